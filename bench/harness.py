"""Timing and checking, for every family of operators.

A `Work` says what is to be timed and costs nothing until it is made; the `Case` that it makes holds the inputs and the
providers. A provider is a function that makes a fresh `call` (its own copies of what it writes), and `call()` does the
work once and returns what `check` compares with the truth: a provider that is wrong is told, and not timed. The others
are timed interleaved, in an order that changes from round to round, so that a machine that slows down slows all of
them; the ratio to ours is the median over rounds. Before each timed call a buffer as large as the last cache is read,
so that every call finds its inputs in main memory.

On a GPU a call is timed by events before and after its work, while the device is still busy with a pause that was
enqueued before: the host runs ahead, as in a training loop, and its own time does not count as the kernels' (of a call
that waits for the device, what follows the wait does). That time stands in a column of its own (`host_ms`): until the
call returns on an idle device, so of a call that waits all of it; a whole training step takes the longer of the two.

Peak memory (`peak_extra_mb`) is taken in this process, or, on the CPU, in a fresh process of each provider: there no
arena that an earlier provider left behind hides what it takes. It is the most that lay in memory at once during one
call, less what lay there
before: the inputs do not count. For a `whole` case it counts from before the provider was made until after its second
call, so of training everything counts: weights, masks, optimizer state, gradients, activations.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.rows import OURS, package_of

Setting = tuple[torch.dtype, float]
# Milliseconds by which the host is ahead of a GPU at least and at most, else twice what it needs; calls that tell what
# it needs.
LEAD, LONGEST_LEAD, HOST_CALLS = 1.0, 20.0, 3


@dataclass(frozen=True)
class Choice:
    """What the user wants timed."""

    device: str
    sizes: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...] = ()  # none: each family's usual ones
    densities: tuple[float, ...] = ()
    quick: bool = False

    def settings(self, usual: list[Setting]) -> list[Setting]:
        """A family's usual dtypes and densities (of a quick run the first alone), or all pairs of what the user chose."""
        if self.quick:
            usual = usual[:1]
        if not self.dtypes and not self.densities:
            return usual
        dtypes = self.dtypes or dict.fromkeys(dtype for dtype, _ in usual)
        return [(dtype, d) for dtype in dtypes for d in self.densities or dict.fromkeys(d for _, d in usual)]


@dataclass
class Footprint:
    """Bytes that a way of training holds for the whole of it; gradients, while they are there."""

    weights: float = 0.0
    gradients: float = 0.0
    state: float = 0.0  # of the optimizer
    mask: float = 0.0

    def columns(self, parameters: int) -> dict[str, Any]:
        held = {"weight": self.weights, "gradient": self.gradients, "state": self.state, "mask": self.mask}
        return {"parameters": parameters} | {f"{k}_bytes_per_param": f"{v / parameters:.3f}" for k, v in held.items()}


@dataclass
class Case:
    bytes: int  # that must cross memory: each input read once, each output written once
    providers: dict[str, Callable[[], Callable[[], Any]]]  # ours under the name "deftx"
    check: Callable[[Any], str | None]  # what is wrong with a provider's result
    flops: float = 0.0
    rounds: int = 15
    served_by: str = ""  # the operator whose backend serves ours, where that is not the work's
    once: tuple[str, ...] = ()  # providers timed in the first round only
    absent: dict[str, str] = field(default_factory=dict)  # providers that cannot be had here, each with the reason
    parameters: int = 0  # of the model, for the footprints
    footprints: dict[str, Footprint] = field(default_factory=dict)  # filled in by a provider's first call
    whole: bool = False  # the peak covers making a provider and two calls
    apart: bool = False  # too large to be held side by side: each provider is timed in the process that tells its peak

    def release(self) -> None:
        """Let go of everything that the providers and the check hold."""
        self.providers, self.check = {}, lambda result: None


@dataclass(frozen=True)
class Work:
    op: str
    size: str  # of --size
    title: str  # what the work is, in the rows' column "size": "minilm, dense gradient"
    dtype: torch.dtype
    density: float | None
    device: str
    # Both of a module's functions, so that they can be pickled.
    make: Callable[[], Case]
    tiny: Callable[[], Case]  # the same kind of work in a moment: what a first call loads is not what the work takes

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def density_text(self) -> str:
        """As the rows have it."""
        return "" if self.density is None else f"{self.density:g}"


def quieten() -> None:
    """What torch and its guests say of themselves on first use is not what the reader looks for between the rows."""
    for message in ("Sparse CSR tensor support", "Sparse invariant checks", "OptimState8bit does not implement"):
        warnings.filterwarnings("ignore", message)
    for name in ("torch.utils._pytree", "torchao", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def imported(name: str) -> tuple[Any, str]:
    """(the module, "") or (None, why it cannot be had). What it says of its own optional parts is not said here."""
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


def milliseconds(call: Callable[[], Any], device: str) -> float:
    return on_busy_device(call, LEAD)[0] if device == "cuda" else host_milliseconds(call)


def on_busy_device(call: Callable[[], Any], lead: float) -> tuple[float, float]:
    """The GPU's milliseconds, the host being `lead` of them ahead of it, and the host's: until the call returns."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(round(lead * cycles()))
    start.record()
    host = host_milliseconds(call)
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def host_milliseconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


@functools.cache
def cycles() -> float:
    """Cycles of the device's clock in a millisecond, as `torch.cuda._sleep` counts them."""
    count, taken = 5_000_000, 0.0
    for _ in range(3):  # the last counts: by then the clock is that of a busy device
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.cuda._sleep(count)
        end.record()
        end.synchronize()
        taken = start.elapsed_time(end)
    return count / taken


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
    # Of a GPU's cache half may belong to the other half of its memory: twice.
    return torch.ones(last_cache_bytes(device) * (2 if device == "cuda" else 1) // 4, device=device)


def flush_cache(device: str) -> None:
    """Fill the caches with other data, read only: nothing waits to be written back while the next call is timed.

    With as many bytes as the last cache has, sums of 2 to 100 MB came from memory; twice as many changed nothing (Xeon,
    480 MiB).
    """
    _flushing(device).sum()


@functools.cache
def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second of a large copy, read and written; operations per second of a matrix product) of this machine."""
    n = 1 << (28 if device == "cuda" else 25)
    source, target = torch.ones(n, device=device), torch.empty(n, device=device)
    copy = min(milliseconds(lambda: target.copy_(source), device) for _ in range(8))
    side = 4096 if device == "cuda" else 1536
    a = torch.randn(side, side, device=device).to(dtype)
    product = min(milliseconds(lambda: a @ a, device) for _ in range(8))
    return 1e3 * 8 * n / copy, 1e3 * 2 * side**3 / product


def quantiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


# ---- memory ----


def available_bytes() -> int:
    """Of main memory, what can be had without swapping; what there is in all where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def trim() -> None:
    """Give freed memory back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def peak_extra(call: Callable[[], Any], device: str) -> float | None:
    """Megabytes that one call needs beside what lay in memory before it; None where the system does not tell."""
    trim()
    if device == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS

        def read(key: str) -> int:
            return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

        before_kib = read("VmRSS")
        call()
        return 1024 * max(0, read("VmHWM") - before_kib) / 1e6
    except (OSError, StopIteration):
        return None


def training(make: Callable[[], Callable[[], Any]]) -> Callable[[], None]:
    """What the peak of a whole case is taken of."""

    def run() -> None:
        call = make()
        call()
        call()

    return run


@dataclass
class Alone:
    """What a process of its own tells of a provider."""

    peak: float | None = None
    times: list[float] = field(default_factory=list)  # only of cases that are timed apart
    host: float | None = None  # likewise


def alone(work: Work, provider: str, rounds: int) -> Alone | None:
    """One provider in a process of its own; None where that process failed (the reason is printed)."""
    try:
        # Spawned, not forked: a fork would share this process's pages and arenas.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_alone_here, work, provider, rounds, torch.get_num_threads()).result()
    except Exception as error:
        print(f"{provider} failed in a process of its own: {type(error).__name__}: {error}", flush=True)
        return None


def _alone_here(work: Work, provider: str, rounds: int, threads: int) -> Alone:
    quieten()
    torch.set_num_threads(threads)
    work.tiny().providers[provider]()()
    case = work.make()
    make = case.providers[provider]
    found = Alone(peak_extra(training(make) if case.whole else make(), work.device))
    if case.apart:
        call = make()
        call()
        times, host = timed({provider: call}, work.device, rounds, (), case.whole)
        found.times, found.host = times[provider], host.get(provider)
    return found


# ---- a work, measured ----


def measure(
    work: Work, facts: dict[str, Any], rounds: int | None, providers: tuple[str, ...], fresh: bool
) -> Iterator[dict[str, Any]]:
    """Check every provider, time the right ones, and give one row for each. A wrong one gives {"wrong": what}, an
    absent one {"absent": why}. `providers`: these alone and ours; none: all. `fresh`: peaks from fresh processes."""
    from deftx_kernels import backends

    case, device = work.make(), work.device
    if providers:
        case.providers = {n: p for n, p in case.providers.items() if n == OURS or n in providers}
    same = {**facts, "op": work.op, "size": work.title, "dtype": work.dtype_name, "density": work.density_text}
    for name, reason in case.absent.items():
        if not providers or name in providers:
            yield same | {"provider": name, "absent": reason}
    faults, calls = checked(case)
    for name, fault in faults.items():
        yield same | {"provider": name, "wrong": fault}
    fresh = case.apart or (fresh and device == "cpu")
    peaks: dict[str, float | None] = {}
    if not fresh:
        for name, call in calls.items():  # and the warm-up
            peaks[name] = peak_extra(training(case.providers[name]) if case.whole else call, device)
    rounds = rounds or case.rounds
    times, host = ({}, {}) if case.apart else timed(calls, device, rounds, case.once, case.whole)
    names = list(calls)
    case.release()
    del calls
    trim()
    if fresh:
        found = {name: result for name in names if (result := alone(work, name, rounds))}
        peaks = {name: found[name].peak if name in found else None for name in names}
        if case.apart:
            times = {name: result.times for name, result in found.items()}
            host = {name: result.host for name, result in found.items() if result.host is not None}
            for name in (n for n in names if n not in found):
                yield same | {"provider": name, "wrong": "it failed in a process of its own, as told above"}
    bandwidth, rate = ceilings(device, work.dtype if work.dtype.is_floating_point else torch.float32)
    floor = 1e3 * max(case.bytes / bandwidth, case.flops / rate)
    same |= {"bytes": case.bytes, "flops": f"{case.flops:.0f}", "floor_ms": f"{floor:.4f}"}
    same |= {"copy_gb_s": f"{bandwidth / 1e9:.1f}", "product_gflop_s": f"{rate / 1e9:.0f}"}
    for name, taken in times.items():
        p20, p50, p80 = quantiles(taken)
        row = same | {"provider": name, "package": package_of(name), "rounds": len(taken)}
        row["backend"] = backends()[case.served_by or work.op][device].name if name.startswith(OURS) else ""
        row |= {
            "p20_ms": f"{p20:.4f}",
            "p50_ms": f"{p50:.4f}",
            "p80_ms": f"{p80:.4f}",
            "share_of_floor": f"{floor / p50:.4f}",
        }
        row["host_ms"] = f"{host[name]:.4f}" if name in host else ""
        row["times_ours"] = (
            f"{statistics.median(t / o for t, o in zip(taken, times[OURS])):.3f}" if OURS in times else ""
        )
        peak = peaks.get(name)
        row["peak_extra_mb"] = "" if peak is None else f"{peak:.1f}"
        yield row | (footprint.columns(case.parameters) if (footprint := case.footprints.get(name)) else {})


def checked(case: Case) -> tuple[dict[str, str], dict[str, Callable[[], Any]]]:
    """What is wrong with whom; a call of each of the others."""
    right, faults = {}, {}
    for name, make in case.providers.items():
        call = None
        try:
            call = make()
            fault = case.check(call())
        except Exception as error:  # of a peer or of ours: a finding to report
            fault = f"{type(error).__name__}: {error}"
        if fault or case.whole:
            call = None  # before the next is made: there may be memory for one only
        if fault:
            faults[name] = fault
        else:
            right[name] = call
    if not case.apart:
        right = {name: call or case.providers[name]() for name, call in right.items()}
    return faults, right


def timed(
    calls: dict[str, Callable[[], Any]], device: str, rounds: int, once: tuple[str, ...], whole: bool
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The milliseconds of each round, of all providers in turn, and on a GPU those that the host needs for a call of
    each.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    host = (
        {name: host_time(call, whole) for name, call in calls.items() if name not in once} if device == "cuda" else {}
    )
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
            if name in once:  # slow: no other call for the host's time
                host[name] = returned - lead if returned > lead else returned
            times[name].append(max(taken, host[name]) if whole else taken)
    return times, host


def host_time(call: Callable[[], Any], whole: bool = False) -> float:
    """The median of a few calls, each on an idle device: where the host waits for the device, it does so for its own
    call alone.

    Of training (`whole`) the first does not count: it makes the optimizer's state, or captures a graph.
    """
    found: list[float] = []
    if whole:
        call()
    while len(found) < HOST_CALLS and sum(found) < 1000:
        synchronize("cuda")
        found.append(host_milliseconds(call))
    synchronize("cuda")
    return statistics.median(found)
