"""Matrix products of float32 accuracy at the speed of the matrix units, whatever the user's precision flags say."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def splits(x: Tensor) -> bool:
    """Whether products of x are made of bfloat16 ones."""
    return x.is_cuda and x.dtype == torch.float32


def matmul(a: Tensor, b: Tensor, parts: int = 2) -> Tensor:
    """a @ b for matrices [..., m, k] and [..., k, n] of one dtype, float32 or float64.

    On the CPU inside `full_precision`. On CUDA float32 products are made of bfloat16 ones: cuBLAS' float32 product would be slow,
    or as inaccurate as the user's TF32 flag.
    """
    return split_matmul(a, b, parts) if splits(a) else a @ b


def matmul_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [m, n] = a @ b, as `matmul`."""
    if splits(a):
        out.copy_(split_matmul(a, b))
    else:
        torch.mm(a, b, out=out)


def split_matmul(a: Tensor, b: Tensor, parts: int = 2) -> Tensor:
    """a @ b of float32 matrices as one product of bfloat16 ones, 3 times as deep (6 times with three parts), summed in float32.

    With x = x0 + x1 (+ x2), all bfloat16: the sum of ai bj over i + j < parts. Left out is 2**-16 (2**-24) of the whole.
    """
    pairs = [(i, j) for i in range(parts) for j in range(parts - i)]
    a_parts, b_parts = _split(a, parts), _split(b, parts)
    left, right = torch.cat([a_parts[i] for i, _ in pairs], -1), torch.cat([b_parts[j] for _, j in pairs], -2)
    if not a.is_cuda:  # products of bfloat16 numbers are exact in float32
        return left.float() @ right.float()
    if left.dim() == 2 and right.dim() == 2:
        return torch.mm(left, right, out_dtype=torch.float32)
    batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    left, right = (x.expand(*batch, -1, -1).reshape(-1, *x.shape[-2:]) for x in (left, right))
    return torch.bmm(left, right, out_dtype=torch.float32).view(*batch, left.shape[-2], right.shape[-1])


def _split(x: Tensor, parts: int) -> list[Tensor]:
    found = []
    for _ in range(parts):
        found.append(x.to(torch.bfloat16))
        x = x - found[-1].float()
    return found


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products on the CPU in float32: torch.set_float32_matmul_precision("medium") makes them bfloat16 ones there."""
    flags = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = flags.fp32_precision
    flags.fp32_precision = "ieee"
    try:
        yield
    finally:
        flags.fp32_precision = before
