"""A run's folder: its marker file with the settings and inputs of the run, and the lock of the process that uses it.

Of several processes that run one command, rank 0 has the lock.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from deftx_kernels.files import read_json, write_json
from deftx_kernels.train.config import to_dict
from deftx_kernels.train.processes import on_main, world_size

MARKER = "deftx_run.json"
FORMAT, FORMAT_VERSION = "deftx_run", 1
LOCK = ".lock"
RESTART_SECONDS = 60  # torchrun may start a process again before the system has removed its killed predecessor
# All that a run writes in its folder, beside seed-<number>. Nothing else there is ever deleted.
CONTENTS = ("config.json", "metrics.json", "report.md", "deltas", "phases")
FIGURES = ("scores.png", "costs.png", "spectra.png", "density.png")
# Settings that change no result (a device changes rounding, which "auto" does as well).
NOT_COMPARED = ("overwrite", "run_dir", "report_to", "device", "cost_steps")
# Settings that are paths: the fingerprints compare their content. Of language=path, the language is compared.
PATHS = ("data_dir", "train", "validation", "start_from")
PAIRS = ("test", "text")


@contextmanager
def open_run(
    config: Any,
    run_dir: Path,
    fingerprints: dict[str, str],
    inputs: Iterable[str | Path] = (),
    waiting: Callable[[], None] | None = None,
    setting: str = "run_dir",
) -> Iterator[None]:
    """`with open_run(...):` no other process uses the folder. Writes its marker and config.json, or checks the marker.

    Args:
        config: the settings; with `config.overwrite`, what the folder holds of a run with other settings or inputs is
            deleted. Those that change no result, and the names of local files and folders, are not compared.
        fingerprints: name → hash of each input (the model, the training data); a run continues only with the same ones.
        inputs: paths that the run reads, none of which may be in run_dir or hold it; other names are ignored.
        waiting: called before waiting for another process that uses the folder; by default that is an error.
        setting: the folder's name in errors.

    Raises:
        ValueError: the folder holds a run with other settings or inputs (and not `overwrite`), or files but no run;
            another process uses it; it is, holds or is in the current or home directory, an input or another run.
        OSError: a file cannot be written; the file system has no locks.
    """
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(_open(config, run_dir, fingerprints, inputs, waiting, setting))

        on_main(enter)
        yield


@contextmanager
def _open(
    config: Any,
    run_dir: Path,
    fingerprints: dict[str, str],
    inputs: Iterable[str | Path],
    waiting: Callable[[], None] | None,
    setting: str,
) -> Iterator[None]:
    _check_run_dir(run_dir, inputs, setting)
    marker = run_dir / MARKER
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{setting} {run_dir} is a file")
    if run_dir.is_dir() and not marker.is_file() and any(not path.name.startswith(".") for path in run_dir.iterdir()):
        what = f"{setting} {run_dir} is not empty and holds no run of this version (no {MARKER})"
        raise ValueError(f"{what}: choose another")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{setting} {run_dir} cannot be made: {error.strerror}") from error
    settings = to_dict(config)
    made_from = {"settings": compared(settings), "fingerprints": fingerprints}
    with _locked(run_dir, waiting, setting):
        old = _read_marker(marker) if marker.is_file() else made_from
        changed = [] if old is None else _changes(old, made_from)
        if changed and not config.overwrite:
            what = f"{setting} {run_dir} holds a run with other {'; '.join(changed[:3])}"
            raise ValueError(f"{what}: choose another{', or overwrite it' if setting == 'run_dir' else ''}")
        if changed or old is None:
            _write_marker(marker, None)  # in case deleting is interrupted
            _delete_contents(run_dir)
        _write_marker(marker, made_from)
        written = {name: value for name, value in settings.items() if name not in ("overwrite", "run_dir")}
        write_json(run_dir / "config.json", written)
        yield


def compared(settings: dict) -> dict:
    """The settings (of `to_dict`) that a run must share with the one that it continues."""
    kept = {name: value for name, value in settings.items() if name not in (*NOT_COMPARED, *PATHS)}
    for name in PAIRS:
        if isinstance(kept.get(name), list):
            kept[name] = [pair.partition("=")[0] for pair in kept[name]]
        else:
            kept.pop(name, None)
    kept |= {name: "a folder" for name in ("model", "dataset") if name in kept and Path(kept[name]).is_dir()}
    if kept.get("language_vectors") is not None:  # other vectors give other scores
        kept["language_vectors"] = str(Path(kept["language_vectors"]).resolve())
    if isinstance(kept.get("data"), dict):
        kept["data"] = compared(kept["data"])
    return kept


def _check_run_dir(run_dir: Path, inputs: Iterable[str | Path], setting: str) -> None:
    """run_dir may not be or hold the current or the home directory, nor be, hold or be in an input or another run."""
    resolved = run_dir.resolve()
    for what, path in {"current": Path.cwd(), "home": Path(os.path.expanduser("~"))}.items():
        if path.resolve().is_relative_to(resolved):
            raise ValueError(f"{setting} {run_dir} is or holds the {what} directory: choose a folder of its own")
    for name in inputs:
        path = Path(name).resolve()
        if path.exists() and (path.is_relative_to(resolved) or resolved.is_relative_to(path)):
            raise ValueError(f"{setting} {run_dir} is, holds or is in the input {name}: choose a folder of its own")
    for folder in resolved.parents:
        if (folder / MARKER).is_file():
            raise ValueError(f"{setting} {run_dir} is in the folder of another run, {folder}")


@contextmanager
def _locked(run_dir: Path, waiting: Callable[[], None] | None, setting: str) -> Iterator[None]:
    """A file lock of the operating system, which is released when the process ends, also when it is killed."""
    lock = filelock.FileLock(run_dir / LOCK)
    try:
        lock.acquire(timeout=RESTART_SECONDS if world_size() > 1 and waiting is None else 0)
    except filelock.Timeout:
        if waiting is not None:
            waiting()
            lock.acquire(blocking=True)
        else:
            advice = f"wait for its end, or choose another {setting}"
            raise ValueError(f"{setting} {run_dir}: another process uses it; {advice}") from None
    except OSError as error:
        if error.filename is not None:  # it cannot be opened
            raise OSError(f"{setting} {run_dir} cannot be written: {error.strerror}") from error
        reason = f"({error.strerror}): its file system has no locks; choose a {setting} on another"
        raise OSError(f"{run_dir / LOCK} cannot be locked {reason}") from error
    try:
        yield
    finally:
        lock.release()


def _read_marker(path: Path) -> dict | None:
    """What the run was made from, or None if a process was interrupted while it emptied the folder."""
    marker = read_json(path)
    version = marker.get("format_version") if isinstance(marker, dict) and marker.get("format") == FORMAT else None
    if version is not None and version != FORMAT_VERSION:
        expected = f"format_version {version}, this version reads {FORMAT_VERSION}; choose another folder"
        raise ValueError(f"{path} is of another version of deftx-kernels: {expected}")
    if version is not None and "made_from" in marker:
        made_from = marker["made_from"]
        parts = made_from if isinstance(made_from, dict) else {}
        if made_from is None or all(isinstance(parts.get(name), dict) for name in ("settings", "fingerprints")):
            return made_from
    raise ValueError(f"{path} is damaged: it does not say what the run was made from; choose another run_dir")


def _write_marker(path: Path, made_from: dict | None) -> None:
    write_json(path, {"format": FORMAT, "format_version": FORMAT_VERSION, "made_from": made_from})


def _changes(old: dict, new: dict) -> list[str]:
    """What differs, for a message: the settings with both values, the inputs by name."""
    settings = differences(old["settings"], new["settings"])
    before, now = old["fingerprints"], new["fingerprints"]
    inputs = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    found = [f"settings ({'; '.join(settings[:3])})"] if settings else []
    return found + ([f"content of its inputs ({', '.join(inputs[:3])})"] if inputs else [])


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """The settings in which two `to_dict` results differ, as "task.dense.lr: 0.1 → 0.2"."""
    if isinstance(old, dict) and isinstance(new, dict):
        names = {key: f"{prefix}.{key}" if prefix else key for key in [*old, *new]}
        return [line for key, name in names.items() for line in differences(old.get(key), new.get(key), name)]
    return [] if old == new else [f"{prefix}: {old} → {new}"]


def _delete_contents(run_dir: Path) -> None:
    seeds = [path.name for path in run_dir.iterdir() if re.fullmatch(r"seed-\d+", path.name) and path.is_dir()]
    for path in (run_dir / name for name in (*CONTENTS, *seeds)):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    figures = run_dir / "figures"
    if not figures.is_symlink():
        for name in FIGURES:
            (figures / name).unlink(missing_ok=True)
        with suppress(OSError):  # it holds other files, or does not exist
            figures.rmdir()
