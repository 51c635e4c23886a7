"""The run folder: its marker, what is deleted in it, its lock, and the comparison of settings and inputs."""

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deftx_kernels.train import runs
from deftx_kernels.train.config import RunConfig, TrainLanguageConfig, to_dict
from deftx_kernels.train.data_config import FilesData
from deftx_kernels.train.runs import open_run

HASHES = {"model": "1", "text": "2"}


def opened(run_dir: Path, hashes: dict = HASHES, inputs=(), **changes) -> None:
    with open_run(
        TrainLanguageConfig(**{"text": Path("a.txt"), "language": "x", "run_dir": run_dir, **changes}),
        run_dir,
        hashes,
        inputs,
    ):
        pass


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    run_dir = tmp_path / "run"
    opened(run_dir)
    for name in ("phases", "figures", "seed-1", "seed-old"):
        (run_dir / name).mkdir()
    for name in ("notes.txt", "figures/scores.png", "figures/mine.png"):
        (run_dir / name).touch()
    (tmp_path / "elsewhere").mkdir()
    (run_dir / "deltas").symlink_to(tmp_path / "elsewhere")
    opened(run_dir, overwrite=True)
    assert (run_dir / "phases").exists()  # the same run goes on
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 → 1\)"):
        opened(run_dir, seed=1)
    with pytest.raises(ValueError, match=r"other content of its inputs \(text\): choose another"):
        opened(run_dir, {**HASHES, "text": "3"})
    opened(run_dir, seed=1, overwrite=True)
    assert not (run_dir / "phases").exists()
    assert not (run_dir / "deltas").is_symlink()
    assert (tmp_path / "elsewhere").exists()
    assert {"notes.txt", "figures", "seed-old"} == {path.name for path in run_dir.iterdir()} & {
        "notes.txt",
        "figures",
        "seed-old",
        "seed-1",
    }
    assert os.listdir(run_dir / "figures") == ["mine.png"]
    assert json.loads((run_dir / "config.json").read_text())["seed"] == 1


def test_what_changes_no_result_is_not_compared(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    opened(tmp_path / "run", model="./model", device="cpu")
    opened(tmp_path / "run", model=str(tmp_path / "model"), text=tmp_path / "a.txt")
    with pytest.raises(ValueError, match="model: a folder → other"):
        opened(tmp_path / "run", model="other")

    def made_from(tests: list[str], **changes) -> dict:
        files = FilesData(["train.csv"], tests, [test.replace("csv", "txt") for test in tests])
        return runs.compared(to_dict(RunConfig(files, **changes)))

    first = made_from(["x=a.csv", "y=b.csv"])
    assert first == made_from(["x=../here/a.csv", "y=b.csv"], cost_steps=0, report_to=["wandb"])
    assert first != made_from(["y=b.csv", "x=a.csv"])
    assert first != made_from(["x=a.csv", "y=b.csv"], seeds=[1])


@pytest.mark.parametrize("name", ["config.json", "phases"])
def test_a_folder_without_the_marker_is_no_run(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("{}")
    with pytest.raises(ValueError, match="holds no run of this version .*choose another"):
        opened(tmp_path / "mine", overwrite=True)
    assert os.listdir(tmp_path / "mine") == [name]


def test_deleting_that_was_cut_off_goes_on(tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    opened(run_dir)
    for name in ("figures", "phases"):
        (run_dir / name).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_delete_contents", lambda _: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            opened(run_dir, seed=1, overwrite=True)
    assert (run_dir / "phases").exists()
    opened(run_dir)  # the first run's settings: its phases may be half gone, so none counts
    assert not (run_dir / "phases").exists()


def test_folders_where_no_run_may_be(tmp_path, monkeypatch):
    (tmp_path / "data/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path / "home/me"))
    for folder, what in (
        (".", "current"),
        ("..", "current"),
        ("/", "current"),
        (tmp_path / "home", "home"),
        (tmp_path / "link", "current"),
    ):
        with pytest.raises(ValueError, match=f"is or holds the {what} directory"):
            opened(Path(folder), overwrite=True)
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "data/inner", "link/inner/new", "data/inner/new"):
        with pytest.raises(ValueError, match="is, holds or is in the input"):
            opened(Path(folder), inputs=["data/inner", "no/such/path"])
    opened(tmp_path / "run")
    with pytest.raises(ValueError, match="is in the folder of another run"):
        opened(tmp_path / "run/phases/new")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file"):
        opened(tmp_path / "file")
    with pytest.raises(OSError, match="run_dir .*file/new cannot be made: Not a directory"):
        opened(tmp_path / "file/new")
    (tmp_path / "locked/.lock").mkdir(parents=True)
    with pytest.raises(OSError, match="run_dir .*locked cannot be written: Is a directory"):
        opened(tmp_path / "locked")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[1]",
        '{"format": "deftx_run", "made_from": {}}',
        '{"format": "deftx_run", "format_version": 1}',
        '{"format": "deftx_run", "format_version": 1, "made_from": 3}',
        '{"format": "deftx_run", "format_version": 1, "made_from": {}}',
        '{"format": "deftx_run", "format_version": 1, "made_from": {"settings": {}, "fingerprints": []}}',
    ],
)
def test_a_damaged_marker_is_named(tmp_path, content):
    opened(tmp_path / "run")
    (tmp_path / "run" / runs.MARKER).write_text(content)
    with pytest.raises(ValueError, match=f"{runs.MARKER}"):
        opened(tmp_path / "run", overwrite=True)


def test_a_folder_of_another_version(tmp_path):
    opened(tmp_path / "run")
    marker = tmp_path / "run" / runs.MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format_version": 2}))
    with pytest.raises(ValueError, match=r"another version of deftx-kernels: format_version 2, this version reads 1"):
        opened(tmp_path / "run", overwrite=True)


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        OSError, match=r"run/.lock cannot be locked \(No locks available\): its file system has no locks"
    ):
        opened(tmp_path / "run")


def test_the_lock_of_a_folder_ends_with_its_process(tmp_path):
    program = f"""
import filelock, sys
lock = filelock.FileLock({str(tmp_path / "run" / runs.LOCK)!r})
lock.acquire()
print("locked", flush=True)
sys.stdin.read()
"""
    opened(tmp_path / "run")
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match="another process uses it"):
        opened(tmp_path / "run", seed=1, overwrite=True)
    other.kill()
    other.communicate()
    opened(tmp_path / "run")
