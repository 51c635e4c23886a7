"""The time of a call on a simulated GPU, the machine's rates, and Nsight Compute's table."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as program
from bench import harness, machine


# ---- the time of a call on a GPU ----
class Clock:
    """A simulated host and device: work starts when the device is idle, not before the host has launched it."""

    def __init__(self, monkeypatch):
        self.now, self.idle_at = 0.0, 0.0  # milliseconds
        monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: self.now / 1e3))
        monkeypatch.setattr(harness, "flush_cache", lambda device: self.launch(0.2))
        monkeypatch.setattr(harness, "cycles", lambda: 1e6)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda count: self.launch(count / 1e6))
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        clock = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(clock.now, clock.idle_at)

            def synchronize(self):
                clock.wait()

            def elapsed_time(self, end):
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)

    def launch(self, milliseconds, host=0.0):
        self.now += host
        self.idle_at = max(self.now, self.idle_at) + milliseconds

    def wait(self):
        self.now = max(self.now, self.idle_at)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def times_of(call, **options):
    times, host = harness.timed({"a": call}, "cuda", 3, **options)
    return times["a"], host["a"]


@pytest.mark.parametrize("host", [0.3, 3.0, 9.0])
def test_host_time_is_not_kernel_time(clock, host):
    times, own = times_of(lambda: clock.launch(0.1, host))
    assert times == pytest.approx([0.1] * 3)
    assert own == pytest.approx(host)


def test_after_a_wait_the_host_counts(clock):
    def call():
        clock.launch(0.5, host=0.2)
        clock.wait()
        clock.launch(0.1, host=0.4)

    times, own = times_of(call)
    assert times == pytest.approx([0.5 + 0.4 + 0.1] * 3)
    assert own == pytest.approx(0.2 + 0.5 + 0.4)


@pytest.mark.parametrize(("host", "first", "step"), [(2.0, 2.0, 5.0), (7.0, 7.0, 7.0), (2.0, 2000.0, 5.0)])
def test_a_training_step_takes_the_longer_time_and_its_first_call_does_not_count(clock, host, first, step):
    hosts = iter([first])  # it captures a graph
    times, own = times_of(lambda: clock.launch(5.0, host=next(hosts, host)), training=True)
    assert times == pytest.approx([step] * 3)
    assert own == pytest.approx(host)


def test_what_is_timed_once_is_called_once(clock):
    calls = []

    def call():
        calls.append(None)
        clock.launch(900.0, host=100.0)
        clock.wait()

    times, own = times_of(call, once=("a",))
    assert len(calls) == 1
    # The first 1.2 of the 100 ms passed while the device was busy with cache and pause.
    assert times == pytest.approx([998.8])
    assert own == pytest.approx(999.0)


def test_on_a_cpu_there_is_no_host_time():
    times, host = harness.timed({"a": lambda: None}, "cpu", 2)
    assert len(times["a"]) == 2
    assert not host


# ---- the machine ----
def test_the_machine_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "last_cache_bytes", lambda device: 1 << 20)
    monkeypatch.setitem(machine.DENSE_BYTES, "cpu", 1 << 16)
    monkeypatch.setitem(harness.COPIED, "cpu", 1 << 14)
    monkeypatch.setitem(harness.SIDE, "cpu", 64)
    harness.ceilings.cache_clear()
    (tmp_path / machine.FILE).write_text(json.dumps({"another": {"date": "2026-01-01"}}))
    assert program.main(["machine", "--device", "cpu", "--out", str(tmp_path)]) == 0
    known = json.loads((tmp_path / machine.FILE).read_text())
    assert known.pop("another") == {"date": "2026-01-01"}
    (found,) = known.values()
    assert {"date", "commit", "torch"} <= found.keys()
    assert set(found["memory"]) == {"copy", "read", "write"}
    assert set(found["products"]) == {"torch.bfloat16", "torch.float32"}
    assert all(rate > 0 for rate in (*found["memory"].values(), *found["products"].values()))
    kinds = ("gather", "scatter", "update")
    masks = {(r["access"], r["bytes"], r["density"]) for r in found["scattered"] if "density" in r}
    assert masks == set(itertools.product(kinds, (2, 4), machine.DENSITIES))
    runs = {(r["access"], r["bytes"], r["run"]) for r in found["scattered"] if "run" in r}
    assert runs == set(itertools.product(kinds, (4,), machine.RUNS))
    assert len(found["scattered"]) == len(masks) + len(runs)
    assert all(0 < r["sector_share"] <= 1 and r["gb_s"] > 0 and r["fetch"] == 64 for r in found["scattered"])
    steps = {(r["bytes"], r["density"]) for r in found["sparse_adamw"] if r["ms"] > 0}
    assert steps == set(itertools.product((2, 4), machine.ADAMW))
    assert "sector_share" in capsys.readouterr().out
    harness.ceilings.cache_clear()


def test_writing_keeps_other_results(tmp_path):
    machine.write("x", {"memory": {"copy": 1.0}}, tmp_path)
    machine.write("x", {"kernels": []}, tmp_path)
    machine.write("x", {"memory": {"copy": 2.0}}, tmp_path)
    assert json.loads((tmp_path / machine.FILE).read_text()) == {"x": {"memory": {"copy": 2.0}, "kernels": []}}


def test_share_of_sectors():
    assert machine.sector_share(0.05, 2, "cuda") == pytest.approx(0.56, abs=0.005)
    for device, itemsize in itertools.product(("cpu", "cuda"), (2, 4)):
        position, sector = machine.random_positions(1 << 18, 0.05, "cpu"), machine.SECTOR[device]
        sectors = len(position.mul(itemsize).div(sector, rounding_mode="floor").unique())
        assert sectors / ((1 << 18) * itemsize / sector) == pytest.approx(
            machine.sector_share(0.05, itemsize, device), rel=0.02
        )


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_runs_touch_the_sectors_of_the_model(device):
    """Runs of 1 and 8 float32 touch one sector of a line, of 16 both; on a CPU, the one line."""
    dense = torch.ones(1 << 18)
    found = [(s["run"], p, share) for s, p, share in machine.patterns(dense, device) if "run" in s]
    assert [run for run, *_ in found] == [1, 8, 16]
    for run, position, share in found:
        lines = position.view(-1, run)
        assert torch.equal(lines - lines[:, :1], torch.arange(run).expand(len(lines), run))
        assert not (lines[:, 0] % 16).any()
        assert bool((lines[:, 0].diff() > 0).all())
        assert len(lines) / (len(dense) / 16) == pytest.approx(machine.LINES, rel=0.1)
        sectors = (position * 4).div(machine.SECTOR[device], rounding_mode="floor").unique()
        assert len(sectors) * machine.SECTOR[device] / dense.nbytes == pytest.approx(share)


class Driver:
    """libcuda's limit; `refuses`: a function that fails."""

    def __init__(self, refuses=""):
        self.limit, self.seen, self.refuses = 128, [], refuses

    def cuCtxGetLimit(self, pointer, which):
        pointer._obj.value = self.limit
        return 1 if self.refuses == "get" else int(which != 5)

    def cuCtxSetLimit(self, which, size):
        if self.refuses == "set":
            return 1
        self.limit = size.value
        self.seen.append(size.value)
        return int(which != 5)


@pytest.mark.parametrize(("refuses", "limits"), [("", [32, 64]), ("set", [128]), ("get", [0])])
def test_the_fetch_limit_is_set_and_reset(monkeypatch, capsys, refuses, limits):
    driver = Driver(refuses)
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch, "ones", lambda *arguments, **options: None)
    found = [(limit, driver.limit) for limit in machine.fetch_limits("cuda")]
    assert found == [(limit, limit or 128) for limit in limits]
    assert driver.limit == 128
    assert ("error 1" in capsys.readouterr().out) == bool(refuses)


def test_least_time_of_an_optimizer_step():
    """1 GB was updated in 3 ms and gathered in 1 ms; the moments of 1.1 GB of parameters are copied at 1000 GB/s."""
    same = {"bytes": 4, "density": 0.05, "fetch": 32}
    rows = [same | {"access": access, "ms": ms} for access, ms in (("gather", 1.0), ("scatter", 9.0), ("update", 3.0))]
    rows += [row | {"density": 0.3} for row in rows]
    rows.append({"access": "update", "bytes": 4, "run": 8, "fetch": 32, "ms": 9.0})
    (step,) = machine.adamw_steps(rows, 1000.0, "cuda")
    count = machine.numel("xlmr")
    expected = 4 * count / 2**30 * 4.0 + 16 * 0.05 * count / 1e9
    assert step == same | {"ms": pytest.approx(expected, abs=1e-4)}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int16])
def test_scattered_accesses(device, dtype):
    gather, scatter, update = machine.accesses(device).values()
    dense, position = torch.arange(20_000, device=device).to(dtype), machine.random_positions(20_000, 0.3, device)
    out = torch.zeros(len(position), dtype=dtype, device=device)
    gather(dense, position, out)
    assert torch.equal(out, position.to(dtype))
    scatter(dense, position, -out)
    expected = torch.arange(20_000).to(dtype)
    expected[position.cpu().long()] *= -1
    assert torch.equal(dense.cpu(), expected)
    update(dense, position, out)
    expected[position.cpu().long()] = 0
    assert torch.equal(dense.cpu(), expected)


# ---- Nsight Compute ----
def test_our_calls_run():
    for call in machine.our_calls("cpu", "tiny", side=64).values():
        call()


TABLE = """==PROF== Profiling "_gather_kernel": 0%....100% - 3 passes
what the program printed
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","dram__bytes_write.sum",{ratios}
"","","","ns","byte","byte","",""
"0","7","_gather_kernel","1,500","4,000","100","2.5","1"
"1","7","void deftx::<unnamed>::pack<float, 4>(float const*, long)","9000","100","100","n/a","4"
"2","7","_gather_kernel","500","0","100","3.5","1"
""".replace("{ratios}", ",".join(f'"{name}"' for name in list(machine.METRICS)[3:]))


def test_nsight_computes_table():
    slow, often = machine.counted(TABLE)
    assert (slow["kernel"], slow["launches"], slow["ns"], slow["sectors_per_load"]) == ("pack", 1, 9000, 0)
    sums = {"kernel": "_gather_kernel", "launches": 2, "ns": 2000, "read": 4000, "written": 200}
    assert often == sums | {"sectors_per_load": 3.0, "sectors_per_store": 1.0}
    assert machine.counted("==ERROR== no table") == []


@pytest.mark.parametrize(
    ("program_does", "status"), [("cat table", 0), ("echo no table", 1), ("cat table; exit 3", 3), ("sleep 60", -9)]
)
def test_nsight_computes_results_are_written(tmp_path, monkeypatch, capsys, program_does, status):
    (tmp_path / "table").write_text(TABLE)
    (tmp_path / "ncu").write_text(f"#!/bin/sh\ncd {tmp_path}\n{program_does}\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(tmp_path / name))
    monkeypatch.setattr(machine, "SECONDS", 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert machine.counters(tmp_path / "out") == status
    shown = capsys.readouterr().out
    if status:
        assert "ncu: exit status" in shown
        assert not (tmp_path / "out").exists()
    else:
        assert "pack" in shown
        known = json.loads((tmp_path / "out" / machine.FILE).read_text())
        assert [k["kernel"] for k in known["a GPU"]["kernels"]] == ["pack", "_gather_kernel"]


def test_without_a_gpu_nothing_is_counted(capsys, tmp_path):
    if torch.cuda.is_available() and machine.shutil.which("ncu"):
        pytest.skip("there is a GPU with ncu")
    assert program.main(["counters", "--out", str(tmp_path)]) == 0
    assert "not counted" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
