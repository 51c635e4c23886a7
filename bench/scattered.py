"""A Triton kernel that only reads or writes at scattered positions: the least that sparse kernels can take."""

import torch
import triton
import triton.language as tl
from torch import Tensor

ACCESSES = ("gather", "scatter", "update")


@triton.jit
def _access_kernel(dense, position, compact, count, READ: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < count
    where = tl.load(position + entry, mask=inside)
    if WRITE:
        value = tl.load(compact + entry, mask=inside)
        if READ:
            value += tl.load(dense + where, mask=inside)
        tl.store(dense + where, value, mask=inside)
    else:
        tl.store(compact + entry, tl.load(dense + where, mask=inside), mask=inside)


def access(name: str, dense: Tensor, position: Tensor, compact: Tensor) -> None:  # [n], int32 [k] distinct, [k]
    """compact = dense[position] (gather), dense[position] = compact (scatter) or += compact (update)."""
    options = {"READ": name != "scatter", "WRITE": name != "gather", "BLOCK": 1024, "num_warps": 4}
    with torch.cuda.device(dense.device):
        grid = (triton.cdiv(len(position), 1024),)
        _access_kernel[grid](dense, position, compact, len(position), **options)
