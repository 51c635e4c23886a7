"""The whole run on a tiny BERT and a NusaX-like folder: run folder, scores, report, and a second run."""

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from train_tiny import write_csv
from transformers import BertModel

from deftx_kernels import CSRMask, SparseDelta
from deftx_kernels.train import costs, figures, models, pipeline, recipes, report, runs
from deftx_kernels.train.checkpoints import finished
from deftx_kernels.train.config import (
    EvalConfig,
    LanguageConfig,
    PhaseConfig,
    SelectionConfig,
    TaskConfig,
    TrainTaskConfig,
)
from deftx_kernels.train.data import load_corpus
from deftx_kernels.train.data_config import NusaxData
from deftx_kernels.train.presets import NusaxRun


def settings(model: str, nusax, folder, **changes) -> NusaxRun:
    def phase(**more):
        return PhaseConfig(**{"lr": 1e-2, "max_steps": 3, "keep_best": False, **more})

    shape = {"batch_size": 8, "accumulation": 1, "max_length": 24}
    selection, l1 = SelectionConfig(density=0.05), phase(l1=0.1)
    return NusaxRun(
        **{
            "data": NusaxData(nusax, ["source"]),
            "model": model,
            "run_dir": folder,
            "device": "cpu",
            "cost_steps": 2,
            "task": TaskConfig(selection, phase(), phase(), **shape),
            "language": LanguageConfig(selection, l1, l1, pack=False, head_steps=2, **shape),
            **changes,
        }
    )


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_run_folder(tiny_bert, nusax_folder, tmp_path, monkeypatch):
    folder, console = nusax_folder / "runs/run", quiet()  # the default beside `--data-dir .`
    config = settings(tiny_bert, nusax_folder, folder)
    metrics = pipeline.run(config, console)

    found = {(s["method"], s["kind"], s["language"]) for s in metrics["scores"]}
    assert found >= {("full", "task", "first"), ("deft-x", "task", "second"), ("deft-x", "composed", "first")}
    assert ("lt-sft", "composed", "second") in found
    assert all(0 <= s["macro_f1"] <= 1 and s["n"] == 16 for s in metrics["scores"])
    dense, sparse = metrics["costs"]["dense"], metrics["costs"]["sparse"]
    assert dense["gradient_bytes"] == 4 * dense["trained_entries"]
    assert sparse["gradient_bytes"] == 4 * sparse["trained_entries"]
    mask = CSRMask.load(folder / "phases/task/deft-x/mask.safetensors")
    head = sum(tensor.numel() for tensor in SparseDelta.from_pretrained(folder / "deltas/deft-x/task").dense.values())
    assert sparse["trained_entries"] == mask.nnz + head < dense["trained_entries"] / 5
    assert min(dense["peak_bytes"], *dense["step_seconds"].values(), *sparse["step_seconds"].values()) > 0

    assert json.loads((folder / "metrics.json").read_text())["scores"] == metrics["scores"]
    text = (folder / "report.md").read_text()
    for words in (
        "DeFT-X, task + language vector",
        "| First | Second | mean | sources |",
        "entries trained",
        "One seed",
    ):
        assert words in text
    for name in ("scores", "costs", "spectra", "density"):
        assert f"figures/{name}.png" in text
        assert (folder / f"figures/{name}.png").stat().st_size > 5000
    assert "Zero-shot macro-F1" in console.file.getvalue()
    assert "full fine-tuning" in console.file.getvalue()
    assert {path.name for path in (folder / "figures").iterdir()} == set(runs.FIGURES)
    assert not list(folder.rglob("*.tmp*"))
    assert not list(folder.rglob("checkpoints"))

    monkeypatch.setattr(recipes, "train_phase", lambda *_, **__: pytest.fail("trained again"))
    again = pipeline.run(settings(os.path.relpath(tiny_bert), nusax_folder, folder), quiet())
    assert again["scores"] == metrics["scores"]
    assert again["costs"] == metrics["costs"]
    measured = []
    monkeypatch.setattr(costs, "compare", lambda *arguments: measured.append(arguments[3]) or metrics["costs"])
    for steps in (2, 3):
        changed = settings(tiny_bert, nusax_folder, folder, cost_steps=steps)
        pipeline.measure_costs(changed, load_corpus(config.data), models.load_tokenizer(tiny_bert), folder, quiet())
    assert measured == [3]

    other = settings(tiny_bert, nusax_folder, folder, seeds=[1])
    with pytest.raises(ValueError, match=r"other settings \(seeds: \[0\] → \[1\]\)"):
        pipeline.run(other, quiet())
    (nusax_folder / "first/test.csv").write_text("id,text,label\n1,the room was good,negative\n")
    with pytest.raises(ValueError, match=r"other content of its inputs \(test of first\)"):
        pipeline.run(config, quiet())
    (folder / "phases/evaluation/phase.json").write_text("[]")
    with pytest.raises(ValueError, match=r"evaluation/phase.json is damaged"):
        finished(folder / "phases/evaluation")


def test_settings_that_do_not_fit_the_model_fail_before_anything_is_written(tiny_bert, nusax_folder, tmp_path):
    def refused(message: str, **changes):
        config = settings(changes.pop("model", tiny_bert), nusax_folder, tmp_path / "run", **changes)
        with pytest.raises(ValueError, match=message):
            pipeline.run(config, quiet())
        assert not (tmp_path / "run").exists()

    refused("max_length must be at most 64", task=TaskConfig(max_length=65))
    refused("max_length must be at most 64", language=LanguageConfig(max_length=65))
    fits = {"language": LanguageConfig(max_length=64)}
    refused("k = 900000 is more than the", task=TaskConfig(SelectionConfig(k=900_000), max_length=24), **fits)
    refused("less than one entry", task=TaskConfig(SelectionConfig(density=1e-9), max_length=24), **fits)
    refused(
        "lift on model.*k = 17000 is more",
        task=TaskConfig(SelectionConfig(k=17_000), max_length=24),
        recipes=["lift"],
        **fits,
    )
    path = nusax_folder / "first/train.csv"
    known = path.read_text()
    write_csv(path, [(1, "ж", "positive")])
    refused("text of 'first': the tokenizer finds no token", language=LanguageConfig(max_length=24))
    path.write_text(known)
    unmasked = tmp_path / "unmasked"
    shutil.copytree(tiny_bert, unmasked)
    tokenizer = models.load_tokenizer(tiny_bert)
    tokenizer.mask_token = None
    tokenizer.save_pretrained(unmasked)
    refused("has no mask token", model=str(unmasked))
    for run_dir in (nusax_folder, nusax_folder / "first", Path(tiny_bert) / "run"):
        with pytest.raises(ValueError, match="is, holds or is in the input"):
            pipeline.run(settings(tiny_bert, nusax_folder, run_dir), quiet())
    assert not (Path(tiny_bert) / "run").exists()


def test_source_vector_lift_and_two_seeds(tiny_bert, nusax_folder, tmp_path):
    config = settings(
        tiny_bert,
        nusax_folder,
        tmp_path / "run",
        recipes=["deft-x"],
        source_vector=True,
        seeds=[0, 1],
        cost_steps=0,
        data=NusaxData(nusax_folder, ["source"], ["first"]),
    )
    metrics = pipeline.run(config, quiet())
    assert {s["seed"] for s in metrics["scores"]} == {0, 1}
    assert "±" in (tmp_path / "run/report.md").read_text()
    assert metrics["costs"] is None
    assert (tmp_path / "run/seed-1/deltas/deft-x/language-source/sparse_delta.safetensors").is_file()

    lift = dataclasses.replace(config, run_dir=tmp_path / "lift", recipes=["lift"], source_vector=False, seeds=[0])
    scores = pipeline.run(lift, quiet())["scores"]
    assert {(s["method"], s["kind"]) for s in scores} == {("lift", "task"), ("lift", "composed")}

    full = dataclasses.replace(lift, run_dir=tmp_path / "full", recipes=["full"])
    assert {(s["method"], s["kind"]) for s in pipeline.run(full, quiet())["scores"]} == {("full", "task")}


def test_full_and_lift_with_a_source_vector(tiny_bert, nusax_folder, tmp_path):
    data = NusaxData(nusax_folder, ["source"], ["first"])
    options = {"recipes": ["full", "lift"], "source_vector": True, "cost_steps": 0, "data": data}
    console = quiet()
    metrics = pipeline.run(settings(tiny_bert, nusax_folder, tmp_path / "run", **options), console)
    scored = {(s["method"], s["kind"]) for s in metrics["scores"]}
    assert scored == {("full", "task"), ("lift", "task"), ("lift", "composed")}
    dense = [phase["vector"] for phase in metrics["phases"] if phase["method"] == "dense"]
    assert dense == ["task"]  # no other recipe than full has a dense phase
    assert "[4/4]" in console.file.getvalue()
    assert "language vector of Source, which is in the" in (tmp_path / "run/report.md").read_text()


def test_a_task_vector_of_a_model_without_pooler_is_evaluated(tiny_bert, nusax_folder, tmp_path):
    folder, source, target = tmp_path / "model", nusax_folder / "source", nusax_folder / "first"
    BertModel.from_pretrained(tiny_bert, add_pooling_layer=False).save_pretrained(folder)
    models.load_tokenizer(tiny_bert).save_pretrained(folder)
    task = settings(tiny_bert, nusax_folder, tmp_path).task
    common = {"model": str(folder), "recipe": "lt-sft", "device": "cpu", "seed": 3}
    run = TrainTaskConfig(run_dir=tmp_path / "run", train=[source / "train.csv"], settings=task, **common)
    vector = str(pipeline.train_task(run))
    pooler = {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}  # new, so a part of the head
    delta = SparseDelta.from_pretrained(vector)
    assert set(delta.dense) == {"classifier.weight", "classifier.bias"} | pooler
    assert not pooler & set(delta.mask.names)
    delta.apply_(models.load_classifier(folder, delta.metadata["labels"]))  # whatever its pooler was
    torch.manual_seed(9)
    found = pipeline.evaluate_vectors(EvalConfig(target / "test.csv", [vector], device="cpu"))
    base = str(tmp_path / "run/phases/base")
    models.load_tokenizer(tiny_bert).save_pretrained(base)
    assert found == pipeline.evaluate_vectors(EvalConfig(target / "test.csv", [vector], base, device="cpu"))


def test_score_tables():
    values = {
        ("full", "task"): {"id": 0.5, "en": 0.8},
        ("deft-x", "task"): {"id": 0.4, "en": 0.9},
        ("deft-x", "composed"): {"id": 0.45},
    }
    scores = [
        {"seed": 0, "method": method, "kind": kind, "language": language, "macro_f1": value}
        for (method, kind), row in values.items()
        for language, value in row.items()
    ]
    metrics = {"data": {"targets": ["id"], "sources": ["en"], "metric": "macro_f1"}, "scores": scores}
    assert report.score_table(metrics) == [
        ["", "Indonesian", "mean", "sources"],
        ["full fine-tuning", ".500", ".500", ".800"],
        ["DeFT-X, task vector alone", ".400", ".400", ".900"],
        ["DeFT-X, task + language vector", ".450", ".450", "–"],
    ]
    changed = "changed macro-F1 by Indonesian +0.050 (mean +0.050)."
    assert report.gain_lines({}, metrics) == [f"DeFT-X: adding the language vector {changed}"]
    replaced = f"DeFT-X: the test language's vector in place of the source's {changed}"
    assert report.gain_lines({"source_vector": True}, metrics) == [replaced]
    assert report.show([0.25, 0.35]) == ".300 ± .071"


def test_perplexity_lines():
    phases = [{"vector": "task", "method": "dense"}, {"vector": "task", "method": "deft-x"}]
    for seed, after in ((0, 532.14), (1, 7.0)):
        fell = {"perplexity": {"before": 1013.1, "after": after}, "seed": seed}
        phases += [{"vector": "language-sw", "method": method, **fell} for method in ("dense", "deft-x")]
    text = "DeFT-X: perplexity of held-out text without and with its language vector: Swahili 1,013.1 → 532.1."
    assert report.perplexity_lines({"phases": phases}) == [text]


def test_densities_add_up(tmp_path):
    mask = CSRMask.from_dense(
        {
            "bert.encoder.layer.0.attention.self.query.weight": torch.tensor([[True, False], [False, False]]),
            "bert.encoder.layer.0.attention.self.query.bias": torch.tensor([True, False]),
            "bert.embeddings.word_embeddings.weight": torch.tensor([[True, True]]),
        }
    )
    assert figures.mask_densities(mask) == {("word embeddings", -1): 1.0, ("query", 0): 0.25, ("biases", 0): 0.5}


def test_a_failing_measurement_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(costs.sys, "executable", "false")
    with pytest.raises(RuntimeError, match="measuring the dense step failed"):
        costs.compare(tmp_path / "nothing", tmp_path / "mask", [], 1, "cpu")
