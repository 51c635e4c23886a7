"""What a rank sends in a step and what it holds, computed from shapes: the benchmark's models, and Llama 3.1.

`python -m bench scale` computes Llama 3.1 8B, 70B and 405B on 8 to 1,024 GPUs, for this library, dense AdamW and LoRA,
under FSDP2 and DDP, and writes bench/results/scale.csv and scale.png. Nothing is timed. tests/bench/test_scale.py
compares the same functions with what bench/bench_distributed.py has measured in two processes.

Bytes sent are those of ring algorithms (`Traffic.sent`). FSDP2 divides each tensor by rows, so that a tensor with fewer
rows than ranks counts one row for each. It has a group for each layer, gathered in forward and again in backward, and
one for the rest (embedding, head, last norm), gathered once (`fully_shard`'s default). Memory is that of the first
rank, which has the most rows:

- weight, gradient, state: stored weights, gradients just before the optimizer's step, the optimizer's state with
  float32 copies.
- mask: row pointers of 8 bytes a row, columns of 2 bytes an entry (4 above 65,536 columns), in as many copies as
  training holds on its device; on a GPU also the kernels' table, 1/8 byte an entry.
- host_mask: the mask of the whole tensors, which `SparseAdamW` keeps where it was made; only local parts are copied.
- gathered (estimated; the others are exact, but for entries that a mask has by chance in this rank's rows): whole
  weights of the group without layers and of two layers (one is computed, one gathered ahead), whole gradients of the
  former and of one layer.

Left out: activations, buffers, the buckets' temporary copies, the allocator's reserve. Norms are frozen.
"""

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Size, nn

from bench.bench_steps import HEADS
from bench.collectives import Traffic
from bench.step_models import MODELS, maskable, on_meta
from deftx_kernels.files import replaced
from deftx_kernels.mask import column_dtype, rows_and_columns

GPUS = tuple(2**i for i in range(3, 11))
DENSITIES = (0.05, 0.01)
LORA_RANKS = (16, 64)
CARD = 80e9  # bytes of a usual GPU
FLOAT32 = 4  # bytes; of moments, compact values and their gradients, adapters
COLUMNS = (
    "model", "parameters", "method", "gpus", "sent_bytes", "all_reduce_bytes", "all_gather_bytes",
    "reduce_scatter_bytes", "all_to_all_bytes", "memory_bytes", "weight_bytes", "gradient_bytes", "state_bytes",
    "mask_bytes", "gathered_bytes", "host_mask_bytes",
)  # fmt: skip


# ---- models ----
@dataclass(frozen=True)
class Parameter:
    """`count` parameters of one shape.

    in_layer: part of a layer, of which FSDP2 makes a group. trained: by dense training. masked: covered by the mask.
    adapted: LoRA has factors for it. saved: LoRA trains a copy of it (PEFT's modules_to_save).
    """

    shape: tuple[int, ...]
    count: int = 1
    in_layer: bool = True
    trained: bool = True
    masked: bool = False
    adapted: bool = False
    saved: bool = False

    def local_shape(self, ranks: int) -> Size:
        """On the first of so many ranks, which have parts of the rows."""
        return Size((-(-self.shape[0] // ranks), *self.shape[1:]))

    def numel(self, ranks: int = 1) -> int:
        """Elements on the first of so many ranks."""
        return self.count * self.local_shape(ranks).numel()

    def factors(self, rank: int) -> list["Parameter"]:
        """LoRA's two."""
        rows, columns = self.shape
        return [replace(self, shape=shape, trained=True) for shape in ((rank, columns), (rows, rank))]


@dataclass(frozen=True)
class Model:
    name: str
    layers: int
    parameters: tuple[Parameter, ...]

    def numel(self) -> int:
        return sum(p.numel() for p in self.parameters)


def llama(name: str, layers: int, width: int, inner: int, key_value_width: int = 1024) -> Model:
    """Llama 3.1, whose head is not tied to the embedding. The mask covers every matrix, LoRA those of the layers."""
    linears = {(width, width): 2, (key_value_width, width): 2, (inner, width): 2, (width, inner): 1}
    parameters = [Parameter(shape, n * layers, masked=True, adapted=True) for shape, n in linears.items()]
    parameters += [Parameter((128256, width), 2, in_layer=False, masked=True)]
    norms = Parameter((width,), 2 * layers, trained=False)
    return Model(name, layers, (*parameters, norms, replace(norms, count=1, in_layer=False)))


LLAMAS = (
    llama("Llama 3.1 8B", 32, 4096, 14336),
    llama("Llama 3.1 70B", 80, 8192, 28672),
    llama("Llama 3.1 405B", 126, 16384, 53248),
)


def step_model(size: str) -> Model:
    """A classifier of the benchmark (bench/step_models.py)."""
    module, masked = on_meta(MODELS[size]), maskable(MODELS[size])
    linears = {f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Linear)}
    parameters = []
    for name, p in module.named_parameters():
        head = name.startswith(HEADS)
        kinds = {"in_layer": ".layer." in name, "trained": p.requires_grad, "masked": name in masked}
        kinds |= {"adapted": name in linears and not head, "saved": head}
        parameters.append(Parameter(tuple(p.shape), **kinds))
    return Model(size, MODELS[size].layers, tuple(parameters))


# ---- what a method sends and holds ----
@dataclass(frozen=True)
class Precision:
    """Bytes of an element of dense tensors, and what a GPU adds."""

    weight: int = 4  # as stored, and of dense gradients as stored
    gathered: int = 4  # of weights and gradients in a step
    reduced: int = 4  # of dense gradients in a reduce-scatter
    master: int = 0  # of the copies of masked entries in the optimizer's state
    table: float = 0.0  # bytes an entry of the kernels' table for a mask


# In the steps of the benchmark on the CPU.
ON_CPU = Precision()
# With bfloat16 in forward and backward, and gradients that are added up in float32, as torchtitan's default. Dense
# training stores float32 weights, which are the master copy; frozen weights are stored in bfloat16.
DENSE = Precision(gathered=2)
FROZEN = Precision(weight=2, gathered=2, master=4, table=1 / 8)


@dataclass
class Cost:
    """Of one rank: its collectives in a step, and bytes by what they hold."""

    traffic: Traffic = field(default_factory=Traffic)
    memory: dict[str, float] = field(default_factory=dict)

    def add(self, **sizes: float) -> None:
        for name, size in sizes.items():
            self.memory[name] = self.memory.get(name, 0) + size


def adamw_state(parameters: Sequence[Parameter], elements: float, element: int = FLOAT32) -> float:
    """Two moments an element, and a float32 number of steps for each parameter."""
    return 2 * element * elements + 4 * sum(p.count for p in parameters)


def mask_bytes(masked: Sequence[Parameter], density: float, ranks: int = 1, table: float = 0.0) -> float:
    """A CSRMask of the first rank's rows."""
    width = column_dtype([p.local_shape(ranks) for p in masked]).itemsize
    return 8 * (row_count(masked, ranks) + 1) + (width + table) * density * elements(masked, ranks)


def row_pointers(masked: Sequence[Parameter]) -> int:
    """Of the masks of each tensor, whose columns are views of the whole mask's."""
    return 8 * (row_count(masked) + sum(p.count for p in masked))


def row_count(parameters: Iterable[Parameter], ranks: int = 1) -> int:
    return sum(p.count * rows_and_columns(p.local_shape(ranks))[0] for p in parameters)


def split(model: Model) -> tuple[list[Parameter], list[Parameter], list[Parameter]]:
    """(those that dense training trains, of these those that the mask covers, and the others, which are trained
    densely)."""
    trained = [p for p in model.parameters if p.trained]
    return trained, [p for p in trained if p.masked], [p for p in trained if not p.masked]


def elements(parameters: Iterable[Parameter], ranks: int = 1) -> int:
    return sum(p.numel(ranks) for p in parameters)


def add_gathers(
    cost: Cost, parameters: Iterable[Parameter], ranks: int, layers: int, size: int, share: float = 1
) -> None:
    """FSDP2's all-gathers of some parameters, or of a share of their elements, of so many bytes an element, and the
    temporary whole tensors.
    """
    for p in parameters:
        whole = size * share * ranks * p.numel(ranks)
        cost.traffic.all_gather += whole * (2 if p.in_layer else 1)
        cost.add(gathered=whole * (2 / layers if p.in_layer else 1))


def add_reductions(
    cost: Cost, parameters: Iterable[Parameter], ranks: int, layers: int, sizes: Precision, share: float = 1
) -> None:
    """FSDP2's reduce-scatters of the gradients, or of a share of their elements."""
    for p in parameters:
        whole = share * ranks * p.numel(ranks)
        cost.traffic.reduce_scatter += sizes.reduced * whole
        cost.add(gathered=sizes.gathered * whole / (layers if p.in_layer else 1))


# ---- DDP ----
def dense_ddp(model: Model, ranks: int, sizes: Precision = ON_CPU) -> Cost:
    trained, _, _ = split(model)
    gradients = sizes.weight * elements(trained)
    cost = Cost(Traffic(all_reduce=gradients))
    cost.add(weight=sizes.weight * model.numel(), gradient=gradients)
    cost.add(state=adamw_state(trained, elements(trained), sizes.weight))
    return cost


def compact_ddp(model: Model, ranks: int, density: float, sizes: Precision = ON_CPU, sparsified: bool = True) -> Cost:
    """A sparsified model, or a plain one with `masked_allreduce_hook`: the masked entries of gradients are sent."""
    trained, masked, dense = split(model)
    entries, others = density * elements(masked), elements(dense)
    compact = (FLOAT32 if sparsified else sizes.weight) * entries
    cost = Cost(Traffic(all_reduce=compact + sizes.weight * others))
    cost.add(weight=sizes.weight * model.numel(), mask=mask_bytes(masked, density, table=sizes.table))
    if sparsified:  # the values, and the row pointers of each layer's mask
        cost.add(weight=compact, gradient=compact + sizes.weight * others, mask=row_pointers(masked))
    else:  # and the masks of DDP's buckets
        cost.add(gradient=sizes.weight * elements(trained), mask=mask_bytes(masked, density))
        cost.add(state=sizes.master * entries)
    cost.add(state=adamw_state(masked, entries) + adamw_state(dense, others, sizes.weight))
    return cost


def lora_ddp(model: Model, ranks: int, rank: int, sizes: Precision = ON_CPU) -> Cost:
    saved = [p for p in model.parameters if p.saved]
    factors = [f for p in model.parameters if p.adapted for f in p.factors(rank)]
    gradients = FLOAT32 * elements(factors) + sizes.weight * elements(saved)
    cost = Cost(Traffic(all_reduce=gradients))
    cost.add(weight=sizes.weight * model.numel() + gradients, gradient=gradients)
    cost.add(state=adamw_state(factors, elements(factors)) + adamw_state(saved, elements(saved), sizes.weight))
    return cost


# ---- FSDP2 ----
def dense_fsdp2(model: Model, ranks: int, sizes: Precision = ON_CPU) -> Cost:
    trained, _, _ = split(model)
    cost, local = Cost(), elements(trained, ranks)
    add_gathers(cost, model.parameters, ranks, model.layers, sizes.gathered)
    add_reductions(cost, trained, ranks, model.layers, sizes)
    cost.add(weight=sizes.weight * elements(model.parameters, ranks), gradient=sizes.weight * local)
    cost.add(state=adamw_state(trained, local, sizes.weight))
    return cost


def masked_fsdp2(model: Model, ranks: int, density: float, sizes: Precision = ON_CPU) -> Cost:
    """`SparseAdamW` on a plain model: dense gradients, compact state of this rank's rows."""
    trained, masked, dense = split(model)
    cost, entries, others = Cost(), density * elements(masked, ranks), elements(dense, ranks)
    add_gathers(cost, model.parameters, ranks, model.layers, sizes.gathered)
    add_reductions(cost, trained, ranks, model.layers, sizes)
    cost.add(weight=sizes.weight * elements(model.parameters, ranks), gradient=sizes.weight * elements(trained, ranks))
    cost.add(state=adamw_state(masked, entries) + adamw_state(dense, others, sizes.weight) + sizes.master * entries)
    cost.add(mask=mask_bytes(masked, density, ranks, table=sizes.table), host_mask=mask_bytes(masked, density))
    return cost


def sparsified_fsdp2(model: Model, ranks: int, density: float, sizes: Precision = ON_CPU) -> Cost:
    """A sparsified model: FSDP2 gathers weights and values, and reduces the gradients of the values.

    After a step, ranks send each other the values that are in another one's rows: few, where entries are spread evenly,
    and not counted here. Each rank has the masks of whole tensors, since it computes its batch's gradients at all
    entries of a layer, and that of its rows.
    """
    _, masked, dense = split(model)
    cost, entries, others = Cost(), density * elements(masked) / ranks, elements(dense, ranks)
    add_gathers(cost, model.parameters, ranks, model.layers, sizes.gathered)
    add_gathers(cost, masked, ranks, model.layers, sizes.gathered, density)
    add_reductions(cost, masked, ranks, model.layers, sizes, density)
    add_reductions(cost, dense, ranks, model.layers, sizes)
    cost.add(weight=sizes.weight * elements(model.parameters, ranks) + FLOAT32 * entries)
    cost.add(gradient=FLOAT32 * entries + sizes.weight * others)
    cost.add(state=adamw_state(masked, entries) + adamw_state(dense, others, sizes.weight))
    cost.add(mask=mask_bytes(masked, density) + row_pointers(masked) + mask_bytes(masked, density, ranks))
    cost.add(mask=8 * (sum(p.count for p in masked) + 1))  # of the optimizer's bucket: where each tensor's values begin
    return cost


def lora_fsdp2(model: Model, ranks: int, rank: int, sizes: Precision = ON_CPU) -> Cost:
    """Frozen weights and float32 factors, both divided."""
    factors = [f for p in model.parameters if p.adapted for f in p.factors(rank)]
    cost, local = Cost(), elements(factors, ranks)
    add_gathers(cost, [*model.parameters, *factors], ranks, model.layers, sizes.gathered)
    add_reductions(cost, factors, ranks, model.layers, sizes)
    cost.add(weight=sizes.weight * elements(model.parameters, ranks) + FLOAT32 * local, gradient=FLOAT32 * local)
    cost.add(state=adamw_state(factors, local))
    return cost


# ---- the table ----
BROWN = "#92400e"


@dataclass(frozen=True)
class Method:
    """`cost(model, GPUs)`; `style`: of its line in the figure, none: not drawn."""

    name: str
    cost: Callable[[Model, int], Cost]
    style: dict[str, Any] = field(default_factory=dict)


def methods() -> Iterator[Method]:
    from bench.figures import AMBER, BLUE, GREEN, GREY

    yield Method("dense AdamW, FSDP2", lambda m, n: dense_fsdp2(m, n, DENSE), {"color": GREY, "linewidth": 4})
    for rank, line in zip(LORA_RANKS, ("-", "--")):
        style = {"color": AMBER, "linestyle": line}
        yield Method(f"LoRA rank {rank}, FSDP2", lambda m, n, r=rank: lora_fsdp2(m, n, r, FROZEN), style)
        style = style | {"color": BROWN}
        yield Method(f"LoRA rank {rank}, DDP", lambda m, n, r=rank: lora_ddp(m, n, r, FROZEN), style)
    for d in DENSITIES:
        drawn = d == DENSITIES[0]
        style, percent = {"color": BLUE} if drawn else {}, f"deftx {100 * d:g} %"
        yield Method(f"{percent}, FSDP2", lambda m, n, d=d: masked_fsdp2(m, n, d, FROZEN), style)
        dashed = style | {"linestyle": "--"} if drawn else {}
        name = f"{percent}, sparsified, FSDP2"
        yield Method(name, lambda m, n, d=d: sparsified_fsdp2(m, n, d, FROZEN), dashed)
        style = {"color": GREEN} if drawn else {}
        yield Method(f"{percent}, sparsified, DDP", lambda m, n, d=d: compact_ddp(m, n, d, FROZEN), style)


def rows_of(model: Model, method: Method) -> Iterator[dict[str, Any]]:
    for gpus in GPUS:
        cost = method.cost(model, gpus)
        row = {"model": model.name, "parameters": model.numel(), "method": method.name}
        sizes = {f"{what}_bytes": size for what, size in vars(cost.traffic).items()}
        sizes |= {f"{what}_bytes": size for what, size in cost.memory.items()}
        sizes["sent_bytes"] = cost.traffic.sent(gpus)
        sizes["memory_bytes"] = sum(size for what, size in cost.memory.items() if what != "host_mask")
        yield row | {"gpus": gpus} | {name: round(size) for name, size in sizes.items()}


def table() -> list[dict[str, Any]]:
    return [row for model in LLAMAS for method in methods() for row in rows_of(model, method)]


def write(out: Path) -> int:
    rows, path = table(), out / "scale.csv"
    out.mkdir(parents=True, exist_ok=True)
    with replaced(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, path.with_suffix(".png"))
    print(f"written: {path}, {path.with_suffix('.png')}")
    return 0


# ---- the figure ----
def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Memory above, communication below; a column for each model."""
    import matplotlib
    from matplotlib.figure import Figure

    from bench.figures import MUTED, STYLE, WIDTH

    panels = {"memory_bytes": "memory of a GPU, bytes", "sent_bytes": "sent by a GPU in a step, bytes"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 5.2), layout="constrained")
        axes = figure.subplots(len(panels), len(LLAMAS), sharex=True, sharey="row")
        for i, (column, label) in enumerate(panels.items()):
            for axis, model in zip(axes[i], LLAMAS):
                for method in methods():
                    here = [r for r in rows if (r["model"], r["method"]) == (model.name, method.name)]
                    if method.style:
                        axis.plot(GPUS, [r[column] for r in here], label=method.name, **method.style)
                axis.set(xscale="log", yscale="log")
                axis.set_xticks(GPUS, [f"{n:,}" if n in (8, 64, 1024) else "" for n in GPUS])
                axis.minorticks_off()
                axis.yaxis.set_major_formatter(lambda y, _: readable(y))
                axis.grid(axis="both")
                if i == 0:
                    axis.set_title(model.name)
                    axis.axhline(CARD, color=MUTED, linewidth=0.8, linestyle=(0, (1, 1)))
                else:
                    axis.set_xlabel("GPUs")
            axes[i][0].set_ylabel(label)
        axes[0][0].text(GPUS[-1], CARD, readable(CARD), ha="right", va="bottom", fontsize=6.5, color=MUTED)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        figure.savefig(path, bbox_inches="tight", facecolor="white")


def readable(size: float) -> str:
    """ "80 GB" """
    power = min(4, max(0, int(math.log10(size) // 3))) if size > 0 else 0
    return f"{size / 1000**power:g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
