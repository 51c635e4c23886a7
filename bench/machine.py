"""The machine's own rates, and our kernels' memory traffic: `python -m bench machine` and `python -m bench counters`.

- Bytes per second of a large copy, of reading and of writing; operations per second of square matrix products.
- Reads (gather), writes (scatter) and both (update) at scattered, ascending positions: those of a random mask, or the
  first 1, 8 or 16 float32 of 5 % of all lines of 64 bytes. In the model, memory moves in sectors of 32 bytes (lines of
  64 on a CPU), so of a mask the share 1 - (1 - density)^(sector / bytes of an element) of a dense tensor moves, and the
  positions and compact values beside it. `gb_s` is the model's bytes divided by the time: where it is half of the
  copy's rate for writes, partly written sectors are read first; where runs of 8 take as long as runs of 16, both
  sectors of a line are fetched. On a GPU each is measured with the cache's fetch limit at 32 and at 64 bytes.
- By these rates, the least time of AdamW's step with dense gradients for XLM-R base: an update at the mask's positions
  (parameters), a gather (gradients), and the moments, read and written.
- `counters`, on a GPU with Nsight Compute (`ncu`): time, bytes from and to memory and sectors per request of every
  kernel that our operators launch (`python -m bench.machine` makes the calls).

Results go to bench/results/machine.json, the newest of each device.
"""

import csv
import ctypes
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import Call, ceilings, timed
from bench.rows import RESULTS, ROOT, provenance
from bench.shapes import numel, random_tensors
from deftx_kernels import sparse_adamw, topk_mask

FILE = "machine.json"
SECTOR, LINE = {"cpu": 64, "cuda": 32}, 64  # bytes
DENSITIES = (0.01, 0.05, 0.1, 0.3)
RUNS, LINES = (1, 8, 16), 0.05  # consecutive float32 of a line; the share of all lines
ADAMW = (0.01, 0.05)  # densities of the estimated steps
ROUNDS = 9
DENSE_BYTES = {"cpu": 1 << 29, "cuda": 1 << 30}  # of a dense tensor: more than the caches
SETTINGS = ("bytes", "density", "run", "fetch", "sector_share")
SECONDS = 80  # for Nsight Compute
SECTORS = "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_"
METRICS = {  # Nsight Compute's name → ours
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    f"{SECTORS}ld.ratio": "sectors_per_load",
    f"{SECTORS}st.ratio": "sectors_per_store",
}


def measure(device: str, out: Path = RESULTS) -> int:
    """Print and write the machine's rates; returns the exit status."""
    found: dict[str, Any] = provenance(device)
    name = str(found.pop("device"))
    print_values({"device": name} | found)
    found["memory"] = memory(device)
    print_values(found["memory"], "memory, GB/s: ")
    dtypes = (torch.bfloat16, torch.float32)
    found["products"] = {str(dtype): float(f"{ceilings(device, dtype)[1] / 1e12:.4g}") for dtype in dtypes}
    print_values(found["products"], "products, TFLOP/s: ")
    found["scattered"] = []
    for rows in scattered(device):
        shared = {k: v for k, v in rows[0].items() if k in SETTINGS}
        print_values(shared | {r["access"]: f"{r['ms']} ms ({r['gb_s']} GB/s)" for r in rows})
        found["scattered"] += rows
    found["sparse_adamw"] = list(adamw_steps(found["scattered"], found["memory"]["copy"], device))
    for step in found["sparse_adamw"]:
        print_values(step, "sparse_adamw of xlmr, at least: ")
    write(name, found, out)
    return 0


def print_values(values: dict[str, Any], heading: str = "") -> None:
    print(heading + ", ".join(f"{k} {v}" for k, v in values.items() if v != ""), flush=True)


def write(device: str, found: dict[str, Any], out: Path) -> None:
    path = out / FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    known[device] = known.get(device, {}) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")


def medians(calls: dict[str, Call], device: str) -> dict[str, float]:
    """Milliseconds, after a warm-up call."""
    for call in calls.values():
        call()
    times, _ = timed(calls, device, ROUNDS)
    return {name: statistics.median(taken) for name, taken in times.items()}


def memory(device: str) -> dict[str, float]:
    """GB/s."""
    tensor = torch.ones(DENSE_BYTES[device] // 4, device=device)
    times = medians({"read": tensor.sum, "write": lambda: tensor.fill_(1.0)}, device)
    rates = {"copy": ceilings(device, torch.float32)[0] / 1e9} | {
        n: tensor.nbytes / ms / 1e6 for n, ms in times.items()
    }
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


# ---- scattered reads and writes ----
def sector_share(density: float, itemsize: int, device: str) -> float:
    """The share of a tensor's sectors that hold an entry of a random mask."""
    return 1 - (1 - density) ** (SECTOR[device] / itemsize)


def scattered(device: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of each setting: one for each access."""
    for fetch in fetch_limits(device):
        for dtype in (torch.bfloat16, torch.float32):
            dense = torch.ones(DENSE_BYTES[device] // dtype.itemsize, dtype=dtype, device=device)
            for setting, position, share in patterns(dense, device):
                same = {"bytes": dtype.itemsize} | setting | {"fetch": fetch, "sector_share": round(share, 4)}
                compact = torch.ones(len(position), dtype=dtype, device=device)
                calls = {name: partial(access, dense, position, compact) for name, access in accesses(device).items()}
                rows = []
                for name, ms in medians(calls, device).items():
                    moved = share * dense.nbytes * (2 if name == "update" else 1) + position.nbytes + compact.nbytes
                    rows.append(
                        {"access": name} | same | {"ms": round(ms, 5), "gb_s": float(f"{moved / ms / 1e6:.4g}")}
                    )
                yield rows


def patterns(dense: Tensor, device: str) -> Iterator[tuple[dict[str, float], Tensor, float]]:
    """(setting, int32 positions, share of the tensor's sectors that they touch)."""
    count, itemsize, here = len(dense), dense.element_size(), str(dense.device)
    for density in DENSITIES:
        position = random_positions(count, density, here)
        yield {"density": density}, position, sector_share(len(position) / count, itemsize, device)
    if dense.dtype == torch.float32:
        line = random_positions(dense.nbytes // LINE, LINES, here) * (LINE // itemsize)
        for run in RUNS:
            position = (line[:, None] + torch.arange(run, dtype=torch.int32, device=here)).view(-1)
            sectors = -(-run * itemsize // SECTOR[device])
            yield {"run": run}, position, len(line) * sectors * SECTOR[device] / dense.nbytes


def fetch_limits(device: str) -> Iterator[int]:
    """The most bytes that a miss fetches into a GPU's last cache, set to each in turn; of a CPU, the line's.

    A hint of this process (cuCtxSetLimit, CU_LIMIT_MAX_L2_FETCH_GRANULARITY), reset at the end. A driver that refuses
    it is measured as it is.
    """
    if device == "cpu":
        yield LINE
        return
    torch.ones(1, device=device)  # makes the context
    driver, which, before = ctypes.CDLL("libcuda.so.1"), 5, ctypes.c_size_t()
    if status := driver.cuCtxGetLimit(ctypes.byref(before), which):
        print(f"the fetch limit is not known: error {status}", flush=True)
        yield 0
        return
    try:
        for size in (32, 64):
            if status := driver.cuCtxSetLimit(which, ctypes.c_size_t(size)):
                print(f"the fetch limit stays {before.value}: error {status}", flush=True)
                yield before.value
                return
            yield size
    finally:
        driver.cuCtxSetLimit(which, before)


def adamw_steps(rows: list[dict[str, Any]], copy: float, device: str) -> Iterator[dict[str, Any]]:
    """Estimated steps on `numel("xlmr")` parameters; `copy`: GB/s."""
    times = {(r["bytes"], r["density"], r["fetch"], r["access"]): r["ms"] for r in rows if "density" in r}
    for (itemsize, density, fetch, access), update in times.items():
        if access == "update" and density in ADAMW:
            count = numel("xlmr")
            scale = count * itemsize / DENSE_BYTES[device]
            moments = 4 * density * count * (itemsize if device == "cuda" else max(itemsize, 4))
            ms = scale * (update + times[itemsize, density, fetch, "gather"]) + moments / copy / 1e6
            yield {"bytes": itemsize, "density": density, "fetch": fetch, "ms": round(ms, 4)}


def random_positions(count: int, density: float, device: str) -> Tensor:  # int32, ascending
    chosen = torch.rand(count, generator=torch.Generator(device).manual_seed(0), device=device) < density
    return chosen.nonzero().view(-1).to(torch.int32)


def accesses(device: str) -> dict[str, Callable[..., Any]]:
    """gather(dense, position, out), scatter(dense, position, values) and update(dense, position, values)."""
    if device == "cuda":
        from bench.scattered import ACCESSES, access

        return {name: partial(access, name) for name in ACCESSES}
    return {
        "gather": lambda dense, position, out: torch.index_select(dense, 0, position, out=out),
        "scatter": lambda dense, position, values: dense.index_copy_(0, position.long(), values),
        "update": lambda dense, position, values: dense.index_add_(0, position, values),
    }


# ---- our kernels, by Nsight Compute ----
def our_calls(device: str, size: str = "xlmr", side: int = 4096, density: float = 0.05) -> dict[str, Call]:
    """One call of each operator with kernels of our own, on a model's tensors, on a large weight and an embedding."""
    float32 = random_tensors(size, torch.float32, device)
    params, grads = ({n: t.bfloat16() for n, t in float32.items()} for _ in range(2))
    mask = topk_mask(float32, density=density)
    values, (first, second) = mask.gather(params), (torch.zeros(mask.nnz, device=device) for _ in range(2))
    step, lr = (torch.tensor(x, device=device) for x in (1.0, 1e-3))
    one = torch.randn(side, side, device=device)
    weight, embedding = topk_mask({"tensor": one}, density=density), mask["embedding"]
    x, gradient = (torch.randn(2048, side, device=device).bfloat16() for _ in range(2))
    factors = [torch.randn(1, side, 64, device=device) for _ in range(2)]
    ids = torch.randint(0, embedding.shapes[0][0], (2048,), device=device)
    rows = torch.randn(2048, embedding.shapes[0][1], device=device).bfloat16()
    index, weight_index, embedding_index = ((m.crow_indices, m.col_indices) for m in (mask, weight, embedding))
    ops, f32 = torch.ops.deftx, torch.float32

    def adamw(gradients: Any) -> Any:
        return sparse_adamw(params, gradients, first, second, step, mask, lr=lr)

    return {
        "topk_mask": lambda: topk_mask(float32, density=density),
        "csr_gather": lambda: mask.gather(params),
        "csr_scatter_": lambda: mask.scatter_(params, values),
        "csr_add_": lambda: mask.add_(params, values),
        "sparse_adamw_, dense": lambda: adamw(grads),
        "sparse_adamw_, compact": lambda: adamw(values),
        "csr_square_sum": lambda: ops.csr_square_sum(list(params.values()), *index),
        "masked_linear_grad": lambda: ops.masked_linear_grad(gradient, x, *weight_index, f32),
        "masked_embedding_grad": lambda: ops.masked_embedding_grad(rows, ids, *embedding_index, 1, f32),
        "residual_cut": lambda: ops.residual_cut(one[None], *factors, side * side // 20),
    }


def run_our_calls() -> None:
    """Under Nsight Compute, which profiles between start and stop: each call once, after one that compiles."""
    calls = our_calls("cuda")
    for begin in (lambda: None, torch.cuda.profiler.start):
        begin()
        for call in calls.values():
            call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def counters(out: Path = RESULTS) -> int:
    """Print and write Nsight Compute's metrics of our kernels; returns the exit status."""
    ncu = shutil.which("ncu")
    if ncu is None or not torch.cuda.is_available():
        print("not counted: " + ("there is no CUDA device" if ncu else "ncu is not on the PATH"))
        return 0
    # The clocks are not locked: that would change the card for every process.
    options = "--clock-control none --profile-from-start off --csv --page raw --print-units base --launch-count 100"
    command = [ncu, *options.split(), "--metrics", ",".join(METRICS), sys.executable, "-m", "bench.machine"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the program under ncu, too
        output, _ = process.communicate()
    status, kernels = process.returncode, counted(output)
    if status or not kernels:
        print(f"ncu: exit status {status}", *output.splitlines()[-15:], sep="\n")
        return status or 1
    for kernel in kernels:
        rate = (kernel["read"] + kernel["written"]) / max(kernel["ns"], 1)
        print_values(kernel | {"GB/s": round(rate)})
    write(torch.cuda.get_device_name(), {"kernels": kernels}, out)
    return 0


def counted(output: str) -> list[dict[str, Any]]:
    """By kernel in Nsight Compute's table: launches, sums of time and bytes, means of the ratios; the longest first."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, list[dict[str, float]]] = {}
    for row in csv.DictReader(lines[start:]):
        if (row["ID"] or "").isdigit():  # else the line of the units, or output of the program
            name = re.sub(r"<unnamed>::|\(anonymous namespace\)::|^void ", "", row["Kernel Name"])
            each = launches.setdefault(re.split(r"[<(]", name)[0].rpartition("::")[2], [])
            numbers = ((ours, (row.get(theirs) or "n/a").replace(",", "")) for theirs, ours in METRICS.items())
            each.append({ours: 0.0 if text == "n/a" else float(text) for ours, text in numbers})
    found = []
    for name, each in launches.items():
        sums = {k: sum(one[k] for one in each) for k in ("ns", "read", "written")}
        means = {k: round(statistics.mean(one[k] for one in each), 2) for k in METRICS.values() if k not in sums}
        found.append({"kernel": name, "launches": len(each)} | sums | means)
    return sorted(found, key=lambda kernel: -kernel["ns"])


if __name__ == "__main__":
    run_our_calls()
