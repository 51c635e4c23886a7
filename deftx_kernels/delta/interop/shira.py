"""SHiRA adapters of PEFT (Bhardwaj et al. 2024)."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from deftx_kernels.delta.interop.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INTEGERS,
    PREFIX,
    adapter_delta,
    check_values,
    read_adapter,
    split_by_module,
)
from deftx_kernels.delta.interop.entries import Entries, mask_and_values, warn_of_low_terms
from deftx_kernels.delta.models import Model
from deftx_kernels.delta.sparse_delta import SparseDelta
from deftx_kernels.files import make_folder, reading, write_tensors, write_text
from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import all_tensors, unwrapped

SHIRA_WEIGHTS, SHIRA_CONFIG = ADAPTER_WEIGHTS, ADAPTER_CONFIG


def from_peft_shira(
    directory: str | os.PathLike, base: Model | None = None, revision: str | None = None
) -> SparseDelta:
    """Read a SHiRA adapter that PEFT saved, as the differences of its modules' weights (PEFT's scaling is 1).

    Entries of value -0.0, with which `to_peft_shira` fills a layer up, are left out: they change nothing.

    Args:
        directory: a folder, or a repository of the Hugging Face hub.
        base: the base model or its tensors, for the shapes of the weights. The file holds only r * (in + out) = nnz;
            without `base` a weight is taken to be square if that agrees with r and with the largest indices.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file of the adapter is missing.
        ValueError: it is damaged or not a SHiRA adapter; a weight's shape is unknown without `base`; a weight is in
            `base` also that of a module without adapter (a tied embedding).
    """
    folder, config, tensors = read_adapter(directory, revision, "SHIRA")
    r = config.get("r")
    if type(r) is not int or r < 1:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: r must be an int from 1, got {r!r}")
    shapes = {} if base is None else {n: t.shape for n, t in all_tensors(base, "base").items()}
    with reading(folder / ADAPTER_WEIGHTS, "SHiRA adapter"):
        modules, dense = split_by_module(tensors, ("shira_weight", "shira_indices"))
        if not modules:
            raise ValueError("it holds no shira_weight")
        mask, values = mask_and_values(
            {f"{m}.weight": _decode(m, parts, r, shapes.get(f"{m}.weight")) for m, parts in modules.items()}
        )
    return adapter_delta(mask, values, dense, "shira", config, base)


def _decode(module: str, parts: Mapping[str, Tensor], r: int, size: torch.Size | None) -> Entries:
    """The entries of one module's weight."""
    values, index = check_values(module, parts.get("shira_weight")), parts.get("shira_indices")
    if index is None or index.dtype not in INTEGERS or index.shape != (2, len(values)):
        raise ValueError(
            f"the indices of {module!r} are missing or do not fit its values of shape {list(values.shape)}"
        )
    index = index.to(torch.int64)
    rows, columns = index
    if size is None:
        side, rest = divmod(len(rows), 2 * r)
        if rest or not side or int(index.max()) >= side:
            raise ValueError(f"the shape of {module!r} is not in a SHiRA adapter's files and is not square: give base=")
        size = torch.Size((side, side))
    if len(size) != 2:
        raise ValueError(f"the weight of {module!r} has shape {list(size)}, a SHiRA adapter is for matrices")
    if bool(((index < 0) | (index >= index.new_tensor(size).view(2, 1))).any()):
        raise ValueError(f"the indices of {module!r} do not fit a weight of shape {list(size)}")
    kept = (values != 0) | ~values.signbit()
    return size, (rows * size[1] + columns)[kept], values[kept]


def to_peft_shira(delta: SparseDelta, directory: str | os.PathLike, base: Model | None = None) -> None:
    """Write a SHiRA adapter that PEFT loads: `PeftModel.from_pretrained(model, directory)`.

    SHiRA has exactly r * (in + out) entries in each layer, with one r for all layers. r is the smallest for which each
    layer's entries fit in; other positions fill a layer up, with the value -0.0, which changes no weight. The format
    has no low terms (`delta.low`): they are left out, with a UserWarning.

    Args:
        delta: of weights of `nn.Linear` modules. Tensors without entries are left out.
        base: the base model (then the modules' classes are checked) or its tensors (then the shapes are). PEFT checks
            the classes when it loads the adapter.

    Raises:
        ValueError: the delta has whole tensors or entries in tensors that are not the weight of a linear layer; a layer
            has fewer than r * (in + out) elements; the tensor is named. Nothing has been written.
        OSError: `directory` is a file, or a file cannot be written; the message names it.
    """
    if delta.dense:
        raise ValueError(
            f"the delta has {min(delta.dense)!r} as a whole, a SHiRA adapter has only differences: leave it out with "
            "SparseDelta(delta.mask, delta.values, metadata=delta.metadata)"
        )
    parts = {n: delta.mask[n].to("cpu") for n in delta.mask.names}
    parts = {n: one for n, one in parts.items() if one.nnz}
    _check_linear(parts, base)
    r = _smallest_rank(parts)
    values = delta.mask.split(delta.values)
    tensors: dict[str, Tensor] = {}
    for name, one in parts.items():
        key = PREFIX + name.removesuffix("weight")
        index, padded = _filled_up(one, values[name].cpu(), r * sum(one.shapes[0]))
        tensors |= {f"{key}shira_indices": index, f"{key}shira_weight": padded}
    config = {
        "peft_type": "SHIRA",
        "r": r,
        # A regular expression, since the names of a list also match modules whose names end in them.
        "target_modules": "|".join(re.escape(n.removesuffix(".weight")) for n in parts),
        "mask_type": "random",
        "random_seed": 0,
        "fan_in_fan_out": False,
        "init_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "task_type": None,
        "base_model_name_or_path": delta.metadata.get("base_model"),
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    warn_of_low_terms(delta, "SHiRA")
    folder = Path(directory)
    make_folder(folder)
    write_text(folder / ADAPTER_CONFIG, text)
    write_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt"})


def _check_linear(parts: Mapping[str, CSRMask], base: Model | None) -> None:
    """ValueError, naming the tensor, unless all are weights of linear layers, as far as that is known."""
    if not parts:
        raise ValueError("the delta has no entries: a SHiRA adapter needs at least one layer")
    shapes = {} if base is None else {n: t.shape for n, t in all_tensors(base, "base").items()}
    modules = dict(unwrapped(base).named_modules(remove_duplicate=False)) if isinstance(base, nn.Module) else {}
    for name, one in parts.items():
        shape, module = one.shapes[0], name.removesuffix(".weight")
        if module == name or len(shape) != 2:
            raise ValueError(f"{name!r} of shape {list(shape)} is not the weight of a linear layer, as SHiRA needs it")
        if base is not None and shapes.get(name) != shape:
            found = f"of shape {list(shapes[name])}" if name in shapes else "missing"
            raise ValueError(f"{name!r} is {found} in base, the delta was made for {list(shape)}")
        if modules and not isinstance(modules[module], nn.Linear):
            kind = type(modules[module]).__name__
            raise ValueError(f"{name!r} is the weight of a module of class {kind}, a SHiRA adapter is for nn.Linear")


def _smallest_rank(parts: Mapping[str, CSRMask]) -> int:
    """The smallest r for which each layer's entries are at most r * (in + out)."""
    ranks = {n: -(-one.nnz // sum(one.shapes[0])) for n, one in parts.items()}
    largest = max(ranks, key=lambda n: ranks[n])
    for name, one in parts.items():
        if (needed := ranks[largest] * sum(one.shapes[0])) > one.numel:
            raise ValueError(
                f"SHiRA has the same r in all layers: the {parts[largest].nnz} entries of {largest!r} need r = "
                f"{ranks[largest]}, with which {name!r} of shape {list(one.shapes[0])} would have {needed} entries, "
                f"more than its {one.numel} elements"
            )
    return ranks[largest]


def _filled_up(one: CSRMask, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices int32 [2, count] and values float32 [count]: the entries, and the first other positions with -0.0."""
    flat = one.flat_indices()
    # Of the first `count` positions at least count - nnz are free.
    free = torch.ones(count, dtype=torch.bool, device="cpu")
    free[flat[flat < count]] = False
    index, order = torch.cat([flat, free.nonzero().view(-1)[: count - one.nnz]]).sort()
    padded = torch.cat([values, torch.full((count - one.nnz,), -0.0, device="cpu")])[order]
    rows, columns = index // one.shapes[0][1], index % one.shapes[0][1]
    return torch.stack([rows, columns]).to(torch.int32), padded
