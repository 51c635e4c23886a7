"""The tests of the Triton kernels once more, with the kernels in Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import INTERPRETED

TESTS = Path(__file__).resolve().parents[1]
# Of the operators with Triton kernels, those that the interpreter computes rightly.
FILES = (
    "nn/test_masked_linear_grad.py",
    "nn/test_product_strips.py",
    "nn/test_masked_embedding_grad.py",
    "optim/test_sparse_adamw.py",
    "optim/test_stochastic_rounding.py",
)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_interpreter():
    pytest.importorskip("triton")
    files = [str(TESTS / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton-interpreter", *files]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
