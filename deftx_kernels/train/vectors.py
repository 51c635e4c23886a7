"""Vectors that the commands are given: folders or hub ids. Needs only the core."""

from pathlib import Path

from deftx_kernels.delta import SparseDelta
from deftx_kernels.delta.interop import SFT_NAME, SHIRA_CONFIG

OTHER_FORMATS = {SFT_NAME: "composable-sft", SHIRA_CONFIG: "PEFT"}


def load_vector(path: str) -> SparseDelta:
    """A vector from a folder or the hub.

    Raises:
        ValueError: there is none, it is damaged, or it is of another library; the message names it.
    """
    try:
        return SparseDelta.from_pretrained(path)
    except FileNotFoundError as error:
        for name, library in OTHER_FORMATS.items():
            if (Path(path) / name).is_file():
                raise ValueError(f"vector {path!r} is of {library}: run `deftx convert {path} FOLDER` first") from None
        raise ValueError(f"vector {path!r}: {error}") from error
