"""The references of the operators that read and write the entries of a mask. As in `reference.py`."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deftx_kernels.ops.schemas import compute_dtype, rows_and_columns


def _entries(
    tensors: Sequence[Tensor],
    crow_indices: Tensor,  # int64 [rows + 1]
    col_indices: Tensor,  # [nnz]
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """For each tensor: its flat view, the flat indices of its entries (int64) and their range in the compact order."""
    first_row = start = 0
    for tensor in tensors:
        rows, columns = rows_and_columns(tensor.shape)
        counts = crow_indices[first_row : first_row + rows + 1].diff()
        row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts)
        span = slice(start, start + len(row))
        yield tensor.view(-1), row * columns + col_indices[span].to(torch.int64), span
        first_row, start = first_row + rows, span.stop


def csr_gather(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    out = tensors[0].new_empty(col_indices.shape)
    for flat, index, span in _entries(tensors, crow_indices, col_indices):
        out[span] = flat[index]
    return out


def csr_scatter_(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, values: Tensor) -> None:
    for flat, index, span in _entries(tensors, crow_indices, col_indices):
        flat[index] = values[span]


def csr_add_(
    tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, values: Tensor, alpha: float
) -> None:
    for flat, index, span in _entries(tensors, crow_indices, col_indices):
        compute = compute_dtype(flat.dtype)
        total = torch.add(flat[index].to(compute), values[span].to(compute), alpha=alpha)
        flat[index] = total.to(flat.dtype)
