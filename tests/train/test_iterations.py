"""Several iterations of LT-SFT and DeFT-X with a growing mask, and LIFT phases that continue from a checkpoint."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from train_vectors import RUNTIME, Crash, language_settings, language_vector, phase, task_settings, task_vector
from transformers import TrainerCallback

from deftx_kernels import CSRMask
from deftx_kernels.train import recipes
from deftx_kernels.train.checkpoints import newest_checkpoint
from deftx_kernels.train.recipes import learn

K = 701  # odd: 350 entries, then 701
ITERATIONS = 2


@pytest.fixture
def trained(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """The weights of the models whose differences were taken, as integers."""
    found = []

    def spy(vector, model, *arguments, difference=recipes.difference):
        found.append({name: p.detach().cpu().clone().view(torch.int32) for name, p in model.named_parameters()})
        return difference(vector, model, *arguments)

    monkeypatch.setattr(recipes, "difference", spy)
    return found


class CrashInPhase(TrainerCallback):
    """Stops the training of the phase with a number, from 1, at its second step. `began`: the phases so far."""

    def __init__(self, number: int | None = None):
        self.number, self.began = number, 0

    def on_train_begin(self, args, state, control, **_):
        self.began += 1

    def on_step_end(self, args, state, control, **_):
        if self.began == self.number and state.global_step == 2:
            raise RuntimeError("the power went out")


def runtime(callback: TrainerCallback):
    return dataclasses.replace(RUNTIME, callbacks=(callback,))


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


def largest(before: dict, after: dict, names, k: int, forced: dict | None = None) -> dict[str, np.ndarray]:
    """The k entries with the largest |after - before|, the `forced` ones first."""
    names = sorted(names)
    scores = np.concatenate([np.abs(after[name] - before[name]).ravel() for name in names])
    if forced is not None:
        scores[np.concatenate([forced[name].ravel() for name in names])] = np.inf
    chosen = np.zeros(len(scores), bool)
    chosen[np.argsort(-scores, kind="stable")[:k]] = True
    parts = np.split(chosen, np.cumsum([before[name].size for name in names])[:-1])
    return {name: part.reshape(before[name].shape) for name, part in zip(names, parts)}


@pytest.mark.parametrize("kind", ["task", "language"])
def test_two_iterations(tiny_bert, tmp_path, trained, kind):
    if kind == "task":
        vector = task_vector(tiny_bert, tmp_path, task_settings(k=K))
    else:
        vector = language_vector(tiny_bert, tmp_path)
    recipe, folder = f"lt-sft:iterations=2,k={K}", vector.folder / f"lt-sft-iterations=2-k={K}"
    callback = CrashInPhase()
    delta, metrics = learn(vector, recipe, runtime(callback))
    assert callback.began == 4
    small, mask = (CSRMask.load(path / "mask.safetensors") for path in (folder / "iteration-1", folder))
    assert (small.nnz, mask.nnz) == (350, K)
    assert metrics["selection"]["nnz"] == K
    assert small & mask == small
    assert delta.mask == mask
    theta0, first, second = map(
        weights, (vector.start, vector.folder / "dense/model", folder / "iteration-2/dense/model")
    )
    names, reached = small.names, weights(folder / "iteration-1/model")
    assert set(names) == {n for n in theta0 if n.startswith("bert.") and "LayerNorm" not in n}
    expected = largest(theta0, first, names, 350)
    assert all(np.array_equal(small.to_dense()[name].numpy(), expected[name]) for name in names)
    expected = largest(theta0, second, names, K, expected)
    assert all(np.array_equal(mask.to_dense()[name].numpy(), expected[name]) for name in names)

    (after,) = trained
    for name, before in theta0.items():
        if name.startswith("bert."):
            outside, outside_small = np.ones(before.shape, bool), np.ones(before.shape, bool)
            if name in names:
                outside, outside_small = (~m.to_dense()[name].numpy() for m in (mask, small))
            assert np.array_equal(after[name].numpy()[outside], before.view(np.int32)[outside]), name
            assert np.array_equal(reached[name].view(np.int32)[outside_small], before.view(np.int32)[outside_small])
    # theta0 + delta is what was trained
    values = np.concatenate([(after[n].view(torch.float32).numpy() - theta0[n])[expected[n]] for n in mask.names])
    assert np.array_equal(delta.values.numpy(), values)
    assert any((reached[name] != theta0[name]).any() for name in names)


def test_residual_density_one_gives_lt_sft_in_every_iteration(tiny_bert, tmp_path):
    vector = task_vector(tiny_bert, tmp_path, task_settings(k=K, iterations=3))
    (one, _), (other, metrics) = (learn(vector, recipe, RUNTIME) for recipe in ("lt-sft", "deft-x:residual_density=1"))
    assert one.mask == other.mask
    assert torch.equal(one.values, other.values)
    folder = vector.folder / "deft-x-residual_density=1"
    masks = [
        CSRMask.load(path / "mask.safetensors") for path in (folder / "iteration-1", folder / "iteration-2", folder)
    ]
    assert [mask.nnz for mask in masks] == [233, 467, K]
    assert masks[0] & masks[1] == masks[0]
    assert masks[1] & masks[2] == masks[1]
    denoised, _ = learn(vector, "deft-x", RUNTIME)
    assert denoised.mask != one.mask
    assert denoised.mask.nnz == K
    assert metrics["selection"]["denoising"]


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_masks_grow_in_each_tensor_and_row(tiny_bert, tmp_path, scope):
    vector = task_vector(tiny_bert, tmp_path, task_settings(density=0.07, iterations=2, scope=scope, rank=3))
    delta, _ = learn(vector, "deft-x", RUNTIME)
    small = CSRMask.load(vector.folder / "deft-x/iteration-1/mask.safetensors")
    once = task_vector(tiny_bert, tmp_path / "once", task_settings(density=0.07, scope=scope, rank=3))
    expected = learn(once, "deft-x", RUNTIME)[0].mask
    assert small & delta.mask == small
    assert small.nnz < delta.mask.nnz
    counts = [{name: row["nnz"] for name, row in mask.summary().items()} for mask in (delta.mask, expected)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("number", "left", "kind"), [(2, 3, "task"), (3, 2, "language"), (4, 1, "task")])
def test_a_crash_between_iterations(tiny_bert, tmp_path, number, left, kind):
    def make(folder):
        if kind == "task":
            return task_vector(tiny_bert, folder, task_settings(k=K))
        return language_vector(tiny_bert, folder, language_settings(phase(l1=0.1, eval_every=4)))

    recipe = f"deft-x:iterations=2,k={K}"
    expected, _ = learn(make(tmp_path / "whole"), recipe, RUNTIME)
    vector = make(tmp_path / "crashed")
    with pytest.raises(RuntimeError, match="power"):
        learn(vector, recipe, runtime(CrashInPhase(number)))
    callback = CrashInPhase()
    found, _ = learn(vector, recipe, runtime(callback))
    assert callback.began == left
    assert found.mask == expected.mask
    assert torch.equal(found.values.view(torch.int32), expected.values.view(torch.int32))
    assert found.dense.keys() == expected.dense.keys()
    assert all(torch.equal(found.dense[name], expected.dense[name]) for name in found.dense)
    assert not list(vector.folder.rglob("checkpoints"))


def test_l1_and_decay_pull_toward_theta0_in_every_iteration(tiny_bert, tmp_path, monkeypatch):
    pulled = []

    def optimizer(parameters, mask, make=recipes.SparseAdamW, **options):
        pulled.append((mask, options["decay_to"]))
        return make(parameters, mask, **options)

    class Spy(recipes.L1Toward):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            pulled.append((None, self.start))

    monkeypatch.setattr(recipes, "SparseAdamW", optimizer)
    monkeypatch.setattr(recipes, "L1Toward", Spy)
    vector = task_vector(tiny_bert, tmp_path, task_settings(phase(l1=0.1), k=K, iterations=2))
    learn(vector, "lt-sft", RUNTIME)
    theta0 = dict(vector.load(vector.start).named_parameters())
    assert [mask and mask.nnz for mask, _ in pulled] == [None, 350, None, K]
    for mask, start in pulled:
        if mask is None:
            assert len(start) > 20
            assert all(torch.equal(p, theta0[name]) for name, p in start.items())
        else:
            assert torch.equal(start, mask.gather(theta0))


# ---- LIFT ----


def lift_vector(tiny_bert: str, folder: Path, keep_best: bool):
    settings = task_settings(phase(max_steps=9, eval_every=2, keep_best=keep_best), density=0.05, rank=4)
    settings.selection.refresh_every = 3
    return task_vector(tiny_bert, folder, settings)


@pytest.mark.parametrize(
    ("crash", "resumed_from", "keep_best"),
    [
        (Crash(2), None, False),
        (Crash(5), "checkpoint-4", True),
        (Crash(6, "on_save"), "checkpoint-6", False),
        (Crash(9), "checkpoint-8", False),
    ],
    ids=["before the first checkpoint", "best checkpoint", "at a refresh", "at the end"],
)
def test_lift_continues_with_its_masks_and_moments(tiny_bert, tmp_path, trained, keep_best, crash, resumed_from):
    expected, wanted = learn(lift_vector(tiny_bert, tmp_path / "whole", keep_best), "lift", RUNTIME)
    vector = lift_vector(tiny_bert, tmp_path / "crashed", keep_best)
    with pytest.raises(RuntimeError, match="power"):
        learn(vector, "lift", runtime(crash))
    found, metrics = learn(vector, "lift", RUNTIME)
    assert metrics["resumed_from"] == resumed_from
    assert found.mask == expected.mask  # the union
    assert torch.equal(found.values.view(torch.int32), expected.values.view(torch.int32))
    undisturbed, resumed = trained
    assert all(torch.equal(p, resumed[name]) for name, p in undisturbed.items())
    assert metrics["loss"] == wanted["loss"]
    for name in ("refreshes", "trained_in_all", "nnz", "denoising"):
        assert metrics["selection"][name] == wanted["selection"][name]
    assert metrics["selection"]["trained_in_all"] > metrics["selection"]["nnz"]
    assert not (vector.folder / "lift/checkpoints").exists()


@pytest.mark.parametrize("name", ["mask.safetensors", "union.safetensors"])
def test_a_lift_checkpoint_without_its_masks_is_incomplete(tiny_bert, tmp_path, name):
    vector = lift_vector(tiny_bert, tmp_path, False)
    with pytest.raises(RuntimeError, match="power"):
        learn(vector, "lift", runtime(Crash(5)))
    folder = vector.folder / "lift/checkpoints"
    assert newest_checkpoint(folder, recipes.LIFT_MASKS).name == "checkpoint-4"
    (folder / "checkpoint-4" / name).unlink()
    with pytest.warns(RuntimeWarning, match=r"checkpoint-4 is incomplete or damaged and is deleted: .*" + name):
        assert learn(vector, "lift", RUNTIME)[1]["resumed_from"] == "checkpoint-2"
