"""Super-Tuning adapters of PEFT (arXiv:2607.09287)."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.delta.interop.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INTEGERS,
    adapter_delta,
    check_values,
    read_adapter,
    split_by_module,
)
from deftx_kernels.delta.interop.entries import Entries, mask_and_values
from deftx_kernels.delta.models import Model
from deftx_kernels.delta.sparse_delta import SparseDelta
from deftx_kernels.files import reading
from deftx_kernels.validation import all_tensors, check_plain, check_readable, is_number


def from_peft_supertuning(directory: str | os.PathLike, base: Model, revision: str | None = None) -> SparseDelta:
    """Read a Super-Tuning adapter that PEFT saved, as the differences of its modules' weights.

    Where the file has no indices (`save_precomputed_indices=False`) they are those of the `sparsity` of the base's
    largest or smallest weights, found as PEFT finds them when it loads the adapter: by `torch.topk`, whose choice among
    equal weights can differ between devices and versions.

    Args:
        directory: a folder, or a repository of the Hugging Face hub.
        base: the base model or its tensors: the file has no shapes.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file of the adapter is missing.
        ValueError: it is damaged, not a Super-Tuning adapter, or one with a low-rank part (`r`); a weight is not in
            `base`, does not fit, or is also that of a module without adapter (a tied embedding).
    """
    folder, config, tensors = read_adapter(directory, revision, "SUPERTUNING")
    if config.get("r") is not None:
        raise ValueError(f"{folder / ADAPTER_CONFIG}: r = {config['r']!r}: a low-rank part cannot be read as a delta")
    weights = all_tensors(base, "base")
    with reading(folder / ADAPTER_WEIGHTS, "Super-Tuning adapter"):
        modules, dense = split_by_module(tensors, ("supertuning_values", "supertuning_indices"))
        if not modules:
            raise ValueError("it holds no supertuning_values")
        mask, found = mask_and_values(
            {f"{m}.weight": _decode(m, parts, weights.get(f"{m}.weight"), config) for m, parts in modules.items()}
        )
    return adapter_delta(mask, found, dense, "supertuning", config, base)


def _decode(module: str, parts: Mapping[str, Tensor], weight: Tensor | None, config: Mapping[str, Any]) -> Entries:
    """The entries of one module's weight."""
    if weight is None:
        raise ValueError(f"base lacks {module + '.weight'!r}")
    values, index = check_values(module, parts.get("supertuning_values")), parts.get("supertuning_indices")
    if index is None:
        index = _largest_weights(module, weight, config)
    if index.dtype not in INTEGERS or index.shape != values.shape:
        raise ValueError(f"the indices of {module!r} do not fit its {len(values)} values")
    index = index.to(torch.int64)
    if bool(((index < 0) | (index >= weight.numel())).any()):
        raise ValueError(f"the indices of {module!r} do not fit a weight of shape {list(weight.shape)}")
    return weight.shape, index, values


def _largest_weights(module: str, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    """The flat indices that PEFT computes for a weight, in its order."""
    check_plain(weight, f"base[{module + '.weight'!r}]")
    check_readable(weight, f"base[{module + '.weight'!r}]")
    sparsity: Any = config.get("sparsity")
    largest: Any = config.get("select_top")
    if not is_number(sparsity) or not 0 <= sparsity < 1 or not isinstance(largest, bool):
        raise ValueError(f"its configuration must have a sparsity in [0, 1) and select_top, got {sparsity}, {largest}")
    count = int(weight.numel() * (1 - sparsity))
    return torch.topk(weight.detach().abs().flatten(), count, largest=largest).indices.cpu()
