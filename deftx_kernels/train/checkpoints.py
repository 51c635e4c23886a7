"""Trainer's checkpoints in a phase's folder: the newest complete one, whatever a kill or a full disk left beside it."""

import errno
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from safetensors import safe_open

from deftx_kernels.files import read_json, write_json

# what torch.save wrote: archives with a checksum of every member
STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`. The incomplete ones are deleted: Trainer would count them among its
    own.

    Complete: trainer_state.json (which Trainer writes last) is of this step, and the weights, the states of optimizer,
    schedule and random generators, and the best checkpoint so far, which lies beside it, can be read.

    Raises:
        OSError: the system cannot read a file that is there; nothing is deleted then.
    """
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    found.sort(key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    faults = {path: fault_of(partial(_check_complete, path)) for path in found}
    complete = [path for path, fault in faults.items() if fault is None]
    for path, fault in faults.items():
        if fault is not None:
            warnings.warn(f"{path} is incomplete or damaged and is deleted: {fault}", RuntimeWarning, stacklevel=2)
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    if not complete:
        return None
    _find_best(complete[0])
    return complete[0]


def fault_of(read: Callable[[], object]) -> Exception | None:
    """What `read` raises because a file is missing or damaged; None where it raises nothing.

    Raises:
        OSError, MemoryError: what says nothing about the files: too many of them are open, a disk fails for a moment.
    """
    try:
        read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        return error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # whatever damaged content makes of its reader
        return error
    return None


def _check_complete(checkpoint: Path) -> None:
    state = read_json(checkpoint / "trainer_state.json")
    if state["global_step"] != int(checkpoint.name.partition("-")[2]):
        raise ValueError(f"its trainer_state.json is of step {state['global_step']}")
    check_weights(checkpoint)
    if (best := state["best_model_checkpoint"]) is not None:
        check_weights(_beside(checkpoint, best))
    for name in STATES:
        _check_archive(checkpoint / name)


def _beside(checkpoint: Path, best: str) -> Path:
    """The best checkpoint: Trainer notes an absolute path, which is another's once the run folder was moved or copied."""
    return checkpoint.parent.absolute() / Path(best).name


def _find_best(checkpoint: Path) -> None:
    """Let Trainer find the best checkpoint where it lies now."""
    path = checkpoint / "trainer_state.json"
    state = read_json(path)
    noted = state["best_model_checkpoint"]
    if noted is not None and noted != (best := str(_beside(checkpoint, noted))):
        write_json(path, {**state, "best_model_checkpoint": best})


def _check_archive(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"the checksum of the part {damaged!r} of {path.name} is wrong")
    except OSError as error:
        if error.errno == errno.EINVAL:  # it points to places before its beginning
            raise ValueError(f"the directory of {path.name} is damaged") from error
        raise


def check_weights(folder: Path) -> None:
    """Raise whatever missing or damaged weights of a model folder raise."""
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in names:
        # safe_open calls any error of opening "no such file", and with "pt" opens the file a second time.
        with open(folder / name, "rb"):
            pass
        with safe_open(folder / name, "np"):  # raises where the file is shorter than its header says
            pass


def remove_checkpoints(folder: Path) -> None:
    """Delete a finished phase's checkpoints."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
