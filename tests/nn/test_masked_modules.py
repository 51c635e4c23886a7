"""sparsify and densify: modules of all kinds train as with dense gradients gathered by the mask; torch.compile."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deftx_kernels import CSRMask, MaskedEmbedding, MaskedLinear, SparseAdamW, densify, sparsify
from deftx_kernels.nn import masked_parameters
from tests.nn.sparsified_models import (
    IDS,
    assert_synchronised,
    compact_gradients,
    mask_of,
    mlp,
    sgd,
    sparsified,
    tied,
    trainable,
    weighted_square,
)

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Allocations(TorchDispatchMode):
    """Records the shapes of tensors with new memory that operators return."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old]
        self.shapes += [t.shape for t in new]
        return out


def test_no_tensor_of_the_size_of_a_weight_is_made():
    """SpIEL, RoSA and SHiRA clone the weight in every forward, others make its dense gradient."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Embedding(61, 37), nn.Linear(37, 53), Conv1D(37, 53), nn.Linear(37, 61))
    plain[3].weight = plain[0].weight
    found = []
    for model in (plain, sparsified(copy.deepcopy(plain))):
        with Allocations() as allocations:
            model(torch.randint(0, 61, (3,))).square().sum().backward()
        found.append([s for s in allocations.shapes if s.numel() in (61 * 37, 53 * 37)])
    assert len(found[0]) >= 4
    assert not found[1]


# ---- kinds of modules ----
class Unusual(nn.Module):
    """Parameters of its own, in containers, and names that a mixin might overwrite."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 2, 2))
        self.parts = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.named = nn.ParameterDict({"shift": torch.randn(4)})
        self.masks, self.own, self.read, self.values = 2.0, 3.0, 4.0, nn.Linear(4, 4)

    def masked(self):
        return self.masks * self.own * self.read

    def forward(self, x):
        product = self.values(x @ self.scale.sum(0).repeat(2, 2)) * self.parts[0]
        return product + self.named["shift"] * sum(self.parts) + self.masked()


class Twice(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def with_own_forward():  # as accelerate's hooks make it
    linear = nn.Linear(4, 4)
    old = linear.forward
    linear.forward = lambda x: 3 * old(x)
    return linear


def not_contiguous():
    linear = nn.Linear(4, 3)
    linear.weight = nn.Parameter(torch.randn(4, 3).t())
    return linear


def used_twice():
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, nn.Tanh(), linear)


X, SEQUENCE = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), torch.randn(3, 2, 4)
MODULES = {
    "linear": (lambda: nn.Linear(4, 3), X),
    "conv1d": (lambda: Conv1D(3, 4), SEQUENCE),
    "embedding": (lambda: nn.Embedding(20, 4, padding_idx=3), IDS),
    "embedding, frequencies": (lambda: nn.Embedding(20, 4, scale_grad_by_freq=True), IDS),
    "embedding, sparse": (lambda: nn.Embedding(20, 4, sparse=True), IDS),
    "bag": (lambda: nn.EmbeddingBag(20, 4), IDS),
    "bag, sparse": (lambda: nn.EmbeddingBag(20, 4, sparse=True), IDS),
    "linear, then in place": (lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)), SEQUENCE),
    "embedding, then in place": (lambda: nn.Sequential(nn.Embedding(20, 4), nn.ReLU(inplace=True)), IDS),
    "used twice": (used_twice, X),
    "tied": (tied, IDS),
    "layer norm": (lambda: nn.LayerNorm(4), X),
    "rms norm": (lambda: nn.RMSNorm(4), X),
    "conv2d": (lambda: nn.Conv2d(3, 2, 2), torch.randn(2, 3, 4, 4)),
    "bilinear": (lambda: nn.Bilinear(4, 4, 2), (X, X)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), (SEQUENCE,) * 3),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True), SEQUENCE),
    "lstm": (lambda: nn.LSTM(4, 3), SEQUENCE),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), X),
    "subclass": (lambda: Twice(4, 3), X),
    "own forward": (with_own_forward, X),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), X),
    "not contiguous": (not_contiguous, X),
    "unusual": (Unusual, X),
}
NOT_COPIED = {"own forward", "lstm", "pruned", "parametrized"}  # nor are the plain modules


def made(kind):
    """The module and its inputs, which get gradients."""
    torch.manual_seed(0)
    make, inputs = MODULES[kind]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return make(), [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]


@pytest.mark.parametrize("kind", MODULES)
def test_modules(kind):
    """Losses, gradients and steps are those of the plain module, also in evaluation and in copies."""
    (plain, plain_inputs), (model, inputs) = made(kind), made(kind)
    keys, types, mask = set(model.state_dict()), [type(m) for m in model.modules()], mask_of(model)
    sparsified(model, mask)
    torch.testing.assert_close(weighted_square(model, *inputs), weighted_square(plain, *plain_inputs))
    with torch.no_grad():
        torch.testing.assert_close(weighted_square(model.eval(), *inputs), weighted_square(plain.eval(), *plain_inputs))
    weighted_square(model.train(), *inputs).backward()
    weighted_square(plain.train(), *plain_inputs).backward()
    torch.testing.assert_close([x.grad for x in inputs], [x.grad for x in plain_inputs])
    gradients = {n: p.grad.to_dense() for n, p in plain.named_parameters()}
    got = torch.cat(list(compact_gradients(model).values()))
    torch.testing.assert_close(got, mask.gather(gradients))
    assert all(p.dense.grad is None for p in masked_parameters(model).values())
    if kind not in NOT_COPIED:
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if kind != "unusual" else model):
            other.zero_grad()
            weighted_square(other, *inputs).backward()
            torch.testing.assert_close(torch.cat(list(compact_gradients(other).values())), got)
    before = {n: t.detach().clone() for n, t in plain.named_parameters()}
    sgd(model).step()
    assert_synchronised(model)
    densify(model)
    assert set(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    after = dict(model.named_parameters())
    for name, chosen in mask.to_dense().items():
        assert torch.equal(after[name][~chosen], before[name][~chosen]), name
        torch.testing.assert_close(after[name][chosen], (before[name] - 0.1 * gradients[name])[chosen])
        assert after[name].requires_grad


# ---- torch.compile ----
AUTOCAST = ["linear", "conv1d", "tied", "conv2d", "encoder layer"]
PRECISE = ["linear", "conv1d", "tied", "layer norm", "conv2d", "attention", "subclass", "unusual", "used twice"]


SLOW = [pytest.param(k, True, marks=pytest.mark.slow) for k in PRECISE if k not in AUTOCAST]


@pytest.mark.parametrize(("kind", "autocast"), [*((k, False) for k in PRECISE), *((k, True) for k in AUTOCAST), *SLOW])
def test_compile_without_graph_breaks(kind, autocast):
    torch._dynamo.reset()
    model, inputs = made(kind)
    sparsified(model)
    gradients = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = weighted_square(function, *inputs)
        loss.backward()
        gradients.append([p.grad for p in trainable(model)])
    for eager, compiled in zip(*gradients):
        assert (compiled - eager).norm() <= (0.02 if autocast else 1e-5) * eager.norm()


@pytest.mark.parametrize("optimizer", ["SparseAdamW", "AdamW", "AdamW, fused"])
def test_a_compiled_model_uses_the_values_of_each_step_without_recompiling(optimizer):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, losses = CompileCounterWithBackend("aot_eager"), []
    for compiled in (False, True):
        model, mask = mlp(), mask_of(mlp())
        sparsified(model, mask)
        function = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        if optimizer == "SparseAdamW":
            steps = SparseAdamW(model.named_parameters(), mask, lr=0.1)
        else:
            steps = torch.optim.AdamW(trainable(model), lr=0.1, fused="fused" in optimizer)
        for _ in range(4):
            loss = weighted_square(function, IDS)
            losses.append(loss.detach())
            loss.backward()
            steps.step()
            steps.zero_grad()
        with torch.no_grad():
            losses.append(weighted_square(function, IDS))
    torch.testing.assert_close(losses[:5], losses[5:])
    assert len({float(loss) for loss in losses[:5]}) == 5
    assert counter.frame_count == 2  # with gradients and without


def test_inductor():
    torch._dynamo.reset()
    model = sparsified(mlp())
    weighted_square(model, IDS).backward()
    expected = compact_gradients(model)
    model.zero_grad()
    weighted_square(torch.compile(model, fullgraph=True), IDS).backward()
    torch.testing.assert_close(compact_gradients(model), expected)


# ---- structure, and what is refused ----
def test_structure():
    model = mlp()
    mask = mask_of(model)
    assert sparsified(model, mask) is model
    assert [type(model[i]) for i in (0, 4)] == [MaskedEmbedding, MaskedLinear]
    assert isinstance(model[1], MaskedLinear)
    assert isinstance(model[1], nn.Linear)
    assert not dict(model.named_parameters())["1.weight"].requires_grad
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(named) == {f"{n}values" for n in ("0.", "1.", "1.bias_", "2.", "2.bias_", "4.")}
    assert sum(p.numel() for p in named.values()) == mask.nnz
    assert len({p.untyped_storage().data_ptr() for p in named.values()}) == 1, "one flat buffer"
    with pytest.raises(ValueError, match="sparsified already"):
        sparsify(model, mask)
    with pytest.raises(TypeError, match="made by sparsify"):
        MaskedLinear(3, 4)
    model.requires_grad_(True)  # dense tensors still get no gradient
    model(IDS).square().sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "values" not in n)
    densify(model)
    with pytest.raises(ValueError, match="not sparsified"):
        densify(model)
    model[1].weight.requires_grad_(False)  # densify restores it
    sparsified(model, mask).requires_grad_(False)
    model[1].values.requires_grad_(True)
    densify(model)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["1.weight"]


def test_dense_gradients_are_named_by_one_warning():
    unusual = Unusual()
    del unusual.values
    with pytest.warns(UserWarning, match=r"1 masked tensors belong to no Linear.*: scale$"):  # not those of one row
        sparsify(unusual, mask_of(unusual))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the gradients of biases and norms are always dense
        for names in (["1.bias"], ["1.weight"], ["0.weight", "1.bias", "1.weight"], ["1.weight", "2.bias", "2.weight"]):
            model = mlp()
            sparsify(model, mask_of(model).restrict(names))
            weighted_square(model, IDS).backward()
            assert all(p.grad is not None for p in trainable(model))


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@pytest.mark.parametrize("make", [mlp, tied])
def test_freeze_others(make, copied):
    """Steps are those of the plain model whose other gradients are dropped; densify gives the flags back."""
    plain, model = make(), make()
    for m in (plain, model):
        m[-1].bias = nn.Parameter(torch.zeros(m[-1].out_features), requires_grad=False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    mask = mask_of(model).restrict(["0.weight"])
    before = copy.deepcopy(model)
    sparsify(model, mask, freeze_others=True)
    model = copy.deepcopy(model) if copied else model
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"0.values"}
    optimizers = sgd(model), torch.optim.SGD([plain[0].weight], lr=0.1)
    for _ in range(2):
        for m, optimizer in zip((model, plain), optimizers):
            optimizer.zero_grad()
            weighted_square(m, IDS).backward()
            plain[0].weight.grad = None if m is model else plain[0].weight.grad * mask.to_dense()["0.weight"]
            optimizer.step()
    densify(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    for (name, found), expected, old in zip(model.named_parameters(), plain.parameters(), before.parameters()):
        torch.testing.assert_close(found, expected)
        assert torch.equal(found, old) == (name != "0.weight")
    assert not torch.equal(model[0].weight, before[0].weight)
    sparsify(model, mask)  # by default all others are trained
    assert sum(p.requires_grad for p in model.parameters()) == sum(flags.values())


class WithValues(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.values = nn.Parameter(torch.randn(3)), nn.Linear(3, 3)


def with_gradient_hook():
    linear = nn.Linear(3, 3)
    linear.weight.register_hook(lambda grad: grad * 0)
    return linear


def with_integers():
    return nn.ParameterDict({"w": nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)})


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: nn.Embedding(4, 3, max_norm=1.0), "max_norm"),
        (lambda: nn.EmbeddingBag(4, 3, max_norm=1.0), "max_norm"),
        (lambda: torch.jit.script(nn.LayerNorm(3)), "script module"),
        (WithValues, "has an attribute 'values'"),
        (with_integers, "must be float32"),
        (with_gradient_hook, r"model\['1\.weight'\] has gradient hooks"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_refused_modules_leave_the_model_unchanged(make, match):
    model = nn.Sequential(nn.Linear(3, 3), make())
    mask = CSRMask.from_dense({n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()})
    before = {n: (type(m), set(vars(m)), set(m._parameters)) for n, m in model[:1].named_modules()}
    with pytest.raises((ValueError, TypeError), match=match):
        sparsify(model, mask)
    assert {n: (type(m), set(vars(m)), set(m._parameters)) for n, m in model[:1].named_modules()} == before
    assert model[0].weight.requires_grad


def test_masks_that_do_not_fit_are_refused():
    model = mlp()
    with pytest.raises(ValueError, match="model lacks tensor 'x'"):
        sparsify(model, CSRMask.from_dense({"x": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(ValueError, match=r"model\['1.weight'\] has shape"):
        sparsify(model, CSRMask.from_dense({"1.weight": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="on cpu, the mask on meta"):
        sparsify(model, mask_of(model).to("meta"))
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), "non-leaf Tensor to parameter 'weight_orig'"),
        (lambda linear: setattr(linear, "weight", nn.Parameter(torch.randn(3, 4))), "before its weight is replaced"),
        (lambda linear: setattr(linear, "values", nn.Parameter(torch.randn(3))), "before its values is replaced"),
        (lambda linear: setattr(linear, "bias", None), "'0.bias' is sparsified"),
        (nn.utils.parametrizations.weight_norm, "DifferentiableWeight"),
    ],
)
def test_weights_cannot_be_replaced(change, match):
    model = sparsified(nn.Sequential(nn.Linear(4, 3)))
    before = model(X)
    with pytest.raises((ValueError, RuntimeError), match=match):
        change(model[0])
    assert torch.equal(model(X), before)
    densify(model)


def test_deleted_weights_are_refused():
    model = sparsified(nn.Sequential(nn.Linear(4, 3)))
    del model[0].weight
    assert not hasattr(model[0], "weight")
    for action in (lambda: model(X), lambda: densify(model)):
        with pytest.raises((RuntimeError, ValueError), match=r"'0\.weight'.* has been replaced or resized since"):
            action()
    other = nn.Linear(2, 2)  # whose optimizer the broken model does not affect
    other(torch.ones(1, 2)).sum().backward()
    sgd(other).step()


def test_part_of_a_tied_model_cannot_be_densified():
    model = sparsified(tied())
    with pytest.raises(ValueError, match=r"'0\.weight' is tied to a module outside"):
        densify(model[0])
    assert_synchronised(model)
    assert type(densify(model)[0]) is nn.Embedding


def test_parts_that_are_sparsified_one_by_one():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    for part in model:
        sparsified(part)
    with pytest.raises(ValueError, match="two masked tensors are named 'weight'"):
        masked_parameters(model)
