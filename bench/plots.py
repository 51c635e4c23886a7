"""The figures of `python -m bench plot`, made from rows alone: speed, memory, growth with the number of parameters,
roofline.
"""

import math
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench import plot_data
from bench.plot_data import LORA, PARTS, REST, Bar, Curve, Race, Spot, Works
from bench.rows import OURS, Row
from bench.tables import duration, origin
from bench.targets import NOT_MEASURED, of_machine

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
BLUE, SKY, GREY, AMBER, GREEN, VIOLET, RED = "#2563eb", "#0ea5e9", "#9ca3af", "#f59e0b", "#10b981", "#8b5cf6", "#ef4444"
STYLE = {
    "savefig.dpi": 150, "font.size": 8, "font.family": "DejaVu Sans", "axes.edgecolor": MUTED, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 9, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 7,
    "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.7, "xtick.labelsize": 7, "ytick.labelsize": 7,
}  # fmt: skip
WIDTH = 8.4  # inches: a README shows some 840 pixels, so that the smallest letters are nine pixels high
KINDS = {"cpu": "CPU", "cuda": "GPU"}
PART_COLORS = dict(zip((*PARTS, REST), ("#94a3b8", AMBER, BLUE, GREEN, GRID)))
MODELS = {"minilm": "MiniLM", "bert": "BERT base", "xlmr": "XLM-R base", "llama1b": "Llama 3.2 1B"}
# others grey
SERIES_COLORS = {"ours": BLUE, "ours, 5 %": BLUE, "ours, denoised with rank 64": SKY, "LT-SFT's way": AMBER}


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draw what the rows have as PNG files in the folder, and tell what they have not. Returns the files."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    machines = {kind: plot_data.works_of(of_machine(rows, kind)) for kind in KINDS}
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in {"speed": speed, "memory": memory, "growth": growth, "roofline": roofline}.items():
            figure = draw(machines)
            if figure is None:
                print(f"{name}.png is not drawn: there are no rows for it")
                continue
            path, new = folder / f"{name}.png", folder / f"{name}.tmp.png"
            figure.savefig(new, bbox_inches="tight", facecolor="white")
            new.replace(path)
            paths.append(path)
    return paths


# ---- the figures: machines, "cpu" and "cuda" → works, or None where there is nothing to draw ----


def speed(machines: dict[str, Works]) -> Any:
    """A bar for each peer, by headline, a panel for each kind of machine."""
    found = {kind: plot_data.races(works) for kind, works in machines.items()}
    found = dict(sorted(found.items(), key=lambda item: not item[1]))  # beside the names what was measured
    lines = plot_data.speed_lines(list(found.values()))
    if not lines:
        return None
    widths = [1.0 if each else 0.4 for each in found.values()]
    height = 0.155 * len(lines) + 0.8
    # names need room at the left
    edges = {"left": 0.25, "right": 0.995, "top": 1 - 0.3 / height, "bottom": 0.4 / height}
    new, cells = figure(height, 1, 2, None, width_ratios=widths, wspace=0.05, **edges)
    times = [t for each in found.values() for race in each.values() for t in race.peers.values()]
    for (kind, each), cell in zip(found.items(), cells):
        axis = new.add_subplot(cell)
        axis.set_title(KINDS[kind])
        if not each:
            not_measured(axis, KINDS[kind])
            continue
        axis.set(
            xscale="log", xlim=(0.75 * min(1, *times), 2 * max(1, *times)), ylim=(len(lines) - 0.3, -0.7), yticks=[]
        )
        axis.set_xlabel("times as long as ours, the blue line" + ("; orange: less" if min(times) < 1 else ""))
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axis.xaxis.set_minor_formatter("")
        axis.grid(axis="x")
        axis.spines["left"].set_visible(False)
        axis.axvline(1, color=BLUE, linewidth=1.2)
        draw_races(axis, each, lines)
        if not new.texts:
            name_lines(new, axis, lines)
    return small_print(new, [race.rows for each in found.values() for race in each.values()])


def draw_races(axis: Any, found: dict[str, Race], lines: dict[tuple[str, str], int]) -> None:
    for (title, name), y in lines.items():
        race = found.get(title)
        if race and not name:
            label = f"ours: {duration(race.ms)}" + ("" if race.dtype == "float32" else f", {race.dtype}")
            axis.text(
                1, y, label, transform=axis.get_yaxis_transform(), ha="right", va="center", fontsize=6.5, color=BLUE
            )
        elif race and name in race.peers:
            times = race.peers[name]
            axis.barh(y, times - 1, 0.62, left=1, color=GREY if times >= 1 else AMBER)
            beside(
                axis,
                f"{times:.2f}" if times < 2 else f"{times:.1f}" if times < 10 else f"{times:.0f}",
                max(times, 1),
                y,
            )


def name_lines(new: Any, axis: Any, lines: dict[tuple[str, str], int]) -> None:
    """Headlines and peers at the left of the figure."""
    from matplotlib.transforms import blended_transform_factory

    place = blended_transform_factory(new.transFigure, axis.transData)
    for (title, name), y in lines.items():
        if name:
            new.text(0.245, y, words(name), transform=place, ha="right", va="center", fontsize=7, color=MUTED)
        else:
            back = {"facecolor": "white", "edgecolor": "none", "pad": 1}
            new.text(0, y, title, transform=place, va="center", fontsize=7.5, weight="bold", bbox=back)


def memory(machines: dict[str, Works]) -> Any:
    """What training holds, stacked: a panel for each model, a column for each kind of machine."""
    found = {kind: bars for kind, works in machines.items() if (bars := plot_data.memory_bars(works))}
    if not found:
        return None
    titles = list(dict.fromkeys(title for bars in found.values() for title in bars))
    names = {t: list(dict.fromkeys(bar.provider for bars in found.values() for bar in bars.get(t, []))) for t in titles}
    heights = [len(names[title]) for title in titles]
    new, cells = figure(0.19 * sum(heights) + 0.35 * len(titles) + 0.3, len(titles), len(found), height_ratios=heights)
    for i, title in enumerate(titles):
        model, comma, batch = title.partition(",")
        for j, (kind, bars) in enumerate(found.items()):
            axis = new.add_subplot(cells[i, j])
            if title not in bars:
                not_measured(axis, KINDS[kind])
                continue
            axis.set_title(
                f"{KINDS[kind]}: {MODELS.get(model, model)}{comma}{batch}, {bars[title][0].row['dtype']}", fontsize=8
            )
            draw_bars(axis, bars[title], names[title])
            if any(title in before for before in list(found.values())[:j]):
                axis.set_yticklabels([])
    legend(
        new, [mark(name, marker="s", color=color, linestyle="", markersize=6) for name, color in PART_COLORS.items()]
    )
    return small_print(new, [[bar.row for bar in each] for bars in found.values() for each in bars.values()])


def draw_bars(axis: Any, bars: list[Bar], names: list[str]) -> None:
    """Each on the line of its name, with the measured peak at its end."""
    if not bars:
        return not_measured(axis, axis.get_title())
    unit, scale = ("GB", 1e-3) if max(bar.peak for bar in bars) >= 1000 else ("MB", 1.0)
    for bar in bars:
        y, left = names.index(bar.provider), 0.0
        for part, size in bar.parts.items():
            axis.barh(y, size * scale, 0.7, left=left, color=PART_COLORS[part])
            left += size * scale
        beside(axis, f"{bar.peak * scale:.3g} {unit}", left, y)
    axis.set(
        xlim=(0, 1.15 * scale * max(sum(bar.parts.values()) for bar in bars)), ylim=(len(names) - 0.4, -0.6), xticks=[]
    )
    axis.set_yticks(range(len(names)), map(words, names), color=INK)
    axis.spines["bottom"].set_visible(False)
    axis.tick_params(length=0)


def growth(machines: dict[str, Works]) -> Any:
    """Costs by number of parameters, measured and modelled."""
    found = [(kind, *panel) for kind, works in machines.items() for panel in plot_data.growth_panels(works).items()]
    if not found:
        return None
    height = (len(found) + 1) // 2
    new, cells = figure(2.5 * height + 0.3, height, 2)
    for (kind, title, curves), cell in zip(found, cells):
        axis = new.add_subplot(cell)
        axis.set(xscale="log", yscale="log", title=f"{KINDS[kind]}: {title}", xlabel="parameters", xlim=(8e6, 1e10))
        for curve in curves:
            draw_curve(axis, curve)
        low, high = axis.get_ylim()
        labels = len({curve.label for curve in curves})
        axis.set_ylim(low, high * (high / low) ** (0.12 * ((labels + 1) // 2)))  # room for the legend
        axis.legend(loc="upper left", ncols=2, handlelength=1.5, borderaxespad=0)
        axis.xaxis.set_major_formatter(lambda n, _: quantity(n, {"B": 1e9, "M": 1e6}))
        units = {"s": 1e3, "ms": 1} if "time" in title else {"TB": 1e12, "GB": 1e9, "MB": 1e6, "KB": 1e3}
        axis.yaxis.set_major_formatter(lambda y, _, units=units: quantity(y, units))
        axis.grid()
        axis.tick_params(which="both", length=0)
    model = (
        "modelled: in proportion to the parameters, from the largest measured point; peak memory without activations"
    )
    marks = [
        mark("measured", marker="o"),
        mark(model, marker="o", linestyle="--", linewidth=1, markerfacecolor="white"),
    ]
    if others := {curve.dtype for _, _, curves in found for curve in curves} - {"float32"}:
        marks.append(mark(", ".join(sorted(others)), marker="s", linestyle=""))
    legend(new, marks)
    return small_print(new, [curve.rows for _, _, curves in found for curve in curves])


def draw_curve(axis: Any, curve: Curve) -> None:
    style = {
        "color": SERIES_COLORS.get(curve.label, GREY),
        "marker": "o" if curve.dtype == "float32" else "s",
        "markersize": 4,
    }
    named_already = curve.label in axis.get_legend_handles_labels()[1]
    axis.plot(*zip(*curve.measured), label=None if named_already else curve.label, **style)
    if beyond := curve.modelled():
        largest, _ = curve.measured[-1]
        axis.plot(*zip((largest, curve.rate * largest), *beyond), "--", color=style["color"], linewidth=1)
        axis.plot(*zip(*beyond), linestyle="", markerfacecolor="white", **style)


def quantity(value: float, units: dict[str, float]) -> str:
    """In the first unit that it has one of."""
    unit, scale = next((item for item in units.items() if value >= item[1]), list(units.items())[-1])
    return f"{value / scale:g} {unit}"


def roofline(machines: dict[str, Works]) -> Any:
    """Of each operator's largest work: Gflop/s under the machine's roofs, or the share of the floor where only bytes
    move.
    """
    found = {kind: plot_data.spots(works) for kind, works in machines.items()}
    if not any(found.values()):
        return None
    counts = [sum(not spot.intensity for spot in each) for each in found.values()]
    heights = [max(3.4, 0.2 * count + 0.7) if each else 0.5 for each, count in zip(found.values(), counts)]
    new, cells = figure(sum(heights) + 0.3, 2, 2, height_ratios=heights)
    for i, (kind, each) in enumerate(found.items()):
        if not each:
            not_measured(new.add_subplot(cells[i, :]), KINDS[kind])
            continue
        if computing := [spot for spot in each if spot.intensity]:
            draw_roofs(new.add_subplot(cells[i, 0]), computing, KINDS[kind])
        if moving := [spot for spot in each if not spot.intensity]:
            draw_shares(new.add_subplot(cells[i, 1]), moving, KINDS[kind])
    dot = {"color": INK, "marker": "o", "linestyle": ""}
    legend(new, [mark("ours", **dot), mark("fastest peer", markerfacecolor="white", **dot)])
    return small_print(new, [spot.rows for each in found.values() for spot in each])


def draw_roofs(axis: Any, found: list[Spot], kind: str) -> None:
    axis.set(
        xscale="log",
        yscale="log",
        title=f"{kind}: rate of arithmetic",
        xlabel="operations for each byte",
        ylabel="Gflop/s",
    )
    low, high = min(s.intensity for s in found) / 3, max(s.intensity for s in found) * 3
    roofs = plot_data.roofs(found)
    tops = [product for _, product in roofs.values()]
    for dtype, (copy, product) in roofs.items():
        bend = min(max(product / copy, low), high)
        xs = [low, bend, high]
        axis.plot(xs, [min(copy * x, product) for x in xs], "-" if dtype == "float32" else ":", color=INK, linewidth=1)
        style = {"textcoords": "offset points", "fontsize": 6.5, "va": "bottom" if product == max(tops) else "top"}
        axis.annotate(f"matrix\nproduct,\n{dtype}", (high, min(copy * high, product)), (2, 0), **style)
        if product == max(tops) and low < bend:
            middle = (low * bend) ** 0.5
            axis.annotate("copy", (middle, copy * middle), (-4, 0), ha="right", **style)
    colors = dict(zip(dict.fromkeys(spot.op for spot in found), (BLUE, AMBER, GREEN, VIOLET, RED, SKY)))
    for spot in found:
        style = {
            "color": colors[spot.op],
            "marker": "o" if spot.dtype == "float32" else "s",
            "markersize": 5,
            "linewidth": 0.8,
        }
        if spot.peer:
            axis.plot([spot.intensity] * 2, [spot.ours, spot.peer], markerfacecolor="white", **style)
        axis.plot(spot.intensity, spot.ours, **style | {"linestyle": ""}, label=named(spot))
    rates = [spot.ours for spot in found] + [spot.peer for spot in found if spot.peer] + tops
    axis.set(
        xlim=(low, high), ylim=(10 ** math.floor(math.log10(min(rates))), 10 ** math.ceil(math.log10(1.2 * max(rates))))
    )
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter(lambda value, _: f"{value:g}")
        ticks.set_minor_formatter("")
    axis.grid()
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, handletextpad=0.2)


def draw_shares(axis: Any, found: list[Spot], kind: str) -> None:
    for y, spot in enumerate(found):
        axis.barh(y, spot.ours, 0.66, color=BLUE)
        if spot.peer:
            axis.plot(spot.peer, y, "o", color=INK, markerfacecolor="white", markersize=4.5)
        beside(axis, f"{spot.ours:.2f}", max(spot.ours, spot.peer or 0), y)
    axis.axvline(1, color=INK, linewidth=1)
    axis.set_yticks(range(len(found)), map(named, found), color=INK)
    axis.set(
        title=f"{kind}: share of the floor",
        xlabel="least time to move the bytes / time taken",
        ylim=(len(found) - 0.4, -0.6),
    )
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")


# ---- what they share ----


def words(provider: str) -> str:
    name = "ours" + provider.removeprefix(OURS) if provider.startswith(OURS) else provider
    return name + (" (trains fewer values)" if name.startswith(LORA) else "")


def named(spot: Spot) -> str:
    return spot.op + ("" if spot.dtype in ("float32", "bool") else f", {spot.dtype}")


def figure(height: float, rows: int, columns: int, layout: str | None = "constrained", **grid: Any) -> tuple[Any, Any]:
    """(a figure, its grid of cells); without pyplot, so that nothing is left behind."""
    from matplotlib.figure import Figure

    new = Figure(figsize=(WIDTH, height), layout=layout)
    return new, new.add_gridspec(rows, columns, **grid)


def mark(label: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **{"color": MUTED, "markersize": 4.5, "label": label, **style})


def legend(new: Any, marks: list[Any]) -> None:
    """Of the whole figure, above it."""
    new.legend(handles=marks, loc="outside upper center", ncols=len(marks))


def beside(axis: Any, text: str, x: float, y: float) -> None:
    axis.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=6.5)


def not_measured(axis: Any, what: str) -> None:
    axis.set(xticks=[], yticks=[])
    axis.patch.set_facecolor("#f9fafb")
    axis.spines[:].set_visible(False)
    axis.text(0.5, 0.5, f"{what}: {NOT_MEASURED}", transform=axis.transAxes, ha="center", va="center", color=MUTED)


def small_print(new: Any, shown: Iterable[list[Row]]) -> Any:
    """Beneath, where the rows come from."""
    rows = [row for each in shown for row in each]
    sources = [
        origin([row for row in rows if row["device"] == device])
        for device in dict.fromkeys(row["device"] for row in rows)
    ]
    text = "\n".join(line for source in sources for line in textwrap.wrap(source, 170))
    new.text(0, -0.1 / new.get_figheight(), text, va="top", fontsize=6, color=MUTED)
    return new
