"""Weighted sums of sparse differences, pruning and sign election, in float64."""

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from deftx_kernels.delta.exact import Low
from deftx_kernels.mask import CSRMask
from deftx_kernels.ops.reference import philox
from deftx_kernels.ops.schemas import ELECTIONS, MAX_SUMMED_MASKS, SCOPES


class Terms(NamedTuple):
    """Differences at the entries of a mask: values plus, at some positions, low terms (see `SparseDelta`)."""

    mask: CSRMask
    values: Tensor  # [nnz], float32 or float64
    low: Low | None = None

    def to(self, device: torch.device) -> "Terms":
        low = None if self.low is None else (self.low[0].to(device), self.low[1].to(device))
        return Terms(self.mask.to(device), self.values.to(device), low)

    def at(self, positions: Tensor) -> "Terms":
        """The entries at these positions, ascending, without low terms."""
        return Terms(self.mask.at(positions), self.values[positions])

    def in_float64(self) -> "Terms":
        """Low terms added to the values."""
        values = self.values.to(torch.float64)
        return Terms(self.mask, values if self.low is None else values.index_add(0, *self.low))


def weighted_sum(terms: Sequence[Terms], weights: Sequence[float], election: str = "none") -> Terms:
    """The operator `csr_sum` at the union of the masks, in float64. Low terms are summed beside the values, or, where
    signs are elected, added to them first.
    """
    device = terms[0].mask.device
    terms = [one.to(device) for one in terms]
    if election != "none":
        terms = [one.in_float64() for one in terms]
    union = reduce(lambda one, other: one | other, [one.mask for one in terms])
    values = _sum(union, [(one.mask, one.values) for one in terms], weights, election)
    if all(one.low is None for one in terms):
        return Terms(union, values)
    low, has_low = [], []
    for one in terms:
        positions, parts = one.low or (values.new_zeros(0, dtype=torch.int64), values.new_zeros(0))
        compact = values.new_zeros(one.mask.nnz)
        low.append((one.mask, compact.index_copy(0, positions, parts)))
        has_low.append((one.mask, compact.index_fill(0, positions, 1.0)))
    positions = _sum(union, has_low, [1.0] * len(terms)).nonzero().view(-1)
    return Terms(union, values, (positions, _sum(union, low, weights)[positions]))


def _sum(
    union: CSRMask, parts: Sequence[tuple[CSRMask, Tensor]], weights: Sequence[float], election: str = "none"
) -> Tensor:
    """float64 [union.nnz]."""
    if len(parts) > MAX_SUMMED_MASKS:
        first, rest = parts[:MAX_SUMMED_MASKS], parts[MAX_SUMMED_MASKS:]
        return _sum(union, [(union, _sum(union, first, weights[: len(first)])), *rest], [1.0, *weights[len(first) :]])
    shapes = dict(zip(union.names, union.shapes))
    others = [mask.over(shapes) for mask, _ in parts]
    return torch.ops.deftx.csr_sum(
        union.crow_indices,
        union.col_indices,
        [mask.crow_indices for mask in others],
        [mask.col_indices for mask in others],
        [values.contiguous() for _, values in parts],
        [float(weight) for weight in weights],
        ELECTIONS[election],
        torch.float64,
    )


def rounded(terms: Terms) -> tuple[Tensor, Low | None]:
    """float32 values, and low terms where there were some or float32 cannot hold the value."""
    values, largest = terms.values, torch.finfo(torch.float32).max
    low = torch.zeros_like(values)
    if terms.low is not None:
        low.index_copy_(0, *terms.low)
    total = values + low
    high = torch.where(total.isfinite(), total.clamp(-largest, largest), total).to(torch.float32)
    kept = total.isfinite() & (total.abs() > largest)
    if terms.low is not None:
        kept[terms.low[0]] = total[terms.low[0]].isfinite()  # beside an infinity a low term would give NaN
    positions = kept.nonzero().view(-1)
    if not len(positions):
        return high, None
    return high, (positions, (values[positions] - high[positions].to(torch.float64)) + low[positions])


def largest(terms: Terms, density: float, scope: str) -> Terms:
    """The int(density * elements) entries of largest magnitude, of equal ones the first: of all tensors together
    (scope "global") or of each ("tensor").
    """
    terms, mask = terms.in_float64(), terms.mask
    if scope == "global":
        scores, sizes, counts = [terms.values], [mask.numel], [mask.nnz]
    else:
        scores = [part.contiguous() for part in mask.split(terms.values).values()]
        sizes, counts = [shape.numel() for shape in mask.shapes], [len(part) for part in scores]
    k = [min(int(density * size), count) for size, count in zip(sizes, counts)]
    if k == counts:
        return terms
    crow, col, _ = torch.ops.deftx.topk_mask(scores, [], k, SCOPES["tensor"])
    chosen = CSRMask.unchecked([f"{i:09}" for i in range(len(scores))], [part.shape for part in scores], crow, col)
    return terms.at(chosen.flat_indices())


def thinned(terms: Terms, density: float, seed: int, number: int) -> Terms:
    """Each entry with probability `density`, divided by it (DARE: Yu et al. 2024, eq. 2 and 3).

    Entry i is kept where word i % 4 of Philox with the key `seed` and the counter (i // 4, number) is below
    density * 2**32: the same entries on every device.
    """
    terms, count = terms.in_float64(), terms.mask.nnz
    step = torch.tensor(number, device=terms.mask.device)
    words = philox(seed, step, -(-count // 4)).T.reshape(-1)[:count]
    positions = (words < density * 2**32).nonzero().view(-1)
    kept = terms.at(positions)
    return Terms(kept.mask, kept.values / density)
