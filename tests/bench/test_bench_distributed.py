"""The benchmark of two processes: its count of bytes in known cases, its check, and processes that fail.

test_bench.py runs the family itself.
"""

import pytest
import torch
import torch.distributed as dist
from process_groups import run_ranks
from torch import nn

from bench import bench_distributed as family
from bench.collectives import CollectiveCounter, Traffic, written_bytes

N = 1 << 16  # elements


def test_counted_bytes():
    run_ranks((_known_collectives, _ddp, _fsdp2), 2)


def counted(function):
    """(traffic, bytes written)"""
    before = written_bytes()
    with CollectiveCounter() as counter:
        function()
    return counter.traffic, None if before is None else written_bytes() - before


def _known_collectives(rank):
    x, half = torch.ones(N), torch.ones(N // 2)
    for function, traffic in (
        (lambda: dist.all_reduce(x), Traffic(all_reduce=4 * N)),
        (lambda: dist.all_reduce(x.bfloat16()), Traffic(all_reduce=2 * N)),
        (lambda: dist.all_gather_into_tensor(x, half), Traffic(all_gather=4 * N)),
        (lambda: dist.all_gather(list(x.chunk(2)), half), Traffic(all_gather=4 * N)),
        (lambda: dist.reduce_scatter_tensor(half, x), Traffic(reduce_scatter=4 * N)),
        (lambda: dist.all_to_all_single(torch.empty(N), x), Traffic(all_to_all=2 * N)),
        (lambda: exchange(rank, x), Traffic(all_to_all=4 * (100 if rank == 0 else N - 300))),
        (dist.barrier, Traffic()),
    ):
        found, written = counted(function)
        assert found == traffic
        if written is not None:  # the operating system's count
            assert 0 <= written - found.sent_by_gloo(2) < 2000
    with pytest.raises(RuntimeError, match="the bytes of the collective broadcast_ are not known"):
        counted(lambda: dist.broadcast(x, 0))


def exchange(rank, x):
    """100 elements to rank 1, and all but 300 to rank 0."""
    sent = [[N - 100, 100], [N - 300, 300]]
    received = [row[rank] for row in sent]
    dist.all_to_all_single(torch.empty(sum(received)), x, received, sent[rank])


def backward(model):
    return lambda: model(torch.ones(2, 64)).sum().backward()


def _ddp(rank):
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 3)))
    for _ in range(2):  # the second one makes DDP's buckets anew
        backward(model)()
    assert counted(backward(model))[0] == Traffic(all_reduce=4 * (65 * 300 + 301 * 3))


def _fsdp2(rank):
    """The layer is gathered twice, the rest once; three rows are padded to four."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(64, 300), nn.Linear(300, 3))
    fully_shard(model[0])
    fully_shard(model)
    backward(model)()
    layer, rest = 4 * 65 * 300, 4 * 301 * 4
    assert counted(backward(model))[0] == Traffic(all_gather=2 * layer + rest, reduce_scatter=layer + rest)


@pytest.mark.parametrize(
    ("losses", "fault"),
    [
        ([1.1, 1.0, 0.9], None),
        ([1.10001, 1.0, 0.9], "loss 1.10001 after 0 steps, in one process 1.1"),
        ([1.1, 1.0, 0.903], "loss 0.903 after 2 steps"),
        ([1.1, 1.1, 1.1], "loss 1.1 after 1 steps"),
        ([1.1, float("nan"), 0.9], "loss nan after 1 steps"),
    ],
)
def test_losses_are_those_of_one_process(losses, fault):
    found = family.wrong_losses(losses, [1.1, 1.0, 0.9])
    assert found is None if fault is None else found.startswith(fault)


def test_a_process_that_fails_is_an_error_and_all_end(tmp_path):
    processes = family.Processes(family.OURS, "tiny", torch.float32, tmp_path / "missing")
    with pytest.raises(RuntimeError, match=r"(?s)process 0: .*missing"):
        processes()
    processes.close()
    assert not any(p.is_alive() for p in processes.members)
