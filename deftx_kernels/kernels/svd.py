"""Truncated SVD and denoising of matrices at the speed of matrix products, for CPU and CUDA tensors.

Two ways, both on the short side of a matrix (n of [m, n], m >= n; a wide matrix is worked on transposed):
    a small rank    block subspace iteration on a whole batch: products with r + oversample columns, and Cholesky QR
    the rest        the Gram matrix and its eigenvectors. Where float32 cannot settle the rank or the truncation, in float64

Whatever is small, [l, l] or [n, l], is computed in float64: a Gram matrix has the squares of the singular values.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deftx_kernels.kernels import products
from deftx_kernels.kernels.products import Parts, full_precision, gram_, matmul, matmul_, rough_matmul
from deftx_kernels.kernels.spectral import spectral_projector

_ROWS = 1 << 14  # of a tall matrix, worked on at a time


def truncated_svd(a: Tensor, rank: int, n_iter: int, test_matrix: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    work = a.to(torch.float64 if a.dtype == torch.float64 else torch.float32)
    if test_matrix is None:
        U, S, Vh = torch.linalg.svd(work, full_matrices=False)
    else:
        wide = a.shape[-2] < a.shape[-1]
        batch, scale = _in_range(work.reshape(-1, *a.shape[-2:]))
        with full_precision():
            tall = batch.mT if wide else batch
            operand = Parts.of(tall) if products.splits(tall) else tall
            scaled, Vh, squares = map(torch.stack, _subspace(operand, _sums_of_squares(batch), rank, n_iter, test_matrix))
            U = _orthonormal_rows(scaled.mT.contiguous()).mT
        S = squares.clamp(min=0).sqrt() / scale
        if wide:
            U, Vh = Vh.mT, U.mT
        U, S, Vh = (x.reshape(*a.shape[:-2], *x.shape[1:]) for x in (U, S, Vh))
    U, S, Vh = (x.to(a.dtype).contiguous() for x in (U[..., :rank], S[..., :rank], Vh[..., :rank, :]))
    return U, S, Vh


def svd_denoise_(
    matrices: Sequence[Tensor],  # each [m, n]
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
    m, n = max(matrices[0].shape), min(matrices[0].shape)
    batch = min(batch, len(matrices))
    # Made once: memory that is new to the process costs more than to copy a matrix into it.
    workspace = torch.empty(batch, n if test_matrix is None else m, n, dtype=matrices[0].dtype, device=matrices[0].device)
    found = []
    with full_precision():
        for first in range(0, len(matrices), batch):
            some = slice(first, first + batch)
            if test_matrix is not None:
                keep = round(residual_density * matrices[0].numel())
                found.append(_by_subspace(matrices[some], out[some], workspace, totals[some], rank, keep, n_iter, test_matrix))
            else:
                found.append(_by_spectrum(matrices[some], out[some], workspace, rank, energy, median, residual_density))
    ranks, captured, lost = (torch.cat(x) for x in zip(*found))
    whole = torch.where(totals > 0, totals, 1.0)
    return ranks, torch.where(totals > 0, captured / whole, 1.0).clamp(max=1.0), (lost / whole).clamp(min=0.0).sqrt()


def _in_range(batch: Tensor) -> tuple[Tensor, Tensor]:
    """The matrices [b, m, n] times powers of 2, so that squares of entries stay within the dtype; the powers, float64 [b, 1]."""
    largest = torch.linalg.vector_norm(batch, float("inf"), dim=(-2, -1))
    limit = 1000 if batch.dtype == torch.float64 else 120  # the powers are numbers of the dtype
    exponent = torch.where((largest < 1e-9) | (largest > 1e9), -torch.frexp(largest).exponent, 0).clamp(-limit, limit)[:, None]
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float64), exponent)
    return (batch * scale[..., None].to(batch.dtype) if bool((exponent != 0).any()) else batch), scale


# ---- sums ---------------------------------------------------------------------------------------------------------------


def _sums_of_squares(y: Tensor) -> Tensor:
    """float64 [...] of y [..., m, n]: float32 sums of rows, added up in float64 (of a whole matrix torch gives 4 digits)."""
    return torch.linalg.vector_norm(y, dim=-1).to(torch.float64).square().sum(-1)


def _at_a_time(x: Tensor, width: int) -> int:
    """How many rows of `width` numbers of each matrix are made float64 at a time: few on the CPU, where memory is the limit."""
    return max(1, (1 << (24 if x.is_cuda else 16)) // width)


def _gram64(y: Tensor, dim: int = -2) -> Tensor:
    """y.mT @ y (dim -2) or y @ y.mT (dim -1) [..., l, l] in float64, some of the other dimension at a time."""
    gram: Tensor | None = None
    for part in y.split(_at_a_time(y, y.shape[-3 - dim]), dim):
        part = part.to(torch.float64)
        product = part.mT @ part if dim == -2 else part @ part.mT
        gram = product if gram is None else gram.add_(product)
    assert gram is not None
    return gram


# The operators keep one multiprocessor of a GPU busy for each matrix: those of more rows are better left to cuSOLVER.
_ONE_BLOCK = 1024


def _eigvalsh(matrices: Tensor) -> Tensor:  # [b, n, n] -> [b, n], ascending
    whole = matrices.is_cuda and matrices.shape[-1] > _ONE_BLOCK
    return torch.linalg.eigvalsh(matrices) if whole else torch.ops.deftx.eigvalsh(matrices)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:  # [b, n, n] -> [b, n], ascending, and [b, n, n], columns
    whole = matrices.is_cuda and matrices.shape[-1] > _ONE_BLOCK
    return torch.linalg.eigh(matrices) if whole else torch.ops.deftx.eigh(matrices)


# ---- a small rank -------------------------------------------------------------------------------------------------------


def _orthonormal_rows(z: Tensor) -> Tensor:  # [b, l, n], l <= n
    """An orthonormal basis of the span of the rows, by Cholesky QR with a float64 Gram matrix (Yamazaki, Tomov & Dongarra 2015).

    Twice for matrices with rows of very different size, since rounding grows with the ratio; Householder QR where rows are too
    nearly dependent. Signs are those of Gram-Schmidt.
    """
    lower, info = torch.linalg.cholesky_ex(_gram64(z, -1))
    diagonal = lower.diagonal(dim1=-2, dim2=-1)
    ratio = diagonal.amin(-1) / diagonal.amax(-1)
    hopeless = (info != 0) | ~(ratio > (1e-10 if z.dtype == torch.float64 else 1e-6))
    again = ~hopeless & (ratio < 1e-2)
    identity = torch.eye(z.shape[-2], dtype=torch.float64, device=z.device).expand_as(lower)
    q = matmul(torch.linalg.solve_triangular(lower, identity, upper=False).to(z.dtype), z)
    if bool((hopeless | again).any()):
        if bool(again.any()):
            q[again] = _orthonormal_rows(q[again])
        for i in hopeless.nonzero().view(-1).tolist():
            basis, r = torch.linalg.qr(z[i].mT)
            q[i] = (basis * torch.where(r.diagonal() < 0, -1.0, 1.0)).mT
    return q


def _subspace(a: Tensor | Parts, totals: Tensor, rank: int, n_iter: int, test_matrix: Tensor) -> tuple[list[Tensor], ...]:
    """Factors of the rank-r approximations of a [b, m, n]: left [m, r] = a @ right.mT, right [r, n] with orthonormal rows, and the
    squared singular values, descending, float64 [r]. totals [b] are the sums of squares.

    Subspace iteration with a.mT a and Rayleigh-Ritz (Halko, Martinsson & Tropp 2011, section 4.5; Saad 2011, chapter 5). From the
    second iteration on it is a.mT a - shift: that weakens the directions that are not wanted, whose mean the shift is about,
    against those that are. No shift is above half of a wanted eigenvalue: then none is weakened more than one that is not wanted.
    """
    b, _, n = a.shape
    columns = test_matrix.shape[1]
    # Errors of 2**-8 in the start are a few more directions to be rid of. Simulated (noise, power laws, steps, exponentials): as
    # many iterations as from an exact start, but one more for some matrices whose singular values fall below 2**-8 of the first.
    q = _orthonormal_rows(rough_matmul(rough_matmul(a, test_matrix.to(a.dtype)).mT, a))
    y = matmul(a, q.mT)
    seen = _sums_of_squares(y)
    half: Tensor | None = None
    results: list[tuple[Tensor, ...]] = [()] * b
    index = list(range(b))
    for k in range(2, 2 + n_iter + _MORE):
        z = matmul(y.mT, a)
        if half is None:  # singular values of a.mT a q are at most those of a.mT a
            half = _eigvalsh(_gram64(z, -1))[:, columns - rank].clamp(min=0).sqrt() / 2
        shift = torch.minimum(1.5 * (totals - seen).clamp(min=0) / (n - columns), half)
        q = _orthonormal_rows(z - shift.to(z.dtype)[:, None, None] * q)
        y = matmul(a, q.mT)
        before, seen = seen, _sums_of_squares(y)
        if k < n_iter:
            continue
        squares, vectors = _ritz(y, rank)
        residual = totals - squares.sum(-1)
        rounding = _ROUNDING[y.dtype]
        done = seen - before <= _enough(k, rank, columns, n) * residual + rounding.gain * totals
        if k < rounding.steps:
            done &= residual > rounding.residual * totals
        done |= (k == 1 + n_iter + _MORE) | (totals == 0)
        finished, rest = (x.nonzero().view(-1) for x in (done, ~done))
        if len(finished):
            some = slice(None) if not len(rest) else finished
            c = vectors[some].to(y.dtype)
            factors = zip(matmul(y[some], c), matmul(c.mT, q[some]), squares[some])
            for i, found in zip(finished.tolist(), factors):
                results[index[i]] = found
        if not len(rest):
            break
        index = [index[i] for i in rest.tolist()]
        a = a[rest]
        q, y, totals, seen, half = (x[rest] for x in (q, y, totals, seen, half))
    return tuple(map(list, zip(*results)))


class _Rounding(NamedTuple):
    """What is lost in the rounding of the sums, as shares of all energy."""

    gain: float  # gains below it are rounding
    residual: float  # of a residual below it the gains are: iterate on unseen
    steps: int  # so often


_ROUNDING = {torch.float32: _Rounding(1e-7, 1e-6, 4), torch.float64: _Rounding(1e-15, 1e-13, 8)}
_MORE = 24  # iterations beyond n_iter at most


def _ritz(y: Tensor, rank: int) -> tuple[Tensor, Tensor]:  # [b, m, l] -> float64 [b, r], [b, l, r]
    """The largest squared singular values of y, descending, and their right singular vectors."""
    if y.dtype == torch.float64:  # a Gram matrix would lose what is below 1e-8 of the largest
        _, singular, vectors = torch.linalg.svd(torch.linalg.qr(y, mode="r").R)
        return singular[:, :rank].square(), vectors.mT[..., :rank]
    squares, basis = _eigh(_gram64(y))
    return squares.flip(-1)[:, :rank], basis.flip(-1)[..., :rank]


def _enough(k: int, rank: int, columns: int, n: int) -> float:
    """Of the residual's square: what iteration k may still gain for the residual to be within 1.02 of the optimal one.

    Found on simulated spectra: noise, low rank and noise, power laws, exponentials, steps, plateaus; n = 160 to 1500, r = 1 to 150.
    With few columns to spare a small gain says little. Neither does it at the second iteration if the columns are more than a
    seventh of all: a step of 1.1 to 1.3 at the rank left 1.02 to 1.024 where the gain was 0.01 to 0.03 (n = 160 to 1000).
    """
    room, spare = 1 - 2 * columns / n, columns - rank
    share = 1.0 if spare >= 16 else 0.6 * (spare / 16) ** 4 + 0.05
    second = min(0.12, 0.15 * room) if room > 0.72 else 0.007
    return {2: second, 3: 0.045 * room + 0.01}.get(k, 0.01) * share


def _by_subspace(
    matrices: Sequence[Tensor],
    out: Sequence[Tensor],
    workspace: Tensor,  # contiguous [at least as many, m, n]: the matrices one after the other, or their two bfloat16 parts
    totals: Tensor,
    rank: int,
    keep: int,
    n_iter: int,
    test_matrix: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    left, right, squares = _subspace(_batched(matrices, workspace), totals, rank, n_iter, test_matrix)
    lost = []
    for i, w in enumerate(matrices):
        if keep and products.splits(w):
            lost.append(_prune_from_factors(w, left[i], right[i].mT, out[i], keep))
            continue
        low = torch.empty_like(w) if keep else out[i]
        matmul_(_tall(low), left[i], right[i])
        if keep:
            lost.append(_prune_(w, low, out[i], keep))
    captured = torch.stack([x.sum() for x in squares])
    ranks = torch.full_like(totals, rank, dtype=torch.int64)
    return ranks, captured, torch.stack(lost) if keep else totals - captured


def _batched(matrices: Sequence[Tensor], workspace: Tensor) -> Tensor | Parts:  # [b, m, n], m >= n
    if products.splits(matrices[0]):
        parts = Parts.stacked(matrices, workspace)
        return parts if parts.shape[1] >= parts.shape[2] else parts.mT
    tall = [_tall(w) for w in matrices]
    return tall[0].unsqueeze(0) if len(tall) == 1 else torch.stack(tall, out=workspace[: len(tall)])


def _tall(w: Tensor) -> Tensor:  # [..., m, n]
    return w if w.shape[-2] >= w.shape[-1] else w.mT


def _prune_(w: Tensor, low: Tensor, out: Tensor, keep: int) -> Tensor:
    """out = low + the `keep` largest entries of w - low; returns the sum of squares of what is lost, float64 []."""
    crow, col, _ = torch.ops.deftx.topk_mask([w], [low], [keep], "tensor")
    torch.ops.deftx.csr_scatter_([low], crow, col, torch.ops.deftx.csr_gather([w], crow, col))
    lost = _sums_of_squares(torch.sub(w, low, out=out))
    out.copy_(low)
    return lost


def _prune_from_factors(w: Tensor, left: Tensor, right: Tensor, out: Tensor, keep: int) -> Tensor:
    """As `_prune_`, for low = left @ right.mT (of the transposed matrix where w is wide) that is not written."""
    if w.shape[0] < w.shape[1]:
        left, right = right, left
    arguments = (w[None], left[None].contiguous(), right[None].contiguous())
    denoised = torch.ops.deftx.low_rank_denoised(*arguments, torch.ops.deftx.residual_cut(*arguments, keep))[0]
    lost = _sums_of_squares(w - denoised)
    out.copy_(denoised)
    return lost


# ---- an energy, a multiple of the median, or a large rank ---------------------------------------------------------------


def _by_spectrum(
    matrices: Sequence[Tensor],  # of one short side n
    out: Sequence[Tensor],
    workspace: Tensor,  # [at least as many, n, n]
    rank: int,
    energy: float,
    median: float,
    residual_density: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tall, grams = [_tall(w) for w in matrices], workspace[: len(matrices)]
    runs = _runs(matrices, grams.shape[0] * grams.shape[1])
    if products.splits(grams):
        for run in runs:
            batch = _stacked(matrices[run])
            gram_(grams[run], _tall(batch).split(_ROWS, 1))
    else:
        for w, gram in zip(tall, grams):
            _gram_(gram, w)
    squares, vectors = (_eigvalsh(grams), None) if _by_products(grams) else _eigh(grams)
    values = squares.to("cpu", torch.float64).clamp(min=0).flip(-1)  # all that is decided from them is decided there
    if grams.dtype == torch.float64:
        values = _known(values)
    ranks = _ranks(values, rank, energy, median)
    settled = _settled(values, ranks, energy, median, grams.dtype)
    captured, lost = _shares(values, ranks)
    projectors = [None] * len(tall) if vectors is not None else _projectors(grams, squares, values, ranks, settled)
    keep = [round(residual_density * w.numel()) for w in matrices]
    pruned = []
    for run in runs:
        lows = [torch.empty_like(w) if k else o for w, o, k in zip(matrices[run], out[run], keep[run])]
        chosen = [(w, p, low) for w, p, low in zip(matrices[run], projectors[run], lows) if p is not None]
        if chosen:
            _project_all(*zip(*chosen))
        for i, low in zip(range(len(matrices))[run], lows):
            if projectors[i] is None:
                basis = None
                if settled[i]:
                    own = vectors[i] if vectors is not None else torch.linalg.eigh(grams[i])[1]
                    basis = _settled_basis(tall[i], values[i], own.flip(-1), int(ranks[i]))
                if basis is None:
                    spectrum, precise = _spectrum64(tall[i])
                    basis, ranks[i] = precise.to(low.dtype), _ranks(spectrum[None], rank, energy, median)[0]
                    captured[i], lost[i] = (x[0] for x in _shares(spectrum[None], ranks[i : i + 1]))
                _project(tall[i], basis, int(ranks[i]), _tall(low))
            if keep[i]:
                pruned.append(_prune_(matrices[i], low, out[i], keep[i]))
            elif residual_density:
                pruned.append(lost[i].to(grams.device))
    device = grams.device
    return ranks.to(device), captured.to(device), torch.stack(pruned) if pruned else lost.to(device)


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
        for rows, target in zip(_tall(matrices[0]).split(_ROWS), _tall(out[0]).split(_ROWS)):
            matmul_(target, rows, projectors[0])
    else:
        batch, p = _stacked(matrices), _stacked(projectors)
        low = matmul(batch, p) if batch.shape[1] >= batch.shape[2] else matmul(p.mT, batch)
        torch._foreach_copy_(list(out), list(low))


def _by_products(grams: Tensor) -> bool:
    """Whether eigenvectors are avoided: products are what a GPU is fast at. Not measured against batched eigenvectors yet."""
    return products.splits(grams)


def _projectors(
    grams: Tensor,  # [b, n, n]
    eigenvalues: Tensor,  # [b, n] of them, ascending
    values: Tensor,  # float64 [b, n]: the same on the CPU, descending
    ranks: Tensor,  # [b]
    settled: Tensor,  # bool [b]
) -> list[Tensor | None]:
    """The spectral projector of each matrix; None where its rank is unknown, or the gap at the cut is too small for products."""
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
        # Both, since errors at the two sides of the cut cancel in the trace, and one alone hardly shows in the sum of squares.
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


def _ranks(squares: Tensor, rank: int, energy: float, median: float) -> Tensor:  # float64 [b, n], descending -> int64 [b]
    """By the rule, from the squared singular values."""
    if rank:
        return torch.full((len(squares),), rank)
    if energy:
        sums = squares.cumsum(1)
        found = torch.searchsorted(sums, energy * sums[:, -1:])[:, 0] + 1
    else:
        singular = squares.sqrt()
        found = (singular > median * torch.quantile(singular, 0.5, dim=1, keepdim=True)).sum(1)
    return torch.where(squares[:, 0] > 0, found, 0)


# Rounding of a Gram matrix and its eigenvalues, in units of float32's (the largest found: 1e-6 of the sum, 5 units of the largest).
_SUM_ROUNDING, _VALUE_ROUNDING = 16, 8


def _settled(squares: Tensor, ranks: Tensor, energy: float, median: float, dtype: torch.dtype) -> Tensor:  # bool [b]
    """Whether no rounding of the dtype could make a rank another one."""
    eps = torch.finfo(dtype).eps
    if eps < 1e-12 or not (energy or median):
        return torch.ones_like(ranks, dtype=torch.bool)
    if energy:
        sums = squares.cumsum(1)
        distance = (sums - energy * sums[:, -1:]).abs()
        last = (ranks - 1).clamp(min=0)[:, None]
        near = torch.minimum(distance.gather(1, last), distance.gather(1, (last - 1).clamp(min=0)))[:, 0]
        settled = near > _SUM_ROUNDING * eps * sums[:, -1]
    else:
        middle = torch.quantile(squares.sqrt(), 0.5, dim=1, keepdim=True).square()
        near = (squares - median**2 * middle).abs().amin(1)
        settled = near > _VALUE_ROUNDING * eps * (1 + median**2) * squares[:, 0]
    return settled | (squares[:, 0] == 0)


def _shares(squares: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:  # float64 [b, n], int64 [b] -> float64 [b], [b]
    """The sums of what the ranks keep and of the rest."""
    kept = torch.arange(squares.shape[1]) < ranks[:, None]
    return torch.where(kept, squares, 0.0).sum(1), torch.where(kept, 0.0, squares).sum(1)


_WINDOW = 16  # eigenvectors on either side of the cut


def _settled_basis(w: Tensor, squares: Tensor, vectors: Tensor, rank: int) -> Tensor | None:
    """The eigenvectors, accurate enough to truncate with at `rank`, or None where float32 does not do.

    Rounding mixes an eigenvector above the cut with one below it by about eps * largest / (their distance). Where that matters,
    Rayleigh-Ritz in float64 on a window around the cut, from products with w itself, undoes it for the near ones.
    """
    n = len(squares)
    if w.dtype == torch.float64 or rank in (0, n):
        return vectors
    scale = torch.finfo(torch.float32).eps * float(squares[0]) / max(float(squares[:rank].sum()), 1e-300) ** 0.5
    above, below = squares[max(rank - 64, 0) : rank, None], squares[None, rank : rank + 64]
    mixing = (above + below) / (above - below).square()
    if scale * float(mixing.sum()) ** 0.5 <= _ERROR:
        return vectors
    mixing[-_WINDOW:, :_WINDOW] = 0
    # What is left came to 9e-6 at most where this accepted it (low rank and noise, and power laws, n = 256).
    if not scale * float(mixing.sum()) ** 0.5 <= 10 * _ERROR:
        return None
    window = slice(max(rank - _WINDOW, 0), min(rank + _WINDOW, n))
    basis = vectors[:, window].to(torch.float64)
    lower = torch.linalg.cholesky(basis.mT @ basis)
    identity = torch.eye(lower.shape[0], dtype=torch.float64, device=w.device)
    basis = basis @ torch.linalg.solve_triangular(lower, identity, upper=False).mT
    _, rotation = torch.linalg.eigh(
        sum(part.mT @ part for part in (rows.to(torch.float64) @ basis for rows in w.split(_at_a_time(w, n))))
    )
    vectors[:, window] = (basis @ rotation.flip(-1)).to(w.dtype)
    return vectors


_ERROR = 2e-5  # relative, of the truncated matrix; 5e-5 is promised


def _spectrum64(w: Tensor) -> tuple[Tensor, Tensor]:
    squares, vectors = torch.linalg.eigh(_gram64(w))
    return _known(squares.cpu().flip(-1)), vectors.flip(-1)


def _known(squares: Tensor) -> Tensor:  # [..., n], descending, of float64 Gram matrices
    """Below the rounding of the largest one nothing is known: count it as zero."""
    noise = squares[..., :1] * squares.shape[-1] * torch.finfo(torch.float64).eps
    return torch.where(squares > noise, squares, 0.0)


def _project(w: Tensor, basis: Tensor, rank: int, out: Tensor) -> None:
    """out = w V V.mT for the first `rank` columns V of the basis, by way of the fewer ones: those, or the others."""
    n = basis.shape[1]
    others = 2 * rank > n
    part = (basis[:, rank:] if others else basis[:, :rank]).contiguous()
    for rows, target in zip(w.split(_ROWS), out.split(_ROWS)):
        product = matmul(rows, part)
        if not others:
            matmul_(target, product, part.mT)
        elif products.splits(rows):
            torch.sub(rows, matmul(product, part.mT), out=target)
        else:
            torch.addmm(rows, product, part.mT, alpha=-1, out=target)
