"""Float32 matrices as sums of bfloat16 ones, x = x0 + x1 (+ x2), in one pass: 4 bytes are read and 2 a slot written of
each entry.

A slot holds one of the parts. Slots lie beside each other along the columns or the rows: `denoise/products.py` needs
the parts in this order as an operand of one matrix product, and nothing is copied later. Matrices of one shape are
split in one launch, wherever each of them lies, and read once for an operand of either kind.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deftx_kernels.kernels.launch import Launcher, cdiv, int_kinds, on
from deftx_kernels.kernels.rows import addresses, device_table

# 16 entries a thread. A row of a tile is 512 bytes of x and 256 of each slot: whole sectors. Not timed yet.
BLOCK_M, BLOCK_N = 32, 128
NUM_WARPS = 8


@triton.jit
def _store(target, slot_stride, first, second, third, inside, SLOTS: tl.constexpr):
    for s in tl.static_range(len(SLOTS)):
        part = first if SLOTS[s] == 0 else (second if SLOTS[s] == 1 else third)
        tl.store(target + s * slot_stride, part, mask=inside)


@triton.jit(do_not_specialize=["m"])
def _split_bf16_kernel(
    # float32: entry (row, column) of matrix i at i * x_batch + row * x_row + column; or int64: the addresses of tensors
    # of `each` matrices
    x,
    # bfloat16, or None: that entry of slot s at i * columns_batch + row * columns_row + s * columns_slot + column
    columns,
    rows,  # likewise
    m,
    n,
    each,
    x_batch,
    x_row,
    columns_batch,
    columns_row,
    columns_slot,
    rows_batch,
    rows_row,
    rows_slot,
    ALIGNMENT: tl.constexpr,  # bytes that divide the addresses
    COLUMN_SLOTS: tl.constexpr,  # which part each slot holds: 0 or 1, or 2 if there are three
    ROW_SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of one matrix."""
    program = tl.program_id(0).to(tl.int64)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tiles_m = tl.cdiv(m, BLOCK_M)
    i = program // tiles_n // tiles_m
    row = (program // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    column = (program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (row < m) & (column < n)
    if x.dtype.element_ty == tl.int64:
        matrix = tl.multiple_of(tl.load(x + i // each).to(tl.pointer_type(tl.float32)), ALIGNMENT) + i % each * x_batch
    else:
        matrix = x + i * x_batch
    whole = tl.load(matrix + (row * x_row + column), mask=inside, other=0.0)
    first = whole.to(tl.bfloat16)
    rest = whole - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    if columns is not None:
        target = columns + (i * columns_batch + row * columns_row + column)
        _store(target, columns_slot, first, second, third, inside, COLUMN_SLOTS)
    if rows is not None:
        target = rows + (i * rows_batch + row * rows_row + column)
        _store(target, rows_slot, first, second, third, inside, ROW_SLOTS)


_launch = Launcher(_split_bf16_kernel, num_warps=NUM_WARPS)


def split_bf16_(
    x: Sequence[Tensor],  # float32 [..., m, n], finite, of one shape
    columns: Tensor | None,  # bfloat16 [len(x), ..., m, s * n], contiguous
    column_slots: Sequence[int],  # [s]
    rows: Tensor | None,  # bfloat16 [len(x), ..., s * m, n], contiguous
    row_slots: Sequence[int],  # [s]
) -> None:
    """The operator `deftx::split_bf16_` on tensors of one CUDA device. One launch; where the tensors of a list are new,
    others before it fill a table of their addresses (`device_table`).
    """
    *batch, m, n = x[0].shape
    b = len(x) * math.prod(batch)
    strides = x[0].stride()
    if len(x) == 1 or strides[-1] != 1 or len(batch) > 1 or any(t.stride() != strides for t in x):
        whole = x[0] if len(x) == 1 else torch.stack(list(x))
        x = [(whole if whole.stride(-1) == 1 else whole.contiguous()).reshape(b, m, n)]
    split_into(
        x,
        None if columns is None else columns.view(b, m, len(column_slots), n).transpose(1, 2),
        column_slots,
        None if rows is None else rows.view(b, len(row_slots), m, n),
        row_slots,
    )


def split_into(
    x: Sequence[Tensor],  # float32 [m, n] or [b / len(x), m, n], of one shape and layout, columns one after the other
    columns: Tensor | None,  # bfloat16 [b, s, m, n], columns one after the other
    column_slots: Sequence[int],  # [s]
    rows: Tensor | None,  # bfloat16 [b, s, m, n], columns one after the other
    row_slots: Sequence[int],  # [s]
) -> None:
    *batch, m, n = x[0].shape
    each = math.prod(batch)
    programs = len(x) * each * cdiv(m, BLOCK_M) * cdiv(n, BLOCK_N)
    if programs == 0:
        return
    device, at = x[0].device, addresses(x)
    numbers = [n, 1 if len(x) == 1 else each, *(0, *x[0].stride())[-3:-1]]
    for out in (columns, rows):
        batch_stride, slot_stride, row_stride, _ = (0, 0, 0, 0) if out is None else out.stride()
        numbers += [batch_stride, row_stride, slot_stride]
    constants = 16 if all(a % 16 == 0 for a in at) else 4, tuple(column_slots), tuple(row_slots)
    with on(device):
        source = x[0]
        if len(x) > 1:
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            source = device_table(device, (stream,), at)
        kind = *constants, m >> 31, *int_kinds(*numbers)
        _launch((programs, 1, 1), kind, (source, columns, rows), (m, *numbers), *constants, BLOCK_M, BLOCK_N)
