"""Recipes on a tiny BERT: what is selected, what moves, what is reset, what a resumed run gives."""

import builtins
import dataclasses
import errno
import io
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.numpy import load_file, save_file
from train_tiny import BAD, GOOD, sentence
from transformers import TrainerCallback

from deftx_kernels import CSRMask, SparseDelta, compose
from deftx_kernels.files import read_json
from deftx_kernels.train import models, recipes, trainer
from deftx_kernels.train.checkpoints import finished, newest_checkpoint, saving
from deftx_kernels.train.config import LanguageConfig, PhaseConfig, SelectionConfig, TaskConfig
from deftx_kernels.train.data import Corpus
from deftx_kernels.train.recipes import dense_phase, learn, select
from deftx_kernels.train.trainer import Runtime, evaluate, with_deltas
from deftx_kernels.train.vectors import VectorBuilder

LABELS = ["negative", "positive"]
RUNTIME = Runtime(seed=0, device="cpu")
K = 700
SHAPE = {"batch_size": 8, "accumulation": 1, "max_length": 24}


def phase(**changes) -> PhaseConfig:
    return PhaseConfig(**{"lr": 1e-2, "max_steps": 6, "keep_best": False, **changes})


def labelled(start: int, count: int) -> Dataset:
    texts, labels = zip(*(sentence(i) for i in range(start, start + count)))
    return Dataset.from_dict({"text": list(texts), "label": list(labels)})


def task_settings(dense: PhaseConfig | None = None, sparse: PhaseConfig | None = None, **selection) -> TaskConfig:
    dense = dense or phase()
    return TaskConfig(SelectionConfig(**(selection or {"k": K})), dense, sparse or dense, **SHAPE)


def language_settings(dense: PhaseConfig | None = None, **changes) -> LanguageConfig:
    dense = dense or phase(l1=0.1)
    return LanguageConfig(SelectionConfig(k=K), dense, dense, **{**SHAPE, "pack": False, "head_steps": 4, **changes})


def builder(
    model: str, folder: Path, rows: Dataset | None = None, labels=LABELS, task="classification"
) -> VectorBuilder:
    text, validation = Dataset.from_dict({"text": labelled(300, 48)["text"]}), None
    if rows is None:
        rows, validation = labelled(0, 48), labelled(100, 16)
    corpus = Corpus({"xx": text}, {}, task, labels, rows, validation)
    return VectorBuilder(model, corpus, models.load_tokenizer(model), RUNTIME, folder)


def task_vector(model: str, folder: Path, settings: TaskConfig | None = None, added=()):
    return builder(model, folder).task(settings or task_settings(), added)


def language_vector(model: str, folder: Path, settings: LanguageConfig | None = None):
    settings = settings or language_settings()
    make = builder(model, folder)
    return make.language("xx", make.mlm_start(settings, ["xx"]), settings)


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
    mask, _ = recipes._select(vector, "deft-x", RUNTIME)
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


class Spoil(TrainerCallback):
    """Makes one weight infinite at a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = torch.inf


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


def test_a_checkpoint_of_diverged_weights_is_not_written(tiny_bert, tmp_path):
    vector = task_vector(tiny_bert, tmp_path, task_settings(phase(max_steps=8, eval_every=2)))
    vector.examples.validation = None  # whose loss would be noticed first
    with pytest.raises(ValueError, match="diverged at step 6 .*holds NaN or infinite"):
        dense_phase(vector, dataclasses.replace(RUNTIME, callbacks=(Spoil(6),)))
    assert newest_checkpoint(vector.folder / "dense/checkpoints").name == "checkpoint-4"
    assert not (vector.folder / "dense/checkpoints/checkpoint-6").exists()
    assert dense_phase(vector, RUNTIME)["resumed_from"] == "checkpoint-4"


def test_what_torch_says_of_a_full_disk_names_the_file(tmp_path):
    for words in (
        "inline_container.cc:862] . PytorchStreamWriter failed",
        "unexpected pos 64 vs 0",
        "basic_ios::clear: iostream error",
    ):
        with (
            pytest.raises(OSError, match="checkpoint-2 cannot be written: the disk is full"),
            saving(tmp_path / "checkpoint-2"),
        ):
            raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="a fault of ours"), saving(tmp_path):
        raise RuntimeError("a fault of ours")


def test_outputs_that_are_not_finite_are_not_scored(tiny_bert, tmp_path):
    vector = task_vector(tiny_bert, tmp_path)
    model = vector.load(vector.start)
    model.classifier.bias.data[1] = torch.nan
    with pytest.raises(ValueError, match="evaluation: outputs of the model are NaN or infinite"):
        evaluate(model, vector.examples.validation, vector.examples.collator, RUNTIME)


@pytest.fixture(scope="module")
def interrupted(tiny_bert, tmp_path_factory):
    """A task vector whose dense phase stopped behind its last checkpoint, and what it would have been."""
    settings = task_settings(phase(max_steps=6, eval_every=2, keep_best=True))
    whole = dense_phase(task_vector(tiny_bert, tmp_path_factory.mktemp("whole"), settings), RUNTIME)
    vector = task_vector(tiny_bert, tmp_path_factory.mktemp("interrupted"), settings)
    with pytest.raises(RuntimeError, match="power"):
        dense_phase(vector, dataclasses.replace(RUNTIME, callbacks=(Crash(6, "on_save"),)))
    return vector, whole


@pytest.mark.parametrize(
    ("name", "size"),
    [
        (None, 0), ("", 0), ("trainer_state.json", 0.5), ("trainer_state.json", 0), ("model.safetensors", 0.9),
        ("optimizer.pt", 0.9), ("optimizer.pt", -1), ("scheduler.pt", 0), ("rng_state.pth", None),
    ],
)  # fmt: skip
def test_an_unfinished_checkpoint_blocks_nothing(interrupted, tmp_path, name, size):
    """Cut off at a share of its size, with a byte turned (-1), or missing (None); "" is an empty folder."""
    vector, _ = interrupted
    folder = Path(shutil.copytree(vector.folder / "dense/checkpoints", tmp_path / "checkpoints"))
    expected = "checkpoint-6"
    if name == "":
        (folder / "checkpoint-999").mkdir()
        (folder / "checkpoint-1000").touch()
    elif name is not None:
        expected = "checkpoint-4"
        path = folder / "checkpoint-6" / name
        content = path.read_bytes()
        path.unlink()
        if size == -1:
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        elif size is not None:
            path.write_bytes(content[: int(size * len(content))])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert newest_checkpoint(folder).name == expected
    assert any("is deleted" in str(one.message) for one in said) == (name is not None)
    assert {path.name for path in folder.iterdir()} <= {"checkpoint-2", "checkpoint-4", expected}


@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt"])
def test_an_error_that_passes_costs_no_checkpoint(interrupted, tmp_path, monkeypatch, name):
    vector, _ = interrupted
    folder = Path(shutil.copytree(vector.folder / "dense/checkpoints", tmp_path / "checkpoints"))
    before = sorted(folder.rglob("*"))

    def failing(path, *arguments, open=open, **options):
        if str(path).endswith(name):
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return open(path, *arguments, **options)

    for module in (builtins, io):
        monkeypatch.setattr(module, "open", failing)
    with pytest.raises(OSError, match="Too many open files"):
        newest_checkpoint(folder)
    assert sorted(folder.rglob("*")) == before


def test_a_phase_resumed_behind_its_last_step_has_the_same_metrics(interrupted, tmp_path):
    """Also where the run folder was moved."""
    vector, whole = interrupted
    vector = dataclasses.replace(vector, folder=Path(shutil.copytree(vector.folder, tmp_path / "moved")))
    last = newest_checkpoint(vector.folder / "dense/checkpoints")
    best = Path(read_json(last / "trainer_state.json")["best_model_checkpoint"])
    assert best.parent == last.parent
    again = dense_phase(vector, RUNTIME)
    assert again.pop("resumed_from") == "checkpoint-6"
    times = ("seconds", "median_step_seconds")
    assert {k: v for k, v in again.items() if k not in times} == {k: whole[k] for k in again if k not in times}


def test_a_model_folder_without_its_phase_json_is_made_again(tiny_bert, tmp_path):
    vector = task_vector(tiny_bert, tmp_path)
    before = load_file(vector.start / "model.safetensors")
    (vector.start / "phase.json").unlink()
    (vector.start / "model.safetensors").write_bytes(b"half")
    after = load_file(task_vector(tiny_bert, tmp_path).start / "model.safetensors")
    assert all(np.array_equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "weights cannot be loaded from .*model.safetensors"),
        ("config.json", b"{", "weights cannot be loaded from .*config.json"),
        ("tokenizer.json", b"{}", "a tokenizer cannot be loaded from .*tokenizer.json"),
        ("tokenizer.json", b"{", "a tokenizer cannot be loaded from .*tokenizer.json"),
    ],
)
def test_a_damaged_file_of_a_model_is_named(tiny_bert, tmp_path, name, content, message):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    first = models.model_hash(folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    assert models.model_hash(folder) != first
    with pytest.raises(ValueError, match=message):
        models.load_tokenizer(folder) if name == "tokenizer.json" else models.load_classifier(folder, LABELS)


def test_a_folder_that_is_missing_is_no_hub_id(tmp_path):
    with pytest.raises(ValueError, match="model folder .*gone is missing"):
        models.load_classifier(tmp_path / "gone", LABELS)


def test_weights_that_are_missing_or_not_finite_are_refused(tiny_bert, tmp_path):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    kept = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lack 1 tensors of the base model, such as 'bert.{name}'"):
        models.load_classifier(folder, LABELS)
    kept[3, 4] = np.nan
    save_file({**tensors, name: kept}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"'bert.{name}' holds NaN"):
        models.load_masked_lm(folder)


class Crash(TrainerCallback):
    def __init__(self, step: int, event: str = "on_step_end"):
        self.step = step
        setattr(self, event, self.crash)

    def crash(self, args, state, control, **_):
        if state.global_step == self.step:
            raise RuntimeError("the power went out")


@pytest.mark.parametrize("kind", ["task", "language"])
def test_resume_gives_the_same_vector(tiny_bert, tmp_path, kind):
    every = phase(max_steps=8, eval_every=3)

    def vector(folder):
        if kind == "task":
            return task_vector(tiny_bert, folder, task_settings(every))
        return language_vector(tiny_bert, folder, language_settings(every, head_steps=2, tie_decoder=True))

    whole, _ = learn(vector(tmp_path / "whole"), "deft-x", RUNTIME)
    for folder in ("dense", "deft-x"):  # crashes once in each phase
        broken = vector(tmp_path / "broken")
        with pytest.raises(RuntimeError, match="power"):
            learn(broken, "deft-x", dataclasses.replace(RUNTIME, callbacks=(Crash(7),)))
        assert newest_checkpoint(broken.folder / folder / "checkpoints").name == "checkpoint-6"
        if folder == "dense":
            assert dense_phase(broken, RUNTIME)["resumed_from"] == "checkpoint-6"
    resumed, metrics = learn(vector(tmp_path / "broken"), "deft-x", RUNTIME)
    assert metrics["resumed_from"] == "checkpoint-6"
    assert resumed.mask == whole.mask
    assert torch.equal(resumed.values, whole.values)
    assert all(torch.equal(resumed.dense[name], whole.dense[name]) for name in whole.dense)
    assert not (broken.folder / "deft-x/checkpoints").exists()


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

    with pytest.warns(RuntimeWarning, match="is made again, as its result is missing or damaged"):
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


def test_the_mlm_decoder_is_a_frozen_copy_or_tied(tiny_bert):
    untied, new_head = models.load_masked_lm(tiny_bert)
    models.freeze_for_vector(untied)
    decoder, words = untied.get_output_embeddings(), untied.get_input_embeddings()
    assert new_head
    assert not decoder.weight.requires_grad
    assert torch.equal(decoder.weight, words.weight)
    assert decoder.weight is not words.weight
    assert words.weight.requires_grad
    tied, _ = models.load_masked_lm(tiny_bert, tie_decoder=True)
    models.freeze_for_vector(tied)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert tied.get_output_embeddings().weight.requires_grad
    for model in (untied, tied):
        assert not any(p.requires_grad for name, p in model.named_parameters() if "LayerNorm" in name)


def test_mlm_loss_at_the_asked_positions_is_the_model_s_own(tiny_bert, tmp_path):
    vector = language_vector(tiny_bert, tmp_path)
    model = vector.load(vector.start).eval()
    batch = vector.examples.collator([vector.examples.train[i] for i in range(8)])
    args = trainer.training_arguments(tmp_path, vector.config, phase(), RUNTIME, False, True)
    ours = trainer.MaskedLanguageTrainer(model=model, args=args)
    loss, outputs = ours.compute_loss(model, dict(batch), return_outputs=True)
    assert loss.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert outputs["logits"].shape[0] == (batch["labels"] != -100).sum()


def test_token_classification(tiny_bert, tmp_path):
    words = [text.split() for text in labelled(0, 40)["text"]]
    tags = [["ADJ" if w in GOOD + BAD else "X" for w in line] for line in words]
    rows = Dataset.from_dict({"tokens": words, "tags": tags})
    vector = builder(tiny_bert, tmp_path, rows, ["ADJ", "X"], "token-classification").task(
        task_settings(phase(), phase(max_steps=300))
    )
    delta, _ = learn(vector, "lt-sft", RUNTIME)
    with with_deltas(vector.load(vector.start), [delta]) as model:
        scores = evaluate(model, vector.examples.train, vector.examples.collator, RUNTIME)
    assert scores["n"] == sum(map(len, words))
    assert scores["macro_f1"] > 0.9
