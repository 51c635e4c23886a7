"""One mask, and one patch, for a process group.

`topk_mask`, `select_mask` and `init_mask` select over all ranks' parts of scores or models, sharded or replicated: the
same mask on every rank, as one process selects. `svd_denoise` divides matrices over the ranks.

FSDP2: `SparseAdamW` takes DTensors that are placed by rows (`Shard(0)`) and a mask of the whole tensors. `local_mask`
returns the mask of this rank's rows, for `deftx_kernels.sparse_adamw` on local tensors.

A model that is sparsified, and then sharded with FSDP2 or wrapped in DDP, needs only the same mask on all ranks: its
trainable parameters are ordinary (compact) ones. For `SparseAdamW` on a plain model under DDP, `masked_allreduce_hook`
all-reduces only the masked entries of dense gradients.

`diff_patch` compares two versions of a model whose parameters are sharded by rows, `apply_patch_` writes a patch to
one. Ranks exchange the entries that changed, never weights.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deftx_kernels.delta.sharded import apply_patch_, diff_patch
from deftx_kernels.mask import CSRMask, column_dtype, rows_and_columns
from deftx_kernels.optim.arguments import check_covered, name_in_mask, trainable
from deftx_kernels.select.sharded import init_mask, select_mask, svd_denoise, topk_mask
from deftx_kernels.shards import (
    attempt,
    check_placement,
    check_rows,
    exchange,
    is_dtensor,
    local_part,
)
from deftx_kernels.validation import check_plain

__all__ = [
    "MaskedAllreduceState",
    "apply_patch_",
    "broadcast_mask",
    "check_same_mask",
    "diff_patch",
    "init_mask",
    "local_mask",
    "masked_allreduce_hook",
    "select_mask",
    "svd_denoise",
    "topk_mask",
]


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


# ---- DDP ----
class MaskedAllreduceState:
    """The state of `masked_allreduce_hook`.

    Args:
        named_params: `model.named_parameters()`. Parameters that need no gradient are left out.
        mask: the entries of some of them that are trained; the same on all ranks. `update_mask(mask)` changes it later,
            with the optimizer's.
        group: of the DistributedDataParallel; by default all ranks.

    Raises:
        ValueError, on every rank: the ranks have different masks, or the mask does not fit the parameters.
    """

    def __init__(
        self, named_params: Iterable[tuple[str, Tensor]], mask: CSRMask, group: dist.ProcessGroup | None = None
    ) -> None:
        self.group, self._named_params = group, list(named_params)
        self.update_mask(mask)

    def update_mask(self, mask: CSRMask) -> None:
        """Average other entries from now on. All ranks call it; errors as in the constructor."""
        error, found = attempt(_covered, self._named_params, mask)
        exchange(error, None, self.group)
        check_same_mask(mask, self.group)
        self.mask = mask
        self._covered: dict[int, tuple[str, Tensor]] = found
        self._of_buckets: dict[tuple[int, ...], CSRMask] = {}

    def names_and_mask(self, params: Sequence[Tensor]) -> tuple[list[str | None], CSRMask | None]:
        """The name in the mask of each parameter of a bucket, None for those outside; and the mask of the others."""
        names = [self._covered[id(p)][0] if id(p) in self._covered else None for p in params]
        if not (covered := [name for name in names if name is not None]):
            return names, None
        key = tuple(map(id, params))
        if key not in self._of_buckets:  # DDP makes its buckets anew after the first backward
            others = {ids: mask for ids, mask in self._of_buckets.items() if not {*ids} & {*key}}
            self._of_buckets = others | {key: self.mask.restrict(covered).to(params[0].device)}
        return names, self._of_buckets[key]


def _covered(named_params: Iterable[tuple[str, Tensor]], mask: CSRMask) -> dict[int, tuple[str, Tensor]]:
    """id → name in the mask, and parameter, of the parameters that a mask covers."""
    if not isinstance(mask, CSRMask):
        raise TypeError(f"mask must be a CSRMask, got {type(mask).__name__}")
    params = {name_in_mask(name, mask): param for name, param in trainable(named_params)}
    check_covered(mask, params)
    shapes = dict(zip(mask.names, mask.shapes))
    found = {}
    for name, param in params.items():
        if name in shapes and param.shape != shapes[name]:
            raise ValueError(f"{name!r} has shape {list(param.shape)}, the mask was made for {list(shapes[name])}")
        if name in shapes:
            found[id(param)] = name, param
    return found


def masked_allreduce_hook(state: MaskedAllreduceState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook for DistributedDataParallel: averages the masked entries of gradients over the ranks.

    For `SparseAdamW` on a plain model. Of parameters that the mask covers only the masked entries are sent; the other
    entries of their gradients are 0 afterwards. Gradients of other parameters are averaged as by DDP itself. A
    sparsified model needs no hook: its gradients are compact.

    Example:
        >>> state = MaskedAllreduceState(model.named_parameters(), mask)  # doctest: +SKIP
        >>> model = DistributedDataParallel(model)  # doctest: +SKIP
        >>> model.register_comm_hook(state, masked_allreduce_hook)  # doctest: +SKIP
    """
    grads, (names, mask) = bucket.gradients(), state.names_and_mask(bucket.parameters())
    masked = {name: grad for name, grad in zip(names, grads) if name is not None}
    others = [grad for name, grad in zip(names, grads) if name is None]
    sent = ([] if mask is None else [mask.gather(masked)]) + [grad.reshape(-1) for grad in others]
    flat = torch.cat(sent).div_(dist.get_world_size(state.group))
    future = dist.all_reduce(flat, group=state.group, async_op=True).get_future()

    buffer, sizes = bucket.buffer(), [part.numel() for part in sent]

    def write(reduced: torch.futures.Future) -> Tensor:
        parts = list(reduced.value()[0].split(sizes))
        buffer.zero_()
        if mask is not None:
            mask.scatter_(masked, parts.pop(0))
        for grad, part in zip(others, parts):
            grad.copy_(part.view(grad.shape))
        return buffer

    return future.then(write)
