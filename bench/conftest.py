"""The options of `pytest bench/ --benchmark-only` (test_workloads.py)."""

import pytest
import torch

from bench.families import FAMILIES, SIZES


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("bench", "what is timed").addoption
    add("--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES), help="families of operators")
    add("--size", nargs="+", choices=SIZES, default=["minilm"], help="sizes of workloads (default: minilm)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda where there is one")
