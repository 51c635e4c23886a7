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
from torch import Tensor, nn

from deftx_kernels._ops import column_dtype, rows_and_columns
from deftx_kernels.delta import SparseDelta
from deftx_kernels.functional import named_tensors
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
        raise ValueError(
            f"{path} is of composable-sft's oldest format ('body', 'head'): load and save it with composable-sft 1.0 first"
        )
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
        diffs[name] = {"size": torch.Size(shape), "index_steps": steps.tolist(), "values": part}
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


def from_peft_shira(directory: str | os.PathLike, base: nn.Module | Mapping[str, Tensor] | None = None) -> SparseDelta:
    """Read a SHiRA adapter that PEFT saved, as the differences of its modules' weights (PEFT's scaling is 1).

    Args:
        base: the base model or its tensors, for the shapes of the weights. The file holds only r * (in + out) = nnz; without `base`
            a weight is taken to be square where that agrees with r and with the largest indices.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: it is damaged, no SHiRA adapter, or a weight's shape cannot be told without `base`.
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
    shapes = {} if base is None else {n: t.shape for n, t in named_tensors(base, "base").items()}
    differences, dense = {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if key.endswith(".shira_weight"):
            module = name.removesuffix(".shira_weight")
            index = tensors.get(key.removesuffix("weight") + "indices")
            if index is None or index.shape != (2, len(tensor)):
                raise ValueError(f"{folder}: the indices of {module!r} are missing or do not fit its {len(tensor)} values")
            rows, columns = index.to(torch.int64)
            size = shapes.get(f"{module}.weight") or _shira_shape(module, rows, columns, config["r"])
            if len(tensor) and (int(index.min()) < 0 or int(rows.max()) >= size[0] or int(columns.max()) >= size[1]):
                raise ValueError(f"{folder}: the indices of {module!r} do not fit a weight of shape {list(size)}")
            differences[f"{module}.weight"] = (size, rows * size[1] + columns, tensor)
        elif not key.endswith(".shira_indices"):
            dense[name] = tensor  # modules_to_save, such as a head
    if not differences:
        raise ValueError(f"{folder} holds no shira_weight")
    mask, values = _from_coordinates(differences)
    facts = {"method": "shira", "source": "peft", "k": mask.nnz, "base_model": config.get("base_model_name_or_path")}
    return SparseDelta(mask, values, dense, facts)


def _shira_shape(module: str, rows: Tensor, columns: Tensor, r: int) -> torch.Size:
    side, rest = divmod(len(rows), 2 * r)
    if rest or int(rows.max()) >= side or int(columns.max()) >= side:
        raise ValueError(f"the shape of {module!r} is not in a SHiRA adapter's files and is not square: give base=")
    return torch.Size((side, side))


def _from_coordinates(differences: Mapping[str, tuple[torch.Size, Tensor, Tensor]]) -> tuple[CSRMask, Tensor]:
    """Mask and compact float32 values of name → (shape, row-major flat indices int64 [n], values [n]); duplicates add up."""
    names = sorted(differences)
    keys, values, offset = [], [], 0
    for name in names:
        size, flat, value = differences[name]
        flat, place = torch.unique(flat, return_inverse=True)
        keys.append(flat + offset)
        values.append(torch.zeros(len(flat), dtype=torch.float32).index_add_(0, place, value.to(torch.float32)))
        offset += size.numel()
    shapes = [differences[n][0] for n in names]
    CSRMask.check_layout(names, shapes)
    return CSRMask._from_keys(names, shapes, torch.cat(keys)), torch.cat(values)


# ---- CSR matrices -------------------------------------------------------------------------------------------------------


def from_csr(matrices: Mapping[str, Any]) -> tuple[CSRMask, Tensor]:
    """Mask and compact values of CSR matrices of torch, SciPy or CuPy, all of one library and on one device.

    Raises:
        TypeError: something is not a CSR matrix.
        ValueError: columns are out of range or occur twice in a row (SciPy: `sum_duplicates()` first).
    """
    names = sorted(matrices)
    shapes, crow, cols, values = [], [], [], []
    for name in names:
        c, j, v, shape = _csr_parts(name, matrices[name])
        order = torch.argsort(torch.repeat_interleave(torch.arange(shape[0], device=c.device), c.diff()) * shape[1] + j)
        shapes.append(torch.Size(shape))
        crow.append(c.diff())
        cols.append(j[order])
        values.append(v[order])
    if not names:
        raise ValueError("matrices: at least one is needed")
    starts = torch.cat([crow[0].new_zeros(1), *crow]).cumsum(0)
    return CSRMask(names, shapes, starts, torch.cat(cols).to(column_dtype(shapes))), torch.cat(values)


def _csr_parts(name: str, matrix: Any) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """crow_indices, col_indices (int64), values and shape of a CSR matrix of any of the libraries."""
    if isinstance(matrix, Tensor):
        if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
            raise TypeError(f"matrices[{name!r}] must be a 2-D sparse CSR tensor, got layout {matrix.layout}")
        return matrix.crow_indices().long(), matrix.col_indices().long(), matrix.values(), (matrix.shape[0], matrix.shape[1])
    if getattr(matrix, "format", None) != "csr":
        raise TypeError(f"matrices[{name!r}] must be a CSR matrix of torch, SciPy or CuPy, got {type(matrix).__name__}")
    # torch.as_tensor takes NumPy arrays, and CuPy ones through their array interface, without a copy.
    indptr, indices, data = (torch.as_tensor(a) for a in (matrix.indptr, matrix.indices, matrix.data))
    return indptr.long(), indices.long(), data, tuple(matrix.shape)


def to_scipy_csr(mask: CSRMask, name: str, compact: Tensor) -> Any:
    """One tensor's entries, with values from `compact` [mask.nnz], as a scipy.sparse.csr_matrix."""
    from scipy.sparse import csr_matrix

    one, values = mask[name], mask.part(name, compact)
    arrays = (values.detach().cpu().numpy(), one.col_indices.cpu().to(torch.int64).numpy(), one.crow_indices.cpu().numpy())
    return csr_matrix(arrays, shape=rows_and_columns(one.shapes[0]))


def to_cupy_csr(mask: CSRMask, name: str, compact: Tensor) -> Any:
    """The same as a cupyx.scipy.sparse.csr_matrix, sharing the values' memory on the GPU.

    Raises:
        ValueError: the mask is not on a CUDA device.
    """
    if mask.device.type != "cuda":
        raise ValueError(f"mask must be on a CUDA device, it is on {mask.device}")
    import cupy
    from cupyx.scipy.sparse import csr_matrix

    one, values = mask[name], mask.part(name, compact)
    arrays = (values.detach(), one.col_indices.to(torch.int32), one.crow_indices.to(torch.int32))
    return csr_matrix(tuple(cupy.asarray(a) for a in arrays), shape=rows_and_columns(one.shapes[0]))
