"""Which entries a recipe trains: the largest changes of LT-SFT and DeFT-X, the largest low-rank weights of LIFT."""

import itertools
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deftx_kernels.denoise import svd_denoise
from deftx_kernels.mask import CSRMask
from deftx_kernels.select import low_rank_mask, select_mask, topk_mask
from deftx_kernels.train.config import Recipe, SelectionConfig

LIFT_RANK = 128
Denoising = dict[str, dict[str, float]]  # matrix → rank of its signal, share of the energy in it, relative residual
Parameters = nn.Module | Mapping[str, Tensor]


def largest_changes(
    recipe: Recipe | str,
    tuned: Parameters,
    base: Parameters,
    names: Sequence[str],
    selection: SelectionConfig,
    iteration: int | None = None,
    before: CSRMask | None = None,
    *,
    raw: Container[str] = (),
) -> tuple[CSRMask, Denoising]:
    """The mask of theta1 and theta0: the largest entries of their difference, which deft-x denoises before.

    Args:
        names: the tensors to select from.
        iteration: of `selection.iterations`, from 1; the mask has that share of the entries. The last by default.
        before: the mask of the iteration before, whose entries are in the result.
        raw: tensors that are not denoised.
    """
    denoised = [] if Recipe.of(recipe).name == "lt-sft" else [name for name in names if name not in raw]
    options: dict[str, Any] = {"rank": selection.rank, "energy": selection.energy}
    options["residual_density"] = selection.residual_density
    number, count = iteration or selection.iterations, selection.iterations
    size: dict[str, Any] = {"density": (selection.density or 0) * number / count, "scope": selection.scope}
    if selection.k is not None:
        size = {"k": selection.k * number // count, "scope": selection.scope}
    if before is not None:
        scores, info = _differences(tuned, base, names), {}
        if denoised:
            cleaned, info = svd_denoise({name: scores[name] for name in denoised}, return_info=True, **options)
            scores |= cleaned
        first = scores[names[0]]
        largest = first.new_full((before.nnz,), torch.finfo(first.dtype).max)
        before.to(first.device).scatter_(scores, largest)
        return topk_mask(scores, **size), denoising_of(info)
    if not denoised:
        return select_mask(tuned, base, names=names, **size), {}
    mask, info = select_mask(tuned, base, names=names, denoise_names=denoised, return_info=True, **options, **size)
    return mask, denoising_of(info)


def _differences(tuned: Parameters, base: Parameters, names: Sequence[str]) -> dict[str, Tensor]:
    new, old = (dict(x.named_parameters()) if isinstance(x, nn.Module) else x for x in (tuned, base))
    dtypes = (new[name].dtype for name in names), (old[name].dtype for name in names)
    dtype = torch.float64 if torch.float64 in itertools.chain(*dtypes) else torch.float32  # as in select_mask
    return {name: new[name].detach().to(dtype) - old[name].detach().to(dtype) for name in names}


def lift_mask(weights: Mapping[str, Tensor], selection: SelectionConfig) -> tuple[CSRMask, Denoising]:
    """LIFT's mask: in each weight matrix W the largest entries of |W_r|, its rank-r approximation."""
    rank = selection.rank if selection.rank is not None else LIFT_RANK
    size = {"density": selection.density} if selection.k is None else {"k": selection.k, "scope": "global"}
    mask, info = low_rank_mask(weights, rank=rank, return_info=True, **size)
    return mask, denoising_of(info)


def denoising_of(info: Mapping[str, dict[str, Tensor] | None]) -> Denoising:
    """`svd_denoise`'s information as numbers."""
    return {
        name: {k: v.double().mean().item() for k, v in found.items()}
        for name, found in info.items()
        if found is not None
    }
