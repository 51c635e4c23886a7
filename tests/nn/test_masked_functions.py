"""masked_linear and masked_embedding: gradients are those of the dense functions, gathered by the mask."""

import pytest
import torch
from torch.nn import functional as F

from deftx_kernels import CSRMask, masked_embedding, masked_linear, topk_mask


def random_mask(shape, density):
    return topk_mask({"tensor": torch.randn(shape, generator=torch.Generator().manual_seed(0))}, density=density)


def problem(m=10, n=8, density=0.4, dtype=torch.float32):
    """x, weight, its values and mask."""
    torch.manual_seed(0)
    weight, mask = torch.randn(m, n, dtype=dtype), random_mask((m, n), density)
    return torch.randn(5, n, dtype=dtype), weight, mask.gather({"tensor": weight}).requires_grad_(), mask


def written(weight, values, mask):
    """The weight that holds the values, which forward does not read: for numerical derivatives."""
    return mask.scatter_({"tensor": weight.clone()}, values.detach())["tensor"]


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_gradcheck(density, bias):
    _, weight, values, mask = problem(5, 4, density, torch.float64)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    biases = [torch.randn(5, dtype=torch.float64, requires_grad=True)] if bias else []

    def function(x, values, *biases):
        return masked_linear(x, written(weight, values, mask), values, mask, *biases)

    assert torch.autograd.gradcheck(function, (x, values, *biases))


def test_embedding_gradcheck():
    _, weight, values, mask = problem(7, 4, 0.5, torch.float64)
    ids = torch.tensor([[0, 3, 3], [6, 1, 0]])
    assert torch.autograd.gradcheck(lambda v: masked_embedding(ids, written(weight, v, mask), v, mask), (values,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_the_dense_ones(dtype):
    _, weight, _, mask = problem(dtype=dtype)
    x, upstream = torch.randn(4, 6, 8).to(dtype), torch.randn(4, 6, 10).to(dtype)
    values = mask.gather({"tensor": weight}).float().requires_grad_()
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    dense = weight.double().requires_grad_()
    masked_linear(ours, weight, values, mask).backward(upstream)
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
    _, weight, values, mask = problem(6, 4, 0.6)
    ids, upstream = torch.tensor([0, 2, 5, 5, 2]), torch.randn(5, 4)
    out = masked_embedding(ids, weight, values, mask, padding_idx)
    out.backward(upstream)
    dense = weight.clone().requires_grad_()
    F.embedding(ids, dense, padding_idx).backward(upstream)
    assert torch.equal(out, weight[ids])
    torch.testing.assert_close(values.grad, mask.gather({"tensor": dense.grad}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Bit for bit the results of dense autocast, except for the values' gradients, which stay in float32."""
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
    dense, results = weight.clone().requires_grad_(), []
    for function in (lambda x: masked_linear(x, weight, values, mask), lambda x: F.linear(x, dense)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            try:
                results.append(function(torch.ones(2, 8, dtype=dtype)).dtype)
            except RuntimeError as error:
                results.append(str(error))
    assert results[0] == results[1]


SHAPES = [(8,), (0, 8), (2, 0, 8), (1, 2, 3, 8)]


@pytest.mark.parametrize("x", [*map(torch.randn, SHAPES), torch.randn(8, 5).t(), torch.randn(3, 8).expand(2, 3, 8)])
def test_shapes_and_strides_of_inputs(x):
    _, weight, values, mask = problem()
    dense = weight.clone().requires_grad_()
    ids = torch.ones(x.shape[:-1], dtype=torch.int64)
    ids = ids.int().mT if ids.dim() > 1 else ids
    masked_linear(x, weight, values, mask).sum().backward()
    F.linear(x, dense).sum().backward()
    torch.testing.assert_close(values.grad, mask.gather({"tensor": dense.grad}))
    values.grad = dense.grad = None
    (masked_embedding(ids, weight, values, mask) ** 2).sum().backward()
    (F.embedding(ids, dense) ** 2).sum().backward()
    torch.testing.assert_close(values.grad, mask.gather({"tensor": dense.grad}))


def test_second_and_forward_derivatives_are_refused():
    x, weight, values, mask = problem()
    x.requires_grad_()
    # the gradient of a sum needs no gradient, that of x still does
    for loss in (lambda out: out.square().sum(), torch.sum):
        for source in (x, values):
            (gradient,) = torch.autograd.grad(loss(masked_linear(x, weight, values, mask)), source, create_graph=True)
            with pytest.raises(RuntimeError, match="masked_linear cannot be differentiated twice"):
                (gradient.sum() + values.sum()).backward()
    embedded = masked_embedding(torch.tensor([1]), weight, values, mask)
    (gradient,) = torch.autograd.grad(embedded.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="masked_embedding cannot be differentiated twice"):
        gradient.sum().backward()
    inner = torch.func.grad(lambda x: masked_linear(x, weight, values, mask).square().sum())
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.func.grad(lambda x: inner(x).sum())(x.detach())
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda x: masked_linear(x, weight, values, mask), (x.detach(),), (x.detach(),))


def test_wrong_arguments_are_named():
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
