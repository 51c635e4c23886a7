"""`truncated_svd` and `svd_denoise`: the public functions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.denoise.batches import denoise
from deftx_kernels.denoise.decompositions import svd
from deftx_kernels.denoise.matrices import power_of_two_scale
from deftx_kernels.denoise.products import full_precision
from deftx_kernels.denoise.rule import check_rule
from deftx_kernels.denoise.subspace import singular_triplets
from deftx_kernels.ops.schemas import compute_dtype
from deftx_kernels.validation import check_finite, check_float, check_int, check_readable


def truncated_svd(
    a: Tensor,  # [..., m, n]
    rank: int,
    *,
    oversample: int = 16,
    n_iter: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a batch of matrices.

    Randomised block subspace iteration (Halko, Martinsson & Tropp 2011) until the residual is, by its convergence,
    within 1.02 times that of the best rank-r matrix; or the exact decomposition where `rank + oversample` is half of
    min(m, n) or more. float16 and bfloat16 are computed in float32.

    Args:
        a: floating point [..., m, n].
        rank: how many triplets, at least 1; no more than min(m, n) are returned.
        oversample: extra columns of the random test matrix.
        n_iter: the least number of power iterations (products with a.mT a). At least two are made, and more until the
            residual has converged.
        generator: source of the test matrix; by default one with a fixed seed, so that equal calls give equal results.

    Returns:
        U [..., m, r], S [..., r] (descending), Vh [..., r, n] with r = min(rank, m, n), in the dtype of `a`.

    Raises:
        ValueError: rank < 1, oversample < 0, n_iter < 0, fewer than two dimensions, a NaN or infinite entry.
        TypeError: `a` is not a floating-point tensor, or `rank` not an int.

    Example:
        >>> a = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
        >>> U, S, Vh = truncated_svd(a, rank=2)
        >>> S
        tensor([3., 2.])
        >>> (U * S) @ Vh
        tensor([[3., 0., 0.],
                [0., 2., 0.],
                [0., 0., 0.]])
    """
    check_float(a, "a")
    check_readable(a, "a")
    if a.dim() < 2:
        raise ValueError(f"a must have at least 2 dimensions [..., m, n], got shape {list(a.shape)}")
    check_finite(a.detach(), "a")
    check_int(rank, "rank", 1)
    rule = check_rule(rank, None, 0.0, oversample, n_iter, generator)
    *batch, m, n = a.shape
    r, dtype = min(rank, m, n), compute_dtype(a.dtype)
    with full_precision(a.device.type):
        w = a.detach().contiguous().to(dtype).reshape(math.prod(batch), m, n)
        test_matrix, scale = None, torch.ones(len(w), dtype=torch.float64, device=w.device)
        if a.numel():
            test_matrix = rule.test_matrix((m, n), dtype, a.device)
            # Squares of entries must stay within the dtype.
            largest = torch.linalg.vector_norm(w, math.inf, dim=(-2, -1))
            scale = torch.where((largest < 1e-9) | (largest > 1e9), power_of_two_scale(largest, dtype), scale)
            if bool((scale != 1).any()):
                w = w * scale[:, None, None].to(dtype)
        U, S, Vh = svd(w) if test_matrix is None else singular_triplets(w, r, n_iter, test_matrix)
        S = S / scale[:, None]
        U, S, Vh = (x.reshape(*batch, *x.shape[1:]) for x in (U, S, Vh))
        U, S, Vh = (x.to(a.dtype).contiguous() for x in (U[..., :r], S[..., :r], Vh[..., :r, :]))
    return U, S, Vh


def svd_denoise(
    delta: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    residual_density: float = 0.0,
    return_info: bool = False,
    oversample: int = 16,
    n_iter: int = 2,
    generator: torch.Generator | None = None,
    batch_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """L + prune(H) for each matrix: L its truncated SVD, H = delta - L (DeFT-X, Simon & Jyothi, arXiv 2505.15090).

    Matrices of one shape are computed together. An energy or a threshold is applied exactly: L comes from the
    eigenvectors of the Gram matrix of the short side (of small matrices, from their singular value decomposition),
    within a relative error of 5e-5 of the exact truncation, and the rank is that of exact arithmetic: where float32
    cannot guarantee this, a matrix is computed in float64. float16 and bfloat16 are computed in float32. Each
    decomposition is checked against its matrix; a wrong one is computed again by another solver, with a RuntimeWarning.

    The truncation is exact too for an int rank of at least a sixth of the short side (a quarter, where that has more
    than 512 entries and the matrix is not four times as long; in float64 a half), since that takes no longer. For a
    smaller rank L is computed as by `truncated_svd`: its residual is within 1.02 times the smallest one, but L is not
    the exact truncation. Of the largest 5 % of its entries, these shares are also among the largest 5 % of the exact L
    (384 to 1024 columns): 97 to 100 % for low rank plus noise, 88 to 97 % for singular values that fall as i**-0.5, and
    20 to 70 % for pure noise, whose leading singular values hardly differ from the others. More iterations increase the
    shares: n_iter = 8 gives 99 % for i**-0.5 and 75 to 90 % for noise, n_iter = 32 gives 99 % for noise.

    Args:
        delta: a tensor [..., m, n] (a batch of matrices), a mapping or a sequence of such tensors. Tensors of fewer
            than two dimensions pass through.
        rank: the rank of L, or "gavish-donoho" for the optimal hard threshold of unknown noise (Gavish & Donoho 2014).
        energy: instead of rank, 0 < energy <= 1: the smallest rank that keeps this share of the sum of squares.
        residual_density: the fraction of H's entries kept, the largest of each matrix. With 1 the result equals `delta`
            bit for bit.
        return_info: also return, per tensor, {"rank": int64 [...], "energy": float64 [...], "residual": float64 [...]}:
            the rank of L, the share of the sum of squares that L holds, and |delta - result| / |delta| (Frobenius
            norms; 0 where delta is 0).
        oversample, n_iter, generator: as in `truncated_svd`; used with an int `rank`.
        batch_bytes: memory for the matrices that are computed together, besides arguments and result; if two matrices
            do not fit, they are computed one at a time. By default 8 MiB for each thread on the CPU (16 MiB where the
            truncation is exact), and a quarter of the free memory of a GPU.
        progress: called with (matrices done, matrices in all).

    Returns:
        The same structure, shapes and dtypes as `delta`; with `return_info` a pair (result, info) of that structure,
        where info of a tensor that passed through is None.

    Raises:
        ValueError: not exactly one of rank and energy, a value out of range, a NaN or infinite entry (the tensor is
            named).
        TypeError: something is not a floating-point tensor.

    Example:
        >>> delta = {"weight": torch.diag(torch.tensor([3.0, 2.0, 0.5])), "bias": torch.ones(3)}
        >>> denoised, info = svd_denoise(delta, energy=0.9, return_info=True)
        >>> denoised["weight"].diagonal()
        tensor([3., 2., 0.])
        >>> int(info["weight"]["rank"])
        2
    """
    rule = check_rule(rank, energy, residual_density, oversample, n_iter, generator, batch_bytes)
    tensors, labels, structure = tensors_of(delta)
    for name, tensor in tensors.items():
        check_float(tensor, labels[name])
        check_readable(tensor, labels[name])
    tensors = {n: t.detach() for n, t in tensors.items()}
    matrices = {n: t for n, t in tensors.items() if t.dim() >= 2}
    results: dict[Any, Tensor] = {}
    infos: dict[Any, dict[str, Tensor] | None] = dict.fromkeys(tensors)
    for name, tensor in tensors.items():
        is_written = name in matrices and not rule.keeps_all
        if not is_written:
            check_finite(tensor, labels[name])
        results[name] = (torch.empty_like if is_written else torch.clone)(tensor, memory_format=torch.contiguous_format)
    if return_info or not rule.keeps_all:
        infos |= denoise(matrices, results, labels, rule, progress)
    return (structure(results), structure(infos)) if return_info else structure(results)


def tensors_of(
    delta: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
) -> tuple[dict[Any, Tensor], dict[Any, str], Callable[[dict], Any]]:
    """The tensors of an argument, their labels in errors, and what makes the argument's structure from a dict with the
    keys of the tensors.
    """
    if isinstance(delta, Tensor):
        return {0: delta}, {0: "delta"}, lambda found: found[0]
    if isinstance(delta, Mapping):
        return dict(delta), {n: f"delta[{n!r}]" for n in delta}, dict
    if isinstance(delta, Sequence) and not isinstance(delta, str):
        sequence = tuple if isinstance(delta, tuple) else list
        labels = {i: f"delta[{i}]" for i in range(len(delta))}
        return dict(enumerate(delta)), labels, lambda found: sequence(found.values())
    raise TypeError(f"delta must be a tensor, a mapping or a sequence of tensors, got {type(delta).__name__}")
