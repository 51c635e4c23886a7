"""Truncated SVD and denoising of matrices at the speed of matrix products, for CPU and CUDA tensors.

Three ways, the first two on the short side of a matrix (n of [m, n], m >= n; a wide matrix is worked on transposed):
    subspace.py    a small rank: block subspace iteration on a whole batch, products with r + oversample columns, and
    Cholesky QR gram.py        the rest: the Gram matrix and its eigenvectors, in float64 where float32 cannot settle
    the rank or the truncation small.py       many small matrices: singular value decompositions of a batch, in float64

Whatever is small, [l, l] or [n, l], is computed in float64: a Gram matrix has the squares of the singular values.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deftx_kernels.denoise import products
from deftx_kernels.denoise.decompositions import svd
from deftx_kernels.denoise.gram import by_gram
from deftx_kernels.denoise.matrices import sums_of_squares
from deftx_kernels.denoise.products import Parts, SeparateMatrices, full_precision
from deftx_kernels.denoise.small import by_svd
from deftx_kernels.denoise.subspace import by_subspace, orthonormal_rows, subspace_factors


def truncated_svd(a: Tensor, rank: int, n_iter: int, test_matrix: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    work = a.to(torch.float64 if a.dtype == torch.float64 else torch.float32)
    batch, scale = _in_range(work.reshape(math.prod(a.shape[:-2]), *a.shape[-2:]))
    with full_precision():
        if test_matrix is None or len(batch) == 0:
            U, S, Vh = svd(batch)
        else:
            wide = a.shape[-2] < a.shape[-1]
            tall = batch.mT if wide else batch
            operand = Parts.of(tall) if products.splits(tall) else SeparateMatrices(tall.unbind())
            scaled, Vh, squares = map(
                torch.stack, subspace_factors(operand, sums_of_squares(batch), rank, n_iter, test_matrix)
            )
            U = orthonormal_rows(scaled.mT.contiguous()).mT
            S = squares.clamp(min=0).sqrt()
            if wide:
                U, Vh = Vh.mT, U.mT
    S = S / scale
    U, S, Vh = (x.reshape(*a.shape[:-2], *x.shape[1:]) for x in (U, S, Vh))
    U, S, Vh = (x.to(a.dtype).contiguous() for x in (U[..., :rank], S[..., :rank], Vh[..., :rank, :]))
    return U, S, Vh


def svd_denoise_(
    matrices: Sequence[Tensor],  # each [m, n], or [b, m, n]
    out: Sequence[Tensor],
    totals: Tensor,
    rank: int,
    energy: float,
    median: float,
    residual_density: float,
    n_iter: int,
    test_matrix: Tensor | None,  # [min(m, n), l]
    batch: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if matrices[0].dim() == 3:
        with full_precision():
            return by_svd(matrices, out, rank, energy, median, residual_density)
    m, n = max(matrices[0].shape), min(matrices[0].shape)
    batch = min(batch, len(matrices))
    # Made once: memory that is new to the process costs more than to copy a matrix into it.
    if test_matrix is None:
        rows = n  # of Gram matrices
    else:
        rows = m if products.splits(matrices[0]) else 0
    workspace = torch.empty(batch, rows, n, dtype=matrices[0].dtype, device=matrices[0].device)
    found = []
    with full_precision():
        for first in range(0, len(matrices), batch):
            some = slice(first, first + batch)
            if test_matrix is not None:
                keep = round(residual_density * matrices[0].numel())
                found.append(
                    by_subspace(matrices[some], out[some], workspace, totals[some], rank, keep, n_iter, test_matrix)
                )
            else:
                found.append(by_gram(matrices[some], out[some], workspace, rank, energy, median, residual_density))
    ranks, captured, lost = (torch.cat(x) for x in zip(*found))
    whole = torch.where(totals > 0, totals, 1.0)
    return ranks, torch.where(totals > 0, captured / whole, 1.0).clamp(max=1.0), (lost / whole).clamp(min=0.0).sqrt()


def _in_range(batch: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices [b, m, n] times powers of 2, so that squares of entries stay within the dtype; the powers, float64
    [b, 1].
    """
    if batch.numel() == 0:
        return batch, batch.new_ones(len(batch), 1, dtype=torch.float64)
    largest = torch.linalg.vector_norm(batch, float("inf"), dim=(-2, -1))
    limit = 1000 if batch.dtype == torch.float64 else 120  # the powers are numbers of the dtype
    exponent = torch.where((largest < 1e-9) | (largest > 1e9), -torch.frexp(largest).exponent, 0).clamp(-limit, limit)[
        :, None
    ]
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    return (batch * scale[..., None].to(batch.dtype) if bool((exponent != 0).any()) else batch), scale
