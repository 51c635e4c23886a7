"""learn_vector on a small torch model: the manual steps, iterations, errors."""

import numpy as np
import pytest
import torch
from torch import nn

from deftx_kernels import CSRMask
from deftx_kernels.nn import densify, masked_parameters, sparsify
from deftx_kernels.optim import SparseAdamW
from deftx_kernels.select import select_mask
from deftx_kernels.train import Recipe, learn_vector
from deftx_kernels.train.config import SelectionConfig
from deftx_kernels.train.selection import largest_changes

WEIGHTS = ["0.weight", "2.weight"]


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    model[3].requires_grad_(False)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Fit:
    """Five steps of AdamW on one batch. `calls`: the mask of each, the parameters before and their flags."""

    def __init__(self, fails_in: int | None = None):
        self.calls: list[tuple] = []
        self.fails_in = fails_in

    def __call__(self, model: nn.Module, mask: CSRMask | None) -> None:
        before = {name: p for name, p in state(model).items() if not name.endswith("values")}
        self.calls.append((mask, before, {name: p.requires_grad for name, p in model.named_parameters()}))
        random = torch.Generator().manual_seed(1)
        inputs, targets = torch.randn(16, 6, generator=random), torch.randint(3, (16,), generator=random)
        if mask is None:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        else:
            optimizer = SparseAdamW(model.named_parameters(), mask, lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
        if self.fails_in == len(self.calls):
            raise KeyboardInterrupt("stopped")
        self.after = state(model)


HEAD = ["4.weight", "4.bias"]


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("lt-sft", {}), ("deft-x", {"rank": 2}), ("deft-x", {"energy": 0.7, "residual_density": 0.1})],
)
def test_learn_vector_is_the_manual_steps(recipe, options):
    model = small_model()
    delta = learn_vector(model, Recipe(recipe, k=31, **options), Fit(), names=WEIGHTS, dense=HEAD)

    other, fit = small_model(), Fit()
    theta0 = state(other)
    for name, p in other.named_parameters():
        p.requires_grad_(name in WEIGHTS + HEAD)
    fit(other, None)
    mask = select_mask(other, theta0, k=31, names=WEIGHTS, **options)
    other.load_state_dict(theta0)
    sparsify(other, mask)
    fit(other, mask)
    densify(other)
    assert delta.mask == mask
    assert delta.mask.nnz == 31
    theta2 = state(other)
    assert all(torch.equal(p, theta2[name]) for name, p in model.named_parameters())
    difference = {name: theta2[name] - theta0[name] for name in mask.names}
    assert torch.equal(delta.values, mask.gather(difference))
    assert set(delta.dense) == set(HEAD)
    assert all(torch.equal(delta.dense[name], theta2[name]) for name in HEAD)
    assert delta.metadata["method"] == str(Recipe(recipe, k=31, **options))


@pytest.mark.parametrize(("iterations", "counts"), [(2, [15, 31]), (3, [10, 20, 31])])
def test_iterations_add_entries(iterations, counts):
    model, fit = small_model(), Fit()
    theta0 = state(model)
    delta = learn_vector(model, Recipe("lt-sft", k=31, iterations=iterations), fit, names=WEIGHTS, dense=HEAD)
    masks = [mask for mask, _, _ in fit.calls[1::2]]
    assert [mask for mask, _, _ in fit.calls[::2]] == [None] * iterations
    assert [mask.nnz for mask in masks] == counts
    assert delta.mask == masks[-1]
    for smaller, larger in zip(masks, masks[1:]):
        assert smaller & larger == smaller
    starts = [before for _, before, _ in fit.calls]
    for number in range(iterations):  # both phases of an iteration begin at the same weights
        dense, sparse = starts[2 * number], starts[2 * number + 1]
        assert all(torch.equal(dense[name], sparse[name]) for name in dense)
        assert all(torch.equal(dense[name], theta0[name]) for name in dense) == (number == 0)
    for _, _, flags in fit.calls:
        assert not any(flags[name] for name in ("0.bias", "2.bias", "3.weight", "3.bias"))
    dense = delta.mask.to_dense()
    for name, p in model.named_parameters():
        if name in dense:
            outside = ~dense[name]
            assert np.array_equal(p.detach()[outside].numpy(), theta0[name][outside].numpy())
            assert bool((p.detach() != theta0[name])[dense[name]].any())
        elif name not in HEAD:
            assert torch.equal(p, theta0[name])


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_fit_that_raises_leaves_theta0(call):
    model = small_model()
    theta0, flags = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    types = [type(module) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        learn_vector(model, Recipe("lt-sft", k=31, iterations=2), Fit(call), names=WEIGHTS)
    assert not masked_parameters(model)
    assert [type(module) for module in model.modules()] == types
    after = dict(model.named_parameters())
    assert after.keys() == theta0.keys()
    assert all(torch.equal(p.view(torch.int32), theta0[name].view(torch.int32)) for name, p in after.items())
    assert {name: p.requires_grad for name, p in after.items()} == flags
    assert all(p.grad is None for p in after.values())


def test_flags_and_the_default_names():
    model, fit = small_model(), Fit()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    delta = learn_vector(model, "lt-sft:density=0.3", fit, dense=HEAD)
    assert set(delta.mask.names) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert fit.calls[0][2] == flags  # LayerNorm stays frozen
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("lift", {}, "recipe must be lt-sft or deft-x, not lift"),
        ("full", {}, "recipe must be lt-sft or deft-x, not full"),
        ("lt-sft:k=3", {"names": ["nothing"]}, "model has no parameter 'nothing'"),
        ("lt-sft:k=3", {"dense": ["head"]}, "model has no parameter 'head'"),
        ("lt-sft:k=300", {}, "k"),
        ("lt-sft:k=3", {"names": ["0.weight"], "dense": ["0.weight"]}, "'0.weight'"),
        ("lt-sft:k=3", {"names": []}, "names"),
    ],
)
def test_what_learn_vector_refuses(recipe, options, message):
    model = small_model()
    theta0 = state(model)
    with pytest.raises(ValueError, match=message):
        learn_vector(model, recipe, Fit(), **options)
    assert all(torch.equal(p, theta0[name]) for name, p in model.named_parameters())


def test_iterations_of_a_float64_model_select_its_differences():
    """As in `select_mask`: differences that float32 cannot tell apart are not ties."""
    base = {"w": torch.zeros(1, 6, dtype=torch.float64)}
    tuned = {"w": torch.tensor([[5.0, 1.0, 1.0 + 1e-12, 0.0, 1.0 + 1e-13, 0.0]], dtype=torch.float64)}
    settings = SelectionConfig(k=2, iterations=2)
    first, _ = largest_changes("lt-sft", tuned, base, ["w"], settings, 1)
    second, _ = largest_changes("lt-sft", tuned, base, ["w"], settings, 2, first)
    assert first.to_dense()["w"].nonzero()[:, 1].tolist() == [0]
    assert second.to_dense()["w"].nonzero()[:, 1].tolist() == [0, 2]
