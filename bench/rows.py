"""The rows of bench/results: their columns, how they are appended, and which of them are the newest."""

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

OURS = "deftx"
NOT_MEASURED = "not measured"
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
# The column "provider" holds the name of the implementation that was timed, "times_ours" its time divided by ours.
COLUMNS = (
    "date", "op", "provider", "package", "backend", "size", "dtype", "density", "p20_ms", "p50_ms", "p80_ms", "host_ms",
    "rounds", "times_ours", "bytes", "flops", "copy_gb_s", "product_gflop_s", "floor_ms", "share_of_floor",
    "peak_extra_mb", "parameters", "weight_bytes_per_param", "gradient_bytes_per_param", "state_bytes_per_param",
    "mask_bytes_per_param", "file_bytes_per_param", "sent_bytes_per_param", "wire_bytes_per_param", "device", "threads",
    "driver", "torch", "triton", "commit",
)  # fmt: skip
WORKLOAD = ("op", "size", "dtype", "density")  # the columns that name a workload
# First word of an implementation → distribution.
PACKAGES = {"numpy": "numpy", "scipy": "scipy", "cupy": "cupy-cuda13x", "cupyx": "cupy-cuda13x", "PEFT": "peft"}
PACKAGES |= {name: name for name in ("bitsandbytes", "torchao", "mergekit")}
# Names of implementations in older rows → today's.
RENAMED = {"LT-SFT's way": "LT-SFT", "LIFT's way": "LIFT", "LIFT's way, svd_lowrank": "LIFT, svd_lowrank"}

Row = dict[str, str]
Workloads = dict[tuple[str, ...], dict[str, Row]]  # op, size, dtype, density → implementation → its row


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def package_of(implementation: str) -> str:
    """An implementation's package and version; empty for torch (it has a column) and deftx (the commit names it)."""
    package = PACKAGES.get(implementation.replace(".", " ").split()[0])
    return f"{package} {version(package)}" if package else ""


def provenance(device: str) -> dict[str, Any]:
    """The columns that all rows of a run share."""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "driver": driver() if device == "cuda" else "",
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
    }


def driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def commit() -> str:
    """The commit, with "-dirty" if anything but the rows has changed; $DEFTX_COMMIT in a tree without git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DEFTX_COMMIT") or "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, restval=""))


def append(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Add rows to a file, which is replaced atomically; older rows are empty in new columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows([*(read(path) if path.exists() else []), *rows])
    new.replace(path)


def newest(folder: Path) -> list[Row]:
    """The rows of the newest run of each workload on each device, from all files: a workload may have changed files."""
    workloads: dict[tuple, dict[str, Row]] = {}  # → implementation → its last row
    for path in sorted(folder.glob("*.csv")):
        for row in read(path):
            if "provider" not in row:  # scores of runs (bench/papers.py)
                break
            name = row["provider"] = RENAMED.get(row["provider"], row["provider"])
            last = workloads.setdefault((row["device"], *workload_of(row)), {})
            if row["date"] >= last.get(name, row)["date"]:
                last[name] = row | {"file": path.name}
    # Workloads last timed with a backend that no longer serves the operator are left out.
    serving = {}  # file, device and op → backend of our newest row
    for ours in sorted((w[OURS] for w in workloads.values() if OURS in w), key=lambda row: row["date"]):
        serving[ours["file"], ours["device"], ours["op"]] = ours["backend"]
    found = []
    for last in workloads.values():
        our = last.get(OURS)
        if our is None or our["backend"] == serving[our["file"], our["device"], our["op"]]:
            date = max(row["date"] for row in last.values())  # speedups compare rows of one run only
            found += [row for row in last.values() if row["date"] == date]
    return found


def of_kind(rows: list[Row], kind: str) -> list[Row]:
    """The rows of CPUs ("cpu") or of GPUs ("cuda"): those with a driver."""
    return [row for row in rows if bool(row.get("driver")) == (kind == "cuda")]


def workload_of(row: Row) -> tuple[str, ...]:
    return tuple(row[k] for k in WORKLOAD)


def by_workload(rows: Iterable[Row]) -> Workloads:
    found: Workloads = {}
    for row in rows:
        found.setdefault(workload_of(row), {})[row["provider"]] = row
    return found


def of_device(rows: list[Row], kind: str) -> list[Row]:
    """The rows of CPUs or of GPUs; of each workload those of the machine that timed it last."""
    found = of_kind(rows, kind)
    last = {workload_of(row): row["device"] for row in sorted(found, key=lambda row: row["date"])}
    return [row for row in found if row["device"] == last[workload_of(row)]]


def of_machine(rows: list[Row], kind: str) -> list[Row]:
    """The rows of one CPU or GPU: the one with the most workloads, of several the one that ran last."""
    found = of_kind(rows, kind)
    workloads: dict[str, set[tuple]] = {}
    for row in sorted(found, key=lambda row: row["date"], reverse=True):
        workloads.setdefault(row["device"], set()).add(workload_of(row))
    most = max(workloads, key=lambda name: len(workloads[name]), default="")
    return [row for row in found if row["device"] == most]
