"""Data with several source languages: CoNLL files, folders of MasakhaNER and AmericasNLI, files as language=path."""

from pathlib import Path

import pytest
from train_tiny import sentence, write_csv

from deftx_kernels.train import data
from deftx_kernels.train.config import RunConfig
from deftx_kernels.train.data_config import AmericasNLIData, Columns, FilesData, MasakhaNERData, NusaxData
from deftx_kernels.train.readers import read_task

SHARED = Path(__file__).parents[3] / "shared/data"
NER = Columns(kind="token-classification")
ROWS = [{"tokens": ["Ana", "reads"], "tags": ["B-PER", "O"]}, {"tokens": ["Rome"], "tags": ["B-LOC"]}]


@pytest.mark.parametrize(
    "content",
    [
        "Ana B-PER\nreads O\n\nRome B-LOC\n",
        "Ana\tB-PER\nreads\tO\n\nRome\tB-LOC",  # no final newline
        "\n\nAna NNP x B-PER\nreads VB x O\n \t\n\nRome NNP x B-LOC\n\n\n",
        "-DOCSTART- -X- O\n\nAna NNP B-PER\nreads VB O\n-DOCSTART- -X- O\nRome NNP B-LOC\n",
        "-DOCSTART-\r\nAna B-PER\r\nreads  O\r\n\r\nRome B-LOC\r\n",
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.CONLL"])
def test_conll_files(tmp_path, content, name):
    (tmp_path / name).write_bytes(content.encode())
    assert read_task(tmp_path / name, NER).to_list() == ROWS


def test_conll_words_may_have_other_white_space(tmp_path):
    (tmp_path / "a.txt").write_text("10\u00a0000 O\nki\u2028lo\tB-X\n", encoding="utf-8")
    assert read_task(tmp_path / "a.txt", NER)[0] == {"tokens": ["10\u00a0000", "ki\u2028lo"], "tags": ["O", "B-X"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a O\nb\n", "a.txt, line 2: 1 columns; expected 2 columns, as before"),
        ("a x O\n\nb O\n", "a.txt, line 3: 2 columns; expected 3 columns, as before"),
        ("\nword\n", "a.txt, line 2: 1 columns; expected a word and its tag"),
        ("", "a.txt: no rows"),
        ("-DOCSTART- O\n\n", "a.txt: no rows"),
        (b"a O\nb\xe9 O\n", "a.txt, line 2: not UTF-8"),
    ],
)
def test_bad_conll_files(tmp_path, content, message):
    (tmp_path / "a.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path / "a.txt", NER)


def conll(start: int, count: int) -> str:
    lines = [[f"w{i} O", f"n{i} B-PER", f"m{i} I-PER"] for i in range(start, start + count)]
    return "\n\n".join("\n".join(words) for words in lines) + "\n"


@pytest.fixture
def masakhaner(tmp_path) -> Path:
    for number, language in enumerate(("swa", "hau", "wol")):
        (tmp_path / language).mkdir()
        for split, count in (("train", 6), ("dev", 2), ("test", 3)):
            (tmp_path / language / f"{split}.txt").write_text(conll(100 * number, count))
    return tmp_path


@pytest.fixture
def americasnli(tmp_path) -> Path:
    for number, language in enumerate(("aym", "gn", "quy")):
        for split, count in (("dev", 20), ("test", 4)):
            texts = [(language, *(sentence(i + 50 * number + j)[0] for j in (0, 9))) for i in range(count)]
            rows = [(*row, ("contradiction", "entailment", "neutral")[i % 3]) for i, row in enumerate(texts)]
            path = tmp_path / split / f"{language}.tsv"
            path.parent.mkdir(exist_ok=True)
            lines = [("language", "premise", "hypothesis", "label"), *rows]
            path.write_text("".join("\t".join(line) + "\n" for line in lines))
    return tmp_path


def test_masakhaner_folder(masakhaner):
    corpus = data.load_corpus(MasakhaNERData(masakhaner))
    assert (corpus.sources, corpus.targets, corpus.labels) == (["swa"], ["hau", "wol"], ["B-PER", "I-PER", "O"])
    assert (corpus.task, corpus.metric) == ("token-classification", "entity_f1")
    assert (len(corpus.train), len(corpus.validation), len(corpus.test["hau"])) == (6, 2, 3)
    assert "language" not in corpus.train.column_names  # of one source
    assert corpus.text["wol"][0] == {"text": "w200 n200 m200"}
    assert corpus.text.keys() == corpus.text_validation.keys() == corpus.test.keys() == {"swa", "hau", "wol"}


def test_several_sources_have_the_column_language(masakhaner):
    corpus = data.load_corpus(MasakhaNERData(masakhaner, ["wol", "swa"], ["hau"]))
    assert corpus.train["language"] == [0] * 6 + [1] * 6
    assert corpus.validation["language"] == [0] * 2 + [1] * 2
    assert corpus.train[0]["tokens"][0] == "w200"
    assert corpus.train[6]["tokens"][0] == "w0"
    assert all(set(rows.column_names) == {"tokens", "tags"} for rows in corpus.test.values())
    assert corpus.sources == ["wol", "swa"]


def test_americasnli_folder_holds_out_a_tenth_of_dev(americasnli):
    corpus = data.load_corpus(AmericasNLIData(americasnli, ["gn", "aym"]))
    assert (corpus.targets, corpus.metric, corpus.task) == (["quy"], "accuracy", "classification")
    assert corpus.labels == ["contradiction", "entailment", "neutral"]
    assert corpus.train["language"] == [0] * 18 + [1] * 18
    assert corpus.validation["language"] == [0] * 2 + [1] * 2
    assert len(corpus.test["quy"]) == 4
    columns = Columns(text_column="premise", pair_column="hypothesis")
    read = [read_task(americasnli / f"dev/{name}.tsv", columns) for name in ("gn", "aym")]
    for name in ("text", "text_pair"):
        assert sorted([*corpus.train[name], *corpus.validation[name]]) == sorted([*read[0][name], *read[1][name]])
    quy = read_task(americasnli / "dev/quy.tsv", columns)
    texts = [*corpus.text["quy"]["text"], *corpus.text_validation["quy"]["text"]]
    assert set(texts) == {*quy["text"], *quy["text_pair"]}
    again = data.load_corpus(AmericasNLIData(americasnli, ["gn", "aym"]))
    assert again.hashes() == corpus.hashes()
    assert again.text_hash("quy") == corpus.text_hash("quy") != corpus.text_hash("gn")


def test_hypotheses_of_a_premise_are_all_held_out_or_all_trained_on(tmp_path):
    labels = ("contradiction", "entailment", "neutral")
    for split, number in (("dev", 30), ("test", 1)):
        (tmp_path / split).mkdir()
        lines = [f"{i}\tpremise {i}\t{label} of {i}\t{label}\n" for i in range(number) for label in labels]
        for language in ("aym", "quy"):
            (tmp_path / split / f"{language}.tsv").write_text("id\tpremise\thypothesis\tlabel\n" + "".join(lines))
    corpus = data.load_corpus(AmericasNLIData(tmp_path, ["aym"]))
    assert (len(corpus.train), len(corpus.validation)) == (81, 9)
    assert not set(corpus.train["text"]) & set(corpus.validation["text"])
    texts, held_out = (x["quy"]["text"] for x in (corpus.text, corpus.text_validation))
    assert len(set(texts)) == len(texts) == 27 + 81  # each premise once
    assert not set(texts) & set(held_out)
    (tmp_path / "dev/quy.tsv").write_text("premise\thypothesis\tlabel\na\tb\tneutral\n")
    with pytest.raises(ValueError, match=r"dev/quy.tsv: it has one premise only"):
        data.load_corpus(AmericasNLIData(tmp_path, ["aym"]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: MasakhaNERData(x, ["yor"]), r"language 'yor': there is no .*yor/train.txt; .*hau, swa, wol"),
        (lambda x: MasakhaNERData(x, ["swa"], ["yor"]), "language 'yor'"),
        (lambda x: AmericasNLIData(x), r"data_dir .*: no test/<language>.tsv in it"),
        (lambda x: MasakhaNERData(x / "swa"), r"data_dir .*swa: no <language>/train.txt in it"),
    ],
)
def test_unknown_languages_and_folders(masakhaner, make, message):
    with pytest.raises(ValueError, match=message):
        data.load_corpus(make(masakhaner))


def test_unknown_languages_of_americasnli(americasnli):
    with pytest.raises(ValueError, match=r"language 'nah': there is no .*test/nah.tsv; the languages are aym, gn, quy"):
        data.load_corpus(AmericasNLIData(americasnli, ["nah"]))
    (americasnli / "dev/quy.tsv").unlink()
    with pytest.raises(ValueError, match=r"dev/quy.tsv: no such file"):
        data.load_corpus(AmericasNLIData(americasnli, ["aym"]))


def test_files_of_several_source_languages(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a", "b", "x")):
        write_csv(Path(f"{name}.csv"), [(i, *sentence(i + 10 * number)) for i in range(4)])
        Path(f"{name}.txt").write_text("the room\n")
    options = {"test": ["x=x.csv"], "text": ["x=x.txt"], "validation": ["b=b.csv"]}
    corpus = data.load_corpus(FilesData(["a=a.csv", "b=b.csv", "a=x.csv"], **options))
    assert corpus.sources == ["a", "b"]
    assert corpus.train["language"] == [0] * 8 + [1] * 4
    assert corpus.train["text"][4:8] == [sentence(i + 20)[0] for i in range(4)]
    assert corpus.validation["language"] == [1] * 4
    with pytest.raises(ValueError, match="validation: 'c' is no source language; these are a, b"):
        FilesData(["a=a.csv", "b=b.csv"], **{**options, "validation": ["c=b.csv"]})
    with pytest.raises(ValueError, match="targets: 'x' is a source"):
        FilesData(["x=a.csv"], ["x=x.csv"], ["x=x.txt"])
    with pytest.raises(ValueError, match="source_vector: give the unlabelled text of 'b' too, as text b=path"):
        RunConfig(FilesData(["a=a.csv", "b=b.csv"], ["x=x.csv"], ["x=x.txt", "a=a.txt"]), source_vector=True)
    texts = ["x=x.txt", "a=a.txt", "b=b.txt"]
    config = RunConfig(FilesData(["a=a.csv", "b=b.csv"], ["x=x.csv"], texts), source_vector=True)
    assert data.load_corpus(config.data).text.keys() == {"a", "b", "x"}


@pytest.mark.parametrize(
    ("name", "make", "labels", "targets"),
    [
        ("nusax", lambda x: NusaxData(x, ["indonesian", "english"]), 3, {"javanese", "minangkabau"}),
        ("americasnli", AmericasNLIData, 3, {"quy"}),
        ("masakhaner", lambda x: MasakhaNERData(x, ["swa", "hau"]), 9, {"wol"}),
    ],
)
def test_the_real_folders(name, make, labels, targets):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"no {name} beside the repository")
    corpus = data.load_corpus(make(folder))
    assert len(corpus.labels) == labels
    assert set(corpus.targets) >= targets
    assert set(corpus.train["language"]) == set(corpus.validation["language"]) == set(range(len(corpus.sources)))
    assert set(corpus.test) == set(corpus.text) == {*corpus.sources, *corpus.targets}
