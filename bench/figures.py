"""The figures of `python -m bench plot`, made from rows alone: speedups over baselines, and memory of training."""

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.report import KINDS, duration, origin
from bench.rows import NOT_MEASURED, OURS, Row, Workloads, by_workload, of_machine

INK, MUTED, GRID, BLUE, GREY, AMBER, GREEN = (
    "#1f2430", "#6b7280", "#e5e7eb", "#2563eb", "#9ca3af", "#f59e0b", "#10b981",
)  # fmt: skip
STYLE = {
    "savefig.dpi": 150, "font.size": 8, "font.family": "DejaVu Sans", "axes.edgecolor": MUTED, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "legend.fontsize": 7, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}  # fmt: skip
WIDTH = 8.4  # inches: shown 840 pixels wide, the smallest letters are nine pixels high
HEADLINES = (  # title, op, size, density (None: any)
    ("Select the top 5 % of 50 M scores", "topk_mask", "50M", "0.05"),
    ("Select the 5 % of XLM-R base that moved most", "select_mask", "xlmr", "0.05"),
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
USUAL_DENSITY = 0.05
LORA = "PEFT LoRA"  # trains fewer values than the others: a point of reference
MODELS = {"minilm": "MiniLM", "bert": "BERT base", "xlmr": "XLM-R base", "llama1b": "Llama 3.2 1B"}
PARTS = {  # → column of bytes per parameter, color
    "weights": ("weight_bytes_per_param", "#94a3b8"),
    "gradients": ("gradient_bytes_per_param", AMBER),
    "optimizer state": ("state_bytes_per_param", BLUE),
    "mask": ("mask_bytes_per_param", GREEN),
}
REST = "activations and the rest"
COLORS = {part: color for part, (_, color) in PARTS.items()} | {REST: GRID}


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw the figures for which there are rows as PNG files in the folder, print which are missing, and return the
    files."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    machines = {kind: by_workload(of_machine(rows, kind)) for kind in KINDS}
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in {"speed": speed, "memory": memory}.items():
            drawn = draw(machines)
            if drawn is None:
                print(f"{name}.png is not drawn: there are no rows for it")
                continue
            path, new = folder / f"{name}.png", folder / f"{name}.tmp.png"
            drawn.savefig(new, bbox_inches="tight", facecolor="white")
            new.replace(path)
            paths.append(path)
    return paths


def pick(workloads: Workloads, op: str, size: str, density: str | None) -> dict[str, Row]:
    """The rows of the workload with this title: float32 before other dtypes, then the density closest to the usual."""

    def rank(key: tuple[str, ...]) -> tuple[bool, float]:
        return key[2] != "float32", abs(float(key[3]) - USUAL_DENSITY) if key[3] else 0.0

    found = [key for key in workloads if key[:2] == (op, size) and density in (None, key[3])]
    return workloads[min(found, key=rank)] if found else {}


# ---- speed ----
def comparisons(workloads: Workloads) -> dict[str, dict[str, Row]]:
    """Headline → ours and then its baselines, the fastest first; workloads without baselines are left out."""
    found = {}
    for title, *names in HEADLINES:
        rows = pick(workloads, *names)
        others = [row for n, row in rows.items() if not n.startswith(OURS) and row.get("times_ours")]
        if others and OURS in rows:
            found[title] = {row["provider"]: row for row in (rows[OURS], *sorted(others, key=speedup_of))}
    return found


def speedup_of(row: Row) -> float:
    return float(row["times_ours"])


def lines_of(machines: Iterable[dict[str, dict[str, Row]]]) -> dict[tuple[str, str], int]:
    """(headline, implementation) → its line from the top, the same for all machines; the headline is on ours."""
    lines: dict[tuple[str, str], int] = {}
    for title, *_ in HEADLINES:
        for name in dict.fromkeys(n for found in machines for n in found.get(title, {})):
            lines[title, name] = len(lines)
    return lines


def speed(machines: dict[str, Workloads]) -> Any:
    """A bar for each baseline, by headline; a panel for each kind of machine."""
    found = {kind: comparisons(workloads) for kind, workloads in machines.items()}
    found = dict(sorted(found.items(), key=lambda item: not item[1]))  # what was measured first
    lines = lines_of(list(found.values()))
    if not lines:
        return None
    rows = [row for each in found.values() for shown in each.values() for row in shown.values()]
    values = [1.0, *(speedup_of(row) for row in rows if row.get("times_ours"))]
    height = 0.155 * len(lines) + 0.8
    edges = {"left": 0.25, "right": 0.995, "top": 1 - 0.3 / height, "bottom": 0.4 / height}  # names at the left
    widths = [1.0 if each else 0.4 for each in found.values()]
    new, cells = figure(height, 1, 2, None, width_ratios=widths, wspace=0.05, **edges)
    for (kind, each), cell in zip(found.items(), cells):
        axis = new.add_subplot(cell)
        axis.set_title(KINDS[kind])
        if not each:
            not_measured(axis, KINDS[kind])
            continue
        limits = (0.75 * min(values), 2 * max(values))
        axis.set(xscale="log", xlim=limits, ylim=(len(lines) - 0.3, -0.7), yticks=[])
        axis.set_xlabel("speedup of deftx over the baseline" + ("; orange: deftx is slower" if min(values) < 1 else ""))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(axis="x")
        axis.spines["left"].set_visible(False)
        axis.axvline(1, color=BLUE, linewidth=1.2)
        draw_speedups(axis, each, lines)
        if not new.texts:
            draw_names(new, axis, lines)
    return sources_below(new, rows)


def draw_speedups(axis: Any, found: dict[str, dict[str, Row]], lines: dict[tuple[str, str], int]) -> None:
    for (title, name), y in lines.items():
        row = found.get(title, {}).get(name)
        if row and name == OURS:
            dtype = "" if row["dtype"] == "float32" else f", {row['dtype']}"
            style = {"ha": "right", "va": "center", "fontsize": 6.5, "color": BLUE}
            text = f"deftx: {duration(float(row['p50_ms']))}{dtype}"
            axis.text(1, y, text, transform=axis.get_yaxis_transform(), **style)
        elif row:
            value = speedup_of(row)
            axis.barh(y, value - 1, 0.62, left=1, color=GREY if value >= 1 else AMBER)
            beside(axis, f"{value:.{2 if value < 2 else 1 if value < 10 else 0}f}", max(value, 1), y)


def draw_names(new: Any, axis: Any, lines: dict[tuple[str, str], int]) -> None:
    """Headlines and baselines at the left of the figure."""
    from matplotlib.transforms import blended_transform_factory

    position = blended_transform_factory(new.transFigure, axis.transData)
    for (title, name), y in lines.items():
        if name == OURS:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            new.text(0, y, title, transform=position, va="center", fontsize=7.5, weight="bold", bbox=box)
        else:
            new.text(0.245, y, label_of(name), transform=position, ha="right", va="center", fontsize=7, color=MUTED)


# ---- memory ----
def parts_of(row: Row) -> dict[str, float]:
    """Megabytes by what they hold, REST included; empty for an older row, without the columns."""
    columns = ("peak_extra_mb", "parameters", *(column for column, _ in PARTS.values()))
    if not all(row.get(column) for column in columns):
        return {}
    parts = {part: float(row["parameters"]) * float(row[column]) / 1e6 for part, (column, _) in PARTS.items()}
    # The peak is less than the parts together where these are not held at one time.
    return parts | {REST: max(0.0, float(row["peak_extra_mb"]) - sum(parts.values()))}


def memory_bars(workloads: Workloads) -> dict[str, list[Row]]:
    """Model and batch → a row for each implementation, ours first; the smallest model first."""
    found: dict[str, list[Row]] = {}
    for title in dict.fromkeys(size for op, size, *_ in workloads if op == "training_step"):
        rows = [row for row in pick(workloads, "training_step", title, None).values() if parts_of(row)]
        if rows:
            found[title] = sorted(rows, key=lambda row: not row["provider"].startswith(OURS))
    return dict(sorted(found.items(), key=lambda item: float(item[1][0]["parameters"])))


def memory(machines: dict[str, Workloads]) -> Any:
    """Memory of training in stacked bars: a panel for each model, a column for each kind of machine."""
    from matplotlib.lines import Line2D

    found = {kind: bars for kind, workloads in machines.items() if (bars := memory_bars(workloads))}
    if not found:
        return None
    names: dict[str, dict[str, int]] = {}  # title → implementation → its line
    for each in found.values():
        for title, shown in each.items():
            lines = names.setdefault(title, {})
            for row in shown:
                lines.setdefault(row["provider"], len(lines))
    heights = list(map(len, names.values()))
    new, cells = figure(0.19 * sum(heights) + 0.35 * len(names) + 0.3, len(names), len(found), height_ratios=heights)
    for i, title in enumerate(names):
        model, comma, batch = title.partition(",")
        for j, (kind, each) in enumerate(found.items()):
            axis = new.add_subplot(cells[i, j])
            if title not in each:
                not_measured(axis, KINDS[kind])
                continue
            dtype = each[title][0]["dtype"]
            axis.set_title(f"{KINDS[kind]}: {MODELS.get(model, model)}{comma}{batch}, {dtype}", fontsize=8)
            draw_bars(axis, each[title], names[title])
            if any(title in before for before in list(found.values())[:j]):
                axis.set_yticklabels([])
    marks = [Line2D([], [], label=n, color=c, marker="s", linestyle="", markersize=6) for n, c in COLORS.items()]
    new.legend(handles=marks, loc="outside upper center", ncols=len(marks))
    return sources_below(new, [row for each in found.values() for bars in each.values() for row in bars])


def draw_bars(axis: Any, rows: list[Row], lines: dict[str, int]) -> None:
    """Each on the line of its implementation, with the measured peak at its end."""
    unit, scale = ("GB", 1e-3) if max(float(row["peak_extra_mb"]) for row in rows) >= 1000 else ("MB", 1.0)
    widest = 0.0
    for row in rows:
        y, left = lines[row["provider"]], 0.0
        for part, size in parts_of(row).items():
            axis.barh(y, size * scale, 0.7, left=left, color=COLORS[part])
            left += size * scale
        beside(axis, f"{float(row['peak_extra_mb']) * scale:.3g} {unit}", left, y)
        widest = max(widest, left)
    axis.set(xlim=(0, 1.15 * widest), ylim=(len(lines) - 0.4, -0.6), xticks=[])
    axis.set_yticks(range(len(lines)), map(label_of, lines), color=INK)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(length=0)


# ---- both ----
def label_of(implementation: str) -> str:
    return implementation + (" (trains fewer values)" if implementation.startswith(LORA) else "")


def figure(height: float, rows: int, columns: int, layout: str | None = "constrained", **grid: Any) -> tuple[Any, Any]:
    """(a figure, its grid of cells), made without pyplot's global state."""
    from matplotlib.figure import Figure

    new = Figure(figsize=(WIDTH, height), layout=layout)
    return new, new.add_gridspec(rows, columns, **grid)


def beside(axis: Any, text: str, x: float, y: float) -> None:
    axis.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=6.5)


def not_measured(axis: Any, what: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.patch.set_facecolor("#f9fafb")
    axis.spines[:].set_visible(False)
    axis.text(0.5, 0.5, f"{what}: {NOT_MEASURED}", transform=axis.transAxes, ha="center", va="center", color=MUTED)


def sources_below(new: Any, rows: list[Row]) -> Any:
    """Below the figure: where its rows come from."""
    devices = dict.fromkeys(row["device"] for row in rows)
    sources = [origin([row for row in rows if row["device"] == device]) for device in devices]
    text = "\n".join(line for source in sources for line in textwrap.wrap(source, 170))
    new.text(0, -0.1 / new.get_figheight(), text, va="top", fontsize=6, color=MUTED)
    return new
