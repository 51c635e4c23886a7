"""Tensors of which each rank of a process group has some rows: DTensors placed `Shard(0)`, as FSDP2's parameters.

`torch.distributed.tensor` takes seconds to import, so nothing here imports it: where it is not loaded, no tensor is a
DTensor.
"""

import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from deftx_kernels.mask.csr_mask import CSRMask


# ---- ranks ----
def attempt(function: Callable, *arguments: Any) -> tuple[str | None, Any]:
    """(None, the function's result), or (the message of its error, {})."""
    try:
        return None, function(*arguments)
    except Exception as error:  # of any kind: without an answer the other ranks would wait
        return str(error) or repr(error), {}


def exchange(error: str | None, content: Any, group: dist.ProcessGroup | None) -> list:
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


def check_same_arguments(arguments: dict[str, Any], group: dist.ProcessGroup | None, error: str | None = None) -> None:
    """ValueError, the same on all ranks, unless the arguments are; or where one of the ranks has an error."""
    everyone = exchange(error, [*arguments.items()], group)
    for rank, theirs in enumerate(everyone):
        for (name, first), (_, other) in zip(everyone[0], theirs):
            if first != other and (first == first or other == other):  # NaN differs from itself
                values = f"{reprlib.repr(first)} on rank 0 and {reprlib.repr(other)} on rank {rank}"
                raise ValueError(f"{name} must be the same on all ranks, got {values}")


def in_common_order(tensors: Mapping[Any, Tensor], argument: str, group: dist.ProcessGroup | None) -> dict[Any, Tensor]:
    """The tensors in the order that rank 0 has them in. ValueError, on all ranks, unless all have the same names."""
    everyone = exchange(None, list(tensors), group)
    for rank, names in enumerate(everyone):
        for one, other, without in ((everyone[0], names, rank), (names, everyone[0], 0)):
            if missing := sorted({*one} - {*other}, key=str):
                wanted = f"{argument} must have the same tensors on all ranks"
                raise ValueError(f"{wanted}: rank {without} has no {missing[0]!r}")
    return {name: tensors[name] for name in everyone[0]}


def tied_on_all_ranks(
    tied: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup | None,
    error: str | None = None,  # of this rank
) -> dict[str, str]:
    """Name → the first name of the same tensor, from each rank's names, in one order, and parts of the tensors.

    Tied are those that are on each rank with elements of them: a rank without any cannot see it.
    """
    without = {n for n, t in tensors.items() if not t.numel()}
    everyone = exchange(error, (dict(tied), without), group)
    found = {n: first for names, _ in everyone for n, first in names.items() if n != first}
    agreed = {n for n, first in found.items() if all(t.get(n) == first or n in empty for t, empty in everyone)}
    return {n: found[n] if n in agreed else n for n in tensors}


@contextmanager
def errors_on_all_ranks(meshes: Iterable[Any]) -> Iterator[None]:
    """An error of the body on any rank of the meshes is a ValueError on all of them. Without meshes, nothing changes.

    All ranks wait for each other at the end of the body, which may contain no collective.
    """
    if not (groups := [mesh.get_group() for mesh in meshes]):
        yield
        return
    found: Exception | None = None
    try:
        yield
    except Exception as error:
        found = error
    for group in groups:
        try:
            exchange(None if found is None else str(found), None, group)
        except ValueError as error:
            raise error from found


def check_same(content: Any, message: str, meshes: Iterable[Any]) -> None:
    """ValueError, on all ranks, unless the content is equal on all of them. `message` has a field {ranks}."""
    for mesh in meshes:
        contents = exchange(None, [content], mesh.get_group())
        if others := [rank for rank, other in enumerate(contents) if other != contents[0]]:
            raise ValueError(message.format(ranks=others))


def gather_all(flat: Tensor, group: dist.ProcessGroup | None, sizes: list[int] | None = None) -> list[Tensor]:
    """The flat tensors of all ranks; their lengths may differ. `sizes`: the lengths, where they are known."""
    sizes = exchange(None, len(flat), group) if sizes is None else sizes
    if not max(sizes):
        return [flat for _ in sizes]
    padded = pad(flat, (0, max(sizes) - len(flat)))
    everyone = [torch.empty_like(padded) for _ in sizes]
    # As bytes: no backend takes every dtype.
    dist.all_gather([t.view(torch.uint8) for t in everyone], padded.view(torch.uint8), group=group)
    return [part[:size] for part, size in zip(everyone, sizes)]


# ---- DTensors ----
def is_dtensor(tensor: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_placement(name: str, tensor: Any) -> None:
    """ValueError unless a DTensor is placed by rows, or replicated, on a mesh of one dimension."""
    placements = tensor.placements
    if len(placements) != 1 or not (placements[0].is_shard(0) or placements[0].is_replicate()):
        raise ValueError(f"tensor {name!r} must be placed Shard(0) or Replicate() on a 1-D mesh, got {placements}")


def check_ranks(label: str, tensor: Any, group: dist.ProcessGroup | None) -> None:
    """ValueError unless the mesh of a DTensor has the ranks of the group."""
    if (mine := tensor.device_mesh.mesh.tolist()) != (ranks := dist.get_process_group_ranks(group)):
        raise ValueError(f"{label} is on the ranks {mine}, the group consists of {ranks}")


def mesh_of_rows(tensor: Tensor) -> Any:
    """The mesh over whose ranks the rows of a tensor are divided; None for one that each rank has as a whole."""
    if is_dtensor(tensor) and tensor.placements[0].is_shard(0):  # type: ignore[attr-defined]
        return tensor.device_mesh  # type: ignore[attr-defined]
    return None


def meshes_of(tensors: Iterable[Tensor], *, of_rows: bool = False) -> list[Any]:
    """The meshes of the DTensors among these tensors, or of those that are divided by rows only. Meshes of two
    dimensions, and those that this rank is not part of, are left out.
    """
    chosen: Iterable[Any] = (t for t in tensors if is_dtensor(t) and (not of_rows or mesh_of_rows(t) is not None))
    meshes = dict.fromkeys(t.device_mesh for t in chosen)
    return [mesh for mesh in meshes if mesh.ndim == 1 and mesh.get_coordinate() is not None]


@torch.no_grad()
def local_tensor(tensor: Any) -> Tensor:
    """This rank's part of a DTensor, in the same memory; another tensor itself."""
    return tensor.to_local().detach() if is_dtensor(tensor) else tensor


@torch.no_grad()
def whole_tensor(tensor: Any) -> Tensor:
    """The whole of a DTensor, on every rank: all of them call it. Another tensor itself."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


@torch.no_grad()
def local_gradient(param: Any) -> Tensor | None:
    """The gradient of this rank's part. A DTensor's gradient is brought to the parameter's placement first."""
    grad = param.grad
    if grad is None or not is_dtensor(param):
        return grad
    if grad.placements != param.placements:  # the sum over the ranks is pending
        grad = grad.redistribute(placements=param.placements)
    return grad.to_local()


def row_bounds(shape: torch.Size, ranks: int) -> list[int]:
    """[ranks + 1]: where the rows of each rank begin, as `torch.chunk` and `Shard(0)` divide them."""
    rows = -(-shape[0] // ranks)
    return [min(rank * rows, shape[0]) for rank in range(ranks + 1)]


def check_rows(name: str, tensor: Any) -> None:
    """ValueError unless a DTensor that passed `check_placement` has the rows that `row_bounds` expects."""
    rank, found = tensor.device_mesh.get_coordinate(), list(local_tensor(tensor).shape)
    if rank is None:
        raise ValueError(f"tensor {name!r} is on a mesh that this rank is not part of")
    wanted = list(tensor.shape)
    if mesh_of_rows(tensor) is not None:
        bounds = row_bounds(tensor.shape, tensor.device_mesh.size())
        wanted[0] = bounds[rank[0] + 1] - bounds[rank[0]]
    if found != wanted:
        raise ValueError(f"tensor {name!r} has the shape {found} on this rank, Shard(0) of a whole tensor {wanted}")


def placed_like(local: Tensor, tensor: Any) -> Tensor:
    """This rank's contiguous part of a new tensor, which is placed as a DTensor; itself for another tensor."""
    if not is_dtensor(tensor):
        return local
    strides = torch.empty(tensor.shape, device="meta").stride()
    placement = dict(device_mesh=tensor.device_mesh, placements=tensor.placements)
    return type(tensor).from_local(local, **placement, run_check=False, shape=tensor.shape, stride=strides)


# ---- masks of parts ----
def entry_bounds(mask: CSRMask, ranks: int) -> list[int]:
    """[ranks + 1]: where the entries of each rank's rows begin in the compact tensors of a mask of one tensor."""
    (shape,) = mask.shapes
    bounds = row_bounds(shape, ranks)
    if len(shape) > 1:
        return mask.crow_indices[bounds].tolist()
    limits = torch.tensor(bounds, dtype=torch.int32, device=mask.device)  # one row, divided by columns
    return torch.searchsorted(mask.col_indices.to(torch.int32), limits).tolist()


def compact_bounds(mask: CSRMask, tensor: Tensor, ranks: int) -> list[int]:
    """`entry_bounds` of a dense tensor; of the values [nnz] of a sparsified model, where each rank's part begins."""
    if tensor.shape != mask.shapes[0]:
        return row_bounds(tensor.shape, ranks)
    return entry_bounds(mask, ranks)


def local_entries(mask: CSRMask, tensor: Any) -> slice:
    """Where this rank's entries (see `compact_bounds`) are in a compact tensor of a mask of this one tensor."""
    if (mesh := mesh_of_rows(tensor)) is None:
        return slice(0, mask.nnz)
    rank = mesh.get_local_rank()
    return slice(*compact_bounds(mask, tensor, mesh.size())[rank : rank + 2])


def local_part(mask: CSRMask, tensor: Any) -> CSRMask:
    """The mask of this rank's part of a tensor, from a mask of the whole tensor alone."""
    if (mesh := mesh_of_rows(tensor)) is None:
        return mask
    (name,), (shape,) = mask.names, mask.shapes
    rank, entries = mesh.get_local_rank(), local_entries(mask, tensor)
    start, stop = row_bounds(shape, mesh.size())[rank : rank + 2]
    columns = mask.col_indices[entries].to(torch.int32)
    if len(shape) > 1:
        crow = mask.crow_indices[start : stop + 1] - entries.start
    else:
        columns = columns - start
        crow = torch.tensor([0, len(columns)], dtype=torch.int64, device=mask.device)
    return CSRMask.unchecked((name,), (torch.Size((stop - start, *shape[1:])),), crow, columns)


def gather_entries(mask: CSRMask, tensor: Tensor) -> Tensor:
    """[nnz], on every rank: `mask.gather` of one tensor, of which ranks may have rows. All of them call it."""
    (name,), local = mask.names, local_tensor(tensor).detach()
    mine = local_part(mask, tensor).to(local.device).gather({name: local})
    if (mesh := mesh_of_rows(tensor)) is None:
        return mine
    bounds = entry_bounds(mask, mesh.size())
    sizes = [end - start for start, end in zip(bounds, bounds[1:])]
    return torch.cat(gather_all(mine, mesh.get_group(), sizes))


class Redistribution:
    """Flat tensors that are divided over the ranks of a group at some bounds become divided at others. A rank sends to
    another one only what that needs.

    Args:
        before, after: of each tensor [ranks + 1]: where the part of each rank begins.
    """

    def __init__(self, before: Sequence[list[int]], after: Sequence[list[int]], group: dist.ProcessGroup) -> None:
        rank, self.ranks, self.group = dist.get_rank(group), dist.get_world_size(group), group
        pairs = list(product(range(len(before)), range(self.ranks)))
        # Elements by (tensor, rank) that gets them, and by (rank, tensor) that sends them
        sent = {(i, r): _common(before[i], rank, after[i], r) for i, r in pairs}
        received = {(r, i): _common(after[i], rank, before[i], r) for i, r in pairs}
        self._sent, self._received = ({k: n for k, n in sizes.items() if n} for sizes in (sent, received))

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """This rank's new parts, one tensor after the other. `parts`: its present part of each, of one dtype."""
        sent = _regrouped(torch.cat(list(parts)), self._sent)
        sizes = [[0] * self.ranks, [0] * self.ranks]
        for (_, to), n in self._sent.items():
            sizes[0][to] += n
        for (source, _), n in self._received.items():
            sizes[1][source] += n
        received = sent.new_empty(sum(sizes[1]))
        dist.all_to_all_single(received, sent, sizes[1], sizes[0], group=self.group)
        return _regrouped(received, self._received)


def _common(bounds: list[int], rank: int, others: list[int], other: int) -> int:
    """How many elements two ranks' parts have in common."""
    return max(0, min(bounds[rank + 1], others[other + 1]) - max(bounds[rank], others[other]))


def _regrouped(flat: Tensor, sizes: dict[tuple[int, int], int]) -> Tensor:
    """The parts of a flat tensor, which are in the order of their keys (a, b), in the order of (b, a)."""
    keys = sorted(sizes)
    parts = dict(zip(keys, flat.split([sizes[key] for key in keys])))
    return torch.cat([parts[key] for key in sorted(keys, key=lambda key: key[::-1])]) if parts else flat
