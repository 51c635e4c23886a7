"""Every operator and every way of training against its peers, each in the same run.

`python -m bench` times what you choose, prints it and appends rows to bench/results; `python -m bench table` writes the
tables of README.md and bench/results/README.md, `python -m bench plot` the figures, both from the rows alone. `python
-m bench machine` measures the machine itself, `python -m bench counters` what our kernels move on a GPU
(bench/machine.py).
"""

import argparse
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine, tables
from bench.families import FAMILIES, OPS, SIZES, works
from bench.harness import Choice, Work, measure, quieten
from bench.rows import OURS, RESULTS, ROOT, append, newest, provenance
from bench.targets import TARGETS

QUICK = ("minilm",)  # the sizes without --size
FULL = tuple(s for s in SIZES if s not in ("tiny", "llama7b"))
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}
COMMANDS = ("run", "table", "plot", "machine", "counters")
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    functions = (run, write_tables, write_figures, measure_machine, count)
    return dict(zip(COMMANDS, functions))[options.command](options)


def parser() -> argparse.ArgumentParser:
    new = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    new.add_argument("command", nargs="?", choices=COMMANDS, default="run", help="default: run")
    new.add_argument(
        "--quick", action="store_true", help="one small size, few rounds, peaks in this process: under three minutes"
    )
    new.add_argument(
        "--targets", action="store_true", help="those works, of any size, that the targets in README.md are about"
    )
    new.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
    sizes = f"of those that a family has; default: {', '.join(FULL)}; {', '.join(QUICK)} with --quick"
    new.add_argument("--size", nargs="+", choices=SIZES, help=sizes)
    new.add_argument("--dtype", nargs="+", choices=DTYPES, default=[], help="default: each family's usual ones")
    new.add_argument(
        "--density", nargs="+", type=share, default=[], help="shares of the entries, 0 to 1; default: the usual ones"
    )
    new.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    new.add_argument(
        "--provider", nargs="+", default=[], help=f"these beside {OURS} (default: all), as the output names them"
    )
    new.add_argument("--target-peers", action="store_true", help="of the peers those that a target names")
    new.add_argument("--rounds", type=int, help="timed calls of each provider")
    new.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows (default: bench/results)")
    return new


def share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share of the entries: above 0, at most 1")
    return value


def device_of(options: argparse.Namespace) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def measure_machine(options: argparse.Namespace) -> int:
    machine.measure(device_of(options), options.out)
    return 0


def count(options: argparse.Namespace) -> int:
    return machine.counters(options.out)


# ---- run ----


def run(options: argparse.Namespace) -> int:
    quieten()
    torch.manual_seed(0)
    device = device_of(options)
    facts = provenance(device)
    print(", ".join(f"{k} {v}" for k, v in facts.items() if v))
    print(
        "Medians of interleaved calls, caches emptied before each; every result is checked first. Peak: beside the inputs."
    )
    tally = Tally()
    for family in options.family:
        for work in chosen(options, family, device):
            print_heading(work, tally)
            rows = []
            for row in measured(work, facts, options):
                print_row(row, work)
                tally.add(row)
                rows.append(row)
            append([row for row in rows if "p50_ms" in row], options.out / f"{family}.csv")
    print(tally.verdict(options.out))
    return 1 if tally.wrong or not tally.works else 0


def measured(work: Work, facts: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows of a work; one that says what is wrong where it cannot be made or measured. The other works go on."""
    rounds = options.rounds or (5 if options.quick else None)
    providers = [
        *options.provider,
        *(n for t in TARGETS if options.target_peers and t.is_about(work) for n in (t.peer, t.ours)),
    ]
    if options.target_peers:
        providers.append(OURS)  # a work whose targets name no peer is timed without any
    try:
        yield from measure(work, facts, rounds, tuple(providers), fresh=not options.quick)
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        yield {"op": work.op, "size": work.title, "provider": OURS, "wrong": f"{type(error).__name__}: {error}"}


def chosen(options: argparse.Namespace, family: str, device: str) -> Iterator[Work]:
    usual = SIZES if options.targets else QUICK if options.quick else FULL
    dtypes = tuple(DTYPES[name] for name in options.dtype)
    choice = Choice(device, tuple(options.size or usual), dtypes, tuple(options.density), options.quick)
    for work in works(family, choice):
        if not options.targets or any(target.is_about(work) for target in TARGETS):
            yield work


class Tally:
    """What a run came to."""

    def __init__(self) -> None:
        self.op = ""  # whose works are being printed
        self.works: dict[tuple, list[tuple[float, str]]] = {}  # work → (times as long as ours, provider) of each peer
        self.wrong: list[str] = []

    def add(self, row: dict[str, Any]) -> None:
        if "wrong" in row:
            self.wrong.append(f"WRONG: {row['provider']} in {row['op']}, {row['size']}: {row['wrong']}")
        elif "p50_ms" in row:
            peers = self.works.setdefault(tuple(row[k] for k in ("op", "size", "dtype", "density")), [])
            if not row["provider"].startswith(OURS) and row["times_ours"]:
                peers.append((float(row["times_ours"]), row["provider"]))

    def verdict(self, out: Path) -> str:
        compared = {work: peers for work, peers in self.works.items() if peers}
        behind = {work: min(peers) for work, peers in compared.items() if min(peers)[0] < 1}
        lines = [
            "",
            f"{OURS} took the least time in {len(compared) - len(behind)} of {len(compared)} works with peers.",
        ]
        for work, (ratio, provider) in behind.items():
            lines.append(
                f"  behind in {', '.join(filter(None, map(str, work)))}: {provider} takes {ratio:.2f} times as long"
            )
        lines.append(f"Rows: {out}. {len(self.wrong)} results were wrong.")
        return "\n".join(lines + self.wrong)


def print_heading(work: Work, tally: Tally) -> None:
    if work.op != tally.op:
        tally.op = work.op
        print(f"\n{work.op}: {OPS[work.op]}")
    parts = [work.title, work.dtype_name]
    parts += [f"{100 * work.density:.3g} % of the entries"] if work.density is not None else []
    print(f"\n  {', '.join(parts)}", flush=True)
    columns = f"{'times ours':>10} {'of the floor':>12} {'host':>10} {'peak':>10}"
    print(f"    {'provider':38} {'median':>10} {'p20 .. p80':>22} {columns}")


def print_row(row: dict[str, Any], work: Work) -> None:
    name = f"{row['provider']} ({row['backend']})" if row.get("backend") else row["provider"]
    if "p50_ms" not in row:
        told = f"WRONG: {row['wrong']}" if "wrong" in row else f"absent: {row['absent']}"
        print(f"    {name:38} {told}", flush=True)
        return
    p20, p50, p80 = (tables.duration(float(row[f"p{q}_ms"])) for q in (20, 50, 80))
    ratio = f"{float(row['times_ours']):.2f}" if row["times_ours"] else "-"
    peak = f"{float(row['peak_extra_mb']):.1f} MB" if row["peak_extra_mb"] else "-"
    share_of_floor = tables.percent(float(row["share_of_floor"]))
    host = tables.duration(float(row["host_ms"])) if row["host_ms"] else "-"
    state = tables.beside(row | {"op": work.op})
    columns = f"{ratio:>10} {share_of_floor:>12} {host:>10} {peak:>10}{state}"
    print(f"    {name:38} {p50:>10} {f'{p20} .. {p80}':>22} {columns}", flush=True)


# ---- from the rows ----


def found_rows(options: argparse.Namespace) -> list[dict[str, str]]:
    rows = newest(options.out)
    if not rows:
        sys.exit(f"no rows in {options.out}: run python -m bench first")
    return rows


def write_tables(options: argparse.Namespace) -> int:
    rows = found_rows(options)
    readme = ROOT / "README.md"
    old = readme.read_text()
    if BEGIN not in old or END not in old:
        sys.exit(f"README.md has no {BEGIN} ... {END}")
    text = f"{tables.of_training(rows)}\n\n{tables.of_targets(rows)}"
    readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", old, flags=re.DOTALL))
    every = options.out / "README.md"
    every.write_text(tables.of_works(rows))
    print(text, f"\nwritten: {readme}, {every}", sep="\n")
    return 0


def write_figures(options: argparse.Namespace) -> int:
    from bench.plots import plot

    for path in plot(found_rows(options), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
