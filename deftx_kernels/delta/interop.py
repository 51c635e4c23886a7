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
from safetensors import safe_open
from torch import Tensor, nn

from deftx_kernels.delta.sparse_delta import SparseDelta
from deftx_kernels.files import make_folder, read_json, reading, replaced
from deftx_kernels.mask import CSRMask
from deftx_kernels.ops.schemas import column_dtype, rows_and_columns
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


# ---- composable-sft (Ansell et al. 2022) ----
_MAX_ROWS = 1 << 25  # of a file's tensors, beside one for each of its bytes: 8 bytes each are taken


def from_composable_sft(directory: str | os.PathLike) -> SparseDelta:
    """Read `pytorch_diff.bin` of the composable-sft library.

    Raises:
        FileNotFoundError: the folder holds no such file.
        ValueError: it is damaged, or of the format before 2022 ('body' and 'head'); the message names it.
    """
    path = Path(directory) / SFT_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{directory} holds no {SFT_NAME}")
    with reading(path, "composable-sft file"):
        content = _load_sft(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
        if "body" in content or "head" in content:
            raise ValueError(
                "it is of the oldest format ('body', 'head'): load and save it with composable-sft 1.0 first"
            )
        if not content.keys() & {"diffs", "abs"}:
            raise ValueError("neither 'diffs' nor 'abs' is in it")
        diffs, dense = content.get("diffs", {}), content.get("abs", {})
        if (
            not isinstance(diffs, dict)
            or not isinstance(dense, dict)
            or not all(isinstance(n, str) for n in (*diffs, *dense))
        ):
            raise ValueError("'diffs' and 'abs' must map names to tensors")
        if not diffs:
            raise ValueError("it holds no sparse differences, only full tensors")
        _check_sizes(diffs, path.stat().st_size)
        for name, tensor in dense.items():
            _check_stored(tensor, f"the full tensor {name!r}")
        mask, values = _from_coordinates({n: _decode_sft(n, e) for n, e in diffs.items()})
        facts = {"method": "lt-sft", "source": "composable-sft", "k": mask.nnz}
        return SparseDelta(mask, values, {n: t.detach() for n, t in dense.items()}, facts)


def _load_sft(path: Path) -> Any:
    """What torch.save wrote, of plain objects, tensors and the one kind of NumPy scalar that the library writes."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
                raise ValueError("its parts are larger than the file")
            if damaged := archive.testzip():  # torch.load reads no checksum
                raise ValueError(f"the checksum of its part {damaged!r} is wrong")
    except OSError as error:
        if error.errno == errno.EINVAL:  # it points to places before its beginning
            raise ValueError("its directory of parts is damaged") from error
        raise
    # The first index is a NumPy scalar, whose pickle names NumPy's module as it was called then or is called now.
    allowed: list[Any] = [
        (_int64_scalar, "numpy.core.multiarray.scalar"),
        (_int64_scalar, "numpy._core.multiarray.scalar"),
        (_Int64, "numpy.dtype"),
    ]
    with torch.serialization.safe_globals(allowed):
        return torch.load(path, map_location="cpu", weights_only=True)


class _Int64:
    """Stands for numpy.dtype in a file: NumPy's own would make any dtype, also of pointers and of gigabytes."""

    def __init__(self, code: str, *_: object) -> None:
        if code != "i8":
            raise ValueError(f"it holds a NumPy scalar of dtype {code!r}, where int64 is expected")

    def __setstate__(self, state: tuple) -> None:
        if state[1] != "<":
            raise ValueError(f"it holds a NumPy scalar of byte order {state[1]!r}, where '<' is expected")


def _int64_scalar(dtype: object, data: object) -> int:
    if not isinstance(dtype, _Int64) or not isinstance(data, bytes) or len(data) != 8:
        raise ValueError("it holds a NumPy scalar that is no int64")
    return int.from_bytes(data, "little", signed=True)


def _check_sizes(diffs: Mapping[str, Any], file_size: int) -> None:
    """ValueError before memory is taken for what the file only claims to hold."""
    steps, rows = 0, 0
    for name, encoded in diffs.items():
        if not isinstance(encoded, dict) or not {"size", "index_steps", "values"} <= encoded.keys():
            raise ValueError(f"tensor {name!r} lacks size, index_steps or values")
        if not isinstance(encoded["index_steps"], list):
            raise ValueError(f"the index_steps of tensor {name!r} are no list")
        CSRMask.check_layout([name], [encoded["size"]])
        steps += len(encoded["index_steps"])
        rows += rows_and_columns(encoded["size"])[0]
    if steps > file_size or rows > _MAX_ROWS + file_size:
        raise ValueError(f"a file of {file_size} bytes does not hold {steps} entries of tensors with {rows} rows")


def _check_stored(tensor: object, label: str) -> None:
    check_plain(tensor, label)
    assert isinstance(tensor, Tensor)
    check_readable(tensor, label)
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise ValueError(f"{label} has {tensor.numel()} elements, the file holds fewer")


def _decode_sft(name: str, encoded: Mapping[str, Any]) -> tuple[torch.Size, Tensor, Tensor]:
    """Shape, row-major flat indices and values of one tensor. The file counts with the first dimension running fastest."""
    size, values, listed = torch.Size(encoded["size"]), encoded["values"], encoded["index_steps"]
    _check_stored(values, f"the values of tensor {name!r}")
    if not values.is_floating_point() or any(type(step) is not int for step in listed):
        raise ValueError(f"the values of tensor {name!r} must be floating point and its index_steps ints")
    flat = np.cumsum(np.asarray(listed, np.int64))
    fits = len(flat) == values.numel() and bool((flat[1:] > flat[:-1]).all())
    if not fits or (len(flat) and (flat[0] < 0 or flat[-1] >= size.numel())):
        raise ValueError(f"the indices of tensor {name!r} do not fit its size {list(size)}")
    coordinates = np.unravel_index(flat, tuple(size), order="F") if size else (flat,)
    rowmajor = np.ravel_multi_index(coordinates, tuple(size)) if size else flat
    return size, torch.from_numpy(np.asarray(rowmajor, np.int64)), values.detach().reshape(-1)


def to_composable_sft(delta: SparseDelta, directory: str | os.PathLike) -> None:
    """Write `pytorch_diff.bin` so that the composable-sft library reads it (atomically).

    The format has no second terms (`delta.low`): they are left out, with a UserWarning.

    Raises:
        ValueError: a tensor has more than two dimensions, which that library decodes wrongly.
        OSError: `directory` is a file, or the file cannot be written; the message names it.
    """
    diffs = {}
    values = delta.mask.split(delta.values)
    for name, shape in zip(delta.mask.names, delta.mask.shapes):
        if len(shape) > 2:
            raise ValueError(f"tensor {name!r} has {len(shape)} dimensions; composable-sft's format carries at most 2")
        keys = delta.mask[name].flat_indices().cpu().numpy()
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
    if delta.low is not None:
        warnings.warn(
            f"composable-sft's format has no second terms: those of {len(delta.low[0])} of {delta.mask.nnz} entries are left out, "
            "so base + delta is not the tuned tensor bit for bit there",
            UserWarning,
            stacklevel=2,
        )
    folder = Path(directory)
    make_folder(folder)
    with replaced(folder / SFT_NAME) as partial, open(partial, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of what torch.save does after an error of the disk
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


# ---- PEFT SHiRA ----
def from_peft_shira(directory: str | os.PathLike, base: nn.Module | Mapping[str, Tensor] | None = None) -> SparseDelta:
    """Read a SHiRA adapter that PEFT saved, as the differences of its modules' weights (PEFT's scaling is 1).

    Args:
        base: the base model or its tensors, for the shapes of the weights. The file holds only r * (in + out) = nnz;
            without `base` a weight is taken to be square where that agrees with r and with the largest indices.

    Raises:
        FileNotFoundError: a file of the adapter is missing.
        ValueError: it is damaged, no SHiRA adapter, or a weight's shape cannot be told without `base`.
    """
    folder = Path(directory)
    for name in (SHIRA_CONFIG, SHIRA_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}")
    config = read_json(folder / SHIRA_CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "SHIRA":
        found = config.get("peft_type") if isinstance(config, dict) else config
        raise ValueError(f"{folder / SHIRA_CONFIG} is of a PEFT adapter of type {found!r}, not SHIRA")
    r, model = config.get("r"), config.get("base_model_name_or_path")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1 or not isinstance(model, str | None):
        raise ValueError(f"{folder / SHIRA_CONFIG}: r must be an int from 1 and base_model_name_or_path a string")
    shapes = {} if base is None else {n: t.shape for n, t in all_tensors(base, "base").items()}
    with reading(folder / SHIRA_WEIGHTS, "SHiRA adapter"):
        with safe_open(folder / SHIRA_WEIGHTS, framework="pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (a safe_open is no mapping)
        differences: dict[str, tuple[torch.Size, Tensor, Tensor]] = {}
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
        mask, values = _from_coordinates(differences)
        facts = {"method": "shira", "source": "peft", "k": mask.nnz, "base_model": model}
        return SparseDelta(mask, values, dense, facts)


def _decode_shira(
    module: str, values: Tensor, index: Tensor | None, r: int, size: torch.Size | None
) -> tuple[torch.Size, Tensor, Tensor]:
    """Shape, row-major flat indices and values of one module's weight."""
    whole = index is not None and not index.is_floating_point() and not index.is_complex() and index.dtype != torch.bool
    if (
        index is None
        or not whole
        or values.dim() != 1
        or index.shape != (2, len(values))
        or not values.is_floating_point()
    ):
        raise ValueError(
            f"the indices of {module!r} are missing or do not fit its values of shape {list(values.shape)}"
        )
    rows, columns = index.to(torch.int64)
    if size is None:
        side, rest = divmod(len(rows), 2 * r)
        if rest or not side or int(rows.max()) >= side or int(columns.max()) >= side:
            raise ValueError(f"the shape of {module!r} is not in a SHiRA adapter's files and is not square: give base=")
        size = torch.Size((side, side))
    if len(size) != 2:
        raise ValueError(f"the weight of {module!r} has shape {list(size)}, a SHiRA adapter is for matrices")
    if len(rows) and (
        min(int(rows.min()), int(columns.min())) < 0 or int(rows.max()) >= size[0] or int(columns.max()) >= size[1]
    ):
        raise ValueError(f"the indices of {module!r} do not fit a weight of shape {list(size)}")
    return size, rows * size[1] + columns, values


def _from_coordinates(differences: Mapping[str, tuple[torch.Size, Tensor, Tensor]]) -> tuple[CSRMask, Tensor]:
    """Mask and compact float32 values of name → (shape, row-major flat indices int64 [n], values [n]); duplicates add
    up.
    """
    names = sorted(differences)
    keys, values, offset = [], [], 0
    for name in names:
        size, flat, value = differences[name]
        flat, place = torch.unique(flat, return_inverse=True)
        keys.append(flat + offset)
        values.append(
            torch.zeros(len(flat), dtype=torch.float32, device="cpu").index_add_(0, place, value.to(torch.float32))
        )
        offset += size.numel()
    shapes = [differences[n][0] for n in names]
    CSRMask.check_layout(names, shapes)
    return CSRMask.from_flat_indices(names, shapes, torch.cat(keys)), torch.cat(values)


# ---- CSR matrices ----
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
        return (
            matrix.crow_indices().long(),
            matrix.col_indices().long(),
            matrix.values(),
            (matrix.shape[0], matrix.shape[1]),
        )
    if getattr(matrix, "format", None) != "csr":
        raise TypeError(f"matrices[{name!r}] must be a CSR matrix of torch, SciPy or CuPy, got {type(matrix).__name__}")
    arrays = (matrix.indptr, matrix.indices, matrix.data)
    # Neither copies: torch.as_tensor takes CuPy arrays through their array interface.
    indptr, indices, data = (torch.from_numpy(a) if isinstance(a, np.ndarray) else torch.as_tensor(a) for a in arrays)
    return indptr.long(), indices.long(), data, tuple(matrix.shape)


def to_scipy_csr(mask: CSRMask, name: str, compact: Tensor) -> Any:
    """One tensor's entries, with values from `compact` [mask.nnz], as a scipy.sparse.csr_matrix."""
    from scipy.sparse import csr_matrix

    one, values = mask[name], mask.part(name, compact)
    arrays = (
        values.detach().cpu().numpy(),
        one.col_indices.cpu().to(torch.int64).numpy(),
        one.crow_indices.cpu().numpy(),
    )
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
