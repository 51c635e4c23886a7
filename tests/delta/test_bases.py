"""Which tensors of a model count: masks and whole tensors, tied weights, buffers, wrappers, sparsified models."""

import copy

import pytest
import torch
from delta_examples import Tied, bits, clones, exact_pair, same, shifted, state, tensors, tune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deftx_kernels import CSRMask, SparseDelta, compose, interop, select_mask, sparsify, topk_mask
from deftx_kernels.delta import CONFIG_NAME
from deftx_kernels.nn import masked_parameters


def test_dense_tensors_and_differences_outside_the_mask():
    base = tensors()
    tuned, mask = tune(base)
    delta = SparseDelta.from_models(tuned | {"head.weight": torch.randn(3, 6)}, base, mask)
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


def test_integer_buffers_are_kept_whole(tmp_path):
    """To a mapping and to a module."""
    base, tuned = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    tuned(torch.randn(5, 3))
    with torch.no_grad():
        tuned.weight.mul_(1.5)
    old, new = base.state_dict(), tuned.state_dict()
    names = ["running_mean", "running_var", "num_batches_tracked"]
    SparseDelta.from_models(new, old, dense=names).save_pretrained(tmp_path)
    delta = SparseDelta.from_pretrained(tmp_path)
    for model in (copy.deepcopy(base), copy.deepcopy(base).state_dict()):
        delta.apply_(model)
        assert same(model, tuned)
    with pytest.raises(ValueError, match="'num_batches_tracked' neither|1 entries of 'num_batches_tracked'"):
        SparseDelta.from_models(new, old, dense=names[:2])
    with pytest.raises(ValueError, match="'num_batches_tracked' is torch.int64, the delta has it as torch.float32"):
        SparseDelta(delta.mask, delta.values, {"num_batches_tracked": torch.tensor(1.0)}).apply_(base, strict=False)
    with pytest.raises(TypeError, match="mask covers 'num_batches_tracked', which is torch.int64"):
        SparseDelta.from_models(new, old, CSRMask.from_dense({"num_batches_tracked": torch.tensor(True)}))


def test_tied_tensors_count_once_in_every_form():
    base = Tied()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.emb.weight.add_(1.0)
    forms = [lambda m: m, state, lambda m: dict(reversed(m.state_dict().items()))]
    for made in forms:
        assert select_mask(made(tuned), made(base), k=20).nnz == 20
        assert len(select_mask(made(tuned), made(base), density=0.5)) == 1
        delta = SparseDelta.from_models(made(tuned), made(base))
        assert delta.mask.nnz == 40
        for form in forms:
            model = copy.deepcopy(base)
            delta.apply_(form(model))
            assert torch.equal(model.emb.weight, tuned.emb.weight)
    assert len(topk_mask(base.state_dict(), density=1.0)) == 1
    with pytest.raises(ValueError, match="mask covers 'head.weight', which is the tensor 'emb.weight' of base"):
        SparseDelta.from_models(tuned, base, CSRMask.from_dense({"head.weight": torch.ones(10, 4, dtype=torch.bool)}))
    more = [m.state_dict() | {"x": torch.full((1,), x)} for m, x in ((tuned, 1.0), (base, 0.0))]
    assert list(SparseDelta.from_models(*more, dense=["head.weight"]).dense) == ["emb.weight"]
    untied = clones(tuned)
    assert len(SparseDelta.from_models(untied, base).mask) == 1
    # as some writers keep it
    assert len(SparseDelta.from_models({"head.weight": untied["head.weight"]}, base).mask) == 1
    untied["head.weight"] += 1
    for make in (SparseDelta.from_models, lambda t, b: select_mask(t, b, k=1)):
        with pytest.raises(ValueError, match="one tensor as 'emb.weight' and 'head.weight', which differ in tuned"):
            make(untied, base)
    both = SparseDelta.from_models(untied, clones(base))
    with pytest.raises(ValueError, match="one tensor as 'emb.weight' and 'head.weight', the delta changes both"):
        both.apply_(base, strict=False)
    for copied in (clones(base), dict(reversed(clones(base).items()))):
        assert len(SparseDelta.from_models(tuned, copied).mask) == len(select_mask(tuned, copied, density=1.0)) == 1
    every = CSRMask.from_dense({n: torch.ones(10, 4, dtype=torch.bool) for n in copied})
    assert SparseDelta.from_models(tuned, copied, every).mask == every  # a mask of both: two tensors
    whole = SparseDelta.from_models(tuned, copied, every["emb.weight"], dense=["head.weight"])
    assert list(whole.dense) == ["head.weight"]
    memory = torch.zeros(12)
    with pytest.raises(ValueError, match=r"base\['b'\] shares a part of its memory"):
        select_mask({"a": torch.ones(8), "b": torch.ones(8)}, {"a": memory[:8], "b": memory[4:]}, k=1)


@pytest.mark.parametrize("dense", [(), ("emb.weight",)])
def test_copies_of_tied_tensors_are_written_too(tmp_path, dense):
    base = Tied()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.emb.weight[:2] = exact_pair()[0]["b"][1:]  # with low terms
    more = [m.state_dict() | {"more": torch.full((1,), i)} for i, m in ((1.0, tuned), (0.0, base))]
    SparseDelta.from_models(*more, dense=dense).save_pretrained(tmp_path)
    delta = compose(SparseDelta.from_pretrained(tmp_path))
    assert delta.metadata["tied"] == {"head.weight": "emb.weight"}
    model = clones(base) | {"more": torch.zeros(1)}
    before = clones(model)
    with delta.applied(model):
        assert same(model, more[0])
    assert same(model, before)
    delta.apply_(model)
    assert same(model, more[0])
    other = clones(before) | {"head.weight": before["head.weight"] + 1}
    with pytest.raises(ValueError, match="'head.weight' was tied to 'emb.weight'"):
        delta.apply_(other)
    delta.apply_(other, strict=False)
    assert same(other, more[0] | {"head.weight": before["head.weight"] + 1})


def test_buffers_of_modules_are_kept_whole_where_they_differ():
    base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    base.register_buffer("scratch", torch.zeros(1), persistent=False)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.add_(1)
        tuned.scratch.add_(1)
    assert not SparseDelta.from_models(tuned, base).dense
    tuned[1](torch.randn(5, 3))
    names = ["1.num_batches_tracked", "1.running_mean", "1.running_var"]
    for new, old in ((tuned, base), (tuned.state_dict(), base), (tuned, base.state_dict())):
        delta = SparseDelta.from_models(new, old)
        assert list(delta.dense) == names
        assert delta.mask.names == ("0.weight",)
        model = copy.deepcopy(base)
        delta.apply_(model)
        assert same(model, tuned)
    parameters = {n: p.detach().clone() for n, p in base.named_parameters()}
    assert not SparseDelta.from_models(tuned, parameters).dense
    assert not SparseDelta.from_models(dict(tuned.named_parameters()), base).dense
    covered = {n: torch.ones_like(tuned.state_dict()[n], dtype=torch.bool) for n in ("0.weight", "1.running_mean")}
    assert list(SparseDelta.from_models(tuned, base, CSRMask.from_dense(covered)).dense) == [names[0], names[2]]


class Compiled(nn.Module):
    """As torch.compile wraps a model."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


WRAPPERS = [
    Compiled,
    nn.DataParallel,
    lambda m: Compiled(nn.DataParallel(m)),
    lambda m: nn.Sequential(Compiled(m[0])),
]


def test_wrapped_models_have_the_names_of_the_model_inside():
    base = nn.Sequential(nn.Linear(3, 3))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.add_(1)
    for wrap in WRAPPERS:
        model = wrap(copy.deepcopy(base))
        assert select_mask(wrap(copy.deepcopy(tuned)), base, k=3).names == ("0.bias", "0.weight")
        delta = SparseDelta.from_models(wrap(copy.deepcopy(tuned)), model)
        assert delta.mask.names == ("0.weight",)
        delta.apply_(model)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tuned.parameters()))
    with pytest.raises(ValueError, match="lacks tensor '0.weight' of the delta, but has '_orig_mod.0.weight'"):
        delta.apply_(Compiled(base).state_dict())
    with pytest.raises(ValueError, match="'0.weight' is bfloat16, the delta was made for a base in float32"):
        delta.apply_(copy.deepcopy(base).bfloat16())


def test_a_sparsified_model_is_read_and_never_written():
    base = nn.Sequential(nn.Linear(4, 4))
    mask = CSRMask.from_dense({"0.weight": torch.eye(4, dtype=torch.bool)})
    model = sparsify(copy.deepcopy(base), mask)
    with torch.no_grad():
        masked_parameters(model)["0.weight"].values.add_(1)
    delta = SparseDelta.from_models(model, base, mask)
    assert delta.mask == mask
    before = base[0].weight.detach().clone()
    with delta.applied(base):
        assert torch.equal(base[0].weight, before + torch.eye(4))
    with pytest.raises(ValueError, match="densify"):
        delta.apply_(model)
    for make in (lambda: SparseDelta.from_models(model.state_dict(), base), lambda: select_mask(model, base, k=1)):
        with pytest.raises(ValueError, match="tuned is sparsified .*'0.values' beside '0.weight'"):
            make()


def test_inference_mode():
    base = nn.Linear(8, 8)
    delta, before = shifted(base, 1), clones(base)
    with torch.inference_mode():
        mask = select_mask({n: p + 1 for n, p in base.named_parameters()}, base, density=0.5)
        with delta.applied(base):
            assert not torch.equal(base.weight, before["weight"])
        loaded = clones(base)
        delta.apply_(loaded)
        again = SparseDelta.from_models(loaded, base, dense=["bias"])
    assert torch.equal(loaded["weight"], before["weight"] + 1)
    assert not again.values.is_inference()
    assert not again.dense["bias"].is_inference()
    sparsify(base, mask)(torch.ones(2, 8)).sum().backward()


def test_a_default_device_changes_nothing(tmp_path):
    tuned, base = exact_pair()
    with torch.device("meta"):
        mask = select_mask(tuned, base, k=2, names=["a"])
        delta = SparseDelta.from_models(tuned, base)
        delta.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="those of 3 of 7 entries are left out"):
            interop.to_composable_sft(delta, tmp_path)
        total = compose(SparseDelta.from_pretrained(tmp_path), SparseDelta.from_models(base, base))
        with total.applied(base | {"a": base["a"].double()}, strict=False):
            pass
        total.apply_(base)
        assert interop.from_composable_sft(tmp_path).mask == delta.mask
        matrix = mask.sparse_csr("a", mask.gather(tuned))
        expected = CSRMask(["a"], [(1, 3)], mask.crow_indices, mask.col_indices)
        assert interop.from_csr({"a": matrix})[0] == expected
    assert same(base, tuned)


def test_a_delta_of_an_encoder_on_a_model_that_wraps_it(tmp_path):
    """With whole tensors, tied names and low terms, and back."""
    tuned, base = exact_pair()
    delta = SparseDelta.from_models(tuned | {"head": torch.ones(2)}, base, metadata={"tied": {"c": "b"}})
    wrapping = {f"bert.{n}": t.clone() for n, t in (base | {"head": torch.zeros(2), "c": base["b"]}).items()}
    hint = r"model lacks tensor 'a' of the delta: delta.with_prefix\('bert.'\) has the model's names"
    with pytest.raises(ValueError, match=hint):
        delta.apply_(wrapping)
    inner = delta.with_prefix("bert.")
    inner.apply_(wrapping)
    for name, tensor in (tuned | {"head": torch.ones(2), "c": tuned["b"]}).items():
        assert torch.equal(bits(wrapping[f"bert.{name}"]), bits(tensor))
    with pytest.raises(ValueError, match=r"delta.without_prefix\('bert.'\) has the model's names"):
        inner.apply_(base | {"head": torch.zeros(2)})
    with pytest.raises(ValueError, match="'a' does not begin with 'bert.'"):
        delta.without_prefix("bert.")
    inner.without_prefix("bert.").save_pretrained(tmp_path / "again")
    delta.save_pretrained(tmp_path / "delta")
    read = [(tmp_path / n / CONFIG_NAME).read_text() for n in ("again", "delta")]
    assert read[0] == read[1]  # with the checksum of the tensors


@given(st.permutations(["a", "b", "cube", "emb.weight"]))
@settings(max_examples=15, deadline=None)
def test_renamed_tensors_are_in_the_order_of_their_new_names(names):
    base = tensors() | exact_pair()[1]
    old = dict(zip(["a", "b", "enc.weight", "emb.weight"], names))
    delta = SparseDelta.from_models(tune(base)[0] | exact_pair()[0], base)
    renamed = delta.renamed({n: f"new.{new}" for n, new in old.items()})
    model = {f"new.{old[n]}" if n in old else n: t.clone() for n, t in base.items()}
    renamed.apply_(model)
    delta.apply_(base)
    for name, tensor in base.items():
        assert torch.equal(bits(model[f"new.{old[name]}" if name in old else name]), bits(tensor))
    CSRMask(renamed.mask.names, renamed.mask.shapes, renamed.mask.crow_indices, renamed.mask.col_indices)
    for wrong, message in (({"x": "y"}, "has no tensor 'x'"), ({"a": "b"}, "two tensors of the delta would be 'b'")):
        with pytest.raises(ValueError, match=message):
            delta.renamed(wrong)


def test_a_base_in_another_dtype_is_refused_with_what_strict_does():
    tuned, base = {"w": torch.full((4,), 1.5)}, {"w": torch.ones(4)}
    delta = SparseDelta.from_models(tuned, base)
    model = {"w": base["w"].bfloat16()}
    with pytest.raises(ValueError, match="'w' is bfloat16, .* in float32: strict=False adds it and rounds each sum to"):
        delta.apply_(model)
    delta.apply_(model, strict=False)
    assert model["w"].tolist() == [1.5] * 4
