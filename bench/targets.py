"""The performance targets, each a question to the rows: a speedup over a baseline in the same run, a time, a share of
the floor, or a peak. CPU targets are for any machine with a C++ compiler, GPU targets for an H200."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench import shapes
from bench.harness import Workload
from bench.rows import OURS, Row, workload_of

SPEEDUP, FLOOR = "speedup", "share of the floor"  # at least
MS, PEAK_OF_BASELINE, PEAK_OF_INPUT = "ms", "peak of the baseline's", "peak of the input's"  # at most


@dataclass(frozen=True)
class Target:
    device: str  # "cpu", "cuda"
    what: str
    op: str
    title: str  # the rows' column "size"
    dtype: str
    density: str
    bound: float
    quantity: str = SPEEDUP
    baseline: str = ""
    ours: str = OURS

    @property
    def workload(self) -> tuple[str, ...]:
        return (self.op, self.title, self.dtype, self.density)

    @property
    def at_least(self) -> bool:
        return self.quantity in (SPEEDUP, FLOOR)

    def is_about(self, workload: Workload) -> bool:
        names = (workload.op, workload.title, workload.dtype_name, workload.density_text)
        return self.device == workload.device and self.workload == names

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


BASELINES = {
    "svd": "torch.linalg.svd", "gesvd": "torch.linalg.svd (gesvd)", "lowrank": "torch.svd_lowrank",
    "eigh": "cupy.linalg.eigh of the Gram matrix", "torch_eigh": "torch.linalg.eigh of the Gram matrix",
    "topk": "torch.topk + sort", "topk_mask": "torch.topk + mask", "partition": "numpy partition",
    "fused": "torch AdamW fused", "mask_foreach": "mask + torch AdamW foreach", "product": "dense product",
    "product_mask": "dense product + grad[mask]", "dense": "dense, torch AdamW fused",
    "dense_mask": "dense + mask, torch AdamW fused", "shira": "PEFT SHiRA",
}  # fmt: skip
RANK = "denoise XLM-R base's 72 linear layers, rank 64"
ENERGY = "denoise XLM-R base's 72 linear layers, 90 % of the energy"
TOPK = "select 5 % of 50 M scores"
STEP = "AdamW step of 5 % of 50 M parameters, dense gradients"
COMPACT = "AdamW step of 5 % of 50 M parameters, compact gradients"
ONE = "AdamW step of 1 % of 50 M parameters, dense gradients"
XLMR_STEP = "training step, XLM-R base's shape, 8 x 256 tokens"
SELECT = "select 2.8 % of XLM-R base, denoised, 90 % of the energy"
GRAPH = ", CUDA graph"  # without the host's time
F32, BF16 = "float32", "bfloat16"


def _speedups(device: str, what: str, workload: tuple[str, str, str, str], **bounds: float) -> Iterator[Target]:
    for baseline, bound in bounds.items():
        yield Target(device, what, *workload, bound, baseline=BASELINES[baseline])


def _cpu_targets() -> Iterator[Target]:
    yield from _speedups("cpu", RANK, ("svd_denoise", "xlmr linears x12, rank 64", F32, ""), svd=15, lowrank=1.8)
    workload = ("svd_denoise", "xlmr linears x12, energy 0.9", F32, "")
    yield from _speedups("cpu", ENERGY, workload, svd=4, torch_eigh=1.3)
    workload = ("topk_mask", "50M", F32, "0.05")
    yield from _speedups("cpu", TOPK, workload, topk=25, partition=3.5)
    yield Target("cpu", TOPK, *workload, 0.3, PEAK_OF_INPUT)
    workload = ("sparse_adamw", "50M, dense gradient", F32, "0.05")
    yield from _speedups("cpu", STEP, workload, fused=2.0, mask_foreach=20)
    yield from _speedups("cpu", COMPACT, ("sparse_adamw", "50M, compact gradient", F32, "0.05"), fused=2.8)
    yield from _speedups("cpu", ONE, ("sparse_adamw", "50M, dense gradient", F32, "0.01"), fused=6)
    for shape in ("384x384", "768x768", "3072x768", "768x3072", "4096x4096"):
        for density, dtype in (("0.05", F32), ("0.3", F32), ("0.05", BF16)):
            what = f"gradient of {100 * float(density):.0f} % of a weight of {shape.replace('x', ' x ')}, {dtype}"
            if shape == "768x768" or (dtype, density) != (F32, "0.05"):
                workload = ("masked_linear_grad", f"2048 tokens, {shape}", dtype, density)
                yield from _speedups("cpu", what, workload, product=1 / 1.15)
    yield Target("cpu", SELECT, "select_mask", "xlmr, energy 0.9", F32, "0.0276", 10_000, MS)


def _gpu_targets() -> Iterator[Target]:
    what = "denoise XLM-R base with its embedding, 90 % of the energy"
    workload = ("svd_denoise", "xlmr with embedding, energy 0.9", F32, "")
    yield Target("cuda", what, *workload, 20, MS)
    yield from _speedups("cuda", what, workload, gesvd=100, eigh=5)
    what = "denoise Llama 7B's 224 linear layers, rank 128"
    workload = ("svd_denoise", "llama7b linears x32, rank 128", F32, "")
    yield Target("cuda", what, *workload, 80, MS)
    yield from _speedups("cuda", what, workload, lowrank=30)
    what, workload = "select 5 % of XLM-R base's scores", ("topk_mask", "xlmr", F32, "0.05")
    yield Target("cuda", what, *workload, 0.40, MS)
    yield Target("cuda", what, *workload, 0.72, FLOOR)
    yield from _speedups("cuda", what, workload, topk_mask=8)
    what, workload = "select 5 % of Llama 7B's scores", ("topk_mask", "llama7b", BF16, "0.05")
    yield Target("cuda", what, *workload, 8.5, MS)
    yield Target("cuda", what, *workload, 0.82, FLOOR)
    for density, ratio in (("0.05", 4), ("0.01", 10)):
        what = f"AdamW step of {100 * float(density):.0f} % of XLM-R base"
        workload = ("sparse_adamw", "xlmr, dense gradient", BF16, density)
        yield from _speedups("cuda", what, workload, fused=ratio)
        yield Target("cuda", what, *workload, 0.70, FLOOR)
        yield Target("cuda", what, *workload, 1 / 1.05, baseline=f"{OURS}{GRAPH}")
    what = "gradient of 5 % of a weight of 4096 x 4096"
    workload = ("masked_linear_grad", "2048 tokens, 4096x4096", BF16, "0.05")
    yield from _speedups("cuda", what, workload, product=1 / 1.08, product_mask=1.15)
    workload = ("training_step", "xlmr, 8x256 tokens", BF16, "0.05")
    bounds = {"dense": 1.5, "dense_mask": 1.3, "shira": 1.3}
    yield from _speedups("cuda", XLMR_STEP, workload, **bounds)
    yield Target("cuda", XLMR_STEP, *workload, 0.4, PEAK_OF_BASELINE, BASELINES["dense"])
    for name, bound in bounds.items():
        yield Target("cuda", XLMR_STEP, *workload, bound, baseline=BASELINES[name] + GRAPH, ours=OURS + GRAPH)
    yield Target("cuda", SELECT, "select_mask", "xlmr, energy 0.9", F32, "0.0276", 50, MS)


TARGETS = (*_cpu_targets(), *_gpu_targets())


def rows_about(target: Target, rows: list[Row]) -> dict[str, Row]:
    """Implementation → its row."""
    return {row["provider"]: row for row in rows if workload_of(row) == target.workload}


def measured(target: Target, rows: list[Row]) -> float | None:
    """The target's quantity from the newest rows of one machine; None where it has not been measured."""
    here = rows_about(target, rows)
    ours, baseline = here.get(target.ours), here.get(target.baseline)
    if ours is None or (target.baseline and baseline is None):
        return None
    if target.quantity in (MS, FLOOR):
        return float(ours["p50_ms" if target.quantity == MS else "share_of_floor"])
    column, above, below = "peak_extra_mb", ours, baseline
    if target.quantity == SPEEDUP:
        column, above, below = "times_ours", baseline, ours
    if target.quantity == PEAK_OF_INPUT:
        below = {column: f"{4 * shapes.numel(target.title) / 1e6}"}
    return float(above[column]) / float(below[column]) if above[column] and below[column] else None
