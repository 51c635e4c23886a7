"""Scores of runs: collected once, averaged over seeds, compared in pairs."""

import json

import pytest
from scipy import stats

from bench import __main__ as command
from bench import papers, rows

SCORES = {  # method, kind → language → score of seeds 0 and 1
    ("full", "task"): {"a": (0.5, 0.6), "b": (0.7, 0.8)},
    ("lt-sft", "task"): {"a": (0.4, 0.5), "b": (0.6, 0.7)},
    ("lt-sft", "composed"): {"a": (0.5, 0.4), "b": (0.8, 0.6)},
    ("deft-x:rank=2", "composed"): {"a": (0.1, 0.1), "b": (0.2, 0.2)},
}


def run_folder(tmp_path, seed: int, change: float = 0.0):
    folder = tmp_path / f"run-{seed}"
    folder.mkdir(exist_ok=True)
    scores = [
        {"seed": seed, "method": method, "kind": kind, "language": language, "macro_f1": both[seed] + change, "n": 9}
        for (method, kind), languages in SCORES.items()
        for language, both in languages.items()
    ]
    phases = [{"vector": "task", "seed": seed, "method": "lt-sft", "selection": {"nnz": 77}}]
    config = {"model": "x/small", "source_vector": False, "data": {"data_dir": "data/two"}}
    (folder / "config.json").write_text(json.dumps(config))
    scores += [{"seed": seed, "method": "full", "kind": "task", "language": "source", "macro_f1": 0.9, "n": 9}]
    metrics = {"data": {"metric": "macro_f1", "sources": ["source"]}, "scores": scores, "phases": phases}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_scores_of_runs(tmp_path, capsys):
    out = tmp_path / "results"
    out.mkdir()
    folders = [run_folder(tmp_path, seed, change=0.1) for seed in (0, 1)]
    assert command.main(["papers", str(folders[0]), "--out", str(out)]) == 0
    folders = [run_folder(tmp_path, seed) for seed in (0, 1)]  # replaces the rows of seed 0
    assert command.main(["papers", *map(str, folders), "--out", str(out)]) == 0
    found = papers.read(out / "two.csv")
    assert len(found) == 18
    assert {row["nnz"] for row in found if row["method"] == "lt-sft"} == {"77"}
    text = (out / "two.md").read_text()
    assert text in capsys.readouterr().out
    assert (out / "two.png").stat().st_size > 5000
    assert "| LT-SFT, task vector alone | .450 ± .071 | .650 ± .071 | .550 ± .071 | 2 |" in text
    assert "| full fine-tuning | .550 ± .071 | .750 ± .071 | .650 ± .071 | 2 |" in text
    (line,) = (x for x in text.splitlines() if x.startswith("| LT-SFT, task + language vector − LT-SFT, task vector"))
    assert line.split("|")[2].strip() == "+0.025"
    assert line.split("|")[4].strip() == "2 of 4"
    assert rows.newest(out) == []  # they are no rows of timings


def row(language: str, seed: int, score: float, **changes: str) -> dict[str, str]:
    common = {"model": "m", "source_vector": "1", "method": "lt-sft", "kind": "composed", "role": "target"}
    text = {"language": language, "seed": str(seed), "score": str(score), "metric": "macro_f1", "n": "9", "nnz": ""}
    return common | text | changes


def test_source_languages_missing_scores_and_models_are_kept_apart(tmp_path):
    rows = [row("a", 0, 0.2), row("b", 0, 0.4), row("a", 1, 0.6), row("s", 0, 0.9, role="source")]
    rows += [row("a", 2, 0.8, kind="task"), row("a", 0, 0.5, model="other")]
    text = papers.write(rows, tmp_path / "x.csv")
    first, second = text.split("Zero-shot macro-F1, ")[1:]
    assert "|  | a | b | mean | seeds |" in first  # of the sources, none
    composed = "| LT-SFT, task + language vector, from the source's vector |"
    assert f"{composed} .400 ± .283 | .400 | .300 | 2 |" in first  # only seed 0 has both languages
    assert "| LT-SFT, task vector alone, from the source's vector | .800 | – | – | 1 |" in first
    assert "−" not in first  # no language and seed is common to two conditions
    assert f"{composed} .500 | .500 | 1 |" in second
    assert (tmp_path / "x.png").is_file()


def test_a_run_that_has_not_ended(tmp_path):
    with pytest.raises(SystemExit, match=r"run-0 has no metrics.json"):
        papers.collect([tmp_path / "run-0"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_paired_differences_are_scipy_s():
    first = {(language, str(seed)): 0.01 * seed**2 + 0.1 for language in "ab" for seed in range(4)}
    second = dict.fromkeys(first, 0.1)
    mean, interval, better, p = papers.paired(first, second)
    differences = [first[key] - 0.1 for key in first]
    low, high = stats.t.interval(0.95, 7, sum(differences) / 8, stats.sem(differences))
    assert mean == f"{sum(differences) / 8:+.3f}"
    assert interval == f"{low:+.3f} to {high:+.3f}"
    assert better == "6 of 8"
    assert float(p) == pytest.approx(stats.wilcoxon(differences).pvalue, rel=1e-2)
