"""Atomic file writes, and reading with errors that name the file."""

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
    """`with replaced(path) as partial:` the file written at `partial` becomes `path` at the end, atomically and synced.

    After a crash, a kill or an error (a full disk) the old file is unchanged. Of several concurrent writers the last
    one wins. If `path` is a symbolic link, its target is written.

    Raises:
        OSError: the file cannot be written; its name is in the message.
    """
    path = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    remove_abandoned(path.parent, escape(path.name))
    # A folder, since safetensors makes temporary files beside the file.
    folder = path.with_name(f".{path.name}.{machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}{_ENDING}")
    try:
        folder.mkdir()
        partial = folder / path.name
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except SafetensorError as error:  # safetensors wraps OSError
        raise OSError(f"{path} cannot be written: {error}") from error
    except OSError as error:
        named = type(error)(f"{path} cannot be written: {error.strerror or error}")
        named.errno = error.errno
        raise named from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def machine() -> str:
    """The scope of a process id: a hash of the host, its last boot, and the process namespace (of a container)."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # Linux only
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Delete the temporary folders of killed writers of files with this name, or of all files in a folder: those of
    this machine, and those of others that are older than a day.
    """
    with suppress(OSError):
        for partial in folder.glob(f".{name}.*{_ENDING}"):
            owner = re.fullmatch(r".*\.([0-9a-f]{12})-(\d+)-[0-9a-f]{8}", partial.name[: -len(_ENDING)])
            if owner is None:
                continue
            here = owner[1] == machine()
            if not _is_running(int(owner[2])) if here else time.time() - partial.stat().st_mtime > _DAY:
                shutil.rmtree(partial, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # of another user
        return True
    return True


def make_folder(path: Path) -> None:
    """Make a folder and its parents; OSError, naming the path, where that fails."""
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file, where a folder is needed")
    path.mkdir(parents=True, exist_ok=True)


def _sync_folder(folder: Path) -> None:
    """Write a new name to the disk."""
    with suppress(OSError):  # not every system can open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8, by `replaced`."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write JSON, by `replaced`. TypeError, before any file is changed, for values that JSON cannot represent."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, by `replaced`."""
    with replaced(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(dict(tensors), partial, metadata=dict(metadata))
        partial.chmod(mode)  # safetensors makes the file readable for its owner only


def read_json(path: str | os.PathLike) -> Any:
    """Read JSON. FileNotFoundError where there is no such file; ValueError, naming the file, where it is not JSON."""
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path} is not readable JSON: {error}") from error


def parse_json(text: str) -> Any:
    """`json.loads`, with a ValueError also for text that is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@contextmanager
def reading(path: str | os.PathLike, kind: str) -> Iterator[None]:
    """`with reading(path, "mask file"):` an error that damaged content causes becomes a ValueError that names the file.

    An OSError (the file is missing, its disk fails) is raised as it is.
    """
    if not Path(path).is_dir():
        open(path, "rb").close()  # safetensors reports every OSError as a missing file
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of safetensors, torch.load, and of the code that uses their results
        fault = f"{error}" if isinstance(error, (ValueError, SafetensorError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} is not a readable {kind}: {fault}") from error
