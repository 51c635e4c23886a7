"""Bytes of the tensors that training keeps: counted, not estimated."""

import torch
from torch import Tensor, nn


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
