"""SparseAdapters: any series of switches leaves the base bit for bit, and each active state is one rounded sum."""

import copy
import gc
import itertools
import pickle
import sys

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from deftx_kernels import CSRMask, SparseAdapters, SparseDelta
from deftx_kernels.kernels.tensors import INTEGERS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {"a": (9, 4), "b": (11,), "c": (2, 3, 4)}
NAMES = ["one", "two", "three"]


def random_model(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def random_delta(seed) -> SparseDelta:
    generator = torch.Generator().manual_seed(seed)
    mask = CSRMask.from_dense({n: torch.rand(s, generator=generator) < 0.5 for n, s in SHAPES.items()})
    return SparseDelta(mask, torch.randn(mask.nnz, generator=generator))


def expected(base, deltas, active):
    """base + the weighted sum, in float64 and rounded once."""
    out = {n: t.double() for n, t in base.items()}
    total = {n: torch.zeros_like(t) for n, t in out.items()}
    for name, weight in active.items():
        values = {n: torch.zeros_like(t) for n, t in out.items()}
        deltas[name].mask.scatter_(values, deltas[name].values.double())
        total = {n: t + weight * values[n] for n, t in total.items()}
    return {n: (t + total[n]).to(base[n].dtype) for n, t in out.items()}


def assert_same_bits(found, wanted):
    for name, tensor in wanted.items():
        assert tensor.dtype == found[name].dtype
        bits = INTEGERS[tensor.element_size()]
        assert torch.equal(found[name].detach().view(bits), tensor.detach().view(bits)), name


STEPS = st.one_of(
    st.tuples(st.just("set"), st.lists(st.sampled_from(NAMES), unique=True, max_size=3)),
    st.tuples(st.just("weights"), st.lists(st.sampled_from([-1.5, 0.0, 0.3, 1.0, 2.0]), min_size=3, max_size=3)),
    st.tuples(st.just("disable"), st.none()),
    st.tuples(st.just("delete"), st.sampled_from(NAMES)),
    st.tuples(st.just("add"), st.sampled_from(NAMES)),
)


@settings(max_examples=80, deadline=None)
@example(dtype=torch.float32, steps=[("set", ["one", "two"]), ("set", ["two", "one"])])
@given(dtype=st.sampled_from(DTYPES), steps=st.lists(STEPS, max_size=12))
def test_any_series_of_switches(dtype, steps):
    model = random_model(dtype)
    base = {n: t.clone() for n, t in model.items()}
    deltas = {name: random_delta(seed) for seed, name in enumerate(NAMES)}
    adapters = SparseAdapters(model, deltas)
    active: dict[str, float] = {}
    for step, argument in steps:
        there = adapters.adapters
        if step == "set":
            active = {name: 1.0 for name in argument if name in there}
            adapters.set_adapter(list(active))
        elif step == "weights":
            active = dict(zip(there, argument))
            adapters.set_adapter(there, argument[: len(there)])
        elif step == "disable":
            with adapters.disable_adapter() as disabled:
                assert_same_bits(disabled, base)
        elif step == "delete" and argument in there:
            adapters.delete_adapter(argument)
            active.pop(argument, None)
        elif step == "add" and argument not in there:
            adapters.add_adapter(argument, deltas[argument])
        assert adapters.active_adapters == list(active)
        assert_same_bits(model, expected(base, deltas, active))
    adapters.set_adapter([])
    assert_same_bits(model, base)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.body(x).relu())


def tuned_delta(base, seed):
    torch.manual_seed(seed)
    tuned = {n: t.clone() for n, t in base.state_dict().items()}
    tuned["body.weight"][seed % 8] += torch.randn(8)
    tuned["head.weight"] = torch.randn(3, 8)
    return tuned, SparseDelta.from_models(tuned, base, dense=["head.weight"])


def test_a_module_with_heads(tmp_path):
    torch.manual_seed(0)
    model = Encoder()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    (tuned_a, a), (tuned_b, b) = tuned_delta(model, 1), tuned_delta(model, 2)
    a.save_pretrained(tmp_path / "a")
    adapters = SparseAdapters(model, {"a": tmp_path / "a", "b": b})
    assert_same_bits(model.state_dict(), base)
    for name, wanted in (("a", tuned_a), ("b", tuned_b), ("a", tuned_a)):
        adapters.set_adapter(name)
        assert_same_bits(model.state_dict(), wanted)
    with pytest.raises(ValueError, match="'head.weight' is in two deltas"):
        adapters.set_adapter(["a", "b"])
    assert adapters.active_adapters == ["a"]
    assert_same_bits(model.state_dict(), tuned_a)
    adapters.add_adapter("later", 0.5 * b)  # while another one is active
    assert_same_bits(model.state_dict(), tuned_a)
    assert adapters.merge_and_unload() is model
    assert adapters.adapters == []
    assert_same_bits(model.state_dict(), tuned_a)


def test_add_weighted_adapter():
    model, deltas = random_model(torch.float32), {name: random_delta(i) for i, name in enumerate(NAMES)}
    base = {n: t.clone() for n, t in model.items()}
    adapters = SparseAdapters(model, deltas)
    adapters.add_weighted_adapter("two", [0.5], "half")
    assert torch.equal(adapters["half"].values, 0.5 * deltas["two"].values)
    adapters.delete_adapter("half")
    adapters.add_weighted_adapter(["one", "two"], [1.0, 0.5], "sum")
    adapters.add_weighted_adapter(NAMES, [1.0, 1.0, 1.0], "ties", combination_type="ties", density=0.3)
    assert adapters.adapters == [*NAMES, "sum", "ties"]
    adapters.set_adapter("ties")
    adapters.delete_adapter("ties")
    assert_same_bits(model, base)
    with pytest.raises(ValueError, match="new_name: there is an adapter 'sum'"):
        adapters.add_weighted_adapter(["one"], [1.0], "sum")


def test_without_the_adapters_the_model_keeps_what_is_active():
    model, delta = random_model(torch.float32), random_delta(0)
    adapters = SparseAdapters(model, {"one": delta})
    adapters.set_adapter("one")
    wanted = {n: t.clone() for n, t in model.items()}
    del adapters
    gc.collect()
    assert_same_bits(model, wanted)
    random_delta(1).apply_(model)  # no block is open


def test_entries_that_are_written_meanwhile():
    model, delta = random_model(torch.float32), random_delta(0)
    base = {n: t.clone() for n, t in model.items()}
    adapters = SparseAdapters(model, {"one": delta})
    adapters.set_adapter("one")
    model["a"].zero_()
    with pytest.warns(RuntimeWarning, match="'a'"):
        adapters.set_adapter([])
    covered = delta.mask.to_dense()["a"]
    assert torch.equal(model["a"][covered], base["a"][covered])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_a_model_of_its_own(clone):
    torch.manual_seed(0)
    model = Encoder()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    (tuned_a, a), (tuned_b, b) = tuned_delta(model, 1), tuned_delta(model, 2)
    adapters = SparseAdapters(model, {"a": a, "b": b})
    adapters.set_adapter("a")
    other = clone(adapters)
    assert_same_bits(other.model.state_dict(), tuned_a)
    other.set_adapter("b")
    assert_same_bits(other.model.state_dict(), tuned_b)
    assert_same_bits(model.state_dict(), tuned_a)
    other.set_adapter([])
    assert_same_bits(other.model.state_dict(), base)
    other.set_adapter("b")
    kept = other.model
    del other
    gc.collect()
    assert_same_bits(kept.state_dict(), tuned_b)
    (0.5 * a).apply_(kept, strict=False)  # no block is open
    with pytest.raises(TypeError, match=r"copy\.deepcopy"):
        copy.copy(adapters)


def interrupted_at(step, call):
    """Call, with a KeyboardInterrupt at this line, call or return of adapters.py or change.py. False: it has fewer."""
    steps = 0

    def trace(frame, event, argument):
        nonlocal steps
        if not frame.f_code.co_filename.endswith(("delta/adapters.py", "delta/change.py")):
            return None
        steps += 1
        if steps == step:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return steps >= step


@pytest.mark.filterwarnings("error")
def test_an_interrupt_at_any_line():
    """In a switch of one of two SparseAdapters of one model, of deltas with low terms, in tensors of two dtypes. Every
    thirteenth line, call and return; all 1,086 were run once.
    """
    low = torch.tensor([1, 5]), torch.tensor([1e-3, 0.5], dtype=torch.float64)
    x, y, z = (SparseDelta(d.mask, d.values, {"head": torch.ones(2)}, low=low) for d in map(random_delta, range(3)))
    for step in itertools.count(1, 13):
        model = random_model(torch.bfloat16) | {"head": torch.zeros(2)}
        model["c"] = model["c"].float()
        base = {n: t.clone() for n, t in model.items()}
        one, other = SparseAdapters(model, {"x": x, "y": y}), SparseAdapters(model, {"z": z})
        one.set_adapter("x")
        other.set_adapter("z")
        if not interrupted_at(step, lambda one=one: one.set_adapter("y")):
            break
        one.set_adapter([])
        with_z = {n: t.clone() for n, t in base.items()}
        z.apply_(with_z)
        assert_same_bits(model, with_z)
        one.set_adapter("y")
        other.set_adapter([])
        one.set_adapter([])
        assert_same_bits(model, base)
    assert step > 100


def test_a_base_in_another_dtype():
    torch.manual_seed(0)
    model = Encoder()
    _, delta = tuned_delta(model, 1)
    model.bfloat16()
    base = {n: t.clone() for n, t in model.state_dict().items()}
    expected = {n: t.clone() for n, t in base.items()}
    delta.apply_(expected, strict=False)
    adapters = SparseAdapters(model)
    with pytest.raises(ValueError, match="is bfloat16, the delta was made for a base in float32: strict=False adds it"):
        adapters.add_adapter("a", delta)
    adapters.add_adapter("a", delta, strict=False)
    adapters.set_adapter("a")
    assert_same_bits(model.state_dict(), expected)
    adapters.set_adapter([])
    assert_same_bits(model.state_dict(), base)


def test_safe_merge():
    model, delta = random_model(torch.float16), random_delta(0)
    base = {n: t.clone() for n, t in model.items()}
    adapters = SparseAdapters(model, {"one": delta, "huge": 1e6 * delta})
    adapters.set_adapter("huge")
    with pytest.raises(ValueError, match=r"'a' has NaN or infinities with \['huge'\] active"):
        adapters.merge_and_unload(safe_merge=True)
    adapters.set_adapter([])
    assert_same_bits(model, base)
    adapters.set_adapter("one")
    assert_same_bits(adapters.merge_and_unload(safe_merge=True), expected(base, {"one": delta}, {"one": 1.0}))


def test_errors_leave_the_model():
    model, delta = random_model(torch.float32), random_delta(0)
    adapters = SparseAdapters(model, {"one": delta})
    adapters.set_adapter("one")
    wanted = {n: t.clone() for n, t in model.items()}
    other = SparseDelta.from_models({"a": torch.ones(9, 4)}, {"a": torch.zeros(9, 4)})
    for call, error, message in (
        (lambda: adapters.add_adapter("one", delta), ValueError, "there is an adapter 'one'"),
        (lambda: adapters.add_adapter("", delta), TypeError, "name must be a string"),
        (lambda: adapters.add_adapter("x", {"w": 1}), TypeError, "delta must be a SparseDelta"),
        (lambda: adapters.add_adapter("x", other), ValueError, "not the base"),
        (lambda: adapters.set_adapter("two"), KeyError, "no adapter 'two'"),
        (lambda: adapters.set_adapter(["one", "one"]), ValueError, "must not repeat"),
        (lambda: adapters.set_adapter("one", float("inf")), ValueError, r"weights\[0\]"),
        (lambda: adapters.set_adapter([], [1.0]), ValueError, "at least one delta"),
        (lambda: adapters.delete_adapter("two"), KeyError, "no adapter 'two'"),
        (lambda: SparseAdapters(3), TypeError, "model must be a module"),
        (lambda: SparseAdapters(model, "path"), TypeError, "adapters must be a mapping of names to deltas or paths"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert_same_bits(model, wanted)
    eight_bits = {n: t.to(torch.float8_e4m3fn) for n, t in random_model(torch.float32).items()}
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        SparseAdapters(eight_bits, {"one": delta})
