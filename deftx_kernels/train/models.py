"""Loading models, and the names of their parts: maskable tensors, linear layers, head."""

import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deftx_kernels.files import read_json
from deftx_kernels.train.packaged import packaged_model

CLASSIFIERS = {
    "classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
}


def resolve_model(model: str | Path) -> str:
    """A folder or hub id for `model`; "minilm" and "e5-small" stand for weights in packages (packaged.py).

    Raises:
        ValueError: the package is not installed.
    """
    return str(packaged_model(str(model)) or model)


def _load(load, model: str | Path, what: str, **options):
    path = resolve_model(model)
    local = Path(path).is_dir()
    # transformers would interpret it as a hub id, which is NAME or OWNER/NAME
    if not local and (isinstance(model, Path) or path.startswith((".", "~")) or path.count("/") > 1 or "\\" in path):
        raise ValueError(f"model {str(model)!r}: there is no such folder")
    try:
        return load(path, **options)
    except Exception as error:  # a damaged file gives any kind, also the bare Exception of tokenizers
        lines = str(error).strip().splitlines() or [type(error).__name__]
        source = _damaged_file(Path(path)) or ("this folder" if local else "the hub, and it is no folder")
        raise ValueError(f"model {str(model)!r}: {what} cannot be loaded from {source}: {lines[0]}") from error


def _damaged_file(folder: Path) -> Path | None:
    """A file in a model folder that cannot be read at all."""
    for path in model_files(folder):
        try:
            if path.name == "tokenizer.json":
                Tokenizer.from_file(str(path))
            elif path.suffix == ".json":
                read_json(path)
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
        except Exception:  # SafetensorError and the bare Exception of tokenizers among them
            return path
    return None


def model_files(folder: Path) -> list[Path]:
    """The files of a model folder that `from_pretrained` may read; none where it is no folder but a hub id."""
    endings = (".json", ".txt", ".model", ".safetensors", ".bin")
    return sorted(p for p in folder.glob("*") if p.suffix in endings and p.name != "phase.json" and p.is_file())


def model_hash(model: str | Path) -> str:
    """SHA-256 (hex) of a model folder's files, or the commit of a hub id."""
    path = resolve_model(model)
    if not (files := model_files(Path(path))):
        return str(getattr(_load(AutoConfig.from_pretrained, model, "a configuration"), "_commit_hash", None))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises ValueError where there is none, or one without a vocabulary."""
    tokenizer = _load(AutoTokenizer.from_pretrained, model, "a tokenizer")
    # Without vocabulary files, transformers makes a tokenizer of special tokens (and SentencePiece's space).
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < 2:
        what = "a tokenizer cannot be loaded: its files, such as tokenizer.json, are missing or have no vocabulary"
        raise ValueError(f"model {str(model)!r}: {what}")
    return tokenizer


def load_classifier(model: str | Path, labels: list[str], task: str = "classification") -> PreTrainedModel:
    """`model` with a head for `labels`; a head that is not in the checkpoint is initialized at random.

    A pooler that is not in it belongs to the head: it has no pretrained values from which a sparse difference could be
    taken. Its parameters are listed in the model's configuration, as `new_parameters`.

    Args:
        task: "classification" (of a text or a pair of texts) or "token-classification".

    Raises:
        ValueError: files that are missing or damaged, by name; weights that are missing, NaN or infinite.
    """
    names = dict(enumerate(labels))
    ids = {label: i for i, label in names.items()}
    loaded, missing = _load_weights(CLASSIFIERS[task], model, num_labels=len(labels), id2label=names, label2id=ids)
    if new := sorted(name for name in missing if name.startswith(base_prefix(loaded))):
        loaded.config.new_parameters = new
    return loaded


def _load_weights(auto, model: str | Path, **options) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of the tensors that are missing in its files."""
    options |= {"output_loading_info": True, "dtype": torch.float32}
    loaded, info = _load(auto.from_pretrained, model, "weights", **options)
    missing = set(info["missing_keys"])
    # transformers initializes missing tensors at random. A head may be new, and so may the pooler, which is
    # missing in checkpoints with an MLM head.
    if lacking := sorted(name for name in missing if name.startswith(base_prefix(loaded)) and ".pooler." not in name):
        what = f"{len(lacking)} tensors of the base model, such as {lacking[0]!r}"
        raise ValueError(f"model {str(model)!r}: its files lack {what}")
    check_finite(loaded, f"model {str(model)!r}")
    return loaded, missing


def trained_head(model: PreTrainedModel) -> list[str]:
    """Names of the head's trainable parameters."""
    return [name for name in head_names(model) if model.get_parameter(name).requires_grad]


def count_parameters(model: nn.Module) -> int:
    """N of the L1 term: all parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_finite(model: nn.Module, what: str) -> None:
    """Raises ValueError naming a tensor that holds NaN or an infinite value."""
    for name, tensor in model.named_parameters():
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise ValueError(f"{what}: {name!r} holds NaN or infinite values")


def outline(model: str | Path, task: str) -> PreTrainedModel:
    """The model without weights (on the meta device), from its configuration alone.

    Args:
        task: as in `load_classifier`, or "masked-lm".
    """
    config = _load(AutoConfig.from_pretrained, model, "a configuration")
    auto = AutoModelForMaskedLM if task == "masked-lm" else CLASSIFIERS[task]
    with torch.device("meta"):
        return _load(lambda _: auto.from_config(config), model, f"an architecture for {task}")


def position_count(model: nn.Module) -> int | None:
    """How many tokens a text may have: the rows of learned position embeddings, None where there are none."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa's positions begin after that of the padding.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    return None


def load_masked_lm(model: str | Path, tie_decoder: bool = False) -> tuple[PreTrainedModel, bool]:
    """(`model` with an MLM head, whether that head is new).

    With `tie_decoder` the output layer shares the word embeddings; otherwise it is a copy of them, which
    `freeze_for_vector` freezes (LT-SFT's setting), so that it has no dense gradient of vocabulary size.
    """
    loaded, missing = _load_weights(AutoModelForMaskedLM, model)
    head = set(head_names(loaded))
    # A tied decoder bias is reported as missing by some checkpoints that have it under its other name.
    new_head = any(name in head and name.endswith("weight") for name in missing)
    if not tie_decoder:
        decoder = loaded.get_output_embeddings()
        if decoder.weight is loaded.get_input_embeddings().weight:
            decoder.weight = nn.Parameter(decoder.weight.detach().clone())
        loaded.config.tie_word_embeddings = False  # saved and loaded checkpoints keep the two apart
    return loaded, new_head


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
    """Names of the parameters that a mask may select: the base model, with embeddings and biases, without norms."""
    without = norm_names(model) | set(head_names(model))
    return sorted(name for name, _ in model.named_parameters() if name not in without)


def linear_names(model: PreTrainedModel) -> list[str]:
    """Names of the maskable weights of linear layers (for LIFT)."""
    embeddings = embedding_names(model)
    return [name for name in maskable_names(model) if model.get_parameter(name).ndim == 2 and name not in embeddings]


def embedding_names(model: nn.Module) -> set[str]:
    """Names of the weights of nn.Embedding modules."""
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the parameters outside the pretrained base model: the head, with a new pooler."""
    prefix, new = base_prefix(model), getattr(model.config, "new_parameters", ())
    return sorted(name for name, _ in model.named_parameters() if not name.startswith(prefix) or name in new)


def freeze_for_vector(model: PreTrainedModel) -> None:
    """Freeze all but the maskable tensors and the head: norms and an untied MLM decoder."""
    trainable = set(maskable_names(model)) | set(head_names(model))
    norms = norm_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable and name not in norms)
    decoder = model.get_output_embeddings()
    if decoder is not None and decoder.weight is not model.get_input_embeddings().weight:
        decoder.weight.requires_grad_(False)


def freeze_for_head(model: PreTrainedModel) -> None:
    """Freeze all but the head; of an MLM head, also the decoder's weight."""
    head = set(head_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in head)
    decoder = model.get_output_embeddings()
    if decoder is not None:
        decoder.weight.requires_grad_(False)
