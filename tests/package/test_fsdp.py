"""SparseAdamW over DTensors: FSDP2 on one to four of four gloo processes, against a plain model in one process."""

import copy
from functools import partial

import pytest
import torch
from fsdp_models import (
    IDS,
    STEPS,
    TARGET,
    Model,
    assert_equal_on_all,
    assert_near,
    assert_same,
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
from deftx_kernels import CSRMask, SparseAdamW, distributed

WORLD = 4


def test_training():
    run_ranks((_training, _other_options, _mixed_precision, _grad_scaler), WORLD)


def test_state(tmp_path):
    functions = (partial(_checkpoints, tmp_path), _full_state_dict, _state_dict, _update_mask)
    run_ranks(functions, WORLD)


def test_placements_and_errors():
    run_ranks((_placements, _replicas, _errors, _different_ranks, _after_a_forward), WORLD)


# ---- training ----
def _training(rank):
    mask = make_mask()
    model = Model()
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
    losses, norms = train(model, optimizer, max_norm=0.3)
    for world, mesh in meshes(rank, (1, 2, 3, 4)):
        sharded = shard(Model(), mesh)
        scores = {n: p for n, p in sharded.named_parameters() if "head" not in n}
        plain = {n: p for n, p in Model().named_parameters() if n in scores}
        assert distributed.topk_mask(scores, k=30, group=mesh.get_group()) == dk.topk_mask(plain, k=30)
        optimizer = SparseAdamW(sharded.named_parameters(), mask, lr=1e-2)
        mine = train(sharded, optimizer, mesh, max_norm=0.3, parts=(1, 3, 2, 3)[world - 1])
        torch.testing.assert_close(mine[0], losses, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mine[1], norms, atol=1e-6, rtol=1e-5)
        assert_equal_on_all(mine[1], mesh)
        assert_near(found := whole(sharded), whole(model))
        assert_untouched(found, mask)
        # Compact state of this rank's entries only
        local = distributed.local_mask(mask, dict(sharded.named_parameters()))
        sizes = {n: optimizer.state[p]["exp_avg"].numel() for n, p in sharded.named_parameters() if n in mask}
        assert sizes == {n: s["nnz"] for n, s in local.summary().items()}
        if world > 1:
            assert local.nnz < mask.nnz
        # torch's clipping counts every entry
        sharded(IDS).sum().backward()
        norm = nn.utils.clip_grad_norm_(sharded.parameters(), 1.0).full_tensor()
        assert norm > optimizer.clip_grad_norm_(1.0)


def set_grads(model, step, mesh):
    """The same on any number of ranks; in one step some parameters have none."""
    for i, p in enumerate(model.parameters()):
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(p.dtype)
        if mesh is not None:
            from torch.distributed.tensor import distribute_tensor

            grad = distribute_tensor(grad, mesh, p.placements, src_data_rank=None)
        p.grad = None if step == 2 and i < 3 else grad


def _other_options(rank):
    """Two groups, decay to a point, L1, bfloat16 with a float32 copy, moments in bfloat16."""
    mask = make_mask()
    point = torch.randn(mask.nnz, generator=torch.Generator().manual_seed(3))
    for dtype, options in (
        (torch.float32, dict(l1=1e-3, maximize=True)),
        (torch.bfloat16, dict(master=True)),
        (torch.float32, dict(state_dtype=torch.bfloat16)),
    ):

        def groups(model):
            named = list(model.named_parameters())
            return [{"params": named[:2], "lr": 5e-3}, {"params": (pair for pair in named[2:])}]

        models = [Model().to(dtype)]
        optimizers = [SparseAdamW(groups(models[0]), mask, lr=1e-2, weight_decay=0.1, decay_to=point, **options)]
        for step in range(4):
            set_grads(models[0], step, None)
            optimizers[0].step()
        for _, mesh in meshes(rank, (2, 4)):
            model = shard(Model().to(dtype), mesh)
            optimizer = SparseAdamW(groups(model), mask, lr=1e-2, weight_decay=0.1, decay_to=point, **options)
            for step in range(4):
                set_grads(model, step, mesh)
                optimizer.step()
            assert_same(whole(model), whole(models[0]))  # the gradients are equal bit by bit


def _mixed_precision(rank):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mask = make_mask()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = Model()
    losses, _ = train(model, SparseAdamW(model.named_parameters(), mask, lr=1e-2))
    for _, mesh in meshes(rank, (2, 4)):
        sharded = shard(Model(), mesh, mp_policy=policy)
        optimizer = SparseAdamW(sharded.named_parameters(), mask, lr=1e-2)
        mine, norms = train(sharded, optimizer, mesh, max_norm=float("inf"))
        assert {p.dtype for p in sharded.parameters()} == {torch.float32}
        torch.testing.assert_close(mine.float(), losses, atol=0.02, rtol=0.02)
        assert_equal_on_all(norms, mesh)
        assert_untouched(whole(sharded), mask)


def _grad_scaler(rank):
    """A loss that overflows on one rank skips the step of all."""
    for world, mesh in meshes(rank, (2,)):
        model, mask = shard(Model(), mesh), make_mask()
        optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for i in range(3):
            before = whole(model)
            optimizer.zero_grad()
            loss = (model(IDS) - TARGET).square().mean()
            scaler.scale(loss * (float("inf") if i == 1 and rank == world - 1 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before["embedding.weight"], whole(model)["embedding.weight"]) == (i == 1)
        assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}


# ---- state ----
def start(mesh, mask):
    model = Model() if mesh is None else shard(Model(), mesh)
    return model, SparseAdamW(model.named_parameters(), mask, lr=1e-2, master=True)


def _checkpoints(folder, rank):
    pairs = (2, 4), (4, 2), (2, 1), (1, 2), (4, None), (None, 4), (2, 2)
    check_checkpoints(rank, folder, partial(start, mask=make_mask()), pairs)


def _full_state_dict(rank):
    """Whole tensors on rank 0, broadcast to other ranks than they came from."""
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
    model, optimizer = start(mesh := mesh_of(WORLD), mask)
    options = dsd.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dsd.set_model_state_dict(model, model_state, options=options)
    dsd.set_optimizer_state_dict(model, optimizer, optimizer_state, options=options)
    train(model, optimizer, mesh, STEPS // 2)
    found = whole(model)
    if rank < 2:
        assert_near(found, expected)


def _state_dict(rank):
    """state_dict has whole compact tensors, which a plain model takes, and the other way round."""
    mask = make_mask()
    model, optimizer = start(None, mask)
    train(model, optimizer, steps=3)
    plain = copy.deepcopy(optimizer.state_dict())
    names = optimizer.param_groups[0]["param_names"]
    for _, mesh in meshes(rank, (3, 4)):
        sharded, mine = start(mesh, mask)
        sharded_weights = dict(sharded.named_parameters())
        for name, tensor in whole(model).items():
            part = tensor.chunk(mesh.size())[mesh.get_local_rank() :][:1]
            if part:
                sharded_weights[name].detach().to_local().copy_(part[0])
        mine.load_state_dict(copy.deepcopy(plain))
        back = mine.state_dict()
        assert back["param_groups"] == plain["param_groups"]
        for i, name in enumerate(names):
            for key, expected in plain["state"][i].items():
                value = back["state"][i][key]
                assert torch.equal(value.full_tensor() if hasattr(value, "full_tensor") else value, expected), name
                assert hasattr(value, "full_tensor") == ("head" in name and key != "step")
        twin = Model()
        twin.load_state_dict(whole(sharded))
        other = SparseAdamW(twin.named_parameters(), mask, lr=1e-2, master=True)
        other.load_state_dict({"state": plain["state"], "param_groups": back["param_groups"]})
        train(sharded, mine, mesh, 3)
        train(twin, other, None, 3)
        assert_near(whole(sharded), whole(twin))
        wrong = copy.deepcopy(plain)
        if mesh.get_local_rank() == 1:  # a part in place of the whole
            wrong["state"][0]["exp_avg"] = wrong["state"][0]["exp_avg"][:3]
        before = mine.state_dict()
        with pytest.raises(ValueError, match=r"rank 1: the state's exp_avg of 'embedding.weight' has shape \[3\]"):
            mine.load_state_dict(wrong)
        assert torch.equal(mine.state_dict()["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def _update_mask(rank):
    mask, later = make_mask(0), make_mask(1)
    point = torch.randn(mask.nnz, generator=torch.Generator().manual_seed(3))
    optimizers = {}
    for world, mesh in [(0, None), *meshes(rank, (3,))]:
        model = Model() if mesh is None else shard(Model(), mesh)
        optimizers[world] = SparseAdamW(model.named_parameters(), mask, lr=1e-2, decay_to=point, master=True)
        for step in range(4):
            set_grads(model, step, mesh)
            optimizers[world].step()
            if step == 1 and mesh is not None:
                with pytest.raises(ValueError, match=r"those of rank 0 differ from those of ranks \[2\]"):
                    optimizers[world].update_mask(mask if rank == 2 else later)
                with pytest.raises(ValueError, match=r"rank 1: mask must be a CSRMask, got NoneType"):
                    optimizers[world].update_mask(None if rank == 1 else later)
            if step == 1:
                optimizers[world].update_mask(later)
        if mesh is None:
            expected = whole(model)
        else:
            assert_same(whole(model), expected)
            with pytest.raises(ValueError, match="the state was saved with another mask"):
                optimizers[world].load_state_dict(SparseAdamW(Model().named_parameters(), mask).state_dict())


# ---- placements ----
def _placements(rank):
    """DTensors without FSDP: by rows, replicated, with a sum of gradients that is pending; beside plain tensors."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    shapes = {"a": (5, 3), "b": (7,), "c": (2, 2), "d": (0, 3), "e": (6, 2), "f": (3,), "g": ()}
    placements = {"a": Shard(0), "b": Shard(0), "c": Replicate(), "d": Shard(0), "e": None, "f": None, "g": Replicate()}
    for world, mesh in meshes(rank, (2, 4)):
        generator = torch.Generator().manual_seed(0)
        tensors, grads = ({n: torch.randn(s, generator=generator) for n, s in shapes.items()} for _ in range(2))
        mask = dk.topk_mask({n: t for n, t in tensors.items() if n != "f"}, density=0.6)
        plain = {n: nn.Parameter(t.clone()) for n, t in tensors.items()}
        mine = {}
        for name, t in tensors.items():
            place = placements[name]
            mine[name] = nn.Parameter(t.clone() if place is None else distribute_tensor(t.clone(), mesh, [place]))
            plain[name].grad, mine[name].grad = grads[name].clone(), grads[name].clone()
            if name == "c":
                local = grads[name] / 2 if mesh.get_local_rank() < 2 else torch.zeros(shapes[name])
                mine[name].grad = DTensor.from_local(local, mesh, [Partial()], run_check=False)
            elif place is not None:
                mine[name].grad = distribute_tensor(grads[name].clone(), mesh, [place])
        optimizers = [SparseAdamW(params.items(), mask, lr=0.1) for params in (plain, mine)]
        for _ in range(2):
            norms = [o.clip_grad_norm_(0.1) for o in optimizers]
            torch.testing.assert_close(*norms)
            for o in optimizers:
                o.step()
        found = {n: (p if placements[n] is None else p.full_tensor()).detach() for n, p in mine.items()}
        assert_near(found, {n: p.detach() for n, p in plain.items()}, 1e-7)
        assert world == mesh.size()


def _replicas(rank):
    """Random numbers of stochastic rounding: the same for all replicas, others for each rank's rows."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = mesh_of(WORLD)
    tensors = {"a": torch.ones(4, 64), "b": torch.ones(1, 64)}
    mask = CSRMask.from_dense({n: torch.ones(t.shape, dtype=torch.bool) for n, t in tensors.items()})
    params = {}
    for (name, tensor), place in zip(tensors.items(), (Shard(0), Replicate())):
        params[name] = nn.Parameter(distribute_tensor(tensor.bfloat16(), mesh, [place]))
        params[name].grad = distribute_tensor(tensor.bfloat16(), mesh, [place])
    optimizer = SparseAdamW(params.items(), mask, lr=1e-3, stochastic_rounding=True)
    optimizer.step()
    rows = params["a"].full_tensor().detach()
    assert len(rows.unique()) == 2
    assert len(rows.float().unique(dim=0)) == WORLD
    assert_equal_on_all(params["b"].to_local().detach().float(), mesh)


# ---- errors ----
def _errors(rank):
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    mesh, mask = mesh_of(WORLD), make_mask()
    named = dict(shard(Model(), mesh).named_parameters())
    with pytest.raises(ValueError, match=r"'embedding.weight'\] is a DTensor, of which masked entries can be trained"):
        SparseAdamW(named.items(), None)
    with pytest.raises(ValueError, match=r"is a DTensor, .* without track_changes"):
        SparseAdamW(named.items(), mask, track_changes=True)
    flat = DeviceMesh("cpu", torch.arange(WORLD).view(2, 2), mesh_dim_names=("a", "b"))
    columns, twice = (torch.ones(4, 4) for _ in range(2))
    one = CSRMask.from_dense({"w": torch.eye(4, dtype=torch.bool)})
    for tensor in (
        distribute_tensor(columns, mesh, [Shard(1)]),
        distribute_tensor(twice, flat["a", "b"], [Shard(0), Shard(0)]),
    ):
        with pytest.raises(ValueError, match=r"'w' must be placed Shard\(0\) or Replicate\(\) on a 1-D mesh"):
            SparseAdamW([("w", nn.Parameter(tensor))], one)


def _different_ranks(rank):
    """Every rank raises the same error, whichever rank's argument is wrong."""
    mesh, mask = mesh_of(WORLD), make_mask()
    model = shard(Model(), mesh)
    named = [*model.named_parameters()]
    renamed = [(n + "x" if n == "head.bias" and rank == 3 else n, p) for n, p in named]
    for params, given, options, message in (
        (named, make_mask(rank // 2), {}, r"those of rank 0 differ from those of ranks \[2, 3\]"),
        (named, mask if rank else mask - mask, {}, r"those of rank 0 differ from those of ranks \[1, 2, 3\]"),
        (renamed, mask, {}, r"those of rank 0 differ from those of ranks \[3\]"),
        (named, mask, {"lr": -1.0 if rank == 1 else 1.0}, "rank 1: lr must be a number, at least 0"),
        (named if rank else named[1:], mask, {}, "rank 0: mask covers 'embedding.weight', which is not among"),
        (named, mask if rank != 2 else None, {}, r"rank 2: named_params\['embedding.weight'\] is a DTensor"),
        (named, "mask" if rank == 2 else mask, {}, "rank 2: mask must be a CSRMask or None, got str"),
        (named, mask, {"decay_to": torch.ones(3)} if rank == 1 else {}, "rank 1: decay_to must be compact"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseAdamW(params, given, **options)
    SparseAdamW(named, mask)


def _after_a_forward(rank):
    """What FSDP2 has gathered for a forward pass gets no gradient."""
    from torch.distributed.fsdp import FSDPModule

    mesh, mask = mesh_of(WORLD), make_mask()
    model = shard(Model(), mesh, reshard_after_forward=False)
    with torch.no_grad():
        model(IDS)
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
    with pytest.raises(ValueError, match=r"'embedding.weight'\] has no memory: .* `reshard\(\)` of each FSDPModule"):
        train(model, optimizer, mesh, steps=1)
    with torch.no_grad():
        model(IDS)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    before = whole(model)
    train(model, SparseAdamW(model.named_parameters(), mask, lr=1e-2), mesh, steps=1)
    assert not torch.equal(whole(model)["embedding.weight"], before["embedding.weight"])
