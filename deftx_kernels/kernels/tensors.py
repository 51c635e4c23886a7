"""Dtypes and memory of tensors, for launchers, operators and the checks of arguments."""

import math
from collections.abc import Sequence

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
