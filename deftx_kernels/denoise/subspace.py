"""Approximations of a small rank, by block subspace iteration on a whole batch of matrices."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deftx_kernels.denoise import products
from deftx_kernels.denoise.decompositions import are_rows_orthonormal, eigh, eigvalsh, svd
from deftx_kernels.denoise.matrices import (
    as_tall,
    gram64,
    is_mostly_rounding,
    prune_,
    prune_from_factors,
    sums_of_squares,
)
from deftx_kernels.denoise.products import (
    LEFT,
    RIGHT,
    Operand,
    SeparateMatrices,
    SplitBF16,
    matmul,
    product_,
    rough_matmul,
    split,
)
from deftx_kernels.denoise.rule import Rule


def orthonormal_rows(z: Tensor) -> Tensor:  # [b, l, n], l <= n
    """An orthonormal basis of the rows' span, by Cholesky QR with a float64 Gram matrix (Yamazaki, Tomov & Dongarra
    2015): twice where rows differ much in size, since rounding grows with the ratio; by Householder QR where rows are
    nearly dependent. Signs are those of Gram-Schmidt.
    """
    lower, info = torch.linalg.cholesky_ex(gram64(z, -1))
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    ratio = diagonal.amin(-1) / diagonal.amax(-1)
    is_dependent = (info != 0) | ~(ratio > (1e-10 if z.dtype == torch.float64 else 1e-6))
    again = ~is_dependent & (ratio < 1e-2)
    identity = torch.eye(z.shape[-2], dtype=torch.float64, device=z.device).expand_as(lower)
    q = matmul(torch.linalg.solve_triangular(lower, identity, upper=False).to(z.dtype), z)
    is_dependent = is_dependent | ~again & ~are_rows_orthonormal(q)
    if bool((is_dependent | again).any()):
        if bool(again.any()):
            q[again] = orthonormal_rows(q[again])
        for i in is_dependent.nonzero().view(-1).tolist():
            basis, r = torch.linalg.qr(z[i].mT)
            q[i] = (basis * torch.where(r.diagonal() < 0, -1.0, 1.0)).mT
        if not bool(are_rows_orthonormal(q).all()):
            raise RuntimeError(
                "Cholesky and Householder QR both failed: values that are not finite, or a broken LAPACK"
            )
    return q


def subspace_factors(
    a: Operand, totals: Tensor, rank: int, n_iter: int, test_matrix: Tensor
) -> tuple[list[Tensor], ...]:
    """Factors of the rank-r approximations of a [b, m, n]: left [m, r] = a @ right.mT, right [r, n] with orthonormal
    rows, and the squared singular values, descending, float64 [r]. totals [b] are the sums of squares.

    Subspace iteration with a.mT a and Rayleigh-Ritz (Halko, Martinsson & Tropp 2011, section 4.5; Saad 2011, chapter
    5). From the second iteration on with a.mT a - shift, which damps the unwanted directions relative to the wanted
    ones: the shift is about the mean of the unwanted eigenvalues, and at most half of the smallest wanted one, so that
    no wanted direction is damped more than an unwanted one.
    """
    b, _, n = a.shape
    columns = test_matrix.shape[1]
    # Errors of 2**-8 in the start cost at most one iteration, for some matrices whose singular values fall below 2**-8
    # of the first (simulated: noise, power laws, steps, exponentials).
    q = orthonormal_rows(rough_matmul(rough_matmul(a, test_matrix).mT, a))
    y = matmul(a, q.mT)
    seen = sums_of_squares(y)
    half: Tensor | None = None
    results: list[tuple[Tensor, ...]] = [()] * b
    index = list(range(b))
    for k in range(2, 2 + n_iter + _EXTRA_ITERATIONS):
        z = matmul(y.mT, a)
        if half is None:  # singular values of a.mT a q are at most those of a.mT a
            half = eigvalsh(gram64(z, -1))[:, columns - rank].clamp(min=0).sqrt() / 2
        shift = torch.minimum(1.5 * (totals - seen).clamp(min=0) / max(n - columns, 1), half)
        q = orthonormal_rows(z - shift.to(z.dtype)[:, None, None] * q)
        y = matmul(a, q.mT)
        before, seen = seen, sums_of_squares(y)
        if k < n_iter:
            continue
        squares, vectors = _ritz(y, rank)
        residual = totals - squares.sum(-1)
        rounding = _ROUNDING[y.dtype]
        done = seen - before <= _convergence_tolerance(k, rank, columns, n) * residual + rounding.gain * totals
        if k < rounding.steps:
            done = done & (residual > rounding.residual * totals)
        done = done | (k == 1 + n_iter + _EXTRA_ITERATIONS) | (totals == 0)
        is_done = [bool(x) for x in done.cpu()]
        finished, rest = ([i for i, x in enumerate(is_done) if x == wanted] for wanted in (True, False))
        if not finished:
            continue
        some = finished if rest else slice(None)
        c = vectors[some].to(y.dtype)
        factors = zip(matmul(y[some], c), matmul(c.mT, q[some]), squares[some])
        for i, found in zip(finished, factors):
            results[index[i]] = found
        if not rest:
            break
        index = [index[i] for i in rest]
        a = a[rest]
        q, y, totals, seen, half = (x[rest] for x in (q, y, totals, seen, half))
    return tuple(map(list, zip(*results)))


class _Rounding(NamedTuple):
    """Rounding of the sums, as shares of the sum of squares."""

    gain: float  # smaller gains are rounding
    residual: float  # the gains of a smaller residual are rounding: at least `steps` iterations are made
    steps: int


_ROUNDING = {torch.float32: _Rounding(1e-7, 1e-6, 4), torch.float64: _Rounding(1e-15, 1e-13, 8)}
_EXTRA_ITERATIONS = 24  # iterations beyond n_iter at most


def _ritz(y: Tensor, rank: int) -> tuple[Tensor, Tensor]:  # [b, m, l] -> float64 [b, r], [b, l, r]
    """The largest squared singular values of y, descending, and their right singular vectors."""
    if y.dtype == torch.float64:  # a Gram matrix would lose what is below 1e-8 of the largest
        _, singular, vectors = svd(torch.linalg.qr(y, mode="r").R)
        return singular[:, :rank].square(), vectors.mT[..., :rank]
    squares, basis = eigh(gram64(y))
    return squares.flip(-1)[:, :rank], basis.flip(-1)[..., :rank]


def _convergence_tolerance(k: int, rank: int, columns: int, n: int) -> float:
    """The largest gain of iteration k, as a share of the squared residual, that shows the residual to be within 1.02
    times the smallest one.

    Determined on simulated spectra: noise, low rank and noise, power laws, exponentials, steps, plateaus; n = 160 to
    1500, r = 1 to 150. A small gain shows little with few spare columns, and at the second iteration if the columns are
    more than a seventh of all: with a step of 1.1 to 1.3 at the rank, gains of 0.01 to 0.03 left 1.02 to 1.024 times
    the smallest residual (n = 160 to 1000).
    """
    room, spare = 1 - 2 * columns / n, columns - rank
    share = 1.0 if spare >= 16 else 0.6 * (spare / 16) ** 4 + 0.05
    second = min(0.12, 0.15 * room) if room > 0.72 else 0.007
    return {2: second, 3: 0.045 * room + 0.01}.get(k, 0.01) * share


def denoise_by_subspace(
    matrices: Sequence[Tensor],  # each [m, n]
    out: Sequence[Tensor],
    workspace: Tensor,  # contiguous [at least as many, m, n]; empty where products are not split
    totals: Tensor,
    rule: Rule,  # of a fixed rank
    test_matrix: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes L + prune(H) to `out`. The ranks int64, and the sums of squares of L and of what is lost, float64."""
    rank, keep = rule.fixed_rank(matrices[0].shape), rule.kept_entries(matrices[0].shape)
    assert rank is not None
    is_split = products.uses_split_products(matrices[0])
    operand: Operand
    if is_split:
        operand = SplitBF16.stacked(matrices, workspace)
        operand = operand if operand.shape[1] >= operand.shape[2] else operand.mT
    else:
        operand = SeparateMatrices([as_tall(w) for w in matrices])
    left, right, squares = subspace_factors(operand, totals, rank, rule.n_iter, test_matrix)
    captured = torch.stack([x.sum() for x in squares])
    lost = totals - captured
    must_measure = is_mostly_rounding(lost, totals, matrices[0].dtype).tolist()
    if is_split and not keep:
        lefts, rights = split(left, LEFT, -1), split(right, RIGHT, -2)
    for i, w in enumerate(matrices):
        if keep and is_split:
            lost[i] = prune_from_factors(w, left[i], right[i].mT, out[i], keep)
            continue
        low = torch.empty_like(w) if keep or must_measure[i] else out[i]
        if is_split:
            product_(as_tall(low)[None], lefts[i : i + 1], rights[i : i + 1])
        else:
            torch.mm(left[i], right[i], out=as_tall(low))
        if keep or must_measure[i]:
            lost[i] = prune_(w, low, out[i], keep)
    return torch.full_like(totals, rank, dtype=torch.int64), captured, lost


def singular_triplets(
    batch: Tensor, rank: int, n_iter: int, test_matrix: Tensor
) -> tuple[Tensor, Tensor, Tensor]:  # [b, m, n] -> U [b, m, r], S float64 [b, r], Vh [b, r, n]
    tall = as_tall(batch)
    operand = SplitBF16.of(tall) if products.uses_split_products(tall) else SeparateMatrices(tall.unbind())
    factors = subspace_factors(operand, sums_of_squares(batch), rank, n_iter, test_matrix)
    left, right, squares = map(torch.stack, factors)
    U = orthonormal_rows(left.mT.contiguous()).mT
    S = squares.clamp(min=0).sqrt()
    return (U, S, right) if tall is batch else (right.mT, S, U.mT)
