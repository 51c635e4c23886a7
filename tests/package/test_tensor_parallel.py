"""Tensor parallelism on two gloo processes: what is sharded by rows trains as in one process, what is not is refused by
name before anything is changed. Weights of experts by rows, that is whole experts, also sparsified and with FSDP2.
"""

import pytest
import torch
from process_groups import run_ranks
from torch import nn

import deftx_kernels as dk
from deftx_kernels import SparseAdamW, distributed
from deftx_kernels.nn import plain_tensors

WORLD = 2
X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


def test_tensor_parallel_models():
    functions = (_refused, _placements, _rows_are_trained, _experts_are_trained, _sparsified_experts)
    run_ranks(functions, WORLD)


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8))


def mask_of(named):
    generator = torch.Generator().manual_seed(0)
    return dk.topk_mask({n: torch.rand(p.shape, generator=generator) for n, p in named}, density=0.4)


def parallel(model):
    """The first layer by rows, Shard(0), the second by columns, Shard(1)."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)


def _refused(rank):
    model, mask = parallel(make()), mask_of(make().named_parameters())
    before = [(type(p), p.requires_grad, p.full_tensor().detach().clone()) for p in model.parameters()]
    named = dict(model.named_parameters())
    columns = r"tensor '2.weight' must be placed Shard\(0\) or Replicate\(\) on a 1-D mesh, got \(Shard\(dim=1\),\)"
    for call, error, message in (
        (lambda: dk.sparsify(model, mask), TypeError, r"model\['0.bias'\] is a DTensor: .*SparseAdamW and the mask"),
        (lambda: SparseAdamW(named.items(), mask), ValueError, columns),
        (lambda: SparseAdamW(named.items(), mask["0.weight"]), ValueError, columns),  # trained densely
        (lambda: distributed.local_mask(mask, named), ValueError, columns),
        (lambda: distributed.topk_mask(named, k=4), ValueError, columns),
        *((lambda m=m: dk.init_mask(model, method=m, k=4), TypeError, "'0.weight'.* got a DTensor") for m in METHODS),
        (lambda: dk.select_mask(model, make(), k=4), TypeError, r"tuned\['0.(bias|weight)'\] .* got a DTensor"),
        (
            lambda: dk.SparseDelta.from_models(model, make(), mask),
            TypeError,
            r"tuned\['0.(bias|weight)'\] .* got a DTensor",
        ),
    ):
        with pytest.raises(error, match=message):
            call()
    for p, (cls, requires_grad, whole) in zip(model.parameters(), before):
        assert (type(p), p.requires_grad) == (cls, requires_grad)
        assert torch.equal(p.full_tensor(), whole)
    assert [type(m) for m in model.modules()] == [type(m) for m in make().modules()]
    sparsified = dk.sparsify(make(), mask)
    with pytest.raises(ValueError, match=r"'0.weight' is sparsified: densify the model before"):
        parallel(sparsified)


METHODS = ("lift", "magnitude", "random")


def _placements(rank):
    """Of fused projections, transformers shards each half over the ranks."""
    from torch.distributed.tensor import DTensor, init_device_mesh
    from torch.distributed.tensor.placement_types import _StridedShard

    halves = [_StridedShard(0, split_factor=2)]
    mesh = init_device_mesh("cpu", (WORLD,))
    weight = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, halves, run_check=False))
    with pytest.raises(ValueError, match=r"'w' must be placed Shard\(0\) .* got \(_StridedShard"):
        SparseAdamW([("w", weight)], mask_of([("w", torch.ones(8, 3))]))


def _rows_are_trained(rank):
    norms, models = [], [make(), parallel(make())]
    mask = mask_of(list(make().named_parameters())[:1])
    for model in models:
        model[2].requires_grad_(False)
        optimizer = SparseAdamW(model[0].named_parameters(prefix="0"), mask, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            norms.append(optimizer.clip_grad_norm_(1.0))
            optimizer.step()
    torch.testing.assert_close(norms[3:], norms[:3])
    for plain, sharded, start in zip(*(m.parameters() for m in models), make().parameters()):
        whole = sharded.full_tensor()
        torch.testing.assert_close(whole, plain, atol=1e-6, rtol=1e-5)
        assert plain.requires_grad != torch.equal(plain, start)


def _experts_are_trained(rank):
    """Whole experts on each rank: Shard(0) of [experts, m, n]."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh, start = init_device_mesh("cpu", (WORLD,)), torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(2))
    mask, found = mask_of([("w", start)]), []
    for shard in (lambda t: t.clone(), lambda t: distribute_tensor(t.clone(), mesh, [Shard(0)])):
        weight = nn.Parameter(shard(start))
        optimizer = SparseAdamW([("w", weight)], mask, lr=1e-2)
        for step in range(3):
            weight.grad = shard(start * (step + 1) - 1)
            optimizer.step()
        found.append(weight.detach())
    assert torch.equal(found[1].full_tensor(), found[0])
    assert torch.equal(found[0] != start, mask.to_dense()["w"])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.num_experts = 3
        self.weight = nn.Parameter(torch.randn(3, 8, 8))

    def forward(self, x):
        grouped = nn.functional.grouped_mm(x, self.weight.mT, offs=torch.tensor([2, 2, 5], dtype=torch.int32))
        return grouped.square().sum() + (x @ self.weight[1]).square().sum()


def _sparsified_experts(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh, found = init_device_mesh("cpu", (WORLD,)), []
    for is_sharded in (False, True):
        mask = mask_of(Experts().named_parameters())
        model = dk.sparsify(Experts(), mask)
        if is_sharded:
            fully_shard(model, mesh=mesh)
        optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(X).backward()
            optimizer.step()
        found.append(plain_tensors(model)["weight"].detach())
    torch.testing.assert_close(found[1].full_tensor(), found[0], atol=1e-6, rtol=1e-5)
