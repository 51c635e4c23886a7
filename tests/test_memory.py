"""Masked training takes as little memory as promised, measured as the benchmark does: fresh processes, from the first tensor on."""

import pytest

from bench.bench_steps import DENSE, step_case
from bench.harness import OURS, fresh_peak, peak_extra


@pytest.mark.slow
def test_32_linears_take_half_of_dense_at_most(tmp_path):
    """Of 1024 x 1024; `python -m bench --only steps --size linears` measures 2048 x 2048."""
    if peak_extra(lambda: None, "cpu") is None:
        pytest.skip("this system does not tell a process's peak memory")
    case = step_case("small linears", "cpu", str(tmp_path))
    case.release()
    ours, dense = (fresh_peak(case.again, name, "cpu") for name in (OURS, DENSE))
    weights = 32 * 1024 * 1024 * 4 / 1e6
    assert dense > 4 * weights  # weights, gradients and two moments: all of training is counted
    assert weights < ours <= 0.5 * dense
