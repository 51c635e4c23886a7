"""The tables made from rows: training steps for README.md; the performance targets and every workload for
bench/results/README.md."""

import re
from collections.abc import Iterator

from bench.families import OPS
from bench.rows import NOT_MEASURED, OURS, Row, by_workload, of_device, workload_of
from bench.targets import FLOOR, MS, SPEEDUP, TARGETS, Target, measured

KINDS = {"cpu": "CPU", "cuda": "GPU"}
SHORT = {  # heads of the README's columns
    "dense, torch AdamW fused": "dense AdamW",
    "dense + mask, torch AdamW fused": "dense + mask",
}


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)]


def origin(rows: list[Row]) -> str:
    """Hardware, versions, dates and commits of the rows of one device."""
    rows = sorted(rows, key=lambda row: row["date"])

    def distinct(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in rows if row.get(column)))

    days = ", ".join(dict.fromkeys(row["date"][:10] for row in rows))
    versions, threads = [f"torch {distinct('torch')}", distinct("package")], f", {distinct('threads')} threads"
    if distinct("driver"):
        versions, threads = [*versions, f"triton {distinct('triton')}", f"driver {distinct('driver')}"], ""
    return f"{distinct('device')}{threads}; {', '.join(filter(None, versions))}; {days}; commit {distinct('commit')}"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def duration(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.{2 if milliseconds < 10 else 1 if milliseconds < 100 else 0}f} ms"


def details(row: Row, *, dtype: str = "", density: str = "") -> str:
    """A workload's title, with dtype and density where they are not the given ones."""
    parts = [row["size"], row["dtype"] if row["dtype"] != dtype else ""]
    parts += [f"{100 * float(row['density']):.3g} %" if row["density"] and row["density"] != density else ""]
    return ", ".join(filter(None, parts))


# ---- training steps ----
def training_table(rows: list[Row]) -> str:
    """A table per device with a line per model: our time, the speedup over each baseline, and the peak memory."""
    tables, missing = [], []
    for kind, name in KINDS.items():
        steps = [row for row in of_device(rows, kind) if row["op"] == "training_step"]
        steps.sort(key=lambda row: float(row["parameters"] or 0))
        if not steps:
            missing.append(f"{name}: {NOT_MEASURED}.")
            continue
        # What a variant of ours or of a baseline adds stands in bench/results/README.md.
        names = dict.fromkeys(row["provider"] for row in steps if not row["provider"].startswith(OURS))
        baselines = [n for n in names if not n.endswith((" weights", " graph"))]
        models = [found for found in by_workload(steps).values() if OURS in found]
        dtype, density = (most_common([found[OURS][column] for found in models]) for column in ("dtype", "density"))
        lines = []
        for found in models:
            ours = found[OURS] | {"size": re.sub(r", \d+ rows$", "", found[OURS]["size"])}
            cells = [f"{duration(float(ours['p50_ms']))}{peak(ours)}", *(speedup(found.get(n)) for n in baselines)]
            lines.append([details(ours, dtype=dtype, density=density), *cells])
        header = f"{name} ({dtype}, {100 * float(density):.3g} %)" if models else name
        tables.append("\n".join(table([header, OURS, *(SHORT.get(n, n) for n in baselines)], lines)))
    return "\n\n".join(tables + missing)


def most_common(values: list[str]) -> str:
    return max(dict.fromkeys(values), key=values.count, default="")


def speedup(row: Row | None) -> str:
    return f"{float(row['times_ours']):.2f}x{peak(row)}" if row and row["times_ours"] else NOT_MEASURED


def peak(row: Row) -> str:
    gigabytes = float(row["peak_extra_mb"] or 0) / 1e3
    return f", {gigabytes:.{1 if gigabytes >= 1 else 2}f} GB" if gigabytes else ""


# ---- targets ----
def target_tables(rows: list[Row]) -> list[str]:
    lines = []
    for kind, name in KINDS.items():
        here = of_device(rows, kind)
        lines += [f"### {name}", "", f"{origin(here) if here else NOT_MEASURED.capitalize()}.", ""]
        devices = {workload_of(row): row["device"] for row in here}
        several = len(set(devices.values())) > 1
        cells = []
        for t in (t for t in TARGETS if t.device == kind):
            bound = f"{'at least' if t.at_least else 'at most'} {quantity(t, t.bound)}"
            cells.append([t.what, against(t), bound, verdict(t, measured(t, here))])
            cells[-1] += [devices.get(t.workload, "")] if several else []
        lines += [*table(["workload", "baseline", "target", "measured", *(["on"] if several else [])], cells), ""]
    return lines


def against(target: Target) -> str:
    if target.quantity in (MS, FLOOR):
        return "time" if target.quantity == MS else FLOOR
    what = "speedup" if target.quantity == SPEEDUP else "peak memory"
    return f"{target.baseline or 'bytes of the input'}: {what}"


def quantity(target: Target, value: float) -> str:
    if target.quantity == MS:
        return duration(value)
    if target.quantity == FLOOR:
        return percent(value)
    return f"{value:.2f} x" if value < 10 else f"{value:.1f} x"


def verdict(target: Target, value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return quantity(target, value) if target.met(value) else f"**{quantity(target, value)}, missed**"


# ---- every workload ----
HEAD = """# Benchmark results

Written by `python -m bench table` from the rows beside this file. Every number is from the newest run of its workload.
A speedup is a baseline's time divided by ours in the same run, above 1 where deftx is faster. The floor is the least
time in which this machine could move the bytes and do the arithmetic.

![Speedup over each baseline](speed.png)

![Memory of training](memory.png)

![Sparse patches: size by learning rate, and the time of getting one](weight_sync.png)

![Memory and communication of a GPU for Llama 3.1 on 8 to 1,024 GPUs](scale.png)

The last figure is computed, not measured (`python -m bench scale`, all numbers: scale.csv; what is counted:
bench/scale.py). The same functions give the bytes that two processes have sent and held (`distributed_step` below).
Dotted: 80 GB.

## Performance targets
"""


def results_page(rows: list[Row]) -> str:
    lines = [HEAD, *target_tables(rows)]
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        lines += [f"## {device}", "", f"{origin(here)}.", ""]
        timed = [found for found in by_workload(here).values() if OURS in found]
        for op in dict.fromkeys(row["op"] for row in here):
            shown = [found for found in timed if found[OURS]["op"] == op]
            if shown:
                backend = ", ".join(dict.fromkeys(found[OURS]["backend"] for found in shown))
                meaning = OPS.get(op, op)
                lines += [f"### {op}", "", f"{meaning[0].upper()}{meaning[1:]}. Backend: {backend}.", ""]
                if any(row.get("sent_bytes_per_param") for found in shown for row in found.values()):
                    lines += [*table(OF_A_PROCESS, [line for found in shown for line in process_lines(found)]), ""]
                    continue
                header = ["workload", OURS, "p20 to p80", FLOOR, "peak memory", "speedup over"]
                lines += [*table(header, list(map(workload_line, shown))), ""]
    if not any(row.get("driver") for row in rows):
        lines += ["## GPU", "", f"{NOT_MEASURED.capitalize()}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def workload_line(found: dict[str, Row]) -> list[str]:
    ours = found[OURS]
    baselines = sorted(
        (row for row in found.values() if row is not ours), key=lambda r: float(r["times_ours"] or "inf")
    )
    p20, p50, p80 = (duration(float(ours[f"p{q}_ms"])) for q in (20, 50, 80))
    floor = percent(float(ours["share_of_floor"]))
    speedups = ", ".join(f"{row['provider']} {row['times_ours']}{in_brackets(row, peak=True)}" for row in baselines)
    return [details(ours), p50 + in_brackets(ours), f"{p20} to {p80}", floor, megabytes(ours), speedups]


# Of one process: what it sends in a step with ring algorithms, what gloo sends, and what the process holds.
OF_A_PROCESS = ["workload", "implementation", "step", "sent", "by gloo"]
OF_A_PROCESS += ["weights", "gradients", "state", "masks", "peak memory"]


def process_lines(found: dict[str, Row]) -> Iterator[list[str]]:
    for name, row in found.items():
        columns = (f"{what}_bytes_per_param" for what in ("sent", "wire", "weight", "gradient", "state", "mask"))
        sizes = [float(row["parameters"]) * float(row[c]) / 1e6 if row[c] else None for c in columns]
        shown = ["" if size is None else f"{size:.3g} MB" if size < 100 else f"{size:.0f} MB" for size in sizes]
        yield [details(row), name, duration(float(row["p50_ms"])), *shown, megabytes(row)]


def megabytes(row: Row) -> str:
    return f"{float(row['peak_extra_mb']):.0f} MB" if row["peak_extra_mb"] else ""


def in_brackets(row: Row, peak: bool = False) -> str:
    """Of training steps the steps per second and the peak, of optimizers the bytes of state per parameter."""
    steps = row["op"] == "training_step"
    parts = [f"{1e3 / float(row['p50_ms']):.3g} steps/s" if steps else "", megabytes(row) if steps and peak else ""]
    if row.get("state_bytes_per_param"):
        parts.append(f"{float(row['state_bytes_per_param']):.2f} B of state")
    if row.get("file_bytes_per_param"):
        parts.append(f"{float(row['file_bytes_per_param']):.2f} B per value")
    return f" ({', '.join(filter(None, parts))})" if any(parts) else ""
