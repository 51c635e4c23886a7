"""The benchmark at its smallest size: every family runs, wrong results are reported, calls are interleaved, peaks come
from new processes, and the command line chooses."""

import csv
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as program
from bench import bench_topk, harness, rows, shapes
from bench.families import FAMILIES
from bench.harness import Case, Choice, Workload, alone, measure, peak_extra
from bench.rows import COLUMNS, OURS, ROOT
from bench.targets import Target
from deftx_kernels import topk_mask

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the program on the tiny size: (exit status, rows by file)."""

    def alone(workload, implementation, rounds):
        """No process for each: too slow here. On a GPU, what is timed apart is timed here."""
        if workload.device == "cpu":
            return harness.Measured()
        return harness._alone_here(workload, implementation, rounds, torch.get_num_threads())

    monkeypatch.setattr(harness, "alone", alone)
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e10, 1e10))
    monkeypatch.setattr(harness, "last_cache_bytes", lambda device: 1 << 20)
    monkeypatch.setattr(harness, "trim", lambda: None)  # after each workload: half of the time

    def run(*arguments):
        status = program.main([*arguments, "--size", "tiny", "--rounds", "1", "--out", str(tmp_path)])
        found = {}
        for path in tmp_path.glob("*.csv"):
            with path.open(newline="") as file:
                found[path.stem] = list(csv.DictReader(file))
        return status, found

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs(bench, capsys, family, device):
    if not list(FAMILIES[family].workloads(Choice(device, ("tiny",)))):
        pytest.skip(f"{family} has no workloads on this device")
    status, found = bench("--family", family, "--device", device)
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("WRONG")] == []
    assert status == 0
    assert list(found) == [family]
    assert {r["op"] for r in found[family] if r["provider"] == OURS} == set(FAMILIES[family].OPS)
    assert all(tuple(r) == COLUMNS and float(r["p50_ms"]) > 0 and float(r["times_ours"]) > 0 for r in found[family])
    assert len({r["provider"] for r in found[family]}) > 1
    if family == "svd" and device == "cpu":
        backends = {r["op"]: r["backend"] for r in found[family] if r["provider"] == OURS}
        functions = ("svd_denoise", "truncated_svd", "select_mask", "lift_mask")  # torch's linear algebra, no operators
        assert all(backends[op] == "blas" for op in functions)
        assert backends["eigh"] != "blas"


def raises(*arguments, **options):
    raise RuntimeError("out of order")


def smallest(scores, density):
    return topk_mask({n: -1 / t.abs() for n, t in scores.items()}, density=density)


def half(scores, density):
    return topk_mask(scores, density=density / 2)


@pytest.mark.parametrize(
    ("name", "op", "wrong", "reason"),
    [
        ("topk_mask", "topk_mask", smallest, ""),
        ("topk_mask", "topk_mask", half, ""),
        ("select_mask", "select_mask", raises, "RuntimeError: out of order"),
        ("select_case", "select_mask", raises, "RuntimeError: out of order"),  # the workload cannot be made
    ],
)
def test_wrong_results_are_reported_and_get_no_row(bench, monkeypatch, capsys, name, op, wrong, reason):
    monkeypatch.setattr(bench_topk, name, wrong)
    status, found = bench("--family", "topk", "--device", "cpu")
    assert status == 1
    assert f"WRONG: {OURS} in {op}, tiny: {reason}" in capsys.readouterr().out
    timed = {(r["op"], r["provider"]) for r in found["topk"]}
    assert (op, OURS) not in timed
    assert ((op, "numpy partition") in timed) == (name != "select_case")
    assert {"topk_mask", "mask_or", "mask_and", "mask_sub"} <= {op for op, _ in timed}


def test_absent_implementations_are_named(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench_topk, "available_bytes", lambda: 0)
    status, found = bench("--family", "topk", "--device", "cpu")
    assert status == 0
    assert f"{bench_topk.LT_SFT:38} absent: needs" in capsys.readouterr().out
    assert bench_topk.LT_SFT not in {r["provider"] for r in found["topk"]}


def test_only_baselines_of_targets(bench, monkeypatch):
    target = Target("cpu", "", "topk_mask", "tiny", "float32", "0.05", 1.0, baseline="numpy partition")
    without = replace(target, op="mask_or", dtype="bool", quantity="ms", baseline="")
    monkeypatch.setattr(program, "TARGETS", (target, without))
    status, found = bench("--family", "topk", "--device", "cpu", "--targets", "--target-baselines")
    assert status == 0
    expected = [("topk_mask", OURS), ("topk_mask", "numpy partition"), ("mask_or", OURS)]
    assert [(r["op"], r["provider"]) for r in found["topk"]] == expected


def test_chosen_operators_dtypes_densities_and_implementations(bench):
    arguments = ("--dtype", "float16", "float32", "--density", "0.5", "0.125", "--implementation", "torch.take")
    status, found = bench("--family", "csr", "topk", "--op", "csr_gather", "--device", "cpu", *arguments)
    assert status == 0
    gathers = {(r["op"], r["dtype"], r["density"], r["provider"]) for r in found["csr"]}
    pairs = [(dtype, density) for dtype in ("float16", "float32") for density in ("0.5", "0.125")]
    assert gathers == {("csr_gather", *pair, name) for pair in pairs for name in (OURS, "torch.take")}
    assert not found.get("topk")


@pytest.mark.parametrize(
    "arguments", ["--density 0", "--density 1.5", "--dtype int8", "--op add", "--size huge", "plots"]
)
def test_wrong_choices_are_errors(arguments):
    with pytest.raises(SystemExit) as error:
        program.main(arguments.split())
    assert error.value.code == 2


DEFAULT = [(F32, 0.05), (F32, 0.01), (BF16, 0.05)]


@pytest.mark.parametrize(
    ("choice", "settings"),
    [
        ({}, DEFAULT),
        ({"quick": True}, DEFAULT[:1]),
        ({"dtypes": (BF16,)}, [(BF16, 0.05), (BF16, 0.01)]),
        ({"densities": (0.3,)}, [(F32, 0.3), (BF16, 0.3)]),
        ({"dtypes": (BF16,), "densities": (0.3,), "quick": True}, [(BF16, 0.3)]),
    ],
)
def test_choice_of_settings(choice, settings):
    assert Choice("cpu", (), **choice).settings(DEFAULT) == settings


def test_listing_workloads_makes_no_tensor(monkeypatch):
    for name in ("randn", "empty", "zeros", "ones", "tensor"):
        monkeypatch.setattr(torch, name, raises)
    for family in FAMILIES.values():
        assert [w for device in ("cpu", "cuda") for w in family.workloads(Choice(device, family.SIZES))]


def test_commit_of_a_tree_without_history(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert rows.commit() == "unknown"
    monkeypatch.setenv("DEFTX_COMMIT", "abc1234")
    assert rows.commit() == "abc1234"


# ---- one workload, measured ----
def logged(log, name):
    """An implementation that logs its calls."""

    def make():
        log.append(f"make {name}")
        return lambda: log.append(name)

    return make


def workload_of(make):
    return Workload("topk_mask", "tiny", "tiny", F32, 0.05, "cpu", make, make)


@pytest.fixture
def log(monkeypatch):
    calls = []
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e9, 1e12))
    monkeypatch.setattr(harness, "flush_cache", lambda device: calls.append("flush"))
    monkeypatch.setattr(harness, "peak_extra", lambda call, device: 1.0)
    return calls


def test_calls_are_interleaved_with_flushed_caches(log):
    names = (OURS, "a", "b")
    case = Case(10**6, {n: logged(log, n) for n in names}, lambda result: None, flops=3e9, once=("b",))
    found = {r["provider"]: r for r in measure(workload_of(lambda: case), {}, 3, (), fresh=False)}
    rounds = [["a", "b", OURS], [OURS, "a"], [OURS, "a"]]
    made = [x for n in names for x in (f"make {n}", n)]
    assert log == made + [x for each in rounds for name in each for x in ("flush", name)]
    assert [found[n]["rounds"] for n in names] == [3, 3, 1]
    # 3e9 operations at 1e12 per second take longer than 1 MB at 1 GB/s.
    assert {float(r["floor_ms"]) for r in found.values()} == {3.0}
    assert found[OURS]["backend"]
    assert not found["a"]["backend"]
    assert found["a"]["peak_extra_mb"] == "1.0"


def test_chosen_and_absent_implementations(log):
    implementations = {n: logged(log, n) for n in (OURS, "a", "b")}
    case = Case(1, implementations, lambda result: None, absent={"c": "no c", "d": "no d"})
    found = list(measure(workload_of(lambda: case), {}, 1, ("b", "c"), fresh=False))
    assert [(r["provider"], r.get("absent")) for r in found] == [("c", "no c"), (OURS, None), ("b", None)]
    assert "make a" not in log


def test_training_cases_are_checked_one_after_the_other(log):
    alive, seen = set(), []

    class Model:
        def __init__(self, name):
            self.name = name
            alive.add(name)

        def __del__(self):
            alive.discard(self.name)

    def implementation(name):
        def make():
            model = Model(name)
            return lambda: (model.name, set(alive))

        return make

    names = (OURS, "a", "b")
    case = Case(1, {n: implementation(n) for n in names}, seen.append, training=True)
    list(measure(workload_of(lambda: case), {}, 1, (), fresh=False))
    assert seen == [(n, {n}) for n in names]


def isolated_case():
    """Its third implementation fails in another process than that of DEFTX_TEST_PARENT."""
    here = str(os.getpid())
    fails = lambda: 1 if os.environ["DEFTX_TEST_PARENT"] == here else 1 / 0  # noqa: E731
    implementations = {OURS: lambda: lambda: 1, "a": lambda: lambda: 1, "b": lambda: fails}
    return Case(1, implementations, lambda result: None, training=True, isolated=True)


def test_isolated_cases_are_timed_in_processes_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e9, 1e12))
    monkeypatch.setenv("DEFTX_TEST_PARENT", str(os.getpid()))
    found = {r["provider"]: r for r in measure(workload_of(isolated_case), {}, 3, (), fresh=False)}
    assert found[OURS]["rounds"] == 3
    assert float(found[OURS]["times_ours"]) > 0
    assert float(found["a"]["times_ours"]) > 0
    assert "process of its own" in found["b"]["wrong"]
    assert "b failed in a process of its own: ZeroDivisionError" in capsys.readouterr().out


def case_with_one_apart():
    """Its second implementation must not run in the process of DEFTX_TEST_PARENT, its third is wrong."""
    here = str(os.getpid())
    calls = {OURS: lambda: 1, "a": lambda: 1 / (os.environ["DEFTX_TEST_PARENT"] != here), "b": lambda: 2}
    implementations = {name: lambda call=call: call for name, call in calls.items()}
    return Case(1, implementations, lambda result: None if result == 1 else "not 1", apart=("a", "b"))


def test_implementations_apart_are_checked_and_timed_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e9, 1e12))
    monkeypatch.setenv("DEFTX_TEST_PARENT", str(os.getpid()))
    found = {r["provider"]: r for r in measure(workload_of(case_with_one_apart), {}, 3, (), fresh=False)}
    assert found["a"]["rounds"] == found[OURS]["rounds"] == 3
    assert float(found["a"]["times_ours"]) > 0
    assert found["b"]["wrong"] == "not 1"


def test_what_is_timed_here_is_reported_before_what_is_timed_apart(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e9, 1e12))
    monkeypatch.setattr(harness, "alone", raises)
    found = measure(workload_of(case_with_one_apart), {}, 3, (), fresh=False)
    assert next(found)["provider"] == OURS
    with pytest.raises(RuntimeError, match="out of order"):
        next(found)


def test_rows_are_written_one_by_one(bench, monkeypatch, tmp_path):
    measured = program.measured

    def stopped(*arguments):
        yield from itertools.islice(measured(*arguments), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "measured", stopped)
    with pytest.raises(KeyboardInterrupt):
        bench("--family", "csr", "--device", "cpu", "--quick")
    with (tmp_path / "csr.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2


def test_on_a_gpu_a_process_is_kept_until_something_is_wrong(monkeypatch):
    pools = []

    class Pool:
        def __init__(self):
            pools.append([])
            self.calls = pools[-1]

        def submit(self, function, workload, implementation, *_):
            self.calls.append(implementation)
            if implementation == "fails":
                raise RuntimeError("its context is lost")
            return SimpleNamespace(result=lambda: harness.Measured(wrong="not 1" if implementation == "wrong" else ""))

        def shutdown(self):
            self.calls.append("shutdown")

    monkeypatch.setattr(harness, "_new_process", Pool)
    harness._gpu_process.cache_clear()
    on_gpu, on_cpu = (replace(workload_of(case_with_one_apart), device=device) for device in ("cuda", "cpu"))
    found = [alone(on_gpu, name, 1).wrong for name in ("a", "b", "fails", "c", "wrong", "d")]
    assert found == ["", "", "it failed in a process of its own (printed above)", "", "not 1", ""]
    assert pools == [["a", "b", "fails", "shutdown"], ["c", "wrong", "shutdown"], ["d"]]
    alone(on_cpu, "e", 1)
    alone(on_cpu, "f", 1)
    assert pools[3:] == [["e", "shutdown"], ["f", "shutdown"]]
    harness._gpu_process.cache_clear()


@pytest.mark.parametrize("one_by_one", [True, False])
def test_implementations_with_processes_of_their_own(log, one_by_one):
    def made(name):
        return lambda: log.append(f"make {name}") or (lambda: log.append(name) or (name, 1 / (name != "c")))

    def check(result):
        case.peaks[result[0]] = 5.0
        return "not right" if result[0] == "b" else None

    names = (OURS, "a", "b", "c")
    case = Case(1, {n: made(n) for n in names}, check, peaks={}, one_by_one=one_by_one)
    found = {r["provider"]: r for r in measure(workload_of(lambda: case), {}, 2, (), fresh=True)}
    each = {n: [f"make {n}", n] for n in names}
    if one_by_one:
        steps = [["flush", n] * 2 for n in (OURS, "a")]
        assert log == [*each[OURS], *steps[0], *each["a"], *steps[1], *each["b"], *each["c"]]
    else:
        assert log == [*(x for n in names for x in each[n]), *(x for n in ("a", OURS, OURS, "a") for x in ("flush", n))]
    faults = {"a": None, "b": "not right", "c": "ZeroDivisionError: division by zero"}
    assert {n: found[n].get("wrong") for n in "abc"} == faults
    assert float(found["a"]["times_ours"]) > 0
    assert found[OURS]["peak_extra_mb"] == "5.0"


# ---- peaks and sizes ----
def test_peak_of_a_fresh_process():
    if peak_extra(lambda: None, "cpu") is None:
        pytest.skip("this system does not report a process's peak memory")
    workload = workload_of(partial(bench_topk.topk_case, "minilm", F32, 0.05, "cpu"))
    peak = alone(workload, "numpy partition", 1).peak
    assert 1.9 * 89.2 < peak < 4 * 89.2  # the magnitudes and the partitioned copy have 89.2 MB each


@pytest.mark.parametrize(
    ("size", "elements"),
    [("minilm", 22.3e6), ("50M", 50e6), ("bert", 109e6), ("xlmr", 277.5e6), ("llama1b", 1.236e9), ("llama7b", 6.48e9)],
)
def test_sizes(size, elements):
    assert shapes.numel(size) == pytest.approx(elements, rel=3e-3)


# ---- pytest-benchmark ----
def pytest_benchmark(tmp_path, *arguments):
    options = ["bench/", "--benchmark-only", "-p", "no:cacheprovider", "-p", "no:xdist", "-q"]
    options += ["--family", "csr", "--size", "tiny", "--device", "cpu", "-k", "csr_gather", "-p", "small_cache"]
    command = [sys.executable, "-m", "pytest", f"--benchmark-storage={tmp_path}", *options, *arguments]
    # Reading 480 MB (the last cache of some machines) before each call takes most of the time.
    (tmp_path / "small_cache.py").write_text(
        "from bench import harness\nharness.last_cache_bytes = lambda device: 1 << 20\n"
    )
    # Benchmarks are switched off in the processes of pytest-xdist, of which this one may be.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), env.get("PYTHONPATH")]))
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=250)


def test_pytest_benchmark_saves_compares_and_fails_on_a_regression(tmp_path):
    pytest.importorskip("pytest_benchmark")
    saved = pytest_benchmark(tmp_path, "--benchmark-save=before")
    assert saved.returncode == 0, saved.stdout
    (path,) = tmp_path.rglob("*_before.json")
    found = json.loads(path.read_text())
    names = {b["name"] for b in found["benchmarks"]}
    assert {f"test_workload[csr_gather: tiny, float32, 5 %: {p}]" for p in (OURS, "torch index", "torch.take")} <= names
    for benchmark in found["benchmarks"]:
        benchmark["stats"] |= {key: benchmark["stats"][key] / 1e6 for key in ("min", "median", "mean", "max")}
    path.write_text(json.dumps(found))
    slower = pytest_benchmark(tmp_path, "--benchmark-compare", "--benchmark-compare-fail=median:50%")
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr
