"""Recipes on a tiny BERT: what is selected, what is trained, what is reset."""

import dataclasses
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file
from train_tiny import BAD, GOOD
from train_vectors import (
    LABELS,
    RUNTIME,
    K,
    builder,
    labelled,
    language_settings,
    language_vector,
    phase,
    task_settings,
    task_vector,
)

from deftx_kernels import CSRMask, SparseDelta, compose
from deftx_kernels.train import models, recipes, trainer
from deftx_kernels.train.checkpoints import finished
from deftx_kernels.train.config import LanguageConfig, SelectionConfig
from deftx_kernels.train.recipes import dense_phase, learn, select
from deftx_kernels.train.trainer import evaluate, with_deltas


class Learned(NamedTuple):
    """A task and a language vector by DeFT-X and LT-SFT."""

    folder: Path
    vectors: tuple
    results: dict  # (vector, recipe) → (delta, metrics)


@pytest.fixture(scope="module")
def learned(tiny_bert, tmp_path_factory) -> Learned:
    folder = tmp_path_factory.mktemp("learned")
    vectors = task_vector(tiny_bert, folder), language_vector(tiny_bert, folder)
    results = {(v.name, recipe): learn(v, recipe, RUNTIME) for v in vectors for recipe in ("deft-x", "lt-sft")}
    return Learned(folder, vectors, results)


def checkpoints(vector) -> tuple[dict, dict]:
    """theta0 and theta1 as NumPy arrays, from their files."""
    return load_file(vector.start / "model.safetensors"), load_file(vector.folder / "dense/model/model.safetensors")


def maskable(tensors: dict) -> list[str]:
    return sorted(name for name in tensors if name.startswith("bert.") and "LayerNorm" not in name)


def numpy_top_k(scores: dict[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    names = sorted(scores)
    flat = np.concatenate([np.abs(scores[name]).ravel() for name in names])
    chosen = np.zeros(len(flat), bool)
    chosen[np.argsort(-flat, kind="stable")[:k]] = True
    parts = np.split(chosen, np.cumsum([scores[name].size for name in names])[:-1])
    return {name: part.reshape(scores[name].shape) for name, part in zip(names, parts)}


@pytest.mark.parametrize("number", [0, 1], ids=["task", "language"])
def test_masks_are_numpy_s(learned, number):
    vector = learned.vectors[number]
    before, after = checkpoints(vector)
    differences = {name: after[name] - before[name] for name in maskable(before)}
    expected = numpy_top_k(differences, K)
    dense = CSRMask.load(vector.folder / "lt-sft/mask.safetensors").to_dense()
    assert sorted(dense) == sorted(expected)
    for name, entries in expected.items():
        assert np.array_equal(dense[name].numpy(), entries), name

    scores = {}
    for name, delta in differences.items():
        scores[name] = delta = after[name].astype(np.float64) - before[name]
        if delta.ndim == 2:
            u, s, vh = np.linalg.svd(delta, full_matrices=False)
            share = np.cumsum(s**2) / max((s**2).sum(), 1e-300)
            rank = int(np.argmax(share >= 0.9)) + 1
            scores[name] = (u[:, :rank] * s[:rank]) @ vh[:rank]
    expected = numpy_top_k(scores, K)
    mask = CSRMask.load(vector.folder / "deft-x/mask.safetensors")
    threshold = min(np.abs(scores[name][expected[name]]).min() for name in scores if expected[name].any())
    dense = mask.to_dense()
    assert mask.nnz == K
    for name, entries in expected.items():
        differ = dense[name].numpy() != entries  # float32 can change the order of entries that are almost equal
        assert (np.abs(np.abs(scores[name][differ]) - threshold) <= 1e-4 * threshold).all(), name


def test_residual_density_one_gives_the_lt_sft_mask(learned):
    for vector in learned.vectors:
        base, tuned = vector.load(vector.start), vector.load(vector.folder / "dense/model")
        lt_sft, _ = select("lt-sft", tuned, base, SelectionConfig(k=K))
        for rank in (None, 2):
            assert select("deft-x", tuned, base, SelectionConfig(k=K, rank=rank, residual_density=1.0))[0] == lt_sft
        assert select("deft-x", tuned, base, SelectionConfig(k=K))[0] != lt_sft


def test_embeddings_can_be_left_as_they_are(learned):
    task = learned.vectors[0]
    base, tuned = task.load(task.start), task.load(task.folder / "dense/model")
    settings = SelectionConfig(k=K, residual_density=1.0, denoise_embeddings=False)
    assert select("deft-x", tuned, base, settings)[0] == select("lt-sft", tuned, base, settings)[0]
    mask, found = select("deft-x", tuned, base, SelectionConfig(k=K, denoise_embeddings=False))
    assert mask.nnz == K
    every = select("deft-x", tuned, base, SelectionConfig(k=K))[1]
    assert found.keys() == every.keys() - models.embedding_names(base)
    assert all(f["rank"] >= 1 and 0 < f["energy"] <= 1 and 0 <= f["residual"] <= 1 for f in found.values())


def test_entries_outside_the_mask_keep_their_bits(tiny_bert, tmp_path):
    vector = task_vector(tiny_bert, tmp_path)
    vector.config.sparse = phase(weight_decay=0.1, l1=0.1)
    dense_phase(vector, RUNTIME)
    mask, _ = recipes._select(vector, "deft-x", RUNTIME, vector.folder / "dense/model", 1, None)
    trained, _ = recipes.sparse_phase(vector, mask, tmp_path / "sparse", RUNTIME)
    start, entries = vector.load(vector.start), mask.to_dense()
    moved = 0
    for name, before in start.named_parameters():
        after = trained.get_parameter(name)
        if name in entries:
            assert torch.equal(after.view(torch.int32)[~entries[name]], before.view(torch.int32)[~entries[name]]), name
            moved += int((after != before)[entries[name]].sum())
        elif name.startswith("bert."):
            assert torch.equal(after.view(torch.int32), before.view(torch.int32)), name
        else:
            assert not torch.equal(after, before), name  # the head is trained densely
    assert moved > 0.9 * mask.nnz


def test_every_phase_starts_from_theta0_head_included(tiny_bert, tmp_path, monkeypatch):
    seen = []

    def spy(model, *arguments, **options):
        named = {name.replace("_values", ""): p for name, p in model.named_parameters() if not name.endswith("values")}
        seen.append({name: p.detach().clone() for name, p in named.items()})
        assert options.get("optimizer") is None or not options["optimizer"].state
        return trainer.train_phase(model, *arguments, **options)

    monkeypatch.setattr(recipes, "train_phase", spy)
    for vector in (task_vector(tiny_bert, tmp_path), language_vector(tiny_bert, tmp_path)):
        seen.clear()
        learn(vector, "deft-x", RUNTIME)
        learn(vector, "lt-sft", RUNTIME)
        start = dict(vector.load(vector.start).named_parameters())
        assert len(seen) == 3  # one dense phase for both
        for state in seen:
            assert state.keys() == start.keys()
            assert all(torch.equal(state[name], start[name]) for name in start)


def test_composed_weights_are_the_sum(learned, tiny_bert):
    task = learned.vectors[0]
    phi_task, phi_language = (learned.results[vector.name, "deft-x"][0] for vector in learned.vectors)
    assert not phi_language.dense
    assert set(phi_task.dense) == {"classifier.weight", "classifier.bias"}
    model = task.load(task.start)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}

    def dense(delta):
        full = {name: torch.zeros(before[name].shape) for name in delta.mask.names}
        return delta.mask.scatter_(full, delta.values)

    a, b = dense(phi_task), dense(phi_language)
    with compose(phi_task, phi_language).applied(model):
        for name, start in before.items():
            change = a.get(name, torch.zeros(())).double() + b.get(name, torch.zeros(())).double()
            expected = phi_task.dense[name] if name in phi_task.dense else start.double() + change
            assert torch.allclose(model.get_parameter(name).double(), expected.double(), rtol=0, atol=1e-6), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_saved_vector_rebuilds_the_trained_model(learned):
    task = learned.vectors[0]
    delta, metrics = learned.results["task", "lt-sft"]
    loaded = SparseDelta.from_pretrained(learned.folder / "deltas/lt-sft/task")
    assert torch.equal(loaded.values, delta.values)
    assert loaded.metadata["labels"] == LABELS
    assert metrics["trained_entries"] == K + sum(tensor.numel() for tensor in delta.dense.values())
    assert metrics["gradient_bytes"] == 4 * metrics["trained_entries"]
    dense = finished(task.folder / "dense")
    assert dense["gradient_bytes"] == 4 * dense["trained_entries"] > 10 * metrics["gradient_bytes"]
    assert 8 * dense["trained_entries"] <= dense["optimizer_state_bytes"] < 8.1 * dense["trained_entries"] + 1000
    assert 8 * metrics["trained_entries"] <= metrics["optimizer_state_bytes"] < 8.1 * metrics["trained_entries"] + 1000


@pytest.mark.parametrize("which", ["dense", "deft-x", "lift"])
def test_a_phase_that_diverges_is_not_finished(tiny_bert, tmp_path, which):
    hot, fine = phase(lr=1e38), phase()
    phases = (hot, fine) if which == "dense" else (fine, hot)
    vector = task_vector(tiny_bert, tmp_path, task_settings(*phases, k=K, rank=4, refresh_every=2))
    name = "dense phase" if which == "dense" else f"sparse phase of {which}"
    message = rf"vector 'task', {name}: training diverged at step \d with learning rate 1e\+38 \("
    for _ in range(2):  # the second time, nothing of the first counts as finished
        with pytest.raises(ValueError, match=message):
            learn(vector, "lift" if which == "lift" else "deft-x", RUNTIME)
        assert not (vector.folder / which / "phase.json").exists()
        assert not vector.deltas.exists()


def test_the_head_s_phase_diverges_by_name(tiny_bert, tmp_path):
    settings = LanguageConfig(batch_size=8, max_length=24, head_steps=3, head_lr=1e38)
    with pytest.raises(ValueError, match=r"^MLM head: training diverged at step 3 with learning rate 1e\+38"):
        language_vector(tiny_bert, tmp_path, settings)
    assert not (tmp_path / "phases/mlm-head/phase.json").exists()


def test_outputs_that_are_not_finite_are_not_scored(tiny_bert, tmp_path):
    vector = task_vector(tiny_bert, tmp_path)
    model = vector.load(vector.start)
    model.classifier.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match="evaluation: outputs of the model are NaN or infinite"):
        evaluate(model, vector.examples.validation, vector.examples.collator, RUNTIME)


@pytest.mark.parametrize("lost", ["deltas/lt-sft/task", "task/lt-sft/mask.safetensors", "task/dense/model"])
@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_a_finished_phase_without_its_result_is_run_again(learned, tmp_path, monkeypatch, lost, how):
    task = learned.vectors[0]
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    shutil.copytree(task.deltas, tmp_path / "deltas")
    shutil.copytree(task.folder, tmp_path / "task")
    path = tmp_path / lost
    for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
        file.write_bytes(file.read_bytes()[:-9])
    if how == "gone":
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    vector = dataclasses.replace(task, folder=tmp_path / "task", deltas=tmp_path / "deltas")

    def learn_again() -> SparseDelta:
        dense_phase(vector, RUNTIME)
        return learn(vector, "lt-sft", RUNTIME)[0]

    with pytest.warns(RuntimeWarning, match="is run again, as its result is missing or damaged"):
        again = learn_again()
    assert torch.equal(again.values, learned.results["task", "lt-sft"][0].values)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        learn_again()


def test_a_finished_phase_is_not_run_again(learned, monkeypatch):
    task = learned.vectors[0]
    monkeypatch.setattr(recipes, "train_phase", lambda *_, **__: pytest.fail("trained again"))
    again, _metrics = learn(task, "deft-x", RUNTIME)
    assert torch.equal(again.values, learned.results["task", "deft-x"][0].values)


def test_the_best_checkpoint_on_validation_is_kept(tiny_bert, tmp_path):
    best = phase(max_steps=12, eval_every=3, keep_best=True, lr=3e-2)
    vector = task_vector(tiny_bert, tmp_path, task_settings(best))
    delta, metrics = learn(vector, "lt-sft", RUNTIME)
    with with_deltas(vector.load(vector.start), [delta]) as model:
        found = evaluate(model, vector.examples.validation, vector.examples.collator, RUNTIME)
    assert found["macro_f1"] == pytest.approx(metrics["best_validation"], abs=1e-6)


def test_lift_takes_the_largest_of_the_low_rank_weights_and_refreshes(tiny_bert, tmp_path):
    settings = task_settings(density=0.05, rank=4, refresh_every=2)
    vector = task_vector(tiny_bert, tmp_path, settings)
    model = vector.load(vector.start)
    names = models.linear_names(model)
    weights = {name: model.get_parameter(name).detach() for name in names}
    mask = recipes.lift_mask(weights, settings.selection)[0].to_dense()
    for name, weight in weights.items():
        u, s, vh = np.linalg.svd(weight.numpy().astype(np.float64), full_matrices=False)
        low = np.abs((u[:, :4] * s[:4]) @ vh[:4])
        chosen = mask[name].numpy()
        assert chosen.sum() == round(0.05 * weight.numel())
        assert low[chosen].min() >= low[~chosen].max() * (1 - 1e-4)
    delta, metrics = learn(vector, "lift", RUNTIME)
    assert metrics["selection"]["refreshes"] == 2
    assert set(delta.mask.names) == set(names)
    assert metrics["selection"]["trained_in_all"] == delta.mask.nnz >= sum(m.sum() for m in mask.values())


def test_l1_pulls_toward_theta0(tiny_bert, tmp_path):
    def distance(l1: float) -> float:
        settings = task_settings(phase(l1=l1, max_grad_norm=0))
        vector = task_vector(tiny_bert, tmp_path / str(l1), settings)
        delta, _ = learn(vector, "lt-sft", RUNTIME)
        before, after = checkpoints(vector)
        dense = sum(np.abs(after[name] - before[name]).sum() for name in maskable(before))
        return float(dense), float(delta.values.abs().sum())

    weak, strong = distance(1e-8), distance(1e6)
    assert strong[0] < 0.9 * weak[0]
    assert strong[1] < 0.9 * weak[1]


def test_source_vector_is_the_start_but_not_part_of_the_task_vector(tiny_bert, learned, tmp_path):
    source = learned.results["language-xx", "deft-x"][0]
    vector = task_vector(tiny_bert, tmp_path, added=[source])
    delta, _ = learn(vector, "deft-x", RUNTIME)
    model = vector.load(vector.base)
    with compose(delta, source).applied(model):
        trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    from_start = vector.load(vector.start)
    with delta.applied(from_start, strict=False):
        assert all(torch.allclose(p, trained[name], atol=1e-6) for name, p in from_start.named_parameters())


def test_mlm_loss_at_the_asked_positions_is_the_model_s_own(tiny_bert, tmp_path):
    vector = language_vector(tiny_bert, tmp_path)
    model = vector.load(vector.start).eval()
    batch = vector.examples.collator([vector.examples.train[i] for i in range(8)])
    args = trainer.training_arguments(tmp_path, vector.config, phase(), RUNTIME, False, vector.examples)
    ours = trainer.MaskedLanguageTrainer(model=model, args=args)
    loss, outputs = ours.compute_loss(model, dict(batch), return_outputs=True)
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert outputs["logits"].shape[0] == (batch["labels"] != -100).sum()


def test_mlm_loss_among_the_tokens_of_the_text(tiny_bert, tmp_path):
    vector = language_vector(tiny_bert, tmp_path, language_settings(vocabulary="text"))
    tokens = vector.examples.vocabulary
    text = {token for row in vector.examples.train["input_ids"] for token in row}
    assert text <= set(tokens.tolist())
    model = vector.load(vector.start).eval()
    assert 4 < len(tokens) < len(model.get_output_embeddings().weight)
    batch = vector.examples.collator([vector.examples.train[i] for i in range(8)])
    masked = batch["labels"] != -100
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[masked][:, tokens]
    targets = torch.searchsorted(tokens, batch["labels"][masked])
    ours = trainer.MaskedLanguageTrainer(
        model=model, args=trainer.training_arguments(tmp_path, vector.config, phase(), RUNTIME, False, vector.examples)
    )
    ours.use_vocabulary(tokens)
    loss, outputs = ours.compute_loss(model, dict(batch), return_outputs=True)
    assert outputs["logits"].shape == logits.shape
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, targets).item(), rel=1e-5)
    _delta, metrics = learn(vector, "lt-sft", RUNTIME)
    assert metrics["steps"] == 6
    with pytest.raises(ValueError, match="vocabulary: text needs tie_decoder"):
        language_settings(vocabulary="text", tie_decoder=True)


@pytest.mark.parametrize(("lr", "warned"), [(3.0, True), (3e-3, False)])
def test_a_language_phase_that_does_not_lower_the_validation_loss(tiny_bert, tmp_path, lr, warned):
    vector = language_vector(tiny_bert, tmp_path, language_settings(phase(lr=lr, keep_best=True, max_grad_norm=0)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = dense_phase(vector, RUNTIME)
    perplexity = metrics["perplexity"]
    assert perplexity["tokens"] == 74
    assert (perplexity["after"] >= perplexity["before"]) == warned
    text = "vector 'language-xx', dense phase: with learning rate 3 the validation loss went from"
    assert any(text in str(warning.message) for warning in caught) == warned


def test_token_classification(tiny_bert, tmp_path):
    words = [text.split() for text in labelled(0, 40)["text"]]
    tags = [["ADJ" if w in GOOD + BAD else "X" for w in line] for line in words]
    rows = Dataset.from_dict({"tokens": words, "tags": tags})
    vector = builder(tiny_bert, tmp_path, rows, ["ADJ", "X"], "token-classification").task(
        task_settings(phase(), phase(lr=3e-2, max_steps=100))
    )
    delta, _ = learn(vector, "lt-sft", RUNTIME)
    with with_deltas(vector.load(vector.start), [delta]) as model:
        scores = evaluate(model, vector.examples.train, vector.examples.collator, RUNTIME)
    assert scores["n"] == sum(map(len, words))
    assert scores["macro_f1"] > 0.9
