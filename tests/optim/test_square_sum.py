"""csr_square_sum against NumPy in float64, the same tests for every implementation.

The oracle never looks at crow_indices or col_indices: it takes the entries of the boolean arrays that the mask was made
from. Outside the mask, tensors hold NaN and infinities.
"""

import math

import numpy as np
import pytest
import torch

from tests.conftest import implementations

OPS = ("csr_square_sum",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BLOCK = 512  # entries of one Triton program


class Case:
    """Normal numbers at the entries of a random mask."""

    def __init__(self, shapes, dtype=torch.float32, density=0.5, wide=False, seed=0) -> None:
        self.rng = np.random.default_rng(seed)
        matrices = [(1, math.prod(s)) if len(s) < 2 else (s[0], math.prod(s[1:])) for s in shapes]
        self.masks = [self.rng.random(m) < density for m in matrices]
        self.nnz = int(sum(m.sum() for m in self.masks))
        self.tensors = []
        for shape, mask in zip(shapes, self.masks):
            x = self.rng.standard_normal(mask.shape)
            x[~mask] = self.rng.choice([np.nan, np.inf, -np.inf], int((~mask).sum()))
            self.tensors.append(torch.from_numpy(x).reshape(shape).to(dtype))
        # [rows + 1]
        self.crow = torch.from_numpy(np.cumsum([0, *np.concatenate([m.sum(1) for m in self.masks])], dtype=np.int64))
        columns = np.concatenate([np.nonzero(m)[1] for m in self.masks])
        wide = wide or any(c > 65_536 for _, c in matrices)
        self.col = torch.from_numpy(columns.astype(np.int32 if wide else np.uint16))  # [nnz]

    def entries(self) -> np.ndarray:  # float64 [nnz]
        flat = [t.double().numpy().reshape(-1)[m.reshape(-1)] for t, m in zip(self.tensors, self.masks)]
        return np.concatenate(flat)

    def sum(self, implementation) -> torch.Tensor:
        total = implementation.on_cpu("csr_square_sum", self.tensors, self.crow, self.col)
        if implementation.name == "triton-sm80":
            assert len(implementation.ops.launches) == (self.nnz > 0), "one launch for all tensors"
        return total

    def check(self, implementation) -> None:
        before = [t.clone() for t in self.tensors]
        total = self.sum(implementation)
        assert total.shape == ()
        assert total.dtype == torch.float64
        want = math.fsum(x * x for x in self.entries().tolist())
        # All terms are positive: n - 1 additions in any order, and a product before them, n times 2**-53 in all.
        assert abs(total.item() - want) <= max(self.nnz, 1) * 2.0**-53 * want
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, self.tensors))


LAYOUTS = {
    "one entry": ([(0, 3), (), (0,)], 1.0),
    "three programs": ([(7,), (), (5, 9), (0, 6), (1, 300), (60, 33), (4, 0)], 0.6),
    "exactly two programs": ([(2 * BLOCK,)], 1.0),
    "one full program": ([(8, BLOCK // 8)], 1.0),
    "one entry more": ([(BLOCK + 1,)], 1.0),
    "one entry less": ([(BLOCK - 1,)], 1.0),
    "many tensors": ([(2, 3), (5,), ()] * 70, 0.7),
    "mostly empty rows": ([(3000, 4), (0, 4), (2000, 1)], 0.01),
    "wide rows": ([(3, 70_000), (2, 2)], 0.003),
    "more dimensions": ([(3, 2, 5), (2, 1, 3, 2)], 0.5),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(implementation, name, dtype):
    shapes, density = LAYOUTS[name]
    Case(shapes, dtype, density).check(implementation)


def test_int32_columns(implementation):
    Case([(40, 33), (7,)], wide=True).check(implementation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shapes", [[(3, 4), (5,)], [(0,), (0, 3), (4, 0)]], ids=str)
def test_an_empty_mask_sums_to_zero(implementation, shapes, dtype):
    case = Case(shapes, dtype, density=0.0)
    case.check(implementation)
    assert case.sum(implementation).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_squares_beyond_float32(implementation, dtype, size):
    case = Case([(30, 40), (9,)], dtype)
    for t in case.tensors:
        t.mul_(size)
    case.check(implementation)
    assert 0 < case.sum(implementation).item() < math.inf


def test_small_terms_count_beside_large_ones(implementation):
    """2**24 and a thousand ones: a sum in float32 would stay at 2**24."""
    case = Case([(1001,)], density=1.0)
    case.tensors[0].fill_(1.0)
    case.tensors[0][0] = 2.0**12
    assert case.sum(implementation).item() == 2.0**24 + 1000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("value", "want"), [(math.nan, math.nan), (math.inf, math.inf), (-math.inf, math.inf)])
def test_nan_and_infinities_at_an_entry_are_seen(implementation, dtype, value, want):
    for place in (0, 600, -1):
        case = Case([(20, 30), (40, 20)], dtype, density=1.0)
        case.tensors[0 if 0 <= place < 600 else 1].view(-1)[0 if place == 600 else place] = value
        total = case.sum(implementation).item()
        assert math.isnan(total) if math.isnan(want) else total == want


def test_the_same_call_gives_the_same_bits(implementation):
    case = Case([(50, 60), (9,)], torch.bfloat16)
    first = case.sum(implementation)
    assert torch.equal(first, case.sum(implementation))


@implementations("c++")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_matter(implementation, dtype):
    case = Case([(300, 1000), (2, 30_000), (9,)], dtype)
    assert case.nnz > 100_000
    totals, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            totals.append(torch.ops.deftx.csr_case.sum(implementation).item())
        finally:
            torch.set_num_threads(before)
    assert totals[0] == totals[1] == totals[2]
    case.check(implementation)


# What is wrong -> (tensors, crow_indices, col_indices) -> those
WRONG = {
    "crow too short": lambda t, crow, col: (t, crow[:-1], col),
    "crow ends early": lambda t, crow, col: (t, torch.cat([crow[:-1], crow[-1:] - 1]), col),
    "columns descend": lambda t, crow, col: (t, crow, col.to(torch.int32).flip(0)),
    "column too large": lambda t, crow, col: (t, crow, torch.cat([col[:-1].int(), torch.tensor([6]).int()])),
    "integers": lambda t, crow, col: ([x.int() for x in t], crow, col),
    "tensor missing": lambda t, crow, col: (t[:-1], crow, col),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_raise(wrong):
    case = Case([(5, 20), (6,)], density=1.0)
    with pytest.raises(RuntimeError, match=r"must|has|dtype"):
        torch.ops.deftx.csr_square_sum(*WRONG[wrong](case.tensors, case.crow, case.col))


def cuda_case():
    case = Case([(300, 200)] * 100 + [(7,)], density=0.2)
    return [torch.ones_like(t, device="cuda") for t in case.tensors], case.crow.cuda(), case.col.cuda(), case.nnz


@implementations("cuda")
def test_cuda_graph(implementation):
    """Nothing waits for the device or copies from the host: the sum can be captured, and replayed on new values."""
    tensors, crow, col, nnz = cuda_case()
    assert implementation.ops.csr_square_sum(tensors, crow, col).item() == nnz  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total = implementation.ops.csr_square_sum(tensors, crow, col)
    for value in (1.0, 3.0):
        for t in tensors:
            t.fill_(value)
        graph.replay()
        assert total.item() == value**2 * nnz


@implementations("cuda")
def test_two_streams_may_sum_the_same_tensors(implementation):
    tensors, crow, col, nnz = cuda_case()
    torch.cuda.synchronize()
    totals = []
    for _ in range(20):
        for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                totals.append(implementation.ops.csr_square_sum(tensors, crow, col))
    torch.cuda.synchronize()
    assert {t.item() for t in totals} == {nnz}
