"""merge_into_checkpoint: a delta added to a model folder, one file at a time."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from deftx_kernels.delta.fingerprints import fingerprint
from deftx_kernels.delta.models import check_not_8_bit
from deftx_kernels.delta.renaming import fitting_prefix
from deftx_kernels.delta.sparse_delta import SparseDelta
from deftx_kernels.files import make_folder, read_json, reading, write_json, write_tensors

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MARKER = "deftx_merge.json"  # in the folder until it is complete
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


def merge_into_checkpoint(
    base: str | os.PathLike,
    delta: SparseDelta,
    output: str | os.PathLike,
    *,
    dense: bool = True,
    strict: bool = True,
    on_file: Callable[[int, int], Any] | None = None,
) -> None:
    """Write the model folder `output`: that of `base` with the delta added. Its other files are copied, and its folders
    without weights (such as a tokenizer's), but not hidden ones.

    One weight file of the base is in memory at a time. `output` can be loaded only when it is complete; after a crash,
    the same call continues with the files that are missing.

    Args:
        base: a folder with model.safetensors, or with several files and their index.
        dense: whether the delta's whole tensors replace the base's, which must have them.
        strict: as in `SparseDelta.apply_`. Without it, too, all files are checked before the first one is written.
        on_file: called with the number of weight files written, and of all, after each.

    Raises:
        FileNotFoundError: `base` has no safetensors weights, or a file is missing in it.
        FileExistsError: `output` exists and is not the unfinished result of the same base and delta.
        ValueError: the base is an unfinished merge, lacks a tensor of the delta, has it in another shape, in 8 bits, or
            (`strict`) with other values; its index names a file outside of the folder.
    """
    source, target = Path(base), Path(output)
    if (source / MARKER).is_file():
        raise ValueError(f"base {source} is an unfinished merge: the call that wrote it has to be continued first")
    shards = _shards(source)
    parts = _parts(delta, shards, dense)
    made_from = {
        "delta": delta.content_hash(),
        "dense": fingerprint(delta.dense) if dense else {},
        "base": {name: [(stat := (source / name).stat()).st_size, stat.st_mtime_ns] for name in shards},
    }
    done = _begin(target, made_from)
    for name, part in parts.items():
        tensors, _ = _read(source / name)
        check_not_8_bit(part.mask.names, tensors)
        part.check_base(tensors, strict)
    make_folder(target)
    write_json(target / MARKER, {"made_from": made_from, "done": done})
    for number, name in enumerate(shards, start=1):
        if name not in done:
            tensors, metadata = _read(source / name)
            if name in parts:
                parts[name].apply_(tensors, strict=False)
            write_tensors(target / name, tensors, metadata)
            done.append(name)
            write_json(target / MARKER, {"made_from": made_from, "done": done})
        if on_file is not None:
            on_file(number, len(shards))
    for path in _other_files(source, index=None if WEIGHTS in shards else INDEX):
        make_folder((target / path.relative_to(source)).parent)
        shutil.copyfile(path, target / path.relative_to(source))
    (target / MARKER).unlink()


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files of a model folder.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing in it.
        ValueError: the index is damaged, or names a file outside of the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"base {folder} is no folder: give a model folder")
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():  # of both, transformers reads WEIGHTS
        with reading(folder / INDEX, "index of a checkpoint"):
            names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"it names {outside[0]!r}, which is no file in its folder")
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"base {folder} has no {name}: its weights must be safetensors files")
    return names


def _shards(folder: Path) -> dict[str, list[str]]:
    """File → the names of its tensors."""
    found = {}
    for name in weight_files(folder):
        with reading(folder / name, "safetensors file"), safe_open(folder / name, "pt") as file:
            found[name] = list(file.keys())
    return found


def _parts(delta: SparseDelta, shards: dict[str, list[str]], dense: bool) -> dict[str, SparseDelta]:
    """File → the delta of its tensors. ValueError where the files lack a tensor."""
    tied, whole = delta.metadata.get("tied", {}), delta.dense if dense else {}
    found, covered = {}, set()
    for file, names in shards.items():
        first = {name: tied.get(name, name) for name in names}
        covered |= set(first.values())
        own: dict[str, str] = {}  # name in the delta → name in the file, which may have another one of tied tensors
        for name, one in first.items():
            if one in delta.mask and (one not in own or name == one):
                own[one] = name
        replaced = {name: whole[one] for name, one in first.items() if one in whole}
        if own or replaced:
            part = delta.restricted(own)
            found[file] = SparseDelta(part.mask, part.values, replaced, part.metadata, part.low)
    every = [name for names in shards.values() for name in names]
    for name in (*delta.mask.names, *whole):
        if name not in covered:
            hint = "" if name in delta.mask else "; dense=False leaves whole tensors out"
            if fitting := fitting_prefix([*delta.mask.names, *whole], every):
                hint = f": delta.{fitting[0]}({fitting[1]!r}) has the base's names"
            elif name in delta.mask and len(delta.mask[name].shapes[0]) == 3:  # from_pretrained joins experts
                hint = ": if its files have a tensor for each expert, load the model, delta.apply_(model) and save it"
            raise ValueError(f"base lacks tensor {name!r} of the delta{hint}")
    return found


def _begin(target: Path, made_from: dict) -> list[str]:
    """The files that an interrupted call has written already."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return []
    if (target / MARKER).is_file():
        marker = read_json(target / MARKER)
        if isinstance(marker, dict) and marker.get("made_from") == made_from:
            return [name for name in marker.get("done", []) if (target / name).is_file()]
    raise FileExistsError(f"output {target} exists and is not an unfinished merge of this base and delta")


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with reading(path, "safetensors file"), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def _other_files(folder: Path, index: str | None) -> Iterator[Path]:
    """All but weights and other indices than `index`, config.json last: without it the folder cannot be loaded."""
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix not in _WEIGHT_FILES]
    files = [path for path in files if path.name == index or not path.name.endswith(".index.json")]
    for inner in [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]:
        within = [path for path in inner.rglob("*") if path.is_file()]
        if not any(path.suffix in _WEIGHT_FILES for path in within):  # else a checkpoint, or another form of the model
            files += within
    return iter(sorted(files, key=lambda path: (path == folder / "config.json", path)))
