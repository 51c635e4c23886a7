"""Data of the driver: CLDR without leakage, NusaX folders, tables, plain text, and what is said about bad files."""

import json
from collections import Counter
from pathlib import Path

import pytest
from train_tiny import write_csv

from deftx_kernels.train import data, report
from deftx_kernels.train.cldr import KINDS, display_names, load_cldr, split_of
from deftx_kernels.train.data_config import CldrData, Columns, FilesData, HubData, NusaxData
from deftx_kernels.train.readers import read_task, read_text

LANGUAGES = ["en", "id", "eu", "sw"]
SHARED_NUSAX = Path(__file__).parents[3] / "shared/data/nusax"


@pytest.fixture(scope="module")
def cldr():
    return load_cldr(LANGUAGES)


def test_cldr_keys_are_in_one_split_in_every_language(cldr):
    found: dict[str, set[str]] = {}
    for splits in cldr.values():
        for split, rows in splits.items():
            for row in rows:
                found.setdefault(row["id"], set()).add(split)
    assert all(len(splits) == 1 for splits in found.values())
    assert all(split_of(*key.split("/", 1)) in splits for key, splits in found.items())


def test_cldr_no_test_string_is_a_training_string_of_any_language(cldr):
    texts = {
        split: {row["text"].casefold() for splits in cldr.values() for row in splits[split]}
        for split in ("train", "validation", "test")
    }
    assert not texts["test"] & texts["train"]
    assert not texts["test"] & texts["validation"]
    assert not texts["validation"] & texts["train"]


def test_cldr_labels_are_unambiguous_and_every_kind_is_in_every_test_set(cldr):
    for language in LANGUAGES:
        names = display_names(language)
        kinds: dict[str, set[str]] = {}
        for (kind, _), name in names.items():
            kinds.setdefault(name.casefold(), set()).add(kind)
        assert all(len(found) == 1 for found in kinds.values())
        assert {row["label"] for row in cldr[language]["test"]} == set(KINDS)
        assert min(Counter(kind for kind, _ in names).values()) >= 30


def test_cldr_leaves_out_thinly_covered_locales():
    with pytest.raises(ValueError, match=r"'su'.*kind 'script'"):
        load_cldr(["en", "su"])
    with pytest.raises(ValueError, match="'nosuch'"):
        load_cldr(["nosuch"])


def test_cldr_corpus_has_unlabelled_text_of_the_targets():
    corpus = data.load_corpus(CldrData(sources=["en"], targets=["id"]))
    assert corpus.labels == sorted(KINDS)
    assert corpus.text["id"].column_names == ["text"]
    assert set(corpus.test["id"]["text"]).isdisjoint(corpus.text["id"]["text"])


def test_nusax_folder(nusax_folder):
    corpus = data.load_corpus(NusaxData(nusax_folder, sources=["source"]))
    assert corpus.targets == ["first", "second"]
    assert corpus.labels == ["negative", "positive"]
    assert len(corpus.train) == 48
    assert len(corpus.validation) == 8
    assert len(corpus.test["first"]) == 16
    assert len(corpus.text["second"]) == 48
    assert corpus.text["second"].column_names == ["text"]


@pytest.mark.skipif(not SHARED_NUSAX.is_dir(), reason="no NusaX beside the repository")
def test_real_nusax():
    corpus = data.load_corpus(NusaxData(SHARED_NUSAX))
    assert corpus.labels == ["negative", "neutral", "positive"]
    assert len(corpus.train) == 500
    assert all(len(rows) == 400 for rows in corpus.test.values())
    assert set(corpus.targets) >= {"acehnese", "balinese", "english"}


def test_nusax_errors_name_the_folder_the_file_and_the_column(nusax_folder):
    with pytest.raises(ValueError, match="language 'third'.*first, second, source"):
        data.load_corpus(NusaxData(nusax_folder, sources=["third"]))
    write_csv(nusax_folder / "first/valid.csv", [(1, "good", "positive")], header=("id", "sentence", "label"))
    with pytest.raises(ValueError, match=r"first/valid.csv: no column 'text'.*'sentence'"):
        data.load_corpus(NusaxData(nusax_folder, sources=["source"]))
    (nusax_folder / "first/valid.csv").unlink()
    with pytest.raises(ValueError, match=r"first/valid.csv: no such file"):
        data.load_corpus(NusaxData(nusax_folder, sources=["source"]))
    with pytest.raises(ValueError, match="data_dir"):
        data.load_corpus(NusaxData(nusax_folder / "nothing"))


def test_a_label_that_training_lacks_is_refused(nusax_folder):
    write_csv(nusax_folder / "second/test.csv", [(1, "so so", "neutral")])
    with pytest.raises(ValueError, match=r"second, test: label 'neutral'.*'negative', 'positive'"):
        data.load_corpus(NusaxData(nusax_folder, sources=["source"]))


def test_tsv_of_pairs_keeps_quotes(tmp_path):
    path = tmp_path / "aym.tsv"
    path.write_text(
        'language\tpremise\thypothesis\tlabel\naym\tHe said "yes\tHe agreed\tentailment\naym\t"a" "b"\t"b"\tneutral\n'
    )
    rows = read_task(path, Columns(text_column="premise", pair_column="hypothesis"))
    assert rows[0] == {"text": 'He said "yes', "text_pair": "He agreed", "label": "entailment"}
    assert rows[1] == {"text": '"a" "b"', "text_pair": '"b"', "label": "neutral"}
    with pytest.raises(ValueError, match=r"aym.tsv: no column 'sentence2'"):
        read_task(path, Columns(text_column="premise", pair_column="sentence2"))


def test_jsonl_of_tokens(tmp_path):
    path = tmp_path / "pos.jsonl"
    path.write_text(json.dumps({"tokens": ["the", "room"], "tags": ["DET", "NOUN"]}) + "\n")
    columns = Columns(text_column="tokens", label_column="tags", kind="token-classification")
    assert read_task(path, columns)[0] == {"tokens": ["the", "room"], "tags": ["DET", "NOUN"]}
    path.write_text(json.dumps({"tokens": ["the", "room"], "tags": ["DET", "NOUN "]}) + "\n")
    with pytest.raises(ValueError, match="row 1: 'NOUN ' in column 'tags' begins or ends with white space"):
        read_task(path, columns)
    path.write_text(json.dumps({"tokens": ["the", "room"], "tags": ["DET"]}) + "\n")
    with pytest.raises(ValueError, match=r"row 1: 2 tokens in 'tokens' but 1 in 'tags'"):
        read_task(path, columns)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{not json}\n", "line 1: not JSON"),
        ("a.jsonl", "[1]\n", "line 1: one JSON object"),
        ("a.csv", "text,label\n", "no rows"),
        ("a.csv", "", "a.csv: the file is empty"),
        ("a.csv", "text,label\ngood,\n", "row 1: column 'label' is empty"),
        ("a.csv", "text,label\ngood,a\n \n,b\n", "line 3: 1 fields, but 2 columns"),
        ("a.csv", "text,label\n  ,b\n", "row 1: column 'text' is empty"),
        ("a.csv", "text,label\ngood,a\nhello, world,a\n", "line 3: 3 fields, but 2 columns"),
        ("a.tsv", "text\tlabel\ngood\n", "line 2: 1 fields, but 2 columns; TSV has no quotes: save the file as CSV"),
        ("a.tsv", 'text\tlabel\n"a ""b"""\ta\n', 'line 2: the field \'"a ""b"""\' is quoted as in CSV; TSV'),
        (
            "a.csv",
            "text,label\ngood,a\nbad, b\n",
            "a.csv, row 2: ' b' in column 'label' begins or ends with white space",
        ),
        ("a.csv", 'text,label\ngood, "a"\n', "row 1: ' \"a\"' in column 'label'"),
        ("a.jsonl", '{"text": "good", "label": "a\\u00a0"}\n', "row 1: 'a.*' in column 'label'"),
        ("a.csv", 'text,label\n"good,a\n', "a.csv, line 2: unexpected end of data"),
        ("a.csv", "text,label,text\ngood,a,b\n", "line 1: two columns are named 'text'"),
        ("a.csv", "text,label\ngo\0od,a\n", "line 2: a NUL character"),
        ("a.csv", "text,label\nh\xe9,a\n".encode("latin-1"), "a.csv, line 2: not UTF-8"),
        ("a.jsonl", "\n{}\xe9".encode("latin-1"), "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", "text".encode("utf-16"), "a.jsonl, line 1: not UTF-8"),
        ("a.jsonl", '{"text": "\\ud83d", "label": "a"}\n', "line 1: NUL or half of a surrogate pair"),
        ("a.jsonl", '{"text": [["\\u0000"]], "label": "a"}\n', "line 1: NUL or half"),
        ("a.jsonl", "[" * 100_000 + "\n", "line 1: not JSON"),
        ("a.jsonl", '{"text": {"a": 1}, "label": "a"}\n', "row 1: column 'text' is not text"),
        ("a.jsonl", '{"text": "good", "label": NaN}\n', "row 1: column 'label' is empty"),
        ("a.xlsx", "", "ending must be"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path / name, Columns())


def test_only_line_ends_end_lines(tmp_path):
    rows = [{"text": "one\u2028two\x85three\x0bfour", "label": "a"}, {"text": "\ud83d\ude00", "label": "\\u0000"}]
    lines = [json.dumps(row, ensure_ascii=i == 1) for i, row in enumerate(rows)]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(lines).encode())
    assert read_task(tmp_path / "a.jsonl", Columns()).to_list() == [rows[0], {"text": "\U0001f600", "label": "\\u0000"}]
    (tmp_path / "a.TSV").write_bytes('\ufefftext\tlabel\r\none\u2028two\t"a\r\rlast\tb'.encode())
    assert read_task(tmp_path / "a.TSV", Columns()).to_list() == [
        {"text": "one\u2028two", "label": '"a'},
        {"text": "last", "label": "b"},
    ]
    (tmp_path / "a.csv").write_text(f'text,label\n"one\n\n{"x" * 200_000}",a\n')
    assert read_task(tmp_path / "a.csv", Columns())[0]["text"] == f"one\n\n{'x' * 200_000}"
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028two\rthree\r\n".encode())
    assert read_text(tmp_path / "a.txt")["text"] == ["one\u2028two", "three"]


def test_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n two \n")
    assert read_text(tmp_path / "a.txt")["text"] == ["one", "two"]
    (tmp_path / "c.txt").write_bytes("one\nh\xe9\n".encode("latin-1"))
    with pytest.raises(ValueError, match="c.txt, line 2: not UTF-8"):
        read_text(tmp_path / "c.txt")
    (tmp_path / "b.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="b.txt: no text"):
        read_text(tmp_path / "b.txt")


def test_files_corpus(tmp_path):
    train = write_csv(tmp_path / "train.csv", [(1, "good room", "a"), (2, "bad room", "b")])
    test = write_csv(tmp_path / "test.csv", [(1, "good food", "a")])
    (tmp_path / "x.txt").write_text("the room\n")
    corpus = data.load_corpus(FilesData([train], [f"x={test}"], [f"x={tmp_path / 'x.txt'}"]))
    assert corpus.targets == ["x"]
    assert corpus.labels == ["a", "b"]
    assert corpus.validation is None
    with pytest.raises(ValueError, match="'x.csv' should be written as language=path"):
        data.load_corpus(FilesData([train], ["x.csv"], []))
    with pytest.raises(ValueError, match="no unlabelled text for the test language 'x'"):
        data.load_corpus(FilesData([train], [f"x={test}"], []))


def test_one_label_only_is_refused(tmp_path, nusax_folder):
    train = write_csv(tmp_path / "train.csv", [(1, "good room", "a"), (2, "bad room", "a")])
    (tmp_path / "x.txt").write_text("the room\n")
    with pytest.raises(ValueError, match="one label only, 'a'"):
        data.load_corpus(FilesData([train], [f"x={train}"], [f"x={tmp_path / 'x.txt'}"]))
    write_csv(nusax_folder / "source/train.csv", [(1, "good", "positive")])
    with pytest.raises(ValueError, match="one label only, 'positive'"):
        data.load_corpus(NusaxData(nusax_folder, sources=["source"]))


@pytest.mark.parametrize("other", ["Positive", "posi\uff54ive"])
def test_labels_that_are_spelled_in_two_ways(nusax_folder, other):
    rows = [(1, "good room", "positive"), (2, "bad room", "negative"), (3, "good food", other)]
    write_csv(nusax_folder / "source/train.csv", rows)
    with pytest.raises(ValueError, match=f"training labels '{min('positive', other)}' and '{max('positive', other)}'"):
        data.load_corpus(NusaxData(nusax_folder, sources=["source"]))


def test_test_texts_that_are_trained_on_are_counted(nusax_folder):
    rows = [(i, f"text {i}", ("a", "b")[i % 2]) for i in range(50)]
    for language in ("source", "first", "second"):
        for number, split in enumerate(("train", "valid", "test")):
            write_csv(nusax_folder / language / f"{split}.csv", rows[number * 10 : number * 10 + 10])
    write_csv(nusax_folder / "second/test.csv", rows[7:17])
    sizes = data.load_corpus(NusaxData(nusax_folder, sources=["source"])).sizes()
    assert sizes["test_in_train"] == {"source": 0, "first": 0, "second": 3}
    assert report.test_sizes(sizes) == "Test examples: Source 10, First 10, Second 10 (3 of them in the training data)."


def test_entity_f1_needs_entity_tags(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": ["the", "room"], "label": ["D", "N"]}))
    (tmp_path / "x.txt").write_text("a")
    files = [tmp_path / "a.jsonl"], [f"x={tmp_path / 'a.jsonl'}"], [f"x={tmp_path / 'x.txt'}"]
    with pytest.raises(ValueError, match=r"metric: entity_f1 needs tags such as B-PER and O; .* \['D', 'N'\]"):
        data.load_corpus(FilesData(*files, kind="token-classification", metric="entity_f1"))
    assert data.load_corpus(FilesData(*files, kind="token-classification")).metric == "macro_f1"


def test_the_hash_of_the_content_sees_every_row():
    from datasets import Dataset

    rows = {"text": ["a", "b"], "label": ["x", "y"]}
    first = data.content_hash(Dataset.from_dict(rows))
    assert first == data.content_hash(Dataset.from_dict({"label": ["x", "y"], "text": ["a", "b"]}))
    assert first != data.content_hash(Dataset.from_dict({**rows, "text": ["a", "c"]}))
    assert first != data.content_hash(Dataset.from_dict({**rows, "text": ["b", "a"]}))


def test_hub_data_set_with_class_labels(monkeypatch):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(
        {"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=["no", "yes"])}
    )

    def fake(name, configuration, split):
        if configuration == "xx":
            raise FileNotFoundError("no such configuration")
        labels = [1, -1] if configuration == "unlabelled" else [1, 0]
        return Dataset.from_dict({"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": labels}, features=features)

    monkeypatch.setattr(data, "load_dataset", fake)
    settings = {"dataset": "some/nli", "sources": ["en"], "text_column": "premise", "pair_column": "hypothesis"}
    corpus = data.load_corpus(HubData(targets=["qu"], **settings))
    assert corpus.train[0] == {"text": "a", "label": "yes", "text_pair": "c"}
    assert corpus.labels == ["no", "yes"]
    assert corpus.text["qu"]["text"] == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match=r"'some/nli', configuration 'xx', split 'train'.*no such configuration"):
        data.load_corpus(HubData(targets=["xx"], **settings))
    with pytest.raises(ValueError, match=r"configuration 'unlabelled', split 'train', row 2: no label"):
        data.load_corpus(HubData(targets=["unlabelled"], **settings))
