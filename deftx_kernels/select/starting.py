"""`init_mask`: starting masks, for those who have no tuned model. Which weights a mask covers is chosen as in PEFT."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deftx_kernels import validation
from deftx_kernels.mask import CSRMask
from deftx_kernels.select.functional import checked_counts, low_rank_mask, topk_mask
from deftx_kernels.select.streaming import select_by_groups

METHODS = ("lift", "magnitude", "random")
ALL_LINEAR = "all-linear"
# PEFT's names of the heads of classification and question answering models
_HEADS = ("score", "classifier", "qa_outputs")


def init_mask(
    model: nn.Module,
    *,
    method: str = "lift",
    density: float | None = None,
    k: int | None = None,
    rank: int = 128,
    target_modules: str | Iterable[str] = ALL_LINEAR,
    scope: str = "tensor",
    seed: int = 0,
) -> CSRMask:
    """A mask from the weights of a model that has not been fine-tuned yet.

    Methods:

    - "lift": the largest entries of the rank-r approximation of each weight (Liu et al. 2025, arXiv 2506.00772).
    - "magnitude": the largest weights.
    - "random": entries drawn uniformly, without replacement. They depend on the seed and the names, shapes and scope
      alone, not on device, dtype or number of threads; those of a tensor (with scope "tensor" or "row") also not on
      the other tensors.

    Only weights are covered: no bias, and with "all-linear" no norm, no embedding and no head. Gradient scores (Fisher
    information, movement) go through `topk_mask`. For several densities, `init_mask(...) | init_mask(...)` joins the
    masks of different targets.

    Experts of transformers 5, one parameter [experts, m, n] for all of them ("gate_up_proj"), are no module's `weight`:
    no target matches them, and the density is that of the other weights. As "magnitude" and "lift" select them:
    `topk_mask(experts, density=0.01, scope="tensor")` and `topk_mask(svd_denoise(experts, rank=128), ...)`, where
    `experts` is a dict of these tensors, detached; `|` joins the masks.

    Args:
        model: the plain model, on one device, which the mask is on, too.
        method: "lift", "magnitude" or "random".
        density, k, scope: as in `topk_mask`: with scope "tensor" the density or the number of entries of each tensor,
            with "row" of each row, with "global" of all together.
        rank: of the approximations of "lift"; at most the smaller dimension of a weight is used.
        target_modules: the modules whose `weight` is covered, as in PEFT: "all-linear" (all `nn.Linear` and
            transformers' `Conv1D` except the output layer and the head), a list of names or of their endings
            (["query", "value"]), or a regular expression that matches names in full. Modules without a weight of two
            or more dimensions are left out.
        seed: of "random", at least 0.

    Raises:
        ValueError: a target that no module matches; an unknown method; as `topk_mask`; a model that is sparsified.
        TypeError: a weight is not floating point (quantized).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
        >>> mask = init_mask(model, method="random", density=0.25)
        >>> mask["0.weight"].nnz, mask["2.weight"].nnz
        (16, 16)
        >>> init_mask(model, method="magnitude", k=3, target_modules=["2"]).names
        ('2.weight',)
    """
    tensors = validation.all_tensors(model, "model")
    weights = {n: tensors[n] for n in target_weights(model, target_modules)}
    return mask_from_weights(weights, method=method, density=density, k=k, rank=rank, scope=scope, seed=seed)


def mask_from_weights(
    weights: Mapping[str, Tensor],
    *,
    method: str,
    density: float | None,
    k: int | None,
    rank: int,
    scope: str,
    seed: int,
) -> CSRMask:
    """`init_mask` of given weights."""
    check_method(method, rank, seed)
    validation.check_floats(list(weights.values()), list(weights), "model")
    size: dict[str, Any] = dict(density=density, k=k, scope=scope)
    if method == "random":
        shapes = {n: t.shape for n, t in weights.items()}
        counts = checked_counts(shapes, **size)
        validation.check_devices(weights, "model")
        return random_mask(shapes, counts, scope, seed).to(next(iter(weights.values())).device)
    if method == "lift":
        return low_rank_mask(weights, rank=rank, **size)
    return topk_mask(weights, **size)


def check_method(method: object, rank: object, seed: object) -> None:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    validation.check_int(rank, "rank", 1)
    validation.check_int(seed, "seed", 0)


def random_mask(shapes: Mapping[str, torch.Size], counts: list[int], scope: str, seed: int) -> CSRMask:
    """The largest of random scores, which are made and compared on the CPU, for the same mask on every device."""
    cpu = torch.device("cpu")

    def scores(group: Sequence[str]) -> list[Tensor]:
        return [_random_scores(name, shapes[name], seed) for name in group]

    crow, col = select_by_groups(scores, dict(shapes), counts, scope, torch.float64, cpu, None)
    return CSRMask.unchecked(list(shapes), list(shapes.values()), crow, col)


def _random_scores(name: str, shape: torch.Size, seed: int) -> Tensor:
    """float64, in [0, 1): of 53 bits, for which ties are rare."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))  # one stream, in one thread
    return torch.rand(shape, dtype=torch.float64, device="cpu", generator=generator)


# ---- target modules ----
def target_weights(
    model: nn.Module, target_modules: str | Iterable[str] = ALL_LINEAR, without: Iterable[str] = ()
) -> list[str]:
    """Names of the weights of the target modules, sorted; of tied ones the first in `named_parameters()`.

    Args:
        target_modules: as in `init_mask`.
        without: names of parameters to leave out.

    Raises:
        ValueError, TypeError: as `init_mask`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = validation.unwrapped(model)
    validation.all_tensors(model, "model")  # ValueError for a sparsified one
    first = {id(p): validation.plain_name(n) for n, p in model.named_parameters()}
    weights = {}  # module → name of its weight
    for module_name, module in plain_modules(model).items():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() > 1:
            weights[module_name] = first[id(weight)]
    excluded = set(without)
    found = {weights[n] for n in _matching(model, list(weights), target_modules) if weights[n] not in excluded}
    if not found:
        raise ValueError(f"target_modules = {target_modules!r} matches only modules that are left out of the mask")
    return sorted(found)


def _matching(model: nn.Module, names: list[str], targets: str | Iterable[str]) -> list[str]:
    """Those of the modules that match. ValueError for a target without any."""
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            head = _head_names(model)
            modules = plain_modules(model)
            found = [n for n in names if n not in head and _is_linear(modules[n])]
        else:
            try:
                pattern = re.compile(targets)
            except re.error as error:
                raise ValueError(f"target_modules is no regular expression: {targets!r}: {error}") from None
            found = [n for n in names if pattern.fullmatch(n)]
        if not found:
            raise _no_match(model, targets, names)
        return found
    endings = list(targets)
    for target in endings:
        if not isinstance(target, str):
            raise TypeError(f"target_modules must be names, got {target!r}")
        if not any(matches_ending(n, target) for n in names):
            raise _no_match(model, target, names)
    if not endings:
        raise _no_match(model, endings, names)
    return [n for n in names if any(matches_ending(n, target) for target in endings)]


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """`named_modules()` without what torch.compile and activation checkpointing insert: modules and names."""
    return {validation.plain_name(f"{name}.")[:-1]: module for name, module in model.named_modules()}


def matches_ending(name: str, ending: str) -> bool:
    """Whether a module's name is `ending` or ends in it, after a dot."""
    return name == ending or name.endswith(f".{ending}")


def _no_match(model: nn.Module, target: object, names: Sequence[str]) -> ValueError:
    step = max(1, len(names) // 6)
    some = ", ".join(names[::step][:6]) or "none"
    others = [n for n, p in model.named_parameters() if p.dim() == 3 and n.rpartition(".")[2] != "weight"]
    hint = f". Weights of experts, such as {others[0]!r}, are selected with topk_mask" if others else ""
    return ValueError(
        f"target_modules: {target!r} matches no module that has a weight. Some of the model's: {some}{hint}"
    )


def _is_linear(module: nn.Module) -> bool:
    bases = type(module).__mro__  # FSDP2 makes a class of its own for each module's class
    conv1d = any(cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.") for cls in bases)
    return conv1d or isinstance(module, nn.Linear)


def _head_names(model: nn.Module) -> set[str]:
    """Names of the modules of the output layer or, where the model has none, of a classifier."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    head = [output] if output is not None else [getattr(model, name, None) for name in _HEADS]
    members = {id(m) for part in head if isinstance(part, nn.Module) for m in part.modules()}
    return {n for n, m in plain_modules(model).items() if id(m) in members}
