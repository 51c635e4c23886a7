"""What the tests of the two masked gradient operators share: masks, error bounds, and broken CSR indices."""

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import Implementation

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def csr(mask: Tensor, int32: bool = False) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices of a bool matrix."""
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return crow, mask.nonzero()[:, 1].to(torch.int32 if int32 or mask.shape[1] > 65_536 else torch.uint16)


def random_mask(rows: int, columns: int, density: float) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < density


@st.composite
def small_masks(draw) -> Tensor:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 70))
    bits = draw(st.lists(st.integers(0, 2**columns - 1), min_size=rows, max_size=rows))
    return torch.tensor([[b >> j & 1 for j in range(columns)] for b in bits], dtype=torch.bool)


def run_examples(implementation: Implementation, test) -> None:
    """Runs a hypothesis test, with few examples for the slow implementations."""
    examples = {"c++": 100, "reference": 30}.get(implementation.name, 8)
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.nested_given]
    settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks)(test)()


def skip_unsupported(implementation: Implementation, *dtypes: torch.dtype) -> None:
    if implementation.name == "triton-interpreter" and not {FP32, FP64} >= set(dtypes):
        pytest.skip("Triton's interpreter gets 16-bit products wrong")


def unit_roundoff(dtype: torch.dtype) -> float:
    """Of the dtype that an operator computes in for a result of this dtype."""
    return 2.0**-53 if dtype == FP64 else 2.0**-24


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    """|got - want| <= bound, beside the rounding of `want` to the dtype of `got` (subnormal numbers included)."""
    info = torch.finfo(got.dtype)
    bound = bound + (want.abs() + bound + info.smallest_normal) * info.eps / 2
    excess = (got.double() - want).abs() - bound
    assert not excess.isnan().any()
    assert (excess <= 0).all(), f"{int((excess > 0).sum())} of {len(want)} entries, the worst by {excess.max():.1e}"


def equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def results_by_threads(function) -> list[Tensor]:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results


BROKEN_CSR = {
    "crow too short": lambda crow, col: (crow[:-1], col),
    "crow too long": lambda crow, col: (torch.cat([crow, crow[-1:]]), col),
    "crow ends early": lambda crow, col: (torch.cat([crow[:-1], crow[-1:] - 1]), col),
    "crow ends late": lambda crow, col: (torch.cat([crow[:-1], crow[-1:] + 1]), col),
    "crow descends": lambda crow, col: (crow[[0, 3, 2, 1, *range(4, len(crow))]], col),
    "columns descend": lambda crow, col: (crow, col.to(torch.int32).flip(0)),
    "negative column": lambda crow, col: (crow, col.to(torch.int32) - 1),
}
