"""The tables made from rows: training steps and targets beside what was measured (the README's), and every work
(bench/results/README.md)."""

from bench.families import OPS
from bench.rows import OURS, Row
from bench.targets import NOT_MEASURED, TARGETS, Target, measured, of_device, rows_about


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines)]


def origin(rows: list[Row]) -> str:
    """Hardware, versions, dates and commits of rows of one device, in a sentence's part."""
    rows = sorted(rows, key=lambda row: row["date"])

    def several(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in rows if row.get(column)))

    days = ", ".join(dict.fromkeys(row["date"][:10] for row in rows))
    versions, threads = [f"torch {several('torch')}", several("package")], f", {several('threads')} threads"
    if several("driver"):
        versions, threads = [*versions, f"triton {several('triton')}", f"driver {several('driver')}"], ""
    return f"{several('device')}{threads}; {', '.join(filter(None, versions))}; {days}; commit {several('commit')}"


def percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def duration(milliseconds: float) -> str:
    if milliseconds >= 1000:
        return f"{milliseconds / 1000:.2f} s"
    return f"{milliseconds:.1f} ms" if milliseconds >= 10 else f"{milliseconds:.2f} ms"


# ---- training steps ----


def of_training(rows: list[Row]) -> str:
    """A line for each model: the time of ours, the peers' in multiples of it, and the peak memory of each."""
    lines = []
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        steps = [row for row in of_device(rows, device) if row["op"] == "training_step"]
        steps.sort(key=lambda row: float(row["parameters"] or 0))
        peers = list(dict.fromkeys(row["provider"] for row in steps if row["provider"] != OURS))
        found = {(row["size"], row["dtype"], row["density"], row["provider"]): row for row in steps}
        cells = []
        for (title, dtype, density, provider), ours in found.items():
            if provider == OURS:
                others = [found.get((title, dtype, density, peer)) for peer in peers]
                work = f"{title}, {dtype}, {100 * float(density):.3g} %"
                cells.append([work, f"{duration(float(ours['p50_ms']))}{peak(ours)}", *map(multiple, others)])
        lines += table([f"one step, {name}", "ours", *peers], cells) if cells else [f"{name}: {NOT_MEASURED}."]
        lines.append("")
    return "\n".join(lines).rstrip()


def multiple(row: Row | None) -> str:
    return f"{float(row['times_ours']):.2f} x{peak(row)}" if row and row["times_ours"] else NOT_MEASURED


def peak(row: Row) -> str:
    return f", {float(row['peak_extra_mb']) / 1e3:.2f} GB" if row["peak_extra_mb"] else ""


# ---- targets ----


def of_targets(rows: list[Row]) -> str:
    lines = []
    for device, name in (("cpu", "CPU"), ("cuda", "GPU")):
        here = of_device(rows, device)
        lines += [f"{name}: {origin(here) if here else NOT_MEASURED}.", ""]
        header, cells = ["work", "compared with", "target", "measured"], []
        several = len({row["device"] for row in here}) > 1
        for t in (t for t in TARGETS if t.device == device):
            cells.append([t.what, against(t), bound(t), verdict(t, measured(t, here))])
            if several:
                cells[-1].append(", ".join({row["device"]: "" for row in rows_about(t, here).values()}))
        lines += [*table([*header, *(["on"] if several else [])], cells), ""]
    return "\n".join(lines).rstrip()


def against(target: Target) -> str:
    if target.peer:
        return f"{target.peer}: peak memory" if target.quantity.startswith("peak") else target.peer
    return {
        "ms": "its time",
        "share of the floor": "the floor",
        "peak of the input's": "the input's bytes: peak memory",
    }[target.quantity]


def quantity(target: Target, value: float) -> str:
    if target.quantity == "ms":
        return duration(value)
    if target.quantity == "share of the floor":
        return percent(value)
    return f"{value:.2f} x" if value < 10 else f"{value:.1f} x"


def bound(target: Target) -> str:
    return f"{'at least' if target.at_least else 'at most'} {quantity(target, target.bound)}"


def verdict(target: Target, value: float | None) -> str:
    if value is None:
        return NOT_MEASURED
    return quantity(target, value) if target.met(value) else f"**{quantity(target, value)}, missed**"


# ---- every work ----


def of_works(rows: list[Row]) -> str:
    lines = ["# Every work, as last measured", "", "Written by `python -m bench table` from the rows beside it.", ""]
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        lines += [f"## {device}", "", f"{origin(here)}.", ""]
        for op in dict.fromkeys(row["op"] for row in here):
            ours = [row for row in here if row["op"] == op and row["provider"] == OURS]
            if ours:
                backend = ", ".join(dict.fromkeys(row["backend"] for row in ours))
                lines += [f"### {op}", "", f"{OPS.get(op, op).capitalize()}. Served by {backend}.", ""]
                header = ["work", "ours", "p20 to p80", "share of the floor", "peak memory", "peers, times as long"]
                lines += [*table(header, [work_line(row, here) for row in ours]), ""]
    if not any(row.get("driver") for row in rows):
        lines += ["## GPU", "", f"{NOT_MEASURED.capitalize()}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def work_line(ours: Row, rows: list[Row]) -> list[str]:
    work = [ours["size"], ours["dtype"], *([f"{100 * float(ours['density']):.3g} %"] if ours["density"] else [])]
    same = ("op", "size", "dtype", "density", "date")
    peers = [row for row in rows if row is not ours and all(row[k] == ours[k] for k in same)]
    peers.sort(key=lambda row: float(row["times_ours"] or "inf"))
    p20, p50, p80 = (float(ours[f"p{q}_ms"]) for q in (20, 50, 80))
    against = ", ".join(f"{row['provider']} {row['times_ours']}{beside(row, peak=True)}" for row in peers)
    spread = f"{duration(p20)} to {duration(p80)}"
    return [
        ", ".join(work),
        duration(p50) + beside(ours),
        spread,
        percent(float(ours["share_of_floor"])),
        megabytes(ours),
        against,
    ]


def megabytes(row: Row) -> str:
    return f"{float(row['peak_extra_mb']):.0f} MB" if row["peak_extra_mb"] else ""


def beside(row: Row, peak: bool = False) -> str:
    """In brackets: of training steps the steps per second and the peak, of optimizers the bytes of state for each
    parameter.
    """
    facts = []
    if row["op"] == "training_step":
        facts.append(f"{1e3 / float(row['p50_ms']):.3g} steps/s")
        if peak and row["peak_extra_mb"]:
            facts.append(megabytes(row))
    if row.get("state_bytes_per_param"):
        facts.append(f"{float(row['state_bytes_per_param']):.2f} B of state")
    return f" ({', '.join(facts)})" if facts else ""
