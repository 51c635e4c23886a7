"""Timing, checking and rows, for every family of operators.

A case names the work and its providers; a provider is a function that makes a fresh `call` (its own copies of what it writes), and
`call()` does the work once and returns what `check` compares with the truth. Providers are timed interleaved, in an order that
changes from round to round, so that a machine that slows down slows all of them; the ratio to ours is the median over rounds.

Peak memory (`peak_extra_mb`) is taken in this process, or, on the CPU and for a case that says how to make it `again`, in a fresh
process of each provider: there no arena that an earlier provider left behind hides what it takes. It is the most that lay in memory
at once during one call, less what lay there before: the inputs do not count. For a `whole` case it counts from before the provider
was made until after its second call, so of training everything counts: weights, masks, optimizer state, gradients, activations.
"""

import contextlib
import csv
import ctypes
import functools
import gc
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

OURS = "deftx"
ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "date", "op", "provider", "backend", "size", "dtype", "density", "p20_ms", "p50_ms", "p80_ms", "rounds", "times_ours", "bytes",
    "floor_ms", "share_of_floor", "peak_extra_mb", "state_bytes_per_param", "device", "threads", "torch", "triton", "commit",
)  # fmt: skip


@dataclass
class Case:
    op: str
    size: str  # what the work is: "minilm", "minilm layer"
    dtype: torch.dtype
    density: float | None
    bytes: int  # that must cross memory: each input read once, each output written once
    providers: dict[str, Callable[[], Callable[[], Any]]]  # ours under the name "deftx"
    check: Callable[[Any], str | None]  # what is wrong with a provider's result
    flops: float = 0.0
    rounds: int = 15
    backend_of: str = field(default="")  # the operator whose backend serves ours
    once: tuple[str, ...] = ()  # providers timed in the first round only
    absent: dict[str, str] = field(default_factory=dict)  # providers that cannot be had here, each with the reason
    state_bytes: dict[str, float] = field(default_factory=dict)  # of optimizers, per parameter; filled in by the first call
    whole: bool = False  # the peak covers making a provider and two calls
    # Makes the case anew, from a module's function so that it can be pickled; `again(size="tiny")` makes a small one.
    again: Callable[..., "Case"] | None = None

    def release(self) -> None:
        """Let go of everything that the providers and the check hold."""
        self.providers, self.check = {}, lambda result: None


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """As a caller sees it: launches and waits included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


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


def fresh_peak(again: Callable[..., Case], provider: str, device: str) -> float | None:
    """`peak_extra` of one provider in a process of its own; None where that process failed (the reason is printed)."""
    try:
        # Spawned, not forked: a fork would share this process's pages and arenas.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_peak_here, again, provider, device, torch.get_num_threads()).result()
    except Exception as error:
        print(f"peak memory of {provider} was not measured: {type(error).__name__}: {error}", flush=True)
        return None


def _peak_here(again: Callable[..., Case], provider: str, device: str, threads: int) -> float | None:
    torch.set_num_threads(threads)
    again(size="tiny").providers[provider]()()  # what a first call loads is not what the work takes
    case = again()
    make = case.providers[provider]
    return peak_extra(training(make) if case.whole else make(), device)


def training(make: Callable[[], Callable[[], Any]]) -> Callable[[], None]:
    """What the peak of a whole case is taken of."""

    def run() -> None:
        call = make()
        call()
        call()

    return run


def quantiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def provenance(device: str) -> dict[str, Any]:
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = ""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    facts = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"), "device": name, "threads": torch.get_num_threads()}
    return {**facts, "torch": torch.__version__, "triton": version, "commit": commit()}


def commit() -> str:
    """The checked-out commit; "-dirty" where anything but the rows themselves has changed since."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(case: Case, device: str, facts: dict[str, Any], rounds: int | None = None) -> Iterator[dict[str, Any]]:
    """Check every provider, time the right ones, and give one row for each; a wrong one gives {"wrong": what}. Uses the case up."""
    from deftx_kernels import backends

    faults, times, peaks = timed(case, device, rounds or case.rounds)
    for name, fault in faults.items():
        yield {"op": case.op, "provider": name, "size": case.size, "wrong": fault}
    case.release()
    trim()
    if case.again is not None and not peaks:
        peaks = {name: fresh_peak(case.again, name, device) for name in times}
    bandwidth, rate = ceilings(device, case.dtype if case.dtype.is_floating_point else torch.float32)
    floor = 1e3 * max(case.bytes / bandwidth, case.flops / rate)
    for name, taken in times.items():
        p20, p50, p80 = quantiles(taken)
        ratio = statistics.median(t / o for t, o in zip(taken, times[OURS])) if OURS in times else None
        backend = backends()[case.backend_of or case.op][device].name if name.startswith(OURS) else ""
        row = {**facts, "op": case.op, "provider": name, "backend": backend, "size": case.size}
        row |= {"dtype": str(case.dtype).removeprefix("torch."), "density": "" if case.density is None else case.density}
        row |= {"p20_ms": f"{p20:.4f}", "p50_ms": f"{p50:.4f}", "p80_ms": f"{p80:.4f}", "rounds": len(taken), "bytes": case.bytes}
        row |= {"times_ours": "" if ratio is None else f"{ratio:.3f}", "floor_ms": f"{floor:.4f}"}
        row |= {"share_of_floor": f"{floor / p50:.4f}", "peak_extra_mb": "" if peaks[name] is None else f"{peaks[name]:.1f}"}
        row["state_bytes_per_param"] = f"{case.state_bytes[name]:.3f}" if name in case.state_bytes else ""
        yield row


def timed(case: Case, device: str, rounds: int) -> tuple[dict[str, str], dict[str, list[float]], dict[str, float | None]]:
    """What is wrong with whom; the milliseconds of each round of the others; their peaks, unless a fresh process is to tell."""
    right, faults = {}, {}
    for name, make in case.providers.items():
        call = None
        try:
            call = make()
            fault = case.check(call())
        except Exception as error:  # of a peer or of ours: a finding to report
            fault = f"{type(error).__name__}: {error}"
        if fault or not case.whole:
            call = None  # before the next is made: there may be memory for one only
        if fault:
            faults[name] = fault
        else:
            right[name] = call or make()
    peaks: dict[str, float | None] = {}
    if device == "cuda" or case.again is None:
        for name, call in right.items():  # and the warm-up
            peaks[name] = peak_extra(training(case.providers[name]) if case.whole else call, device)
    times: dict[str, list[float]] = {name: [] for name in right}
    order = list(right)
    for i in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            if i == 0 or name not in case.once:
                times[name].append(milliseconds(right[name], device))
    return faults, times, peaks


def append(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Rows are only ever added, by this function. Those of a file that lacks a column of today have it empty from then on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old: list[dict[str, Any]] = []
    header: list[str] | None = None
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            old, header = list(reader), list(reader.fieldnames or ())
    if header == list(COLUMNS):
        with path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerows(rows)
        return
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows([*old, *rows])
    new.replace(path)
