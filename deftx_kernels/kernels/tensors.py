"""Dtypes and memory of tensors, for launchers, operators and the checks of arguments."""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})  # what operators compute with
SCALARS = frozenset({torch.float32, torch.float64, torch.int32, torch.int64})  # of one-element tensors
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix that a tensor of this shape stands for in a CSRMask."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def overlapping(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """The indices of two tensors, all without gaps in memory, that share memory."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes, i) for i, t in enumerate(tensors) if t.numel())
    return next(((i, j) for (_, end, i), (start, _, j) in zip(spans, spans[1:]) if end > start), None)


def row_starts_of(shapes: Sequence[torch.Size], starts: Sequence[int] | None = None) -> Tensor:
    """int64 [rows]: the flat index of each row's first element; `starts`: those of the tensors."""
    starts = list(accumulate((s.numel() for s in shapes), initial=0)) if starts is None else starts
    matrices = [rows_and_columns(s) for s in shapes]
    rows = [torch.arange(m, dtype=torch.int64, device="cpu") * n + start for (m, n), start in zip(matrices, starts)]
    return torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *rows])


def signed(col_indices: Tensor) -> Tensor:
    """The same bits in a dtype that every torch operation takes, as uint16 is not."""
    return col_indices.view(torch.int16) if col_indices.dtype == torch.uint16 else col_indices
