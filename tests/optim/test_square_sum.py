"""csr_square_sum against a float64 sum, the same tests for every implementation.

The oracle never looks at crow_indices or col_indices: it takes the entries of the boolean tensors that the mask was
made from. Outside the mask, tensors hold NaN and infinities.
"""

import math

import pytest
import torch
from adamw_problem import BLOCK, LAYOUTS, Layout, Options, Problem, same_bits
from torch import Tensor

from tests.conftest import implementations

OPS = ("csr_square_sum",)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = LAYOUTS | {
    "one entry more": Layout([(BLOCK + 1,)], 1.0),
    "one entry less": Layout([(BLOCK - 1,)], 1.0),
    "more dimensions": Layout([(3, 2, 5), (2, 1, 3, 2)], 0.5),
    "int32 columns of narrow tensors": Layout([(40, 33), (7,)], 0.5, torch.int32),
    "no element": Layout([(0,), (0, 3), (4, 0)], 0.0),
}


class Case(Problem):
    """Normal numbers at the entries of a random mask."""

    def __init__(self, shapes, dtype=torch.float32, density=0.5) -> None:
        layout = shapes if isinstance(shapes, Layout) else Layout(shapes, density)
        super().__init__(layout, Options(dtype))

    def sum(self, implementation) -> Tensor:
        total = implementation.on_cpu("csr_square_sum", self.params, self.crow_indices, self.col_indices)
        if implementation.name == "triton-sm80":
            assert len(implementation.ops.launches) == (self.nnz > 0), "one launch for all tensors"
        return total

    def check(self, implementation) -> None:
        before = self.snapshot()
        total = self.sum(implementation)
        assert total.shape == ()
        assert total.dtype == torch.float64
        want = math.fsum(x * x for x in self.weight().double().tolist())
        # All terms are positive: n - 1 additions in any order, and a product before them, n times 2**-53 in all.
        assert abs(total.item() - want) <= max(self.nnz, 1) * 2.0**-53 * want
        assert same_bits(before, self.snapshot())


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(implementation, name, dtype):
    case = Case(LAYOUTS[name], dtype)
    case.check(implementation)
    assert case.nnz or case.sum(implementation).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_squares_beyond_float32(implementation, dtype, size):
    case = Case([(30, 40), (9,)], dtype)
    for t in case.params:
        t.mul_(size)
    case.check(implementation)
    assert 0 < case.sum(implementation).item() < math.inf


def test_small_terms_count_beside_large_ones(implementation):
    """2**24 and a thousand ones: a sum in float32 would stay at 2**24."""
    case = Case([(1001,)], density=1.0)
    case.params[0].fill_(1.0)
    case.params[0][0] = 2.0**12
    assert case.sum(implementation).item() == 2.0**24 + 1000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("value", "want"), [(math.nan, math.nan), (math.inf, math.inf), (-math.inf, math.inf)])
def test_nan_and_infinities_at_an_entry_are_seen(implementation, dtype, value, want):
    for place in (0, 600, -1):
        case = Case([(20, 30), (40, 20)], dtype, density=1.0)
        case.params[0 if 0 <= place < 600 else 1].view(-1)[0 if place == 600 else place] = value
        total = case.sum(implementation).item()
        assert math.isnan(total) if math.isnan(want) else total == want


def test_the_same_call_gives_the_same_bits(implementation):
    one, other = (Case([(50, 60), (9,)], torch.bfloat16) for _ in range(2))
    assert torch.equal(one.sum(implementation), other.sum(implementation))


@implementations("c++")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_matter(implementation, dtype):
    case = Case([(300, 1000), (2, 30_000), (9,)], dtype)
    assert case.nnz > 100_000
    totals, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            totals.append(case.sum(implementation).item())
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
        torch.ops.deftx.csr_square_sum(*WRONG[wrong](case.params, case.crow_indices, case.col_indices))


def cuda_case():
    case = Case([(300, 200)] * 100 + [(7,)], density=0.2)
    ones = [torch.ones_like(t, device="cuda") for t in case.params]
    return ones, case.crow_indices.cuda(), case.col_indices.cuda(), case.nnz


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
