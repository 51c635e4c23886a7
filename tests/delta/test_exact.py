"""Differences and sums: base + delta is the tuned tensor bit for bit, and `compose` is the sum of deltas."""

import pytest
import torch
from delta_examples import BITS, clones, exact_pair, same, tensors, tune

from deftx_kernels import CSRMask, SparseDelta, compose

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, *FLOAT8])
@pytest.mark.parametrize("seed", range(3))
def test_every_finite_number_comes_back(dtype, seed):
    """Random bits (every exponent, subnormals, both zeros), a tenth of them within a few bits of the base; and normal
    numbers with differences of three sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    integer = BITS[dtype.itemsize]
    least, most = torch.iinfo(integer).min, torch.iinfo(integer).max
    base, tuned = (
        torch.randint(least, most, (20_000,), generator=generator, dtype=torch.int64).to(integer) for _ in range(2)
    )
    tuned = torch.where(torch.rand(len(base), generator=generator) < 0.1, base ^ (tuned & 3), tuned)
    base[:4], tuned[:4] = torch.tensor([0, least, 0, 1]), torch.tensor([least, 0, 1, least])
    normal, change = torch.randn(2, 3, 10_000, generator=generator)
    change = torch.tensor([[1e-4], [0.1], [30.0]]) * change
    base = torch.cat([base.view(dtype), normal.view(-1).to(dtype)])
    tuned = torch.cat([tuned.view(dtype), (normal + change).view(-1).to(dtype)])
    finite = base.float().isfinite() & tuned.float().isfinite()
    model = {"first": torch.zeros(4), "w": base[finite]}
    tuned = {"first": torch.ones(4), "w": tuned[finite]}
    delta, before = SparseDelta.from_models(tuned, model), clones(model)
    assert delta.metadata["inexact_entries"] == 0
    with delta.applied(model):
        assert same(model, tuned)
    assert same(model, before)
    delta.apply_(model)
    assert same(model, tuned)


def test_entries_that_no_sum_gives_back_are_counted():
    nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32).item()
    base, tuned = torch.tensor([1.0, torch.inf, torch.nan, torch.inf]), torch.tensor([nan, 1.0, 1.0, -torch.inf])
    assert SparseDelta.from_models({"w": tuned}, {"w": base}).metadata["inexact_entries"] >= 3
    for value in (torch.inf, -torch.inf):
        base = {f"{value}": torch.ones(1)}
        delta = SparseDelta.from_models({f"{value}": torch.full((1,), value)}, base)
        delta.apply_(base)
        assert base[f"{value}"].item() == value
        assert delta.metadata["inexact_entries"] == 0
    wide = {"w": torch.randn(1000, dtype=torch.float64)}
    tuned = {"w": wide["w"] * 1.37}
    delta = SparseDelta.from_models(tuned, wide)
    delta.apply_(wide)
    assert int((wide["w"] != tuned["w"]).sum()) == delta.metadata["inexact_entries"] <= 10
    zero = {"w": torch.zeros(1, dtype=torch.float64)}
    # nothing added to 0.0 gives -0.0
    assert SparseDelta.from_models({"w": -zero["w"]}, zero).metadata["inexact_entries"] == 1


def test_low_terms_are_saved_composed_and_dropped_by_the_lossy_form(tmp_path):
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
            assert same(model, tuned)
        assert same(model, base)
        mixed = clones(base) | {"a": base["a"].bfloat16()}  # two dtypes: applied by tensor
        one.apply_(mixed, strict=False)
        assert same({"b": mixed["b"]}, {"b": tuned["b"]})
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
def test_low_terms_are_validated(low, message):
    mask = CSRMask.from_dense({"a": torch.ones(3, dtype=torch.bool)})
    with pytest.raises((ValueError, TypeError), match=message):
        SparseDelta(mask, torch.zeros(3), low=(torch.tensor(low[0]), torch.tensor(low[1], dtype=torch.float64)))


def test_compose_is_the_sum():
    base = tensors()
    deltas = [
        SparseDelta.from_models(tune(base, seed)[0], base, metadata={"base_model": "m", "seed": seed})
        for seed in (1, 2, 3)
    ]
    total = compose(*deltas)
    expected = {n: torch.zeros(t.shape, dtype=torch.float64) for n, t in base.items()}
    for delta in deltas:
        delta.mask.add_(expected, delta.values.double())
    got = total.mask.scatter_({n: torch.zeros(t.shape) for n, t in base.items()}, total.values)
    assert all(torch.equal(got[n], expected[n].float()) for n in base)
    assert total.mask == deltas[0].mask | deltas[1].mask | deltas[2].mask
    assert total.metadata["base_model"] == "m"
    assert [d["seed"] for d in total.metadata["composed_of"]] == [1, 2, 3]
    assert deltas[0].compose(deltas[1]).mask == SparseDelta.compose(deltas[0], deltas[1]).mask
    total.apply_(clones(base))


def test_compose_refuses_conflicts():
    base = tensors()
    tuned, mask = tune(base)
    one, two = (SparseDelta.from_models(tuned | {"head": torch.full((2,), i)}, base, mask) for i in (0.0, 1.0))
    with pytest.raises(ValueError, match="'head' is in two deltas"):
        compose(one, two)
    other = tensors(9)
    with pytest.raises(ValueError, match="made for another base"):
        compose(one, SparseDelta.from_models(tune(other)[0], other))
    with pytest.raises(ValueError, match="at least one"):
        compose()
    with pytest.raises(TypeError, match=r"deltas\[1\]"):
        compose(one, {})
    bias = {"enc.bias": base["enc.bias"]}
    with pytest.raises(ValueError, match="'cube' is sparse in one delta and whole in another"):
        compose(one, SparseDelta.from_models(bias | {"cube": torch.zeros(2, 3, 2)}, bias))
