"""The stateless public operations: arguments are checked here, once; the work is done by `torch.ops.deftx`."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from deftx_kernels._checks import (
    check_devices,
    check_finite,
    check_float,
    check_floats,
    check_hyperparameters,
    check_int,
    check_matrix,
    check_plain,
    check_readable,
    check_writable,
    has_memory,
    is_number,
    scalar,
)
from deftx_kernels._denoising import Rule, check_rule, compute_dtype, denoise, factors, random_test_matrix
from deftx_kernels._masked import masked_lookup, masked_matmul
from deftx_kernels._ops import SCOPES, column_dtype
from deftx_kernels._selection import Denoised, Scores, by_rounds, select_by_groups
from deftx_kernels.mask import CSRMask

# ---- truncated SVD ----
def truncated_svd(
    a: Tensor,  # [..., m, n]
    rank: int,
    *,
    oversample: int = 16,
    n_iter: int = 2,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular triplets of a batch of matrices.

    Randomised block subspace iteration (Halko, Martinsson & Tropp 2011), as long as its convergence tells that the
    residual is within 1.02 times that of the best rank-r matrix; or the exact decomposition where `rank + oversample`
    is half of min(m, n) or more. float16 and bfloat16 are computed in float32.

    Args:
        a: floating point [..., m, n].
        rank: how many triplets, at least 1; no more than min(m, n) are returned.
        oversample: extra columns of the random test matrix.
        n_iter: power iterations, products with a.mT a, at least. Two are always made, more where the residual asks for
            them.
        generator: source of the test matrix; by default one with a fixed seed, so that equal calls give equal results.

    Returns:
        U [..., m, r], S [..., r] (descending), Vh [..., r, n] with r = min(rank, m, n), in the dtype of `a`.

    Raises:
        ValueError: rank < 1, oversample < 0, n_iter < 0, fewer than two dimensions, a NaN or infinite entry.
        TypeError: `a` is not a floating-point tensor, or `rank` not an int.
    """
    check_matrix(a, "a")
    check_int(rank, "rank", 1)
    check_int(oversample, "oversample", 0)
    check_int(n_iter, "n_iter", 0)
    r = min(rank, *a.shape[-2:])
    test_matrix = (
        random_test_matrix(a.shape, r, oversample, generator, compute_dtype(a.dtype), a.device) if a.numel() else None
    )
    return torch.ops.deftx.truncated_svd(a.detach().contiguous(), r, n_iter, test_matrix)


def svd_denoise(
    delta: Tensor | Mapping[str, Tensor] | Sequence[Tensor],
    *,
    rank: int | str | None = None,
    energy: float | None = None,
    residual_density: float = 0.0,
    return_info: bool = False,
    oversample: int = 16,
    n_iter: int = 2,
    generator: torch.Generator | None = None,
    batch_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Any:
    """L + prune(H) for each matrix: L its truncated SVD, H = delta - L (DeFT-X, Simon & Jyothi, arXiv 2505.15090).

    Matrices of one shape are worked on together. An energy or a threshold is applied exactly: L comes from the
    eigenvectors of the Gram matrix of the short side (of small matrices, from their singular value decomposition),
    within a relative error of 5e-5 of the exact truncation, and the rank is that of exact arithmetic: where float32
    cannot promise this, a matrix is done in float64. float16 and bfloat16 are computed in float32. Each decomposition
    is checked against its matrix; one that is wrong is computed again by another solver, with a RuntimeWarning.

    An int rank that is at least a sixth of the short side (a quarter, where that has more than 512 entries and the
    matrix is not four times as long) is exact too, since that takes no longer (float64: from half of it on). A smaller
    one is that of `truncated_svd`: its residual is within 1.02 times the best, but L is another matrix. The largest 5 %
    of its entries share with those of the exact L, for 384 to 1024 columns: 97 to 100 % where directions stand out from
    noise, 88 to 97 % where singular values fall as i**-0.5, and 20 to 70 % of pure noise, where nothing sets the first
    r directions apart. More iterations come
    closer: with n_iter = 8, 99 % of the second kind and 75 to 90 % of the third; with 32, 99 %.

    Args:
        delta: a tensor [..., m, n] (a batch of matrices), a mapping or a sequence of such tensors. Tensors of fewer
            than two dimensions pass through.
        rank: the rank of L, or "gavish-donoho" for the optimal hard threshold of unknown noise (Gavish & Donoho 2014).
        energy: or: the smallest rank whose singular values hold this share of the sum of squares, 0 < energy <= 1.
        residual_density: the fraction of H's entries kept, the largest of each matrix. 1 gives `delta` back bit for
            bit.
        return_info: also return, per tensor, {"rank": int64 [...], "energy": float64 [...], "residual": float64 [...]}:
            the rank of L, the share of the sum of squares that L holds, and |delta - result| / |delta| (Frobenius
            norms; 0 where delta is 0).
        oversample, n_iter, generator: as in `truncated_svd`; used with an int `rank`.
        batch_bytes: memory for the matrices that are worked on together, beside arguments and result; one matrix at a
            time where that is not enough for two. By default 8 MiB (16 MiB without a test matrix) for
            each thread on the CPU, and a quarter of the free memory of a GPU.
        progress: called with (matrices done, matrices in all).

    Returns:
        The same structure, shapes and dtypes as `delta`; with `return_info` a pair (result, info) of that structure,
        where info of a tensor that passed through is None.

    Raises:
        ValueError: not exactly one of rank and energy, a value out of range, a NaN or infinite entry (the tensor is
            named).
        TypeError: something is not a floating-point tensor.
    """
    rule = check_rule(rank, energy, residual_density, oversample, n_iter, generator, batch_bytes)
    tensors: dict[Any, Tensor]
    if isinstance(delta, Tensor):
        tensors, labels = {0: delta}, ["delta"]
    elif isinstance(delta, Mapping):
        tensors, labels = dict(delta), [f"delta[{n!r}]" for n in delta]
    elif isinstance(delta, Sequence) and not isinstance(delta, str):
        tensors, labels = dict(enumerate(delta)), [f"delta[{i}]" for i in range(len(delta))]
    else:
        raise TypeError(f"delta must be a tensor, a mapping or a sequence of tensors, got {type(delta).__name__}")
    for tensor, label in zip(tensors.values(), labels):
        check_float(tensor, label)
        check_readable(tensor, label)
    tensors = {n: t.detach() for n, t in tensors.items()}
    matrices = {n: t for n, t in tensors.items() if t.dim() >= 2}
    results: dict[Any, Tensor] = {}
    infos: dict[Any, dict[str, Tensor] | None] = dict.fromkeys(tensors)
    for (name, tensor), label in zip(tensors.items(), labels):
        written = name in matrices and residual_density < 1
        if not written:
            check_finite(tensor, label)
        results[name] = (torch.empty_like if written else torch.clone)(tensor, memory_format=torch.contiguous_format)
    if residual_density < 1 or return_info:
        infos |= denoise(matrices, results, dict(zip(tensors, labels)), rule, progress)
    result: Any
    info: Any
    if isinstance(delta, Tensor):
        result, info = results[0], infos[0]
    elif isinstance(delta, Mapping):
        result, info = results, infos
    else:
        kind = tuple if isinstance(delta, tuple) else list
        result, info = kind(results.values()), kind(infos.values())
    return (result, info) if return_info else result


# ---- selection ----
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
    keep_factors: bool = False,
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
        keep_factors: with an int rank and scope "global": write no denoised difference, but keep the factors of L, r (m
            + n) numbers for each matrix, and make L + prune(H) anew, tile by tile, wherever the selection reads it
            (three times). On a GPU a Triton kernel does that; elsewhere plain torch, a matrix at a time.
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
    if keep_factors and (rule is None or not isinstance(rule.rank, int) or scope != "global" or return_info):
        raise ValueError("keep_factors needs an int rank and scope 'global', and has no information to return")
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
    elif keep_factors and rule is not None:
        kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        visits, rounds = itertools.count(), 1 + dtype.itemsize // 2

        def each() -> Iterator[Scores]:
            for name in chosen:
                if progress is not None:
                    progress(next(visits) // rounds, len(chosen))
                delta = difference(name)
                check_finite(delta, labels[name])
                if name not in noisy or delta.dim() > 2 or delta.numel() == 0:
                    if name in noisy:
                        denoise({name: delta}, {name: delta}, labels, rule)
                    yield [delta]
                else:
                    kept[name] = kept.get(name) or factors(delta, rule)
                    yield Denoised(delta[None], *kept[name])

        crow, col = by_rounds(each, counts[0], column_dtype(shapes), dtype, device)
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


def named_tensors(model: Mapping[str, Tensor] | nn.Module, argument: str) -> dict[str, Tensor]:
    """A module's named parameters, or a mapping's items; detached. Of several names of one tensor (tied weights) the
    first.

    Raises:
        ValueError: tensors that share part of their memory, a model that is sparsified.
        TypeError: no module and no mapping of names to tensors.
    """
    tensors = all_tensors(model, argument)
    tied = tied_names(tensors, argument)
    return {n: t for n, t in tensors.items() if tied[n] == n}


def all_tensors(model: Mapping[str, Tensor] | nn.Module, argument: str) -> dict[str, Tensor]:
    """As `named_tensors`, tied tensors under each of their names."""
    if isinstance(model, nn.Module):
        model = {plain_name(n): p for n, p in unwrapped(model).named_parameters(remove_duplicate=False)}
    if not isinstance(model, Mapping):
        raise TypeError(f"{argument} must be a module or a mapping of names to tensors, got {type(model).__name__}")
    for name, tensor in model.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must have names that are strings, got {name!r}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}")
    for name, tensor in model.items():
        stem = name.removesuffix("_values") if name.endswith("_values") else name.removesuffix("values") + "weight"
        dense = model.get(stem) if name.rpartition(".")[2] == "values" or name.endswith("_values") else None
        if dense is not None and tensor.dim() == 1 and tensor.numel() <= dense.numel() and tensor.is_floating_point():
            raise ValueError(f"{argument} is sparsified ({name!r} beside {stem!r}): densify(model) first")
    return {n: t.detach() for n, t in model.items()}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DataParallel and DistributedDataParallel, and within what torch.compile makes of those."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (DataParallel, DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def tied_names(tensors: Mapping[str, Tensor], argument: str) -> dict[str, str]:
    """Name → the first of the names of the same tensor: of the same memory, shape and strides.

    Raises:
        ValueError: tensors that share a part of their memory.
    """
    first: dict[Any, str] = {}
    tied, spans = {}, []
    for name, tensor in tensors.items():
        tied[name] = name
        # an expanded tensor is read, never written
        if not has_memory(tensor) or torch._debug_has_internal_overlap(tensor) == 1:
            continue
        start = tensor.data_ptr()
        tied[name] = first.setdefault((tensor.device, start, tensor.dtype, tensor.shape, tensor.stride()), name)
        if tied[name] == name:
            length = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride()))
            spans.append((str(tensor.device), start, start + length * tensor.element_size(), name))
    spans.sort()
    group: list[tuple[str, int, int, str]] = []
    end = 0
    for span in spans:
        if group and span[0] == group[0][0] and span[1] < end:
            group.append(span)
            end = max(end, span[2])
            continue
        _check_apart(group, end, tensors, argument)
        group, end = [span], span[2]
    _check_apart(group, end, tensors, argument)
    return tied


def _check_apart(
    group: list[tuple[str, int, int, str]], end: int, tensors: Mapping[str, Tensor], argument: str
) -> None:
    """ValueError where tensors of overlapping spans of memory have a byte in common: columns of one matrix may be
    interleaved.
    """
    if len(group) < 2:
        return
    origin = group[0][1]
    taken = torch.zeros(end - origin, dtype=torch.bool, device="cpu")
    for _, start, _, name in group:
        tensor, size = tensors[name], tensors[name].element_size()
        own = taken.as_strided((*tensor.shape, size), (*(size * step for step in tensor.stride()), 1), start - origin)
        if bool(own.any()):
            raise ValueError(f"{argument}[{name!r}] shares a part of its memory with another tensor")
        own.fill_(True)


def tied_in_either(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]) -> dict[str, str]:
    """`tied_names` of the base, and of what is tied in `tuned` and has the same bits in the base: copies of a tied
    model.
    """
    tied = tied_names(base, "base")
    for name, first in tied_names({n: tuned[n] for n in base if n in tuned}, "tuned").items():
        if name != first and tied[name] == name and _same_bits(base[name], base[first]):
            tied[name] = tied[first]
    return {n: tied[first] for n, first in tied.items()}


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pair = [t.contiguous().view(-1).view(torch.uint8) for t in (one, other.to(one.device))]
    return torch.equal(pair[0], pair[1])


def with_tied_names(tuned: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """`tuned` with the first name of each tied tensor of the base, also where it has only another.

    Raises:
        ValueError: tensors that are tied in the base differ in `tuned`.
    """
    found = dict(tuned)
    for name, first in tied.items():
        if name != first and name in found:
            other = found.setdefault(first, found[name])
            one = found[name].to(other.device)
            if one.data_ptr() != other.data_ptr() and (one.shape != other.shape or bool((one != other).any())):
                raise ValueError(f"base has one tensor as {first!r} and {name!r}, which differ in tuned")
    return found


# ---- AdamW ----
def sparse_adamw(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor] | Tensor,
    exp_avg: Tensor,  # [nnz]
    exp_avg_sq: Tensor,  # [nnz]
    step: int | Tensor,
    mask: CSRMask,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_to: Tensor | None = None,  # [nnz]
    l1: float = 0.0,
    maximize: bool = False,
    values: Tensor | None = None,  # [nnz]
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    """One step of `torch.optim.AdamW` (Loshchilov & Hutter 2019) at the mask's entries, in place.

    Everything outside the mask stays bit-identical. There is no host synchronisation; with `step` and `lr` as tensors
    on the device, a CUDA graph may hold it.

    Args:
        params: name → dense tensor, of one floating dtype.
        grads: name → dense gradient, or one compact tensor [nnz].
        exp_avg, exp_avg_sq: compact moments, float32 or, both, bfloat16 (float64 for float64 params). Updated.
        step: the number of this step, from 1: an int, or a 0-d tensor that the kernel reads on the device.
        lr: learning rate, a float or a 0-d tensor.
        weight_decay: decoupled decay: w -= lr * weight_decay * (w - decay_to).
        decay_to: compact; by default 0.
        l1: adds the subgradient l1 * sign(w - decay_to) to the gradient.
        maximize: ascend.
        values: compact float32 master copy of the entries; it is then what is updated, and params receive its rounding.
        grad_scale: gradients are divided by this 0-d tensor.
        found_inf: a 0-d tensor; where it is not zero, nothing changes.
        stochastic_rounding: what is kept in bfloat16 (moments; params without `values`) is rounded up or down by
            chance, each neighbour as likely as the result is near to it, so that steps below half a unit in the last
            place count in the mean (nearest rounding drops them: with beta2 = 0.999, bfloat16 moments then never
            decay).
        seed: of that chance, 0 <= seed < 2**63. The result is a function of the arguments alone: Philox4x32-10 (Salmon
            et al. 2011) with the key `seed`, at (entry, step).

    Raises:
        ValueError, TypeError: an argument is out of range, or of another shape, dtype or device than the mask and the
            params ask for. Nothing has changed then.
    """
    targets = check_targets(params, exp_avg, exp_avg_sq, values, mask)
    if decay_to is not None:
        mask.check_compact(decay_to, "decay_to")
        check_float(decay_to, "decay_to")
    step_targets(
        targets, grads, exp_avg, exp_avg_sq, step, mask, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decay_to=decay_to,
        l1=l1, maximize=maximize, values=values, grad_scale=grad_scale, found_inf=found_inf,
        stochastic_rounding=stochastic_rounding, seed=seed,
    )  # fmt: skip


def check_targets(
    params: Mapping[str, Tensor], exp_avg: Tensor, exp_avg_sq: Tensor, values: Tensor | None, mask: CSRMask
) -> list[Tensor]:
    """The tensors that a step writes; the params among them in the mask's order."""
    targets = mask.select(params, "params")
    dtype = targets[0].dtype
    if check_floats(targets, mask.names, "params") != {dtype}:
        name, tensor = next((n, t) for n, t in zip(mask.names, targets) if t.dtype != dtype)
        raise ValueError(
            f"params[{name!r}] is {tensor.dtype}, params[{mask.names[0]!r}] {dtype}: one dtype a call is needed"
        )
    _check_state(_state(exp_avg, exp_avg_sq, values), mask, dtype)
    if not all(t.is_contiguous() for t in targets):  # the kernel gets copies of those
        check_writable(_labelled(targets, mask))
    return targets


def _state(exp_avg: Tensor, exp_avg_sq: Tensor, values: Tensor | None) -> dict[str, Tensor]:
    return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq} | ({} if values is None else {"values": values})


def _labelled(targets: list[Tensor], mask: CSRMask) -> dict[str, Tensor]:
    return {f"params[{name!r}]": tensor for name, tensor in zip(mask.names, targets)}


def step_targets(
    targets: list[Tensor], grads: Mapping[str, Tensor] | Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int | Tensor,
    mask: CSRMask, *, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, decay_to: Tensor | None,
    l1: float, maximize: bool, values: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None,
    stochastic_rounding: bool, seed: int,
) -> None:  # fmt: skip
    """`sparse_adamw` of tensors that have been checked, by `check_targets`, and `decay_to`."""
    dtype = targets[0].dtype
    if decay_to is not None:
        decay_to = decay_to.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()
    if stochastic_rounding:
        check_int(seed, "seed", 0)
        if seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63, got {seed}")
        if dtype == torch.float16 and values is None:
            raise ValueError("stochastic_rounding is not defined for float16 params: keep a float32 master in values")
    beta1, beta2 = check_hyperparameters(lr, betas, eps, weight_decay, l1)
    gradients, is_compact = _gradients(grads, mask, dtype)
    scalars = [
        scalar(step, "step", mask.device, least=1),
        scalar(lr, "lr", mask.device),
        None if grad_scale is None else scalar(grad_scale, "grad_scale", mask.device),
        None if found_inf is None else scalar(found_inf, "found_inf", mask.device),
    ]
    with torch.no_grad():
        dense = [t.contiguous() for t in targets]
        try:
            torch.ops.deftx.sparse_adamw_(
                dense, gradients, is_compact, exp_avg, exp_avg_sq, values, mask.crow_indices, mask.col_indices, scalars[0],
                scalars[1], beta1, beta2, float(eps), float(weight_decay), decay_to, float(l1), bool(maximize), scalars[2],
                scalars[3], seed if stochastic_rounding else None,
            )  # fmt: skip
        except (RuntimeError, ValueError):
            check_writable(_labelled(targets, mask) | _state(exp_avg, exp_avg_sq, values))  # names what shares memory
            raise
        for tensor, copy in zip(targets, dense):
            if copy is not tensor:
                tensor.copy_(copy)
    torch.autograd.graph.increment_version(targets)


def _check_state(state: Mapping[str, Tensor], mask: CSRMask, dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for argument, compact in state.items():
        mask.check_compact(compact, argument)
        allowed = {compute} if argument == "values" or compute == torch.float64 else {compute, torch.bfloat16}
        if compact.dtype not in allowed or not compact.is_contiguous():
            kinds = " or ".join(sorted(map(str, allowed), reverse=True))
            raise ValueError(f"{argument} must be contiguous {kinds} for {dtype} params, got {compact.dtype}")
    if (first := state["exp_avg"].dtype) != (second := state["exp_avg_sq"].dtype):
        raise ValueError(f"exp_avg and exp_avg_sq must have the same dtype, got {first} and {second}")


def _gradients(grads: Mapping[str, Tensor] | Tensor, mask: CSRMask, dtype: torch.dtype) -> tuple[list[Tensor], bool]:
    """What the operator takes: dense gradients of one dtype, or one compact tensor."""
    if isinstance(grads, Tensor):
        mask.check_compact(grads, "grads")
        check_float(grads, "grads")
        return [grads.detach().contiguous()], True
    chosen = mask.select(grads, "grads")
    dtypes = check_floats(chosen, mask.names, "grads")
    with torch.no_grad():
        if dtypes != {dtype}:
            chosen = [g.to(torch.float64 if dtype == torch.float64 else torch.float32) for g in chosen]
        return [g.contiguous() for g in chosen], False


# ---- masked layers ----
def _check_masked(
    source: Tensor, argument: str, weight: Tensor, values: Tensor, mask: CSRMask, bias: Tensor | None = None
) -> None:
    """`source`: x or ids."""
    for label, tensor in (("weight", weight), ("values", values), ("bias", bias)):
        if tensor is not None:
            check_float(tensor, label)
    if len(mask.names) != 1 or mask.shapes[0] != weight.shape or weight.dim() != 2:
        raise ValueError(
            f"mask must cover one tensor of weight's shape {list(weight.shape)}, it covers {[list(s) for s in mask.shapes]}"
        )
    mask.check_compact(values, "values")
    if weight.device != mask.device:
        raise ValueError(f"weight is on {weight.device}, the mask on {mask.device}: move one with .to()")
    for label, tensor in ((argument, source), ("bias", bias)):
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(f"{label} is on {tensor.device}, weight on {weight.device}: move one with .to()")
    # what backward needs must not be an inference tensor
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for label, tensor, other in (
            (argument, source, values),
            ("weight", weight, source),
            ("values", values, source),
        ):
            if tensor.is_inference() and other.requires_grad:
                raise ValueError(
                    f"{label} was made in inference_mode, so that backward cannot use it: clone it outside of that"
                )


def masked_linear(
    x: Tensor,  # [..., n]
    weight: Tensor,  # [m, n]
    values: Tensor,  # [nnz]
    mask: CSRMask,
    bias: Tensor | None = None,  # [m]
) -> Tensor:
    """`torch.nn.functional.linear` whose weight is trained at the mask's entries only.

    Forward reads the dense `weight`, which already holds `values` at its entries, and makes no copy of it. Backward
    gives the gradient of `values` (compact, in their dtype), of `x` and of `bias`; no dense weight gradient exists.
    Autocast is honoured, as forward found it, in backward too. First derivatives only: differentiating a gradient again
    is a RuntimeError.

    Args:
        x: floating point [..., n], of the weight's dtype (any float but float64, under autocast).
        weight: float32, float64, float16 or bfloat16 [m, n].
        values: floating point [nnz], by preference float32 beside a 16-bit weight.
        mask: of one [m, n] tensor.
        bias: [m].

    Returns:
        [..., m], of the dtype that `torch.nn.functional.linear` gives.

    Raises:
        ValueError: `mask` is not the mask of one tensor of `weight`'s shape, `values` is not compact [nnz], the devices
            differ, or backward would need a tensor that was made in inference_mode.
        TypeError: `x`, `weight`, `values` or `bias` is not a dense floating-point tensor.
        RuntimeError: of `torch.nn.functional.linear`: dtypes or shapes do not fit.
    """
    check_plain(x, "x")
    _check_masked(x, "x", weight, values, mask, bias)
    return masked_matmul(x, weight, values, mask, bias)


def masked_embedding(
    ids: Tensor,  # integer [...]
    weight: Tensor,  # [vocabulary, d]
    values: Tensor,  # [nnz]
    mask: CSRMask,
    padding_idx: int | None = None,
) -> Tensor:
    """`torch.nn.functional.embedding` whose weight is trained at the mask's entries only (see `masked_linear`).

    Args:
        ids: int64 or int32 [...].
        weight: floating point [vocabulary, d].
        values: floating point [nnz].
        mask: of one [vocabulary, d] tensor.
        padding_idx: masked entries of this row receive no gradient; negative ones count from the end.

    Returns:
        [..., d], of the weight's dtype, also under autocast.

    Raises:
        ValueError, TypeError: as `masked_linear`; `ids` that are not integer; `padding_idx` outside the vocabulary.
        IndexError: of `torch.nn.functional.embedding`: ids out of range.
    """
    check_plain(ids, "ids")
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
    _check_masked(ids, "ids", weight, values, mask)
    if padding_idx is not None:
        if not -weight.shape[0] <= padding_idx < weight.shape[0]:
            raise ValueError(f"padding_idx must be within the {weight.shape[0]} rows of weight, got {padding_idx}")
        padding_idx %= weight.shape[0]
    return masked_lookup(ids, weight, values, mask, padding_idx)
