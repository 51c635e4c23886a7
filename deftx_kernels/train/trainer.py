"""One training phase on transformers.Trainer with its costs, and evaluation."""

import contextlib
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from deftx_kernels.delta import SparseDelta, compose
from deftx_kernels.nn import masked_parameters
from deftx_kernels.train import processes
from deftx_kernels.train.callbacks import CostMeter, DivergenceGuard, EpochToCollator, QuietProgress
from deftx_kernels.train.checkpoints import newest_checkpoint, saving
from deftx_kernels.train.config import PhaseConfig, VectorConfig
from deftx_kernels.train.global_batches import GlobalBatchTrainer, SeedOfRank
from deftx_kernels.train.metrics import classification_metrics
from deftx_kernels.train.sources import LanguageBatches, SourceVectors
from deftx_kernels.train.tokens import IGNORED, MaskedLanguageCollator


@dataclass
class Runtime:
    """Settings of a run that all its phases share."""

    seed: int = 0
    device: str = "auto"
    """ "auto" or "cpu"."""
    report_to: tuple[str, ...] = ()
    callbacks: tuple[TrainerCallback, ...] = ()
    """Further callbacks for every phase."""

    @property
    def bf16(self) -> bool:
        """Whether training uses bfloat16 autocast: on GPUs that have it."""
        return self.device != "cpu" and torch.cuda.is_available() and torch.cuda.is_bf16_supported()

    @property
    def torch_device(self) -> torch.device:
        """Where training runs: the current CUDA device, or the CPU."""
        if self.device == "cpu" or not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


@dataclass
class Examples:
    """The tokenized data of a phase."""

    train: Dataset
    validation: Dataset | None
    collator: Callable
    masked_lm: bool = False
    vocabulary: Tensor | None = None
    """Ids [tokens] of the tokens that masked positions are predicted among, ascending; None: all."""
    labels: list[str] = field(default_factory=list)
    metric: str = "macro_f1"
    """The score that chooses the best checkpoint."""
    source_vectors: SourceVectors | None = None
    """Where given, each batch has examples of one language (column `language`), with its vector applied."""


# ---- trainers ----


class VectorTrainer(GlobalBatchTrainer):
    """A Trainer that also saves sparsified models, for whose tied values `save_pretrained` raises.

    A checkpoint of diverged weights is not written, and one that is incomplete because the disk is full is deleted.
    """

    source_vectors: SourceVectors | None = None
    save_extra: Callable[[Path], None] | None = None
    """Writes further files of a checkpoint into its folder."""
    averages_accumulated = False
    """Whether `compute_loss` is a mean over all accumulated batches, not over one batch."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        # Trainer takes it for granted of models with **kwargs. Classifiers have them, but their loss is the mean of a
        # batch: Trainer would not divide it by the accumulation steps.
        self.model_accepts_loss_kwargs = self.averages_accumulated

    def training_step(self, model, inputs, num_items_in_batch=None):
        with self._source_vector(inputs):
            return super().training_step(model, inputs, num_items_in_batch)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with self._source_vector(inputs):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)

    def _source_vector(self, inputs: dict) -> contextlib.AbstractContextManager:
        """The vector of the batch's language in the weights, where there are source vectors."""
        if self.source_vectors is None:
            return contextlib.nullcontext()
        (language,) = set(inputs.pop("language").tolist())
        return self.source_vectors.applied(self.accelerator.unwrap_model(self.model), language)

    def evaluation_loop(self, *arguments, **options):
        if self.source_vectors is not None:
            # The last batch of every language may be smaller. Trainer's default cuts the last one of all of them to
            # what is left of the sum of their examples.
            self.gather_function = self.accelerator.gather
        return super().evaluation_loop(*arguments, **options)

    def get_train_dataloader(self):
        if self.source_vectors is None:
            return super().get_train_dataloader()
        return self._batches_of_one_language(self.train_dataset, self.args.train_batch_size, self.args.seed)

    def get_eval_dataloader(self, eval_dataset=None):
        if self.source_vectors is None:
            return super().get_eval_dataloader(eval_dataset)
        return self._batches_of_one_language(eval_dataset or self.eval_dataset, self.args.eval_batch_size, None)

    def _batches_of_one_language(self, dataset, batch_size: int, seed: int | None) -> DataLoader:
        batches = LanguageBatches(dataset["language"], batch_size * processes.world_size(), seed)
        if processes.world_size() > 1:
            return self.divided(dataset, batch_sampler=batches)
        return self.accelerator.prepare(DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator))

    def _save_checkpoint(self, model, trial):
        guard = next(callback for callback in self.callback_handler.callbacks if isinstance(callback, DivergenceGuard))
        guard.check_weights(self.model, self.state.global_step)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            with saving(folder):
                if self.save_extra is not None and self.args.should_save:
                    folder.mkdir(parents=True, exist_ok=True)
                    self.save_extra(folder)
                super()._save_checkpoint(model, trial)
        except OSError:
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        processes.barrier()  # trainer_state.json is written next: a checkpoint with it has the states of all ranks

    def save_model(self, output_dir=None, _internal_call=False):
        if not masked_parameters(self.model) or self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            state = self.model.state_dict()
            once = {id(tensor): name for name, tensor in self.model.state_dict(keep_vars=True).items()}
            tensors = {name: state[name].contiguous() for name in once.values()}
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class MaskedLanguageTrainer(VectorTrainer):
    """A Trainer whose MLM loss computes logits only at the masked positions.

    15 % of the positions are masked; the [batch, length, vocabulary] logits of the others, the largest tensor of the
    step, are never computed. With a `vocabulary`, neither are those of other tokens.
    """

    def use_vocabulary(self, tokens: Tensor) -> None:
        """Predict masked positions among `tokens` [count], ids in ascending order. The decoder's weight is frozen."""
        decoder = self.model.get_output_embeddings()
        tokens = tokens.to(decoder.weight.device)
        weight = decoder.weight.detach()[tokens]
        self.column = torch.full((len(decoder.weight),), IGNORED, device=tokens.device)
        self.column[tokens] = torch.arange(len(tokens), device=tokens.device)

        def forward(hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, weight, None if decoder.bias is None else decoder.bias[tokens])

        decoder.forward = forward

    averages_accumulated = True
    column: Tensor | None = None  # of each token among the logits

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {name: value for name, value in inputs.items() if name not in ("rows", "share")}
        labels = inputs.pop("labels")
        masked = labels != IGNORED  # [batch, length]

        def keep_masked(_, arguments):
            return (arguments[0][masked], *arguments[1:])

        hook = mlm_head(self.accelerator.unwrap_model(model)).register_forward_pre_hook(keep_masked)
        try:
            outputs = model(**inputs)
        finally:
            hook.remove()
        targets = labels[masked] if self.column is None else self.column[labels[masked]]
        total = nn.functional.cross_entropy(outputs.logits.float(), targets, reduction="sum")
        if num_items_in_batch is None:
            loss = total / masked.sum().clamp(min=1)
        else:  # those of all ranks, whose losses DDP averages
            loss = total / num_items_in_batch * processes.world_size()
        return (loss, {"logits": outputs.logits}) if return_outputs else loss


def mlm_head(model: PreTrainedModel) -> nn.Module:
    """The child of the model, beside its base, that ends in the output layer."""
    decoder = model.get_output_embeddings()
    for child in model.children():
        if child is not model.base_model and any(module is decoder for module in child.modules()):
            return child
    raise ValueError(f"{type(model).__name__}: its MLM head is not beside its base model")


# ---- training ----


def training_arguments(
    folder: Path, vector: VectorConfig, phase: PhaseConfig, runtime: Runtime, validated: bool, examples: Examples
) -> TrainingArguments:
    """Trainer's arguments for one phase."""
    every = phase.eval_every
    # Without keep_best and eval_every a phase is short, and is run again from its start: no checkpoints.
    save_strategy = "steps" if every is not None else "epoch" if phase.keep_best else "no"
    best, masked_lm, ranks = phase.keep_best and validated, examples.masked_lm, processes.world_size()
    return TrainingArguments(
        output_dir=str(folder.absolute() / "checkpoints"),  # Trainer stores it: a run may continue from elsewhere
        per_device_train_batch_size=vector.batch_size // ranks,
        per_device_eval_batch_size=-(-max(32, vector.batch_size) // ranks),
        gradient_accumulation_steps=vector.accumulation,
        num_train_epochs=phase.epochs,
        max_steps=phase.max_steps or -1,
        learning_rate=phase.lr,
        lr_scheduler_type="linear",
        warmup_steps=phase.warmup_steps,
        weight_decay=phase.weight_decay,
        max_grad_norm=phase.max_grad_norm,
        seed=runtime.seed,
        data_seed=runtime.seed,
        bf16=runtime.bf16,
        use_cpu=runtime.torch_device.type == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
        eval_strategy=save_strategy if validated else "no",
        eval_steps=every,
        save_strategy=save_strategy,
        save_steps=every or 500,
        save_total_limit=2,
        load_best_model_at_end=best,
        metric_for_best_model=("loss" if masked_lm else examples.metric) if best else None,
        greater_is_better=(not masked_lm) if best else None,
        prediction_loss_only=masked_lm,
        logging_steps=10,
        logging_nan_inf_filter=False,
        log_level_replica="error",
        disable_tqdm=not sys.stderr.isatty(),
        report_to=list(runtime.report_to) or "none",
        **({"train_sampling_strategy": "group_by_length"} if vector.group_by_length else {}),
    )


def train_phase(
    model: PreTrainedModel,
    examples: Examples,
    vector: VectorConfig,
    phase: PhaseConfig,
    folder: Path,
    runtime: Runtime,
    guard: DivergenceGuard,
    optimizer: torch.optim.Optimizer | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    save_extra: Callable[[Path], None] | None = None,
) -> dict:
    """Train `model`'s trainable parameters in place. Continues from a checkpoint in `folder`, if any.

    Args:
        optimizer: fused AdamW over the trainable parameters by default.
        save_extra: writes further files of a checkpoint into its folder.

    Returns:
        Metrics as JSON values: costs, losses by step, validation losses and scores by step, the best score; of masked
        language modelling the perplexity of the validation text before and after, and among how many tokens it is.

    Raises:
        ValueError: the loss or the weights became NaN or infinite; earlier checkpoints are kept.
        OSError: a checkpoint cannot be written.
    """
    validated = examples.validation is not None and len(examples.validation) > 0
    args = training_arguments(folder, vector, phase, runtime, validated, examples)
    if args.n_gpu > 1:  # DataParallel would copy masked modules without their masks
        args._n_gpu = 1
    meter = CostMeter()
    trainer = (MaskedLanguageTrainer if examples.masked_lm else VectorTrainer)(
        model=model,
        args=args,
        data_collator=examples.collator,
        train_dataset=examples.train,
        eval_dataset=examples.validation if validated else None,
        compute_metrics=None if examples.masked_lm else partial(classification_metrics, labels=examples.labels),
        optimizers=(optimizer, None),
        callbacks=[guard, meter, SeedOfRank(), *callbacks, *runtime.callbacks],
    )
    if examples.vocabulary is not None:
        trainer.use_vocabulary(examples.vocabulary)
    trainer.source_vectors, trainer.save_extra = examples.source_vectors, save_extra
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(QuietProgress())
    if isinstance(examples.collator, MaskedLanguageCollator):
        trainer.add_callback(EpochToCollator(examples.collator))
    last = newest_checkpoint(folder / "checkpoints")
    if last is not None:
        meter.restore(last)
    measures_perplexity = examples.masked_lm and validated
    before = trainer.evaluate()["eval_loss"] if measures_perplexity else None
    began = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    guard.check_weights(model, trainer.state.global_step)
    processes.check_weights(model)
    _check_loss(trainer, guard)
    metrics = {**meter.metrics(), "seconds": time.perf_counter() - began, **_history(trainer, examples.metric)}
    if before is not None:
        best = trainer.state.best_metric
        after = best if best is not None else trainer.evaluate()["eval_loss"]
        tokens = model.get_output_embeddings().weight if examples.vocabulary is None else examples.vocabulary
        metrics["perplexity"] = {"before": _perplexity(before), "after": _perplexity(after), "tokens": len(tokens)}
        if after >= before:
            warnings.warn(guard.no_gain(before, after), RuntimeWarning, stacklevel=2)
    if examples.vocabulary is not None:
        del model.get_output_embeddings().forward  # that of the class again
    processes.barrier()  # rank 0 deletes the checkpoints, which every rank may have read
    metrics["world_size"] = processes.world_size()
    return {**metrics, "resumed_from": None if last is None else last.name}


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # above, it overflows


def _history(trainer: Trainer, metric: str) -> dict:
    """The losses and scores of a phase by step, as JSON values."""
    logs = trainer.state.log_history
    found = {
        "steps": trainer.state.global_step,
        "loss": [[log["step"], log["loss"]] for log in logs if "loss" in log],
        "best_validation": trainer.state.best_metric,
    }
    for name in ("loss", metric):
        if values := [[log["step"], log[f"eval_{name}"]] for log in logs if f"eval_{name}" in log]:
            found[f"validation_{name}"] = values
    return found


def _check_loss(trainer: Trainer, guard: DivergenceGuard) -> None:
    """ValueError where the trained model's loss is not finite: finite weights can be too large for finite outputs."""
    with torch.no_grad(), trainer.compute_loss_context_manager():
        batch = next(iter(trainer.get_train_dataloader()))
        batch.pop("language", None)
        batch = {n: x.to(trainer.args.device) if isinstance(x, Tensor) else x for n, x in batch.items()}
        loss = trainer.compute_loss(trainer.model.eval(), batch).item()
    if not math.isfinite(loss):
        raise guard.error(f"the loss after it is {loss}", trainer.state.global_step)


# ---- evaluation ----


def evaluate(
    model: PreTrainedModel, dataset: Dataset, collator, runtime: Runtime, batch_size: int = 64
) -> dict[str, float]:
    """{"macro_f1", "accuracy", "n"} of a classifier on a tokenized data set; with entity tags also "entity_f1".

    Raises:
        ValueError: an output of the model is NaN or infinite.
    """
    processes.join(runtime.device)
    lengths = [len(ids) for ids in dataset["input_ids"]]
    by_length = dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__))  # less padding
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=-(-batch_size // processes.world_size()),
            bf16=runtime.bf16,
            use_cpu=runtime.torch_device.type == "cpu",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            log_level_replica="error",
            report_to="none",
        )
        prediction = GlobalBatchTrainer(model=model, args=args, data_collator=collator).predict(by_length)
    if not np.isfinite(prediction.predictions).all():
        raise ValueError("evaluation: outputs of the model are NaN or infinite, so it is not scored")
    labels = [model.config.id2label[i] for i in range(model.config.num_labels)]
    return classification_metrics(prediction, labels)


@contextlib.contextmanager
def with_deltas(model: PreTrainedModel, deltas: Sequence[SparseDelta]):
    """`model` with the sum of `deltas` added; restored exactly at the end."""
    if not deltas:
        yield model
        return
    total = deltas[0] if len(deltas) == 1 else compose(*deltas)
    with total.applied(model):
        yield model
