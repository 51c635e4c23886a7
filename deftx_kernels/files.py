"""Files that are written whole or not at all, and read with errors that name them."""

import json
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_ENDING = ".partial"


@contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """`with replaced(path) as partial:` what is written to `partial` becomes `path` at the end, in one step and on the disk.

    A crash, a kill or a full disk leaves the old file; several writers do not disturb one another, the last one wins.

    Raises:
        OSError: the file cannot be written; its name is in the message.
    """
    path = Path(path)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.{_owner()}-{uuid.uuid4().hex[:8]}{_ENDING}")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except SafetensorError as error:  # what safetensors makes of an error of the disk
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        named = type(error)(f"{path} cannot be written: {error.strerror or error}")
        named.errno = error.errno
        raise named from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _owner() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _remove_abandoned(path: Path) -> None:
    """Delete what writers of `path` left that were killed on this machine."""
    with suppress(OSError):
        for partial in path.parent.glob(f".{escape(path.name)}.{socket.gethostname()}-*{_ENDING}"):
            process = partial.name.removesuffix(_ENDING).split("-")[-2]
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                partial.unlink(missing_ok=True)
            except (OSError, ValueError):  # of another user; no name of ours
                continue


def _sync_folder(folder: Path) -> None:
    """A new name on the disk; not every system lets a folder be opened."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8, as `replaced` does."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON, as `replaced` does. What JSON cannot hold is refused before any file is touched."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, as `replaced` does."""
    with replaced(path) as partial:
        save_file(dict(tensors), partial, metadata=dict(metadata))


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path} is not readable JSON: {error}") from error
