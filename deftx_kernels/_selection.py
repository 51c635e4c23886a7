"""Exact top-k over scores that are not all in one place: tensors that come one group after the other, pieces on several ranks.

Everything here is made of two operators: magnitude_histogram, whose counts can be added up over whatever holds the scores, and
threshold_mask.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deftx_kernels._ops import SCOPES, column_dtype, rows_and_columns


def find_threshold(
    histogram: Callable[[int, int], Tensor],  # (prefix, shift) -> int64 [65536], as the operator magnitude_histogram
    element_size: int,  # bytes of a score
    k: int,
) -> tuple[int, int]:
    """(threshold, ties): the k largest scores are those with magnitude bits above the threshold and the first `ties` equal to it.

    A radix select, 16 bits a round. Where every score equal to the k-th largest is wanted, there are no ties to count.
    """
    if k == 0:
        return (1 << (8 * element_size - 1)) - 1, 0  # no finite score has bits like these
    prefix, remaining, tied = 0, k, 0
    for shift in range(8 * element_size - 16, -1, -16):
        counts = histogram(prefix, shift).flip(0)
        from_the_top = counts.cumsum(0)
        position = int(torch.searchsorted(from_the_top, remaining))
        tied = int(counts[position])
        remaining -= int(from_the_top[position]) - tied
        prefix = (prefix << 16) | (0xFFFF - position)
    return (prefix - 1, 0) if remaining == tied and prefix > 0 else (prefix, remaining)


class Denoised(NamedTuple):
    """L + prune(H) of one matrix, not written anywhere: the operators low_rank_* make it where they read it."""

    delta: Tensor  # [1, m, n]
    left: Tensor  # [1, m, r]
    right: Tensor  # [1, n, r]
    cut: Tensor  # [1, 2]


Scores = Sequence[Tensor] | Denoised


def histogram(scores: Scores, prefix: int, shift: int) -> Tensor:
    """The operator magnitude_histogram, of tensors that may not be written."""
    if isinstance(scores, Denoised):
        return torch.ops.deftx.low_rank_histogram(*scores, prefix, shift)
    return torch.ops.deftx.magnitude_histogram(scores, prefix, shift)


def count_equal(scores: Scores, threshold: int) -> Tensor:
    """int64 []: how many entries have the magnitude bits `threshold`."""
    return histogram(scores, threshold >> 16, 0)[threshold & 0xFFFF]


def take(scores: Scores, threshold: int, ties: int) -> tuple[Tensor, Tensor, int]:
    """crow_indices and col_indices of the scores above the threshold and of the first `ties` equal to it; the ties left."""
    quotas = []
    for part in [scores] if isinstance(scores, Denoised) else [[t] for t in scores]:
        quotas.append(min(ties, int(count_equal(part, threshold))) if ties else 0)
        ties -= quotas[-1]
    if isinstance(scores, Denoised):
        return *torch.ops.deftx.low_rank_mask(*scores, threshold, quotas), ties
    return *torch.ops.deftx.threshold_mask(scores, threshold, quotas), ties


class Columns:
    """col_indices [k] that are filled one group of tensors after the other, and the crow_indices that belong to them."""

    def __init__(self, k: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.col = torch.empty(k, dtype=_SIGNED[dtype], device=device)
        self.crows: list[Tensor] = []  # of each group, from 0
        self.bounds = [0]  # where each group's entries begin, and where the last one's end

    def append(self, crow: Tensor, col: Tensor) -> None:
        start, end = self.bounds[-1], self.bounds[-1] + len(col)
        self.col[start:end] = col.view(_SIGNED[col.dtype]) if col.dtype == self.dtype else col.to(self.col.dtype)
        self.crows.append(crow)
        self.bounds.append(end)

    def csr(self) -> tuple[Tensor, Tensor]:
        """crow_indices and col_indices over the rows of all groups."""
        parts = [self.crows[0][:1], *(crow[1:] + start for crow, start in zip(self.crows, self.bounds))]
        return torch.cat(parts), self.col[: self.bounds[-1]].view(self.dtype)


_SIGNED = {torch.uint16: torch.int16, torch.int32: torch.int32}  # torch indexes few tensors of unsigned integers


class Candidates(Columns):
    """The k largest of groups of tensors that come one after the other: what is not among the k largest so far can never be.

    Holds a score and a column, together 6 to 12 bytes, for each of k entries.
    """

    def __init__(self, k: int, dtype: torch.dtype, score_dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(k, dtype, device)
        self.k = k
        self.seen = 0  # elements
        self.scores = torch.empty(k, dtype=score_dtype, device=device)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Takes the next tensors: finite, contiguous, of `score_dtype`."""
        self.seen += sum(t.numel() for t in tensors)
        lists = [[self.scores[: self.bounds[-1]]], tensors] if self.bounds[-1] else [tensors]
        threshold, ties = find_threshold(
            lambda prefix, shift: sum(torch.ops.deftx.magnitude_histogram(x, prefix, shift) for x in lists),
            self.scores.element_size(),
            min(self.k, self.seen),
        )
        old, self.bounds = self.bounds, [0]
        for i, (start, end) in enumerate(zip(old, old[1:])):  # move what stays to the front
            scores, col, to = self.scores[start:end], self.col[start:end], self.bounds[-1]
            _, stay, ties = take([scores], threshold, ties)
            if len(stay) < len(scores) or to < start:
                stay = stay.to(torch.int32)
                self.crows[i] = torch.searchsorted(stay, self.crows[i])
                self.scores[to : to + len(stay)] = scores[stay]
                self.col[to : to + len(stay)] = col[stay]
            self.bounds.append(to + len(stay))
        crow, col, _ = take(tensors, threshold, ties)
        start = self.bounds[-1]
        self.append(crow, col)
        self.scores[start : self.bounds[-1]] = torch.ops.deftx.csr_gather(tensors, crow, col)


def by_rounds(
    groups: Callable[[], Iterable[Scores]], k: int, dtype: torch.dtype, score_dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """As `Candidates`, of groups that can be made again: no score is kept, and each group is made 1 + itemsize / 2 times."""
    threshold, ties = find_threshold(
        lambda prefix, shift: functools.reduce(Tensor.add_, (histogram(x, prefix, shift) for x in groups())),
        score_dtype.itemsize,
        k,
    )
    columns = Columns(k, dtype, device)
    for scores in groups():
        crow, col, ties = take(scores, threshold, ties)
        columns.append(crow, col)
        del scores
    return columns.csr()


def select_by_groups(
    scores: Callable[[Sequence[str]], list[Tensor]],
    names: list[str],
    shapes: list[torch.Size],
    counts: list[int],
    scope: str,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices of the largest scores, of which those of one group of tensors exist at a time.

    `scores(names)` makes those of a group, finite and contiguous, of `dtype`; it may be called several times for a group.
    """
    groups = _groups(names, shapes)

    def each(first: int = 0, rounds: int = 1) -> Iterator[list[Tensor]]:
        done = first * len(names)
        for group in groups:
            if progress is not None:
                progress(done // rounds, len(names))
            yield scores(group)
            done += len(group)

    columns = column_dtype(shapes)
    if scope != "global":
        rows = [rows_and_columns(s)[0] if scope == "row" else 1 for s in shapes]
        found = Columns(sum(n * r for n, r in zip(counts, rows)), columns, device)
        remaining = iter(counts)
        for tensors in each():
            crow, col, _ = torch.ops.deftx.topk_mask(tensors, [], [next(remaining) for _ in tensors], SCOPES[scope])
            found.append(crow, col)
            del tensors  # before the next ones are made
        return found.csr()
    [k] = counts
    if k * (dtype.itemsize + columns.itemsize) <= 0.25 * dtype.itemsize * sum(s.numel() for s in shapes):
        candidates = Candidates(k, columns, dtype, device)
        for tensors in each():
            candidates.add(tensors)
            del tensors
        return candidates.csr()
    rounds = 1 + dtype.itemsize // 2
    passes = itertools.count()
    return by_rounds(lambda: each(next(passes), rounds), k, columns, dtype, device)


def _groups(names: list[str], shapes: list[torch.Size]) -> list[list[str]]:
    """The names in order, cut into groups of at most as many elements as the largest tensor has."""
    limit = max(s.numel() for s in shapes)
    groups: list[list[str]] = []
    room = 0
    for name, shape in zip(names, shapes):
        if not groups or shape.numel() > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= shape.numel()
    return groups
