"""A tiny random BERT with a vocabulary of its own, and tiny data: no network, no packaged weights."""

import csv
from pathlib import Path

import pytest

LETTERS = "abcdefghijklmnopqrstuvwxyz"
GOOD, BAD = ["good", "nice", "lovely", "great"], ["bad", "awful", "ugly", "poor"]
FILLERS = ["the", "room", "food", "was", "very", "and", "place", "a", "service", "is"]


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    """Folder of a two-layer BertModel with random weights and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *GOOD,
        *BAD,
        *FILLERS,
        *LETTERS,
        *(f"##{c}" for c in LETTERS),
    ]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(words)) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(dict.fromkeys(words)), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


def sentence(i: int) -> tuple[str, str]:
    """The i-th sentence and its label, which depends on one of its words."""
    words = [FILLERS[(i * 7 + j * 3) % len(FILLERS)] for j in range(4 + i % 5)]
    label, choice = (("positive", GOOD), ("negative", BAD))[i % 2]
    words.insert(i % len(words), choice[(i // 2) % 4])
    return " ".join(words), label


def write_csv(path: Path, rows: list[tuple], header=("id", "text", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


@pytest.fixture
def nusax_folder(tmp_path) -> Path:
    """A NusaX-like folder of three small languages."""
    for number, language in enumerate(("source", "first", "second")):
        for split, start, count in (("train", 0, 48), ("valid", 100, 8), ("test", 200, 16)):
            rows = [(i, *sentence(i + 31 * number)) for i in range(start, start + count)]
            write_csv(tmp_path / "data" / language / f"{split}.csv", rows)
    return tmp_path / "data"
