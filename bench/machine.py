"""What a machine gives at the most, and what of it our kernels take: `python -m bench machine` and `python -m bench
counters`.

- Bytes per second of a large copy (read and written), of reading and of writing alone; operations per second of square
products.
- Reads and writes at scattered, ascending positions, as those of a mask are. The model: memory moves in sectors of 32
bytes (on a
  CPU in lines of 64), so of a dense tensor the share 1 - (1 - density)^(32 / bytes of an element) moves; beside it the
  positions and the compact values.
  `gb_s` are the model's bytes by the time taken; `implied_share` is the share of the tensor that would explain the time
  at the rate of the copy. Where it is twice the model's for writes, sectors that are partly written are read first.
- `counters`, on a GPU with Nsight Compute (`ncu`): the time, the bytes from and to memory and the sectors for each
request of every
  kernel that a call of our operators launches (`python -m bench.machine` makes those calls).

The results go to bench/results/machine.json, the newest of each device in place of the one before.
"""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.harness import timed
from bench.rows import RESULTS, ROOT, provenance
from bench.shapes import SIZES, random_tensors
from deftx_kernels import CSRMask, sparse_adamw, topk_mask

FILE = "machine.json"
SECTOR = {"cpu": 64, "cuda": 32}  # bytes
DENSITIES = (0.01, 0.05, 0.1, 0.3)
ROUNDS = 9
DENSE_BYTES = {"cpu": 1 << 29, "cuda": 1 << 30}  # of a dense tensor: more than the caches
POSITIONS = {"cpu": 1, "cuda": 1024}  # a multiple of so many
SIDE = {"cpu": 1536, "cuda": 8192}  # of the matrices
SECONDS = 80  # for Nsight Compute
METRICS = {  # Nsight Compute's name → ours
    "gpu__time_duration.sum": "ns",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors_per_load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors_per_store",
}
Call = Callable[[], Any]


def measure(device: str, out: Path = RESULTS) -> dict[str, Any]:
    """Everything but Nsight Compute's, printed as it comes, and written."""
    found: dict[str, Any] = provenance(device)
    name = str(found.pop("device"))
    print(name, *(f"{k} {v}" for k, v in found.items() if v), sep=", ")
    found["memory"] = memory(device)
    print("memory, GB/s:", *(f"{k} {v:.0f}" for k, v in found["memory"].items()))
    found["products"] = products(device)
    print(
        f"products of {SIDE[device]} x {SIDE[device]}, TFLOP/s:",
        *(f"{k} {v:.2f}" for k, v in found["products"].items()),
    )
    print(f"{'':8}{'bytes':>6}{'density':>8}{'ms':>9}{'GB/s':>7}{'share of sectors':>18}{'implied':>9}")
    found["scattered"] = []
    for row in scattered(device, 1e9 * found["memory"]["copy"]):
        found["scattered"].append(row)
        line = f"{row['access']:8}{row['bytes']:6}{row['density']:8.2f}{row['ms']:9.4f}{row['gb_s']:7.0f}"
        print(f"{line}{row['sector_share']:18.3f}{row['implied_share']:9.3f}", flush=True)
    write(name, found, out)
    return found


def write(device: str, found: dict[str, Any], out: Path) -> None:
    path = out / FILE
    known = json.loads(path.read_text()) if path.exists() else {}
    known[device] = known.get(device, {}) | found
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known, indent=1) + "\n")


def medians(calls: dict[str, Call], device: str) -> dict[str, float]:
    """Milliseconds, after a call that does not count."""
    for call in calls.values():
        call()
    times, _ = timed(calls, device, ROUNDS, (), whole=False)
    return {name: statistics.median(taken) for name, taken in times.items()}


# ---- memory and products ----


def memory(device: str) -> dict[str, float]:
    """GB/s."""
    source = torch.ones(DENSE_BYTES[device] // 4, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Call] = {
        "copy": lambda: target.copy_(source),
        "read": source.sum,
        "write": lambda: target.fill_(1.0),
    }
    return {
        n: round((2 if n == "copy" else 1) * source.nbytes / ms / 1e6, 1) for n, ms in medians(calls, device).items()
    }


@contextmanager
def tf32() -> Iterator[None]:
    flags = torch.backends.cuda.matmul
    before, flags.fp32_precision = flags.fp32_precision, "tf32"
    try:
        yield
    finally:
        flags.fp32_precision = before


def products(device: str) -> dict[str, float]:
    """TFLOP/s of products of random matrices."""
    side = SIDE[device]
    matrix = torch.randn(side, side, device=device)
    half = matrix.to(torch.bfloat16)

    def product_tf32() -> Tensor:
        with tf32():
            return matrix @ matrix

    calls: dict[str, Call] = {"bfloat16": lambda: half @ half, "float32": lambda: matrix @ matrix}
    if device == "cuda":
        calls |= {"bfloat16 to float32": lambda: torch.mm(half, half, out_dtype=torch.float32), "tf32": product_tf32}
    return {name: round(2 * side**3 / ms / 1e9, 3) for name, ms in medians(calls, device).items()}


# ---- scattered reads and writes ----


def sector_share(density: float, itemsize: int, device: str) -> float:
    """Of a tensor's sectors, those that hold an entry of a random mask."""
    return 1 - (1 - density) ** (SECTOR[device] / itemsize)


def scattered(device: str, copy_rate: float) -> Iterator[dict[str, Any]]:
    gather, scatter = accesses(device)
    for itemsize, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        dense = torch.ones(DENSE_BYTES[device] // itemsize, dtype=dtype, device=device)
        for density in DENSITIES:
            position = random_positions(len(dense), density, device)
            compact = torch.ones(len(position), dtype=dtype, device=device)
            calls: dict[str, Call] = {"gather": partial(gather, dense, position, compact)}
            calls["scatter"] = partial(scatter, dense, position, compact)
            beside = position.nbytes + compact.nbytes
            share = sector_share(len(position) / len(dense), itemsize, device)
            for access, ms in medians(calls, device).items():
                rate = (share * dense.nbytes + beside) / ms / 1e6
                implied = (copy_rate * ms / 1e3 - beside) / dense.nbytes
                row = {
                    "access": access,
                    "bytes": itemsize,
                    "density": density,
                    "ms": round(ms, 5),
                    "gb_s": round(rate, 1),
                }
                yield row | {"sector_share": round(share, 4), "implied_share": round(implied, 4)}


def random_positions(count: int, density: float, device: str) -> Tensor:  # int32, ascending
    chosen = torch.rand(count, generator=torch.Generator(device).manual_seed(0), device=device) < density
    position = chosen.nonzero().view(-1).to(torch.int32)
    return position[: len(position) // POSITIONS[device] * POSITIONS[device]]


def accesses(device: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """gather(dense, position, out) and scatter(dense, position, values)."""
    if device == "cuda":
        from bench.scattered import gather, scatter

        return gather, scatter
    return (
        lambda dense, position, out: torch.index_select(dense, 0, position, out=out),
        lambda dense, position, values: dense.index_copy_(0, position.long(), values),
    )


# ---- our kernels, by Nsight Compute ----


def our_calls(device: str, size: str = "xlmr", side: int = 4096, density: float = 0.05) -> dict[str, Call]:
    """One call of each operator whose kernels are our own, on a model's tensors, on one large weight and on an
    embedding.
    """
    float32 = random_tensors(SIZES[size](), torch.float32, device)
    params, grads = ({n: t.bfloat16() for n, t in float32.items()} for _ in range(2))
    mask = topk_mask(float32, density=density)
    values, (first, second) = mask.gather(params), (torch.zeros(mask.nnz, device=device) for _ in range(2))
    step, lr = (torch.tensor(x, device=device) for x in (1.0, 1e-3))
    one = {"tensor": torch.randn(side, side, device=device)}
    weight = topk_mask(one, density=density)
    x, gradient = (torch.randn(2048, side, device=device).bfloat16() for _ in range(2))
    factors = [torch.randn(1, side, 64, device=device) for _ in range(2)]
    embedding: CSRMask = mask["embedding"]
    ids = torch.randint(0, embedding.shapes[0][0], (2048,), device=device)
    rows = torch.randn(2048, embedding.shapes[0][1], device=device).bfloat16()
    ops = torch.ops.deftx

    def adamw(gradients: Any) -> Any:
        return sparse_adamw(params, gradients, first, second, step, mask, lr=lr)

    return {
        "topk_mask": lambda: topk_mask(float32, density=density),
        "csr_gather": lambda: mask.gather(params),
        "csr_scatter_": lambda: mask.scatter_(params, values),
        "csr_add_": lambda: mask.add_(params, values),
        "sparse_adamw_, dense": lambda: adamw(grads),
        "sparse_adamw_, compact": lambda: adamw(values),
        "csr_square_sum": lambda: ops.csr_square_sum(list(params.values()), mask.crow_indices, mask.col_indices),
        "masked_linear_grad": lambda: ops.masked_linear_grad(
            gradient, x, weight.crow_indices, weight.col_indices, torch.float32
        ),
        "masked_embedding_grad": lambda: ops.masked_embedding_grad(
            rows, ids, embedding.crow_indices, embedding.col_indices, 1, torch.float32
        ),
        "residual_cut": lambda: ops.residual_cut(one["tensor"][None], *factors, side * side // 20),
    }


def run_our_calls() -> None:
    """Under Nsight Compute, which looks at what is between start and stop: each call once, after one that compiles."""
    calls = our_calls("cuda")
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls.values():
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def counters(out: Path = RESULTS) -> int:
    """Nsight Compute's figures of our kernels, printed and written; the exit status."""
    ncu = shutil.which("ncu")
    if ncu is None or not torch.cuda.is_available():
        print("not counted: " + ("there is no CUDA device" if ncu else "ncu is not on the PATH"))
        return 0
    # The clocks stay as they are: locking them changes the card for everybody.
    command = [
        ncu,
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--csv",
        "--page",
        "raw",
        "--print-units",
        "base",
    ]
    command += ["--launch-count", "100", "--metrics", ",".join(METRICS), sys.executable, "-m", "bench.machine"]
    pipe, told = subprocess.PIPE, subprocess.STDOUT
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=pipe, stderr=told, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the program under ncu, too
        output, _ = process.communicate()
    status, kernels = process.returncode, counted(output)
    if status or not kernels:
        print(f"ncu: exit status {status}", *output.splitlines()[-15:], sep="\n")
        return status or 1
    print(
        f"{'kernel':44}{'launches':>9}{'ms':>9}{'read MB':>9}{'written MB':>11}{'GB/s':>7}{'sectors a load, a store':>25}"
    )
    for k in kernels:
        rate = (k["read"] + k["written"]) / max(k["ns"], 1)
        line = f"{k['kernel'][:43]:44}{k['launches']:9}{k['ns'] / 1e6:9.4f}{k['read'] / 1e6:9.1f}{k['written'] / 1e6:11.1f}"
        print(f"{line}{rate:7.0f}{k['sectors_per_load']:14.2f}{k['sectors_per_store']:11.2f}")
    write(torch.cuda.get_device_name(), {"kernels": kernels}, out)
    return 0


def counted(output: str) -> list[dict[str, Any]]:
    """Of each kernel in Nsight Compute's table: launches, sums of nanoseconds and bytes, means of the ratios; the
    longest first.
    """
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, list[dict[str, float]]] = {}
    for row in csv.DictReader(lines[start:]):
        if (row["ID"] or "").isdigit():  # else the line of the units, or what the program printed
            name = re.sub(r"<unnamed>::|\(anonymous namespace\)::|^void ", "", row["Kernel Name"])
            each = launches.setdefault(re.split(r"[<(]", name)[0].rpartition("::")[2], [])
            each.append({ours: number(row.get(theirs)) for theirs, ours in METRICS.items()})
    found = []
    for name, each in launches.items():
        sums = {k: sum(one[k] for one in each) for k in ("ns", "read", "written")}
        means = {
            k: round(statistics.mean(one[k] for one in each), 2) for k in ("sectors_per_load", "sectors_per_store")
        }
        found.append({"kernel": name, "launches": len(each)} | sums | means)
    return sorted(found, key=lambda kernel: -kernel["ns"])


def number(text: str | None) -> float:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:  # "n/a"
        return 0.0


if __name__ == "__main__":
    run_our_calls()
