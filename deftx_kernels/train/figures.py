"""The figures of a report. Each function takes the run folder, its config.json and metrics.json."""

import re
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from safetensors import safe_open

from deftx_kernels.denoise import svd_denoise
from deftx_kernels.files import replaced
from deftx_kernels.mask import CSRMask
from deftx_kernels.train.cldr import language_name
from deftx_kernels.train.config import METHODS, Recipe, SelectionConfig
from deftx_kernels.train.metrics import METRICS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = {"full": "#9ca3af", "deft-x": "#2563eb", "lt-sft": "#f59e0b", "lift": "#10b981"}
STYLE = {
    "figure.dpi": 160,
    "savefig.dpi": 160,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
LAYER = re.compile(r"^(?P<before>.*?)\.(?:layers?|h|blocks?)\.(?P<layer>\d+)\.(?P<kind>.*)$")
MAX_SPECTRUM_LAYERS = 4
SHORT_KINDS = {
    "attention.output.dense": "attention output",
    "intermediate.dense": "intermediate",
    "output.dense": "output",
    "pooler.dense": "pooler",
}
KINDS_IN_ORDER = (
    "word embeddings",
    "position embeddings",
    "token type embeddings",
    "query",
    "key",
    "value",
    "attention output",
    "intermediate",
    "output",
    "pooler",
    "biases",
    "",
)


def draw_all(run_dir: Path, config: dict, metrics: dict) -> dict[str, str]:
    """Draw the figures that the run has data for, as figures/*.png. Returns {name: path relative to the run folder}."""
    folder = run_dir / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    with plt.rc_context(STYLE):
        for name, draw in {"scores": scores, "costs": costs, "spectra": spectra, "density": density}.items():
            figure = draw(run_dir, config, metrics)
            if figure is not None:
                with replaced(folder / f"{name}.png") as partial:
                    figure.savefig(partial, format="png", bbox_inches="tight", facecolor="white")
                plt.close(figure)
                drawn[name] = f"figures/{name}.png"
    return drawn


# ---- scores ----


def scores_by_method(metrics: dict) -> dict[tuple[str, str], dict[str, list[float]]]:
    """{(method, "task" or "composed"): {language: score of each seed}}, in the order of METHODS."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in metrics["scores"]:
        score = row[metrics["data"]["metric"]]
        found.setdefault((row["method"], row["kind"]), {}).setdefault(row["language"], []).append(score)
    order, appearance = list(METHODS), {key: i for i, key in enumerate(found)}
    keys = sorted(found, key=lambda key: (order.index(Recipe.of(key[0]).name), appearance[key]))
    return {key: found[key] for key in keys}


def colors_of(methods: Iterable[str]) -> dict[str, tuple]:
    """A colour for each method: that of its recipe, lighter for each further variant of a recipe."""
    colors: dict[str, tuple] = {}
    for method in dict.fromkeys(methods):
        name = Recipe.of(method).name
        before = sum(Recipe.of(other).name == name for other in colors)
        base = np.array(to_rgb(COLORS[name]))
        colors[method] = tuple(base + (1 - base) * (1 - 0.65**before))
    return colors


def scores(run_dir: Path, config: dict, metrics: dict):
    """The score by target language: of full fine-tuning, of each method alone (light) and composed (full colour)."""
    targets, values = metrics["data"]["targets"], scores_by_method(metrics)
    colors = colors_of(method for method, _ in values)
    figure, axes = plt.subplots(figsize=(max(5.5, 1.2 + 0.34 * len(values) * len(targets)), 3.2))
    width = 0.8 / len(values)
    for i, ((method, kind), by_language) in enumerate(values.items()):
        x = np.arange(len(targets)) + (i - (len(values) - 1) / 2) * width
        each = [by_language[name] for name in targets]
        suffix = "" if method == "full" else ", task alone" if kind == "task" else ", task + language"
        light = kind == "task" and method != "full"
        means = [float(np.mean(v)) for v in each]
        axes.bar(
            x,
            means,
            width * 0.9,
            label=Recipe.of(method).label + suffix,
            color=colors[method],
            alpha=0.38 if light else 1.0,
            linewidth=0,
            yerr=[float(np.std(v, ddof=1)) for v in each] if len(each[0]) > 1 else None,
            error_kw={"ecolor": INK, "elinewidth": 0.8},
        )
        style = {"textcoords": "offset points", "ha": "center", "fontsize": 6.5, "color": MUTED}
        for position, mean in zip(x, means):
            axes.annotate(f"{mean:.2f}".removeprefix("0"), (position, mean), (0, 2), **style)
    axes.set_xticks(range(len(targets)), [language_name(name) for name in targets], color=INK)
    axes.set_ylabel(f"zero-shot {METRICS[metrics['data']['metric']]}")
    axes.yaxis.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=min(3, len(values)), fontsize=8)
    return figure


def costs(run_dir: Path, config: dict, metrics: dict):
    """Dense against sparse: gradients, optimizer state, peak memory, step time."""
    measured = metrics["costs"]
    if measured is None:
        return None
    pair = (measured["dense"], measured["sparse"])
    panels = {
        "gradients": ([side["gradient_bytes"] / 1e6 for side in pair], "MB"),
        "optimizer state": ([side["optimizer_state_bytes"] / 1e6 for side in pair], "MB"),
        "peak memory of training": ([side["peak_bytes"] / 1e6 for side in pair], "MB"),
        "step time (median)": ([side["step_seconds"]["p50"] * 1e3 for side in pair], "ms"),
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(9.5, 1.25), gridspec_kw={"wspace": 0.12})
    names = ["full", measured["recipe"]]
    for axis, (title, (numbers, unit)) in zip(axes, panels.items()):
        axis.barh([1, 0], numbers, 0.62, color=list(colors_of(names).values()))
        for y, number in zip([1, 0], numbers):
            inside = number > 0.6 * max(numbers)
            label = f"{number:,.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}"
            axis.annotate(
                label,
                (number, y),
                (-4 if inside else 4, 0),
                textcoords="offset points",
                va="center",
                ha="right" if inside else "left",
                fontsize=8,
                color="white" if inside else INK,
            )
        axis.set_title(title, fontsize=9)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        axis.set_yticks([1, 0], [Recipe.of(name).label for name in names] if axis is axes[0] else ["", ""], color=INK)
        axis.tick_params(length=0)
        axis.set_xlim(0, max(numbers) * 1.02)
    return figure


# ---- selection ----


def first_vectors(metrics: dict) -> list[str]:
    """The vectors of these figures: the task's and the first target language's."""
    return ["task", *(f"language-{name}" for name in metrics["data"]["targets"][:1])]


def vector_title(vector: str) -> str:
    """ "language: Indonesian" for "language-id"."""
    kind, _, language = vector.partition("-")
    return f"{kind}: {language_name(language)}" if language else kind


def kind_and_layer(name: str) -> tuple[str, int]:
    """("query", 3) for "bert.encoder.layer.3.attention.self.query.weight"; layer -1 is outside the layers."""
    match = LAYER.match(name)
    stem = (match["kind"] if match else name).removesuffix(".weight")
    short = next((short for long, short in SHORT_KINDS.items() if stem.endswith(long)), None)
    return short or stem.rsplit(".", 1)[-1].replace("_", " "), int(match["layer"]) if match else -1


def position_of(kind: str) -> int:
    """The position of a kind of tensor in a figure: embeddings, attention, feed-forward, the rest, biases."""
    return KINDS_IN_ORDER.index(kind) if kind in KINDS_IN_ORDER else len(KINDS_IN_ORDER) - 1


def spectra(run_dir: Path, config: dict, metrics: dict):
    """Cumulative energy of the singular values of theta1 - theta0, for some layers of each kind, with the rank kept."""
    phases = run_dir / "phases"
    languages = Path(config["language_vectors"] or run_dir) / "phases"
    folders = {name: (phases if name == "task" else languages) for name in first_vectors(metrics)}
    if config.get("source_vector"):  # phases/task is full fine-tuning, of which no recipe selects entries
        del folders["task"]
    vectors = [name for name, folder in folders.items() if (folder / name / "dense/model").is_dir()]
    recipe = next((found for text in config["recipes"] if (found := Recipe.of(text)).name == "deft-x"), None)
    if not vectors or recipe is None:
        return None
    starts = {name: phases / "base" if name == "task" else languages / "mlm-head/model" for name in vectors}
    tables = {name: difference_matrices(starts[name], folders[name] / name / "dense/model") for name in vectors}
    kinds = list(dict.fromkeys(kind for table in tables.values() for kind, _ in table))
    layers = sorted({layer for table in tables.values() for _, layer in table})
    colors = dict(zip(layers, plt.get_cmap("viridis")(np.linspace(0.05, 0.85, len(layers)))))
    size = (1.9 * len(kinds), 1.95 * len(vectors) + 0.5)
    figure, axes = plt.subplots(len(vectors), len(kinds), figsize=size, sharex="col", sharey=True, squeeze=False)
    for row, vector in zip(axes, vectors):
        settings = config["task" if vector == "task" else "language"]["selection"]
        selection = recipe.selection(SelectionConfig(**settings))
        _spectrum_row(row, kinds, colors, tables[vector], {"rank": selection.rank, "energy": selection.energy})
        row[0].set_ylabel(f"{vector_title(vector)}\nshare of Σσ²", fontsize=8)
    for axis, kind in zip(axes[0], kinds):
        axis.set_title(kind, fontsize=9)
    figure.supxlabel("singular values kept; dots and r: the rank of the signal", fontsize=8, color=MUTED, y=0.03)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(labels), fontsize=8)
    figure.tight_layout()
    return figure


def _spectrum_row(axes, kinds: list[str], colors: dict, matrices: dict[tuple[str, int], torch.Tensor], rule: dict):
    """One axis per kind of matrix, one line per layer."""
    _, info = svd_denoise({f"{kind} {layer}": x for (kind, layer), x in matrices.items()}, return_info=True, **rule)
    for (kind, layer), delta in matrices.items():
        axis, color = axes[kinds.index(kind)], colors[layer]
        squares = torch.linalg.svdvals(delta.double()).square()
        share = (squares.cumsum(0) / squares.sum().clamp_min(1e-300)).numpy()
        kept = max(1, int(info[f"{kind} {layer}"]["rank"]))
        axis.plot(np.arange(1, len(share) + 1), share, color=color, linewidth=1.3, label=f"layer {layer}")
        axis.plot(kept, share[kept - 1], "o", color=color, markersize=4.5, markeredgecolor="white", markeredgewidth=0.7)
        line = 0.05 + 0.1 * list(colors)[::-1].index(layer)
        axis.text(0.97, line, f"r = {kept}", transform=axis.transAxes, ha="right", fontsize=7, color=color)
    for axis in axes:
        axis.set_ylim(0, 1.03)
        axis.set_xscale("log")
        axis.grid(True, color=GRID, linewidth=0.7)
        axis.tick_params(labelsize=7)
        axis.minorticks_off()
        if rule["energy"] is not None:
            axis.axhline(rule["energy"], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))


def difference_matrices(start: Path, tuned: Path) -> dict[tuple[str, int], torch.Tensor]:
    """{(kind, layer): theta1 - theta0} for the weight matrices of at most four layers, evenly chosen."""
    found = {}
    with safe_open(start / "model.safetensors", "pt") as old, safe_open(tuned / "model.safetensors", "pt") as new:
        names = [name for name in set(new.keys()) & set(old.keys()) if name.endswith(".weight")]
        keys = {name: kind_and_layer(name) for name in names if len(new.get_slice(name).get_shape()) == 2}
        layers = sorted({layer for _, layer in keys.values() if layer >= 0})
        chosen = {layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(MAX_SPECTRUM_LAYERS, len(layers)))}
        for name, key in keys.items():
            if key[1] in chosen:
                found[key] = new.get_tensor(name) - old.get_tensor(name)
    return dict(sorted(found.items(), key=lambda item: (position_of(item[0][0]), item[0])))


def density(run_dir: Path, config: dict, metrics: dict):
    """Heat maps: density of each method's mask by layer and kind of tensor, task and first language."""
    paths = {
        (vector, str(recipe)): path
        for vector in first_vectors(metrics)
        for recipe in map(Recipe.of, config["recipes"])
        for folder in (run_dir, *([Path(config["language_vectors"])] if config["language_vectors"] else []))
        for name in (vector, f"{vector}-{recipe.folder}")
        if (path := folder / "phases" / name / recipe.folder / "mask.safetensors").is_file()
    }
    if not paths:
        return None
    tables = {key: mask_densities(CSRMask.load(path)) for key, path in paths.items()}
    kinds = sorted({kind for table in tables.values() for kind, _ in table}, key=lambda kind: (position_of(kind), kind))
    layers = sorted({layer for table in tables.values() for _, layer in table})
    top = max(value for table in tables.values() for value in table.values())
    size = (2.0 + (0.35 + 0.3 * len(layers)) * len(tables), 1.1 + 0.26 * len(kinds))
    figure, axes = plt.subplots(1, len(tables), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, ((vector, recipe), table) in zip(axes[0], tables.items()):
        grid = np.full((len(kinds), len(layers)), np.nan)
        for (kind, layer), value in table.items():
            grid[kinds.index(kind), layers.index(layer)] = value * 100
        image = axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=top * 100, aspect="auto")
        axis.set_title(f"{Recipe.of(recipe).label}\n{vector_title(vector)}", fontsize=8)
        axis.set_xticks(range(len(layers)), ["–" if layer < 0 else str(layer) for layer in layers], fontsize=7)
        axis.set_yticks(range(len(kinds)), kinds, fontsize=7.5, color=INK)
        axis.tick_params(length=0)
        axis.set_xlabel("layer", fontsize=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.colorbar(image, ax=axes[0], label="entries trained, %", fraction=0.06, pad=0.02).outline.set_visible(False)
    return figure


def mask_densities(mask: CSRMask) -> dict[tuple[str, int], float]:
    """{(kind of tensor, layer): density}; all biases of a layer are one kind, layer -1 is outside the layers."""
    counts: dict[tuple[str, int], list[int]] = {}
    for name, sizes in mask.summary().items():
        kind, layer = kind_and_layer(name)
        total = counts.setdefault(("biases" if name.endswith(".bias") else kind, layer), [0, 0])
        total[0] += sizes["nnz"]
        total[1] += sizes["numel"]
    return {key: nnz / max(1, numel) for key, (nnz, numel) in counts.items()}
