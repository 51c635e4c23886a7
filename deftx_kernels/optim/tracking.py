"""What the steps of an optimizer changed, since a patch was last taken: marks of entries, no copies of weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.optim.bucket import Bucket


class Changed(NamedTuple):
    """A dense tensor that an optimizer steps, and what has changed in it since the last patch."""

    tensor: Tensor
    checksum: int | None  # before the first tracked step; None: the tensor had none since the last patch
    other_writes: bool  # other code than the optimizer may have written it
    indices: Tensor  # int32 or int64, ascending: flat indices of the entries that steps changed


# (reads what has changed, the state that the last one returned or None, model, model_version) → patch, new state
PatchMaker = Callable[[Callable[[], list[Changed]], Any, Any, int], tuple[Any, Any]]
_makers: list[PatchMaker] = []


def register_patch_maker(maker: PatchMaker) -> None:
    """Register the function that makes patches of changes. It stands above this folder, in `delta`."""
    _makers[:] = [maker]


class _Tracked:
    """A dense tensor since the last patch."""

    def __init__(self, tensor: Tensor, checksum: Tensor | None = None) -> None:
        self.tensor = tensor  # kept, as its id is the key
        self.checksum = checksum  # int64 []: before its first step; None if it was there when a patch was last taken
        self.written = _writes(tensor)  # as the optimizer left it
        self.other_writes = False
        self.indices: list[Tensor] = []  # marked in buckets that are no longer used

    def check(self) -> None:
        self.other_writes |= _writes(self.tensor) != self.written


def _writes(tensor: Tensor) -> tuple[int, int]:
    """Differs after each write to the tensor, except through its `.data` or another alias without its version."""
    return tensor.data_ptr(), tensor._version


class ChangeTracker:
    """The changes of one optimizer. A step reads nothing back from the device, so that it can be captured."""

    def __init__(self) -> None:
        self.tensors: dict[int, _Tracked] = {}  # by id
        self.state: Any = None  # of the model when a patch was last taken, as the patch maker returned it
        self.divided: list[Bucket] = []  # buckets that were divided; a CUDA graph may still step them

    def before_step(self, buckets: Sequence[Bucket]) -> None:
        """Find tensors that other code has written since the last step; keep checksums of new ones."""
        for bucket in buckets:
            if new := [t for t in bucket.dense if id(t) not in self.tensors]:
                sums = torch.ops.deftx.bit_checksum([t.detach().contiguous() for t in new])
                for tensor, checksum in zip(new, sums.unbind()):
                    self.tensors[id(tensor)] = _Tracked(tensor, checksum)
            for tensor in bucket.dense:
                self.tensors[id(tensor)].check()

    def after_step(self, buckets: Sequence[Bucket]) -> None:
        for bucket in buckets:
            for tensor in bucket.dense:
                self.tensors[id(tensor)].written = _writes(tensor)

    def keep_marks(self, buckets: Iterable[Bucket]) -> None:
        """Keep the marks of buckets that will not be used any more."""
        buckets, self.divided = [*buckets, *self.divided], []
        for bucket in buckets:
            for tensor, indices in bucket.marked():
                if len(indices):
                    self.tensors[id(tensor)].indices.append(indices)

    def take_patch(self, model: Any, model_version: int, buckets: Sequence[Bucket], tensors: Sequence[Tensor]) -> Any:
        """The patch since the last call. tensors: the dense tensors that the optimizer steps. Errors clear nothing."""
        buckets = [*buckets, *self.divided]
        patch, state = _makers[0](lambda: self._changes(buckets, tensors), self.state, model, model_version)
        for bucket in buckets:
            if bucket.changed is not None:
                bucket.changed.zero_()
        self.tensors, self.state = {id(t): _Tracked(t) for t in tensors}, state
        return patch

    def _changes(self, buckets: Sequence[Bucket], tensors: Sequence[Tensor]) -> list[Changed]:
        marked = {id(t): list(self.tensors[id(t)].indices) if id(t) in self.tensors else [] for t in tensors}
        for bucket in buckets:
            for tensor, indices in bucket.marked():
                marked[id(tensor)].append(indices)
        changes = []
        for tensor in tensors:
            tracked = self.tensors.get(id(tensor)) or _Tracked(tensor)
            tracked.check()
            parts = [p.to(tensor.device) for p in marked[id(tensor)] if len(p)]
            if len(parts) > 1:
                indices = torch.cat(parts).unique()
            else:
                indices = parts[0] if parts else torch.empty(0, dtype=torch.int64, device=tensor.device)
            checksum = None if tracked.checksum is None else int(tracked.checksum)
            changes.append(Changed(tensor, checksum, tracked.other_writes, indices))
        return changes
