"""Runs that are killed, whose disk fills up, or that share a folder: all end with the metrics of an undisturbed run."""

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from train_tiny import sentence, write_csv

from deftx_kernels import cli
from tests.process_groups import CONTEXT

pytestmark = pytest.mark.slow
TIMES = {"seconds", "median_step_seconds", "resumed_from"}  # what may differ from run to run
PHASE = {"lr": "0.01", "max-steps": "6", "eval-every": "2", "weight-decay": "0.01"}


def run_command(arguments: list[str], log: Path, file_size: int | None = None) -> None:
    """In a process of its own: the command, its messages in `log`."""
    os.setsid()
    sys.stdout = sys.stderr = log.open("w")
    torch.set_num_threads(1)
    if file_size is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
    code = cli.main(arguments)
    sys.stdout.flush()
    os._exit(code)


class Small:
    """A run of a few seconds, in processes that are forked from one that has imported everything."""

    def __init__(self, model: str, folder: Path):
        for number, language in enumerate(("source", "first")):
            for split, start, count in (("train", 0, 48), ("valid", 100, 16), ("test", 200, 24)):
                rows = [(i, *sentence(i + 31 * number)) for i in range(start, start + count)]
                write_csv(folder / "data" / language / f"{split}.csv", rows)
        options = {"batch-size": "8", "accumulation": "1", "max-length": "24"}
        options |= {f"{phase}.{name}": value for phase in ("dense", "sparse") for name, value in PHASE.items()}
        phases = [
            item
            for vector in ("task", "language")
            for name, value in options.items()
            for item in (f"--{vector}.{name}", value)
        ]
        self.folder = folder
        self.arguments = ["run", "nusax", "--data-dir", str(folder / "data"), "--sources", "source", "--model", model]
        self.arguments += [
            *["--device", "cpu", "--cost-steps", "0", "--language.head-steps", "3", "--recipes", "deft-x"],
            *phases,
        ]
        self.run(folder / "warm", folder / "log")  # the first process of the server waits for its imports
        began = time.perf_counter()
        assert self.run(folder / "whole", folder / "log") == 0, (folder / "log").read_text()
        self.seconds = time.perf_counter() - began
        self.bytes = sum(path.stat().st_size for path in (folder / "whole").rglob("*"))

    def start(self, run_dir: Path, log: Path, file_size: int | None = None):
        process = CONTEXT.Process(
            target=run_command, args=([*self.arguments, "--run-dir", str(run_dir)], log, file_size)
        )
        process.start()
        return process

    def run(self, run_dir: Path, log: Path, file_size: int | None = None) -> int:
        process = self.start(run_dir, log, file_size)
        process.join()
        return process.exitcode

    def ends_like_an_undisturbed_run(self, run_dir: Path, log: Path) -> bool:
        assert self.run(run_dir, log) == 0, log.read_text()
        return metrics(run_dir) == metrics(self.folder / "whole")


def metrics(run_dir: Path):
    def kept(value):
        if isinstance(value, dict):
            return {name: kept(inner) for name, inner in value.items() if name not in TIMES}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    return kept(json.loads((run_dir / "metrics.json").read_text()))


@pytest.fixture(scope="module")
def small(tiny_bert, tmp_path_factory) -> Small:
    return Small(tiny_bert, tmp_path_factory.mktemp("small"))


def kill(process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


@pytest.mark.parametrize("number", range(20))
def test_killed_twice(small, tmp_path, number):
    moments = random.Random(number)
    for _ in range(2):
        process = small.start(tmp_path / "run", tmp_path / "log")
        time.sleep(moments.uniform(0, 0.9 * small.seconds))
        kill(process)
    assert small.ends_like_an_undisturbed_run(tmp_path / "run", tmp_path / "log")


@contextlib.contextmanager
def disk(folder: Path, size: int):
    """A disk of `size` bytes, or None where this user may not mount one."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("number", range(10))
def test_a_disk_that_fills_up(small, tmp_path, number):
    """Where no disk can be mounted, files may not grow beyond a size instead."""
    share = 0.17 * (number + random.Random(number).random())  # up to 1.7: checkpoints need more than the final folder
    with disk(tmp_path / "disk", int(share * small.bytes)) as mounted:
        run_dir = tmp_path / "disk/run"
        code = small.run(run_dir, tmp_path / "log", None if mounted else int(share * 200_000))
        said = (tmp_path / "log").read_text()
        assert code in (0, 2), said
        if code == 2:
            last = said.splitlines()[-1]
            assert last.startswith("deftx: ")
            assert "cannot be written" in last or "No space left" in last or "File too large" in last
            assert str(run_dir) in last
            assert "Traceback" not in said
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=100m", mounted], check=True)
        assert small.ends_like_an_undisturbed_run(run_dir, tmp_path / "log-again")


@pytest.mark.parametrize("number", range(6))
def test_two_runs_in_one_folder(small, tmp_path, number):
    logs = [tmp_path / "log-0", tmp_path / "log-1"]
    first = small.start(tmp_path / "run", logs[0])
    if number % 2:  # the second comes while the first trains, however busy the machine is
        while not (tmp_path / "run/phases").is_dir() and first.is_alive():
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)
    second = small.start(tmp_path / "run", logs[1])
    second.join()
    if number % 2:
        os.kill(first.pid, signal.SIGCONT)
    first.join()
    codes = [first.exitcode, second.exitcode]
    assert sorted(codes) == [0, 2], [log.read_text() for log in logs]
    assert "another process uses it" in logs[codes.index(2)].read_text()
    assert metrics(tmp_path / "run") == metrics(small.folder / "whole")
