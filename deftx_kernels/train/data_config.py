"""The data of a run: where it lies, its columns and languages. This file does not import transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from deftx_kernels.train.checks import check_choice, check_languages, check_list, check_transfer, parse_pairs

TaskKind = Literal["classification", "token-classification"]
Metric = Literal["macro_f1", "accuracy", "entity_f1"]


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
    metric: Metric | None = None
    """The score that is reported and that chooses checkpoints; by default macro_f1, or entity_f1 for BIO tags."""

    def __post_init__(self):
        check_choice("kind", self.kind, TaskKind)
        if self.metric is not None:
            check_choice("metric", self.metric, Metric)
            if self.metric == "entity_f1" and self.kind != "token-classification":
                raise ValueError("metric: entity_f1 is for token classification")
        names = (self.text_column, self.pair_column, self.label_column)
        check_list("text_column, pair_column and label_column", [name for name in names if name is not None])
        if self.pair_column is not None and self.kind == "token-classification":
            raise ValueError("pair_column: token classification has no pairs of texts")


@dataclass
class CldrData:
    """Display names from CLDR; the label is their kind. No files needed."""

    sources: list[str] = field(default_factory=lambda: ["en", "de", "fr", "es"])
    """Labelled languages."""
    targets: list[str] = field(default_factory=lambda: ["sw", "eu"])
    """Languages to transfer to."""

    def __post_init__(self):
        check_transfer(self.sources, self.targets)


@dataclass
class _LanguageFiles:
    """A folder with files for each language."""

    data_dir: Path
    """The folder."""
    sources: list[str]
    """Labelled languages."""
    targets: list[str] | None = None
    """Languages to transfer to; by default all others that the folder has."""

    def __post_init__(self):
        check_languages("sources", self.sources)
        if self.targets is not None:
            check_transfer(self.sources, self.targets)


@dataclass
class NusaxData(_LanguageFiles):
    """Folders <language>/{train,valid,test}.csv with the columns id, text and label, as in NusaX-senti."""

    sources: list[str] = field(default_factory=lambda: ["indonesian"])
    """Labelled languages."""


@dataclass
class AmericasNLIData(_LanguageFiles):
    """Files {dev,test}/<language>.tsv with the columns premise, hypothesis and label, as in AmericasNLI.

    The labelled dev sets of the sources are the training data. A tenth of the premises is held out for validation.
    """

    sources: list[str] = field(default_factory=lambda: ["aym", "gn", "cni"])
    """Labelled languages."""


@dataclass
class MasakhaNERData(_LanguageFiles):
    """Folders <language>/{train,dev,test}.txt of tokens and IOB2 tags in CoNLL form, as in MasakhaNER."""

    sources: list[str] = field(default_factory=lambda: ["swa"])
    """Labelled languages."""


@dataclass
class FilesData(Columns):
    """Your own files: CSV, TSV, JSONL, CoNLL (by their ending: .txt, .conll), or plain text for language modelling."""

    train: list[Path]
    """Labelled files in the source language; with several source languages, each as language=path."""
    test: list[str]
    """Test files of the target languages, each as language=path."""
    text: list[str]
    """Unlabelled texts of the target languages, each as language=path."""
    validation: list[Path] = field(default_factory=list)
    """Labelled files for choosing the best checkpoint; with several source languages, each as language=path."""

    @property
    def sources(self) -> list[str]:
        """The source languages."""
        return list(dict.fromkeys(language for language, _ in named_files(self.train)))

    def __post_init__(self):
        super().__post_init__()
        check_list("train", self.train)
        check_transfer(self.sources, list(parse_pairs(self.test, "test")))
        if unknown := [name for name, _ in named_files(self.validation) if name not in self.sources]:
            raise ValueError(f"validation: {unknown[0]!r} is no source language; these are {', '.join(self.sources)}")
        check_list("test", self.test)
        texts = parse_pairs(self.text, "text")
        for name in parse_pairs(self.test, "test"):
            if name not in texts:
                raise ValueError(f"text: no unlabelled text for the test language {name!r}; give text {name}=path")


def named_files(paths: list[Path]) -> list[tuple[str, Path]]:
    """[("aym", Path("a.tsv"))] from ["aym=a.tsv"]; the language of a plain path is "source"."""
    named = []
    for path in paths:
        name, equals, rest = str(path).partition("=")
        plain = not equals or Path(path).exists()
        named.append(("source", Path(path)) if plain else (name, Path(rest)))
    return named


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
        check_transfer(self.sources, self.targets)
