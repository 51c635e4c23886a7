"""Exact top-k over scores of which each rank of a process group has some rows.

Each rank finds its candidates: the k largest of its own scores. The ranks add up histograms of the candidates' scores
to find the threshold of all, and gather the selected entries; no score leaves its rank.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from deftx_kernels.mask import CSRMask, column_dtype, rows_and_columns, signed
from deftx_kernels.mask.shards import attempt, exchange
from deftx_kernels.ops.schemas import SCOPES
from deftx_kernels.select.rows import Rows
from deftx_kernels.select.streaming import count_equal, find_threshold
from deftx_kernels.validation import raise_not_finite


def select_over_ranks(
    new: Mapping[str, Tensor],  # this rank's rows, contiguous, in the order of the names
    old: Mapping[str, Tensor],  # the same, or empty
    rows: Mapping[str, Rows],
    counts: Sequence[int],
    scope: str,
    label: str,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> CSRMask:
    """The mask of the whole tensors on every rank: the largest entries of |new|, or of |new - old|.

    Args:
        counts, scope: as the operator `topk_mask` takes them, of the whole tensors.
        label: format of a tensor's name in errors.
        dtype: in which scores are computed and compared.

    Raises:
        ValueError: on all ranks, for a score that is NaN or infinite.
    """
    error, mine = attempt(_candidates, new, old, rows, counts, scope, label, dtype, dist.get_rank(group))
    exchange(error, None, group)
    if scope == "global":
        parts = [range(len(rows))]
    else:  # the candidates of a row, or of a tensor, that one rank has as a whole are selected
        several = [sum(a < b for a, b in pairwise(r.bounds)) > 1 for r in rows.values()]
        parts = [range(i, i + 1) for i, r in enumerate(rows.values()) if several[i] and _is_divided(r, scope)]
    if parts:
        scores = mine.gather(new).to(dtype)
        if old:
            scores -= mine.gather(old).to(dtype)
        mine = _selected(mine, scores, parts, counts, group)
    return _whole_mask(mine, list(rows.values()), group)


def _is_divided(rows: Rows, scope: str) -> bool:
    """Whether entries of different ranks' rows are selected together."""
    return scope == "tensor" or len(rows.shape) < 2


def _candidates(
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    rows: Mapping[str, Rows],
    counts: Sequence[int],
    scope: str,
    label: str,
    dtype: torch.dtype,
    rank: int,
) -> CSRMask:
    """The largest of this rank's scores; none that it must select is missing."""
    tensors = [list(model.values()) for model in (new, old)]
    if scope == "global":
        sizes = [sum(t.numel() for t in tensors[0])]
    else:
        sizes = [rows_and_columns(t.shape)[1] if scope == "row" else t.numel() for t in tensors[0]]
    with torch.no_grad():
        crow, col, bad = torch.ops.deftx.topk_mask(*tensors, list(map(min, counts, sizes)), SCOPES[scope])
        if (i := int(bad[0])) >= 0:
            name, score = list(new)[i], tensors[0][i].to(dtype)
            score = score - tensors[1][i].to(dtype) if old else score
            raise_not_finite(score, label.format(name), int(bad[1]), rows[name].start(rank))
    return CSRMask.unchecked(list(new), [t.shape for t in tensors[0]], crow, col)


def _selected(
    mine: CSRMask,
    scores: Tensor,  # [nnz]
    parts: Sequence[range],  # of tensors from which counts[i] entries are selected together
    counts: Sequence[int],
    group: dist.ProcessGroup | None,
) -> CSRMask:
    """The candidates without those of the parts that are not selected."""
    selected = torch.ones(mine.nnz, dtype=torch.bool, device=mine.device)
    for part in parts:
        offsets = mine.entry_offsets[part.start : part.stop + 1]
        tensors = [scores[start:stop] for start, stop in pairwise(offsets)]
        together = scores[offsets[0] : offsets[-1]]

        def histogram(prefix: int, shift: int, together: Tensor = together) -> Tensor:
            found = torch.ops.deftx.magnitude_histogram([together], prefix, shift)
            dist.all_reduce(found, group=group)
            return found

        threshold, ties = find_threshold(histogram, scores.element_size(), counts[part.start])
        quotas = _tie_quotas(tensors, threshold, ties, group)
        crow, col = torch.ops.deftx.threshold_mask(tensors, threshold, quotas)  # each tensor is one row
        starts = torch.tensor(offsets[:-1], device=crow.device)
        selected[offsets[0] : offsets[-1]] = False
        selected[col.to(torch.int64) + torch.repeat_interleave(starts, crow.diff())] = True
    return mine.at(selected.nonzero().view(-1))


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


def _whole_mask(mine: CSRMask, rows: Sequence[Rows], group: dist.ProcessGroup | None) -> CSRMask:
    """The mask of the whole tensors from those of all ranks' rows."""
    shapes, rank = [r.shape for r in rows], dist.get_rank(group)
    dtype, device, col = column_dtype(shapes), mine.device, mine.col_indices
    # A tensor of fewer than two dimensions is one row, whose columns are divided.
    if any(starts := [r.bounds[rank] if len(r.shape) < 2 else 0 for r in rows]):
        nnz = torch.tensor(mine.entry_offsets, device=device).diff()
        col = col.to(torch.int32) + torch.tensor(starts, dtype=torch.int32, device=device).repeat_interleave(nnz)
    heights = [[rows_and_columns(r.local_shape(i))[0] for r in rows] for i in range(dist.get_world_size(group))]
    of_rows = _gathered(mine.crow_indices.diff(), [sum(h) for h in heights], group)  # entries of each row
    sizes = [_sums(counts, h) for counts, h in zip(of_rows, heights)]  # entries of each tensor
    cols = _gathered(signed(col.to(dtype)), [sum(s) for s in sizes], group)
    counts = list(zip(*(c.split(h) for c, h in zip(of_rows, heights))))
    crows = [torch.cat(parts) if len(s) > 1 else torch.stack(parts).sum(0) for parts, s in zip(counts, shapes)]
    crow = pad(torch.cat(crows).cumsum(0), (1, 0))
    parts = zip(*(c.split(s) for c, s in zip(cols, sizes)))
    return CSRMask.unchecked(mine.names, shapes, crow, torch.cat([c for part in parts for c in part]).view(dtype))


def _gathered(mine: Tensor, sizes: Sequence[int], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The flat tensors of all ranks, whose lengths are `sizes`. Not padded: one rank may have nearly all entries."""
    found = [mine if rank == dist.get_rank(group) else mine.new_empty(n) for rank, n in enumerate(sizes)]
    for rank, flat in enumerate(found):
        if len(flat):
            dist.broadcast(
                flat.view(torch.uint8), group=group, group_src=rank
            )  # as bytes: no backend takes every dtype
    return found


def _sums(counts: Tensor, sizes: Sequence[int]) -> list[int]:
    """The sums of consecutive parts of these sizes."""
    ends = torch.tensor([0, *accumulate(sizes)], device=counts.device)
    return pad(counts.cumsum(0), (1, 0))[ends].diff().tolist()
