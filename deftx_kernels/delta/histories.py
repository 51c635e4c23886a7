"""Which deltas this library has added to a tensor, found by the tensor's content.

With them several deltas can be added to a tensor, to a copy of it or to a saved and loaded one, and none of them twice.
"""

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from deftx_kernels.delta.exact import bits_differ
from deftx_kernels.delta.fingerprints import fingerprint, map_tensors, tensor_hash
from deftx_kernels.mask import CSRMask


class History(NamedTuple):
    """The deltas in a tensor's content."""

    base: str  # fingerprint of the content before any delta was added
    deltas: dict[str, float]  # content hash of each delta in it → alpha

    def after(self, delta: str, alpha: float) -> "History":
        deltas = {**self.deltas, delta: self.deltas.get(delta, 0.0) + alpha}
        return History(self.base, {d: a for d, a in deltas.items() if a != 0})


class Addition(NamedTuple):
    """The addition of a delta to a tensor, whose result has not been hashed."""

    mask: CSRMask  # of this tensor
    before: Tensor  # [nnz], the tensor's entries
    after: Tensor  # [nnz]
    name: str
    fingerprint: str  # of the tensor before
    history: History  # of the tensor after


_numbers = itertools.count()
# Fingerprint → history of the content and its number; the newest are kept: several models of 10,000 tensors.
_HISTORIES: OrderedDict[str, tuple[History, int]] = OrderedDict()
_MAX_HISTORIES = 1 << 16
# Of open `applied` blocks, in the order of their numbers.
_ADDITIONS: list[tuple[Addition, int]] = []


def find_histories(
    tensors: Mapping[str, Tensor], contents: Mapping[str, str], base: Mapping[str, str]
) -> dict[str, History]:
    """Name → history of a tensor with fingerprint contents[name], for a delta made for base[name] (absent: for any)."""
    names = [n for n, content in contents.items() if content != base.get(n)]
    made = map_tensors(_find_addition, [tensors[n] for n in names], [contents[n] for n in names])
    for name, (added, number) in [(n, found) for n, found in zip(names, made) if found]:
        _set_history(contents[name], added.history, number)
        forget([added])
    histories = {n: History(content, {}) for n, content in contents.items()}
    for name in names:
        found, _ = _HISTORIES.get(contents[name], (histories[name], -1))
        if found.base != contents[name]:
            histories[name] = found
    return histories


def _find_addition(tensor: Tensor, content: str) -> tuple[Addition, int] | None:
    """The newest addition that made this content, with its number, unless a newer history is known."""
    _, known = _HISTORIES.get(content, (None, -1))
    for added, number in [(a, number) for a, number in reversed(_ADDITIONS) if number > known]:
        if tensor.shape != added.mask.shapes[0] or tensor.dtype != added.before.dtype:
            continue
        mask = added.mask.to(tensor.device)
        if bool(bits_differ(mask.gather({added.name: tensor}), added.after).any()):
            continue
        undone = {added.name: tensor.detach().clone()}
        mask.scatter_(undone, added.before.to(tensor.device))
        if tensor_hash(undone[added.name]) == added.fingerprint:
            return added, number
    return None


def record(additions: Sequence[Addition], tensors: Mapping[str, Tensor], until_forgotten: bool) -> None:
    """Record the results of additions to `tensors`: permanently by fingerprint, or unhashed, until `forget`."""
    if until_forgotten:  # hashed only if another delta follows
        _ADDITIONS.extend((a, next(_numbers)) for a in additions)
        return
    made = fingerprint({a.name: tensors[a.name] for a in additions})
    for added in additions:
        _set_history(made[added.name], added.history, next(_numbers))


def _set_history(content: str, found: History, number: int) -> None:
    _HISTORIES.pop(content, None)
    _HISTORIES[content] = found, number
    while len(_HISTORIES) > _MAX_HISTORIES:
        _HISTORIES.popitem(last=False)


def forget(additions: Sequence[Addition]) -> None:
    dropped = {id(a) for a in additions}
    _ADDITIONS[:] = [(a, number) for a, number in _ADDITIONS if id(a) not in dropped]
