"""The runs that `deftx run` knows by name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from deftx_kernels.train.config import (
    MINILM,
    CldrData,
    FilesData,
    HubData,
    LanguageConfig,
    NusaxData,
    PhaseConfig,
    RunConfig,
    SelectionConfig,
    TaskConfig,
)


@dataclass
class DemoRun(RunConfig):
    """A few minutes on two CPU cores: MiniLM learns kinds of names (from CLDR) in four languages, for three others."""

    data: Annotated[CldrData, tyro.conf.arg(name="")] = field(default_factory=CldrData)
    model: str = MINILM
    run_dir: Path = Path("runs/demo")
    cost_steps: int = 12
    task: TaskConfig = field(
        default_factory=lambda: TaskConfig(
            selection=SelectionConfig(density=0.05),
            dense=PhaseConfig(lr=2e-4, max_steps=120, keep_best=False),
            sparse=PhaseConfig(lr=1e-3, max_steps=120, keep_best=False),
            batch_size=32,
            accumulation=1,
            max_length=24,
            group_by_length=True,
        )
    )
    language: LanguageConfig = field(
        default_factory=lambda: LanguageConfig(
            selection=SelectionConfig(density=0.05),
            dense=PhaseConfig(lr=1e-4, max_steps=50, keep_best=False),
            sparse=PhaseConfig(lr=2e-4, max_steps=50, keep_best=False),
            batch_size=32,
            accumulation=1,
            max_length=24,
            group_by_length=True,
            pack=False,
            mlm_probability=0.3,  # a name has only a few tokens
            head_steps=150,
        )
    )


@dataclass
class NusaxRun(RunConfig):
    """NusaX-senti: three-way sentiment in Indonesian, English and local languages of Indonesia, from a folder."""

    data: Annotated[NusaxData, tyro.conf.arg(name="")]
    run_dir: Path = Path("runs/nusax")


@dataclass
class FilesRun(RunConfig):
    """Your own CSV, TSV, JSONL and text files."""

    data: Annotated[FilesData, tyro.conf.arg(name="")]
    run_dir: Path = Path("runs/files")


@dataclass
class HubRun(RunConfig):
    """A data set of the Hugging Face hub."""

    data: Annotated[HubData, tyro.conf.arg(name="")]
    run_dir: Path = Path("runs/hub")
