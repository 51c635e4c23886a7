"""What the figures of bench/plots.py show, computed from the rows of one machine."""

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from bench import shapes
from bench.rows import OURS, Row

USUAL = "0.05"  # the density that figures show where there are several
LORA = "PEFT LoRA"  # trains fewer values than the others: a point of reference, not the same work

Point = tuple[float, float]


class Key(NamedTuple):
    """Which work a row is of."""

    op: str
    size: str
    dtype: str
    density: str


Works = dict[Key, dict[str, Row]]  # → provider → its row


def works_of(rows: list[Row]) -> Works:
    """The rows of each work's newest run: those of different runs do not stand side by side."""
    groups: dict[Key, list[Row]] = {}
    for row in rows:
        groups.setdefault(Key(*(row[k] for k in Key._fields)), []).append(row)
    newest = {key: max(row["date"] for row in group) for key, group in groups.items()}
    return {key: {row["provider"]: row for row in group if row["date"] == newest[key]} for key, group in groups.items()}


def number(row: Row, column: str) -> float | None:
    """None where the row is older than the column, or has nothing there."""
    text = row.get(column)
    return float(text) if text else None


def unusual(key: Key) -> float:
    """How far from the usual density."""
    return abs(float(key.density) - float(USUAL)) if key.density else 0.0


def pick(works: Works, op: str, size: str, density: str | None) -> Key | None:
    """Of the works of this title, and of this density if one is asked for: float32 before other dtypes, the usual
    density first.
    """
    found = [key for key in works if (key.op, key.size) == (op, size) and density in (None, key.density)]
    return min(found, key=lambda key: (key.dtype != "float32", unusual(key)), default=None)


# ---- speed ----

HEADLINES = (  # in words, op, size, density
    ("Choose the top 5 % of 50 M scores", "topk_mask", "50M", "0.05"),
    ("Choose the 5 % of XLM-R base that moved most", "select_mask", "xlmr", "0.05"),
    ("Denoise XLM-R base's 72 linear layers, rank 64", "svd_denoise", "xlmr linears x12, rank 64", ""),
    ("Denoise XLM-R base's 72 linear layers, 90 % of the energy", "svd_denoise", "xlmr linears x12, energy 0.9", ""),
    ("AdamW step of 5 % of 50 M parameters, dense gradients", "sparse_adamw", "50M, dense gradient", "0.05"),
    ("AdamW step of 5 % of 50 M parameters, compact gradients", "sparse_adamw", "50M, compact gradient", "0.05"),
    ("AdamW step of 1 % of 50 M parameters, dense gradients", "sparse_adamw", "50M, dense gradient", "0.01"),
    ("AdamW step of 1 % of 50 M parameters, compact gradients", "sparse_adamw", "50M, compact gradient", "0.01"),
    ("Gradient of 5 % of a 768 x 768 weight, 2048 tokens", "masked_linear_grad", "2048 tokens, 768x768", "0.05"),
    ("Training step of MiniLM, 8 x 128 tokens", "training_step", "minilm, 8x128 tokens", None),
    ("Training step of BERT base, 8 x 128 tokens", "training_step", "bert, 8x128 tokens", None),
    ("Training step of XLM-R base, 8 x 256 tokens", "training_step", "xlmr, 8x256 tokens", None),
    ("Training step of Llama 3.2 1B, 2 x 128 tokens", "training_step", "llama1b, 2x128 tokens", None),
)


@dataclass
class Race:
    """A headline's work on one machine."""

    ms: float  # ours
    dtype: str
    peers: dict[str, float]  # times as long as ours, the fastest first
    rows: list[Row]


def races(works: Works) -> dict[str, Race]:
    """Headline → its race; those without peers are left out."""
    found = {}
    for title, *work in HEADLINES:
        key = pick(works, *work)
        rows = works[key] if key else {}
        times = {
            name: t for name, row in rows.items() if not name.startswith(OURS) and (t := number(row, "times_ours"))
        }
        if key and times and OURS in rows:
            peers = dict(sorted(times.items(), key=lambda item: item[1]))
            found[title] = Race(
                float(rows[OURS]["p50_ms"]), key.dtype, peers, [rows[OURS], *(rows[name] for name in peers)]
            )
    return found


def speed_lines(machines: list[dict[str, Race]]) -> dict[tuple[str, str], int]:
    """(headline, peer) → its line from the top, the same for all machines; headlines themselves, peer "", have a line
    as well.
    """
    lines: dict[tuple[str, str], int] = {}
    for title, *_ in HEADLINES:
        names = dict.fromkeys(name for found in machines if title in found for name in found[title].peers)
        for name in ["", *names] if names else []:
            lines[title, name] = len(lines)
    return lines


# ---- memory ----

PARTS = {"weights": "weight_bytes_per_param", "gradients": "gradient_bytes_per_param"}
PARTS |= {"optimizer state": "state_bytes_per_param", "mask": "mask_bytes_per_param"}
REST = "activations and the rest"


@dataclass
class Bar:
    provider: str
    parts: dict[str, float]  # megabytes, REST included
    peak: float  # as measured: less than the parts together where these are not held at one time
    row: Row


def held(row: Row) -> float | None:
    """Bytes of a parameter that training holds, without activations."""
    parts = [number(row, column) for column in PARTS.values()]
    return None if None in parts else sum(parts)


def memory_bars(works: Works) -> dict[str, list[Bar]]:
    """Model and batch → a bar for each provider, ours first, the smallest model first."""
    found: dict[str, list[Bar]] = {}
    for title in dict.fromkeys(key.size for key in works if key.op == "training_step"):
        rows = works[pick(works, "training_step", title, None)]
        for name in sorted(rows, key=lambda name: not name.startswith(OURS)):
            row = rows[name]
            peak, parameters = number(row, "peak_extra_mb"), number(row, "parameters")
            if peak is not None and parameters and held(row) is not None:
                parts = {part: parameters * number(row, column) / 1e6 for part, column in PARTS.items()}
                parts[REST] = max(0.0, peak - sum(parts.values()))
                found.setdefault(title, []).append(Bar(name, parts, peak, row))
    return dict(sorted(found.items(), key=lambda item: float(item[1][0].row["parameters"])))


# ---- growth ----

SIZES = {name: float(shapes.numel(name)) for name in shapes.SIZES if name != "tiny"}


@dataclass(frozen=True)
class Series:
    label: str
    # op, what follows the size's name in the title (None: anything), provider
    works: tuple[tuple[str, str | None, str], ...]
    density: str | None = USUAL  # None: any, for a cost that hardly depends on it


TRAINING = ("training_step", None, OURS), ("training_step", None, "dense, torch AdamW fused")
OPTIMIZER = ("optimizer_step", "", OURS), ("optimizer_step", "", "torch AdamW fused")
STEP = ("sparse_adamw", "dense gradient", OURS), ("sparse_adamw", "dense gradient", "torch AdamW fused")
LABELS = ("ours, 5 %", "dense AdamW")
SELECTION = (
    Series("ours", (("select_mask", "", OURS),)),
    Series("ours, denoised with rank 64", (("select_mask", "rank 64", OURS),), None),
    Series(
        "NumPy's or CuPy's partition", (("select_mask", "", "numpy partition"), ("select_mask", "", "cupy partition"))
    ),
    Series("LT-SFT's way", (("select_mask", "", "LT-SFT's way"),)),
)
GROWTH = {  # → column, series
    "time to select the mask": ("p50_ms", SELECTION),
    "time of an optimizer step": ("p50_ms", tuple(Series(label, (step,)) for label, step in zip(LABELS, STEP))),
    "optimizer state": (
        "state_bytes_per_param",
        tuple(Series(label, works) for label, *works in zip(LABELS, TRAINING, OPTIMIZER)),
    ),
    "peak memory of training": (
        "peak_extra_mb",
        tuple(Series(label, (training,)) for label, training in zip(LABELS, TRAINING)),
    ),
}


@dataclass
class Curve:
    """Of a series in one dtype: parameters → milliseconds or bytes, as measured and, beyond that, in proportion."""

    label: str
    dtype: str
    measured: list[Point]
    rate: float | None  # modelled cost of a parameter
    rows: list[Row]

    def modelled(self) -> list[Point]:
        # A model has a few parameters more than the matrices of its size: that size is no new point.
        beyond = sorted(n for n in SIZES.values() if n > 1.05 * self.measured[-1][0])
        return [(n, self.rate * n) for n in beyond] if self.rate else []


def growth_panels(works: Works) -> dict[str, list[Curve]]:
    panels = {
        title: [c for series in each for c in curves(works, series, column)] for title, (column, each) in GROWTH.items()
    }
    return {title: found for title, found in panels.items() if found}


def curves(works: Works, series: Series, column: str) -> list[Curve]:
    """One for each dtype, float32 first."""
    dtypes: dict[str, dict[float, tuple[float, Row]]] = {}  # → parameters → cost
    for key in sorted(works, key=unusual):  # of several densities the usual one
        name, _, rest = key.size.partition(", ")
        for op, wanted, provider in series.works:
            row = works[key].get(provider)
            if row is None or key.op != op or wanted not in (None, rest) or series.density not in (None, key.density):
                continue
            n = number(row, "parameters") if op == "training_step" else SIZES.get(name)
            if n and (cost := cost_of(row, column, n)) is not None:
                dtypes.setdefault(key.dtype, {}).setdefault(n, (cost, row))
    found = []
    for dtype, points in sorted(dtypes.items(), reverse=True):
        largest = max(points)
        cost, row = points[largest]
        rate = held(row) if column == "peak_extra_mb" else cost / largest
        measured = [(n, points[n][0]) for n in sorted(points)]
        found.append(Curve(series.label, dtype, measured, rate, [row for _, row in points.values()]))
    return found


def cost_of(row: Row, column: str, parameters: float) -> float | None:
    value = number(row, column)
    return (
        None if value is None else value * {"state_bytes_per_param": parameters, "peak_extra_mb": 1e6}.get(column, 1.0)
    )


# ---- roofline ----


@dataclass
class Spot:
    """An operator's largest work in a dtype: how much of what the machine can do is reached."""

    op: str
    dtype: str
    intensity: float  # operations for each byte of the least work; 0: it only moves bytes
    ours: float  # Gflop/s of the least work; with intensity 0 the share of the floor
    peer: float | None  # the same of the fastest peer
    rows: list[Row]


def spots(works: Works) -> list[Spot]:
    """Of several densities the usual one; rows that are older than the columns do not count."""
    groups: dict[tuple, list[Key]] = {}
    for key, rows in works.items():
        flops = number(rows[OURS], "flops") if OURS in rows else None
        if flops is not None:
            groups.setdefault((key.op, key.dtype, flops > 0), []).append(key)
    found = []
    for (op, dtype, computes), keys in groups.items():
        rows = works[max(keys, key=lambda key: (-unusual(key), number(works[key][OURS], "bytes")))]
        ours = rows[OURS]
        flops = number(ours, "flops")
        peers = [row for name, row in rows.items() if not name.startswith((OURS, LORA))]
        used = [ours, *sorted(peers, key=lambda row: float(row["p50_ms"]))[:1]]
        reached = [flops / float(row["p50_ms"]) / 1e6 if computes else float(row["share_of_floor"]) for row in used]
        found.append(Spot(op, dtype, flops / number(ours, "bytes"), reached[0], reached[1] if peers else None, used))
    return found


def roofs(found: list[Spot]) -> dict[str, Point]:
    """dtype → (GB/s of a large copy, Gflop/s of a matrix product): the median over the runs shown."""
    measured: dict[str, list[Point]] = {}
    for spot in found:
        copy, product = (number(spot.rows[0], column) for column in ("copy_gb_s", "product_gflop_s"))
        if copy and product:
            measured.setdefault(spot.dtype, []).append((copy, product))
    return {dtype: tuple(map(statistics.median, zip(*each))) for dtype, each in sorted(measured.items(), reverse=True)}
