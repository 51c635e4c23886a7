"""Group-wide selection and masks over two gloo processes, and DDP over a sparsified model."""

import pytest
import torch
from process_groups import run_ranks
from torch import nn

import deftx_kernels as dk
from deftx_kernels import distributed

WORLD = 2


def test_two_processes():
    run_ranks((_selection, _agreement, _ddp), WORLD)


def tied_scores():
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randint(-5, 5, (7, 6), generator=generator).float(),
        "a": torch.randint(-5, 5, (9,), generator=generator).float(),
        "c": torch.zeros(1, 3),
    }


def _selection(rank):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    full = tied_scores()
    local = {n: torch.tensor_split(t, WORLD)[rank] for n, t in full.items()}
    for k in (0, 1, 10, 33, 54):
        assert distributed.topk_mask(local, k=k) == dk.topk_mask(full, k=k), k
    for dtype in (torch.bfloat16, torch.float64):
        got = distributed.topk_mask({n: t.to(dtype) for n, t in local.items()}, density=0.4)
        assert got == dk.topk_mask({n: t.to(dtype) for n, t in full.items()}, density=0.4)
    mask = dk.topk_mask(full, k=20)
    mesh = init_device_mesh("cpu", (WORLD,))
    sharded = {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in full.items()}
    assert distributed.topk_mask(sharded, k=20) == mask
    with pytest.raises(TypeError, match=r"scores\['b'\] must be a plain tensor, got a DTensor"):
        dk.topk_mask(sharded, k=20)
    alone = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("across", "alone"))["alone"]
    elsewhere = {n: distribute_tensor(t, alone, [Shard(0)]) for n, t in full.items()}
    with pytest.raises(ValueError, match=r"scores\['b'\] is on the ranks \[\d\], the group consists of \[0, 1\]"):
        distributed.topk_mask(elsewhere, k=20)
    with pytest.raises(TypeError, match=r"params\['b'\] must be a torch.Tensor, got list"):
        distributed.local_mask(mask, sharded | {"b": []})
    mine = distributed.local_mask(mask, sharded)
    for name, dense in mask.to_dense().items():
        chunks = torch.chunk(dense, WORLD)
        expected = chunks[rank] if rank < len(chunks) else dense[:0]
        assert torch.equal(mine.to_dense()[name], expected), name


def _agreement(rank):
    mask = dk.topk_mask(tied_scores(), k=20)
    assert distributed.broadcast_mask(mask if rank == 0 else None) == mask
    distributed.check_same_mask(mask)
    with pytest.raises(ValueError, match=r"ranks \[1\]"):
        distributed.check_same_mask(mask if rank else mask - mask)
    nan = float("nan") if rank else 1.0
    for scores, k, message in (
        ({"a": torch.tensor([1.0, nan])}, 1, r"rank 1: scores\['a'\] on this rank holds nan at flat index 1"),
        ({} if rank == 0 else {"a": torch.ones(2)}, 1, "rank 0: scores must be a mapping"),
        ({"a": torch.ones(2, device="meta" if rank else "cpu")}, 1, r"rank 1: scores\['a'\] is on meta"),
        ({"a": torch.ones(2)}, rank, "k and density must be the same on all ranks"),
        ({f"a{rank}": torch.ones(2)}, 1, "same names"),
    ):
        with pytest.raises(ValueError, match=message):
            distributed.topk_mask(scores, k=k)
    with pytest.raises(ValueError, match="rank 0 has none"):
        distributed.broadcast_mask(None)


def _ddp(rank):
    """Two ranks with half a batch each take the steps of one process with the whole batch."""

    def model_and_mask():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 4))
        return model, dk.topk_mask({n: torch.randn(p.shape) for n, p in model.named_parameters()}, density=0.3)

    ids, target = torch.arange(16).view(4, 4) % 20, torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1))
    results = []
    for parallel in (False, True):
        model, mask = model_and_mask()
        dk.sparsify(model, mask)
        optimizer = dk.SparseAdamW(model.named_parameters(), mask, lr=1e-2)
        wrapped = nn.parallel.DistributedDataParallel(model) if parallel else model
        mine = slice(2 * rank, 2 * rank + 2) if parallel else slice(None)
        for _ in range(5):
            optimizer.zero_grad()
            (wrapped(ids[mine]) - target[mine]).square().mean().backward()
            optimizer.step()
        results.append([p.detach().clone() for p in dk.densify(model).parameters()])
    for one, two in zip(*results):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
