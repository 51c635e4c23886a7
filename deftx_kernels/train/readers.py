"""Files and rows as datasets.Dataset. Every error is a ValueError that names the file and the line, row or column.

Labelled rows have `text` (and `text_pair`) and `label`, or `tokens` and `tags`, with labels as strings; unlabelled rows
have `text`.
"""

import csv
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset

from deftx_kernels.files import parse_json
from deftx_kernels.train.data_config import Columns

TABLES = (".csv", ".tsv", ".jsonl", ".json")
CONLL = (".txt", ".conll")
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_CSV_QUOTED = re.compile(r'"(?:[^"]*"")+[^"]*"')  # with doubled quotes inside: else quotes may be text
_TSV_HINT = "TSV has no quotes: save the file as CSV"


def read_task(path: Path, columns: Columns) -> Dataset:
    """Labelled rows from a CSV, TSV or JSONL file, or of tokens and tags from a CoNLL file."""
    if columns.kind == "token-classification" and Path(path).suffix.lower() in CONLL:
        names = Columns(text_column="tokens", label_column="tags", kind=columns.kind)
        return labelled_dataset(list(_conll_rows(_read(path), path)), names, str(path))
    return labelled_dataset(read_rows(path), columns, str(path))


def read_text(path: Path, column: str = "text") -> Dataset:
    """Unlabelled text: the non-empty lines of a text file in UTF-8, or one column of a CSV, TSV or JSONL file."""
    path = Path(path)
    if path.suffix.lower() in TABLES:
        return Dataset.from_dict({"text": [str(text) for text in _column(read_rows(path), column, str(path))]})
    lines = [line.strip() for line in _lines(_read(path)) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no text")
    return Dataset.from_dict({"text": lines})


def labelled_dataset(rows: list[dict], columns: Columns, where: str) -> Dataset:
    """Rows with the columns that the task needs, under their standard names. `where` names the source in errors."""
    lists = columns.kind == "token-classification"
    texts, labels = (_column(rows, name, where, lists) for name in (columns.text_column, columns.label_column))
    data: dict[str, list]
    if lists:
        tokens, tags = ([_words(value) for value in values] for values in (texts, labels))
        for number, (a, b) in enumerate(zip(tokens, tags), start=1):
            if len(a) != len(b):
                names = f"{len(a)} tokens in {columns.text_column!r} but {len(b)} in {columns.label_column!r}"
                raise ValueError(f"{where}, row {number}: {names}")
        data = {"tokens": tokens, "tags": tags}
    else:
        tags = [[str(label)] for label in labels]
        data = {"text": list(map(str, texts)), "label": list(map(str, labels))}
    for number, row in enumerate(tags, start=1):
        for label in row:
            if label != label.strip():  # it would be another class
                name = f"{label!r} in column {columns.label_column!r}"
                raise ValueError(f"{where}, row {number}: {name} begins or ends with white space; remove it")
    if columns.pair_column is not None:
        data["text_pair"] = [str(text) for text in _column(rows, columns.pair_column, where)]
    return Dataset.from_dict(data)


def _words(value: Any) -> list[str]:
    return value.split() if isinstance(value, str) else list(map(str, value))


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
            raise ValueError(f"{where}, row {number}: column {name!r} is not text but {value!r:.50}")
    return values


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
    return list(_json_rows(text, path) if ending.startswith(".json") else _table_rows(text, path, ending == ".tsv"))


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
        line = len(_lines(text.partition("\0")[0]))
        raise ValueError(f"{path}, line {line}: a NUL character; this is not text in UTF-8")
    return text


def _lines(text: str) -> list[str]:
    """`str.splitlines`, but not at U+2028, U+0085 and others, which occur inside texts."""
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
        if repeated := [name for i, name in enumerate(header) if name in header[:i]]:
            raise ValueError(f"{path}, line {reader.line_num}: two columns are named {repeated[0]!r}")
        for fields in filter(None, reader):  # an empty line is not a row
            where = f"{path}, line {reader.line_num}"
            if len(fields) != len(header):
                hint = _TSV_HINT if tabs else "put a text with a comma in double quotes"
                raise ValueError(f"{where}: {len(fields)} fields, but {len(header)} columns; {hint}")
            if tabs and (quoted := [field for field in fields if _CSV_QUOTED.fullmatch(field)]):
                raise ValueError(f"{where}: the field {quoted[0]!r:.50} is quoted as in CSV; {_TSV_HINT}")
            yield dict(zip(header, fields))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)


def _conll_rows(text: str, path: Path) -> Iterable[dict]:
    """Sentences of a CoNLL file: a word a line, its tag in the last column; an empty line ends a sentence."""
    tokens: list[str] = []
    tags: list[str] = []
    columns = None
    for number, line in enumerate([*_lines(text), ""], start=1):
        fields = re.findall(r"[^ \t]+", line)  # other white space may be in a word
        if fields and fields[0] != "-DOCSTART-":
            columns = columns or len(fields)
            if len(fields) != columns or columns < 2:
                expected = f"{columns} columns, as before" if columns > 1 else "a word and its tag"
                raise ValueError(f"{path}, line {number}: {len(fields)} columns; expected {expected}")
            tokens.append(fields[0])
            tags.append(fields[-1])
        elif tokens:
            yield {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


def _json_rows(text: str, path: Path) -> Iterable[dict]:
    for number, line in enumerate(_lines(text), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line)
        except ValueError as error:
            fault = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{where}: not JSON ({fault}); one object a line is expected") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: one JSON object a line is expected, not {type(row).__name__}")
        # escapes can encode characters that are not text
        if wrong := [text for text in _strings(row) if _NO_TEXT.search(text)] if "\\u" in line else []:
            raise ValueError(f"{where}: NUL or half of a surrogate pair, which is not text, in {wrong[0]!r:.50}")
        yield row


def _strings(value: Any) -> Iterable[str]:
    """All strings in a JSON value, keys included. Not recursive: it may be nested deeper than Python's call stack."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            left += [*item, *item.values()]
        elif isinstance(item, list):
            left += item
