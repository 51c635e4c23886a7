"""Exact top-k over scores that are not all in one place: tensors that come one group after the other, pieces on several ranks.

Everything here is made of two operators: magnitude_histogram, whose counts can be added up over whatever holds the scores, and
threshold_mask.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def kth_magnitude(
    histogram: Callable[[int, int], Tensor],  # (prefix, shift) -> int64 [65536], as the operator magnitude_histogram
    element_size: int,  # bytes of a score
    k: int,
) -> tuple[int, int]:
    """The bits of the k-th largest |score|, and how many scores equal to it belong to the first k: a radix select, 16 bits a round."""
    if k == 0:
        return (1 << (8 * element_size - 1)) - 1, 0  # no finite score has bits like these
    prefix, remaining = 0, k
    for shift in range(8 * element_size - 16, -1, -16):
        from_the_top = histogram(prefix, shift).flip(0).cumsum(0)
        position = int(torch.searchsorted(from_the_top, remaining))
        if position > 0:
            remaining -= int(from_the_top[position - 1])
        prefix = (prefix << 16) | (0xFFFF - position)
    return prefix, remaining


def count_equal(score: Tensor, threshold: int) -> Tensor:
    """int64 []: how many entries have the magnitude bits `threshold`."""
    return torch.ops.deftx.magnitude_histogram([score], threshold >> 16, 0)[threshold & 0xFFFF]


def take(tensors: Sequence[Tensor], threshold: int, ties: int) -> tuple[Tensor, Tensor, int]:
    """crow_indices and col_indices of the scores above the threshold and of the first `ties` equal to it; the ties that are left."""
    quotas = []
    for tensor in tensors:
        quotas.append(min(ties, int(count_equal(tensor, threshold))) if ties else 0)
        ties -= quotas[-1]
    return *torch.ops.deftx.threshold_mask(tensors, threshold, quotas), ties


def joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """CSR matrices one below the other, the columns in the widest of their dtypes."""
    crows, total = [parts[0][0][:1]], 0
    wide = any(col.dtype == torch.int32 for _, col in parts)
    for crow, col in parts:
        crows.append(crow[1:] + total)
        total += col.numel()
    cols = [col.to(torch.int32) for _, col in parts] if wide else [col.view(torch.int16) for _, col in parts]
    return torch.cat(crows), torch.cat(cols) if wide else torch.cat(cols).view(torch.uint16)


class _Group(NamedTuple):
    crow: Tensor  # int64 [rows + 1]
    col: Tensor  # [nnz]
    scores: Tensor  # [nnz]


class Candidates:
    """The k largest of groups of tensors that come one after the other: what is not among the k largest so far can never be.

    Holds 6 bytes (uint16 columns, float32 scores) for each of k entries.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.seen = 0  # elements
        self.groups: list[_Group] = []

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Takes the next tensors: finite, contiguous, of one dtype."""
        self.seen += sum(t.numel() for t in tensors)
        lists = [*([g.scores] for g in self.groups), tensors]
        threshold, ties = kth_magnitude(
            lambda prefix, shift: sum(torch.ops.deftx.magnitude_histogram(x, prefix, shift) for x in lists),
            tensors[0].element_size(),
            min(self.k, self.seen),
        )
        for i, group in enumerate(self.groups):
            _, stay, ties = take([group.scores], threshold, ties)
            if len(stay) < len(group.scores):
                stay = stay.to(torch.int32)
                crow = torch.searchsorted(stay, group.crow)
                self.groups[i] = _Group(crow, group.col.view(_SIGNED[group.col.dtype])[stay].view(group.col.dtype), group.scores[stay])
        crow, col, _ = take(tensors, threshold, ties)
        self.groups.append(_Group(crow, col, torch.ops.deftx.csr_gather(tensors, crow, col)))

    def csr(self) -> tuple[Tensor, Tensor]:
        """crow_indices and col_indices over all rows seen."""
        return joined([(g.crow, g.col) for g in self.groups])


_SIGNED = {torch.uint16: torch.int16, torch.int32: torch.int32}  # torch indexes few tensors of unsigned integers


def by_rounds(groups: Callable[[], Sequence[list[Tensor]]], element_size: int, k: int) -> tuple[Tensor, Tensor]:
    """As `Candidates` over groups that can be made again: nothing is kept, and each is made once for 16 bits of a score and once more."""
    threshold, ties = kth_magnitude(
        lambda prefix, shift: sum(torch.ops.deftx.magnitude_histogram(x, prefix, shift) for x in groups()), element_size, k
    )
    parts = []
    for tensors in groups():
        crow, col, ties = take(tensors, threshold, ties)
        parts.append((crow, col))
    return joined(parts)
