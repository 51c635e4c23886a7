"""A communication hook for DistributedDataParallel that averages only the masked entries of gradients."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.over_ranks import check_same_mask
from deftx_kernels.mask.shards import attempt, exchange
from deftx_kernels.optim.arguments import check_covered, name_in_mask, trainable


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
