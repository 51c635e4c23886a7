"""Files of the composable-sft library (Ansell et al. 2022)."""

import errno
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deftx_kernels.delta.interop.entries import Entries, mask_and_values, warn_of_low_terms
from deftx_kernels.delta.sparse_delta import SparseDelta
from deftx_kernels.delta.storage import find_folder
from deftx_kernels.files import make_folder, reading, replaced
from deftx_kernels.mask import rows_and_columns
from deftx_kernels.validation import check_mask_layout, check_plain, check_readable

SFT_NAME = "pytorch_diff.bin"
# Rows of the tensors of a composable-sft file, besides one for each of its bytes: a row takes 8 bytes of memory.
_MAX_ROWS = 1 << 25


def from_composable_sft(directory: str | os.PathLike, revision: str | None = None) -> SparseDelta:
    """Read `pytorch_diff.bin` of the composable-sft library, from a folder or a repository of the Hugging Face hub.

    A file without sparse differences (only full tensors, such as a head) gives a delta whose mask has no tensors.

    Raises:
        FileNotFoundError: there is no such folder or repository, or it holds no such file.
        ValueError: it is damaged, or of the format before 2022 ('body' and 'head'); the message names it.
    """
    path = find_folder(directory, revision, [SFT_NAME]) / SFT_NAME
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
        if not diffs and not dense:
            raise ValueError("it holds neither sparse differences nor full tensors")
        _check_sizes(diffs, path.stat().st_size)
        for name, tensor in dense.items():
            _check_stored(tensor, f"the full tensor {name!r}")
        mask, values = mask_and_values({n: _decode_sft(n, e) for n, e in diffs.items()})
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
        check_mask_layout([name], [encoded["size"]])
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
    warn_of_low_terms(delta, "composable-sft")
    folder = Path(directory)
    make_folder(folder)
    with replaced(folder / SFT_NAME) as partial, open(partial, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # raised by torch.save while it handles an OSError
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
