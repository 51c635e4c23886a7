"""The tensors of models that patches compare and write, and the version of a model: the checksums of their bits."""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deftx_kernels import validation
from deftx_kernels.delta.models import Model, persistent_buffers
from deftx_kernels.kernels.tensors import INTEGERS
from deftx_kernels.ops.schemas import index_dtype

_CHUNK = 1 << 20  # elements of a part that have an index at a time


class TensorState(NamedTuple):
    """What a version of a model says of one tensor."""

    dtype: str  # without "torch."
    shape: tuple[int, ...]
    checksum: int  # of the bits, int64

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


State = dict[str, TensorState]  # by name, tied tensors once


def version(state: State) -> str:
    """SHA-256 (hex) of the names, dtypes, shapes and checksums of a model's tensors."""
    return hashlib.sha256(json.dumps(sorted(state.items())).encode()).hexdigest()


def state_of(tensors: Mapping[str, Tensor]) -> State:
    """The state of each tensor. Reads all of them once."""
    checksums: dict[str, int] = {}
    for names in by_kind(tensors):
        sums = torch.ops.deftx.bit_checksum([dense(tensors[n]) for n in names])
        checksums |= zip(names, sums.tolist())
    return {n: layout(t)._replace(checksum=checksums[n]) for n, t in tensors.items()}


def part_of_checksum(tensor: Tensor, start: int) -> int:
    """What a contiguous part of a flat tensor adds to its checksum. start: the index of the part's first element."""
    flat = bits(dense(tensor))
    if start == 0:
        return int(torch.ops.deftx.bit_checksum([flat]))
    size = flat.element_size()
    if all(n * size % 4 == 0 for n in (start, len(flat), flat.storage_offset())):
        flat, start = flat.view(torch.int32), start * size // 4  # a checksum is the sum over words of 32 bits
    total = torch.zeros(1, dtype=torch.int64, device=flat.device)
    for part in flat.split(_CHUNK):
        ends = torch.tensor([0, len(part)], device=flat.device)
        indices = torch.arange(start, start + len(part), device=flat.device)
        total += torch.ops.deftx.bit_checksum_change(ends, indices, torch.zeros_like(part), part)
        start += len(part)
    return int(total)


def layout(tensor: Tensor) -> TensorState:
    """The state of a tensor without its checksum."""
    return TensorState(dtype_name(tensor), tuple(tensor.shape), 0)


def added(checksum: int, change: int) -> int:
    """The sum of a checksum and its change: int64, modulo 2**64."""
    return (checksum + change + 2**63) % 2**64 - 2**63


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def by_kind(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of the contiguous tensors of each dtype, device and width of flat indices, what one call of an operator
    takes; and each other tensor, of which there is then one copy at a time.
    """
    groups: dict[tuple, list[str]] = {}
    for name, tensor in tensors.items():
        alone = None if tensor.is_contiguous() else name
        groups.setdefault((tensor.dtype, tensor.device, index_dtype([tensor]), alone), []).append(name)
    return list(groups.values())


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy of it."""
    return tensor.resolve_conj().resolve_neg().contiguous()


def bits(tensor: Tensor) -> Tensor:
    """The elements of a contiguous tensor as integers of their size, flat."""
    return tensor.view(-1).view(INTEGERS[tensor.element_size()])


def joined(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """`torch.cat` of flat tensors on a device, without a copy where they follow one another in one storage there."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != end:
            return torch.cat([bits(p.to(device)) for p in parts]).view(first.dtype)
        end += part.numel()
    return first.as_strided((end - first.storage_offset(),), (1,)).to(device)


def offsets_of(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """int64 [n + 1]: where each part begins in `joined(parts)`."""
    return torch.tensor([0, *(p.numel() for p in parts)], device=device).cumsum(0)


# ---- the tensors of a model ----
def model_tensors(model: Model, argument: str) -> dict[str, Tensor]:
    """A module's parameters and persistent buffers, or a mapping's items, tied ones under each name. ValueError or
    TypeError for tensors whose bits cannot be read.
    """
    tensors = validation.all_tensors(model, argument) | persistent_buffers(model)
    for name, tensor in tensors.items():
        check_bits(tensor, f"{argument}[{name!r}]")
    return tensors


def check_bits(tensor: Tensor, label: str) -> None:
    """ValueError or TypeError unless the operators can read a tensor's bits."""
    validation.check_plain(tensor, label)
    validation.check_readable(tensor, label)
    if tensor.element_size() not in INTEGERS:
        raise TypeError(f"{label} must have elements of 1, 2, 4 or 8 bytes, got {tensor.dtype}")


def matched_tensors(new: Model, old: Model) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The tensors of two models by name, in the order of `old`, without those that are tied: name → name of the first.

    Tensors are tied if one of the models has them in the same memory, and the other has them there, too, or equal, or
    only one of them.

    Raises:
        ValueError: one has a tensor that the other lacks, or in another shape or dtype; tensors share a part of their
            memory.
    """
    mine, theirs = model_tensors(new, "new"), model_tensors(old, "old")
    common = [n for n in theirs if n in mine]
    tied: dict[str, str] = {}
    for tensors, other, arguments in ((mine, theirs, ("new", "old")), (theirs, mine, ("old", "new"))):
        memory = validation.tied_names(tensors, arguments[0])
        first: dict[str, str] = {}
        for name in common:
            first.setdefault(memory[name], name)
        for name in tensors:
            found = first.get(memory[name])
            if name not in other:
                if found is None:
                    raise ValueError(f"{arguments[1]} lacks tensor {name!r} of {arguments[0]}")
                tied[name] = found
            elif found is not None and found != name and validation.same_bits(other[name], other[found]):
                tied.setdefault(name, found)
    for name in tied:
        while tied[name] in tied:
            tied[name] = tied[tied[name]]
    names = [n for n in common if n not in tied]
    for name in names:
        for what, one, other_one in (
            ("shape", list(mine[name].shape), list(theirs[name].shape)),
            ("dtype", mine[name].dtype, theirs[name].dtype),
        ):
            if one != other_one:
                raise ValueError(f"tensor {name!r} has {what} {one} in new and {other_one} in old")
    return {n: mine[n] for n in names}, {n: theirs[n] for n in names}, tied


def matched_targets(
    tensors: Mapping[str, Tensor],
    argument: str,
    names: Collection[str],
    tied: Mapping[str, str],
    states: Sequence[State] = (),
    exactly: bool = False,
) -> dict[str, str]:
    """Name in a model → name in a patch or anchor, for those of its names that are in `names`, or tied to one of them.
    Tensors that the model has in the same memory are given once.

    Args:
        states: states of the tensors; those with the same ones may be in the same memory.
        exactly: the model must have no other tensors.

    Raises:
        ValueError: the model lacks a tensor, has one too many, or has two in the same memory; with the name.
    """
    memory = validation.tied_names(tensors, argument)
    own_names = {name: tied.get(name, name) for name in tensors}
    shared = {memory[n] for n, known in own_names.items() if known in names}
    if exactly and (more := [n for n in own_names if memory[n] not in shared]):
        raise ValueError(f"{argument} has tensor {more[0]!r}, which is not in the version that this was made for")
    found = set(own_names.values())
    if missing := [n for n in names if n not in found]:
        raise ValueError(f"{argument} lacks tensor {missing[0]!r}")
    first: dict[str, str] = {}
    for name, known in own_names.items():
        if known not in names:
            continue
        other = own_names[first.setdefault(memory[name], name)]
        if other != known and not (states and all(s[other] == s[known] for s in states)):
            raise ValueError(f"{argument} has one tensor as {first[memory[name]]!r} and {name!r}, here they are two")
    return {name: own_names[name] for name in first.values()}


def check_layout(tensor: Tensor, label: str, wanted: TensorState) -> None:
    """ValueError unless a tensor has the dtype and the shape of a state."""
    if (found := layout(tensor))[:2] != wanted[:2]:
        raise ValueError(f"{label} is {found}, the version that this was made for has {wanted}")


def check_writable(tensor: Tensor, label: str) -> None:
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{label} was made in inference_mode and can be written only there")
    validation.check_writable({label: tensor})
