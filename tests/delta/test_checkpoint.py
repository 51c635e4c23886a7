"""merge_into_checkpoint: equal to apply_ on the whole model, with one file in memory, and resumable."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from deftx_kernels import SparseDelta
from deftx_kernels.delta import checkpoint
from deftx_kernels.delta.checkpoint import INDEX, MARKER, WEIGHTS, merge_into_checkpoint

FILES = {"model-00001-of-00002.safetensors": ["a", "head"], "model-00002-of-00002.safetensors": ["b", "c"]}


def tensors(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 5), "b": (4, 3), "c": (7,), "head": (2, 5)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.fixture
def base(tmp_path):
    folder, weights = tmp_path / "base", tensors()
    folder.mkdir()
    for file, names in FILES.items():
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, names in FILES.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text("{}")
    for copied in ("tokenizer/vocab.json", "tokenizer/more/merges.txt"):
        (folder / copied).parent.mkdir(exist_ok=True)
        (folder / copied).write_text(copied)
    for left_out in ("pytorch_model.bin", "checkpoint-3/optimizer.pt", "checkpoint-3/state.json", ".cache/lock"):
        (folder / left_out).parent.mkdir(exist_ok=True)
        (folder / left_out).write_text("not copied")
    return folder


@pytest.fixture
def delta():
    old, new = tensors(), tensors()
    new["a"][1] += 1
    new["c"][3] = -new["c"][3]
    new["head"] += 2
    return SparseDelta.from_models(new, old, dense=["head"])


def loaded(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_merged(output, delta, **options):
    expected = tensors()
    delta.apply_(expected, **options)
    found = loaded(output)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    assert not (output / MARKER).exists()


def test_shards(base, delta, tmp_path):
    written = []
    merge_into_checkpoint(base, delta, tmp_path / "out", on_file=lambda *numbers: written.append(numbers))
    assert_merged(tmp_path / "out", delta)
    assert written == [(1, 2), (2, 2)]
    others = [INDEX, "config.json", "tokenizer/vocab.json", "tokenizer/more/merges.txt"]
    found = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(found) == sorted([*FILES, *others])
    assert (tmp_path / "out/tokenizer/vocab.json").read_text() == "tokenizer/vocab.json"
    merge_into_checkpoint(base, delta, tmp_path / "without", dense=False)
    assert_merged(tmp_path / "without", delta, dense=False)


def test_one_file(delta, tmp_path):
    (tmp_path / "base").mkdir()
    save_file(tensors(), tmp_path / "base" / WEIGHTS)
    merge_into_checkpoint(tmp_path / "base", delta, tmp_path / "out")
    assert_merged(tmp_path / "out", delta)


def test_an_interrupted_call_is_continued(base, delta, tmp_path, monkeypatch):
    output, written = tmp_path / "out", []

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_into_checkpoint(base, delta, output, on_file=stop)
    assert not (output / "config.json").exists()  # transformers cannot load it
    with pytest.raises(ValueError, match="is an unfinished merge"):
        merge_into_checkpoint(output, delta, tmp_path / "other")
    with pytest.raises(FileExistsError, match="not an unfinished merge of this base and delta"):
        merge_into_checkpoint(base, 0.5 * delta, output, strict=False)
    write = checkpoint.write_tensors
    monkeypatch.setattr(
        checkpoint, "write_tensors", lambda path, *rest: (written.append(path.name), write(path, *rest))
    )
    merge_into_checkpoint(base, delta, output)
    assert written == list(FILES)[1:]
    assert_merged(output, delta)
    with pytest.raises(FileExistsError):
        merge_into_checkpoint(base, delta, output)


def test_nothing_is_written_for_a_wrong_base(base, delta, tmp_path):
    other = tensors()
    other["c"] += 1  # in the last file
    save_file({name: other[name] for name in FILES[list(FILES)[1]]}, base / list(FILES)[1])
    with pytest.raises(ValueError, match="'c'"):
        merge_into_checkpoint(base, delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_into_checkpoint(base, delta, tmp_path / "out", strict=False)


def test_wrong_arguments(base, delta, tmp_path):
    lacking = SparseDelta.from_models({"d": torch.ones(2)}, {"d": torch.zeros(2)})
    with pytest.raises(ValueError, match="base lacks tensor 'd'"):
        merge_into_checkpoint(base, lacking, tmp_path / "out")
    with pytest.raises(ValueError, match=r"'x.a' of the delta: delta.without_prefix\('x.'\) has the base's names"):
        merge_into_checkpoint(base, delta.with_prefix("x."), tmp_path / "out")
    experts = SparseDelta.from_models({"up": torch.ones(2, 1, 1)}, {"up": torch.zeros(2, 1, 1)})
    with pytest.raises(
        ValueError, match="'up' of the delta: if its files have a tensor for each expert, load the model"
    ):
        merge_into_checkpoint(base, experts, tmp_path / "out")
    whole = SparseDelta(delta.mask, delta.values, {"score": torch.ones(2)})
    with pytest.raises(ValueError, match="base lacks tensor 'score' of the delta; dense=False"):
        merge_into_checkpoint(base, whole, tmp_path / "out", strict=False)
    shape = SparseDelta(delta.mask, delta.values, {"head": torch.ones(2)})
    with pytest.raises(ValueError, match="tensor 'head' has shape"):
        merge_into_checkpoint(base, shape, tmp_path / "out", strict=False)
    with pytest.raises(FileNotFoundError, match="give a model folder"):
        merge_into_checkpoint(tmp_path / "nowhere", delta, tmp_path / "out")
    first = next(iter(FILES))
    (base / first).unlink()
    with pytest.raises(FileNotFoundError, match=first):
        merge_into_checkpoint(base, delta, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [torch.ones(8), torch.ones(7, dtype=torch.int8), torch.ones(7).to(torch.float8_e5m2)])
def test_nothing_is_written_without_strict(bad, base, delta, tmp_path):
    save_file({"b": tensors()["b"], "c": bad}, base / list(FILES)[1])  # the last file
    with pytest.raises(ValueError, match="'c'"):
        merge_into_checkpoint(base, delta, tmp_path / "out", strict=False)
    assert not (tmp_path / "out").exists()


def test_another_head_is_another_merge(base, delta, tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_into_checkpoint(base, delta, tmp_path / "out", on_file=stop)
    other = SparseDelta(delta.mask, delta.values, {"head": delta.dense["head"] + 1}, delta.metadata, delta.low)
    with pytest.raises(FileExistsError):
        merge_into_checkpoint(base, other, tmp_path / "out")


def test_files_outside_of_the_folder_are_not_written(base, delta, tmp_path):
    save_file(tensors(), tmp_path / "x.safetensors")
    before = (tmp_path / "x.safetensors").read_bytes()
    for outside in ("../x.safetensors", str(tmp_path / "x.safetensors"), 3):
        (base / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(), outside)}))
        with pytest.raises(ValueError, match=INDEX):
            merge_into_checkpoint(base, delta, tmp_path / "out")
    assert (tmp_path / "x.safetensors").read_bytes() == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("files", [[["emb"], ["head", "w"]], [["head", "emb"], ["w"]], [["w"], ["head"]]])
def test_tied_tensors_in_the_files(files, tmp_path):
    """Both of them, in two files or in one, or only the one that is not the first in the model."""
    old, new = {"emb": torch.randn(4, 3), "w": torch.randn(2)}, {}
    old["head"] = old["emb"]
    new["w"], new["emb"] = old["w"] * 2, old["emb"] + torch.eye(4, 3)
    delta = SparseDelta.from_models(new | {"head": new["emb"]}, old)
    assert delta.metadata["tied"] == {"head": "emb"}
    folder = tmp_path / "base"
    folder.mkdir()
    weight_map = {name: f"{i}.safetensors" for i, names in enumerate(files) for name in names}
    for i, names in enumerate(files):
        save_file({name: old[name].clone() for name in names}, folder / f"{i}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    merge_into_checkpoint(folder, delta, tmp_path / "out")
    found = loaded(tmp_path / "out")
    assert found.keys() == weight_map.keys()
    assert all(torch.equal(tensor, new["w" if name == "w" else "emb"]) for name, tensor in found.items())


def test_of_two_forms_the_one_that_transformers_loads(base, delta, tmp_path):
    save_file(tensors(), base / WEIGHTS)
    merge_into_checkpoint(base, delta, tmp_path / "out")
    assert_merged(tmp_path / "out", delta)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", WEIGHTS, "tokenizer"]


def test_parts_keep_low_terms():
    old = {"a": torch.tensor([0.1, 0.3, 0.5]), "b": torch.tensor([0.1, 0.7])}
    new = {"a": torch.tensor([0.1, 1e-9, 0.25]), "b": torch.tensor([3e-9, 0.1])}
    delta = SparseDelta.from_models(new, old)
    assert delta.low is not None
    for name in ("a", "b"):
        part, tensor = delta.restricted({name: name}), {name: old[name].clone()}
        part.apply_(tensor)
        assert torch.equal(tensor[name], new[name])


def test_the_commands(base, delta, tmp_path, capsys):
    pytest.importorskip("tyro")
    from deftx_kernels.cli import main

    for name, one in (("one", delta), ("two", 0.5 * delta)):
        one.save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in ("one", "two")]
    arguments = ["--weights", "2", "-2", "-o", str(tmp_path / "out"), "--no-strict"]
    assert main(["merge", str(base), *folders, *arguments]) == 0
    assert_merged(tmp_path / "out", delta)
    assert main(["merge", str(base), *folders, "-o", str(base)]) == 2
    assert "output" in capsys.readouterr().err
    assert main(["inspect", *folders]) == 0
    text = capsys.readouterr().out
    assert "all tensors" in text
    assert "+1.000" in text
