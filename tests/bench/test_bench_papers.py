"""Scores of runs: collected once, averaged over seeds, compared in pairs."""

import json

import numpy as np
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


def run_folder(tmp_path, seed: int, change: float = 0.0, sources=("source",), n: int = 9, **settings):
    folder = tmp_path / f"run-{seed}"
    folder.mkdir(exist_ok=True)
    scores = [
        {"seed": seed, "method": method, "kind": kind, "language": language, "macro_f1": both[seed] + change, "n": n}
        for (method, kind), languages in SCORES.items()
        for language, both in languages.items()
    ]
    phases = [{"vector": "task", "seed": seed, "method": "lt-sft", "selection": {"nnz": 77}}]
    config = {"model": "x/small", "source_vector": False, "data": {"data_dir": "data/two"}, "seeds": [seed], **settings}
    (folder / "config.json").write_text(json.dumps(config))
    scores += [{"seed": seed, "method": "full", "kind": "task", "language": "source", "macro_f1": 0.9, "n": 9}]
    metrics = {"data": {"metric": "macro_f1", "sources": list(sources)}, "scores": scores, "phases": phases}
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
    common = {"model": "m", "source_vector": "1", "method": "lt-sft", "kind": "composed", "role": "target", "nnz": ""}
    text = {
        "language": language,
        "seed": str(seed),
        "score": str(score),
        "metric": "macro_f1",
        "n": "9",
        "nnz": "",
        "settings": "",
    }
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": {"lr": 2}}, "its settings differ"),
        ({"sources": ["source", "a"]}, r"its metric, test set or source languages \(of a\) differ"),
        ({"n": 8}, r"its metric, test set or source languages \(of a\) differ"),
        ({"data": {}}, "have no data set"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, changes, message):
    papers.collect([run_folder(tmp_path, 0)], tmp_path)
    before = (tmp_path / "two.csv").read_text()
    with pytest.raises(SystemExit, match=message):
        papers.collect([run_folder(tmp_path, 1, **changes)], tmp_path)
    assert (tmp_path / "two.csv").read_text() == before
    papers.collect([run_folder(tmp_path, 1, recipes=["full"], seeds=[1])], tmp_path)
    assert len(papers.read(tmp_path / "two.csv")) == 18


@pytest.mark.parametrize("shape", [(1, 5), (5, 1)])
def test_pairs_of_one_seed_or_one_language_have_scipy_s_interval(shape):
    grid = np.random.default_rng(0).normal(0.02, 0.01, shape)
    mean, interval, above, p = papers.paired(grid)
    low, high = stats.t.interval(0.95, 4, grid.mean(), stats.sem(grid.ravel()))
    assert (mean, above) == (f"{grid.mean():+.3f}", "5 of 5")
    assert interval == f"{low:+.3f} to {high:+.3f}"
    assert float(p) == pytest.approx(stats.ttest_1samp(grid.ravel(), 0).pvalue, rel=0.05)
    assert papers.paired(grid[:1, :1]) == [f"{grid[0, 0]:+.3f}", "–", "1 of 1", "–"]


def test_the_interval_holds_for_other_languages_and_other_seeds():
    """Coverage, where seeds differ in all languages together; that of the pairs as if independent is far lower."""
    random, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(1000):
        grid = random.normal(0, 0.03, (7, 1)) + random.normal(0, 0.04, (1, 3)) + random.normal(0, 0.02, (7, 3))
        error, freedom = papers.standard_error(grid)
        covered += abs(grid.mean()) < stats.t.ppf(0.975, freedom) * error
        naive += abs(grid.mean()) < stats.t.ppf(0.975, 20) * stats.sem(grid.ravel())
    assert 930 <= covered <= 985
    assert naive < 700


def test_only_seeds_with_all_languages_are_compared():
    first = {("a", "0"): 0.3, ("b", "0"): 0.5, ("a", "1"): 0.9, ("c", "0"): 0.7}
    second = {("a", "0"): 0.1, ("b", "0"): 0.1, ("a", "1"): 0.1}
    assert papers.differences_of(first, second) == pytest.approx(np.array([[0.2], [0.4]]))
    assert papers.differences_of({}, second).size == 0
