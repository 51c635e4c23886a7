"""The files of a delta, and fingerprints."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from delta_examples import deltas_of, save_version_2, tensors, tune
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from deftx_kernels import CSRMask, SparseDelta, compose, interop
from deftx_kernels.delta import CONFIG_NAME, WEIGHTS_NAME, fingerprint
from deftx_kernels.delta.card import model_card

ONE = CSRMask.from_dense({"a": torch.ones(1, dtype=torch.bool)})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, dtype):
    base = tensors()
    tuned, mask = tune(base)
    metadata = {"method": "deft-x", "settings": {"rank": 4}}
    delta = SparseDelta.from_models(tuned | {"head": torch.ones(2)}, base, mask, metadata=metadata)
    delta.save_pretrained(tmp_path / "delta", dtype)
    assert sorted(p.name for p in (tmp_path / "delta").iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]
    assert json.loads((tmp_path / "delta" / CONFIG_NAME).read_text())["lossy"] == (dtype is not None)
    again = SparseDelta.from_pretrained(tmp_path / "delta")
    assert again.mask == mask
    assert torch.equal(again.values, delta.values.to(dtype or torch.float32).float())
    assert torch.equal(again.dense["head"], torch.ones(2))
    metadata = json.loads(json.dumps(delta.metadata))
    if dtype is not None:
        del metadata["inexact_entries"]
        metadata["lossy"] = str(dtype).removeprefix("torch.")
        again.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / CONFIG_NAME).read_text())["lossy"]
        assert compose(delta, again).metadata["lossy"] == metadata["lossy"]
    assert again.metadata == metadata


def test_a_failed_save_leaves_the_old_delta(tmp_path, monkeypatch):
    (delta,) = deltas_of(tensors(), 1)
    delta.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TypeError, match=r"metadata\['x'\] cannot be written as JSON"):
        SparseDelta(delta.mask, delta.values, metadata={"x": object()}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="overflows"):
        SparseDelta(ONE, torch.tensor([1e6])).save_pretrained(tmp_path, torch.float16)
    file = tmp_path / WEIGHTS_NAME
    flat = SparseDelta(delta.mask["enc.bias"], delta.mask.part("enc.bias", delta.values))
    for write in (flat.save_pretrained, lambda path: interop.to_composable_sft(flat, path)):
        with pytest.raises(NotADirectoryError, match=f"{WEIGHTS_NAME} is a file"):
            write(file)
    with pytest.raises(FileNotFoundError, match=f"{WEIGHTS_NAME} is a file"):
        SparseDelta.from_pretrained(file)

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("deftx_kernels.files.save_file", fail)
    with pytest.raises(OSError, match="sparse_delta.safetensors cannot be written: disk full"):
        delta.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_the_weights_file_is_the_delta(tmp_path):
    """A kill between the two files leaves the configuration of another save beside it."""
    deltas = deltas_of(tensors(), 1, 2)
    for name, delta in zip("ab", deltas):
        delta.save_pretrained(tmp_path / name)
    folder = tmp_path / "a"
    config, weights = folder / CONFIG_NAME, folder / WEIGHTS_NAME
    text = config.read_text()
    config.write_text((tmp_path / "b" / CONFIG_NAME).read_text())
    with pytest.warns(RuntimeWarning, match="is of another save"):
        loaded = SparseDelta.from_pretrained(folder)
    assert loaded.mask == deltas[0].mask
    assert torch.equal(loaded.values, deltas[0].values)

    def check_unreadable(path, message=""):
        with pytest.raises(ValueError, match=f"{path.name} is not a readable .*{message}"):
            SparseDelta.from_pretrained(folder)

    for damaged in (text.replace('"nnz"', '"nNz"'), "[" * 100_000, "{}", "5", text[:-20]):
        config.write_text(damaged)
        check_unreadable(config)
    config.write_text(json.dumps(json.loads(text)))  # another layout
    assert SparseDelta.from_pretrained(folder).mask == deltas[0].mask
    config.write_text(text)
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # of a value
    weights.write_bytes(content)
    check_unreadable(weights, "sparse delta: .*checksum")
    save_file({"values": torch.ones(1)}, weights, {"format": "deftx_sparse_delta", "content": "0"})
    check_unreadable(weights, "written by an older version")
    weights.write_bytes(b"x" * 100)
    check_unreadable(weights)
    for path in (config, weights):
        path.unlink()
        with pytest.raises(FileNotFoundError, match=rf"{path.name}$"):
            SparseDelta.from_pretrained(folder)
        path.write_text("")
    weights.unlink()
    (folder / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"but a whole model: sparse_delta\(model\)"):
        SparseDelta.from_pretrained(folder)


def test_a_folder_that_is_missing_is_sought_on_the_hub(tmp_path, monkeypatch):
    def download(repo_id, revision, allow_patterns):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a folder nor a repository .*: no network"):
        SparseDelta.from_pretrained("nowhere")
    deltas_of(tensors(), 1)[0].save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    assert SparseDelta.from_pretrained("me/delta", revision="main").mask.nnz


def test_metadata_comes_back_as_json_represents_it(tmp_path):
    metadata = {"lr": float("nan"), "max": float("inf"), "steps": {10: 1, 9: 2}, "pair": (1, 2), "text": "é\u2028"}
    SparseDelta(ONE, torch.ones(1), metadata=metadata).save_pretrained(tmp_path)
    again = SparseDelta.from_pretrained(tmp_path).metadata
    assert json.dumps(again) == json.dumps(json.loads(json.dumps(metadata)), sort_keys=True)
    for key, bad in (
        ("base_fingerprint", 5),
        ("base_fingerprint", {"a": 1}),
        ("base_fingerprint", {1: "a"}),
        ("tied", ["a"]),
    ):
        with pytest.raises(TypeError, match=f"{key} must be a mapping"):
            SparseDelta(ONE, torch.ones(1), metadata={key: bad})


@pytest.mark.parametrize("has_card", [False, True])
def test_push_to_hub_uploads_the_two_files_and_a_card(monkeypatch, has_card):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def file_exists(self, repo_id, filename):
            return has_card

        def upload_folder(self, repo_id, folder_path, commit_message):
            assert repo_id == "me/delta"
            uploaded.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    (delta,) = deltas_of(tensors(), 1)
    delta.metadata |= {"base_model": "me/base", "method": "lt-sft"}
    assert delta.push_to_hub("delta", dtype=torch.bfloat16) == "commit"
    assert uploaded.keys() - {"README.md"} == {WEIGHTS_NAME, CONFIG_NAME}
    assert ("README.md" in uploaded) != has_card
    if not has_card:
        card = ModelCard(uploaded["README.md"].decode())
        data = card.data.to_dict()
        assert (data["base_model"], data["library_name"], data["method"]) == ("me/base", "deftx-kernels", "lt-sft")
        assert data["density"] == delta.mask.density
        assert "sparse-delta" in data["tags"]
        for text in ("SparseDelta.from_pretrained('me/delta')", "rounded to bfloat16"):
            assert text in card.text


def test_a_card_does_not_name_a_folder_as_the_base():
    for base in ("/home/me/model", None, 5):
        data = ModelCard(model_card("me/delta", ONE, {}, {"base_model": base})).data.to_dict()
        assert "base_model" not in data
        assert data["method"] == "unknown"


@pytest.mark.parametrize(
    ("entries", "columns", "dtype"),
    [(0, 4, torch.uint8), (255, 300, torch.uint8), (256, 300, torch.uint16), (70_000, 70_000, torch.int32)],
)
def test_row_counts_take_the_smallest_type(tmp_path, entries, columns, dtype):
    dense = torch.zeros(3, columns, dtype=torch.bool)
    dense[1, :entries] = True
    delta = SparseDelta(CSRMask.from_dense({"w": dense, "z": torch.ones(2, dtype=torch.bool)}), torch.ones(entries + 2))
    delta.save_pretrained(tmp_path)
    stored = load_file(tmp_path / WEIGHTS_NAME)
    assert stored["row_counts"].dtype == dtype
    assert stored["row_counts"].tolist() == [0, entries, 0, 2]
    assert SparseDelta.from_pretrained(tmp_path).mask == delta.mask


def test_files_of_version_2_are_read(tmp_path):
    delta, other = deltas_of(tensors(), 1, 2)
    save_version_2(delta, tmp_path / "old")
    again = SparseDelta.from_pretrained(tmp_path / "old")
    assert again.mask == delta.mask
    assert torch.equal(again.values, delta.values)
    other.save_pretrained(tmp_path / "new")
    (tmp_path / "old" / CONFIG_NAME).write_text((tmp_path / "new" / CONFIG_NAME).read_text())
    with pytest.warns(RuntimeWarning, match="is of another save"):
        assert SparseDelta.from_pretrained(tmp_path / "old").mask == delta.mask


def test_each_flipped_bit_of_either_file_is_found(tmp_path):
    """Also one that changes no value: e and E in a number or an escape of JSON."""
    metadata = {"lr": 1e-5, "text": "é", "base_fingerprint": {"a": "x"}}
    SparseDelta(ONE, torch.ones(1), {"h": torch.ones(2)}, metadata).save_pretrained(tmp_path)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        path, content = tmp_path / name, (tmp_path / name).read_bytes()
        letters = [8 * i + 5 for i, byte in enumerate(content) if byte == ord("e")]
        for i in {*range(0, 8 * len(content), 61), *letters}:
            damaged = bytearray(content)
            damaged[i // 8] ^= 1 << i % 8
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=name):
                SparseDelta.from_pretrained(tmp_path)
        path.write_bytes(content)


def test_fingerprints_depend_on_every_bit():
    t = torch.randn(1000)
    same = fingerprint({"a": t})
    assert fingerprint({"a": t.clone()}) == same
    for change in (lambda x: x[500].neg_(), lambda x: x.copy_(x.flip(0)), lambda x: x[:2].copy_(x[:2].flip(0))):
        other = t.clone()
        change(other)
        assert fingerprint({"a": other}) != same
    assert fingerprint({"a": t.view(10, 100)}) != same
    assert fingerprint({"a": t.double()}) != same
    w = torch.tensor([1.0, 0, 2, 0, 2, 0, 1])
    assert fingerprint({"a": w}) != fingerprint({"a": torch.tensor([2.0, 0, 1, 0, 1, 0, 2])})
    t.numpy()[0] = 7
    assert fingerprint({"a": t}) != same
    large = {n: torch.arange(float(n), 9e6, dtype=torch.float64)[::2] for n in "12"}  # by threads
    assert fingerprint(large) == {n: fingerprint({n: t.contiguous()})[n] for n, t in large.items()}
    assert len(same["a"]) == 64
