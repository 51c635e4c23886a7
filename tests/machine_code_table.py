"""The table of the GPU kernels' machine code: what aot.py prints, writes and compares."""

import csv
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import machine_code
from machine_code import MachineCode

TABLE = Path(__file__).resolve().parents[1] / "bench/results/machine_code.csv"
KEY = ("kernel", "variant", "arch")
# Per KB of the main path's widest accesses to global memory, or per iteration where it has none.
WORSE = {"instructions": 1.05, "shared_accesses": 1.05, "warps": 0.95}


class Row(NamedTuple):
    kernel: str
    variant: str
    arch: str
    registers: int
    spill_stores: int  # bytes
    spill_loads: int  # bytes
    shared: int  # bytes a block
    missing: tuple[str, ...]  # instructions that should have been there
    code: MachineCode


def toolchain() -> str:
    import triton

    nvcc = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout if shutil.which("nvcc") else ""
    release = re.search(r"V(\d+\.\d+\.\d+)", nvcc)
    return f"nvcc {release[1] if release else 'none'}, triton {triton.__version__}"


def cells_of(row: Row) -> dict[str, str | int | float]:
    """A row of the table. `warps`: at a time on a multiprocessor (without dynamic shared memory of csrc/cuda)."""
    main, arch = row.code.main, int(row.arch.removeprefix("sm_").rstrip("a"))
    per = 1024 / (32 * main.wide) if main.wide else 1
    return {
        **dict(zip((*KEY, "registers", "spill_stores", "spill_loads", "shared_memory"), row)),
        "warps": machine_code.occupancy(arch, row.code.threads, row.registers, row.shared),
        "loop": "yes" if row.code.loop else "no",
        "bytes": 32 * main.wide,
        "instructions": round(main.instructions * per, 1),
        "longest": round(row.code.longest * per, 1),
        "shared_accesses": round(main.shared * per, 2),
        "barriers": main.barriers,
        "share_of_bandwidth": round(row.code.bandwidth_share, 2) if arch == 90 else "",
    }


def table(rows: list[dict]) -> str:
    cells = [[name.replace("_", " ") for name in rows[0]], *([str(x) for x in row.values()] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if i > 2 else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells
    )


def write_table(rows: list[dict]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# {toolchain()}\n")
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _with_keys(rows: list[dict]) -> tuple[list[tuple[str, ...]], list[dict]]:
    """Keys and rows; kernels of one name in two files are told apart by their order."""
    seen: dict[tuple[str, ...], int] = {}
    keys = []
    for row in rows:
        name = tuple(str(row[x]) for x in KEY)
        seen[name] = seen.get(name, 0) + 1
        keys.append((*name, str(seen[name])))
    return keys, rows


def worse_than_table(rows: list[dict]) -> Iterator[str]:
    """What is worse than in the committed table, or is not there: it is of the same compilers, or nothing is said."""
    with TABLE.open(newline="") as file:
        made_with = file.readline().removeprefix("# ").strip()
        before = dict(zip(*_with_keys(list(csv.DictReader(file)))))
    if made_with != toolchain():
        print(f"\nNot compared with {TABLE.name}, which is of {made_with}: this is {toolchain()}")
        return
    for key, row in zip(*_with_keys(rows)):
        former = before.get(key)
        label = ", ".join(filter(None, key[:-1]))
        if former is None:
            yield f"{label}: not in {TABLE.name}; `make aot ARGS=--write` adds it"
            continue
        for name, limit in WORSE.items():
            now, then = float(row[name]), float(former[name])
            if (now - then * limit) * (limit - 1) > 0:
                yield f"{label}: {name} {former[name]} -> {row[name]}, more than 5 % worse than in {TABLE.name}"
