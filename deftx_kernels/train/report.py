"""The run's report: report.md with its figures, and the tables on the terminal."""

import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from deftx_kernels.files import write_text
from deftx_kernels.train import figures
from deftx_kernels.train.cldr import language_name
from deftx_kernels.train.config import Recipe
from deftx_kernels.train.metrics import METRICS

KINDS = {"task": "task vector alone", "composed": "task + language vector"}
Rows = list[list[str]]  # of a table; the first is its header


def write(run_dir: Path, config: dict, metrics: dict) -> None:
    """Write figures/ and report.md."""
    pictures = figures.draw_all(run_dir, config, metrics)
    write_text(run_dir / "report.md", text(config, metrics, pictures))


def text(config: dict, metrics: dict, pictures: dict[str, str]) -> str:
    """The report as Markdown. `pictures`: name → path of the figures that there are."""
    data, seeds = metrics["data"], config["seeds"]
    sources, targets = (", ".join(map(language_name, data[key])) for key in ("sources", "targets"))

    def picture(name: str, caption: str) -> str:
        return f"![{caption}]({pictures[name]})" if name in pictures else ""

    parts = [
        "# Composable sparse fine-tuning",
        f"Model `{config['model']}` · {data['task']} into {len(data['labels'])} classes ({', '.join(data['labels'])}) "
        f"· labelled: {sources} ({data['train']:,} examples) · targets without labels: {targets} · "
        f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}.",
        f"## Zero-shot {score_name(metrics)}",
        markdown(score_table(metrics)),
        f'{test_sizes(data)} "sources" is the mean over the labelled languages. {seed_note(len(seeds))}',
        source_vector_note(config, data["sources"]),
        *gain_lines(config, metrics),
        *perplexity_lines(metrics),
        picture("scores", f"{score_name(metrics)} by target language and method"),
    ]
    if (table := cost_table(metrics)) is not None:
        dense = metrics["costs"]["dense"]
        parts += [
            "## What a training step costs",
            markdown(table),
            f"The task's training step on the same {dense['steps']} batches, each column in a fresh process "
            f"({dense['device']}, {dense['threads']} threads). Gradients and optimizer state are counted from the "
            f"tensors. Peak memory: {dense['peak_bytes_are']}."
            + (f" Measured on {where}." if (where := metrics["costs"].get("measured_on")) else ""),
            picture("costs", "Cost of a training step, dense and sparse"),
        ]
    parts += [
        "## What was selected",
        picture("spectra", "Singular values of the difference matrices"),
        markdown(table) if (table := denoising_table(metrics)) is not None else "",
        picture("density", "Density of the masks by layer and tensor"),
        markdown(table) if (table := overlap_table(metrics)) is not None else "",
        "share: of the entries of the smaller vector; by chance: that of two random masks."
        if metrics["overlaps"]
        else "",
        "## Phases",
        markdown(phase_table(metrics)),
        f"Step times are those of the run itself{processes_note(metrics)}. "
        "A dense phase that is of no method is shared by DeFT-X and LT-SFT.",
        perplexity_note(config, metrics),
        "Settings: [config.json](config.json). All numbers: [metrics.json](metrics.json). "
        f"Time of the last call, which repeats no finished phase: {metrics['seconds']:.0f} s.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def processes_note(metrics: dict) -> str:
    count = metrics.get("world_size", 1)
    return f", on rank 0 of {count} processes, which divide each batch" if count > 1 else ""


def test_sizes(data: dict) -> str:
    """The sizes of the test sets, and what they share with the training data."""
    seen = {name: f" ({count} of them in the training data)" for name, count in data["test_in_train"].items() if count}
    sizes = [f"{language_name(name)} {count}{seen.get(name, '')}" for name, count in data["test"].items()]
    return f"Test examples: {', '.join(sizes)}."


def seed_note(seeds: int) -> str:
    if seeds == 1:
        return "One seed: another seed can change scores by several hundredths."
    return f"Mean ± standard deviation over {seeds} seeds."


def source_vector_note(config: dict, sources: list[str]) -> str:
    """With which vectors the task was trained and scored."""
    if not config.get("source_vector"):
        return ""
    if len(sources) > 1:
        return "Each training batch had the language vector of its source language, which is not in the scores alone."
    return (
        f"The task was trained from the model plus the language vector of {language_name(sources[0])}, which is in the "
        '"task vector alone" too; "task + language vector" has the test language\'s in its place.'
    )


def markdown(table: Rows) -> str:
    """A Markdown table; the first column is text."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    lines.insert(1, "|" + "|".join(["---"] + ["---:"] * (len(table[0]) - 1)) + "|")
    return "\n".join(lines)


def print_tables(config: dict, metrics: dict, console: Console) -> None:
    """The scores and the costs on the terminal."""
    tables = {f"Zero-shot {score_name(metrics)}": score_table(metrics), "A training step": cost_table(metrics)}
    for title, rows in tables.items():
        if rows is not None:
            table = Table(title=title, title_justify="left")
            for i, name in enumerate(rows[0]):
                table.add_column(name, justify="right" if i else "left")
            for row in rows[1:]:
                table.add_row(*row)
            console.print(table)
    for line in gain_lines(config, metrics) + perplexity_lines(metrics):
        console.print(line)
    console.print(test_sizes(metrics["data"]))
    console.print(seed_note(len({score["seed"] for score in metrics["scores"]})))


# ---- tables ----


def score_table(metrics: dict) -> Rows:
    """The score by target language, their mean, and for reference the mean of the source languages."""
    scores, targets = figures.scores_by_method(metrics), metrics["data"]["targets"]
    sources = [name for name in metrics["data"]["sources"] if name in next(iter(scores.values()))]
    table = [["", *map(language_name, targets), "mean", *(["sources"] if sources else [])]]
    for (method, kind), values in scores.items():
        name = Recipe.of(method).label
        label = name if method == "full" else f"{name}, {KINDS[kind]}"
        row = [label, *(show(values[name]) for name in targets), show(mean_of(values, targets))]
        if sources:
            row.append(show(mean_of(values, sources)) if sources[0] in values else "–")
        table.append(row)
    return table


def mean_of(values: dict[str, list[float]], languages: list[str]) -> list[float]:
    """The mean over languages, for each seed."""
    return [statistics.fmean(column) for column in zip(*(values[name] for name in languages))]


def show(values: list[float]) -> str:
    """.361, or .361 ± .012 (standard deviation over seeds)."""
    mean = f"{statistics.fmean(values):.3f}".removeprefix("0")
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.3f}".replace("± 0", "± ")


def gain_lines(config: dict, metrics: dict) -> list[str]:
    """One sentence per method: what the language vector changed."""
    replaced = config.get("source_vector") and len(metrics["data"]["sources"]) == 1
    done = "the test language's vector in place of the source's" if replaced else "adding the language vector"
    scores, lines = figures.scores_by_method(metrics), []
    for method in dict.fromkeys(method for method, _ in scores):
        alone, composed = scores.get((method, "task")), scores.get((method, "composed"))
        if not alone or not composed:
            continue
        targets = metrics["data"]["targets"]
        gains = {target: statistics.fmean(composed[target]) - statistics.fmean(alone[target]) for target in targets}
        each = ", ".join(f"{language_name(target)} {gain:+.3f}" for target, gain in gains.items())
        mean, name = statistics.fmean(gains.values()), Recipe.of(method).label
        lines.append(f"{name}: {done} changed {score_name(metrics)} by {each} (mean {mean:+.3f}).")
    return lines


def perplexity_lines(metrics: dict) -> list[str]:
    """One sentence per method: the perplexity of each target language without and with its vector (first seed)."""
    found: dict[str, dict[str, str]] = {}
    for phase in metrics["phases"]:
        if phase["method"] != "dense" and phase["vector"] != "task" and "perplexity" in phase:
            name = language_name(phase["vector"].removeprefix("language-"))
            found.setdefault(phase["method"], {}).setdefault(name, perplexities(phase))
    return [
        f"{Recipe.of(method).label}: perplexity of held-out text without and with its language vector: "
        + ", ".join(f"{name} {values}" for name, values in languages.items())
        + "."
        for method, languages in found.items()
    ]


def cost_table(metrics: dict) -> Rows | None:
    """The dense and the sparse training step."""
    costs = metrics["costs"]
    if costs is None:
        return None
    table = [["", "full fine-tuning", Recipe.of(costs["recipe"]).label, "ratio"]]

    def add(label: str, dense: float, sparse: float, text) -> None:
        table.append([label, text(dense), text(sparse), f"{dense / sparse:.1f}×" if sparse else "–"])

    dense, sparse = costs["dense"], costs["sparse"]
    add("entries trained", dense["trained_entries"], sparse["trained_entries"], lambda count: f"{count:,}")
    add("bytes of gradients", dense["gradient_bytes"], sparse["gradient_bytes"], megabytes)
    add("bytes of optimizer state", dense["optimizer_state_bytes"], sparse["optimizer_state_bytes"], megabytes)
    add("peak memory of training", dense["peak_bytes"], sparse["peak_bytes"], megabytes)
    for phase in metrics["phases"]:
        if (phase["vector"], phase["method"]) == ("task", costs["recipe"]):
            table.append(["selection of the entries, once", "–", f"{phase['selection']['seconds']:.2f} s", "–"])
            break
    add("step time, median", dense["step_seconds"]["p50"], sparse["step_seconds"]["p50"], milliseconds)
    return table


def phase_table(metrics: dict) -> Rows:
    """The phases of the first seed, and those of shared language vectors."""
    header = "vector, phase, steps, entries, selection, gradients, optimizer state, median step, final loss, perplexity"
    table = [header.split(", ")]
    for phase in metrics["phases"]:
        if phase["seed"] != metrics["scores"][0]["seed"] and not phase.get("shared"):
            continue
        selection, step = phase.get("selection"), phase["median_step_seconds"]
        table.append(
            [
                phase["vector"],
                _phase_name(phase),
                str(phase["steps"]),
                f"{phase['trained_entries']:,}",
                "–" if selection is None else f"{selection['seconds']:.2f} s",
                megabytes(phase["gradient_bytes"]),
                megabytes(phase["optimizer_state_bytes"]),
                "–" if step is None else milliseconds(step),
                f"{phase['loss'][-1][1]:.3f}" if phase["loss"] else "–",
                perplexities(phase),
            ]
        )
    return table


def _phase_name(phase: dict) -> str:
    if phase["method"] != "dense":
        return f"{Recipe.of(phase['method']).label}, sparse"
    return f"{Recipe.of(phase['recipe']).label}, dense" if "recipe" in phase else "dense"


def perplexity_note(config: dict, metrics: dict) -> str:
    """What the perplexities of the phases are."""
    if not any("perplexity" in phase for phase in metrics["phases"]):
        return ""
    among = "all tokens of the model"
    if config["language"]["vocabulary"] == "text":
        among = "the tokens of that language's text alone: it cannot be compared with another language's or model's"
    return f"Perplexity: at the masked positions of the validation text, before and after the phase, among {among}."


def perplexities(phase: dict) -> str:
    """Of the validation text, before and after a phase of masked language modelling."""
    values = phase.get("perplexity")
    return "–" if values is None else f"{values['before']:,.1f} → {values['after']:,.1f}"


def overlap_table(metrics: dict) -> Rows | None:
    """What the task vector shares with the language vectors: means over seeds."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in metrics["overlaps"]:
        found.setdefault((row["method"], row["language"]), []).append(row)
    if not found:
        return None
    table = [["task vector and vector of", "entries in both", "share", "by chance", "signs differ"]]
    for (method, language), rows in found.items():
        shared, *shares = (
            statistics.fmean(row[key] for row in rows) for key in ("shared", "share", "by_chance", "sign_conflicts")
        )
        label = f"{language_name(language)}, {Recipe.of(method).label}"
        table.append([label, f"{shared:,.0f}", *(f"{value:.1%}" for value in shares)])
    return table


def score_name(metrics: dict) -> str:
    return METRICS[metrics["data"]["metric"]]


def denoising_table(metrics: dict) -> Rows | None:
    """What denoising found in the task's difference, by kind of matrix; None where nothing was denoised."""
    selections = (phase.get("selection") or {} for phase in metrics["phases"] if phase["vector"] == "task")
    found = next((s["denoising"] for s in selections if s.get("denoising")), None)
    if found is None:
        return None
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, values in found.items():
        kinds.setdefault(figures.kind_and_layer(name)[0], []).append(values)
    table = [["matrices of the task's difference", "count", "rank of the signal", "energy in it", "relative residual"]]
    for kind in sorted(kinds, key=figures.position_of):
        each = kinds[kind]
        ranks = sorted(values["rank"] for values in each)
        span = f"{ranks[0]:.0f}" if ranks[0] == ranks[-1] else f"{ranks[0]:.0f} to {ranks[-1]:.0f}"
        means = (statistics.fmean(values[key] for values in each) for key in ("energy", "residual"))
        table.append([kind, str(len(each)), span, *(f"{mean:.1%}" for mean in means)])
    return table


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"
