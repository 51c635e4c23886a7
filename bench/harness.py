"""Timing and checking, for every family of operators.

A `Workload` names what is timed and allocates nothing; `make` builds its `Case`: the inputs and the implementations. An
implementation is a function that makes a fresh `call` (with its own copies of what it writes); `call()` runs once and
returns what `check` compares with the truth. An implementation with a wrong result is reported and not timed. The
others are timed interleaved, in an order that changes from round to round, so that a slower machine slows all of them;
the ratio to ours is the median over rounds. Before each timed call the caches are flushed.

On a GPU, events before and after the call give its time while the device is still busy with a pause enqueued before:
the host runs ahead, as in a training loop, and its time does not count (of a call that waits for the device, what
follows the wait does). The column `host_ms` is the time until the call returns on an idle device. A training step
counts the longer of the two.

Peak memory (`peak_extra_mb`) is the most memory in use during one call, less that in use before it: inputs do not
count. On the CPU it is measured in a fresh process for each implementation, where no arena left by another one hides
an allocation. For a `training` case it covers making the implementation and two calls, so it includes weights, masks,
optimizer state, gradients and activations. Implementations with processes of their own report it (`Case.peaks`).
"""

import contextlib
import functools
import importlib
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.rows import OURS, WORKLOAD, package_of
from deftx_kernels import backends
from deftx_kernels.train.tensors import memory_in_use, peak_bytes

Setting = tuple[torch.dtype, float]
Call = Callable[[], Any]
# First word of an implementation's name → the module it needs.
MODULES = {"cupy": "cupy", "cupyx": "cupyx", "scipy": "scipy.sparse", "torchao": "torchao.optim"}
MODULES |= {"bitsandbytes": "bitsandbytes.optim", "PEFT": "peft", "mergekit": "mergekit.merge_methods.registry"}
GRAPH = ", CUDA graph"  # appended to an implementation's name
# Milliseconds by which the host is ahead of a GPU: at least, at most; in between twice its time, from so many calls.
LEAD, LONGEST_LEAD, HOST_CALLS = 1.0, 20.0, 3
COPIED, SIDE = {"cpu": 1 << 25, "cuda": 1 << 28}, {"cpu": 1536, "cuda": 4096}  # elements; of square matrices


@dataclass(frozen=True)
class Choice:
    """The command line's choice of workloads."""

    device: str
    sizes: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = ()  # none: each family's default
    densities: tuple[float, ...] = ()
    quick: bool = False

    def settings(self, default: list[Setting]) -> list[Setting]:
        """A family's default dtypes and densities (the first if quick), or all pairs of the chosen ones."""
        if self.quick:
            default = default[:1]
        if not self.dtypes and not self.densities:
            return default
        dtypes = self.dtypes or dict.fromkeys(dtype for dtype, _ in default)
        return [(dtype, d) for dtype in dtypes for d in self.densities or dict.fromkeys(d for _, d in default)]


@dataclass
class Case:
    bytes: int  # that must cross memory: each input read once, each output written once
    implementations: dict[str, Callable[[], Call]]  # ours is named "deftx"
    check: Callable[[Any], str | None]  # what is wrong with a result
    flops: float = 0.0
    rounds: int = 15
    served_by: str = ""  # the operator that ours calls, where the workload is not named after it
    library: str = ""  # the library that serves ours, where that is neither an operator nor linear algebra
    once: tuple[str, ...] = ()  # implementations timed in the first round only
    absent: dict[str, str] = field(default_factory=dict)  # implementations unavailable here → the reason
    parameters: int = 0  # of the model, for the footprints
    # implementation → bytes of "weight", "gradient", "state", "mask" in training; filled in by its first call
    footprints: dict[str, dict[str, int]] = field(default_factory=dict)
    training: bool = False  # the peak covers making an implementation and two calls
    isolated: bool = False  # too large to be held side by side: each implementation is timed in its own process
    # Implementations checked and timed each in its own process: CUDA graphs, whose faults may stop all later calls.
    apart: tuple[str, ...] = ()
    # In megabytes, by implementation, where each has processes of its own; filled in by the check.
    peaks: dict[str, float] | None = None
    one_by_one: bool = False  # too large to be held side by side: each is made, checked and timed before the next

    def __post_init__(self) -> None:
        """Leave out the implementations that are absent, or whose package does not import."""
        for name in self.implementations:
            module = MODULES.get(name.replace(".", " ").split()[0])
            if module and name not in self.absent and (reason := imported(module)[1]):
                self.absent = self.absent | {name: reason}
        self.implementations = {n: make for n, make in self.implementations.items() if n not in self.absent}


@dataclass(frozen=True)
class Workload:
    op: str
    size: str  # of --size
    title: str  # the rows' column "size": "minilm, dense gradient"
    dtype: torch.dtype
    density: float | None
    device: str
    make: Callable[[], Case]  # both picklable
    tiny: Callable[[], Case]  # the same on a tiny input: loads what a first call loads

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def label(self) -> str:
        """ "minilm, float32, 5 %" """
        density = "" if self.density is None else f", {100 * self.density:.3g} %"
        return f"{self.title}, {self.dtype_name}{density}"

    @property
    def key(self) -> tuple[str, ...]:
        """As the rows have it: op, size, dtype, density."""
        return self.op, self.title, self.dtype_name, "" if self.density is None else f"{self.density:g}"


def workload(
    case: Callable[..., Case],
    op: str,
    size: str,
    setting: Setting,
    device: str,
    *more: Any,
    title: str = "",
    of: Any = None,
) -> Workload:
    """The workload whose cases are case(x, dtype, density, device, *more), x of `of`: (this size, its tiny one)."""
    make, tiny = (partial(case, x, *setting, device, *more) for x in of or (size, "tiny"))
    return Workload(op, size, title or size, *setting, device, make, tiny)


def silence_libraries() -> None:
    """Turn off first-use warnings of torch and the baselines' packages, which would stand between the rows."""
    for message in ("Sparse CSR tensor support", "Sparse invariant checks", "OptimState8bit does not implement"):
        warnings.filterwarnings("ignore", message)
    for name in ("torch.utils._pytree", "torchao", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def imported(name: str) -> tuple[Any, str]:
    """(the module, "") or (None, why it does not import), without the module's own warnings."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name} does not import: {error}"
    finally:
        logging.disable(logging.NOTSET)


# ---- time ----
def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Call, device: str) -> float:
    return on_busy_device(call, LEAD)[0] if device == "cuda" else host_milliseconds(call)


def on_busy_device(call: Call, lead: float) -> tuple[float, float]:
    """(milliseconds of the GPU, with the host `lead` ms ahead of it; milliseconds of the host until it returns)."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if lead:
        torch.cuda._sleep(round(lead * cycles()))
    start.record()
    host = host_milliseconds(call)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def host_milliseconds(call: Call) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


@functools.cache
def cycles() -> float:
    """Clock cycles of `torch.cuda._sleep` per millisecond."""
    count = 5_000_000
    times = [on_busy_device(lambda: torch.cuda._sleep(count), 0.0)[0] for _ in range(3)]
    return count / times[-1]  # the clock is then that of a busy device


@functools.cache
def last_cache_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    found = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            found.append(int(path.read_text().strip().removesuffix("K")) << 10)
    return max(found)


@functools.cache
def _flushing(device: str) -> Tensor:
    # Twice the size on a GPU: half of its cache may serve the other half of its memory.
    return torch.ones(last_cache_bytes(device) * (2 if device == "cuda" else 1) // 4, device=device)


def flush_cache(device: str) -> None:
    """Fill the caches with other data, which is only read: nothing is written back while the next call is timed.

    With the last cache's size, sums of 2 to 100 MB came from memory; twice the size made no difference (Xeon, 480 MiB).
    """
    _flushing(device).sum()


@functools.cache
def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second of a large copy, read and written; operations per second of a matrix product)."""
    n, side = COPIED[device], SIDE[device]
    source, target = torch.ones(n, device=device), torch.empty(n, device=device)
    copy = min(milliseconds(lambda: target.copy_(source), device) for _ in range(8))
    a = torch.randn(side, side, device=device).to(dtype)
    product = min(milliseconds(lambda: a @ a, device) for _ in range(8))
    return 1e3 * 8 * n / copy, 1e3 * 2 * side**3 / product


def timed(
    calls: dict[str, Call], device: str, rounds: int, once: tuple[str, ...] = (), training: bool = False
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(the milliseconds of each round by implementation, on a GPU the host's milliseconds by implementation)."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    host: dict[str, float] = {}
    if device == "cuda":
        host = {name: host_time(call, training) for name, call in calls.items() if name not in once}
    order = list(calls)
    for i in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            if i and name in once:
                continue
            flush_cache(device)
            if device != "cuda":
                times[name].append(milliseconds(calls[name], device))
                continue
            lead = min(max(LEAD, 2 * host.get(name, 0)), LONGEST_LEAD)
            taken, returned = on_busy_device(calls[name], lead)
            if name in once:  # slow: no extra call for the host's time
                host[name] = returned - lead if returned > lead else returned
            times[name].append(max(taken, host[name]) if training else taken)
    return times, host


def host_time(call: Call, training: bool = False) -> float:
    """Median milliseconds of a few calls, each on an idle device.

    A first training step does not count: it makes the optimizer's state or captures a graph.
    """
    found: list[float] = []
    if training:
        call()
    while len(found) < HOST_CALLS and sum(found) < 1000:
        synchronize("cuda")
        found.append(host_milliseconds(call))
    synchronize("cuda")
    return statistics.median(found)


# ---- memory ----
def available_bytes() -> int:
    """Main memory that is free without swapping; all of it where the system does not report that."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def too_large(needs: dict[str, float], room: float, together: bool = False) -> dict[str, str]:
    """Implementation → why it is absent: it needs more bytes than `room`; if all are held `together`, than are left."""
    absent = {}
    for name, need in needs.items():
        if need > room:
            absent[name] = f"needs {need / 1e9:.1f} GB of memory, {max(0, room) / 1e9:.1f} GB are free"
        elif together:
            room -= need
    return absent


def trim() -> None:
    """Return freed memory to the system."""
    memory_in_use()


def peak_extra(call: Call, device: str) -> float | None:
    """Megabytes that one call takes beyond those in use before it; None where the system does not report them."""
    peak = peak_bytes(call, device)
    return None if peak is None else peak / 1e6


def peak_of(case: Case, make: Callable[[], Call], call: Call | None, device: str) -> float | None:
    """The peak of a call; of a training case that of making an implementation and two calls."""

    def two_steps() -> None:
        step = make()
        step()
        step()

    return peak_extra(two_steps if case.training else call or make(), device)


@dataclass
class Measured:
    """What was measured of an implementation."""

    times: list[float] = field(default_factory=list)  # milliseconds
    host: float | None = None  # milliseconds until a call returns, on a GPU
    peak: float | None = None  # megabytes
    wrong: str = ""


@functools.cache
def _gpu_process() -> ProcessPoolExecutor:
    return _new_process()


def _new_process() -> ProcessPoolExecutor:
    # Spawned, not forked: a fork would share this process's pages and arenas.
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))


def alone(workload: Workload, implementation: str, rounds: int) -> Measured:
    """Measure the peak of one implementation, and of one timed apart the times, in another process.

    On the CPU that is a new one. On a GPU, where torch counts the peaks, it serves the next implementations, too, until
    one of them is wrong or fails: imports and a context take ten seconds.
    """
    kept = workload.device == "cuda"
    pool = _gpu_process() if kept else _new_process()
    try:
        found = pool.submit(_alone_here, workload, implementation, rounds, torch.get_num_threads()).result()
    except Exception as error:
        print(f"{implementation} failed in a process of its own: {type(error).__name__}: {error}", flush=True)
        found = Measured(wrong="it failed in a process of its own (printed above)")
    if found.wrong or not kept:
        pool.shutdown()
        _gpu_process.cache_clear()
    return found


def _alone_here(workload: Workload, implementation: str, rounds: int, threads: int) -> Measured:
    silence_libraries()
    torch.set_num_threads(threads)
    trim()  # of the implementation before
    if workload.device == "cuda":
        torch.cuda.empty_cache()
    workload.tiny().implementations[implementation]()()
    case = workload.make()
    make = case.implementations[implementation]
    found = Measured()
    if implementation in case.apart:
        found.wrong = case.check(make()()) or ""
        if found.wrong:
            return found
    found.peak = peak_of(case, make, None, workload.device)
    if case.isolated or implementation in case.apart:
        call = make()
        call()
        times, host = timed({implementation: call}, workload.device, rounds, training=case.training)
        found.times, found.host = times[implementation], host.get(implementation)
    return found


# ---- one workload ----
def measure(
    workload: Workload, metadata: dict[str, Any], rounds: int | None, chosen: tuple[str, ...], fresh: bool
) -> Iterator[dict[str, Any]]:
    """Check every implementation, time the right ones, and yield one row for each; {"wrong": what} for one with a wrong
    result, {"absent": why} for one that is unavailable. `chosen`: only these and ours; none: all. `fresh`: peaks from
    fresh processes."""
    case, device = workload.make(), workload.device
    if chosen:
        case.implementations = {n: p for n, p in case.implementations.items() if n == OURS or n in chosen}
    same = metadata | dict(zip(WORKLOAD, workload.key))
    for name, reason in case.absent.items():
        if not chosen or name in chosen:
            yield same | {"provider": name, "absent": reason}
    op, ours = case.served_by or workload.op, []
    # The denoising functions are no operators: torch's linear algebra serves them.
    backend = case.library or (backends()[op][device].name if op in backends() else "blas")
    for name, one in run(workload, case, rounds or case.rounds, fresh):
        if one.wrong:
            yield same | {"provider": name, "wrong": one.wrong}
            continue
        # Measured once, after the first of the timed calls, when memory is free again.
        bandwidth, rate = ceilings(device, workload.dtype if workload.dtype.is_floating_point else torch.float32)
        floor = 1e3 * max(case.bytes / bandwidth, case.flops / rate)
        limits = {"bytes": case.bytes, "flops": f"{case.flops:.0f}", "floor_ms": f"{floor:.4f}"}
        limits |= {"copy_gb_s": f"{bandwidth / 1e9:.1f}", "product_gflop_s": f"{rate / 1e9:.0f}"}
        ours = one.times if name == OURS else ours
        row = same | limits | {"provider": name, "package": package_of(name), "rounds": len(one.times)}
        row["backend"] = backend if name.startswith(OURS) else ""
        deciles = statistics.quantiles(one.times if len(one.times) > 1 else 2 * one.times, n=10, method="inclusive")
        row |= {f"p{q}_ms": f"{deciles[q // 10 - 1]:.4f}" for q in (20, 50, 80)}
        row["share_of_floor"] = f"{floor / deciles[4]:.4f}"
        row["host_ms"] = "" if one.host is None else f"{one.host:.4f}"
        row["times_ours"] = f"{statistics.median(t / o for t, o in zip(one.times, ours)):.3f}" if ours else ""
        row["peak_extra_mb"] = "" if one.peak is None else f"{one.peak:.1f}"
        if held := case.footprints.get(name):
            row |= {f"{what}_bytes_per_param": f"{size / case.parameters:.6f}" for what, size in held.items()}
            row["parameters"] = case.parameters
        yield row


def run(workload: Workload, case: Case, rounds: int, fresh: bool) -> Iterator[tuple[str, Measured]]:
    """Check and time the case, which then lets go of its inputs; each implementation as soon as it is measured."""
    device = workload.device
    if case.one_by_one:
        yield from ((name, one_of(case, name, device, rounds)) for name in case.implementations)
        return
    found, calls = checked(case)
    fresh = case.peaks is None and (case.isolated or (fresh and device == "cpu"))
    if case.peaks is not None:
        for name in calls:
            found[name].peak = case.peaks.get(name)
    elif not fresh:
        for name, call in calls.items():  # and the warm-up
            found[name].peak = peak_of(case, case.implementations[name], call, device)
    if not case.isolated:
        times, host = timed(calls, device, rounds, case.once, case.training)
        for name in calls:
            found[name].times, found[name].host = times[name], host.get(name)
    names = list(calls) if fresh else []
    apart = [name for name in case.apart if name in case.implementations]
    case.implementations, case.check = {}, lambda result: None
    del calls
    trim()
    for name, one in found.items():
        if name in names:
            result = alone(workload, name, rounds)
            one = result if case.isolated else replace(one, peak=result.peak)
        yield name, one
    for name in apart:
        yield name, alone(workload, name, rounds)


def one_of(case: Case, name: str, device: str, rounds: int) -> Measured:
    """Make, check and time one implementation."""
    found = Measured()
    try:
        call = case.implementations[name]()
        found.wrong = case.check(call()) or ""
        if not found.wrong:
            found.times = timed({name: call}, device, rounds, training=case.training)[0][name]
            found.peak = (case.peaks or {}).get(name)
    except Exception as error:  # reported as a wrong result
        found.wrong = f"{type(error).__name__}: {error}"
    return found


def checked(case: Case) -> tuple[dict[str, Measured], dict[str, Call]]:
    """(what is wrong by implementation, a call of each of the right ones)."""
    right: dict[str, Any] = {}
    found: dict[str, Measured] = {}
    for name, make in case.implementations.items():
        if name in case.apart:
            continue
        call, fault = None, None
        try:
            call = make()
            fault = case.check(call())
        except Exception as error:  # reported as a wrong result
            fault = f"{type(error).__name__}: {error}"
        if fault or case.training:
            call = None  # before the next is made: there may be memory for one only
        found[name] = Measured(wrong=fault or "")
        if not fault:
            right[name] = call
    if not case.isolated:
        right = {name: call or case.implementations[name]() for name, call in right.items()}
    return found, right
