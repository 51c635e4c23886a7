"""One mask for a process group: of this rank's rows, sent to all ranks, compared."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from deftx_kernels.mask.csr_mask import CSRMask
from deftx_kernels.mask.shards import check_placement, check_rows, exchange, is_dtensor, local_part
from deftx_kernels.ops.schemas import column_dtype, rows_and_columns
from deftx_kernels.validation import check_plain


def local_mask(mask: CSRMask, params: Mapping[str, Tensor]) -> CSRMask:
    """The mask for the `to_local()` tensors of DTensor parameters placed `Shard(0)`: the entries in this rank's rows.

    Raises:
        ValueError, TypeError: a parameter is missing, no tensor, has another shape, or is placed otherwise than
            `Shard(0)` or `Replicate()`.
    """
    parts = []
    for name, shape in zip(mask.names, mask.shapes):
        if name not in params:
            raise ValueError(f"params lacks tensor {name!r}, which the mask covers")
        param = params[name]
        if not is_dtensor(param):
            check_plain(param, f"params[{name!r}]")
        if param.shape != shape:
            raise ValueError(f"params[{name!r}] has shape {list(param.shape)}, the mask was made for {list(shape)}")
        if is_dtensor(param):
            check_placement(name, param)
            check_rows(name, param)
        parts.append(local_part(mask[name], param))
    return CSRMask.joined(parts) if parts else mask


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
    fingerprints = exchange(None, mask.fingerprint(), group)
    if others := [rank for rank, f in enumerate(fingerprints) if f != fingerprints[0]]:
        raise ValueError(
            f"the mask of rank 0 differs from that of ranks {others}: select it from common scores, or broadcast_mask"
        )
