"""Masks over two gloo processes; DDP over a sparsified and over a plain model."""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from process_groups import run_ranks
from torch import nn

import deftx_kernels as dk
from deftx_kernels import distributed

WORLD = 2


def test_two_processes():
    run_ranks((_masks, _agreement, _ddp, _masked_allreduce_hook), WORLD)


def tied_scores():
    generator = torch.Generator().manual_seed(0)
    return {
        "b": torch.randint(-5, 5, (7, 6), generator=generator).float(),
        "a": torch.randint(-5, 5, (9,), generator=generator).float(),
        "c": torch.zeros(1, 3),
    }


def _masks(rank):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    full = tied_scores()
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
    with pytest.raises(ValueError, match="rank 0 has none"):
        distributed.broadcast_mask(None)


# ---- DDP ----
IDS = torch.arange(16).view(4, 4) % 20
TARGET = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(1))


def model_and_mask():
    """A masked embedding and layer; the last layer is outside the mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 6), nn.Linear(6, 4))
    scores = {n: torch.randn(p.shape) for n, p in model.named_parameters() if not n.startswith("2")}
    return model, dk.topk_mask(scores, density=0.3)


def train(model, optimizer, rows, parts=1, steps=5):
    """`parts`: over how many backward passes a gradient is accumulated, synchronised in the last one."""
    for _ in range(steps):
        optimizer.zero_grad()
        for i, (ids, target) in enumerate(zip(IDS[rows].chunk(parts), TARGET[rows].chunk(parts))):
            with nullcontext() if i == parts - 1 else model.no_sync():
                ((model(ids) - target).square().mean() / parts).backward()
        optimizer.step()


def one_process():
    """The weights after training with the whole batch."""
    model, mask = model_and_mask()
    train(model, dk.SparseAdamW(model.named_parameters(), mask, lr=1e-2), slice(None))
    return dict(model.named_parameters()), mask


def check_weights(found, rank):
    """Near those of one process; equal on all ranks, and at the start's entries outside the mask, bit by bit."""
    expected, mask = one_process()
    start, chosen = model_and_mask()[0].state_dict(), mask.to_dense()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
        everyone = [torch.empty_like(tensor) for _ in range(WORLD)]
        dist.all_gather(everyone, tensor.detach())
        assert torch.equal(*everyone), name
        if name in chosen:
            assert torch.equal(tensor[~chosen[name]], start[name][~chosen[name]]), name


def _ddp(rank):
    """Two ranks with half a batch each take the steps of one process with the whole one, and send compact gradients."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    rows = slice(2 * rank, 2 * rank + 2)
    for parts in (1, 2):
        model, mask = model_and_mask()
        dk.sparsify(model, mask)
        sent = []

        def count_hook(state, bucket, sent=sent):
            sent.append(bucket.buffer().nbytes)
            return default_hooks.allreduce_hook(state, bucket)

        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(None, count_hook)
        train(wrapped, dk.SparseAdamW(wrapped.named_parameters(), mask, lr=1e-2), rows, parts)
        size = 4 * (mask.nnz + 6 * 4 + 4)
        assert sum(sent) == 5 * size  # nothing in no_sync
        logged = wrapped._get_ddp_logging_data()
        assert sum(map(int, logged["bucket_sizes"].split(","))) == size
        check_weights(dict(dk.densify(model).named_parameters()), rank)


def _masked_allreduce_hook(rank):
    """SparseAdamW on a plain model: masked entries of dense gradients are sent, and whole gradients of the rest."""
    rows = slice(2 * rank, 2 * rank + 2)
    all_reduce, sent = dist.all_reduce, []

    def counting(tensor, *args, **options):
        sent.append(tensor.nbytes)
        return all_reduce(tensor, *args, **options)

    for parts, options in ((1, {}), (2, {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True})):
        model, mask = model_and_mask()
        state = distributed.MaskedAllreduceState(model.named_parameters(), mask)
        wrapped = nn.parallel.DistributedDataParallel(model, **options)
        wrapped.register_comm_hook(state, distributed.masked_allreduce_hook)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(dist, "all_reduce", counting)
            train(wrapped, dk.SparseAdamW(wrapped.named_parameters(), mask, lr=1e-2), rows, parts)
        assert sum(sent) == 5 * 4 * (mask.nnz + 6 * 4 + 4)
        assert (len(sent) > 5) == bool(options)
        assert sum(part.nnz for part in state._of_buckets.values()) == mask.nnz  # DDP's first buckets are gone
        sent.clear()
        check_weights(dict(model.named_parameters()), rank)
        for name, chosen in mask.to_dense().items():
            grad = model.get_parameter(name).grad
            assert not grad[~chosen].any()
            assert grad[chosen].any() or not chosen.any()
    frozen = [(n, p.requires_grad_(n != "0.weight")) for n, p in model_and_mask()[0].named_parameters()]
    named = list(model.named_parameters())
    for params, given, message in (
        (named, mask if rank else mask - mask, r"that of ranks \[1\]"),
        (frozen if rank else named, mask, "rank 1: mask covers '0.weight', which is not among the trainable"),
        (named, None if rank else mask, "rank 1: mask must be a CSRMask, got NoneType"),
        ([(n, p.T if p.dim() > 1 else p) for n, p in named], mask, r"rank 0: '0.weight' has shape \[8, 20\], the mask"),
    ):
        with pytest.raises(ValueError, match=message):
            distributed.MaskedAllreduceState(params, given)
    state.update_mask(mask - mask)
    train(wrapped, dk.SparseAdamW(wrapped.named_parameters(), mask, lr=1e-2), rows, steps=1)
    assert not any(model.get_parameter(name).grad.any() for name in mask.names)
