"""SparseDelta: exact differences, files that are whole or absent, bases that fit or are refused, composition; interop."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deftx_kernels import CSRMask, SparseDelta, compose, interop, sparsify, topk_mask
from deftx_kernels.delta import CONFIG_NAME, WEIGHTS_NAME, fingerprint

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"


def bits(tensor):
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def tensors(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"enc.weight": (6, 5), "enc.bias": (6,), "emb.weight": (9, 4), "cube": (2, 3, 2)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def tune(base, seed=1, density=0.3, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    mask = topk_mask({n: torch.randn(t.shape, generator=generator) for n, t in base.items()}, density=density)
    tuned = {n: t.clone() for n, t in base.items()}
    change = scale * torch.randn(mask.nnz, generator=generator)
    return mask.scatter_(tuned, mask.gather(tuned) + change.to(base["cube"].dtype)) | {}, mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-4, 0.1, 30.0])
def test_base_plus_delta_is_tuned_bit_for_bit(dtype, scale):
    base = {"w": torch.randn(200, 50, generator=torch.Generator().manual_seed(0)).to(dtype)}
    tuned = {"w": (base["w"].float() + scale * torch.randn(200, 50, generator=torch.Generator().manual_seed(1))).to(dtype)}
    delta = SparseDelta.from_models(tuned, base)
    model = {"w": base["w"].clone()}
    delta.apply_(model)
    wrong = int((bits(model["w"]) != bits(tuned["w"])).sum())
    assert wrong == delta.metadata["inexact_entries"]
    assert wrong <= 5  # of 10,000: where tuned is much smaller than base


def test_entries_that_float32_cannot_carry_are_counted():
    base, tuned = {"w": torch.tensor([1.0, 1.0, 2.0])}, {"w": torch.tensor([1e-9, 1.5, 2.0])}
    delta = SparseDelta.from_models(tuned, base)
    assert delta.metadata["inexact_entries"] == 1
    assert delta.metadata["k"] == 2
    assert delta.mask.nnz == 2


def test_dense_tensors_and_differences_outside_the_mask():
    base = tensors()
    tuned, mask = tune(base)
    head = {"head.weight": torch.randn(3, 6)}
    delta = SparseDelta.from_models(tuned | head, base, mask)
    assert list(delta.dense) == ["head.weight"]
    assert delta.mask == mask
    changed = base | {"enc.weight": tuned["enc.weight"] + 1.0}
    with pytest.raises(ValueError, match="differs from base in .* entries of 'enc.weight'"):
        SparseDelta.from_models(changed, base, mask)
    assert SparseDelta.from_models(changed, base, mask["enc.bias"], dense=["enc.weight"]).dense.keys() == {"enc.weight"}
    with pytest.raises(ValueError, match="tuned lacks tensor 'cube'"):
        SparseDelta.from_models({n: t for n, t in tuned.items() if n != "cube"}, base)
    with pytest.raises(ValueError, match="dense names 'x'"):
        SparseDelta.from_models(tuned, base, dense=["x"])


def test_applied_restores_every_bit():
    """composable-sft's subtraction leaves 0.4 % of the entries changed."""
    torch.manual_seed(0)
    base, tuned = nn.Linear(40, 30), nn.Linear(40, 30)
    with torch.no_grad():
        for p, q in zip(base.parameters(), tuned.parameters()):
            q.copy_(1.01 * p)
    delta = SparseDelta.from_models(tuned, base)
    assert delta.metadata["inexact_entries"] == 0
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    with delta.applied(base) as model:
        assert model is base
        for p, q in zip(base.parameters(), tuned.parameters()):
            assert torch.equal(p, q)
    assert all(torch.equal(bits(p), bits(before[n])) for n, p in base.named_parameters())
    with pytest.raises(RuntimeError, match="inside"), delta.applied(base, alpha=0.5):
        raise RuntimeError("inside")
    assert all(torch.equal(bits(p), bits(before[n])) for n, p in base.named_parameters())


def test_alpha_and_dense():
    base = tensors()
    tuned, mask = tune(base)
    delta = SparseDelta.from_models(tuned | {"head": torch.ones(2)}, base, mask)
    model = {n: t.clone() for n, t in base.items()} | {"head": torch.zeros(2)}
    delta.apply_(model, alpha=0.5, dense=False)
    assert not model["head"].any()
    for name in base:
        torch.testing.assert_close(model[name], (base[name] + tuned[name]) / 2)
    with pytest.raises(ValueError, match="model lacks tensor 'head'"):
        delta.apply_(dict(base))


def test_a_base_that_does_not_fit_is_refused_by_name_and_left_alone():
    base = tensors()
    tuned, _ = tune(base)
    delta = SparseDelta.from_models(tuned, base, metadata={"base_model": "my-model"})
    other = {n: t.clone() for n, t in base.items()}
    other["emb.weight"] += 1e-3
    before = {n: t.clone() for n, t in other.items()}
    with pytest.raises(ValueError, match=r"not the base of this delta \(my-model\): 1 of 4 tensors .* 'emb.weight'"):
        delta.apply_(other)
    with pytest.raises(ValueError, match="'emb.weight'"), delta.applied(other):
        pass
    with pytest.raises(ValueError, match="'cube' has shape"):
        delta.apply_(other | {"cube": torch.zeros(3)})
    with pytest.raises(ValueError, match="lacks tensor 'cube'"):
        delta.apply_({n: t for n, t in other.items() if n != "cube"})
    with pytest.raises(ValueError, match="'cube' is torch.int64"):
        delta.apply_(other | {"cube": torch.zeros(2, 3, 2, dtype=torch.int64)})
    assert all(torch.equal(other[n], before[n]) for n in other)
    delta.apply_(other, strict=False)
    assert not torch.equal(other["emb.weight"], before["emb.weight"])


def test_deltas_can_be_stacked_on_a_base_but_not_on_a_trained_one():
    base = tensors()
    a, b = (SparseDelta.from_models(tune(base, seed)[0], base) for seed in (1, 2))
    model = {n: t.clone() for n, t in base.items()}
    a.apply_(model)
    b.apply_(model)
    with a.applied(model, alpha=-1.0):
        pass
    expected = {n: t.clone() for n, t in base.items()}
    compose(a, b).apply_(expected)
    for name in base:
        torch.testing.assert_close(model[name], expected[name], atol=1e-6, rtol=1e-6)
    with torch.no_grad():
        model["cube"] += 1
    with pytest.raises(ValueError, match="'cube'"):
        b.apply_(model)


def test_a_sparsified_model_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    delta = SparseDelta.from_models({"0.weight": torch.ones(4, 4)}, {"0.weight": model[0].weight})
    sparsify(model, delta.mask)
    with pytest.raises(ValueError, match="densify"):
        delta.apply_(model)


def test_compose_is_the_sum():
    base = tensors()
    deltas = [SparseDelta.from_models(tune(base, seed)[0], base, metadata={"base_model": "m", "seed": seed}) for seed in (1, 2, 3)]
    total = compose(*deltas)
    expected = {
        n: sum(
            d.mask.scatter_({m: torch.zeros(s, dtype=torch.float64) for m, s in zip(d.mask.names, d.mask.shapes)}, d.values)[n]
            for d in deltas
        )
        for n in base
    }
    got = total.mask.scatter_({n: torch.zeros(t.shape) for n, t in base.items()}, total.values)
    for name in base:
        assert torch.equal(got[name], expected[name].float())
    assert total.mask == deltas[0].mask | deltas[1].mask | deltas[2].mask
    assert total.metadata["base_model"] == "m"
    assert [d["seed"] for d in total.metadata["composed_of"]] == [1, 2, 3]
    assert deltas[0].compose(deltas[1]).mask == SparseDelta.compose(deltas[0], deltas[1]).mask
    total.apply_({n: t.clone() for n, t in base.items()})


def test_compose_refuses_conflicts():
    base = tensors()
    tuned, mask = tune(base)
    one = SparseDelta.from_models(tuned | {"head": torch.ones(2)}, base, mask)
    two = SparseDelta.from_models(tuned | {"head": torch.zeros(2)}, base, mask)
    with pytest.raises(ValueError, match="'head' stands in two deltas"):
        compose(one, two)
    other = tensors(9)
    with pytest.raises(ValueError, match="made for another base"):
        compose(one, SparseDelta.from_models(tune(other)[0], other))
    with pytest.raises(ValueError, match="at least one"):
        compose()
    with pytest.raises(TypeError, match=r"deltas\[1\]"):
        compose(one, {})
    whole = SparseDelta.from_models({"cube": torch.zeros(2, 3, 2), "enc.bias": base["enc.bias"]}, {"enc.bias": base["enc.bias"]})
    with pytest.raises(ValueError, match="'cube' is sparse in one delta and whole in another"):
        compose(one, whole)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, dtype):
    base = tensors()
    tuned, mask = tune(base)
    delta = SparseDelta.from_models(
        tuned | {"head": torch.ones(2)}, base, mask, metadata={"method": "deft-x", "settings": {"rank": 4}}
    )
    delta.save_pretrained(tmp_path / "delta", dtype)
    assert sorted(p.name for p in (tmp_path / "delta").iterdir()) == [WEIGHTS_NAME, CONFIG_NAME]
    config = json.loads((tmp_path / "delta" / CONFIG_NAME).read_text())
    assert config["lossy"] == (dtype is not None)
    again = SparseDelta.from_pretrained(tmp_path / "delta")
    assert again.mask == mask
    assert torch.equal(again.values, delta.values.to(dtype or torch.float32).float())
    assert torch.equal(again.dense["head"], torch.ones(2))
    assert again.metadata == json.loads(json.dumps(delta.metadata))


def test_a_failed_save_leaves_the_old_delta(tmp_path, monkeypatch):
    base = tensors()
    delta = SparseDelta.from_models(tune(base)[0], base)
    delta.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TypeError, match="JSON"):
        SparseDelta(delta.mask, delta.values, metadata={"x": object()}).save_pretrained(tmp_path)

    def fail(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("deftx_kernels.delta.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        delta.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_files_that_do_not_belong_together_or_are_damaged(tmp_path):
    base = tensors()
    for seed in (1, 2):
        SparseDelta.from_models(tune(base, seed)[0], base).save_pretrained(tmp_path / str(seed))
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository|holds no"):
        SparseDelta.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "1" / CONFIG_NAME).write_text((tmp_path / "2" / CONFIG_NAME).read_text())
    with pytest.raises(ValueError, match="do not belong together"):
        SparseDelta.from_pretrained(tmp_path / "1")
    (tmp_path / "2" / WEIGHTS_NAME).write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="no readable sparse delta"):
        SparseDelta.from_pretrained(tmp_path / "2")
    (tmp_path / "2" / CONFIG_NAME).write_text("{}")
    with pytest.raises(ValueError, match="is not a deftx_sparse_delta"):
        SparseDelta.from_pretrained(tmp_path / "2")
    (tmp_path / "2" / CONFIG_NAME).unlink()
    with pytest.raises(FileNotFoundError, match=CONFIG_NAME):
        SparseDelta.from_pretrained(tmp_path / "2")


def test_overflow_in_float16_is_refused(tmp_path):
    mask = CSRMask.from_dense({"a": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="overflows"):
        SparseDelta(mask, torch.tensor([1e6])).save_pretrained(tmp_path, torch.float16)
    assert not list(tmp_path.iterdir())


def test_push_to_hub_uploads_the_two_files(monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok

        def upload_folder(self, repo_id, folder_path, commit_message):
            uploaded[repo_id] = sorted(p.name for p in Path(folder_path).iterdir())
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    base = tensors()
    assert SparseDelta.from_models(tune(base)[0], base).push_to_hub("me/delta") == "commit"
    assert uploaded == {"me/delta": [WEIGHTS_NAME, CONFIG_NAME]}


def test_fingerprints_see_every_bit():
    t = torch.randn(1000)
    same = fingerprint({"a": t})
    assert fingerprint({"a": t.clone()}) == same
    for change in (lambda x: x[500].neg_(), lambda x: x.copy_(x.flip(0)), lambda x: x[:2].copy_(x[:2].flip(0))):
        other = t.clone()
        change(other)
        assert fingerprint({"a": other}) != same
    assert fingerprint({"a": t.view(10, 100)}) != same
    assert fingerprint({"a": t.double()}) != same


# ---- interop ----


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the files that composable-sft and PEFT wrote are not at ../shared/fixtures")
class TestFixtures:
    def dense(self, delta):
        zeros = {n: torch.zeros(s) for n, s in zip(delta.mask.names, delta.mask.shapes)}
        return delta.mask.add_(zeros, delta.values)

    def test_composable_sft(self, tmp_path):
        delta = interop.from_composable_sft(FIXTURES / "composable_sft")
        expected = load_file(FIXTURES / "composable_sft" / "expected_dense.safetensors")
        got = {f"diff.{n}": t for n, t in self.dense(delta).items()} | {f"abs.{n}": t for n, t in delta.dense.items()}
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[n], expected[n]) for n in expected)
        interop.to_composable_sft(delta, tmp_path)
        ours = torch.load(tmp_path / "pytorch_diff.bin", weights_only=True)
        again = interop.from_composable_sft(tmp_path)
        assert again.mask == delta.mask
        assert torch.equal(again.values, delta.values)
        assert all(type(s) is int for e in ours["diffs"].values() for s in e["index_steps"])

    def test_peft_shira(self):
        delta = interop.from_peft_shira(FIXTURES / "peft_shira")
        expected = load_file(FIXTURES / "peft_shira" / "expected_dense.safetensors")
        got = self.dense(delta)
        assert got.keys() == expected.keys()
        for name, tensor in expected.items():  # written as (base + difference) - base, so up to the rounding of the sum
            torch.testing.assert_close(got[name], tensor, atol=5e-7, rtol=0)
            assert torch.equal(got[name] != 0, tensor != 0)


def test_composable_sft_encoding_is_column_major(tmp_path):
    values = torch.tensor([[1.0, 0.0, 3.0], [2.0, 4.0, 0.0]])
    values[1, 2], values[1, 1] = 4.0, 0.0
    delta = SparseDelta(CSRMask.from_dense({"w": values != 0}), values[values != 0])
    interop.to_composable_sft(delta, tmp_path)
    encoded = torch.load(tmp_path / "pytorch_diff.bin", weights_only=True)["diffs"]["w"]
    assert encoded["index_steps"] == [0, 1, 3, 1]
    assert encoded["values"].tolist() == [1, 2, 3, 4]
    cube = SparseDelta(CSRMask.from_dense({"c": torch.ones(2, 2, 2, dtype=torch.bool)}), torch.ones(8))
    with pytest.raises(ValueError, match="'c' has 3 dimensions"):
        interop.to_composable_sft(cube, tmp_path)


def test_composable_sft_reads_three_dimensions_empty_tensors_and_parameters(tmp_path):
    """The original reader decodes 3-D tensors wrongly."""
    dense = torch.zeros(2, 3, 4)
    dense[1, 2, 0], dense[0, 1, 3] = 5.0, 6.0
    flat = dense.permute(2, 1, 0).reshape(-1).nonzero().view(-1).numpy()
    encoded = {
        "size": dense.shape,
        "index_steps": [np.int64(flat[0]), *np.diff(flat).tolist()],
        "values": dense.permute(2, 1, 0).reshape(-1)[flat],
    }
    empty = {"size": torch.Size((3,)), "index_steps": [], "values": torch.empty(0)}
    torch.save({"diffs": {"c": encoded, "e": empty}, "abs": {"h": nn.Parameter(torch.ones(2))}}, tmp_path / "pytorch_diff.bin")
    delta = interop.from_composable_sft(tmp_path)
    got = delta.mask.add_({"c": torch.zeros(2, 3, 4), "e": torch.zeros(3)}, delta.values)
    assert torch.equal(got["c"], dense)
    assert delta.mask["e"].nnz == 0
    assert delta.dense["h"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"body": {}, "head": {}}, "oldest format"),
        ({"x": 1}, "neither 'diffs' nor 'abs'"),
        ([1], "holds a list"),
        ({"diffs": {"w": {"size": torch.Size((2, 2)), "index_steps": [0, 9], "values": torch.ones(2)}}}, "indices of tensor 'w'"),
        ({"diffs": {"w": {"size": torch.Size((2, 2)), "index_steps": [0], "values": torch.ones(2)}}}, "indices of tensor 'w'"),
    ],
)
def test_composable_sft_refuses_bad_files(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_diff.bin")
    with pytest.raises(ValueError, match=message):
        interop.from_composable_sft(tmp_path)


def test_malicious_pickles_do_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"diffs": {"w": Evil()}}, tmp_path / "pytorch_diff.bin")
    with pytest.raises(ValueError, match="cannot be read"):
        interop.from_composable_sft(tmp_path)
    assert not (tmp_path / "ran").exists()


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


def test_shira_shapes_need_the_base_where_they_are_not_square(tmp_path):
    from safetensors.torch import save_file

    index = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 5, 2, 3, 1, 4]], dtype=torch.int32)
    save_file(
        {"base_model.model.fc.shira_indices": index, "base_model.model.fc.shira_weight": torch.ones(6)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": 1}))
    with pytest.raises(ValueError, match="give base="):
        interop.from_peft_shira(tmp_path)
    delta = interop.from_peft_shira(tmp_path, base={"fc.weight": torch.zeros(4, 6)})
    assert delta.mask.shapes == (torch.Size((4, 6)),)
    with pytest.raises(ValueError, match="do not fit a weight of shape"):
        interop.from_peft_shira(tmp_path, base={"fc.weight": torch.zeros(4, 5)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    with pytest.raises(ValueError, match="type 'LORA', not SHIRA"):
        interop.from_peft_shira(tmp_path)
