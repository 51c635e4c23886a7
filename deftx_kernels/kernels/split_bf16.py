"""Float32 matrices as sums of bfloat16 ones, x = x0 + x1 (+ x2), in one pass: 4 bytes are read and 2 a slot written of
each entry.

A slot holds one of the parts. Slots lie beside each other along the columns or the rows: `denoise/products.py` needs
the parts in this order as an operand of one matrix product, and nothing is copied later. Matrices of one shape are split
in one launch, wherever each of them lies.
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


@triton.jit(do_not_specialize=["m"])
def _split_bf16_kernel(
    # float32: entry (row, column) of matrix i at i * x_batch + row * x_row + column; or int64: the addresses of tensors
    # of `each` matrices
    x,
    out,  # bfloat16: that entry of slot s at i * out_batch + row * out_row + s * out_slot + column
    m,
    n,
    each,
    x_batch,
    x_row,
    out_batch,
    out_row,
    out_slot,
    ALIGNMENT: tl.constexpr,  # bytes that divide the addresses
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
    if x.dtype.element_ty == tl.int64:
        matrix = tl.multiple_of(tl.load(x + i // each).to(tl.pointer_type(tl.float32)), ALIGNMENT) + i % each * x_batch
    else:
        matrix = x + i * x_batch
    whole = tl.load(matrix + (row * x_row + column), mask=inside, other=0.0)
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
    x: Sequence[Tensor],  # float32 [..., m, n], finite, of one shape
    out: Tensor,  # bfloat16 [len(x), ..., m, s * n] (dim -1) or [len(x), ..., s * m, n] (dim -2), contiguous
    slots: Sequence[int],  # [s]
    dim: int,
) -> None:
    """The operator `deftx::split_bf16_` on tensors of one CUDA device. One launch; where the tensors of a list are new,
    others before it fill a table of their addresses (`device_table`).
    """
    *batch, m, n = x[0].shape
    b, s = len(x) * math.prod(batch), len(slots)
    targets = out.view(b, m, s, n).transpose(1, 2) if dim == -1 else out.view(b, s, m, n)
    strides = x[0].stride()
    if len(x) == 1 or strides[-1] != 1 or len(batch) > 1 or any(t.stride() != strides for t in x):
        whole = x[0] if len(x) == 1 else torch.stack(list(x))
        x = [(whole if whole.stride(-1) == 1 else whole.contiguous()).reshape(b, m, n)]
    split_into(targets, x, slots)


def split_into(
    out: Tensor,  # bfloat16 [b, s, m, n], columns one after the other
    x: Sequence[Tensor],  # float32 [m, n] or [b / len(x), m, n], of one shape and layout, columns one after the other
    slots: Sequence[int],  # [s]
) -> None:
    b, _, m, n = out.shape
    tiles = cdiv(m, BLOCK_M) * cdiv(n, BLOCK_N)
    if b * tiles == 0:
        return
    device, at = out.device, addresses(x)
    x_batch, x_row = (0, *x[0].stride())[-3:-1]
    out_batch, out_slot, out_row, _ = out.stride()
    numbers = n, b // len(x), x_batch, x_row, out_batch, out_row, out_slot
    constants = 16 if all(a % 16 == 0 for a in at) else 4, tuple(slots)
    with on(device):
        source = x[0]
        if len(x) > 1:
            stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
            source = device_table(device, (stream,), at)
        kind = *constants, m >> 31, *int_kinds(*numbers)
        _launch((b * tiles, 1, 1), kind, (source, out), (m, *numbers), *constants, BLOCK_M, BLOCK_N)
