"""Trainer's checkpoints in a phase's folder: the newest complete one, whatever a kill or a full disk left beside it."""

import re
import shutil
import zipfile
from pathlib import Path

from safetensors import safe_open

from deftx_kernels.files import read_json

STATES = ("optimizer.pt", "scheduler.pt", "rng_state.pth")  # what torch.save wrote: archives with a checksum of every member


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`. The incomplete ones are deleted: Trainer would count them among its own.

    Complete: trainer_state.json (which Trainer writes last) is of this step, and the weights, the states of optimizer,
    schedule and random generators, and the best checkpoint so far can be read.
    """
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    found.sort(key=lambda path: int(path.name.partition("-")[2]), reverse=True)
    complete = [path for path in found if _is_complete(path)]
    for path in found:
        if path not in complete:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return complete[0] if complete else None


def _is_complete(checkpoint: Path) -> bool:
    try:
        state = read_json(checkpoint / "trainer_state.json")
        best = state["best_model_checkpoint"]
        return (
            state["global_step"] == int(checkpoint.name.partition("-")[2])
            and _has_weights(checkpoint)
            and (best is None or _has_weights(Path(best)))
            and all(_is_whole(checkpoint / name) for name in STATES)
        )
    except Exception:  # whatever a damaged file makes of its reader
        return False


def _is_whole(archive: Path) -> bool:
    with zipfile.ZipFile(archive) as members:
        return members.testzip() is None


def _has_weights(checkpoint: Path) -> bool:
    index = checkpoint / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in names:
        with safe_open(checkpoint / name, "pt"):  # raises where the file is shorter than its header says
            pass
    return True


def remove_checkpoints(folder: Path) -> None:
    """Delete a finished phase's checkpoints."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
