"""A model to shard with FSDP2 over some of the ranks of a group, its training, and checks of the result."""

from functools import cache

import torch
import torch.distributed as dist
from torch import nn

import deftx_kernels as dk
from deftx_kernels.nn import masked_parameters, plain_tensors

STEPS, BATCH = 20, 12


@cache
def mesh_of(world):
    """The mesh of the first `world` ranks. Every rank makes each one."""
    from torch.distributed.tensor import DeviceMesh

    return DeviceMesh("cpu", list(range(world)))


def meshes(rank, worlds):
    """(number of ranks, mesh), of those that this rank is part of."""
    found = [(world, mesh_of(world)) for world in worlds]
    return [(world, mesh) for world, mesh in found if rank < world]


class Model(nn.Module):
    """Of 13, 5, 1 and 3 rows: uneven shards, and ranks without rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.inner = nn.Embedding(13, 6), nn.Linear(6, 5)
        self.gate, self.norm, self.head = nn.Linear(6, 1, bias=False), nn.LayerNorm(5), nn.Linear(5, 3)

    def forward(self, ids):
        x = self.embedding(ids)
        return self.head(self.norm(torch.tanh(self.inner(x)) * torch.sigmoid(self.gate(x)))) * 1.0


def make_mask(seed=0, density=0.4, model=None):
    generator = torch.Generator().manual_seed(seed)
    named = (model or Model()).named_parameters()
    scores = {n: torch.randn(p.shape, generator=generator) for n, p in named if "head" not in n}
    return dk.topk_mask(scores, density=density)


def shard(model, mesh, **options):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model.inner, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


IDS = torch.arange(BATCH) % 13
TARGET = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(1))


def rows_of(mesh):
    """This rank's part of the batch."""
    if mesh is None:
        return slice(None)
    size = BATCH // mesh.size()
    return slice(mesh.get_local_rank() * size, (mesh.get_local_rank() + 1) * size)


def train(model, optimizer, mesh=None, steps=STEPS, max_norm=None, parts=1, sync=True):
    """Losses and norms. `parts`: over how many backward passes a gradient is accumulated. Not `sync`: the gradients are
    reduced in the last one only.
    """
    losses, norms = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for i, (ids, target) in enumerate(zip(IDS[rows_of(mesh)].chunk(parts), TARGET[rows_of(mesh)].chunk(parts))):
            if not sync:
                model.set_requires_gradient_sync(i == parts - 1)
            loss = (model(ids) - target).square().mean() / parts
            loss.backward()
            total = total + loss.detach()
        if mesh is not None:
            dist.all_reduce(total, group=mesh.get_group())
        losses.append(total / (1 if mesh is None else mesh.size()))
        if max_norm is not None:
            norms.append(optimizer.clip_grad_norm_(max_norm))
        optimizer.step()
    return torch.stack(losses), torch.stack(norms) if norms else None


def whole(model):
    """The whole weights of the plain model, on every rank of the mesh."""
    found = {n: p.detach() for n, p in plain_tensors(model).items()}
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in found.items()}


def group_of(mesh):
    return {"no_dist": True} if mesh is None else {"process_group": mesh.get_group()}


def check_checkpoints(rank, folder, start, pairs):
    """Five steps on some ranks, saved with DCP, five on others: as ten steps of one process. None: one process without
    FSDP.

    Args:
        start: mesh → model, optimizer.
        pairs: of numbers of ranks, before and after.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = start(None)
    train(model, optimizer, steps=10)
    expected = whole(model)
    mesh_for = {None: None} | {world: mesh_of(world) for world in (1, 2, 4)}
    for before, after in pairs:
        path = folder / f"{before}-{after}"
        if rank < (before or 1):
            model, optimizer = start(mesh := mesh_for[before])
            train(model, optimizer, mesh, 5)
            states = get_state_dict(model, optimizer)
            dcp.save(dict(zip("mo", states)), checkpoint_id=path, **group_of(mesh))
            train(model, optimizer, mesh, 5)
            undisturbed = whole(model)
        dist.barrier()
        if rank < (after or 1):
            model, optimizer = start(mesh := mesh_for[after])
            states = get_state_dict(model, optimizer)
            dcp.load(dict(zip("mo", states)), checkpoint_id=path, **group_of(mesh))
            set_state_dict(model, optimizer, model_state_dict=states[0], optim_state_dict=states[1])
            train(model, optimizer, mesh, 5)
            assert_near(whole(model), expected)
            if before == after:
                assert_same(whole(model), undisturbed)


def assert_near(found, expected, atol=2e-6):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=atol, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name].view(torch.uint8), expected[name].view(torch.uint8)), name


def assert_synchronised(model):
    """The dense tensors hold the values, bit for bit."""
    for name, (dense, values, mask) in masked_parameters(model).items():
        found = mask.gather({name: dense.detach().full_tensor()})
        assert torch.equal(found, values.detach().full_tensor().to(found.dtype)), name


def assert_untouched(found, mask, model=None):
    """Entries outside the mask are those of the start, bit for bit; the others changed, and so did other tensors."""
    start, chosen = whole(model or Model()), mask.to_dense()
    for name, tensor in found.items():
        if name in chosen:
            assert torch.equal(tensor[~chosen[name]], start[name][~chosen[name]]), name
            assert not chosen[name].any() or not torch.equal(tensor, start[name]), name
        else:
            assert not torch.equal(tensor, start[name]), name


def assert_equal_on_all(tensor, mesh):
    found = [torch.empty_like(tensor) for _ in range(mesh.size())]
    dist.all_gather(found, tensor, group=mesh.get_group())
    assert all(torch.equal(t, tensor) for t in found)
