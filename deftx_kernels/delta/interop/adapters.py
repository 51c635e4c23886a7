"""The files of PEFT's adapters."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from deftx_kernels.delta.models import Model
from deftx_kernels.delta.sparse_delta import SparseDelta
from deftx_kernels.delta.storage import find_folder
from deftx_kernels.files import read_json, reading
from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import all_tensors, same_bits, tied_names

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of the names in an adapter's file
INTEGERS = {torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64}


def adapter_type(directory: str | os.PathLike) -> str:
    """The `peft_type` of the adapter in a folder, such as "LORA" or "SHIRA".

    Raises:
        FileNotFoundError: the folder holds no adapter_config.json.
        ValueError: this file is damaged.
    """
    path = Path(directory) / ADAPTER_CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{path} has no peft_type")
    return config["peft_type"]


def read_adapter(
    directory: str | os.PathLike, revision: str | None, peft_type: str
) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """The folder of an adapter (perhaps downloaded), its configuration, and its tensors by their names in the file.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file is missing.
        ValueError: a file is damaged, or the adapter is of another type.
    """
    folder = find_folder(directory, revision, [ADAPTER_CONFIG, ADAPTER_WEIGHTS])
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != peft_type:
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{path} is of a PEFT adapter of type {found!r}, not {peft_type}")
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise ValueError(f"{path}: base_model_name_or_path must be a string")
    with reading(folder / ADAPTER_WEIGHTS, "PEFT adapter"):
        return folder, config, load_file(folder / ADAPTER_WEIGHTS)


def split_by_module(
    tensors: Mapping[str, Tensor], parts: tuple[str, ...]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Module → part → tensor for the tensors that are named MODULE.PART, and name → tensor for the others: those of
    `modules_to_save`, such as a head. The base's own weights, which PEFT saves beside an adapter of embeddings, are
    left out. ValueError if a tensor would be there twice.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if ".base_layer." in name:
            continue
        part = next((p for p in parts if name.endswith(f".{p}")), None)
        module = None if part is None else name.removesuffix(f".{part}")
        found, own = (whole, name) if module is None else (modules.setdefault(module, {}), str(part))
        if own in found:
            raise ValueError(f"it holds {name!r} twice")
        found[own] = tensor
    if both := [m for m in modules if f"{m}.weight" in whole]:
        raise ValueError(f"it holds {both[0]!r} as an adapter and as a whole")
    return modules, whole


def check_values(module: str, values: Tensor | None) -> Tensor:
    """ValueError unless a module's values are a floating-point vector."""
    if values is None or values.dim() != 1 or not values.is_floating_point():
        found = "missing" if values is None else f"{values.dtype} {list(values.shape)}"
        raise ValueError(f"the values of {module!r} must be a floating-point vector, they are {found}")
    return values


def adapter_delta(
    mask: CSRMask,
    values: Tensor,  # [nnz]
    whole: dict[str, Tensor],
    method: str,
    config: Mapping[str, Any],
    base: Model | None,
) -> SparseDelta:
    """The delta of an adapter. ValueError as `_without_ties`."""
    dense, tied = _without_ties(base, mask.names, whole)
    metadata = {"method": method, "source": "peft", "k": mask.nnz, "base_model": config.get("base_model_name_or_path")}
    return SparseDelta(mask, values, dense, metadata | ({"tied": tied} if tied else {}))


def _without_ties(
    base: Model | None, adapted: Collection[str], whole: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The whole tensors, each once, and the further names of those that `base` has twice (`tied` of a delta).

    PEFT gives a saved or adapted module a tensor of its own, also where the base has this tensor in another module,
    too. ValueError if one of them alone is changed then: in the base they cannot differ.

    Args:
        adapted: names of the tensors that have sparse or low-rank differences.
        whole: name → tensor of `modules_to_save`.
    """
    tensors = {} if base is None else all_tensors(base, "base")
    groups: dict[str, list[str]] = {}
    tied: dict[str, str] = {}
    for name, first in tied_names(tensors, "base").items():
        groups.setdefault(first, []).append(name)
    whole = dict(whole)
    for first, names in [(first, names) for first, names in groups.items() if len(names) > 1]:
        own = [n for n in names if n in whole]
        changed = [n for n in names if n in adapted]
        changed += [n for n in own if not same_bits(whole[n].to(tensors[n].dtype), tensors[n])]
        if changed and not all(n in whole and same_bits(whole[n], whole[own[0]]) for n in names):
            raise ValueError(
                f"{changed[0]!r} and {next(n for n in names if n != changed[0])!r} are one tensor in base, the adapter "
                "changes one of them alone: untie them in the base first"
            )
        if own:
            whole[first] = whole[own[0]]
            tied |= {n: first for n in names if n != first}
    return {n: t for n, t in whole.items() if n not in tied}, tied
