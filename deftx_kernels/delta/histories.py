"""Which deltas this library has added to a tensor, found by the tensor's content.

So deltas can be stacked on a tensor, on a copy of it, or on what was saved and loaded, and none is added twice.
"""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from deftx_kernels.delta.exact import bits_differ
from deftx_kernels.delta.fingerprints import fingerprint, tensor_hash
from deftx_kernels.mask import CSRMask


class History(NamedTuple):
    """The deltas in a tensor's content."""

    base: str  # fingerprint of the content before any delta was added
    deltas: dict[str, float]  # content hash of each delta in it → alpha

    def after(self, delta: str, alpha: float) -> "History":
        deltas = {**self.deltas, delta: self.deltas.get(delta, 0.0) + alpha}
        return History(self.base, {d: a for d, a in deltas.items() if a != 0})


class Addition(NamedTuple):
    """A delta was added to a tensor, and the result has not been hashed."""

    name: str
    mask: CSRMask  # of this tensor
    before: Tensor  # [nnz], the tensor's entries
    after: Tensor  # [nnz]
    fingerprint: str  # of the tensor before
    history: History  # of the tensor after


# Fingerprint → history of the content; the newest are kept: several models of 10,000 tensors.
_HISTORIES: OrderedDict[str, History] = OrderedDict()
_MAX_HISTORIES = 1 << 16
# Hashed when a delta follows, which is rare: a hash of the result would be a second pass over the whole model.
_ADDITIONS: list[Addition] = []
_MAX_BYTES = 1 << 28  # of the additions that are kept by `record`; results beyond are hashed at once


def find_history(name: str, tensor: Tensor, content: str, base: str | None) -> History:
    """The history of a tensor with fingerprint `content`, for a delta that was made for `base` (None: for any)."""
    if content != base and content not in _HISTORIES:
        _find_addition(name, tensor, content)
    found = _HISTORIES.get(content)
    return History(content, {}) if found is None or content in (found.base, base) else found


def _find_addition(name: str, tensor: Tensor, content: str) -> None:
    """Give this content the history of the addition that made it, if there is one."""
    for added in sorted(_ADDITIONS, key=lambda a: a.name != name):
        if tensor.shape != added.mask.shapes[0] or tensor.dtype != added.before.dtype:
            continue
        mask = added.mask.to(tensor.device)
        if bool(bits_differ(mask.gather({added.name: tensor}), added.after).any()):
            continue
        undone = {added.name: tensor.detach().clone()}
        mask.scatter_(undone, added.before.to(tensor.device))
        if tensor_hash(undone[added.name]) == added.fingerprint:
            _set_history(content, added.history)
            forget([added])
            return


def record(additions: Iterable[Addition], tensors: dict[str, Tensor]) -> None:
    """Keep the histories of what additions made of `tensors`, on the CPU."""
    size = sum(_nbytes(a) for a in _ADDITIONS)
    hashed = {}
    for added in additions:
        size += _nbytes(added)
        if size > _MAX_BYTES:
            hashed[added.name] = added.history
        else:
            mask, before, after = added.mask.to("cpu"), added.before.cpu(), added.after.cpu()
            _ADDITIONS.append(added._replace(mask=mask, before=before, after=after))
    for name, content in fingerprint({n: tensors[n] for n in hashed}).items():
        _set_history(content, hashed[name])


def _nbytes(added: Addition) -> int:
    arrays = (added.mask.crow_indices, added.mask.col_indices, added.before, added.after)
    return sum(t.numel() * t.element_size() for t in arrays)


def _set_history(content: str, found: History) -> None:
    _HISTORIES.pop(content, None)
    _HISTORIES[content] = found
    while len(_HISTORIES) > _MAX_HISTORIES:
        _HISTORIES.popitem(last=False)


def hold(additions: Iterable[Addition]) -> None:
    """Keep additions until `forget`, whatever their size."""
    _ADDITIONS.extend(additions)


def forget(additions: Iterable[Addition]) -> None:
    dropped = {id(a) for a in additions}
    _ADDITIONS[:] = [a for a in _ADDITIONS if id(a) not in dropped]
