"""Labelled and unlabelled text from files, NusaX folders, CLDR and the hub, as datasets.Dataset.

Task rows have `text` (and `text_pair`) and `label`, or `tokens` and `tags`, with labels as strings; unlabelled rows
have `text`. Whatever is wrong with a file is a ValueError that names the file and the line or column.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, concatenate_datasets, load_dataset
from datasets import Sequence as SequenceFeature

from deftx_kernels.files import parse_json
from deftx_kernels.train.cldr import load_cldr
from deftx_kernels.train.config import CldrData, FilesData, HubData, NusaxData, parse_pairs

TABLES = (".csv", ".tsv", ".jsonl", ".json")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_CSV_QUOTED = re.compile(r'"(?:[^"]*"")+[^"]*"')  # with quotes inside, all doubled: "He said so" alone may be meant
_TSV_HINT = "TSV knows no quotes: save the file as CSV"
SPLIT_FILES = {"train": "train.csv", "validation": "valid.csv", "test": "test.csv"}


@dataclass
class Corpus:
    """The data of a run."""

    task: str
    """ "classification" (of texts or pairs of texts) or "token-classification"."""
    labels: list[str]
    train: Dataset
    """Labelled, all source languages mixed."""
    validation: Dataset | None
    test: dict[str, Dataset]
    """Labelled test sets by language: the targets, and the sources for reference."""
    text: dict[str, Dataset]
    """Unlabelled text by language."""
    text_validation: dict[str, Dataset] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Columns:
    """Names of the columns in a file."""

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    task: str = "classification"


def read_rows(path: Path) -> list[dict]:
    """The rows of a .csv, .tsv, .jsonl or .json (one object a line) file in UTF-8.

    Raises:
        ValueError: the file is missing, unreadable, or of another kind; a row has too many or too few fields.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in TABLES:
        raise ValueError(f"{path}: the ending must be .csv, .tsv, .jsonl or .json")
    text = _read(path)
    return list(
        _jsonl_rows(text, path) if ending in (".jsonl", ".json") else _table_rows(text, path, tabs=ending == ".tsv")
    )


def _read(path: Path) -> str:
    """The text of a file, without a byte order mark."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(_lines(error.object[: error.start].decode("utf-8")))
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    if "\0" in text:
        raise ValueError(
            f"{path}, line {len(_lines(text.partition(chr(0))[0]))}: a NUL character; this is no text in UTF-8"
        )
    return text


def _lines(text: str) -> list[str]:
    """`str.splitlines`, but at line ends only: that also splits at U+2028, U+0085 and others, which stand inside texts."""
    return re.split(r"\r\n|\n|\r", text)


def _table_rows(text: str, path: Path, tabs: bool) -> Iterable[dict]:
    """Rows of a CSV, or of a TSV, where quotes are characters like others."""
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {}
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, **options)
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        header = next(filter(None, reader), None)
        if header is None:
            raise ValueError(f"{path}: the file is empty; its first line should name the columns")
        if twice := [name for i, name in enumerate(header) if name in header[:i]]:
            raise ValueError(f"{path}, line {reader.line_num}: two columns are named {twice[0]!r}")
        for fields in filter(None, reader):  # an empty line is no row
            if len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields, but {len(header)} columns; "
                    + (_TSV_HINT if tabs else "a text with a comma stands in double quotes")
                )
            if tabs and (quoted := [field for field in fields if _CSV_QUOTED.fullmatch(field)]):
                raise ValueError(
                    f"{path}, line {reader.line_num}: the field {quoted[0]!r:.50} is quoted as in CSV; {_TSV_HINT}"
                )
            yield dict(zip(header, fields))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _jsonl_rows(text: str, path: Path) -> Iterable[dict]:
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            fault = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{path}, line {number}: not JSON ({fault}); one object a line is expected") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: one JSON object a line is expected, not {type(row).__name__}")
        # A valid file can stand for what is no text, by an escape.
        if wrong := [text for text in _strings(row) if _NO_TEXT.search(text)] if "\\u" in line else []:
            raise ValueError(
                f"{path}, line {number}: NUL or half of a surrogate pair, which is no text, in {wrong[0]!r:.50}"
            )
        yield row


def _strings(value: Any) -> Iterable[str]:
    """All strings in a JSON value, keys included; a loop, as it may be nested deeper than calls may be."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item


def _column(rows: list[dict], name: str, where: str, lists: bool = False) -> list:
    """One column's strings, or with `lists` strings or lists of strings. Numbers and booleans count as strings."""
    if not rows:
        raise ValueError(f"{where}: no rows")
    values = [row.get(name) for row in rows]
    if all(value is None for value in values):
        raise ValueError(f"{where}: no column {name!r}; its columns are {', '.join(map(repr, rows[0]))}")
    for number, value in enumerate(values, start=1):
        items = value if lists and isinstance(value, list) else [value]
        if not items or any(
            item is None or item != item or (isinstance(item, str) and not item.strip()) for item in items
        ):
            raise ValueError(f"{where}, row {number}: column {name!r} is empty")
        if any(isinstance(item, (dict, list)) for item in items):
            raise ValueError(f"{where}, row {number}: column {name!r} is no text but {value!r:.50}")
    return values


def _check_stripped(labels: list[str], column: str, where: str) -> None:
    """ValueError for white space around a label, which would make another class of it."""
    for label in labels:
        if label != label.strip():
            raise ValueError(f"{where}: {label!r} in column {column!r} begins or ends with white space; remove it")


def make_task_dataset(rows: list[dict], columns: Columns, where: str) -> Dataset:
    """Rows with the columns that the task needs, under their standard names. `where` names the source in errors."""
    lists = columns.task == "token-classification"
    texts, labels = (_column(rows, name, where, lists) for name in (columns.text, columns.label))
    if lists:
        tokens, tags = (
            [value.split() if isinstance(value, str) else list(map(str, value)) for value in values]
            for values in (texts, labels)
        )
        for number, (a, b) in enumerate(zip(tokens, tags), start=1):
            if len(a) != len(b):
                raise ValueError(
                    f"{where}, row {number}: {len(a)} tokens in {columns.text!r} but {len(b)} in {columns.label!r}"
                )
        for number, line in enumerate(tags, start=1):
            _check_stripped(line, columns.label, f"{where}, row {number}")
        return Dataset.from_dict({"tokens": tokens, "tags": tags})
    for number, label in enumerate(labels, start=1):
        _check_stripped([str(label)], columns.label, f"{where}, row {number}")
    data = {"text": [str(text) for text in texts], "label": [str(label) for label in labels]}
    if columns.pair is not None:
        data["text_pair"] = [str(text) for text in _column(rows, columns.pair, where)]
    return Dataset.from_dict(data)


def read_task(path: Path, columns: Columns = Columns()) -> Dataset:
    """Labelled rows from a CSV, TSV or JSONL file."""
    return make_task_dataset(read_rows(path), columns, str(path))


def read_text(path: Path, column: str = "text") -> Dataset:
    """Unlabelled text: the non-empty lines of a text file in UTF-8, or one column of a CSV, TSV or JSONL file."""
    path = Path(path)
    if path.suffix.lower() in TABLES:
        return Dataset.from_dict({"text": [str(text) for text in _column(read_rows(path), column, str(path))]})
    lines = [line.strip() for line in _lines(_read(path)) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no text")
    return Dataset.from_dict({"text": lines})


def content_hash(dataset: Dataset) -> str:
    """SHA-256 (hex) of all rows."""
    digest = hashlib.sha256()
    for batch in dataset.iter(1000):
        digest.update(json.dumps(batch, sort_keys=True).encode())
    return digest.hexdigest()


def label_names(datasets: Iterable[Dataset]) -> list[str]:
    """The labels (or tags) that occur, sorted."""
    found: set[str] = set()
    for dataset in datasets:
        if "tags" in dataset.column_names:
            found.update(tag for tags in dataset["tags"] for tag in tags)
        else:
            found.update(dataset["label"])
    return sorted(found)


def training_labels(train: Dataset) -> list[str]:
    """The labels of the training data. Raises ValueError where they are fewer than two."""
    labels = label_names([train])
    if len(labels) < 2:
        raise ValueError(f"the training data has one label only, {labels[0]!r}: at least two are needed")
    return labels


def check_labels(dataset: Dataset, labels: list[str], where: str) -> None:
    """Raises ValueError where `dataset` has a label that is not in `labels`."""
    unknown = sorted(set(label_names([dataset])) - set(labels))
    if unknown:
        raise ValueError(
            f"{where}: label {unknown[0]!r} is not among the training labels {', '.join(map(repr, labels))}"
        )


def _load_cldr(data: CldrData) -> Corpus:
    splits = load_cldr([*data.sources, *data.targets])
    rows = {
        language: {name: make_task_dataset(rows, Columns(), f"CLDR {language} {name}") for name, rows in parts.items()}
        for language, parts in splits.items()
    }
    return _from_splits(rows, data.sources, data.targets, "classification")


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
            raise ValueError(
                f"language {name!r}: no folder {folder / name} with train.csv; there are {', '.join(found)}"
            )
    rows = {
        name: {split: read_task(folder / name / file) for split, file in SPLIT_FILES.items()}
        for name in [*data.sources, *targets]
    }
    return _from_splits(rows, data.sources, targets, "classification")


def _from_splits(rows: dict[str, dict[str, Dataset]], sources: list[str], targets: list[str], task: str) -> Corpus:
    train = concatenate_datasets([rows[name]["train"] for name in sources])
    labels = training_labels(train)
    for name, parts in rows.items():
        for split, part in parts.items():
            check_labels(part, labels, f"{name}, {split}")
    return Corpus(
        task=task,
        labels=labels,
        train=train,
        validation=concatenate_datasets([rows[name]["validation"] for name in sources]),
        test={name: rows[name]["test"] for name in [*sources, *targets]},
        text={name: _as_text(parts["train"]) for name, parts in rows.items()},
        text_validation={name: _as_text(parts["validation"]) for name, parts in rows.items()},
        sources=list(sources),
        targets=list(targets),
    )


def _as_text(dataset: Dataset) -> Dataset:
    """The strings alone, without labels."""
    if "tokens" in dataset.column_names:
        return Dataset.from_dict({"text": [" ".join(tokens) for tokens in dataset["tokens"]]})
    texts = list(dataset["text"])
    return Dataset.from_dict(
        {"text": texts + list(dataset["text_pair"]) if "text_pair" in dataset.column_names else texts}
    )


def _load_files(data: FilesData) -> Corpus:
    columns = Columns(data.text_column, data.pair_column, data.label_column, data.kind)
    tests, texts = parse_pairs(data.test, "test"), parse_pairs(data.text, "text")
    train = concatenate_datasets([read_task(path, columns) for path in data.train])
    labels = training_labels(train)
    validation = (
        concatenate_datasets([read_task(path, columns) for path in data.validation]) if data.validation else None
    )
    if validation is not None:
        check_labels(validation, labels, "validation")
    test = {name: read_task(path, columns) for name, path in tests.items()}
    for name, dataset in test.items():
        check_labels(dataset, labels, str(tests[name]))
    text = {name: read_text(path, data.text_column) for name, path in texts.items()}
    return Corpus(data.kind, labels, train, validation, test, text, sources=["source"], targets=list(test))


def _load_hub_split(data: HubData, language: str, split: str) -> Dataset:
    where = f"data set {data.dataset!r}, configuration {language!r}, split {split!r}"
    try:
        dataset = load_dataset(data.dataset, language, split=split)
    except Exception as error:  # load_dataset raises many kinds: no network, no such repository, configuration or split
        raise ValueError(f"{where}: cannot be loaded ({str(error).strip().splitlines()[0]})") from error
    names = [data.text_column, data.label_column] + ([data.pair_column] if data.pair_column else [])
    for name in names:
        if name not in dataset.column_names:
            raise ValueError(
                f"{where}: no column {name!r}; its columns are {', '.join(map(repr, dataset.column_names))}"
            )
    feature = dataset.features[data.label_column]
    inner = feature.feature if isinstance(feature, SequenceFeature) else feature
    rows = dataset.select_columns(names).to_list()
    if isinstance(inner, ClassLabel):
        for number, row in enumerate(rows, start=1):
            try:
                row[data.label_column] = inner.int2str(row[data.label_column])
            except (ValueError, TypeError) as error:  # -1 or None: the split has no labels
                raise ValueError(f"{where}, row {number}: no label ({error})") from None
    return make_task_dataset(rows, Columns(data.text_column, data.pair_column, data.label_column, data.kind), where)


def _load_hub(data: HubData) -> Corpus:
    languages = [*data.sources, *data.targets]
    rows = {name: {split: _load_hub_split(data, name, split) for split in SPLIT_FILES} for name in languages}
    return _from_splits(rows, data.sources, data.targets, data.kind)


def load_corpus(data: CldrData | NusaxData | FilesData | HubData) -> Corpus:
    """The labelled and unlabelled text that a data configuration stands for. Raises ValueError naming file and column."""
    loaders: dict[type, Callable[[Any], Corpus]] = {
        CldrData: _load_cldr,
        NusaxData: _load_nusax,
        FilesData: _load_files,
        HubData: _load_hub,
    }
    return loaders[type(data)](data)
