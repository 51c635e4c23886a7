"""Inputs of threads_worker.py, at sizes of real layers. Random numbers and elementwise arithmetic alone: their bits
depend neither on the number of threads nor on a matrix product.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from deftx_kernels import CSRMask

VOCABULARY = (250_002, 768)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


@functools.cache
def layers() -> dict[str, Tensor]:
    """27 million entries in layers of real shapes, a bias and a scalar."""
    shapes = {
        "attention": (768, 768),
        "bias": (3072,),
        "down": (768, 3072),
        "large": (1024, 1024),
        "mlp": (4096, 4096),
        "scale": (),
        "up": (3072, 768),
    }
    return {name: randn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


@functools.cache
def other_layers() -> dict[str, Tensor]:
    return {name: tensor.flip(0) if tensor.dim() else tensor + 1 for name, tensor in layers().items()}


@functools.cache
def embedding() -> Tensor:
    """[250,002, 768]: one block of random rows again and again, each row with its own factor."""
    rows, columns = VOCABULARY
    block, table = randn(8192, columns, seed=50), torch.empty(rows, columns)
    factor = 1 + torch.arange(rows, dtype=torch.float32)[:, None] / rows
    for part, by in zip(table.split(8192), factor.split(8192)):
        torch.mul(block[: len(part)], by, out=part)
    return table


def pattern(shape: torch.Size, density: float, seed: int) -> np.ndarray:
    """bool, with rows that are empty, full and between; by NumPy, on one thread."""
    rows, columns = (1, int(np.prod(shape))) if len(shape) < 2 else shape
    some = min(rows, 4096)
    generator = np.random.default_rng(seed)
    # of a tenth of the rows 8 times as many entries
    share = density * np.where(generator.random((some, 1)) < 0.1, 8, 0.2)
    share[generator.random((some, 1)) < 0.01] = 0
    return np.resize(generator.random((some, columns), dtype=np.float32) < share, (rows, columns)).reshape(shape)


@functools.cache
def patterns(density: float = 0.05, seed: int = 0) -> dict[str, Tensor]:
    return {n: torch.from_numpy(pattern(t.shape, density, seed + i)) for i, (n, t) in enumerate(layers().items())}


def csr(dense: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices (uint16), by NumPy."""
    matrices = [d.reshape(-1, d.shape[-1]) if d.ndim > 1 else d.reshape(1, -1) for d in dense]
    counts = np.concatenate([m.sum(1) for m in matrices])
    columns = np.concatenate([m.nonzero()[1] for m in matrices]).astype(np.uint16)
    return torch.from_numpy(np.concatenate([[0], counts.cumsum()])), torch.from_numpy(columns)


@functools.cache
def mask(seed: int = 0) -> CSRMask:
    """5 % of the layers."""
    dense = patterns(seed=seed)
    return CSRMask(list(dense), [t.shape for t in dense.values()], *csr([t.numpy() for t in dense.values()]))


@functools.cache
def vocabulary_mask() -> CSRMask:
    """1 % of the embedding."""
    return CSRMask(["table"], [VOCABULARY], *csr([pattern(torch.Size(VOCABULARY), 0.01, 70)]))


def one_mask(rows: int, columns: int, density: float) -> CSRMask:
    return CSRMask(["w"], [(rows, columns)], *csr([pattern(torch.Size((rows, columns)), density, 80)]))


def compact(nnz: int, seed: int) -> Tensor:
    return randn(nnz, seed=seed)


def low_rank(m: int, n: int, seed: int, rank: int = 32) -> Tensor:
    """Noise and `rank` columns that are 30 times as large: a gap after `rank` singular values."""
    a = randn(m, n, seed=seed)
    a[:, :rank] *= 30
    return a


def smooth(m: int, n: int, seed: int) -> Tensor:
    """Singular values that fall steadily, without a gap."""
    return randn(m, n, seed=seed) / (1 + torch.arange(n, dtype=torch.float32) / 50)


@functools.cache
def matrices() -> dict[str, Tensor]:
    """What is denoised. Of each short side several, so that a batch of them is shared by the threads."""
    found = {f"low rank {i}, 768x768": low_rank(768, 768, 100 + i) for i in range(3)}
    found["smooth, 768x768"] = smooth(768, 768, 110)
    found |= {
        "low rank, 3072x768": low_rank(3072, 768, 120),
        "low rank, 768x3072": low_rank(3072, 768, 121).mT.contiguous(),
    }
    return found | {f"low rank {i}, 1024x1024": low_rank(1024, 1024, 130 + i) for i in range(2)}


@functools.cache
def slow_matrices() -> dict[str, Tensor]:
    return {f"low rank {i}, 3072x3072": low_rank(3072, 3072, 140 + i) for i in range(2)}


@functools.cache
def slow_symmetric() -> Tensor:
    return symmetric(2, 4096, seed=160)


def slow_table() -> Tensor:
    """The embedding with a gap after 32 singular values."""
    table = embedding().clone()
    table[:, :32] *= 30
    return table


def symmetric(count: int, n: int, seed: int) -> Tensor:
    """Every second one has eigenvalues of many sizes."""
    a = randn(count, n, n, seed=seed)
    a = a + a.mT
    scale = 1 / (1 + torch.arange(n, dtype=torch.float32) / 8)
    a[1::2] *= scale[:, None] * scale
    return a


@functools.cache
def symmetric_matrices() -> dict[str, Tensor]:
    return {"768": symmetric(3, 768, seed=150), "1024": symmetric(2, 1024, seed=151)}


@functools.cache
def factors() -> tuple[Tensor, Tensor, Tensor]:
    """delta [2, 768, 3072] and factors of -1, 0 and 1: products and residuals are exact in every order of summation."""
    left, right = (torch.randint(-1, 2, (2, size, 8), generator=seeded(170 + size)).float() for size in (768, 3072))
    noise = torch.tensor([0, 0.25, -0.25, 1, 4])[torch.randint(0, 5, (2, 768, 3072), generator=seeded(172))]
    return torch.einsum("bmr,bnr->bmn", left, right) + noise, left, right


@functools.cache
def tokens(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """grad_output [1024, rows] and input [1024, columns]."""
    return randn(1024, rows, seed=180).to(dtype), randn(1024, columns, seed=181).to(dtype)


@functools.cache
def ids() -> Tensor:
    return torch.randint(0, VOCABULARY[0], (8, 512), generator=seeded(190)) ** 2 % VOCABULARY[0]
