"""masked_linear, masked_embedding, sparsify and densify against dense gradients gathered by the mask."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deftx_kernels import (
    CSRMask,
    MaskedEmbedding,
    MaskedLinear,
    SparseAdamW,
    densify,
    masked_embedding,
    masked_linear,
    sparsify,
    topk_mask,
)
from deftx_kernels.nn import masked_parameters

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


def random_mask(shape, density=0.3, seed=0, name="tensor"):
    return topk_mask({name: torch.randn(shape, generator=torch.Generator().manual_seed(seed))}, density=density)


def problem(m=10, n=8, density=0.4, dtype=torch.float32):
    """x, weight, its values and mask."""
    torch.manual_seed(0)
    weight, mask = torch.randn(m, n, dtype=dtype), random_mask((m, n), density)
    return torch.randn(5, n, dtype=dtype), weight, mask.gather({"tensor": weight}).requires_grad_(), mask


# ---- the functions ----


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_masked_linear_gradcheck(density, bias):
    weight, mask = torch.randn(5, 4, dtype=torch.float64), random_mask((5, 4), density)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    values = mask.gather({"tensor": weight}).requires_grad_()

    def function(x, values, b=None):
        # forward reads the weight, which holds the values: put them there, so that numerical differences see them
        w = mask.scatter_({"tensor": weight.clone()}, values.detach())["tensor"]
        return masked_linear(x, w, values, mask, b)

    assert torch.autograd.gradcheck(function, (x, values) if b is None else (x, values, b))


def test_masked_embedding_gradcheck():
    weight, mask = torch.randn(7, 4, dtype=torch.float64), random_mask((7, 4), 0.5)
    ids = torch.tensor([[0, 3, 3], [6, 1, 0]])
    values = mask.gather({"tensor": weight}).requires_grad_()

    def function(values):
        w = mask.scatter_({"tensor": weight.clone()}, values.detach())["tensor"]
        return masked_embedding(ids, w, values, mask)

    assert torch.autograd.gradcheck(function, (values,))


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), lambda: Conv1D(3, 4), lambda: nn.Bilinear(4, 4, 2)])
def test_gradcheck_of_modules(make):
    """Weight and bias in the mask; functional_call puts the values into the dense tensors."""
    torch.manual_seed(0)
    model = quietly_sparsified(make().double(), 0.5)[0]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, x.detach().clone()) if isinstance(model, nn.Bilinear) else (x,)

    def function(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values)), (x, *inputs[1:]))

    assert torch.autograd.gradcheck(
        function, (x, *(model.get_parameter(n).detach().clone().requires_grad_() for n in names))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_the_dense_ones(dtype):
    torch.manual_seed(0)
    x, weight, mask = torch.randn(4, 6, 8).to(dtype), torch.randn(10, 8).to(dtype), random_mask((10, 8))
    upstream = torch.randn(4, 6, 10).to(dtype)
    values = mask.gather({"tensor": weight}).float().requires_grad_()
    ours = x.clone().requires_grad_()
    masked_linear(ours, weight, values, mask).backward(upstream)
    dense = weight.double().requires_grad_()
    theirs = x.double().requires_grad_()
    F.linear(theirs, dense).backward(upstream.double())
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.1, rtol=2e-2)
    torch.testing.assert_close(values.grad.double(), mask.gather({"tensor": dense.grad}), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)
    ids, values.grad, dense.grad = torch.arange(24).view(4, 6) % 3, None, None
    masked_embedding(ids, weight, values, mask).backward(upstream[..., :8])  # sums that 16 bits would round
    F.embedding(ids, dense).backward(upstream[..., :8].double())
    torch.testing.assert_close(values.grad.double(), mask.gather({"tensor": dense.grad}), atol=1e-5, rtol=1e-5)
    assert values.grad.dtype == torch.float32


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding_padding(padding_idx):
    weight, mask = torch.randn(6, 4), random_mask((6, 4), 0.6)
    ids = torch.tensor([0, 2, 5, 5, 2])
    values = mask.gather({"tensor": weight}).requires_grad_()
    out = masked_embedding(ids, weight, values, mask, padding_idx)
    upstream = torch.randn(5, 4)
    out.backward(upstream)
    dense = weight.clone().requires_grad_()
    F.embedding(ids, dense, padding_idx).backward(upstream)
    assert torch.equal(out, weight[ids])
    torch.testing.assert_close(values.grad, mask.gather({"tensor": dense.grad}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Outputs bit for bit as dense autocast's; gradients too, but for the values', which are not rounded to 16 bits."""
    x, weight, values, mask = problem()
    x.requires_grad_()
    bias, dense = torch.randn(10, requires_grad=True), weight.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        out, theirs = masked_linear(x, weight, values, mask, bias), F.linear(x, dense, bias)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(masked_linear(x, weight, values, mask), F.linear(x, weight))
        assert masked_embedding(torch.tensor([1]), weight, values, mask).dtype == torch.float32
        with torch.no_grad():
            assert torch.equal(masked_linear(x, weight, values, mask, bias), theirs)
    assert out.dtype == dtype
    assert torch.equal(out, theirs)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (x, bias, values), upstream)
    expected = torch.autograd.grad(theirs, (x, bias, dense), upstream)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])
    assert ours[2].dtype == torch.float32
    torch.testing.assert_close(ours[2], mask.gather({"tensor": expected[2]}), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(ours[2], mask.gather({"tensor": (upstream.float().mT @ x.detach().to(dtype).float())}))


def test_backward_keeps_the_autocast_state_of_forward():
    x, weight, values, mask = problem()
    x.requires_grad_()
    out, upstream = masked_linear(x, weight, values, mask), torch.randn(5, 10)
    with torch.autocast("cpu", torch.bfloat16):
        out.backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ weight, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_dtypes_are_refused_where_linear_refuses_them(dtype, weight_dtype, autocast):
    _, weight, values, mask = problem(dtype=weight_dtype)
    results = []
    for function in (
        lambda x: masked_linear(x, weight, values, mask),
        lambda x: F.linear(x, weight.clone().requires_grad_()),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                results.append(function(torch.ones(2, 8, dtype=dtype)).dtype)
            except RuntimeError as error:
                results.append(str(error))
    assert results[0] == results[1]


SHAPES = [(8,), (0, 8), (2, 0, 8), (1, 2, 3, 8)]


@pytest.mark.parametrize("x", [*map(torch.randn, SHAPES), torch.randn(8, 5).t(), torch.randn(3, 8).expand(2, 3, 8)])
def test_inputs_of_any_shape(x):
    _, weight, values, mask = problem()
    dense = weight.clone().requires_grad_()
    masked_linear(x, weight, values, mask).sum().backward()
    F.linear(x, dense).sum().backward()
    torch.testing.assert_close(values.grad, mask.gather({"tensor": dense.grad}))
    ids = (
        torch.zeros(x.shape[:-1], dtype=torch.int32).t()
        if x.dim() == 3
        else torch.ones(x.shape[:-1], dtype=torch.int64)
    )
    values.grad = dense.grad = None
    (masked_embedding(ids.mT if x.dim() > 3 else ids, weight, values, mask) ** 2).sum().backward()
    (F.embedding(ids.mT if x.dim() > 3 else ids, dense) ** 2).sum().backward()
    torch.testing.assert_close(values.grad, mask.gather({"tensor": dense.grad}))


def test_second_and_forward_derivatives_are_refused():
    x, weight, values, mask = problem()
    x.requires_grad_()
    # the gradient of a sum needs no gradient, that of x still does
    for loss in (lambda out: out.square().sum(), torch.sum):
        for of in (x, values):
            (gradient,) = torch.autograd.grad(loss(masked_linear(x, weight, values, mask)), of, create_graph=True)
            with pytest.raises(RuntimeError, match="masked_linear cannot be differentiated twice"):
                (gradient.sum() + values.sum()).backward()
    (gradient,) = torch.autograd.grad(
        masked_embedding(torch.tensor([1]), weight, values, mask).square().sum(), values, create_graph=True
    )
    with pytest.raises(RuntimeError, match="masked_embedding cannot be differentiated twice"):
        gradient.sum().backward()
    inner = torch.func.grad(lambda x: masked_linear(x, weight, values, mask).square().sum())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.grad(lambda x: inner(x).sum())(x.detach())
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: masked_linear(x, weight, values, mask), (x.detach(),), (x.detach(),))


def test_bad_arguments_are_named():
    x, weight, values, mask = problem(3, 4)
    with pytest.raises(ValueError, match=r"weight's shape \[4, 3\]"):
        masked_linear(x, weight.t(), values, mask)
    with pytest.raises(ValueError, match="values must be compact"):
        masked_linear(x, weight, values[:-1], mask)
    with pytest.raises(TypeError, match=r"values must be a torch\.Tensor"):
        masked_linear(x, weight, [1.0], mask)
    with pytest.raises(ValueError, match="weight is on meta, the mask on cpu"):
        masked_linear(x.to("meta"), weight.to("meta"), values, mask)
    with pytest.raises(ValueError, match="values is on meta, the mask on cpu"):
        masked_embedding(torch.tensor([0]), weight, values.to("meta"), mask)
    with pytest.raises(ValueError, match="padding_idx must be within the 3 rows"):
        masked_embedding(torch.tensor([0]), weight, values, mask, padding_idx=3)
    two = CSRMask.from_dense({"a": torch.ones(3, 4, dtype=torch.bool), "b": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="mask must cover one tensor"):
        masked_linear(x, weight, values, two)


class Allocations(TorchDispatchMode):
    """Shapes of the tensors that operators make anew; what an operator of the library does inside is its own."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old]
        self.shapes += [t.shape for t in new]
        return out


def test_nothing_of_the_size_of_a_weight_is_made():
    """SpIEL, RoSA and SHiRA clone the weight in every forward, others make its dense gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(61, 37), nn.Linear(37, 53), Conv1D(37, 53), nn.Linear(37, 61))
    model[3].weight = model[0].weight
    weights = {61 * 37, 53 * 37}
    plain = copy.deepcopy(model)
    quietly_sparsified(model, 0.2)
    found = {}
    for name, one in (("dense", plain), ("sparsified", model)):
        with Allocations() as allocations:
            one(torch.randint(0, 61, (3,))).square().sum().backward()
        found[name] = [s for s in allocations.shapes if s.numel() in weights]
    assert len(found["dense"]) >= 4
    assert not found["sparsified"]


# ---- modules ----


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False))


def mlp_mask(density=0.3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return topk_mask(
        {n: torch.randn(p.shape, generator=generator) for n, p in mlp().named_parameters()}, density=density
    )


IDS = torch.randint(0, 20, (5, 6), generator=torch.Generator().manual_seed(4))


def quietly_sparsified(model, density=0.4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = topk_mask(
        {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}, density=density
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sparsify(model, mask), mask


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model, lr=0.1):
    return torch.optim.SGD(trainable(model), lr=lr)


def check_in_step(model):
    """Every dense tensor holds its values."""
    records = masked_parameters(model)
    assert records
    for name, (dense, values, mask) in records.items():
        assert torch.equal(mask.gather({name: dense}), values.to(dense.dtype)), name


def loss_of(model, *inputs):
    """Every output counts differently: the plain sum of squares behind a norm has next to no gradient before it."""
    out = model(*inputs)
    out = (out[0] if isinstance(out, tuple) else out).float()
    return (out.square() * torch.linspace(-1, 2, out.numel()).view_as(out)).sum()


class Odd(nn.Module):
    """Parameters of its own, in containers, and names that a careless mixin would use."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 2, 2))
        self.parts = nn.ParameterList([torch.randn(4), torch.randn(4)])
        self.named = nn.ParameterDict({"shift": torch.randn(4)})
        self.masks, self.own, self.read, self.values = 2.0, 3.0, 4.0, nn.Linear(4, 4)

    def masked(self):
        return self.masks * self.own * self.read

    def forward(self, x):
        return (
            self.values(x @ self.scale.sum(0).repeat(2, 2)) * self.parts[0]
            + self.named["shift"] * sum(self.parts)
            + self.masked()
        )


class Twice(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def with_own_forward():  # as accelerate's hooks make it
    linear = nn.Linear(4, 4)
    old = linear.forward
    linear.forward = lambda x: 3 * old(x)
    return linear


def pruned():
    linear = nn.Linear(4, 4)
    prune.l1_unstructured(linear, "weight", 0.5)
    return linear


def transposed_storage():
    linear = nn.Linear(4, 3)
    linear.weight = nn.Parameter(torch.randn(4, 3).t())
    return linear


def shared_module():
    linear = nn.Linear(4, 4)
    return nn.Sequential(linear, nn.Tanh(), linear)


def tied():
    model = nn.Sequential(nn.Embedding(20, 4, padding_idx=3), nn.Linear(4, 20, bias=False))
    model[1].weight = model[0].weight
    return model


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
    "used twice": (shared_module, X),
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
    "pruned": (pruned, X),
    "not contiguous": (transposed_storage, X),
    "odd": (Odd, X),
}


@pytest.mark.parametrize("kind", MODULES)
def test_modules(kind):
    """Gradients as the dense ones gathered, also in evaluation, in copies and in float64; training reaches the dense
    tensors.
    """
    make, inputs = MODULES[kind]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    model = make()
    keys = set(model.state_dict())
    model, mask = quietly_sparsified(model)
    types = [type(m).__name__ for m in plain.modules()]
    torch.testing.assert_close(loss_of(model, *inputs), loss_of(plain, *inputs))
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model.eval(), *inputs), loss_of(plain.eval(), *inputs))
    loss_of(model.train(), *inputs).backward()
    loss_of(plain.train(), *inputs).backward()
    gradients = {n: p.grad.to_dense() for n, p in plain.named_parameters()}
    got = torch.cat([r.values.grad for r in masked_parameters(model).values()])
    torch.testing.assert_close(got, mask.gather(gradients))
    assert all(r.dense.grad is None for r in masked_parameters(model).values())
    # these cannot be copied even where they are plain
    if kind not in ("own forward", "lstm", "pruned", "parametrized"):
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)) if kind != "odd" else model):
            other.zero_grad()
            loss_of(other, *inputs).backward()
            torch.testing.assert_close(torch.cat([r.values.grad for r in masked_parameters(other).values()]), got)
    before = {n: t.detach().clone() for n, t in plain.named_parameters()}
    sgd(model).step()
    check_in_step(model)
    densify(model)
    assert set(model.state_dict()) == keys
    assert [type(m).__name__ for m in model.modules()] == types
    after = dict(model.named_parameters())
    for name, chosen in mask.to_dense().items():
        assert torch.equal(after[name][~chosen], before[name][~chosen]), name
        torch.testing.assert_close(after[name][chosen], (before[name] - 0.1 * gradients[name])[chosen])
        assert after[name].requires_grad


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "kind",
    ["linear", "conv1d", "tied", "layer norm", "conv2d", "attention", "encoder layer", "subclass", "odd", "used twice"],
)
def test_compile_without_graph_breaks(kind, autocast):
    make, inputs = MODULES[kind]
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = quietly_sparsified(make())[0]
    gradients = []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(function, *inputs)
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for eager, compiled in zip(*gradients):
        error, size = (compiled - eager).norm(), eager.norm()
        assert error <= (0.02 if autocast else 1e-5) * size


@pytest.mark.parametrize("make", ["SparseAdamW", "AdamW", "AdamW, fused"])
def test_compiled_model_sees_every_step_without_recompiling(make):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, losses = CompileCounterWithBackend("aot_eager"), []
    for compiled in (False, True):
        model, mask = quietly_sparsified(mlp())
        function = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        if make == "SparseAdamW":
            optimizer = SparseAdamW(model.named_parameters(), mask, lr=0.1)
        else:
            optimizer = torch.optim.AdamW(trainable(model), lr=0.1, fused="fused" in make)
        for _ in range(4):
            loss = loss_of(function, IDS)
            losses.append(loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(loss_of(function, IDS))
    torch.testing.assert_close(losses[:5], losses[5:])
    assert len({float(loss) for loss in losses[:5]}) == 5
    assert counter.frame_count == 2  # with gradients and without


def test_inductor():
    torch._dynamo.reset()
    model = quietly_sparsified(mlp())[0]
    loss_of(model, IDS).backward()
    expected = [p.grad.clone() for p in trainable(model)]
    model.zero_grad()
    loss_of(torch.compile(model, fullgraph=True), IDS).backward()
    torch.testing.assert_close([p.grad for p in trainable(model)], expected)


def test_sparsify_structure():
    model, mask = mlp(), mlp_mask()
    assert sparsify(model, mask) is model
    assert isinstance(model[0], MaskedEmbedding)
    assert isinstance(model[1], MaskedLinear)
    assert isinstance(model[1], nn.Linear)
    assert not dict(model.named_parameters())["1.weight"].requires_grad
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(named) == {"0.values", "1.values", "1.bias_values", "3.values"}
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
    model[1].weight.requires_grad_(False)  # the mask says what is trained, the model what is when the mask is gone
    sparsify(model, mask).requires_grad_(False)
    model[1].values.requires_grad_(True)
    densify(model)
    assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]


def test_fallbacks_are_named_by_one_warning():
    odd = Odd()
    del odd.values
    with pytest.warns(
        UserWarning, match="4 masked tensors belong to no Linear.*: named.shift, parts.0, parts.1, scale$"
    ):
        sparsify(odd, topk_mask({n: torch.randn(p.shape) for n, p in odd.named_parameters()}, k=12))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the gradient of a bias is always dense
        for names in (["1.bias"], ["1.weight"], ["0.weight", "1.bias", "1.weight"]):
            model = mlp()
            sparsify(model, mlp_mask().restrict(names))
            loss_of(model, IDS).backward()
            assert all(p.grad is not None for p in trainable(model))


class Taken(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.values = nn.Parameter(torch.randn(3)), nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("module", "match"),
    [
        (lambda: nn.Embedding(4, 3, max_norm=1.0), "max_norm"),
        (lambda: nn.EmbeddingBag(4, 3, max_norm=1.0), "max_norm"),
        (lambda: torch.jit.script(nn.LayerNorm(3)), "script module"),
        (Taken, "has an attribute 'values'"),
        (
            lambda: nn.ParameterDict({"w": nn.Parameter(torch.ones(3, dtype=torch.int32), requires_grad=False)}),
            "floating point",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_sparsify_refuses_and_changes_nothing(module, match):
    model = nn.Sequential(nn.Linear(3, 3), module())
    mask = CSRMask.from_dense({n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()})
    before = {n: (type(m), set(vars(m)), set(m._parameters)) for n, m in model[:1].named_modules()}
    with pytest.raises((ValueError, TypeError), match=match):
        sparsify(model, mask)
    assert {n: (type(m), set(vars(m)), set(m._parameters)) for n, m in model[:1].named_modules()} == before
    assert model[0].weight.requires_grad


def test_sparsify_refuses_masks_that_do_not_fit():
    model = mlp()
    with pytest.raises(ValueError, match="model lacks tensor 'x'"):
        sparsify(model, CSRMask.from_dense({"x": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(ValueError, match=r"model\['1.weight'\] has shape"):
        sparsify(model, CSRMask.from_dense({"1.weight": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="on cpu, the mask on meta"):
        sparsify(model, mlp_mask().to("meta"))
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
            "Cannot assign non-leaf Tensor to parameter 'weight_orig'",
        ),
        (
            lambda linear: setattr(linear, "weight", nn.Parameter(torch.randn(3, 4))),
            "densify the model before its weight is replaced",
        ),
        (lambda linear: setattr(linear, "values", nn.Parameter(torch.randn(3))), "before its values is replaced"),
        (lambda linear: setattr(linear, "bias", None), "'0.bias' is sparsified"),
        (nn.utils.parametrizations.weight_norm, "DifferentiableWeight"),
    ],
)
def test_weights_cannot_be_replaced_after_sparsify(change, match):
    model = quietly_sparsified(nn.Sequential(nn.Linear(4, 3)))[0]
    before = model(X)
    with pytest.raises((ValueError, RuntimeError), match=match):
        change(model[0])
    assert torch.equal(model(X), before)
    densify(model)


def test_weights_that_are_gone_after_sparsify_are_refused():
    model = quietly_sparsified(nn.Sequential(nn.Linear(4, 3)))[0]
    del model[0].weight
    assert not hasattr(model[0], "weight")
    for action in (lambda: model(X), lambda: densify(model)):
        with pytest.raises((RuntimeError, ValueError), match=r"'0\.weight'.* has been replaced or resized since"):
            action()
    other = nn.Linear(2, 2)  # whose optimizer the broken model does not hinder
    other(torch.ones(1, 2)).sum().backward()
    sgd(other).step()


def test_part_of_a_tied_model_cannot_be_densified():
    model = quietly_sparsified(tied())[0]
    with pytest.raises(ValueError, match=r"'0\.weight' is tied to a module outside"):
        densify(model[0])
    check_in_step(model)
    assert type(densify(model)[0]) is nn.Embedding


def test_a_copied_model_has_one_buffer():
    model = sparsify(mlp(), mlp_mask())
    trained = []
    for each in (copy.deepcopy(model), model):
        values = [p for p in each.parameters() if p.requires_grad]
        assert len({p.untyped_storage().data_ptr() for p in values}) == 1
        optimizer = SparseAdamW(each.named_parameters(), mlp_mask(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            each(IDS).square().sum().backward()
            optimizer.step()
        assert torch.equal(each(IDS), densify(each)(IDS))
        trained.append(torch.cat([p.detach().flatten() for p in each.parameters()]))
    assert torch.equal(*trained)
