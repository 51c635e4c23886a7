"""sparsify(..., autocast_copies=True): the same bits as without copies, whatever writes the weights."""

import copy
import io

import pytest
import torch
from sparsified_models import IDS, X, linears, mask_of, mlp, tied
from torch import nn

from deftx_kernels import SparseAdamW, densify, sparsify
from deftx_kernels.nn import autocast_copy, copies_in_graphs, entries, masked_parameters

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:(?s).*trained through a dense gradient"),
]
BF16 = torch.bfloat16
MODELS = {"linears": (linears, X), "mlp": (mlp, IDS), "tied": (tied, IDS)}
OPTIMIZERS = {
    "ours": lambda model, mask: SparseAdamW(model.named_parameters(), mask, lr=0.05),
    "torch": lambda model, mask: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05),
}


def make(name="linears", copies=True):
    build, inputs = MODELS[name]
    model = build()
    mask = mask_of(model)
    return sparsify(model, mask, autocast_copies=copies), inputs, mask


def forward(model, inputs, dtype=BF16):
    with torch.autocast("cpu", dtype):
        return model(inputs)


def copies_of(model):
    return [(m.weight, m._masked_entries["weight"].copy) for m in model if isinstance(m, nn.Linear)]


def assert_current(model, dtype=BF16):
    for weight, kept in copies_of(model):
        assert kept.is_current(weight)
        assert torch.equal(kept.tensor, weight.detach().to(dtype))


def step(model, optimizer, inputs):
    optimizer.zero_grad()
    loss = forward(model, inputs).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.fixture
def casts(monkeypatch):
    """The weights that are copied whole."""
    found = []
    refresh = autocast_copy.AutocastCopy.refresh

    def spy(self, dense):
        if not self.is_current(dense):
            found.append(dense)
        refresh(self, dense)

    monkeypatch.setattr(autocast_copy.AutocastCopy, "refresh", spy)
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_bit_for_bit(name, optimizer, casts):
    runs = []
    for kept in (False, True):
        model, inputs, mask = make(name, kept)
        stepper = OPTIMIZERS[optimizer](model, mask)
        losses = []
        for _ in range(5):
            losses.append(step(model, stepper, inputs))
            if kept:
                assert_current(model)
        with torch.no_grad():
            out = forward(model, inputs)
        runs.append([*losses, out, *(p.detach() for p in densify(model).parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    linear = sum(isinstance(m, nn.Linear) for m in model)
    assert len(casts) == linear  # each once, at its first forward


def outside_mask(model):
    with torch.no_grad():
        masked_parameters(model)["0.weight"].dense.mul_(1.5)


def through_data(model):
    masked_parameters(model)["0.weight"].dense.data.mul_(1.5)


def through_numpy(model):
    masked_parameters(model)["0.weight"].dense.data.numpy()[:] *= 1.5


def replaced_data(model):
    weight = masked_parameters(model)["0.weight"].dense
    weight.data = weight.detach() * 1.5


def values(model):
    with torch.no_grad():
        masked_parameters(model)["2.weight"].values.mul_(1.5)


def values_data(model):
    masked_parameters(model)["2.weight"].values.data.mul_(1.5)


def loaded(model):
    model.load_state_dict({n: 1.5 * t for n, t in model.state_dict().items()})


def assigned(model):
    model.load_state_dict({n: 1.5 * t for n, t in model.state_dict().items()}, assign=True)


def cast_and_back(model):
    outside_mask(model)
    model.to(BF16).to(torch.float32)


WRITES = [
    outside_mask, through_data, through_numpy, replaced_data, values, values_data, loaded, assigned, cast_and_back,
]  # fmt: skip


@pytest.mark.parametrize("stepped", [False, True], ids=["", "stepped"])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen(write, stepped):
    """Also one between a forward and the step, which writes the mask's entries only."""
    results = []
    for kept in (False, True):
        model, inputs, mask = make(copies=kept)
        optimizer = OPTIMIZERS["ours"](model, mask)
        step(model, optimizer, inputs)
        before = forward(model, inputs)
        if stepped:
            before.float().square().mean().backward()
        write(model)
        if stepped and write is not assigned:  # whose parameters the optimizer does not have
            optimizer.step()
        first = forward(model, inputs)
        assert not torch.equal(first, before)
        with torch.no_grad():
            results.append([first, forward(model, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_alias_that_is_alive_may_be_written_at_any_time():
    model, inputs, _ = make()
    forward(model, inputs)
    alias = masked_parameters(model)["0.weight"].dense.data
    for _ in range(3):
        alias.mul_(1.5)
        got = forward(model, inputs)
        plain = copy.deepcopy(model)
        assert torch.equal(got, forward(densify(plain), inputs))


def test_dtypes_of_autocast():
    model, inputs, _ = make()
    plain = densify(copy.deepcopy(model))
    for dtype in (BF16, torch.float16, BF16):
        assert torch.equal(forward(model, inputs, dtype), forward(plain, inputs, dtype))
        assert_current(model, dtype)
    assert torch.equal(model(inputs), plain(inputs))


@pytest.mark.parametrize("how", ["deepcopy", "file"])
def test_copies_of_the_model_have_their_own(how):
    model, inputs, _ = make()
    expected = forward(model, inputs)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert all(kept.tensor is None for _, kept in copies_of(other))
    assert torch.equal(forward(other, inputs), expected)
    outside_mask(model)
    assert torch.equal(forward(other, inputs), expected)
    assert_current(other)


def test_backward_after_a_write_raises():
    model, inputs, mask = make()
    optimizer = OPTIMIZERS["ours"](model, mask)
    step(model, optimizer, inputs)
    loss = forward(model, inputs).float().square().mean()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_in_cuda_graphs(monkeypatch):
    """Replays change no version. A captured forward casts, and a captured step ends copies that it does not write."""
    capturing = [False]
    for module in (autocast_copy, entries):
        monkeypatch.setattr(module, "is_capturing", lambda tensor: capturing[0])
    model, inputs, mask = make()
    optimizer = OPTIMIZERS["ours"](model, mask)
    step(model, optimizer, inputs)
    first, others = copies_of(model)[0][1], [kept for _, kept in copies_of(model)[1:]]
    tensor = first.tensor
    for kept in others:
        kept.key = None
    capturing[0] = True
    weight = model[0].weight
    assert first.of(weight, BF16) is None
    with copies_in_graphs():
        assert first.of(weight, BF16) is tensor
    optimizer.step()
    capturing[0] = False
    assert first.in_graph
    assert all(kept.disabled and kept.tensor is None for kept in others)
    assert first.of(weight, BF16) is tensor
    assert first.of(weight, torch.float16) is None  # the graph goes on with the old one
    assert first.disabled
    assert first.pinned is tensor
    assert torch.equal(forward(model, inputs), forward(densify(copy.deepcopy(model)), inputs))
