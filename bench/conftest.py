"""pytest bench/ --benchmark-only: the same works and providers as `python -m bench`, one test each, under
pytest-benchmark.
"""

import pytest
import torch

from bench.families import FAMILIES, SIZES, works
from bench.harness import Choice


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "what is timed")
    group.addoption(
        "--family", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES), help="families of operators"
    )
    group.addoption("--size", nargs="+", choices=SIZES, default=["minilm"], help="sizes of work (default: minilm)")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "work" not in metafunc.fixturenames:
        return
    config = metafunc.config
    device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
    choice = Choice(device, tuple(config.getoption("--size")), quick=True)
    found, names = [], []
    for family in config.getoption("--family"):
        for work in works(family, choice):
            tiny = work.tiny()  # tells the providers' names in a moment
            for provider in [*tiny.providers, *tiny.absent]:
                found.append((work, provider))
                density = "" if work.density is None else f", {100 * work.density:.3g} %"
                names.append(f"{work.op}: {work.title}, {work.dtype_name}{density}: {provider}")
    metafunc.parametrize(("work", "provider"), found, ids=names)
