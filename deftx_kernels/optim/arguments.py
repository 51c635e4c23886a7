"""Checks of the arguments of an optimizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import check_hyperparameters, check_int, dense_name, plain_name


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
