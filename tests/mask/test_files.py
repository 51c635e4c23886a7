"""Atomic file writes: kills, full disks, several writers; errors name the file."""

import errno
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deftx_kernels import CSRMask, SparseDelta, files, interop, topk_mask
from deftx_kernels.delta import CONFIG_NAME, WEIGHTS_NAME


def delta(value, size=100):
    mask = topk_mask({"w": torch.arange(float(size * size)).view(size, size)}, k=size)
    return SparseDelta(mask, torch.full((size,), value), {"head": torch.full((size,), value)}, {"value": value})


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, and how to make it read-only."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this needs the right to mount a file system")
    yield disk, lambda: subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_writes_are_atomic_and_remove_abandoned_folders(tmp_path):
    path = tmp_path / "[a]*.json"
    files.write_json(path, {"a": float("inf")})
    assert files.read_json(path) == {"a": float("inf")}
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = files.machine()
    abandoned = [
        tmp_path / f".{path.name}.{host}-{gone.pid}-00000000.partial",
        tmp_path / f".{path.name}.{'e' * 12}-{os.getpid()}-00000000.partial",  # of another machine, a day ago
    ]
    kept = [
        tmp_path / f".{path.name}.{host}-{os.getpid()}-00000000.partial",  # of a writer that lives
        tmp_path / f".{path.name}.{'f' * 12}-{gone.pid}-00000000.partial",  # of another machine
        tmp_path / f".other.{host}-{gone.pid}-00000000.partial",  # of another file
    ]
    for folder in (*abandoned, *kept):
        folder.mkdir()
        (folder / "file").write_text("half")
    os.utime(abandoned[1], (0, 0))
    with pytest.raises(TypeError, match="JSON"):
        files.write_json(path, {"a": object()})
    files.write_text(path, "1")
    assert files.read_json(path) == 1
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])
    with pytest.raises(ZeroDivisionError), files.replaced(path) as partial:
        partial.write_text(str(1 / 0))
    assert path.read_text() == "1"
    assert sorted(tmp_path.iterdir()) == sorted([path, *kept])
    link = tmp_path / "link"
    link.symlink_to(path.name)
    files.write_text(link, "2")
    assert link.is_symlink()
    assert path.read_text() == "2"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 10_000])
def test_invalid_json_is_named(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(f"{path} is not readable JSON")):
        files.read_json(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.read_json(tmp_path / "nowhere")


def test_reading_makes_every_error_of_the_content_a_value_error(tmp_path):
    path = tmp_path / "a.bin"
    with pytest.raises(FileNotFoundError), files.reading(path, "thing"):
        pass
    path.touch()
    for error in (ValueError, KeyError, RecursionError, MemoryError, ZeroDivisionError, EOFError):
        with pytest.raises(ValueError, match="a.bin is not a readable thing: .*x"), files.reading(path, "thing"):
            raise error("x")
    for passes in (PermissionError("x"), KeyboardInterrupt()):
        with pytest.raises(type(passes)), files.reading(path, "thing"):
            raise passes


def test_several_savers_do_not_disturb_one_another(tmp_path):
    deltas = [delta(float(i)) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: deltas[i % 4].save_pretrained(tmp_path), range(24)))
        list(pool.map(lambda i: deltas[i % 4].mask.save(tmp_path / "mask"), range(24)))
    (tmp_path / CONFIG_NAME).unlink()  # that of another saver may have been the last
    value = load_file(tmp_path / WEIGHTS_NAME)["values"][0].item()
    deltas[int(value)].save_pretrained(tmp_path)
    assert SparseDelta.from_pretrained(tmp_path).metadata == {"value": value}
    assert CSRMask.load(tmp_path / "mask") == deltas[0].mask
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mask", WEIGHTS_NAME, CONFIG_NAME]
    assert (tmp_path / WEIGHTS_NAME).stat().st_mode == (tmp_path / CONFIG_NAME).stat().st_mode


def test_a_full_and_a_read_only_disk_leave_the_old_files(small_disk):
    disk, make_read_only = small_disk
    old, large = delta(1.0), delta(2.0, 500)
    large.dense["large"] = torch.zeros(200_000)
    masks = {1.0: old.mask, 2.0: topk_mask({"w": torch.rand(500, 500)}, density=1.0)}
    writes = {
        WEIGHTS_NAME: lambda d: d.save_pretrained(disk),
        "mask": lambda d: masks[d.metadata["value"]].save(disk / "mask"),
        "pytorch_diff.bin": lambda d: interop.to_composable_sft(d, disk),
    }

    def read():
        found = SparseDelta.from_pretrained(disk)
        return found.metadata, CSRMask.load(disk / "mask"), interop.from_composable_sft(disk).dense["head"].tolist()

    for write in writes.values():
        write(old)
    before, names = read(), sorted(disk.iterdir())
    for name, write in writes.items():
        with pytest.raises(OSError, match=f"{name} cannot be written: ") as caught:
            write(large)
        assert caught.value.errno in (errno.ENOSPC, None)
        with pytest.warns(RuntimeWarning, match="of another save") if name == WEIGHTS_NAME else nullcontext():
            assert read() == before
        assert sorted(disk.iterdir()) == names
        old.save_pretrained(disk)
    make_read_only()
    for name, write in writes.items():
        with pytest.raises(OSError, match=f"({name}|{CONFIG_NAME}) cannot be written: .*[Rr]ead-only"):
            write(old)
    assert read() == before


KILLS = """
import os, random, signal, sys, time, warnings
import torch
sys.path[:0] = sys.argv[2:]
from test_files import delta
from deftx_kernels import SparseDelta

torch.set_num_threads(1)
folder, chance = sys.argv[1], random.Random(0)
deltas = [delta(float(i), 300) for i in range(2)]
deltas[0].save_pretrained(folder)
seen, most, ahead = [0, 0], 0, 0
for kill in range(300):
    if not (child := os.fork()):
        while True:
            for one in deltas:
                one.save_pretrained(folder)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = SparseDelta.from_pretrained(folder)
    ahead += len(caught)
    value = int(found.metadata["value"])
    assert torch.equal(found.values, deltas[value].values)
    assert torch.equal(found.dense["head"], deltas[value].dense["head"])
    seen[value] += 1
    most = max(most, len(os.listdir(folder)))
deltas[1].save_pretrained(folder)
assert most <= 4, most
assert len(os.listdir(folder)) == 2
print("300 kills:", seen, "old and new; most files in the folder:", most, "; config of another save:", ahead)
"""


@pytest.mark.slow
def test_kills_in_a_save_loop_leave_the_old_or_the_new_delta(tmp_path):
    folder, here = tmp_path / "delta", Path(__file__).parent
    command = [sys.executable, "-c", KILLS, str(folder), str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
