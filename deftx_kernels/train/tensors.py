"""Memory that training takes: bytes of gradients and of optimizer state, counted from the tensors, and peak memory."""

import ctypes
import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that exist now."""
    return _bytes(p.grad for p in model.parameters() if p.grad is not None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state tensors, shared storage counted once."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return _bytes(_tensors(dict(inner.state)))


def _tensors(value: Any) -> Iterator[Tensor]:
    if hasattr(value, "__tensor_flatten__"):  # a tensor made of tensors, as of 8-bit optimizers
        value = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = max(storages.get(storage.data_ptr(), 0), storage.nbytes())
    return sum(storages.values())


def memory_in_use(device: str | torch.device = "cpu") -> int | None:
    """Bytes in use now: allocated by torch on a GPU, resident in this process on a CPU (None where that is unknown).

    Memory that was freed but not returned to the system is returned first: `peak_bytes` would not count its reuse.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        return torch.cuda.memory_allocated(device)
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    return _process_status("VmRSS")


def peak_bytes(call: Callable[[], object], device: str | torch.device = "cpu", before: int | None = None) -> int | None:
    """Bytes that `call()` takes at its peak, beyond those in use before it.

    Args:
        device: whose memory: that of a GPU as torch allocates it, or the resident memory of this process.
        before: bytes to subtract instead (of `memory_in_use`), to count also what was allocated since then.

    Returns:
        None where the system does not report peak memory (only Linux does, on the CPU); `call` is not made then.
    """
    cuda = torch.device(device).type == "cuda"
    now = memory_in_use(device)
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
        except OSError:
            return None
    before = now if before is None else before
    if before is None or (not cuda and _process_status("VmHWM") is None):
        return None
    call()
    if cuda:
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return max(0, (_process_status("VmHWM") or 0) - before)


def _process_status(field: str) -> int | None:
    """Bytes of a line of /proc/self/status."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)
