"""Benchmark every operator and whole training steps against baselines, each in the same run.

`python -m bench` times the chosen workloads, prints the results and appends rows to bench/results. `python -m bench
table` writes the tables of README.md and bench/results/README.md, `python -m bench plot` the figures, both from the
rows alone. `python -m bench papers RUN_DIR...` collects the scores of `deftx run` (bench/papers.py). `python -m bench
weight-sync` trains and generates in two processes that share patches (bench/weight_sync.py). `python -m bench scale`
computes memory and communication of large models on many GPUs (bench/scale.py). `python -m bench machine` measures the
machine's own rates, `python -m bench counters` the memory traffic of our kernels on a GPU (bench/machine.py).
"""

import argparse
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine, report
from bench.families import FAMILIES, OPS, SIZES, workloads
from bench.harness import Choice, Workload, measure, silence_libraries
from bench.rows import OURS, RESULTS, ROOT, WORKLOAD, Workloads, append, by_workload, newest, provenance
from bench.targets import TARGETS

QUICK = ("minilm",)  # the default sizes with --quick
FULL = tuple(s for s in SIZES if s not in ("tiny", "llama7b"))
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return COMMANDS[options.command](options)


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = new.add_argument
    add("command", nargs="?", choices=tuple(COMMANDS), default="run", help="default: run")
    add("runs", nargs="*", type=Path, help="papers: folders of runs of `deftx run`")
    add("--quick", action="store_true", help="one small size, few rounds, peaks in this process: under three minutes")
    add("--targets", action="store_true", help="only the workloads, of any size, that have a performance target")
    add("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    add("--op", nargs="+", choices=OPS, metavar="OP", default=list(OPS), help=f"default: all of {', '.join(OPS)}")
    sizes = f"those that a family has; default: {', '.join(FULL)}; {', '.join(QUICK)} with --quick"
    add("--size", nargs="+", choices=SIZES, help=sizes)
    add("--dtype", nargs="+", choices=DTYPES, default=[], help="default: each family's own")
    entries = "fractions of the entries, 0 to 1; default: the family's"
    add("--density", nargs="+", type=density, default=[], help=entries)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", choices=("cpu", "cuda"), default=device, help="default: cuda where there is one")
    add("--implementation", nargs="+", default=[], help=f"only these and {OURS}, by the names in the output")
    add("--target-baselines", action="store_true", help="only the baselines that a target names")
    add("--rounds", type=int, help="timed calls of each implementation")
    add("--out", type=Path, default=RESULTS, help="folder of the rows (default: bench/results)")
    return new


def density(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a fraction of the entries: above 0, at most 1")
    return value


# ---- run ----
def run(options: argparse.Namespace) -> int:
    silence_libraries()
    torch.manual_seed(0)
    metadata = provenance(options.device)
    print(", ".join(f"{k} {v}" for k, v in metadata.items() if v))
    print("Medians of interleaved calls with flushed caches; every result is checked first. Peak: without the inputs.")
    found, op = [], ""
    for family in options.family:
        for workload in chosen(options, family):
            print_heading(workload, new=workload.op != op)
            op = workload.op
            for row in measured(workload, metadata, options):
                print_row(row)
                if "p50_ms" in row:
                    append([row], options.out / f"{family}.csv")
                found.append(row)
    wrong = [f"WRONG: {r['provider']} in {r['op']}, {r['size']}: {r['wrong']}" for r in found if "wrong" in r]
    timed = by_workload(row for row in found if "p50_ms" in row)
    print(*summary(timed), f"Rows: {options.out}. {len(wrong)} results were wrong.", *wrong, sep="\n")
    return 1 if wrong or not timed else 0


def measured(workload: Workload, metadata: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A workload's rows; after an exception one that says what failed, so that the other workloads go on."""
    rounds = options.rounds or (5 if options.quick else None)
    names = list(options.implementation)
    if options.target_baselines:  # a workload whose targets name no baseline is timed without any
        names += [OURS, *(n for t in TARGETS if t.is_about(workload) for n in (t.baseline, t.ours))]
    try:
        yield from measure(workload, metadata, rounds, tuple(names), fresh=not options.quick)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        fault = f"{type(error).__name__}: {error}"
        yield dict(zip(WORKLOAD, workload.key)) | {"provider": OURS, "wrong": fault}


def chosen(options: argparse.Namespace, family: str) -> Iterator[Workload]:
    default = SIZES if options.targets else QUICK if options.quick else FULL
    dtypes = tuple(DTYPES[name] for name in options.dtype)
    choice = Choice(options.device, tuple(options.size or default), dtypes, tuple(options.density), options.quick)
    for workload in workloads(family, choice):
        targeted = not options.targets or any(target.is_about(workload) for target in TARGETS)
        if targeted and workload.op in options.op:
            yield workload


def summary(timed: Workloads) -> list[str]:
    """In how many workloads ours was the fastest, and where it was not."""
    compared, slower = 0, []
    for workload, rows in timed.items():
        others = [row for name, row in rows.items() if not name.startswith(OURS) and row["times_ours"]]
        if others:
            compared += 1
            fastest = min(others, key=lambda row: float(row["times_ours"]))
            if (speedup := float(fastest["times_ours"])) < 1:
                where = ", ".join(filter(None, workload))
                slower.append(f"  slower in {where}: speedup {speedup:.2f} over {fastest['provider']}")
    counts = f"{compared - len(slower)} of {compared}"
    return ["", f"{OURS} was the fastest in {counts} workloads with baselines.", *slower]


def print_heading(workload: Workload, new: bool) -> None:
    if new:
        print(f"\n{workload.op}: {OPS[workload.op]}")
    print(f"\n  {workload.label}", flush=True)
    columns = f"{'speedup':>10} {'of the floor':>12} {'host':>10} {'peak':>10}"
    print(f"    {'implementation':38} {'median':>10} {'p20 .. p80':>22} {columns}")


def print_row(row: dict[str, Any]) -> None:
    name = f"{row['provider']} ({row['backend']})" if row.get("backend") else row["provider"]
    if "p50_ms" not in row:
        reason = f"WRONG: {row['wrong']}" if "wrong" in row else f"absent: {row['absent']}"
        print(f"    {name:38} {reason}", flush=True)
        return
    p20, p50, p80 = (report.duration(float(row[f"p{q}_ms"])) for q in (20, 50, 80))
    speedup = f"{float(row['times_ours']):.2f}" if row["times_ours"] else "-"
    peak = f"{float(row['peak_extra_mb']):.1f} MB" if row["peak_extra_mb"] else "-"
    host = report.duration(float(row["host_ms"])) if row["host_ms"] else "-"
    columns = f"{speedup:>10} {report.percent(float(row['share_of_floor'])):>12} {host:>10} {peak:>10}"
    print(f"    {name:38} {p50:>10} {f'{p20} .. {p80}':>22} {columns}{report.in_brackets(row)}", flush=True)


# ---- from the rows ----
def newest_rows(options: argparse.Namespace) -> list[dict[str, str]]:
    return newest(options.out) or sys.exit(f"no rows in {options.out}: run python -m bench first")


def write_tables(options: argparse.Namespace) -> int:
    rows = newest_rows(options)
    readme, page = ROOT / "README.md", options.out / "README.md"
    old = readme.read_text()
    if BEGIN not in old or END not in old:
        sys.exit(f"README.md has no {BEGIN} ... {END}")
    text = report.training_table(rows)
    readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", old, flags=re.DOTALL))
    page.write_text(report.results_page(rows))
    print(text, f"\nwritten: {readme}, {page}", sep="\n")
    return 0


def write_figures(options: argparse.Namespace) -> int:
    from bench.figures import plot

    print(*plot(newest_rows(options), options.out), sep="\n")
    return 0


def weight_sync(options: argparse.Namespace) -> int:
    from bench import weight_sync

    return weight_sync.measure(options.out, options.quick)


def write_scale(options: argparse.Namespace) -> int:
    from bench import scale

    return scale.write(options.out)


def collect_scores(options: argparse.Namespace) -> int:
    from bench import papers

    for path, rows in papers.collect(options.runs, options.out).items():
        print(papers.write(rows, path), f"\nwritten: {path}", sep="\n")
    return 0


COMMANDS = {
    "run": run,
    "table": write_tables,
    "plot": write_figures,
    "machine": lambda options: machine.measure(options.device, options.out),
    "papers": collect_scores,
    "weight-sync": weight_sync,
    "scale": write_scale,
    "counters": lambda options: machine.counters(options.out),
}

if __name__ == "__main__":
    sys.exit(main())
