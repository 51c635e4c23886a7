"""SparseDelta: exact differences, files that are whole or absent, bases that fit or are refused, composition; interop."""

import copy
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deftx_kernels import CSRMask, SparseDelta, compose, interop, select_mask, sparsify, topk_mask
from deftx_kernels.delta import CONFIG_NAME, WEIGHTS_NAME, fingerprint, fingerprints
from deftx_kernels.nn import masked_parameters

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


def bits(tensor):
    return tensor.detach().contiguous().view(BITS[tensor.element_size()])


def clones(tensors):
    return {n: t.clone() for n, t in tensors.items()}


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
    tuned = {
        "w": (base["w"].float() + scale * torch.randn(200, 50, generator=torch.Generator().manual_seed(1))).to(dtype)
    }
    delta = SparseDelta.from_models(tuned, base)
    delta.apply_(base)
    assert torch.equal(bits(base["w"]), bits(tuned["w"]))
    assert delta.metadata["inexact_entries"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *FP8])
@pytest.mark.parametrize("seed", range(3))
def test_any_finite_bits_come_back(dtype, seed):
    """Bit patterns at random: every exponent, subnormals, both zeros; a tenth within a few bits of the base."""
    generator = torch.Generator().manual_seed(seed)
    integer = BITS[dtype.itemsize]
    least, most = torch.iinfo(integer).min, torch.iinfo(integer).max
    base, tuned = (
        torch.randint(least, most, (20_000,), generator=generator, dtype=torch.int64).to(integer) for _ in range(2)
    )
    tuned = torch.where(torch.rand(len(base), generator=generator) < 0.1, base ^ (tuned & 3), tuned)
    base[:4], tuned[:4] = torch.tensor([0, least, 0, 1]), torch.tensor([least, 0, 1, least])
    base, tuned = base.view(dtype), tuned.view(dtype)
    finite = base.float().isfinite() & tuned.float().isfinite()
    base, tuned = {"w": base[finite]}, {"w": tuned[finite]}
    delta = SparseDelta.from_models(tuned, base)
    delta.apply_(base)
    assert torch.equal(bits(base["w"]), bits(tuned["w"]))
    assert delta.metadata["inexact_entries"] == 0


def test_what_no_sum_can_carry_is_counted():
    nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32).item()
    base, tuned = torch.tensor([1.0, torch.inf, torch.nan, torch.inf]), torch.tensor([nan, 1.0, 1.0, -torch.inf])
    assert SparseDelta.from_models({"w": tuned}, {"w": base}).metadata["inexact_entries"] >= 3
    for name, value in (("up", torch.inf), ("down", -torch.inf)):
        base, tuned = {name: torch.ones(1)}, {name: torch.full((1,), value)}
        delta = SparseDelta.from_models(tuned, base)
        delta.apply_(base)
        assert base[name].item() == value
        assert delta.metadata["inexact_entries"] == 0
    wide = {"w": torch.randn(1000, dtype=torch.float64)}
    tuned = {"w": wide["w"] * 1.37}
    delta = SparseDelta.from_models(tuned, wide)
    delta.apply_(wide)
    assert int((wide["w"] != tuned["w"]).sum()) == delta.metadata["inexact_entries"] <= 10
    zero = {"w": torch.zeros(1, dtype=torch.float64)}
    # nothing added to 0.0 gives -0.0
    assert SparseDelta.from_models({"w": -zero["w"]}, zero).metadata["inexact_entries"] == 1


def exact_pair():
    """A base and a tuned tensor of which some entries need a second term, and a tensor before them that needs none."""
    base = {"a": torch.ones(3), "b": torch.tensor([1.0, 1.0, 0.0, -3e38, 2.0])}
    tuned = {"a": torch.full((3,), 1.5), "b": torch.tensor([1e-9, 1.5, -0.0, 3e38, 2.0])}
    return tuned, base


def test_second_terms_are_saved_composed_and_dropped_by_the_lossy_form(tmp_path):
    tuned, base = exact_pair()
    delta = SparseDelta.from_models(tuned, base)
    assert delta.low[0].tolist() == [3, 5, 6]
    assert delta.mask.nnz == 7
    delta.save_pretrained(tmp_path / "exact")
    loaded = SparseDelta.from_pretrained(tmp_path / "exact")
    nothing = SparseDelta.from_models(base, base, delta.mask)
    for one in (delta, loaded, compose(loaded), compose(nothing, delta), compose(delta, nothing)):
        assert torch.equal(one.values, delta.values)
        model = clones(base)
        with one.applied(model):
            assert all(torch.equal(bits(model[n]), bits(tuned[n])) for n in base)
        assert all(torch.equal(bits(model[n]), bits(base[n])) for n in base)
        mixed = clones(base) | {"a": base["a"].bfloat16()}  # two dtypes: applied by tensor
        one.apply_(mixed, strict=False)
        assert torch.equal(bits(mixed["b"]), bits(tuned["b"]))
    small = SparseDelta.from_models({n: t[:3] for n, t in tuned.items()}, {n: t[:3] for n, t in base.items()})
    assert len(small.low[0]) == 2
    small.save_pretrained(tmp_path / "lossy", torch.bfloat16)
    assert SparseDelta.from_pretrained(tmp_path / "lossy").low is None
    assert nothing.low is None


@pytest.mark.parametrize(
    ("low", "message"),
    [
        (([0, 0], [1.0, 1.0]), "ascend"),
        (([0, 9], [1.0, 1.0]), "ascend"),
        (([-1], [1.0]), "ascend"),
        (([0.0], [1.0]), "int32 or int64"),
        (([0], [1.0, 2.0]), r"float64 \[1\]"),
    ],
)
def test_second_terms_are_validated(low, message):
    mask = CSRMask.from_dense({"a": torch.ones(3, dtype=torch.bool)})
    with pytest.raises((ValueError, TypeError), match=message):
        SparseDelta(mask, torch.zeros(3), low=(torch.tensor(low[0]), torch.tensor(low[1], dtype=torch.float64)))


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
    for alpha in (float("nan"), float("inf"), "1"):
        with pytest.raises(ValueError, match="alpha must be a finite number"):
            delta.apply_(base, alpha)
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


def test_a_delta_is_added_once_unless_it_is_taken_off():
    base = tensors()
    a, b = (SparseDelta.from_models(tune(base, seed)[0], base) for seed in (1, 2))
    again = SparseDelta(a.mask, a.values.clone(), metadata=a.metadata)
    for start in (a, SparseDelta(a.mask, a.values)):  # with and without fingerprints of the base
        model = clones(base)
        start.apply_(model)
        before = clones(model)
        with pytest.raises(
            ValueError, match=r"is on model's tensor '.*' already, with alpha = 1.0: alpha = -1.0 takes it off"
        ):
            again.apply_(model)
        with pytest.raises(ValueError, match="already"), start.applied(model, alpha=0.5):
            pass
        assert all(torch.equal(model[n], before[n]) for n in model)
        start.apply_(model, strict=False)
        assert not torch.equal(model["cube"], before["cube"])
    model = clones(base)
    a.apply_(model)
    b.apply_(model)
    a.apply_(model, alpha=-1.0)
    a.apply_(model)  # off, and on again
    with pytest.raises(ValueError, match="already"):
        b.apply_(model)


@pytest.mark.parametrize("write", [lambda p: p.data.mul_(2), lambda p: p.detach().numpy().fill(3)])
def test_strict_sees_every_write(write):
    """Weight loaders write through .data, NumPy through shared memory: no version counter moves."""
    base = nn.Linear(8, 8)
    delta = SparseDelta.from_models({n: p + 1 for n, p in base.named_parameters()}, base)
    with delta.applied(base):
        pass
    other = copy.deepcopy(base)
    write(other.weight)
    delta.apply_(base)
    write(base.weight)
    for model, alpha in ((other, 1.0), (base, 1.0), (base, -1.0)):
        with pytest.raises(ValueError, match="not the base"):
            delta.apply_(model, alpha)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_applied_contexts_close_in_any_order(order):
    base = tensors()
    fixed, *deltas = (SparseDelta.from_models(tune(base, seed)[0], base) for seed in (1, 2, 3, 4))
    other = nn.Linear(3, 3)
    elsewhere = SparseDelta.from_models({"weight": torch.ones(3, 3)}, {"weight": other.weight})
    model = clones(base)
    fixed.apply_(model)
    before = clones(model)
    contexts = [d.applied(model) for d in deltas]
    opened = [
        contexts[0].__enter__(),
        elsewhere.applied(other).__enter__,
        contexts[1].__enter__(),
        contexts[2].__enter__(),
    ]
    assert len(opened) == 4
    for i, at in enumerate(order):
        contexts[at].__exit__(None, None, None)
        expected = clones(base)
        fixed.apply_(expected)
        for still in sorted(order[i + 1 :]):
            deltas[still].apply_(expected)
        assert all(torch.equal(bits(model[n]), bits(expected[n])) for n in base)
        with deltas[at].applied(model):  # those that stay open are known
            pass
    assert all(torch.equal(bits(model[n]), bits(before[n])) for n in base)
    for delta in deltas:  # and it counts as the base that it is
        with delta.applied(model):
            pass


def fail_after(_):
    raise TypeError("own")


def test_what_else_is_written_meanwhile_is_not_lost_silently():
    base = {"w": torch.zeros(2)}
    delta = SparseDelta.from_models({"w": torch.ones(2)}, base)
    with (
        pytest.warns(RuntimeWarning, match="entries of 'w' .* were changed while a delta was applied"),
        delta.applied(base),
    ):
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
    delta = SparseDelta.from_models({n: p + 1 for n, p in base.named_parameters()}, base)
    before = clones(base.state_dict())
    with pytest.raises(RuntimeError, match=r"tensors \['1.weight'\] have another shape"), delta.applied(base):
        base[1].weight = nn.Parameter(torch.zeros(5, 3))
    assert all(torch.equal(t, before[n]) for n, t in base.state_dict().items() if n != "1.weight")
    base[1].weight = nn.Parameter(before["1.weight"].clone())
    with (
        pytest.warns(RuntimeWarning, match="another shape"),
        pytest.raises(TypeError, match="own"),
        delta.applied(base),
    ):
        fail_after(setattr(base[1].weight, "data", torch.zeros(5, 3)))
    base[1].weight = nn.Parameter(before["1.weight"].clone())
    with delta.applied(base) as model:
        old = base[0].weight
        model.load_state_dict(clones(model.state_dict()), assign=True)
        assert model[0].weight is not old
        # a state dict is the model
        with SparseDelta(delta.mask, 2 * delta.values).applied(model.state_dict(), strict=False):
            model.double()
    assert all(torch.equal(t, before[n].double()) for n, t in base.state_dict().items())
    assert torch.equal(old, before["0.weight"])


def test_an_open_delta_is_seen_through_every_form_of_the_model():
    model = nn.Linear(3, 3)
    one, two = (SparseDelta.from_models({n: p + i for n, p in model.named_parameters()}, model) for i in (1, 2))
    before = clones(model.state_dict())
    first, second = one.applied(model), two.applied(model.state_dict())
    with first:
        for form in (model, model.state_dict()):
            with pytest.raises(ValueError, match="model's tensor 'bias' is in an open `applied` block"):
                two.apply_(form, strict=False)
            with pytest.raises(ValueError, match="already"), one.applied(form):
                pass
        second.__enter__()
    assert all(torch.equal(t, before[n] + 2) for n, t in model.state_dict().items())
    second.__exit__(None, None, None)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with one.applied(model):
        model.bias.data[0] += 1
        with pytest.raises(ValueError, match="not the base .* 'bias'"), two.applied(model):
            pass
        model.bias.data[0] -= 1


def test_applied_reads_the_model_once(monkeypatch):
    model = {"w": torch.zeros(3)}
    delta = SparseDelta.from_models({"w": torch.ones(3)}, model)
    digest, calls = fingerprints.tensor_hash, []
    monkeypatch.setattr(fingerprints, "tensor_hash", lambda t: calls.append(1) or digest(t))
    with delta.applied(model):
        pass
    assert len(calls) == 1


def test_copies_of_a_model_have_its_history(tmp_path):
    base = nn.Linear(4, 4)
    one, two = (SparseDelta.from_models({n: p + i for n, p in base.named_parameters()}, base) for i in (1, 2))
    one.apply_(base)
    save_file(base.state_dict(), tmp_path / "model")
    for form in (base.state_dict(), copy.deepcopy(base), load_file(tmp_path / "model"), clones(base.state_dict())):
        with pytest.raises(ValueError, match="already"):
            one.apply_(form)
        with two.applied(form):
            pass
    two.apply_(base.state_dict())
    one.apply_(copy.deepcopy(base), alpha=-1)


def test_a_failed_write_changes_nothing(monkeypatch):
    base = {"a": torch.zeros(3), "b": torch.zeros(3, dtype=torch.bfloat16), "head": torch.zeros(2)}
    delta = SparseDelta.from_models({n: t + 1 for n, t in base.items()}, base, dense=["head"])
    scatter = CSRMask.scatter_
    calls = []

    def fail_once(mask, tensors, compact):
        calls.append(mask.names)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return scatter(mask, tensors, compact)

    monkeypatch.setattr(CSRMask, "scatter_", fail_once)
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
    delta.apply_({"a": columns[:, 0], "b": columns[:, 1]})  # interleaved, and apart
    assert bool((columns == 1).all())
    for argument in (base | {"b": refused["'b' is on meta"]}, base | {"b": refused["'b' must be a dense"]}):
        with pytest.raises((ValueError, TypeError), match=r"base\['b'\]"):
            SparseDelta.from_models(base, argument)


@pytest.mark.parametrize("dtype", FP8)
def test_float8_is_summed_in_float32(dtype):
    base = {"a": torch.zeros(4), "q": torch.tensor([0.0, 1.0, 2.0, 3.0]).to(dtype)}
    tuned = {"a": torch.ones(4), "q": torch.tensor([1.0, 1.0, 4.0, 0.5]).to(dtype)}
    delta = SparseDelta.from_models(tuned, base)
    with delta.applied(base):
        assert all(torch.equal(bits(base[n]), bits(tuned[n])) for n in base)
    delta.apply_(base)
    assert all(torch.equal(bits(base[n]), bits(tuned[n])) for n in base)


def test_what_can_be_saved_can_be_applied(tmp_path):
    """Integer buffers, whole, to a mapping and to a module."""
    base, tuned = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    tuned(torch.randn(5, 3))
    with torch.no_grad():
        tuned.weight.mul_(1.5)
    names = ["running_mean", "running_var", "num_batches_tracked"]
    SparseDelta.from_models(tuned.state_dict(), base.state_dict(), dense=names).save_pretrained(tmp_path)
    delta = SparseDelta.from_pretrained(tmp_path)
    for model in (copy.deepcopy(base), copy.deepcopy(base).state_dict()):
        delta.apply_(model)
        state = model.state_dict() if isinstance(model, nn.Module) else model
        assert all(torch.equal(state[n], t) for n, t in tuned.state_dict().items())
    with pytest.raises(ValueError, match="'num_batches_tracked' neither|1 entries of 'num_batches_tracked'"):
        SparseDelta.from_models(tuned.state_dict(), base.state_dict(), dense=names[:2])
    with pytest.raises(ValueError, match="'num_batches_tracked' is torch.int64, the delta has it as torch.float32"):
        SparseDelta(delta.mask, delta.values, {"num_batches_tracked": torch.tensor(1.0)}).apply_(base, strict=False)
    whole = CSRMask.from_dense({"num_batches_tracked": torch.tensor(True)})
    with pytest.raises(TypeError, match="mask covers 'num_batches_tracked', which is torch.int64"):
        SparseDelta.from_models(tuned.state_dict(), base.state_dict(), whole)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.emb.weight


def test_tied_tensors_count_once_in_every_form():
    base = Tied()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.emb.weight.add_(1.0)
    forms = [lambda m: m, lambda m: m.state_dict(), lambda m: dict(reversed(m.state_dict().items()))]
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
    assert list(
        SparseDelta.from_models(
            tuned.state_dict() | {"x": torch.ones(1)}, base.state_dict() | {"x": torch.zeros(1)}, dense=["head.weight"]
        ).dense
    ) == ["emb.weight"]
    untied = {n: t.clone() for n, t in tuned.state_dict().items()}
    assert len(SparseDelta.from_models(untied, base).mask) == 1
    # as some writers keep it
    assert len(SparseDelta.from_models({"head.weight": untied["head.weight"]}, base).mask) == 1
    untied["head.weight"] += 1
    for make in (SparseDelta.from_models, lambda t, b: select_mask(t, b, k=1)):
        with pytest.raises(ValueError, match="one tensor as 'emb.weight' and 'head.weight', which differ in tuned"):
            make(untied, base)
    both = SparseDelta.from_models(untied, clones(base.state_dict()))
    with pytest.raises(ValueError, match="one tensor as 'emb.weight' and 'head.weight', the delta changes both"):
        both.apply_(base, strict=False)
    for copied in (clones(base.state_dict()), dict(reversed(clones(base.state_dict()).items()))):
        assert len(SparseDelta.from_models(tuned, copied).mask) == len(select_mask(tuned, copied, density=1.0)) == 1
    every = CSRMask.from_dense({n: torch.ones(10, 4, dtype=torch.bool) for n in copied})
    assert SparseDelta.from_models(tuned, copied, every).mask == every  # a mask of both: two tensors
    assert list(SparseDelta.from_models(tuned, copied, every["emb.weight"], dense=["head.weight"]).dense) == [
        "head.weight"
    ]
    whole = torch.zeros(12)
    with pytest.raises(ValueError, match=r"base\['b'\] shares a part of its memory"):
        select_mask({"a": torch.ones(8), "b": torch.ones(8)}, {"a": whole[:8], "b": whole[4:]}, k=1)


@pytest.mark.parametrize("dense", [(), ("emb.weight",)])
def test_copies_of_tied_tensors_are_written_too(tmp_path, dense):
    base = Tied()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.emb.weight[:2] = exact_pair()[0]["b"][1:]  # with second terms
    more = [m.state_dict() | {"more": torch.full((1,), i)} for i, m in ((1.0, tuned), (0.0, base))]
    delta = SparseDelta.from_models(*more, dense=dense)
    delta.save_pretrained(tmp_path)
    delta = compose(SparseDelta.from_pretrained(tmp_path))
    assert delta.metadata["tied"] == {"head.weight": "emb.weight"}
    model = clones(base.state_dict()) | {"more": torch.zeros(1)}
    before = clones(model)
    with delta.applied(model):
        assert torch.equal(bits(model["head.weight"]), bits(tuned.emb.weight))
    assert all(torch.equal(model[n], before[n]) for n in model)
    delta.apply_(model)
    assert all(torch.equal(bits(model[n]), bits(tuned.emb.weight)) for n in ("emb.weight", "head.weight"))
    other = clones(before) | {"head.weight": before["head.weight"] + 1}
    with pytest.raises(ValueError, match="'head.weight' was tied to 'emb.weight'"):
        delta.apply_(other)
    delta.apply_(other, strict=False)
    assert torch.equal(other["head.weight"], before["head.weight"] + 1)
    assert torch.equal(bits(other["emb.weight"]), bits(tuned.emb.weight))
    with pytest.raises(TypeError, match="tied must be a mapping"):
        SparseDelta(delta.mask, delta.values, metadata={"tied": ["a"]})


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
        assert all(torch.equal(t, tuned.state_dict()[n]) for n, t in model.state_dict().items())
    parameters = {n: p.detach().clone() for n, p in base.named_parameters()}
    assert not SparseDelta.from_models(tuned, parameters).dense
    assert not SparseDelta.from_models(dict(tuned.named_parameters()), base).dense
    mask = CSRMask.from_dense(
        {n: torch.ones(s, dtype=torch.bool) for n, s in {"0.weight": (3, 3), "1.running_mean": (3,)}.items()}
    )
    assert list(SparseDelta.from_models(tuned, base, mask).dense) == [names[0], names[2]]


class Compiled(nn.Module):
    """As torch.compile wraps a model."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


def test_wrapped_models_go_by_the_names_inside():
    base = nn.Sequential(nn.Linear(3, 3))
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned[0].weight.add_(1)
    for wrap in (
        Compiled,
        nn.DataParallel,
        lambda m: Compiled(nn.DataParallel(m)),
        lambda m: nn.Sequential(Compiled(m[0])),
    ):
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
    base, tuned = nn.Linear(8, 8), nn.Linear(8, 8)
    delta = SparseDelta.from_models(tuned, base)
    with torch.inference_mode():
        mask = select_mask(tuned, base, density=0.5)
        with delta.applied(base):
            assert torch.equal(base.weight, tuned.weight)
        loaded = {n: p.clone() for n, p in base.named_parameters()}
        delta.apply_(loaded)
        again = SparseDelta.from_models(loaded, base, dense=["bias"])
    assert torch.equal(loaded["weight"], tuned.weight)
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
        assert interop.from_csr({"a": mask.sparse_csr("a", mask.gather(tuned))})[0] == CSRMask(
            ["a"], [(1, 3)], mask.crow_indices, mask.col_indices
        )
    assert all(torch.equal(bits(base[n]), bits(tuned[n])) for n in base)


def test_compose_is_the_sum():
    base = tensors()
    deltas = [
        SparseDelta.from_models(tune(base, seed)[0], base, metadata={"base_model": "m", "seed": seed})
        for seed in (1, 2, 3)
    ]
    total = compose(*deltas)
    expected = {
        n: sum(
            d.mask.scatter_(
                {m: torch.zeros(s, dtype=torch.float64) for m, s in zip(d.mask.names, d.mask.shapes)}, d.values
            )[n]
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
    whole = SparseDelta.from_models(
        {"cube": torch.zeros(2, 3, 2), "enc.bias": base["enc.bias"]}, {"enc.bias": base["enc.bias"]}
    )
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
    metadata = json.loads(json.dumps(delta.metadata))
    if dtype is not None:
        del metadata["inexact_entries"]
        metadata["lossy"] = str(dtype).removeprefix("torch.")
        again.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / CONFIG_NAME).read_text())["lossy"]
        assert compose(delta, again).metadata["lossy"] == metadata["lossy"]
    assert again.metadata == metadata


def test_a_failed_save_leaves_the_old_delta(tmp_path, monkeypatch):
    base = tensors()
    delta = SparseDelta.from_models(tune(base)[0], base)
    delta.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(TypeError, match=r"metadata\['x'\] cannot be written as JSON"):
        SparseDelta(delta.mask, delta.values, metadata={"x": object()}).save_pretrained(tmp_path)
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
    base = tensors()
    deltas = [SparseDelta.from_models(tune(base, seed)[0], base) for seed in (1, 2)]
    for name, delta in zip("ab", deltas):
        delta.save_pretrained(tmp_path / name)
    config, weights = tmp_path / "a" / CONFIG_NAME, tmp_path / "a" / WEIGHTS_NAME
    text = config.read_text()
    config.write_text((tmp_path / "b" / CONFIG_NAME).read_text())
    with pytest.warns(RuntimeWarning, match="is of another save"):
        loaded = SparseDelta.from_pretrained(tmp_path / "a")
    assert loaded.mask == deltas[0].mask
    assert torch.equal(loaded.values, deltas[0].values)
    for damaged in (text.replace('"nnz"', '"nNz"'), "[" * 100_000, "{}", "5", text[:-20]):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=f"{CONFIG_NAME} is no readable"):
            SparseDelta.from_pretrained(tmp_path / "a")
    config.write_text(json.dumps(json.loads(text)))  # another layout
    assert SparseDelta.from_pretrained(tmp_path / "a").mask == deltas[0].mask
    config.write_text(text)
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1  # of a value
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=f"{WEIGHTS_NAME} is no readable sparse delta: .*checksum"):
        SparseDelta.from_pretrained(tmp_path / "a")
    save_file({"values": torch.ones(1)}, weights, {"format": "deftx_sparse_delta", "content": "0"})
    with pytest.raises(ValueError, match="written by an older version"):
        SparseDelta.from_pretrained(tmp_path / "a")
    weights.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=f"{WEIGHTS_NAME} is no readable sparse delta"):
        SparseDelta.from_pretrained(tmp_path / "a")
    for path in (config, weights):
        path.unlink()
        with pytest.raises(FileNotFoundError, match=path.name):
            SparseDelta.from_pretrained(tmp_path / "a")
        path.write_text("")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository|holds no"):
        SparseDelta.from_pretrained(tmp_path / "nowhere")


def test_metadata_comes_back_whatever_json_makes_of_it(tmp_path):
    mask = CSRMask.from_dense({"a": torch.ones(1, dtype=torch.bool)})
    metadata = {"lr": float("nan"), "max": float("inf"), "steps": {10: 1, 9: 2}, "pair": (1, 2), "text": "é\u2028"}
    SparseDelta(mask, torch.ones(1), metadata=metadata).save_pretrained(tmp_path)
    again = SparseDelta.from_pretrained(tmp_path).metadata
    assert json.dumps(again) == json.dumps(json.loads(json.dumps(metadata)), sort_keys=True)
    for bad in (5, {"a": 1}, {1: "a"}):
        with pytest.raises(TypeError, match="base_fingerprint"):
            SparseDelta(mask, torch.ones(1), metadata={"base_fingerprint": bad})


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
    w = torch.tensor([1.0, 0, 2, 0, 2, 0, 1])
    assert fingerprint({"a": w}) != fingerprint(
        {"a": w[[2, 1, 0, 3, 4, 5, 6]].index_copy(0, torch.tensor([4, 6]), w[[6, 4]])}
    )
    t.numpy()[0] = 7
    assert fingerprint({"a": t}) != same
    large = {n: torch.arange(float(n), 9e6, dtype=torch.float64)[::2] for n in "12"}  # by threads
    assert fingerprint(large) == {n: fingerprint({n: t.contiguous()})[n] for n, t in large.items()}
    assert len(same["a"]) == 64


# ---- interop ----


@pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the files that composable-sft and PEFT wrote are not at ../shared/fixtures"
)
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
    torch.save(
        {"diffs": {"c": encoded, "e": empty}, "abs": {"h": nn.Parameter(torch.ones(2))}}, tmp_path / "pytorch_diff.bin"
    )
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
        (
            {"diffs": {"w": {"size": torch.Size((2, 2)), "index_steps": [0, 9], "values": torch.ones(2)}}},
            "indices of tensor 'w'",
        ),
        (
            {"diffs": {"w": {"size": torch.Size((2, 2)), "index_steps": [0], "values": torch.ones(2)}}},
            "indices of tensor 'w'",
        ),
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
    with pytest.raises(ValueError, match="pytorch_diff.bin is no readable composable-sft file"):
        interop.from_composable_sft(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("encoded", "message"),
    [
        ({"size": torch.Size((2, 2)), "index_steps": [0]}, "lacks size, index_steps or values"),
        ({"size": (2, 2), "index_steps": 0, "values": torch.ones(1)}, "index_steps of tensor 'w' are no list"),
        ({"size": (2, -2), "index_steps": [0], "values": torch.ones(1)}, "negative size"),
        (
            {"size": (1 << 40, 1), "index_steps": [0], "values": torch.ones(1)},
            "does not hold 1 entries of tensors with 1099511627776 rows",
        ),
        ({"size": (2, 2), "index_steps": [True], "values": torch.ones(1)}, "index_steps ints"),
        ({"size": (2, 2), "index_steps": [0.0], "values": torch.ones(1)}, "index_steps ints"),
        ({"size": (2, 2), "index_steps": [1 << 70], "values": torch.ones(1)}, "OverflowError"),
        (
            {"size": (2, 2), "index_steps": [1, (1 << 63) - 1, (1 << 63) - 1, 3], "values": torch.ones(4)},
            "do not fit its size",
        ),
        ({"size": (2, 2), "index_steps": [0], "values": torch.ones(1, dtype=torch.int64)}, "must be floating point"),
        (
            {"size": (2, 2), "index_steps": [0], "values": torch.ones(1, device="meta")},
            "values of tensor 'w' is on meta",
        ),
        ({"size": (2, 2), "index_steps": [0], "values": 1.0}, "must be a torch.Tensor"),
        ({"size": (2, 2), "index_steps": [np.int64(1)] * 3, "values": torch.ones(1).expand(3)}, "the file holds fewer"),
        (
            {"size": (2, 2), "index_steps": [np.float64(1)], "values": torch.ones(1)},
            "dtype 'f8', where int64 is expected",
        ),
    ],
)
def test_composable_sft_files_that_claim_what_they_do_not_hold(tmp_path, encoded, message):
    torch.save({"diffs": {"w": encoded}}, tmp_path / "pytorch_diff.bin")
    with pytest.raises(ValueError, match=f"pytorch_diff.bin is no readable composable-sft file: (?s:.*){message}"):
        interop.from_composable_sft(tmp_path)


def test_composable_sft_parts_are_checked_before_they_are_read(tmp_path):
    path = tmp_path / "pytorch_diff.bin"
    torch.save({"diffs": {"w": {"size": torch.Size((2,)), "index_steps": [0], "values": torch.ones(1)}}}, path)
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


def test_shira_shapes_need_the_base_where_they_are_not_square(tmp_path):
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
    with pytest.raises(ValueError, match="for matrices"):
        interop.from_peft_shira(tmp_path, base={"fc.weight": torch.zeros(4, 6, 1)})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    with pytest.raises(ValueError, match="type 'LORA', not SHIRA"):
        interop.from_peft_shira(tmp_path)
    for r in ("1", 0, True, None, 1.5):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "SHIRA", "r": r}))
        with pytest.raises(ValueError, match="adapter_config.json: r must be an int from 1"):
            interop.from_peft_shira(tmp_path)
    for text, message in (("[" * 100_000, "not readable JSON"), ("[]", r"type \[\], not"), ("{", "not readable JSON")):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"adapter_config.json.*{message}"):
            interop.from_peft_shira(tmp_path)
