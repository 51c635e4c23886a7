"""FullMask: every entry of some tensors, without column indices in memory."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import check_floats


class FullMask(CSRMask):
    """The mask of every entry of some tensors, with what a bucket uses of a mask.

    A compact tensor holds the elements of the tensors, one after the other. Each tensor counts as one row, of numel
    columns: `crow_indices` [tensors + 1] are where they begin, `col_indices` is None.

    Args:
        shapes: name → shape of each tensor.
        device: of `crow_indices`.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device) -> None:
        shapes = dict(sorted(shapes.items()))
        offsets = [*accumulate((s.numel() for s in shapes.values()), initial=0)]
        crow = torch.tensor(offsets, dtype=torch.int64, device=device)
        self.__dict__.update(names=tuple(shapes), shapes=tuple(shapes.values()), entry_offsets=offsets)
        self.__dict__.update(crow_indices=crow, col_indices=None)

    @property
    def nnz(self) -> int:
        return self.entry_offsets[-1]

    def __getitem__(self, name: str) -> "FullMask":
        return self.restrict([name])

    def restrict(self, names: Sequence[str]) -> "FullMask":
        return FullMask({n: self.shapes[self.positions[n]] for n in names}, self.device)

    def to(self, device: torch.device | str | int) -> "FullMask":
        device = torch.device(device)
        return self if device == self.device else FullMask(dict(zip(self.names, self.shapes)), device)

    def gather(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([t.detach().reshape(-1) for t in self.checked_tensors(tensors, "tensors")])

    def split(self, compact: Tensor) -> dict[str, Tensor]:
        """Name → the view of a compact tensor that holds this tensor's entries, in the tensor's shape."""
        self.check_compact(compact, "compact")
        parts = zip(self.names, self.shapes, self.entry_offsets, self.entry_offsets[1:])
        return {n: compact[start:end].view(shape) for n, shape, start, end in parts}

    def square_sum(self, tensors: Mapping[str, Tensor]) -> Tensor:
        chosen = self.checked_tensors(tensors, "tensors")
        check_floats(chosen, self.names, "tensors")
        norms = [torch.linalg.vector_norm(t.detach(), dtype=torch.float64) for t in chosen]
        return torch.stack(norms).square().sum()
