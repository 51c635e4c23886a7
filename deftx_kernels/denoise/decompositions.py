"""Eigenproblems and singular value decompositions whose results are checked, with a second solver as fallback.

A linear algebra library can be wrong on one processor and right on all others: LAPACK's eigensolver of one BLAS, called
by several threads at once, returned noise for the eigenvectors of matrices of 640 rows. A mask selected from such a
result looks like any other mask. So each result is compared with its matrix, in n**2 operations: the trace and the sum
of squares, and products with a few random vectors, which depend on every eigenvector (Freivalds 1979). A matrix whose
result fails is decomposed again in float64 by another solver, with a warning; if that fails too, it is an error.
Matrices must be scaled so that the squares of their entries are in the dtype's range.
"""

import functools
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from deftx_kernels.denoise.rule import Rule
from deftx_kernels.ops.library import MAX_EIGH_ROWS

_PROBES = 2


def eigvalsh(matrices: Tensor) -> Tensor:  # symmetric [b, n, n] -> [b, n], ascending
    large = matrices.is_cuda and matrices.shape[-1] > MAX_EIGH_ROWS
    values = torch.linalg.eigvalsh(matrices) if large else torch.ops.deftx.eigvalsh(matrices)
    return _checked(matrices, (values,), _values_match, lambda g: (torch.linalg.eigvalsh(g),), "eigenvalues")[0]


def eigh(
    matrices: Tensor,  # symmetric [b, n, n]
    rule: Rule | None = None,
    shape: torch.Size | None = None,  # of the matrices whose Gram matrices these are
) -> tuple[Tensor, Tensor]:  # [b, n], ascending, and [b, n, n], columns
    """With a rule, vectors that a truncation by it does not need may be zero (see the operator)."""
    large = matrices.is_cuda and matrices.shape[-1] > MAX_EIGH_ROWS
    needed: Callable[[Tensor], Tensor] | None = None
    arguments: tuple = ()
    if rule is not None and shape is not None:
        needed, arguments = functools.partial(_needed, rule=rule, shape=shape), rule.operator_arguments(shape)
    found = torch.linalg.eigh(matrices) if large else torch.ops.deftx.eigh(matrices, *arguments)
    match = functools.partial(_vectors_match, needed=needed)
    values, vectors = _checked(matrices, tuple(found), match, torch.linalg.eigh, "eigenvectors")
    return values, vectors


# [b, m, n] -> U [b, m, r], S [b, r], Vh [b, r, n], r = min(m, n)
def svd(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = torch.linalg.svd(matrices, full_matrices=False)
    U, S, Vh = _checked(matrices, tuple(found), _triplets_match, _svd_of_transpose, "singular value decomposition")
    return U, S, Vh


def _svd_of_transpose(matrices: Tensor) -> tuple[Tensor, ...]:
    V, S, Uh = torch.linalg.svd(matrices.mT, full_matrices=False)
    return Uh.mT, S, V.mT


def are_rows_orthonormal(q: Tensor) -> Tensor:  # [b, l, n] -> bool [b]
    """As far as products with random vectors show: to about 1e-5 in float32."""
    tolerance = _tolerance(q)
    q = _without_tf32(q)
    z = _probes(q.shape[-2], q)
    return _norm(q @ (q.mT @ z) - z) <= tolerance * _norm(z)


def _checked(
    matrices: Tensor,  # [b, m, n]
    found: tuple[Tensor, ...],  # each [b, ...]
    match: Callable[..., Tensor],  # (matrices, *found) -> bool [b]
    other_solver: Callable[[Tensor], tuple[Tensor, ...]],
    what: str,
) -> tuple[Tensor, ...]:
    if matrices.numel() == 0:
        return found
    is_right = match(matrices, *found)
    if bool(is_right.all()):
        return found
    wrong = (~is_right).nonzero().view(-1)
    b, m, n = matrices.shape
    size = f"{len(wrong)} of {b} matrices of {m} x {n}"
    warnings.warn(
        f"deftx_kernels: the {what} of {size} ({matrices.dtype} on {matrices.device}) failed the check against the"
        " matrix. Another solver computes them again in float64: the results are correct, but slow. Please report this"
        " with the output of `deftx doctor`",
        RuntimeWarning,
        stacklevel=4,
    )
    second = tuple(x.to(matrices.dtype) for x in other_solver(matrices[wrong].to(torch.float64)))
    if not bool(match(matrices[wrong], *second).all()):
        raise RuntimeError(
            f"every solver on this machine gives wrong results for the {what} of {size} ({matrices.dtype} on"
            f" {matrices.device}): the matrix holds values that are not finite, or a linear algebra library is"
            " broken (see `deftx doctor`)"
        )
    found = tuple(x.clone(memory_format=torch.preserve_format) for x in found)
    for x, y in zip(found, second):
        x[wrong] = y
    return found


# ---- the checks; comparisons are written so that NaN fails ----
def _values_match(matrices: Tensor, values: Tensor) -> Tensor:
    """The trace, and the sum of squares."""
    n = values.shape[-1]
    exact = values.to(torch.float64)
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64)
    norm = _norm(matrices)
    tolerance = _tolerance(matrices) * norm
    return (
        (exact.diff(dim=-1) >= 0).all(-1)
        & ((exact.sum(-1) - trace).abs() <= n**0.5 * tolerance)
        & ((torch.linalg.vector_norm(exact, dim=-1) - norm).abs() <= tolerance)
    )


def _vectors_match(
    matrices: Tensor, values: Tensor, vectors: Tensor, needed: Callable[[Tensor], Tensor] | None
) -> Tensor:
    tolerance, is_right = _tolerance(matrices), _values_match(matrices, values)
    wanted = None if needed is None else needed(values)  # bool [b, n]
    matrices, values, vectors = map(_without_tf32, (matrices, values, vectors))
    # Probes are rows: a BLAS takes five times as long for products with two columns.
    z = _probes(matrices.shape[-1], matrices).mT
    z = z.expand(len(matrices), *z.shape) if wanted is None else z * wanted[:, None].to(z.dtype)
    x, scaled = (torch.cat([z, z * values[:, None]], 1) @ vectors.mT).tensor_split(2, 1)
    back, norm = x @ vectors, _norm(z)
    if wanted is not None:
        back *= wanted[:, None].to(z.dtype)
    return (
        is_right
        & (_norm(back - z) <= tolerance * norm)
        & (_norm(x @ matrices - scaled) <= tolerance * norm * _norm(matrices))
    )


def _needed(values: Tensor, rule: Rule, shape: torch.Size) -> Tensor:  # ascending [b, n] -> bool [b, n]
    """The kept eigenvalues or the others, whichever are fewer."""
    n = values.shape[-1]
    kept = rule.ranks(values.to("cpu", torch.float64).clamp(min=0).flip(-1), shape)[:, None]
    above = torch.arange(n, device="cpu") >= n - kept
    return torch.where(2 * kept > n, ~above, above).to(values.device)


def _triplets_match(matrices: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    r, tolerance = S.shape[-1], _tolerance(matrices)
    matrices, U, S, Vh = map(_without_tf32, (matrices, U, S, Vh))
    z, y = _probes(matrices.shape[-1], matrices), _probes(r, matrices)
    norm = _norm(matrices)
    return (
        ((torch.linalg.vector_norm(S, dim=-1, dtype=torch.float64) - norm).abs() <= tolerance * norm)
        & (S.diff(dim=-1) <= 0).all(-1)
        & (_norm(U.mT @ (U @ y) - y) <= tolerance * _norm(y))
        & (_norm(Vh @ (Vh.mT @ y) - y) <= tolerance * _norm(y))
        & (_norm(U @ (S[..., None] * (Vh @ z)) - matrices @ z) <= tolerance * norm * _norm(z))
    )


def _without_tf32(x: Tensor) -> Tensor:
    """On CUDA a float64 copy, since float32 products may be rounded to TF32 (on the CPU, see `full_precision`)."""
    return x.to(torch.float64) if x.is_cuda else x


def _norm(x: Tensor) -> Tensor:  # [..., m, n] -> float64 [...]
    """Frobenius norms: float32 sums of rows, added up in float64."""
    return torch.linalg.vector_norm(torch.linalg.vector_norm(x, dim=-1).to(torch.float64), dim=-1)


def _tolerance(x: Tensor) -> float:
    """Relative to the Frobenius norm: several times the errors of LAPACK's solvers and of ours (float32: at most 10
    units of rounding at n = 1024; float64: 1e-13, by inverse iteration). One wrong vector among n right ones causes an
    error of about n**-0.5.
    """
    return (256 + max(x.shape[-2:]) / 4) * torch.finfo(x.dtype).eps if x.dtype == torch.float32 else 1e-11


def _probes(n: int, like: Tensor) -> Tensor:  # [n, _PROBES]
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, _PROBES, generator=generator, dtype=torch.float64, device="cpu").to(like)
