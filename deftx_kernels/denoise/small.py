"""Truncation of many small matrices (the 3 x 3 filters of a convolution, say) by singular value decompositions of a
batch.

In float64, so that the rank is that of exact arithmetic without a second look.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deftx_kernels.denoise.decompositions import svd
from deftx_kernels.denoise.gram import shares
from deftx_kernels.denoise.matrices import ranks_of
from deftx_kernels.ops.schemas import SCOPES


def by_svd(
    matrices: Sequence[Tensor],  # each [b, m, n], float32 or float64
    out: Sequence[Tensor],
    rank: int,
    energy: float,
    median: float,
    residual_density: float,
) -> tuple[Tensor, Tensor, Tensor]:  # of all matrices: rank int64, captured energy and relative residual float64
    w = torch.cat(list(matrices)) if len(matrices) > 1 else matrices[0]
    _, m, n = w.shape
    exact = w.to(torch.float64)
    largest = exact.abs().amax((1, 2), keepdim=True)
    # float64 has no room for the squares of its own largest and smallest numbers
    scale = torch.where(largest > 0, largest, 1.0)
    U, S, Vh = svd(exact / scale)
    # below the rounding of the largest one nothing is known
    known = S[:, :1] * (max(m, n) * torch.finfo(torch.float64).eps) < S
    squares = torch.where(known, S, 0.0).square()
    ranks = ranks_of(squares, rank, energy, median)
    captured, lost = shares(squares, ranks)
    kept = torch.arange(S.shape[1], device=S.device) < ranks[:, None]
    low = ((U * torch.where(kept, S, 0.0)[:, None] @ Vh) * scale).to(w.dtype)
    total = torch.where(squares[:, 0] > 0, captured + lost, 1.0)
    if keep := round(residual_density * m * n):
        flat, low_flat = w.reshape(-1, m * n), low.view(-1, m * n)
        crow, col, _ = torch.ops.deftx.topk_mask([flat], [low_flat], [keep], SCOPES["row"])
        torch.ops.deftx.csr_scatter_([low_flat], crow, col, torch.ops.deftx.csr_gather([flat], crow, col))
        lost = ((exact - low) / scale).square().sum((1, 2))
    for target, part in zip(out, low.split([len(x) for x in matrices])):
        target.copy_(part)
    share = torch.where(squares[:, 0] > 0, captured / total, 1.0)
    return ranks, share.clamp(max=1.0), (lost / total).sqrt()
