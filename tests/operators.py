"""Helpers for the tests of single operators."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

SHAPES = [(), (1,), (7,), (0,), (1, 1), (3, 0), (0, 5), (4, 9), (3, 2, 5), (2, 1, 3, 2), (40, 3), (2, 300)]
MANY = 330  # tensors: more than two kernel launches take, more than the emulated device has warps
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def matrix_shape(shape) -> tuple[int, int]:
    """The rows and columns that a tensor has in a mask."""
    return (1, int(np.prod(shape))) if len(shape) < 2 else (shape[0], int(np.prod(shape[1:])))


def bits(t: Tensor) -> np.ndarray:  # [numel, bytes of an element]
    if t.numel() == 0:  # NumPy's empty arrays have stride 0, which `view` refuses
        return np.empty((0, t.dtype.itemsize), np.uint8)
    return t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().reshape(t.numel(), t.dtype.itemsize).copy()


def csr_of(masks, dtype=np.int64, first=0) -> tuple[np.ndarray, np.ndarray]:
    """crow_indices and col_indices of bool arrays [rows, columns]: the oracle."""
    crow = np.cumsum([first, *np.concatenate([m.sum(1) for m in masks])], dtype=np.int64)
    return crow, np.concatenate([np.nonzero(m)[1] for m in masks]).astype(dtype)


def replaced(t: Tensor, at: int, value: int) -> Tensor:
    t = t.to(torch.int32).clone() if t.dtype == torch.uint16 else t.clone()
    t[at] = value
    return t


def explore(implementation, strategy, check: Callable, few: int = 25, many: int = 100) -> None:
    """Runs hypothesis, with fewer examples for the slow implementations."""
    examples = few if implementation.name in ("reference", "emulated") else many
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=examples, deadline=None, suppress_health_check=quiet, database=None)(given(strategy)(check))()


def with_threads(function: Callable[[], Any], counts=(1, 2, 3, 7)) -> Iterator[Any]:
    """The function's results with several numbers of threads."""
    before = torch.get_num_threads()
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            yield function()
    finally:
        torch.set_num_threads(before)
