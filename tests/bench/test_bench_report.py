"""Rows, tables and figures: rows are appended, runs are not mixed, targets are met, missed or not measured, and figures
show what the rows hold."""

import csv

import pytest

from bench import __main__ as program
from bench import report, targets
from bench import rows as bench_rows
from bench.families import FAMILIES, SIZES, workloads
from bench.harness import Choice
from bench.rows import COLUMNS, NOT_MEASURED, OURS, append, by_workload, newest, of_device, of_machine, package_of
from bench.targets import TARGETS, Target, measured

OLD, NEW = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
GPU = {"device": "a GPU", "driver": "600.1"}
DENSE = "dense, torch AdamW fused"


def row(op="topk_mask", size="minilm", **fields):
    """A row as bench/results has it: every column, as text."""
    usual = {"date": NEW, "op": op, "provider": OURS, "backend": "c++", "size": size, "dtype": "float32"}
    usual |= {"density": "0.05", "p20_ms": 0.9, "p50_ms": 1.0, "p80_ms": 1.2, "times_ours": 1.0, "share_of_floor": 0.5}
    usual |= {"device": "here", "threads": 2, "torch": "2", "commit": "abc"}
    return dict.fromkeys(COLUMNS, "") | {k: str(v) for k, v in (usual | fields).items()}


# ---- rows ----
def test_rows_are_appended_and_old_files_get_new_columns(tmp_path):
    path = tmp_path / "rows/topk.csv"
    path.parent.mkdir()
    path.write_text("date,provider\nlong ago,deftx\n")
    append([{"date": "today", "provider": "torch", "state_bytes_per_param": "8"}], path)
    append([{"date": "tomorrow"}], path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [tuple(r) for r in found] == [COLUMNS] * 3
    values = [(r["date"], r["provider"], r["state_bytes_per_param"]) for r in found]
    assert values == [("long ago", "deftx", ""), ("today", "torch", "8"), ("tomorrow", "", "")]
    assert list(path.parent.iterdir()) == [path]


OLD_RUN = {"date": OLD, "p50_ms": 9.0}
XLMR = OLD_RUN | {"size": "xlmr"}
NEWEST = {
    "of one run": (
        [row(**OLD_RUN), row(**OLD_RUN, provider="a"), row(**XLMR), row(p50_ms=3.0), row(provider="a")],
        {("minilm", OURS, "3.0"), ("minilm", "a", "1.0"), ("xlmr", OURS, "9.0")},
    ),
    "without a baseline that is gone": (
        [row(**OLD_RUN), row(**OLD_RUN, provider="gone"), row(p50_ms=3.0)],
        {("minilm", OURS, "3.0")},
    ),
    "of the backend that serves the operator now": (
        [row(**XLMR, backend="reference"), row(**XLMR, provider="a"), row(**OLD_RUN, op="mask_or"), row()],
        {("minilm", OURS, "9.0"), ("minilm", OURS, "1.0")},
    ),
    "with renamed baselines": (
        [row(), row(**OLD_RUN, provider="LT-SFT's way"), row(provider="LT-SFT", p50_ms=5.0)],
        {("minilm", OURS, "1.0"), ("minilm", "LT-SFT", "5.0")},
    ),
}


@pytest.mark.parametrize("several_files", [False, True])
@pytest.mark.parametrize(("rows", "expected"), NEWEST.values(), ids=NEWEST)
def test_newest_rows(tmp_path, rows, expected, several_files):
    old, new = ([r for r in rows if r["date"] == date] for date in (OLD, NEW))
    append(old, tmp_path / "topk.csv")
    append(new, tmp_path / ("other.csv" if several_files and "reference" not in str(old) else "topk.csv"))
    assert {(r["size"], r["provider"], r["p50_ms"]) for r in newest(tmp_path)} == expected


@pytest.mark.parametrize(
    ("name", "package"),
    [("numpy.take", "numpy"), ("PEFT LoRA", "peft"), ("scipy csr", "scipy"), ("torch index", ""), (OURS, "")],
)
def test_package_of_an_implementation(monkeypatch, name, package):
    monkeypatch.setattr(bench_rows, "version", lambda name: "7.1")
    assert package_of(name) == (f"{package} 7.1" if package else "")


def test_each_workload_is_of_the_machine_that_timed_it_last():
    cpus, gpu = [row(date=OLD, device="old Xeon"), row(device="new Xeon")], row(date=OLD, **GPU)
    assert of_device([*cpus, gpu], "cpu") == cpus[1:] == of_machine([*cpus, gpu], "cpu")
    assert of_device([*cpus, gpu], "cuda") == [gpu]
    assert of_device(cpus, "cuda") == [] == of_machine(cpus, "cuda")
    others = [row(date=OLD, device="old Xeon", size=size) for size in ("a", "b")]
    assert of_device([*cpus, *others], "cpu") == [cpus[1], *others]
    assert of_machine([*cpus, *others, gpu], "cpu") == [cpus[0], *others]  # the one with the most workloads


# ---- tables ----
def test_training_table():
    ours = row("training_step", "bert, 8x128 tokens", p50_ms=1610, peak_extra_mb=1250, parameters=2)
    a, b = {"provider": "a", "times_ours": 1.274, "peak_extra_mb": 870}, {"provider": "b", "times_ours": ""}
    small = ours | {"size": "mini", "p50_ms": "200", "peak_extra_mb": "", "parameters": "1"}
    half = ours | {"dtype": "bfloat16", "density": "0.02", "p50_ms": "500"}
    rows = [ours, ours | a, ours | b, small, small | {"provider": "a", "times_ours": "3"}]
    rows += [half, half | a, half | a | {"provider": "deftx, x"}]
    lines = [
        "| CPU (float32, 5 %) | deftx | a | b |",
        "| --- | --- | --- | --- |",
        "| mini | 200 ms | 3.00x | not measured |",
        "| bert, 8x128 tokens | 1.61 s, 1.2 GB | 1.27x, 0.87 GB | not measured |",
        "| bert, 8x128 tokens, bfloat16, 2 % | 500 ms, 1.2 GB | 1.27x, 0.87 GB | not measured |",
    ]  # fmt: skip
    table = "\n".join(lines)
    assert report.training_table(rows) == f"{table}\n\nGPU: not measured."
    on_gpu = [r | GPU for r in rows]
    assert report.training_table(rows + on_gpu) == f"{table}\n\n{table.replace('CPU', 'GPU')}"


RATIO = Target("cpu", "the workload", "topk_mask", "minilm", "float32", "0.05", 2.0, baseline="a")


@pytest.mark.parametrize(
    ("times", "verdict"), [("2.000", "2.00 x"), ("1.990", "**1.99 x, missed**"), ("31.4", "31.4 x")]
)
def test_speedup_target(times, verdict):
    rows = [row(), row(provider="a", times_ours=times), row(provider="other", times_ours=9)]
    assert report.verdict(RATIO, measured(RATIO, rows)) == verdict


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, []),
        ({}, [row()]),  # the baseline was absent
        ({}, [row(density=0.01), row(provider="a", density=0.01, times_ours=3)]),
        ({}, [row(dtype="bfloat16"), row(provider="a", dtype="bfloat16", times_ours=3)]),
        ({"quantity": targets.PEAK_OF_BASELINE}, [row(peak_extra_mb=1), row(provider="a")]),
        ({"quantity": targets.PEAK_OF_INPUT, "baseline": ""}, [row()]),
    ],
)
def test_targets_that_were_not_measured(fields, rows):
    target = Target(**{**vars(RATIO), **fields})
    assert report.verdict(target, measured(target, rows)) == NOT_MEASURED


@pytest.mark.parametrize(
    ("quantity", "bound", "ours", "value", "met"),
    [
        (targets.MS, 10, {"p50_ms": 9.5}, 9.5, True),
        (targets.MS, 10, {"p50_ms": 10.5}, 10.5, False),
        (targets.FLOOR, 0.7, {"share_of_floor": 0.71}, 0.71, True),
        (targets.FLOOR, 0.7, {"share_of_floor": 0.69}, 0.69, False),
        (targets.PEAK_OF_BASELINE, 0.4, {"peak_extra_mb": 40}, 0.4, True),
        (targets.PEAK_OF_BASELINE, 0.4, {"peak_extra_mb": 41}, 0.41, False),
        (targets.PEAK_OF_INPUT, 0.3, {"size": "10M", "peak_extra_mb": 12}, 0.3, True),
        (targets.PEAK_OF_INPUT, 0.3, {"size": "10M", "peak_extra_mb": 13}, 0.325, False),
    ],
)
def test_other_targets(quantity, bound, ours, value, met):
    target = Target(**vars(RATIO) | {"quantity": quantity, "bound": bound, "title": ours.get("size", "minilm")})
    found = measured(target, [row(**ours), row(**ours | {"provider": "a", "peak_extra_mb": 100})])
    assert found == pytest.approx(value)
    assert target.met(found) == met
    assert ("missed" in report.verdict(target, found)) == (not met)


def test_targets_name_workloads_and_baselines_that_exist():
    listed, tiny = {}, {}
    for device in ("cpu", "cuda"):
        for family in FAMILIES:
            for one in workloads(family, Choice(device, SIZES)):
                listed[(device, *one.key)] = one
    for target in TARGETS:
        key = (target.device, *target.workload)
        assert key in listed, f"no workload for {target}"
        if target.baseline and target.device == "cpu":
            case = tiny.setdefault(key, listed[key].tiny())
            assert target.baseline in {*case.implementations, *case.absent}, f"no such baseline: {target}"


def test_results_page():
    rows = [row(p50_ms=3), row(provider="slow", times_ours="4.200"), row(provider="near", times_ours="1.100")]
    text = report.results_page(rows)
    assert "## here\n\nhere, 2 threads; torch 2; 2026-01-02; commit abc.\n" in text
    assert "| minilm, float32, 5 % | 3.00 ms | 0.90 ms to 1.20 ms | 50% |  | near 1.100, slow 4.200 |" in text
    assert text.endswith("## GPU\n\nNot measured.\n")
    gpu_targets = [x for x in text.split("### GPU")[1].split("\n## ")[0].splitlines() if x.startswith("|")][2:]
    assert len(gpu_targets) == sum(t.device == "cuda" for t in TARGETS)
    assert all(line.endswith(f"| {NOT_MEASURED} |") for line in gpu_targets)
    two = report.results_page([row(device="a Xeon", size="50M"), row(device="an EPYC")])
    assert next(line for line in two.splitlines() if "peak memory" in line).endswith("| a Xeon |")
    ours = row("training_step", p50_ms=250, peak_extra_mb=1234.5, state_bytes_per_param=0.4)
    text = report.results_page([ours, ours | {"provider": "a", "times_ours": "2.000", "p50_ms": "500"}])
    assert "| 250 ms (4 steps/s, 0.40 B of state) |" in text
    assert "| 1234 MB | a 2.000 (2 steps/s, 1234 MB, 0.40 B of state) |" in text


def test_tables_are_written_between_the_markers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "ROOT", tmp_path)
    readme, results = tmp_path / "README.md", tmp_path / "rows"
    readme.write_text("no markers")
    for error in ("no rows", "has no <!-- bench:begin"):
        with pytest.raises(SystemExit, match=error):
            program.main(["table", "--out", str(results)])
        append([row()], results / "topk.csv")
    assert readme.read_text() == "no markers"
    readme.write_text(f"before\n{program.BEGIN}\nold \\1\n{program.END}\nafter\n")
    assert program.main(["table", "--out", str(results)]) == 0
    missing = "CPU: not measured.\nGPU: not measured."
    assert readme.read_text().replace("\n\n", "\n") == f"before\n{program.BEGIN}\n{missing}\n{program.END}\nafter\n"
    assert "### topk_mask" in (results / "README.md").read_text()


def test_the_readmes_table_is_narrow():
    assert max(map(len, report.training_table(newest(bench_rows.RESULTS)).splitlines())) <= 120


# ---- figures ----
figures = pytest.importorskip("bench.figures")
PARTS = [column for column, _ in figures.PARTS.values()]


def work(op, size, ms=10.0, baselines=None, **columns):
    """Rows of one run: ours, and baselines by our speedup over them."""
    names = {OURS: 1.0, **(baselines or {})}
    return [row(op, size, provider=n, p50_ms=ms * t, times_ours=t, **columns) for n, t in names.items()]


def training(size, parameters, peak, parts, provider=OURS, **columns):
    columns |= {"provider": provider, "parameters": parameters, "peak_extra_mb": peak}
    return row("training_step", size, **columns, **dict(zip(PARTS, parts)))


def test_comparisons():
    baselines = {"torch.topk + sort": 33.0, "deftx, CUDA graph": 1.1, "numpy partition": 0.8}
    half = work("topk_mask", "50M", 14, {"a": 3.0}, dtype="bfloat16")
    rows = work("topk_mask", "50M", 28, baselines)
    rows += work("select_mask", "xlmr")  # no baseline
    rows += work("sparse_adamw", "50M, dense gradient", baselines={"a": 2.0}, density=0.3)  # another density
    rows += [row("sparse_adamw", "50M, compact gradient", provider="a", times_ours=2)]  # ours is missing
    for given in (rows, rows[::-1], rows + half):
        ((title, found),) = figures.comparisons(by_workload(given)).items()
        assert title == "Select the top 5 % of 50 M scores"
        assert (found[OURS]["p50_ms"], found[OURS]["dtype"]) == ("28.0", "float32")
        speedups = [(name, figures.speedup_of(r)) for name, r in found.items()]
        assert speedups == [(OURS, 1.0), ("numpy partition", 0.8), ("torch.topk + sort", 33.0)]
    (found,) = figures.comparisons(by_workload(half)).values()
    assert found[OURS]["dtype"] == "bfloat16"
    other = figures.comparisons(by_workload(work("topk_mask", "50M", baselines={"b": 2.0, "a": 1.0})))
    assert figures.lines_of([{title: found}, other]) == {(title, OURS): 0, (title, "a"): 1, (title, "b"): 2}


def test_memory_bars():
    names = ("dense", "PEFT LoRA", "deftx, bfloat16 weights", OURS)
    rows = [training("xlmr, 8x256 tokens", 1e9, 9000, (4, 0.5, 1.25, 0.25), name) for name in names]
    rows += [training("minilm, 8x128 tokens", 1e8, 300, (4, 0, 0, 0)), row("training_step", "older", peak_extra_mb=1)]
    found = figures.memory_bars(by_workload(rows))
    assert list(found) == ["minilm, 8x128 tokens", "xlmr, 8x256 tokens"]  # the smaller model first
    (small,), bars = found.values()
    assert (figures.parts_of(small)[figures.REST], small["peak_extra_mb"]) == (0.0, "300")  # never below 0
    assert [bar["provider"] for bar in bars] == ["deftx, bfloat16 weights", OURS, "dense", "PEFT LoRA"]
    expected = {"weights": 4000, "gradients": 500, "optimizer state": 1250, "mask": 250, figures.REST: 3000}
    assert figures.parts_of(bars[0]) == pytest.approx(expected)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws rows: name → figure, kept instead of saved."""
    figure = pytest.importorskip("matplotlib.figure").Figure

    def run(rows):
        kept = {}

        def keep(figure, path, **options):
            kept[path.name.partition(".")[0]] = figure
            path.touch()

        with monkeypatch.context() as patch:
            patch.setattr(figure, "savefig", keep)
            figures.plot(rows, tmp_path)
        return kept

    return run


def texts(part):
    from matplotlib.text import Text

    return [text.get_text() for text in part.findobj(Text)]


SPEED = work("topk_mask", "50M", 28, {"slower": 21.4, "faster": 0.5})
MEMORY = [training("xlmr, 8x256 tokens", 1e9, 9000, (4, 0.5, 1.25, 0.25))]


def test_figures_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    paths = figures.plot(SPEED + MEMORY + [r | GPU for r in SPEED + MEMORY], tmp_path)
    assert [path.name for path in paths] == ["speed.png", "memory.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)  # no temporary file is left
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert figures.plot(SPEED, tmp_path) == paths[:1]
    assert "memory.png is not drawn" in capsys.readouterr().out


def test_figures_show_the_numbers_of_the_rows(drawn):
    from matplotlib.colors import to_rgba

    found = drawn(SPEED + MEMORY)
    axis = found["speed"].axes[0]
    bars = sorted((p.get_x() + p.get_width(), p.get_facecolor() == to_rgba(figures.AMBER)) for p in axis.patches)
    assert bars == [(pytest.approx(0.5), True), (pytest.approx(21.4), False)]
    assert {"21", "0.50", "deftx: 28.0 ms"} <= set(texts(axis))
    axis = found["memory"].axes[0]
    assert [patch.get_x() for patch in axis.patches] == pytest.approx([0, 4, 4.5, 5.75, 6])
    assert axis.patches[-1].get_width() == pytest.approx(3)
    assert {"9 GB", OURS} <= set(texts(axis))


def test_figures_name_the_machine_and_what_was_not_measured(drawn):
    other = work("csr_add_", "minilm", commit="3333333") + work(
        "topk_mask", "50M", 99, {"a": 7.0}, device="old", date=OLD
    )
    found = drawn(SPEED + other)["speed"]
    assert "GPU: not measured" in texts(found)
    assert all(part in texts(found)[-1] for part in ("here", "2 threads", "torch 2", "2026-01-02", "abc"))
    assert not any(part in text for text in texts(found) for part in ("3333333", "old", "99"))
    both = drawn(SPEED + [r | GPU for r in SPEED])["speed"]
    assert not any("not measured" in text for text in texts(both))
    alone = drawn([r | GPU for r in SPEED])["speed"]
    assert "CPU: not measured" in texts(alone)
    assert [axis.get_title(loc="left") for axis in alone.axes] == ["GPU", "CPU"]
