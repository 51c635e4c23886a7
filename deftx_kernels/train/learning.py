"""LT-SFT and DeFT-X with a training loop or trainer of your own."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from deftx_kernels.delta import SparseDelta
from deftx_kernels.mask import CSRMask
from deftx_kernels.nn import densify, sparsify
from deftx_kernels.train.config import Recipe, SelectionConfig
from deftx_kernels.train.selection import largest_changes

Fit = Callable[[nn.Module, CSRMask | None], object]


def learn_vector(
    model: nn.Module, recipe: Recipe | str, fit: Fit, *, names: Iterable[str] | None = None, dense: Iterable[str] = ()
) -> SparseDelta:
    """Learn a sparse difference: train all of `model`, select entries, reset it, and train only those.

    LT-SFT (Ansell et al., 2022) and DeFT-X (Simon & Jyothi, 2025). The masks are those of `deftx run`.

    Args:
        model: the pretrained model, theta0. It has the trained weights theta0 + delta afterwards.
        recipe: "lt-sft" or "deft-x", with options: `Recipe("deft-x", density=0.05, energy=0.9)`.
        fit: `fit(model, mask)` trains the model in place, with a fresh optimizer and schedule. It is called with mask
            None, to train all parameters, and then with a mask and a sparsified model, for which the optimizer is
            `SparseAdamW(model.named_parameters(), mask, ...)`.
        names: parameters that the mask may select; by default all trainable ones but `dense`.
        dense: parameters, such as the head's, that are trained whole in both phases and stored whole.

    Returns:
        The difference over the mask, with the tensors `dense`. metadata["method"] is the recipe.

    Raises:
        ValueError: another recipe; a name that is no parameter, or in both lists. If `fit` raises, the model has
            theta0's values.

    Example:
        >>> model = torch.nn.Linear(8, 4, bias=False)
        >>> def fit(model, mask):
        ...     optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ...     model(torch.ones(2, 8)).square().sum().backward()
        ...     optimizer.step()
        >>> delta = learn_vector(model, Recipe("lt-sft", k=6), fit)
        >>> delta.mask.nnz
        6
    """
    recipe = Recipe.of(recipe)
    if recipe.name not in ("lt-sft", "deft-x"):
        raise ValueError(f"recipe must be lt-sft or deft-x, not {recipe}")
    selection = recipe.selection(SelectionConfig())
    parameters, whole = dict(model.named_parameters()), list(dense)
    trainable = [name for name, p in parameters.items() if p.requires_grad and name not in whole]
    maskable = trainable if names is None else list(names)
    for name in [*maskable, *whole]:
        if name not in parameters:
            raise ValueError(f"model has no parameter {name!r}")
    if both := [name for name in maskable if name in whole]:
        raise ValueError(f"names: {both[0]!r} is in dense as well, where it is trained whole")
    if not maskable:
        raise ValueError("names: the model has no parameter to select from")
    frozen = set(parameters) - set(maskable) - set(whole)
    theta0, mask = _copied(parameters), None
    start = theta0
    flags = {name: p.requires_grad for name, p in parameters.items()}
    try:
        for number in range(1, selection.iterations + 1):
            for name, parameter in parameters.items():
                parameter.requires_grad_(name not in frozen)
            fit(model, None)
            mask, _ = largest_changes(recipe, model, theta0, maskable, selection, number, mask)
            _write(model, start)
            sparsify(model, mask)
            try:
                fit(model, mask)
            finally:
                densify(model)
            start = _copied(dict(model.named_parameters()))
    except BaseException:
        _write(model, theta0)
        raise
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])
    delta = SparseDelta.from_models(start, theta0, mask=mask, dense=whole)
    delta.metadata["method"] = str(recipe)
    return delta


def _copied(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


@torch.no_grad()
def _write(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.grad = None
        parameter.copy_(tensors[name])
