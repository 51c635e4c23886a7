"""`topk_mask`, `select_mask` and `low_rank_mask`: the public functions. Arguments are checked here, once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from deftx_kernels import validation
from deftx_kernels.denoise.batches import denoise
from deftx_kernels.denoise.rule import Rule, check_rule
from deftx_kernels.mask import CSRMask, rows_and_columns
from deftx_kernels.ops.schemas import SCOPES
from deftx_kernels.select.streaming import select_by_groups


def topk_mask(
    scores: Mapping[str, Tensor] | Tensor, *, k: int | None = None, density: float | None = None, scope: str = "global"
) -> CSRMask:
    """The mask of exactly the k entries of largest |score|.

    Ties go to the tensor whose name comes first, then to the smaller flat index: the same on every device and in every
    run. The scores are read once; those that are not contiguous are copied first. Besides the mask, the compiled
    kernels need 1/4 byte and 1/32 of its size for each score on the CPU (and at most 1 MB per thread), and about
    0.45 bytes (float32) on a GPU (and 13 MB), where the host waits once, at the end. Each tensor adds about 400 bytes,
    on a GPU 0.9 KB and, with scope "tensor", up to 12 KB more (float32; 12 bytes for each of its first 1024 entries).

    Args:
        scores: name → floating-point tensor on one device; a single tensor counts as {"tensor": scores}. Of several
            names of one tensor (the tied weights of a state dict) the first is in the mask.
        k: the number of entries; with scope "tensor" or "row": of each tensor or row.
        density: instead of k, a fraction, 0 <= density <= 1; round(density * numel) entries are selected.
        scope: "global" selects over all tensors together, "tensor" within each tensor, "row" within each row.

    Raises:
        ValueError: not exactly one of k and density, one out of range, an unknown scope, tensors on several devices, a
            score that is NaN or infinite (the tensor and the flat index are named).
        TypeError: a score is not a floating-point tensor.

    Example:
        >>> mask = topk_mask({"w": torch.tensor([[0.1, -3.0], [2.0, 0.5]])}, k=2)
        >>> mask.to_dense()["w"]
        tensor([[False,  True],
                [ True, False]])
    """
    if isinstance(scores, Tensor):
        scores = {"tensor": scores}
    validation.check_mapping(scores, "scores", "a tensor or ")
    validation.check_floats(list(scores.values()), list(scores), "scores")
    validation.check_devices(scores, "scores")
    chosen = validation.untied(scores, "scores")  # detached, 20,000 small tensors would need 5 MB more
    counts = checked_counts({n: t.shape for n, t in chosen.items()}, k, density, scope)
    return _select(chosen, {}, "scores[{!r}]", set(), None, counts, scope)


def selected_counts(
    names: Sequence[str], shapes: Sequence[torch.Size], k: int | None, density: float | None, scope: str
) -> list[int]:
    """`k` as the operator takes it: one number, or one for each tensor."""
    if scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    if (k is None) == (density is None):
        raise ValueError(f"exactly one of k and density is needed, got k={k}, density={density}")
    if density is not None and not (validation.is_number(density) and 0 <= density <= 1):
        raise ValueError(f"density must be in [0, 1], got {density}")
    if k is not None:
        validation.check_int(k, "k", 0)
    if scope == "global":
        sizes, labels = [sum(s.numel() for s in shapes)], ["all tensors together"]
    else:
        labels = [f"{'each row of ' if scope == 'row' else ''}tensor {n!r}" for n in names]
        sizes = [rows_and_columns(s)[1] if scope == "row" else s.numel() for s in shapes]
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
    `topk_mask`. Without denoising both models are read once, and no difference is stored. With it, groups of tensors
    are denoised one after the other: besides the models there exist the differences of one group and 7.5 to 10 bytes
    (float64: to 15) for each selected entry. A group has as many elements as the largest tensor (on a GPU half as many
    more), but at least 2**20 (2**25 on a GPU). Where the selected entries would take more than a quarter of the model
    (from a density of about 0.13), no score is kept and every group is denoised three times (float64: five times).

    Args:
        tuned, base: θ1 and θ0: modules (their named parameters) or mappings of names to tensors, of any floating
            dtypes. Tensors may be on different devices; the mask is on the device of `base`. Tied tensors count once,
            under the first name in `base`; they are tied in `base`, or in `tuned` where `base` has equal copies.
        k, density, scope: as in `topk_mask`.
        rank, energy, residual_density: as in `svd_denoise`; neither rank nor energy: no denoising.
        names: the tensors to select from; by default all floating-point ones of `base`.
        denoise_names: those of them to denoise; by default all of two or more dimensions.
        return_info: also return the information of `svd_denoise`: a pair (mask, {name: info, or None}).
        progress: called with (tensors done, tensors in all).

    Raises:
        ValueError: as `topk_mask` and `svd_denoise`; also a tensor that is missing in `tuned` or has another shape
            there, tensors of `base` that share part of their memory or are tied and differ in `tuned`, a model that is
            sparsified.

    Example:
        >>> base = {"w": torch.zeros(2, 3)}
        >>> tuned = {"w": torch.tensor([[0.0, 4.0, 0.0], [1.0, 0.0, -2.0]])}
        >>> select_mask(tuned, base, k=2).to_dense()["w"].nonzero().tolist()
        [[0, 1], [1, 2]]
    """
    rule = checked_rule(rank, energy, residual_density, denoise_names)
    old = validation.all_tensors(base, "base")
    tied = validation.tied_names(old, "base")
    new = validation.with_tied_names(validation.all_tensors(tuned, "tuned"), tied)
    chosen = chosen_names(new, old, names)
    check_differences(new, old, chosen)
    tied = tied_names_of_chosen(new, old, tied, chosen)
    chosen = [n for n in chosen if tied[n] == n]
    denoised_names = names_to_denoise(chosen, old, rule, denoise_names, return_info)
    new, old = ({n: model[n] for n in chosen} for model in (new, old))
    counts = checked_counts({n: t.shape for n, t in new.items()}, k, density, scope)
    label = "tuned[{0!r}] - base[{0!r}]"
    return _select(new, old, label, denoised_names, rule, counts, scope, return_info, progress)


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
    """The largest entries of low-rank approximations of the weights: LIFT (Liu et al. 2025, arXiv 2506.00772).

    The mask of `topk_mask(svd_denoise(weights, rank=rank), ...)`, in the memory that `select_mask` needs: groups of
    weights are approximated one after the other. Approximations of 16-bit weights are compared in float32.

    Args:
        weights: a module (its named parameters) or a mapping of names to floating-point tensors, on one device.
        rank: of the approximation of each matrix, as in `svd_denoise`; tensors of fewer than two dimensions are taken
            as they are.
        k, density, scope: as in `topk_mask`.
        return_info, progress: as in `select_mask`.

    Raises:
        ValueError, TypeError: as `topk_mask` and `svd_denoise`.

    Example:
        >>> from deftx_kernels.select import low_rank_mask
        >>> low_rank_mask({"w": torch.tensor([[9.0, 0.0], [0.0, 1.0]])}, rank=1, k=1).col_indices.tolist()
        [0]
    """
    rule = check_rule(rank, None, 0.0)
    tensors = validation.untied(validation.all_tensors(weights, "weights"), "weights")
    validation.check_floats(list(tensors.values()), list(tensors), "weights")
    counts = checked_counts({n: t.shape for n, t in tensors.items()}, k, density, scope)
    validation.check_devices(tensors, "weights")
    denoised_names = {n for n, t in tensors.items() if t.dim() >= 2}
    return _select(tensors, {}, "weights[{!r}]", denoised_names, rule, counts, scope, return_info, progress)


def checked_counts(shapes: Mapping[str, torch.Size], k: int | None, density: float | None, scope: str) -> list[int]:
    """`selected_counts` of the tensors of a mask."""
    validation.check_mask_layout(list(shapes), list(shapes.values()))
    return selected_counts(list(shapes), list(shapes.values()), k, density, scope)


def score_dtype(new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> torch.dtype:
    """Of the differences new - old, and of what is denoised."""
    return reduce(torch.promote_types, (t.dtype for t in (*new.values(), *old.values())), torch.float32)


def _select(
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    label: str,  # format of a tensor's name in errors
    denoised_names: set[str],
    rule: Rule | None,
    counts: list[int],
    scope: str,
    return_info: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """The mask of the largest entries of `new`, or of new - old where `old` is not empty, after denoising some."""
    names = list(new)
    device = next(iter((old or new).values())).device
    dtype = score_dtype(new, old)
    infos: dict[str, dict[str, Tensor] | None] = dict.fromkeys(names) if return_info else {}

    def score(name: str) -> Tensor:
        if not old:
            return new[name].to(dtype, copy=True, memory_format=torch.contiguous_format)
        # `sub` converts what it reads: no copy of the base in a wider dtype is made on a GPU.
        return (new[name].to(device, dtype) - old[name]).contiguous()

    def denoised_scores(group: Sequence[str]) -> list[Tensor]:
        found = {n: score(n) for n in group}
        noisy = {n: t for n, t in found.items() if n in denoised_names}
        for name in group:
            if name not in noisy:
                validation.check_finite(found[name], label.format(name))
        if rule is not None:
            found_infos = denoise(noisy, noisy, {n: label.format(n) for n in noisy}, rule)
            if return_info:
                infos.update(found_infos)
        return list(found.values())

    if denoised_names or any(t.device != device for t in new.values()):
        shapes = {n: t.shape for n, t in new.items()}
        crow, col = select_by_groups(denoised_scores, shapes, counts, scope, dtype, device, progress)
    else:
        if progress is not None:
            progress(0, len(names))
        tensors = [[t.contiguous() for t in model.values()] for model in (new, old)]
        with torch.no_grad():
            crow, col, bad = torch.ops.deftx.topk_mask(*tensors, counts, SCOPES[scope])
        if (i := int(bad[0])) >= 0:
            validation.raise_not_finite(score(names[i]), label.format(names[i]), int(bad[1]))
    if progress is not None:
        progress(len(names), len(names))
    mask = CSRMask.unchecked(names, [t.shape for t in new.values()], crow, col)
    return (mask, infos) if return_info else mask


# ---- the arguments of `select_mask`; sharded.py uses these, too ----
def checked_rule(
    rank: int | str | None, energy: float | None, residual_density: float, denoise_names: Iterable[str] | None
) -> Rule | None:
    """None: no denoising."""
    if rank is not None or energy is not None:
        return check_rule(rank, energy, residual_density)
    if residual_density != 0 or denoise_names is not None:
        given = "denoise_names" if residual_density == 0 else f"residual_density = {residual_density}"
        raise ValueError(f"{given} needs a rank or an energy")
    return None


def chosen_names(new: Mapping[str, Tensor], old: Mapping[str, Tensor], names: Iterable[str] | None) -> list[str]:
    """The names of the tensors to select from, sorted, tied ones included. Both models have them."""
    if isinstance(names, str):
        raise TypeError("names must be an iterable of names, got one string")
    chosen = sorted(n for n in old if old[n].is_floating_point()) if names is None else sorted(names)
    if not chosen:
        raise ValueError(f"{'base' if names is None else 'names'} has no tensor to select from")
    for before, after in zip(chosen, chosen[1:]):
        if before == after:
            raise ValueError(f"names holds {before!r} twice")
    for mapping, argument in ((old, "base"), (new, "tuned")):
        for name in chosen:
            if name not in mapping:
                raise ValueError(f"{argument} lacks tensor {name!r}")
    return chosen


def check_differences(new: Mapping[str, Tensor], old: Mapping[str, Tensor], chosen: list[str]) -> None:
    """ValueError or TypeError unless new - old can be computed."""
    for mapping, argument in ((old, "base"), (new, "tuned")):
        validation.check_floats([mapping[n] for n in chosen], chosen, argument)
    for name in chosen:
        validation.check_readable(new[name], f"tuned[{name!r}]")
        check_shapes(name, new, old)
    validation.check_devices({n: old[n] for n in chosen}, "base")


def check_shapes(name: str, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> None:
    """ValueError unless a tensor has one shape in both models."""
    if new[name].shape != old[name].shape:
        shapes = f"{list(new[name].shape)} in tuned and {list(old[name].shape)} in base"
        raise ValueError(f"tensor {name!r} has shape {shapes}")


def tied_names_of_chosen(
    new: Mapping[str, Tensor], old: Mapping[str, Tensor], tied: Mapping[str, str], chosen: list[str]
) -> dict[str, str]:
    """Chosen name → the first chosen one of the same tensor, in the order of `old`, whose `tied_names` are `tied`."""
    wanted = set(chosen)
    known = {n: t for n, t in old.items() if n in wanted}
    first: dict[str, str] = {}  # first name in `old` of a tied tensor → the first of the known ones
    return validation.tied_in_either(
        known, {n: new[n] for n in chosen}, {n: first.setdefault(tied[n], n) for n in known}
    )


def names_to_denoise(
    chosen: list[str],
    old: Mapping[str, Tensor],
    rule: Rule | None,
    names: Iterable[str] | None,
    return_info: bool,
) -> set[str]:
    if rule is None:
        return set()
    if isinstance(names, str):
        raise TypeError("denoise_names must be an iterable of names, got one string")
    denoised_names = {n for n in chosen if old[n].dim() >= 2}
    if names is not None:
        wanted = set(names)
        if unknown := sorted(wanted.difference(chosen)):
            raise ValueError(f"denoise_names holds {unknown[0]!r}, which is not among the tensors to select from")
        denoised_names &= wanted
    if rule.residual_density == 1 and not return_info:
        return set()  # L + H is the difference itself
    return denoised_names
