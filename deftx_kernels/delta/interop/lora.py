"""LoRA adapters of PEFT (Hu et al. 2022), as the largest entries of their products."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.delta.interop.adapters import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_delta,
    read_adapter,
    split_by_module,
)
from deftx_kernels.delta.models import Model
from deftx_kernels.delta.sparse_delta import SparseDelta
from deftx_kernels.files import reading
from deftx_kernels.mask import CSRMask
from deftx_kernels.select.functional import selected_counts
from deftx_kernels.select.streaming import select_by_groups
from deftx_kernels.validation import all_tensors, check_finite, check_mask_layout, is_number

# Settings with which the adapter is more than scaling * B @ A on the weights of the base, and their usual values.
_PLAIN: dict[str, tuple] = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "kasa_config": (None,),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    # The others change the base's weights, too.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
}


def from_peft_lora(
    directory: str | os.PathLike,
    *,
    density: float | None = None,
    k: int | None = None,
    base: Model | None = None,
    revision: str | None = None,
) -> SparseDelta:
    """The largest entries of a LoRA adapter's products, over all its layers together, as a delta.

    The products scaling * B @ A are computed in float64 and rounded to float32, a group of layers at a time; scaling is
    alpha / r, or alpha / sqrt(r) with rsLoRA. The selection is exact, as that of `topk_mask`. Whole tensors
    (`modules_to_save`) are kept.

    Args:
        directory: a folder, or a repository of the Hugging Face hub.
        density: the fraction of the elements of all adapted weights that is kept, 0 <= density <= 1.
        k: instead of it, how many entries are kept.
        base: the base model or its tensors, to check names and shapes, and whether it has an adapted tensor twice.

    Raises:
        FileNotFoundError: there is no such folder or repository, or a file of the adapter is missing.
        ValueError: not exactly one of k and density; the adapter is damaged, not LoRA, or has what a delta of these
            weights cannot hold (DoRA, biases, embeddings, convolutions, an initialisation that changes the base); a
            weight is not in `base`, has another shape, or is also that of a module without adapter (a tied embedding).
            The setting or the tensor is named.
    """
    folder, config, tensors = read_adapter(directory, revision, "LORA")
    with reading(folder / ADAPTER_CONFIG, "LoRA configuration"):
        for setting, usual in _PLAIN.items():
            if not any(config.get(setting) is v or config.get(setting) == v for v in usual):
                raise ValueError(f"{setting} = {config[setting]!r} cannot be converted to a sparse delta")
        transposed = config.get("fan_in_fan_out", False)
        if not isinstance(transposed, bool):
            raise ValueError(f"fan_in_fan_out must be a bool, got {transposed!r}")
    shapes = None if base is None else {n: t.shape for n, t in all_tensors(base, "base").items()}
    with reading(folder / ADAPTER_WEIGHTS, "LoRA adapter"):
        modules, dense = split_by_module(tensors, ("lora_A.weight", "lora_B.weight"))
        if other := [n for n in dense if ".lora_" in n]:
            raise ValueError(f"its tensor {other[0]!r} cannot be converted to a sparse delta")
        if not modules:
            raise ValueError("it holds no lora_A")
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for module, parts in sorted(modules.items(), key=lambda item: f"{item[0]}.weight"):
            factors[f"{module}.weight"] = _factors(module, parts, _scaling(module, parts, config), transposed, shapes)
    sizes = {n: torch.Size((len(left), right.shape[1])) for n, (left, right) in factors.items()}
    counts = selected_counts(list(sizes), list(sizes.values()), k, density, "global")
    with reading(folder / ADAPTER_WEIGHTS, "LoRA adapter"):
        mask, values = _largest_entries(factors, sizes, counts)
    return adapter_delta(mask, values, dense, "lora", config, base)


def _scaling(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> float:
    """alpha / r; the alpha of a module is that of the first pattern that matches its name or the end of it."""
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"alpha_pattern must be an object, got {patterns!r}")
    key = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)
    alpha: Any = config.get("lora_alpha") if key is None else patterns[key]
    if not is_number(alpha):
        raise ValueError(f"lora_alpha of {module!r} must be a finite number, got {alpha!r}")
    r = max(1, len(parts.get("lora_A.weight", ())))
    return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)


def _factors(
    module: str,
    parts: Mapping[str, Tensor],
    scaling: float,
    transposed: bool,
    shapes: Mapping[str, torch.Size] | None,
) -> tuple[Tensor, Tensor]:
    """Two float64 matrices whose product is the difference of one module's weight."""
    a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    if a is None or b is None:
        raise ValueError(f"{module!r} lacks its lora_{'A' if a is None else 'B'}")
    if a.dim() != 2 or b.dim() != 2 or not (a.is_floating_point() and b.is_floating_point()):
        raise ValueError(f"the LoRA matrices of {module!r} have shapes {list(a.shape)} and {list(b.shape)}, not 2-D")
    if len(a) != b.shape[1]:
        raise ValueError(f"lora_A of {module!r} has rank {len(a)}, its lora_B {b.shape[1]}")
    for part, factor in (("lora_A", a), ("lora_B", b)):
        check_finite(factor, f"{part} of {module!r}")
    left, right = (a.T, b.T) if transposed else (b, a)
    shape, name = (len(left), right.shape[1]), f"{module}.weight"
    if shapes is not None and (name not in shapes or shapes[name] != shape):
        found = f"of shape {list(shapes[name])}" if name in shapes else "missing"
        raise ValueError(f"{name!r} is {found} in base, the adapter was made for {list(shape)}")
    return left.to(torch.float64) * scaling, right.to(torch.float64)


def _largest_entries(
    factors: Mapping[str, tuple[Tensor, Tensor]], shapes: dict[str, torch.Size], counts: list[int]
) -> tuple[CSRMask, Tensor]:
    """Mask and compact values of the largest entries of all products, of which one group exists at a time."""
    check_mask_layout(list(shapes), list(shapes.values()))

    def products(names: Sequence[str]) -> list[Tensor]:
        found = [torch.matmul(*factors[n]).to(torch.float32) for n in names]
        for name, product in zip(names, found):
            check_finite(product, f"the product of {name!r}")
        return found

    crow, col = select_by_groups(products, shapes, counts, "global", torch.float32, torch.device("cpu"), None)
    mask = CSRMask.unchecked(list(shapes), list(shapes.values()), crow, col)
    values = [mask[n].gather({n: products([n])[0]}) for n in shapes]
    return mask, torch.cat(values)
