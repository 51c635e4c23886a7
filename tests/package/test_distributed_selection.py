"""Selection and denoising over one to four of four gloo processes, against one process: the same bits."""

import copy
from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from process_groups import run_ranks
from torch import nn

import deftx_kernels as dk
from deftx_kernels import distributed
from deftx_kernels.denoise.plans import Layout, work
from deftx_kernels.denoise.rule import check_rule
from deftx_kernels.select import streaming
from deftx_kernels.select.divided import Division

WORLD = 4


def test_selection_and_denoising():
    run_ranks((_topk_mask, _select_mask, _tied_names, _svd_denoise, _bytes, _layer), WORLD)


def test_starting_masks_and_errors():
    run_ranks((_init_mask, _after_a_forward, _errors, _errors_of_entries), WORLD)


# ---- tensors and their placements ----
@cache
def mesh_of(world):
    """The mesh of the first `world` ranks. Every rank makes each one."""
    from torch.distributed.tensor import DeviceMesh

    return DeviceMesh("cpu", list(range(world)))


def meshes(rank, worlds=(1, 2, 3, 4)):
    """(number of ranks, mesh), of those that this rank is part of."""
    found = [(world, mesh_of(world)) for world in worlds]
    return [(world, mesh) for world, mesh in found if rank < world]


SHAPES = {  # uneven rows, ranks without rows, matrices of every kind of truncation, several of one shape
    "wide": (61, 90),
    "tall": (90, 61),
    "tall2": (90, 61),
    "experts": (5, 44, 40),
    "conv": (6, 3, 3, 3),
    "bias": (7,),
    "row": (1, 40),
    "empty": (0, 4),
}
NUMEL = 25_479


def randn(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def tied_scores():
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randint(-3, 4, s, generator=generator).float() for n, s in SHAPES.items()}


def part(tensor, world, rank):
    """This rank's rows, as torch.chunk divides them."""
    chunks = tensor.chunk(world) if len(tensor) else ()
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def shard(tensors, mesh, replicated=False):
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Replicate() if replicated else Shard(0)]
    found, rank = {}, mesh.get_local_rank()
    for name, t in tensors.items():
        local = t if replicated else part(t, mesh.size(), rank)
        found[name] = DTensor.from_local(local, mesh, placements, run_check=False, shape=t.shape, stride=t.stride())
    return found


def placements(tensors, mesh):
    """kind → tensors: sharded, replicated DTensors, whole."""
    return {"sharded": shard(tensors, mesh), "replicated": shard(tensors, mesh, replicated=True), "whole": tensors}


def same(found, expected):
    one, other = (t.reshape(-1).view(torch.uint8) for t in (found, expected))
    return found.shape == expected.shape and torch.equal(one, other)


# ---- topk_mask ----
def _topk_mask(rank):
    scores = tied_scores()
    mixed = {n: t.to(torch.bfloat16 if n < "e" else torch.float64) for n, t in randn(0).items()}
    for world, mesh in meshes(rank):
        group = mesh.get_group()
        for tensors, sizes in (
            (scores, [("global", dict(k=k)) for k in (0, 1234, NUMEL)] + [("row", dict(density=0.4))]),
            (scores, [("tensor", dict(density=0.3)), ("tensor", dict(density=1))][: world - 1]),
            (mixed, [(("global", "tensor", "row")[world % 3], dict(density=0.1))]),
        ):
            local = {n: part(t, world, rank) for n, t in tensors.items()}
            for scope, size in sizes:
                expected = dk.topk_mask(tensors, scope=scope, **size)
                take = partial(distributed.topk_mask, scope=scope, group=group, **size)
                found = [take(local)] if world % 2 else [take(tensors, replicated=True)]
                found += [take(t) for t in placements(tensors, mesh).values() if t is not tensors]
                assert all(mask == expected for mask in found), (world, scope, size)
    # Rows that are divided in other ways; a tensor of which one rank has all rows
    if rank < 2:
        rows = [{"a": scores["wide"][:50], "b": scores["row"]}, {"a": scores["wide"][50:], "b": scores["row"][:0]}]
        expected = dk.topk_mask({"a": scores["wide"], "b": scores["row"]}, k=7, scope="tensor")
        assert distributed.topk_mask(rows[rank], k=7, scope="tensor", group=mesh_of(2).get_group()) == expected
    zero = {"scale": torch.tensor(3.0), "w": torch.ones(5)}
    assert distributed.topk_mask(zero, k=2, replicated=True) == dk.topk_mask(zero, k=2)


# ---- select_mask ----
RULES = (
    dict(density=0.1),
    dict(density=0.2, scope="tensor", energy=0.9),
    dict(k=900, rank=5, residual_density=0.05, denoise_names=["tall", "tall2", "conv", "experts"]),
    dict(density=0.3, scope="row", rank="gavish-donoho", names=["wide", "experts", "bias", "row"]),
)
KINDS = (("sharded", "sharded"), ("whole", "whole"), ("sharded", "whole"), ("replicated", "sharded"))


def _select_mask(rank):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(streaming, "_MIN_GROUP", (1, 1))  # several groups, one after the other, on one process
        _select_like_one_process(rank)
    ties = tied_scores()
    pair = shard(ties, mesh_of(WORLD)), {n: torch.zeros_like(t) for n, t in ties.items()}
    calls = []
    found = distributed.select_mask(*pair, k=5000, progress=lambda *done: calls.append(done))
    assert found == dk.topk_mask(ties, k=5000)
    assert calls == [(8, 8)]


def _select_like_one_process(rank):
    for seed, dtypes, worlds in (
        (0, (torch.float32, torch.float32), (1, 2, 3, 4)),
        (2, (torch.bfloat16, torch.float32), (3,)),
    ):
        tuned, base = randn(seed, dtypes[0]), randn(seed + 1, dtypes[1])
        expected = [dk.select_mask(tuned, base, return_info=True, **rule) for rule in RULES]
        for world, mesh in meshes(rank, worlds):
            models = [placements(m, mesh) for m in (tuned, base)]
            for i, (rule, (mask, infos)) in enumerate(zip(RULES, expected)):
                for kinds in dict.fromkeys((KINDS[0], KINDS[(i + world) % 4])):
                    pair = [m[kind] for m, kind in zip(models, kinds)]
                    found = distributed.select_mask(*pair, **rule, group=mesh.get_group(), return_info=True)
                    assert found[0] == mask, (world, kinds, rule)
                    assert_same_infos(found[1], infos)


def assert_same_infos(found, expected):
    assert found.keys() == expected.keys()
    for name, info in expected.items():
        if info is None:
            assert found[name] is None
        else:
            assert all(same(found[name][key], info[key]) for key in info), name


def _tied_names(rank):
    """A tied tensor counts once; a rank without rows of it cannot see that it is tied."""
    tuned, base = randn(0), randn(1)
    for model in (tuned, base):
        model["head"] = model["row"]
    separate = base | {"head": base["row"].clone()}
    different = base | {"head": base["row"].clone()}
    different["head"][0, 0] += 1
    for world, mesh in meshes(rank, (2, 4)):
        select = partial(distributed.select_mask, k=700, group=mesh.get_group())
        for old in (base, separate, different):
            models = []
            for model in (tuned, old):
                models.append(shard(model, mesh))
                if model["head"] is model["row"]:
                    models[-1]["head"] = models[-1]["row"]
            expected = dk.select_mask(tuned, old, k=700)
            assert select(*models) == expected, world
            assert ("head" in expected) == (old is different)
        del models[0]["row"]  # of the tied names the tuned model has one only
        models[1]["head"] = models[1]["row"]
        assert select(*models) == dk.select_mask({n: t for n, t in tuned.items() if n != "row"}, base, k=700)
        scores = shard(tuned, mesh)
        scores["head"] = scores["row"]
        assert distributed.topk_mask(scores, k=99, group=mesh.get_group()) == dk.topk_mask(tuned, k=99)


# ---- svd_denoise ----
def _svd_denoise(rank):
    from torch.distributed.tensor import DTensor

    delta = randn(4) | {"wide16": randn(5, torch.bfloat16)["wide"]}
    delta["large"] = delta["tall"] * 1e25  # scaled, to be computed
    for options in (
        dict(energy=0.8),
        dict(rank=5, residual_density=0.05, n_iter=3),
        dict(rank=5, generator=3, batch_bytes=1 << 16),
        dict(rank=2, residual_density=1.0),
    ):
        seed = options.pop("generator", None)

        def denoise(function, tensors, seed=seed, options=options, **others):
            generator = {} if seed is None else {"generator": torch.Generator().manual_seed(seed)}
            return function(tensors, return_info=True, **options, **generator, **others)

        expected, expected_infos = denoise(dk.svd_denoise, delta)
        for world, mesh in meshes(rank, (2, 3, 4)):
            placed = placements(delta, mesh)
            for kind in ("sharded", ("whole", "replicated")[world % 2]):
                tensors = placed[kind]
                found, infos = denoise(distributed.svd_denoise, tensors, group=mesh.get_group())
                assert list(found) == list(delta)
                assert_same_infos(infos, expected_infos)
                for name, tensor in found.items():
                    whole = part(expected[name], world, rank) if kind == "sharded" else expected[name]
                    if kind != "whole":
                        assert tensor.placements == tensors[name].placements
                        assert tensor.shape == delta[name].shape
                        assert tensor.stride() == expected[name].stride()
                    assert isinstance(tensor, DTensor) == (kind != "whole")
                    local = tensor.to_local() if kind != "whole" else tensor
                    assert same(local, whole), (world, kind, name, options)
    one = distributed.svd_denoise(shard({"w": delta["wide"]}, mesh_of(WORLD))["w"], rank=3)
    assert same(one.full_tensor(), dk.svd_denoise(delta["wide"], rank=3))
    pair = distributed.svd_denoise((delta["tall"], delta["bias"]), energy=0.5)
    assert isinstance(pair, tuple)
    assert same(pair[0], dk.svd_denoise(delta["tall"], energy=0.5))
    calls = []
    distributed.svd_denoise(delta, energy=0.5, progress=lambda *done: calls.append(done))
    total = [None] * WORLD
    dist.all_gather_object(total, calls[-1])
    assert all(done == count for done, count in total)
    assert sum(count for _, count in total) == 3 + 5 + 6 * 3 + 1 + 2


def _bytes(rank):
    """A rank receives the rows of the matrices that it denoises, once, and no others."""
    generator = torch.Generator().manual_seed(0)
    layers = {f"{i}.w": torch.randn(50 + i, 70 - 3 * i, generator=generator) for i in range(9)}
    layers |= {"stack": torch.randn(5, 33, 40, generator=generator), "bias": torch.randn(50, generator=generator)}
    sharded, zeros = (shard(m, mesh_of(WORLD)) for m in (layers, {n: torch.zeros_like(t) for n, t in layers.items()}))
    received, transfer = [], dist.batch_isend_irecv

    def counting(operations):
        received.extend(x.tensor.nbytes for x in operations if x.op is dist.irecv)
        return transfer(operations)

    divided, made = Division.of, []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "batch_isend_irecv", counting)
        patched.setattr(Division, "of", lambda *arguments: made.append(divided(*arguments)) or made[-1])
        distributed.select_mask(sharded, zeros, density=0.1, energy=0.9)
    (division,) = made
    matrices = {n: t for n, t in layers.items() if t.dim() > 1}
    assert sorted(division.owners) == sorted(matrices)
    mine = [t for n, t in matrices.items() if division.owners[n] == rank]
    assert sum(received) == sum(t.nbytes - part(t, WORLD, rank).nbytes for t in mine)
    # The least loaded rank has at most one list of tensors less than the most loaded one.
    rule, loads = check_rule(None, 0.9, 0.0), [0.0] * WORLD
    costs = [sum(work(Layout.of(layers[n]), rule) for n in names) for names in division.lists]
    for names, cost in zip(division.lists, costs):
        loads[division.owners[names[0]]] += cost
    assert max(loads) - min(loads) <= max(costs)
    received.clear()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dist, "batch_isend_irecv", counting)
        distributed.select_mask(sharded, zeros, density=0.1)
    assert not received


def _layer(rank):
    """The size of a layer of a real model, with two threads."""
    if rank > 1:
        return
    torch.set_num_threads(2)
    generator, group = torch.Generator().manual_seed(0), mesh_of(2).get_group()
    shapes = {"fc1": (3072, 768), "fc2": (768, 3072), "q": (768, 768), "bias": (3072,)}
    tuned = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    base = {n: torch.zeros(s) for n, s in shapes.items()}
    for rule in (dict(energy=0.5, residual_density=0.05), dict(rank=16)):
        found = distributed.select_mask(
            *(shard(m, mesh_of(2)) for m in (tuned, base)), density=0.05, **rule, group=group
        )
        if rank == 0:
            assert found == dk.select_mask(tuned, base, density=0.05, **rule)
    torch.set_num_threads(1)


# ---- init_mask ----
class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(45, 40))


Conv1D.__module__ = "transformers.pytorch_utils"


def _init_mask(rank):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 90), nn.Linear(90, 3), Conv1D(), nn.Conv2d(2, 3, 3), nn.LayerNorm(4))
    methods = [("magnitude", {}), ("random", dict(seed=5)), ("lift", dict(rank=2))]
    for world, mesh in meshes(rank, (2, 3, 4)):
        sharded, group = copy.deepcopy(model), mesh.get_group()
        for layer in (*sharded, sharded):
            fully_shard(layer, mesh=mesh)
        scope, targets = (("tensor", "all-linear"), ("global", ["0", "3"]), ("row", "[12]"))[world - 2]
        for method, options in methods:
            options = dict(method=method, target_modules=targets, scope=scope, density=0.2) | options
            expected = dk.init_mask(model, **options)
            for given in (model, sharded):
                assert distributed.init_mask(given, **options, group=group) == expected, (world, options)
    assert dk.init_mask(model, method="magnitude", k=1).names == ("0.weight", "1.weight", "2.weight")
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert distributed.init_mask(wrapped, density=0.1, rank=3) == dk.init_mask(model, density=0.1, rank=3)


def _after_a_forward(rank):
    """A forward without a backward leaves gathered copies, here in bfloat16, in place of the root's parameters."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    base, tuned = nn.Linear(40, 30), nn.Linear(40, 30)
    with torch.no_grad():
        tuned.weight.copy_(base.weight + 1e-4 * tuned.weight)
    expected, patch = dk.select_mask(tuned, base, density=0.1), dk.SparsePatch.diff(base, tuned)
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.bfloat16)):
        model = fully_shard(copy.deepcopy(tuned), mesh=mesh_of(WORLD), mp_policy=policy)

        def forward(model=model):
            with torch.no_grad():
                model(torch.ones(1, 40))
            return model

        assert distributed.select_mask(forward(), base, density=0.1) == expected
        distributed.apply_patch_(patch, forward())
        found = dk.nn.plain_tensors(forward())
        assert all(torch.equal(found[n].full_tensor(), p) for n, p in base.named_parameters())


# ---- errors ----
def assert_fails(call, message):
    """A ValueError on every rank, with the same message."""
    with pytest.raises(ValueError, match=message) as error:
        call()
    everyone = [None] * WORLD
    dist.all_gather_object(everyone, str(error.value))
    assert len(set(everyone)) == 1, everyone


def _errors(rank):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, two = mesh_of(WORLD), rank == 2
    plain = {n: t for n, t in randn(0).items() if n in ("wide", "bias")}
    tuned = shard(plain, mesh)
    other = {"wide": torch.randn(61, 91), "bias": plain["bias"]}
    columns = {n: distribute_tensor(t, mesh, [Shard(t.dim() - 1)]) for n, t in plain.items()}
    whole = {"wide": distribute_tensor(plain["wide"], mesh, [Replicate()])}
    more, fewer = plain | ({"x": plain["bias"]} if two else {}), {n: t for n, t in plain.items() if n < "c" or not two}
    take, select = distributed.topk_mask, distributed.select_mask
    both = partial(select, tuned, plain, k=1)
    for call, message in (
        (lambda: take(tuned, k=1 + two), "k must be the same on all ranks, got 1 on rank 0 and 2 on rank 2"),
        (lambda: take(tuned, k=1, scope="tensor" if two else "row"), "scope must be the same"),
        (lambda: take(plain, k=1, replicated=two), "replicated must be the same on all ranks, got False on rank 0"),
        (lambda: take(tuned, k=-1), "k must be at least 0"),
        (lambda: take({} if two else plain, k=1), "rank 2: scores must be a mapping"),
        (lambda: take(more, k=1), "scores must have the same tensors on all ranks: rank 0 has no 'x'"),
        (lambda: take(fewer, k=1), "rank 2 has no 'wide'"),
        (lambda: take(other if two else plain, k=1), r"scores\['wide'\] must be one tensor, got rows \[61, 90\]"),
        (
            lambda: take(plain if two else tuned, k=1),
            r"got sharded \[61, 90\] torch.float32 \(cpu\) on rank 0",
        ),
        (lambda: take(columns, k=1), r"rank 0: tensor 'wide' must be placed Shard\(0\) or Replicate"),
        (lambda: take({"wide": [1]} if two else plain, k=1), r"rank 2: scores\['wide'\] must be a torch.Tensor"),
        (lambda: take({"x": torch.ones(2, device="meta" if two else "cpu")}, k=1), r"rank 2: scores\['x'\] is on meta"),
        (lambda: select(tuned, plain, density=0.1, energy=0.5 + two / 4), "energy must be the same .* 0.5 .* 0.75"),
        (lambda: both(names=["wide", "bias"][: 1 + two]), r"names must be the same .* \['wide'\] on rank 0 and"),
        (lambda: both(rank=1, denoise_names=["x"]), "denoise_names holds 'x'"),
        (lambda: both(names=(n for n in ["wide"] if fewer[n] is not None)), "rank 2: 'wide'"),
        (lambda: both(names=[]), "rank 0: names has no tensor to select from"),
        (lambda: select(tuned, plain, density=float("nan")), r"density must be in \[0, 1\], got nan"),
        (lambda: both(residual_density=0.5), "rank 0: residual_density = 0.5 needs a rank"),
        (lambda: select(tuned, plain, k=10**6), "k = 1000000 is more than the 5497 entries"),
        (lambda: select(tuned, other if two else plain, k=1), r"rank 2: tensor 'wide' has shape \[61, 90\] in tuned"),
        (lambda: select(other if two else plain, whole, k=1), r"rank 2: tensor 'wide' has shape \[61, 91\] in tuned"),
        (lambda: select(plain if two else tuned, plain, k=1), r"tuned\['wide'\] must be one tensor, got sharded"),
        (lambda: select({} if two else tuned, plain, k=1), "rank 2: tuned lacks tensor 'bias'"),
        (lambda: select(tuned, fewer, k=1), "base must have the same tensors on all ranks: rank 2 has no 'wide'"),
    ):
        assert_fails(call, message)
    denoise, init = distributed.svd_denoise, partial(distributed.init_mask, k=1)
    model, targets = nn.Sequential(nn.Linear(3, 4)), ["x"] if two else "all-linear"
    generator = torch.Generator().manual_seed(rank)
    for call, message in (
        (lambda: denoise(tuned, rank=1 + two), "rank must be the same on all ranks"),
        (lambda: denoise(tuned, rank=1, energy=0.5), "rank 0: exactly one of rank and energy"),
        (lambda: denoise(columns["wide"], rank=1), "must be placed"),
        (lambda: denoise([plain["wide"]] * (1 + two), rank=1), "rank 0 has no 1"),
        (lambda: denoise(plain, rank=1, generator=3 if two else None), "rank 2: generator must be a torch.Generator"),
        (lambda: denoise(plain, rank=1, generator=generator), "the state of generator must be the same"),
        (lambda: init(model, method="fisher"), "rank 0: method must be one of lift, magnitude, random"),
        (lambda: init(model, method="random", seed=rank), "seed must be the same"),
        (lambda: init(model, target_modules=["0"] if two else "all-linear"), "target_modules must be the same"),
        (lambda: init(model, target_modules=targets), "rank 2: target_modules: 'x' matches no module"),
        (lambda: init(nn.Sequential(nn.Linear(3, 4 + two))), r"model\['0.weight'\] must be one tensor, got whole"),
    ):
        assert_fails(call, message)


def _errors_of_entries(rank):
    """NaN in the rows of one rank, at a position in the whole tensor; an error while denoising."""
    mesh = mesh_of(WORLD)
    tensors = {n: t for n, t in randn(0).items() if n in ("wide", "bias", "experts")}
    zeros = {n: torch.zeros_like(t) for n, t in tensors.items()}
    for name, index, owner in (("wide", 50 * 90 + 2, 3), ("bias", 4, 2), ("experts", 4 * 44 * 40 + 7, 2)):
        bad = {n: t.clone() for n, t in tensors.items()}
        bad[name].view(-1)[index] = float("nan")
        holds = f"holds nan at flat index {index}: every entry must be finite"
        for size in (dict(k=1), dict(k=1, scope="tensor"), dict(k=1, energy=0.9)):
            sharded = shard(bad, mesh)
            select = partial(distributed.select_mask, sharded, zeros, **size)
            assert_fails(select, rf"rank {owner}: tuned\['{name}'\] - base\['{name}'\] {holds}")
        assert_fails(lambda s=sharded: distributed.topk_mask(s, k=1), rf"rank {owner}: scores\['{name}'\] {holds}")
        assert_fails(lambda s=sharded: distributed.svd_denoise(s, rank=1), rf"rank {owner}: delta\['{name}'\] {holds}")
        for size in (dict(k=1), dict(k=1, rank=1)):
            pair = (bad if rank == 1 else tensors, zeros)  # replicated, wrong on one rank: seen where that one reads it
            owners = Division.of(dict.fromkeys(bad), {n: Layout.of(t) for n, t in sorted(bad.items())}, None).owners
            if len(size) == 1 and owners[name] == 1:
                assert_fails(partial(distributed.select_mask, *pair, **size), holds)

    def progress(done, total):
        if rank == 1:
            raise KeyError("progress")

    assert_fails(lambda: distributed.svd_denoise(tensors, rank=1, progress=progress), "rank 1: 'progress'")
