"""Other names for a delta's tensors: those of a model that wraps its base, or that the base wraps."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.delta.exact import Low
from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import check_mask_layout


def tensor_names(mask: CSRMask, dense: Collection[str], metadata: Mapping[str, Any]) -> list[str]:
    """All names that a delta has for tensors of its model."""
    return [*mask.names, *dense, *metadata.get("tied", {})]


def renamed_parts(
    mask: CSRMask,
    values: Tensor,  # [nnz]
    dense: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    low: Low | None,
    names: Mapping[str, str],
) -> tuple[CSRMask, Tensor, dict[str, Tensor], dict[str, Any], Low | None]:
    """The arguments of a SparseDelta with other names; as `SparseDelta.renamed`."""
    own = tensor_names(mask, dense, metadata)
    if unknown := sorted(names.keys() - set(own)):
        raise ValueError(f"names: the delta has no tensor {unknown[0]!r}")
    new = Counter(names.get(n, n) for n in own)
    if twice := [n for n, count in new.items() if count > 1]:
        raise ValueError(f"names: two tensors of the delta would be {twice[0]!r}")

    def rename(name: str) -> str:
        return names.get(name, name)

    new_names = {n: rename(n) for n in mask.names}
    renamed_mask, renamed_values, renamed_low = picked_entries(mask, values, low, new_names)
    renamed_dense = {rename(n): t for n, t in dense.items()}
    return renamed_mask, renamed_values, renamed_dense, _renamed_metadata(metadata, rename), renamed_low


def picked_entries(
    mask: CSRMask, values: Tensor, low: Low | None, names: Mapping[str, str]
) -> tuple[CSRMask, Tensor, Low | None]:
    """Mask, values and low terms of some of the mask's tensors, in the order of their new names.

    Args:
        names: name → new name.
    """
    order = sorted(names, key=names.__getitem__)
    shapes = [mask.shapes[mask.positions[n]] for n in order]
    new = [names[n] for n in order]
    check_mask_layout(new, shapes)
    if order == list(mask.names):
        return CSRMask.unchecked(new, shapes, mask.crow_indices, mask.col_indices), values, low
    parts = []
    for name in order:
        one = mask[name]
        parts.append(CSRMask.unchecked([names[name]], one.shapes, one.crow_indices, one.col_indices))
    places = [mask.positions[n] for n in order]
    spans = [(mask.entry_offsets[i], mask.entry_offsets[i + 1]) for i in places]
    if low is not None:
        starts = accumulate((end - begin for begin, end in spans), initial=0)
        within = [(low[0] >= begin) & (low[0] < end) for begin, end in spans]
        moved = [low[0][w] - begin + start for w, (begin, _), start in zip(within, spans, starts)]
        low = torch.cat(moved), torch.cat([low[1][w] for w in within])
    if not parts:
        return CSRMask.unchecked([], [], mask.crow_indices[:1], mask.col_indices[:0]), values[:0], None
    return CSRMask.joined(parts), torch.cat([values[begin:end] for begin, end in spans]), low


def _renamed_metadata(metadata: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """The metadata with other names of tensors in base_fingerprint and tied."""
    renamed = dict(metadata)
    if "base_fingerprint" in metadata:
        renamed["base_fingerprint"] = {rename(n): value for n, value in metadata["base_fingerprint"].items()}
    if "tied" in metadata:
        renamed["tied"] = {rename(n): rename(first) for n, first in metadata["tied"].items()}
    return renamed


def fitting_prefix(names: Collection[str], present: Collection[str]) -> tuple[str, str] | None:
    """("with_prefix" or "without_prefix", the prefix) for which all names are present; None if there is none."""
    first = next(iter(names), "")
    for name in present:
        prefix = name.removesuffix(first)
        if prefix != name and prefix.endswith(".") and all(prefix + n in present for n in names):
            return "with_prefix", prefix
    for i in [i for i, letter in enumerate(first) if letter == "."]:
        prefix = first[: i + 1]
        if all(n.startswith(prefix) and n.removeprefix(prefix) in present for n in names):
            return "without_prefix", prefix
    return None
