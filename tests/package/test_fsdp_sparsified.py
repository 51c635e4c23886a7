"""Sparsified models that are sharded with FSDP2, on two to four of four gloo processes, against one process."""

import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from fsdp_models import (
    IDS,
    STEPS,
    Model,
    assert_equal_on_all,
    assert_near,
    assert_same,
    assert_synchronised,
    assert_untouched,
    check_checkpoints,
    make_mask,
    mesh_of,
    meshes,
    shard,
    train,
    whole,
)
from process_groups import run_ranks
from torch import nn

import deftx_kernels as dk
from deftx_kernels import CSRMask, SparseAdamW, densify, distributed, sparsify
from deftx_kernels.integrations import SparseConfig, get_sparse_model, sparse_delta
from deftx_kernels.nn import masked_parameters, plain_tensors

WORLD = 4


def test_training():
    run_ranks((_training, _options, _mixed_precision, _bfloat16, _sent, _other_optimizers), WORLD)


def test_state(tmp_path):
    functions = (partial(_checkpoints, tmp_path), _full_state_dict, _states, _results)
    run_ranks(functions, WORLD)


def test_errors():
    run_ranks((_errors, _written_by_other_code, _cast_after_a_forward), WORLD)


# ---- models ----
def start(mesh, mask, **options):
    model = sparsify(Model(), mask)
    if mesh is not None:
        shard(model, mesh, **options)
    return model, SparseAdamW(model.named_parameters(), mask, lr=1e-2)


# ---- training ----
def _training(rank):
    mask = make_mask()
    model, optimizer = start(None, mask)
    losses, norms = train(model, optimizer, max_norm=0.3)
    for world, reshard, parts in ((2, True, 3), (2, False, 1), (3, True, 2), (3, False, 1), (4, 2, 1), (4, True, 3)):
        mesh = mesh_of(world)
        if rank >= world:
            continue
        sharded, optimizer = start(mesh, mask, reshard_after_forward=reshard)
        mine = train(sharded, optimizer, mesh, max_norm=0.3, parts=parts, sync=parts == 1)
        torch.testing.assert_close(mine[0], losses, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mine[1], norms, atol=1e-6, rtol=1e-5)
        assert_equal_on_all(mine[1], mesh)
        assert_near(found := whole(sharded), whole(model))
        assert_untouched(found, mask)
        assert_synchronised(sharded)
        for dense, values, _ in masked_parameters(sharded).values():
            assert not dense.requires_grad
            assert dense.grad is None
            state = optimizer.state[values]
            assert not values.numel() or state["exp_avg"].shape == values.to_local().shape


def _options(rank):
    """Decay to a point, L1, moments in bfloat16, parameter groups."""
    mask = make_mask()
    point = torch.randn(mask.nnz, generator=torch.Generator().manual_seed(3))
    options = dict(lr=1e-2, weight_decay=0.1, decay_to=point, l1=1e-2)
    for state_dtype, atol in ((None, 2e-6), (torch.bfloat16, 2e-3)):
        found = {}
        for world, mesh in [(None, None), *meshes(rank, (3,))]:
            model, _ = start(mesh, mask)
            named = list(model.named_parameters())
            groups = [{"params": named[:5], "betas": (0.8, 0.99)}, {"params": named[5:], "maximize": True}]
            train(model, SparseAdamW(groups, mask, state_dtype=state_dtype, **options), mesh, 8)
            found[world] = whole(model)
        if 3 in found:
            assert_near(found[3], found[None], atol)


def _mixed_precision(rank):
    """As FSDP2 with a plain model."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mask = make_mask()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for _, mesh in meshes(rank, (2, 3)):
        plain = shard(Model(), mesh, mp_policy=policy)
        losses, norms = train(plain, SparseAdamW(plain.named_parameters(), mask, lr=1e-2), mesh, max_norm=0.3)
        model, optimizer = start(mesh, mask, mp_policy=policy)
        mine = train(model, optimizer, mesh, max_norm=0.3)
        torch.testing.assert_close(mine[0], losses, atol=1e-3, rtol=1e-2)
        torch.testing.assert_close(mine[1], norms, atol=1e-3, rtol=1e-2)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert_near(found := whole(model), whole(plain), atol=1e-3)
        assert_untouched(found, mask)
        assert_synchronised(model)


def _bfloat16(rank):
    """16-bit weights with values in float32, as in one process; and casts of the sharded model."""
    mask = make_mask()

    def half(mesh):
        model = sparsify(Model().bfloat16(), mask, freeze_others=True)
        if mesh is not None:
            shard(model, mesh)
        return model, SparseAdamW(model.named_parameters(), mask, lr=1e-3, state_dtype=torch.bfloat16)

    model, optimizer = half(None)
    losses, _ = train(model, optimizer, steps=8)
    for _, mesh in meshes(rank, (3,)):
        sharded, optimizer = half(mesh)
        mine, _ = train(sharded, optimizer, mesh, steps=8)
        torch.testing.assert_close(mine, losses, atol=0.05, rtol=0.05)
        values = {n: m.values.detach().full_tensor() for n, m in masked_parameters(sharded).items()}
        assert {v.dtype for v in values.values()} == {torch.float32}
        assert_synchronised(sharded)
        for dtype in (torch.float32, torch.float16, torch.float64):
            sharded.to(dtype)
            found = masked_parameters(sharded)
            assert {m.dense.dtype for m in found.values()} == {dtype}
            for name, value in values.items():
                kept = found[name].values.detach().full_tensor()
                assert kept.dtype == (dtype if dtype == torch.float64 else torch.float32)
                assert torch.equal(kept.float(), value), name
            assert_synchronised(sharded)


class CountingReduceScatter:
    """For `FSDPModule.set_custom_reduce_scatter`."""

    def __init__(self):
        self.nbytes = 0

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.nbytes += input_tensor.nbytes
        reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # before torch 2.13
        return reduce_scatter(output_tensor, input_tensor, op, group, async_op)


def _sent(rank):
    """A layer of real size: gradients that travel are compact, and after a step only values of other ranks' rows do."""
    x = torch.randn(4, 768, generator=torch.Generator().manual_seed(rank % 2))

    def layers():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(768, 768), nn.Tanh(), nn.Linear(768, 768))

    def step(model, optimizer, x):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    generator = torch.Generator().manual_seed(1)
    scores = {n: torch.rand(p.shape, generator=generator) for n, p in layers().named_parameters() if "weight" in n}
    scores["0.weight"][:300] = 0.0  # most values of rank 0 are in rows of rank 1
    mask = dk.topk_mask(scores, density=0.02)
    all_to_all, sent = dist.all_to_all_single, []

    def count(output, input, output_sizes, input_sizes, group):
        sent.append(input.element_size() * (sum(input_sizes) - input_sizes[rank]))
        return all_to_all(output, input, output_sizes, input_sizes, group=group)

    for _, mesh in meshes(rank, (2,)):
        expected = sparsify(layers(), mask, freeze_others=True)
        optimizer = SparseAdamW(expected.named_parameters(), mask, lr=1e-3)
        batch = torch.cat([torch.randn(4, 768, generator=torch.Generator().manual_seed(r)) for r in (0, 1)])
        for _ in range(3):
            step(expected, optimizer, batch)
        model = shard_layers(sparsify(layers(), mask, freeze_others=True), mesh)
        counting = CountingReduceScatter()
        model.set_custom_reduce_scatter(counting)
        optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-3)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(dist, "all_to_all_single", count)
            patched.setattr("deftx_kernels.nn.modules.scattered_copy", None)  # of whole weights
            for _ in range(3):
                step(model, optimizer, x)
        assert counting.nbytes == 3 * 4 * sum(2 * -(-mask[n].nnz // 2) for n in mask.names)
        if rank == 0:
            below = [mask[n].crow_indices[384] for n in mask.names]
            wanted = sum(max(0, -(-mask[n].nnz // 2) - int(rows)) for n, rows in zip(mask.names, below))
            assert wanted > 1000
            assert sent == [4 * wanted] * 4  # the first step compares values and weights before
        assert_near(whole(model), whole(expected))


def shard_layers(model, mesh):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=mesh)


def _other_optimizers(rank):
    """With optimizers of torch, activation checkpointing, and tied weights."""
    from torch.distributed.fsdp import fully_shard
    from torch.utils.checkpoint import checkpoint

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.inner = nn.Embedding(13, 6), nn.Linear(6, 6)
            self.out = nn.Linear(6, 13, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, ids):
            x = self.embedding(ids)
            return self.out(torch.tanh(checkpoint(self.inner, x, use_reentrant=False)))[:, :3] * 1.0

    mask = make_mask(model=Tied(), density=0.3)
    for make in (partial(torch.optim.AdamW, lr=1e-2), partial(torch.optim.SGD, lr=0.5, momentum=0.9)):
        model = sparsify(Tied(), mask)
        losses, _ = train(model, make([p for p in model.parameters() if p.requires_grad]))
        for _, mesh in meshes(rank, (3,)):
            sharded = sparsify(Tied(), mask)
            fully_shard(sharded.inner, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            mine, _ = train(sharded, make([p for p in sharded.parameters() if p.requires_grad]), mesh)
            torch.testing.assert_close(mine, losses, atol=1e-5, rtol=1e-5)
            assert_near(whole(sharded), whole(model), atol=1e-5)
            assert_synchronised(sharded)


# ---- state ----
def _checkpoints(folder, rank):
    pairs = (2, 4), (4, 2), (2, 1), (1, 2), (4, None), (None, 4), (2, 2)
    check_checkpoints(rank, folder, partial(start, mask=make_mask()), pairs)


def _full_state_dict(rank):
    """Whole tensors on rank 0, broadcast to a model without weights on other ranks than they came from."""
    from torch.distributed.checkpoint import state_dict as dsd

    mask = make_mask()
    full = dsd.StateDictOptions(full_state_dict=True, cpu_offload=True)
    states = [None]
    for _, mesh in meshes(rank, (2,)):
        model, optimizer = start(mesh, mask)
        train(model, optimizer, mesh, STEPS // 2)
        states = [copy.deepcopy(dsd.get_state_dict(model, optimizer, options=full))]
        train(model, optimizer, mesh, STEPS // 2)
        expected = whole(model)
    model_state, optimizer_state = states[0] if rank == 0 else ({}, {})
    with torch.device("meta"):
        model = Model()
    model = shard(sparsify(model, mask), mesh := mesh_of(WORLD)).to_empty(device="cpu")
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
    options = dsd.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dsd.set_model_state_dict(model, model_state, options=options)
    dsd.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    train(model, optimizer, mesh, STEPS // 2)
    assert_synchronised(model)
    found = whole(model)
    if rank < 2:
        assert_near(found, expected)


def _states(rank):
    """Loading of a plain model's weights, of states that do not fit, and of those that differ between ranks."""
    mask, other = make_mask(), make_mask(1)
    for _, mesh in meshes(rank, (3,)):
        plain = shard(Model(), mesh)
        train(plain, SparseAdamW(plain.named_parameters(), other, lr=1e-2), mesh, 3)
        model, optimizer = start(mesh, mask)
        model.load_state_dict(plain.state_dict())
        assert_synchronised(model)
        assert_same(whole(model), whole(plain))
        state = {n: t.clone() for n, t in model.state_dict().items()}
        optimizer_state = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, mesh, 3)
        changed = whole(model)
        wrong = {n: t.clone() for n, t in state.items()}
        if rank == 1:
            wrong["embedding.values"].to_local()[0] += 1.0
        with pytest.raises(RuntimeError, match="the values of weight do not belong to this model's mask"):
            model.embedding.load_state_dict({n[10:]: t for n, t in wrong.items() if n.startswith("embedding.")})
        assert_same(whole(model), changed)
        missing = {n: t for n, t in state.items() if rank != 2 or n != "inner.values"}
        with pytest.raises(ValueError, match=r"the state of 'inner.weight' on rank 0 differs from that of ranks \[2\]"):
            model.load_state_dict(missing)
        model.load_state_dict(state)
        optimizer.load_state_dict(optimizer_state)
        assert_synchronised(model)
        assert_same(whole(model), whole(plain))


def _results(rank):
    """Deltas and patches of the whole model, on every rank, without a masked tensor as a whole."""
    from torch.distributed.tensor import DTensor

    mask = make_mask()
    config = SparseConfig(modules_to_save=["head"])
    gathered, full_tensor = [], DTensor.full_tensor

    def record(tensor, **options):
        gathered.append(tuple(tensor.shape))
        return full_tensor(tensor, **options)

    for _, mesh in meshes(rank, (2, 3)):
        model = shard(get_sparse_model(Model(), config, mask), mesh)
        before = {n: t.detach().clone() for n, t in plain_tensors(model).items()}
        train(model, SparseAdamW(model.named_parameters(), mask, lr=1e-2), mesh, 5)
        with torch.no_grad():
            model(IDS)  # leaves the parameters of the root gathered
        gathered.clear()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DTensor, "full_tensor", record)
            delta = sparse_delta(model)
            patch = distributed.diff_patch(model, before, group=mesh.get_group())
        assert sorted(gathered) == [(3,), (3, 5)]  # the head
        expected = whole(model)
        for apply in (delta.apply_, patch.apply_):
            fresh = Model()
            apply(fresh)
            assert_same(whole(fresh), expected)
        assert delta.mask == mask
        assert {n: tuple(t.shape) for n, t in delta.dense.items()} == {"head.weight": (3, 5), "head.bias": (3,)}


# ---- errors ----
def _errors(rank):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DeviceMesh, Shard

    mesh, mask = mesh_of(WORLD), make_mask()
    with pytest.raises(TypeError, match=r"'embedding.weight'\] is a DTensor: call fully_shard after sparsify"):
        sparsify(shard(Model(), mesh), mask)
    model, optimizer = start(mesh, mask)
    named = list(model.named_parameters())
    with pytest.raises(ValueError, match=r"'embedding.weight' is sharded .* stays sparsified: .*plain_tensors"):
        densify(model)
    with pytest.raises(ValueError, match=r"mask cannot change for a sparsified model"):
        optimizer.update_mask(make_mask(1))
    for given, options, message in (
        (mask, dict(track_changes=True), r"'embedding.weight'\] is a DTensor, .* without track_changes"),
        (None, {}, "'embedding.weight' is sparsified: give its mask"),
        (make_mask(1), {}, "'embedding.weight' was sparsified with another mask"),
        (make_mask(1) if rank == 2 else mask, {}, "rank 2: 'embedding.weight' was sparsified with another mask"),
        (mask, {"lr": -1.0 if rank == 1 else 1.0}, "rank 1: lr must be a number, at least 0"),
        (mask, {"decay_to": torch.ones(3)} if rank == 1 else {}, "rank 1: decay_to must be compact"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseAdamW(named, given, **options)
    # Another mask on one rank, of as many entries
    mine = CSRMask.from_dense({n: t.flip(0) if rank == 2 else t for n, t in mask.to_dense().items()})
    model = shard(sparsify(Model(), mine), mesh)
    with pytest.raises(ValueError, match=r"must be the same on all ranks, .* differ from those of ranks \[2\]"):
        SparseAdamW(model.named_parameters(), mine)
    other = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match=r"sparsified with another mask on rank 0 than on ranks \[2\]"):
        train(model, other, mesh, 1)
    # Values that are not sharded, or otherwise than the dense tensors
    model = sparsify(Model(), mask)
    fully_shard(model, mesh=mesh, ignored_params={model.embedding.values})
    with pytest.raises(ValueError, match="is sparsified and has been replaced"):
        SparseAdamW(model.named_parameters(), mask)
    with pytest.raises(ValueError, match="'embedding.weight' and its values must be sharded \\(FSDP2\\) together"):
        model(IDS)
    even = CSRMask.from_dense({"weight": torch.eye(8, dtype=torch.bool)})
    for options in (
        dict(mesh=mesh, shard_placement_fn=lambda p: Shard(1) if p.dim() > 1 else None),
        dict(mesh=DeviceMesh("cpu", torch.arange(WORLD).view(2, 2), mesh_dim_names=("a", "b"))),
    ):
        model = sparsify(nn.Linear(8, 8), even)
        fully_shard(model, **options)
        for step in (
            lambda m=model: SparseAdamW(m.named_parameters(), even),
            torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step,
        ):
            with pytest.raises(ValueError, match=r"must be placed Shard\(0\) or Replicate\(\) on a 1-D mesh"):
                step()


def _written_by_other_code(rank):
    """Weights that are initialised after `to_empty` without load_state_dict: the values hold anything then."""
    from torch.distributed.tensor import distribute_tensor

    mask, weights = make_mask(), {n: p.detach() + 1.0 for n, p in Model().named_parameters()}
    mesh = mesh_of(WORLD)
    with torch.device("meta"):
        model = Model()
    model = shard(sparsify(model, mask), mesh).to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in plain_tensors(model).items():
            tensor.copy_(distribute_tensor(weights[name], mesh, tensor.placements))
        for _, values, _ in masked_parameters(model).values():
            values.zero_()
    optimizers = SparseAdamW(model.named_parameters(), mask), torch.optim.SGD(model.parameters(), lr=0.0)
    for optimizer in optimizers:
        for _ in range(2):
            with pytest.raises(ValueError, match="'embedding.weight' does not hold its values"):
                optimizer.step()
    assert_same(whole(model), weights)
    for _ in range(2):  # before the first step, and after it
        model.load_state_dict(plain_tensors(model))
        train(model, optimizers[1], mesh, 2)
        assert_same(whole(model), weights)
        assert_synchronised(model)
        with torch.no_grad():
            for tensor in plain_tensors(model).values():
                tensor.data.mul_(2.0)
        weights = {n: 2.0 * t for n, t in weights.items()}


def _cast_after_a_forward(rank):
    """FSDP2's buffers keep the old dtype; of plain models, too, where torch raises an error."""
    model = shard(sparsify(Model(), make_mask(), freeze_others=True), mesh_of(WORLD)).to(torch.float16)
    model.to(torch.float32)(IDS)
    model.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="was cast from torch.float32 to torch.bfloat16 after a forward"):
        model(IDS)
