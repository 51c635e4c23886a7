"""The standard sizes of workloads, name of a tensor → shape, and random tensors of these shapes."""

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def _layers(count: int, width: int, inner: int) -> Shapes:
    shapes: Shapes = {}
    for i in range(count):
        shapes |= {f"{i}.{n}": (width, width) for n in ("query", "key", "value", "output")}
        shapes |= {f"{i}.up": (inner, width), f"{i}.down": (width, inner)}
    return shapes


def tiny() -> Shapes:
    """For tests: every kind of tensor, small."""
    return {"embedding": (200, 96), "bias": (97,), **_layers(1, 96, 160)}


def minilm() -> Shapes:
    """MiniLM's matrices, 22 M elements."""
    return {"embedding": (30522, 384)} | _layers(6, 384, 1536)


def squares(count: int) -> Shapes:
    return {f"{i:02}": (1000, 1000) for i in range(count)}


def bert() -> Shapes:
    """BERT base, 109 M elements: matrices and embeddings."""
    return {"embedding": (30522, 768), "positions": (512, 768), "types": (2, 768)} | _layers(12, 768, 3072)


def xlmr() -> Shapes:
    """XLM-R base, 277 M elements: matrices, embeddings, biases and layer norms."""
    shapes: Shapes = {"embedding": (250002, 768), "positions": (514, 768), "types": (1, 768)} | _layers(12, 768, 3072)
    shapes |= {f"{n}.bias": (s[0],) for n, s in _layers(12, 768, 3072).items()}
    norms = ["norm", *(f"{i}.{n}" for i in range(12) for n in ("attention_norm", "norm"))]
    return shapes | {f"{n}.{part}": (768,) for n in norms for part in ("weight", "bias")}


def llama1b() -> Shapes:
    """Llama 3.2 1B, 1.24 billion elements: linear layers with grouped keys and values, and the tied embedding."""
    shapes: Shapes = {"embedding": (128256, 2048)}
    for i in range(16):
        shapes |= {f"{i}.{n}": (2048, 2048) for n in ("query", "output")}
        shapes |= {f"{i}.{n}": (512, 2048) for n in ("key", "value")}
        shapes |= {f"{i}.{n}": (8192, 2048) for n in ("gate", "up")} | {f"{i}.down": (2048, 8192)}
    return shapes


def llama7b() -> Shapes:
    """The 224 linear layers of Llama 7B, 6.48 billion elements."""
    return _layers(32, 4096, 11008) | {f"{i}.gate": (11008, 4096) for i in range(32)}


SIZES = {"tiny": tiny, "10M": partial(squares, 10), "minilm": minilm, "50M": partial(squares, 50)}
SIZES |= {"bert": bert, "xlmr": xlmr, "llama1b": llama1b, "llama7b": llama7b}


def numel(size: str) -> int:
    return sum(math.prod(shape) for shape in SIZES[size]().values())


def random_tensors(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor]:
    """Normally distributed, ascending by name; equal arguments give equal tensors."""
    generator = torch.Generator(device).manual_seed(seed)
    return {n: torch.randn(s, generator=generator, device=device).to(dtype) for n, s in sorted(shapes.items())}


def copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in tensors.items()}


def token_ids(count: int, vocabulary: int, generator: torch.Generator) -> Tensor:  # int64 [count]
    """Ids with the frequencies of words (Zipf's law: the n-th about 1/n as often as the first), no special tokens."""
    return (vocabulary ** torch.rand(count, generator=generator, dtype=torch.float64)).long().clamp(5, vocabulary - 1)
