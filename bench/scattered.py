"""Reads and writes at scattered positions, by kernels that do nothing else: what sparse kernels take at the least.

For bench/machine.py. As many positions as are a multiple of BLOCK: no load is masked, so those of positions and compact
values are 16 bytes a thread.
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


def gather(source: Tensor, position: Tensor, out: Tensor) -> None:  # [n], int32 [k], [k]
    """out = source[position]"""
    _run(_gather_kernel, source, position, out)


def scatter(target: Tensor, position: Tensor, values: Tensor) -> None:  # [n], int32 [k], [k]
    """target[position] = values"""
    _run(_scatter_kernel, target, position, values)


def _run(kernel, dense: Tensor, position: Tensor, compact: Tensor) -> None:
    assert len(position) % BLOCK == 0
    with torch.cuda.device(dense.device):
        kernel[(len(position) // BLOCK,)](dense, position, compact, BLOCK=BLOCK, num_warps=4)
