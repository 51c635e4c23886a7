"""Fingerprints of tensors, and which deltas this library has added to them."""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_CHUNK = 1 << 26  # bytes
_THREADS = min(8, os.cpu_count() or 1)


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → SHA-256 (64 hexadecimal digits) of a tensor's dtype, shape and bytes: the same on every device.

    Large models are read by several threads, where they lie.
    """
    large = sum(t.numel() * t.element_size() for t in tensors.values()) > _CHUNK
    if large and len(tensors) > 1:
        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(tensors, pool.map(digest, tensors.values())))
    return {n: digest(t) for n, t in tensors.items()}


def digest(tensor: Tensor) -> str:
    """The fingerprint of one tensor."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    update(sha, tensor)
    return sha.hexdigest()


def update(sha: Any, tensor: Tensor) -> None:
    """Add a tensor's bytes to a hash of hashlib."""
    for chunk in tensor.contiguous().view(-1).view(torch.uint8).split(_CHUNK):
        sha.update(chunk.cpu().numpy().data)  # without the interpreter's lock, and without a copy on the CPU


class History(NamedTuple):
    """How a tensor came to its content."""

    now: str  # fingerprint of the content
    base: str  # that of the content before any delta was added
    deltas: dict[str, float]  # content hash of each delta on it → alpha

    def after(self, now: str, delta: str, alpha: float) -> "History":
        deltas = {**self.deltas, delta: self.deltas.get(delta, 0.0) + alpha}
        return History(now, self.base, {d: a for d, a in deltas.items() if a != 0})


# Of the tensors that deltas were added to, so that deltas can be stacked. Only a history whose `now` is the content counts.
_HISTORIES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def history(tensor: Tensor, now: str, base: str | None) -> History:
    """The history of a tensor with fingerprint `now`, for a delta that was made for `base` (None: for any)."""
    known = _HISTORIES.get(tensor)
    if known is None or known.now != now or now in (known.base, base):
        return History(now, now, {})
    return known


def remembered(tensor: Tensor) -> History | None:
    """What is remembered of a tensor, to be given back to `remember`."""
    return _HISTORIES.get(tensor)


def remember(tensor: Tensor, known: History | None) -> None:
    """Replace what is remembered of a tensor; None: nothing."""
    if known is None:
        _HISTORIES.pop(tensor, None)
    else:
        _HISTORIES[tensor] = known
