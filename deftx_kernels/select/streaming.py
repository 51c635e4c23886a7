"""Exact top-k over scores that are not all in one place: tensors that come one group after the other, pieces on several
ranks.

Everything here is made of two operators: magnitude_histogram, whose counts can be added up over whatever holds the
scores, and threshold_mask.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from deftx_kernels.ops.schemas import SCOPES, column_dtype, rows_and_columns


def find_threshold(
    histogram: Callable[[int, int], Tensor],  # (prefix, shift) -> int64 [65536], as the operator magnitude_histogram
    element_size: int,  # bytes of a score
    k: int,
) -> tuple[int, int]:
    """(threshold, ties): the k largest scores are those with magnitude bits above the threshold and the first `ties`
    equal to it.

    A radix select, 16 bits a round. Where every score equal to the k-th largest is wanted, there are no ties to count.
    """
    if k == 0:
        return _largest_bits(element_size), 0
    prefix, remaining, tied = 0, k, 0
    for shift in range(8 * element_size - 16, -1, -16):
        counts = histogram(prefix, shift).flip(0)
        from_the_top = counts.cumsum(0)
        position = int(torch.searchsorted(from_the_top, remaining))
        tied = int(counts[position])
        remaining -= int(from_the_top[position]) - tied
        prefix = (prefix << 16) | (0xFFFF - position)
    return (prefix - 1, 0) if remaining == tied and prefix > 0 else (prefix, remaining)


def count_equal(scores: Sequence[Tensor], threshold: int) -> Tensor:
    """int64 []: how many entries have the magnitude bits `threshold`."""
    return torch.ops.deftx.magnitude_histogram(scores, threshold >> 16, 0)[threshold & 0xFFFF]


def take(scores: Sequence[Tensor], threshold: int, ties: int) -> tuple[Tensor, Tensor, int]:
    """crow_indices and col_indices of the scores above the threshold and of the first `ties` equal to it; the ties
    left.
    """
    quotas, ties = _tie_quotas(scores, threshold, ties)
    return *torch.ops.deftx.threshold_mask(scores, threshold, quotas), ties


def _tie_quotas(scores: Sequence[Tensor], threshold: int, ties: int) -> tuple[list[int], int]:
    """How many of its entries equal to the threshold each tensor may keep, earlier tensors first; the ties left.

    The tensor in which the ties end is found by halving: a count takes 65,536 bins, however small a tensor is.
    """
    sizes = [t.numel() for t in scores]
    if ties == 0:
        return [0] * len(sizes), 0
    if (count := int(count_equal(scores, threshold))) <= ties:
        return sizes, ties - count
    first, last = 0, len(sizes)  # all before `first` keep theirs, none from `last` on
    while last - first > 1:
        middle = (first + last) // 2
        if (count := int(count_equal(scores[first:middle], threshold))) <= ties:
            first, ties = middle, ties - count
        else:
            last = middle
    return [*sizes[:first], ties, *[0] * (len(sizes) - last)], 0


class Columns:
    """col_indices [capacity] that are filled one group of tensors after the other, and the crow_indices that belong to
    them.
    """

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.col = torch.empty(capacity, dtype=_SIGNED[dtype], device=device)
        # one after the other: crow_indices of all groups
        self.crows = [torch.zeros(1, dtype=torch.int64, device=device)]
        self.filled = 0

    def append(self, crow: Tensor, col: Tensor) -> None:
        start, self.filled = self.filled, self.filled + len(col)
        self.col[start : self.filled] = (
            col.view(_SIGNED[col.dtype]) if col.dtype == self.dtype else col.to(self.col.dtype)
        )
        self.crows.append(crow[1:] + start)

    def csr(self) -> tuple[Tensor, Tensor]:
        """crow_indices and col_indices over the rows of all groups."""
        return torch.cat(self.crows), self.col[: self.filled].view(self.dtype)


_SIGNED = {torch.uint16: torch.int16, torch.int32: torch.int32}  # torch indexes few tensors of unsigned integers


class StreamingTopK(Columns):
    """The k largest of groups of tensors that come one after the other: what is not among the k largest so far can
    never be.

    A buffer holds the column and the score, together 6 to 12 bytes, of each entry that may still be one of them, and
    has room for a quarter more than k. Where the next ones do not fit it is cut to the k largest so far: about 4 log(n
    / k) times for n entries in no particular order.
    """

    def __init__(self, k: int, dtype: torch.dtype, score_dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(self.capacity(k), dtype, device)
        self.k = k
        self.scores = torch.empty(len(self.col), dtype=score_dtype, device=device)
        # Magnitude bits that k earlier scores have at least: a later one that is not above them cannot be selected.
        # None: all can.
        self.bound = _largest_bits(score_dtype.itemsize) if k == 0 else None

    @staticmethod
    def capacity(k: int) -> int:
        return k + max(k // 4, _LEAST_ROOM)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Takes the next tensors: finite, contiguous, of `score_dtype`."""
        room = len(self.col) - self.filled
        if self.bound is not None:
            crow, col = torch.ops.deftx.threshold_mask(tensors, self.bound, [0] * len(tensors))
        elif (numel := sum(t.numel() for t in tensors)) <= room:
            crow, col, _ = take(tensors, 0, numel)
        else:
            crow = col = None
        if col is None or len(col) > room:
            crow = col = None  # before the buffer is cut
            threshold, ties = self._cut([tensors])
            crow, col, _ = take(tensors, threshold, ties)
        start = self.filled
        self.append(crow, col)
        self.scores[start : self.filled] = torch.ops.deftx.csr_gather(tensors, crow, col)

    def _cut(self, more: Sequence[Sequence[Tensor]]) -> tuple[int, int]:
        """Leaves in the buffer what is among the k largest of it and of `more`: threshold and ties for those that come
        after it.
        """
        lists = [[self.scores[: self.filled]], *more] if self.filled else more
        threshold, ties = find_threshold(
            lambda prefix, shift: functools.reduce(
                Tensor.add_, (torch.ops.deftx.magnitude_histogram(x, prefix, shift) for x in lists)
            ),
            self.scores.element_size(),
            self.k,
        )
        self.bound = threshold if ties else threshold + 1
        crow = torch.cat(self.crows)
        self.crows = [crow]
        starts = range(0, self.filled, _PIECE)
        firsts = torch.searchsorted(crow, torch.tensor(starts, device=crow.device)).tolist()
        to = 0
        # a piece at a time: to the front, in place
        for start, first, last in zip(starts, firsts, [*firsts[1:], len(crow)]):
            scores, columns = (x[start : min(start + _PIECE, self.filled)] for x in (self.scores, self.col))
            _, stay, ties = take([scores], threshold, ties)
            stay = stay.to(torch.int32)
            crow[first:last] = to + torch.searchsorted(stay, crow[first:last] - start)
            self.scores[to : to + len(stay)] = scores[stay]
            self.col[to : to + len(stay)] = columns[stay]
            to += len(stay)
        self.filled = to
        return threshold, ties

    def csr(self) -> tuple[Tensor, Tensor]:
        """crow_indices and col_indices of the k largest of all; nothing can be added then."""
        if self.filled > self.k:
            self._cut([])
        del self.scores
        crow, col = super().csr()
        return crow, col.clone()  # without the room


_LEAST_ROOM = 4096  # entries: a small k would leave no room for what comes next
_PIECE = 1 << 18  # entries that are moved at a time


def _largest_bits(element_size: int) -> int:
    """No magnitude is above these bits."""
    return (1 << (8 * element_size - 1)) - 1


def by_rounds(
    groups: Callable[[], Iterable[Sequence[Tensor]]],
    k: int,
    dtype: torch.dtype,
    score_dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """As `StreamingTopK`, of groups that can be made again: no score is kept, and each group is made 1 + itemsize / 2
    times.
    """
    threshold, ties = find_threshold(
        lambda prefix, shift: functools.reduce(
            Tensor.add_, (torch.ops.deftx.magnitude_histogram(x, prefix, shift) for x in groups())
        ),
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

    `scores(names)` makes those of a group, finite and contiguous, of `dtype`; it may be called several times for a
    group.
    """
    groups = _groups(names, shapes, device)

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
    if (k + k // 4) * (dtype.itemsize + columns.itemsize) <= 0.25 * dtype.itemsize * sum(s.numel() for s in shapes):
        found = StreamingTopK(k, columns, dtype, device)
        for tensors in each():
            found.add(tensors)
            del tensors
        return found.csr()
    rounds = 1 + dtype.itemsize // 2
    passes = itertools.count()
    return by_rounds(lambda: each(next(passes), rounds), k, columns, dtype, device)


def _groups(names: list[str], shapes: list[torch.Size], device: torch.device) -> list[list[str]]:
    """The names in order, cut into groups of at most as many elements as the largest tensor has, or `_LEAST_GROUP`."""
    limit = max(_LEAST_GROUP[device.type == "cuda"], *(s.numel() for s in shapes))
    groups: list[list[str]] = []
    room = 0
    for name, shape in zip(names, shapes):
        if not groups or shape.numel() > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= shape.numel()
    return groups


# Elements, on the CPU and on a GPU: a group costs some calls, and a GPU works on many small matrices in the time of
# one.
_LEAST_GROUP = (1 << 20, 1 << 25)
