"""Several processes of a gloo group, for tests."""

import gc
import os
import socket
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Its processes have imported what takes long, once for all tests.
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "deftx_kernels.train.pipeline",
        "torch._dynamo",
        "torch.distributed.fsdp",
        "torch.distributed.checkpoint.state_dict",
    ]
)


def run_ranks(functions: Sequence[Callable[[int], None]], world: int) -> None:
    """Call each function, of a test file, with the rank in `world` processes of one group."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.start_processes(_process, args=(port, functions, world), nprocs=world, start_method="forkserver")


def _process(rank, port, functions, world):
    if sys.platform == "linux":  # whatever the host's name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        for function in functions:
            function(rank)
        gc.collect()  # a DDP wrapper's reducer ends before the group that it uses
        dist.barrier()  # no rank ends while another one still communicates with it
    except pytest.fail.Exception as error:  # of pytest.raises: not an Exception, so spawn would not report it
        raise AssertionError(str(error)) from error
    finally:
        dist.destroy_process_group()
