"""The tensors that training keeps: their bytes, counted, not estimated; and what stops them from being written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

_WRITER_ERRORS = ("inline_container", "unexpected pos", "iostream error")  # the RuntimeErrors of torch's file writer


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """`with saving(path):` what torch.save and safetensors make of a full or read-only disk is an OSError that names
    `path`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _WRITER_ERRORS):
            raise
        raise OSError(f"{path} cannot be written: the disk is full or fails") from error


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of the gradients that exist now."""
    return _bytes(p.grad for p in model.parameters() if p.grad is not None)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's state tensors, shared storage counted once."""

    def tensors(value):
        if hasattr(value, "__tensor_flatten__"):  # a tensor made of tensors, as of 8-bit optimizers
            for name in value.__tensor_flatten__()[0]:
                yield from tensors(getattr(value, name))
        elif isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            for inner in value.values():
                yield from tensors(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                yield from tensors(inner)

    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    return _bytes(tensors(dict(inner.state)))


def _bytes(tensors) -> int:
    storages: dict[int, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = max(storages.get(storage.data_ptr(), 0), storage.nbytes())
    return sum(storages.values())
