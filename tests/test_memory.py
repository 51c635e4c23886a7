"""Masked training takes as little memory as promised, measured as the benchmark does: fresh processes, from the first tensor on."""

import pytest
import torch

from bench.bench_steps import DENSE, step_work
from bench.harness import alone, peak_extra
from bench.rows import OURS


@pytest.mark.slow
def test_32_linears_take_half_of_dense_at_most():
    """Of 1024 x 1024; `python -m bench --family steps --size linears` measures 2048 x 2048."""
    if peak_extra(lambda: None, "cpu") is None:
        pytest.skip("this system does not tell a process's peak memory")
    work = step_work("small linears", "cpu", torch.float32, 0.02)
    ours, dense = (alone(work, name, 1).peak for name in (OURS, DENSE))
    weights = 32 * 1024 * 1024 * 4 / 1e6
    assert dense > 4 * weights  # weights, gradients and two moments: all of training is counted
    assert weights < ours <= 0.5 * dense
