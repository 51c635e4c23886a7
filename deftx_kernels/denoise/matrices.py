"""Shared by the three methods of truncation (gram, subspace, small): accurate sums, scales, the pruned residual."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deftx_kernels.ops.schemas import SCOPES


def as_tall(w: Tensor) -> Tensor:  # [..., m, n]
    return w if w.shape[-2] >= w.shape[-1] else w.mT


def sums_of_squares(y: Tensor) -> Tensor:  # [..., m, n] -> float64 [...]
    """Norms of rows, squared and added up in float64: torch's sum of a whole float32 matrix has 4 correct digits."""
    return torch.linalg.vector_norm(y, dim=-1).to(torch.float64).square().sum(-1)


def shares(squares: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:  # float64 [b, n], int64 [b] -> float64 [b], [b]
    """The sums of the squared singular values that the ranks keep, and of the rest."""
    kept = torch.arange(squares.shape[1], device=squares.device) < ranks[:, None]
    return torch.where(kept, squares, 0.0).sum(1), torch.where(kept, 0.0, squares).sum(1)


def rows_per_chunk(x: Tensor, width: int) -> int:
    """How many rows of `width` numbers are converted to float64 at a time: few on the CPU, to save memory."""
    return max(1, (1 << (24 if x.is_cuda else 16)) // width)


def gram64(y: Tensor, dim: int = -2) -> Tensor:
    """y.mT @ y (dim -2) or y @ y.mT (dim -1) [..., l, l] in float64, chunk by chunk of the other dimension."""
    gram: Tensor | None = None
    for part in y.split(rows_per_chunk(y, y.shape[-3 - dim]), dim):
        part = part.to(torch.float64)
        product = part.mT @ part if dim == -2 else part @ part.mT
        gram = product if gram is None else gram.add_(product)
    assert gram is not None
    return gram


def power_of_two_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:  # [...] -> float64 [...]
    """Powers of 2 that scale entries of these magnitudes to about 1."""
    limit = 1000 if dtype == torch.float64 else 120  # so that the dtype can represent the powers
    exponent = (-torch.frexp(largest).exponent).clamp(-limit, limit)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)


def is_mostly_rounding(lost: Tensor, total: Tensor, dtype: torch.dtype) -> Tensor:  # -> bool
    """Whether `lost`, a difference of two sums of squares, is so small that most of it is rounding."""
    return lost < (1e-5 if dtype == torch.float32 else 1e-13) * total


def keep_largest_residuals_(low: Sequence[Tensor], w: Sequence[Tensor], keep: int, scope: str) -> None:
    """low += w - low at its `keep` largest entries, of each tensor or of each row."""
    crow, col, _ = torch.ops.deftx.topk_mask(w, low, [keep], SCOPES[scope])
    torch.ops.deftx.csr_scatter_(low, crow, col, torch.ops.deftx.csr_gather(w, crow, col))


def prune_(w: Tensor, low: Tensor, out: Tensor, keep: int) -> Tensor:
    """out = low + the `keep` largest entries of w - low; returns the sum of squares of the rest, float64 []."""
    if keep == 0:
        lost = sums_of_squares(w - low)
    else:
        keep_largest_residuals_([low], [w], keep, "tensor")
        lost = sums_of_squares(torch.sub(w, low, out=out))
    out.copy_(low)
    return lost


def prune_from_factors(w: Tensor, left: Tensor, right: Tensor, out: Tensor, keep: int) -> Tensor:
    """As `prune_`, for low = left @ right.mT (of the transposed matrix where w is wide), which is not stored."""
    if w.shape[0] < w.shape[1]:
        left, right = right, left
    arguments = (w[None], left[None].contiguous(), right[None].contiguous())
    denoised = torch.ops.deftx.low_rank_denoised(*arguments, torch.ops.deftx.residual_cut(*arguments, keep))[0]
    lost = sums_of_squares(w - denoised)
    out.copy_(denoised)
    return lost
