"""Shared by the kernels over the entries of a mask: an entry's row, tensor and address, and tables of addresses.

A program works on a range of the compact order. A table that is made once for a mask (`block_table`, 1/8 byte an entry)
says near which rows its entries are, and in which tensors; a few halvings then find each entry's row. A search for the
program's first and last row in each launch took more than half of its instructions (sm_90: 710 to 760 of 1,230 to 1,350
a warp), 25 of 28 barriers and 4 to 6 loads that wait for each other.
"""

import functools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deftx_kernels.kernels.tensors import overlapping, rows_and_columns

GROUP = 32  # consecutive entries with a first row of their own in a block table
HEAD = 3  # what a block has in a block table before these: rows to search, first tensor, last tensor

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _search_each(table, low, extra, keys):
    """For each key the last i in [low, low + extra] with table[i] <= key; table[low] <= key holds. low: [BLOCK]."""
    found = low
    while extra > 0:
        half = (extra + 1) >> 1
        found = tl.where(tl.load(table + (found + half)) <= keys, found + half, found)
        extra -= half
    return found


@triton.jit
def _rows_of(crow_indices, block, entry, BLOCK: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr):
    """int32 [BLOCK]: the rows of the entries. block: what the block table has of the program."""
    quads: tl.constexpr = BLOCK // 4
    # One load for 4 entries, which a thread has: it is not repeated for each of them.
    low = tl.load(block + HEAD + tl.arange(0, quads) // (GROUP // 4))
    low = tl.reshape(tl.broadcast_to(low[:, None], (quads, 4)), (BLOCK,))
    return _search_each(crow_indices, low, tl.load(block), entry)


@triton.jit
def _addresses_in(table, other_table, n_tensors, tensor, row, columns, DTYPE: tl.constexpr, OTHER: tl.constexpr):
    """Where the entries are in the tensors and in the other tensors. `tensor`: one for all entries, or one for each."""
    last = tl.load(table + 2 * n_tensors + tensor).to(tl.uint32)
    # A column outside its row is clamped to the last one (a negative one, too): a load mask would cost registers.
    column = tl.minimum(columns.to(tl.uint32), last)
    # Factors of 32 bits: one instruction, where a product of 64-bit numbers takes four.
    row_in_tensor = row.to(tl.uint32) - tl.load(table + n_tensors + tensor).to(tl.uint32)
    index = row_in_tensor.to(tl.int64) * (last + 1).to(tl.int64) + column.to(tl.int64)
    element = tl.load(table + tensor).to(tl.pointer_type(DTYPE)) + index
    other = element
    if other_table is not None:
        other = tl.load(other_table + tensor).to(tl.pointer_type(OTHER)) + index
    return element, other


@triton.jit
def locate(
    table,  # int64 [3, n_tensors], as `tensor_table` makes it
    other_table,  # int64 [n_tensors]: addresses of other tensors of the same shapes, or None
    crow_indices,  # int64 [rows + 1]
    blocks,  # int32 [programs, HEAD + BLOCK // GROUP], as `block_table` makes it
    n_tensors,
    entry,  # int64 [BLOCK]: the program's entries; at and after nnz, what is returned is meaningless
    columns,  # [BLOCK]: of col_indices
    DTYPE: tl.constexpr,
    OTHER: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
):
    """Pointers to the entries [BLOCK] in both lists of tensors: inside, whatever crow_indices and columns hold."""
    block = blocks + tl.program_id(0).to(tl.int64) * (HEAD + BLOCK // GROUP)
    row = _rows_of(crow_indices, block, entry, BLOCK, GROUP, HEAD)
    first, last = tl.load(block + 1), tl.load(block + 2)
    if first == last:  # common case: fewer loads and about 12 registers less than the general case
        element, other = _addresses_in(table, other_table, n_tensors, first, row, columns, DTYPE, OTHER)
    else:
        tensor = _search_each(table + n_tensors, tl.zeros_like(row) + first, last - first, row)
        element, other = _addresses_in(table, other_table, n_tensors, tensor, row, columns, DTYPE, OTHER)
    return element, other


@triton.jit
def _elements_in(table, other_table, starts, n_tensors, tensor, entry, DTYPE: tl.constexpr, OTHER: tl.constexpr):
    """As `_addresses_in`, for tensors that are one row each, whose entries are all elements."""
    index = entry - tl.load(starts + tensor)
    index = tl.maximum(tl.minimum(index, tl.load(table + 2 * n_tensors + tensor)), 0)
    element = tl.load(table + tensor).to(tl.pointer_type(DTYPE)) + index
    other = element
    if other_table is not None:
        other = tl.load(other_table + tensor).to(tl.pointer_type(OTHER)) + index
    return element, other


@triton.jit
def locate_full(
    table, other_table, starts, blocks, n_tensors, entry, DTYPE: tl.constexpr, OTHER: tl.constexpr, HEAD: tl.constexpr
):  # fmt: skip
    """As `locate`, where each tensor is one row and every element an entry. starts: int64 [n_tensors + 1]; blocks:
    int32 [programs, HEAD].
    """
    block = blocks + tl.program_id(0).to(tl.int64) * HEAD
    first, last = tl.load(block + 1), tl.load(block + 2)
    if first == last:
        element, other = _elements_in(table, other_table, starts, n_tensors, first, entry, DTYPE, OTHER)
    else:
        tensor = _search_each(starts, tl.zeros_like(entry).to(tl.int32) + first, last - first, entry)
        element, other = _elements_in(table, other_table, starts, n_tensors, tensor, entry, DTYPE, OTHER)
    return element, other


# ---- for the launchers ----
def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([t.data_ptr() for t in tensors])


@functools.lru_cache(maxsize=64)
def _layout(shapes: tuple[torch.Size, ...]) -> tuple[tuple[int, ...], tuple[int, ...], int, dict[int, int]]:
    """First row and last column of each tensor, the rows of all, and index → rows of the tensors without columns."""
    first_rows, last_columns, row, empty = [], [], 0, {}
    for i, shape in enumerate(shapes):
        rows, columns = rows_and_columns(shape)
        first_rows.append(row)
        last_columns.append(max(columns, 1) - 1)
        row += rows
        if columns == 0:
            empty[i] = rows
    return tuple(first_rows), tuple(last_columns), row, empty


def tensor_table(
    device: torch.device,
    order: tuple[int, ...],
    tensors: Sequence[Tensor],
    at: tuple[int, ...],
    rows: int,
    written: bool = False,
) -> Tensor:
    """int64 [3, n_tensors]: address, first row, last column. `order` as below; `at`: the tensors' addresses; `rows`: of
    the mask.

    Raises unless the tensors fit the mask. Device, layout and overlap are checked when the table is made: at each call,
    they would double the host's time.
    """
    first_rows, last_columns, end, empty = _layout(tuple([t.shape for t in tensors]))
    if end != rows or not 0 < rows < 2**31:  # the kernels count rows in 32 bits
        raise ValueError(
            f"crow_indices has {rows + 1} elements; the tensors have {end} rows, which need one more, at most 2**31"
        )
    check_dtype(tensors)
    at = _with_scratch(at, empty, device) if empty else at

    def check() -> None:
        _check_layout(tensors, device)
        if written and overlapping(tensors):
            raise ValueError("two tensors that are written share memory")

    return device_table(device, order, at + first_rows + last_columns, check)


def gradient_table(
    device: torch.device, order: tuple[int, ...], grads: Sequence[Tensor], params: Sequence[Tensor]
) -> Tensor:
    """int64 [n_tensors]: the addresses of dense gradients. Raises unless they have the shapes of the parameters."""
    if [g.shape for g in grads] != [p.shape for p in params]:
        raise ValueError("every gradient must have the shape of its parameter")
    check_dtype(grads)
    at, empty = addresses(grads), _layout(tuple([g.shape for g in grads]))[3]
    at = _with_scratch(at, empty, device) if empty else at
    return device_table(device, order, at, lambda: _check_layout(grads, device))


def _with_scratch(at: tuple[int, ...], empty: dict[int, int], device: torch.device) -> tuple[int, ...]:
    """The addresses, with scratch memory for tensors without columns: a wrong mask may have entries in their rows."""
    scratch = _scratch(device, max(empty.values())).data_ptr()
    return tuple([scratch if i in empty else a for i, a in enumerate(at)])


@functools.lru_cache
def _scratch(device: torch.device, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.float64, device=device)


def check_dtype(tensors: Sequence[Tensor]) -> None:
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= TRITON_DTYPE.keys():
        raise TypeError(f"tensors must have one floating dtype, got {', '.join(sorted(map(str, dtypes)))}")


def _check_layout(tensors: Sequence[Tensor], device: torch.device) -> None:
    for i, t in enumerate(tensors):
        if t.device != device or t.layout != torch.strided or not t.is_contiguous():
            raise ValueError(f"tensor {i} must be contiguous and on {device}, where the mask is")


_TABLES_KEPT = 64
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
# Kept tables that a captured graph reads. When the graph ends is unknown, so they stay: 24 bytes a tensor.
_captured: set[Tensor] = set()


def device_table(
    device: torch.device, order: tuple[int, ...], numbers: tuple[int, ...], check: Callable[[], None] | None = None
) -> Tensor:
    """`numbers` as an int64 tensor, kept for later calls with the same arguments; `check` is called where it is new.

    The numbers are passed as kernel arguments (`_foreach_add_` with a list of scalars takes 96 a launch), not by a copy
    from pinned memory: no host buffer has to outlive the copy, and a stream capture may contain it with every torch. A
    kept table may be used on another stream than the one that filled it. `order` makes that safe: calls with the same
    one run one after the other, because they write the tensors at the addresses in it (so their caller has to order
    them), or because it names their stream.
    """
    key = (device, order, numbers)
    table = _tables.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if table is None:
        if check is not None:
            check()
        table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
        torch._foreach_add_(table.unbind(), numbers)
        if not capturing:  # else its memory is the graph's, and only a replay fills it
            _tables[key] = table
            if len(_tables) > _TABLES_KEPT:
                _tables.popitem(last=False)
        return table
    _tables.move_to_end(key)
    if capturing:
        _captured.add(table)
    elif device.type == "cuda":
        table.record_stream(torch.cuda.current_stream(device))
    return table


class _BlockTable(NamedTuple):
    """A kept block table, and what it was made for beside the tensor `crow_indices`."""

    version: int
    first_rows: tuple[int, ...]
    tensors: Tensor  # the table of tensors of the last call: the same one has the same first rows
    table: Tensor
    filled: torch.cuda.Event | None  # None on the CPU
    captured: list[Tensor]  # it and older ones, where a captured graph reads them


# id(crow_indices) → crow_indices, (block, group) → what was made for it
_block_tables: dict[int, tuple[weakref.ref, dict[tuple, _BlockTable]]] = {}


def _block_tables_of(crow_indices: Tensor) -> dict[tuple, _BlockTable]:
    """As a WeakTensorKeyDictionary, whose look-up makes a weak reference (8 us of 10 for a block table, EPYC)."""
    key = id(crow_indices)
    found = _block_tables.get(key)
    if found is None or found[0]() is not crow_indices:

        def forget(reference: weakref.ref) -> None:
            if key in _block_tables and _block_tables[key][0] is reference:
                del _block_tables[key]

        found = _block_tables[key] = weakref.ref(crow_indices, forget), {}
    return found[1]


def block_table(
    table: Tensor, tensors: Sequence[Tensor], crow_indices: Tensor, nnz: int, block: int, group: int | None
) -> Tensor:
    """int32 [programs, HEAD + block // group]: what each program of `block` entries reads in place of a search. HEAD
    alone without a group. `table`: of these tensors, as `tensor_table` makes it.

    Kept as long as the tensor `crow_indices` is alive and unchanged. Calls on several streams may share it: they wait
    until it is filled. In a stream capture it was filled before, since a capture begins with a synchronisation
    (`torch.cuda.graph`); one that is made within is filled again in each replay.
    """
    version = 0 if crow_indices.is_inference() else crow_indices._version
    tables = _block_tables_of(crow_indices)
    kept = tables.get((block, group))
    on_cuda = crow_indices.device.type == "cuda"
    capturing = on_cuda and torch.cuda.is_current_stream_capturing()
    if kept is None or kept.version != version or kept.tensors is not table:
        first_rows = _layout(tuple([t.shape for t in tensors]))[0]
        if kept is not None and kept.version == version and kept.first_rows == first_rows:
            kept = kept if capturing else kept._replace(tensors=table)  # a graph's own memory is not kept
        else:
            n = len(first_rows)
            made = _fill_block_table(table[n : 2 * n], crow_indices, nnz, block, group)
            if capturing:
                return made
            filled = torch.cuda.current_stream(crow_indices.device).record_event() if on_cuda else None
            captured = [] if kept is None else kept.captured
            kept = _BlockTable(version, first_rows, table, made, filled, captured)
        tables[block, group] = kept
    if capturing:
        if not any(t is kept.table for t in kept.captured):
            kept.captured.append(kept.table)
    elif kept.filled is not None:
        stream = torch.cuda.current_stream(crow_indices.device)
        stream.wait_event(kept.filled)
        kept.table.record_stream(stream)
    return kept.table


def _fill_block_table(first_rows: Tensor, crow_indices: Tensor, nnz: int, block: int, group: int | None) -> Tensor:
    """Whatever crow_indices holds, a program finds rows and tensors that exist."""
    step, programs, rows = group or block, -(-nnz // block), crow_indices.numel() - 1
    entries = torch.arange(0, programs * block + 1, step, device=crow_indices.device).clamp_(max=nnz - 1)
    row = torch.searchsorted(crow_indices, entries, right=True, out_int32=True).sub_(1).clamp_(0, rows - 1)
    low, high = (r.view(programs, block // step) for r in (row[:-1], row[1:]))
    extra = (high - low).amax(1).clamp_(min=0)
    low = torch.minimum(low, (rows - 1 - extra)[:, None])  # so that the search ends within crow_indices
    ends = torch.stack([low.amin(1), low.amax(1) + extra])
    first, last = torch.searchsorted(first_rows, ends.long(), right=True, out_int32=True) - 1
    return torch.cat([torch.stack([extra, first, last], 1), *([low] if group else [])], 1)
