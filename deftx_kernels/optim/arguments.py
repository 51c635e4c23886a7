"""Checks of the arguments of an optimizer."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.shards import check_placement, check_rows, check_same, is_dtensor
from deftx_kernels.nn import check_shards
from deftx_kernels.validation import (
    check_float,
    check_hyperparameters,
    check_int,
    check_plain,
    dense_name,
    plain_name,
)


def check_options(group: Mapping[str, Any]) -> None:
    check_hyperparameters(group["lr"], group["betas"], group["eps"], group["weight_decay"], group["l1"])
    if float(group["lr"]) < 0:
        raise ValueError(f"lr must be at least 0, got {float(group['lr'])}")
    if group["state_dtype"] not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be torch.float32, torch.bfloat16 or None, got {group['state_dtype']}")
    check_int(group["seed"], "seed", 0)
    if group["seed"] >= 2**31:
        raise ValueError(f"seed must be less than 2**31, got {group['seed']}")


def trainable(named_params: Any) -> list[tuple[str, Tensor]]:
    """The (name, parameter) pairs of the parameters that need a gradient."""
    pairs = [named_params] if isinstance(named_params, Tensor) else list(named_params)
    for pair in pairs:
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            raise TypeError("named_params must be (name, parameter) pairs, such as model.named_parameters()")
    return [(name, param) for name, param in pairs if param.requires_grad]


def as_lists(named_params: Any) -> Any:
    """The argument with lists in place of generators, to be read more than once."""
    if isinstance(named_params, Tensor | Mapping | str) or not isinstance(named_params, Iterable):
        return named_params
    given = list(named_params)
    return [{**g, "params": as_lists(g["params"])} if isinstance(g, dict) and "params" in g else g for g in given]


def tensors_in(named_params: Any) -> list[Tensor]:
    """The tensors in (name, parameter) pairs and groups of them; anything else is left out."""
    found = []
    for item in named_params if isinstance(named_params, list) else ():
        if isinstance(item, dict):
            found += tensors_in(item.get("params"))
        elif isinstance(item, tuple):
            found += [part for part in item if isinstance(part, Tensor)]
    return found


def check_ranks_agree(content: Any, meshes: Iterable[Any]) -> None:
    """ValueError, on all ranks of the meshes, unless they have the same parameter groups, or the same fingerprint."""
    if isinstance(content, list):
        content = [(g["param_names"], [[*p.shape] for p in g["params"]], g["mask_fingerprints"]) for g in content]
    message = (
        "the mask and the parameters must be the same on all ranks, those of rank 0 differ from those of ranks "
        "{ranks}: select the mask from common scores (distributed.topk_mask), or distributed.broadcast_mask"
    )
    check_same(content, message, meshes)


_DTENSORS = (
    "is a DTensor, of which masked entries can be trained, without track_changes. torch.optim.AdamW trains every "
    "entry; distributed.diff_patch finds what has changed"
)


def check_memory(names: Iterable[str], params: Iterable[Tensor]) -> None:
    """ValueError if a parameter was what FSDP2 gathered for a forward pass: `model.parameters()` has those until the
    backward pass, which frees them, and never gives them a gradient.
    """
    for name, param in zip(names, params):
        if is_dtensor(param) or param.is_meta or param.layout != torch.strided:  # other layouts have no such storage
            continue
        if param.numel() and not param.untyped_storage().nbytes():
            raise ValueError(
                f"named_params[{name!r}] has no memory: it was a whole tensor that FSDP2 had gathered. Call "
                "`reshard()` of each FSDPModule after a forward pass, or make the optimizer before it"
            )


def check_stepped_whole(name: str, param: Tensor) -> None:
    """TypeError unless the kernel can step every entry of a parameter."""
    if is_dtensor(param):
        raise TypeError(f"named_params[{name!r}] {_DTENSORS}")
    check_float(param, f"named_params[{name!r}]")


def check_masked(name: str, param: Tensor, shapes: Mapping[str, torch.Size], track_changes: bool) -> bool:
    """Whether a mask over tensors of these names and shapes covers a parameter. An error if it does not fit."""
    if name not in shapes:
        if is_dtensor(param):
            check_placement(name, param)
        return False
    if not is_dtensor(param):
        check_plain(param, f"named_params[{name!r}]")
    if param.shape != (shape := shapes[name]):
        raise ValueError(f"{name!r} has shape {list(param.shape)}, the mask was made for {list(shape)}")
    if is_dtensor(param):
        if track_changes:
            raise TypeError(f"named_params[{name!r}] {_DTENSORS}")
        check_placement(name, param)
        check_rows(name, param)
    return True


def check_entry(entry: Any, track_changes: bool) -> None:
    """An error unless the values of this entry of a sparsified model can be stepped."""
    if entry.dense is None:
        raise ValueError(entry.replaced_message)
    if entry.is_sharded:
        if track_changes:
            raise TypeError(f"named_params[{entry.name!r}] {_DTENSORS}")
        check_shards(entry)


def checked_for_mask(
    mask: CSRMask, present: CSRMask | None, pairs: Iterable[tuple[str, tuple[Tensor, Tensor]]]
) -> dict[str, Tensor]:
    """Name → dense tensor of the covered parameters, for another mask than the present one. Errors as `update_mask`."""
    if not isinstance(mask, CSRMask):
        raise TypeError(f"mask must be a CSRMask, got {type(mask).__name__}")
    if present is None:
        raise ValueError("mask cannot be set: this optimizer was made without one and trains every entry")
    if (mask.names, mask.shapes) != (present.names, present.shapes):
        raise ValueError("mask must cover the same tensors as the one that it replaces")
    dense_tensors = {}
    for name, (dense, param) in pairs:
        if param is not dense:
            raise ValueError(
                "mask cannot change for a sparsified model: densify and sparsify it, and make a new optimizer"
            )
        dense_tensors[name] = dense
    check_covered(mask, dense_tensors)
    return dense_tensors


def check_same_mask(saved_groups: list[dict[str, Any]], groups: list[dict[str, Any]]) -> None:
    """ValueError unless the groups of a state were saved with the masks of these groups."""
    differences = []
    for i, (saved, group) in enumerate(zip(saved_groups, groups)):
        saved_fingerprints, fingerprints = saved.get("mask_fingerprints"), group["mask_fingerprints"]
        if saved_fingerprints is None:
            raise ValueError(
                f"param_groups[{i}] of the state has no mask_fingerprints: it is not a state of this SparseAdamW"
            )
        names = group["param_names"]
        saved_names = saved.get("param_names", names)
        for name, saved_name, old, new in zip(names, saved_names, saved_fingerprints, fingerprints):
            if old == new:
                continue
            if dense_name(name) != dense_name(saved_name):
                raise ValueError(
                    f"param_groups[{i}] of the state belongs to other parameters: it has {saved_name!r} where "
                    f"this optimizer has {name!r}. Give the optimizer the saved run's parameters, in their order"
                )
            differences.append(f"{name!r} {_describe_difference(old.partition(':')[0], new.partition(':')[0])}")
    if differences:
        more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise ValueError(
            f"the state was saved with another mask than this optimizer's: {'; '.join(differences[:3])}{more}"
        )


def check_covered(mask: CSRMask, names: Iterable[str]) -> None:
    missing = {name for name, row in mask.summary().items() if row["nnz"]}.difference(names)
    if missing:
        raise ValueError(f"mask covers {min(missing)!r}, which is not among the trainable named_params")


def _describe_difference(saved: str, current: str) -> str:
    if not saved or not current:
        return f"was {'masked' if saved else 'not masked'} and is {'masked' if current else 'not masked'} now"
    return f"has {saved} entries " + (f"there and {current} here" if saved != current else "at other positions")


def name_in_mask(name: str, mask: CSRMask | None) -> str:
    """`plain_name`, also without the prefix of DistributedDataParallel; a name that is in the mask stays as it is."""
    if mask is None:
        return plain_name(name).removeprefix("module.")
    if name in mask:
        return name
    name = plain_name(name)
    inner = name.removeprefix("module.")  # a model may have a module of that name, too
    return inner if inner in mask else name
