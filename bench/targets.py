"""What this library set out to reach, each as a question to the rows: the ratio to a peer in the same run, a time, a
share, a peak.

Targets of the CPU are for any machine with a compiler; those of the GPU for an H200.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from bench import shapes
from bench.harness import Work
from bench.rows import OURS, Row

RATIO = "times as long as ours"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Target:
    device: str  # "cpu", "cuda"
    what: str
    op: str
    title: str  # the row's column "size"
    dtype: str
    density: str
    bound: float
    # at least; "ms", "peak of the peer's", "peak of the input's": at most; "share of the floor": at least
    quantity: str = RATIO
    peer: str = ""
    ours: str = OURS

    @property
    def at_least(self) -> bool:
        return self.quantity in (RATIO, "share of the floor")

    def is_about(self, work: Work) -> bool:
        ours = (self.device, self.op, self.title, self.dtype, self.density)
        return ours == (work.device, work.op, work.title, work.dtype_name, work.density_text)

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound


def _ratios(device: str, what: str, op: str, title: str, dtype: str, density: str, **bounds: float) -> Iterator[Target]:
    for peer, bound in bounds.items():
        yield Target(device, what, op, title, dtype, density, bound, peer=PEERS[peer])


PEERS = {
    "svd": "torch.linalg.svd", "gesvd": "torch.linalg.svd (gesvd)", "lowrank": "torch.svd_lowrank",
    "eigh": "cupy.linalg.eigh of the Gram matrix", "plain": "torch.linalg.eigh of the Gram matrix",
    "topk": "torch.topk + sort", "topk_mask": "torch.topk + mask",
    "partition": "numpy partition", "fused": "torch AdamW fused", "mask_foreach": "mask + torch AdamW foreach",
    "product": "dense product", "product_mask": "dense product + grad[mask]", "dense": "dense, torch AdamW fused",
    "dense_mask": "dense + mask, torch AdamW fused", "shira": "PEFT SHiRA",
}  # fmt: skip
RANK = "denoise XLM-R base's 72 linear layers, rank 64"
ENERGY = "denoise XLM-R base's 72 linear layers, 90 % of the energy"
TOPK = "select 5 % of 50 M scores"
STEP = "AdamW step of 5 % of 50 M parameters, dense gradients"
COMPACT = "AdamW step of 5 % of 50 M parameters, compact gradients"
ONE = "AdamW step of 1 % of 50 M parameters, dense gradients"
XLMR_STEP = "training step, XLM-R base's shape, 8 x 256 tokens"


def _targets() -> Iterator[Target]:
    f32, bf16 = "float32", "bfloat16"
    yield from _ratios("cpu", RANK, "svd_denoise", "xlmr linears x12, rank 64", f32, "", svd=15, lowrank=1.8)
    yield from _ratios("cpu", ENERGY, "svd_denoise", "xlmr linears x12, energy 0.9", f32, "", svd=4, plain=1.3)
    yield from _ratios("cpu", TOPK, "topk_mask", "50M", f32, "0.05", topk=25, partition=3.5)
    yield Target("cpu", TOPK, "topk_mask", "50M", f32, "0.05", 0.3, "peak of the input's")
    yield from _ratios("cpu", STEP, "sparse_adamw", "50M, dense gradient", f32, "0.05", fused=2.0, mask_foreach=20)
    yield from _ratios("cpu", COMPACT, "sparse_adamw", "50M, compact gradient", f32, "0.05", fused=2.8)
    yield from _ratios("cpu", ONE, "sparse_adamw", "50M, dense gradient", f32, "0.01", fused=6)
    for shape in ("384x384", "768x768", "3072x768", "768x3072", "4096x4096"):
        for density, dtype in (("0.05", f32), ("0.3", f32), ("0.05", bf16)):
            what = f"gradient of {100 * float(density):.0f} % of a weight of {shape.replace('x', ' x ')}, {dtype}"
            if shape == "768x768" or (dtype, density) != (f32, "0.05"):
                yield from _ratios(
                    "cpu", what, "masked_linear_grad", f"2048 tokens, {shape}", dtype, density, product=1 / 1.15
                )
    what = "choose 2.8 % of XLM-R base, denoised, 90 % of the energy"
    yield Target("cpu", what, "select_mask", "xlmr, energy 0.9", f32, "0.0276", 10_000, "ms")

    what = "denoise XLM-R base with its embedding, 90 % of the energy"
    work = ("svd_denoise", "xlmr with embedding, energy 0.9", f32, "")
    yield Target("cuda", what, *work, 20, "ms")
    yield from _ratios("cuda", what, *work, gesvd=100, eigh=5)
    what, work = (
        "denoise Llama 7B's 224 linear layers, rank 128",
        ("svd_denoise", "llama7b linears x32, rank 128", f32, ""),
    )
    yield Target("cuda", what, *work, 80, "ms")
    yield from _ratios("cuda", what, *work, lowrank=30)
    what, work = "select 5 % of XLM-R base's scores", ("topk_mask", "xlmr", f32, "0.05")
    yield Target("cuda", what, *work, 0.40, "ms")
    yield Target("cuda", what, *work, 0.72, "share of the floor")
    yield from _ratios("cuda", what, *work, topk_mask=8)
    what, work = "select 5 % of Llama 7B's scores", ("topk_mask", "llama7b", bf16, "0.05")
    yield Target("cuda", what, *work, 8.5, "ms")
    yield Target("cuda", what, *work, 0.82, "share of the floor")
    for density, ratio in (("0.05", 4), ("0.01", 10)):
        what, work = (
            f"AdamW step of {100 * float(density):.0f} % of XLM-R base",
            ("sparse_adamw", "xlmr, dense gradient", bf16, density),
        )
        yield from _ratios("cuda", what, *work, fused=ratio)
        yield Target("cuda", what, *work, 0.70, "share of the floor")
        yield Target("cuda", what, *work, 1 / 1.05, peer=f"{OURS}, CUDA graph")
    what, work = (
        "gradient of 5 % of a weight of 4096 x 4096",
        ("masked_linear_grad", "2048 tokens, 4096x4096", bf16, "0.05"),
    )
    yield from _ratios("cuda", what, *work, product=1 / 1.08, product_mask=1.15)
    work = ("training_step", "xlmr, 8x256 tokens", bf16, "0.05")
    yield from _ratios("cuda", XLMR_STEP, *work, dense=1.5, dense_mask=1.3, shira=1.3)
    yield Target("cuda", XLMR_STEP, *work, 0.4, "peak of the peer's", PEERS["dense"])
    graph = ", CUDA graph"  # where the host's time counts in neither
    for peer, ratio in (("dense", 1.5), ("dense_mask", 1.3), ("shira", 1.3)):
        yield Target("cuda", XLMR_STEP, *work, ratio, peer=PEERS[peer] + graph, ours=OURS + graph)
    what = "choose 2.8 % of XLM-R base, denoised, 90 % of the energy"
    yield Target("cuda", what, "select_mask", "xlmr, energy 0.9", f32, "0.0276", 50, "ms")


TARGETS = tuple(_targets())


WORK = ("op", "size", "dtype", "density")


def of_device(rows: list[Row], device: str) -> list[Row]:
    """The rows of CPUs or of GPUs ("cuda"), which have a driver; of each work those of the machine that timed it last."""
    kind = [row for row in rows if bool(row.get("driver")) == (device == "cuda")]
    last: dict[tuple, str] = {}
    for row in sorted(kind, key=lambda row: row["date"]):
        last[tuple(row[k] for k in WORK)] = row["device"]
    return [row for row in kind if row["device"] == last[tuple(row[k] for k in WORK)]]


def of_machine(rows: list[Row], device: str) -> list[Row]:
    """Those of one machine, for figures that compare works: the one that timed most of them, of several the last."""
    kind = [row for row in rows if bool(row.get("driver")) == (device == "cuda")]
    works: dict[str, set[tuple]] = {}
    for row in sorted(kind, key=lambda row: row["date"], reverse=True):
        works.setdefault(row["device"], set()).add(tuple(row[k] for k in WORK))
    most = max(works, key=lambda name: len(works[name]), default="")
    return [row for row in kind if row["device"] == most]


def rows_about(target: Target, rows: list[Row]) -> dict[str, Row]:
    """Provider → its row."""
    same = {"op": target.op, "size": target.title, "dtype": target.dtype, "density": target.density}
    return {row["provider"]: row for row in rows if all(row[k] == v for k, v in same.items())}


def measured(target: Target, rows: list[Row]) -> float | None:
    """The quantity that the target is about, from the newest rows of one machine; None where it has not been measured."""
    here = rows_about(target, rows)
    ours, peer = here.get(target.ours), here.get(target.peer)
    if ours is None or (target.peer and peer is None):
        return None
    if target.quantity == "ms":
        return float(ours["p50_ms"])
    if target.quantity == "share of the floor":
        return float(ours["share_of_floor"])
    if target.quantity == RATIO:
        return (
            float(peer["times_ours"]) / float(ours["times_ours"])
            if peer and peer["times_ours"] and ours["times_ours"]
            else None
        )
    if not ours["peak_extra_mb"]:
        return None
    if target.quantity == "peak of the input's":
        return float(ours["peak_extra_mb"]) * 1e6 / (4 * shapes.numel(target.title))
    return float(ours["peak_extra_mb"]) / float(peer["peak_extra_mb"]) if peer and peer["peak_extra_mb"] else None
