"""The figures of a report."""

import re
from pathlib import Path

import matplotlib
import numpy as np
import torch
from safetensors import safe_open

from deftx_kernels.denoise import svd_denoise
from deftx_kernels.files import replaced
from deftx_kernels.mask import CSRMask

matplotlib.use("Agg")
from matplotlib import pyplot as plt

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = {"full": "#9ca3af", "deft-x": "#2563eb", "lt-sft": "#f59e0b", "lift": "#10b981"}
STYLE = {
    "figure.dpi": 160, "savefig.dpi": 160, "font.size": 9, "font.family": "DejaVu Sans", "axes.edgecolor": MUTED,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": MUTED, "ytick.color": MUTED, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "legend.frameon": False,
}  # fmt: skip
LAYER = re.compile(r"^(?P<before>.*?)\.(?:layers?|h|blocks?)\.(?P<layer>\d+)\.(?P<kind>.*)$")
MAX_SPECTRUM_LAYERS = 4
KINDS_IN_ORDER = (
    "word embeddings", "position embeddings", "token type embeddings", "query", "key", "value", "attention output", "intermediate",
    "output", "pooler", "biases", "",
)  # fmt: skip


def draw_all(run_dir: Path, config: dict, metrics: dict) -> dict[str, str]:
    """Draw what the run has, as figures/*.png. Returns {name: path relative to the run folder}."""
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


def scores(run_dir: Path, config: dict, metrics: dict):
    """Macro-F1 by target language: a bar for full fine-tuning, and for each method alone (light) and composed (full
    colour).
    """
    from deftx_kernels.train.report import METHODS, language_name

    targets = metrics["data"]["targets"]
    values: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in metrics["scores"]:
        values.setdefault((row["method"], row["kind"]), {}).setdefault(row["language"], []).append(row["macro_f1"])
    series = [key for method in METHODS for kind in ("task", "composed") if (key := (method, kind)) in values]
    figure, axes = plt.subplots(figsize=(max(5.5, 1.2 + 0.34 * len(series) * len(targets)), 3.2))
    width = 0.8 / len(series)
    for i, (method, kind) in enumerate(series):
        at = np.arange(len(targets)) + (i - (len(series) - 1) / 2) * width
        each = [values[method, kind][name] for name in targets]
        label = METHODS[method] + (
            "" if method == "full" else ", task alone" if kind == "task" else ", task + language"
        )
        light = kind == "task" and method != "full"
        means = [float(np.mean(v)) for v in each]
        axes.bar(
            at, means, width * 0.9, label=label, color=COLORS[method], alpha=0.38 if light else 1.0, linewidth=0,
            yerr=[float(np.std(v, ddof=1)) for v in each] if len(each[0]) > 1 else None,
            error_kw={"ecolor": INK, "elinewidth": 0.8},
        )  # fmt: skip
        for x, mean in zip(at, means):
            axes.annotate(
                f"{mean:.2f}".removeprefix("0"),
                (x, mean),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
                color=MUTED,
            )
    axes.set_xticks(range(len(targets)), [language_name(name) for name in targets], color=INK)
    axes.set_ylabel("zero-shot macro-F1")
    axes.yaxis.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=min(3, len(series)), fontsize=8)
    return figure


def costs(run_dir: Path, config: dict, metrics: dict):
    """Dense against sparse: gradients, optimizer state, peak memory, step time."""
    from deftx_kernels.train.report import METHODS

    facts = metrics["costs"]
    if facts is None:
        return None
    panels = [
        ("gradients", lambda f: f["gradient_bytes"] / 1e6, "MB"),
        ("optimizer state", lambda f: f["optimizer_state_bytes"] / 1e6, "MB"),
        ("peak memory of training", lambda f: f["peak_bytes"] / 1e6, "MB"),
        ("step time (median)", lambda f: f["step_seconds"]["p50"] * 1e3, "ms"),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(9.5, 1.25), gridspec_kw={"wspace": 0.12})
    names = ["full", facts["recipe"]]
    for axis, (title, value, unit) in zip(axes, panels):
        numbers = [value(facts["dense"]), value(facts["sparse"])]
        axis.barh([1, 0], numbers, 0.62, color=[COLORS[name] for name in names])
        for y, number in zip([1, 0], numbers):
            inside = number > 0.6 * max(numbers)
            axis.annotate(
                f"{number:,.0f} {unit}" if number >= 10 else f"{number:.1f} {unit}",
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
        axis.set_yticks([1, 0], [METHODS[name] for name in names] if axis is axes[0] else ["", ""], color=INK)
        axis.tick_params(length=0)
        axis.set_xlim(0, max(numbers) * 1.02)
    return figure


def spectra(run_dir: Path, config: dict, metrics: dict):
    """Cumulative energy of the singular values of theta1 - theta0, some layers of each kind of matrix, with the rank
    kept.
    """
    vectors = [
        name
        for name in ("task", *(f"language-{name}" for name in metrics["data"]["targets"][:1]))
        if (run_dir / "phases" / name / "dense/model").is_dir()
    ]
    if not vectors or "deft-x" not in config["recipes"]:
        return None
    starts = {name: run_dir / "phases" / ("base" if name == "task" else "mlm-head/model") for name in vectors}
    tables = {name: difference_matrices(starts[name], run_dir / "phases" / name / "dense/model") for name in vectors}
    kinds = list(dict.fromkeys(kind for table in tables.values() for kind, _ in table))
    layers = sorted({layer for table in tables.values() for _, layer in table})
    colors = dict(zip(layers, plt.get_cmap("viridis")(np.linspace(0.05, 0.85, len(layers)))))
    size = (1.9 * len(kinds), 1.95 * len(vectors) + 0.5)
    figure, axes = plt.subplots(len(vectors), len(kinds), figsize=size, sharex="col", sharey=True, squeeze=False)
    for row, vector in zip(axes, vectors):
        selection = config["task" if vector == "task" else "language"]["selection"]
        _spectrum_row(row, kinds, colors, tables[vector], {"rank": selection["rank"], "energy": selection["energy"]})
        row[0].set_ylabel(f"{vector_name(vector)}\nshare of Σσ²", fontsize=8)
    for axis, kind in zip(axes[0], kinds):
        axis.set_title(kind, fontsize=9)
    figure.supxlabel("singular values kept; dots and r: the rank of the signal", fontsize=8, color=MUTED, y=0.03)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=len(labels), fontsize=8)
    figure.tight_layout()
    return figure


def _spectrum_row(
    axes, kinds: list[str], colors: dict, matrices: dict[tuple[str, int], torch.Tensor], rule: dict
) -> None:
    """One axis per kind of matrix, one line per layer."""
    _, info = svd_denoise(
        {f"{kind} {layer}": delta for (kind, layer), delta in matrices.items()}, return_info=True, **rule
    )
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


def vector_name(vector: str) -> str:
    """ "language-id" → "language: Indonesian"."""
    from deftx_kernels.train.report import language_name

    kind, _, language = vector.partition("-")
    return f"{kind}: {language_name(language)}" if language else kind


def short_kind(kind: str) -> str:
    """ "attention.self.query" → "query"."""
    names = {
        "attention.output.dense": "attention output", "intermediate.dense": "intermediate", "output.dense": "output",
        "pooler.dense": "pooler",
    }  # fmt: skip
    stem = kind.removesuffix(".weight")
    return next(
        (short for long, short in names.items() if stem.endswith(long)), stem.rsplit(".", 1)[-1].replace("_", " ")
    )


def difference_matrices(start: Path, tuned: Path) -> dict[tuple[str, int], torch.Tensor]:
    """{(kind, layer): theta1 - theta0} for the weight matrices of at most four layers, evenly chosen."""
    found = {}
    with safe_open(start / "model.safetensors", "pt") as old, safe_open(tuned / "model.safetensors", "pt") as new:
        matches = {name: LAYER.match(name) for name in set(new.keys()) & set(old.keys()) if name.endswith(".weight")}
        matrices = {
            name: match for name, match in matches.items() if match and len(new.get_slice(name).get_shape()) == 2
        }
        layers = sorted({int(match["layer"]) for match in matrices.values()})
        picks = {layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(MAX_SPECTRUM_LAYERS, len(layers)))}
        for name, match in matrices.items():
            if int(match["layer"]) in picks:
                found[short_kind(match["kind"]), int(match["layer"])] = new.get_tensor(name) - old.get_tensor(name)
    return dict(sorted(found.items(), key=lambda item: (rank_of(item[0][0]), item[0])))


def rank_of(kind: str) -> int:
    """The place of a kind of tensor in a figure: embeddings, attention, feed-forward, the rest, biases."""
    return KINDS_IN_ORDER.index(kind) if kind in KINDS_IN_ORDER else len(KINDS_IN_ORDER) - 1


def density(run_dir: Path, config: dict, metrics: dict):
    """Heat maps: density of each method's mask by layer and kind of tensor, task and first language."""
    from deftx_kernels.train.report import METHODS

    vectors = ["task", *(f"language-{name}" for name in metrics["data"]["targets"][:1])]
    paths = {
        (vector, recipe): path
        for vector in vectors
        for recipe in config["recipes"]
        for folder in (vector, f"{vector}-{recipe}")
        if (path := run_dir / "phases" / folder / recipe / "mask.safetensors").is_file()
    }
    if not paths:
        return None
    tables = {key: mask_densities(CSRMask.load(path)) for key, path in paths.items()}
    rows = sorted({kind for table in tables.values() for kind, _ in table}, key=lambda kind: (rank_of(kind), kind))
    columns = sorted({layer for table in tables.values() for _, layer in table})
    top = max(value for table in tables.values() for value in table.values())
    size = (2.0 + (0.35 + 0.3 * len(columns)) * len(tables), 1.1 + 0.26 * len(rows))
    figure, axes = plt.subplots(1, len(tables), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, ((vector, recipe), table) in zip(axes[0], tables.items()):
        grid = np.full((len(rows), len(columns)), np.nan)
        for (kind, layer), value in table.items():
            grid[rows.index(kind), columns.index(layer)] = value * 100
        image = axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=top * 100, aspect="auto")
        axis.set_title(f"{METHODS[recipe]}\n{vector_name(vector)}", fontsize=8)
        axis.set_xticks(range(len(columns)), ["–" if layer < 0 else str(layer) for layer in columns], fontsize=7)
        axis.set_yticks(range(len(rows)), rows, fontsize=7.5, color=INK)
        axis.tick_params(length=0)
        axis.set_xlabel("layer", fontsize=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    figure.colorbar(image, ax=axes[0], label="entries trained, %", fraction=0.06, pad=0.02).outline.set_visible(False)
    return figure


def mask_densities(mask: CSRMask) -> dict[tuple[str, int], float]:
    """{(kind of tensor, layer): density}; all biases of a layer are one kind, -1 stands for tensors outside the layers."""
    counts: dict[tuple[str, int], list[int]] = {}
    for name, facts in mask.summary().items():
        match = LAYER.match(name)
        kind = "biases" if name.endswith(".bias") else short_kind(match["kind"] if match else name)
        total = counts.setdefault((kind, int(match["layer"]) if match else -1), [0, 0])
        total[0] += facts["nnz"]
        total[1] += facts["numel"]
    return {key: nnz / max(1, numel) for key, (nnz, numel) in counts.items()}
