"""The references of the operators on the bits of tensors: differences, exchanges of entries, checksums, set bits.

As in `reference.py`. Elements are compared and moved as integers of their size, whatever their dtype.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.kernels.tensors import INTEGERS
from deftx_kernels.ops.schemas import bits_dtype, index_dtype

_CHUNK = 1 << 22  # elements of temporary memory per step
_LOW = 0xFFFF_FFFF


def _bits(tensor: Tensor) -> Tensor:
    """The elements of a contiguous tensor as signed integers of their size, flat."""
    return tensor.view(-1).view(INTEGERS[tensor.element_size()])


def _chunks(*flat: Tensor) -> Iterator[tuple[Any, ...]]:
    """(the index of a chunk's first element, the chunk of each of the flat tensors)."""
    return zip(range(0, flat[0].numel(), _CHUNK), *(t.split(_CHUNK) for t in flat))


def bit_diff(new: Sequence[Tensor], old: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if not new:
        return torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int32), torch.empty(0)
    dtype, device, integer = index_dtype(new), new[0].device, INTEGERS[new[0].element_size()]
    counts = [0]
    indices, values = [torch.empty(0, dtype=dtype, device=device)], [torch.empty(0, dtype=integer, device=device)]
    for a, b in zip(new, old):
        count = 0
        for start, mine, theirs in _chunks(_bits(a), _bits(b)):
            index = (mine != theirs).nonzero().view(-1)
            indices.append((index + start).to(dtype))
            values.append(mine[index])
            count += len(index)
        counts.append(count)
    offsets = torch.tensor(counts, device=device).cumsum(0)
    return offsets, torch.cat(indices), torch.cat(values).view(new[0].dtype)


def flat_exchange_(
    tensors: Sequence[Tensor],
    offsets: Tensor,  # int64 [n + 1]
    indices: Tensor,  # [nnz]
    values: Tensor,  # [nnz]
) -> None:
    given, bounds = _bits(values), offsets.tolist()
    for tensor, start, end in zip(tensors, bounds, bounds[1:]):
        flat, index = _bits(tensor), indices[start:end].to(torch.int64)
        before = flat[index]
        flat[index] = given[start:end]
        given[start:end] = before


# ---- checksums ----
def word_key(word: Tensor) -> Tensor:  # int64: indices of words
    """The odd 32-bit number that a word of a tensor is multiplied by in the tensor's checksum: see `bit_checksum`."""
    x = ((word & _LOW) * 0x9E3779B1 + ((word >> 32) & _LOW) * 0xC2B2AE3D) & _LOW
    x = ((x ^ (x >> 15)) * 0x85EBCA77) & _LOW
    return (x ^ (x >> 13)) | 1


def _terms(index: Tensor, bits: Tensor) -> Tensor:
    """What elements with these bits at these flat indices add to a checksum, int64 [n]."""
    size = bits.element_size()
    if size == 8:
        return word_key(2 * index) * (bits & _LOW) + word_key(2 * index + 1) * ((bits >> 32) & _LOW)
    each = 4 // size  # elements of a word
    bits = bits.to(torch.int64) & (1 << 8 * size) - 1
    return word_key(index // each) * (bits << 8 * size * (index % each))


def bit_checksum(tensors: Sequence[Tensor]) -> Tensor:
    """The sum over the tensor's 32-bit words, of key * word modulo 2**64.

    The words are those of its memory, from its first element on, low byte first; what the last one lacks is 0. Elements
    of 8 bytes are two words, the low half first; four elements of 1 byte or two of 2 bytes share one word. The key of
    word w is odd, 32 bits long, and depends on w alone. With arithmetic modulo 2**32, and the constants of xxHash32
    (Collet, github.com/Cyan4973/xxHash):

        x = (w mod 2**32) * 0x9E3779B1 + (w >> 32) * 0xC2B2AE3D
        x = (x ^ x >> 15) * 0x85EBCA77
        key = (x ^ x >> 13) | 1

    Why this sum:
    - It is linear in the words: entries that change from old to new add key * (new - old), `bit_checksum_change`, in
      O(changed), and sums of parts add up. It does not depend on the order of summation, on threads or on the device.
    - A change within one word, such as a flipped bit, is always found: its difference and the key are below 2**32 in
      magnitude and not 0, so that their product is not 0 modulo 2**64.
    - Words that are swapped or moved are found, too, but for one pair in 2**31: the steps of the mix are bijections of
      32-bit numbers, so that at most two of 2**32 words have the same key. The shifts keep keys from being an
      arithmetic sequence, in which +d, -2 d, +d in words at equal distances would cancel: of 2**23 keys at distances
      up to 4096, three of 84 million second differences are 0.
    - It is limited by memory: a word needs one 32 x 32 -> 32 and one 32 x 32 -> 64 bit multiplication, which vector
      units and GPUs have (w * 0x9E3779B1 is an addition from one word to the next), and two elements of bfloat16 share
      them. One key for each element would cost twice that for bfloat16, four times for float8.

    It is no signature: who knows the keys can make tensors of equal checksums.
    """
    device = tensors[0].device if tensors else torch.device("cpu")
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    for total, tensor in zip(sums, tensors):
        for start, bits in _chunks(_bits(tensor)):
            total += _terms(torch.arange(start, start + len(bits), device=device), bits).sum()
    return sums


def bit_checksum_change(
    offsets: Tensor,  # int64 [n + 1]
    indices: Tensor,  # [nnz]
    old: Tensor,  # [nnz]
    new: Tensor,  # [nnz]
) -> Tensor:
    index = indices.to(torch.int64)
    change = _terms(index, _bits(new)) - _terms(index, _bits(old))
    return torch.nn.functional.pad(change.cumsum(0), (1, 0))[offsets].diff()


# ---- marks ----
def set_bits(
    words: Tensor,  # int32 [w]
    starts: Tensor,  # int64 [n + 1]
) -> tuple[Tensor, Tensor]:
    bounds, dtype, places = starts.tolist(), bits_dtype(words), torch.arange(32, device=words.device)
    counts, indices = [0], [torch.empty(0, dtype=dtype, device=words.device)]
    for start, end in zip(bounds, bounds[1:]):
        count = 0
        for first, part in _chunks(words[start // 32 : -(-end // 32)]):
            number = ((part[:, None] >> places) & 1).view(-1).nonzero().view(-1) + 32 * (first + start // 32)
            index = number[(number >= start) & (number < end)] - start
            indices.append(index.to(dtype))
            count += len(index)
        counts.append(count)
    return torch.tensor(counts, device=words.device).cumsum(0), torch.cat(indices)
