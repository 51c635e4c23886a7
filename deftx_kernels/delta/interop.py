"""Files and matrices of other libraries: composable-sft, PEFT's SHiRA, and CSR matrices of torch, SciPy and CuPy."""

import errno
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from deftx_kernels.delta.models import Model
from deftx_kernels.delta.sparse_delta import SparseDelta
from deftx_kernels.delta.storage import check_files
from deftx_kernels.files import make_folder, read_json, reading, replaced
from deftx_kernels.mask import CSRMask, column_dtype, rows_and_columns
from deftx_kernels.validation import all_tensors, check_plain, check_readable

__all__ = [
    "SFT_NAME",
    "SHIRA_CONFIG",
    "SHIRA_WEIGHTS",
    "from_composable_sft",
    "from_csr",
    "from_peft_shira",
    "to_composable_sft",
    "to_cupy_csr",
    "to_scipy_csr",
]

SFT_NAME = "pytorch_diff.bin"
SHIRA_WEIGHTS, SHIRA_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Rows of the tensors of a composable-sft file, besides one for each of its bytes: a row takes 8 bytes of memory.
_MAX_ROWS = 1 << 25

_INTEGERS = {torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64, torch.int64}

Entries = tuple[torch.Size, Tensor, Tensor]  # a tensor's shape, row-major flat indices int64 [n], and values [n]


def _from_entries(tensors: Mapping[str, Entries]) -> tuple[CSRMask, Tensor]:
    """Mask and compact float32 values. Values of one index are added up."""
    names = sorted(tensors)
    shapes = [tensors[n][0] for n in names]
    CSRMask.check_layout(names, shapes)
    indices, values, start = [], [], 0
    for name, shape in zip(names, shapes):
        flat, position = torch.unique(tensors[name][1], return_inverse=True)
        sums = torch.zeros(len(flat), dtype=torch.float32, device="cpu")
        values.append(sums.index_add_(0, position, tensors[name][2].to(torch.float32)))
        indices.append(flat + start)
        start += shape.numel()
    return CSRMask.from_flat_indices(names, shapes, torch.cat(indices)), torch.cat(values)


# ---- composable-sft (Ansell et al. 2022) ----
def from_composable_sft(directory: str | os.PathLike) -> SparseDelta:
    """Read `pytorch_diff.bin` of the composable-sft library.

    Raises:
        FileNotFoundError: the folder holds no such file.
        ValueError: it is damaged, or of the format before 2022 ('body' and 'head'); the message names it.
    """
    path = Path(directory) / SFT_NAME
    check_files(path.parent, SFT_NAME)
    with reading(path, "composable-sft file"):
        content = _load_sft(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if "body" in content or "head" in content:
            raise ValueError(
                "it is of the oldest format ('body', 'head'): load and save it with composable-sft 1.0 first"
            )
        if not content.keys() & {"diffs", "abs"}:
            raise ValueError("it has neither 'diffs' nor 'abs'")
        diffs, dense = content.get("diffs", {}), content.get("abs", {})
        if any(not isinstance(m, dict) or any(not isinstance(n, str) for n in m) for m in (diffs, dense)):
            raise ValueError("'diffs' and 'abs' must map names to tensors")
        if not diffs:
            raise ValueError("it holds no sparse differences, only full tensors")
        _check_sizes(diffs, path.stat().st_size)
        for name, tensor in dense.items():
            _check_stored(tensor, f"the full tensor {name!r}")
        mask, values = _from_entries({n: _decode_sft(n, e) for n, e in diffs.items()})
        metadata = {"method": "lt-sft", "source": "composable-sft", "k": mask.nnz}
        return SparseDelta(mask, values, {n: t.detach() for n, t in dense.items()}, metadata)


def _load_sft(path: Path) -> Any:
    """What torch.save wrote: plain objects, tensors, and the one type of NumPy scalar that the library writes."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
                raise ValueError("its parts are larger than the file")
            if damaged := archive.testzip():  # torch.load reads no checksum
                raise ValueError(f"the checksum of its part {damaged!r} is wrong")
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset before the beginning of the file
            raise ValueError("its directory of parts is damaged") from error
        raise
    # The first index is a NumPy scalar, whose pickle has the old or the new name of NumPy's module.
    allowed: list[Any] = [(_int64_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    with torch.serialization.safe_globals([*allowed, (_Int64, "numpy.dtype")]):
        return torch.load(path, map_location="cpu", weights_only=True)


class _Int64:
    """Replaces numpy.dtype while a file is read: NumPy's own makes any dtype, also of pointers or huge items."""

    def __init__(self, code: str, *_: object) -> None:
        if code != "i8":
            raise ValueError(f"it holds a NumPy scalar of dtype {code!r}, where int64 is expected")

    def __setstate__(self, state: tuple) -> None:
        if state[1] != "<":
            raise ValueError(f"it holds a NumPy scalar of byte order {state[1]!r}, where '<' is expected")


def _int64_scalar(dtype: object, data: object) -> int:
    if not isinstance(dtype, _Int64) or not isinstance(data, bytes) or len(data) != 8:
        raise ValueError("it holds a NumPy scalar that is not int64")
    return int.from_bytes(data, "little", signed=True)


def _check_sizes(diffs: Mapping[str, Any], file_size: int) -> None:
    """ValueError before memory is allocated for entries that a file of this size cannot hold."""
    steps, rows = 0, 0
    for name, encoded in diffs.items():
        if not isinstance(encoded, dict) or not {"size", "index_steps", "values"} <= encoded.keys():
            raise ValueError(f"tensor {name!r} lacks size, index_steps or values")
        if not isinstance(encoded["index_steps"], list):
            raise ValueError(f"the index_steps of tensor {name!r} are not a list")
        CSRMask.check_layout([name], [encoded["size"]])
        steps += len(encoded["index_steps"])
        rows += rows_and_columns(encoded["size"])[0]
    if steps > file_size or rows > _MAX_ROWS + file_size:
        raise ValueError(f"a file of {file_size} bytes does not hold {steps} entries of tensors with {rows} rows")


def _check_stored(tensor: Any, label: str) -> None:
    check_plain(tensor, label)
    check_readable(tensor, label)
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise ValueError(f"{label} has {tensor.numel()} elements, the file holds fewer")


def _decode_sft(name: str, encoded: Mapping[str, Any]) -> Entries:
    """The entries of one tensor. In the file's flat indices the first dimension varies fastest."""
    size, values, steps = torch.Size(encoded["size"]), encoded["values"], encoded["index_steps"]
    _check_stored(values, f"the values of tensor {name!r}")
    if not values.is_floating_point() or any(type(step) is not int for step in steps):
        raise ValueError(f"the values of tensor {name!r} must be floating point and its index_steps ints")
    flat = np.cumsum(np.asarray(steps, np.int64))
    fits = len(flat) == values.numel() and bool((flat[1:] > flat[:-1]).all())
    if not fits or (len(flat) and (flat[0] < 0 or flat[-1] >= size.numel())):
        raise ValueError(f"the indices of tensor {name!r} do not fit its size {list(size)}")
    if size:
        flat = np.ravel_multi_index(np.unravel_index(flat, tuple(size), order="F"), tuple(size))
    return size, torch.from_numpy(np.asarray(flat, np.int64)), values.detach().reshape(-1)


def to_composable_sft(delta: SparseDelta, directory: str | os.PathLike) -> None:
    """Write `pytorch_diff.bin` so that the composable-sft library reads it (atomically).

    The format has no low terms (`delta.low`): they are left out, with a UserWarning.

    Raises:
        ValueError: a tensor has more than two dimensions, which that library decodes wrongly.
        OSError: `directory` is a file, or the file cannot be written; the message names it.
    """
    diffs = {}
    for name, values in delta.mask.split(delta.values).items():
        one = delta.mask[name].to("cpu")
        shape = one.shapes[0]
        if len(shape) > 2:
            raise ValueError(f"tensor {name!r} has {len(shape)} dimensions; composable-sft's format has at most 2")
        rows = rows_and_columns(shape)[0]
        row = torch.repeat_interleave(torch.arange(rows, device="cpu"), one.crow_indices.diff())
        flat, order = (one.col_indices.to(torch.int64) * rows + row).sort()
        steps = flat.diff(prepend=flat.new_zeros(1)).tolist()
        diffs[name] = {"size": shape, "index_steps": steps, "values": values.cpu()[order]}
    content: dict[str, Any] = {"diffs": diffs}
    if delta.dense:
        content["abs"] = {n: t.detach().cpu().clone() for n, t in delta.dense.items()}
    if delta.low is not None:
        warnings.warn(
            f"composable-sft's format has no low terms: those of {len(delta.low[0])} of {delta.mask.nnz} entries are "
            "left out, so base + delta is not the tuned tensor bit for bit there",
            UserWarning,
            stacklevel=2,
        )
    folder = Path(directory)
    make_folder(folder)
    with replaced(folder / SFT_NAME) as partial, open(partial, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # raised by torch.save while it handles an OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


# ---- PEFT SHiRA ----
def from_peft_shira(directory: str | os.PathLike, base: Model | None = None) -> SparseDelta:
    """Read a SHiRA adapter that PEFT saved, as the differences of its modules' weights (PEFT's scaling is 1).

    Args:
        base: the base model or its tensors, for the shapes of the weights. The file holds only r * (in + out) = nnz;
            without `base` a weight is taken to be square if that agrees with r and with the largest indices.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: it is damaged or not a SHiRA adapter, or a weight's shape is unknown without `base`.
    """
    folder = Path(directory)
    check_files(folder, SHIRA_CONFIG, SHIRA_WEIGHTS)
    config = read_json(folder / SHIRA_CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "SHIRA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{folder / SHIRA_CONFIG} is of a PEFT adapter of type {found!r}, not SHIRA")
    r, model = config.get("r"), config.get("base_model_name_or_path")
    if type(r) is not int or r < 1 or not isinstance(model, str | None):
        raise ValueError(f"{folder / SHIRA_CONFIG}: r must be an int from 1 and base_model_name_or_path a string")
    shapes = {} if base is None else {n: t.shape for n, t in all_tensors(base, "base").items()}
    with reading(folder / SHIRA_WEIGHTS, "SHiRA adapter"):
        tensors = load_file(folder / SHIRA_WEIGHTS)
        differences: dict[str, Entries] = {}
        dense: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            name = key.removeprefix("base_model.model.")
            if name.endswith(".shira_indices"):
                continue
            module = name.removesuffix(".shira_weight")
            target = name if module == name else f"{module}.weight"
            if target in dense or target in differences:
                raise ValueError(f"it holds {target!r} twice")
            if module == name:
                dense[name] = tensor  # modules_to_save, such as a head
            else:
                index = tensors.get(key.removesuffix("weight") + "indices")
                differences[target] = _decode_shira(module, tensor, index, r, shapes.get(target))
        if not differences:
            raise ValueError("it holds no shira_weight")
        mask, values = _from_entries(differences)
        metadata = {"method": "shira", "source": "peft", "k": mask.nnz, "base_model": model}
        return SparseDelta(mask, values, dense, metadata)


def _decode_shira(module: str, values: Tensor, index: Tensor | None, r: int, size: torch.Size | None) -> Entries:
    """The entries of one module's weight."""
    vector = values.dim() == 1 and values.is_floating_point()
    if index is None or index.dtype not in _INTEGERS or not vector or index.shape != (2, len(values)):
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
    return size, rows * size[1] + columns, values


# ---- CSR matrices ----
def from_csr(matrices: Mapping[str, Any]) -> tuple[CSRMask, Tensor]:
    """Mask and compact values of CSR matrices of torch, SciPy or CuPy, all of one library and on one device.

    Raises:
        TypeError: something is not a CSR matrix.
        ValueError: columns are out of range or occur twice in a row (SciPy: `sum_duplicates()` first).
    """
    names = sorted(matrices)
    if not names:
        raise ValueError("matrices: at least one is needed")
    shapes, counts, columns, values = [], [], [], []
    for name in names:
        crow, col, data, shape = _csr_parts(name, matrices[name])
        if bool(((col < 0) | (col >= shape[1])).any()):
            raise ValueError(f"matrices[{name!r}] has a column outside [0, {shape[1]})")
        row = torch.repeat_interleave(torch.arange(shape[0], device=crow.device), crow.diff())
        order = torch.argsort(row * shape[1] + col)
        shapes.append(shape)
        counts.append(crow.diff())
        columns.append(col[order])
        values.append(data[order])
    crow = torch.cat([counts[0].new_zeros(1), *counts]).cumsum(0)
    return CSRMask(names, shapes, crow, torch.cat(columns).to(column_dtype(shapes))), torch.cat(values)


def _csr_parts(name: str, matrix: Any) -> tuple[Tensor, Tensor, Tensor, torch.Size]:
    """crow_indices, col_indices (int64), values and shape of a CSR matrix of any of the libraries."""
    if isinstance(matrix, Tensor):
        if matrix.layout != torch.sparse_csr or matrix.dim() != 2:
            raise TypeError(f"matrices[{name!r}] must be a 2-D sparse CSR tensor, got layout {matrix.layout}")
        return matrix.crow_indices().long(), matrix.col_indices().long(), matrix.values(), matrix.shape
    if getattr(matrix, "format", None) != "csr":
        raise TypeError(f"matrices[{name!r}] must be a CSR matrix of torch, SciPy or CuPy, got {type(matrix).__name__}")
    arrays = (matrix.indptr, matrix.indices, matrix.data)
    # Neither copies: torch.as_tensor takes CuPy arrays through their array interface.
    crow, col, data = (torch.from_numpy(a) if isinstance(a, np.ndarray) else torch.as_tensor(a) for a in arrays)
    return crow.long(), col.long(), data, torch.Size(matrix.shape)


def to_scipy_csr(mask: CSRMask, name: str, compact: Tensor) -> Any:
    """One tensor's entries, with values from `compact` [mask.nnz], as a scipy.sparse.csr_matrix."""
    from scipy.sparse import csr_matrix

    one, values = mask[name].to("cpu"), mask.part(name, compact).detach().cpu()
    arrays = (values.numpy(), one.col_indices.to(torch.int64).numpy(), one.crow_indices.numpy())
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
