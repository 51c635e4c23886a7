"""Files that are written whole or not at all, and read with errors that name them."""

import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from glob import escape
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

_ENDING = ".partial"
_DAY = 86_400  # seconds


@contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """`with replaced(path) as partial:` what is written to `partial` becomes `path` at the end, in one step and on the
    disk.

    A crash, a kill or a full disk leaves the old file; several writers do not disturb one another, the last one wins.
    Of a symbolic link the target is written.

    Raises:
        OSError: the file cannot be written; its name is in the message.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    _remove_abandoned(path)
    # A folder, since a writer may make temporary files of its own beside the file: safetensors does.
    folder = path.with_name(f".{path.name}.{machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{_ENDING}")
    try:
        folder.mkdir()
        partial = folder / path.name
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
        shutil.rmtree(folder, ignore_errors=True)


@cache
def machine() -> str:
    """Where a process has this id: a hash of the host, its last start, and the namespace of its processes (of a
    container).
    """
    facts = [socket.gethostname()]
    with suppress(OSError):  # of Linux only
        facts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _remove_abandoned(path: Path) -> None:
    """Delete what writers of `path` left that were killed: here, or more than a day ago elsewhere."""
    with suppress(OSError):
        for partial in path.parent.glob(f".{escape(path.name)}.*{_ENDING}"):
            owner = re.fullmatch(
                rf"([0-9a-f]{{12}})-(\d+)-[0-9a-f]{{8}}{re.escape(_ENDING)}", partial.name[len(path.name) + 2 :]
            )
            if owner and (
                _is_gone(int(owner[2])) if owner[1] == machine() else time.time() - partial.stat().st_mtime > _DAY
            ):
                shutil.rmtree(partial, ignore_errors=True)


def _is_gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:  # of another user
        return False
    return False


def make_folder(path: Path) -> None:
    """Make a folder, with those above it; OSError naming the path where that cannot be."""
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file, where a folder is needed")
    path.mkdir(parents=True, exist_ok=True)


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
        partial.touch()
        mode = partial.stat().st_mode
        save_file(dict(tensors), partial, metadata=dict(metadata))
        partial.chmod(mode)  # safetensors writes a file that only its owner can read


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON; the message names the file.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path} is not readable JSON: {error}") from error


def parse_json(text: str) -> Any:
    """`json.loads`, with a ValueError also for what is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextmanager
def reading(path: str | os.PathLike, kind: str) -> Iterator[None]:
    """`with reading(path, "mask file"):` whatever damaged or hostile content raises there becomes a ValueError that
    names the file.

    What the system says of the file itself (an OSError: it is missing, its disk fails) passes.
    """
    if not Path(path).is_dir():
        with open(path, "rb"):  # safetensors calls every error of the system a missing file
            pass
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of safetensors, torch.load, and of whatever is done with what was read
        fault = f"{error}" if isinstance(error, (ValueError, SafetensorError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is no readable {kind}: {fault}") from error
