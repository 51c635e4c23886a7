"""Small models, their masks, and what the tests of sparsified models ask of them."""

import warnings

import torch
from torch import nn

from deftx_kernels import CSRMask, sparsify, topk_mask
from deftx_kernels.nn import masked_parameters

IDS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(4))
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def mlp(dtype=torch.float32):
    """For IDS. The LayerNorm has no compact gradient of its own."""
    torch.manual_seed(0)
    ends = nn.Embedding(20, 8, padding_idx=0), nn.Linear(16, 4, bias=False)
    return nn.Sequential(ends[0], nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), ends[1]).to(dtype)


def linears(dtype=torch.float32):
    """For X."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).to(dtype)


def tied(dtype=torch.float32):
    """For IDS."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8, padding_idx=3), nn.Linear(8, 20, bias=False)).to(dtype)
    model[1].weight = model[0].weight
    return model


def mask_of(model, density=0.4, seed=1, only=lambda name, parameter: True) -> CSRMask:
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters() if only(n, p)}
    return topk_mask(scores, density=density)


def sparsified(model, mask=None):
    """The model, sparsified without the warning about dense gradients."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*trained through a dense gradient")
        return sparsify(model, mask_of(model) if mask is None else mask)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model, lr=0.1):
    return torch.optim.SGD(trainable(model), lr=lr)


def weighted_square(model, *inputs):
    """A loss to which each output contributes differently: behind a norm, the plain sum of squares is constant."""
    out = model(*inputs)
    out = (out[0] if isinstance(out, tuple) else out).float()
    return (out.square() * torch.linspace(-1, 2, out.numel()).view_as(out)).sum()


def flatten_parameters(parameters):
    """Makes each parameter a view of a buffer, in this order, as sharded training does."""
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, buffer.split([p.numel() for p in parameters])):
        p.data = part.view_as(p)
    return buffer


def compact_gradients(model):
    """Name → gradient of the values, 0 where there is none."""
    values = {n: p.values for n, p in masked_parameters(model).items()}
    return {n: torch.zeros_like(v) if v.grad is None else v.grad for n, v in values.items()}


def assert_synchronised(model):
    """Each dense tensor holds its values."""
    parameters = masked_parameters(model)
    assert parameters
    for name, (dense, values, mask) in parameters.items():
        assert torch.equal(mask.gather({name: dense}), values.to(dense.dtype)), name
