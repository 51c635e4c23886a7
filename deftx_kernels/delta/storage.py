"""The files of a SparseDelta.

`sparse_delta.safetensors` is the delta. Its header holds the configuration, with a checksum of it and of all tensors.
`sparse_delta_config.json` is a copy of the configuration, for people and for the hub. It is written first, so a process
that is killed between the two files leaves the old delta.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from deftx_kernels.delta.fingerprints import update
from deftx_kernels.files import make_folder, parse_json, reading, write_tensors, write_text

WEIGHTS_NAME = "sparse_delta.safetensors"
CONFIG_NAME = "sparse_delta_config.json"
FORMAT, VERSION = "deftx_sparse_delta", 2


def save(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write both files. TypeError or ValueError, before anything is written, for a configuration that is not JSON."""
    saved = json.loads(json.dumps({"format": FORMAT, "format_version": VERSION, **config}))  # keys become strings
    saved["content"] = checksum(saved, tensors)
    text = json.dumps(saved, indent=2, sort_keys=True) + "\n"
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
        if version != VERSION:
            age = "an older" if version < VERSION else "a newer"
            raise ValueError(f"written by {age} version of deftx-kernels, in format version {version}, not {VERSION}")
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (a safe_open is not a mapping)
        content = config.pop("content", None)
        if content != checksum(config, tensors):
            raise ValueError("its content does not have the checksum that it was saved with")
    _check_copy(folder / CONFIG_NAME, header["config"], content)
    return config, tensors


def check_files(folder: Path, *names: str) -> None:
    """FileNotFoundError unless the folder holds these files."""
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}")


def _check_copy(path: Path, text: str, content: str) -> None:
    """ValueError if the configuration file is neither a copy of `text` nor from another save."""
    with reading(path, "configuration of a sparse delta"):
        copy = path.read_text(encoding="utf-8")
        if copy == text:
            return
        found = parse_json(copy)
        if json.dumps(found, sort_keys=True) == json.dumps(parse_json(text), sort_keys=True):  # as text NaN equals NaN
            return
        if not isinstance(found, dict) or not isinstance(found.get("content"), str):
            raise ValueError("it has no checksum `content`")
        if found["content"] == content:
            raise ValueError(f"it was changed after it was saved: {WEIGHTS_NAME} holds another text")
    warnings.warn(f"{path} is of another save than {WEIGHTS_NAME}, which was read", RuntimeWarning, stacklevel=4)


def checksum(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of a configuration without its checksum, and of the tensors."""
    sha = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        update(sha, tensors[name])
    return sha.hexdigest()
