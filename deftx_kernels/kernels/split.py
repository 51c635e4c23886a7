"""Float32 matrices as sums of bfloat16 ones, x = x0 + x1 (+ x2), in one pass: 4 bytes are read and 2 a slot written of
each entry.

A slot holds one of the parts. Slots lie beside each other along the columns or the rows, so that what `products` needs
as an operand (parts one after the other along k, or side by side in the result) is written in its place, and nothing is
copied later.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 entries a thread. A row of a tile is 512 bytes of x and 256 of each slot: whole sectors. No GPU has timed these
# figures yet.
BLOCK_M, BLOCK_N = 32, 128
NUM_WARPS = 8


@triton.jit(do_not_specialize=["m"])
def _split_kernel(
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
    place = out + (i * out_batch + row * out_row + column)
    for s in tl.static_range(len(SLOTS)):
        part = first if SLOTS[s] == 0 else (second if SLOTS[s] == 1 else third)
        tl.store(place + s * out_slot, part, mask=inside)


def split(
    x: Tensor,  # float32 [..., m, n], finite
    slots: Sequence[int],  # [s]
    dim: int,
    out: Tensor | None = None,  # bfloat16, contiguous, of the result's shape
) -> Tensor:  # bfloat16 [..., m, s * n] (dim -1) or [..., s * m, n] (dim -2)
    """As `products.split`. A transposed x is read as it lies, and its slots are written the same way."""
    if x.stride(-1) != 1:
        if out is None and x.stride(-2) == 1:
            return split(x.mT, slots, -3 - dim).mT
        x = x.contiguous()
    *batch, m, n = x.shape
    b, s = math.prod(batch), len(slots)
    if out is None:
        out = x.new_empty(*batch, *((m, s * n) if dim == -1 else (s * m, n)), dtype=torch.bfloat16)
    places = out.view(b, m, s, n).transpose(1, 2) if dim == -1 else out.view(b, s, m, n)
    split_into(places, x.reshape(b, m, n), slots)
    return out


def split_into(
    out: Tensor,  # bfloat16 [b, s, m, n], columns one after the other
    x: Tensor,  # float32 [b, m, n], columns one after the other
    slots: Sequence[int],  # [s]
) -> None:
    b, m, n = x.shape
    tiles = triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N)
    if b * tiles == 0:
        return
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        _split_kernel[(b * tiles,)](
            x,
            out,
            m,
            n,
            x.stride(0),
            x.stride(1),
            out.stride(0),
            out.stride(2),
            out.stride(1),
            SLOTS=tuple(slots),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            num_warps=NUM_WARPS,
        )
