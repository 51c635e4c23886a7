"""The rows of bench/results: what they hold, how they are added, and which of them are the newest."""

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
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
COLUMNS = (
    "date", "op", "provider", "package", "backend", "size", "dtype", "density", "p20_ms", "p50_ms", "p80_ms", "host_ms",
    "rounds", "times_ours", "bytes", "flops", "copy_gb_s", "product_gflop_s", "floor_ms", "share_of_floor", "peak_extra_mb",
    "parameters", "weight_bytes_per_param", "gradient_bytes_per_param", "state_bytes_per_param", "mask_bytes_per_param",
    "device", "threads", "driver", "torch", "triton", "commit",
)  # fmt: skip
PACKAGES = {
    "numpy": "numpy",
    "scipy": "scipy",
    "cupy": "cupy-cuda13x",
    "cupyx": "cupy-cuda13x",
    "PEFT": "peft",
}  # first word of a provider → distribution
PACKAGES |= {"bitsandbytes": "bitsandbytes", "torchao": "torchao"}

Row = dict[str, str]


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def package_of(provider: str) -> str:
    """A provider's package with its version; nothing for torch, which has a column, and for us, whom a commit names."""
    package = PACKAGES.get(provider.replace(".", " ").split()[0])
    return f"{package} {version(package)}" if package else ""


def provenance(device: str) -> dict[str, Any]:
    """The columns that every row of a run shares."""
    facts: dict[str, Any] = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")}
    facts |= {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
    }
    return facts | {
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
    """The checked-out commit; "-dirty" where anything but the rows themselves has changed since. $DEFTX_COMMIT tells it
    of a tree that was copied without its history."""

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


def append(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Rows are only ever added, by this function. Those of a file that lacks a column of today have it empty from then
    on.
    """
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


def newest(folder: Path) -> list[Row]:
    """The last row of each provider for each work and device, with its file; a work may have moved from one file to
    another.
    """
    works: dict[tuple, dict[str, Row]] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file, restval=""):
                providers = works.setdefault(tuple(row[k] for k in ("device", "op", "size", "dtype", "density")), {})
                if row["date"] >= providers.get(row["provider"], row)["date"]:
                    providers[row["provider"]] = row | {"file": path.name}
    # Works that were last timed with an implementation which no longer serves the op are history.
    serving = {}  # file, device and op → backend of our newest row
    for ours in sorted((p[OURS] for p in works.values() if OURS in p), key=lambda row: row["date"]):
        serving[ours["file"], ours["device"], ours["op"]] = ours["backend"]
    found = []
    for providers in works.values():
        our = providers.get(OURS)
        if our is None or our["backend"] == serving[our["file"], our["device"], our["op"]]:
            # Ratios are of one run: only rows of the newest run of that work stand side by side.
            date = max(row["date"] for row in providers.values())
            found += [row for row in providers.values() if row["date"] == date]
    return found
