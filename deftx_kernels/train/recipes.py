"""How a vector is learned: LT-SFT and DeFT-X (dense phase, selection, reset, sparse phase) and LIFT.

Every phase starts from a fresh copy of theta0, loaded from its folder: weights, head, optimizer and schedule alike. A
phase whose result is in the run folder is not run again.
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from deftx_kernels.delta import SparseDelta, fingerprint
from deftx_kernels.mask import CSRMask
from deftx_kernels.nn import densify, sparsify
from deftx_kernels.optim import SparseAdamW
from deftx_kernels.train import models, processes
from deftx_kernels.train.callbacks import DivergenceGuard, L1Toward
from deftx_kernels.train.checkpoints import finish, finished, finished_model, newest_checkpoint, save_model
from deftx_kernels.train.config import Recipe, SelectionConfig, to_dict
from deftx_kernels.train.selection import Denoising, largest_changes, lift_mask
from deftx_kernels.train.trainer import Runtime, train_phase
from deftx_kernels.train.vectors import Vector

LIFT_MASKS = ("mask.safetensors", "union.safetensors")  # in a checkpoint: the current mask, and all that were trained


def learn(vector: Vector, recipe: Recipe | str, runtime: Runtime) -> tuple[SparseDelta, dict]:
    """The vector by one recipe (not "full"): (theta2 - theta0 at the selected entries, metrics).

    The dense phase is shared by the recipes deft-x and lt-sft. Written to `vector.folder`: dense/model (theta1) and
    <recipe>/mask.safetensors, with a phase.json of metrics in each folder.
    """
    recipe = Recipe.of(recipe)
    folder, output = vector.folder / recipe.folder, vector.deltas / recipe.folder / vector.name
    if (metrics := finished(folder, partial(_read_result, folder, output, recipe))) is not None:
        return SparseDelta.from_pretrained(output), metrics
    vector = dataclasses.replace(
        vector, config=dataclasses.replace(vector.config, selection=recipe.selection(vector.config.selection))
    )
    if recipe.name == "lift":
        mask, metrics, trained = _lift(vector, folder, runtime)
    else:
        mask, metrics, trained = _lottery_ticket(vector, recipe, folder, runtime)
    saved: list[SparseDelta] = []

    def save() -> None:
        saved.append(difference(vector, trained, mask, recipe))
        saved[0].save_pretrained(output)
        finish(folder, metrics)

    processes.on_main(save)
    return saved[0] if saved else SparseDelta.from_pretrained(output), metrics


def _lottery_ticket(vector: Vector, recipe: Recipe, folder: Path, runtime: Runtime):
    """LT-SFT and DeFT-X: (mask, metrics, theta2).

    Each iteration begins where the one before it ended, and adds entries: the largest of theta1 minus the first start
    that are not in the mask yet (Ansell et al., 2022).
    """
    iterations, mask, current = vector.config.selection.iterations, None, vector
    for number in range(1, iterations + 1):
        part = folder if number == iterations else folder / f"iteration-{number}"
        if number < iterations and finished_model(part, part / "model") is not None:
            mask = CSRMask.load(part / "mask.safetensors")
        else:
            dense_phase(current, runtime)
            mask, selection = _select(vector, recipe, runtime, current.folder / "dense/model", number, mask)
            processes.on_main(partial(_save_mask, mask, part))
            trained, metrics = sparse_phase(current, mask, part, runtime)
            metrics["selection"] = selection
            if number < iterations:
                save_model(trained.to("cpu"), part / "model")
                finish(part, metrics)
        following = folder / f"iteration-{number + 1}"
        current = dataclasses.replace(vector, start=part / "model", folder=following, theta0=vector.start)
    return mask, metrics, trained


def _save_mask(mask: CSRMask, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    mask.save(folder / "mask.safetensors")


def _read_result(folder: Path, output: Path, recipe: Recipe) -> None:
    if recipe.name != "lift":  # which has no single mask
        CSRMask.load(folder / "mask.safetensors")
    if not output.is_dir():  # from_pretrained would look for it on the hub
        raise FileNotFoundError(f"no folder {output}")
    SparseDelta.from_pretrained(output)


def dense_phase(vector: Vector, runtime: Runtime) -> dict:
    """Full fine-tuning theta0 -> theta1, kept as the model folder dense/model. Returns its metrics."""
    folder, phase = vector.folder / "dense", vector.config.dense
    if (metrics := finished_model(folder, folder / "model")) is not None:
        return metrics
    model = load_start(vector, runtime)
    callbacks: tuple[TrainerCallback, ...] = ()
    if phase.l1:
        callbacks = (L1Toward(model, phase.l1 / models.count_parameters(model), _theta0(vector, model)),)
    guard = DivergenceGuard(f"vector {vector.name!r}, dense phase", phase.lr)
    metrics = train_phase(model, vector.examples, vector.config, phase, folder, runtime, guard, callbacks=callbacks)
    save_model(model, folder / "model")
    finish(folder, metrics)
    return metrics


def _theta0(vector: Vector, model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters toward which L1 and weight decay pull, on the model's device."""
    theta0 = model if vector.theta0 is None else vector.load(vector.theta0).to(model.device)
    return {name: p.detach() for name, p in theta0.named_parameters()}


def sparse_phase(vector: Vector, mask: CSRMask, folder: Path, runtime: Runtime) -> tuple[PreTrainedModel, dict]:
    """Fine-tune the entries of `mask` (and the head) of a fresh copy of theta0: (theta2, metrics)."""
    processes.check_mask(mask)
    model, phase = load_start(vector, runtime), vector.config.sparse
    l1 = phase.l1 / models.count_parameters(model)
    start = mask.gather(_theta0(vector, model))
    sparsify(model, mask)
    optimizer = SparseAdamW(
        model.named_parameters(),
        mask,
        lr=phase.lr,
        weight_decay=phase.weight_decay,
        l1=l1,
        decay_to=start if l1 or phase.weight_decay else None,
    )
    guard = DivergenceGuard(f"vector {vector.name!r}, sparse phase of {folder.name}", phase.lr)
    metrics = train_phase(model, vector.examples, vector.config, phase, folder, runtime, guard, optimizer=optimizer)
    return densify(model), metrics


def select(
    recipe: Recipe | str,
    tuned: PreTrainedModel,
    base: PreTrainedModel,
    selection: SelectionConfig,
    iteration: int | None = None,
    before: CSRMask | None = None,
) -> tuple[CSRMask, Denoising]:
    """`largest_changes` over the maskable tensors of theta1 and theta0."""
    raw = () if selection.denoise_embeddings else models.embedding_names(base)
    names = models.maskable_names(base)
    return largest_changes(recipe, tuned, base, names, selection, iteration, before, raw=raw)


def _select(
    vector: Vector, recipe: Recipe | str, runtime: Runtime, tuned: Path, iteration: int, before: CSRMask | None
) -> tuple[CSRMask, dict]:
    """The mask of the model in the folder `tuned` and theta0, and metrics."""

    def find() -> tuple[CSRMask, dict]:
        base, theta1 = load_start(vector, runtime), vector.load(tuned).to(runtime.torch_device)
        began = _clock()
        mask, denoising = select(recipe, theta1, base, vector.config.selection, iteration, before)
        metrics = {"seconds": _clock() - began, **_sizes(mask)}
        return mask, {**metrics, "denoising": denoising} if denoising else metrics

    return processes.mask_of_main(find, runtime.torch_device)


def _sizes(mask: CSRMask) -> dict:
    return {"nnz": mask.nnz, "numel": mask.numel, "density": mask.density}


class RefreshMask(TrainerCallback):
    """LIFT: selects a new mask every few steps; entries in both keep their moments. `union`: all that were trained."""

    def __init__(
        self,
        optimizer: SparseAdamW,
        weights: Mapping[str, Tensor],
        selection: SelectionConfig,
        masks: tuple[CSRMask, ...],
        guard: DivergenceGuard,
    ):
        self.optimizer, self.weights, self.selection, self.guard = optimizer, weights, selection, guard
        self.mask, self.union = masks

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.selection.refresh_every or state.global_step >= state.max_steps:
            return
        self.guard.check_weights(model, state.global_step)
        self.mask, _ = _lift_mask(self.weights, self.selection)
        self.optimizer.update_mask(self.mask)
        self.union = self.union | self.mask

    def save(self, checkpoint: Path) -> None:
        """Write the masks into the folder of a checkpoint, whose optimizer state is in the order of the first."""
        for name, mask in zip(LIFT_MASKS, (self.mask, self.union)):
            mask.save(checkpoint / name)


def _lift_mask(weights: Mapping[str, Tensor], selection: SelectionConfig) -> tuple[CSRMask, Denoising]:
    """`lift_mask`, the same on all ranks."""
    device = next(iter(weights.values())).device
    return processes.mask_of_main(partial(lift_mask, weights, selection), device)


def _lift(vector: Vector, folder: Path, runtime: Runtime) -> tuple[CSRMask, dict, PreTrainedModel]:
    model = load_start(vector, runtime)
    linear = models.linear_names(model)
    for name in set(models.maskable_names(model)) - set(linear):
        model.get_parameter(name).requires_grad_(False)
    weights = {name: model.get_parameter(name).detach() for name in linear}
    selection, phase = vector.config.selection, vector.config.sparse
    began = time.perf_counter()
    mask, denoising = _lift_mask(weights, selection)
    seconds = time.perf_counter() - began
    checkpoint = newest_checkpoint(folder / "checkpoints", LIFT_MASKS)
    masks = (mask, mask) if checkpoint is None else _load_masks(checkpoint, runtime)
    optimizer = SparseAdamW(model.named_parameters(), masks[0], lr=phase.lr, weight_decay=phase.weight_decay)
    guard = DivergenceGuard(f"vector {vector.name!r}, sparse phase of {folder.name}", phase.lr)
    refresh = RefreshMask(optimizer, weights, selection, masks, guard)
    metrics = train_phase(
        model,
        vector.examples,
        vector.config,
        phase,
        folder,
        runtime,
        guard,
        optimizer=optimizer,
        callbacks=(refresh,),
        save_extra=refresh.save,
    )
    metrics["selection"] = {
        "seconds": seconds,
        "refreshes": (metrics["steps"] - 1) // selection.refresh_every,
        **_sizes(mask),
        "trained_in_all": refresh.union.nnz,
        "denoising": denoising,
    }
    head = sum(model.get_parameter(name).numel() for name in models.trained_head(model))
    metrics["trained_entries"] = mask.nnz + head
    return refresh.union, metrics, model


def _load_masks(checkpoint: Path, runtime: Runtime) -> tuple[CSRMask, ...]:
    """The masks that `RefreshMask.save` wrote."""
    return tuple(CSRMask.load(checkpoint / name, device=runtime.torch_device) for name in LIFT_MASKS)


def difference(vector: Vector, trained: PreTrainedModel, mask: CSRMask, recipe: Recipe) -> SparseDelta:
    """theta2 - theta0 at the entries of `mask`, with the head in full for a task vector."""
    start = vector.load(vector.start)
    trained = trained.to("cpu")
    head = models.trained_head(trained) if vector.keep_head else []
    # The whole base, so that an entry that changed outside the mask is an error here.
    names = [name for name, _ in start.named_parameters() if name.startswith(models.base_prefix(start))] + head
    tuned, base = ({name: model.get_parameter(name).detach() for name in names} for model in (trained, start))
    delta = SparseDelta.from_models(tuned, base, mask=mask.to("cpu"), dense=head)
    if not bool(torch.isfinite(delta.values).all()):
        raise ValueError(f"vector {vector.name!r}: a difference of the trained weights and the start overflows float32")
    if vector.base is not None:
        model = vector.load(vector.base)
        weights = {name: model.get_parameter(name).detach() for name in mask.names}
        delta.metadata["base_fingerprint"] = fingerprint(weights)
    settings = to_dict(vector.config)
    delta.metadata |= {"method": str(recipe), "vector": vector.name, "settings": settings, **vector.metadata}
    return delta


def load_start(vector: Vector, runtime: Runtime) -> PreTrainedModel:
    """A fresh copy of theta0 on the training device, with what the vector does not change frozen."""
    model = vector.load(vector.start)
    models.freeze_for_vector(model)
    return model.to(runtime.torch_device)


def _clock() -> float:
    """Seconds; waits for the GPU, if any."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
