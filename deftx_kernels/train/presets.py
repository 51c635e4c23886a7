"""The named runs of `deftx run`: demo, nusax, americasnli, masakhaner, files, hub.

Their settings are the papers' for XLM-R base (Ansell et al., 2022; Simon & Jyothi, 2025), or with `--profile small`
those for a model of about 100 M parameters on CPU cores.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from deftx_kernels.train import config, data_config
from deftx_kernels.train.config import LanguageConfig, PhaseConfig, RunConfig, SelectionConfig, TaskConfig
from deftx_kernels.train.no_prefix import NO_PREFIX

# For multilingual-e5-small on names of a few tokens.
DEMO: dict[str, Any] = {"batch_size": 32, "accumulation": 1, "max_length": 24, "group_by_length": True}


def _phase(lr: float, max_steps: int) -> PhaseConfig:
    return PhaseConfig(lr=lr, max_steps=max_steps, keep_best=False)


def _demo_task() -> TaskConfig:
    return TaskConfig(SelectionConfig(density=0.05), _phase(2e-4, 80), _phase(1e-3, 80), **DEMO)


def _demo_language() -> LanguageConfig:
    # mlm_probability: a name has only a few tokens
    return LanguageConfig(
        SelectionConfig(density=0.05),
        _phase(1e-4, 25),
        _phase(2e-4, 25),
        pack=False,
        mlm_probability=0.3,
        vocabulary="text",
        head_steps=80,
        **DEMO,
    )


@dataclass
class DemoRun(RunConfig):
    """Five minutes on two CPU cores: e5-small learns kinds of names (from CLDR) in four languages, for two others."""

    data: Annotated[data_config.CldrData, NO_PREFIX] = field(default_factory=data_config.CldrData)
    model: str = config.E5_SMALL
    run_dir: Path = Path("runs/demo")
    recipes: list[str] = field(default_factory=lambda: ["deft-x"])
    cost_steps: int = 6
    task: TaskConfig = field(default_factory=_demo_task)
    language: LanguageConfig = field(default_factory=_demo_language)


Profile = Literal["paper", "small"]


@dataclass
class PresetRun(RunConfig):
    """A run whose settings depend on a profile."""

    profile: Profile = "paper"
    """paper: the papers' settings for XLM-R base. small: for a model of about 100 M parameters on CPU cores."""


def _nli_task() -> TaskConfig:
    return TaskConfig(batch_size=32, accumulation=1)


def _ner_task() -> TaskConfig:
    phases = PhaseConfig(epochs=3), PhaseConfig(epochs=10)
    return TaskConfig(SelectionConfig(density=0.051), *phases)


@dataclass
class NusaxRun(PresetRun):
    """NusaX-senti: three-way sentiment in Indonesian, English and local languages of Indonesia, from a folder."""

    data: Annotated[data_config.NusaxData, NO_PREFIX]
    run_dir: Path = Path("runs/nusax")


@dataclass
class AmericasNLIRun(PresetRun):
    """AmericasNLI: inference in indigenous languages of the Americas, several of them as sources, from a folder."""

    data: Annotated[data_config.AmericasNLIData, NO_PREFIX]
    run_dir: Path = Path("runs/americasnli")
    task: TaskConfig = field(default_factory=_nli_task)


@dataclass
class MasakhaNERRun(PresetRun):
    """MasakhaNER: entities in African languages, from a folder."""

    data: Annotated[data_config.MasakhaNERData, NO_PREFIX]
    run_dir: Path = Path("runs/masakhaner")
    task: TaskConfig = field(default_factory=_ner_task)


@dataclass
class FilesRun(PresetRun):
    """Your own CSV, TSV, JSONL, CoNLL and text files."""

    data: Annotated[data_config.FilesData, NO_PREFIX]
    run_dir: Path = Path("runs/files")


@dataclass
class HubRun(PresetRun):
    """A data set of the Hugging Face hub."""

    data: Annotated[data_config.HubData, NO_PREFIX]
    run_dir: Path = Path("runs/hub")


# ---- the small profile ----
# For multilingual-e5-small on NusaX. bench/NOTES.md tells how each setting was chosen, and on which text.


def _small_task() -> TaskConfig:
    return TaskConfig(
        SelectionConfig(density=0.051),
        PhaseConfig(lr=1e-4, epochs=4, warmup_steps=25),
        PhaseConfig(lr=5e-4, epochs=4, warmup_steps=25),
        batch_size=8,
        accumulation=1,
        max_length=128,
        group_by_length=True,
    )


def _small_language() -> LanguageConfig:
    return LanguageConfig(
        SelectionConfig(density=0.0276),
        PhaseConfig(lr=3e-4, epochs=4, warmup_steps=20),
        PhaseConfig(lr=1e-3, epochs=4, warmup_steps=20),
        batch_size=16,
        accumulation=1,
        max_length=64,
        vocabulary="text",
        head_steps=800,
        head_lr=2e-3,
    )


Run = TypeVar("Run", bound=PresetRun)
PRESETS: dict[str, type[PresetRun]] = {
    "nusax": NusaxRun,
    "americasnli": AmericasNLIRun,
    "masakhaner": MasakhaNERRun,
    "files": FilesRun,
    "hub": HubRun,
}


def small(preset: type[Run], data: Any, **settings: Any) -> Run:
    """A preset with the settings of the small profile, where `settings` has no others."""
    defaults = {"profile": "small", "task": _small_task(), "language": _small_language()}
    return preset(data, **{**defaults, **settings})  # type: ignore[arg-type]
