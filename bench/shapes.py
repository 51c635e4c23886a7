"""The standard sizes of workloads, name of a tensor → shape, and random tensors of these shapes."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def _layers(count: int, width: int, inner: int, key_width: int = 0, gate: bool = False) -> Shapes:
    shapes: Shapes = {}
    for i in range(count):
        shapes |= {f"{i}.{n}": (width, width) for n in ("query", "output")}
        shapes |= {f"{i}.{n}": (key_width or width, width) for n in ("key", "value")}
        shapes |= {f"{i}.up": (inner, width), f"{i}.down": (width, inner)}
        shapes |= {f"{i}.gate": (inner, width)} if gate else {}
    return shapes


def _xlmr_layers() -> Shapes:
    matrices = _layers(12, 768, 3072)
    norms = ["norm", *(f"{i}.{n}" for i in range(12) for n in ("attention_norm", "norm"))]
    vectors = {f"{n}.{part}": (768,) for n in norms for part in ("weight", "bias")}
    return matrices | {f"{n}.bias": (s[0],) for n, s in matrices.items()} | vectors


# Matrices and embeddings; of XLM-R also biases and norms, of Llama 7B the linear layers alone.
SHAPES: dict[str, Shapes] = {
    "tiny": {"embedding": (200, 96), "bias": (97,)} | _layers(1, 96, 160),  # every kind of tensor, for tests
    "10M": {f"{i:02}": (1000, 1000) for i in range(10)},
    "minilm": {"embedding": (30522, 384)} | _layers(6, 384, 1536),  # 22 M elements
    "50M": {f"{i:02}": (1000, 1000) for i in range(50)},
    "512M": {f"{i:02}": (8000, 8000) for i in range(8)},  # 1 GB of bfloat16
    "bert": {"embedding": (30522, 768), "positions": (512, 768), "types": (2, 768)} | _layers(12, 768, 3072),  # 109 M
    "xlmr": {"embedding": (250002, 768), "positions": (514, 768), "types": (1, 768)} | _xlmr_layers(),  # 277 M
    # Llama 3.2, 1.24 billion
    "llama1b": {"embedding": (128256, 2048)} | _layers(16, 2048, 8192, key_width=512, gate=True),
    "llama7b": _layers(32, 4096, 11008, gate=True),  # 6.48 billion
}


def numel(size: str) -> int:
    return sum(map(math.prod, SHAPES[size].values()))


def random_tensors(
    shapes: str | Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor]:
    """Normally distributed, of a size or of shapes, ascending by name; equal arguments give equal tensors."""
    generator = torch.Generator(device).manual_seed(seed)
    named = SHAPES[shapes] if isinstance(shapes, str) else shapes
    return {n: torch.randn(s, generator=generator, device=device).to(dtype) for n, s in sorted(named.items())}


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in tensors.items()}


def token_ids(count: int, vocabulary: int, generator: torch.Generator) -> Tensor:  # int64 [count]
    """Ids with the frequencies of words (Zipf's law: the n-th about 1/n as often as the first), no special tokens."""
    return (vocabulary ** torch.rand(count, generator=generator, dtype=torch.float64)).long().clamp(5, vocabulary - 1)
