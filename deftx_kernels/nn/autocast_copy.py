"""A copy of a float32 weight in the dtype of autocast, kept up to date: no step casts a whole weight.

It is used only where it is known to be current: the weight has the address and the version counter that it had when the
two last agreed, and no alias of it (`.data`) is alive. Steps over the values write their entries into both tensors.

Replays of a CUDA graph are invisible to version counters. So a graph that contains a step writes the copies that were
current at its capture; weights without one then never get one. A captured forward uses copies in `captured_step` only,
which checks them before each replay; in other graphs it casts.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask

_graphs_may_use_copies = False


@contextmanager
def copies_in_graphs() -> Iterator[None]:
    """A capture in this context may use copies: its owner calls `refresh` before each replay."""
    global _graphs_may_use_copies
    before, _graphs_may_use_copies = _graphs_may_use_copies, True
    try:
        yield
    finally:
        _graphs_may_use_copies = before


def is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


class AutocastCopy:
    """The copy of one weight, made when autocast first needs it."""

    def __init__(self) -> None:
        self.tensor: Tensor | None = None
        self.key: tuple[int, int] | None = None  # address and version of the weight when the copy last agreed with it
        self.in_graph = False  # a captured graph reads or writes the tensor
        self.pinned: Tensor | None = None
        self.disabled = False  # a captured graph writes the weight, and not the copy

    def __reduce__(self):  # copies of the model make their own
        return AutocastCopy, ()

    def is_current(self, dense: Tensor) -> bool:
        return self.tensor is not None and self.key == _key(dense) and self.tensor.device == dense.device

    def of(self, dense: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weight in the dtype; None where the caller has to cast it."""
        if self.disabled or dense.dtype != torch.float32 or dtype.itemsize != 2:
            return None
        if not dense.is_contiguous() or dense.is_inference():
            return None
        capturing = is_capturing(dense)
        if self.is_current(dense) and self.tensor is not None and self.tensor.dtype == dtype:
            if capturing and not _graphs_may_use_copies:
                return None
            self.in_graph |= capturing
            return self.tensor
        if capturing:
            return None
        if self.tensor is None or self.tensor.dtype != dtype or self.tensor.device != dense.device:
            if self.in_graph:  # which would go on with the old tensor
                self.disable()
                return None
            with torch.inference_mode(False):
                self.tensor, self.key = torch.empty(dense.shape, dtype=dtype, device=dense.device), None
        self.refresh(dense)
        return self.tensor

    def refresh(self, dense: Tensor) -> None:
        """Copy the whole weight, unless it is known to be unchanged."""
        if self.tensor is not None and not self.is_current(dense):
            with torch.no_grad():
                self.tensor.copy_(dense)
            self.key = _key(dense)

    def disable(self) -> None:
        if self.in_graph:
            self.pinned = self.tensor  # a replay would write into freed memory
        self.disabled, self.tensor, self.key = True, None, None


def write_copies(
    copies: list[tuple[AutocastCopy, Tensor]],  # with their weights, in the order of the mask
    mask: CSRMask,
    values: Tensor,  # [nnz]
) -> None:
    """Write the mask's entries into copies that were current before the same entries of the weights were written."""
    tensors = [copy.tensor for copy, _ in copies if copy.tensor is not None]
    for dtype in {t.dtype for t in tensors}:
        if any(t.dtype != dtype for t in tensors):  # autocast changed its dtype in the middle of a model
            for copy, _ in copies:
                copy.key = None
            return
        compact = values.detach().to(dtype).contiguous()
        torch.ops.deftx.csr_scatter_(tensors, mask.crow_indices, mask.col_indices, compact)
        torch.autograd.graph.increment_version(tensors)  # backward raises if it saved one that has changed
    for copy, dense in copies:
        copy.key, copy.in_graph = _key(dense), copy.in_graph or is_capturing(dense)


def _key(dense: Tensor) -> tuple[int, int]:
    return dense.data_ptr(), dense._version
