"""Patches of models whose parameters are sharded over a process group: `SparsePatch.diff` and `apply_` by rows.

Ranks exchange the entries that changed, never weights.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

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
from deftx_kernels.delta.models import Model, persistent_buffers, plain_model
from deftx_kernels.delta.patch import SparsePatch, check_fits, different_entries
from deftx_kernels.mask.shards import (
    attempt,
    check_placement,
    check_ranks,
    exchange,
    gather_all,
    in_common_order,
    is_dtensor,
    local_tensor,
    mesh_of_rows,
    tied_on_all_ranks,
)
from deftx_kernels.ops.schemas import index_dtype
from deftx_kernels.validation import all_tensors


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
    error, found = attempt(_both_parts, new, old, group)
    exchange(error, None, group)
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
    error, found = attempt(_targets, patch, model, verify, group)
    everyone = [dict(rank) for rank in exchange(error, [*found[1].items()] if error is None else [], group)]
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
    error, _ = attempt(mine.apply_, tensors, False)
    try:
        exchange(error, None, group)
    except ValueError:
        if error is None:
            back.apply_(tensors, verify=False)
        raise


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
        if is_dtensor(tensor):
            check_placement(name, tensor)
            check_ranks(f"{argument}[{name!r}]", tensor, group)
            found[name] = _Part(local_tensor(tensor), tensor.shape, mesh_of_rows(tensor) is not None)
        else:
            found[name] = _Part(tensor, tensor.shape, False)
    model_tensors({n: part.local for n, part in found.items()}, argument)  # for its checks
    return found


def _both_parts(new: Model, old: Model, group: dist.ProcessGroup | None) -> tuple[_Parts, _Parts, dict[str, str]]:
    """The parts of both models, with this rank's tied names."""
    mine, theirs = _parts(plain_model(new), "new", group), _parts(plain_model(old), "old", group)
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
    local = {n: (mine.get(n) or theirs[n]).local for n in {**theirs, **mine}}
    common = in_common_order({n: local[n] for n in theirs if n in mine}, "new and old", group)
    tied = {n: first for n, first in tied_on_all_ranks(tied, local, group).items() if n != first}
    return [n for n in common if n not in tied], tied


def _placed(parts: _Parts, group: dist.ProcessGroup | None) -> _Parts:
    """The parts with their starts. ValueError, on every rank, unless those of all ranks make up the whole tensors."""
    everyone = exchange(None, {n: (layout(p.whole), p.sharded, p.local.numel()) for n, p in parts.items()}, group)
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
    for rank in exchange(None, [*sums.items()], group):
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
    for copies in exchange(None, [*sums.items()], group):
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
    counts = [dict(rank) for rank in exchange(None, [(n, len(patch.flat(n)[0])) for n in patch.names], group)]
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
        gathered = (gather_all(torch.cat([bits(t) for t in flat]), group) for flat in (indices, values))
        for rank, all_indices, all_values in zip(counts, *gathered):
            sizes = [rank.get(n, 0) for n in names]
            for name, piece in zip(names, zip(all_indices.split(sizes), all_values.split(sizes))):
                pieces[name].append(piece)
        for name in names:
            of_indices, of_values = (torch.cat(flat) for flat in zip(*pieces[name]))
            entries[name] = of_indices, of_values.view(dtype)
    return {n: entries[n] for n in parts if n in entries}
