"""PatchWriter and PatchReader: a reader's model is one of the writer's versions, bit for bit, whatever is killed.

`python tests/delta/test_channel.py FOLDER` kills writers and readers.
"""

import ast
import copy
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from delta_examples import clones, same
from safetensors.torch import save_file
from test_patch import two_layers
from torch import nn

from deftx_kernels import CSRMask, PatchReader, PatchWriter, SparseAdamW, SparsePatch, densify, sparsify
from deftx_kernels.delta import channel

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {"a": (40, 30), "b": (7,), "c": ()}


def content(step, shapes=None):
    """The model at a version: each step changes a few entries of the one before."""
    model = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in (shapes or SHAPES).items()}
    for i in range(step + 1):
        for tensor in model.values():
            tensor.view(-1)[i * 7919 % tensor.numel()] = i
    return model


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def written(folder, steps, **options):
    writer = PatchWriter(folder, **options)
    for step in range(1, steps + 1):
        assert writer.write(content(step)) == step
    return writer


def updated(reader, model=None):
    """The number of the version that the reader finds; its model is that version."""
    model = model or content(0)
    step = reader.update(model)
    assert same(model, content(step))
    return step


# ---- versions ----
@pytest.mark.parametrize("compact", [False, True])
def test_readers_follow_a_module(tmp_path, compact):
    model, follower = two_layers(), two_layers()
    writer, reader = PatchWriter(tmp_path, anchor_every=3, compact=compact), PatchReader(tmp_path)
    for step in range(1, 8):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter[..., -1] += step % 3
        assert writer.write(model) == step
        if step != 5:
            assert reader.update(follower) == step
            assert same(follower, model)
        late = two_layers() if step % 2 else clones(two_layers())  # tied tensors, and copies of them
        assert PatchReader(tmp_path).update(late) == step
        assert same(late, model)
    steps = {"anchors": (1, 4, 7), "deltas": range(2, 8)}
    assert files(tmp_path) == [f"{kind}/step_{i:06d}.safetensors" for kind in steps for i in steps[kind]]


def test_given_patches(tmp_path):
    writer, reader, model = PatchWriter(tmp_path, anchor_every=2), PatchReader(tmp_path), content(0)
    for step in range(1, 5):
        patch = SparsePatch.diff(content(step), content(step - 1))
        assert writer.write(content(step), patch) == updated(reader, model) == step
    for wrong, message in (
        (patch, "patch was made for version"),
        (SparsePatch({"a": (torch.tensor([0]), torch.ones(1).bfloat16())}), "has no versions"),
        (SparsePatch.diff(content(6), content(4)), "does not lead to the model's version: tensor 'a'"),
    ):
        before = files(tmp_path)
        with pytest.raises(ValueError, match=message):
            writer.write(content(5), wrong)
        assert files(tmp_path) == before
    assert writer.write(content(5)) == updated(reader, model) == 5  # without a patch: an anchor
    assert "anchors/step_000005.safetensors" in files(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_sparsified_model(tmp_path, tied):
    """Anchors too are of the plain model: those of the first version, of a later one, and after an error."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(20, 20), torch.nn.BatchNorm1d(20), torch.nn.Linear(20, 20)).bfloat16()
    if tied:
        plain[2].weight = plain[0].weight
    follower, mask = copy.deepcopy(plain), CSRMask.from_dense({"0.weight": torch.rand(20, 20) < 0.2})
    model = sparsify(plain, mask)
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2, track_changes=True)
    writer, reader, former = PatchWriter(tmp_path, anchor_every=3), PatchReader(tmp_path), None
    for step in range(1, 8):
        if step > 1:
            model(torch.randn(5, 20).bfloat16()).float().square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        patch = optimizer.take_patch(model)
        if step == 5:
            with pytest.raises(ValueError, match="patch was made for version .* the model would be written whole"):
                writer.write(model, former)
            patch = None
        assert writer.write(model, patch) == reader.update(follower) == step
        former = patch
        late = copy.deepcopy(follower)
        assert PatchReader(tmp_path).update(late) == step
        state = densify(copy.deepcopy(model)).state_dict()
        assert all(torch.equal(t, state[n]) for n, t in follower.state_dict().items())
        assert all(torch.equal(t, state[n]) for n, t in late.state_dict().items())


@pytest.mark.parametrize("url", ["{}", "memory://{}"])
def test_old_anchors_are_deleted(tmp_path, url):
    url = url.format(tmp_path)
    writer = written(url, 8, anchor_every=2, keep_anchors=2)
    early, names = PatchReader(url), writer._folder.names
    assert sorted(names("anchors")) == ["step_000005.safetensors", "step_000007.safetensors"]
    assert sorted(names("deltas")) == [f"step_{i:06d}.safetensors" for i in (6, 7, 8)]
    assert updated(early) == 8
    if url.startswith("memory"):
        writer._folder.files.pipe_file(
            f"{writer._folder.root}/deltas/step_000009.safetensors.partial", b"of a killed one"
        )
    again = PatchWriter(url)  # a writer that is started again
    assert not [name for name in names("deltas") if name.endswith(".partial")]
    assert again.write(content(9)) == updated(early) == 9


def test_wrong_arguments(tmp_path):
    written(tmp_path, 2)
    with pytest.raises(TypeError, match="model must be"):
        PatchWriter(tmp_path).write(3)
    for options, message in (({"anchor_every": 0}, "anchor_every must be at least 1"), ({"keep_anchors": 1}, "keep_")):
        with pytest.raises(ValueError, match=message):
            PatchWriter(tmp_path, **options)
    for change, message in (
        ({"a": torch.zeros(3)}, "tensor 'a' is float32 .3."),
        ({"d": torch.zeros(1)}, "has tensor 'd'"),
        ({"b": torch.zeros(1, dtype=torch.bfloat16).expand(7)}, "share memory"),
    ):
        model = {**content(0), **change}
        before = clones(model)
        with pytest.raises(ValueError, match=message):
            PatchReader(tmp_path).update(model)
        assert same(model, before)


# ---- damage ----
def test_torn_and_missing_files(tmp_path):
    writer, reader, model = written(tmp_path, 3, anchor_every=4), PatchReader(tmp_path), content(0)
    torn = tmp_path / "deltas/step_000003.safetensors"
    whole = torn.read_bytes()
    torn.write_bytes(whole[:-1])
    assert updated(reader, model) == 2
    torn.write_bytes(whole)
    assert updated(reader, model) == 3
    for step in (4, 5, 6):
        writer.write(content(step))
    (tmp_path / "deltas/step_000004.safetensors").unlink()
    (tmp_path / "deltas/step_000006.safetensors").write_bytes(b"")
    assert updated(reader, model) == 5  # by the anchor
    anchor = tmp_path / "anchors/step_000005.safetensors"
    damaged = bytearray(anchor.read_bytes())
    damaged[-1] ^= 1
    anchor.write_bytes(damaged)
    assert updated(PatchReader(tmp_path)) == 3  # by the anchor before it


def test_a_model_that_other_code_changed(tmp_path):
    writer, reader, model = written(tmp_path, 3), PatchReader(tmp_path), content(0)
    assert updated(reader, model) == 3
    assert updated(reader, content(0)) == 3  # another model
    model["b"][0] = 100
    assert updated(reader, model) == 3
    model["b"].data[0] = 100  # which torch does not count
    writer.write(content(4))
    assert updated(reader, model) == 4
    with torch.inference_mode():
        assert updated(reader, content(0)) == 4


def test_numbers_of_versions(tmp_path):
    """A file that has another name than the writer gave it; a folder that was emptied for another run."""
    written(tmp_path, 2)
    for kind, step, name in (("anchors", 1, 9), ("deltas", 2, 3)):
        (tmp_path / f"{kind}/step_{name:06d}.safetensors").write_bytes(
            (tmp_path / f"{kind}/step_{step:06d}.safetensors").read_bytes()
        )
    reader, model = PatchReader(tmp_path), content(0)
    assert updated(reader, model) == 2
    shutil.rmtree(tmp_path)
    assert updated(reader, model) == 2
    written(tmp_path, 1)
    assert updated(reader, model) == 1


@pytest.mark.parametrize("written_first", [False, True])
@pytest.mark.parametrize("fails", ["deltas/step_000003", "anchors/step_000004", "apply_"])
def test_a_writer_that_fails(tmp_path, monkeypatch, fails, written_first):
    """No number of a version is used twice: a reader may have seen the file of which the writer got an error."""
    writer, reader, model = written(tmp_path, 2, anchor_every=3), PatchReader(tmp_path), content(0)
    write, apply, failures = writer._folder.write, SparsePatch.apply_, iter([True])

    def failing_write(name, save):
        if written_first or fails not in name:
            write(name, save)
        if fails in name and next(failures, False):
            raise OSError("the disk is full")

    def failing_apply(self, target, verify=True):
        if not verify and next(failures, False):  # to the writer's copy
            raise KeyboardInterrupt
        apply(self, target, verify)

    monkeypatch.setattr(writer._folder, "write", failing_write)
    if fails == "apply_":
        monkeypatch.setattr(SparsePatch, "apply_", failing_apply)
    errors = 0
    for step in range(3, 7):
        try:
            writer.write(content(step))
        except (OSError, KeyboardInterrupt):
            errors += 1
        else:
            assert updated(reader, model) == step
        assert writer.model_version == step
        assert updated(PatchReader(tmp_path)) in (step, step - errors)
    assert errors == 1


def test_an_interrupt_while_an_anchor_is_copied(tmp_path, monkeypatch):
    written(tmp_path, 1)
    reader, model, copy = PatchReader(tmp_path), content(0), channel._copy

    def interrupted_copy(anchor, tensors, targets):
        monkeypatch.setattr(channel, "_copy", copy)
        tensors["a"].copy_(anchor.tensors["a"])
        raise KeyboardInterrupt

    monkeypatch.setattr(channel, "_copy", interrupted_copy)
    with pytest.raises(KeyboardInterrupt):
        reader.update(model)
    assert same(model, content(1))
    assert updated(reader, model) == 1


# ---- other tools ----
def test_files_of_trl(tmp_path):
    model = nn.ModuleDict({"emb": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["emb"].weight
    for kind in ("anchors", "deltas"):
        (tmp_path / kind).mkdir()
    anchor = {"emb.weight": torch.ones(4, 3), "head.bias": torch.zeros(4)}
    header = {"sparse": "False", "model_version": "1", "sparsity": "0.0"}
    save_file(anchor, tmp_path / "anchors/step_000001.safetensors", header)
    patch = {"head.bias.indices": torch.tensor([2], dtype=torch.int32), "head.bias.values": torch.tensor([5.0])}
    header = {"sparse": "True", "model_version": "2", "sparsity": "0.9", "changed_params": '["head.bias"]'}
    save_file(patch, tmp_path / "deltas/step_000002.safetensors", header)
    assert PatchReader(tmp_path).update(model) == 2
    assert model["head"].bias.tolist() == [0, 0, 5, 0]
    assert torch.equal(model["head"].weight, anchor["emb.weight"])


def test_the_weight_transfer_of_trl(tmp_path):
    writer, model, follower = PatchWriter(tmp_path), two_layers(), two_layers()
    if spec := importlib.util.find_spec("trl"):
        source = Path(spec.submodule_search_locations[0]) / "experimental/async_grpo/async_grpo_trainer.py"
        [protocol] = [
            n for n in ast.parse(source.read_text()).body if getattr(n, "name", "") == "WeightTransferProtocol"
        ]
        assert all(callable(getattr(writer, f.name)) for f in protocol.body if isinstance(f, ast.FunctionDef))
    writer.init_weight_transfer()
    reader, served = PatchReader(tmp_path), dict(follower.named_parameters())
    for step in (1, 2):
        with torch.no_grad():
            model["emb"].weight[step] += 1
        writer.pause()
        writer.send_weights(iter(model.named_parameters()))
        writer.resume()
        assert reader.update(served) == step
    writer.destroy()
    assert same(dict(follower.named_parameters()), dict(model.named_parameters()))


# ---- killed processes ----
def test_killed_writers_and_readers(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    found = dict(part.split("=") for part in result.stdout.split())
    assert int(found["killed"]) >= 40
    assert int(found["versions"]) >= 20


LARGER = {"a": (400, 300), "b": (7,)}


def _write(folder):
    writer = PatchWriter(folder, anchor_every=2, keep_anchors=2)
    for _ in range(3):
        writer.write(content(writer.model_version + 1, LARGER))


def _read(folder):
    PatchReader(folder).update(content(0, LARGER))


def _run_and_kill(work, folder, at_event=None, after=None):
    """Whether a forked process was killed, at the n-th event of its on the folder, or after some seconds."""
    child = os.fork()
    if child == 0:
        events = 0

        def hook(event, arguments):
            nonlocal events
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.listdir", "os.rmdir", "os.chmod"):
                events += folder in str(arguments[0])
                if events == at_event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            work(folder)
        finally:
            os._exit(0 if sys.exc_info()[0] is None else 1)
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _kill_at_many_points(folder):
    torch.set_num_threads(1)  # before any fork
    killed, follower, model, last = 0, PatchReader(folder), content(0, LARGER), 0
    points = [{"at_event": n} for n in range(1, 45)] + [{"after": 0.003 * n} for n in range(6)]
    for i, point in enumerate(points):
        killed += _run_and_kill(_write, folder, **point)
        if i % 6 == 0:
            killed += _run_and_kill(_read, folder, at_event=1 + i // 6)
        late = content(0, LARGER)
        steps = (follower.update(model), PatchReader(folder).update(late))
        newest = max([0, *(int(f[-18:-12]) for f in files(folder) if ".partial" not in f)])
        assert steps == (newest, newest), (steps, files(folder))
        assert same(model, content(newest, LARGER))
        assert same(late, content(newest, LARGER))
        assert newest >= last
        last = newest
    PatchWriter(folder)
    assert not [name for name in files(folder) if ".partial" in name]
    print(f"killed={killed} versions={last}")


if __name__ == "__main__":
    _kill_at_many_points(sys.argv[1])
