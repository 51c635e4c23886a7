"""The tensors of models that deltas are made of and written to."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deftx_kernels import validation
from deftx_kernels.delta.exact import SUMMABLE, bits_differ
from deftx_kernels.delta.renaming import fitting_prefix
from deftx_kernels.kernels.tensors import FLOATS
from deftx_kernels.mask import CSRMask
from deftx_kernels.nn import masked_parameters, plain_tensors

Model = nn.Module | Mapping[str, Tensor]


def current_tensors(model: Model) -> dict[str, Any]:
    """Name → parameter or buffer as the model has it now, tied ones under each name."""
    if not isinstance(model, nn.Module):
        return dict(model)
    inner = validation.unwrapped(model)
    found = (*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False))
    return {validation.plain_name(n): t for n, t in found}


def persistent_buffers(model: Model) -> dict[str, Tensor]:
    """Name → buffer that state dicts have, tied ones under each name; none for a mapping."""
    found = {}
    inner = validation.unwrapped(model) if isinstance(model, nn.Module) else nn.ModuleList()
    for prefix, module in inner.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                found[validation.plain_name(f"{prefix}.{name}" if prefix else name)] = buffer.detach()
    return found


def plain_model(model: Model) -> Model:
    """The model; for a sparsified module the tensors of the plain model by name, tied ones under each name, into which
    the masked values have been written.
    """
    if not isinstance(model, nn.Module) or not (masked := masked_parameters(model)):
        return model
    plain_tensors(model)
    values = {id(m.values) for m in masked.values()}
    named = validation.unwrapped(model).named_parameters(remove_duplicate=False)
    plain = {validation.plain_name(n): p.detach() for n, p in named if id(p) not in values}
    return plain | persistent_buffers(model)


def _tensors_and_buffers(model: Model, argument: str) -> tuple[dict[str, Tensor], set[str]]:
    """Name → tensor (the plain model's of a sparsified one), tied ones under each name, and the names of buffers."""
    if isinstance(model, nn.Module) and masked_parameters(model):
        tensors = validation.all_tensors(plain_tensors(validation.unwrapped(model)), argument)
    else:
        tensors = validation.all_tensors(model, argument)
    buffers = persistent_buffers(model)
    tensors |= buffers
    for name, tensor in tensors.items():
        validation.check_plain(tensor, f"{argument}[{name!r}]")
        validation.check_readable(tensor, f"{argument}[{name!r}]")
    return tensors, set(buffers)


class Matched(NamedTuple):
    """The tensors of a tuned model and of its base. Names are the first in `base` of tied tensors."""

    tuned: dict[str, Tensor]
    base: dict[str, Tensor]
    tied: dict[str, str]  # name in `base` → first name of the same tensor
    shared: list[str]  # names of tensors to be compared, of one shape in both
    buffers: set[str]  # names in both that are a buffer in one
    whole: set[str]  # names of tensors to be kept whole


def match_tensors(tuned: Model, base: Model, mask: CSRMask | None, dense: Iterable[str]) -> Matched:
    """Match tensors by name; arguments and errors as in `SparseDelta.from_models`."""
    old, old_buffers = _tensors_and_buffers(base, "base")
    new, new_buffers = _tensors_and_buffers(tuned, "tuned")
    wanted, covered = set(dense), () if mask is None else mask.names
    buffers = (old_buffers | new_buffers) & old.keys() & new.keys()
    old = {n: t for n, t in old.items() if n in new or n not in old_buffers}
    tied = validation.tied_names(old, "base")
    new = validation.with_tied_names(
        {n: t for n, t in new.items() if n in old or n in wanted or n not in new_buffers}, tied
    )
    tied_in_tuned = validation.tied_names({n: new[n] for n in sorted(new, key=lambda n: n not in old)}, "tuned")
    for name, first in validation.tied_in_either(old, new, tied).items():
        if name not in covered and not (name in wanted and first in covered):  # else they are two tensors
            tied[name] = first
    for name in sorted(wanted - new.keys()):
        raise ValueError(f"dense names {name!r}, which tuned lacks")
    whole = {tied.get(n, n) for n in wanted} | {n for n in new.keys() - old.keys() if tied_in_tuned[n] == n}
    shared = sorted(n for n in old if n not in whole and tied[n] == n)
    for name in shared:
        if name not in new:
            raise ValueError(f"tuned lacks tensor {name!r} of base")
        if new[name].shape != old[name].shape:
            raise ValueError(
                f"tensor {name!r} has shape {list(new[name].shape)} in tuned and {list(old[name].shape)} in base"
            )
    return Matched(new, old, tied, shared, buffers, whole)


def checked_mask(matched: Matched, mask: CSRMask | None) -> CSRMask:
    """The mask of `from_models`, by default of all entries that differ. Adds buffers that differ outside it to
    `matched.whole`; ValueError for other differences outside it.
    """
    new, old = matched.tuned, matched.base
    differing = {n: bits_differ(new[n], old[n]) for n in matched.shared}
    for name in [n for n in matched.shared if n in matched.buffers and (mask is None or n not in mask)]:
        if bool(differing.pop(name).any()):
            matched.whole.add(name)
    if mask is None:
        names = [n for n in differing if old[n].dtype in SUMMABLE]
        changed = [n for n in names if bool(differing[n].any())] or names
        mask = CSRMask.from_dense({n: differing[n] for n in changed})
    for name, tensor in zip(mask.names, mask.checked_tensors(old, "base")):
        if (first := matched.tied[name]) != name:
            raise ValueError(f"mask covers {name!r}, which is the tensor {first!r} of base: use that name in the mask")
        if not {tensor.dtype, new[name].dtype} <= SUMMABLE:
            raise TypeError(f"mask covers {name!r}, which is {tensor.dtype} in base and {new[name].dtype} in tuned")
        if name in differing:
            one = mask[name].to(differing[name].device)
            one.scatter_(differing, torch.zeros(one.nnz, dtype=torch.bool, device=one.device))
    for name, outside in differing.items():
        if bool(outside.any()):
            raise ValueError(
                f"tuned differs from base in {int(outside.sum())} entries of {name!r} that neither mask nor dense "
                "covers"
            )
    return mask


def checked_targets(
    model: Model, mask: CSRMask, dense: Mapping[str, Tensor], tied: Mapping[str, str], strict: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's tensors that a delta (mask, dense, tied) is written to, by name, and which of them are copies: name →
    name in the delta. Errors and `strict` as in `SparseDelta.apply_`.
    """
    if isinstance(model, nn.Module) and masked_parameters(model):
        raise ValueError("model is sparsified: densify(model) before a delta is applied")
    if not isinstance(model, nn.Module):
        validation.all_tensors(model, "model")
    present = current_tensors(model)
    shapes = dict(zip(mask.names, mask.shapes)) | {n: t.shape for n, t in dense.items()}
    copies = {n: first for n, first in tied.items() if first in shapes and n not in shapes and n in present}
    shapes |= {n: shapes[first] for n, first in copies.items()}
    labels = {n: f"model's tensor {n!r}" for n in shapes}
    for name, shape in shapes.items():
        if name not in present:
            wrapped = [w + name for w in ("_orig_mod.", "module.") if w + name in present]
            has = f", but has {wrapped[0]!r}: give the tensors of the model inside its wrapper" if wrapped else ""
            if not wrapped and (found := fitting_prefix([*mask.names, *dense], present)):
                has = f": delta.{found[0]}({found[1]!r}) has the model's names"
            raise ValueError(f"model lacks tensor {name!r} of the delta{has}")
        needs_sum = copies.get(name, name) in mask
        _check_target(present[name], labels[name], shape, needs_sum, dense.get(name))
    targets = {n: present[n] for n in shapes}
    for name, first in validation.tied_names(targets, "model").items():
        if name != first:
            if copies.get(name) != copies.get(first, first):
                raise ValueError(f"model has one tensor as {first!r} and {name!r}, the delta changes both")
            del targets[name], copies[name]
    for name, first in list(copies.items()):
        if not validation.same_bits(targets[name], targets[first]):
            if strict:
                raise ValueError(
                    f"{labels[name]} was tied to {first!r} in the base of this delta, here it has other values "
                    "(strict=False leaves it as it is)"
                )
            del targets[name], copies[name]
    validation.check_writable({labels[n]: t for n, t in targets.items()})
    return targets, copies


def check_not_8_bit(names: Iterable[str], tensors: Mapping[str, Any]) -> None:
    """ValueError, naming the tensor, unless those of a delta have 16 bits or more."""
    for name in names:
        found = tensors.get(name)
        if isinstance(found, Tensor) and found.dtype not in FLOATS:
            raise ValueError(
                f"model's tensor {name!r} is {str(found.dtype).removeprefix('torch.')}, in which most of a delta would "
                "be lost: float32, float64, bfloat16 or float16 is needed"
            )


def _check_target(tensor: Tensor, label: str, shape: torch.Size, needs_sum: bool, whole: Tensor | None) -> None:
    validation.check_plain(tensor, label)
    validation.check_readable(tensor, label)
    if tensor.shape != shape:
        raise ValueError(f"{label} has shape {list(tensor.shape)}, the delta was made for {list(shape)}")
    if needs_sum and tensor.dtype not in SUMMABLE:
        raise ValueError(f"{label} is {tensor.dtype}, a difference needs floating point")
    if whole is not None and not torch.can_cast(whole.dtype, tensor.dtype):
        raise ValueError(f"{label} is {tensor.dtype}, the delta has it as {whole.dtype}")
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{label} was made in inference_mode and can be written only there")
