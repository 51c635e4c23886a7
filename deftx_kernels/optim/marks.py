"""Tensors of bits, one for each entry of a bucket."""

import numpy as np
import torch
from torch import Tensor

_CHUNK = 1 << 19  # bytes; a chunk's bits take 4 MB


def set_bits(words: Tensor, start: int, end: int) -> Tensor:
    """The bits of int32 words that are set, of those from `start` to `end`, counted from `start`: int64, ascending."""
    first = start // 32 * 32
    octets = words[start // 32 : -(-end // 32)].view(torch.uint8)  # the lowest first
    parts = [_ones(chunk).add_(first + 8 * _CHUNK * i) for i, chunk in enumerate(octets.split(_CHUNK))]
    position = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=words.device)
    return position[(position >= start) & (position < end)].sub_(start)


def _ones(octets: Tensor) -> Tensor:
    """The places of the bits that are set, the lowest of a byte first: int64."""
    if octets.device.type == "cpu":  # several times as fast as PyTorch's
        return torch.from_numpy(np.flatnonzero(np.unpackbits(octets.numpy(), bitorder="little")))
    places = 1 << torch.arange(8, dtype=torch.uint8, device=octets.device)
    return (octets[:, None] & places).view(-1).nonzero().view(-1)
