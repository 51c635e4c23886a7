"""The files of a SparseDelta, and folders that are on the disk or on the Hugging Face hub.

`sparse_delta.safetensors` is the delta. Its header holds the configuration, with a checksum of it and of all tensors.
`sparse_delta_config.json` is a copy of the configuration, for people and for the hub. It is written first, so a process
that is killed between the two files leaves the old delta.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from deftx_kernels.delta.fingerprints import update
from deftx_kernels.files import make_folder, parse_json, reading, write_tensors, write_text

WEIGHTS_NAME = "sparse_delta.safetensors"
CONFIG_NAME = "sparse_delta_config.json"
# Version 2 has crow_indices (int64) where version 3 has row_counts, and its configuration has no config_checksum.
FORMAT, VERSION, OLDEST = "deftx_sparse_delta", 3, 2


def save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write both files. TypeError or ValueError, before anything is written, for a configuration that is not JSON."""
    saved = json.loads(json.dumps({"format": FORMAT, "format_version": VERSION, **config}))  # keys become strings
    saved["content"] = checksum(saved, tensors)
    saved["config_checksum"] = checksum(saved, {})
    text = _text(saved)
    make_folder(folder)
    write_text(folder / CONFIG_NAME, text)
    write_tensors(folder / WEIGHTS_NAME, tensors, {"format": FORMAT, "config": text})


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors, on the CPU, that `save` wrote. The caller checks what they contain."""
    check_files(folder, CONFIG_NAME, WEIGHTS_NAME)
    with reading(folder / WEIGHTS_NAME, "sparse delta"), safe_open(folder / WEIGHTS_NAME, framework="pt") as file:
        header = file.metadata() or {}
        if header.get("format") != FORMAT:
            raise ValueError(f"its header lacks format = {FORMAT}")
        config = parse_json(header["config"]) if "config" in header else {"format_version": 1}
        if not isinstance(config, dict) or type(version := config.get("format_version")) is not int:
            raise ValueError("its header has no format_version")
        if not OLDEST <= version <= VERSION:
            age = "an older" if version < OLDEST else "a newer"
            raise ValueError(f"written by {age} version of deftx-kernels, in format version {version}, not {VERSION}")
        if version > 2 and not (_text(config) == header["config"] and _has_own_checksum(config)):
            raise ValueError("its configuration does not have the checksum that it was saved with")
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (a safe_open is not a mapping)
        content = config.pop("content", None)
        config.pop("config_checksum", None)
        if content != checksum(config, tensors):
            raise ValueError("its content does not have the checksum that it was saved with")
    _check_copy(folder / CONFIG_NAME, header["config"], content)
    return config, tensors


def check_files(folder: Path, *names: str) -> None:
    """FileNotFoundError unless the folder holds these files."""
    for name in names:
        if not (folder / name).is_file():
            whole = folder / "config.json"  # what transformers' save_pretrained writes, also of a sparsified model
            hint = ", but a whole model: sparse_delta(model).save_pretrained(folder) writes a delta"
            raise FileNotFoundError(f"{folder} holds no {name}{hint if whole.is_file() else ''}")


def find_folder(path: str | os.PathLike, revision: str | None, names: Sequence[str]) -> Path:
    """`local_folder`, with all these files.

    Raises:
        FileNotFoundError: neither exists, or a file is missing.
    """
    folder = local_folder(path, revision, names)
    check_files(folder, *names)
    return folder


def local_folder(path: str | os.PathLike, revision: str | None, names: Sequence[str]) -> Path:
    """The folder at `path`, or one with those of the files `names` that the repository `path` of the Hugging Face hub
    has. FileNotFoundError if neither exists.
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(str(path), revision=revision, allow_patterns=list(names)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise FileNotFoundError(
                f"{str(path)!r} is neither a folder nor a repository that can be downloaded: {error}"
            ) from error
    return folder


def row_counts(crow_indices: Tensor) -> Tensor:
    """[rows] from [rows + 1]: each row's number of entries, in the smallest of uint8, uint16 and int32."""
    counts = crow_indices.diff()
    largest = int(counts.max()) if len(counts) else 0
    return counts.to(next(d for d in (torch.uint8, torch.uint16, torch.int32) if largest <= torch.iinfo(d).max))


def crow_indices(counts: Tensor) -> Tensor:
    """The inverse of `row_counts`: int64. ValueError for another dtype or shape."""
    if counts.dtype not in (torch.uint8, torch.uint16, torch.int32) or counts.dim() != 1:
        raise ValueError(f"row_counts must be uint8, uint16 or int32 [rows], got {counts.dtype} {list(counts.shape)}")
    return torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.to(torch.int64).cumsum(0)])


def _check_copy(path: Path, text: str, content: str) -> None:
    """ValueError if the configuration file is neither a copy of `text`, up to white space, nor from another save."""
    with reading(path, "configuration of a sparse delta"):
        copy = path.read_text(encoding="utf-8")
        if copy == text:
            return
        found = parse_json(copy)
        if "".join(copy.split()) == "".join(text.split()) and _text(found) == _text(parse_json(text)):
            return
        if not isinstance(found, dict) or not isinstance(found.get("content"), str):
            raise ValueError("it has no checksum `content`")
        if found["content"] == content or not (found.get("format_version") == 2 or _has_own_checksum(found)):
            raise ValueError(f"it was changed after it was saved: {WEIGHTS_NAME} holds another text")
    warnings.warn(f"{path} is of another save than {WEIGHTS_NAME}, which was read", RuntimeWarning, stacklevel=4)


def _text(config: Any) -> str:
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _has_own_checksum(config: Mapping[str, Any]) -> bool:
    """Whether `config_checksum` is that of the rest: also a configuration without its tensors can be checked."""
    rest = {k: v for k, v in config.items() if k != "config_checksum"}
    return config.get("config_checksum") == checksum(rest, {})


def checksum(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of a configuration without its checksum, and of the tensors."""
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        update(sha, tensors[name])
    return sha.hexdigest()
