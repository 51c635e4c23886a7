"""Sparsified models in `transformers.Trainer` and in TRL's trainers: the optimizer, and deltas in the checkpoints.

    model = get_sparse_model(model, SparseConfig(density=0.01))
    Trainer(
        model, args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args), callbacks=[SaveDeltaCallback()], ...
    ).train()

A trainer needs nothing else. TRL's DPOTrainer and others without this argument take an optimizer:
`factory, kwargs = optimizer_cls_and_kwargs(args)`, then `optimizers=(factory()(model, **kwargs), None)`.

`max_grad_norm` clips what is trained: the values are the parameters that have gradients, the dense tensors have none.
Checkpoints hold dense tensors and values, so that training resumes with `resume_from_checkpoint` in a model sparsified
with the same mask, which the delta in the checkpoint has (`SparseDelta.from_pretrained(checkpoint).mask`). Several GPUs
need a launcher (torchrun, accelerate).

Of a mixture of experts, transformers may save weights under other names than the model's, and `resume_from_checkpoint`
does not load those, of plain models either (it logs "missing keys"). Load them before:
`model.load_state_dict(AutoModelForCausalLM.from_pretrained(checkpoint).state_dict())`. `SaveDeltaCallback` raises an
error where they are missing.

`peft_config`, or `get_peft_model`, beside a sparsified model freezes the values as all other parameters. The optimizer
and the callback raise an error then; a trainer without both of them would train PEFT's adapter alone.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from deftx_kernels.delta import SparseDelta
from deftx_kernels.delta.storage import CONFIG_NAME
from deftx_kernels.integrations.sparse_model import base_record, sparse_delta
from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.shards import is_dtensor
from deftx_kernels.nn import masked_parameters
from deftx_kernels.optim import SparseAdamW


def optimizer_cls_and_kwargs(
    args: TrainingArguments, **options: Any
) -> tuple[Callable[[], Callable[..., SparseAdamW]], dict[str, Any]]:
    """`Trainer(..., optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args))`: SparseAdamW for a sparsified model.

    Learning rate, betas, epsilon and weight decay are those of `args`. As Trainer's own optimizers, it does not decay
    biases and norms. The scheduler is Trainer's.

    Args:
        args: of the trainer (also SFTConfig and others of TRL).
        options: further arguments of `SparseAdamW` (state_dtype, l1, ...), or others than those of `args`.

    Raises:
        ValueError: several GPUs in one process, where Trainer uses DataParallel. When the trainer makes the optimizer:
            the model is not sparsified, or its values are frozen (by PEFT).
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process: Trainer would use DataParallel, which does not copy masks. Start one "
            "process for each GPU (torchrun, accelerate launch), or set CUDA_VISIBLE_DEVICES"
        )
    betas = (args.adam_beta1, args.adam_beta2)
    kwargs: dict[str, Any] = dict(
        lr=args.learning_rate, betas=betas, eps=args.adam_epsilon, weight_decay=args.weight_decay
    )
    return _OptimizerFactory, kwargs | options


class _OptimizerFactory:
    """What Trainer takes for an optimizer that needs the model: `factory()(model, **kwargs)`."""

    def __call__(self, model: nn.Module, **options: Any) -> SparseAdamW:
        masked = _trained(model)
        mask = CSRMask.joined([m.mask for m in masked.values() if m.values.requires_grad or not m.mask.nnz])
        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [(n, p) for n, p in named if n in decayed]},
            {"params": [(n, p) for n, p in named if n not in decayed], "weight_decay": 0.0},
        ]
        return SparseAdamW([g for g in groups if g["params"]], mask, **options)


def _check_loaded(model: nn.Module, saved: SparseDelta) -> None:
    """ValueError where a tensor that a checkpoint's delta changes is the base's."""
    now = sparse_delta(model)
    for name in saved.mask.names:
        if name in now.mask and _changes(saved, name) and not _changes(now, name):
            raise ValueError(
                f"the checkpoint's {name!r} was not loaded: transformers has saved it under another name. Before "
                "training, model.load_state_dict(AutoModelForCausalLM.from_pretrained(checkpoint).state_dict())"
            )


def _changes(delta: SparseDelta, name: str) -> bool:
    return bool(delta.restricted({name: name}).values.any())


class SaveDeltaCallback(TrainerCallback):
    """Saves the delta of a model of `get_sparse_model` in each checkpoint, and at the end in `output_dir`.

    With `push_to_hub`, each saved delta is uploaded to the trainer's repository as well (unless `hub_strategy` is
    "end": the delta in `output_dir` is part of `trainer.push_to_hub()`). An upload that fails is a warning.

    Args:
        dtype: a 16-bit dtype of the stored values (lossy), as in `SparseDelta.save_pretrained`.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def on_train_begin(self, args, state, control, model=None, **_):
        """ValueError unless the model is sparsified, its values are trained and, if training is resumed from a
        checkpoint in `output_dir`, were loaded.
        """
        _trained(model)
        base_record(model)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.global_step and (folder / CONFIG_NAME).is_file() and not _is_sharded(model):
            _check_loaded(model, SparseDelta.from_pretrained(folder))

    def on_save(self, args, state, control, model=None, **_):
        """Write the delta into the new checkpoint, and upload it."""
        if (delta := _delta(model, state)) is None:
            return
        delta.save_pretrained(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.dtype)
        if not args.push_to_hub or args.hub_strategy == HubStrategy.END:
            return
        repository = args.hub_model_id or Path(args.output_dir).absolute().name  # as in Trainer
        try:
            delta.push_to_hub(
                repository,
                dtype=self.dtype,
                private=args.hub_private_repo,
                token=args.hub_token,
                commit_message=f"Sparse delta, step {state.global_step}",
            )
        except Exception as error:  # of the network: training goes on, the delta is in the checkpoint
            warnings.warn(f"the delta was not pushed to {repository!r}: {error}", RuntimeWarning, stacklevel=2)

    def on_train_end(self, args, state, control, model=None, **_):
        """Write the delta of the trained model (the best one, with `load_best_model_at_end`) into `output_dir`."""
        if (delta := _delta(model, state)) is not None:
            delta.save_pretrained(args.output_dir, self.dtype)


def _delta(model: nn.Module, state: TrainerState) -> SparseDelta | None:
    """The delta, on the main process. All ranks gather that of a model which is sharded with FSDP2."""
    is_needed = _is_sharded(model) or state.is_world_process_zero
    delta = sparse_delta(model, {"step": state.global_step}) if is_needed else None
    return delta if state.is_world_process_zero else None


def _is_sharded(model: nn.Module) -> bool:
    return any(is_dtensor(m.values) for m in masked_parameters(model).values())


def _trained(model: nn.Module) -> dict[str, Any]:
    """The model's masked parameters. ValueError unless there are some and one of them is trained."""
    masked = masked_parameters(model)
    if not masked:
        raise ValueError("model is not sparsified: call get_sparse_model(model, config) or sparsify(model, mask) first")
    if not any(m.values.requires_grad for m in masked.values() if m.mask.nnz):
        raise ValueError(
            "the values of this sparsified model are frozen, so that none would be trained. get_peft_model, which a "
            "trainer calls for peft_config, freezes them: drop peft_config, or densify(model) before"
        )
    return masked
