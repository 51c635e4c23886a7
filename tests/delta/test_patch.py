"""SparsePatch: exactly the entries whose bits differ; applied, inverted, composed and saved bit for bit."""

import json
import math

import numpy as np
import pytest
import torch
from delta_examples import clones, same, state
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from deftx_kernels import SparsePatch
from deftx_kernels.delta import model_state
from deftx_kernels.delta import patch as patch_module
from deftx_kernels.delta.patch_files import read_anchor

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
DTYPES += [torch.float64, torch.int64, torch.uint16, torch.complex64, torch.bool]
SHAPES = [(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (4, 0)]


def random_bits(rng, shape, dtype):
    size = math.prod(shape) * dtype.itemsize
    data = rng.integers(0, 2 if dtype == torch.bool else 256, size, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).reshape(shape) if size else torch.empty(shape, dtype=dtype)


def unsigned(tensor):
    """The bits as a flat NumPy array: the oracle compares these."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().view(f"u{tensor.element_size()}")


def changed(rng, tensor, density):
    data = unsigned(tensor).copy()
    at = rng.random(data.shape) < density
    data[at] ^= np.array(1, data.dtype) << rng.integers(0, 1 if tensor.dtype == torch.bool else 7, at.sum()).astype(
        data.dtype
    )
    return torch.from_numpy(data.view(np.uint8)).view(tensor.dtype).reshape(tensor.shape) if len(data) else tensor


def models(seed, count, dtypes=DTYPES, shapes=SHAPES, density=0.3):
    """Models of which each differs from the one before."""
    rng = np.random.default_rng(seed)
    found = [{f"{i}.{d}": random_bits(rng, s, d) for i, s in enumerate(shapes) for d in dtypes if rng.random() < 0.3}]
    while len(found) < count:
        found.append({n: changed(rng, t, density * (rng.random() < 0.7)) for n, t in found[-1].items()})
    return found


def two_layers():
    """A module with tied, transposed and non-contiguous parameters, and a buffer."""
    model = nn.ModuleDict({"emb": nn.Embedding(6, 4), "head": nn.Linear(4, 6), "norm": nn.BatchNorm1d(4)})
    model["head"].weight = model["emb"].weight
    model.columns = nn.Parameter(torch.randn(5, 8)[:, ::2])
    model.turned = nn.Parameter(torch.randn(3, 4).T)
    return model


# ---- content ----
@given(seed=st.integers(0, 2**32 - 1), density=st.sampled_from([0.0, 0.1, 0.9]))
@settings(max_examples=20, deadline=None)
def test_entries_are_those_whose_bits_differ(tmp_path_factory, seed, density):
    old, new, last = models(seed, 3, density=density)
    patch = SparsePatch.diff(new, old)
    for name in old:
        indices = np.flatnonzero(unsigned(new[name]) != unsigned(old[name]))
        assert (name in patch.names) == bool(len(indices))
        if len(indices):
            found, values = patch.flat(name)
            assert found.tolist() == indices.tolist()
            assert found.dtype == torch.int32
            assert values.dtype == new[name].dtype
            assert (unsigned(values) == unsigned(new[name])[indices]).all()
    back, further = patch.inverse(old), SparsePatch.diff(last, new)
    path = tmp_path_factory.mktemp("patch") / "patch.safetensors"
    for one, compact in ((patch, False), (back, True), (patch.then(further), True)):
        one.save(path, compact)
        read = SparsePatch.load(path)
        assert repr(read) == repr(one)
        assert (read.from_version, read.to_version, read.nbytes) == (one.from_version, one.to_version, one.nbytes)
        model = clones(new if one is back else old)
        read.apply_(model)
        assert same(model, {id(patch): new, id(back): old}.get(id(one), last))
        if patch.nnz and one is patch:
            with pytest.raises(ValueError, match="applied already"):
                read.apply_(model)


def test_zeros_and_nans_are_compared_by_their_bits():
    words = torch.tensor([0, -(2**31), 0x7FC00000, 0x7FC00001, 0x7F800001, 1], dtype=torch.int32)
    old = {"w": words.view(torch.float32)}
    new = {"w": words.flip(0).view(torch.float32)}
    model = clones(old)
    SparsePatch.diff(new, old).apply_(model)
    assert torch.equal(model["w"].view(torch.int32), words.flip(0))
    assert SparsePatch.diff({"w": torch.tensor([-0.0])}, {"w": torch.tensor([0.0])}).nnz == 1
    assert SparsePatch.diff({"w": torch.tensor([math.nan])}, {"w": torch.tensor([math.nan])}).nnz == 0


def test_tied_and_strided_parameters():
    model = two_layers()
    before = clones(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[0] += 1
        model["norm"].running_mean[1] = 3
    patch = SparsePatch.diff(model, before)
    assert patch.tied == {"head.weight": "emb.weight"}
    assert "head.weight" not in patch.names
    assert {"norm.running_mean", "columns", "turned"} <= set(patch.names)
    after = clones(model)
    copies, other, module = clones(before), {n: t for n, t in clones(before).items() if n != "emb.weight"}, two_layers()
    module.load_state_dict(before)
    for target in (copies, other, module):
        patch.apply_(target)
        assert same(target, {n: after[n] for n in state(target)})
    assert module["head"].weight is module["emb"].weight
    assert not module.columns.is_contiguous()
    # of a model with copies, for one with one tensor
    untied = SparsePatch.diff(after, before)
    assert not untied.tied
    module.load_state_dict(before)
    untied.apply_(module)
    assert same(module, after)
    before["head.weight"] = before["head.weight"] + 1
    with pytest.raises(ValueError, match="model has one tensor as 'emb.weight' and 'head.weight'"):
        SparsePatch.diff(after, before).apply_(module)


def test_entries_that_are_not_contiguous():
    """Of other code: every second element, one value for all."""
    values = torch.complex(torch.arange(8.0), torch.ones(8)).conj()
    for indices, these in ((torch.arange(8)[::2], values[::2]), (torch.arange(4), values[3].expand(4))):
        patch, model = SparsePatch({"w": (indices, these)}), {"w": torch.zeros(8, dtype=torch.complex64)}
        patch.apply_(model)
        assert torch.equal(model["w"][indices], these)
        assert int(model["w"].count_nonzero()) == int(these.count_nonzero())


@given(seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(DTYPES), cuts=st.sets(st.integers(0, 40), max_size=3))
@settings(max_examples=40, deadline=None)
def test_checksums_of_parts_add_up(seed, dtype, cuts):
    tensor = random_bits(np.random.default_rng(seed), (41,), dtype)
    total = 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model_state, "_CHUNK", 5)
        for part in tensor.tensor_split(sorted(cuts)):
            total = model_state.added(total, model_state.part_of_checksum(part, part.storage_offset()))
    assert total == model_state.state_of({"w": tensor})["w"].checksum


def test_widths_of_indices():
    """A tensor above 2**31 - 1 elements does not make those of others wide: vLLM takes int32."""
    tensors = {n: torch.empty(size, dtype=torch.int8, device="meta") for n, size in (("a", 3), ("b", 2**31), ("c", 4))}
    assert model_state.by_kind(tensors) == [["a", "c"], ["b"]]
    wide, narrow = torch.tensor([0, 2]), torch.tensor([1], dtype=torch.int32)
    patch = SparsePatch({"a": (wide, torch.ones(2)), "b": (narrow, torch.ones(1))})
    model = clones({"a": OLD["a"], "b": OLD["c"]})
    patch.apply_(model)
    assert (model["a"].view(-1)[wide] == 1).all()
    assert model["b"].tolist() == [0, 1]


def test_chains():
    versions = models(3, 5)
    patches = [SparsePatch.diff(new, old, model_version=i) for i, (old, new) in enumerate(zip(versions, versions[1:]))]
    whole = patches[0]
    for patch in patches[1:]:
        whole = whole.then(patch)
    assert (whole.from_version, whole.to_version) == (patches[0].from_version, patches[-1].to_version)
    assert whole.model_version == 3
    model = clones(versions[0])
    whole.apply_(model)
    assert same(model, versions[-1])
    for patch, old in zip(patches[::-1], versions[-2::-1]):
        patch.inverse(old).apply_(model)
        assert same(model, old)
    with pytest.raises(ValueError, match="later was made for version"):
        patches[0].then(patches[2])
    with pytest.raises(ValueError, match="old is not at the version"):
        patches[0].inverse(versions[1])


# ---- errors ----
OLD = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2)}
NEW = {"a": OLD["a"] + torch.eye(2, 3), "b": OLD["b"] * 2, "c": OLD["c"]}
BAD_MODELS = {
    "is not at the version .* 1 of 3 tensors .* 'c'": {"c": torch.tensor([0.0, -0.0])},
    "lacks tensor 'a'": {"a": None},
    "lacks tensor 'c'": {"c": None},
    "has tensor 'd', which is not": {"d": torch.zeros(1)},
    "tensor 'a' is float32 \\[3, 2\\], .* has float32 \\[2, 3\\]": {"a": torch.arange(6.0).reshape(3, 2)},
    "tensor 'c' is float32 \\[1, 2\\]": {"c": torch.zeros(1, 2)},
    "tensor 'b' is float32 \\[4\\], .* has bfloat16 \\[4\\]": {"b": torch.ones(4)},
    "elements of model's tensor 'b' share memory": {"b": torch.ones(1, dtype=torch.bfloat16).expand(4)},
    "made in inference_mode": {"b": torch.inference_mode()(lambda: torch.ones(4, dtype=torch.bfloat16))()},
}


@pytest.mark.parametrize("message", BAD_MODELS)
def test_a_model_that_does_not_fit_is_unchanged(message):
    model = {n: t for n, t in ({**clones(OLD), **BAD_MODELS[message]}).items() if t is not None}
    before = clones(model)
    with pytest.raises(ValueError, match=message):
        SparsePatch.diff(NEW, OLD).apply_(model)
    assert same(model, before)


def test_without_verification_only_changed_tensors_are_checked():
    patch = SparsePatch.diff(NEW, OLD)
    model = {"a": torch.full((2, 3), 9.0), "b": OLD["b"].clone(), "d": torch.zeros(1)}
    patch.apply_(model, verify=False)
    assert model["a"].tolist() == [[1, 9, 9], [9, 5, 9]]
    for other, message in (({"a": model["a"]}, "lacks tensor 'b'"), ({**model, "a": torch.zeros(6)}, "'a' is float32")):
        with pytest.raises(ValueError, match=message):
            patch.apply_(other, verify=False)


@pytest.mark.parametrize("fails", ["before", "after", "checksum"])
def test_a_failure_half_way_is_rolled_back(monkeypatch, fails):
    """An interrupt that comes while an operator runs is raised when it has ended."""
    patch, model, writes = SparsePatch.diff(NEW, OLD), clones(OLD), []
    if fails == "checksum":
        patch.after = {**patch.after, "b": patch.after["b"]._replace(checksum=7)}
    real = patch_module._Group.exchange

    def second_call_fails(self, values):
        writes.append(self)
        interrupted = len(writes) == 2 and fails != "checksum"
        if not interrupted or fails == "after":
            real(self, values)
        if interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(patch_module._Group, "exchange", second_call_fails)
    with pytest.raises(ValueError if fails == "checksum" else KeyboardInterrupt):
        patch.apply_(model)
    assert same(model, OLD)
    assert len(writes) == {"before": 3, "after": 4, "checksum": 4}[fails]


def patch_of(*indices):
    return SparsePatch({str(i): (torch.tensor(each), torch.ones(len(each))) for i, each in enumerate(indices)})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SparsePatch.diff(NEW, {"a": OLD["a"]}), ValueError, "old lacks tensor 'b' of new"),
        (lambda: SparsePatch.diff({"a": OLD["a"]}, OLD), ValueError, "new lacks tensor 'b' of old"),
        (lambda: SparsePatch.diff({**NEW, "c": torch.zeros(3)}, OLD), ValueError, "'c' has shape .3. in new and .2."),
        (
            lambda: SparsePatch.diff({**NEW, "c": OLD["c"].half()}, OLD),
            ValueError,
            "'c' has dtype torch.float16 in new",
        ),
        (lambda: SparsePatch.diff({"a": torch.zeros(1, dtype=torch.complex128)}, {}), TypeError, "1, 2, 4 or 8 bytes"),
        (lambda: SparsePatch.diff(3, OLD), TypeError, "new must be a module"),
        (lambda: SparsePatch.diff(NEW, OLD, model_version=-1), ValueError, "model_version must be at least 0"),
        (lambda: patch_of([0, 5], [1, 1]), ValueError, "indices of '1' must be .* strictly ascending"),
        (lambda: patch_of([3], [-1, 1], [2]), ValueError, "indices of '1' must be at least 0"),
        (lambda: SparsePatch({"a": (torch.tensor([1]), torch.ones(2))}), ValueError, "values of 'a' must be .1."),
        (lambda: SparsePatch({"a": (torch.tensor([1.0]), torch.ones(1))}), TypeError, "int32 or int64"),
        (lambda: SparsePatch({"a": torch.tensor([1])}), TypeError, "entries of 'a' must be .indices, values."),
        (lambda: SparsePatch({1: (torch.tensor([1]), torch.ones(1))}), TypeError, "names that are strings, got 1"),
        (lambda: SparsePatch([1]), TypeError, "entries must be a mapping"),
        (
            lambda: SparsePatch({"a": (torch.tensor([1]), torch.ones(1, device="meta"))}),
            ValueError,
            "values of 'a' is on meta",
        ),
        (lambda: SparsePatch.diff(NEW, OLD).then({}), TypeError, "later must be a SparsePatch"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ---- files ----
@pytest.mark.parametrize("compact", [False, True])
def test_each_damaged_bit_is_found(tmp_path, compact):
    path = tmp_path / "patch.safetensors"
    old = {"w": torch.arange(2000.0).bfloat16()}
    new = {"w": old["w"].clone().index_fill_(0, torch.tensor([1, 5, 1900]), 3.0)}
    SparsePatch.diff(new, old).save(path, compact)
    data = path.read_bytes()
    damaged = [data[:n] for n in range(0, len(data), 7)] + [data + b"\0"]
    for bit in range(0, 8 * len(data), 1 if compact else 5):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a readable sparse patch"):
            SparsePatch.load(path)
    with pytest.raises(FileNotFoundError):
        SparsePatch.load(tmp_path / "missing")


@pytest.mark.parametrize("density", [1e-4, 1e-3, 1e-2, 0.3, "rows"])
def test_bytes_of_the_compact_layout(tmp_path, density):
    rng = np.random.default_rng(0)
    old = {f"layers.{i}.weight": torch.zeros(1000, 1000, dtype=torch.bfloat16) for i in range(4)}
    if density == "rows":  # of an embedding: long gaps
        new = {n: t.clone().index_fill_(0, torch.tensor([3, 400, 999]), 1.0) for n, t in old.items()}
    else:
        new = {n: changed(rng, t, density) for n, t in old.items()}
    patch = SparsePatch.diff(new, old)
    patch.save(tmp_path / "compact", compact=True)
    patch.save(tmp_path / "plain")
    overhead = 2000 if density == 1e-4 else 0  # of the header, for 400 changes
    assert (tmp_path / "compact").stat().st_size <= 4.1 * patch.nnz + overhead
    model = clones(old)
    SparsePatch.load(tmp_path / "compact").apply_(model)
    assert same(model, new)


def test_indices_above_32_bits(tmp_path):
    indices = torch.tensor([7, 2**31 - 1, 2**31, 2**40])
    SparsePatch({"w": (indices, torch.ones(4))}).save(tmp_path / "wide", compact=True)
    assert torch.equal(SparsePatch.load(tmp_path / "wide").flat("w")[0], indices)


def test_files_in_the_layout_of_trl(tmp_path):
    """As in TRL's description of delta weight sync (huggingface.co/blog/delta-weight-sync, section 4)."""
    path, model = tmp_path / "step_000011.safetensors", clones(OLD)
    SparsePatch.diff(NEW, OLD, model_version=11).save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        assert (header["sparse"], int(header["model_version"])) == ("True", 11)
        assert float(header["sparsity"]) == 0.5
        for name in json.loads(header["changed_params"]):
            indices, values = file.get_tensor(f"{name}.indices"), file.get_tensor(f"{name}.values")
            assert indices.dtype == torch.int32
            model[name].flatten()[indices.long()] = values
    assert same(model, NEW)

    header = {"sparse": "True", "model_version": "12", "sparsity": "0.9", "changed_params": '["c"]'}
    save_file({"c.indices": torch.tensor([1], dtype=torch.int32), "c.values": torch.tensor([4.0])}, path, header)
    patch = SparsePatch.load(path)
    assert (patch.model_version, patch.from_version, patch.to_version) == (12, None, None)
    patch.apply_(model)
    assert model["c"].tolist() == [0, 4]
    for bad, message in (({"c": torch.zeros(1)}, "index 1"), ({"c": torch.zeros(2).half()}, "float16"), ({}, "lacks")):
        with pytest.raises(ValueError, match=message):
            patch.apply_(bad)
    save_file({"c": torch.zeros(2)}, path, {**header, "sparse": "False"})
    with pytest.raises(ValueError, match="sparse = True"):
        SparsePatch.load(path)


@pytest.mark.parametrize("load", [SparsePatch.load, read_anchor], ids=["patch", "anchor"])
def test_a_folder_is_no_file(tmp_path, load):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        load(tmp_path)
