"""Tensors of bits, one for each entry of a bucket."""

import torch
from torch import Tensor

_CHUNK = 1 << 19  # bytes; a chunk's bits take 4 MB


def set_bits(words: Tensor, start: int, end: int) -> Tensor:
    """The bits of int32 words that are set, of those from `start` to `end`, counted from `start`: int64, ascending."""
    first = start // 32 * 4
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    found = [torch.empty(0, dtype=torch.int64, device=words.device)]
    octets = words[start // 32 : -(-end // 32)].view(torch.uint8)  # the lowest first
    for at, chunk in zip(range(first, first + len(octets), _CHUNK), octets.split(_CHUNK)):
        filled = chunk.nonzero().view(-1)
        octet, place = ((chunk[filled][:, None] >> places) & 1).nonzero(as_tuple=True)
        found.append((filled[octet] + at) * 8 + place)
    position = torch.cat(found)
    return position[(position >= start) & (position < end)] - start
