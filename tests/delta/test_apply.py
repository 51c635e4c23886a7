"""A delta on a model: only on the base that it was made for, once, and taken off bit for bit."""

import copy
import warnings

import pytest
import torch
from delta_examples import clones, deltas_of, same, shifted, tensors, tune
from safetensors.torch import load_file, save_file
from torch import nn

from deftx_kernels import CSRMask, SparseDelta, compose
from deftx_kernels.delta import fingerprints


def fail_after(_):
    raise TypeError("own")


def test_applied_restores_every_bit():
    """composable-sft's subtraction leaves 0.4 % of the entries changed."""
    torch.manual_seed(0)
    base = nn.Linear(40, 30)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for p in tuned.parameters():
            p.mul_(1.01)
    delta, before = SparseDelta.from_models(tuned, base), clones(base)
    assert delta.metadata["inexact_entries"] == 0
    with delta.applied(base) as model:
        assert model is base
        assert same(base, tuned)
    assert same(base, before)
    with pytest.raises(TypeError, match="own"), delta.applied(base, alpha=0.5):
        fail_after(None)
    assert same(base, before)


def test_alpha_and_dense():
    base = tensors()
    tuned, mask = tune(base)
    delta = SparseDelta.from_models(tuned | {"head": torch.ones(2)}, base, mask)
    model = clones(base) | {"head": torch.zeros(2)}
    delta.apply_(model, alpha=0.5, dense=False)
    assert not model["head"].any()
    for name in base:
        torch.testing.assert_close(model[name], (base[name] + tuned[name]) / 2)
    with pytest.raises(ValueError, match="model lacks tensor 'head'"):
        delta.apply_(dict(base))


def test_another_base_is_refused_by_name_and_not_changed():
    base = tensors()
    tuned, _ = tune(base)
    delta = SparseDelta.from_models(tuned, base, metadata={"base_model": "my-model"})
    other = clones(base)
    other["emb.weight"] += 1e-3
    before = clones(other)
    with pytest.raises(ValueError, match=r"not the base of this delta \(my-model\): 1 of 4 tensors .* 'emb.weight'"):
        delta.apply_(other)
    with pytest.raises(ValueError, match="'emb.weight'"), delta.applied(other):
        pass
    for model, message in (
        (other | {"cube": torch.zeros(3)}, "'cube' has shape"),
        ({n: t for n, t in other.items() if n != "cube"}, "lacks tensor 'cube'"),
        (other | {"cube": torch.zeros(2, 3, 2, dtype=torch.int64)}, "'cube' is torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            delta.apply_(model)
    for alpha in (float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="alpha must be a finite number"):
            delta.apply_(base, alpha)
    assert same(other, before)
    delta.apply_(other, strict=False)
    assert not torch.equal(other["emb.weight"], before["emb.weight"])


def test_deltas_can_be_stacked_on_a_base_but_not_on_a_trained_one():
    base = tensors()
    a, b = deltas_of(base, 1, 2)
    model, expected = clones(base), clones(base)
    a.apply_(model)
    b.apply_(model)
    with a.applied(model, alpha=-1.0):
        pass
    compose(a, b).apply_(expected)
    for name in base:
        torch.testing.assert_close(model[name], expected[name], atol=1e-6, rtol=1e-6)
    model["cube"] += 1
    with pytest.raises(ValueError, match="'cube'"):
        b.apply_(model)


def test_a_delta_is_added_once_unless_it_is_taken_off():
    base = tensors()
    a, b = deltas_of(base, 1, 2)
    again = SparseDelta(a.mask, a.values.clone(), metadata=a.metadata)
    for start in (a, SparseDelta(a.mask, a.values)):  # with and without fingerprints of the base
        model = clones(base)
        start.apply_(model)
        before = clones(model)
        message = r"has been added to model's tensor '.*' already, with alpha = 1.0: alpha = -1.0 removes it"
        with pytest.raises(ValueError, match=message):
            again.apply_(model)
        with pytest.raises(ValueError, match="already"), start.applied(model, alpha=0.5):
            pass
        assert same(model, before)
        start.apply_(model, strict=False)
        assert not torch.equal(model["cube"], before["cube"])
    model = clones(base)
    a.apply_(model)
    b.apply_(model)
    a.apply_(model, alpha=-1.0)
    a.apply_(model)  # off, and on again
    with pytest.raises(ValueError, match="already"):
        b.apply_(model)


def test_copies_of_a_model_have_its_history(tmp_path):
    base = nn.Linear(4, 4)
    one, two = shifted(base, 1), shifted(base, 2)
    one.apply_(base)
    save_file(base.state_dict(), tmp_path / "model")
    for form in (base.state_dict(), copy.deepcopy(base), load_file(tmp_path / "model"), clones(base)):
        with pytest.raises(ValueError, match="already"):
            one.apply_(form)
        with two.applied(form):
            pass
    two.apply_(base.state_dict())
    one.apply_(copy.deepcopy(base), alpha=-1)


@pytest.mark.parametrize("write", [lambda p: p.data.mul_(2), lambda p: p.detach().numpy().fill(3)])
def test_strict_detects_every_write(write):
    """Weight loaders write through .data, NumPy through shared memory: no version counter changes."""
    base = nn.Linear(8, 8)
    delta = shifted(base, 1)
    with delta.applied(base):
        pass
    other = copy.deepcopy(base)
    write(other.weight)
    delta.apply_(base)
    write(base.weight)
    for model, alpha in ((other, 1.0), (base, 1.0), (base, -1.0)):
        with pytest.raises(ValueError, match="not the base"):
            delta.apply_(model, alpha)


@pytest.mark.parametrize("mask", [[True, False, True], [False, False, False]])
def test_strict_detects_writes_outside_the_mask(mask):
    base = {"w": torch.zeros(3)}
    mask = CSRMask.from_dense({"w": torch.tensor(mask)})
    delta = SparseDelta(mask, torch.ones(mask.nnz), metadata={"base_fingerprint": fingerprints.fingerprint(base)})
    delta.apply_(base)
    base["w"][1] = 5
    with pytest.raises(ValueError, match="not the base"):
        delta.apply_(base, -1.0)


@pytest.mark.parametrize(("applied", "hashes"), [(False, 2), (True, 1)])
def test_hashes_of_a_model(monkeypatch, applied, hashes):
    """`apply_` hashes before and after writing; `applied` after writing only if another delta follows."""
    model = {"w": torch.zeros(3)}
    delta = SparseDelta.from_models({"w": torch.ones(3)}, model)
    tensor_hash, calls = fingerprints.tensor_hash, []
    monkeypatch.setattr(fingerprints, "tensor_hash", lambda t: calls.append(1) or tensor_hash(t))
    if applied:
        with delta.applied(model):
            pass
    else:
        delta.apply_(model)
    assert len(calls) == hashes


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_applied_contexts_close_in_any_order(order):
    base = tensors()
    fixed, *deltas = deltas_of(base, 1, 2, 3, 4)
    other = nn.Linear(3, 3)
    elsewhere = shifted(other, 1).applied(other)
    model = clones(base)
    fixed.apply_(model)
    before = clones(model)
    contexts = [d.applied(model) for d in deltas]
    for context in (contexts[0], elsewhere, *contexts[1:]):
        context.__enter__()
    for i, at in enumerate(order):
        contexts[at].__exit__(None, None, None)
        expected = clones(base)
        fixed.apply_(expected)
        for still in sorted(order[i + 1 :]):
            deltas[still].apply_(expected)
        assert same(model, expected)
        with deltas[at].applied(model):  # those that stay open are known
            pass
    elsewhere.__exit__(None, None, None)
    assert same(model, before)
    for delta in deltas:  # and it counts as the base that it is
        with delta.applied(model):
            pass


def test_other_writes_meanwhile_are_reported():
    base = {"w": torch.zeros(2)}
    delta = SparseDelta.from_models({"w": torch.ones(2)}, base)
    message = "entries of 'w' .* were changed while a delta was applied"
    with pytest.warns(RuntimeWarning, match=message), delta.applied(base):
        base["w"].mul_(3)
    assert base["w"].tolist() == [0, 0]
    whole = SparseDelta.from_models({"w": torch.ones(2), "head": torch.ones(2)}, base)
    model = base | {"head": torch.zeros(2)}
    with pytest.warns(RuntimeWarning, match="entries of 'head' "), whole.applied(model):
        model["head"].mul_(3)
    assert not model["head"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="'w'"), delta.applied(base):
            base["w"].mul_(3)
        with pytest.raises(TypeError, match="own"), delta.applied(base):
            fail_after(base["w"].mul_(3))
        with delta.applied(base):  # nothing was left open
            pass
        delta.apply_(base)
    assert base["w"].tolist() == [1, 1]


def test_tensors_that_are_resized_or_replaced_meanwhile():
    base = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    delta, before = shifted(base, 1), clones(base)
    with pytest.raises(RuntimeError, match=r"tensors \['1.weight'\] have another shape"), delta.applied(base):
        base[1].weight = nn.Parameter(torch.zeros(5, 3))
    assert same(base, before | {"1.weight": torch.zeros(5, 3)})
    base[1].weight = nn.Parameter(before["1.weight"].clone())
    resized = pytest.warns(RuntimeWarning, match="another shape")
    with resized, pytest.raises(TypeError, match="own"), delta.applied(base):
        fail_after(setattr(base[1].weight, "data", torch.zeros(5, 3)))
    base[1].weight = nn.Parameter(before["1.weight"].clone())
    with delta.applied(base) as model:
        old = base[0].weight
        model.load_state_dict(clones(model), assign=True)
        assert model[0].weight is not old
        # a state dict is the model
        with SparseDelta(delta.mask, 2 * delta.values).applied(model.state_dict(), strict=False):
            model.double()
    assert same(base, {n: t.double() for n, t in before.items()})
    assert torch.equal(old, before["0.weight"])


def test_an_open_delta_is_found_through_every_form_of_the_model():
    model = nn.Linear(3, 3)
    one, two, before = shifted(model, 1), shifted(model, 2), clones(model)
    second = two.applied(model.state_dict())
    with one.applied(model):
        for form in (model, model.state_dict()):
            with pytest.raises(ValueError, match="model's tensor 'bias' is in an open `applied` block"):
                two.apply_(form, strict=False)
            with pytest.raises(ValueError, match="already"), one.applied(form):
                pass
        second.__enter__()
    assert all(torch.equal(t, before[n] + 2) for n, t in model.state_dict().items())
    second.__exit__(None, None, None)
    assert same(model, before)
    with one.applied(model):
        model.bias.data[0] += 1
        with pytest.raises(ValueError, match="not the base .* 'bias'"), two.applied(model):
            pass
        model.bias.data[0] -= 1


def test_a_failed_write_changes_nothing(monkeypatch):
    base = {"a": torch.zeros(3), "b": torch.zeros(3, dtype=torch.bfloat16), "head": torch.zeros(2)}
    delta = SparseDelta.from_models({n: t + 1 for n, t in base.items()}, base, dense=["head"])
    add, calls = CSRMask.add_, []

    def fail_once(mask, *arguments, **options):
        calls.append(mask.names)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return add(mask, *arguments, **options)

    monkeypatch.setattr(CSRMask, "add_", fail_once)
    with pytest.raises(RuntimeError, match="out of memory"):
        delta.apply_(base)
    assert not any(t.any() for t in base.values())
    delta.apply_(base)  # strict: it still is the base
    assert all(bool((t == 1).all()) for t in base.values())


def test_tensors_that_cannot_be_written_are_named_before_any_is():
    base = {"a": torch.zeros(4), "b": torch.zeros(4)}
    delta = SparseDelta.from_models({n: t + 1 for n, t in base.items()}, base)
    shared = torch.zeros(6)
    with torch.inference_mode():
        inference = torch.zeros(4)
    refused = {
        "'b' is on meta": torch.zeros(4, device="meta"),
        "'b' must be a dense": torch.zeros(4).to_sparse(),
        "'b' was made in inference_mode": inference,
        "elements of model's tensor 'b' share memory": torch.zeros(1).expand(4),
        r"one tensor as 'a' and 'b'": base["a"],
    }
    for message, tensor in refused.items():
        with pytest.raises((ValueError, TypeError), match=message):
            delta.apply_({"a": base["a"], "b": tensor}, strict=False)
    with pytest.raises(ValueError, match="'b'.* shares a part of its memory"):
        delta.apply_({"a": shared[:4], "b": shared[2:]})
    assert not base["a"].any()
    assert not shared.any()
    columns = torch.zeros(4, 2)
    delta.apply_({"a": columns[:, 0], "b": columns[:, 1]})  # interleaved, without a common byte
    assert bool((columns == 1).all())
    for message in ("'b' is on meta", "'b' must be a dense"):
        with pytest.raises((ValueError, TypeError), match=r"base\['b'\]"):
            SparseDelta.from_models(base, base | {"b": refused[message]})
