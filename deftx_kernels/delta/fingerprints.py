"""Fingerprints of tensors."""

import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 26  # bytes
_THREADS = min(8, os.cpu_count() or 1)


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → SHA-256 (64 hexadecimal digits) of a tensor's dtype, shape and bytes: the same on every device."""
    return dict(zip(tensors, map_tensors(tensor_hash, tensors.values())))


def map_tensors(function: Callable, tensors: Collection[Tensor], *more: Iterable) -> list:
    """`list(map(function, tensors, *more))`, with several threads if the tensors are large."""
    if len(tensors) > 1 and sum(t.nbytes for t in tensors) > _CHUNK:
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(function, tensors, *more))
    return list(map(function, tensors, *more))


def tensor_hash(tensor: Tensor) -> str:
    """The fingerprint of one tensor."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    sha = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
    update(sha, tensor)
    return sha.hexdigest()


def update(sha: Any, tensor: Tensor) -> None:
    """Add a tensor's bytes to a hash object of hashlib."""
    for chunk in tensor.contiguous().view(-1).view(torch.uint8).split(_CHUNK):
        sha.update(chunk.cpu().numpy().data)  # releases the GIL; no copy on the CPU
