"""One mask, and one patch, for a process group.

DDP needs only the same mask on all ranks: a sparsified model's trainable parameters are ordinary (compact) ones.
Where parameters are sharded by rows (FSDP2's `Shard(0)`), `topk_mask` selects over all ranks' shards and `local_mask`
returns the mask of this rank's rows, for `deftx_kernels.sparse_adamw` on local tensors. Ranks exchange histograms and
the mask, never scores.

`diff_patch` compares two versions of a model whose parameters are sharded in this way, `apply_patch_` writes a patch to
one. Ranks exchange the entries that changed, never weights.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from deftx_kernels.delta.model_state import (
    State,
    added,
    bits,
    check_writable,
    layout,
    matched_targets,
    matched_tensors,
    model_tensors,
    part_of_checksum,
)
from deftx_kernels.delta.models import Model, persistent_buffers
from deftx_kernels.delta.patch import SparsePatch, check_fits, different_entries
from deftx_kernels.mask import CSRMask, column_dtype, rows_and_columns
from deftx_kernels.ops.schemas import index_dtype
from deftx_kernels.select.functional import selected_counts
from deftx_kernels.select.streaming import count_equal, find_threshold
from deftx_kernels.validation import (
    all_tensors,
    check_devices,
    check_finite,
    check_float,
    check_mask_layout,
    check_plain,
)


def topk_mask(
    scores: Mapping[str, Tensor],
    *,
    k: int | None = None,
    density: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> CSRMask:
    """`deftx_kernels.topk_mask` with scope "global" over tensors that are sharded by rows over a process group.

    Args:
        scores: on every rank the same names, each with this rank's rows: a DTensor placed `Shard(0)`, or a plain
            tensor. The tensor of each rank follows that of the rank before along dimension 0; it may be empty. One
            floating dtype.
        k, density: as in `deftx_kernels.topk_mask`, of the whole tensors.
        group: by default all ranks.

    Returns:
        The mask of the whole tensors, the same on every rank, on this rank's device.

    Raises:
        ValueError, TypeError: on every rank, whichever rank's argument is wrong.
    """
    error, local = _try(_local_scores, scores, group)
    if len(set(_exchange(error, (k, density), group))) > 1:
        raise ValueError(f"k and density must be the same on all ranks, got k={k}, density={density} on this one")
    shards = _exchange(None, {n: (t.shape, t.dtype) for n, t in local.items()}, group)
    names = sorted(local)
    shapes = [_whole_shape(name, [s[name][0] for s in shards]) for name in names]
    check_mask_layout(names, shapes)
    if len(dtypes := {str(s[n][1]) for s in shards for n in names}) > 1:
        raise ValueError(f"scores must have one dtype on all ranks, got {sorted(dtypes)}")
    [count] = selected_counts(names, shapes, k, density, "global")
    tensors = [local[n] for n in names]
    _exchange(_try(_check_finite, local)[0], None, group)

    def histogram(prefix: int, shift: int) -> Tensor:
        counts = torch.ops.deftx.magnitude_histogram(tensors, prefix, shift)
        dist.all_reduce(counts, group=group)
        return counts

    threshold, ties = find_threshold(histogram, tensors[0].element_size(), count)
    csr = torch.ops.deftx.threshold_mask(tensors, threshold, _tie_quotas(tensors, threshold, ties, group))
    mine = CSRMask.unchecked(names, [t.shape for t in tensors], *csr)
    rank, offsets, tensor_start = dist.get_rank(group), {}, 0
    for name, shape in zip(names, shapes):  # of this rank's first rows in the whole tensors
        offsets[name] = tensor_start + sum(s[name][0].numel() for s in shards[:rank])
        tensor_start += shape.numel()
    return CSRMask.from_flat_indices(
        names, shapes, torch.cat(_gather_all(mine.flat_indices(offsets), group)).sort().values
    )


def local_mask(mask: CSRMask, params: Mapping[str, Tensor]) -> CSRMask:
    """The mask for the `to_local()` tensors of DTensor parameters placed `Shard(0)`: the entries in this rank's rows.

    Raises:
        ValueError, TypeError: a parameter is missing, no tensor, has another shape, or is placed otherwise than
            `Shard(0)` or `Replicate()`.
    """
    dense = {}
    for name, shape in zip(mask.names, mask.shapes):
        if name not in params:
            raise ValueError(f"params lacks tensor {name!r}, which the mask covers")
        param = params[name]
        if not isinstance(param, DTensor):
            check_plain(param, f"params[{name!r}]")
        if param.shape != shape:
            raise ValueError(f"params[{name!r}] has shape {list(param.shape)}, the mask was made for {list(shape)}")
        selected = mask[name].to_dense()[name]
        if isinstance(param, DTensor):
            _check_placement(name, param)
            whole = DTensor.from_local(selected, param.device_mesh, [Replicate()])
            selected = whole.redistribute(placements=param.placements).to_local()
        dense[name] = selected
    return CSRMask.from_dense(dense)


def broadcast_mask(mask: CSRMask | None, src: int = 0, group: dist.ProcessGroup | None = None) -> CSRMask:
    """The mask of rank `src` (of the default group) on every rank, on the device that the group's backend uses.

    The other ranks may pass None. ValueError on every rank where `src` passed None.
    """
    layout = [None if mask is None else (mask.names, [list(s) for s in mask.shapes], mask.nnz)]
    dist.broadcast_object_list(layout, src=src, group=group)
    if layout[0] is None:
        raise ValueError(f"mask: rank {src} has none to broadcast")
    names, shapes, nnz = layout[0]
    if dist.get_rank() != src or mask is None:
        device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
        rows = sum(rows_and_columns(s)[0] for s in shapes)
        crow = torch.empty(rows + 1, dtype=torch.int64, device=device)
        mask = CSRMask.unchecked(names, shapes, crow, torch.empty(nnz, dtype=column_dtype(shapes), device=device))
    dist.broadcast(mask.crow_indices, src=src, group=group)
    dist.broadcast(mask.col_indices.view(torch.uint8), src=src, group=group)
    return mask


def check_same_mask(mask: CSRMask, group: dist.ProcessGroup | None = None) -> None:
    """ValueError, naming the ranks, unless every rank has this mask. Masks made from local gradients differ."""
    fingerprints = _exchange(None, mask.fingerprint(), group)
    if others := [rank for rank, f in enumerate(fingerprints) if f != fingerprints[0]]:
        raise ValueError(
            f"the mask of rank 0 differs from that of ranks {others}: select it from common scores, or broadcast_mask"
        )


def diff_patch(
    new: Model, old: Model, *, group: dist.ProcessGroup | None = None, model_version: int = 0
) -> SparsePatch:
    """`SparsePatch.diff` of a model that is sharded over a process group: each rank compares its rows.

    Every rank gets the patch of the whole model, with the entries and versions that one process would find. It needs
    memory for the entries of all ranks, never for a whole tensor.

    Args:
        new, old: on every rank, modules or mappings of names to tensors as in `SparsePatch.diff`, with DTensors placed
            `Shard(0)` (FSDP2's, between steps) or `Replicate()`. Plain tensors are replicated. Of replicated tensors
            those of the first rank count. `old` is placed as `new`, such as
            `{n: t.detach().clone() for n, t in model.state_dict().items()}` before a step.
        group: the ranks of the DTensors' mesh; by default all ranks.
        model_version: the number of the version `new`.

    Raises:
        ValueError: on every rank, whichever rank's argument is wrong: as in `SparsePatch.diff`, and for DTensors that
            are placed otherwise.
    """
    error, found = _try(_both_parts, new, old, group)
    _exchange(error, None, group)
    mine, theirs, tied = found
    names, tied = _names_of_all(mine, theirs, tied, group)
    mine = _placed({n: mine[n] for n in names}, group)
    counted = [n for n in names if mine[n].sharded or dist.get_rank(group) == 0]
    olds = {n: theirs[n].local for n in counted}
    patch = SparsePatch(different_entries({n: mine[n].local for n in counted}, olds))
    back = patch.inverse({n: olds[n] for n in patch.names})
    starts = {n: mine[n].start for n in names}
    sums = _total({n: part_of_checksum(olds[n], starts[n]) for n in counted}, group)
    changes = _total({n: _change(patch, back, n, starts[n]) for n in patch.names}, group)
    before = {n: layout(mine[n].whole)._replace(checksum=sums[n]) for n in names}
    after = {n: s._replace(checksum=added(s.checksum, changes.get(n, 0))) for n, s in before.items()}
    return SparsePatch(_entries_of_all(patch, mine, group), before, after, tied, model_version)


def apply_patch_(
    patch: SparsePatch, model: Model, *, verify: bool = True, group: dist.ProcessGroup | None = None
) -> None:
    """`SparsePatch.apply_` to a model that is sharded over a process group: each rank writes its rows.

    After an error on any rank the model is unchanged on all of them.

    Args:
        patch: of the whole model, on every rank.
        model: as in `diff_patch`.
        verify: as in `SparsePatch.apply_`; each rank reads its rows once.
        group: the ranks of the DTensors' mesh; by default all ranks.

    Raises:
        ValueError: on every rank, whichever rank's model is wrong: as in `SparsePatch.apply_`.
    """
    error, found = _try(_targets, patch, model, verify, group)
    everyone = [dict(rank) for rank in _exchange(error, [*found[1].items()] if error is None else [], group)]
    targets = {n: known for n, known in everyone[0].items() if all(rank.get(n) == known for rank in everyone)}
    parts, changed = _placed({n: found[0][n] for n in targets}, group), {*patch.names}
    tensors = {n: parts[n].local for n in targets}
    mine = SparsePatch({n: _own_entries(patch, known, parts[n]) for n, known in targets.items() if known in changed})
    back = mine.inverse({n: tensors[n] for n in mine.names})
    if verify and patch.before is not None and patch.after is not None:
        sums = {n: part_of_checksum(t, parts[n].start) for n, t in tensors.items()}
        changes = {n: _change(mine, back, n, parts[n].start) for n in mine.names}
        after = {n: added(total, changes.get(n, 0)) for n, total in sums.items()}
        for state, found_sums, version in ((patch.before, sums, "was made for"), (patch.after, after, "leads to")):
            _check_sums(state, found_sums, targets, parts, f"the version that the patch {version}", group)
    error, _ = _try(mine.apply_, tensors, False, errors=Exception)
    try:
        _exchange(error, None, group)
    except ValueError:
        if error is None:
            back.apply_(tensors, verify=False)
        raise


def _try(function: Callable, *arguments: Any, errors: Any = (TypeError, ValueError)) -> tuple[str | None, Any]:
    """(None, the function's result), or (the message of its error, {})."""
    try:
        return None, function(*arguments)
    except errors as error:
        return str(error), {}


def _local_scores(scores: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """This rank's rows of each tensor, checked."""
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError("scores must be a mapping of names to tensors, with at least one")
    local = {}
    for name, tensor in scores.items():
        if isinstance(tensor, DTensor):
            _check_placement(name, tensor)
            _check_ranks(f"scores[{name!r}]", tensor, group)
            replicated = tensor.placements[0].is_replicate()  # then the copy of the first rank counts
            tensor = tensor.to_local()[:0] if replicated and dist.get_rank(group) > 0 else tensor.to_local()
        check_float(tensor, f"scores[{name!r}]")
        if tensor.dim() == 0:
            raise ValueError(f"scores[{name!r}] has no dimension that can be sharded over ranks")
        local[name] = tensor.detach().contiguous()
    check_devices(local, "scores")
    return local


def _check_finite(local: Mapping[str, Tensor]) -> None:
    for name in sorted(local):
        check_finite(local[name], f"scores[{name!r}] on this rank")


def _check_placement(name: str, tensor: DTensor) -> None:
    if len(tensor.placements) != 1 or not (tensor.placements[0] == Shard(0) or tensor.placements[0].is_replicate()):
        raise ValueError(
            f"tensor {name!r} must be placed Shard(0) or Replicate() on a 1-D mesh, got {tensor.placements}"
        )


def _check_ranks(label: str, tensor: DTensor, group: dist.ProcessGroup | None) -> None:
    if (mine := tensor.device_mesh.mesh.tolist()) != (ranks := dist.get_process_group_ranks(group)):
        raise ValueError(f"{label} is on the ranks {mine}, the group consists of {ranks}")


def _exchange(error: str | None, content: Any, group: dist.ProcessGroup | None) -> list:
    """Every rank's content; or, if any rank has an error, the same ValueError on all of them."""
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (error, content), group=group)
    for rank, (message, _) in enumerate(everyone):
        if message is not None:
            raise ValueError(f"rank {rank}: {message}")
    contents = [c for _, c in everyone]
    if isinstance(content, dict) and any(c.keys() != contents[0].keys() for c in contents):
        raise ValueError("the tensors must have the same names on all ranks")
    return contents


def _whole_shape(name: str, shapes: list[torch.Size]) -> torch.Size:
    if len({s[1:] for s in shapes}) > 1:
        raise ValueError(f"scores[{name!r}]: the ranks' shards differ beyond dimension 0: {[list(s) for s in shapes]}")
    return torch.Size((sum(s[0] for s in shapes), *shapes[0][1:]))


def _tie_quotas(tensors: list[Tensor], threshold: int, ties: int, group: dist.ProcessGroup | None) -> list[int]:
    """How many entries equal to the threshold this rank selects of each tensor: earlier tensors, then ranks, first."""
    if ties == 0:
        return [0] * len(tensors)
    mine = torch.stack([count_equal([t], threshold) for t in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    counts = torch.stack(everyone, dim=1).view(-1)  # tensor-major
    selected = (ties - (counts.cumsum(0) - counts)).clamp(min=0).minimum(counts).view(len(tensors), -1)
    return selected[:, dist.get_rank(group)].tolist()


def _gather_all(flat: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """The flat tensors of all ranks; their lengths may differ."""
    sizes = _exchange(None, len(flat), group)
    padded = torch.nn.functional.pad(flat, (0, max(sizes) - len(flat)))
    everyone = [torch.empty_like(padded) for _ in sizes]
    # As bytes: no backend takes every dtype.
    dist.all_gather([t.view(torch.uint8) for t in everyone], padded.view(torch.uint8), group=group)
    return [part[:size] for part, size in zip(everyone, sizes)]


# ---- parts of models ----
class _Part(NamedTuple):
    """What this rank has of a tensor."""

    local: Tensor
    shape: torch.Size  # of the whole tensor
    sharded: bool  # by rows; else every rank has the whole tensor
    start: int = 0  # the flat index in the whole tensor of the part's first element

    @property
    def whole(self) -> Tensor:
        """A tensor on meta with the layout of the whole one."""
        return torch.empty(self.shape, dtype=self.local.dtype, device="meta")


_Parts = dict[str, _Part]


def _parts(model: Model, argument: str, group: dist.ProcessGroup | None) -> _Parts:
    found = {}
    for name, tensor in (all_tensors(model, argument) | persistent_buffers(model)).items():
        if isinstance(tensor, DTensor):
            _check_placement(name, tensor)
            _check_ranks(f"{argument}[{name!r}]", tensor, group)
            found[name] = _Part(tensor.to_local().detach(), tensor.shape, not tensor.placements[0].is_replicate())
        else:
            found[name] = _Part(tensor, tensor.shape, False)
    model_tensors({n: part.local for n, part in found.items()}, argument)  # for its checks
    return found


def _both_parts(new: Model, old: Model, group: dist.ProcessGroup | None) -> tuple[_Parts, _Parts, dict[str, str]]:
    """The parts of both models, with this rank's tied names."""
    mine, theirs = _parts(new, "new", group), _parts(old, "old", group)
    for name in [n for n in theirs if n in mine]:
        if (one := mine[name][1:3]) != (other := theirs[name][1:3]):
            words = [f"{list(shape)}{', sharded' if sharded else ''}" for shape, sharded in (one, other)]
            raise ValueError(f"tensor {name!r} is {words[0]} in new and {words[1]} in old")
    # A rank without rows of a tensor cannot see that it is tied.
    models = [
        {n: p.local for n, p in one.items() if n in other or p.local.numel()}
        for one, other in ((mine, theirs), (theirs, mine))
    ]
    return mine, theirs, matched_tensors(*models)[2]


def _names_of_all(
    mine: _Parts, theirs: _Parts, tied: Mapping[str, str], group: dist.ProcessGroup | None
) -> tuple[list[str], dict[str, str]]:
    """The names of the tensors to compare, and the tied names: those that are tied on each rank with rows of them."""
    common = [n for n in theirs if n in mine]
    without_rows = {n for n in {*mine, *theirs} if not (mine.get(n) or theirs[n]).local.numel()}
    everyone = _exchange(None, (common, dict(tied), without_rows), group)
    if any({*rank[0]} != {*common} for rank in everyone):
        raise ValueError("the tensors must have the same names on all ranks")
    found = {n: first for rank in everyone for n, first in rank[1].items()}
    tied = {n: f for n, f in found.items() if all(t.get(n) == f or n in empty for _, t, empty in everyone)}
    return [n for n in everyone[0][0] if n not in tied], tied


def _placed(parts: _Parts, group: dist.ProcessGroup | None) -> _Parts:
    """The parts with their starts. ValueError, on every rank, unless those of all ranks make up the whole tensors."""
    everyone = _exchange(None, {n: (layout(p.whole), p.sharded, p.local.numel()) for n, p in parts.items()}, group)
    found = {}
    for name, part in parts.items():
        ranks = [layouts[name] for layouts in everyone]
        sizes = [size for _, _, size in ranks]
        if len({rank[:2] for rank in ranks}) > 1 or sum(sizes) != part.shape.numel() * (
            1 if part.sharded else len(sizes)
        ):
            raise ValueError(f"tensor {name!r} is not the same on all ranks, or their rows are not all of its rows")
        found[name] = part._replace(start=sum(sizes[: dist.get_rank(group)]) if part.sharded else 0)
    return found


def _targets(
    patch: SparsePatch, model: Model, verify: bool, group: dist.ProcessGroup | None
) -> tuple[_Parts, dict[str, str]]:
    """The parts of the model, and name → name in the patch. Errors as `apply_patch_`."""
    if not isinstance(patch, SparsePatch):
        raise TypeError(f"patch must be a SparsePatch, got {type(patch).__name__}")
    parts = _parts(model, "model", group)
    states = [s for s in (patch.before, patch.after) if s is not None]
    exactly = bool(states) and verify
    names = states[0] if exactly else dict.fromkeys(patch.names)
    seen = {n: p.local for n, p in parts.items() if p.local.numel() or n in names or n in patch.tied}
    targets = matched_targets(seen, "model", names, patch.tied, states, exactly)
    for name, known in targets.items():
        check_fits(patch, known, parts[name].whole, f"model's tensor {name!r}")
        check_writable(parts[name].local, f"model's tensor {name!r}")
    return parts, targets


# ---- entries of parts ----
def _change(patch: SparsePatch, back: SparsePatch, name: str, start: int) -> int:
    """What the entries of a part, with indices in it, add to the checksum of the whole tensor."""
    (indices, values), (_, before) = patch.flat(name), back.flat(name)
    ends = torch.tensor([0, len(indices)], device=indices.device)
    return int(torch.ops.deftx.bit_checksum_change(ends, indices.to(torch.int64) + start, before, values))


def _total(sums: Mapping[str, int], group: dist.ProcessGroup | None) -> dict[str, int]:
    """The sums over all ranks, of checksums."""
    total: dict[str, int] = {}
    for rank in _exchange(None, [*sums.items()], group):
        for name, value in rank:
            total[name] = added(total.get(name, 0), value)
    return total


def _check_sums(
    state: State,
    sums: Mapping[str, int],
    targets: Mapping[str, str],
    parts: _Parts,
    version: str,
    group: dist.ProcessGroup | None,
) -> None:
    """ValueError, on every rank, unless the checksums of the whole tensors are those of a state."""
    total = _total({n: s for n, s in sums.items() if parts[n].sharded}, group)
    for copies in _exchange(None, [*sums.items()], group):
        found = {**dict(copies), **total}
        if wrong := [n for n, known in targets.items() if found[n] != state[known].checksum]:
            raise ValueError(f"model is not at {version}: tensor {wrong[0]!r} has other values")


def _own_entries(patch: SparsePatch, name: str, part: _Part) -> tuple[Tensor, Tensor]:
    """The entries in a part, with indices in it."""
    indices, values = patch.flat(name)
    wide = indices.to(torch.int64)
    ends = torch.tensor([part.start, part.start + part.local.numel()], device=indices.device)
    first, last = torch.searchsorted(wide, ends).tolist()
    return wide[first:last] - part.start, values[first:last]


def _entries_of_all(
    patch: SparsePatch, parts: _Parts, group: dist.ProcessGroup | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """The entries of all ranks' parts, with indices in the whole tensors."""
    counts = [dict(rank) for rank in _exchange(None, [(n, len(patch.flat(n)[0])) for n in patch.names], group)]
    kinds: dict[tuple, list[str]] = {}
    for name, part in parts.items():
        if any(name in rank for rank in counts):
            kinds.setdefault((part.local.dtype, index_dtype([part.whole]), part.local.device), []).append(name)
    entries, changed = {}, {*patch.names}
    for (dtype, index, device), names in kinds.items():
        mine = [n for n in names if n in changed]
        indices = [torch.empty(0, dtype=index, device=device)]
        values = [torch.empty(0, dtype=dtype, device=device)]
        indices += [(patch.flat(n)[0].to(torch.int64) + parts[n].start).to(index) for n in mine]
        values += [patch.flat(n)[1] for n in mine]
        pieces: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in names}
        gathered = (_gather_all(torch.cat([bits(t) for t in flat]), group) for flat in (indices, values))
        for rank, all_indices, all_values in zip(counts, *gathered):
            sizes = [rank.get(n, 0) for n in names]
            for name, piece in zip(names, zip(all_indices.split(sizes), all_values.split(sizes))):
                pieces[name].append(piece)
        for name in names:
            of_indices, of_values = (torch.cat(flat) for flat in zip(*pieces[name]))
            entries[name] = of_indices, of_values.view(dtype)
    return {n: entries[n] for n in parts if n in entries}
