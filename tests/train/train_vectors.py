"""Small vectors to learn, of a task and of a language, and a callback that stops their training."""

from pathlib import Path

from datasets import Dataset
from train_tiny import sentence
from transformers import TrainerCallback

from deftx_kernels.train import models
from deftx_kernels.train.config import LanguageConfig, PhaseConfig, SelectionConfig, TaskConfig
from deftx_kernels.train.data import Corpus
from deftx_kernels.train.trainer import Runtime
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


class Crash(TrainerCallback):
    def __init__(self, step: int, event: str = "on_step_end"):
        self.step = step
        setattr(self, event, self.crash)

    def crash(self, args, state, control, **_):
        if state.global_step == self.step:
            raise RuntimeError("the power went out")
