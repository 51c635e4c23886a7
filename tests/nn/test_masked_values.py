"""Values and dense tensors stay synchronised, however one of them is written, loaded, cast or copied."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from deftx_kernels import SparseAdamW, densify, sparsify
from deftx_kernels.nn import masked_parameters, plain_tensors
from tests.nn.sparsified_models import (
    IDS,
    X,
    assert_synchronised,
    compact_gradients,
    flatten_parameters,
    linears,
    mask_of,
    mlp,
    sgd,
    sparsified,
    tied,
    trainable,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
MODELS = pytest.mark.parametrize("make", [mlp, tied])


def output(model):
    with torch.no_grad():
        return model(X.to(next(model.parameters()).dtype))


def square(model):
    return model(IDS).float().square().mean()


# ---- writes to values ----
def to_held_aliases(model):
    aliases = [p.data for p in trainable(model)]
    for _ in range(2):
        output(model)
        for alias in aliases:
            alias.sub_(1.0)


def by_assignment(model, change=lambda data: data * 2):
    for p in trainable(model):
        p.data = change(p.data)


@torch.no_grad()
def to_a_buffer(model):
    buffer = flatten_parameters(trainable(model))
    output(model)
    buffer.mul_(2.0)


def to_a_state_dict(model):
    output(model)
    for tensor in model.state_dict().values():
        tensor.mul_(2.0)


def by_numpy(model):
    for p in trainable(model):
        p.data.numpy()[...] *= 2


WRITES = {
    "detached": lambda m: [p.detach().mul_(2.0) for p in trainable(m)],
    "data": lambda m: [p.data.mul_(2.0) for p in trainable(m)],
    "part of data": lambda m: [p.data.view(-1)[::2].mul_(2.0) for p in trainable(m)],
    "all data": lambda m: [p.data.mul_(2.0) for p in m.parameters()],  # as averages of weights are swapped in
    "held aliases": to_held_aliases,
    "foreach": lambda m: torch._foreach_mul_([p.data for p in trainable(m)], 2.0),
    "assignment": by_assignment,
    "permutation": lambda m: by_assignment(m, lambda data: data.flip(0)),
    "vector_to_parameters": lambda m: vector_to_parameters(parameters_to_vector(trainable(m)) * 2, trainable(m)),
    "buffer": to_a_buffer,
    "state dict": to_a_state_dict,
    "NumPy": by_numpy,
}


@DTYPES
@pytest.mark.parametrize("write", WRITES)
def test_written_values_are_detected(write, dtype):
    for copied in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        model = copied(sparsified(linears(dtype)))
        before = output(model)
        WRITES[write](model)
        after = output(model)
        assert not torch.equal(after, before)
        assert_synchronised(model)
        assert torch.equal(output(densify(model)), after)
        assert {type(p) for p in model.parameters()} == {nn.Parameter}


def test_a_read_of_data_changes_nothing():
    """Also while the alias is held: no write into dense tensors that a backward still needs."""
    model = sparsified(linears())
    aliases = [p.data for p in model.parameters()]
    loss = model(X).sum() + model(X).sum()
    loss.backward()
    assert all(p.grad is not None for p in trainable(model))
    assert aliases


# ---- writes to dense tensors ----
def add_to_data(linear, change):
    linear.weight.data += change


def assign_data(linear, change):
    linear.weight.data = linear.weight.data + change


@torch.no_grad()
def add_in_place(linear, change):
    linear.weight.add_(change)


def add_by_name(linear, change):
    dict(linear.named_parameters())["weight"].data.add_(change)


@pytest.mark.parametrize("then", ["densify", "forward", "state_dict", "step", "copy", "cast"])
@pytest.mark.parametrize("merge", [add_to_data, assign_data, add_in_place, torch.no_grad()(add_to_data), add_by_name])
def test_what_is_added_to_a_weight_stays(merge, then):
    """As when a LoRA adapter is merged: in masked entries, too."""
    model, plain = sparsified(linears(torch.bfloat16)), linears(torch.bfloat16)
    change = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    for layer in (0, 2, 4):
        merge(model[layer], change)
        plain[layer].weight.data += change
    if then == "forward":
        assert torch.equal(output(model), output(plain))
    if then == "state_dict":
        assert all(torch.equal(model.state_dict()[f"{i}.weight"], plain[i].weight) for i in (0, 2, 4))
    if then == "copy":
        model = copy.deepcopy(model)
    if then == "cast":
        model.double().bfloat16()
    if then == "step":
        model(X.bfloat16()).sum().backward()
        sgd(model, lr=0.0).step()
    for p, q in zip(densify(model).parameters(), plain.parameters()):
        assert torch.equal(p, q)


def test_a_written_weight_stays_where_a_step_trains_other_tensors():
    model = sparsified(linears())
    model[0](X).sum().backward()
    with torch.no_grad():
        model[4].weight.add_(1.0)
    expected = model[4].weight.detach().clone()
    sgd(model).step()
    assert torch.equal(densify(model)[4].weight, expected)


def test_values_are_kept_where_both_were_written():
    model = sparsified(linears())
    dense, values, _ = masked_parameters(model)["0.weight"]
    dense.data.zero_()
    values.data.fill_(3.0)
    output(model)
    assert set(dense.detach().unique().tolist()) == {0.0, 3.0}


def test_plain_tensors():
    model, plain = sparsified(linears()), linears()
    assert plain_tensors(model).keys() == plain_tensors(plain).keys() == dict(plain.named_parameters()).keys()
    trainable(model)[0].data.fill_(7.0)
    assert 7.0 in plain_tensors(model)["0.weight"]


# ---- weights that are read as attributes ----
class Head(nn.Module):
    """The ends of a language model, whose loss reads the head's weight (fused losses do)."""

    def __init__(self, tie):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, ids, read):
        return read(self.embedding(ids), self.head).square().sum()


class Fused(torch.autograd.Function):
    """A kernel that checks `requires_grad` of its arguments, and sees no Python subclass."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        assert weight.requires_grad
        return x @ weight.detach().T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None


READS = {
    "transposed": lambda x, head: x @ head.weight.T,
    "linear": lambda x, head: nn.functional.linear(x, head.weight),
    "a copy": lambda x, head: x @ head.weight.float().mT,
    "fused": lambda x, head: Fused.apply(x, head.weight),
    "get_parameter": lambda x, head: x @ head.get_parameter("weight").T,
    "forward": lambda x, head: head(x),
}


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("read", READS)
def test_weights_read_as_attributes_get_their_gradient(read, tie, density):
    ids = torch.tensor([[1, 2, 3], [3, 4, 11]])
    plain, model = Head(tie), Head(tie)
    mask = mask_of(model, density)
    sparsified(model, mask)
    plain(ids, READS[read]).backward()
    model(ids, READS[read]).backward()
    found = compact_gradients(model)
    for name, expected in mask.split(mask.gather({n: p.grad for n, p in plain.named_parameters()})).items():
        torch.testing.assert_close(found[name], expected)
    assert all(p.dense.grad is None for p in masked_parameters(model).values())


def test_a_weight_without_gradient_is_the_parameter():
    model = sparsified(linears())
    with torch.no_grad():
        assert model[0].weight is dict(model.named_parameters())["0.weight"]
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.data_ptr() == model[0].weight.data.data_ptr()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model[0].weight)), linears()[0].weight)
    model.requires_grad_(False)
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("no_grad", [False, True])
def test_tied_weights_can_be_tied_again(no_grad):
    model = sparsified(Head(tie=True))
    with torch.set_grad_enabled(not no_grad):
        model.head.weight = model.embedding.weight
    assert model.head.values is model.embedding.values
    other = nn.Linear(4, 12, bias=False)
    with pytest.raises(ValueError, match="Cannot assign non-leaf"):
        other.weight = model.embedding.weight


# ---- states ----
def randomized(model, seed=0):
    """With other weights, and values of more digits than 16 bits hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


@DTYPES
@pytest.mark.parametrize("assign", [False, True])
@MODELS
def test_state_of_a_sparsified_model(make, assign, dtype):
    source, target = randomized(sparsified(make(dtype))), sparsified(make(dtype))
    state = {n: t.clone() for n, t in source.state_dict().items()}
    assert sum("values" in n for n in state) == len(masked_parameters(source)), "tied values once"
    target.load_state_dict(state, assign=assign)
    assert_synchronised(target)
    assert torch.equal(target[0].values, source[0].values)
    assert torch.equal(target(IDS), source(IDS))
    assert target[0].values.requires_grad
    assert not masked_parameters(target)["0.weight"].dense.requires_grad
    square(target).backward()
    sgd(target, lr=0.5).step()
    assert_synchronised(target)
    assert not torch.equal(target(IDS), source(IDS))


@pytest.mark.parametrize("strict", [False, True])
@MODELS
def test_state_of_a_plain_model(make, strict):
    """The next step keeps its weights, in masked entries, too."""
    model, plain = sparsified(make()), randomized(make())
    state = plain.state_dict()
    assert model.load_state_dict(state, strict=strict) == ([], [])
    assert_synchronised(model)
    square(model).backward()
    sgd(model, lr=0.0).step()
    assert torch.equal(model(IDS), plain(IDS))
    del state["0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        model.load_state_dict(state)


def test_values_alone_are_a_state():
    source, target = sparsified(mlp()), sparsified(mlp())
    with torch.no_grad():
        for p in trainable(source):
            p.normal_()
    values = {n: t for n, t in source.state_dict().items() if "values" in n}
    target.load_state_dict(values, strict=False)
    assert_synchronised(target)
    assert torch.equal(target(IDS), source(IDS))


def test_state_of_another_mask_is_refused():
    one, other = (sparsified(nn.Linear(8, 4, bias=False), mask_of(nn.Linear(8, 4, bias=False), seed=i)) for i in (1, 2))
    before = other.weight.clone()
    with pytest.raises(RuntimeError, match="values of weight do not belong to this model's mask"):
        other.load_state_dict(randomized(one).state_dict())
    assert torch.equal(other.weight, before)
    with pytest.raises(RuntimeError, match="size mismatch for 0.values"):
        sparsified(mlp()).load_state_dict(sparsified(mlp(), mask_of(mlp(), density=0.2)).state_dict())


@DTYPES
def test_states_that_are_averaged_or_cast(dtype):
    one, two = sparsified(linears(dtype)), sparsified(linears(dtype))
    WRITES["data"](two)
    states = one.state_dict(), two.state_dict()
    mean = {n: (t + states[1][n]) / 2 for n, t in states[0].items()}
    one.load_state_dict(mean)
    assert torch.equal(one[0].values, mean["0.values"])
    one.load_state_dict({n: t.half() for n, t in mean.items()})
    assert output(one).isfinite().all()
    one.load_state_dict(mean)
    mean["0.values"] = mean["0.values"].flip(0)
    with pytest.raises(RuntimeError, match="saved with another mask"):
        one.load_state_dict(mean)


def test_a_model_on_meta_is_sparsified():
    """It trains as others, from the weights that are loaded then."""
    plain = linears()
    mask, trained = mask_of(plain), []
    with torch.device("meta"):
        model = linears()
    for each in (sparsify(model, mask).to_empty(device="cpu"), sparsify(linears(), mask)):
        each.load_state_dict(plain.state_dict())
        optimizer = SparseAdamW(each.named_parameters(), mask, lr=0.1)
        each(X).square().sum().backward()
        optimizer.step()
        assert len({p.untyped_storage().data_ptr() for p in trainable(each)}) == 1
        trained.append(densify(each)(X))
    assert torch.equal(*trained)


def test_a_model_on_meta_comes_back():
    model = sparsified(linears())
    state = {n: t.clone() for n, t in model.state_dict().items()}
    expected = output(model)
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(output(model), expected)


# ---- casts, copies, functional calls ----
@MODELS
def test_casts_keep_values_in_32_bits_and_ties(make):
    model = randomized(sparsified(make()))
    model(IDS)
    values = model[0].values.detach().clone()
    square(model).backward()
    model.to(torch.bfloat16)
    assert_synchronised(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].values.dtype == model[0].values.grad.dtype == torch.float32
    square(model).backward()
    assert torch.equal(model.float()[0].values, values), "the cast to 16 bits and back costs no digit"
    assert_synchronised(model)
    model.double()
    assert model[0].values.dtype == model[0].values.grad.dtype == torch.float64
    assert_synchronised(model)
    assert make is mlp or model[0].values is model[1].values
    assert model.to("meta")[0].values.is_meta
    assert model[0].masks["weight"].device.type == "cpu", "so that it can come back"


def test_casts_tensor_by_tensor():
    """Values keep their digits when their dense tensors are cast; they are not cast themselves."""
    model = sparsified(linears(torch.bfloat16))
    with torch.no_grad():
        for p in trainable(model):
            p.add_(1e-5)
    output(model)
    digits = [p.detach().clone() for p in trainable(model)]
    for dense, _, _ in masked_parameters(model).values():
        dense.data = dense.data.float()
    output(model)
    assert all(torch.equal(p, d) for p, d in zip(trainable(model), digits))
    assert_synchronised(model)
    bias = model[0].bias_values
    with pytest.raises(TypeError, match=r"of '0\.bias' are torch.float32, got torch.bfloat16: cast the model with"):
        bias.data = bias.data.bfloat16()


def test_copies_are_independent():
    model = sparsified(mlp())
    twin = copy.deepcopy(model)
    start = parameters_to_vector(model.parameters()).clone()
    square(twin).backward()
    sgd(twin, lr=0.5).step()
    assert_synchronised(twin)
    assert torch.equal(parameters_to_vector(model.parameters()), start)
    assert not torch.equal(twin(IDS), model(IDS))


@MODELS
def test_functional_calls_use_the_values_they_are_given(make):
    model = sparsified(make())
    values = {n: p.detach() + 1 for n, p in model.named_parameters() if p.requires_grad}
    out = torch.func.functional_call(model, values, (IDS,))
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in values.items():
            moved.get_parameter(name).copy_(value)
    assert not torch.equal(out, model(IDS))
    assert torch.equal(out, moved(IDS))
    square(moved).backward()
    gradients = torch.func.grad(lambda v: torch.func.functional_call(model, v, (IDS,)).square().mean())(values)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, moved.get_parameter(name).grad)
    assert_synchronised(model)


def test_functional_calls_with_a_plain_state_and_vmap():
    model, other = sparsified(linears()), linears()
    with torch.no_grad():
        vector_to_parameters(torch.arange(216.0) / 216, other.parameters())
    state = dict(other.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(model, state, X), other(X))
    model = sparsified(mlp())
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(IDS), model(IDS))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(model)(IDS)
