"""python -m bench: every operator against its peers, in the same run; python -m bench table: the README's table from the rows."""

import argparse
import csv
import re
import sys
from pathlib import Path

import torch

from bench import bench_csr, bench_masked, bench_steps, bench_svd, bench_topk, bench_train
from bench.harness import OURS, append, measure, provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results"
FAMILIES = {"csr": bench_csr, "topk": bench_topk, "svd": bench_svd, "train": bench_train}
FAMILIES |= {"masked": bench_masked, "steps": bench_steps}
QUICK, FULL = ("minilm",), ("minilm", "50M", "linears", "xlmr")  # the sizes without --size
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def bench(options: argparse.Namespace) -> int:
    torch.manual_seed(0)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    facts, wrong = provenance(device), []
    print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
    print(f"{'op':21} {'provider':31} {'backend':10} {'size':32} {'p50':>11} {'x ours':>8} {'floor':>6} {'peak MB':>9}")
    wanted = options.size or (QUICK if options.quick else FULL)
    for name in options.only or FAMILIES:
        family = FAMILIES[name]
        for case in family.cases(device, options.quick, tuple(s for s in family.SIZES if s in wanted)):
            if options.quick:
                case.again = None  # starting a process for each provider takes longer than the work
            for provider, reason in case.absent.items():
                print(f"{case.op:21} {provider:31} absent: {reason}", flush=True)
            rows = list(measure(case, device, facts, options.rounds or (min(case.rounds, 5) if options.quick else None)))
            for row in rows:
                if "wrong" in row:
                    wrong.append(f"{row['op']}, {row['provider']}, {row['size']}: {row['wrong']}")
                    print("WRONG", wrong[-1])
                    continue
                where = f"{row['size']}, {row['dtype']}" + (f", {row['density']:.0%}" if row["density"] else "")
                share = f"{float(row['share_of_floor']):6.1%}"
                times = f"{row['p50_ms']:>8} ms {row['times_ours']:>8}"
                peak = row["peak_extra_mb"] or "-"
                print(f"{row['op']:21} {row['provider']:31} {row['backend']:10} {where:32} {times} {share} {peak:>9}", flush=True)
            append([r for r in rows if "wrong" not in r], options.out / f"{name}.csv")
    print(f"rows went to {options.out}; {len(wrong)} providers gave a wrong result", *wrong, sep="\n")
    return 1 if wrong else 0


def newest(folder: Path) -> list[dict[str, str]]:
    """The last row of each provider for each work and device, with its file; a work may have moved from one file to another."""
    rows: dict[tuple, dict[str, dict[str, str]]] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                providers = rows.setdefault(tuple(row[k] for k in ("device", "op", "size", "dtype", "density")), {})
                if row["date"] >= providers.get(row["provider"], row)["date"]:
                    providers[row["provider"]] = row | {"file": path.name}
    # Works that were last timed with an implementation which no longer serves the op are history.
    serving = {}  # file, device and op → backend of our newest row
    for ours in sorted((p[OURS] for p in rows.values() if OURS in p), key=lambda row: row["date"]):
        serving[ours["file"], ours["device"], ours["op"]] = ours["backend"]
    found = []
    for providers in rows.values():
        ours = providers.get(OURS)
        if ours is None or ours["backend"] == serving[ours["file"], ours["device"], ours["op"]]:
            # Ratios are of one run: only rows of the newest run of that work stand side by side.
            date = max(row["date"] for row in providers.values())
            found += [row for row in providers.values() if row["date"] == date]
    return found


def table(rows: list[dict[str, str]]) -> str:
    lines = []
    for device in dict.fromkeys(r["device"] for r in rows):
        here = [r for r in rows if r["device"] == device]
        facts = {
            k: dict.fromkeys(r[k] for r in sorted(here, key=lambda r: r["date"])) for k in ("threads", "torch", "date", "commit")
        }
        days = dict.fromkeys(d[:10] for d in facts["date"])
        several = {k: ", ".join(facts[k]) for k in facts}
        lines += [
            f"{device}, {several['threads']} threads, torch {several['torch']}, {', '.join(days)}, commit {several['commit']}:",
            "",
        ]
        lines += ["| op | work | served by | ours, median | share of the floor | peers, times as long |", "|" + "---|" * 6]
        for ours in (r for r in here if r["provider"] == OURS):
            work = [ours["size"], ours["dtype"], *([f"{float(ours['density']):.0%}"] if ours["density"] else [])]
            same = ("op", "size", "dtype", "density", "date")
            peers = [r for r in here if r is not ours and all(r[k] == ours[k] for k in same)]
            against = ", ".join(f"{r['provider']} {float(r['times_ours']):.2f}{beside(r)}" for r in peers)
            cells = [ours["op"], ", ".join(work), ours["backend"], f"{float(ours['p50_ms']):.2f} ms{beside(ours)}"]
            share = float(ours["share_of_floor"])
            lines.append(f"| {' | '.join(cells)} | {share:{'.0%' if share >= 0.1 else '.1%'}} | {against} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def beside(row: dict[str, str]) -> str:
    """In brackets: of training steps the steps per second and the peak memory; of optimizers the bytes of state for each parameter
    (rows of an older header have none)."""
    facts = []
    if row["op"] == "training_step":
        facts.append(f"{1e3 / float(row['p50_ms']):.3g} steps/s")
        if row["peak_extra_mb"]:
            facts.append(f"{float(row['peak_extra_mb']):.0f} MB")
    if row.get("state_bytes_per_param"):
        facts.append(f"{float(row['state_bytes_per_param']):.2f} B")
    return f" ({', '.join(facts)})" if facts else ""


def write_table(options: argparse.Namespace) -> int:
    rows = newest(options.out)
    if not rows:
        print(f"no rows in {options.out}: run python -m bench first", file=sys.stderr)
        return 1
    text = table(rows)
    print(text)
    readme = ROOT / "README.md"
    old = readme.read_text()
    if BEGIN not in old or END not in old:
        print(f"README.md has no {BEGIN} ... {END}", file=sys.stderr)
        return 1
    readme.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{text}\n{END}", old, flags=re.DOTALL))
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("command", nargs="?", choices=("run", "table"), default="run")
    parser.add_argument("--quick", action="store_true", help="fewer works and rounds, peaks in this process: two minutes")
    parser.add_argument("--only", nargs="+", choices=FAMILIES, help="families (default: all)")
    known = list(dict.fromkeys(s for family in FAMILIES.values() for s in family.SIZES))
    sizes = f"sizes of work (default: {', '.join(FULL)}; {', '.join(QUICK)} with --quick), of those that a family has"
    parser.add_argument("--size", nargs="+", choices=known, help=sizes)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--rounds", type=int, help="timed calls of each provider")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows (default: bench/results)")
    options = parser.parse_args(arguments)
    return write_table(options) if options.command == "table" else bench(options)


if __name__ == "__main__":
    sys.exit(main())
