"""The named runs of `deftx run`: demo, nusax, files, hub."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from deftx_kernels.train import config
from deftx_kernels.train.config import LanguageConfig, PhaseConfig, RunConfig, SelectionConfig, TaskConfig

DEMO: dict[str, Any] = {"batch_size": 32, "accumulation": 1, "max_length": 24, "group_by_length": True}


def _phase(lr: float, max_steps: int) -> PhaseConfig:
    return PhaseConfig(lr=lr, max_steps=max_steps, keep_best=False)


def _demo_task() -> TaskConfig:
    return TaskConfig(SelectionConfig(density=0.05), _phase(2e-4, 120), _phase(1e-3, 120), **DEMO)


def _demo_language() -> LanguageConfig:
    # mlm_probability: a name has only a few tokens
    return LanguageConfig(
        SelectionConfig(density=0.05),
        _phase(1e-4, 50),
        _phase(2e-4, 50),
        pack=False,
        mlm_probability=0.3,
        head_steps=150,
        **DEMO,
    )


@dataclass
class DemoRun(RunConfig):
    """A few minutes on two CPU cores: MiniLM learns kinds of names (from CLDR) in four languages, for three others."""

    data: Annotated[config.CldrData, tyro.conf.arg(name="")] = field(default_factory=config.CldrData)
    model: str = config.MINILM
    run_dir: Path = Path("runs/demo")
    cost_steps: int = 12
    task: TaskConfig = field(default_factory=_demo_task)
    language: LanguageConfig = field(default_factory=_demo_language)


@dataclass
class NusaxRun(RunConfig):
    """NusaX-senti: three-way sentiment in Indonesian, English and local languages of Indonesia, from a folder."""

    data: Annotated[config.NusaxData, tyro.conf.arg(name="")]
    run_dir: Path = Path("runs/nusax")


@dataclass
class FilesRun(RunConfig):
    """Your own CSV, TSV, JSONL and text files."""

    data: Annotated[config.FilesData, tyro.conf.arg(name="")]
    run_dir: Path = Path("runs/files")


@dataclass
class HubRun(RunConfig):
    """A data set of the Hugging Face hub."""

    data: Annotated[config.HubData, tyro.conf.arg(name="")]
    run_dir: Path = Path("runs/hub")
