"""What base + delta is, and the delta for which it is the tuned tensor bit for bit."""

import torch
from torch import Tensor

SUMMABLE = frozenset(
    {torch.float32, torch.float64, torch.float16, torch.bfloat16}
    | {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size
_CHUNK = 1 << 22  # entries
# Added to 0 it is rounded to -0.0 in every dtype below float64. A normal number of float64: nothing flushes it to zero.
_NEGATIVE_ZERO = -1e-300

Low = tuple[Tensor, Tensor]  # int64 [m], places in the compact order, ascending; float64 [m], what to add there as well


def differs(new: Tensor, old: Tensor) -> Tensor:
    """bool, like `old`: where the bits differ. Between two dtypes: where values or signs do; NaN equals NaN there."""
    new = new.to(old.device)
    if new.is_complex() or old.is_complex():
        dtype = torch.promote_types(new.dtype, old.dtype)
        return differs(
            torch.view_as_real(new.to(dtype).resolve_conj()), torch.view_as_real(old.to(dtype).resolve_conj())
        ).any(-1)
    if new.dtype == old.dtype:
        return new.view(_BITS[old.element_size()]) != old.view(_BITS[old.element_size()])
    new, old = new.to(torch.float64), old.to(torch.float64)
    return ((new != old) | (new.signbit() != old.signbit())) & ~(new.isnan() & old.isnan())


def total(base: Tensor, values: Tensor, alpha: float = 1.0, low: Low | None = None) -> Tensor:
    """base + alpha * (values + low), in the dtype of `base`.

    Computed in float32 (float64 beside float64), where there is a low term in float64, and rounded once.

    Args:
        base, values: [n]. low: as in `SparseDelta`.
    """
    wide = base.to(torch.float64 if base.dtype == torch.float64 else torch.float32)
    result = torch.add(wide, values.to(wide.dtype), alpha=alpha).to(base.dtype)
    if low is not None:
        places, rest = low
        sums = torch.add(wide[places].to(torch.float64), values[places].to(torch.float64), alpha=alpha)
        bits = _BITS[base.element_size()]  # indexing knows these for every dtype
        result.view(bits)[places] = torch.add(sums, rest, alpha=alpha).to(base.dtype).view(bits)
    return result


def exact_difference(base: Tensor, tuned: Tensor) -> tuple[Tensor, Low, int]:
    """Values float32 [n] and low terms with total(base, values, low=low) = tuned; the number of entries where there are
    none.

    The value is the float32 nearest to the difference, or a neighbour of it. Where neither gives the bits of `tuned`,
    mostly since it is smaller than the difference, a float64 term is added.
    """
    values, places, rests, inexact = [base.new_empty(0, dtype=torch.float32)], [], [], 0
    for start in range(0, len(base), _CHUNK):
        one, place, rest, bad = _exact_difference(base[start : start + _CHUNK], tuned[start : start + _CHUNK])
        values.append(one)
        places.append(place + start)
        rests.append(rest)
        inexact += bad
    nothing = base.new_empty(0, dtype=torch.int64), base.new_empty(0, dtype=torch.float64)
    return torch.cat(values), (torch.cat([nothing[0], *places]), torch.cat([nothing[1], *rests])), inexact


def _exact_difference(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    old, new = base.to(torch.float64), tuned.to(torch.float64)
    difference, most = new - old, torch.finfo(torch.float32).max
    bounded = difference.clamp(-most, most)  # of finite numbers the low term carries what is more
    values = torch.where(old.isfinite() & new.isfinite(), bounded, difference).to(torch.float32)
    off = differs(total(base, values), tuned)
    for limit in (torch.inf, -torch.inf):
        if bool(off.any()):
            candidate = torch.nextafter(values, torch.full_like(values, limit))
            better = off & ~differs(total(base, candidate), tuned)
            values, off = torch.where(better, candidate, values), off & ~better
    places = off.nonzero().view(-1)
    if not len(places):
        return values, places, old[:0], 0
    tuned, new, off = tuned[places], new[places], off[places]
    sums = old[places] + values[places].to(torch.float64)
    rest = torch.where((new == 0) & new.signbit(), torch.full_like(new, _NEGATIVE_ZERO), new - sums)
    for candidate in (
        rest,
        *(torch.nextafter(rest, torch.full_like(rest, limit)) for limit in (torch.inf, -torch.inf)),
    ):
        better = off & ~differs((sums + candidate).to(base.dtype), tuned)
        rest, off = torch.where(better, candidate, rest), off & ~better
    kept = rest.isfinite() if base.dtype == torch.float64 else ~off  # in float64 the nearest is better than none
    return values, places[kept], rest[kept], int(off.sum())
