"""Truncation of many small matrices, such as the 3 x 3 filters of a convolution, by one batched singular value
decomposition in float64, so that each rank is that of exact arithmetic.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deftx_kernels.denoise.decompositions import svd
from deftx_kernels.denoise.matrices import keep_largest_residuals_, shares
from deftx_kernels.denoise.rule import Rule


def denoise_by_svd(
    matrices: Sequence[Tensor],  # each [b, m, n], float32 or float64
    out: Sequence[Tensor],
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all matrices: rank int64, captured energy and relative residual float64."""
    w = torch.cat(list(matrices)) if len(matrices) > 1 else matrices[0]
    _, m, n = w.shape
    exact = w.to(torch.float64)
    largest = exact.abs().amax((1, 2), keepdim=True)
    # The squares of the largest and smallest float64 numbers are out of float64's range.
    scale = torch.where(largest > 0, largest, 1.0)
    U, S, Vh = svd(exact / scale)
    # Singular values below the rounding error of the largest one count as zero.
    S_known = torch.where(S[:, :1] * (max(m, n) * torch.finfo(torch.float64).eps) < S, S, 0.0)
    squares = S_known.square()
    ranks = rule.ranks(squares, (m, n))
    captured, lost = shares(squares, ranks)
    kept = torch.arange(S.shape[1], device=S.device) < ranks[:, None]
    low = ((U * torch.where(kept, S, 0.0)[:, None] @ Vh) * scale).to(w.dtype)
    total = torch.where(squares[:, 0] > 0, captured + lost, 1.0)
    if keep := rule.kept_entries((m, n)):
        keep_largest_residuals_([low.view(-1, m * n)], [w.reshape(-1, m * n)], keep, "row")
        lost = ((exact - low) / scale).square().sum((1, 2))
    for target, part in zip(out, low.split([len(x) for x in matrices])):
        target.copy_(part)
    share = torch.where(squares[:, 0] > 0, captured / total, 1.0)
    return ranks, share.clamp(max=1.0), (lost / total).sqrt()
