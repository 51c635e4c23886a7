"""A Triton kernel that only reads or writes at scattered positions: the least that sparse kernels can take."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _access_kernel(dense, position, compact, count, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    where = tl.load(position + entry, mask=inside)
    if WRITE:
        tl.store(dense + where, tl.load(compact + entry, mask=inside), mask=inside)
    else:
        tl.store(compact + entry, tl.load(dense + where, mask=inside), mask=inside)


def access(write: bool, dense: Tensor, position: Tensor, compact: Tensor) -> None:  # [n], int32 [k], [k]
    """dense[position] = compact, or compact = dense[position]"""
    with torch.cuda.device(dense.device):
        grid = (triton.cdiv(len(position), 1024),)
        _access_kernel[grid](dense, position, compact, len(position), WRITE=write, BLOCK=1024, num_warps=4)
