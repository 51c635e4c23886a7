"""One mask for a whole process group.

DDP needs nothing of this module beyond a common mask: a sparsified model's trainable parameters are ordinary (compact)
ones. Where parameters are sharded by rows (FSDP2's `Shard(0)`), `topk_mask` selects over all ranks' shards and
`local_mask` gives the rows of this rank, on which `deftx_kernels.sparse_adamw` works with local tensors. Ranks exchange
histograms and the mask, never scores.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from deftx_kernels.mask import CSRMask
from deftx_kernels.ops.schemas import column_dtype, rows_and_columns
from deftx_kernels.select.functional import selected_counts
from deftx_kernels.select.streaming import count_equal, find_threshold
from deftx_kernels.validation import check_devices, check_finite, check_float, check_plain


def topk_mask(
    scores: Mapping[str, Tensor],
    *,
    k: int | None = None,
    density: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> CSRMask:
    """`deftx_kernels.topk_mask` with scope "global" over tensors whose rows are spread over a process group.

    Args:
        scores: on every rank the same names, each with this rank's rows: a DTensor placed `Shard(0)`, or a plain
            tensor, of which the pieces follow each other along dimension 0 in the order of the ranks (a rank may have
            none). One floating dtype.
        k, density: as in `deftx_kernels.topk_mask`, of the whole tensors.
        group: by default all ranks.

    Returns:
        The mask of the whole tensors, the same on every rank, on this rank's device.

    Raises:
        ValueError, TypeError: on every rank alike, whichever rank's argument is wrong.
    """
    problem, local = _try_local(scores, group)
    if len(set(_exchange(problem, (k, density), group))) > 1:
        raise ValueError(f"k and density must be the same on all ranks, got k={k}, density={density} on this one")
    pieces = _exchange(None, {n: (t.shape, t.dtype) for n, t in local.items()}, group)
    names = sorted(local)
    shapes = [_whole_shape(name, [p[name][0] for p in pieces]) for name in names]
    CSRMask.check_layout(names, shapes)
    if len({p[n][1] for p in pieces for n in names}) > 1:
        raise ValueError(
            f"scores must have one dtype on all ranks, got {sorted({str(p[n][1]) for p in pieces for n in names})}"
        )
    [count] = selected_counts(names, shapes, k, density, "global")
    tensors = [local[n] for n in names]
    _exchange(_not_finite(local), None, group)
    threshold, ties = _threshold(tensors, count, group)
    quotas = _tie_quotas(tensors, threshold, ties, group)
    mine = CSRMask._trusted(
        names, [t.shape for t in tensors], *torch.ops.deftx.threshold_mask(tensors, threshold, quotas)
    )
    rank, layout, tensor_start = dist.get_rank(group), {}, 0
    for name, shape in zip(names, shapes):  # where this rank's rows begin in the whole tensors, one after the other
        layout[name] = tensor_start + sum(p[name][0].numel() for p in pieces[:rank])
        tensor_start += shape.numel()
    return CSRMask._from_keys(names, shapes, _gather_varying(mine._keys(layout), group).sort().values)


def local_mask(mask: CSRMask, params: Mapping[str, Tensor]) -> CSRMask:
    """The entries in this rank's rows of DTensor parameters placed `Shard(0)`: the mask for their `to_local()` tensors.

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
            selected = (
                DTensor.from_local(selected, param.device_mesh, [Replicate()])
                .redistribute(placements=param.placements)
                .to_local()
            )
        dense[name] = selected
    return CSRMask.from_dense(dense)


def broadcast_mask(mask: CSRMask | None, src: int = 0, group: dist.ProcessGroup | None = None) -> CSRMask:
    """The mask of rank `src` (of the default group) on every rank; the others may pass None.

    It arrives on the device that the group's backend communicates from. ValueError on every rank where `src` passed no
    mask.
    """
    layout = [None if mask is None else (mask.names, [list(s) for s in mask.shapes], mask.nnz)]
    dist.broadcast_object_list(layout, src=src, group=group)
    if layout[0] is None:
        raise ValueError(f"mask: rank {src} has none to broadcast")
    names, shapes, nnz = layout[0]
    if dist.get_rank() != src or mask is None:
        device = torch.device("cuda") if dist.get_backend(group) == "nccl" else torch.device("cpu")
        rows = sum(rows_and_columns(s)[0] for s in shapes)
        empty = (
            torch.empty(rows + 1, dtype=torch.int64, device=device),
            torch.empty(nnz, dtype=column_dtype(shapes), device=device),
        )
        mask = CSRMask._trusted(names, shapes, *empty)
    dist.broadcast(mask.crow_indices, src=src, group=group)
    dist.broadcast(mask.col_indices.view(torch.uint8), src=src, group=group)
    return mask


def check_same_mask(mask: CSRMask, group: dist.ProcessGroup | None = None) -> None:
    """ValueError, naming the ranks, unless every rank has this mask: a mask made from local gradients differs from rank
    to rank.
    """
    fingerprints = _exchange(None, mask.fingerprint(), group)
    if others := [rank for rank, f in enumerate(fingerprints) if f != fingerprints[0]]:
        raise ValueError(
            f"the mask of rank 0 differs from that of ranks {others}: select it from common scores, or broadcast_mask"
        )


def _try_local(scores: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> tuple[str | None, dict[str, Tensor]]:
    """What is wrong with this rank's scores, or this rank's piece of each."""
    try:
        if not isinstance(scores, Mapping) or not scores:
            raise ValueError("scores must be a mapping of names to tensors, with at least one")
        local = {}
        for name, tensor in scores.items():
            if isinstance(tensor, DTensor):
                _check_placement(name, tensor)
                if (mine := tensor.device_mesh.mesh.tolist()) != (ranks := dist.get_process_group_ranks(group)):
                    raise ValueError(f"scores[{name!r}] lies on the ranks {mine}, the group consists of {ranks}")
                copies = tensor.placements[0].is_replicate() and dist.get_rank(group) > 0  # one rank's copy counts
                tensor = tensor.to_local()[:0] if copies else tensor.to_local()
            check_float(tensor, f"scores[{name!r}]")
            if tensor.dim() == 0:
                raise ValueError(f"scores[{name!r}] has no dimension to be spread over ranks")
            local[name] = tensor.detach().contiguous()
        check_devices(local, "scores")
        return None, local
    except (TypeError, ValueError) as error:
        return str(error), {}


def _check_placement(name: str, tensor: DTensor) -> None:
    if len(tensor.placements) != 1 or not (tensor.placements[0] == Shard(0) or tensor.placements[0].is_replicate()):
        raise ValueError(
            f"tensor {name!r} must be placed Shard(0) or Replicate() on a 1-D mesh, got {tensor.placements}"
        )


def _exchange(problem: str | None, content, group) -> list:
    """Every rank's content; or, if any rank has a problem, the same ValueError on all of them."""
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, (problem, content), group=group)
    for rank, (found, _) in enumerate(everyone):
        if found is not None:
            raise ValueError(f"rank {rank}: {found}")
    contents = [c for _, c in everyone]
    if isinstance(content, dict) and any(c.keys() != contents[0].keys() for c in contents):
        raise ValueError("scores must have the same names on all ranks")
    return contents


def _whole_shape(name: str, shapes: list[torch.Size]) -> torch.Size:
    if len({s[1:] for s in shapes}) > 1:
        raise ValueError(f"scores[{name!r}]: the ranks' pieces differ beyond dimension 0: {[list(s) for s in shapes]}")
    return torch.Size((sum(s[0] for s in shapes), *shapes[0][1:]))


def _not_finite(local: Mapping[str, Tensor]) -> str | None:
    try:
        for name in sorted(local):
            check_finite(local[name], f"scores[{name!r}] on this rank")
        return None
    except ValueError as error:
        return str(error)


def _threshold(tensors: list[Tensor], k: int, group) -> tuple[int, int]:
    def histogram(prefix: int, shift: int) -> Tensor:
        counts = torch.ops.deftx.magnitude_histogram(tensors, prefix, shift)
        dist.all_reduce(counts, group=group)
        return counts

    return find_threshold(histogram, tensors[0].element_size(), k)


def _tie_quotas(tensors: list[Tensor], threshold: int, ties: int, group) -> list[int]:
    """How many entries equal to the threshold this rank keeps of each tensor: earlier tensors first, then earlier
    ranks.
    """
    if ties == 0:
        return [0] * len(tensors)
    mine = torch.stack([count_equal([t], threshold) for t in tensors])
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    counts = torch.stack(everyone, dim=1).view(-1)  # tensor-major
    kept = (ties - (counts.cumsum(0) - counts)).clamp(min=0).minimum(counts).view(len(tensors), -1)
    return kept[:, dist.get_rank(group)].tolist()


def _gather_varying(keys: Tensor, group) -> Tensor:
    """All ranks' int64 keys; ranks may have different numbers of them."""
    size = torch.tensor([len(keys)], device=keys.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, size, group=group)
    most = max(int(s) for s in sizes)
    padded = torch.nn.functional.pad(keys, (0, most - len(keys)))
    everyone = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(everyone, padded, group=group)
    return torch.cat([part[: int(s)] for part, s in zip(everyone, sizes)])
