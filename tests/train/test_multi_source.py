"""A run with two source languages and their vectors: scores, overlaps, perplexities and the report."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from test_pipeline import quiet, settings

from deftx_kernels import SparseDelta
from deftx_kernels.train import models, pipeline, trainer
from deftx_kernels.train.config import PhaseConfig
from deftx_kernels.train.data import load_corpus
from deftx_kernels.train.data_config import NusaxData
from deftx_kernels.train.deltas import overlap
from deftx_kernels.train.tokens import task_collator, tokenize_task
from deftx_kernels.train.trainer import Runtime, evaluate


def numpy_delta(delta: SparseDelta, other: SparseDelta) -> tuple[np.ndarray, np.ndarray]:
    """(mask, values) as two flat arrays, of the tensors that both deltas have."""
    names = sorted({*delta.mask.names} & {*other.mask.names})
    shapes = dict(zip(delta.mask.names, delta.mask.shapes))
    values = delta.mask.scatter_({name: torch.zeros(shape) for name, shape in shapes.items()}, delta.values)
    chosen = delta.mask.to_dense()
    return tuple(np.concatenate([each[name].numpy().ravel() for name in names]) for each in (chosen, values))


def random_delta(density: float, seed: int) -> SparseDelta:
    random = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=random) for name, shape in (("a", (9, 7)), ("b", (30,)))}
    tuned = {
        name: p + torch.randn(p.shape, generator=random) * (torch.rand(p.shape, generator=random) < density)
        for name, p in base.items()
    }
    return SparseDelta.from_models(tuned, base)


@pytest.mark.parametrize(("one", "other"), [((0.5, 1), (0.3, 2)), ((0.2, 3), (0.9, 4)), ((1.0, 5), (1.0, 6))])
def test_overlap_is_numpy_s(one, other):
    first, second = (random_delta(*arguments) for arguments in (one, other))
    (a, x), (b, y) = numpy_delta(first, second), numpy_delta(second, first)
    both = a & b
    expected = {
        "shared": both.sum(),
        "share": both.sum() / min(a.sum(), b.sum()),
        "by_chance": max(a.sum(), b.sum()) / a.size,
        "sign_conflicts": (np.sign(x[both]) != np.sign(y[both])).mean(),
    }
    for found in (overlap(first, second), overlap(second, first)):
        assert found == pytest.approx(expected)
    assert overlap(first, first)["sign_conflicts"] == 0
    assert overlap(first, first)["share"] == 1


def test_overlap_of_vectors_that_share_nothing():
    base = {"a": torch.zeros(4, 4)}
    first, second = ({"a": torch.zeros(4, 4)} for _ in range(2))
    first["a"][0], second["a"][1] = 1, -1
    one, other = (SparseDelta.from_models(tuned, base) for tuned in (first, second))
    assert overlap(one, other) == {"shared": 0, "share": 0, "by_chance": 0.25, "sign_conflicts": 0}
    second["a"][0, 0] = -1
    assert overlap(one, SparseDelta.from_models(second, base)) == {
        "shared": 1,
        "share": 0.25,
        "by_chance": 5 / 16,
        "sign_conflicts": 1,
    }


RECIPES = ["deft-x:rank=3", "lt-sft"]


@pytest.fixture(scope="module")
def multi_source(tiny_bert, tmp_path_factory):
    """A run with two sources and one target: (its folder, config, metrics)."""
    from train_tiny import sentence, write_csv

    folder = tmp_path_factory.mktemp("multi")
    for number, language in enumerate(("east", "west", "target")):
        for split, start, count in (("train", 0, 32), ("valid", 100, 12), ("test", 200, 16)):
            rows = [(i, *sentence(i + 31 * number)) for i in range(start, start + count)]
            write_csv(folder / "data" / language / f"{split}.csv", rows)
    base = settings(tiny_bert, folder / "data", folder / "run", cost_steps=0, recipes=RECIPES, source_vector=True)
    config = dataclasses.replace(base, data=NusaxData(folder / "data", ["west", "east"]))
    for phase in (config.task.dense, config.task.sparse):  # large steps, so that scores differ
        phase.max_steps = 12
    return folder / "run", config, pipeline.run(config, quiet())


def test_sources_are_scored_with_their_own_vectors(multi_source, tiny_bert):
    folder, config, metrics = multi_source
    corpus = load_corpus(config.data)
    assert corpus.sources == metrics["data"]["sources"] == ["west", "east"]
    found = {(s["method"], s["kind"], s["language"]): s for s in metrics["scores"]}
    assert set(found) == {(r, k, x) for r in RECIPES for k in ("task", "composed") for x in ("east", "west", "target")}
    tokenizer = models.load_tokenizer(tiny_bert)
    collator = task_collator(tokenizer, corpus.task)
    start = models.load_classifier(folder / "phases/base", corpus.labels)
    for recipe in RECIPES:
        deltas = folder / "deltas" / recipe.replace(":", "-")
        task = SparseDelta.from_pretrained(deltas / "task")
        assert task.metadata["source_vectors"] == ["west", "east"]
        for language in ("east", "west", "target"):
            vector = SparseDelta.from_pretrained(deltas / f"language-{language}")
            rows = tokenize_task(corpus.test[language], tokenizer, corpus.labels, 24)
            for kind, added in (("task", [task]), ("composed", [task, vector])):
                model = copy.deepcopy(start)
                for delta in added:
                    with torch.no_grad():
                        delta.mask.add_(dict(model.named_parameters()), delta.values)
                        for name, tensor in delta.dense.items():
                            model.get_parameter(name).copy_(tensor)
                expected = evaluate(model, rows, collator, Runtime(device="cpu"))
                score = {name: found[recipe, kind, language][name] for name in expected}
                assert score == pytest.approx(expected), (recipe, kind, language)


def test_overlaps_and_perplexities_are_in_metrics_and_report(multi_source):
    folder, _, metrics = multi_source
    assert json.loads((folder / "metrics.json").read_text())["overlaps"] == metrics["overlaps"]
    keys = [(row["method"], row["language"]) for row in metrics["overlaps"]]
    assert keys == [(recipe, language) for recipe in RECIPES for language in ("target", "west", "east")]
    for row in metrics["overlaps"]:
        deltas = folder / "deltas" / row["method"].replace(":", "-")
        names = ("task", f"language-{row['language']}")
        task, language = (SparseDelta.from_pretrained(deltas / name) for name in names)
        (a, x), (b, y) = numpy_delta(task, language), numpy_delta(language, task)
        assert row["shared"] == (a & b).sum() > 0
        assert row["sign_conflicts"] == pytest.approx((x * y < 0)[a & b].mean())
    language_phases = [phase for phase in metrics["phases"] if phase["vector"].startswith("language-")]
    assert len(language_phases) == 3 * (1 + len(RECIPES))
    for phase in language_phases:
        before, after = phase["perplexity"]["before"], phase["perplexity"]["after"]
        assert 1 < after != before > 1
    for phase in metrics["phases"]:
        assert ("perplexity" in phase) == phase["vector"].startswith("language-")
    for language in ("east", "west", "target"):  # all phases of a language begin at theta0
        found = [x["perplexity"]["before"] for x in language_phases if x["vector"] == f"language-{language}"]
        assert found == pytest.approx([found[0]] * 3, rel=1e-4)
    report = (folder / "report.md").read_text()
    assert "| task vector and vector of | entries in both | share | by chance | signs differ |" in report
    assert "DeFT-X, rank 3, task + language vector" in report
    for language in ("Target", "West", "East"):
        assert f"{language}, DeFT-X, rank 3 |" in report
    phases = report.partition("## Phases")[2]
    assert "→" in phases
    assert "| task | DeFT-X, rank 3, dense |" in phases  # each recipe has a start of its own
    assert "| task | LT-SFT, dense |" in phases
    assert "| language-east | dense |" in phases
    assert "before and after the phase, among all tokens of the model." in phases


def test_task_phases_of_each_recipe_have_their_own_folder(multi_source, monkeypatch):
    folder, config, metrics = multi_source
    for recipe in ("deft-x-rank=3", "lt-sft"):
        assert (folder / f"phases/task-{recipe}/dense/model").is_dir()
        assert (folder / f"phases/task-{recipe}/{recipe}/mask.safetensors").is_file()
    trained = [phase["method"] for phase in metrics["phases"] if phase["vector"] == "task"]
    assert trained == ["dense", "deft-x:rank=3", "dense", "lt-sft"]
    monkeypatch.setattr("deftx_kernels.train.recipes.train_phase", lambda *_, **__: pytest.fail("trained again"))
    again = pipeline.run(config, quiet())
    assert again["scores"] == metrics["scores"]
    assert again["overlaps"] == metrics["overlaps"]


def test_costs_of_several_sources(multi_source, monkeypatch):
    folder, config, _ = multi_source
    seen = []
    monkeypatch.setattr(pipeline.costs, "compare", lambda *arguments: seen.append(arguments) or {})
    corpus, tokenizer = load_corpus(config.data), models.load_tokenizer(config.model)
    changed = dataclasses.replace(config, cost_steps=1)
    pipeline.measure_costs(changed, corpus, tokenizer, folder, quiet())
    ((start, mask, batches, *_),) = seen
    assert start == folder / "phases/base"
    assert mask == folder / "phases/task-deft-x-rank=3/deft-x-rank=3/mask.safetensors"
    assert mask.is_file()
    assert all("language" not in batch for batch in batches)


def test_a_large_loss_has_a_perplexity(tiny_bert, tmp_path, monkeypatch):
    from train_vectors import RUNTIME, language_settings, language_vector

    from deftx_kernels.train.recipes import dense_phase

    vector = language_vector(tiny_bert, tmp_path, language_settings(PhaseConfig(lr=1e-2, max_steps=1, keep_best=True)))
    losses = iter([2000.0, 1500.0, 1200.0, 1100.0])
    monkeypatch.setattr(trainer.MaskedLanguageTrainer, "evaluate", lambda *_, **__: {"eval_loss": next(losses)})
    metrics = dense_phase(vector, RUNTIME)
    assert metrics["perplexity"]["before"] > 1e300
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics
