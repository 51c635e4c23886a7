"""Float32 matrices as sums of bfloat16 ones, x = x0 + x1 (+ x2), in one pass: 4 bytes are read and 2 a slot written of
each entry.

A slot holds one of the parts. Slots lie beside each other along the columns or the rows: `denoise/products.py` needs
the parts in this order as an operand of one matrix product, and nothing is copied later.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from deftx_kernels.kernels.launch import Launcher, cdiv, int_kinds, on

# 16 entries a thread. A row of a tile is 512 bytes of x and 256 of each slot: whole sectors. Not timed yet.
BLOCK_M, BLOCK_N = 32, 128
NUM_WARPS = 8


@triton.jit(do_not_specialize=["m"])
def _split_bf16_kernel(
    x,  # float32: entry (row, column) of matrix i at i * x_batch + row * x_row + column
    out,  # bfloat16: that entry of slot s at i * out_batch + row * out_row + s * out_slot + column
    m,
    n,
    x_batch,
    x_row,
    out_batch,
    out_row,
    out_slot,
    SLOTS: tl.constexpr,  # which part each slot holds: 0 or 1, or 2 if there are three
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
    whole = tl.load(x + (i * x_batch + row * x_row + column), mask=inside, other=0.0)
    first = whole.to(tl.bfloat16)
    rest = whole - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    target = out + (i * out_batch + row * out_row + column)
    for s in tl.static_range(len(SLOTS)):
        part = first if SLOTS[s] == 0 else (second if SLOTS[s] == 1 else third)
        tl.store(target + s * out_slot, part, mask=inside)


_launch = Launcher(_split_bf16_kernel, num_warps=NUM_WARPS)


def split_bf16_(
    x: Tensor,  # float32 [..., m, n], finite
    out: Tensor,  # bfloat16 [..., m, s * n] (dim -1) or [..., s * m, n] (dim -2), contiguous
    slots: Sequence[int],  # [s]
    dim: int,
) -> None:
    """The operator `deftx::split_bf16_` on tensors of one CUDA device."""
    *batch, m, n = x.shape
    b, s = math.prod(batch), len(slots)
    targets = out.view(b, m, s, n).transpose(1, 2) if dim == -1 else out.view(b, s, m, n)
    split_into(targets, (x if x.stride(-1) == 1 else x.contiguous()).reshape(b, m, n), slots)


def split_into(
    out: Tensor,  # bfloat16 [b, s, m, n], columns one after the other
    x: Tensor,  # float32 [b, m, n], columns one after the other
    slots: Sequence[int],  # [s]
) -> None:
    b, m, n = x.shape
    tiles = cdiv(m, BLOCK_M) * cdiv(n, BLOCK_N)
    if b * tiles == 0:
        return
    out_batch, out_slot, out_row, _ = out.stride()
    slots, numbers = tuple(slots), (n, x.stride(0), x.stride(1), out_batch, out_row, out_slot)
    with on(x.device):
        kind = slots, m >> 31, *int_kinds(*numbers)
        _launch((b * tiles, 1, 1), kind, (x, out), (m, *numbers), slots, BLOCK_M, BLOCK_N)
