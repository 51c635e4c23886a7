"""`topk_mask`, `select_mask` and `low_rank_mask`: the public functions. Arguments are checked here, once."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from deftx_kernels.denoise.batches import denoise
from deftx_kernels.denoise.rule import Rule, check_rule
from deftx_kernels.mask import CSRMask
from deftx_kernels.ops.schemas import SCOPES
from deftx_kernels.select.streaming import select_by_groups
from deftx_kernels.validation import (
    all_tensors,
    check_devices,
    check_finite,
    check_floats,
    check_int,
    check_readable,
    is_number,
    named_tensors,
    tied_in_either,
    tied_names,
    with_tied_names,
)


def topk_mask(
    scores: Mapping[str, Tensor] | Tensor,
    *,
    k: int | None = None,
    density: float | None = None,
    scope: str = "global",
) -> CSRMask:
    """The mask of exactly the k entries of largest |score|.

    Ties go to the tensor whose name comes first, then to the smaller flat index: the same on every device and in every
    run. The scores are read once; those that are not contiguous are copied first. Beside the mask the compiled kernels
    need, for each score, a quarter of a byte and 1/32 of its size on the CPU, and about 0.45 bytes (float32) on a GPU,
    where the host waits once, at the end. Each tensor adds about 400 bytes, on a GPU 0.9 KB and, with scope "tensor",
    up to 12 KB more (float32; 12 bytes for each of its first 1024 entries); each thread of the CPU adds 1 MB at most, a
    GPU 13 MB.

    Args:
        scores: name → floating-point tensor on one device; a single tensor counts as {"tensor": scores}. Of several
            names of one tensor (the tied weights of a state dict) the first is in the mask.
        k: how many entries; with scope "tensor" or "row": of each tensor or row.
        density: or: their share, 0 <= density <= 1; round(density * numel) entries are selected.
        scope: "global" selects over all tensors together, "tensor" within each tensor, "row" within each row.

    Raises:
        ValueError: not exactly one of k and density, one out of range, an unknown scope, tensors on several devices, a
            score that is NaN or infinite (the tensor and the flat index are named).
        TypeError: a score is not a floating-point tensor.
    """
    if isinstance(scores, Tensor):
        scores = {"tensor": scores}
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be a tensor or a mapping of names to tensors, got {type(scores).__name__}")
    check_floats(list(scores.values()), list(scores), "scores")
    check_devices(scores, "scores")
    names = sorted(n for n, first in tied_names(scores, "scores").items() if n == first)
    tensors = [scores[n] for n in names]
    shapes = [t.shape for t in tensors]
    CSRMask.check_layout(names, shapes)
    counts = selected_counts(names, shapes, k, density, scope)
    with torch.no_grad():
        crow, col, bad = torch.ops.deftx.topk_mask([t.contiguous() for t in tensors], [], counts, SCOPES[scope])
    if (i := int(bad[0])) >= 0:
        _raise_not_finite(scores[names[i]], f"scores[{names[i]!r}]", int(bad[1]))
    return CSRMask._trusted(names, shapes, crow, col)


def _raise_not_finite(tensor: Tensor, label: str, index: int) -> NoReturn:
    value = float(tensor.detach().reshape(-1)[index])
    raise ValueError(f"{label} holds {value} at flat index {index}: every entry must be finite")


def selected_counts(
    names: Sequence[str], shapes: Sequence[torch.Size], k: int | None, density: float | None, scope: str
) -> list[int]:
    """What the operator takes as `k`: one number, or one for each tensor."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if (k is None) == (density is None):
        raise ValueError(f"exactly one of k and density is needed, got k={k}, density={density}")
    if density is not None and not (is_number(density) and 0 <= density <= 1):
        raise ValueError(f"density must be in [0, 1], got {density}")
    if k is not None:
        check_int(k, "k", 0)
    if scope == "global":
        sizes, labels = [sum(s.numel() for s in shapes)], ["all tensors together"]
    else:
        labels = [f"{'each row of ' if scope == 'row' else ''}tensor {n!r}" for n in names]
        sizes = [(math.prod(s[1:]) if len(s) > 1 else s.numel()) if scope == "row" else s.numel() for s in shapes]
    if k is None:
        return [round(float(density) * size) for size in sizes]  # type: ignore[arg-type]
    for size, label in zip(sizes, labels):
        if k > size:
            raise ValueError(f"k = {k} is more than the {size} entries of {label}")
    return [k] * len(sizes)


def select_mask(
    tuned: Mapping[str, Tensor] | nn.Module,
    base: Mapping[str, Tensor] | nn.Module,
    *,
    k: int | None = None,
    density: float | None = None,
    rank: int | str | None = None,
    energy: float | None = None,
    residual_density: float = 0.0,
    scope: str = "global",
    names: Iterable[str] | None = None,
    denoise_names: Iterable[str] | None = None,
    return_info: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The entries in which `tuned` differs most from `base`: DeFT-X with a rank or an energy, LT-SFT (Ansell et al.
    2022) without.

    The differences are taken in float32 (float64 where one tensor is), denoised by `svd_denoise` and selected by
    `topk_mask`. Without denoising both models are read once, where they lie, and no difference is stored. With it, one
    group of tensors is denoised after the other: beside the models there exist the differences of one group and 7.5 to
    10 bytes (float64: to 15) for each selected entry. A group has as many elements as the largest tensor, but at least
    2**20 (2**25 on a GPU): many small tensors are worked on together. Where the selected entries would take more than a
    quarter of the model (from a density of about 0.13), no score is kept and every group is denoised three times.

    Args:
        tuned, base: θ1 and θ0: modules (their named parameters) or mappings of names to tensors, of any floating
            dtypes. Tensors may lie on different devices; the mask lies where `base` does. Tied tensors count once,
            under the first name in `base`; they are tied in `base`, or in `tuned` where `base` has equal copies.
        k, density, scope: as in `topk_mask`.
        rank, energy, residual_density: as in `svd_denoise`; neither rank nor energy: no denoising.
        names: the tensors to choose from; by default all floating-point ones of `base`.
        denoise_names: those of them to denoise; by default all of two or more dimensions.
        return_info: also return what denoising found, as `svd_denoise` does: a pair (mask, {name: info, or None}).
        progress: called with (tensors done, tensors in all).

    Raises:
        ValueError: as `topk_mask` and `svd_denoise`; also a tensor that is missing in `tuned` or has another shape
            there, tensors of `base` that share part of their memory or are tied and differ in `tuned`, a model that is
            sparsified.
    """
    rule = check_rule(rank, energy, residual_density) if rank is not None or energy is not None else None
    if rule is None and (residual_density != 0 or denoise_names is not None):
        given = "denoise_names" if residual_density == 0 else f"residual_density = {residual_density}"
        raise ValueError(f"{given} needs a rank or an energy")
    old = all_tensors(base, "base")
    new = with_tied_names(all_tensors(tuned, "tuned"), tied_names(old, "base"))
    chosen = _chosen_names(new, old, names)
    noisy = _noisy_names(chosen, old, denoise_names) if rule is not None else set()
    shapes = [old[n].shape for n in chosen]
    CSRMask.check_layout(chosen, shapes)
    counts = selected_counts(chosen, shapes, k, density, scope)
    dtype = torch.float32
    for name in chosen:
        dtype = torch.promote_types(dtype, torch.promote_types(new[name].dtype, old[name].dtype))
    if rule is not None and rule.residual_density == 1 and not return_info:
        noisy = set()  # L + H is the difference itself
    infos: dict[str, dict[str, Tensor] | None] = dict.fromkeys(chosen)
    labels = {n: f"tuned[{n!r}] - base[{n!r}]" for n in chosen}
    device = old[chosen[0]].device

    def difference(name: str) -> Tensor:
        return (new[name].to(device, dtype) - old[name].to(dtype)).contiguous()

    if not noisy and all(new[n].device == old[n].device for n in chosen):
        if progress is not None:
            progress(0, len(chosen))
        crow, col, bad = torch.ops.deftx.topk_mask(
            [new[n].contiguous() for n in chosen], [old[n].contiguous() for n in chosen], counts, SCOPES[scope]
        )
        if (i := int(bad[0])) >= 0:
            _raise_not_finite(difference(chosen[i]), labels[chosen[i]], int(bad[1]))
    else:
        scores = _denoised(difference, noisy, labels, rule, infos)
        crow, col = select_by_groups(scores, chosen, shapes, counts, scope, dtype, device, progress)
    if progress is not None:
        progress(len(chosen), len(chosen))
    mask = CSRMask._trusted(chosen, shapes, crow, col)
    return (mask, infos) if return_info else mask


def low_rank_mask(
    weights: Mapping[str, Tensor] | nn.Module,
    *,
    rank: int | str,
    k: int | None = None,
    density: float | None = None,
    scope: str = "tensor",
    return_info: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The largest entries of the weights' approximations of low rank: LIFT (Liu et al. 2025, arXiv 2506.00772).

    The mask of `topk_mask(svd_denoise(weights, rank=rank), ...)`, in the memory that `select_mask` needs: one group of
    weights is approximated after the other. Approximations of 16-bit weights are compared in float32.

    Args:
        weights: a module (its named parameters) or a mapping of names to floating-point tensors, on one device.
        rank: of the approximation of each matrix, as in `svd_denoise`; tensors of fewer than two dimensions are taken
        as they are. k, density, scope: as in `topk_mask`.
        return_info, progress: as in `select_mask`.

    Raises:
        ValueError, TypeError: as `topk_mask` and `svd_denoise`.
    """
    rule = check_rule(rank, None, 0.0)
    tensors = dict(sorted(named_tensors(weights, "weights").items()))
    names = list(tensors)
    dtype = functools.reduce(torch.promote_types, check_floats(list(tensors.values()), names, "weights"), torch.float32)
    shapes = [t.shape for t in tensors.values()]
    CSRMask.check_layout(names, shapes)
    check_devices(tensors, "weights")
    counts = selected_counts(names, shapes, k, density, scope)
    infos: dict[str, dict[str, Tensor] | None] = dict.fromkeys(names)
    scores = _denoised(
        lambda name: tensors[name].to(dtype, copy=True, memory_format=torch.contiguous_format),
        {n for n in names if tensors[n].dim() >= 2}, {n: f"weights[{n!r}]" for n in names}, rule, infos,
    )  # fmt: skip
    crow, col = select_by_groups(scores, names, shapes, counts, scope, dtype, tensors[names[0]].device, progress)
    if progress is not None:
        progress(len(names), len(names))
    mask = CSRMask._trusted(names, shapes, crow, col)
    return (mask, infos) if return_info else mask


def _denoised(
    make: Callable[[str], Tensor],
    noisy: set[str],
    labels: Mapping[str, str],
    rule: Rule | None,
    infos: dict[str, dict[str, Tensor] | None],
) -> Callable[[Sequence[str]], list[Tensor]]:
    """What `select_by_groups` takes: a group's tensors by `make`, those that `noisy` has denoised in place; `infos` is
    updated.
    """

    def scores(group: Sequence[str]) -> list[Tensor]:
        found = {n: make(n) for n in group}
        for name in set(group).difference(noisy):
            check_finite(found[name], labels[name])
        if rule is not None:
            matrices = {n: found[n] for n in group if n in noisy}
            infos.update(denoise(matrices, matrices, labels, rule))
        return list(found.values())

    return scores


def _noisy_names(chosen: list[str], old: Mapping[str, Tensor], names: Iterable[str] | None) -> set[str]:
    """Which of the chosen tensors are to be denoised."""
    matrices = {n for n in chosen if old[n].dim() >= 2}
    if names is None:
        return matrices
    if isinstance(names, str):
        raise TypeError("denoise_names must be an iterable of names, got one string")
    wanted = set(names)
    if unknown := sorted(wanted.difference(chosen)):
        raise ValueError(f"denoise_names holds {unknown[0]!r}, which is not among the tensors to choose from")
    return matrices & wanted


def _chosen_names(new: Mapping[str, Tensor], old: Mapping[str, Tensor], names: Iterable[str] | None) -> list[str]:
    if isinstance(names, str):
        raise TypeError("names must be an iterable of names, got one string")
    chosen = sorted(n for n in old if old[n].is_floating_point()) if names is None else sorted(names)
    for before, after in zip(chosen, chosen[1:]):
        if before == after:
            raise ValueError(f"names holds {before!r} twice")
    for mapping, argument in ((old, "base"), (new, "tuned")):
        for name in chosen:
            if name not in mapping:
                raise ValueError(f"{argument} lacks tensor {name!r}")
        check_floats([mapping[n] for n in chosen], chosen, argument)
    for name in chosen:
        check_readable(new[name], f"tuned[{name!r}]")
        if new[name].shape != old[name].shape:
            raise ValueError(
                f"tensor {name!r} has shape {list(new[name].shape)} in tuned and {list(old[name].shape)} in base"
            )
    check_devices({n: old[n] for n in chosen}, "base")
    wanted = set(chosen)
    tied = tied_in_either({n: t for n, t in old.items() if n in wanted}, {n: new[n] for n in chosen})
    return [n for n in chosen if tied[n] == n]
