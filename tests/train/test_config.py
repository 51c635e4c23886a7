"""Settings that cannot be meant are refused where they are made, by name."""

import math
from functools import partial

import pytest

from deftx_kernels.train.config import (
    EvalConfig,
    LanguageConfig,
    PhaseConfig,
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
    with pytest.raises(ValueError, match="pair_column: token classification"):
        FilesData(**FILES, pair_column="other", kind="token-classification")
    RunConfig(CldrData(), recipes=["lt-sft", "lift"], task=NEITHER)
