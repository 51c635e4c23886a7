"""What a phase keeps in its folder: Trainer's checkpoints, its result, and phase.json, written last.

Until there is a phase.json, the newest complete checkpoint lets the phase continue after a crash. Of several processes
rank 0 reads and writes, and the others have its results.
"""

import errno
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deftx_kernels.files import read_json, write_json
from deftx_kernels.train.processes import on_main

# what torch.save wrote: archives with a checksum of every member
STATES = ("optimizer.pt", "scheduler.pt")
RANDOM_STATE, RANDOM_STATES = "rng_state.pth", "rng_state_*.pth"  # of one process, of the ranks of several
_WRITER_ERRORS = ("inline_container", "unexpected pos", "iostream error")  # the RuntimeErrors of torch's file writer


# ---- finished phases ----


def finished(folder: Path, read: Callable[[], object] | None = None) -> dict | None:
    """The metrics of a finished phase, or None where there is no phase.json.

    Args:
        read: reads the phase's results; where they are missing or damaged, the phase is not finished.

    Raises:
        ValueError: phase.json is damaged.
    """
    return on_main(partial(_finished, folder, read))


def _finished(folder: Path, read: Callable[[], object] | None) -> dict | None:
    path = folder / "phase.json"
    if not path.is_file():
        return None
    metrics = read_json(path)
    if not isinstance(metrics, dict):
        raise ValueError(f"{path} is damaged: an object is expected, not {type(metrics).__name__}")
    if read is not None and (error := damage_found(read)) is not None:
        message = f"{folder} is run again, as its result is missing or damaged: {error}"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return None
    return metrics


def finished_model(folder: Path, model: Path) -> dict | None:
    """`finished`, of a phase whose result is the model folder `model`."""

    def read() -> None:
        read_json(model / "config.json")
        check_weights(model)

    return finished(folder, read)


def finish(folder: Path, metrics: dict) -> None:
    """Mark a phase as finished, and delete its checkpoints."""

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "phase.json", metrics)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    on_main(write)


def save_model(model, folder: Path) -> None:
    """Write a transformers model folder, replacing the one of an unfinished phase, if any.

    Raises:
        OSError: it cannot be written; its name is in the message.
    """

    def write() -> None:
        if folder.exists():
            shutil.rmtree(folder)
        model.save_pretrained(folder)
        for path in folder.iterdir():  # on the disk before phase.json is
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    with saving(folder):
        on_main(write)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """`with saving(path):` errors of torch.save and safetensors on a full disk become an OSError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _WRITER_ERRORS):
            raise
        raise OSError(f"{path} cannot be written: the disk is full or fails") from error


# ---- checkpoints ----


def newest_checkpoint(folder: Path, extra: Sequence[str] = ()) -> Path | None:
    """The newest complete checkpoint in `folder`. Incomplete ones are deleted: Trainer would count them as its own.

    Complete: trainer_state.json (which Trainer writes last) is of this step, and the weights, the states of optimizer,
    schedule and random generators, and the best checkpoint so far, in the same folder, can be read.

    Args:
        extra: names of safetensors files that a complete checkpoint has, too.

    Raises:
        OSError: the system cannot read a file that is there; nothing is deleted then.
    """
    return on_main(partial(_newest_checkpoint, folder, extra))


def _newest_checkpoint(folder: Path, extra: Sequence[str]) -> Path | None:
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    found.sort(key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    errors = {path: damage_found(partial(_check_complete, path, extra)) for path in found}
    complete = [path for path, error in errors.items() if error is None]
    for path, error in errors.items():
        if error is not None:
            warnings.warn(f"{path} is incomplete or damaged and is deleted: {error}", RuntimeWarning, stacklevel=4)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not complete:
        return None
    _correct_best_path(complete[0])
    return complete[0]


def damage_found(read: Callable[[], object]) -> Exception | None:
    """The error that `read` raises because a file is missing or damaged, or None.

    Raises:
        OSError, MemoryError: errors with other causes: too many open files, a disk that fails temporarily.
    """
    try:
        read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever a reader raises on damaged content
        return error
    return None


def _check_complete(checkpoint: Path, extra: Sequence[str]) -> None:
    state = read_json(checkpoint / "trainer_state.json")
    if state["global_step"] != int(checkpoint.name.partition("-")[2]):
        raise ValueError(f"its trainer_state.json is of step {state['global_step']}")
    check_weights(checkpoint)
    if (best := state["best_model_checkpoint"]) is not None:
        check_weights(_best_checkpoint(checkpoint, best))
    of_ranks = sorted(path.name for path in checkpoint.glob(RANDOM_STATES))
    for name in (*STATES, *(of_ranks or [RANDOM_STATE])):
        _check_archive(checkpoint / name)
    for name in extra:
        _check_safetensors(checkpoint / name)


def _best_checkpoint(checkpoint: Path, stored: str) -> Path:
    """Trainer stores an absolute path, which is wrong after the run folder has been moved or copied."""
    return checkpoint.parent.absolute() / Path(stored).name


def _correct_best_path(checkpoint: Path) -> None:
    """Correct the path of the best checkpoint in trainer_state.json, where the folder was moved."""
    path = checkpoint / "trainer_state.json"
    state = read_json(path)
    stored = state["best_model_checkpoint"]
    if stored is not None and stored != (best := str(_best_checkpoint(checkpoint, stored))):
        write_json(path, {**state, "best_model_checkpoint": best})


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of the part {damaged!r} of {path.name} is wrong")
    except OSError as error:
        if error.errno == errno.EINVAL:  # an offset in its directory is negative
            raise ValueError(f"the directory of {path.name} is damaged") from error
        raise


def check_weights(folder: Path) -> None:
    """Raise what reading a model folder's weights raises where they are missing or damaged."""
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in names:
        _check_safetensors(folder / name)


def _check_safetensors(path: Path) -> None:
    # safe_open calls any error of opening "no such file", and with "pt" opens the file a second time.
    with open(path, "rb"):
        pass
    with safe_open(path, "np"):  # raises where the file is shorter than its header says
        pass
