"""CSR matrices of torch, SciPy and CuPy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask, column_dtype, rows_and_columns


def from_csr(matrices: Mapping[str, Any]) -> tuple[CSRMask, Tensor]:
    """Mask and compact values of CSR matrices of torch, SciPy or CuPy, all of one library and on one device.

    Raises:
        TypeError: something is not a CSR matrix.
        ValueError: columns are out of range or occur twice in a row (SciPy: `sum_duplicates()` first).
    """
    names = sorted(matrices)
    if not names:
        raise ValueError("matrices: at least one is needed")
    shapes, counts, columns, values = [], [], [], []
    for name in names:
        crow, col, data, shape = _csr_parts(name, matrices[name])
        if bool(((col < 0) | (col >= shape[1])).any()):
            raise ValueError(f"matrices[{name!r}] has a column outside [0, {shape[1]})")
        row = torch.repeat_interleave(torch.arange(shape[0], device=crow.device), crow.diff())
        order = torch.argsort(row * shape[1] + col)
        shapes.append(shape)
        counts.append(crow.diff())
        columns.append(col[order])
        values.append(data[order])
    crow = torch.cat([counts[0].new_zeros(1), *counts]).cumsum(0)
    return CSRMask(names, shapes, crow, torch.cat(columns).to(column_dtype(shapes))), torch.cat(values)


def _csr_parts(name: str, matrix: Any) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """crow_indices, col_indices (int64), values and shape of a CSR matrix of any of the libraries."""
    if isinstance(matrix, Tensor):
        if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
            raise TypeError(f"matrices[{name!r}] must be a 2-D sparse CSR tensor, got layout {matrix.layout}")
        return matrix.crow_indices().long(), matrix.col_indices().long(), matrix.values(), matrix.shape
    if getattr(matrix, "format", None) != "csr":
        raise TypeError(f"matrices[{name!r}] must be a CSR matrix of torch, SciPy or CuPy, got {type(matrix).__name__}")
    arrays = (matrix.indptr, matrix.indices, matrix.data)
    # Neither copies: torch.as_tensor takes CuPy arrays through their array interface.
    crow, col, data = (torch.from_numpy(a) if isinstance(a, np.ndarray) else torch.as_tensor(a) for a in arrays)
    return crow.long(), col.long(), data, torch.Size(matrix.shape)


def to_scipy_csr(mask: CSRMask, name: str, compact: Tensor) -> Any:
    """One tensor's entries, with values from `compact` [mask.nnz], as a scipy.sparse.csr_matrix."""
    from scipy.sparse import csr_matrix

    one, values = mask[name].to("cpu"), mask.part(name, compact).detach().cpu()
    arrays = (values.numpy(), one.col_indices.to(torch.int64).numpy(), one.crow_indices.numpy())
    return csr_matrix(arrays, shape=rows_and_columns(one.shapes[0]))


def to_cupy_csr(mask: CSRMask, name: str, compact: Tensor) -> Any:
    """The same as a cupyx.scipy.sparse.csr_matrix, sharing the values' memory on the GPU.

    Raises:
        ValueError: the mask is not on a CUDA device.
    """
    if mask.device.type != "cuda":
        raise ValueError(f"mask must be on a CUDA device, it is on {mask.device}")
    import cupy
    from cupyx.scipy.sparse import csr_matrix

    one, values = mask[name], mask.part(name, compact)
    arrays = (values.detach(), one.col_indices.to(torch.int32), one.crow_indices.to(torch.int32))
    return csr_matrix(tuple(cupy.asarray(a) for a in arrays), shape=rows_and_columns(one.shapes[0]))
