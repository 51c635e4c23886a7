"""Checkpoints: incomplete or damaged ones, a full disk, weights that diverged, and resumed phases."""

import builtins
import dataclasses
import errno
import io
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_vectors import (
    RUNTIME,
    Crash,
    language_settings,
    language_vector,
    phase,
    task_settings,
    task_vector,
)
from transformers import TrainerCallback

from deftx_kernels.files import read_json
from deftx_kernels.train.checkpoints import newest_checkpoint, saving
from deftx_kernels.train.recipes import dense_phase, learn


class Spoil(TrainerCallback):
    """Makes one weight infinite at a step."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == self.step:
            next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] = torch.inf


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
        (None, 0),
        ("", 0),
        ("trainer_state.json", 0.5),
        ("trainer_state.json", 0),
        ("model.safetensors", 0.9),
        ("optimizer.pt", 0.9),
        ("optimizer.pt", -1),
        ("scheduler.pt", 0),
        ("rng_state.pth", None),
    ],
)
def test_an_unfinished_checkpoint_blocks_nothing(interrupted, tmp_path, name, size):
    """A file truncated to a share of its size, with a changed byte (-1), or missing (None); "" is an empty folder."""
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


@pytest.mark.parametrize("group_by_length", [False, True])
def test_a_resumed_second_epoch_has_the_same_order(tiny_bert, tmp_path, group_by_length):
    settings = task_settings(phase(max_steps=12, eval_every=2))  # epochs of 6 steps
    settings = dataclasses.replace(settings, group_by_length=group_by_length)
    whole, broken = (task_vector(tiny_bert, tmp_path / name, settings) for name in ("whole", "broken"))
    dense_phase(whole, RUNTIME)
    with pytest.raises(RuntimeError, match="power"):
        dense_phase(broken, dataclasses.replace(RUNTIME, callbacks=(Crash(9),)))
    assert dense_phase(broken, RUNTIME)["resumed_from"] == "checkpoint-8"
    expected, found = (load_file(vector.folder / "dense/model/model.safetensors") for vector in (whole, broken))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["task", "language"])
def test_resume_gives_the_same_vector(tiny_bert, tmp_path, kind):
    every = phase(max_steps=4, eval_every=2)

    def vector(folder):
        if kind == "task":
            return task_vector(tiny_bert, folder, task_settings(every))
        return language_vector(tiny_bert, folder, language_settings(every, head_steps=2, tie_decoder=True))

    whole, _ = learn(vector(tmp_path / "whole"), "deft-x", RUNTIME)
    for folder in ("dense", "deft-x"):  # crashes once in each phase
        broken = vector(tmp_path / "broken")
        with pytest.raises(RuntimeError, match="power"):
            learn(broken, "deft-x", dataclasses.replace(RUNTIME, callbacks=(Crash(3),)))
        assert newest_checkpoint(broken.folder / folder / "checkpoints").name == "checkpoint-2"
        if folder == "dense":
            assert dense_phase(broken, RUNTIME)["resumed_from"] == "checkpoint-2"
    resumed, metrics = learn(vector(tmp_path / "broken"), "deft-x", RUNTIME)
    assert metrics["resumed_from"] == "checkpoint-2"
    assert resumed.mask == whole.mask
    assert torch.equal(resumed.values, whole.values)
    assert all(torch.equal(resumed.dense[name], whole.dense[name]) for name in whole.dense)
    assert not (broken.folder / "deft-x/checkpoints").exists()
