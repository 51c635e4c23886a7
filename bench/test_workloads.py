"""The workloads of `python -m bench` under pytest-benchmark, one test for each implementation: checked, then timed.

pytest bench/ --benchmark-only --benchmark-save=before
pytest bench/ --benchmark-only --benchmark-compare --benchmark-compare-fail=median:20%
"""

from functools import lru_cache

import pytest

from bench.families import workloads
from bench.harness import Case, Choice, Workload, flush_cache, synchronize


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    found = {}
    for family in option("--family"):
        for workload in workloads(family, Choice(option("--device"), tuple(option("--size")), quick=True)):
            tiny = workload.tiny()  # has the same implementations
            for name in [*tiny.implementations, *tiny.absent]:
                found[f"{workload.op}: {workload.label}: {name}"] = (workload, name)
    metafunc.parametrize(("workload", "implementation"), found.values(), ids=found)


@lru_cache(maxsize=1)  # the implementations of a workload come one after the other
def made(workload: Workload) -> Case:
    return workload.make()


def test_workload(workload: Workload, implementation: str, benchmark) -> None:
    case = made(workload)
    if implementation in case.absent:
        pytest.skip(case.absent[implementation])
    call = case.implementations[implementation]()
    fault = case.check(call())
    assert fault is None, fault

    def synchronized() -> None:
        call()
        synchronize(workload.device)

    def setup() -> None:
        flush_cache(workload.device)
        synchronize(workload.device)

    benchmark.group = ", ".join(filter(None, [workload.op, workload.title, str(workload.density or "")]))
    benchmark.extra_info |= {"bytes": case.bytes, "flops": case.flops, "device": workload.device}
    benchmark.pedantic(synchronized, setup=setup, rounds=case.rounds, warmup_rounds=1)
