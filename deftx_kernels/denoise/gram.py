"""Truncation at an energy, at a multiple of the median, or at a large rank: from the eigenvalues of the Gram matrix.

Its eigenvectors or, on a GPU, a spectral projector made of products (projector.py) do the truncation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deftx_kernels.denoise import products
from deftx_kernels.denoise.decompositions import eigh, eigvalsh, svd
from deftx_kernels.denoise.matrices import as_tall, gram64, is_mostly_rounding, prune_, rows_per_chunk, shares
from deftx_kernels.denoise.products import LEFT, RIGHT, gram_, matmul, matmul_, product_, split
from deftx_kernels.denoise.projector import spectral_projector
from deftx_kernels.denoise.rule import Rule, gavish_donoho_multiple

ROWS = 1 << 14  # rows of a tall matrix that are multiplied at a time


def denoise_by_gram(
    matrices: Sequence[Tensor],  # [m, n] or [n, m], of one short side n
    out: Sequence[Tensor],
    workspace: Tensor,  # [at least as many, n, n]
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes L + prune(H) to `out`. The ranks int64, and the sums of squares of L and of what is lost, float64."""
    shape, grams = matrices[0].shape, workspace[: len(matrices)]
    runs = _runs(matrices, grams.shape[0] * grams.shape[1])
    if products.uses_split_products(grams):
        for run in runs:
            gram_(grams[run], zip(*(as_tall(w).split(ROWS) for w in matrices[run])))
    else:
        for w, gram in zip(matrices, grams):
            _gram_matrix_(gram, as_tall(w))
    # On a GPU products should be faster than a batched eigendecomposition; not measured yet.
    squares, vectors = (eigvalsh(grams), None) if products.uses_split_products(grams) else eigh(grams, rule, shape)
    values = squares.to("cpu", torch.float64).clamp(min=0).flip(-1)  # all decisions from them are made on the CPU
    ranks = rule.ranks(values, shape)
    is_certain = _rank_is_certain(values, ranks, rule, shape, grams.dtype)
    captured, lost = shares(values, ranks)
    must_measure = is_mostly_rounding(lost, captured + lost, grams.dtype).tolist()
    lost = lost.to(grams.device)
    projectors = [None] * len(grams) if vectors is not None else _projectors(grams, squares, values, ranks, is_certain)
    keep = [rule.kept_entries(w.shape) for w in matrices]
    for run in runs:
        indices = range(len(matrices))[run]
        lows = {i: torch.empty_like(out[i]) if keep[i] or must_measure[i] else out[i] for i in indices}
        projected = [(matrices[i], p, lows[i]) for i in indices if (p := projectors[i]) is not None]
        if projected:
            _project_all(*zip(*projected))
        for i, low in lows.items():
            if projectors[i] is None:
                w, basis = as_tall(matrices[i]), None
                if is_certain[i]:
                    own = vectors[i] if vectors is not None else eigh(grams[i : i + 1], rule, shape)[1][0]
                    given = rule.fixed_rank(shape) is not None
                    basis = _accurate_basis(w, values[i], own.flip(-1), int(ranks[i]), given)
                if basis is None:
                    spectrum, precise = _spectrum_float64(w)
                    basis, ranks[i] = precise.to(low.dtype), rule.ranks(spectrum[None], shape)[0]
                    captured[i], lost[i] = (x[0] for x in shares(spectrum[None], ranks[i : i + 1]))
                _project(w, basis, int(ranks[i]), as_tall(low))
            if keep[i] or must_measure[i]:
                lost[i] = prune_(matrices[i], low, out[i], keep[i])
    return ranks.to(grams.device), captured.to(grams.device), lost


def _runs(matrices: Sequence[Tensor], rows: int) -> list[slice]:
    """Runs of consecutive matrices of one shape: at most `rows` rows (of the long side) in all, at least one matrix."""
    runs: list[slice] = []
    for i, w in enumerate(matrices):
        if runs and w.shape == matrices[i - 1].shape and (i + 1 - runs[-1].start) * max(w.shape) <= rows:
            runs[-1] = slice(runs[-1].start, i + 1)
        else:
            runs.append(slice(i, i + 1))
    return runs


# ---- Gram matrices, and whether their eigenvalues determine the ranks ----
def _gram_matrix_(gram: Tensor, w: Tensor) -> None:  # [n, n], [m, n]
    """gram = w.mT @ w. Truncation multiplies its errors by the largest eigenvalue over the gap at the cut."""
    n = w.shape[1]
    if n < 256:
        torch.mm(w.mT, w, out=gram)
    else:  # the two off-diagonal quarters are each other's transposes
        half = (n + 1) // 2
        first, second = w[:, :half], w[:, half:]
        _gram_matrix_(gram[:half, :half], first)
        _gram_matrix_(gram[half:, half:], second)
        torch.mm(first.mT, second, out=gram[:half, half:])
        gram[half:, :half] = gram[:half, half:].mT


# Rounding errors of a Gram matrix and its eigenvalues, in units of float32's eps. The largest errors found: 18 in the
# cumulative sums of 256 values and 27 in those of 1600 (matrices of rank 2); 5 in one value, relative to the largest.
_SUM_ROUNDING, _VALUE_ROUNDING = 32, 8


def _rank_is_certain(
    squares: Tensor, ranks: Tensor, rule: Rule, shape: torch.Size, dtype: torch.dtype
) -> Tensor:  # bool [b]
    """Whether rounding errors can change neither the rank nor, where the rank is given, most of the residual."""
    eps, n = torch.finfo(dtype).eps, squares.shape[1]
    if rule.fixed_rank(shape) is not None:
        captured, lost = shares(squares, ranks)
        return (ranks == n) | (squares[:, 0] == 0) | ~is_mostly_rounding(lost, captured + lost, dtype)
    if rule.energy is not None:
        sums = squares.cumsum(1)
        distance = (sums - rule.energy * sums[:, -1:]).abs()
        last = (ranks - 1).clamp(min=0)[:, None]
        near = torch.minimum(distance.gather(1, last), distance.gather(1, (last - 1).clamp(min=0)))[:, 0]
        is_certain = near > _SUM_ROUNDING * max(1.0, (n / 256) ** 0.5) * eps * sums[:, -1]
    else:
        multiple = gavish_donoho_multiple(*shape)
        middle = torch.quantile(squares.sqrt(), 0.5, dim=1, keepdim=True).square()
        near = (squares - multiple**2 * middle).abs().amin(1)
        is_certain = near > _VALUE_ROUNDING * eps * (1 + multiple**2) * squares[:, 0]
    return is_certain | (squares[:, 0] == 0)


# ---- truncation by projectors ----
def _projectors(
    grams: Tensor,  # [b, n, n]
    eigenvalues: Tensor,  # [b, n] of them, ascending
    values: Tensor,  # float64 [b, n]: the same on the CPU, descending
    ranks: Tensor,  # [b]
    is_certain: Tensor,  # bool [b]
) -> list[Tensor | None]:
    """The spectral projector of each matrix; None where its rank is not certain, or the gap at the cut too small."""
    b, n = values.shape
    found: list[Tensor | None] = [None] * b
    if n == 1:
        return found
    cut = ranks.clamp(1, n - 1)[:, None]
    gap = (values.gather(1, cut - 1) - values.gather(1, cut))[:, 0]
    wide = gap > (1e-4 if n >= 256 else 1e-3) * values[:, 0]
    chosen = (is_certain & wide & (ranks > 0) & (ranks < n)).nonzero()[:, 0].tolist()
    if chosen:
        rank = ranks[chosen].to(grams.device)
        if len(chosen) < b:
            grams, eigenvalues = grams[chosen], eigenvalues[chosen]
        projectors = spectral_projector(grams, eigenvalues, rank)
        # Both: errors on the two sides of the cut cancel in the trace, and one alone changes the squares little.
        trace = (projectors.diagonal(dim1=-2, dim2=-1).sum(-1) - rank).abs()
        squares = (projectors.square().sum((-2, -1)) - rank).abs()
        for i, p, is_right in zip(chosen, projectors, (torch.maximum(trace, squares) < 1e-2).tolist()):
            found[i] = p if is_right else None
    return found


def _project_all(matrices: Sequence[Tensor], projectors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """out[i] [m, n] = matrices[i] P or, of wide ones, P' matrices[i]: all of one shape."""
    tall, right = [as_tall(w) for w in matrices], split(projectors, RIGHT, -2)
    if len(matrices) == 1:
        for rows, target in zip(tall[0].split(ROWS), as_tall(out[0]).split(ROWS)):
            product_(target[None], split([rows], LEFT, -1), right)
    else:  # on a GPU, copying small matrices costs less than a product for each of them
        low = out[0].new_empty(len(out), *out[0].shape)
        product_(as_tall(low), split(tall, LEFT, -1), right)
        torch._foreach_copy_(list(out), list(low))


# ---- truncation by eigenvectors ----
_WINDOW = 16  # eigenvectors on either side of the cut; `eigh` gives as many beyond it

# Relative errors of the truncated matrix. With an energy or a threshold, 5e-5 is documented. With a given rank, the
# residual is (see _RESIDUAL); the largest error found was 1.5e-3 (power laws, spikes of 400 times the noise), where
# 99.9 % of the largest 5 % of the entries are those of the exact matrix.
_ERROR, _RANK_ERROR = 2e-5, 1e-3
# With a given rank: by how much the squared residual may exceed the smallest one (documented: residual 1.02 times it).
_RESIDUAL = 0.01


def _accurate_basis(w: Tensor, squares: Tensor, vectors: Tensor, rank: int, given: bool) -> Tensor | None:
    """The eigenvectors, accurate enough to truncate with at `rank` (`given`: by the caller), or None where that needs
    float64.

    Rounding mixes an eigenvector above the cut with one below it by about eps * largest / (their distance). Where that
    matters, Rayleigh-Ritz in float64 on a window around the cut, from products with w itself, separates the near ones.
    """
    n = len(squares)
    if w.dtype == torch.float64 or rank in (0, n):  # in float64 the mixing is small wherever the rank is certain
        return vectors
    scale = torch.finfo(torch.float32).eps * float(squares[0])
    captured, lost = float(squares[:rank].sum()), float(squares[rank:].sum())
    above, below = squares[max(rank - 64, 0) : rank, None], squares[None, rank : rank + 64]
    gap = above - below
    mixing = (above + below) / gap.square()

    def is_small(error: float) -> bool:
        """Whether the mixing changes the matrix by little and, where the rank is given, adds little to what is lost."""
        changed = scale * (float(mixing.sum()) / max(captured, 1e-300)) ** 0.5
        return changed <= error and (
            not given or scale**2 * float(torch.where(mixing > 0, 1 / gap, 0.0).sum()) <= _RESIDUAL * lost
        )

    error = _RANK_ERROR if given else _ERROR
    if is_small(error):
        return vectors
    mixing[-_WINDOW:, :_WINDOW] = 0
    # The remaining error was at most 9e-6 where this test passed (low rank and noise, and power laws, n = 256).
    if not is_small(10 * error):
        return None
    window = slice(max(rank - _WINDOW, 0), min(rank + _WINDOW, n))
    basis = vectors[:, window].mT.to(torch.float64)
    lower = torch.linalg.cholesky(basis @ basis.mT)
    basis = torch.linalg.solve_triangular(lower, basis, upper=False)
    # Transposed, so with few rows: a BLAS takes twice as long for products with few columns.
    gram = basis.new_zeros(len(basis), len(basis))
    for rows in w.split(4 * rows_per_chunk(w, n)):
        part = basis @ rows.mT.to(torch.float64)
        gram += part @ part.mT
    rotation = eigh(gram[None])[1][0]
    vectors[:, window] = (rotation.flip(-1).mT @ basis).to(w.dtype).mT
    return vectors


def _spectrum_float64(w: Tensor) -> tuple[Tensor, Tensor]:  # [m, n] -> float64 [n], [n, n]
    """The squared singular values, descending, and right singular vectors: from a Gram matrix in float64 or, of a
    float64 matrix, without one. Values below the rounding error of the largest one count as zero.
    """
    eps, n = torch.finfo(torch.float64).eps, w.shape[1]
    if w.dtype == torch.float64:
        _, singular, vectors = (x[0] for x in svd(w[None]))
        return torch.where(singular > singular[0] * len(w) * eps, singular, 0.0).square().cpu(), vectors.mT
    squares, basis = (x[0].flip(-1) for x in eigh(gram64(w)[None]))
    return torch.where(squares > squares[0] * n * eps, squares, 0.0).cpu(), basis


def _project(w: Tensor, basis: Tensor, rank: int, out: Tensor) -> None:
    """out = w V V.mT for the first `rank` columns V of the basis, from those columns or the others, if fewer."""
    n = basis.shape[1]
    others = 2 * rank > n
    part = (basis[:, rank:] if others else basis[:, :rank]).contiguous()
    for rows, target in zip(w.split(ROWS), out.split(ROWS)):
        product = matmul(rows, part)
        if not others:
            matmul_(target, product, part.mT)
        elif products.uses_split_products(rows):
            torch.sub(rows, matmul(product, part.mT), out=target)
        else:
            torch.addmm(rows, product, part.mT, alpha=-1, out=target)
