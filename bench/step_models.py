"""The models of the training steps: their shapes, start weights and batches. The weights are random."""

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.shapes import token_ids


@dataclass(frozen=True)
class Shape:
    """Of a model and its batch. Family "linears": linear layers of `width`, one after the other."""

    family: str
    layers: int
    width: int
    batch: int
    tokens: int = 1
    vocabulary: int = 0
    heads: int = 0
    key_value_heads: int = 0  # of family "llama"
    inner: int = 0
    density: float = 0.05
    rounds: int = 5  # on the CPU
    isolated: bool = False

    def __str__(self) -> str:
        if self.family == "linears":
            return f"{self.layers} of {self.width}x{self.width}, {self.batch} rows"
        return f"{self.batch}x{self.tokens} tokens"

    @property
    def spread(self) -> float:
        """Standard deviation of the start weights: that of BERT and Llama; of a stack, one that keeps activations'
        size."""
        return self.width**-0.5 if self.family == "linears" else 0.02


LLAMA: dict[str, Any] = {"batch": 2, "tokens": 128, "vocabulary": 128256, "heads": 32, "key_value_heads": 8}
MODELS = {
    "tiny": Shape("bert", 2, 32, batch=2, tokens=16, vocabulary=200, heads=2, inner=64),
    "tiny linears": Shape("linears", 4, 64, batch=4, density=0.02),
    "tiny llama": Shape("llama", 2, 32, batch=2, tokens=16, vocabulary=200, heads=4, key_value_heads=2, inner=64),
    "small linears": Shape("linears", 32, 512, batch=64, density=0.02),  # for the test of peak memory
    "minilm": Shape("bert", 6, 384, batch=8, tokens=128, vocabulary=30522, heads=12, inner=1536, rounds=7),
    "linears": Shape("linears", 32, 2048, batch=128, density=0.02, rounds=7),
    "bert": Shape("bert", 12, 768, batch=8, tokens=128, vocabulary=30522, heads=12, inner=3072),
    "xlmr": Shape("xlmr", 12, 768, batch=8, tokens=256, vocabulary=250002, heads=12, inner=3072, rounds=3),
    "llama1b": Shape("llama", 16, 2048, inner=8192, rounds=3, isolated=True, **LLAMA),
}
TINY = {"linears": "tiny linears", "bert": "tiny", "xlmr": "tiny", "llama": "tiny llama"}


def skeleton(shape: Shape, dtype: torch.dtype) -> nn.Module:
    """The model on torch's current device with arbitrary weights; what masked training never changes is frozen."""
    if shape.family == "linears":
        layers = (nn.Linear(shape.width, shape.width, bias=False, dtype=dtype) for _ in range(shape.layers))
        return nn.Sequential(*layers)
    import transformers

    from deftx_kernels.train.models import freeze_for_vector

    options: dict[str, Any] = {"vocab_size": shape.vocabulary, "hidden_size": shape.width, "use_cache": False}
    options |= {"num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}
    options["intermediate_size"] = shape.inner
    if shape.family == "llama":
        options |= {"num_key_value_heads": shape.key_value_heads, "tie_word_embeddings": True}
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**options), dtype=dtype)
    else:
        options |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
        if shape.family == "xlmr":
            config = transformers.XLMRobertaConfig(max_position_embeddings=514, type_vocab_size=1, **options)
        else:
            config = transformers.BertConfig(**options)
        model = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    freeze_for_vector(model)
    return model.train()


def on_meta(shape: Shape) -> nn.Module:
    """Names and shapes without memory."""
    with torch.device("meta"):
        return skeleton(shape, torch.float32)


@torch.no_grad()
def build(shape: Shape, dtype: torch.dtype, device: str) -> nn.Module:
    """The model with its start weights, the same at each call, without another allocation of its size."""
    with torch.device("meta"):
        model = skeleton(shape, dtype)
    model.to_empty(device=device)
    if shape.family != "linears":
        model.tie_weights()
        # Buffers, such as positions, depend neither on the number of layers nor on the vocabulary.
        small = skeleton(replace(shape, layers=1, vocabulary=16), dtype)
        for (_, buffer), (_, known) in zip(model.named_buffers(), small.named_buffers(), strict=True):
            buffer.copy_(known)
    for name, parameter in model.named_parameters():
        start_weights_(name, parameter, shape.spread)
    return model


@torch.no_grad()
def start_weights_(name: str, tensor: Tensor, spread: float) -> Tensor:
    """Fill one parameter. The seed is its name: each can be made again without the others."""
    if tensor.dim() < 2:
        return tensor.fill_(float(name.endswith("weight")))  # norms: 1; biases: 0
    generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
    return tensor.normal_(std=spread, generator=generator)


def maskable(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors that the mask covers."""
    model = on_meta(shape)
    if shape.family == "linears":
        return {n: tuple(p.shape) for n, p in model.named_parameters()}
    from deftx_kernels.train.models import maskable_names

    return {n: tuple(model.get_parameter(n).shape) for n in maskable_names(model)}


def make_batch(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if shape.family == "linears":
        x, y = torch.randn(2, shape.batch, shape.width, generator=generator).to(device)
        return {"x": x.to(dtype), "y": y}
    ids = token_ids(shape.batch * shape.tokens, shape.vocabulary, generator).view(shape.batch, shape.tokens).to(device)
    labels = ids if shape.family == "llama" else torch.arange(shape.batch, device=device) % 3
    return {"input_ids": ids, "labels": labels}
