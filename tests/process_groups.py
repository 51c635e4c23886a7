"""Several processes of a gloo group, for tests."""

import gc
import importlib
import os
import socket
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(functions: Sequence[Callable[[int], None]], world: int, imports: Sequence[str] = ()) -> None:
    """Call each function, of a test file, with the rank in `world` processes of one group. `imports`: modules that take
    long to import, which is done once for all processes.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_fork, args=(port, functions, world, imports))


def _fork(_, port, functions, world, imports):
    """In a fresh process of one thread, whose imports its forks share."""
    for name in ("torch.distributed.tensor", *imports):
        importlib.import_module(name)
    torch.set_num_threads(1)
    mp.start_processes(_process, args=(port, functions, world), nprocs=world, start_method="fork")


def _process(rank, port, functions, world):
    if sys.platform == "linux":  # whatever the host's name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
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
