"""The references of the operators on the entries of a mask. See reference.py."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from deftx_kernels.kernels.tensors import INTEGERS, rows_and_columns
from deftx_kernels.ops.schemas import compute_dtype


def entries(
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
    for flat, index, span in entries(tensors, crow_indices, col_indices):
        out[span] = flat[index]
    return out


def csr_scatter_(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, values: Tensor) -> None:
    for flat, index, span in entries(tensors, crow_indices, col_indices):
        flat[index] = values[span]


def _sum(old: Tensor, values: Tensor, alpha: float) -> Tensor:
    """old + alpha * values; product and sum are rounded one by one, and then to the dtype of `old`."""
    compute = torch.promote_types(compute_dtype(old.dtype), values.dtype)
    return (old.to(compute) + alpha * values.to(compute)).to(old.dtype)


def csr_add_(
    tensors: Sequence[Tensor],
    crow_indices: Tensor,
    col_indices: Tensor,
    values: Tensor,  # [nnz]
    alpha: float,
    former: Tensor | None = None,  # [nnz]
    done: Tensor | None = None,  # bool []
) -> None:
    for flat, index, span in entries(tensors, crow_indices, col_indices):
        old = flat[index]
        flat[index] = _sum(old, values[span], alpha)
        if former is not None:
            former[span] = old
    if done is not None:
        done.fill_(True)


def csr_restore_(
    tensors: Sequence[Tensor],
    crow_indices: Tensor,
    col_indices: Tensor,
    former: Tensor,  # [nnz]
    values: Tensor,  # [nnz]
    alpha: float,
) -> Tensor:
    changed = crow_indices.new_zeros(len(tensors))
    for i, (flat, index, span) in enumerate(entries(tensors, crow_indices, col_indices)):
        bits = INTEGERS[flat.element_size()]
        sums = _sum(former[span], values[span], alpha)
        changed[i] = (flat[index].view(bits) != sums.view(bits)).sum()
        flat[index] = former[span]
    return changed
