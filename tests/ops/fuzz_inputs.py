"""Valid arguments of every operator, small and random: what test_op_fuzz.py begins with."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.ops import reference, schemas

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Maker:
    """Random tensors and masks of a few entries."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.generator = torch.Generator().manual_seed(rng.getrandbits(32))

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype)

    def whole(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """-2 ... 2: sums of products of few of them are exact in every order."""
        return torch.randint(-2, 3, shape, generator=self.generator).to(dtype)

    def size(self, least: int = 1, most: int = 9) -> int:
        return self.rng.randint(least, most)

    def shapes(self) -> list[tuple[int, ...]]:
        def one() -> tuple[int, ...]:
            size, large = self.size, self.rng.randint(20, 70)
            return self.rng.choice([(size(), size()), (size(),), (), (size(), 2, 3), (0, 4), (large, 90 - large)])

        return [one() for _ in range(self.size(1, 5))]

    def mask(self, shapes: list[tuple[int, ...]], density: float = 0.4) -> tuple[Tensor, Tensor]:
        chosen = [torch.rand(s, generator=self.generator) < density for s in shapes]
        crow, col = reference.dense_to_csr(chosen)
        return crow, col.to(torch.int32) if self.rng.random() < 0.3 else col

    def tensors(self, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
        shapes = self.shapes()
        return [self.floats(*s, dtype=dtype) for s in shapes], *self.mask(shapes)

    def dtype(self) -> torch.dtype:
        return self.rng.choice(FLOATS)

    def factors(self) -> list[Tensor]:
        b, m, n, r = self.size(0, 3), self.size(), self.size(), self.size()
        dtype = self.rng.choice([torch.float32, torch.float32, torch.float64])
        return [self.whole(b, m, n, dtype=dtype), self.whole(b, m, r, dtype=dtype), self.whole(b, n, r, dtype=dtype)]


def _csr(make: Maker, values: bool = True) -> list[Any]:
    tensors, crow, col = make.tensors(make.dtype())
    return [tensors, crow, col, *([make.floats(len(col), dtype=tensors[0].dtype)] if values else [])]


def _add(make: Maker) -> list[Any]:
    csr = _csr(make)
    return [*csr, 0.5, torch.zeros_like(csr[3]), torch.tensor(False)]


def _combine(make: Maker) -> list[Any]:
    shapes = make.shapes()
    crow, col = make.mask(shapes)
    other_crow, other_col = make.mask(shapes)
    return [crow, col, other_crow, other_col.to(col.dtype), make.rng.choice([*schemas.OPERATIONS.values()])]


def _sum(make: Maker) -> list[Any]:
    crow, col, other_crow, other_col, _ = _combine(make)
    values = [make.floats(len(c), dtype=make.dtype()) for c in (col, other_col)]
    options = [0.5, -2.0], make.rng.choice([*schemas.ELECTIONS.values()]), make.rng.choice(FLOATS[:2])
    return [crow, col, [crow, other_crow], [col, other_col], values, *options]


def _topk(make: Maker) -> list[Any]:
    scores = [make.floats(*s, dtype=make.dtype()) for s in make.shapes()]
    base = [make.floats(*s.shape, dtype=make.dtype()) for s in scores] if make.rng.random() < 0.3 else []
    scope = make.rng.choice([*schemas.SCOPES])
    tables = [schemas.rows_and_columns(s.shape) for s in scores]
    most = {
        "global": [sum(s.numel() for s in scores)],
        "tensor": [r * c for r, c in tables],
        "row": [c for _, c in tables],
    }
    return [scores, base, [make.rng.randint(0, n) for n in most[scope]], schemas.SCOPES[scope]]


def _threshold(make: Maker) -> list[Any]:
    dtype = make.dtype()
    scores = [make.whole(*s, dtype=dtype) for s in make.shapes()]
    return [scores, _bits(1.0, dtype), [make.rng.randint(0, min(5, s.numel())) for s in scores]]


def _histogram(make: Maker) -> list[Any]:
    dtype = make.dtype()
    shift = 16 * make.rng.randrange(dtype.itemsize // 2)
    return [[make.whole(*s, dtype=dtype) for s in make.shapes()], 0 if shift else _bits(1.0, dtype) >> 16, shift]


def _symmetric(make: Maker) -> list[Any]:
    b, n = make.size(0, 3), make.size(0, 12)
    a = make.floats(b, n, n, dtype=make.rng.choice(FLOATS[:2]))
    return [a + a.mT]


def _cut(make: Maker, *more: Any) -> list[Any]:
    delta, left, right = make.factors()
    cut = torch.tensor([[_bits(1.0, delta.dtype), make.size(0, 20)] for _ in delta], dtype=torch.int64).view(-1, 2)
    return [delta, left, right, cut]


def _residual(make: Maker) -> list[Any]:
    delta, left, right = make.factors()
    return [delta, left, right, make.rng.randint(0, delta.shape[1] * delta.shape[2])]


def _adamw(make: Maker) -> list[Any]:
    dtype = make.dtype()
    compute = schemas.compute_dtype(dtype)
    params, crow, col = make.tensors(dtype)
    nnz = len(col)
    if make.rng.random() < 0.3:  # every element is an entry
        crow, col = torch.tensor([0, *(p.numel() for p in params)]).cumsum(0), None
        nnz = int(crow[-1])
    compact = make.rng.random() < 0.5
    state = compute if dtype == torch.float64 or make.rng.random() < 0.7 else torch.bfloat16

    def maybe(value: Any) -> Any:
        return value if make.rng.random() < 0.3 else None

    grads = [make.floats(nnz, dtype=dtype)] if compact else [make.floats(*p.shape, dtype=dtype) for p in params]
    moments = [make.floats(nnz, dtype=state), make.floats(nnz, dtype=state).abs() + 0.1]
    values, decay_to = maybe(make.floats(nnz, dtype=compute)), maybe(make.floats(nnz, dtype=compute))
    tensors = [params, grads, compact, *moments, values, crow, col, torch.tensor(3.0), torch.tensor(0.01)]
    numbers = [0.9, 0.999, 1e-8, 0.01, decay_to, 0.0, False]
    more = maybe(torch.tensor(2.0)), maybe(torch.tensor(0.0)), maybe(7)
    return list(schemas.AdamWArgs(*tensors, *numbers, *more, maybe(torch.zeros(-(-nnz // 32), dtype=torch.int32))))


def _split(make: Maker) -> list[Any]:
    shape = *make.rng.choice([(), (0,), (2,)]), make.size(), make.size()
    x = [make.floats(*shape) for _ in range(make.size(1, 4))]
    slots = [make.rng.choice([[], [0, 1], [1, 0, 0], [2]]) for _ in range(2)]
    slots = slots if any(slots) else [[0], [0, 1]]
    outs = [torch.cat([torch.stack(x)] * len(s), dim).bfloat16() if s else None for s, dim in zip(slots, (-1, -2))]
    return [x, outs[0], slots[0], outs[1], slots[1]]


def _linear(make: Maker) -> list[Any]:
    tokens, m, n = make.size(0, 12), make.size(1, 40), make.size(1, 40)
    wide = make.rng.random() < 0.3
    inputs = [make.floats(tokens, s, dtype=torch.float64 if wide else torch.float32) for s in (m, n)]
    return [*inputs, *make.mask([(m, n)], make.rng.choice([0.1, 0.9])), torch.float64 if wide else torch.float32]


def _embedding(make: Maker) -> list[Any]:
    tokens, d, vocabulary = make.rng.choice([0, 3, 20, 200]), make.size(), make.size()
    indices = torch.randint(0, vocabulary, (tokens,), generator=make.generator)
    indices = indices.to(make.rng.choice([torch.int32, torch.int64]))
    mask, padding_idx = make.mask([(vocabulary, d)], 0.6), make.rng.choice([-1, 0, 1])
    return [make.floats(tokens, d), indices, *mask, padding_idx, torch.float32]


def _diff(make: Maker) -> list[Any]:
    dtype = make.rng.choice([*FLOATS, torch.bool, torch.uint8, torch.float8_e4m3fn, torch.int64])
    shapes = make.shapes()
    return [[make.whole(*s, dtype=dtype) for s in shapes] for _ in range(2)]


def _exchange(make: Maker) -> list[Any]:
    new, old = _diff(make)
    return [old, *reference.bit_diff(new, old)]


def _change(make: Maker) -> list[Any]:
    _, offsets, indices, values = _exchange(make)
    return [offsets, indices, torch.zeros_like(values), values]


def _marks(make: Maker) -> list[Any]:
    words = make.size(0, 40)
    starts = sorted(make.rng.randint(0, 32 * words) for _ in range(make.rng.randint(1, 6)))
    return [torch.randint(-(2**31), 2**31, (words,), generator=make.generator).to(torch.int32), torch.tensor(starts)]


def _bits(magnitude: float, dtype: torch.dtype) -> int:
    return int(reference.magnitude_bits(torch.tensor([magnitude], dtype=dtype)))


VALID: dict[str, Callable[[Maker], list[Any]]] = {
    "csr_gather": lambda make: _csr(make, values=False),
    "csr_scatter_": _csr,
    "csr_add_": _add,
    "csr_restore_": lambda make: [*(csr := _csr(make))[:3], csr[3].clone(), csr[3], 0.5],
    "csr_combine": _combine,
    "csr_sum": _sum,
    "dense_to_csr": lambda make: [[make.floats(*s) > 0.3 for s in make.shapes()]],
    "topk_mask": _topk,
    "magnitude_histogram": _histogram,
    "threshold_mask": _threshold,
    "eigh": lambda make: [*_symmetric(make), 0, 0.0, 0.0],
    "eigvalsh": _symmetric,
    "residual_cut": _residual,
    "low_rank_denoised": _cut,
    "split_bf16_": _split,
    "sparse_adamw_": _adamw,
    "csr_square_sum": lambda make: _csr(make, values=False),
    "masked_linear_grad": _linear,
    "masked_embedding_grad": _embedding,
    "bit_diff": _diff,
    "flat_exchange_": _exchange,
    "bit_checksum": lambda make: _diff(make)[:1],
    "bit_checksum_change": _change,
    "set_bits": _marks,
}
