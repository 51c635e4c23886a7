"""Checks of the elements of index tensors in direct operator calls, for the reference: they wait for the device.

The compiled libraries check the same in C++ where the tensors are on the CPU; kernels stay inside the tensors' memory
whatever the indices are.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.ops.schemas import AdamWArgs, rows_and_columns


def _rows_ascend(crow_indices: Tensor, nnz: int, name: str = "crow_indices") -> None:
    if not bool((crow_indices[0] == 0) & (crow_indices[-1] == nnz) & (crow_indices[1:] >= crow_indices[:-1]).all()):
        raise ValueError(f"{name} must ascend from 0 to nnz = {nnz}")


def _ascends(
    crow_indices: Tensor,  # int64 [rows + 1]
    col_indices: Tensor,  # [nnz]
    columns: Tensor,  # int64 [rows]: of each row
) -> None:
    _rows_ascend(crow_indices, col_indices.shape[0])
    row = torch.repeat_interleave(torch.arange(len(columns), device=columns.device), crow_indices.diff())
    col = col_indices.to(torch.int64)
    right = (col >= 0) & (col < columns[row])
    right[1:] &= (row[1:] > row[:-1]) | (col[1:] > col[:-1])
    if not bool(right.all()):
        raise ValueError(
            "col_indices must ascend strictly within each row and be less than the row's number of columns"
        )


def _csr_contents(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, *rest: Any) -> None:
    sizes = [rows_and_columns(t.shape) for t in tensors]
    columns = [torch.full((r,), c, device=col_indices.device) for r, c in sizes]
    _ascends(crow_indices, col_indices, torch.cat(columns) if columns else crow_indices[:0])


def _sum_contents(
    crow_indices: Tensor,
    col_indices: Tensor,
    other_crow_indices: Sequence[Tensor],
    other_col_indices: Sequence[Tensor],
    *rest: Any,
) -> None:
    _rows_ascend(crow_indices, col_indices.shape[0])
    for i, (crow, col) in enumerate(zip(other_crow_indices, other_col_indices)):
        _rows_ascend(crow, col.shape[0], f"other_crow_indices[{i}]")


def _adamw_contents(*arguments: Any) -> None:
    args = AdamWArgs(*arguments)
    if args.col_indices is not None:
        _csr_contents(args.params, args.crow_indices, args.col_indices)
    elif args.crow_indices.tolist() != [*accumulate((p.numel() for p in args.params), initial=0)]:
        raise ValueError("crow_indices must hold where each of params begins, and the number of their elements")


def _linear_contents(grad_output: Tensor, input: Tensor, crow_indices: Tensor, col_indices: Tensor, *rest: Any) -> None:
    _ascends(crow_indices, col_indices, torch.full_like(crow_indices[1:], input.shape[1]))


def _embedding_contents(
    grad_output: Tensor, indices: Tensor, crow_indices: Tensor, col_indices: Tensor, *rest: Any
) -> None:
    rows = crow_indices.shape[0] - 1
    _ascends(crow_indices, col_indices, torch.full_like(crow_indices[1:], grad_output.shape[1]))
    if not bool(((indices >= 0) & (indices < rows)).all()):
        raise ValueError(f"indices must be at least 0 and less than {rows}")


def _exchange_contents(tensors: Sequence[Tensor], offsets: Tensor, indices: Tensor, values: Tensor) -> None:
    _rows_ascend(offsets, indices.shape[0], "offsets")
    bounds = offsets.tolist()
    for i, (t, start, end) in enumerate(zip(tensors, bounds, bounds[1:])):
        index = indices[start:end]
        if end > start and not bool((index[0] >= 0) & (index[-1] < t.numel()) & (index[1:] > index[:-1]).all()):
            raise ValueError(f"the indices of tensors[{i}] must ascend strictly from 0 to at most {t.numel() - 1}")


def _bit_contents(words: Tensor, starts: Tensor) -> None:
    bits = 32 * words.numel()
    if not bool((starts[0] >= 0) & (starts[-1] <= bits) & (starts[1:] >= starts[:-1]).all()):
        raise ValueError(f"starts must ascend from at least 0 to at most {bits}, the bits of words")


CONTENTS: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("csr_gather", "csr_scatter_", "csr_add_", "csr_restore_", "csr_square_sum"), _csr_contents),
    "csr_sum": _sum_contents,
    "sparse_adamw_": _adamw_contents,
    "masked_linear_grad": _linear_contents,
    "masked_embedding_grad": _embedding_contents,
    "flat_exchange_": _exchange_contents,
    "bit_checksum_change": lambda offsets, indices, *rest: _rows_ascend(offsets, indices.shape[0], "offsets"),
    "set_bits": _bit_contents,
}
