"""A training and a generating process that share patches: the same weights, bit for bit, after every step."""

import csv

import pytest
import torch

pytest.importorskip("transformers")
from bench import __main__ as command
from bench import weight_sync
from deftx_kernels import PatchReader


@torch.no_grad()
def loss(model) -> float:
    ids = weight_sync.texts()[: 64 * weight_sync.LENGTH].view(64, -1)
    return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.multithreaded
def test_fifty_steps(tmp_path):
    versions = list(weight_sync.synchronized(tmp_path, steps=50, layers=2, hidden=64, lr=3e-6))
    assert [v["version"] for v in versions] == list(range(1, 52))
    assert len({v["digest"] for v in versions}) == 51
    assert all(len(v["tokens"]) == weight_sync.GENERATED for v in versions)
    patches = [v["patch"] for v in versions[1:]]
    model = weight_sync.llama(2, 64, seed=2)
    numel = sum(p.numel() for p in model.parameters())
    assert all(0 < patch.nnz < 0.2 * numel for patch in patches)
    assert all(one.to_version == next_one.from_version for one, next_one in zip(patches, patches[1:]))
    assert PatchReader(tmp_path / "channel").update(model) == 51  # one that joins late
    assert weight_sync.digest(model) == versions[-1]["digest"]
    assert loss(model) < loss(weight_sync.llama(2, 64, seed=0)) - 0.01  # .028 lower


def test_a_difference_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_sync, "digest", lambda model: "another one")
    with pytest.raises(RuntimeError, match="version 1 is .* in the generating process, not another one"):
        list(weight_sync.synchronized(tmp_path, steps=1, layers=1, hidden=16, lr=3e-6))


def test_rows_and_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert command.main(["weight-sync", "--quick", "--out", str(tmp_path)]) == 0
    assert "the weights of each, bit for bit" in capsys.readouterr().out
    with (tmp_path / "weight_sync.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 + 5 * 5 + 3
    assert {row["op"] for row in rows} == {"weight sync", "patch size", "patch time"}
    changed = [sum(int(r["changed"]) for r in rows if r["lr"] == str(lr) and r["step"]) for lr in weight_sync.RATES]
    assert changed[0] < changed[2] < changed[4]
    assert (tmp_path / "weight_sync.png").stat().st_size > 5000
