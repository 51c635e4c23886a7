"""Which rows of which tensors the ranks of a process group have, and how rows get from one rank to another."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deftx_kernels.mask.shards import (
    check_placement,
    check_ranks,
    check_rows,
    exchange,
    is_dtensor,
    mesh_of_rows,
    row_bounds,
)


class Rows(NamedTuple):
    """The rows that each rank has of a tensor; of a tensor of fewer than two dimensions, the elements."""

    shape: torch.Size  # of the whole tensor
    bounds: tuple[int, ...]  # [ranks + 1]: where the rows of each rank begin

    @classmethod
    def of_owner(cls, shape: torch.Size, owner: int, ranks: int) -> "Rows":
        """One rank has the whole tensor, the others nothing."""
        rows = shape[0] if shape else 1
        return cls(shape, (0,) * (owner + 1) + (rows,) * (ranks - owner))

    def range(self, rank: int) -> slice:
        return slice(*self.bounds[rank : rank + 2])

    def local_shape(self, rank: int) -> torch.Size:
        return torch.Size((self.bounds[rank + 1] - self.bounds[rank], *self.shape[1:]))

    def start(self, rank: int) -> int:
        """The flat index of a rank's first element in the whole tensor."""
        return self.bounds[rank] * self.shape[1:].numel()

    def of(self, whole: Tensor, rank: int) -> Tensor:
        """A rank's rows, from the whole tensor."""
        return (whole if whole.dim() else whole.reshape(1))[self.range(rank)]


def check_dtensor(tensor: Any, label: str, name: str, group: dist.ProcessGroup | None) -> None:
    """ValueError for a DTensor that is placed otherwise than by rows or replicated, on the ranks of the group."""
    if is_dtensor(tensor):
        check_placement(name, tensor)
        check_ranks(label, tensor, group)
        check_rows(name, tensor)


def rows_of_ranks(
    tensors: Mapping[Any, Tensor], argument: str, group: dist.ProcessGroup | None, *, of_rows: bool = False
) -> dict[Any, Rows | None]:
    """Which rows of each tensor the ranks have; None: each rank has the whole one. They passed `check_dtensor`.

    Args:
        of_rows: plain tensors are each rank's rows; else each rank has the whole ones.

    Raises:
        ValueError: on all ranks, unless shapes, dtypes, kinds of device and placements fit together.
    """
    mine = []
    for tensor in tensors.values():
        kind = "sharded" if mesh_of_rows(tensor) else "whole" if is_dtensor(tensor) or not of_rows else "rows"
        mine.append(_Layout(kind, tensor.shape, str(tensor.dtype), tensor.device.type))
    everyone, found = exchange(None, mine, group), {}
    for name, *layouts in zip(tensors, *everyone):
        for rank, layout in enumerate(layouts):
            if layout.fixed != layouts[0].fixed:
                one, other = f"{layouts[0]} on rank 0", f"{layout} on rank {rank}"
                raise ValueError(f"{argument}[{name!r}] must be one tensor, got {one} and {other}")
        kind, shape, _, _ = layouts[0]
        bounds: Iterable[int] = row_bounds(shape, len(layouts)) if kind == "sharded" else ()
        if kind == "rows":
            bounds = accumulate((layout.shape[0] for layout in layouts), initial=0)
        found[name] = _rows(shape, tuple(bounds))
    return found


def _rows(shape: torch.Size, bounds: tuple[int, ...]) -> Rows | None:
    return Rows(torch.Size((bounds[-1], *shape[1:])), bounds) if bounds else None


class _Layout(NamedTuple):
    """What one rank has as a tensor."""

    kind: str  # whole: each rank has the whole tensor; sharded: a DTensor of rows; rows: a plain tensor of rows
    shape: torch.Size
    dtype: str
    device: str

    @property
    def fixed(self) -> tuple:
        """What must be the same on all ranks."""
        return (self.kind, self.shape[1:] if self.kind == "rows" else self.shape, self.dtype, self.device)

    def __str__(self) -> str:
        return f"{self.kind} {list(self.shape)} {self.dtype} ({self.device})"


def moved(
    local: Tensor,  # contiguous
    source: Rows,
    target: Rows,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """This rank's rows of a tensor as `target` divides it. Each rank sends its rows only to those that get them."""
    if source.bounds == target.bounds:
        return local
    rank, transfers = dist.get_rank(group), []
    out = local.new_empty(target.local_shape(rank))
    for peer in range(dist.get_world_size(group)):
        sent = _common(source.bounds, rank, target.bounds, peer)
        received = _common(source.bounds, peer, target.bounds, rank)
        if peer == rank:
            out[sent[1]] = local[sent[0]]
            continue
        for transfer, part in ((dist.isend, local[sent[0]]), (dist.irecv, out[received[1]])):
            if part.numel():
                flat = part.view(-1).view(torch.uint8)  # as bytes: no backend takes every dtype
                transfers.append(dist.P2POp(transfer, flat, group=group, group_peer=peer))
    for work in dist.batch_isend_irecv(transfers) if transfers else []:
        work.wait()
    return out


def _common(source: Sequence[int], sender: int, target: Sequence[int], receiver: int) -> tuple[slice, slice]:
    """The rows that one rank sends to another: which of the sender's, and which of the receiver's."""
    start = max(source[sender], target[receiver])
    stop = max(start, min(source[sender + 1], target[receiver + 1]))
    one, other = (slice(start - first, stop - first) for first in (source[sender], target[receiver]))
    return one, other
