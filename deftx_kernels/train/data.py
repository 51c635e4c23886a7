"""The data of a run, from files, NusaX folders, CLDR or the hub: labelled and unlabelled text by language."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from datasets import ClassLabel, Dataset, concatenate_datasets, load_dataset
from datasets import Sequence as SequenceFeature

from deftx_kernels.train.checks import parse_pairs
from deftx_kernels.train.cldr import load_cldr
from deftx_kernels.train.config import TrainLanguageConfig, TrainTaskConfig
from deftx_kernels.train.data_config import (
    AmericasNLIData,
    CldrData,
    Columns,
    FilesData,
    HubData,
    MasakhaNERData,
    NusaxData,
    named_files,
)
from deftx_kernels.train.metrics import are_entity_tags, default_metric
from deftx_kernels.train.readers import labelled_dataset, read_task, read_text

NUSAX_FILES = {"train": "train.csv", "validation": "valid.csv", "test": "test.csv"}
MASAKHANER_FILES = {"train": "train.txt", "validation": "dev.txt", "test": "test.txt"}
AMERICASNLI_VALIDATION = 0.1  # share of a dev set's premises that is held out
DataConfig = CldrData | NusaxData | AmericasNLIData | MasakhaNERData | FilesData | HubData


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
    """Labelled, all source languages; with several, the column `language` has the index in `sources`."""
    validation: Dataset | None = None
    test: dict[str, Dataset] = field(default_factory=dict)
    """Labelled test sets by language: the targets, and the sources for reference."""
    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    metric: str = "macro_f1"
    """The score that is reported and that chooses checkpoints."""

    def hashes(self) -> dict[str, str]:
        """Name of a part of the data → hash of its rows."""
        parts = {"training data": self.train, "validation data": self.validation}
        named = {"test": self.test, "text": self.text, "validation text": self.text_validation}
        for name, by_language in named.items():
            parts |= {f"{name} of {language}": rows for language, rows in by_language.items()}
        return {name: content_hash(rows) for name, rows in parts.items() if rows is not None}

    def text_hash(self, language: str) -> str:
        """Hash of a language's unlabelled text, validation text included."""
        parts = (by_language.get(language) for by_language in (self.text, self.text_validation))
        return " ".join(content_hash(rows) for rows in parts if rows is not None)

    def sizes(self) -> dict:
        """The numbers on the data in metrics.json."""
        trained = set(_texts(self.train))
        return {
            "task": self.task,
            "metric": self.metric,
            "labels": self.labels,
            "sources": self.sources,
            "targets": self.targets,
            "train": len(self.train),
            "test": {name: len(rows) for name, rows in self.test.items()},
            "test_in_train": {name: sum(x in trained for x in _texts(rows)) for name, rows in self.test.items()},
            "text": {name: len(rows) for name, rows in self.text.items()},
        }


class Split(NamedTuple):
    """Labelled rows of one language; `where` names them in errors."""

    language: str
    name: str  # "train", "validation" or "test"
    rows: Dataset
    where: str


def load_corpus(config: DataConfig | TrainTaskConfig | TrainLanguageConfig) -> Corpus:
    """Load the data that a configuration describes. Raises ValueError naming file and column."""
    loaders: dict[type, Callable[[Any], Corpus]] = {
        CldrData: _load_cldr,
        NusaxData: _load_nusax,
        AmericasNLIData: _load_americasnli,
        MasakhaNERData: _load_masakhaner,
        FilesData: _load_files,
        HubData: _load_hub,
        TrainTaskConfig: _load_files,
        TrainLanguageConfig: _load_text,
    }
    return loaders[type(config)](config)


def _corpus(
    splits: list[Split],
    sources: list[str],
    targets: list[str],
    columns: Columns,
    text: dict[str, Dataset] | None = None,
    metric: str | None = None,
) -> Corpus:
    """A corpus of labelled splits; without `text`, the texts of train and validation are its unlabelled text too."""

    def of_sources(name: str) -> Dataset | None:
        parts = [
            split.rows.add_column("language", [number] * len(split.rows)) if len(sources) > 1 else split.rows
            for number, source in enumerate(sources)
            for split in splits
            if split[:2] == (source, name)
        ]
        return concatenate_datasets(parts) if parts else None

    def by_language(name: str) -> dict[str, Dataset]:
        return {split.language: split.rows for split in splits if split.name == name}

    train = of_sources("train")
    labels = label_names(train)
    if len(labels) < 2:
        raise ValueError(f"the training data has one label only, {labels[0]!r}: at least two are needed")
    check_distinct(labels)
    for split in splits:
        check_labels(split.rows, labels, split.where)
    text_validation: dict[str, Dataset] = {}
    if text is None:
        text, text_validation = (
            {language: _without_labels(rows) for language, rows in by_language(name).items()}
            for name in ("train", "validation")
        )
    validation, test = of_sources("validation"), by_language("test")
    metric = metric or columns.metric or default_metric(labels, columns.kind)
    if metric == "entity_f1" and not are_entity_tags(labels):
        raise ValueError(f"metric: entity_f1 needs tags such as B-PER and O; the training labels are {labels}")
    return Corpus(
        text, text_validation, columns.kind, labels, train, validation, test, list(sources), list(targets), metric
    )


def _texts(rows: Dataset) -> list:
    if "tokens" in rows.column_names:
        return list(map(tuple, rows["tokens"]))
    return list(zip(*(rows[name] for name in ("text", "text_pair") if name in rows.column_names)))


def _without_labels(dataset: Dataset) -> Dataset:
    if "tokens" in dataset.column_names:
        return Dataset.from_dict({"text": [" ".join(tokens) for tokens in dataset["tokens"]]})
    if "text_pair" not in dataset.column_names:
        return Dataset.from_dict({"text": list(dataset["text"])})
    return Dataset.from_dict({"text": list(dict.fromkeys([*dataset["text"], *dataset["text_pair"]]))})


def _load_cldr(data: CldrData) -> Corpus:
    splits = [
        Split(language, name, labelled_dataset(rows, Columns(), f"CLDR {language} {name}"), f"{language}, {name}")
        for language, parts in load_cldr([*data.sources, *data.targets]).items()
        for name, rows in parts.items()
    ]
    return _corpus(splits, data.sources, data.targets, Columns())


def _load_nusax(data: NusaxData) -> Corpus:
    return _load_folders(data, NUSAX_FILES, Columns())


def _load_masakhaner(data: MasakhaNERData) -> Corpus:
    return _load_folders(data, MASAKHANER_FILES, Columns(kind="token-classification"))


def _load_folders(data: NusaxData | MasakhaNERData, files: dict[str, str], columns: Columns) -> Corpus:
    """A folder with a folder per language, which has the files of the splits."""
    folder = Path(data.data_dir)
    targets = _targets(data, f"<language>/{files['train']}", lambda path: path.parent.name)
    splits = [
        Split(language, name, read_task(folder / language / file, columns), f"{language}, {name}")
        for language in [*data.sources, *targets]
        for name, file in files.items()
    ]
    return _corpus(splits, data.sources, targets, columns)


def _load_americasnli(data: AmericasNLIData) -> Corpus:
    folder, columns = Path(data.data_dir), Columns(text_column="premise", pair_column="hypothesis")
    targets = _targets(data, "test/<language>.tsv", lambda path: path.stem)
    splits = []
    for language in [*data.sources, *targets]:
        where = folder / "dev" / f"{language}.tsv"
        parts = _by_premise(read_task(where, columns), str(where))
        splits += [Split(language, name, rows, str(where)) for name, rows in parts.items()]
        test = folder / "test" / f"{language}.tsv"
        splits.append(Split(language, "test", read_task(test, columns), str(test)))
    return _corpus(splits, data.sources, targets, columns, metric="accuracy")


def _by_premise(rows: Dataset, where: str) -> dict[str, Dataset]:
    """Training and validation rows. All hypotheses of a premise (XNLI has three) are in one of them."""
    premises = list(dict.fromkeys(rows["text"]))
    if len(premises) < 2:
        raise ValueError(f"{where}: it has one premise only; at least two are needed, as some are held out")
    parts = Dataset.from_dict({"text": premises}).train_test_split(AMERICASNLI_VALIDATION, seed=0)
    held_out = set(parts["test"]["text"])
    numbers: dict[str, list[int]] = {"train": [], "validation": []}
    for number, premise in enumerate(rows["text"]):
        numbers["validation" if premise in held_out else "train"].append(number)
    return {name: rows.select(each) for name, each in numbers.items()}


def _targets(
    data: NusaxData | AmericasNLIData | MasakhaNERData, pattern: str, language_of: Callable[[Path], str]
) -> list[str]:
    """The targets, by default all languages that are no sources. Raises ValueError unless there are files of each."""
    folder = Path(data.data_dir)
    if not folder.is_dir():
        raise ValueError(f"data_dir {folder}: no such folder")
    found = sorted(map(language_of, folder.glob(pattern.replace("<language>", "*"))))
    if not found:
        raise ValueError(f"data_dir {folder}: no {pattern} in it")
    targets = data.targets if data.targets is not None else [name for name in found if name not in data.sources]
    for name in [*data.sources, *targets]:
        if name not in found:
            path = folder / pattern.replace("<language>", name)
            raise ValueError(f"language {name!r}: there is no {path}; the languages are {', '.join(found)}")
    return targets


def _load_files(data: FilesData | TrainTaskConfig) -> Corpus:
    """Labelled files of the source languages, and of a run the test files and texts of the targets."""
    splits = [
        Split(language, name, read_task(path, data), str(path))
        for name, paths in (("train", data.train), ("validation", data.validation))
        for language, path in (named_files(paths) if isinstance(data, FilesData) else [("source", p) for p in paths])
    ]
    if isinstance(data, TrainTaskConfig):
        return _corpus(splits, ["source"], [], data, text={})
    tests = parse_pairs(data.test, "test")
    splits += [Split(name, "test", read_task(path, data), str(path)) for name, path in tests.items()]
    text = {name: read_text(path, data.text_column) for name, path in parse_pairs(data.text, "text").items()}
    return _corpus(splits, data.sources, list(tests), data, text)


def _load_text(data: TrainLanguageConfig) -> Corpus:
    paths = {"train": data.text, "validation": data.validation}
    text = {name: {data.language: read_text(p, data.text_column)} for name, p in paths.items() if p is not None}
    return Corpus(text["train"], text.get("validation", {}))


def _load_hub(data: HubData) -> Corpus:
    languages = [*data.sources, *data.targets]
    splits = [_load_hub_split(data, language, name) for language in languages for name in NUSAX_FILES]
    return _corpus(splits, data.sources, data.targets, data)


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


def check_distinct(labels: Iterable[str]) -> None:
    """Raises ValueError where two training labels differ in case, white space or Unicode form: they would be classes of
    their own, as of several files that spell a label differently.
    """
    spellings: dict[str, str] = {}
    for label in labels:
        first = spellings.setdefault(" ".join(unicodedata.normalize("NFKC", label).casefold().split()), label)
        if first != label:
            what = "differ in case, white space or Unicode form alone, and would be two classes"
            raise ValueError(f"the training labels {first!r} and {label!r} {what}; write them alike")


def check_labels(dataset: Dataset, labels: Iterable[str], where: str) -> None:
    """Raises ValueError where `dataset` has a label that is not in `labels`."""
    if unknown := sorted(set(label_names(dataset)) - set(labels)):
        known = ", ".join(map(repr, labels))
        raise ValueError(f"{where}: label {unknown[0]!r} is not among the training labels {known}")
