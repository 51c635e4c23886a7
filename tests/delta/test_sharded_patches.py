"""Patches of models that are sharded over gloo processes: those of one process, bit for bit."""

import pytest
import torch
import torch.distributed as dist
from delta_examples import clones, same
from process_groups import run_ranks
from test_patch import DTYPES, models
from torch import nn

from deftx_kernels import SparsePatch, distributed

SHAPES = [(), (0,), (1,), (2,), (7,), (5, 3), (3, 5, 1), (1, 4), (4, 0)]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks(world):
    run_ranks((_diff_and_apply, _errors, _a_failure_on_one_rank, _fsdp2), world)


def sharded(model):
    """This rank's rows of the tensors, as DTensors; every third tensor is plain or placed Replicate()."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

    mesh, rank, found = init_device_mesh("cpu", (dist.get_world_size(),)), dist.get_rank(), {}
    for i, (name, tensor) in enumerate(model.items()):
        if tensor.dim() == 0 or i % 6 == 0:
            found[name] = tensor.clone()
        elif i % 6 == 3:
            found[name] = DTensor.from_local(tensor.clone(), mesh, [Replicate()], run_check=False)
        else:
            rows = tensor.chunk(mesh.size())[rank:] or [tensor[:0]]
            options = {"run_check": False, "shape": tensor.shape, "stride": tensor.stride()}
            found[name] = DTensor.from_local(rows[0].clone(), mesh, [Shard(0)], **options)
    return found


def local(model):
    return {n: t if type(t) is torch.Tensor else t.to_local() for n, t in model.items()}


def assert_same_patch(one, other):
    assert (one.before, one.after, one.tied, one.names) == (other.before, other.after, other.tied, other.names)
    for name in other.names:
        for found, expected in zip(one.flat(name), other.flat(name)):
            assert found.dtype == expected.dtype
            assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8)), name


def _diff_and_apply(rank):
    for seed in range(3):
        old, new = models(seed, 2, DTYPES, SHAPES, density=(0.3, 0.9, 0.0)[seed % 3])
        patch, shards = SparsePatch.diff(new, old), sharded(old)
        found = distributed.diff_patch(sharded(new), shards, model_version=seed)
        assert_same_patch(found, patch)
        assert found.model_version == seed
        for verify in (True, False):
            distributed.apply_patch_(patch, shards, verify=verify)
            assert same(local(shards), local(sharded(new)))
            distributed.apply_patch_(patch.inverse(old), shards, verify=verify)
            assert same(local(shards), local(sharded(old)))
        if patch.nnz:
            distributed.apply_patch_(SparsePatch({n: patch.flat(n) for n in patch.names}), shards)
            assert same(local(shards), local(sharded(new)))


OLD = {"a": torch.zeros(4), "b": torch.arange(15.0).view(5, 3), "c": torch.zeros(1, 3), "d": torch.zeros(2)}
NEW = {n: t + 1 for n, t in OLD.items()}


def _errors(rank):
    patch = SparsePatch.diff(NEW, OLD)
    for name, message in (("a", "'a' has other values"), ("b", "'b' has other values")):  # plain, sharded
        model = sharded(OLD)
        if rank == 1:
            local(model)[name].view(-1)[0] = 7
        before = clones(local(model))
        with pytest.raises(ValueError, match=f"not at the version that the patch was made for: tensor {message}"):
            distributed.apply_patch_(patch, model)
        assert same(local(model), before)
    wrong = SparsePatch(patch._entries, patch.before, {**patch.after, "b": patch.after["b"]._replace(checksum=1)})
    shorter = sharded({**OLD, "b": OLD["b"][:4]})
    for apply, model, message in (
        (wrong, sharded(OLD), "not at the version that the patch leads to: tensor 'b'"),
        (patch, shorter, "rank 0: model's tensor 'b' is float32 .4, 3., .* has float32 .5, 3."),
        (patch, sharded(OLD | {"x": torch.ones(1)}), "rank 0: model has tensor 'x', which is not"),
        (patch, {n: t for n, t in sharded(OLD).items() if n != "d" or rank == 0}, "rank 1: model lacks tensor 'd'"),
        (patch if rank == 0 else None, sharded(OLD), "rank 1: patch must be a SparsePatch, got NoneType"),
    ):
        before = clones(local(model))
        with pytest.raises(ValueError, match=message):
            distributed.apply_patch_(apply, model)
        assert same(local(model), before)
    for new, message in (
        (shorter, r"tensor 'b' is \[4, 3\], sharded in new and \[5, 3\], sharded in old"),
        (OLD, r"tensor 'b' is \[5, 3\] in new and \[5, 3\], sharded in old"),
        ({n: t for n, t in sharded(OLD).items() if n != "d" or rank == 0}, "rank 1: new lacks tensor 'd' of old"),
        ([], "rank 0: new must be a module or a mapping"),
    ):
        with pytest.raises(ValueError, match=message):
            distributed.diff_patch(new, sharded(OLD))


def _a_failure_on_one_rank(rank):
    patch, model = SparsePatch.diff(NEW, OLD), sharded(OLD)
    with pytest.MonkeyPatch.context() as patched:
        if rank == 1:
            patched.setattr(SparsePatch, "apply_", lambda *_: 1 / 0)
        with pytest.raises(ValueError, match="rank 1: division by zero"):
            distributed.apply_patch_(patch, model)
    assert same(local(model), local(sharded(OLD)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.head = nn.Embedding(7, 3), nn.BatchNorm1d(2), nn.Linear(3, 7)
        self.head.weight = self.embedding.weight
        self.bfloat16()

    def forward(self, ids):
        return self.head(self.norm(self.embedding(ids)))


def _fsdp2(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    def changed(model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
            model.norm.running_mean[1] = 3
        return model

    old = clones(Tied())
    patch = SparsePatch.diff(changed(Tied()), {n: t for n, t in old.items() if n != "head.weight"})
    assert patch.tied == {"head.weight": "embedding.weight"}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, follower = (fully_shard(Tied(), mesh=mesh) for _ in range(2))
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    found = distributed.diff_patch(changed(model), before)
    assert_same_patch(found, patch)
    distributed.apply_patch_(found, follower)
    assert_same_patch(distributed.diff_patch(follower, before), patch)
    assert_same_patch(distributed.diff_patch(follower, model), SparsePatch.diff(changed(Tied()), changed(Tied())))
