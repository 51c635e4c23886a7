"""The run's report: report.md with its figures, and the tables on the terminal."""

import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deftx_kernels.files import write_text
from deftx_kernels.train import figures

METHODS = {"full": "full fine-tuning", "deft-x": "DeFT-X", "lt-sft": "LT-SFT", "lift": "LIFT"}
KINDS = {"task": "task vector alone", "composed": "task + language vector"}


def score_rows(metrics: dict) -> tuple[list[str], list[tuple[str, dict[str, list[float]]]]]:
    """(target languages, [(label, {language: macro-F1 of each seed})]), in the order of the table."""
    targets = metrics["data"]["targets"]
    rows: dict[tuple[str, str], dict[str, list[float]]] = {}
    for score in metrics["scores"]:
        rows.setdefault((score["method"], score["kind"]), {}).setdefault(score["language"], []).append(
            score["macro_f1"]
        )
    order = {method: i for i, method in enumerate(METHODS)}
    keys = sorted(rows, key=lambda key: (key[1] == "composed", order[key[0]]))
    keys = sorted(keys, key=lambda key: order[key[0]])
    return targets, [(row_label(method, kind), rows[method, kind]) for method, kind in keys]


def row_label(method: str, kind: str) -> str:
    """ "DeFT-X, task + language vector"."""
    return METHODS[method] if method == "full" else f"{METHODS[method]}, {KINDS[kind]}"


def mean_of(values: dict[str, list[float]], languages: list[str]) -> list[float]:
    """The mean over languages, for each seed."""
    return [statistics.fmean(column) for column in zip(*(values[name] for name in languages))]


def show(values: list[float]) -> str:
    """.361, or .361 ± .012 (standard deviation over seeds)."""
    text = f"{statistics.fmean(values):.3f}".removeprefix("0")
    return text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.3f}".replace("± 0", "± ")


def score_table(metrics: dict) -> list[list[str]]:
    """Header and rows of macro-F1 by target language, their mean, and the mean of the source languages for reference."""
    targets, rows = score_rows(metrics)
    sources = [name for name in metrics["data"]["sources"] if all(name in values for label, values in rows[:1])]
    table = [["", *map(language_name, targets), "mean", *(["sources"] if sources else [])]]
    for label, values in rows:
        line = [label, *(show(values[name]) for name in targets), show(mean_of(values, targets))]
        if sources:
            line.append(show(mean_of(values, sources)) if sources[0] in values else "–")
        table.append(line)
    return table


def gain_lines(metrics: dict) -> list[str]:
    """One sentence per method: what adding the language vector changed."""
    targets, rows = score_rows(metrics)
    values = dict(rows)
    lines = []
    for method in METHODS:
        alone, composed = values.get(row_label(method, "task")), values.get(row_label(method, "composed"))
        if method == "full" or not alone or not composed:
            continue
        gains = {name: statistics.fmean(composed[name]) - statistics.fmean(alone[name]) for name in targets}
        each = ", ".join(f"{language_name(name)} {gain:+.3f}" for name, gain in gains.items())
        mean = statistics.fmean(gains.values())
        lines.append(f"{METHODS[method]}: adding the language vector changed macro-F1 by {each} (mean {mean:+.3f}).")
    return lines


def cost_table(metrics: dict) -> list[list[str]] | None:
    """Header and rows of the dense and the sparse training step."""
    costs = metrics["costs"]
    if costs is None:
        return None
    dense, sparse = costs["dense"], costs["sparse"]
    rows = [
        ("entries trained", "trained_entries", lambda v: f"{v:,}"),
        ("bytes of gradients", "gradient_bytes", megabytes),
        ("bytes of optimizer state", "optimizer_state_bytes", megabytes),
        ("peak memory of training", "peak_bytes", megabytes),
    ]
    table = [["", "full fine-tuning", METHODS[costs["recipe"]], "ratio"]]
    for label, key, text in rows:
        table.append([label, text(dense[key]), text(sparse[key]), ratio(dense[key], sparse[key])])
    a, b = dense["step_seconds"]["p50"], sparse["step_seconds"]["p50"]
    selection = next((phase["selection"] for phase in metrics["phases"] if is_task(phase, costs["recipe"])), None)
    if selection is not None:
        table.append(["selection of the entries, once", "–", f"{selection['seconds']:.2f} s", "–"])
    table.append(["step time, median", f"{a * 1e3:.0f} ms", f"{b * 1e3:.0f} ms", ratio(a, b)])
    return table


def is_task(phase: dict, recipe: str) -> bool:
    return phase["vector"] == "task" and phase["method"] == recipe


def phase_table(metrics: dict) -> list[list[str]]:
    """Header and rows of the phases as they ran."""
    table = [
        [
            "vector",
            "phase",
            "steps",
            "entries",
            "selection",
            "gradients",
            "optimizer state",
            "median step",
            "final loss",
        ]
    ]
    for phase in metrics["phases"]:
        if phase["seed"] != metrics["phases"][0]["seed"]:
            continue
        selection = phase.get("selection")
        step = phase["median_step_seconds"]
        table.append([
            phase["vector"], "dense" if phase["method"] == "dense" else f"{METHODS[phase['method']]}, sparse", str(phase["steps"]),
            f"{phase['trained_entries']:,}", "–" if selection is None else f"{selection['seconds']:.2f} s",
            megabytes(phase["gradient_bytes"]), megabytes(phase["optimizer_state_bytes"]),
            "–" if step is None else f"{step * 1e3:.0f} ms", f"{phase['loss'][-1][1]:.3f}" if phase["loss"] else "–",
        ])  # fmt: skip
    return table


def denoising_table(metrics: dict) -> list[list[str]] | None:
    """Header and rows of what denoising found in the task's difference, by kind of matrix; None where nothing was
    denoised.
    """
    selections = (phase.get("selection") or {} for phase in metrics["phases"] if phase["vector"] == "task")
    found = next((s["denoising"] for s in selections if s.get("denoising")), None)
    if found is None:
        return None
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, facts in found.items():
        match = figures.LAYER.match(name)
        kinds.setdefault(figures.short_kind(match["kind"] if match else name), []).append(facts)
    table = [
        ["matrices of the task's difference", "count", "rank of the signal", "energy in it", "taken away, relative"]
    ]
    for kind in sorted(kinds, key=figures.rank_of):
        each = kinds[kind]
        ranks = sorted(facts["rank"] for facts in each)
        span = f"{ranks[0]:.0f}" if ranks[0] == ranks[-1] else f"{ranks[0]:.0f} to {ranks[-1]:.0f}"
        means = (statistics.fmean(facts[key] for facts in each) for key in ("energy", "residual"))
        table.append([kind, str(len(each)), span, *(f"{mean:.1%}" for mean in means)])
    return table


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def ratio(a: float, b: float) -> str:
    return f"{a / b:.1f}×" if b else "–"


def language_name(code: str) -> str:
    """English name of a CLDR code, or the name as it is."""
    try:
        from babel import Locale

        return Locale.parse(code).get_display_name("en") or code
    except Exception:  # not a CLDR code, such as a folder's name
        return code.capitalize()


def markdown(table: list[list[str]]) -> str:
    """A Markdown table; the first row is the header, the first column is text."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|" + "|".join(["---"] + ["---:"] * (len(table[0]) - 1)) + "|")
    return "\n".join(lines)


def write(run_dir: Path, config: dict, metrics: dict) -> None:
    """Write figures/ and report.md."""
    pictures = figures.draw_all(run_dir, config, metrics)
    write_text(run_dir / "report.md", text(config, metrics, pictures))


def text(config: dict, metrics: dict, pictures: dict[str, str]) -> str:
    """The report as Markdown."""
    data, seeds = metrics["data"], config["seeds"]
    sources, targets = (", ".join(map(language_name, data[key])) for key in ("sources", "targets"))
    tests = ", ".join(f"{language_name(name)} {count}" for name, count in data["test"].items())
    parts = [
        "# Composable sparse fine-tuning",
        f"Model `{config['model']}` · {data['task']} into {len(data['labels'])} classes ({', '.join(data['labels'])}) · "
        f"labelled: {sources} ({data['train']:,} examples) · targets without labels: {targets} · "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}.",
        "## Zero-shot macro-F1",
        markdown(score_table(metrics)),
        f'Test examples: {tests}. "sources" is the mean over the labelled languages. {seed_note(len(seeds))}',
        *gain_lines(metrics),
        picture(pictures, "scores", "Macro-F1 by target language and method"),
    ]
    if (table := cost_table(metrics)) is not None:
        costs = metrics["costs"]
        parts += [
            "## What a training step costs",
            markdown(table),
            f"The task's training step on the same {costs['dense']['steps']} batches, each column in a fresh process "
            f"({costs['dense']['device']}, {costs['dense']['threads']} threads). Gradients and optimizer state are counted from "
            f"the tensors. Peak memory: {costs['dense']['peak_bytes_are']}.",
            picture(pictures, "costs", "Cost of a training step, dense and sparse"),
        ]
    parts += [
        "## What was selected",
        picture(pictures, "spectra", "Singular values of the difference matrices"),
        markdown(table) if (table := denoising_table(metrics)) is not None else "",
        picture(pictures, "density", "Density of the masks by layer and tensor"),
        "## Phases",
        markdown(phase_table(metrics)),
        "Step times are those of the run itself. The dense phase of a vector is shared by DeFT-X and LT-SFT.",
        f"Settings: [config.json](config.json). All numbers: [metrics.json](metrics.json). Time: {metrics['seconds']:.0f} s.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def seed_note(seeds: int) -> str:
    if seeds == 1:
        return "One seed: differences of a few hundredths are within what another seed would change."
    return f"Mean ± standard deviation over {seeds} seeds."


def picture(pictures: dict[str, str], name: str, caption: str) -> str:
    return f"![{caption}]({pictures[name]})" if name in pictures else ""


def print_tables(metrics: dict, console: Console) -> None:
    """The scores and the costs on the terminal."""
    console.print(rich_table("Zero-shot macro-F1", score_table(metrics)))
    if (table := cost_table(metrics)) is not None:
        console.print(rich_table("A training step", table))
    for line in gain_lines(metrics):
        console.print(line)
    console.print(seed_note(len({score["seed"] for score in metrics["scores"]})))


def rich_table(title: str, rows: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if i else "left")
    for row in rows[1:]:
        table.add_row(*row)
    return table
