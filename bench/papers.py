"""Scores of `deftx run` on the papers' data: rows, means over seeds, paired tests, one figure.

`python -m bench papers RUN_DIR...` collects the scores of finished runs into bench/results/<data set>.csv, where they
replace those of the same model, method, language and seed, and writes <data set>.md and <data set>.png. Runs of one
model with other settings, source languages or test sets are refused: their scores would be averaged and compared.
"""

import csv
import hashlib
import json
import statistics
import sys
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from deftx_kernels.files import replaced
from deftx_kernels.train.config import Recipe
from deftx_kernels.train.figures import COLORS
from deftx_kernels.train.metrics import METRICS
from deftx_kernels.train.report import KINDS, markdown

COLUMNS = (
    *("model", "source_vector", "seed", "method", "kind", "language", "role", "score", "metric", "n", "nnz"),
    "settings",
)
# Settings in which the runs of one file may differ: they are in the rows, or change no score.
NOT_COMPARED = ("model", "source_vector", "seeds", "recipes", "language_vectors", "cost_steps", "device", "report_to")
Row = dict[str, str]
Key = tuple[str, str, str]  # source_vector, method, kind
Scores = Mapping[tuple[str, str], float]  # by language and seed


def collect(folders: Iterable[Path], out: Path) -> dict[Path, list[Row]]:
    """The rows of run folders, added to the files of their data sets. {file: all its rows}"""
    found: dict[Path, list[Row]] = {}
    for folder in folders:
        if not (folder / "metrics.json").is_file():
            sys.exit(f"{folder} has no metrics.json: it is no run folder, or its run has not ended")
        config, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics"))
        path = out / f"{data_set(config)}.csv"
        rows = found.setdefault(path, read(path))
        new = list(rows_of(config, metrics))
        same = {identity(row) for row in new}
        kept = [row for row in rows if identity(row) not in same]
        check_same(folder, kept, new)
        found[path] = kept + new
    for path, rows in found.items():
        rows.sort(key=identity)
        out.mkdir(parents=True, exist_ok=True)
        with replaced(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return found


def check_same(folder: Path, kept: list[Row], new: list[Row]) -> None:
    """Exits where rows of one model are of other settings than those of `folder`, or of other test sets."""
    for row in new:
        for other in kept:
            if other["model"] != row["model"]:
                continue
            settings = other["settings"] and other["settings"] != row["settings"]  # older rows have none
            test = other["language"] == row["language"] and any(other[x] != row[x] for x in ("metric", "n", "role"))
            if settings or test:
                what = "settings" if settings else f"metric, test set or source languages (of {row['language']})"
                sys.exit(f"{folder}: its {what} differ from those of other runs of {row['model']}: use another --out")


def data_set(config: dict) -> str:
    """The name of a run's data set: that of its folder."""
    name = config["data"].get("data_dir") or config["data"].get("dataset")
    if name is None:
        sys.exit("runs of `deftx run files` and `demo` have no data set: papers collects those of folders and the hub")
    return Path(name).name


def settings_hash(config: dict) -> str:
    """A hash of the settings that the runs of one file share."""
    kept = {name: value for name, value in config.items() if name not in NOT_COMPARED}
    kept["data"] = {name: value for name, value in config["data"].items() if name not in ("data_dir", "targets")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:8]


def rows_of(config: dict, metrics: dict) -> Iterable[Row]:
    metric, sources, sizes = metrics["data"]["metric"], metrics["data"]["sources"], {}
    for phase in metrics["phases"]:
        if phase["vector"] == "task" and "selection" in phase:
            sizes[phase["seed"], phase["method"]] = phase["selection"]["nnz"]
    for score in metrics["scores"]:
        row = {name: score[name] for name in ("seed", "method", "kind", "language", "n")}
        row |= {"model": Path(config["model"]).name, "source_vector": int(config["source_vector"]), "metric": metric}
        row["settings"] = settings_hash(config)
        row |= {"score": f"{score[metric]:.5f}", "nnz": sizes.get((score["seed"], score["method"]), "")}
        row["role"] = "source" if score["language"] in sources else "target"
        yield {name: str(row[name]) for name in COLUMNS}


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [{name: row.get(name) or "" for name in COLUMNS} for row in csv.DictReader(file)]


def identity(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "source_vector", "method", "kind", "language", "seed"))


# ---- report ----


def write(rows: list[Row], path: Path) -> str:
    """Write the tables and the figure beside the rows; returns the tables."""
    text = report(rows)
    path.with_suffix(".md").write_text(text)
    plot(rows, path.with_suffix(".png"))
    return text


def by_condition(rows: Iterable[Row]) -> dict[Key, dict[tuple[str, str], float]]:
    """{condition: {(language, seed): score}} of the target languages, in the order of the tables."""
    scores: dict[Key, dict[tuple[str, str], float]] = {}
    for row in rows:
        if row["role"] == "target":
            key = (row["source_vector"], row["method"], row["kind"])
            scores.setdefault(key, {})[row["language"], row["seed"]] = float(row["score"])
    order = sorted(scores, key=lambda key: (key[0], key[1] != "full", ":" in key[1], key[1], key[2] == "composed"))
    return {key: scores[key] for key in order}


def by_model(rows: list[Row]) -> dict[str, list[Row]]:
    return {model: [row for row in rows if row["model"] == model] for model in sorted({row["model"] for row in rows})}


def languages_of(scores: Mapping[Key, Scores]) -> list[str]:
    return sorted({language for each in scores.values() for language, _ in each})


def report(rows: list[Row]) -> str:
    """Tables in Markdown, of each model: the score by language and condition, and paired differences of conditions."""
    return "\n".join(_report_of_model(model, each) for model, each in by_model(rows).items())


def _report_of_model(model: str, rows: list[Row]) -> str:
    scores = by_condition(rows)
    languages = languages_of(scores)
    table = [["", *languages, "mean", "seeds"]]
    for key, each in scores.items():
        columns = [[value for (name, _), value in each.items() if name == language] for language in languages]
        means = means_of(each, languages)
        table.append([label(key), *map(summary, columns), summary(means), str(len({seed for _, seed in each}))])
    differences = [["difference", "mean", "95 % interval", "above 0", "p"]]
    for first, second in comparisons(list(scores)):
        if (grid := differences_of(scores[first], scores[second])).size:
            differences.append([f"{label(first)} − {label(second)}", *paired(grid)])
    note = (
        f"Zero-shot {METRICS[rows[0]['metric']]}, {model}. Mean ± standard deviation over seeds. Differences are "
        "paired over languages and seeds. Intervals and p values (t) hold for other languages and other seeds: pairs "
        "of one language or one seed are not independent, so that both are random effects. The p values are not "
        "corrected for the number of comparisons."
    )
    return f"{note}\n\n{markdown(table)}\n\n{markdown(differences)}\n"


def means_of(scores: Scores, languages: list[str]) -> list[float]:
    """The mean over all languages, of each seed that has scores of all."""
    seeds = sorted({seed for _, seed in scores})
    complete = [seed for seed in seeds if all((language, seed) in scores for language in languages)]
    return [statistics.fmean(scores[language, seed] for language in languages) for seed in complete]


def plot(rows: list[Row], path: Path) -> None:
    """The mean over languages of each model and condition, with one point per seed."""
    from matplotlib.figure import Figure

    models = by_model(rows)
    bars, counts = [], set()
    for model, each in models.items():
        scores = by_condition(each)
        languages = languages_of(scores)
        counts.add(str(len(languages)))
        for key, of_condition in scores.items():
            if values := means_of(of_condition, languages):
                bars.append((label(key) + (f" ({model})" if len(models) > 1 else ""), key, values))
    longest = max((len(name) for name, *_ in bars), default=0)
    figure = Figure(figsize=(max(6.5, 3 + 0.06 * longest), 0.6 + 0.3 * len(bars)), dpi=160, layout="constrained")
    axes = figure.subplots()
    for place, (_, key, values) in enumerate(bars):
        color = COLORS[Recipe.of(key[1]).name]
        axes.barh(place, statistics.fmean(values), 0.7, color=color, alpha=1 if key[2] == "composed" else 0.45)
        axes.plot(values, [place] * len(values), "o", color="#1f2430", markersize=2.5)
    axes.set_yticks(range(len(bars)), [name for name, *_ in bars], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(left=max(0.0, min((min(values) for *_, values in bars), default=0.0) - 0.1))
    count = " or ".join(sorted(counts))
    axes.set_xlabel(f"zero-shot {METRICS[rows[0]['metric']]}, mean over {count} languages", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def summary(values: list[float]) -> str:
    """ ".763 ± .012": mean and standard deviation over seeds."""
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.3f}"
    return (text if len(values) < 2 else f"{text} ± {statistics.stdev(values):.3f}").replace("0.", ".")


def label(key: Key) -> str:
    source_vector, method, kind = key
    name = Recipe.of(method).label + ("" if method == "full" else f", {KINDS[kind]}")
    return f"{name}, from the source's vector" if source_vector == "1" else name


def comparisons(keys: list[Key]) -> Iterable[tuple[Key, Key]]:
    """Pairs that differ in one respect: composed or alone, the recipe, with or without the source's vector."""
    for second, first in combinations(keys, 2):
        differ = [i for i in range(3) if first[i] != second[i]]
        if len(differ) == 1 and first[1] != "full":
            recipes = {first[1], second[1]}
            if 1 not in differ or "lt-sft" in recipes or "deft-x" in recipes:
                yield (second, first) if second[1] == "deft-x" and 1 in differ else (first, second)


def differences_of(first: Scores, second: Scores) -> np.ndarray:
    """[languages, seeds] of the differences: the languages of both, and the seeds that have all of them in both."""
    common = first.keys() & second.keys()
    languages, seeds = (sorted({key[i] for key in common}) for i in (0, 1))
    complete = [seed for seed in seeds if all((language, seed) in common for language in languages)]
    values = [[first[language, seed] - second[language, seed] for seed in complete] for language in languages]
    return np.array(values).reshape(len(languages), len(complete))


def paired(grid: np.ndarray) -> list[str]:
    """Of differences [languages, seeds]: the mean, its 95 % interval, how many are above 0, p value of a mean of 0."""
    mean, (error, freedom) = grid.mean(), standard_error(grid)
    half, p = stats.t.ppf(0.975, freedom) * error, 2 * stats.t.sf(abs(mean) / error, freedom) if error else float("nan")
    interval = f"{mean - half:+.3f} to {mean + half:+.3f}" if np.isfinite(half) else "–"
    return [f"{mean:+.3f}", interval, f"{(grid > 0).sum()} of {grid.size}", f"{p:.2g}" if np.isfinite(p) else "–"]


def standard_error(grid: np.ndarray) -> tuple[float, float]:
    """(standard error of the mean of a grid, its degrees of freedom), rows and columns being random effects.

    The mean squares of rows, columns and rest give the variance (rows + columns - rest) / size, with the degrees of
    freedom of Satterthwaite (1946); a variance component that would be negative is 0. (NaN, NaN) of a single value.
    """
    rows, columns = grid.shape
    if grid.size < 2:
        return float("nan"), float("nan")
    by_row, by_column = grid.mean(1), grid.mean(0)
    of_rows = columns * by_row.var(ddof=1) if rows > 1 else 0.0
    of_columns = rows * by_column.var(ddof=1) if columns > 1 else 0.0
    if 1 in grid.shape:
        return float(((of_rows + of_columns) / grid.size) ** 0.5), float(grid.size - 1)
    freedom = (rows - 1) * (columns - 1)
    rest = np.square(grid - by_row[:, None] - by_column + grid.mean()).sum() / freedom
    if min(of_rows, of_columns) <= rest:
        larger, count = max((of_rows, rows), (of_columns, columns))
        return float((larger / grid.size) ** 0.5), float(count - 1)
    total = of_rows + of_columns - rest
    parts = of_rows**2 / (rows - 1) + of_columns**2 / (columns - 1) + rest**2 / freedom
    return float((total / grid.size) ** 0.5), float(total**2 / parts)
