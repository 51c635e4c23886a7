"""The bytes of a step's collectives: by formula, counted in a step, and as written to sockets.

A `Traffic` is what one rank's collectives hold. `CollectiveCounter` adds it up in a step that it watches;
bench/scale.py computes it from shapes. `sent` is what a rank then sends with ring algorithms, as NCCL's.
`sent_by_gloo` is what gloo sends: its reduce-scatter is an all-reduce. `written_bytes` are counted by the operating
system, and so check both.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Traffic:
    """Bytes of the whole tensors of one rank's collectives."""

    all_reduce: float = 0
    all_gather: float = 0  # of the results
    reduce_scatter: float = 0  # of the inputs
    all_to_all: float = 0  # of what goes to other ranks

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends with ring algorithms: an all-reduce is a reduce-scatter and an all-gather."""
        rings = 2 * self.all_reduce + self.all_gather + self.reduce_scatter
        return rings * (ranks - 1) / ranks + self.all_to_all

    def sent_by_gloo(self, ranks: int) -> float:
        return Traffic(self.all_reduce + self.reduce_scatter, self.all_gather, 0, self.all_to_all).sent(ranks)


class CollectiveCounter(TorchDispatchMode):
    """Adds up this rank's collectives while it is active, in `traffic`.

    Every call of a process group, by DDP's reducer in C++, by FSDP2 or by `torch.distributed`, is an operator of the
    dispatcher (`c10d::allreduce_`), which this mode sees with its tensors. All groups are that of all ranks.
    RuntimeError for a collective whose bytes it does not know: nothing stays uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(t.__name__ == "DTensor" for t in types):
            return NotImplemented  # its own operators come through here
        if "c10d" in func.namespace:
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: tuple) -> None:
        if name == "allreduce_":
            self.traffic.all_reduce += _bytes(args[0])
        elif name in ("_allgather_base_", "allgather_"):
            self.traffic.all_gather += _bytes(args[0])
        elif name == "_reduce_scatter_base_":
            self.traffic.reduce_scatter += _bytes(args[1])
        elif name == "alltoall_base_":
            rows, sizes = args[1], list(args[4])
            kept = sizes[dist.get_rank()] / sum(sizes) if any(sizes) else 1 / dist.get_world_size()
            self.traffic.all_to_all += _bytes(rows) * (1 - kept)
        elif name != "barrier":
            raise RuntimeError(f"the bytes of the collective {name} are not known")


def _bytes(tensors: Any) -> int:
    return tensors.nbytes if isinstance(tensors, Tensor) else sum(map(_bytes, tensors))


def written_bytes() -> int | None:
    """Bytes that all threads of this process have written to files and sockets; None where the system does not count
    them. (Linux does: /proc/self/io. Gloo's TCP transport writes with `writev`, which counts.)"""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))
    except (OSError, StopIteration):
        return None
