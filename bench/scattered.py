"""Reads and writes at scattered positions, by kernels that do nothing else: what sparse kernels cost at the least. For bench/machine.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _gather_kernel(source, position, out, count, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    tl.store(out + entry, tl.load(source + tl.load(position + entry, mask=inside, other=0), mask=inside), mask=inside)


@triton.jit
def _scatter_kernel(target, position, values, count, BLOCK: tl.constexpr):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    tl.store(target + tl.load(position + entry, mask=inside, other=0), tl.load(values + entry, mask=inside), mask=inside)


def gather(source: Tensor, position: Tensor, out: Tensor) -> None:  # [n], int32 [k], [k]
    """out = source[position]"""
    _run(_gather_kernel, source, position, out)


def scatter(target: Tensor, position: Tensor, values: Tensor) -> None:  # [n], int32 [k], [k]
    """target[position] = values"""
    _run(_scatter_kernel, target, position, values)


def _run(kernel, dense: Tensor, position: Tensor, compact: Tensor) -> None:
    with torch.cuda.device(dense.device):
        kernel[(triton.cdiv(len(position), BLOCK),)](dense, position, compact, len(position), BLOCK=BLOCK, num_warps=4)
