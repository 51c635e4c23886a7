"""The data of a run, from files, NusaX folders, CLDR or the hub: labelled and unlabelled text by language."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, concatenate_datasets, load_dataset
from datasets import Sequence as SequenceFeature

from deftx_kernels.train.cldr import load_cldr
from deftx_kernels.train.config import (
    CldrData,
    Columns,
    FilesData,
    HubData,
    NusaxData,
    TrainLanguageConfig,
    TrainTaskConfig,
    parse_pairs,
)
from deftx_kernels.train.readers import labelled_dataset, read_task, read_text

SPLIT_FILES = {"train": "train.csv", "validation": "valid.csv", "test": "test.csv"}


@dataclass
class Corpus:
    """The data of a run. Of a command that learns a single vector, only what it is trained on."""

    text: dict[str, Dataset]
    """Unlabelled text by language."""
    text_validation: dict[str, Dataset] = field(default_factory=dict)
    task: str = "classification"
    """ "classification" (of texts or pairs of texts) or "token-classification"."""
    labels: list[str] = field(default_factory=list)
    train: Dataset = None
    """Labelled, all source languages mixed."""
    validation: Dataset | None = None
    test: dict[str, Dataset] = field(default_factory=dict)
    """Labelled test sets by language: the targets, and the sources for reference."""
    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)

    def hashes(self) -> dict[str, str]:
        """Name of a part of the data → hash of its rows."""
        parts = {"training data": self.train, "validation data": self.validation}
        named = {"test": self.test, "text": self.text, "validation text": self.text_validation}
        for name, by_language in named.items():
            parts |= {f"{name} of {language}": rows for language, rows in by_language.items()}
        return {name: content_hash(rows) for name, rows in parts.items() if rows is not None}

    def sizes(self) -> dict:
        """The numbers on the data in metrics.json."""
        return {
            "task": self.task,
            "labels": self.labels,
            "sources": self.sources,
            "targets": self.targets,
            "train": len(self.train),
            "test": {name: len(rows) for name, rows in self.test.items()},
            "text": {name: len(rows) for name, rows in self.text.items()},
        }


class Split(NamedTuple):
    """Labelled rows of one language; `where` names them in errors."""

    language: str
    name: str  # "train", "validation" or "test"
    rows: Dataset
    where: str


def load_corpus(config: CldrData | NusaxData | FilesData | HubData | TrainTaskConfig | TrainLanguageConfig) -> Corpus:
    """Load the data that a configuration describes. Raises ValueError naming file and column."""
    loaders: dict[type, Callable[[Any], Corpus]] = {
        CldrData: _load_cldr,
        NusaxData: _load_nusax,
        FilesData: _load_files,
        HubData: _load_hub,
        TrainTaskConfig: _load_files,
        TrainLanguageConfig: _load_text,
    }
    return loaders[type(config)](config)


def _corpus(
    splits: list[Split], sources: list[str], targets: list[str], task: str, text: dict[str, Dataset] | None = None
) -> Corpus:
    """A corpus of labelled splits; without `text`, the texts of train and validation are its unlabelled text too."""

    def of_sources(name: str) -> Dataset | None:
        parts = [split.rows for source in sources for split in splits if split[:2] == (source, name)]
        return concatenate_datasets(parts) if parts else None

    def by_language(name: str) -> dict[str, Dataset]:
        return {split.language: split.rows for split in splits if split.name == name}

    train = of_sources("train")
    labels = label_names(train)
    if len(labels) < 2:
        raise ValueError(f"the training data has one label only, {labels[0]!r}: at least two are needed")
    for split in splits:
        check_labels(split.rows, labels, split.where)
    text_validation: dict[str, Dataset] = {}
    if text is None:
        text, text_validation = (
            {language: _without_labels(rows) for language, rows in by_language(name).items()}
            for name in ("train", "validation")
        )
    validation, test = of_sources("validation"), by_language("test")
    return Corpus(text, text_validation, task, labels, train, validation, test, list(sources), list(targets))


def _without_labels(dataset: Dataset) -> Dataset:
    if "tokens" in dataset.column_names:
        return Dataset.from_dict({"text": [" ".join(tokens) for tokens in dataset["tokens"]]})
    return Dataset.from_dict(
        {"text": [x for n in ("text", "text_pair") if n in dataset.column_names for x in dataset[n]]}
    )


def _load_cldr(data: CldrData) -> Corpus:
    splits = [
        Split(language, name, labelled_dataset(rows, Columns(), f"CLDR {language} {name}"), f"{language}, {name}")
        for language, parts in load_cldr([*data.sources, *data.targets]).items()
        for name, rows in parts.items()
    ]
    return _corpus(splits, data.sources, data.targets, "classification")


def _load_nusax(data: NusaxData) -> Corpus:
    folder = Path(data.data_dir)
    if not folder.is_dir():
        raise ValueError(f"data_dir {folder}: no such folder")
    found = sorted(path.parent.name for path in folder.glob("*/train.csv"))
    if not found:
        raise ValueError(f"data_dir {folder}: no <language>/train.csv in it")
    targets = data.targets if data.targets is not None else [name for name in found if name not in data.sources]
    for name in [*data.sources, *targets]:
        if name not in found:
            there = ", ".join(found)
            raise ValueError(f"language {name!r}: no folder {folder / name} with train.csv; there are {there}")
    splits = [
        Split(language, name, read_task(folder / language / file, Columns()), f"{language}, {name}")
        for language in [*data.sources, *targets]
        for name, file in SPLIT_FILES.items()
    ]
    return _corpus(splits, data.sources, targets, "classification")


def _load_files(data: FilesData | TrainTaskConfig) -> Corpus:
    """Labelled files of one language, "source", and of a run the test files and texts of the targets."""
    splits = [Split("source", "train", read_task(path, data), str(path)) for path in data.train]
    splits += [Split("source", "validation", read_task(path, data), "validation") for path in data.validation]
    if isinstance(data, TrainTaskConfig):
        return _corpus(splits, ["source"], [], data.kind, text={})
    tests = parse_pairs(data.test, "test")
    splits += [Split(name, "test", read_task(path, data), str(path)) for name, path in tests.items()]
    text = {name: read_text(path, data.text_column) for name, path in parse_pairs(data.text, "text").items()}
    return _corpus(splits, ["source"], list(tests), data.kind, text)


def _load_text(data: TrainLanguageConfig) -> Corpus:
    paths = {"train": data.text, "validation": data.validation}
    text = {name: {data.language: read_text(p, data.text_column)} for name, p in paths.items() if p is not None}
    return Corpus(text["train"], text.get("validation", {}))


def _load_hub(data: HubData) -> Corpus:
    languages = [*data.sources, *data.targets]
    splits = [_load_hub_split(data, language, name) for language in languages for name in SPLIT_FILES]
    return _corpus(splits, data.sources, data.targets, data.kind)


def _load_hub_split(data: HubData, language: str, split: str) -> Split:
    where = f"data set {data.dataset!r}, configuration {language!r}, split {split!r}"
    try:
        dataset = load_dataset(data.dataset, language, split=split)
    except Exception as error:  # load_dataset raises many kinds: no network, no such repository, configuration or split
        raise ValueError(f"{where}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    names = [data.text_column, data.label_column] + ([data.pair_column] if data.pair_column else [])
    for name in names:
        if name not in dataset.column_names:
            there = ", ".join(map(repr, dataset.column_names))
            raise ValueError(f"{where}: no column {name!r}; its columns are {there}")
    feature = dataset.features[data.label_column]
    inner = feature.feature if isinstance(feature, SequenceFeature) else feature
    rows = dataset.select_columns(names).to_list()
    if isinstance(inner, ClassLabel):
        for number, row in enumerate(rows, start=1):
            try:
                row[data.label_column] = inner.int2str(row[data.label_column])
            except (ValueError, TypeError) as error:  # -1 or None: the split has no labels
                raise ValueError(f"{where}, row {number}: no label ({error})") from None
    return Split(language, split, labelled_dataset(rows, data, where), f"{language}, {split}")


def content_hash(dataset: Dataset) -> str:
    """SHA-256 (hex) of all rows."""
    digest = hashlib.sha256()
    for batch in dataset.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def label_names(dataset: Dataset) -> list[str]:
    """The labels (or tags) that occur, sorted."""
    if "tags" in dataset.column_names:
        return sorted({tag for tags in dataset["tags"] for tag in tags})
    return sorted(set(dataset["label"]))


def check_labels(dataset: Dataset, labels: Iterable[str], where: str) -> None:
    """Raises ValueError where `dataset` has a label that is not in `labels`."""
    if unknown := sorted(set(label_names(dataset)) - set(labels)):
        known = ", ".join(map(repr, labels))
        raise ValueError(f"{where}: label {unknown[0]!r} is not among the training labels {known}")
