"""A tiny random BERT and a NusaX-like folder: no network, no packaged weights."""

from pathlib import Path

import pytest
from train_tiny import BAD, FILLERS, GOOD, sentence, write_csv

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory) -> str:
    """Folder of a two-layer BertModel with random weights and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-bert")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = list(dict.fromkeys([*special, *GOOD, *BAD, *FILLERS, *LETTERS, *(f"##{c}" for c in LETTERS)]))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=64, initializer_range=0.2, **shape)
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def nusax_folder(tmp_path) -> Path:
    """A NusaX-like folder of three small languages."""
    for number, language in enumerate(("source", "first", "second")):
        for split, start, count in (("train", 0, 48), ("valid", 100, 8), ("test", 200, 16)):
            rows = [(i, *sentence(i + 31 * number)) for i in range(start, start + count)]
            write_csv(tmp_path / "data" / language / f"{split}.csv", rows)
    return tmp_path / "data"
