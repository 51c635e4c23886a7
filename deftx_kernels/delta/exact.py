"""The sum of a base and a delta, and the delta for which this sum equals the tuned tensor bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deftx_kernels.kernels.tensors import FLOATS, INTEGERS
from deftx_kernels.mask import CSRMask
from deftx_kernels.ops.schemas import compute_dtype

SUMMABLE = FLOATS | {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}
_CHUNK = 1 << 22  # entries
# 0 plus this is rounded to -0.0 in every dtype smaller than float64. Not subnormal, so never flushed to zero.
_NEGATIVE_ZERO = -1e-300

Low = tuple[Tensor, Tensor]  # int64 [m], ascending positions in the compact order; float64 [m], second terms there


def bits_differ(new: Tensor, old: Tensor) -> Tensor:
    """bool, like `old`: where the bits differ. Between two dtypes: where values or signs do; NaN equals NaN there."""
    new = new.to(old.device)
    if new.is_complex() or old.is_complex():
        dtype = torch.promote_types(new.dtype, old.dtype)
        real = [torch.view_as_real(t.to(dtype).resolve_conj()) for t in (new, old)]
        return bits_differ(*real).any(-1)
    if new.dtype == old.dtype:
        return new.view(INTEGERS[old.element_size()]) != old.view(INTEGERS[old.element_size()])
    new, old = new.to(torch.float64), old.to(torch.float64)
    return ((new != old) | (new.signbit() != old.signbit())) & ~(new.isnan() & old.isnan())


def base_plus_delta(base: Tensor, values: Tensor, alpha: float = 1.0, low: Low | None = None) -> Tensor:
    """base + alpha * (values + low), in the dtype of `base`.

    Computed in float32 (in float64 if `base` or `values` is float64, and at low terms), and rounded once.

    Args:
        base, values: [n]. low: as in `SparseDelta`.
    """
    wide = base.to(torch.promote_types(compute_dtype(base.dtype), values.dtype))
    result = _add(wide, values, alpha).to(base.dtype)
    if low is not None:
        positions, terms = low
        sums = _add(wide[positions].to(torch.float64), values[positions], alpha)
        bits = INTEGERS[base.element_size()]  # indexing supports integers, but not every float8
        result.view(bits)[positions] = torch.add(sums, terms, alpha=alpha).to(base.dtype).view(bits)
    return result


def _add(base: Tensor, values: Tensor, alpha: float) -> Tensor:
    """base + alpha * values, product and sum rounded one by one as csr_add_ does: torch.add may fuse them."""
    values = values.to(base.dtype)
    return base + (values if alpha == 1 else alpha * values)


def exact_differences(
    mask: CSRMask, base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]
) -> tuple[Tensor, Low, int]:
    """Compact values and low terms for which `base_plus_delta` gives `tuned`, and the number of entries without any."""
    values, positions, terms, start, inexact = [], [], [], 0, 0
    for name in mask.names:
        one = mask[name]
        old, new = one.gather(base), one.gather({name: tuned[name].to(mask.device)})
        for chunks in zip(old.split(_CHUNK), new.split(_CHUNK)):
            value, position, term, bad = _exact_difference(*chunks)
            values.append(value)
            positions.append(position + start)
            terms.append(term)
            start += len(value)
            inexact += bad
    return torch.cat(values), (torch.cat(positions), torch.cat(terms)), inexact


def _exact_difference(base: Tensor, tuned: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Values [n], positions [m] and float64 [m] of the low terms, and the number of inexact entries.

    A value is the float32 nearest to the difference, or a neighbour of it. Where neither gives the bits of `tuned`
    (mostly where `tuned` is smaller than the rounding error of the difference), a float64 term is added.
    """
    old, new = base.to(torch.float64), tuned.to(torch.float64)
    difference, largest = new - old, torch.finfo(torch.float32).max
    bounded = difference.clamp(-largest, largest)  # of finite numbers: the low term has the rest
    values = torch.where(old.isfinite() & new.isfinite(), bounded, difference).to(torch.float32)
    off = bits_differ(base_plus_delta(base, values), tuned)
    for limit in (torch.inf, -torch.inf):
        if bool(off.any()):
            candidate = torch.nextafter(values, torch.full_like(values, limit))
            better = off & ~bits_differ(base_plus_delta(base, candidate), tuned)
            values, off = torch.where(better, candidate, values), off & ~better
    positions = off.nonzero().view(-1)
    tuned, new, off = tuned[positions], new[positions], off[positions]
    sums = old[positions] + values[positions].to(torch.float64)
    nearest = torch.where((new == 0) & new.signbit(), torch.full_like(new, _NEGATIVE_ZERO), new - sums)
    neighbours = [torch.nextafter(nearest, torch.full_like(nearest, limit)) for limit in (torch.inf, -torch.inf)]
    terms = nearest
    for candidate in (nearest, *neighbours):
        better = off & ~bits_differ((sums + candidate).to(base.dtype), tuned)
        terms, off = torch.where(better, candidate, terms), off & ~better
    kept = terms.isfinite() if base.dtype == torch.float64 else ~off  # in float64 an inexact term is kept, too
    return values, positions[kept], terms[kept], int(off.sum())
