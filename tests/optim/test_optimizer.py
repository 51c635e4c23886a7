"""Steps of SparseAdamW against torch.optim.AdamW on the gathered entries in float64.

The cases follow PyTorch's own tests of optimizers. The operator itself is tested in test_sparse_adamw.py.
"""

import copy

import pytest
import torch
from optimizer_setup import (
    MASKED,
    ORIGIN,
    assert_near,
    assert_same_bits,
    backward,
    bits,
    both,
    differ,
    full_mask,
    label,
    make_mask,
    make_model,
    set_grads,
    setup,
    through_file,
    train,
    trained,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

from deftx_kernels import CSRMask, SparseAdamW, sparsify
from deftx_kernels.nn import masked_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- the arithmetic ----
def oracle(model, mask, steps, *, l1=0.0, decay_to=None, maximize=False, lr=1e-2, **options):
    """torch.optim.AdamW on the gathered entries, less what they decay to, and on the other parameters."""
    named, chosen = dict(model.named_parameters()), mask.to_dense()
    origin = torch.zeros(mask.nnz, dtype=torch.float64) if decay_to is None else decay_to
    distance = nn.Parameter(torch.cat([named[n].detach()[chosen[n]] for n in mask.names]) - origin)
    others = [p for n, p in named.items() if n not in mask]
    adamw = torch.optim.AdamW([distance, *others], lr=float(lr), maximize=maximize, foreach=False, **options)
    for i in range(steps):
        model.zero_grad()
        backward(model, i)
        gradient = torch.cat([named[n].grad[chosen[n]] for n in mask.names])
        distance.grad = gradient + (-l1 if maximize else l1) * torch.sign(distance.detach())
        adamw.step()
        with torch.no_grad():
            for n, part in zip(mask.names, (distance + origin).split([int(chosen[n].sum()) for n in mask.names])):
                named[n][chosen[n]] = part
    return weights(model)


OPTIONS = [
    {},
    {"betas": (0.6, 0.9)},
    {"betas": (0.0, 0.0)},
    {"eps": 1e-2},
    {"weight_decay": 0.5},
    {"weight_decay": 0.0},
    {"maximize": True},
    {"lr": torch.tensor(3e-3, dtype=torch.float64)},
    {"lr": torch.tensor([3e-3])},
    {"lr": 0.0},
    {"maximize": True, "weight_decay": 0.3, "betas": (0.8, 0.99), "eps": 1e-4, "lr": 3e-2},
]
MASKED_OPTIONS = [
    {"l1": 0.1},
    {"decay_to": ORIGIN, "weight_decay": 0.5},
    {"l1": 0.1, "decay_to": ORIGIN, "weight_decay": 0.2, "maximize": True, "betas": (0.7, 0.95), "eps": 1e-3},
]


@both
@pytest.mark.parametrize("options", OPTIONS + MASKED_OPTIONS, ids=label)
def test_against_adamw_on_the_gathered_entries(sparsified, options):
    mask, start = make_mask(), weights(make_model())
    expected = oracle(make_model(), mask, 60, **options)
    got = train(*setup(sparsified, **options), 60)
    assert_near(got, expected)
    for name, chosen in mask.to_dense().items():
        assert torch.equal(bits(got[name])[~chosen], bits(start[name])[~chosen]), name
        assert torch.equal(got[name][chosen], start[name][chosen]) == (options.get("lr") == 0), name


@both
@pytest.mark.parametrize("options", OPTIONS, ids=label)
def test_density_one_is_adamw(sparsified, options):
    reference = make_model()
    options = {"lr": 1e-2} | options
    adamw = torch.optim.AdamW(reference.parameters(), **options | {"lr": float(options["lr"])})
    expected = train(reference, adamw, 60)
    assert_near(train(*setup(sparsified, mask=make_mask(1.1), **options), 60), expected)


@both
def test_bfloat16_entries_outside_the_mask_stay_bit_identical_under_weight_decay(sparsified):
    """composable-sft multiplies the gradient by the mask, and weight decay then moves every weight."""
    model, mask = make_model(torch.bfloat16), make_mask()
    with torch.no_grad():
        model[1].weight.view(-1)[:8] = -0.0
    start = weights(model)
    if sparsified:
        sparsify(model, mask)
    got = train(model, SparseAdamW(model.named_parameters(), mask, lr=1e-2, weight_decay=0.5), 10)
    for name, chosen in mask.to_dense().items():
        assert torch.equal(bits(got[name])[~chosen], bits(start[name])[~chosen]), name
        assert not torch.equal(got[name][chosen], start[name][chosen]), name


@pytest.mark.parametrize("maximize", [False, True])
def test_goes_in_the_right_direction(maximize):
    """Rosenbrock's function of 4 points at once; only some coordinates are trained."""
    x = nn.Parameter(torch.tensor([[1.5, 1.5], [0.5, -1.0], [-1.0, 1.0], [0.0, 2.0]], dtype=torch.float64))
    mask = CSRMask.from_dense({"x": torch.tensor([[1, 1], [1, 0], [0, 1], [1, 1]], dtype=torch.bool)})
    optimizer = SparseAdamW([("x", x)], mask, lr=0.05, weight_decay=0.0, maximize=maximize)
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.999)

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        value = ((1 - x[:, 0]) ** 2 + 100 * (x[:, 1] - x[:, 0] ** 2) ** 2).sum()
        value = -value if maximize else value
        value.backward()
        return value

    values = []
    for _ in range(300):
        values.append(float(optimizer.step(closure).detach()))
        scheduler.step()
    assert values[-1] > values[0] if maximize else values[-1] < 0.3 * values[0]
    assert (x[1, 1], x[2, 0]) == (-1, -1)
    assert not x.is_inference()


@both
def test_no_gradient_and_zero_gradients_move_nothing(sparsified):
    model, optimizer = setup(sparsified, weight_decay=0.0)
    start = weights(model)
    optimizer.step()
    assert_same_bits(weights(model), start)
    assert all(float(s["step"]) == 0 for s in optimizer.state.values())
    set_grads(model, 0.0)
    optimizer.step()
    assert_same_bits(weights(model), start)
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


@both
@pytest.mark.parametrize("reload", [False, True])
def test_parameters_without_a_gradient_are_skipped_and_keep_their_own_step(sparsified, reload):
    reference = make_model()
    adamw = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    model, optimizer = setup(sparsified, mask=make_mask(1.1))
    for i in range(6):
        for m, o in ((reference, adamw), (model, optimizer)):
            o.zero_grad()
            backward(m, i)
            for name, p in m.named_parameters():
                if name.startswith("1.bias") and i % 2:
                    p.grad = None
            o.step()
        if reload:  # the loaded numbers of steps differ
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_near(weights(model), weights(reference))
    steps = {n: float(optimizer.state[p]["step"]) for n, p in model.named_parameters() if p.requires_grad}
    assert all(step == (3 if n.startswith("1.bias") else 6) for n, step in steps.items())


def test_a_missing_gradient_moves_no_state_in_memory():
    """Where a bucket is split, a CUDA graph may hold addresses of its state."""
    model, optimizer = trained(2)
    before = {p: {k: t.data_ptr() for k, t in optimizer.state[p].items()} for p in model.parameters()}
    model[1].bias.grad = None
    optimizer.step()
    assert before == {p: {k: t.data_ptr() for k, t in optimizer.state[p].items()} for p in model.parameters()}


def test_the_step_counter_passes_256():
    """SpIEL's bfloat16 counter never passes 1 (and bfloat16 cannot count past 256)."""
    model, optimizer = setup(dtype=torch.bfloat16)
    set_grads(model, 0.0)
    for _ in range(300):
        optimizer.step()
    assert {float(s["step"]) for s in optimizer.state.values()} == {300.0}


@both
def test_zero_grad_may_keep_the_gradients(sparsified):
    (model, optimizer), (twin, other) = setup(sparsified), setup(sparsified)
    for i in range(4):
        optimizer.zero_grad(set_to_none=False)
        backward(model, i)
        optimizer.step()
    assert_same_bits(train(twin, other, 4), weights(model))
    optimizer.zero_grad(set_to_none=False)
    assert all(float(p.grad.abs().max()) == 0 for p in model.parameters() if p.requires_grad)


@both
def test_the_step_shows_as_an_inplace_change(sparsified):
    """A backward over weights that a step has changed since is an error, not a wrong gradient."""
    x = torch.randn(5, 4, requires_grad=True)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    mask = CSRMask.from_dense({f"{i}.weight": torch.rand(4, 4) < 0.5 for i in (0, 1)})
    if sparsified:
        sparsify(model, mask)
    optimizer = SparseAdamW(model.named_parameters(), mask)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


LAYOUTS = {"transposed": lambda b: b.t(), "columns": lambda b: b[:, :3], "every second": lambda b: b[:, ::2]}


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("contiguous_gradient", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_that_are_not_contiguous(layout, contiguous_gradient, masked):
    factor = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)
    ends = []
    for ours in (True, False):
        base = torch.arange(24, dtype=torch.float64).reshape(4, 6)
        p, other = nn.Parameter(LAYOUTS[layout](base)), nn.Parameter(torch.ones(2, dtype=torch.float64))
        assert not p.is_contiguous()
        if ours:
            mask = full_mask(p=p.shape) if masked else full_mask(q=other.shape)
            optimizer = SparseAdamW([("p", p), ("q", other)], mask, lr=0.1)
        else:
            optimizer = torch.optim.AdamW([p, other], lr=0.1, foreach=False, fused=False)
        for _ in range(3):
            p.grad, other.grad = LAYOUTS[layout](factor.clone()), torch.ones_like(other)
            p.grad = p.grad.contiguous() if contiguous_gradient else p.grad
            optimizer.step()
        ends.append({"memory": base, "other": other.detach()})
    assert_near(*ends)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16, torch.float64), (torch.float64,) * 3])
def test_odd_shapes_in_several_dtypes(dtypes):
    """Tensors without dimensions, elements or masked entries, in models of one dtype and of several."""
    shapes = {"a": (3, 5), "empty": (0, 4), "flat": (7,), "none": (2, 2), "scalar": (), "thin": (5, 0, 2)}
    model = {n: nn.Parameter(torch.full(s, 0.5).to(dtypes[i % 3])) for i, (n, s) in enumerate(shapes.items())}
    model["rest"] = nn.Parameter(torch.ones(3, 2, dtype=dtypes[1]))
    chosen = {n: torch.full(s, n != "none", dtype=torch.bool) for n, s in shapes.items()}
    optimizer = SparseAdamW(list(model.items()), CSRMask.from_dense(chosen), lr=0.1, weight_decay=0.1)
    twin = {n: nn.Parameter(p.detach().clone()) for n, p in model.items() if n != "none"}
    reference = torch.optim.AdamW(twin.values(), lr=0.1, weight_decay=0.1, fused=False, foreach=False)
    for i in range(5):
        set_grads(model.values(), seed=i)
        optimizer.clip_grad_norm_(1e9)
        for n, p in twin.items():
            p.grad = model[n].grad.clone()
        optimizer.step()
        reference.step()
    for n, p in twin.items():
        rtol = 0.05 if p.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(model[n].detach(), p.detach(), rtol=rtol, atol=1e-6)
    assert torch.equal(model["none"], torch.full((2, 2), 0.5, dtype=model["none"].dtype))
    assert {s["exp_avg"].dtype for s in optimizer.state.values()} >= {torch.float64}
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    optimizer.step()


@both
def test_a_mask_without_entries(sparsified):
    model, optimizer = setup(sparsified, mask=make_mask(-1))
    start = weights(model)
    backward(model, 0)
    norm = optimizer.clip_grad_norm_(1.0)
    dense = [p.grad.norm() for n, p in model.named_parameters() if n.startswith("3")]
    assert float(norm) == pytest.approx(float(torch.stack(dense).norm()))
    got = train(model, optimizer, 3)
    assert not differ({n: got[n] for n in MASKED}, start)
    assert differ({n: got[n] for n in got if n not in MASKED}, start)


def test_the_default_dtype_does_not_matter():
    expected = train(*setup(dtype=torch.float32), 4)
    model, mask = make_model(torch.float32), make_mask()
    torch.set_default_dtype(torch.float64)
    try:
        optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
        got = train(model, optimizer, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(got, expected)
    assert {s["step"].dtype for s in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("masked", [True, False])
def test_sparse_gradients_are_refused(masked):
    embedding = nn.Embedding(4, 2, sparse=True)
    other = ("other", nn.Parameter(torch.ones(4, 2)))
    optimizer = SparseAdamW(
        [*embedding.named_parameters(), other], full_mask(**{"weight" if masked else "other": (4, 2)})
    )
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(float(s["step"]) == 0 for s in optimizer.state.values())


def test_a_sparse_parameter_without_a_gradient_is_skipped():
    other, weight = nn.Parameter(torch.eye(2).to_sparse()), nn.Parameter(torch.ones(4, 2))
    optimizer = SparseAdamW([("other", other), ("weight", weight)], full_mask(weight=(4, 2)))
    weight.grad = torch.ones(4, 2)
    optimizer.step()
    assert bool((weight < 1).all())


# ---- memory that changes between steps ----
def moved_apart(tensor):
    tensor.data = tensor.data.clone()


def away_and_back(tensor):
    tensor.data = tensor.data.float()
    tensor.data = tensor.data.double()


def strided(tensor):
    """The same numbers, not contiguous."""
    if tensor.dim() == 2:
        tensor.data = tensor.data.mT.contiguous().mT
    else:
        tensor.data = tensor.data.repeat_interleave(2)[::2]


@pytest.mark.parametrize("change", [moved_apart, away_and_back, strided])
@pytest.mark.parametrize("which", ["dense", "trained"])
@both
def test_tensors_whose_memory_changes_between_steps(sparsified, which, change):
    """The next step checks a tensor again if its memory is another one."""
    (model, optimizer), (twin, other) = trained(2, sparsified), trained(2, sparsified)
    for name, parameter in [*model.named_parameters()]:
        if which == "trained" and not name.endswith("values"):
            continue
        if change is away_and_back and name.endswith("values"):
            with pytest.raises(TypeError, match="cast the model with"):
                change(parameter)
        elif change is away_and_back:
            for tensor in (parameter, dict(twin.named_parameters())[name]):
                change(tensor)
        else:
            change(parameter)
    for first in (2, 4):  # and again, where nothing has changed
        got, expected = train(model, optimizer, 2, first=first), train(twin, other, 2, first=first)
        if change is strided:  # products of the forward round otherwise
            assert_near(got, expected)
        else:
            assert_same_bits(got, expected)
    for name, record in masked_parameters(model).items():
        assert torch.equal(record.mask.gather({name: record.dense}), record.values)


@both
def test_a_tensor_that_no_longer_fits_is_refused_between_steps(sparsified):
    model, optimizer = trained(2, sparsified)
    weight = model[1].weight
    backward(model, 2)
    weight.data = weight.data.float()
    start, state = weights(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="must have one dtype"):
        optimizer.step()
    assert_same_bits(weights(model), start)
    assert_same_bits(optimizer.state_dict(), state)


@both
def test_a_tensor_of_another_shape_is_refused_though_it_lies_at_the_same_address(sparsified):
    model, optimizer = trained(2, sparsified)
    backward(model, 2)
    weight = model[1].weight
    address, weight.data = weight.data_ptr(), weight.data.view(4, 6)
    assert weight.data_ptr() == address
    with pytest.raises(ValueError, match="has shape"):
        optimizer.step()


def test_values_changed_by_hand_reach_the_weights_around_a_step():
    """SparseAdamW writes the weights itself; no later check compares them with the values."""
    (model, optimizer), (twin, other) = trained(2, True), trained(2, True)
    for m, o in ((model, optimizer), (twin, other)):
        with torch.no_grad():
            m[1].values.mul_(2)
        if m is twin:
            m(torch.arange(3))  # a forward in between writes them, too
        set_grads(m)
        o.step()
        with torch.no_grad():
            m[1].bias_values.add_(1)
        m(torch.arange(3))
    assert_same_bits(weights(model), weights(twin))
    for name, record in masked_parameters(model).items():
        assert torch.equal(record.mask.gather({name: record.dense}), record.values)


# ---- bfloat16 state and stochastic rounding ----
@both
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.bfloat16, {}),
        (torch.bfloat16, {"state_dtype": torch.bfloat16}),
        (torch.bfloat16, {"state_dtype": torch.bfloat16, "master": True}),
        (torch.float32, {"state_dtype": torch.bfloat16}),
    ],
    ids=label,
)
def test_results_depend_on_the_seed(sparsified, dtype, options):
    if sparsified and "state_dtype" not in options:
        pytest.skip("values are float32: nothing is rounded")

    def run(seed, **more):
        return train(*setup(sparsified, dtype, mask=make_mask(0.9), seed=seed, **options, **more), 8)

    one = run(1, stochastic_rounding=True)
    assert_same_bits(one, run(1, stochastic_rounding=True))
    assert differ(one, run(2, stochastic_rounding=True))
    assert not differ(run(1), run(2))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.bfloat16, torch.float32, torch.bfloat16)])
def test_no_two_parameters_share_random_numbers(dtypes, alone, groups):
    """Stepped by one launch or, because of dtypes, groups or a third parameter without a gradient, by one each."""
    params = {name: nn.Parameter(torch.ones(64, 4, dtype=d)) for name, d in zip("abc", dtypes)}
    pairs, mask = list(params.items()), full_mask(a=(64, 4), b=(64, 4), c=(64, 4))
    given = [{"params": [pair]} for pair in pairs] if groups else pairs
    optimizer = SparseAdamW(given, mask, stochastic_rounding=True, state_dtype=torch.bfloat16)
    set_grads(params.values(), 0.3)
    if alone:
        params["c"].grad = None
    optimizer.step()
    a, b = params["a"], params["b"]
    moments = [optimizer.state[p]["exp_avg"] for p in (a, b)]
    assert 0.25 < (moments[0] != moments[1]).double().mean() < 0.75
    if a.dtype == b.dtype:
        assert 0.1 < (a != b).double().mean() < 0.9
