"""svd_denoise and truncated_svd against torch.linalg.svd and torch.svd_lowrank."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bench.harness import OURS, Case
from bench.shapes import SIZES as SHAPES
from bench.shapes import random_tensors
from deftx_kernels import CSRMask, select_mask, svd_denoise, truncated_svd

SIZES = ("tiny", "minilm", "xlmr")
OVERSAMPLE, POWER_STEPS = 16, 2
RULES: tuple[dict[str, Any], ...] = ({"rank": 64}, {"energy": 0.9})
SELECTED = 0.0276  # LT-SFT's share of XLM-R base for a language


def cases(device: str, quick: bool, sizes: tuple[str, ...]) -> Iterator[Case]:
    for size in sizes:
        layers = {"tiny": 1, "minilm": 1 if quick else 6, "xlmr": 1 if quick else 12}[size]
        for rule in RULES:
            yield linears_case(device, size, layers, rule)
        if size != "xlmr":
            yield truncated_case(torch.stack([t for t in linears(device, size, layers).values() if t.shape[0] == t.shape[1]]), 64)
        if size == "tiny" or not quick:
            for rule in RULES:
                yield whole_case(device, size, rule)
                yield selection_case(device, size, rule)


def linears(device: str, size: str, layers: int) -> dict[str, Tensor]:
    """The linear layers' matrices: low rank and noise."""
    shapes = {n: s for n, s in SHAPES[size]().items() if len(s) == 2 and n[0].isdigit() and int(n.partition(".")[0]) < layers}
    return {n: low_rank_plus_noise(t) for n, t in random_tensors(shapes, torch.float32, device).items()}


def low_rank_plus_noise(noise: Tensor, rank: int = 32) -> Tensor:
    m, n = noise.shape
    left, right = noise[:, :rank], noise[:rank]
    return left @ right * 2 / (m * n) ** 0.25 + noise


def denoised(matrices: dict[str, Tensor], rule: dict[str, Any]) -> dict[str, Tensor]:
    return svd_denoise(matrices, oversample=OVERSAMPLE, n_iter=POWER_STEPS, **rule)


def flops(m: Tensor, rule: dict[str, Any]) -> float:
    """With a rank, the products of the randomised method; with an energy, those of a Gram matrix and a projection."""
    if rank := rule.get("rank"):
        return 2.0 * m.numel() * (rank + OVERSAMPLE) * (2 * POWER_STEPS + 2)
    return 4.0 * m.numel() * min(m.shape)


def label(rule: dict[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in rule.items())


def peers(matrices: dict[str, Tensor], rule: dict[str, Any]) -> dict[str, Callable[[], Callable[[], dict[str, Tensor]]]]:
    """One matrix after the other: the full SVD, and for a rank torch's randomised one."""

    def full() -> dict[str, Tensor]:
        return {n: truncated(m, rule) for n, m in matrices.items()}

    def lowrank() -> dict[str, Tensor]:
        found, rank = {}, rule["rank"]
        for name, m in matrices.items():
            u, s, v = torch.svd_lowrank(m, q=rank + OVERSAMPLE, niter=POWER_STEPS)
            found[name] = (u[:, :rank] * s[:rank]) @ v[:, :rank].mT
        return found

    return {"torch.linalg.svd": lambda: full} | ({"torch.svd_lowrank": lambda: lowrank} if "rank" in rule else {})


def linears_case(device: str, size: str, layers: int, rule: dict[str, Any]) -> Case:
    matrices = linears(device, size, layers)
    rank = rule.get("rank")
    exact = {n: truncated(m.double(), rule) for n, m in matrices.items()}

    def check(result: dict[str, Tensor]) -> str | None:
        for name, best in exact.items():
            delta = matrices[name].double()
            error = float((result[name].double() - best).norm() / best.norm())
            residual = float((delta - result[name].double()).norm() / (delta - best).norm())
            if not rank and not error <= 5e-5:
                return f"{name}: {error:.1e} from the exact truncation, at most 5e-5 is right"
            if rank and not residual <= 1.02:
                return f"{name}: residual {residual:.3f} times that of the best rank-{rank} matrix, at most 1.02 is right"
        return None

    providers = {OURS: lambda: lambda: denoised(matrices, rule), **peers(matrices, rule)}
    work = sum(flops(m, rule) for m in matrices.values())
    moved = 8 * sum(m.numel() for m in matrices.values())
    name = f"{size} linears x{layers}, {label(rule)}"
    return Case("svd_denoise", name, torch.float32, None, moved, providers, check, flops=work, rounds=5, backend_of="svd_denoise_")


def truncated(matrix: Tensor, rule: dict[str, Any]) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    if not (rank := rule.get("rank")):
        share = s.double().square().cumsum(0) / s.double().square().sum()
        rank = int((share < rule["energy"]).sum()) + 1
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def whole_case(device: str, size: str, rule: dict[str, Any]) -> Case:
    """The whole model's matrices, with its embedding."""
    delta = {n: t for n, t in random_tensors(SHAPES[size](), torch.float32, device).items() if t.dim() == 2}
    others = peers(delta, rule)

    def check(result: dict[str, Tensor]) -> str | None:
        """Of the embedding: the residual is orthogonal to the low-rank part, as that of a truncated SVD is."""
        low, whole = result["embedding"], delta["embedding"]
        inner = float((low.double() * (whole - low).double()).sum() / whole.double().square().sum())
        return None if abs(inner) < 1e-4 else f"the embedding's residual is not orthogonal to its low-rank part: {inner:.1e}"

    return Case(
        "svd_denoise", f"{size} with embedding, {label(rule)}", torch.float32, None, 8 * sum(m.numel() for m in delta.values()),
        {OURS: lambda: lambda: denoised(delta, rule), **others}, check, flops=sum(flops(m, rule) for m in delta.values()), rounds=3,
        once=tuple(others), backend_of="svd_denoise_", again=functools.partial(_again, whole_case, device, size, rule),
    )  # fmt: skip


def selection_case(device: str, size: str, rule: dict[str, Any]) -> Case:
    """DeFT-X's whole selection: differences, denoising, global top-k."""
    base = random_tensors(SHAPES[size](), torch.float32, device)
    tuned = {n: t + 0.01 * random_tensors({n: t.shape}, torch.float32, device, seed=1)[n] for n, t in base.items()}
    numel = sum(t.numel() for t in base.values())
    k = round(SELECTED * numel)

    def check(mask: CSRMask) -> str | None:
        return None if mask.nnz == k else f"{mask.nnz} entries in place of {k}"

    return Case(
        "select_mask", f"{size}, {label(rule)}", torch.float32, SELECTED, 8 * numel,
        {OURS: lambda: lambda: select_mask(tuned, base, k=k, **rule)}, check,
        flops=sum(flops(t, rule) for t in base.values() if t.dim() == 2), rounds=3, backend_of="svd_denoise_",
        again=functools.partial(_again, selection_case, device, size, rule),
    )  # fmt: skip


def _again(make: Callable[..., Case], device: str, usual: str, rule: dict[str, Any], size: str | None = None) -> Case:
    return make(device, size or usual, rule)


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
    moved = 4 * (batch.numel() + batch.shape[0] * rank * (batch.shape[1] + batch.shape[2] + 1))
    return Case("truncated_svd", size, torch.float32, None, moved, providers, check, flops=flops(batch, {"rank": rank}), rounds=5)
