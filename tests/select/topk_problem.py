"""Tensors, the oracle and the checks for the tests of topk_mask and its parts.

The oracle sorts: by -|x|, then by position. It knows nothing of bits, brackets or tiles.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from deftx_kernels.ops.schemas import SCOPES
from tests.operators import csr_of, matrix_shape

TILE = 4096  # elements of the CUDA kernels' unit of work; also the size up to which a tensor is its own sample


def own_ops(implementation):
    """own_ops(implementation).topk_mask(...): the implementation's op, or a skip where it has none of its own."""

    class Ops:
        device = implementation.device

        def __getattr__(self, op):
            if not implementation.can_run(op):
                pytest.skip(f"{implementation.name} has no {op} of its own")
            return getattr(implementation.ops, op)

    return Ops()


def kernels_of(implementation, call) -> str | None:
    """The names of the kernels that a call launches; None where they are not counted."""
    if implementation.name != "emulated":
        call()
        return None
    implementation.emulator.clear()
    call()
    return " ".join(launch.name for launch in implementation.emulator.launches)


# ---- data ----


VALUES = {
    "normal": lambda n, rng: rng.standard_normal(n),
    "few": lambda n, rng: (rng.standard_normal(n) * 2).round(),  # distinct magnitudes, both signs
    "equal": lambda n, rng: rng.choice([-1.5, 1.5], n),
    "zero": lambda n, rng: rng.choice([-0.0, 0.0], n),
    # of float16, bfloat16 and float32: multiples of the smallest one
    "subnormal": lambda n, rng: rng.integers(-9, 10, n) * float(rng.choice([2.0**-24, 2.0**-133, 2.0**-149])),
    "wide": lambda n, rng: np.exp2(rng.uniform(-14, 15, n)) * rng.choice([-1, 1], n),  # many exponents
}
KINDS = ["normal", "normal", "few", "equal", "zero", "subnormal", "wide"]


def tensor(shape, dtype, kind, rng, device="cpu", aligned=True) -> Tensor:
    n = int(np.prod(shape))
    flat = torch.zeros(n + (not aligned), dtype=dtype, device=device)[not aligned :]
    flat.copy_(torch.from_numpy(VALUES[kind](n, rng)))
    return flat.view(shape)


def tensors(shapes, dtypes, kind, rng, device="cpu", aligned=True) -> list[Tensor]:
    return [tensor(s, dtypes[i % len(dtypes)], kind, rng, device, aligned) for i, s in enumerate(shapes)]


def double(t: Tensor) -> np.ndarray:
    return t.detach().cpu().to(torch.float64).numpy().reshape(-1)


# ---- the oracle ----


def magnitudes(scores, base) -> list[np.ndarray]:
    if not base:
        return [np.abs(double(s)) for s in scores]
    real = np.float64 if any(t.dtype == torch.float64 for t in [*scores, *base]) else np.float32
    with np.errstate(all="ignore"):
        return [
            np.abs(double(s).astype(real) - double(b).astype(real)).astype(np.float64) for s, b in zip(scores, base)
        ]


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """bool like x."""
    chosen = np.zeros(x.shape, bool)
    chosen[np.lexsort((np.arange(len(x)), -x))[:k]] = True
    return chosen


def selected(scores, base, k, scope) -> list[np.ndarray]:
    """bool [rows, columns] for each tensor."""
    flat = magnitudes(scores, base)
    shapes = [matrix_shape(s.shape) for s in scores]
    if scope == "global":
        ends = np.cumsum([len(x) for x in flat])[:-1]
        return [m.reshape(s) for m, s in zip(np.split(largest(np.concatenate(flat), k[0]), ends), shapes)]
    if scope == "tensor":
        return [largest(x, n).reshape(s) for x, n, s in zip(flat, k, shapes)]
    return [
        np.array([largest(row, n) for row in x.reshape(s)], bool).reshape(s) if s[0] else np.zeros(s, bool)
        for x, n, s in zip(flat, k, shapes)
    ]


def check_csr(crow, col, masks, device):
    wide = any(m.shape[1] > 65_536 for m in masks)
    assert crow.dtype == torch.int64
    assert col.dtype == (torch.int32 if wide else torch.uint16)
    assert crow.device.type == col.device.type == device
    for found, expected in zip((crow, col), csr_of(masks)):
        np.testing.assert_array_equal(found.cpu().numpy(), expected)


def check_topk(run, scores, base, k, scope):
    crow, col, bad = run.topk_mask(scores, base, k, SCOPES[scope])
    assert (bad.device.type, bad.dtype, bad.tolist()) == ("cpu", torch.int64, [-1, -1])
    check_csr(crow, col, selected(scores, base, k, scope), scores[0].device.type)


def check_random(run, shapes, dtypes, scope, share, kind="normal", base_dtypes=(), aligned=True, seed=1):
    """Random tensors; base_dtypes: also differences from tensors of these dtypes."""
    rng = np.random.default_rng(seed)
    scores = tensors(shapes, dtypes, kind, rng, run.device, aligned)
    base = tensors(shapes, base_dtypes, kind, rng, run.device, aligned) if base_dtypes else []
    check_topk(run, scores, base, counts(shapes, scope, share, rng), scope)


def counts(shapes, scope, share, rng) -> list[int]:
    """A k for each, of which the share is wanted; None: any."""
    matrices = [matrix_shape(s) for s in shapes]
    sizes = {
        "global": [sum(r * c for r, c in matrices)],
        "tensor": [r * c for r, c in matrices],
        "row": [c for _, c in matrices],
    }
    return [round(share * n) if share is not None else int(rng.integers(0, n + 1)) for n in sizes[scope]]
