"""svd_denoise and truncated_svd against torch.linalg.svd and torch.svd_lowrank."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.harness import OURS, Case
from bench.shapes import SIZES as SHAPES
from bench.shapes import random_tensors
from deftx_kernels import svd_denoise, truncated_svd

SIZES = ("tiny", "minilm")
OVERSAMPLE, POWER_STEPS = 16, 2


def cases(device: str, quick: bool, sizes: tuple[str, ...]) -> Iterator[Case]:
    for size in sizes:
        layers = 1 if quick or size == "tiny" else 6
        shapes = {n: s for n, s in SHAPES[size]().items() if n[0].isdigit() and int(n.partition(".")[0]) < layers}
        matrices = {n: low_rank_plus_noise(t) for n, t in random_tensors(shapes, torch.float32, device).items()}
        label = f"{size} linears x{layers}"
        yield denoise_case(label, matrices, rank=64)
        yield denoise_case(label, matrices, energy=0.9)
        square = torch.stack([t for t in matrices.values() if t.shape[0] == t.shape[1]])
        yield truncated_case(square, rank=64)


def low_rank_plus_noise(noise: Tensor, rank: int = 32) -> Tensor:
    m, n = noise.shape
    left, right = noise[:, :rank], noise[:rank]
    return left @ right * 2 / (m * n) ** 0.25 + noise


def randomized_flops(matrices: Tensor, rank: int) -> float:  # [..., m, n]
    return 2.0 * matrices.numel() * (rank + OVERSAMPLE) * (2 * POWER_STEPS + 2)


def denoise_case(label: str, matrices: dict[str, Tensor], rank: int | None = None, energy: float | None = None) -> Case:
    exact = {n: truncated(m.double(), rank, energy) for n, m in matrices.items()}

    def full() -> dict[str, Tensor]:
        return {n: truncated(m, rank, energy) for n, m in matrices.items()}

    def lowrank() -> dict[str, Tensor]:
        found = {}
        for name, m in matrices.items():
            u, s, v = torch.svd_lowrank(m, q=rank + OVERSAMPLE, niter=POWER_STEPS)
            found[name] = (u[:, :rank] * s[:rank]) @ v[:, :rank].mT
        return found

    def check(result: dict[str, Tensor]) -> str | None:
        for name, best in exact.items():
            delta = matrices[name].double()
            error = float((result[name].double() - best).norm() / best.norm())
            residual = float((delta - result[name].double()).norm() / (delta - best).norm())
            if energy is not None and not error <= 5e-5:
                return f"{name}: {error:.1e} from the exact truncation, at most 5e-5 is right"
            if rank is not None and not residual <= 1.02:
                return f"{name}: residual {residual:.3f} times that of the best rank-{rank} matrix, at most 1.02 is right"
        return None

    providers = {
        OURS: lambda: lambda: svd_denoise(matrices, rank=rank, energy=energy, oversample=OVERSAMPLE, n_iter=POWER_STEPS),
        "torch.linalg.svd": lambda: full,
    }
    if rank is not None:
        providers["torch.svd_lowrank"] = lambda: lowrank
    numel = sum(m.numel() for m in matrices.values())
    # With a rank, the products of the randomised method; with an energy, those of a Gram matrix and a projection.
    flops = sum(randomized_flops(m, rank) if rank else 4.0 * m.numel() * min(m.shape) for m in matrices.values())
    size = f"{label}, " + (f"rank {rank}" if rank else f"energy {energy}")
    return Case("svd_denoise", size, torch.float32, None, 8 * numel, providers, check, flops=flops, rounds=3)


def truncated(matrix: Tensor, rank: int | None, energy: float | None) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    if rank is None:
        share = s.double().square().cumsum(0) / s.double().square().sum()
        rank = int((share < energy).sum()) + 1
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def truncated_case(batch: Tensor, rank: int) -> Case:  # [b, m, n]
    best = torch.linalg.svdvals(batch.double())[:, rank:].norm(dim=1)

    def lowrank() -> tuple[Tensor, Tensor, Tensor]:
        each = [torch.svd_lowrank(m, q=rank + OVERSAMPLE, niter=POWER_STEPS) for m in batch]
        u, s, v = (torch.stack(x) for x in zip(*each))
        return u[..., :rank], s[..., :rank], v[..., :rank].mT

    def full() -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(batch, full_matrices=False)
        return u[..., :rank], s[..., :rank], vh[..., :rank, :]

    def check(result: tuple[Tensor, Tensor, Tensor]) -> str | None:
        u, s, vh = (x.double() for x in result)
        residual = float(((batch.double() - (u * s[..., None, :]) @ vh).norm(dim=(1, 2)) / best).max())
        return None if residual <= 1.02 else f"residual {residual:.3f} times that of the best rank {rank}, at most 1.02 is right"

    providers = {
        OURS: lambda: lambda: truncated_svd(batch, rank, oversample=OVERSAMPLE, n_iter=POWER_STEPS),
        "torch.svd_lowrank": lambda: lowrank,
        "torch.linalg.svd": lambda: full,
    }
    size = f"{len(batch)}x{batch.shape[1]}x{batch.shape[2]}, rank {rank}"
    flops = randomized_flops(batch, rank)
    moved = 4 * (batch.numel() + batch.shape[0] * rank * (batch.shape[1] + batch.shape[2] + 1))
    return Case("truncated_svd", size, torch.float32, None, moved, providers, check, flops=flops, rounds=5)
