"""Fingerprints of tensors, and which deltas this library has added to them."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

    base: str  # fingerprint of the content before any delta was added
    deltas: dict[str, float]  # content hash of each delta on it → alpha

    def after(self, delta: str, alpha: float) -> "History":
        deltas = {**self.deltas, delta: self.deltas.get(delta, 0.0) + alpha}
        return History(self.base, {d: a for d, a in deltas.items() if a != 0})


# Fingerprint → history of what deltas were added to, so that deltas can be stacked: on that tensor, a copy of it, or
# when it was saved and loaded. The newest are kept: several models of 10,000 tensors.
_HISTORIES: OrderedDict[str, History] = OrderedDict()
_MOST = 1 << 16


def known(now: str) -> bool:
    """Whether content with fingerprint `now` has a history."""
    return now in _HISTORIES


def history(now: str, base: str | None) -> History:
    """The history of content with fingerprint `now`, for a delta that was made for `base` (None: for any)."""
    found = _HISTORIES.get(now)
    return History(now, {}) if found is None or now in (found.base, base) else found


def remember(now: str, found: History) -> None:
    """Replace the history of content with fingerprint `now`."""
    _HISTORIES.pop(now, None)
    _HISTORIES[now] = found
    while len(_HISTORIES) > _MOST:
        _HISTORIES.popitem(last=False)
