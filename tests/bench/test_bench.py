"""The benchmark at its smallest size: every family runs, a wrong provider is told, calls take turns, peaks are of new
processes.
"""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

from bench import __main__ as program
from bench import bench_topk, harness, rows, shapes
from bench.families import FAMILIES
from bench.harness import Case, Choice, Work, alone, measure, peak_extra
from bench.rows import COLUMNS, OURS, ROOT
from bench.targets import Target
from deftx_kernels import topk_mask

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the program on the tiny size: (exit status, rows by file)."""
    # a process a provider: too long for here
    monkeypatch.setattr(harness, "alone", lambda work, provider, rounds: harness.Alone())
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e10, 1e10))
    monkeypatch.setattr(harness, "last_cache_bytes", lambda device: 1 << 20)

    def run(*arguments):
        status = program.main([*arguments, "--size", "tiny", "--rounds", "1", "--out", str(tmp_path)])
        rows = {}
        for path in tmp_path.glob("*.csv"):
            with path.open(newline="") as file:
                rows[path.stem] = list(csv.DictReader(file))
        return status, rows

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs(bench, capsys, family, device):
    status, rows = bench("--family", family, "--device", device)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")] == []
    assert status == 0
    assert list(rows) == [family]
    assert {r["op"] for r in rows[family] if r["provider"] == OURS} == set(FAMILIES[family].OPS)
    assert all(tuple(r) == COLUMNS and float(r["p50_ms"]) > 0 and float(r["times_ours"]) > 0 for r in rows[family])
    assert len({r["provider"] for r in rows[family]}) > 1


@pytest.mark.parametrize(
    "wrong",
    [
        # the smallest
        lambda scores, density: topk_mask({n: -1 / t.abs() for n, t in scores.items()}, density=density),
        lambda scores, density: topk_mask(scores, density=density / 2),
    ],
)
def test_wrong_provider_is_told_and_gets_no_row(bench, monkeypatch, capsys, wrong):
    monkeypatch.setattr(bench_topk, "topk_mask", wrong)
    status, rows = bench("--family", "topk", "--device", "cpu")
    assert status == 1
    assert f"WRONG: {OURS} in topk_mask, tiny" in capsys.readouterr().out
    kept = [r for r in rows["topk"] if r["op"] == "topk_mask"]
    assert OURS not in {r["provider"] for r in kept}
    assert "numpy partition" in {r["provider"] for r in kept}


def test_provider_that_raises_is_told(bench, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(bench_topk, "select_mask", fails)
    status, _ = bench("--family", "topk", "--device", "cpu")
    assert status == 1
    assert "RuntimeError: out of order" in capsys.readouterr().out


def test_absent_provider_is_named(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench_topk, "available_bytes", lambda: 0)
    status, rows = bench("--family", "topk", "--device", "cpu")
    assert status == 0
    assert f"{bench_topk.LT_SFT:38} absent: needs" in capsys.readouterr().out
    assert bench_topk.LT_SFT not in {r["provider"] for r in rows["topk"]}


def test_of_the_peers_those_that_a_target_names(bench, monkeypatch):
    target = Target("cpu", "", "topk_mask", "tiny", "float32", "0.05", 1.0, peer="numpy partition")
    monkeypatch.setattr(
        program, "TARGETS", (target, replace(target, op="mask_or", dtype="bool", quantity="ms", peer=""))
    )
    status, rows = bench("--family", "topk", "--device", "cpu", "--targets", "--target-peers")
    assert status == 0
    assert [(r["op"], r["provider"]) for r in rows["topk"]] == [
        ("topk_mask", OURS),
        ("topk_mask", "numpy partition"),
        ("mask_or", OURS),
    ]


def test_a_work_that_cannot_be_made_does_not_keep_the_others_from_being_timed(bench, monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bench_topk, "select_case", fails)
    status, rows = bench("--family", "topk", "--device", "cpu")
    assert status == 1
    assert f"WRONG: {OURS} in select_mask, tiny: RuntimeError: out of memory" in capsys.readouterr().out
    assert {r["op"] for r in rows["topk"]} == {"topk_mask", "mask_or", "mask_and", "mask_sub"}


def test_chosen_dtypes_densities_and_providers(bench):
    arguments = ("--dtype", "float16", "float32", "--density", "0.5", "0.125", "--provider", "torch.take")
    status, rows = bench("--family", "csr", "--device", "cpu", *arguments)
    assert status == 0
    gathers = {(r["dtype"], r["density"], r["provider"]) for r in rows["csr"] if r["op"] == "csr_gather"}
    pairs = [(dtype, density) for dtype in ("float16", "float32") for density in ("0.5", "0.125")]
    assert gathers == {(*pair, provider) for pair in pairs for provider in (OURS, "torch.take")}


@pytest.mark.parametrize(
    "arguments", [("--density", "0"), ("--density", "1.5"), ("--dtype", "int8"), ("--size", "huge"), ("plots",)]
)
def test_wrong_choices_are_refused(arguments):
    with pytest.raises(SystemExit) as refused:
        program.main([*arguments])
    assert refused.value.code == 2


def test_choice_of_settings():
    f32, bf16 = torch.float32, torch.bfloat16
    usual = [(f32, 0.05), (f32, 0.01), (bf16, 0.05)]
    assert Choice("cpu", ()).settings(usual) == usual
    assert Choice("cpu", (), quick=True).settings(usual) == usual[:1]
    assert Choice("cpu", (), dtypes=(bf16,)).settings(usual) == [(bf16, 0.05), (bf16, 0.01)]
    assert Choice("cpu", (), densities=(0.3,)).settings(usual) == [(f32, 0.3), (bf16, 0.3)]
    assert Choice("cpu", (), dtypes=(bf16,), densities=(0.3,), quick=True).settings(usual) == [(bf16, 0.3)]


def test_listing_works_makes_nothing(monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("a tensor was made while works were listed")

    for name in ("randn", "empty", "zeros", "ones", "tensor"):
        monkeypatch.setattr(torch, name, refused)
    for family in FAMILIES.values():
        assert list(family.works(Choice("cuda", family.SIZES)))


def test_the_commit_of_a_tree_without_history_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert rows.commit() == "unknown"
    monkeypatch.setenv("DEFTX_COMMIT", "abc1234")
    assert rows.commit() == "abc1234"


# ---- one work, measured ----


def told(log, name):
    """A provider that writes down its calls."""

    def make():
        log.append(f"make {name}")

        def call():
            log.append(name)
            return name

        return call

    return make


def work_of(case, **fields):
    usual = {
        "op": "topk_mask",
        "size": "tiny",
        "title": "tiny",
        "dtype": torch.float32,
        "density": 0.05,
        "device": "cpu",
    }
    return Work(**usual | fields, make=lambda: case, tiny=lambda: case)


@pytest.fixture
def quiet(monkeypatch):
    log = []
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e9, 1e12))
    monkeypatch.setattr(harness, "flush_cache", lambda device: log.append("flush"))
    monkeypatch.setattr(harness, "peak_extra", lambda call, device: 1.0)
    return log


def test_calls_take_turns_with_empty_caches(quiet):
    names = (OURS, "a", "b")
    case = Case(10**6, {n: told(quiet, n) for n in names}, lambda result: None, flops=3e9, once=("b",))
    rows = {r["provider"]: r for r in measure(work_of(case), {}, 3, (), fresh=False)}
    assert quiet == [
        *(x for n in names for x in (f"make {n}", n)),
        *("flush", "a", "flush", "b", "flush", OURS), *("flush", OURS, "flush", "a"), *("flush", OURS, "flush", "a"),
    ]  # fmt: skip
    assert [rows[n]["rounds"] for n in names] == [3, 3, 1]
    # 3e9 operations at 1e12 a second outweigh 1 MB at 1 GB/s
    assert {float(r["floor_ms"]) for r in rows.values()} == {3.0}
    assert rows[OURS]["backend"]
    assert not rows["a"]["backend"]
    assert rows["a"]["peak_extra_mb"] == "1.0"


def test_chosen_providers_and_absent_ones(quiet):
    case = Case(
        1, {n: told(quiet, n) for n in (OURS, "a", "b")}, lambda result: None, absent={"c": "no c", "d": "no d"}
    )
    rows = list(measure(work_of(case), {}, 1, ("b", "c"), fresh=False))
    assert [(r["provider"], r.get("absent")) for r in rows] == [("c", "no c"), (OURS, None), ("b", None)]
    assert "make a" not in quiet


def test_a_whole_case_is_checked_one_provider_after_the_other(quiet):
    alive = set()

    class Model:
        def __init__(self, name):
            self.name = name
            alive.add(name)

        def __del__(self):
            alive.discard(self.name)

    def provider(name):
        def make():
            model = Model(name)
            return lambda: (model.name, set(alive))

        return make

    seen = []
    case = Case(1, {n: provider(n) for n in (OURS, "a", "b")}, lambda result: seen.append(result), whole=True)
    list(measure(work_of(case), {}, 1, (), fresh=False))
    assert seen == [(n, {n}) for n in (OURS, "a", "b")]


def slow_case(apart=True):
    return Case(1, {OURS: lambda: lambda: 1, "a": lambda: lambda: 1}, lambda result: None, whole=True, apart=apart)


def test_providers_that_do_not_fit_side_by_side_are_timed_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e9, 1e12))
    work = work_of(None)
    work = Work(**{**vars(work), "make": slow_case, "tiny": slow_case})
    rows = list(measure(work, {}, 3, (), fresh=False))
    assert [(r["provider"], r["rounds"]) for r in rows] == [(OURS, 3), ("a", 3)]
    assert all(float(r["times_ours"]) > 0 for r in rows)


def mortal_case():
    """Its second provider works here, where it is checked, and not in another process."""
    here = os.getpid()

    def make():
        return lambda: 1 if os.environ.get("DEFTX_TEST_PARENT") == str(here) else 1 / 0

    return Case(1, {OURS: lambda: lambda: 1, "a": make}, lambda result: None, whole=True, apart=True)


def test_a_provider_that_fails_only_in_its_own_process_counts_as_wrong(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e9, 1e12))
    monkeypatch.setenv("DEFTX_TEST_PARENT", str(os.getpid()))
    work = Work(**{**vars(work_of(None)), "make": mortal_case, "tiny": mortal_case})
    rows = {r["provider"]: r for r in measure(work, {}, 1, (), fresh=False)}
    assert "process of its own" in rows["a"]["wrong"]
    assert float(rows[OURS]["p50_ms"]) >= 0


# ---- peaks ----


@pytest.fixture
def minilm():
    make = partial(bench_topk.topk_case, "minilm", torch.float32, 0.05, "cpu")
    return Work("topk_mask", "minilm", "minilm", torch.float32, 0.05, "cpu", make, make)


def test_peak_of_a_fresh_process(minilm):
    if peak_extra(lambda: None, "cpu") is None:
        pytest.skip("this system does not tell a process's peak memory")
    peak = alone(minilm, "numpy partition", 1).peak
    assert peak > 1.9 * 89.2  # the magnitudes and the partitioned copy, 89.2 MB each
    assert peak < 4 * 89.2


def test_a_process_that_fails_is_told(minilm, capsys):
    assert alone(minilm, "nobody", 1) is None
    assert "nobody failed in a process of its own" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "elements"),
    [("minilm", 22.3e6), ("50M", 50e6), ("bert", 109e6), ("xlmr", 277.5e6), ("llama1b", 1.236e9), ("llama7b", 6.48e9)],
)
def test_sizes(size, elements):
    assert shapes.numel(size) == pytest.approx(elements, rel=3e-3)


# ---- pytest-benchmark ----


def pytest_bench(tmp_path, *arguments):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/",
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-q",
    ]
    command += [f"--benchmark-storage={tmp_path}", *arguments, "--family", "csr", "--size", "tiny", "--device", "cpu"]
    # Benchmarks are switched off in the processes of pytest-xdist, of which this one may be.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=250)


def test_pytest_benchmark_saves_compares_and_fails_on_a_regression(tmp_path):
    pytest.importorskip("pytest_benchmark")
    saved = pytest_bench(tmp_path, "--benchmark-save=before")
    assert saved.returncode == 0, saved.stdout
    (path,) = tmp_path.rglob("*_before.json")
    found = json.loads(path.read_text())
    names = {b["name"] for b in found["benchmarks"]}
    assert {f"test_work[csr_gather: tiny, float32, 5 %: {p}]" for p in (OURS, "torch index", "torch.take")} <= names
    for benchmark in found["benchmarks"]:
        benchmark["stats"] |= {key: benchmark["stats"][key] / 1e6 for key in ("min", "median", "mean", "max")}
    path.write_text(json.dumps(found))
    slower = pytest_bench(tmp_path, "--benchmark-compare", "--benchmark-compare-fail=median:50%")
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr
