"""The families of operators and their workloads."""

from collections.abc import Iterator
from dataclasses import replace

from bench import (
    bench_csr,
    bench_deltas,
    bench_distributed,
    bench_masked,
    bench_patches,
    bench_steps,
    bench_svd,
    bench_topk,
    bench_train,
)
from bench.harness import Choice, Workload

FAMILIES = {"csr": bench_csr, "topk": bench_topk, "svd": bench_svd, "train": bench_train}
FAMILIES |= {"masked": bench_masked, "steps": bench_steps, "deltas": bench_deltas, "patches": bench_patches}
FAMILIES |= {"distributed": bench_distributed}
OPS = {op: meaning for family in FAMILIES.values() for op, meaning in family.OPS.items()}
SIZES = tuple(dict.fromkeys(size for family in FAMILIES.values() for size in family.SIZES))


def workloads(family: str, choice: Choice) -> Iterator[Workload]:
    """The family's workloads of the chosen sizes; no tensor is made yet."""
    module = FAMILIES[family]
    yield from module.workloads(replace(choice, sizes=tuple(s for s in module.SIZES if s in choice.sizes)))
