"""`topk_mask`, `select_mask`, `svd_denoise` and `init_mask` of models that are divided over a process group."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deftx_kernels import validation
from deftx_kernels.denoise.functional import tensors_of
from deftx_kernels.denoise.plans import Layout, with_drawn_matrices
from deftx_kernels.denoise.rule import Rule, check_rule
from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.shards import (
    attempt,
    check_same_arguments,
    exchange,
    in_common_order,
    is_dtensor,
    local_tensor,
    placed_like,
    tied_on_all_ranks,
)
from deftx_kernels.select.divided import Division, denoised_rows, infos_of_all_ranks, lists_to_denoise
from deftx_kernels.select.functional import (
    check_differences,
    check_shapes,
    checked_counts,
    checked_rule,
    chosen_names,
    names_to_denoise,
    score_dtype,
    tied_names_of_chosen,
)
from deftx_kernels.select.over_ranks import select_over_ranks
from deftx_kernels.select.rows import Rows, check_dtensor, moved, rows_of_ranks
from deftx_kernels.select.starting import ALL_LINEAR, check_method, random_mask, target_weights
from deftx_kernels.select.streaming import groups_of_names

Group = dist.ProcessGroup | None
Progress = Callable[[int, int], None] | None


def topk_mask(
    scores: Mapping[str, Tensor],
    *,
    k: int | None = None,
    density: float | None = None,
    scope: str = "global",
    replicated: bool = False,
    group: Group = None,
) -> CSRMask:
    """`deftx_kernels.topk_mask` of scores that are divided over a process group: the same mask, bit for bit.

    Each rank reads its rows once. Ranks exchange histograms and the mask, never scores.

    Args:
        scores: on every rank the same names, each with this rank's rows: a DTensor placed `Shard(0)`, or a plain
            tensor. The tensor of each rank follows that of the rank before along dimension 0; it may be empty. A
            DTensor placed `Replicate()` is whole on each rank.
        k, density, scope: as in `deftx_kernels.topk_mask`, of the whole tensors.
        replicated: plain tensors are whole, and equal, on each rank. Each rank reads some of them.
        group: the ranks of the DTensors' mesh; by default all ranks.

    Returns:
        The mask of the whole tensors, the same on every rank, on this rank's device.

    Raises:
        ValueError: on every rank, with the same message, whichever rank's argument is wrong: as
            `deftx_kernels.topk_mask`; arguments or shapes that do not fit together.

    Example:
        >>> import torch.distributed as dist
        >>> from deftx_kernels import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun: none of these
        >>> distributed.topk_mask({"w": torch.tensor([[0.1, -3.0], [2.0, 0.5]])}, k=2).col_indices.tolist()
        [1, 0]
        >>> dist.destroy_process_group()
    """
    error, given = attempt(_checked_scores, scores, replicated, group)
    arguments = {"k": k, "density": density, "scope": scope, "replicated": replicated}
    check_same_arguments(arguments, group, error)
    given = in_common_order(given, "scores", group)
    rows = rows_of_ranks(given, "scores", group, of_rows=not replicated)
    local = _untied({n: local_tensor(t) for n, t in given.items()}, "scores", group)
    shapes = _whole_shapes(local, rows)
    counts = checked_counts(shapes, k, density, scope)
    dtype = reduce(torch.promote_types, (t.dtype for t in local.values()))
    return _select(local, {}, rows, counts, scope, "scores[{!r}]", set(), None, dtype, group)


def select_mask(
    tuned: Mapping[str, Tensor] | nn.Module,
    base: Mapping[str, Tensor] | nn.Module,
    *,
    k: int | None = None,
    density: float | None = None,
    rank: int | str | None = None,
    energy: float | None = None,
    residual_density: float = 0.0,
    scope: str = "global",
    names: Iterable[str] | None = None,
    denoise_names: Iterable[str] | None = None,
    return_info: bool = False,
    progress: Progress = None,
    group: Group = None,
) -> Any:
    """`deftx_kernels.select_mask` of models that are divided over a process group: the same mask on every rank.

    On CPUs it is the mask that one process with the same number of threads selects, bit for bit. On GPUs, too, without
    denoising; with it the last bits of a difference may depend on how many matrices are denoised together.

    Without denoising, differences stay on their rank: ranks exchange histograms and the mask. With it, tensors are
    divided over the ranks by an estimate of the work. The rows of a tensor's difference are sent to the rank that
    denoises it, and to no other; its scores stay there. On CPUs one rank denoises what one process would compute in one
    batch: matrices of at most 8 or 16 MiB of products for each thread, or one large one.

    Memory of a rank, besides its part of the models: 6 to 12 bytes for each of its candidates, of which there are k at
    most, and twice the mask; with denoising also its scores, 4 bytes an element (float64: 8), and the memory that
    `svd_denoise` needs. Its scores are those of the tensors that it denoises and of its rows of the others: about its
    share of the model, or its largest tensor where that is more.

    Args:
        tuned, base: as in `deftx_kernels.select_mask`, with DTensors placed `Shard(0)` (FSDP2's, with rows on some of
            the ranks only, too) or `Replicate()`. Plain tensors are whole, and equal, on each rank; one model may be
            sharded and the other one whole.
        k, density, rank, energy, residual_density, scope, names, denoise_names, return_info: as in
            `deftx_kernels.select_mask`, the same on all ranks.
        progress: called with (matrices done, matrices in all) of this rank; without denoising, once, at the end, with
            (tensors done, tensors in all).
        group: the ranks of the DTensors' mesh; by default all ranks.

    Returns:
        The mask of the whole tensors, the same on every rank, on the device of this rank's part of `base`.

    Raises:
        ValueError: on every rank, with the same message, whichever rank's argument is wrong: as
            `deftx_kernels.select_mask`; arguments, names, shapes or dtypes that are not the same on all ranks; DTensors
            placed otherwise. Positions are those in the whole tensors.

    Example:
        >>> import torch.distributed as dist
        >>> from deftx_kernels import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> tuned, base = (torch.nn.Linear(8, 4) for _ in range(2))  # after fully_shard, or plain
        >>> mask = distributed.select_mask(tuned, base, density=0.25, energy=0.9)
        >>> mask == select_mask(tuned, base, density=0.25, energy=0.9)
        True
        >>> dist.destroy_process_group()
    """
    error, given = attempt(_checked_models, tuned, base, (rank, energy, residual_density), names, denoise_names)
    arguments: dict[str, Any] = {"k": k, "density": density, "scope": scope, "return_info": return_info}
    arguments |= {"rank": rank, "energy": energy, "residual_density": residual_density}
    if error is None:
        rule, new, old, names, denoise_names = given
        arguments |= {"names": names, "denoise_names": denoise_names}
    check_same_arguments(arguments, group, error)
    old = in_common_order(old, "base", group)
    local = {n: local_tensor(t) for n, t in old.items()}
    error, tied = attempt(validation.tied_names, local, "base")
    tied = tied_on_all_ranks(tied, local, group, error)
    error, given = attempt(_chosen_tensors, new, old, tied, names, group)
    exchange(error, None, group)
    new, old = given
    new, old, rows = _parts(new, old, group)
    error, tied = attempt(_tied_parts, new, old, tied)
    tied = tied_on_all_ranks(tied, old, group, error)
    chosen = sorted(n for n, first in tied.items() if n == first)
    new, old = ({n: model[n] for n in chosen} for model in (new, old))
    shapes = _whole_shapes(new, rows)
    whole = {n: torch.empty(s, device="meta") for n, s in shapes.items()}
    denoised = names_to_denoise(chosen, whole, rule, denoise_names, return_info)
    counts = checked_counts(shapes, k, density, scope)
    label, dtype = "tuned[{0!r}] - base[{0!r}]", score_dtype(new, old)
    return _select(new, old, rows, counts, scope, label, denoised, rule, dtype, group, return_info, progress)


def init_mask(
    model: nn.Module,
    *,
    method: str = "lift",
    density: float | None = None,
    k: int | None = None,
    rank: int = 128,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    scope: str = "tensor",
    seed: int = 0,
    group: Group = None,
) -> CSRMask:
    """`deftx_kernels.init_mask` of a model that is divided over a process group: the same mask on every rank.

    "lift" divides the approximations over the ranks as `select_mask` its denoising, with its memory and its bits.
    "magnitude": ranks exchange histograms and the mask. "random": each rank draws the mask of the whole model.

    Args:
        model: on every rank, with DTensors placed `Shard(0)` (FSDP2's) or `Replicate()`, or with plain parameters,
            which are whole, and equal, on each rank (DistributedDataParallel).
        method, density, k, rank, target_modules, scope, seed: as in `deftx_kernels.init_mask`, the same on all ranks.
        group: the ranks of the DTensors' mesh; by default all ranks.

    Raises:
        ValueError: on every rank, with the same message, whichever rank's argument is wrong: as
            `deftx_kernels.init_mask`; arguments, shapes or dtypes that are not the same on all ranks.

    Example:
        >>> import torch.distributed as dist
        >>> from deftx_kernels import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.Linear(8, 8)
        >>> distributed.init_mask(model, density=0.25, rank=2).nnz
        16
        >>> dist.destroy_process_group()
    """
    targets = target_modules
    error, listed = attempt(lambda: targets if isinstance(targets, str) else list(targets))
    error, given = attempt(_target_tensors, model, method, rank, seed, listed, group) if error is None else (error, {})
    arguments = {"method": method, "density": density, "k": k, "rank": rank, "scope": scope, "seed": seed}
    check_same_arguments(arguments | {"target_modules": listed}, group, error)
    given = in_common_order(given, "model", group)
    rows = rows_of_ranks(given, "model", group)
    local = {n: local_tensor(t) for n, t in given.items()}
    if method == "random":
        shapes = _whole_shapes(local, rows)
        counts = checked_counts(shapes, k, density, scope)
        return random_mask(shapes, counts, scope, seed).to(next(iter(local.values())).device)
    local = _untied(local, "model", group)
    counts = checked_counts(_whole_shapes(local, rows), k, density, scope)
    if method == "magnitude":
        dtype = reduce(torch.promote_types, (t.dtype for t in local.values()))
        return _select(local, {}, rows, counts, scope, "model[{!r}]", set(), None, dtype, group)
    rule, dtype = check_rule(rank, None, 0.0), score_dtype(local, {})
    return _select(local, {}, rows, counts, scope, "model[{!r}]", set(local), rule, dtype, group)


def svd_denoise(
    delta: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    residual_density: float = 0.0,
    return_info: bool = False,
    oversample: int = 16,
    n_iter: int = 2,
    generator: torch.Generator | None = None,
    batch_bytes: int | None = None,
    progress: Progress = None,
    group: Group = None,
) -> Any:
    """`deftx_kernels.svd_denoise` of tensors that are divided over a process group.

    Tensors are divided over the ranks and sent as in `distributed.select_mask`. On CPUs results are those of one
    process with the same number of threads, bit for bit. Besides arguments and results a rank needs memory for the
    tensors that it denoises: about its share of all, or its largest tensor where that is more.

    Args:
        delta: as in `deftx_kernels.svd_denoise`, with DTensors placed `Shard(0)` or `Replicate()`; plain tensors are
            whole, and equal, on each rank.
        rank, energy, residual_density, return_info, oversample, n_iter, batch_bytes: as in
            `deftx_kernels.svd_denoise`, the same on all ranks.
        generator: as there, in the same state on all ranks.
        progress: called with (matrices done, matrices in all) of this rank.
        group: the ranks of the DTensors' mesh; by default all ranks.

    Returns:
        The same structure as `delta`, with DTensors placed as those of `delta`; plain tensors are the same on each
        rank. With `return_info` also the information of the whole tensors, on every rank.

    Raises:
        ValueError: on every rank, with the same message, whichever rank's argument is wrong: as
            `deftx_kernels.svd_denoise`; arguments, shapes or dtypes that are not the same on all ranks; DTensors placed
            otherwise.

    Example:
        >>> import torch.distributed as dist
        >>> from deftx_kernels import distributed
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> distributed.svd_denoise(torch.diag(torch.tensor([3.0, 2.0, 0.5])), energy=0.9).diagonal()
        tensor([3., 2., 0.])
        >>> dist.destroy_process_group()
    """
    numbers = (rank, energy, residual_density, oversample, n_iter)
    error, given = attempt(_checked_delta, delta, (*numbers, generator, batch_bytes), group)
    keys = ("rank", "energy", "residual_density", "oversample", "n_iter")
    state = None
    if isinstance(generator, torch.Generator):
        state = hashlib.sha256(bytes(generator.get_state().tolist())).hexdigest()
    arguments = dict(zip(keys, numbers)) | {"batch_bytes": batch_bytes, "return_info": return_info}
    check_same_arguments(arguments | {"the state of generator": state}, group, error)
    tensors, labels, structure, rule = given
    ordered = in_common_order(tensors, "delta", group)
    rows = rows_of_ranks(ordered, "delta", group)
    local = {n: local_tensor(t) for n, t in ordered.items()}
    matrices = [n for n, t in ordered.items() if t.dim() >= 2]
    results = _copies({n: local[n] for n in ordered if rule.keeps_all or n not in matrices}, rows, labels, group)
    infos: dict[Any, dict[str, Tensor] | None] = dict.fromkeys(tensors)
    if matrices and (return_info or not rule.keeps_all):
        layouts = {n: Layout(ordered[n].shape, ordered[n].dtype, local[n].device) for n in matrices}
        rule = with_drawn_matrices(rule, [layout for layout in layouts.values() if layout.shape.numel()])
        division = Division.of(rows, layouts, group, lists_to_denoise([matrices], layouts, rule, group), rule)

        def values(name: Any, part: slice) -> Tensor:
            return local[name][part].clone(memory_format=torch.contiguous_format)

        found, mine = denoised_rows(values, division, rule, labels, group, progress)
        if return_info:
            infos |= infos_of_all_ranks(mine, group, {n: local[n].device for n in matrices})
        for name in [] if rule.keeps_all else matrices:
            results[name] = _returned(found.pop(name), name, division, group)
    result = structure({n: placed_like(results[n], t) for n, t in tensors.items()})
    return (result, structure(infos)) if return_info else result


# ---- arguments, checked on each rank ----
def _checked_scores(scores: Mapping[str, Tensor], replicated: bool, group: Group) -> dict[str, Tensor]:
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError("scores must be a mapping of names to tensors, with at least one")
    for name, tensor in scores.items():
        _check_tensor(tensor, f"scores[{name!r}]", name, group)
        if tensor.dim() == 0 and not replicated and not is_dtensor(tensor):
            raise ValueError(f"scores[{name!r}] has no dimension that can be sharded over ranks")
    validation.check_devices({n: local_tensor(t) for n, t in scores.items()}, "scores")
    return {n: t.detach() for n, t in scores.items()}


def _check_tensor(tensor: Tensor, label: str, name: Any, group: Group) -> None:
    check_dtensor(tensor, label, name, group)
    validation.check_float(local_tensor(tensor), label)


def _checked_models(
    tuned: Mapping[str, Tensor] | nn.Module,
    base: Mapping[str, Tensor] | nn.Module,
    rule: tuple[Any, Any, Any],
    names: Iterable[str] | None,
    denoise_names: Iterable[str] | None,
) -> tuple:
    """The rule, the tensors of both models, and the names as lists."""
    listed = [n if n is None or isinstance(n, str) else sorted(n) for n in (names, denoise_names)]
    found = checked_rule(*rule, listed[1])
    return found, validation.all_tensors(tuned, "tuned"), validation.all_tensors(base, "base"), *listed


def _chosen_tensors(
    new: dict[str, Tensor], old: dict[str, Tensor], tied: Mapping[str, str], names: list[str] | None, group: Group
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors to select from, whole or DTensors, in the order of the base; tied ones under each name."""
    completed = validation.with_tied_names({n: local_tensor(t) for n, t in new.items()}, tied)
    other_names = {first: n for n, first in tied.items() if n in new}
    new = {n: new[n] if n in new else new[other_names[n]] for n in completed}
    wanted = set(chosen_names(new, old, names))
    chosen = [n for n in old if n in wanted]
    for name in chosen:
        for model, argument in ((new, "tuned"), (old, "base")):
            check_dtensor(model[name], f"{argument}[{name!r}]", name, group)
        check_shapes(name, new, old)
    return {n: new[n] for n in chosen}, {n: old[n] for n in chosen}


def _tied_parts(new: Mapping[str, Tensor], old: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, str]:
    check_differences(new, old, sorted(old))
    return tied_names_of_chosen(new, old, tied, sorted(old))


def _target_tensors(
    model: nn.Module, method: str, rank: int, seed: int, target_modules: str | list[str], group: Group
) -> dict[str, Tensor]:
    check_method(method, rank, seed)
    names = target_weights(model, target_modules)
    tensors = validation.all_tensors(model, "model")
    for name in names:
        _check_tensor(tensors[name], f"model[{name!r}]", name, group)
    validation.check_devices({n: local_tensor(tensors[n]) for n in names}, "model")
    return {n: tensors[n] for n in names}


def _checked_delta(delta: Any, rule: tuple, group: Group) -> tuple:
    """The tensors, their labels, what makes the structure, and the rule."""
    checked = check_rule(*rule)
    tensors, labels, structure = tensors_of(delta)
    for name, tensor in tensors.items():
        _check_tensor(tensor, labels[name], name, group)
        validation.check_readable(local_tensor(tensor), labels[name])
    return {n: t.detach() for n, t in tensors.items()}, labels, structure, checked


# ---- parts of tensors ----
def _parts(
    new: Mapping[str, Tensor], old: Mapping[str, Tensor], group: Group
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Rows | None]]:
    """This rank's parts of both models, and which rows they are: of a tensor that is sharded in one of them, rows."""
    old = in_common_order(old, "base", group)
    new, rank = {n: new[n] for n in old}, dist.get_rank(group)
    of_new, of_old = rows_of_ranks(new, "tuned", group), rows_of_ranks(old, "base", group)
    rows = {n: of_new[n] or of_old[n] for n in old}

    def parts(model: Mapping[str, Tensor], own: Mapping[str, Rows | None]) -> dict[str, Tensor]:
        local = {n: local_tensor(t) for n, t in model.items()}
        return {n: r.of(t, rank) if (r := rows[n]) and not own[n] else t for n, t in local.items()}

    return parts(new, of_new), parts(old, of_old), rows


def _untied(local: dict[str, Tensor], argument: str, group: Group) -> dict[str, Tensor]:
    """The tensors in the order of their names, tied ones only under the first."""
    error, tied = attempt(validation.tied_names, local, argument)
    tied = tied_on_all_ranks(tied, local, group, error)
    return {n: local[n] for n in sorted(local) if tied[n] == n}


def _whole_shapes(local: Mapping[str, Tensor], rows: Mapping[str, Rows | None]) -> dict[str, torch.Size]:
    return {n: t.shape if (r := rows[n]) is None else r.shape for n, t in local.items()}


def _copies(
    local: Mapping[Any, Tensor], rows: Mapping[Any, Rows | None], labels: Mapping[Any, str], group: Group
) -> dict[Any, Tensor]:
    """Copies of this rank's parts, which are finite on all ranks."""
    errors = []
    for name, tensor in local.items():
        start = 0 if (r := rows[name]) is None else r.start(dist.get_rank(group))
        errors.append(attempt(validation.check_finite, tensor, labels[name], start)[0])
    exchange(next((e for e in errors if e is not None), None), None, group)
    return {n: t.clone(memory_format=torch.contiguous_format) for n, t in local.items()}


def _returned(found: Tensor, name: Any, division: Division, group: Group) -> Tensor:
    """A denoised tensor where its source is: rows on their ranks, a replicated one on all ranks."""
    source, target = division.sources[name], division.targets[name]
    if source is not None:
        return moved(found, target, source, group)
    owner = division.owners[name]
    whole = found if dist.get_rank(group) == owner else found.new_empty(target.shape)
    if whole.numel():
        dist.broadcast(whole.view(-1).view(torch.uint8), group=group, group_src=owner)
    return whole


# ---- selection ----
def _select(
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    rows: Mapping[str, Rows | None],
    counts: list[int],
    scope: str,
    label: str,
    denoised: set[str],
    rule: Rule | None,
    dtype: torch.dtype,
    group: Group,
    return_info: bool = False,
    progress: Progress = None,
) -> Any:
    """The mask of the largest entries of `new`, or of new - old where `old` is not empty, after denoising some.

    `new` and `old`: this rank's parts in the order of the names, the whole tensors where `rows` is None.
    """
    shapes, rank = _whole_shapes(new, rows), dist.get_rank(group)
    device = next(iter((old or new).values())).device
    layouts, lists = {n: Layout(s, dtype, device) for n, s in shapes.items()}, list[list[str]]()
    if denoised and rule is not None:
        groups = [[n for n in names if n in denoised] for names in groups_of_names(shapes, device)]
        lists = lists_to_denoise(groups, layouts, rule, group)
    division = Division.of(rows, layouts, group, lists, rule)
    # A rank has rows of a tensor; one without dimensions is one row.
    new, old = ({n: t if t.dim() else t.reshape(1) for n, t in model.items()} for model in (new, old))

    def values(name: str, part: slice) -> Tensor:
        found = new[name][part].to(device, dtype, copy=True, memory_format=torch.contiguous_format)
        return found.sub_(old[name][part].to(dtype)) if old else found

    infos: dict[str, Any] = dict.fromkeys(new)
    if denoised and rule is not None:
        labels = {n: label.format(n) for n in new}
        scores, mine = denoised_rows(values, division, rule, labels, group, progress)
        if return_info:
            infos |= infos_of_all_ranks(mine, group, dict.fromkeys(denoised, device))
        new, old = scores, {}
    else:
        parts = {n: division.targets[n].range(rank) if rows[n] is None else slice(None) for n in new}
        new, old = ({n: t[parts[n]].to(device).contiguous() for n, t in model.items()} for model in (new, old))
    mask = select_over_ranks(new, old, division.targets, counts, scope, label, dtype, group)
    if progress is not None and not denoised:
        progress(len(new), len(new))
    return (mask, infos) if return_info else mask
