"""The performance targets: a speedup over a baseline in the same run, a time, a share of the floor, or a peak. CPU
targets are for any machine with a C++ compiler, GPU targets for an H200."""

from collections.abc import Iterator
from dataclasses import dataclass

from bench import shapes
from bench.harness import GRAPH, Workload
from bench.rows import OURS, Row, workload_of

SPEEDUP, FLOOR = "speedup", "share of the floor"  # at least
MS, PEAK_OF_BASELINE, PEAK_OF_INPUT = "ms", "peak of the baseline's", "peak of the input's"  # at most
F32, BF16 = "float32", "bfloat16"


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
        return self.device == workload.device and self.workload == workload.key

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


FUSED, PRODUCT = "torch AdamW fused", "dense product"
STEP = {"dense, torch AdamW fused": 1.5, "dense + mask, torch AdamW fused": 1.3, "PEFT SHiRA": 1.3}
SELECTION = (
    "select 2.8 % of XLM-R base, denoised, 90 % of the energy",
    "select_mask",
    "xlmr, energy 0.9",
    F32,
    "0.0276",
)
# (what, op, title, dtype, density) and the bounds: of a quantity, or of the speedup over the baseline of this name.
CPU = (
    ("denoise XLM-R base's 72 linear layers, rank 64", "svd_denoise", "xlmr linears x12, rank 64", F32, "",
     {"torch.linalg.svd": 15, "torch.svd_lowrank": 1.8}),
    ("denoise XLM-R base's 72 linear layers, 90 % of the energy", "svd_denoise", "xlmr linears x12, energy 0.9", F32,
     "", {"torch.linalg.svd": 4, "torch.linalg.eigh of the Gram matrix": 1.3}),
    ("select 5 % of 50 M scores", "topk_mask", "50M", F32, "0.05",
     {"torch.topk + sort": 25, "numpy partition": 3.5, PEAK_OF_INPUT: 0.3}),
    ("AdamW step of 5 % of 50 M parameters, dense gradients", "sparse_adamw", "50M, dense gradient", F32, "0.05",
     {FUSED: 2.0, "mask + torch AdamW foreach": 20}),
    ("AdamW step of 5 % of 50 M parameters, compact gradients", "sparse_adamw", "50M, compact gradient", F32, "0.05",
     {FUSED: 2.8}),
    ("AdamW step of 1 % of 50 M parameters, dense gradients", "sparse_adamw", "50M, dense gradient", F32, "0.01",
     {FUSED: 6}),
    *((f"gradient of {share} % of a weight of {m} x {n}, {dtype}", "masked_linear_grad", f"2048 tokens, {m}x{n}", dtype,
       f"{share / 100}", {PRODUCT: 1 / 1.15})
      for m, n in ((384, 384), (768, 768), (3072, 768), (768, 3072), (4096, 4096))
      for share, dtype in ((5, F32), (30, F32), (5, BF16)) if m == n == 768 or (share, dtype) != (5, F32)),
    (*SELECTION, {MS: 10_000}),
    ("find 1 % changed entries in 1 GB", "bit_diff", "512M", BF16, "0.01", {"torch != and nonzero": 5, FLOOR: 0.6}),
    *((f"write {share} % of the entries of 1 GB", "flat_exchange_", "512M", BF16, f"{share / 100}",
       {"torch copy_ of whole tensors": 10}) for share in (1, 0.1)),
    *((f"step {share} % of MiniLM's entries and mark what changes", "tracked_step", "minilm", BF16, density,
       {"SparseAdamW without track_changes": 1 / 1.03}) for share, density in ((5, "0.05"), (100, "1"))),
)  # fmt: skip
GPU = (
    ("denoise XLM-R base with its embedding, 90 % of the energy", "svd_denoise", "xlmr with embedding, energy 0.9", F32,
     "", {MS: 20, "torch.linalg.svd (gesvd)": 100, "cupy.linalg.eigh of the Gram matrix": 5}),
    ("denoise Llama 7B's 224 linear layers, rank 128", "svd_denoise", "llama7b linears x32, rank 128", F32, "",
     {MS: 80, "torch.svd_lowrank": 30}),
    ("select 5 % of XLM-R base's scores", "topk_mask", "xlmr", F32, "0.05",
     {MS: 0.40, FLOOR: 0.72, "torch.topk + mask": 8}),
    ("select 5 % of Llama 7B's scores", "topk_mask", "llama7b", BF16, "0.05", {MS: 8.5, FLOOR: 0.82}),
    *((f"AdamW step of {share} % of XLM-R base, {dtype}", "sparse_adamw", "xlmr, dense gradient", dtype,
       f"{share / 100}", {FUSED: bound, FLOOR: 0.80, OURS + GRAPH: 1 / 1.05})
      for dtype, share, bound in ((F32, 5, 4), (F32, 1, 10), (BF16, 5, 2.5), (BF16, 1, 7))),
    ("gradient of 5 % of a weight of 4096 x 4096", "masked_linear_grad", "2048 tokens, 4096x4096", BF16, "0.05",
     {PRODUCT: 1 / 1.08, "dense product + grad[mask]": 1.15}),
    ("training step, XLM-R base's shape, 8 x 256 tokens", "training_step", "xlmr, 8x256 tokens", BF16, "0.05",
     STEP | {PEAK_OF_BASELINE: 0.4} | {name + GRAPH: bound for name, bound in STEP.items()}),
    (*SELECTION, {MS: 50}),
)  # fmt: skip


def _targets(device: str, table: tuple[tuple, ...]) -> Iterator[Target]:
    for *workload, bounds in table:
        for name, bound in bounds.items():
            if name == PEAK_OF_BASELINE:
                yield Target(device, *workload, bound, name, next(iter(bounds)))
            elif name in (MS, FLOOR, PEAK_OF_INPUT):
                yield Target(device, *workload, bound, name)
            else:  # a captured step is compared with a captured one
                both = workload[1] == "training_step" and name.endswith(GRAPH)
                yield Target(device, *workload, bound, SPEEDUP, name, OURS + GRAPH if both else OURS)


TARGETS = (*_targets("cpu", CPU), *_targets("cuda", GPU))


def measured(target: Target, rows: list[Row]) -> float | None:
    """The target's quantity from the newest rows of one machine; None where it has not been measured."""
    here = {row["provider"]: row for row in rows if workload_of(row) == target.workload}
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
