"""`eigh` and `eigvalsh`: the public functions. The library itself uses those of decompositions.py."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from deftx_kernels.denoise import decompositions
from deftx_kernels.denoise.matrices import power_of_two_scale
from deftx_kernels.denoise.products import full_precision
from deftx_kernels.ops.schemas import compute_dtype
from deftx_kernels.validation import check_finite, check_float, check_readable


class Eigh(NamedTuple):
    """What `eigh` returns."""

    eigenvalues: Tensor  # [..., n]
    eigenvectors: Tensor  # [..., n, n]


def eigh(a: Tensor) -> Eigh:  # [..., n, n]
    """Eigenvalues and eigenvectors of a batch of symmetric matrices, as `torch.linalg.eigh` returns them.

    A batch is computed together: on a GPU one block of threads decomposes each matrix, on the CPU one thread (all
    threads, where there are fewer matrices than threads). `backends()["eigh"]` names the implementation on each device.
    CUDA tensors of more than 1024 rows are decomposed by `torch.linalg.eigh`. Errors are a few units of rounding of a
    matrix's largest eigenvalue. Each result is compared with its matrix; a wrong one is computed again by
    `torch.linalg.eigh` in float64, with a RuntimeWarning. Equal calls give equal bits. float16 and bfloat16 are
    computed in float32.

    Only the lower triangle of each matrix is used. Derivatives are not supported: use `torch.linalg.eigh`, or pass
    a.detach(). A call waits for the device.

    Args:
        a: floating point [..., n, n].

    Returns:
        A named tuple, in the dtype of `a`: eigenvalues [..., n], ascending, and eigenvectors [..., n, n], whose columns
        are orthonormal. a = V diag(L) V.mT. The signs of the columns, and the basis where eigenvalues are equal, are
        not determined.

    Raises:
        ValueError: `a` is not square, requires grad (where gradients are enabled), or holds a NaN or infinite entry.
        TypeError: `a` is not a floating-point tensor.

    Example:
        >>> eigenvalues, eigenvectors = eigh(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        >>> eigenvalues
        tensor([1., 2.])
        >>> eigenvectors.abs()
        tensor([[0., 1.],
                [1., 0.]])
    """
    matrices, scale = _scaled_matrices(a, "eigh")
    with full_precision(a.device.type):
        values, vectors = decompositions.eigh(matrices)
    return Eigh(_unscaled(values, scale, a), vectors.to(a.dtype).reshape(a.shape))


def eigvalsh(a: Tensor) -> Tensor:  # [..., n, n]
    """The eigenvalues of a batch of symmetric matrices, ascending, as `torch.linalg.eigvalsh` returns them.

    Arguments, errors and limits are those of `eigh` (`backends()["eigvalsh"]`). It takes a fraction of its time, and
    the values may differ from those of `eigh` by rounding.

    Args:
        a: floating point [..., n, n].

    Returns:
        [..., n], in the dtype of `a`.

    Raises:
        ValueError, TypeError: as `eigh`.

    Example:
        >>> eigvalsh(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor([1., 3.])
    """
    matrices, scale = _scaled_matrices(a, "eigvalsh")
    return _unscaled(decompositions.eigvalsh(matrices), scale, a)


def _scaled_matrices(a: Tensor, function: str) -> tuple[Tensor, Tensor]:  # [b, n, n], float64 [b]
    """Symmetric copies times powers of two, with which the squares of their entries are in the dtype's range."""
    check_float(a, "a")
    check_readable(a, "a")
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a must be square matrices [..., n, n], got shape {list(a.shape)}")
    if a.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"a requires grad: {function} has no derivatives; pass a.detach(), or use torch.linalg")
    lower = a.detach().to(compute_dtype(a.dtype)).reshape(math.prod(a.shape[:-2]), *a.shape[-2:]).tril()
    check_finite(lower, "the lower triangle of a")
    if a.numel() == 0:
        return lower, torch.ones(len(lower), dtype=torch.float64, device=a.device)
    scale = power_of_two_scale(torch.linalg.vector_norm(lower, math.inf, dim=(-2, -1)), lower.dtype)
    matrices = lower * scale[:, None, None].to(lower.dtype)
    return matrices + matrices.tril(-1).mT, scale


def _unscaled(values: Tensor, scale: Tensor, a: Tensor) -> Tensor:  # [b, n], [b]
    return (values.to(torch.float64) / scale[:, None]).to(a.dtype).reshape(a.shape[:-1])
