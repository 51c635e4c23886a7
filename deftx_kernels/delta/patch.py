"""SparsePatch: the bits that an update of a model changed; applied, inverted, composed, saved and loaded."""

import os
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from deftx_kernels.delta.model_state import (
    State,
    added,
    bits,
    by_kind,
    check_bits,
    check_layout,
    check_writable,
    dense,
    dtype_name,
    joined,
    layout,
    matched_targets,
    matched_tensors,
    model_tensors,
    offsets_of,
    state_of,
    version,
)
from deftx_kernels.delta.models import Model
from deftx_kernels.delta.patch_files import Entries, PatchContent, read_patch, write_patch
from deftx_kernels.files import reading
from deftx_kernels.validation import check_int, check_mapping, same_bits, usable_in_backward


class _Group(NamedTuple):
    """Tensors of one dtype and device, and a patch's entries of them: the arguments of the operators."""

    names: list[str]  # of the tensors, in the patch
    tensors: list[Tensor]
    offsets: Tensor  # int64 [n + 1]
    indices: Tensor  # [nnz]
    values: Tensor  # [nnz]

    def exchange(self, values: Tensor) -> None:
        """Write values [nnz] at the entries, and what was there into `values`."""
        contiguous = [dense(t) for t in self.tensors]
        torch.ops.deftx.flat_exchange_(contiguous, self.offsets, self.indices, values)
        for tensor, copy in zip(self.tensors, contiguous):
            if copy.data_ptr() != tensor.data_ptr():
                tensor.copy_(copy)

    def gather(self) -> Tensor:
        """The tensors' values at the entries, [nnz]."""
        found = torch.empty_like(self.values)
        parts = [t.tensor_split(self.offsets[1:-1].cpu()) for t in (self.indices, bits(found))]
        for tensor, index, part in zip(self.tensors, *parts):
            torch.index_select(bits(dense(tensor)), 0, index, out=part)
        return found

    def changes(self, before: Tensor) -> dict[str, int]:
        """Name → what the entries' change from `before` to the patch's values adds to the tensor's checksum."""
        sums = torch.ops.deftx.bit_checksum_change(self.offsets, self.indices, before, self.values)
        return dict(zip(self.names, sums.tolist()))


class SparsePatch:
    """The entries of a model's tensors whose bits an update changed, with their new values.

    A SparseDelta is what to add; a patch is what the bits became: applied to the model that it was made for, it gives
    the updated model bit for bit, in every dtype. Reinforcement learning sends such patches to inference engines: about
    99 % of bfloat16 weights keep their bits in a step (arXiv 2602.03839).

    A *version* is a hash of the names, dtypes, shapes and checksums of a model's tensors. A patch knows the one it was
    made for and the one it leads to, except for patches of other tools.

    Args:
        entries: name → (flat indices, int32 or int64 [n], strictly ascending; values [n], in the tensor's dtype).
        before, after: the states of all tensors of the model, without and with the patch; None: not known.
        tied: further name → name in `before` of tensors that the model has twice.
        model_version: the number that the writer gives the version that the patch leads to; 0 if it gives none.

    Raises:
        ValueError, TypeError: entries have another form, or are not of tensors in `before`.

    Example:
        >>> old = {"w": torch.zeros(4, dtype=torch.bfloat16), "b": torch.ones(2)}
        >>> new = {"w": torch.tensor([0.0, -0.0, 0.5, 0.0], dtype=torch.bfloat16), "b": torch.ones(2)}
        >>> patch = SparsePatch.diff(new, old)
        >>> patch.names, patch.nnz, patch.nbytes
        (('w',), 2, 12)
        >>> patch.flat("w")
        (tensor([1, 2], dtype=torch.int32), tensor([-0.0000, 0.5000], dtype=torch.bfloat16))
        >>> back = patch.inverse(old)
        >>> patch.apply_(old)
        >>> old["w"]
        tensor([0.0000, -0.0000, 0.5000, 0.0000], dtype=torch.bfloat16)
        >>> back.apply_(old)
        >>> old["w"]
        tensor([0., 0., 0., 0.], dtype=torch.bfloat16)
    """

    def __init__(
        self,
        entries: Mapping[str, tuple[Tensor, Tensor]],
        before: State | None = None,
        after: State | None = None,
        tied: Mapping[str, str] | None = None,
        model_version: int = 0,
    ) -> None:
        check_int(model_version, "model_version", 0)
        check_mapping(entries, "entries")
        self._entries: Entries = {}
        for name, pair in entries.items():
            indices, values = _checked_entries(name, pair)
            if len(indices):
                self._entries[name] = indices.contiguous(), usable_in_backward(dense(values.detach()))
        self.before, self.after = before, after
        self.tied, self.model_version = dict(tied or {}), model_version
        self._check_states(_last_indices(self._entries))

    def _check_states(self, last: Mapping[str, int]) -> None:
        if (self.before is None) != (self.after is None):
            raise ValueError("before and after must both be given, or neither")
        if self.before is None or self.after is None:
            return
        unchanged = {n: s[:2] if n in self._entries else s for n, s in self.before.items()}
        if unchanged != {n: s[:2] if n in self._entries else s for n, s in self.after.items()}:
            raise ValueError("before and after must have the same tensors, those without entries in the same state")
        for name, (_, values) in self._entries.items():
            if name not in self.before:
                raise ValueError(f"entries of tensor {name!r}, which is not in before")
            if dtype_name(values) != self.before[name].dtype:
                raise ValueError(f"values of {name!r} are {values.dtype}, the tensor is {self.before[name]}")
            if last[name] >= torch.Size(self.before[name].shape).numel():
                raise ValueError(f"an index of {name!r} is {last[name]}, the tensor is {self.before[name]}")
        if other := [n for n in self.tied.values() if n not in self.before]:
            raise ValueError(f"tied: {other[0]!r} is not in before")

    def __repr__(self) -> str:
        versions = (
            f", {self.from_version[:8]} to {self.to_version[:8]}" if self.from_version and self.to_version else ""
        )
        return f"SparsePatch(nnz={self.nnz}, tensors={len(self._entries)}{versions})"

    # ---- content ----
    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors that the patch changes."""
        return tuple(self._entries)

    @property
    def nnz(self) -> int:
        """How many entries the patch changes."""
        return sum(len(indices) for indices, _ in self._entries.values())

    @property
    def nbytes(self) -> int:
        """The size of indices and values."""
        return sum(indices.nbytes + values.nbytes for indices, values in self._entries.values())

    @property
    def from_version(self) -> str | None:
        """The version that the patch was made for (64 hexadecimal digits); None for a patch of another tool."""
        return None if self.before is None else version(self.before)

    @property
    def to_version(self) -> str | None:
        """The version that the patch leads to; None for a patch of another tool."""
        return None if self.after is None else version(self.after)

    def flat(self, name: str) -> tuple[Tensor, Tensor]:
        """Flat indices (int32, int64 for tensors above 2**31 - 1 elements) and values [n] of one changed tensor.

        `[(name, *patch.flat(name)) for name in patch.names]` is what vLLM takes as sparse weight patches.

        Raises:
            KeyError: the patch does not change a tensor of this name.
        """
        return self._entries[name]

    # ---- from models ----
    @classmethod
    def diff(cls, new: Model, old: Model, *, model_version: int = 0) -> "SparsePatch":
        """The patch that makes `new` of `old`: the entries whose bits differ. -0.0 is not 0.0, and NaNs differ by their
        payloads.

        Args:
            new, old: modules (their parameters and persistent buffers, names as without torch.compile and
                DistributedDataParallel) or mappings of names to tensors, of dtypes with 1, 2, 4 or 8 bytes. Tied
                tensors are compared once.
            model_version: the number of the version `new`.

        Raises:
            ValueError: one has a tensor that the other lacks, or in another shape or dtype; tensors share a part of
                their memory; a model is sparsified.
            TypeError: a tensor is not plain (a DTensor), or its elements have 16 bytes.
        """
        mine, theirs, tied = matched_tensors(new, old)
        entries = different_entries(mine, theirs)
        return cls(entries, state_of(theirs), state_of(mine), tied, model_version)

    def inverse(self, old: Model) -> "SparsePatch":
        """The patch that takes this one back.

        Args:
            old: the model without this patch: a module or a mapping.

        Raises:
            ValueError: `old` lacks a tensor, or is not at the version that this patch was made for.
        """
        entries: Entries = {}
        for group in self._groups(model_tensors(old, "old"), "old", False, False):
            before = group.gather()
            self._check_changes(group, before, "old is not at the version that this patch was made for")
            entries |= _split(group.names, group.offsets, group.indices, before)
        return SparsePatch({n: entries[n] for n in self._entries}, self.after, self.before, self.tied)

    # ---- on models ----
    def apply_(self, model: Model, verify: bool = True) -> None:
        """Write the patch's values to a module or a mapping. After any error the model is unchanged.

        Tensors that were tied when the patch was made are written under each name that the model has.

        Args:
            verify: check that the model is at the version that the patch was made for, which reads all its tensors
                once, and then, from the entries alone, that it is at the version that the patch leads to. Otherwise,
                and for patches of other tools, only names, shapes and dtypes of the changed tensors are checked.

        Raises:
            ValueError: the model lacks a tensor, has it in another shape or dtype or where it cannot be written; with
                `verify` also if it has other tensors, or is at another version. The tensor is named.
            TypeError: a tensor is not plain (a DTensor).
        """
        groups = self._groups(model_tensors(model, "model"), "model", verify, True)
        exchanged = [group.values.clone() for group in groups]
        try:
            for group, values in zip(groups, exchanged):
                group.exchange(values)
                if verify:
                    self._check_changes(group, values, "the patch does not lead to the version in it")
        except BaseException:  # also an interrupt, which is raised when an operator has ended
            for group, values in zip(groups, exchanged):
                if not same_bits(values, group.values):  # else the model has them, or nothing was exchanged
                    group.exchange(values)
            raise

    def _groups(self, tensors: Mapping[str, Tensor], argument: str, verify: bool, write: bool) -> list[_Group]:
        """The tensors that this patch changes in a model, with their entries. Errors as `apply_`."""
        states = [s for s in (self.before, self.after) if s is not None]
        exactly = bool(states) and verify
        wanted: Collection[str] = states[0] if exactly else self._entries
        targets = matched_targets(tensors, argument, wanted, self.tied, states, exactly)
        changed = {n: tensors[n] for n, known in targets.items() if known in self._entries}
        for name, known in targets.items():
            tensor, label = tensors[name], f"{argument}'s tensor {name!r}"
            check_fits(self, known, tensor, label)
            if write and name in changed:
                check_writable(tensor, label)
        if exactly:
            self._check_version({n: tensors[n] for n in targets}, targets, argument)
        groups = []
        for own in by_kind(changed):
            names, device = [targets[n] for n in own], changed[own[0]].device
            entries = [self._entries[n] for n in names]
            indices, values = _of_one_dtype([i for i, _ in entries]), [v for _, v in entries]
            stacked = offsets_of(indices, device), joined(indices, device), joined(values, device)
            groups.append(_Group(names, [changed[n] for n in own], *stacked))
        return groups

    def _check_version(self, tensors: Mapping[str, Tensor], targets: Mapping[str, str], argument: str) -> None:
        assert self.before is not None
        found = state_of(tensors)
        if wrong := [n for n, state in found.items() if state != self.before[targets[n]]]:
            applied = all(state == (self.after or {})[targets[n]] for n, state in found.items())
            reason = ": this patch has been applied already" if applied else ""
            raise ValueError(
                f"{argument} is not at the version that this patch was made for, {self.from_version}: {len(wrong)} of "
                f"{len(found)} tensors have other values, the first is {wrong[0]!r}{reason}"
            )

    def _check_changes(self, group: _Group, before: Tensor, message: str) -> None:
        """ValueError unless the entries' change from `before` is what changes the checksums of the version."""
        if self.before is None or self.after is None:
            return
        for name, change in group.changes(before).items():
            if added(self.before[name].checksum, change) != self.after[name].checksum:
                raise ValueError(f"{message}: tensor {name!r} has other values")

    # ---- chains ----
    def then(self, later: "SparsePatch") -> "SparsePatch":
        """One patch for two: this one and then `later`. An entry that `later` sets back is in it, unchanged.

        Raises:
            ValueError: `later` was made for another version than this patch leads to, or has other dtypes.
        """
        if not isinstance(later, SparsePatch):
            raise TypeError(f"later must be a SparsePatch, got {type(later).__name__}")
        if None not in (self.after, later.before) and self.after != later.before:
            raise ValueError(
                f"later was made for version {later.from_version}, this patch leads to version {self.to_version}"
            )
        entries = self._entries | later._entries
        for name in self._entries.keys() & later._entries.keys():
            entries[name] = _later_entries(name, self._entries[name], later._entries[name])
        known = None not in (self.before, later.after)
        states = (self.before, later.after) if known else (None, None)
        return SparsePatch(entries, *states, self.tied | later.tied, later.model_version)

    # ---- files ----
    def save(self, path: str | os.PathLike, compact: bool = False) -> None:
        """Write one safetensors file, atomically, in the layout of TRL's delta weight sync.

        Per changed tensor `NAME.indices` (flat, int32, int64 where needed) and `NAME.values` (the tensor's dtype); in
        the header `sparse`, `model_version`, `sparsity`, `changed_params`, and ours: the versions and a checksum.

        Args:
            compact: store a code of the gaps between indices, `NAME.gaps`, instead. For bfloat16 a change takes about 3
                bytes at a density of 1 %, 3.5 at 0.1 %, and 6 with indices. TRL does not read it.

        Raises:
            OSError: the file cannot be written; its name is in the message.
        """
        entries = {n: (i.cpu().contiguous(), v.cpu().contiguous()) for n, (i, v) in self._entries.items()}
        write_patch(path, PatchContent(entries, self.before, self.after, self.tied, self.model_version), compact)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "SparsePatch":
        """Read a file of `save`, or one that TRL wrote. The tensors are mapped from the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged (its checksum is computed again) or no patch; the message names it.
        """
        content = read_patch(path)
        with reading(path, "sparse patch"):
            return cls(*content)


def different_entries(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Entries:
    """The entries of tensors, of the same names and layouts, whose bits differ, with their new values."""
    entries: Entries = {}
    here = {n: t for n, t in new.items() if t.device == old[n].device}
    # Tensors that are on two devices are copied one at a time.
    for names in [*by_kind(here), *([n] for n in new if n not in here)]:
        pairs = [[dense(t) for t in (new[n], old[n].to(new[n].device))] for n in names]
        offsets, indices, values = torch.ops.deftx.bit_diff(*([pair[i] for pair in pairs] for i in (0, 1)))
        entries |= _split(names, offsets, indices, values)
    return {n: entries[n] for n in new}


def check_fits(patch: SparsePatch, name: str, tensor: Tensor, label: str) -> None:
    """ValueError unless a tensor has the dtype and the shape that a patch is for, or room for its entries."""
    if patch.before is not None:
        return check_layout(tensor, label, patch.before[name])
    indices, values = patch.flat(name)
    if tensor.dtype != values.dtype or int(indices[-1]) >= tensor.numel():
        raise ValueError(f"{label} is {layout(tensor)}, the patch has {values.dtype} and index {int(indices[-1])}")


def _checked_entries(name: str, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Indices and values. ValueError or TypeError unless they can be a tensor's entries."""
    if not isinstance(name, str):
        raise TypeError(f"entries must have names that are strings, got {name!r}")
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(f"entries of {name!r} must be (indices, values), got {type(pair).__name__}")
    indices, values = pair
    for what, tensor in (("indices", indices), ("values", values)):
        check_bits(tensor, f"{what} of {name!r}")
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise TypeError(f"indices of {name!r} must be int32 or int64 [n], got {indices.dtype} {list(indices.shape)}")
    if values.shape != indices.shape or values.device != indices.device:
        has = f"{list(values.shape)} on {values.device}"
        raise ValueError(f"values of {name!r} must be {list(indices.shape)} on {indices.device}, got {has}")
    return indices, values


def _last_indices(entries: Entries) -> dict[str, int]:
    """The last index of each tensor. ValueError, naming one, unless the indices of each ascend strictly from 0 on.

    The device is waited for once, not for each tensor.
    """
    kinds: dict[tuple, list[str]] = {}
    for name, (indices, _) in entries.items():
        kinds.setdefault((indices.dtype, indices.device), []).append(name)
    last: dict[str, int] = {}
    for (_, device), names in kinds.items():
        parts = [entries[n][0] for n in names]
        flat, bounds = joined(parts, device), offsets_of(parts, device)
        ascending = flat[1:] > flat[:-1]
        ascending[bounds[1:-1] - 1] = True  # from one tensor to the next
        correct = ascending.all() & (flat[bounds[:-1]] >= 0).all()
        *found, all_correct = torch.cat([flat[bounds[1:] - 1].to(torch.int64), correct.view(1)]).tolist()
        if not all_correct:
            wrong = next(n for n, i in zip(names, parts) if int(i[0]) < 0 or not bool((i[1:] > i[:-1]).all()))
            raise ValueError(f"indices of {wrong!r} must be at least 0 and strictly ascending")
        last |= zip(names, found)
    return last


def _split(names: list[str], offsets: Tensor, indices: Tensor, values: Tensor) -> Entries:
    bounds = offsets.tolist()
    return {n: (indices[i:j], values[i:j]) for n, i, j in zip(names, bounds, bounds[1:])}


def _of_one_dtype(indices: list[Tensor]) -> list[Tensor]:
    wide = any(i.dtype == torch.int64 for i in indices)
    return [i.to(torch.int64) if wide else i for i in indices]


def _later_entries(name: str, first: tuple[Tensor, Tensor], later: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The entries of both, with the later values where both have one."""
    (indices, values), (later_indices, later_values) = first, (t.to(first[0].device) for t in later)
    if values.dtype != later_values.dtype:
        raise ValueError(f"tensor {name!r} is {values.dtype} in this patch and {later_values.dtype} in later")
    both, order = torch.sort(torch.cat([indices.to(torch.int64), later_indices.to(torch.int64)]), stable=True)
    last = torch.ones_like(both, dtype=torch.bool)
    last[:-1] = both[1:] != both[:-1]
    stacked = torch.cat([bits(values), bits(later_values)])[order[last]]
    return both[last].to(torch.promote_types(indices.dtype, later_indices.dtype)), stacked.view(values.dtype)
