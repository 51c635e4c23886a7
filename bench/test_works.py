"""One provider at one work: checked, then timed. Compare with a saved run by pytest-benchmark's own options:

pytest bench/ --benchmark-only --benchmark-save=before
pytest bench/ --benchmark-only --benchmark-compare --benchmark-compare-fail=median:20%
"""

from functools import lru_cache

import pytest

from bench.harness import Case, Work, flush_cache, synchronize


@lru_cache(maxsize=1)  # the providers of a work come one after the other
def made(work: Work) -> Case:
    return work.make()


def test_work(work: Work, provider: str, benchmark) -> None:
    case = made(work)
    if provider in case.absent:
        pytest.skip(case.absent[provider])
    call = case.providers[provider]()
    fault = case.check(call())
    assert fault is None, fault

    def waited() -> None:
        call()
        synchronize(work.device)

    def setup() -> None:
        flush_cache(work.device)
        synchronize(work.device)

    benchmark.group = ", ".join(filter(None, [work.op, work.title, str(work.density or "")]))
    benchmark.extra_info |= {"bytes": case.bytes, "flops": case.flops, "device": work.device}
    benchmark.pedantic(waited, setup=setup, rounds=case.rounds, warmup_rounds=1)
