"""Files and matrices of other libraries: composable-sft, PEFT's SHiRA, and CSR matrices of torch, SciPy and CuPy."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deftx_kernels._ops import rows_and_columns
from deftx_kernels.delta import SparseDelta
from deftx_kernels.mask import CSRMask

SFT_NAME = "pytorch_diff.bin"
SHIRA_WEIGHTS, SHIRA_CONFIG = "adapter_model.safetensors", "adapter_config.json"


# ---- composable-sft (Ansell et al. 2022) --------------------------------------------------------------------------------


def from_composable_sft(directory: str | os.PathLike) -> SparseDelta:
    """Read `pytorch_diff.bin` of the composable-sft library.

    Raises:
        FileNotFoundError: the folder holds no such file.
        ValueError: it is damaged, or of the format before 2022 ('body' and 'head').
    """
    path = Path(directory) / SFT_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {SFT_NAME}")
    content = _load_sft(path)
    if "body" in content or "head" in content:
        raise ValueError(f"{path} is of composable-sft's oldest format ('body', 'head'): load and save it with composable-sft 1.0 first")
    if not content.keys() & {"diffs", "abs"}:
        raise ValueError(f"{path} is no composable-sft file: neither 'diffs' nor 'abs' is in it")
    diffs, dense = content.get("diffs", {}), content.get("abs", {})
    differences = {n: _decode_sft(n, e, path) for n, e in diffs.items()}
    if not differences:
        raise ValueError(f"{path} holds no sparse differences, only full tensors")
    mask, values = _from_coordinates(differences)
    facts = {"method": "lt-sft", "source": "composable-sft", "k": mask.nnz}
    return SparseDelta(mask, values, {n: t.detach() for n, t in dense.items()}, facts)


def _load_sft(path: Path) -> dict[str, Any]:
    # The first index is a NumPy scalar, whose pickle names NumPy's module as it was called then or is called now.
    from numpy._core import multiarray

    allowed: list[Any] = [
        (multiarray.scalar, "numpy.core.multiarray.scalar"),
        (multiarray.scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        np.dtypes.Int64DType,
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no composable-sft file: it holds a {type(content).__name__}")
    return content


def _decode_sft(name: str, encoded: Mapping[str, Any], path: Path) -> tuple[torch.Size, Tensor, Tensor]:
    """Shape, row-major flat indices and values of one tensor. The file counts with the first dimension running fastest."""
    size, values = torch.Size(encoded["size"]), encoded["values"].detach().view(-1)
    steps = np.asarray(encoded["index_steps"], np.int64)
    flat = np.cumsum(steps)
    if len(flat) != len(values) or (len(flat) and (flat[0] < 0 or steps[1:].min(initial=1) < 1 or flat[-1] >= size.numel())):
        raise ValueError(f"{path}: the indices of tensor {name!r} do not fit its size {list(size)}")
    coordinates = np.unravel_index(flat, tuple(size), order="F") if size else (flat,)
    rowmajor = np.ravel_multi_index(coordinates, tuple(size)) if size else flat
    return size, torch.from_numpy(np.asarray(rowmajor, np.int64)), values


def to_composable_sft(delta: SparseDelta, directory: str | os.PathLike) -> None:
    """Write `pytorch_diff.bin` so that the composable-sft library reads it (atomically).

    Raises:
        ValueError: a tensor has more than two dimensions, which that library decodes wrongly.
    """
    diffs = {}
    values = delta.mask.split(delta.values)
    for name, shape in zip(delta.mask.names, delta.mask.shapes):
        if len(shape) > 2:
            raise ValueError(f"tensor {name!r} has {len(shape)} dimensions; composable-sft's format carries at most 2")
        keys = delta.mask[name]._keys().cpu().numpy()
        columns = rows_and_columns(shape)[1]
        # Column-major for matrices; a vector's only dimension is the column of its one row.
        flat = keys if len(shape) < 2 else (keys % columns) * shape[0] + keys // columns
        order = np.argsort(flat, kind="stable")
        steps = np.diff(flat[order], prepend=0)
        # clone: torch.save writes the whole storage behind a view
        part = values[name].cpu()[torch.from_numpy(order)].clone()
        diffs[name] = {"size": torch.Size(shape), "index_steps": [int(s) for s in steps], "values": part}
    content: dict[str, Any] = {"diffs": diffs}
    if delta.dense:
        content["abs"] = {n: t.detach().cpu().clone() for n, t in delta.dense.items()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / (SFT_NAME + ".partial")
    try:
        torch.save(content, partial)
        os.replace(partial, folder / SFT_NAME)
    finally:
        partial.unlink(missing_ok=True)


# ---- PEFT SHiRA ---------------------------------------------------------------------------------------------------------


def from_peft_shira(directory: str | os.PathLike) -> SparseDelta:
    """Read a SHiRA adapter that PEFT saved, as the differences of its modules' weights.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: it is damaged or no SHiRA adapter, or the shapes of its weights are not in it.
    """
    folder = Path(directory)
    for name in (SHIRA_CONFIG, SHIRA_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}")
    try:
        config = json.loads((folder / SHIRA_CONFIG).read_text())
        tensors = load_file(folder / SHIRA_WEIGHTS)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    if config.get("peft_type") != "SHIRA":
        raise ValueError(f"{folder} holds a PEFT adapter of type {config.get('peft_type')!r}, not SHIRA")
    return _shira_delta(folder, config, tensors)
