"""Sparsified models that FSDP2 has sharded.

FSDP2 divides the dense tensor of an entry by rows, and its values by elements, over the same ranks. It gathers both for
forward and backward, and reduces the gradient of the values. After a step of an optimizer, which changes each rank's
values, the ranks exchange those that are in another one's rows, and each writes its rows: so what FSDP2 gathers holds
the values. All ranks call the functions that exchange something.
"""

import weakref
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.shards import (
    Redistribution,
    check_placement,
    check_same,
    entry_bounds,
    exchange,
    is_dtensor,
    local_part,
    local_tensor,
    mesh_of_rows,
    row_bounds,
)
from deftx_kernels.nn.entries import Entry, entries_of
from deftx_kernels.ops.schemas import compute_dtype


def check_shards(entry: Entry) -> None:
    """ValueError unless the tensors of a sharded entry are divided by rows, and by elements, over one mesh."""
    for tensor in (entry.dense, entry.values):
        check_placement(entry.name, tensor)
    if (mesh := mesh_of_rows(entry.values)) is None or mesh_of_rows(entry.dense) != mesh:
        raise ValueError(f"{entry.name!r} and its values must be placed Shard(0) on one mesh")


class _Batch:
    """Sharded entries of one mesh, device, and dtype of the values and of the dense tensors."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            check_shards(entry)
        self.entries, self.mesh = list(entries), mesh_of_rows(entries[0].values)
        elements = [row_bounds(e.values.shape, self.mesh.size()) for e in entries]
        rows = [entry_bounds(e.mask, self.mesh.size()) for e in entries]
        self._to_rows = Redistribution(elements, rows, self.mesh.get_group())
        self._to_values = Redistribution(rows, elements, self.mesh.get_group())
        self.device = entries[0].mask.device  # of the group's backend; parameters may be offloaded to the CPU
        self.mask = CSRMask.joined([local_part(e.mask, e.dense) for e in entries])  # of this rank's rows
        if not entries[0].dense.is_meta:
            self.mask = self.mask.to(entries[0].dense.device)

    def of_rows(self, values: Sequence[Tensor]) -> Tensor:
        """[nnz of this rank's rows]: their values, from this rank's part of all values."""
        return self._to_rows([local_tensor(v).to(self.device) for v in values])

    def in_rows(self, dense: Sequence[Tensor]) -> Tensor:
        """[nnz of this rank's rows]: what these hold."""
        local = [local_tensor(t) for t in dense]
        mask = self.mask.to(local[0].device)
        return torch.ops.deftx.csr_gather(local, mask.crow_indices, mask.col_indices)

    def write_rows(self) -> None:
        """Write the values into the rows of the dense tensors."""
        dense = [local_tensor(e.dense) for e in self.entries]
        values = self.of_rows([e.values for e in self.entries]).to(dense[0])
        torch.ops.deftx.csr_scatter_(dense, self.mask.crow_indices, self.mask.col_indices, values)

    def check_rows(self) -> None:
        """ValueError, on all ranks, unless the rows of the dense tensors hold the values."""
        found, error = self.in_rows([e.dense for e in self.entries]), None
        wanted = self.of_rows([local_tensor(e.values) for e in self.entries]).to(found)
        differs = (found != wanted) & ~(found.isnan() & wanted.isnan())
        if len(at := differs.nonzero()):
            name = self.entries[bisect_right(self.mask.entry_offsets, int(at[0])) - 1].name
            error = (
                f"{name!r} does not hold its values: other code has written one of the two since fully_shard. Load "
                "weights with load_state_dict, which writes both (a plain model's state has no values)"
            )
        exchange(error, None, self.mesh.get_group())

    def read_rows(self) -> None:
        """Read the values from the rows. Values that round to what these hold stay, in their precision."""
        values, dense = [local_tensor(e.values) for e in self.entries], [e.dense for e in self.entries]
        found = self._to_values([self.in_rows(dense).to(self.device, values[0].dtype)])
        for mine, part in zip(values, found.to(values[0].device).split([len(v) for v in values])):
            same = mine.to(dense[0].dtype).to(mine.dtype) == part
            mine.copy_(torch.where(same, mine, part))


_batches: weakref.WeakKeyDictionary[Optimizer, tuple[list, list[_Batch]]] = weakref.WeakKeyDictionary()


def _batches_of(optimizer: Optimizer) -> list[_Batch]:
    """The sharded entries that an optimizer trains. All ranks call it."""
    params = [p for group in optimizer.param_groups for p in group["params"] if is_dtensor(p)]
    found = entries_of(params) if params else {}
    entries = [found[id(p)] for p in params if id(p) in found]
    if not entries:
        return []
    kinds = [(e, e.dense.device, e.dense.dtype, e.values.dtype, e.values.device_mesh) for e in entries]
    if _batches.get(optimizer, ([],))[0] != kinds:
        for entry in entries:
            check_shards(entry)
        masks = [(e.name, e.mask.fingerprint()) for e in entries]
        message = "the model was sparsified with another mask on rank 0 than on ranks {ranks}"
        check_same(masks, message, dict.fromkeys(e.values.device_mesh for e in entries))
        by_kind: dict[tuple, list[Entry]] = {}
        for entry, *kind in kinds:
            by_kind.setdefault(tuple(kind), []).append(entry)
        _batches[optimizer] = kinds, [_Batch(batch) for batch in by_kind.values()]
    return _batches[optimizer][1]


def _check_before_first_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if optimizer in _batches:
        return
    try:
        for batch in _batches_of(optimizer):
            if not batch.entries[0].dense.is_meta:
                batch.check_rows()
    except ValueError:
        _batches.pop(optimizer, None)
        raise


def _write_rows_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for batch in _batches_of(optimizer):
        batch.write_rows()


register_optimizer_step_pre_hook(_check_before_first_step)
register_optimizer_step_post_hook(_write_rows_after_step)


# ---- states and conversions ----
def shards_match(entry: Entry, dense: Tensor | None, values: Tensor | None) -> bool:
    """`Entry.matches` of what a state has for a sharded entry, on all ranks alike. ValueError on all of them if they
    were not given the same.
    """
    batch = _Batch([entry])
    given = [None if t is None else (tuple(t.shape), str(getattr(t, "placements", ""))) for t in (dense, values)]
    message = f"the state of {entry.name!r} on rank 0 differs from that of ranks {{ranks}}"
    check_same(given, message, [batch.mesh])
    if dense is None or values is None:
        return True
    if given != [(tuple(t.shape), str(t.placements)) for t in (entry.dense, entry.values)]:
        return True  # torch reports other shapes and placements
    near = entry.are_near(batch.in_rows([dense]), batch.of_rows([values]))
    return all(exchange(None, near, batch.mesh.get_group()))


def synchronise_shards(entry: Entry, from_values: bool) -> None:
    """Write the values of a sharded entry into its dense tensor, or read them from it."""
    batch = _Batch([entry])
    batch.write_rows() if from_values else batch.read_rows()


def after_apply(entry: Entry, dense: nn.Parameter, values: nn.Parameter, before: Tensor) -> None:
    """The two tensors of a sharded entry have been cast or moved: a cast to 16 bits leaves `before`, the values."""
    if values.dtype != (dtype := compute_dtype(dense.dtype)):
        torch.utils.swap_tensors(values, nn.Parameter(before.to(dtype), values.requires_grad))
    was_cast = entry.synchronised_dtype != dense.dtype
    entry.set_tensors(dense, values)
    entry.synchronised_dtype = dense.dtype
    if was_cast and not dense.is_meta:
        synchronise_shards(entry, from_values=True)
