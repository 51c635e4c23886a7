"""Settings that cannot be meant are refused where they are made, by name."""

import math
from functools import partial
from pathlib import Path

import pytest

from deftx_kernels.train.config import (
    EvalConfig,
    LanguageConfig,
    PhaseConfig,
    Recipe,
    RunConfig,
    SelectionConfig,
    TaskConfig,
    TrainLanguageConfig,
    TrainTaskConfig,
)
from deftx_kernels.train.data_config import CldrData, FilesData, HubData, NusaxData

FILES = {"train": ["a.csv"], "test": ["x=a.csv"], "text": ["x=a.txt"]}
NEITHER = TaskConfig(SelectionConfig(energy=None))


@pytest.mark.parametrize(
    ("make", "wrong"),
    [
        (SelectionConfig, {"k": [0, -1, 1.5], "density": [0, -0.1, 1.1, math.nan], "energy": [0, 2]}),
        (SelectionConfig, {"rank": [0, "half"]}),
        (partial(SelectionConfig, iterations=3), {"k": [2]}),
        (SelectionConfig, {"residual_density": [-1, math.nan], "scope": ["column"], "refresh_every": [0]}),
        (PhaseConfig, {"lr": [0, -1, math.nan, math.inf], "epochs": [0, math.nan], "max_steps": [0]}),
        (PhaseConfig, {"warmup_steps": [-1, 0.5]}),
        (PhaseConfig, {"weight_decay": [-1, math.nan], "l1": [-1], "max_grad_norm": [-1, math.inf], "eval_every": [0]}),
        (TaskConfig, {"batch_size": [0], "accumulation": [0, -2], "max_length": [3]}),
        (LanguageConfig, {"mlm_probability": [0, 1, math.nan], "head_steps": [-1], "head_lr": [0, math.nan]}),
        (CldrData, {"sources": [[], ["en", "en"], ["en/x"]], "targets": [[], ["en"], ["id", "id"], [".."]]}),
        (partial(NusaxData, "folder"), {"sources": [[], ["a", "a"], ["a\\b"]], "targets": [["indonesian"], [""]]}),
        (partial(FilesData, **FILES), {"train": [[], ["a", "a"]], "test": [["x"], ["y=b.csv"], ["x=a", "x=b"]]}),
        (partial(FilesData, **FILES), {"text": [[], ["../x=a"]], "pair_column": ["text"], "kind": ["regression"]}),
        (partial(HubData, "d", sources=["a"], targets=["b"]), {"targets": [["a"]], "label_column": ["text"]}),
        (partial(RunConfig, CldrData()), {"seeds": [[], [0, 0], [-1], [1 << 32]], "cost_steps": [-1]}),
        (partial(RunConfig, CldrData()), {"recipes": [[], ["full", "full"], ["x"]], "device": ["tpu"]}),
        (
            partial(RunConfig, CldrData()),
            {"task": [NEITHER], "recipes": [["deft-x:x=1"], ["lt-sft:k"]]},
        ),
        (partial(RunConfig, FilesData(**FILES)), {"source_vector": [True]}),
        (partial(TrainLanguageConfig, "a", language="x", run_dir="r"), {"language": ["a/b", ""], "seed": [-1]}),
        (partial(TrainTaskConfig, train=["a"], run_dir="r"), {"train": [[]], "recipe": ["x"], "settings": [NEITHER]}),
        (partial(EvalConfig, "a", vectors=["v"]), {"vectors": [[]], "batch_size": [0]}),
    ],
)
def test_each_wrong_value_is_refused_by_name(make, wrong):
    make()
    names = {"settings": "selection", "task": "selection", "test": "te[sx]t", "recipes": "recipe"}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(ValueError, match=names.get(name, name)):
                make(**{name: value})


def test_what_excludes_one_another():
    with pytest.raises(ValueError, match="warmup_steps must be at most max_steps = 5, not 6"):
        PhaseConfig(max_steps=5, warmup_steps=6)
    with pytest.raises(ValueError, match="selection: give one of rank and energy, not rank 8 and energy 0.7"):
        SelectionConfig(rank=8, energy=0.7)
    with pytest.raises(ValueError, match="pair_column: token classification"):
        FilesData(**FILES, pair_column="other", kind="token-classification")
    RunConfig(CldrData(), recipes=["lt-sft", "lift"], task=NEITHER)


@pytest.mark.parametrize(
    ("text", "folder", "label"),
    [
        ("deft-x", "deft-x", "DeFT-X"),
        ("full", "full", "full fine-tuning"),
        ("deft-x:rank=32", "deft-x-rank=32", "DeFT-X, rank 32"),
        (
            "deft-x:energy=0.9,residual_density=0.1",
            "deft-x-energy=0.9-residual_density=0.1",
            "DeFT-X, energy 0.9, residual density 0.1",
        ),
        ("deft-x:rank=gavish-donoho", "deft-x-rank=gavish-donoho", "DeFT-X, rank gavish-donoho"),
        ("lt-sft:k=7,iterations=2", "lt-sft-k=7-iterations=2", "LT-SFT, k 7, iterations 2"),
    ],
)
def test_recipes_as_text(text, folder, label):
    recipe = Recipe.of(text)
    assert str(recipe) == text
    assert Recipe.of(recipe) is recipe
    assert (recipe.folder, recipe.label) == (folder, label)
    again = Recipe.of(str(Recipe(recipe.name, **recipe.options)))
    assert (again.name, again.options) == (recipe.name, recipe.options)


@pytest.mark.parametrize(
    ("text", "defaults", "expected"),
    [
        ("deft-x:energy=0.5", {"rank": 8}, {"energy": 0.5, "rank": None}),
        ("deft-x:rank=8", {}, {"energy": None, "rank": 8}),
        ("deft-x:density=0.2", {"k": 9}, {"density": 0.2, "k": None}),
        ("lt-sft:k=9", {"density": 0.2}, {"k": 9}),
        ("deft-x:residual_density=1", {"rank": 8}, {"rank": 8, "energy": None, "residual_density": 1}),
        ("deft-x:denoise_embeddings=false,scope=row", {}, {"denoise_embeddings": False, "scope": "row"}),
        ("lift:refresh_every=3", {"k": 9}, {"k": 9, "refresh_every": 3}),
        ("deft-x:density=.1", {}, {"density": 0.1}),
    ],
)
def test_an_option_replaces_the_default_that_excludes_it(text, defaults, expected):
    selection = Recipe.of(text).selection(SelectionConfig(**defaults))
    assert {name: getattr(selection, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dft", "recipe must be one of deft-x, lt-sft, lift, full, not 'dft'"),
        ("deft-x:ranks=3", "recipe deft-x: no option 'ranks'; options are density, k, rank"),
        ("full:k=3", "recipe full: no option 'k'; it has none"),
        ("deft-x:", "recipe 'deft-x:' should be written as deft-x:option=value"),
        ("deft-x:rank", "should be written as deft-x:option=value"),
        ("deft-x:rank=", "should be written as deft-x:option=value"),
        ("deft-x:k=3,k=4", "'k' is given twice"),
        ("deft-x:k=0", "selection.k must be an integer of at least 1"),
        ("deft-x:density=2", "selection.density must be above 0"),
        ("deft-x:density=half", "selection.density must be"),
        ("deft-x:residual_density=some", "selection.residual_density must be"),
        ("deft-x:denoise_embeddings=yes", "selection.denoise_embeddings must be"),
        ("deft-x:energy=null", "deft-x needs one of rank and energy"),
        ("deft-x:rank=3,energy=0.9", "one of rank and energy"),
        ("lt-sft:k=3,density=0.1", "one of k and density"),
        ("lt-sft:density=null", "one of k and density must be given"),
        ("lt-sft:iterations=0", "selection.iterations"),
    ],
)
def test_bad_recipes_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        Recipe.of(text)


def test_recipes_of_a_run():
    RunConfig(CldrData(), recipes=["full", "deft-x:rank=3", "deft-x:rank=4", "lt-sft"])
    with pytest.raises(ValueError, match="recipes: 'deft-x-rank=3' is given twice"):
        RunConfig(CldrData(), recipes=["deft-x:rank=3", "deft-x:rank= 3"])
    with pytest.raises(ValueError, match="recipes: 'lt-sft' is given twice"):
        RunConfig(CldrData(), recipes=["lt-sft", "lt-sft"])
    for folder in (Path("runs/x"), Path("runs/../runs/x")):
        with pytest.raises(ValueError, match="language_vectors"):
            RunConfig(CldrData(), run_dir=Path("runs/x"), language_vectors=folder)
