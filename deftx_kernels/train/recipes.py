"""How a vector is learned: LT-SFT and DeFT-X (dense phase, selection, reset, sparse phase) and LIFT.

Every phase starts from a fresh copy of theta0, loaded from its folder: weights, head, optimizer and schedule alike. A
phase whose result is in the run folder is not run again.
"""

import dataclasses
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from deftx_kernels.delta import SparseDelta, fingerprint
from deftx_kernels.files import read_json, write_json
from deftx_kernels.mask import CSRMask
from deftx_kernels.nn import densify, sparsify
from deftx_kernels.optim import SparseAdamW
from deftx_kernels.select import low_rank_mask, select_mask
from deftx_kernels.train import models
from deftx_kernels.train.checkpoints import check_weights, fault_of, remove_checkpoints
from deftx_kernels.train.config import PhaseConfig, Recipe, SelectionConfig, VectorConfig, to_dict
from deftx_kernels.train.tensors import saving
from deftx_kernels.train.trainer import DivergenceGuard, Examples, L1Toward, Runtime, train_phase

LIFT_RANK = 128


@dataclass
class Vector:
    """One vector to learn: what it starts from, what it is trained on, and where things are kept."""

    name: str
    start: Path
    """Folder of theta0, a transformers model folder."""
    load: Callable[[Path], PreTrainedModel]
    examples: Examples
    config: VectorConfig
    folder: Path
    """Where its phases are kept."""
    deltas: Path
    """The vector by a recipe is saved as deltas/<recipe>/<name>."""
    keep_head: bool
    """Whether the head belongs to the vector (a task) or is dropped (a language)."""
    base: Path | None = None
    """Folder of the model that the vector will be added to, where that is not theta0 (a task trained on top of a source
    language vector)."""
    metadata: dict = field(default_factory=dict)


def learn(vector: Vector, recipe: Recipe, runtime: Runtime) -> tuple[SparseDelta, dict]:
    """The vector by one recipe ("deft-x", "lt-sft" or "lift"): (theta2 - theta0 at the selected entries, facts).

    The dense phase is shared by deft-x and lt-sft. Written to `vector.folder`: dense/model (theta1) and
    <recipe>/mask.safetensors, with a phase.json of facts in each folder.
    """
    folder, output = vector.folder / recipe, vector.deltas / recipe / vector.name
    if (facts := finished(folder, partial(_read_vector, folder, output, recipe))) is not None:
        return SparseDelta.from_pretrained(output), facts
    folder.mkdir(parents=True, exist_ok=True)
    if recipe == "lift":
        mask, facts, trained = _lift(vector, folder, runtime)
    else:
        dense_phase(vector, runtime)
        mask, selection = _select(vector, recipe, runtime)
        mask.save(folder / "mask.safetensors")
        trained, facts = sparse_phase(vector, mask, vector.config.sparse, folder, runtime)
        facts["selection"] = selection
    delta = difference(vector, trained, mask, recipe)
    delta.save_pretrained(output)
    finish(folder, facts)
    return delta, facts


def _read_vector(folder: Path, output: Path, recipe: Recipe) -> None:
    if recipe != "lift":  # which has no single mask
        CSRMask.load(folder / "mask.safetensors")
    if not output.is_dir():  # from_pretrained would ask the hub for it
        raise FileNotFoundError(f"no folder {output}")
    SparseDelta.from_pretrained(output)


def dense_phase(vector: Vector, runtime: Runtime) -> dict:
    """Full fine-tuning theta0 -> theta1, kept as the model folder dense/model. Returns its facts."""
    folder = vector.folder / "dense"
    if (facts := finished_model(folder, folder / "model")) is not None:
        return facts
    model = load_start(vector, runtime)
    callbacks: tuple[TrainerCallback, ...] = ()
    if vector.config.dense.l1:
        callbacks = (L1Toward(model, vector.config.dense.l1 / count_parameters(model)),)
    guard = DivergenceGuard(f"vector {vector.name!r}, dense phase", vector.config.dense.lr)
    facts = train_phase(
        model, vector.examples, vector.config, vector.config.dense, folder, runtime, guard, callbacks=callbacks
    )
    save_model(model, folder / "model")
    finish(folder, facts)
    return facts


def sparse_phase(
    vector: Vector, mask: CSRMask, phase: PhaseConfig, folder: Path, runtime: Runtime
) -> tuple[PreTrainedModel, dict]:
    """Fine-tune a fresh copy of theta0 at the entries of `mask` (and the head): (theta2, facts)."""
    model = load_start(vector, runtime)
    l1 = phase.l1 / count_parameters(model)
    start = mask.gather(dict(model.named_parameters()))
    sparsify(model, mask)
    optimizer = SparseAdamW(
        model.named_parameters(), mask, lr=phase.lr, weight_decay=phase.weight_decay, l1=l1,
        decay_to=start if l1 or phase.weight_decay else None,
    )  # fmt: skip
    guard = DivergenceGuard(f"vector {vector.name!r}, sparse phase of {folder.name}", phase.lr)
    facts = train_phase(model, vector.examples, vector.config, phase, folder, runtime, guard, optimizer=optimizer)
    return densify(model), facts


def select(
    recipe: Recipe, tuned: PreTrainedModel, base: PreTrainedModel, selection: SelectionConfig
) -> tuple[CSRMask, dict[str, dict[str, float]]]:
    """The mask of theta1 and theta0: by deft-x the largest entries of the denoised difference, by lt-sft of the
    difference.

    Also what denoising found in each matrix (`denoising_facts`; nothing for lt-sft).
    """
    names = models.maskable_names(base)
    arguments: dict[str, Any] = {"k": selection.k} if selection.k is not None else {"density": selection.density}
    arguments |= {"names": names, "scope": selection.scope}
    if recipe == "lt-sft":
        return select_mask(tuned, base, **arguments), {}
    raw = () if selection.denoise_embeddings else models.embedding_names(base)
    mask, info = select_mask(
        tuned, base, rank=selection.rank, energy=selection.energy, residual_density=selection.residual_density,
        denoise_names=[name for name in names if name not in raw], return_info=True, **arguments,
    )  # fmt: skip
    return mask, denoising_facts(info)


def denoising_facts(info: Mapping[str, dict[str, Tensor] | None]) -> dict[str, dict[str, float]]:
    """Name of a matrix → rank of its signal, share of the energy in it, and relative residual of the denoised matrix."""
    return {
        name: {k: v.double().mean().item() for k, v in found.items()}
        for name, found in info.items()
        if found is not None
    }


def _select(vector: Vector, recipe: Recipe, runtime: Runtime) -> tuple[CSRMask, dict]:
    base = load_start(vector, runtime)
    tuned = vector.load(vector.folder / "dense" / "model").to(torch_device(runtime))
    synchronize()
    began = time.perf_counter()
    mask, denoising = select(recipe, tuned, base, vector.config.selection)
    synchronize()
    facts = {"seconds": time.perf_counter() - began, "nnz": mask.nnz, "numel": mask.numel, "density": mask.density}
    return mask, {**facts, "denoising": denoising} if denoising else facts


def lift_mask(weights: Mapping[str, Tensor], selection: SelectionConfig) -> tuple[CSRMask, dict[str, dict[str, float]]]:
    """LIFT's mask: in each weight matrix W the largest entries of |W_r|, its rank-r approximation; and
    `denoising_facts`.
    """
    rank = selection.rank if selection.rank is not None else LIFT_RANK
    arguments: dict[str, Any] = (
        {"density": selection.density} if selection.k is None else {"k": selection.k, "scope": "global"}
    )
    mask, info = low_rank_mask(weights, rank=rank, return_info=True, **arguments)
    return mask, denoising_facts(info)


class RefreshMask(TrainerCallback):
    """LIFT: selects anew every few steps; moments of entries that stay are kept. `union` holds every entry ever
    trained.
    """

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
        self.seconds: list[float] = []

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step % self.selection.refresh_every or state.global_step >= state.max_steps:
            return
        self.guard.check_weights(model, state.global_step)
        synchronize()
        began = time.perf_counter()
        mask, _ = lift_mask(self.weights, self.selection)
        self.optimizer.update_mask(mask)
        self.union = self.union | mask
        synchronize()
        self.seconds.append(time.perf_counter() - began)


def _lift(vector: Vector, folder: Path, runtime: Runtime) -> tuple[CSRMask, dict, PreTrainedModel]:
    model = load_start(vector, runtime)
    linear = models.linear_names(model)
    for name in set(models.maskable_names(model)) - set(linear):
        model.get_parameter(name).requires_grad_(False)
    weights = {name: model.get_parameter(name).detach() for name in linear}
    selection = vector.config.selection
    # The mask changes on the way and is not part of a checkpoint, so the phase is run in one go.
    phase = dataclasses.replace(vector.config.sparse, keep_best=False, eval_every=None)
    began = time.perf_counter()
    mask, denoising = lift_mask(weights, selection)
    seconds = time.perf_counter() - began
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=phase.lr, weight_decay=phase.weight_decay)
    guard = DivergenceGuard(f"vector {vector.name!r}, sparse phase of lift", phase.lr)
    refresh = RefreshMask(optimizer, weights, selection, mask, guard)
    facts = train_phase(
        model, vector.examples, vector.config, phase, folder, runtime, guard, optimizer=optimizer, callbacks=(refresh,)
    )
    facts["selection"] = {
        "seconds": seconds, "refreshes": len(refresh.seconds), "nnz": mask.nnz, "numel": mask.numel, "density": mask.density,
        "trained_in_all": refresh.union.nnz, "denoising": denoising,
    }  # fmt: skip
    facts["trained_entries"] = mask.nnz + sum(model.get_parameter(name).numel() for name in trained_head(model))
    return refresh.union, facts, model


def difference(vector: Vector, trained: PreTrainedModel, mask: CSRMask, recipe: Recipe) -> SparseDelta:
    """theta2 - theta0 at the entries of `mask`, with the head in full for a task vector."""
    start = vector.load(vector.start)
    trained = trained.to("cpu")
    head = trained_head(trained) if vector.keep_head else []
    # The whole base, so that an entry which moved outside the mask is an error here.
    names = [name for name, _ in start.named_parameters() if name.startswith(models.base_prefix(start))] + head
    tuned_tensors = {name: trained.get_parameter(name).detach() for name in names}
    base_tensors = {name: start.get_parameter(name).detach() for name in names}
    delta = SparseDelta.from_models(tuned_tensors, base_tensors, mask=mask.to("cpu"), dense=head)
    if not bool(torch.isfinite(delta.values).all()):
        raise ValueError(f"vector {vector.name!r}: a difference of the trained weights and the start overflows float32")
    if vector.base is not None:
        base = vector.load(vector.base)
        delta.metadata["base_fingerprint"] = fingerprint(
            {name: base.get_parameter(name).detach() for name in mask.names}
        )
    delta.metadata.update(
        {"method": recipe, "vector": vector.name, "settings": to_dict(vector.config), **vector.metadata}
    )
    return delta


def trained_head(model: PreTrainedModel) -> list[str]:
    """Names of the head's parameters that training moves."""
    return [name for name in models.head_names(model) if model.get_parameter(name).requires_grad]


def load_start(vector: Vector, runtime: Runtime) -> PreTrainedModel:
    """A fresh copy of theta0 on the training device, with what must not move frozen."""
    model = vector.load(vector.start)
    models.freeze_for_vector(model)
    return model.to(torch_device(runtime))


def torch_device(runtime: Runtime) -> torch.device:
    """Where training runs: the current CUDA device, or the CPU."""
    if runtime.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def synchronize() -> None:
    """Wait for the GPU, where there is one, so that a clock tells the truth."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def count_parameters(model: PreTrainedModel) -> int:
    """N of the L1 term: all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def finished(folder: Path, read: Callable[[], object] | None = None) -> dict | None:
    """The facts of a finished phase, or None: its phase.json is written last, and what is there without it counts for
    nothing.

    Args:
        read: reads the phase's results; where they are missing or damaged, the phase is not finished.

    Raises:
        ValueError: phase.json is damaged.
    """
    path = folder / "phase.json"
    if not path.is_file():
        return None
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise ValueError(f"{path} is damaged: an object is expected, not {type(facts).__name__}")
    if read is not None and (fault := fault_of(read)) is not None:
        warnings.warn(
            f"{folder} is made again, as what it gave is missing or damaged: {fault}", RuntimeWarning, stacklevel=2
        )
        return None
    return facts


def finished_model(folder: Path, model: Path) -> dict | None:
    """`finished`, of a phase that gave the model folder `model`."""

    def read() -> None:
        read_json(model / "config.json")
        check_weights(model)

    return finished(folder, read)


def finish(folder: Path, facts: dict) -> None:
    """Mark a phase as finished, and drop its checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "phase.json", facts)
    remove_checkpoints(folder)


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a transformers model folder in the place of what an unfinished phase may have left.

    Raises:
        OSError: it cannot be written; its name is in the message.
    """
    with saving(folder):
        if folder.exists():
            shutil.rmtree(folder)
        model.save_pretrained(folder)
        for path in folder.iterdir():  # on the disk before phase.json says so
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
