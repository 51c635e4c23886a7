"""Triton kernels that only read or write at scattered positions: the least that sparse kernels can take.

For bench/machine.py. The number of positions is a multiple of BLOCK, so that no load is masked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _gather_kernel(source, position, out, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + entry, tl.load(source + tl.load(position + entry)))


@triton.jit
def _scatter_kernel(target, position, values, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + tl.load(position + entry), tl.load(values + entry))


def access(kernel: str, dense: Tensor, position: Tensor, compact: Tensor) -> None:  # [n], int32 [k], [k]
    """ "gather": compact = dense[position]; "scatter": dense[position] = compact"""
    assert len(position) % BLOCK == 0
    run = {"gather": _gather_kernel, "scatter": _scatter_kernel}[kernel]
    with torch.cuda.device(dense.device):
        run[(len(position) // BLOCK,)](dense, position, compact, BLOCK=BLOCK, num_warps=4)
