"""The arguments of `svd_denoise`, checked, and the ranks that follow from them."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.validation import check_int, is_number

GAVISH_DONOHO = "gavish-donoho"


class Rule(NamedTuple):
    """How to truncate and to prune: made by `check_rule`. `shape` is that of a matrix, (m, n), everywhere."""

    rank: int | str | None
    energy: float | None
    residual_density: float
    oversample: int
    n_iter: int
    generator: torch.Generator | None
    batch_bytes: int | None
    drawn: Mapping[Any, Tensor | None] | None = None  # test matrices that are drawn already (plans.py)

    @property
    def keeps_all(self) -> bool:
        """Whether L + H is the matrix itself: then only the information is computed."""
        return self.residual_density == 1

    def kept_entries(self, shape: Sequence[int]) -> int:
        """How many entries of the residual are kept."""
        return 0 if self.keeps_all else round(self.residual_density * math.prod(shape))

    def fixed_rank(self, shape: Sequence[int]) -> int | None:
        """The given rank, at most min(m, n); None where the rank follows from the singular values."""
        return min(self.rank, *shape) if isinstance(self.rank, int) else None

    def ranks(self, squares: Tensor, shape: Sequence[int]) -> Tensor:  # float64 [b, min(m, n)], descending -> int64 [b]
        """The ranks of b matrices, from their squared singular values."""
        rank = self.fixed_rank(shape)
        if rank is not None:
            return torch.full((len(squares),), rank, device=squares.device)
        if self.energy is not None:
            sums = squares.cumsum(1)
            ranks = torch.searchsorted(sums, self.energy * sums[:, -1:])[:, 0] + 1
        else:
            singular = squares.sqrt()
            threshold = gavish_donoho_multiple(*shape) * torch.quantile(singular, 0.5, dim=1, keepdim=True)
            ranks = (singular > threshold).sum(1)
        return torch.where(squares[:, 0] > 0, ranks, 0)

    def operator_arguments(self, shape: Sequence[int]) -> tuple[int, float, float]:
        """rank, energy and median of the operator `eigh`, where 0 stands for what is not given."""
        median = gavish_donoho_multiple(*shape) if self.rank == GAVISH_DONOHO else 0.0
        return self.fixed_rank(shape) or 0, float(self.energy or 0), median

    def test_matrix(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Gaussian [min(m, n), rank + oversample] of a fixed rank; None where the exact decomposition is faster."""
        if (columns := self.test_columns(shape)) is None:
            return None
        generator = self.generator or torch.Generator(device=device).manual_seed(0)
        return torch.randn(min(shape), columns, dtype=dtype, device=generator.device, generator=generator).to(device)

    def test_columns(self, shape: Sequence[int]) -> int | None:
        rank = self.fixed_rank(shape)
        assert rank is not None
        columns = rank + self.oversample
        return columns if 2 * columns < min(shape) else None


def check_rule(
    rank: int | str | None,
    energy: float | None,
    residual_density: float,
    oversample: int = 16,
    n_iter: int = 2,
    generator: torch.Generator | None = None,
    batch_bytes: int | None = None,
) -> Rule:
    if (rank is None) == (energy is None):
        raise ValueError(f"exactly one of rank and energy is needed, got rank={rank}, energy={energy}")
    if isinstance(rank, str):
        if rank != GAVISH_DONOHO:
            raise ValueError(f"rank must be an int or {GAVISH_DONOHO!r}, got {rank!r}")
    elif rank is not None:
        check_int(rank, "rank", 1)
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    if not (is_number(residual_density) and 0 <= residual_density <= 1):
        raise ValueError(f"residual_density must be in [0, 1], got {residual_density}")
    check_int(oversample, "oversample", 0)
    check_int(n_iter, "n_iter", 0)
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if batch_bytes is not None:
        check_int(batch_bytes, "batch_bytes", 1)
    return Rule(rank, energy, float(residual_density), oversample, n_iter, generator, batch_bytes)


@functools.cache
def gavish_donoho_multiple(m: int, n: int) -> float:
    """The optimal hard threshold for unknown noise, in median singular values (Gavish & Donoho 2014, eqs. 11 and 4)."""
    beta = min(m, n) / max(m, n)
    threshold = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    # mu_beta is the median of the squared singular values: the median of the singular values is its root.
    return threshold / math.sqrt(_marchenko_pastur_median(beta))


def _marchenko_pastur_median(beta: float) -> float:
    """The median of the Marchenko-Pastur law of aspect ratio beta, from its distribution function."""
    lower, upper = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # t = lower + (upper - lower) sin^2(u) takes the square-root ends out of the integrand.
    u = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64, device="cpu")
    s2, c2 = torch.sin(u) ** 2, torch.cos(u) ** 2
    t = lower + (upper - lower) * s2
    density = (upper - lower) ** 2 * s2 * c2 / (math.pi * beta * t)
    density[0] = density[1] if lower == 0 else density[0]
    mass = torch.cumulative_trapezoid(density, u)
    return float(t[1:][torch.searchsorted(mass, mass[-1] / 2)])
