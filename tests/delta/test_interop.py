"""Files and matrices of other libraries."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deftx_kernels import CSRMask, SparseDelta, interop, topk_mask

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the files that composable-sft and PEFT wrote are not at ../shared/fixtures"
)


def dense(delta):
    zeros = {n: torch.zeros(s) for n, s in zip(delta.mask.names, delta.mask.shapes)}
    return delta.mask.add_(zeros, delta.values)


def save_sft(folder, content):
    torch.save(content, folder / interop.SFT_NAME)


@needs_fixtures
def test_a_file_that_composable_sft_wrote(tmp_path):
    delta = interop.from_composable_sft(FIXTURES / "composable_sft")
    expected = load_file(FIXTURES / "composable_sft" / "expected_dense.safetensors")
    got = {f"diff.{n}": t for n, t in dense(delta).items()} | {f"abs.{n}": t for n, t in delta.dense.items()}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], expected[n]) for n in expected)
    interop.to_composable_sft(delta, tmp_path)
    ours = torch.load(tmp_path / interop.SFT_NAME, weights_only=True)
    again = interop.from_composable_sft(tmp_path)
    assert again.mask == delta.mask
    assert torch.equal(again.values, delta.values)
    assert all(type(s) is int for e in ours["diffs"].values() for s in e["index_steps"])


@needs_fixtures
def test_an_adapter_that_peft_wrote():
    got = dense(interop.from_peft_shira(FIXTURES / "peft_shira"))
    expected = load_file(FIXTURES / "peft_shira" / "expected_dense.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():  # written as (base + difference) - base, so up to the rounding of the sum
        torch.testing.assert_close(got[name], tensor, atol=5e-7, rtol=0)
        assert torch.equal(got[name] != 0, tensor != 0)


def test_composable_sft_encoding_is_column_major(tmp_path):
    values = torch.tensor([[1.0, 0.0, 3.0], [2.0, 0.0, 4.0]])
    delta = SparseDelta(CSRMask.from_dense({"w": values != 0}), values[values != 0])
    interop.to_composable_sft(delta, tmp_path)
    encoded = torch.load(tmp_path / interop.SFT_NAME, weights_only=True)["diffs"]["w"]
    assert encoded["index_steps"] == [0, 1, 3, 1]
    assert encoded["values"].tolist() == [1, 2, 3, 4]
    cube = SparseDelta(CSRMask.from_dense({"c": torch.ones(2, 2, 2, dtype=torch.bool)}), torch.ones(8))
    with pytest.raises(ValueError, match="'c' has 3 dimensions"):
        interop.to_composable_sft(cube, tmp_path)


def test_composable_sft_reads_three_dimensions_empty_tensors_and_parameters(tmp_path):
    """The original reader decodes 3-D tensors wrongly."""
    cube = torch.zeros(2, 3, 4)
    cube[1, 2, 0], cube[0, 1, 3] = 5.0, 6.0
    columns = cube.permute(2, 1, 0).reshape(-1)
    flat = columns.nonzero().view(-1).numpy()
    steps = [np.int64(flat[0]), *np.diff(flat).tolist()]
    encoded = {"size": cube.shape, "index_steps": steps, "values": columns[flat]}
    empty = {"size": torch.Size((3,)), "index_steps": [], "values": torch.empty(0)}
    save_sft(tmp_path, {"diffs": {"c": encoded, "e": empty}, "abs": {"h": nn.Parameter(torch.ones(2))}})
    delta = interop.from_composable_sft(tmp_path)
    assert torch.equal(dense(delta)["c"], cube)
    assert delta.mask["e"].nnz == 0
    assert delta.dense["h"].tolist() == [1, 1]


def test_composable_sft_files_without_a_sparse_part_and_from_the_hub(tmp_path, monkeypatch):
    save_sft(tmp_path, {"diffs": {}, "abs": {"head": torch.ones(2)}})
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    delta = interop.from_composable_sft("me/head", revision="v1")
    assert asked == [("me/head", "v1", [interop.SFT_NAME])]
    assert (delta.mask.names, delta.mask.nnz, delta.mask.density) == ((), 0, 0)
    delta.save_pretrained(tmp_path / "saved")
    again = SparseDelta.from_pretrained(tmp_path / "saved")
    values = torch.tensor([1.0, 0.0, 2.0])
    other = SparseDelta(CSRMask.from_dense({"w": values != 0}), values[values != 0])
    model = {"w": torch.zeros(3), "head": torch.zeros(2)}
    with again.compose(other).applied(model):
        assert (model["w"].tolist(), model["head"].tolist()) == ([1, 0, 2], [1, 1])
    assert (model["w"].tolist(), model["head"].tolist()) == ([0, 0, 0], [0, 0])
    save_sft(tmp_path, {"abs": {}})
    with pytest.raises(ValueError, match="neither sparse differences nor full tensors"):
        interop.from_composable_sft(tmp_path)


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


SIZE, ONE = torch.Size((2, 2)), torch.ones(1)


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ({"size": SIZE, "index_steps": [0]}, "lacks size, index_steps or values"),
        ({"size": SIZE, "index_steps": 0, "values": ONE}, "index_steps of tensor 'w' are not a list"),
        ({"size": (2, -2), "index_steps": [0], "values": ONE}, "negative size"),
        (
            {"size": (1 << 40, 1), "index_steps": [0], "values": ONE},
            "does not hold 1 entries of tensors with 1099511627776 rows",
        ),
        ({"size": SIZE, "index_steps": [0, 9], "values": torch.ones(2)}, "indices of tensor 'w'"),
        ({"size": SIZE, "index_steps": [0], "values": torch.ones(2)}, "indices of tensor 'w'"),
        ({"size": SIZE, "index_steps": [True], "values": ONE}, "index_steps ints"),
        ({"size": SIZE, "index_steps": [0.0], "values": ONE}, "index_steps ints"),
        ({"size": SIZE, "index_steps": [1 << 70], "values": ONE}, "OverflowError"),
        ({"size": SIZE, "index_steps": [1, *[(1 << 63) - 1] * 2, 3], "values": torch.ones(4)}, "do not fit its size"),
        ({"size": SIZE, "index_steps": [0], "values": ONE.long()}, "must be floating point"),
        ({"size": SIZE, "index_steps": [0], "values": ONE.to("meta")}, "values of tensor 'w' is on meta"),
        ({"size": SIZE, "index_steps": [0], "values": 1.0}, "must be a torch.Tensor"),
        ({"size": SIZE, "index_steps": [np.int64(1)] * 3, "values": ONE.expand(3)}, "the file holds fewer"),
        ({"size": SIZE, "index_steps": [np.float64(1)], "values": ONE}, "dtype 'f8', where int64 is expected"),
    ],
)
def test_composable_sft_tensors_that_are_not_as_claimed(tmp_path, encoded, message):
    save_sft(tmp_path, {"diffs": {"w": encoded}})
    with pytest.raises(ValueError, match=f"pytorch_diff.bin is not a readable composable-sft file: (?s:.*){message}"):
        interop.from_composable_sft(tmp_path)


def test_composable_sft_files_of_another_form(tmp_path):
    contents = {
        "oldest format": {"body": {}, "head": {}},
        "neither 'diffs' nor 'abs'": {"x": 1},
        "holds a list": [1],
        "pytorch_diff.bin is not a readable composable-sft file": {"diffs": {"w": Evil(tmp_path / "ran")}},
    }
    for message, content in contents.items():
        save_sft(tmp_path, content)
        with pytest.raises(ValueError, match=message):
            interop.from_composable_sft(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_composable_sft_parts_are_checked_before_they_are_read(tmp_path):
    path = tmp_path / interop.SFT_NAME
    save_sft(tmp_path, {"diffs": {"w": {"size": torch.Size((2,)), "index_steps": [0], "values": ONE}}})
    content = bytearray(path.read_bytes())
    content[content.index(b"\x00\x00\x80\x3f")] ^= 1  # of the value, 1.0
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum of its part '.*data/0' is wrong"):
        interop.from_composable_sft(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\0" * 10_000_000)
    with pytest.raises(ValueError, match="larger than the file"):
        interop.from_composable_sft(tmp_path)


def test_csr_matrices_in_and_out():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    mask = topk_mask({"a": torch.randn(6, 5), "b": torch.randn(3, 9)}, k=20)
    values = torch.randn(20)
    for convert in (lambda n: interop.to_scipy_csr(mask, n, values), lambda n: mask.sparse_csr(n, values)):
        again, back = interop.from_csr({n: convert(n) for n in mask.names})
        assert again == mask
        assert torch.equal(back, values)
    with pytest.raises(TypeError, match=r"matrices\['a'\] must be a CSR matrix"):
        interop.from_csr({"a": scipy_sparse.coo_matrix((2, 2))})
    with pytest.raises(ValueError, match="must be on a CUDA device"):
        interop.to_cupy_csr(mask, "a", values)
    unsorted = scipy_sparse.csr_matrix(([1.0, 2.0], [3, 1], [0, 2]), shape=(1, 4))
    again, back = interop.from_csr({"m": unsorted})
    assert again.col_indices.tolist() == [1, 3]
    assert back.tolist() == [2, 1]
    for column, message in ((3, "ascending"), (1 + (1 << 16), r"matrices\['m'\] has a column outside \[0, 4\)")):
        unsorted.indices[1] = column
        with pytest.raises(ValueError, match=message):
            interop.from_csr({"m": unsorted})


def test_shira_shapes_need_the_base_where_they_are_not_square(tmp_path):
    index = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 5, 2, 3, 1, 4]], dtype=torch.int32)
    tensors = {"base_model.model.fc.shira_indices": index, "base_model.model.fc.shira_weight": torch.ones(6)}
    save_file(tensors, tmp_path / interop.SHIRA_WEIGHTS)
    config = tmp_path / interop.SHIRA_CONFIG
    config.write_text(json.dumps({"peft_type": "SHIRA", "r": 1}))
    assert interop.from_peft_shira(tmp_path, {"fc.weight": torch.zeros(4, 6)}).mask.shapes == (torch.Size((4, 6)),)
    for base, message in (
        (None, "give base="),
        ({"fc.weight": torch.zeros(4, 5)}, "do not fit a weight of shape"),
        ({"fc.weight": torch.zeros(4, 6, 1)}, "for matrices"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.from_peft_shira(tmp_path, base)
    texts = {json.dumps({"peft_type": "LORA", "r": 1}): "type 'LORA', not SHIRA"}
    texts |= {json.dumps({"peft_type": "SHIRA", "r": r}): "r must be an int from 1" for r in ("1", 0, True, None, 1.5)}
    texts |= {"[" * 100_000: "not readable JSON", "[]": r"type \[\], not", "{": "not readable JSON"}
    for text, message in texts.items():
        config.write_text(text)
        with pytest.raises(ValueError, match=f"adapter_config.json.*{message}"):
            interop.from_peft_shira(tmp_path)
