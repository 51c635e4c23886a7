"""Shared by the kernels over the entries of a mask: the search for an entry's row, tensor and address, and tables of
addresses.

A program works on a range of the compact order. It searches for the rows and tensors of its entries: first those of its
first and last entry, then each entry's between the two. So a launch depends on nnz alone, and no table of tiles has to
be built, kept or synchronised with a mask.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deftx_kernels.kernels.tensors import overlapping, rows_and_columns

# Ways of the search for a program's first and last row: 3 rounds for 2,000,000 rows; halving takes 21 dependent loads.
WAYS = 128

TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _narrow(table, low, extra, key, WAYS: tl.constexpr):
    """One round of the search for the last i in [low, low + extra] with table[i] <= key, which holds for i = low."""
    stride = tl.maximum(tl.cdiv(extra, WAYS), 1)
    probe = (tl.arange(0, WAYS) + 1) * stride
    inside = probe <= extra
    below = inside & (tl.load(table + low + probe, mask=inside, other=0) <= key)
    passed = tl.sum(below.to(tl.int32), 0) * stride
    return low + passed, tl.minimum(stride - 1, extra - passed)


@triton.jit
def _search(table, size, first_key, last_key, WAYS: tl.constexpr):
    """The last i with table[i] <= key, for two keys: both searches wait for memory at the same time."""
    first = (size * 0).to(tl.int64)
    last = first
    first_extra = size.to(tl.int64) - 1
    last_extra = first_extra
    while first_extra + last_extra > 0:
        first, first_extra = _narrow(table, first, first_extra, first_key, WAYS)
        last, last_extra = _narrow(table, last, last_extra, last_key, WAYS)
    return first, last


@triton.jit
def _search_each(table, first, last, keys):
    """For each key the last i in [first, last] with table[i] <= key, less `first`; table[first] <= key holds."""
    # 64-bit counts would cost registers; `tensor_table` checks that 32 bits suffice
    found = tl.zeros_like(keys).to(tl.int32)
    extra = (last - first).to(tl.int32)
    while extra > 0:
        half = (extra + 1) // 2
        found += tl.where(tl.load(table + first + found + half) <= keys, half, 0)
        extra -= half
    return found


@triton.jit
def _addresses_in(table, other_table, n_tensors, tensor, row, columns, DTYPE: tl.constexpr, OTHER: tl.constexpr):
    """Where the entries are in the tensors and in the other tensors. `tensor`: one for all entries, or one for each."""
    last = tl.load(table + 2 * n_tensors + tensor)
    # A column outside its row is clamped to the last one (a negative one, too): a load mask would cost registers.
    column = tl.minimum(columns.to(tl.uint32), last.to(tl.uint32))
    index = (row - tl.load(table + n_tensors + tensor)) * (last + 1) + column.to(tl.int64)
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
    rows,
    n_tensors,
    start,  # the first of the program's entries
    end,  # the one after the last
    entry,  # int64 [BLOCK]: those entries; at and after `end`, what is returned is meaningless
    columns,  # [BLOCK]: of col_indices
    DTYPE: tl.constexpr,
    OTHER: tl.constexpr,
    WAYS: tl.constexpr,
):
    """Pointers to the entries [BLOCK] in both lists of tensors: inside, whatever crow_indices and columns hold."""
    first_row, last_row = _search(crow_indices, rows, start, end - 1, WAYS)
    row = first_row + _search_each(crow_indices, first_row, last_row, entry)
    first, last = _search(table + n_tensors, n_tensors, first_row, last_row, WAYS)
    if first == last:  # common case: fewer loads and about 12 registers less than the general case
        element, other = _addresses_in(table, other_table, n_tensors, first, row, columns, DTYPE, OTHER)
    else:
        tensor = first + _search_each(table + n_tensors, first, last, row)
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
    table, other_table, starts, n_tensors, start, end, entry,
    DTYPE: tl.constexpr, OTHER: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """As `locate`, where each tensor is one row and every element an entry. starts: int64 [n_tensors + 1]."""
    first, last = _search(starts, n_tensors, start, end - 1, WAYS)
    if first == last:
        element, other = _elements_in(table, other_table, starts, n_tensors, first, entry, DTYPE, OTHER)
    else:
        tensor = first + _search_each(starts, first, last, entry)
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
    if end != rows or not 0 < rows < 2**31:  # _search_each counts the rows of a program in 32 bits
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
