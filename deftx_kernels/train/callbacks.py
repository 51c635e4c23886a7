"""Callbacks of transformers.Trainer: divergence, costs, L1, epochs of the MLM masks, the progress bar."""

import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from deftx_kernels.files import read_json
from deftx_kernels.train.models import check_finite
from deftx_kernels.train.tensors import gradient_bytes, state_bytes
from deftx_kernels.train.tokens import MaskedLanguageCollator


class DivergenceGuard(TrainerCallback):
    """Stops a phase whose loss, gradients or weights are NaN or infinite, before a checkpoint is made of it.

    Args:
        phase: the phase's name in errors.
        lr: its learning rate.
    """

    def __init__(self, phase: str, lr: float):
        self.phase, self.lr = phase, lr

    def on_step_end(self, args, state, control, **_):
        # Logs the loss with each checkpoint, so that it is checked first, and so that the mean losses of a resumed run
        # are those of an uninterrupted one.
        control.should_log |= control.should_save

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, **_):
        for name, value in (logs or {}).items():
            if name.endswith(("loss", "grad_norm")) and not math.isfinite(value):
                raise self.error(f"{name} is {value}", state.global_step)

    def check_weights(self, model: nn.Module, step: int) -> None:
        """Raises ValueError naming a tensor that is not finite."""
        try:
            check_finite(model, "the model")
        except ValueError as error:
            raise self.error(str(error), step) from None

    def no_gain(self, before: float, after: float) -> str:
        """The warning about a phase that did not lower the loss of the validation text."""
        return (
            f"{self.phase}: with learning rate {self.lr:g} the validation loss went from {before:.3f} to {after:.3f}; "
            "try a smaller one, or warmup_steps"
        )

    def error(self, what: str, step: int) -> ValueError:
        """The error to raise."""
        return ValueError(
            f"{self.phase}: training diverged at step {step} with learning rate {self.lr:g} ({what}); the phase counts "
            "as not finished: choose a smaller learning rate"
        )


class CostMeter(TrainerCallback, ExportableState):
    """Measures seconds of each optimizer step, and bytes of gradients and optimizer state, counted from tensors."""

    def __init__(self):
        self.step_seconds: list[float] = []
        self.gradient_bytes = 0
        self.state_bytes = 0
        self.trained_entries = 0
        self._began = 0.0

    def on_step_begin(self, args, state, control, **_):
        self._began = time.perf_counter()

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **_):
        if not self.gradient_bytes:
            self.trained_entries = sum(p.numel() for p in model.parameters() if p.grad is not None)
            self.gradient_bytes = gradient_bytes(model)
            self.state_bytes = state_bytes(optimizer)

    def on_step_end(self, args, state, control, **_):
        if torch.cuda.is_available() and not args.use_cpu:
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - self._began)

    def state(self) -> dict:
        """The measurements for Trainer's checkpoint: a phase may be resumed when no step is left to measure."""
        names = ("gradient_bytes", "state_bytes", "trained_entries")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def restore(self, checkpoint: Path) -> None:
        """Continue from the state in a checkpoint."""
        state = read_json(checkpoint / "trainer_state.json")["stateful_callbacks"]["CostMeter"]["attributes"]
        for name, value in state.items():
            setattr(self, name, value)

    def metrics(self) -> dict:
        """The measurements as JSON values."""
        return {
            "trained_entries": self.trained_entries,
            "gradient_bytes": self.gradient_bytes,
            "optimizer_state_bytes": self.state_bytes,
            "median_step_seconds": statistics.median(self.step_seconds) if self.step_seconds else None,
        }


class L1Toward(TrainerCallback):
    """Adds the gradient of weight * sum|theta - start| to dense gradients, once an optimizer step."""

    def __init__(self, model: nn.Module, weight: float, start: Mapping[str, Tensor]):
        self.weight = weight
        self.start = {name: start[name].clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        for name, parameter in model.named_parameters():
            if name in self.start and parameter.grad is not None:
                start = self.start[name] = self.start[name].to(parameter.device)
                parameter.grad.add_(torch.sign(parameter.detach() - start), alpha=self.weight)


class EpochToCollator(TrainerCallback):
    """Sets the MLM collator's epoch, on which its masks depend."""

    def __init__(self, collator: MaskedLanguageCollator):
        self.collator = collator

    def on_epoch_begin(self, args, state, control, **_):
        self.collator.epoch = int((state.epoch or 0) + 1e-6)


class QuietProgress(ProgressCallback):
    """Trainer's progress bar with the loss beside it, instead of printed dictionaries."""

    def on_log(self, args, state, control, logs=None, **_):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
