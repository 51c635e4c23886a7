"""Float64 references of `truncated_svd` and `svd_denoise` by numpy, and matrices of known spectra."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deftx_kernels.denoise.rule import gavish_donoho_multiple

# (i, n) -> singular values of the indices i = 0 ... n - 1; None: Gaussian noise
SPECTRA = {
    "noise": None,
    "low rank and noise": lambda i, n: torch.where(i < 12, 3.0 / (1 + 0.2 * i), 1 - 0.9 * i / n),
    "slow power": lambda i, n: (1.0 + i) ** -0.25,
    "power": lambda i, n: 1 / (1.0 + i),
    "exponential": lambda i, n: 0.95**i,
    "steep": lambda i, n: 0.6**i,
    "step at the rank": lambda i, n: torch.where(i < 24, 1.3, 1.0),
    "steps": lambda i, n: torch.where(i < 20, 1.5, torch.where(i < 60, 1.2, 1.0)),
    "linear": lambda i, n: 1 - 0.99 * i / n,
    "clusters": lambda i, n: torch.where(i < n // 2, 1.0, 0.5),
    "flat": lambda i, n: torch.ones_like(i),
    "deficient": lambda i, n: torch.where(i < 30, 1.0 / (1 + i), 0.0),
}
SMALL_SPECTRA = {
    "flat": SPECTRA["flat"],
    "decaying": lambda i, n: 0.7**i,
    "clustered": lambda i, n: torch.where(i < n // 2, 1.0, 0.1) + 1e-6 * i,
    "low rank": lambda i, n: torch.where(i < max(1, n // 4), 1.0 / (1 + i), 0.0),
    "low rank and noise, small": lambda i, n: torch.where(i < max(1, n // 4), 1.0 / (1 + i), 0.01),
    "zero": lambda i, n: torch.zeros_like(i),
}
SHAPES = [(160, 160), (400, 150), (130, 390), (300, 300)]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_singular_values(shape: tuple[int, int], values: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    left, right = (torch.linalg.qr(torch.randn(d, size, generator=generator, dtype=torch.float64)).Q for d in shape)
    return (left * values.double()) @ right.mT


def matrix(shape: tuple[int, int], spectrum: str, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = {**SMALL_SPECTRA, **SPECTRA}[spectrum]
    if values is None:
        return noise(*shape, seed=seed, dtype=dtype)
    i = torch.arange(min(shape), dtype=torch.float64)
    tilt = 1 if spectrum in SMALL_SPECTRA else 1 - 1e-4 * i / len(i)  # no two of the others are equal
    return with_singular_values(shape, values(i, len(i)) * tilt, seed).to(dtype)


def svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [m, n] -> float64 U, S, Vh
    U, S, Vh = np.linalg.svd(a.double().numpy(), full_matrices=False)
    return torch.from_numpy(U), torch.from_numpy(S), torch.from_numpy(Vh)


def distance(a: Tensor, b: Tensor) -> float:
    """The Frobenius norm of a - b."""
    return float(torch.linalg.vector_norm(a.double() - b.double()))


class Denoised(NamedTuple):
    result: Tensor  # float64 [m, n]
    rank: int
    energy: float
    residual: float


def svd_denoise(
    a: Tensor,  # [m, n]
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    residual_density: float = 0.0,
) -> Denoised:
    U, S, Vh = svd(a)
    # Singular values below the rounding error of the largest one count as zero.
    S = torch.where(S[0] * max(a.shape) * torch.finfo(torch.float64).eps < S, S, 0.0)
    shares = S.square().cumsum(0) / S.square().sum()
    if isinstance(rank, int):
        r = min(rank, *a.shape)
    elif S[0] == 0:
        r = 0
    elif rank is not None:
        r = int((gavish_donoho_multiple(*a.shape) * torch.quantile(S, 0.5) < S).sum())
    else:
        r = int((shares < energy * (1 - 1e-12)).sum()) + 1
    exact = a.double()
    result = (U[:, :r] * S[:r]) @ Vh[:r]
    index = (exact - result).abs().view(-1).topk(round(residual_density * a.numel())).indices
    result.view(-1)[index] = exact.reshape(-1)[index]
    norm = float(exact.norm())
    share = 1.0 if norm == 0 else float(shares[r - 1]) if r else 0.0
    return Denoised(result, r, share, distance(exact, result) / norm if norm else 0.0)


def assert_near_optimal(a: Tensor, result: Tensor, rank: int, rounding: float = 3e-6) -> None:
    """The residual is within 1.02 times that of the best matrix of this rank."""
    _, S, _ = svd(a)
    assert distance(a, result) <= 1.02 * math.sqrt(float(S[rank:].square().sum())) + rounding * float(S.norm())


def assert_exact_truncation(a: Tensor, result: Tensor, info: dict[str, Tensor], energy: float) -> None:
    want = svd_denoise(a, energy=energy)
    assert int(info["rank"]) == want.rank
    assert distance(result, want.result) <= 5e-5 * float(want.result.norm())
    assert abs(float(info["energy"]) - want.energy) <= 2e-6
