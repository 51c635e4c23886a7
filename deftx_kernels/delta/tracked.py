"""Patches of what an optimizer's steps changed, from its marks: `SparseAdamW.take_patch`."""

from collections.abc import Callable

import torch
from torch import Tensor

from deftx_kernels import validation
from deftx_kernels.delta.model_state import State, bits, dense, model_tensors, state_of
from deftx_kernels.delta.models import Model, plain_model
from deftx_kernels.delta.patch import SparsePatch
from deftx_kernels.ops.schemas import index_dtype
from deftx_kernels.optim.tracking import Changed, register_patch_maker


def tracked_patch(
    read_changes: Callable[[], list[Changed]], before: State | None, model: Model, model_version: int
) -> tuple[SparsePatch, State]:
    """The patch of an optimizer's changes, and the state of the model now.

    Args:
        read_changes: returns what has changed in the tensors that the optimizer steps.
        before: the state of the model when the last patch was taken. Without it, tensors that the optimizer does not
            step are taken to be as they were.
        model, model_version: as in `SparseAdamW.take_patch`, which see for errors.
    """
    tensors, tied = _untied_tensors(model)
    changes = read_changes()  # after the values of a sparsified model have been written to its dense tensors
    names = {_memory(t): n for n, t in tensors.items() if t.numel()}
    after = state_of(tensors)
    base = dict(after if before is None else before)
    _check_same_tensors(base, after)
    marked: dict[str, Tensor] = {}
    whole: set[str] = set()
    for change in changes:
        if not change.tensor.numel():
            continue
        if (name := names.get(_memory(change.tensor))) is None:
            shape = list(change.tensor.shape)
            raise ValueError(
                f"model lacks a tensor of shape {shape} that the optimizer steps: give the whole model, and not a copy"
            )
        marked[name] = change.indices
        if before is None and change.checksum is not None:
            base[name] = base[name]._replace(checksum=change.checksum)
        if change.other_writes or change.checksum not in (None, base[name].checksum):
            whole.add(name)
    entries = {}
    for name, tensor in tensors.items():
        indices = marked.get(name, torch.empty(0, dtype=torch.int64, device=tensor.device))
        unchanged = after[name] == base[name]
        if not unchanged and (name in whole or not len(indices)):
            indices = torch.arange(tensor.numel(), device=tensor.device)
        if len(indices):
            values = bits(dense(tensor)).index_select(0, indices).view(tensor.dtype)
            entries[name] = indices.to(index_dtype([tensor])), values
    return SparsePatch(entries, base, after, tied, model_version), after


def _untied_tensors(model: Model) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Name → tensor of the plain model, tied ones under the first name; and the other names → the first."""
    tensors = model_tensors(plain_model(model), "model")
    first = validation.tied_names(tensors, "model")
    tied = {n: other for n, other in first.items() if n != other}
    return {n: t for n, t in tensors.items() if n not in tied}, tied


def _memory(tensor: Tensor) -> tuple:
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _check_same_tensors(before: State, after: State) -> None:
    if different := before.keys() ^ after.keys():
        name = min(different)
        where = "now" if name in before else "when the last patch was taken"
        raise ValueError(f"model lacks tensor {name!r} {where}: make a new optimizer after the model has changed")
    for name, state in after.items():
        if state[:2] != before[name][:2]:
            raise ValueError(
                f"tensor {name!r} is {state} and was {before[name]} when the last patch was taken: make a new optimizer"
                " after the model has changed"
            )


register_patch_maker(tracked_patch)
