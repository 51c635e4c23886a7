"""How a vector is learned: LT-SFT and DeFT-X (dense phase, selection, reset, sparse phase) and LIFT.

Every phase starts from a fresh copy of theta0, loaded from its folder: weights, head, optimizer and schedule alike. A
phase whose result is in the run folder is not run again.
"""

import dataclasses
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from deftx_kernels.delta import SparseDelta, fingerprint
from deftx_kernels.mask import CSRMask
from deftx_kernels.nn import densify, sparsify
from deftx_kernels.optim import SparseAdamW
from deftx_kernels.select import low_rank_mask, select_mask
from deftx_kernels.train import models
from deftx_kernels.train.checkpoints import finish, finished, finished_model, save_model
from deftx_kernels.train.config import Recipe, SelectionConfig, to_dict
from deftx_kernels.train.trainer import DivergenceGuard, L1Toward, Runtime, train_phase
from deftx_kernels.train.vectors import Vector

LIFT_RANK = 128
Denoising = dict[str, dict[str, float]]  # matrix → rank of its signal, share of the energy in it, relative residual


def learn(vector: Vector, recipe: Recipe, runtime: Runtime) -> tuple[SparseDelta, dict]:
    """The vector by one recipe ("deft-x", "lt-sft" or "lift"): (theta2 - theta0 at the selected entries, metrics).

    The dense phase is shared by deft-x and lt-sft. Written to `vector.folder`: dense/model (theta1) and
    <recipe>/mask.safetensors, with a phase.json of metrics in each folder.
    """
    folder, output = vector.folder / recipe, vector.deltas / recipe / vector.name
    if (metrics := finished(folder, partial(_read_result, folder, output, recipe))) is not None:
        return SparseDelta.from_pretrained(output), metrics
    folder.mkdir(parents=True, exist_ok=True)
    if recipe == "lift":
        mask, metrics, trained = _lift(vector, folder, runtime)
    else:
        dense_phase(vector, runtime)
        mask, selection = _select(vector, recipe, runtime)
        mask.save(folder / "mask.safetensors")
        trained, metrics = sparse_phase(vector, mask, folder, runtime)
        metrics["selection"] = selection
    delta = difference(vector, trained, mask, recipe)
    delta.save_pretrained(output)
    finish(folder, metrics)
    return delta, metrics


def _read_result(folder: Path, output: Path, recipe: Recipe) -> None:
    if recipe != "lift":  # which has no single mask
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
    callbacks = (L1Toward(model, phase.l1 / models.count_parameters(model)),) if phase.l1 else ()
    guard = DivergenceGuard(f"vector {vector.name!r}, dense phase", phase.lr)
    metrics = train_phase(model, vector.examples, vector.config, phase, folder, runtime, guard, callbacks=callbacks)
    save_model(model, folder / "model")
    finish(folder, metrics)
    return metrics


def sparse_phase(vector: Vector, mask: CSRMask, folder: Path, runtime: Runtime) -> tuple[PreTrainedModel, dict]:
    """Fine-tune the entries of `mask` (and the head) of a fresh copy of theta0: (theta2, metrics)."""
    model, phase = load_start(vector, runtime), vector.config.sparse
    l1 = phase.l1 / models.count_parameters(model)
    start = mask.gather(dict(model.named_parameters()))
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
    recipe: Recipe, tuned: PreTrainedModel, base: PreTrainedModel, selection: SelectionConfig
) -> tuple[CSRMask, Denoising]:
    """The mask of theta1 and theta0: the largest entries of their difference, which deft-x denoises before."""
    names = models.maskable_names(base)
    arguments: dict[str, Any] = {"k": selection.k} if selection.k is not None else {"density": selection.density}
    arguments |= {"names": names, "scope": selection.scope}
    if recipe == "lt-sft":
        return select_mask(tuned, base, **arguments), {}
    raw = () if selection.denoise_embeddings else models.embedding_names(base)
    mask, info = select_mask(
        tuned,
        base,
        rank=selection.rank,
        energy=selection.energy,
        residual_density=selection.residual_density,
        denoise_names=[name for name in names if name not in raw],
        return_info=True,
        **arguments,
    )
    return mask, _denoising(info)


def lift_mask(weights: Mapping[str, Tensor], selection: SelectionConfig) -> tuple[CSRMask, Denoising]:
    """LIFT's mask: in each weight matrix W the largest entries of |W_r|, its rank-r approximation."""
    rank = selection.rank if selection.rank is not None else LIFT_RANK
    size = {"density": selection.density} if selection.k is None else {"k": selection.k, "scope": "global"}
    mask, info = low_rank_mask(weights, rank=rank, return_info=True, **size)
    return mask, _denoising(info)


def _denoising(info: Mapping[str, dict[str, Tensor] | None]) -> Denoising:
    return {
        name: {k: v.double().mean().item() for k, v in found.items()}
        for name, found in info.items()
        if found is not None
    }


def _select(vector: Vector, recipe: Recipe, runtime: Runtime) -> tuple[CSRMask, dict]:
    base = load_start(vector, runtime)
    tuned = vector.load(vector.folder / "dense/model").to(runtime.torch_device)
    began = _clock()
    mask, denoising = select(recipe, tuned, base, vector.config.selection)
    metrics = {"seconds": _clock() - began, **_sizes(mask)}
    return mask, {**metrics, "denoising": denoising} if denoising else metrics


def _sizes(mask: CSRMask) -> dict:
    return {"nnz": mask.nnz, "numel": mask.numel, "density": mask.density}


class RefreshMask(TrainerCallback):
    """LIFT: selects a new mask every few steps; entries in both keep their moments. `union`: all that were trained."""

    def __init__(
        self,
        optimizer: SparseAdamW,
        weights: Mapping[str, Tensor],
        selection: SelectionConfig,
        mask: CSRMask,
        guard: DivergenceGuard,
    ):
        self.optimizer, self.weights, self.selection, self.union = optimizer, weights, selection, mask
        self.guard = guard
        self.refreshes = 0

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.selection.refresh_every or state.global_step >= state.max_steps:
            return
        self.guard.check_weights(model, state.global_step)
        mask, _ = lift_mask(self.weights, self.selection)
        self.optimizer.update_mask(mask)
        self.union = self.union | mask
        self.refreshes += 1


def _lift(vector: Vector, folder: Path, runtime: Runtime) -> tuple[CSRMask, dict, PreTrainedModel]:
    model = load_start(vector, runtime)
    linear = models.linear_names(model)
    for name in set(models.maskable_names(model)) - set(linear):
        model.get_parameter(name).requires_grad_(False)
    weights = {name: model.get_parameter(name).detach() for name in linear}
    selection = vector.config.selection
    # The mask changes during training and is not part of a checkpoint, so the phase has none.
    phase = dataclasses.replace(vector.config.sparse, keep_best=False, eval_every=None)
    began = time.perf_counter()
    mask, denoising = lift_mask(weights, selection)
    seconds = time.perf_counter() - began
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=phase.lr, weight_decay=phase.weight_decay)
    guard = DivergenceGuard(f"vector {vector.name!r}, sparse phase of lift", phase.lr)
    refresh = RefreshMask(optimizer, weights, selection, mask, guard)
    metrics = train_phase(
        model, vector.examples, vector.config, phase, folder, runtime, guard, optimizer=optimizer, callbacks=(refresh,)
    )
    metrics["selection"] = {
        "seconds": seconds,
        "refreshes": refresh.refreshes,
        **_sizes(mask),
        "trained_in_all": refresh.union.nnz,
        "denoising": denoising,
    }
    head = sum(model.get_parameter(name).numel() for name in models.trained_head(model))
    metrics["trained_entries"] = mask.nnz + head
    return refresh.union, metrics, model


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
    delta.metadata |= {"method": recipe, "vector": vector.name, "settings": settings, **vector.metadata}
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
