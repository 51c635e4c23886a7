"""Scores of `deftx run` on the papers' data: rows, means over seeds, paired tests, one figure.

`python -m bench papers RUN_DIR...` collects the scores of finished runs into bench/results/<data set>.csv, where they
replace those of the same model, settings and seed, and writes <data set>.md and <data set>.png.
"""

import csv
import json
import statistics
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
from scipy import stats

from deftx_kernels.train.config import Recipe

COLUMNS = ("model", "source_vector", "seed", "method", "kind", "language", "score", "metric", "n", "nnz")
KINDS = {"task": "task vector alone", "composed": "task + language vector"}
Row = dict[str, str]
Key = tuple[str, str, str]  # source_vector, method, kind


def collect(folders: Iterable[Path], out: Path) -> dict[Path, list[Row]]:
    """The rows of run folders, added to the files of their data sets. {file: all its rows}"""
    found: dict[Path, list[Row]] = {}
    for folder in folders:
        config, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "metrics"))
        path = out / f"{data_set(config)}.csv"
        rows = found.setdefault(path, read(path))
        new = list(rows_of(config, metrics))
        same = {identity(row) for row in new}
        found[path] = [row for row in rows if identity(row) not in same] + new
    for path, rows in found.items():
        rows.sort(key=identity)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return found


def data_set(config: dict) -> str:
    """The name of a run's data set: that of its folder."""
    return Path(config["data"].get("data_dir") or config["data"].get("dataset") or "run").name


def rows_of(config: dict, metrics: dict) -> Iterable[Row]:
    metric, sizes = metrics["data"]["metric"], {}
    for phase in metrics["phases"]:
        if phase["vector"] == "task" and "selection" in phase:
            sizes[phase["seed"], phase["method"]] = phase["selection"]["nnz"]
    for score in metrics["scores"]:
        row = {name: score[name] for name in ("seed", "method", "kind", "language", "n")}
        row |= {"model": Path(config["model"]).name, "source_vector": int(config["source_vector"]), "metric": metric}
        row |= {"score": f"{score[metric]:.5f}", "nnz": sizes.get((score["seed"], score["method"]), "")}
        yield {name: str(row[name]) for name in COLUMNS}


def read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def identity(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("model", "source_vector", "method", "kind", "language", "seed"))


# ---- report ----


def report(rows: list[Row], sources: Iterable[str] = ()) -> str:
    """Tables in Markdown: the score by language, condition by condition, and the paired differences."""
    scores: dict[Key, dict[tuple[str, str], float]] = {}
    for row in rows:
        key = (row["source_vector"], row["method"], row["kind"])
        scores.setdefault(key, {})[row["language"], row["seed"]] = float(row["score"])
    keys = sorted(scores, key=lambda key: (key[0], key[1] != "full", ":" in key[1], key[1], key[2] == "composed"))
    languages = sorted({row["language"] for row in rows if row["kind"] == "composed"} - set(sources))
    lines = [f"| | {' | '.join(languages)} | mean |", "|---" * (len(languages) + 2) + "|"]
    for key in keys:
        means = [summary([v for (name, _), v in scores[key].items() if name == language]) for language in languages]
        seeds = sorted({seed for _, seed in scores[key]})
        overall = [statistics.fmean(scores[key][name, seed] for name in languages) for seed in seeds]
        lines.append(f"| {label(key)} | {' | '.join(means)} | {summary(overall)} |")
    lines += ["", "| difference | mean | 95 % | better in | p (Wilcoxon) |", "|---|---|---|---|---|"]
    for first, second in comparisons(keys):
        lines.append(f"| {label(first)} − {label(second)} | {paired(scores[first], scores[second], languages)} |")
    return "\n".join(lines) + "\n"


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


def paired(first: Mapping, second: Mapping, languages: list[str]) -> str:
    """Over all pairs of one language and seed: mean difference, its 95 % interval (t), how often above 0, p value."""
    pairs = [key for key in first if key in second and key[0] in languages]
    differences = np.array([first[key] - second[key] for key in pairs])
    mean, count = differences.mean(), len(differences)
    half = stats.t.ppf(0.975, count - 1) * differences.std(ddof=1) / count**0.5 if count > 1 else float("nan")
    p = stats.wilcoxon(differences).pvalue if count > 5 and differences.any() else float("nan")
    better = f"{(differences > 0).sum()} of {count}"
    return f"{mean:+.3f} | {mean - half:+.3f} to {mean + half:+.3f} | {better} | {p:.3g}"
