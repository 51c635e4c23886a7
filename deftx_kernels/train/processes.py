"""Several processes that run one command together, started by torchrun or accelerate launch.

Training is data-parallel (DDP, in `transformers.Trainer`). Every process follows the same steps: rank 0 alone writes
files, takes locks and prints, and the others wait for it (`on_main`). All of them read the same run folder.
"""

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.over_ranks import broadcast_mask, check_same_mask

T = TypeVar("T")
TRAINING_TIMEOUT = timedelta(hours=1)
CONTROL_TIMEOUT = timedelta(days=7)  # rank 0 may wait for another run, which makes a language vector
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
OTHER_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")  # of accelerate launch

_control: Any = None  # a gloo group, also on GPUs: a GPU does nothing while it waits for rank 0
_store: Any = None  # shared by the processes; outlives them under torchrun
_alone = False  # inside of `on_main`


class FailedElsewhere(RuntimeError):
    """Rank 0 failed; it reports the error."""


# ---- the group ----


def started_together() -> int:
    """How many processes torchrun, accelerate launch or another launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: str = "auto") -> None:
    """Connect the processes that a launcher started, with a timeout above the time that rank 0 works alone.

    Nothing happens in a single process, or where they are connected.

    Raises:
        ValueError: accelerate is set to shard the model; mpirun started the processes; a machine has more of them than
            GPUs.
    """
    global _control, _store
    if "WORLD_SIZE" not in os.environ and any(int(os.environ.get(name, "1")) > 1 for name in MPI_SIZES):
        raise ValueError(
            "mpirun started several processes: start them with torchrun, or with accelerate's multi-GPU launch"
        )
    if started_together() < 2 and world_size() < 2:
        return
    for engine in OTHER_ENGINES:
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() in ("1", "true", "yes"):
            raise ValueError(f"accelerate launch with {engine}: deftx trains with DDP; choose multi-GPU or multi-CPU")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus and (local := int(os.environ.get("LOCAL_RANK", "0"))) >= gpus:
        count = os.environ.get("LOCAL_WORLD_SIZE", local + 1)
        raise ValueError(f"{count} processes on a machine with {gpus} GPUs: start one for each, or choose device cpu")
    if not dist.is_initialized():
        if gpus:
            torch.cuda.set_device(local)
        store, rank, size = next(dist.rendezvous("env://", timeout=TRAINING_TIMEOUT))
        # torchrun keeps the store when it restarts the processes: it holds the addresses of those that were killed.
        _store = dist.PrefixStore(f"restart {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')} of {size}", store)
        backend = "nccl" if gpus else "gloo"
        dist.init_process_group(backend, store=_store, rank=rank, world_size=size, timeout=TRAINING_TIMEOUT)
    if _control is None:
        _control = dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)


def leave() -> None:
    """Wait for the other processes and disconnect, at the end of the command."""
    global _control, _store
    if _control is not None:
        barrier()
        gc.collect()  # DDP's reducers end before the group
        dist.destroy_process_group()
        _control = _store = None


def first_to_fail() -> bool:
    """Whether this process should report its error: it is the first that failed. The others fail as a consequence."""
    if started_together() < 2:
        return True
    try:
        return _store.add("deftx/failed", 1) == 1
    except Exception:  # not connected yet, or the store's process has ended
        return os.environ.get("RANK", "0") == "0"


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


# ---- what rank 0 does ----


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1 and not _alone:
        dist.barrier(group=_control)


def on_main(function: Callable[[], T]) -> T:
    """`function()`, called by rank 0 alone, while the others wait: its result on every rank. It may call `on_main`.

    Raises:
        FailedElsewhere: on the other ranks, where the function raised an error on rank 0.
    """
    global _alone
    if world_size() < 2 or _alone:
        return function()
    sent: list = [None, None]  # error, result
    if rank() > 0:
        dist.broadcast_object_list(sent, src=0, group=_control)
        if sent[0] is not None:
            raise FailedElsewhere(f"rank 0: {sent[0]}")
        return sent[1]
    _alone = True
    try:
        sent[1] = function()
    except BaseException as error:
        sent[0] = str(error) or type(error).__name__
        raise
    finally:
        _alone = False
        dist.broadcast_object_list(sent, src=0, group=_control)
    return sent[1]


def main_first(function: Callable[[], T]) -> T:
    """`function()` on every rank, on rank 0 before the others: it may download files."""
    kept: list[T] = []
    on_main(lambda: kept.append(function()))
    return kept[0] if kept else function()


def mask_of_main(select: Callable[[], tuple[CSRMask, T]], device: torch.device) -> tuple[CSRMask, T]:
    """`select()`, a mask and something about it, called by rank 0 and sent to the others: the same mask everywhere."""
    if world_size() < 2:
        return select()
    kept: list[CSRMask] = []

    def call() -> T:
        mask, about = select()
        kept.append(mask.to("cpu"))
        return about

    about = on_main(call)
    return broadcast_mask(kept[0] if kept else None, group=_control).to(device), about


# ---- checks ----


def check_batch_size(batch_size: int) -> None:
    """ValueError unless a batch can be divided among the processes."""
    if batch_size % (count := world_size()):
        raise ValueError(f"batch_size = {batch_size}, which {count} processes divide, is not a multiple of {count}")


def check_mask(mask: CSRMask) -> None:
    """ValueError unless every rank has this mask."""
    if world_size() > 1:
        check_same_mask(mask, group=_control)


def check_weights(model: torch.nn.Module) -> None:
    """RuntimeError unless the parameters are the same on every rank, by their sums."""
    if world_size() > 1:
        sums = [p.detach().double().sum().item() for p in model.parameters()]
        everyone: list = [None] * world_size()
        dist.all_gather_object(everyone, sums, group=_control)
        if different := [i for i, found in enumerate(everyone) if found != everyone[0]]:
            raise RuntimeError(f"after training the weights of rank 0 differ from those of ranks {different}")
