"""Truncation at an energy, at a multiple of the median, or at a large rank: from the eigenvalues of the Gram matrix.

Its eigenvectors or, on a GPU, a spectral projector made of products (projector.py) do the truncation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deftx_kernels.denoise import products
from deftx_kernels.denoise.decompositions import eigh, eigvalsh, svd
from deftx_kernels.denoise.matrices import ROWS, as_tall, at_a_time, gram64, is_mostly_rounding, prune_, ranks_of
from deftx_kernels.denoise.products import gram_, matmul, matmul_
from deftx_kernels.denoise.projector import spectral_projector


def by_gram(
    matrices: Sequence[Tensor],  # of one short side n
    out: Sequence[Tensor],
    workspace: Tensor,  # [at least as many, n, n]
    rank: int,
    energy: float,
    median: float,
    residual_density: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tall, grams = [as_tall(w) for w in matrices], workspace[: len(matrices)]
    runs = _runs(matrices, grams.shape[0] * grams.shape[1])
    if products.splits(grams):
        for run in runs:
            batch = _stacked(matrices[run])
            gram_(grams[run], as_tall(batch).split(ROWS, 1))
    else:
        for w, gram in zip(tall, grams):
            _gram_(gram, w)
    rule = (rank, energy, median)
    squares, vectors = (eigvalsh(grams), None) if _by_products(grams) else eigh(grams, *rule)
    values = squares.to("cpu", torch.float64).clamp(min=0).flip(-1)  # all that is decided from them is decided there
    ranks = ranks_of(values, rank, energy, median)
    settled = _settled(values, ranks, energy, median, grams.dtype)
    captured, lost = shares(values, ranks)
    measured = is_mostly_rounding(lost, captured + lost, grams.dtype).tolist()
    lost = lost.to(grams.device)
    projectors = [None] * len(tall) if vectors is not None else _projectors(grams, squares, values, ranks, settled)
    keep = [round(residual_density * w.numel()) for w in matrices]
    for run in runs:
        lows = [
            torch.empty_like(w) if k or x else o
            for w, o, k, x in zip(matrices[run], out[run], keep[run], measured[run])
        ]
        chosen = [(w, p, low) for w, p, low in zip(matrices[run], projectors[run], lows) if p is not None]
        if chosen:
            _project_all(*zip(*chosen))
        for i, low in zip(range(len(matrices))[run], lows):
            if projectors[i] is None:
                basis = None
                if settled[i]:
                    own = vectors[i] if vectors is not None else eigh(grams[i : i + 1], *rule)[1][0]
                    basis = _settled_basis(tall[i], values[i], own.flip(-1), int(ranks[i]), bool(rank))
                if basis is None:
                    spectrum, precise = _spectrum_float64(tall[i])
                    basis, ranks[i] = precise.to(low.dtype), ranks_of(spectrum[None], rank, energy, median)[0]
                    captured[i], lost[i] = (x[0] for x in shares(spectrum[None], ranks[i : i + 1]))
                _project(tall[i], basis, int(ranks[i]), as_tall(low))
            if keep[i] or measured[i]:
                lost[i] = prune_(matrices[i], low, out[i], keep[i])
    device = grams.device
    return ranks.to(device), captured.to(device), lost


def _runs(matrices: Sequence[Tensor], rows: int) -> list[slice]:
    """Neighbours of one shape, of at most so many rows (of the long side) together, but at least one."""
    runs: list[slice] = []
    for i, w in enumerate(matrices):
        if runs and w.shape == matrices[i - 1].shape and (i + 1 - runs[-1].start) * max(w.shape) <= rows:
            runs[-1] = slice(runs[-1].start, i + 1)
        else:
            runs.append(slice(i, i + 1))
    return runs


def _stacked(matrices: Sequence[Tensor]) -> Tensor:  # [b, m, n]
    """On a GPU a copy of small matrices costs less than to launch every step for each of them."""
    return torch.stack(list(matrices)) if len(matrices) > 1 else matrices[0][None]


def _project_all(matrices: Sequence[Tensor], projectors: Sequence[Tensor], out: Sequence[Tensor]) -> None:
    """out[i] [m, n] = matrices[i] P or, of wide ones, P' matrices[i]: all of one shape."""
    if len(matrices) == 1:
        for rows, target in zip(as_tall(matrices[0]).split(ROWS), as_tall(out[0]).split(ROWS)):
            matmul_(target, rows, projectors[0])
    else:
        batch, p = _stacked(matrices), _stacked(projectors)
        low = matmul(batch, p) if batch.shape[1] >= batch.shape[2] else matmul(p.mT, batch)
        torch._foreach_copy_(list(out), list(low))


def _by_products(grams: Tensor) -> bool:
    """Whether eigenvectors are avoided: products are what a GPU is fast at. Not measured against batched eigenvectors
    yet.
    """
    return products.splits(grams)


def _projectors(
    grams: Tensor,  # [b, n, n]
    eigenvalues: Tensor,  # [b, n] of them, ascending
    values: Tensor,  # float64 [b, n]: the same on the CPU, descending
    ranks: Tensor,  # [b]
    settled: Tensor,  # bool [b]
) -> list[Tensor | None]:
    """The spectral projector of each matrix; None where its rank is unknown, or the gap at the cut is too small for
    products.
    """
    b, n = values.shape
    found: list[Tensor | None] = [None] * b
    if n == 1:
        return found
    cut = ranks.clamp(1, n - 1)[:, None]
    gap = (values.gather(1, cut - 1) - values.gather(1, cut))[:, 0]
    wide = gap > (1e-4 if n >= 256 else 1e-3) * values[:, 0]
    chosen = (settled & wide & (ranks > 0) & (ranks < n)).nonzero()[:, 0].tolist()
    if chosen:
        rank = ranks[chosen].to(grams.device)
        if len(chosen) < b:
            grams, eigenvalues = grams[chosen], eigenvalues[chosen]
        projectors = spectral_projector(grams, eigenvalues, rank)
        # Both, since errors at the two sides of the cut cancel in the trace, and one alone hardly shows in the sum of
        # squares.
        trace = (projectors.diagonal(dim1=-2, dim2=-1).sum(-1) - rank).abs()
        squares = (projectors.square().sum((-2, -1)) - rank).abs()
        for i, p, right in zip(chosen, projectors, (torch.maximum(trace, squares) < 1e-2).tolist()):
            found[i] = p if right else None
    return found


def _gram_(gram: Tensor, w: Tensor) -> None:  # [n, n], [m, n]
    """gram = w.mT @ w; its errors come out multiplied by the largest eigenvalue over the gap at the cut."""
    n = w.shape[1]
    if n < 256:
        torch.mm(w.mT, w, out=gram)
    else:  # of the off-diagonal quarters, one is the other's transpose
        half = (n + 1) // 2
        first, second = w[:, :half], w[:, half:]
        _gram_(gram[:half, :half], first)
        _gram_(gram[half:, half:], second)
        torch.mm(first.mT, second, out=gram[:half, half:])
        gram[half:, :half] = gram[:half, half:].mT


# Rounding of a Gram matrix and its eigenvalues, in units of float32's. The largest found: of sums 18 for 256 values, 27
# for 1600 (two directions and nothing else), of a value 5 of the largest one.
_SUM_ROUNDING, _VALUE_ROUNDING = 32, 8


def _settled(squares: Tensor, ranks: Tensor, energy: float, median: float, dtype: torch.dtype) -> Tensor:  # bool [b]
    """Whether no rounding of the dtype could make a rank another one, or, where it is given, hide how little is lost."""
    eps, n = torch.finfo(dtype).eps, squares.shape[1]
    if not (energy or median):
        captured, lost = shares(squares, ranks)
        return (ranks == n) | (squares[:, 0] == 0) | ~is_mostly_rounding(lost, captured + lost, dtype)
    if energy:
        sums = squares.cumsum(1)
        distance = (sums - energy * sums[:, -1:]).abs()
        last = (ranks - 1).clamp(min=0)[:, None]
        near = torch.minimum(distance.gather(1, last), distance.gather(1, (last - 1).clamp(min=0)))[:, 0]
        settled = near > _SUM_ROUNDING * max(1.0, (n / 256) ** 0.5) * eps * sums[:, -1]
    else:
        middle = torch.quantile(squares.sqrt(), 0.5, dim=1, keepdim=True).square()
        near = (squares - median**2 * middle).abs().amin(1)
        settled = near > _VALUE_ROUNDING * eps * (1 + median**2) * squares[:, 0]
    return settled | (squares[:, 0] == 0)


def shares(squares: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:  # float64 [b, n], int64 [b] -> float64 [b], [b]
    """The sums of what the ranks keep and of the rest."""
    kept = torch.arange(squares.shape[1], device=squares.device) < ranks[:, None]
    return torch.where(kept, squares, 0.0).sum(1), torch.where(kept, 0.0, squares).sum(1)


_WINDOW = 16  # eigenvectors on either side of the cut; `eigh` gives as many beyond it


def _settled_basis(w: Tensor, squares: Tensor, vectors: Tensor, rank: int, given: bool) -> Tensor | None:
    """The eigenvectors, accurate enough to truncate with at `rank` (that was given or found), or None where float32
    does not do.

    Rounding mixes an eigenvector above the cut with one below it by about eps * largest / (their distance). Where that
    matters, Rayleigh-Ritz in float64 on a window around the cut, from products with w itself, undoes it for the near
    ones.
    """
    n = len(squares)
    if w.dtype == torch.float64 or rank in (0, n):  # in float64 what mixes is small wherever the rank is settled
        return vectors
    scale = torch.finfo(torch.float32).eps * float(squares[0])
    captured, lost = float(squares[:rank].sum()), float(squares[rank:].sum())
    above, below = squares[max(rank - 64, 0) : rank, None], squares[None, rank : rank + 64]
    gap = above - below
    mixing = (above + below) / gap.square()

    def small(error: float) -> bool:
        """Whether what mixes changes the matrix, and where the rank was given adds to what is lost, by little."""
        changed = scale * (float(mixing.sum()) / max(captured, 1e-300)) ** 0.5
        return changed <= error and (
            not given or scale**2 * float(torch.where(mixing > 0, 1 / gap, 0.0).sum()) <= _RESIDUAL * lost
        )

    error = _RANK_ERROR if given else _ERROR
    if small(error):
        return vectors
    mixing[-_WINDOW:, :_WINDOW] = 0
    # What is left came to 9e-6 at most where this accepted it (low rank and noise, and power laws, n = 256).
    if not small(10 * error):
        return None
    window = slice(max(rank - _WINDOW, 0), min(rank + _WINDOW, n))
    basis = vectors[:, window].mT.to(torch.float64)
    lower = torch.linalg.cholesky(basis @ basis.mT)
    basis = torch.linalg.solve_triangular(lower, basis, upper=False)
    # With few rows: of products with few columns a BLAS takes twice as long.
    gram = sum(part @ part.mT for part in (basis @ rows.mT.to(torch.float64) for rows in w.split(4 * at_a_time(w, n))))
    assert isinstance(gram, Tensor)
    rotation = eigh(gram[None])[1][0]
    vectors[:, window] = (rotation.flip(-1).mT @ basis).to(w.dtype).mT
    return vectors


# Relative errors of the truncated matrix. An energy or a threshold promises 5e-5. A given rank promises a residual
# (_RESIDUAL); the largest error found was 1.5e-3 (power laws, spikes of 400 times the noise), where of the largest 5 %
# of the entries 99.9 % are those of the exact matrix.
_ERROR, _RANK_ERROR = 2e-5, 1e-3
_RESIDUAL = 0.01  # of the best one's square, which a given rank may exceed; 1.02 of the best one is promised


def _spectrum_float64(w: Tensor) -> tuple[Tensor, Tensor]:  # [m, n] -> float64 [n], [n, n]
    """The squared singular values, descending, and right singular vectors: from a Gram matrix in float64 or, of a
    float64 matrix, without one. Below the rounding of the largest one nothing is known: it counts as zero."""
    eps, n = torch.finfo(torch.float64).eps, w.shape[1]
    if w.dtype == torch.float64:
        _, singular, vectors = (x[0] for x in svd(w[None]))
        return torch.where(singular > singular[0] * len(w) * eps, singular, 0.0).square().cpu(), vectors.mT
    squares, basis = (x[0].flip(-1) for x in eigh(gram64(w)[None]))
    return torch.where(squares > squares[0] * n * eps, squares, 0.0).cpu(), basis


def _project(w: Tensor, basis: Tensor, rank: int, out: Tensor) -> None:
    """out = w V V.mT for the first `rank` columns V of the basis, by way of the fewer ones: those, or the others."""
    n = basis.shape[1]
    others = 2 * rank > n
    part = (basis[:, rank:] if others else basis[:, :rank]).contiguous()
    for rows, target in zip(w.split(ROWS), out.split(ROWS)):
        product = matmul(rows, part)
        if not others:
            matmul_(target, product, part.mT)
        elif products.splits(rows):
            torch.sub(rows, matmul(product, part.mT), out=target)
        else:
            torch.addmm(rows, product, part.mT, alpha=-1, out=target)
