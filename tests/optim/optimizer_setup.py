"""Small models, masks and optimizers, and comparisons, for the tests of SparseAdamW."""

import io

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from deftx_kernels import CSRMask, SparseAdamW, sparsify

MASKED = ("0.weight", "1.bias", "1.weight")
both = pytest.mark.parametrize("sparsified", [False, True], ids=["plain", "sparsified"])


def label(value):
    return (", ".join(value) or "defaults") if isinstance(value, dict) else str(value)


def make_model(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def make_mask(density=0.4, seed=1, names=MASKED):
    generator = torch.Generator().manual_seed(seed)
    shapes = {n: p.shape for n, p in make_model().named_parameters() if n in names}
    return CSRMask.from_dense({n: torch.rand(s, generator=generator) < density for n, s in shapes.items()})


def full_mask(**shapes):
    return CSRMask.from_dense({name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()})


def setup(sparsified=False, dtype=torch.float64, mask=None, model_seed=0, **options):
    model, mask = make_model(dtype, model_seed), mask or make_mask()
    if sparsified:
        sparsify(model, mask)
    return model, SparseAdamW(model.named_parameters(), mask, **({"lr": 1e-2} | options))


def trained(steps, *args, **options):
    """`setup`, after some steps."""
    pair = setup(*args, **options)
    train(*pair, steps)
    return pair


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


def set_grads(model, value=None, seed=0):
    """Gradients of random numbers or of one value, of the parameters that need one."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters() if isinstance(model, nn.Module) else model:
        if p.requires_grad and value is not None:
            p.grad = torch.full_like(p, value)
        elif p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


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


def assert_near(got, expected, tolerance=1e-12):
    """To a tolerance in units of the largest weight; by default for 60 steps of float64."""
    largest = max(float(t.abs().max()) for t in expected.values())
    for name, tensor in expected.items():
        assert float((got[name].double() - tensor.double()).abs().max()) <= tolerance * largest, name


def through_file(objects, weights_only=True):
    file = io.BytesIO()
    torch.save(objects, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


ORIGIN = torch.randn(make_mask().nnz, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
