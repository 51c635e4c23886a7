"""bench.host_time runs our launchers without a GPU, in a process of its own: it registers other operators."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_operators_are_launched_without_a_gpu():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "bench.host_time", "--only", "operator", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [
        "sparse_adamw_, dense gradients",
        "sparse_adamw_, compact gradient",
        "masked_linear_grad",
        "masked_embedding_grad",
    ]
    assert [line[:50].strip() for line in done.stdout.splitlines()] == [f"operator {n}" for n in names]
