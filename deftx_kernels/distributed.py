"""One mask for a process group.

DDP needs only the same mask on all ranks: a sparsified model's trainable parameters are ordinary (compact) ones.
Where parameters are sharded by rows (FSDP2's `Shard(0)`), `topk_mask` selects over all ranks' shards and `local_mask`
returns the mask of this rank's rows, for `deftx_kernels.sparse_adamw` on local tensors. Ranks exchange histograms and
the mask, never scores.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from deftx_kernels.mask import CSRMask, column_dtype, rows_and_columns
from deftx_kernels.select.functional import selected_counts
from deftx_kernels.select.streaming import count_equal, find_threshold
from deftx_kernels.validation import check_devices, check_finite, check_float, check_mask_layout, check_plain


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
    return CSRMask.from_flat_indices(names, shapes, _gather_all(mine.flat_indices(offsets), group).sort().values)


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


def _try(function: Callable, *arguments: Any) -> tuple[str | None, Any]:
    """(None, the function's result), or (the message of its error, {})."""
    try:
        return None, function(*arguments)
    except (TypeError, ValueError) as error:
        return str(error), {}


def _local_scores(scores: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """This rank's rows of each tensor, checked."""
    if not isinstance(scores, Mapping) or not scores:
        raise ValueError("scores must be a mapping of names to tensors, with at least one")
    local = {}
    for name, tensor in scores.items():
        if isinstance(tensor, DTensor):
            _check_placement(name, tensor)
            if (mine := tensor.device_mesh.mesh.tolist()) != (ranks := dist.get_process_group_ranks(group)):
                raise ValueError(f"scores[{name!r}] is on the ranks {mine}, the group consists of {ranks}")
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


def _exchange(error: str | None, content: Any, group: dist.ProcessGroup | None) -> list:
    """Every rank's content; or, if any rank has an error, the same ValueError on all of them."""
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (error, content), group=group)
    for rank, (message, _) in enumerate(everyone):
        if message is not None:
            raise ValueError(f"rank {rank}: {message}")
    contents = [c for _, c in everyone]
    if isinstance(content, dict) and any(c.keys() != contents[0].keys() for c in contents):
        raise ValueError("scores must have the same names on all ranks")
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


def _gather_all(flat: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' int64 tensors, concatenated; their lengths may differ."""
    sizes = _exchange(None, len(flat), group)
    padded = torch.nn.functional.pad(flat, (0, max(sizes) - len(flat)))
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded, group=group)
    return torch.cat([part[:size] for part, size in zip(everyone, sizes)])
