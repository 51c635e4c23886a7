"""Exact top-k over scores that are not all in memory: groups of tensors one after the other, or shards on many ranks.

It uses two operators: magnitude_histogram, whose counts can be summed over groups or ranks, and threshold_mask.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial, reduce

import torch
from torch import Tensor

from deftx_kernels.mask import column_dtype, rows_and_columns, signed
from deftx_kernels.ops.reference import radix_select
from deftx_kernels.ops.schemas import SCOPES

_MIN_ROOM = 4096  # entries: for a small k, k / 4 would leave no room for the next scores
_CHUNK = 1 << 18  # entries that are moved at a time
# Elements, on the CPU and on a GPU: a group costs some calls; a GPU decomposes many small matrices in the time of one.
_MIN_GROUP = (1 << 20, 1 << 25)


def find_threshold(
    histogram: Callable[[int, int], Tensor],  # (prefix, shift) -> int64 [65536], as the operator magnitude_histogram
    element_size: int,  # bytes of a score
    k: int,
) -> tuple[int, int]:
    """(threshold, ties): the k largest scores are those with magnitude bits above the threshold and the first `ties`
    equal to it.

    Where every score equal to the k-th largest is selected, `ties` is 0.
    """
    if k == 0:
        return _largest_bits(element_size), 0
    threshold, ties, tied = radix_select(histogram, element_size, k)
    return (threshold - 1, 0) if ties == tied and threshold > 0 else (threshold, ties)


def _largest_bits(element_size: int) -> int:
    """No magnitude is above these bits."""
    return (1 << (8 * element_size - 1)) - 1


def count_equal(scores: Sequence[Tensor], threshold: int) -> Tensor:
    """int64 []: how many entries have the magnitude bits `threshold`."""
    return torch.ops.deftx.magnitude_histogram(scores, threshold >> 16, 0)[threshold & 0xFFFF]


def select_above(scores: Sequence[Tensor], threshold: int, ties: int) -> tuple[Tensor, Tensor, int]:
    """CSR of the scores above the threshold and the first `ties` equal to it; the ties that remain for later scores."""
    quotas, ties = _tie_quotas(scores, threshold, ties)
    return *torch.ops.deftx.threshold_mask(scores, threshold, quotas), ties


def _tie_quotas(scores: Sequence[Tensor], threshold: int, ties: int) -> tuple[list[int], int]:
    """How many entries equal to the threshold to select of each tensor, earlier ones first; the ties that remain."""
    sizes = [t.numel() for t in scores]
    if ties == 0:
        return [0] * len(sizes), 0
    if (count := int(count_equal(scores, threshold))) <= ties:
        return sizes, ties - count
    # By bisection, since a count takes 65,536 bins: all ties before `first` are selected, none from `last` on.
    first, last = 0, len(sizes)
    while last - first > 1:
        middle = (first + last) // 2
        if (count := int(count_equal(scores[first:middle], threshold))) <= ties:
            first, ties = middle, ties - count
        else:
            last = middle
    return [*sizes[:first], ties, *[0] * (len(sizes) - last)], 0


def _threshold_of(groups: Callable[[], Iterable[Sequence[Tensor]]], element_size: int, k: int) -> tuple[int, int]:
    """`find_threshold` of groups of tensors, which are made once for each round."""

    def histogram(prefix: int, shift: int) -> Tensor:
        counts = partial(torch.ops.deftx.magnitude_histogram, prefix=prefix, shift=shift)
        return reduce(Tensor.add_, map(counts, groups()))  # `map` drops a group before the next one is made

    return find_threshold(histogram, element_size, k)


class SelectedEntries:
    """The selected entries of one group of tensors after the other: col_indices [capacity] and crow_indices."""

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.col = signed(torch.empty(capacity, dtype=dtype, device=device))
        self.crows = [torch.zeros(1, dtype=torch.int64, device=device)]  # concatenated: crow_indices of all groups
        self.filled = 0

    def append(self, crow: Tensor, col: Tensor) -> None:
        start, self.filled = self.filled, self.filled + len(col)
        self.col[start : self.filled] = signed(col) if col.dtype == self.dtype else col.to(self.col.dtype)
        self.crows.append(crow[1:] + start)

    def csr(self) -> tuple[Tensor, Tensor]:
        """crow_indices and col_indices over the rows of all groups."""
        return torch.cat(self.crows), self.col[: self.filled].view(self.dtype)


class StreamingTopK(SelectedEntries):
    """The k largest scores of groups of tensors that come one after the other, in one pass.

    A buffer holds the column and the score, together 6 to 12 bytes, of each entry that may still be among the k
    largest, with room for a quarter more than k. When it is full it is reduced to the k largest so far: about
    4 log(n / k) times for n entries in random order.
    """

    def __init__(self, k: int, dtype: torch.dtype, score_dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(k + max(k // 4, _MIN_ROOM), dtype, device)
        self.k = k
        self.scores = torch.empty(len(self.col), dtype=score_dtype, device=device)
        # k earlier scores have at least these magnitude bits: only a later score above them can be selected. None: any.
        self.bound = _largest_bits(score_dtype.itemsize) if k == 0 else None

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Adds the next tensors: finite, contiguous, of `score_dtype`."""
        room = len(self.col) - self.filled
        found = None
        if self.bound is not None:
            found = torch.ops.deftx.threshold_mask(tensors, self.bound, [0] * len(tensors))
        elif (numel := sum(t.numel() for t in tensors)) <= room:
            found = select_above(tensors, 0, numel)
        if found is None or len(found[1]) > room:
            found = None  # frees its memory
            found = select_above(tensors, *self._reduce([tensors]))
        crow, col, start = found[0], found[1], self.filled
        self.append(crow, col)
        self.scores[start : self.filled] = torch.ops.deftx.csr_gather(tensors, crow, col)

    def _reduce(self, more: list[Sequence[Tensor]]) -> tuple[int, int]:
        """Reduce the buffer to its entries among the k largest of it and `more`; the threshold and ties of `more`."""
        groups = [[self.scores[: self.filled]], *more] if self.filled else more
        threshold, ties = _threshold_of(lambda: groups, self.scores.element_size(), self.k)
        self.bound = threshold if ties else threshold + 1
        crow = torch.cat(self.crows)
        self.crows = [crow]
        starts = range(0, self.filled, _CHUNK)
        rows = torch.searchsorted(crow, torch.tensor(starts, device=crow.device)).tolist()
        end = 0
        for start, first, last in zip(starts, rows, [*rows[1:], len(crow)]):  # in place, a chunk at a time
            scores, columns = (x[start : min(start + _CHUNK, self.filled)] for x in (self.scores, self.col))
            _, kept, ties = select_above([scores], threshold, ties)
            kept = kept.to(torch.int32)
            crow[first:last] = end + torch.searchsorted(kept, crow[first:last] - start)
            self.scores[end : end + len(kept)] = scores[kept]
            self.col[end : end + len(kept)] = columns[kept]
            end += len(kept)
        self.filled = end
        return threshold, ties

    def csr(self) -> tuple[Tensor, Tensor]:
        """crow_indices and col_indices of the k largest of all; nothing can be added afterwards."""
        if self.filled > self.k:
            self._reduce([])
        del self.scores
        crow, col = super().csr()
        return crow, col.clone()  # without the unused capacity


def topk_in_passes(
    groups: Callable[[], Iterable[Sequence[Tensor]]],
    k: int,
    dtype: torch.dtype,
    score_dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """As `StreamingTopK`, without its buffer of scores: the groups are made anew in each of 1 + itemsize / 2 passes."""
    threshold, ties = _threshold_of(groups, score_dtype.itemsize, k)
    selected = SelectedEntries(k, dtype, device)
    for scores in groups():
        crow, col, ties = select_above(scores, threshold, ties)
        selected.append(crow, col)
        del scores
    return selected.csr()


def select_by_groups(
    scores: Callable[[Sequence[str]], list[Tensor]],
    shapes: dict[str, torch.Size],
    counts: list[int],
    scope: str,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None,
) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices of the largest scores of named tensors, of which one group exists at a time.

    `scores` makes those of a group of names: finite and contiguous, of `dtype`, on `device`. It may be called several
    times for a group. `shapes` is in the mask's order; counts, scope: as the operator `topk_mask` takes them.
    """
    columns, k = column_dtype(list(shapes.values())), counts[0]
    entry_bytes = (k + k // 4) * (dtype.itemsize + columns.itemsize)
    few = entry_bytes <= 0.25 * dtype.itemsize * sum(s.numel() for s in shapes.values())
    passes = 1 if scope != "global" or few else 1 + dtype.itemsize // 2
    names, done = groups_of_names(shapes, device), 0

    def groups() -> Iterator[list[Tensor]]:
        nonlocal done
        for group in names:
            if progress is not None:
                progress(done // passes, len(shapes))
            yield scores(group)
            done += len(group)

    if scope == "global" and not few:
        return topk_in_passes(groups, k, columns, dtype, device)
    if scope == "global":
        found = StreamingTopK(k, columns, dtype, device)
        for tensors in groups():
            found.add(tensors)
            del tensors  # before the next ones are made
        return found.csr()
    rows = [rows_and_columns(s)[0] if scope == "row" else 1 for s in shapes.values()]
    selected = SelectedEntries(sum(n * r for n, r in zip(counts, rows)), columns, device)
    remaining = iter(counts)
    for tensors in groups():
        crow, col, _ = torch.ops.deftx.topk_mask(tensors, [], [next(remaining) for _ in tensors], SCOPES[scope])
        selected.append(crow, col)
        del tensors
    return selected.csr()


def groups_of_names(shapes: Mapping[str, torch.Size], device: torch.device) -> list[list[str]]:
    """The names in order, in groups of at most as many elements as the largest tensor has, or `_MIN_GROUP`."""
    cuda, largest = device.type == "cuda", max(s.numel() for s in shapes.values())
    # Half as much more on a GPU: the embedding of XLM-R, alone, would take as long as all its linear layers together.
    limit = max(_MIN_GROUP[cuda], largest + cuda * (largest // 2))
    groups: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        if not groups or shape.numel() > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= shape.numel()
    return groups
