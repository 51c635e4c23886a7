"""A channel of versions of a model, through a folder or an object store: one writer, any number of readers.

`anchors/step_000001.safetensors` is a whole model, `deltas/step_000002.safetensors` the patch from version 1 to 2: the
layout that TRL documents for delta weight sync. A file gets its name when it is complete; one that is torn all the same
(a store that shows files while they are written) does not have its checksums, and is read again later.
"""

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from deftx_kernels.delta.folders import Folder, folder_at
from deftx_kernels.delta.model_state import (
    check_layout,
    check_writable,
    layout,
    matched_targets,
    matched_tensors,
    model_tensors,
    state_of,
    version,
)
from deftx_kernels.delta.models import Model, plain_model
from deftx_kernels.delta.patch import SparsePatch
from deftx_kernels.delta.patch_files import AnchorContent, read_anchor, write_anchor
from deftx_kernels.validation import check_int

_ANCHORS, _PATCHES = "anchors", "deltas"
_Content = TypeVar("_Content", AnchorContent, SparsePatch)
_FILE = re.compile(r"step_(\d+)\.safetensors")


def _steps(folder: Folder, kind: str) -> list[int]:
    """Numbers of the versions of which the folder has an anchor or a patch, ascending."""
    return sorted(int(found[1]) for name in folder.names(kind) if (found := _FILE.fullmatch(name)))


def _name(kind: str, step: int) -> str:
    return f"{kind}/step_{step:06d}.safetensors"


class PatchWriter:
    """Writes the versions of a model for PatchReaders: patches, and every few versions an anchor, the whole model.

    It is also an object for TRL: `AsyncGRPOTrainer(weight_transfer=PatchWriter(url))` writes a version at each weight
    sync, which readers take when they like.

    A process that is killed, at any point, leaves a channel of complete versions. A writer that is started on it later
    continues after the last one, with an anchor. There must be one writer at a time.

    Args:
        url: a folder, or a URL of fsspec (`s3://bucket/run`).
        anchor_every: how many versions there are from one anchor to the next. Version 1 is an anchor.
        keep_anchors: how many anchors to keep, with the patches after the oldest of them; None: all. At least 2, for
            readers that are reading the last but one.
        compact: write patches in the compact layout, which TRL does not read.

    Raises:
        ValueError, TypeError: anchor_every is not an int above 0, keep_anchors not one above 1.

    Example:
        >>> writer, reader = PatchWriter("sync"), PatchReader("sync")
        >>> model, copy = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
        >>> writer.write(model), reader.update(copy)
        (1, 1)
        >>> model["w"][1] = 5.0
        >>> writer.write(model), reader.update(copy)
        (2, 2)
        >>> copy["w"]
        tensor([0., 5., 0.])
    """

    def __init__(
        self,
        url: str | os.PathLike,
        anchor_every: int = 10,
        *,
        keep_anchors: int | None = None,
        compact: bool = False,
    ) -> None:
        check_int(anchor_every, "anchor_every", 1)
        if keep_anchors is not None:
            check_int(keep_anchors, "keep_anchors", 2)
        self.anchor_every, self.keep_anchors, self.compact = anchor_every, keep_anchors, compact
        self._folder = folder_at(url)
        self.model_version = 0
        for kind in (_ANCHORS, _PATCHES):
            self._folder.remove_abandoned(kind)
            self.model_version = max([self.model_version, *_steps(self._folder, kind)])
        self._last_anchor = 0
        self._written: str | None = None  # the version that this writer wrote last
        self._copy: dict[str, Tensor] | None = None  # of the model at that version

    def write(self, model: Model, patch: SparsePatch | None = None) -> int:
        """Write the next version. Returns its number.

        Args:
            model: a module, plain or sparsified, or a mapping of names to tensors.
            patch: from the version that was written last to this one. Without it the model is compared with a copy of
                the last version, which the writer then keeps in CPU memory; after versions that were written with a
                patch, it is an anchor. So `write(model)` goes on after any error.

        Raises:
            ValueError, TypeError: the patch was made for another version, or does not lead to the model's (where that
                is checked, with an anchor); the model's tensors are not those of the last version. Nothing is written.
            OSError: a file cannot be written. If it is the version's first one, its number is not used again, and the
                next version is an anchor; else the version is complete, without its anchor. Do not give the same patch
                again.
        """
        step, last, given = self.model_version + 1, self._written, patch is not None
        if patch is not None and not isinstance(patch, SparsePatch):
            raise TypeError(f"patch must be a SparsePatch, got {type(patch).__name__}")
        if patch is not None and patch.to_version is None:
            raise ValueError("patch has no versions: a patch of another tool cannot be followed")
        if patch is not None and last not in (None, patch.from_version):
            raise ValueError(
                f"patch was made for version {patch.from_version}, the last one is {last}; without a patch, the model"
                " would be written whole"
            )
        model = model_tensors(plain_model(model), "model")
        if patch is None and self._copy is not None:
            patch = SparsePatch.diff(model, self._copy)
        is_first = patch is None or last != patch.from_version  # also where an earlier call was interrupted
        anchor = None
        if is_first or step - self._last_anchor >= self.anchor_every:
            anchor = _anchor(model, patch, step)
        self.model_version, self._written = step, None  # until one file is written
        if patch is not None and not is_first:
            self._write_patch(patch, step)
            self._written = patch.to_version
        elif anchor is not None:
            self._write_anchor(anchor)
            self._written = version(anchor.state or {})
        if given:
            self._copy = None
        elif self._copy is not None and patch is not None:
            patch.apply_(self._copy, verify=False)
        elif anchor is not None:
            self._copy = {n: t.detach().to("cpu", copy=True) for n, t in anchor.tensors.items()}
        if anchor is not None and not is_first:
            self._write_anchor(anchor)
        return step

    def _write_patch(self, patch: SparsePatch, step: int) -> None:
        numbered = copy.copy(patch)
        numbered.model_version = step
        self._folder.write(_name(_PATCHES, step), lambda path: numbered.save(path, self.compact))

    def _write_anchor(self, anchor: AnchorContent) -> None:
        self._folder.write(_name(_ANCHORS, anchor.model_version), lambda path: write_anchor(path, anchor))
        self._last_anchor = anchor.model_version
        if self.keep_anchors is None:
            return
        oldest = _steps(self._folder, _ANCHORS)[-self.keep_anchors :][0]
        for kind, first in ((_PATCHES, oldest + 1), (_ANCHORS, oldest)):
            for step in [s for s in _steps(self._folder, kind) if s < first]:
                self._folder.delete(_name(kind, step))

    # ---- TRL's weight transfer ----
    def send_weights(self, iterator: Iterable[tuple[str, Tensor]]) -> None:
        """`write` of (name, tensor) pairs."""
        self.write({name: tensor.detach().cpu() for name, tensor in iterator})

    def init_weight_transfer(self) -> None:
        """Does nothing, as `pause`, `resume` and `destroy`: readers decide when they read."""

    def pause(self) -> None:
        """See `init_weight_transfer`."""

    resume = destroy = pause


def _anchor(model: dict[str, Tensor], patch: SparsePatch | None, step: int) -> AnchorContent:
    """The whole model. ValueError unless the patch, if there is one, leads to its version."""
    if patch is None or patch.after is None:
        tensors, _, tied = matched_tensors(model, model)
        return AnchorContent(tensors, state_of(tensors), tied, step)
    targets = matched_targets(model, "model", patch.after, patch.tied, [patch.after], exactly=True)
    tensors = {known: model[name] for name, known in targets.items()}
    if wrong := [n for n, state in state_of(tensors).items() if state != patch.after[n]]:
        raise ValueError(f"patch does not lead to the model's version: tensor {wrong[0]!r} has other values")
    return AnchorContent(tensors, patch.after, patch.tied, step)


class PatchReader:
    """Brings a model to the newest version that a PatchWriter has written, or TRL.

    Args:
        url: a folder, or a URL of fsspec, as that of the writer.

    Attributes:
        model_version: the number of the version that the model has; 0 before the first.

    Example:
        See PatchWriter.

        >>> PatchReader("empty").update({"w": torch.zeros(3)})
        0
    """

    def __init__(self, url: str | os.PathLike) -> None:
        self._folder = folder_at(url)
        self.model_version = 0
        self._marks: dict[str, tuple[int, int]] = {}  # of the model's tensors when the last update ended

    def update(self, model: Model) -> int:
        """Write the newest version to a module or a mapping: by the patches since the last update, or, where they are
        missing or do not fit, by the newest anchor and the patches after it. Returns its number.

        The model is at one of the writer's versions afterwards, also after an error. Each version is verified. A file
        that is missing or torn is not used; where no later anchor replaces it, the next update reads it again. A model
        that was changed since the last update, or that is another one, gets the version, too; changes that torch does
        not count (through `.data`, by NumPy) are found with the next patch.

        Raises:
            ValueError, TypeError: the model lacks a tensor of the version, has one too many, or has it in another shape
                or dtype, or where it cannot be written.
            OSError: the store cannot be read.
        """
        tensors = model_tensors(model, "model")
        anchors = _steps(self._folder, _ANCHORS)
        is_another = bool(anchors) and max(anchors + _steps(self._folder, _PATCHES)) < self.model_version
        if is_another or self._marks != _marks(tensors):
            self.model_version = 0
        try:
            if self.model_version and not self._follow(model):
                self.model_version = 0
            for step in reversed(anchors):
                if step <= self.model_version:
                    break
                anchor = self._read(_ANCHORS, step, read_anchor)
                if anchor is not None:
                    self._write(anchor, tensors, step)
                    self._follow(model)
                    break
        finally:
            self._marks = _marks(tensors)
        return self.model_version

    def _follow(self, model: Model) -> bool:
        """Apply the patches after the present version. False if one does not fit."""
        while (patch := self._read(_PATCHES, self.model_version + 1, SparsePatch.load)) is not None:
            try:
                patch.apply_(model)
            except ValueError:
                return False
            self.model_version += 1
        return True

    def _write(self, anchor: AnchorContent, tensors: Mapping[str, Tensor], step: int) -> None:
        states = [] if anchor.state is None else [anchor.state]
        targets = matched_targets(tensors, "model", anchor.tensors, anchor.tied, states, exactly=bool(states))
        for name, known in targets.items():
            label = f"model's tensor {name!r}"
            check_layout(tensors[name], label, layout(anchor.tensors[known]))
            check_writable(tensors[name], label)
        self.model_version = 0  # until all tensors are written
        try:
            _copy(anchor, tensors, targets)
        except BaseException:  # an interrupt: the model must not stay between two versions
            _copy(anchor, tensors, targets)
            raise
        self.model_version = step

    def _read(self, kind: str, step: int, load: Callable[[Path], _Content]) -> _Content | None:
        """The content of a file; None if it is missing, damaged, or that of another version of ours."""
        try:
            with self._folder.local_file(_name(kind, step)) as path:
                content = load(path)
        except (FileNotFoundError, ValueError):
            return None
        state = content.before if isinstance(content, SparsePatch) else content.state
        return content if state is None or content.model_version in (0, step) else None


def _copy(anchor: AnchorContent, tensors: Mapping[str, Tensor], targets: Mapping[str, str]) -> None:
    for name, known in targets.items():
        tensors[name].copy_(anchor.tensors[known])


def _marks(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """What differs if a tensor is another one, or was written: its address, and torch's count of writes."""
    return {n: (t.data_ptr(), -1 if t.is_inference() else t._version) for n, t in tensors.items()}
