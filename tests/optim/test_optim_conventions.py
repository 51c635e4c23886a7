"""SparseAdamW by the patterns of PyTorch's own optimizer tests, against torch.optim.AdamW on the gathered entries in
float64.
"""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import lr_scheduler

from deftx_kernels import CSRMask, SparseAdamW, sparsify
from deftx_kernels.nn import masked_parameters

MASKED = ("0.weight", "1.bias", "1.weight")
pytestmark = pytest.mark.usefixtures("one_thread")

EXACT = 1e-12  # of the largest weight: 50 steps of float64


def label(value):
    return (", ".join(value) or "defaults") if isinstance(value, dict) else str(value)


both = pytest.mark.parametrize("sparsified", [False, True], ids=["plain", "sparsified"])


def make_model(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def make_mask(density=0.4, seed=1, names=MASKED):
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in make_model().named_parameters() if n in names}
    return CSRMask.from_dense({n: torch.rand(s, generator=generator) < density for n, s in shapes.items()})


def setup(sparsified=False, dtype=torch.float64, mask=None, draw=0, **options):
    model, mask = make_model(dtype, draw), mask or make_mask()
    if sparsified:
        sparsify(model, mask)
    return model, SparseAdamW(model.named_parameters(), mask, **({"lr": 1e-2} | options))


def backward(model, i):
    generator = torch.Generator().manual_seed(100 + i)
    ids, labels = torch.randint(0, 10, (8,), generator=generator), torch.randint(0, 3, (8,), generator=generator)
    loss = nn.functional.cross_entropy(model(ids).double(), labels)
    loss.backward()
    return loss.detach()


def train(model, optimizer, steps, first=0, scheduler=None):
    for i in range(first, first + steps):
        optimizer.zero_grad()
        loss = backward(model, i)
        optimizer.step()
        if scheduler is not None:
            scheduler.step(*([loss] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
    return weights(model)


def weights(model):
    """Name in the plain model → a copy of the dense tensor."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.endswith("values")}


def bits(tensor):
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same_bits(one, other):
    """Of tensors in nested dicts and lists; everything else must be equal."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(bits(one), bits(other))
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same_bits(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other):
            assert_same_bits(a, b)
    else:
        assert one == other


def differ(one, other):
    return any(not torch.equal(bits(one[n]), bits(other[n])) for n in one)


def assert_near(got, expected, tolerance=EXACT):
    largest = max(float(t.abs().max()) for t in expected.values())
    for name, tensor in expected.items():
        assert float((got[name].double() - tensor.double()).abs().max()) <= tolerance * largest, name


def set_grads(parameters, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (scale * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def through_file(objects, weights_only=True):
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


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


ORIGIN = torch.randn(make_mask().nnz, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
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
OF_MASKED = [
    {"l1": 0.1},
    {"decay_to": ORIGIN, "weight_decay": 0.5},
    {"l1": 0.1, "decay_to": ORIGIN, "weight_decay": 0.2, "maximize": True, "betas": (0.7, 0.95), "eps": 1e-3},
]


@both
@pytest.mark.parametrize("options", OPTIONS + OF_MASKED, ids=label)
def test_against_adamw_on_the_gathered_entries(sparsified, options):
    mask, start = make_mask(), weights(make_model())
    expected = oracle(make_model(), mask, 60, **options)
    model, optimizer = setup(sparsified, **options)
    got = train(model, optimizer, 60)
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
        if maximize:
            value = -value
        value.backward()
        return value

    values = []
    for _ in range(300):
        values.append(float(optimizer.step(closure).detach()))
        scheduler.step()
    assert values[-1] > values[0] if maximize else values[-1] < 0.3 * values[0]
    assert x[1, 1] == -1
    assert x[2, 0] == -1
    assert not x.is_inference()


@both
def test_no_gradient_and_zero_gradients_move_nothing(sparsified):
    model, optimizer = setup(sparsified, weight_decay=0.0)
    start = weights(model)
    optimizer.step()
    assert_same_bits(weights(model), start)
    assert all(float(s["step"]) == 0 for s in optimizer.state.values())
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    assert_same_bits(weights(model), start)
    assert {float(s["step"]) for s in optimizer.state.values()} == {1.0}


@both
def test_zero_grad_may_keep_the_gradients(sparsified):
    model, optimizer = setup(sparsified)
    twin, other = setup(sparsified)
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
    mask = CSRMask.from_dense(
        {n: torch.rand(p.shape) < 0.5 for n, p in model.named_parameters() if n.endswith("weight")}
    )
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
            mask = CSRMask.from_dense(
                {"p" if masked else "q": torch.ones((p if masked else other).shape, dtype=torch.bool)}
            )
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
        set_grads(model.values(), i)
        optimizer.clip_grad_norm_(1e9)
        for n, p in twin.items():
            p.grad = model[n].grad.clone()
        optimizer.step()
        reference.step()
    for n, p in twin.items():
        torch.testing.assert_close(
            model[n].detach(), p.detach(), rtol=0.05 if p.dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
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
    mask = CSRMask.from_dense({"weight" if masked else "other": torch.ones(4, 2, dtype=torch.bool)})
    optimizer = SparseAdamW([*embedding.named_parameters(), other], mask)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert all(float(s["step"]) == 0 for s in optimizer.state.values())


def test_repr():
    text = repr(setup(weight_decay=0.125)[1])
    assert text.startswith("SparseAdamW (")
    assert "weight_decay: 0.125" in text


# ---- state dicts ----
@both
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {"lr": torch.tensor(0.01)}),
        (torch.bfloat16, {"master": True, "state_dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 3}),
        (torch.bfloat16, {"stochastic_rounding": True}),
    ],
    ids=label,
)
def test_state_dict(sparsified, dtype, options):
    """Deterministic, survives a file, and both a copy and the file continue bit by bit, dtypes as they were."""
    model, optimizer = setup(sparsified, dtype, **options)
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    assert_same_bits(state, optimizer.state_dict())
    saved, copied, saved_model = through_file(state), copy.deepcopy(state), copy.deepcopy(model.state_dict())
    assert_same_bits(saved, state)
    expected = train(model, optimizer, 3, first=3)
    for loaded in (saved, copied):
        before = copy.deepcopy(loaded)
        other, resumed = setup(sparsified, dtype, draw=4, **options)
        other.load_state_dict(saved_model)
        resumed.load_state_dict(loaded)
        assert_same_bits(resumed.state_dict(), before)
        assert_same_bits(train(other, resumed, 3, first=3), expected)
        assert_same_bits(resumed.state_dict(), optimizer.state_dict())
        assert_same_bits(loaded, before)  # what was loaded is no view of the state


@pytest.mark.parametrize("kind", [float, int])
def test_a_step_that_is_a_number(kind):
    model, optimizer = setup()
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = kind(entry["step"])
    other, resumed = setup()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert_same_bits(train(other, resumed, 2, first=3), train(model, optimizer, 2, first=3))


def test_hooks_of_state_dicts():
    model, optimizer = setup()
    train(model, optimizer, 2)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    state = optimizer.state_dict()
    assert (calls, state["note"]) == (["before"], 1)
    _, other = setup()

    def adapt(_, given):
        adapted = copy.deepcopy(given)
        adapted["param_groups"][0]["lr"] = 0.003
        for entry in adapted["state"].values():
            entry["exp_avg"] *= 2
        return adapted

    other.register_load_state_dict_pre_hook(adapt)
    other.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    other.load_state_dict(state)
    assert calls == ["before", 0.003]
    for one, two in zip(optimizer.state.values(), other.state.values()):
        assert torch.equal(two["exp_avg"], 2 * one["exp_avg"])
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_a_hook_after_loading_sees_what_was_loaded_and_may_change_it():
    """float32 moments of bfloat16 parameters, not their rounding."""
    model, optimizer = setup(dtype=torch.bfloat16)
    train(model, optimizer, 2)
    _, other = setup(dtype=torch.bfloat16)
    seen = []

    def hook(o):
        for entry in o.state.values():
            seen.append(entry["exp_avg"].dtype)
            entry["exp_avg"].zero_()

    other.register_load_state_dict_post_hook(hook)
    other.load_state_dict(optimizer.state_dict())
    assert all(float(entry["exp_avg"].abs().sum()) == 0 for entry in other.state.values())
    assert seen[: len(MASKED)] == [torch.float32] * len(MASKED)


def test_state_that_belongs_to_no_parameter():
    """A hook may keep something of its own in the state, as in torch's tests."""
    model, optimizer = setup()
    optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("note", 1))
    train(model, optimizer, 1)
    _, other = setup()
    other.load_state_dict(optimizer.state_dict())
    assert other.state["note"] == 1


def test_an_emptied_state_begins_anew():
    """As with torch's optimizers: moments and step counts are those of `optimizer.state`, also for what is saved."""
    model, optimizer = setup()
    train(model, optimizer, 3)
    fresh, other = setup()
    fresh.load_state_dict(model.state_dict())
    optimizer.state.clear()
    assert_same_bits(train(model, optimizer, 2, first=3), train(fresh, other, 2, first=3))
    assert_same_bits(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
@both
def test_a_tensor_of_the_state_that_someone_replaced_counts(sparsified, key):
    """As load hooks and other code do; the other parameters' state stays."""
    (model, optimizer), (twin, other) = setup(sparsified), setup(sparsified)
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2)
    for state in optimizer.state.values():
        state[key] = state[key].clone().add_(1)
    for state in other.state.values():
        state[key].add_(1)
    assert_same_bits(train(model, optimizer, 2, first=2), train(twin, other, 2, first=2))
    assert_same_bits(optimizer.state_dict()["state"], other.state_dict()["state"])


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
    """What a step has checked and found is true of the next one only where the tensors are still there."""
    (model, optimizer), (twin, other) = setup(sparsified), setup(sparsified)
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2)
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
    model, optimizer = setup(sparsified)
    train(model, optimizer, 2)
    weight = model[1].weight
    backward(model, 2)
    weight.data = weight.data.float()
    start, state = weights(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="one dtype a call"):
        optimizer.step()
    assert_same_bits(weights(model), start)
    assert_same_bits(optimizer.state_dict(), state)


@both
def test_a_tensor_of_another_shape_is_refused_though_it_lies_at_the_same_address(sparsified):
    model, optimizer = setup(sparsified)
    train(model, optimizer, 2)
    backward(model, 2)
    weight = model[1].weight
    address, weight.data = weight.data_ptr(), weight.data.view(4, 6)
    assert weight.data_ptr() == address
    with pytest.raises(ValueError, match="has shape"):
        optimizer.step()


def test_values_changed_by_hand_reach_the_weights_around_a_step():
    """SparseAdamW writes the weights itself, so that nothing looks after its step whether they are up to date."""
    (model, optimizer), (twin, other) = setup(sparsified=True), setup(sparsified=True)
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2)
        with torch.no_grad():
            m[1].values.mul_(2)
        if m is twin:
            m(torch.arange(3))  # a forward in between writes them, too
        set_grads([p for p in m.parameters() if p.requires_grad])
        o.step()
        with torch.no_grad():
            m[1].bias_values.add_(1)
        m(torch.arange(3))
    assert_same_bits(weights(model), weights(twin))
    for name, record in masked_parameters(model).items():
        assert torch.equal(record.mask.gather({name: record.dense}), record.values)


def test_hooks_of_steps():
    model, optimizer = setup()
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    train(model, optimizer, 1)
    handle.remove()
    train(model, optimizer, 1)
    assert calls == ["before", "after", "before"]


def state_of(make_optimizer=SparseAdamW, mask=None, in_two=False):
    model = make_model()
    named = list(model.named_parameters())
    params = [{"params": named[:2]}, {"params": named[2:]}] if in_two else named
    optimizer = make_optimizer(params, mask or make_mask()) if make_optimizer is SparseAdamW else make_optimizer(params)
    train(model, optimizer, 2)
    return optimizer.state_dict()


def moved():
    """A mask with as many entries in each tensor, at other places."""
    return CSRMask.from_dense({n: t.flatten().roll(1).view(t.shape) for n, t in make_mask().to_dense().items()})


@both
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"make_optimizer": torch.optim.AdamW}, "has no mask_fingerprints"),
        ({"in_two": True}, "number of parameter groups"),
        ({"mask": moved()}, r"another mask.*'0\.\w+' has \d+ entries at other places"),
        ({"mask": make_mask(0.9)}, r"another mask.*'0\.\w+' has \d+ entries there and \d+ here"),
        ({"mask": make_mask(names=["0.weight", "1.weight"])}, r"'1\.bias\w*' was not masked and is masked now"),
        ({"mask": make_mask(names=[*MASKED, "3.bias"])}, r"'3\.bias' was masked and is not masked now"),
    ],
    ids=label,
)
def test_a_refused_state_changes_nothing(sparsified, state, message):
    model, optimizer = setup(sparsified)
    twin, other = setup(sparsified)
    train(model, optimizer, 2)
    train(twin, other, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_of(**state))
    assert_same_bits(optimizer.state_dict(), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert_same_bits(train(model, optimizer, 2, first=2), train(twin, other, 2, first=2))


@both
def test_a_state_without_newer_options_gets_their_defaults(sparsified):
    """As with torch's optimizers, also where this optimizer was made with another value: the state is of a run without
    it.
    """
    (model, optimizer), (twin, other) = setup(sparsified), setup(sparsified)
    for m, o in ((model, optimizer), (twin, other)):
        train(m, o, 2)
    state = optimizer.state_dict()
    for option in ("l1", "maximize", "master", "state_dtype", "stochastic_rounding", "seed"):
        del state["param_groups"][0][option]
    fresh, late = setup(sparsified, maximize=True)
    fresh.load_state_dict(model.state_dict())
    late.load_state_dict(state)
    assert_same_bits(train(fresh, late, 2, first=2), train(twin, other, 2, first=2))


def test_a_state_of_renamed_parameters():
    """It is the names that differ, and the message says so."""
    model, optimizer = setup()
    train(model, optimizer, 1)
    mask = CSRMask.from_dense({f"model.{n}": t for n, t in make_mask().to_dense().items()})
    renamed = SparseAdamW([(f"model.{n}", p) for n, p in make_model().named_parameters()], mask)
    with pytest.raises(
        ValueError, match=r"belongs to other parameters: '0\.weight' is there where .* has 'model\.0\.weight'"
    ):
        renamed.load_state_dict(optimizer.state_dict())


def test_a_state_of_another_number_of_parameters_is_refused():
    model = make_model()
    named = [(n, p) for n, p in model.named_parameters() if n != "3.bias"]
    with pytest.raises(ValueError, match="doesn't match the size"):
        setup()[1].load_state_dict(SparseAdamW(named, make_mask()).state_dict())


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: through_file(pair, weights_only=False),
}


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("options", [{}, {"decay_to": ORIGIN, "lr": torch.tensor(0.02)}], ids=["", "decay_to"])
@both
def test_copies_train_on_with_the_same_bits(sparsified, options, copier):
    model, optimizer = setup(sparsified, **options)
    start = train(model, optimizer, 3)
    other, twin = COPIERS[copier]((model, optimizer))
    assert_same_bits(twin.state_dict(), optimizer.state_dict())
    expected = train(other, twin, 3, first=3)
    assert_same_bits(weights(model), start)  # nothing is shared
    assert_same_bits(train(model, optimizer, 3, first=3), expected)
    assert differ(expected, start)


def test_deepcopy_keeps_all_public_attributes():
    def attributes(optimizer):
        return {k for k in vars(optimizer) if not k.startswith("_")}

    model, optimizer = setup()
    train(model, optimizer, 1)
    assert attributes(copy.deepcopy(optimizer)) == attributes(optimizer)
    assert copy.deepcopy(optimizer).mask == optimizer.mask


@pytest.mark.parametrize(
    ("dtype", "options", "sparsified", "each"),
    [
        (torch.float32, {}, False, 8),
        (torch.float32, {}, True, 8),
        (torch.float32, {"state_dtype": torch.bfloat16}, False, 4),
        (torch.bfloat16, {"state_dtype": torch.bfloat16}, True, 4),
        (torch.bfloat16, {"master": True}, False, 12),
        (torch.bfloat16, {"master": True, "state_dtype": torch.bfloat16}, False, 8),
        (torch.bfloat16, {"master": True}, True, 8),  # the values are the master
        (torch.float64, {"state_dtype": torch.bfloat16, "master": True}, False, 16),
    ],
)
def test_bytes_of_the_state(dtype, options, sparsified, each):
    mask = make_mask()
    model, optimizer = setup(sparsified, dtype, **options)
    assert not optimizer.state
    train(model, optimizer, 2)
    tensors = [
        t for n, p in model.named_parameters() if n[0] in "01" and p.requires_grad for t in optimizer.state[p].values()
    ]
    assert sum(t.nbytes for t in tensors) == each * mask.nnz + 4 * len(MASKED)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == each * mask.nnz + 4 * len(MASKED)


# ---- learning rates and groups ----
SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda i: 0.9**i, lambda i: 1 / (1 + i)]),
    "numpy": lambda o: lr_scheduler.LambdaLR(o, lambda i: np.float32(0.9) ** i),
    "linear to 0": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.0, 4),  # ends, by rounding, at -5e-20
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 10),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 15),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=25),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, threshold=0.1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.ExponentialLR(o, 0.8)], [5]
    ),
}


def in_groups(model, lr):
    """Two groups with a learning rate each; the first holds a masked parameter, the second the others of both kinds."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    second = {"params": named[1:], "lr": lr[1], "weight_decay": 0.2, "betas": (0.8, 0.9)}
    return [{"params": named[:1], "lr": lr[0]}, second]


@both
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tensor, sparsified):
    reference, model, mask = make_model(), make_model(), make_mask(1.1)
    if sparsified:
        sparsify(model, mask)
    ends, rates = [], []
    for m in (reference, model):
        lr = [torch.tensor(x, dtype=torch.float64) if tensor else x for x in (0.02, 0.01)]
        o = torch.optim.AdamW(in_groups(m, lr)) if m is reference else SparseAdamW(in_groups(m, lr), mask)
        scheduler = SCHEDULERS[name](o)
        ends.append(train(m, o, 24, scheduler=scheduler))
        rates.append([float(x) for g in o.param_groups for x in (g["lr"], *g["betas"])])
    # torch goes on computing in the float32 of such a rate.
    assert_near(ends[1], ends[0], 24 * torch.finfo(torch.float32).eps if name == "numpy" else EXACT)
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0][0] != 0.02


@both
def test_options_of_groups(sparsified):
    """Each group as an optimizer of its own."""
    options = [
        {"lr": 0.03, "state_dtype": torch.bfloat16},
        {"lr": 0.01, "weight_decay": 0.3, "betas": (0.5, 0.8), "eps": 1e-3},
    ]
    options.append({"maximize": True, "l1": 0.1})
    ends = []
    for together in (True, False):
        model = make_model(torch.float32)
        mask = make_mask()
        if sparsified:
            sparsify(model, mask)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        parts = [[(n, p) for n, p in named if n[0] == digit] for digit in "013"]
        if together:
            optimizers = [SparseAdamW([{"params": part, **o} for part, o in zip(parts, options)], mask)]
            assert optimizers[0].state_dict()["param_groups"][0]["state_dtype"] == torch.bfloat16
        else:
            masks = [mask.restrict([n for n in MASKED if n[0] == digit]) for digit in "01"]
            masks.append(CSRMask.from_dense({"none": torch.zeros(1, dtype=torch.bool)}))
            optimizers = [SparseAdamW(part, m, **o) for part, m, o in zip(parts, masks, options)]
        for i in range(10):
            model.zero_grad()
            backward(model, i)
            for o in optimizers:
                o.step()
        ends.append(weights(model))
    assert_same_bits(*ends)


def test_groups_without_trainable_parameters_keep_their_place():
    model, mask = make_model(), make_mask(names=["1.weight"])
    model[0].requires_grad_(False)
    named = list(model.named_parameters())
    optimizer = SparseAdamW([{"params": named[:1]}, {"params": iter(named[1:])}, {"params": []}], mask, lr=0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, 4, 0]
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda i: 5.0, lambda i: 0.0, lambda i: 7.0])
    start = weights(model)
    assert_same_bits(train(model, optimizer, 2, scheduler=scheduler), start)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.0, pytest.approx(0.7)]
    other = SparseAdamW([{"params": named[:1]}, {"params": named[1:]}, {"params": []}], mask)
    other.load_state_dict(through_file(optimizer.state_dict()))


def bad_groups():
    leaf = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    inner = nn.Linear(4, 6).double()
    elsewhere = sparsify(nn.Sequential(nn.Embedding(1, 1), inner), make_mask(0.9, names=["1.bias", "1.weight"]))
    return {
        "no names": ([leaf], {}, TypeError),
        "a tensor": (leaf, {}, TypeError),
        "half the names": ([("a", leaf), leaf], {}, TypeError),
        "negative lr": ([("a", leaf)], {"lr": -1.0}, ValueError),
        "an lr for each entry": ([("a", leaf)], {"lr": torch.ones(2)}, ValueError),
        "negative decay": ([("a", leaf)], {"weight_decay": -0.1}, ValueError),
        "betas": ([("a", leaf)], {"betas": (1.0, 0.5)}, ValueError),
        "eps": ([("a", leaf)], {"eps": float("nan")}, ValueError),
        "l1": ([("a", leaf)], {"l1": -1}, ValueError),
        "state_dtype": ([("a", leaf)], {"state_dtype": torch.float16}, ValueError),
        "seed": ([("a", leaf)], {"seed": -1}, ValueError),
        "shape": ([("1.weight", leaf)], {}, ValueError),
        "another mask": (list(elsewhere.named_parameters()), {}, ValueError),
        "no leaf": ([("a", leaf * 2)], {}, ValueError),
        "a name that is taken": ([("1.weight", nn.Parameter(torch.ones(6, 4, dtype=torch.float64)))], {}, ValueError),
    }


@pytest.mark.parametrize("case", bad_groups())
def test_a_refused_group_changes_nothing(case):
    params, options, error = bad_groups()[case]
    model, optimizer = setup()
    twin, other = setup()
    train(model, optimizer, 2)
    train(twin, other, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error):
        optimizer.add_param_group({"params": params, **options})
    assert_same_bits(optimizer.state_dict(), before)
    assert_same_bits(train(model, optimizer, 2, first=2), train(twin, other, 2, first=2))


def test_a_parameter_passed_twice():
    model, optimizer = setup()
    named = list(model.named_parameters())
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": named[-1:]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        SparseAdamW([{"params": named}, {"params": named[:1]}], make_mask())
    with pytest.warns(UserWarning, match="duplicate parameters"):
        SparseAdamW([*named, named[0]], make_mask())


def test_two_parameters_of_one_masked_name_are_refused():
    """Otherwise the second would be trained and the first would silently stay."""
    one, two = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    with pytest.raises(ValueError, match="'w'"):
        SparseAdamW([("w", one), ("w", two)], CSRMask.from_dense({"w": torch.ones(2, 2, dtype=torch.bool)}))


# ---- wrapped models ----
class Replica(nn.Module):
    """DistributedDataParallel's names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, ids):
        return self.module(ids)


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    for i in (1, 3):
        model[i] = checkpoint_wrapper(model[i])
    return model


WRAPPERS = {
    "compile": compiled,
    "replica": Replica,
    "checkpoint": checkpointed,
    "replica of compile": lambda m: Replica(compiled(m)),
    "compile of replica": lambda m: compiled(Replica(checkpointed(m))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@both
def test_names_of_wrapped_models(sparsified, wrapper):
    """The wrapped model trains as the plain one, and its optimizer's state loads there."""
    model, optimizer = setup(sparsified)
    inner = make_model()
    if sparsified:
        sparsify(inner, make_mask())
    wrapped = WRAPPERS[wrapper](inner)
    assert any(w in n for n, _ in wrapped.named_parameters() for w in ("module.", "_orig_mod."))
    other = SparseAdamW(wrapped.named_parameters(), make_mask(), lr=1e-2)
    expected, got = train(model, optimizer, 3), train(wrapped, other, 3)
    for one, two in zip(expected.values(), got.values()):
        assert torch.equal(bits(one), bits(two))
    fresh, resumed = setup(sparsified)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(other.state_dict()))
    assert_same_bits(train(fresh, resumed, 2, first=3), train(model, optimizer, 2, first=3))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_mask_made_of_the_wrapped_model(wrapper):
    wrapped = WRAPPERS[wrapper](make_model())
    before = weights(wrapped)
    mask = CSRMask.from_dense({n: torch.ones(p.shape, dtype=torch.bool) for n, p in wrapped.named_parameters()})
    after = train(wrapped, SparseAdamW(wrapped.named_parameters(), mask), 1)
    assert all(differ({n: after[n]}, before) for n in mask.names)


@pytest.mark.parametrize("wrap", [nn.Identity(), Replica, compiled], ids=["plain", "replica", "compile"])
def test_a_model_with_a_module_of_that_name(wrap):
    model = Replica(nn.Linear(2, 2))
    mask = CSRMask.from_dense({"module.weight": torch.eye(2, dtype=torch.bool)})
    wrapped = wrap(model)
    optimizer = SparseAdamW(wrapped.named_parameters(), mask, weight_decay=0.5)
    before = weights(model)["module.weight"]
    wrapped(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model.module.weight == before, ~torch.eye(2, dtype=torch.bool))


# ---- clipping ----
def norm_of(model, mask):
    """float64: of the masked gradients and those of the other parameters."""
    grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    chosen = mask.to_dense()
    return torch.cat([g[chosen[n]] if n in chosen else g.flatten() for n, g in grads.items()]).norm()


@both
@pytest.mark.parametrize("max_norm", [0, 0.05, 1e6])
@pytest.mark.parametrize("without", [(), ("1.weight", "1.values", "3.bias")])
def test_clip_grad_norm(sparsified, max_norm, without):
    mask = make_mask()
    model, optimizer = setup(sparsified, torch.float32, eps=1e-3)
    twin, other = setup(sparsified, torch.float32, eps=1e-3)
    for i in range(4):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            backward(m, i)
            for n, p in m.named_parameters():
                p.grad = None if n in without else p.grad
        before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = optimizer.clip_grad_norm_(max_norm)
        expected = norm_of(model, mask)
        assert (norm.dtype, norm.shape) == (torch.float32, ())
        torch.testing.assert_close(norm.double(), expected, rtol=2e-7, atol=0)
        assert_same_bits({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, before)
        if sparsified:
            theirs = nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
            torch.testing.assert_close(norm, theirs)
        else:
            for p in twin.parameters():
                if p.grad is not None:
                    p.grad *= min(1.0, max_norm / (float(expected) + 1e-6))
        optimizer.step()
        other.step()
    assert_near(weights(model), weights(twin), 1e-6)
    if max_norm == 0.05:  # it does clip
        assert differ(weights(model), train(*setup(sparsified, torch.float32, eps=1e-3), 4))


@pytest.mark.parametrize("clear", ["zero_grad", "step", "clip again"])
def test_clipping_counts_for_one_step(clear):
    model, optimizer = setup(eps=1e-2)
    twin, other = setup(eps=1e-2)
    for m, o in ((model, optimizer), (twin, other)):
        backward(m, 0)
        if clear == "step":
            o.clip_grad_norm_(1e-3)
            o.step()
    if clear == "step":
        other.zero_grad()
        set_grads(twin.parameters())
        set_grads(model.parameters())
    else:
        optimizer.clip_grad_norm_(1e-3)
    if clear == "clip again":
        optimizer.clip_grad_norm_(1e3)
    if clear == "zero_grad":
        optimizer.zero_grad()
        backward(model, 0)
    optimizer.step()
    other.step()
    assert_same_bits(weights(model), weights(twin))


@both
def test_clipping_with_a_grad_scaler(sparsified):
    model, optimizer = setup(sparsified, torch.float32, eps=1e-3)
    twin, other = setup(sparsified, torch.float32, eps=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(4):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(0, 10, (8,), generator=generator)
        scaler.scale(model(ids).square().mean() * (float("inf") if i == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        norm = optimizer.clip_grad_norm_(0.01)
        start = weights(model)
        scaler.step(optimizer)
        scaler.update()
        if i == 1:
            assert not torch.isfinite(norm)
            assert_same_bits(weights(model), start)
            continue
        other.zero_grad()
        twin(ids).square().mean().backward()
        torch.testing.assert_close(other.clip_grad_norm_(0.01), norm)
        other.step()
    assert_near(weights(model), weights(twin), 1e-6)
    assert {float(s["step"]) for s in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["0.weight", "3.bias"])
def test_gradients_that_are_not_finite(value, where):
    model, optimizer = setup()
    backward(model, 0)
    outside = ~make_mask().to_dense()["1.weight"]
    model[1].weight.grad[outside] = value
    assert torch.isfinite(optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True))  # what is not trained does not count
    dict(model.named_parameters())[where].grad[:] = value
    assert not torch.isfinite(optimizer.clip_grad_norm_(1.0))
    with pytest.raises(RuntimeError, match="norm of the gradients"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("max_norm", [-1.0, float("nan"), "1", None, True])
def test_clip_grad_norm_refuses(max_norm):
    with pytest.raises(ValueError, match="max_norm"):
        setup()[1].clip_grad_norm_(max_norm)


def test_clip_grad_norm_without_gradients():
    assert float(setup()[1].clip_grad_norm_(1.0)) == 0


# ---- bfloat16 state and stochastic rounding ----
ROUNDED = [
    (torch.bfloat16, {}),
    (torch.bfloat16, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"state_dtype": torch.bfloat16, "master": True}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
]


@both
@pytest.mark.parametrize(("dtype", "options"), ROUNDED, ids=label)
def test_the_seed_decides(sparsified, dtype, options):
    if sparsified and "state_dtype" not in options:
        pytest.skip("values are float32: nothing is rounded")

    def run(seed, **more):
        model, optimizer = setup(sparsified, dtype, mask=make_mask(0.9), seed=seed, **options, **more)
        return train(model, optimizer, 8)

    one = run(1, stochastic_rounding=True)
    assert_same_bits(one, run(1, stochastic_rounding=True))
    assert differ(one, run(2, stochastic_rounding=True))
    assert not differ(run(1), run(2))


def twins(*dtypes, groups, **options):
    """Parameters a, b, ... of equal content, fully masked."""
    params = {name: nn.Parameter(torch.ones(64, 4, dtype=d)) for name, d in zip("abc", dtypes)}
    mask = CSRMask.from_dense({n: torch.ones(64, 4, dtype=torch.bool) for n in params})
    pairs = list(params.items())
    return params, SparseAdamW([{"params": [pair]} for pair in pairs] if groups else pairs, mask, lr=1e-3, **options)


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 3, (torch.bfloat16, torch.float32, torch.bfloat16)])
def test_no_two_parameters_share_random_numbers(dtypes, alone, groups):
    """Whether they are stepped by one launch, by one each (dtypes, groups), or one by one since a third lacks a
    gradient.
    """
    params, optimizer = twins(*dtypes, groups=groups, stochastic_rounding=True, state_dtype=torch.bfloat16)
    for p in params.values():
        p.grad = torch.full_like(p, 0.3)
    if alone:
        params["c"].grad = None
    optimizer.step()
    a, b = params["a"], params["b"]
    moments = [optimizer.state[p]["exp_avg"] for p in (a, b)]
    assert 0.25 < (moments[0] != moments[1]).double().mean() < 0.75
    if a.dtype == b.dtype:
        assert 0.1 < (a != b).double().mean() < 0.9


def test_bfloat16_moments_decay_only_with_stochastic_rounding():
    """After one large gradient, exp_avg_sq falls by 0.1 % a step, less than half a unit in the last place of bfloat16."""
    ends = {}
    for name, options in {
        "float32": {},
        "nearest": {"state_dtype": torch.bfloat16},
        "stochastic": {"state_dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 5},
    }.items():
        p = nn.Parameter(torch.zeros(512))
        mask = CSRMask.from_dense({"p": torch.ones(512, dtype=torch.bool)})
        optimizer = SparseAdamW([("p", p)], mask, lr=1e-3, weight_decay=0.0, **options)
        for i in range(1000):
            p.grad = torch.full_like(p, 1e-3 if i else 1.0)
            optimizer.step()
            if i == 0:
                first = float(optimizer.state[p]["exp_avg_sq"].float().mean())
        ends[name] = float(optimizer.state[p]["exp_avg_sq"].float().mean()), -float(p.detach().mean())
    assert ends["float32"][0] < 0.4 * first
    assert ends["nearest"][0] > 0.99 * first
    assert ends["stochastic"] == pytest.approx(ends["float32"], rel=0.03)
    assert ends["nearest"][1] != pytest.approx(ends["float32"][1], rel=0.03)


# ---- update_mask ----
def test_update_mask_and_what_entries_decay_to():
    """Entries that stay keep their point; those that join stay where they are, since they decay to their present
    weight.
    """
    model, optimizer = setup(decay_to=ORIGIN, lr=0.1, weight_decay=0.5)
    old, new = make_mask(), make_mask(0.6, seed=9)
    start = weights(model)
    optimizer.update_mask(new)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    origin = old.scatter_({n: torch.zeros_like(start[n]) for n in MASKED}, ORIGIN)
    was = old.to_dense()
    for name, chosen in new.to_dense().items():
        stayed, w = chosen & was[name], weights(model)[name]
        assert 0 < stayed.sum() < chosen.sum()
        torch.testing.assert_close(
            w[stayed], (start[name] - 0.05 * (start[name] - origin[name]))[stayed], rtol=0, atol=1e-15
        )
        assert torch.equal(w[~stayed], start[name][~stayed]), name


def test_update_mask_keeps_the_trajectory_of_entries_that_stay():
    """With a mask of more entries, those of the old one go on as if nothing had happened, given the same gradients."""
    ends = []
    for update in (True, False):
        model, optimizer = setup(mask=make_mask(), decay_to=ORIGIN, l1=0.01)
        for i in range(6):
            set_grads(model.parameters(), i)
            if update and i == 3:
                optimizer.update_mask(make_mask() | make_mask(0.6, seed=9))
            optimizer.step()
        ends.append({n: w[make_mask().to_dense()[n]] for n, w in weights(model).items() if n in MASKED})
    assert_near(*ends)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (None, TypeError),
        (make_mask(names=["0.weight"]), ValueError),
        (CSRMask.from_dense({n: torch.ones(2, 2, dtype=torch.bool) for n in MASKED}), ValueError),
        (make_mask(0.6), ValueError),
    ],
    ids=["none", "names", "shapes", "entries in a frozen tensor"],
)
def test_a_refused_update_changes_nothing(mask, error):
    """The optimizer's own mask covers a frozen tensor, in which it has no entry."""
    old = CSRMask.from_dense({n: m & (n != "0.weight") for n, m in make_mask().to_dense().items()})
    ends = []
    for refused in (True, False):
        model = make_model()
        model[0].requires_grad_(False)
        optimizer = SparseAdamW(
            model.named_parameters(), old, lr=1e-2, decay_to=torch.ones(old.nnz, dtype=torch.float64)
        )
        train(model, optimizer, 2)
        if refused:
            with pytest.raises(error):
                optimizer.update_mask(mask)
            assert optimizer.mask is old
        ends.append(train(model, optimizer, 2, first=2))
    assert_same_bits(*ends)
