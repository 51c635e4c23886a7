"""merge, weights in compose, and products: against NumPy in float64, PEFT's functions, and dense arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deftx_kernels import CSRMask, SparseDelta, compose, merge

SHAPES = {"a.weight": (6, 5), "b.bias": (7,), "c.weight": (3, 2, 4)}
NUMEL = sum(int(np.prod(shape)) for shape in SHAPES.values())


def random_delta(rng, density=0.6, dense=None) -> SparseDelta:
    flags = {n: torch.from_numpy(rng.random(s) < density) for n, s in SHAPES.items()}
    mask = CSRMask.from_dense(flags)
    values = torch.from_numpy(np.round(rng.standard_normal(mask.nnz), 1).astype(np.float32))  # with ties
    return SparseDelta(mask, values, dense or {})


def to_dense(delta: SparseDelta) -> dict[str, np.ndarray]:
    tensors = {n: torch.zeros(s, dtype=torch.float64) for n, s in zip(delta.mask.names, delta.mask.shapes)}
    delta.mask.scatter_(tensors, delta.values.double())
    return {n: tensors[n].numpy() if n in tensors else np.zeros(s) for n, s in SHAPES.items()}


def flat(delta: SparseDelta) -> np.ndarray:
    return np.concatenate([x.reshape(-1) for x in to_dense(delta).values()])


def pruned(x: np.ndarray, density: float) -> np.ndarray:
    k = int(density * x.size)
    kept = np.zeros(x.shape)
    kept[np.lexsort((np.arange(x.size), -np.abs(x)))[:k]] = 1
    return x * kept


def merged(xs: list[np.ndarray], weights: list[float], election: str | None) -> np.ndarray:
    if election is None:
        return sum(w * x for w, x in zip(weights, xs))
    votes = sum(xs) if election == "total" else sum(np.sign(x) for x in xs)
    elected = np.where(votes >= 0, 1.0, -1.0)
    agree = [np.sign(x) == elected for x in xs]
    return sum(w * x * a for w, x, a in zip(weights, xs, agree)) / np.maximum(sum(agree), 1)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    count=st.integers(1, 4),
    method=st.sampled_from(["linear", "ties", "magnitude_prune"]),
    density=st.sampled_from([0.1, 0.4, 1.0]),
    election=st.sampled_from(["total", "frequency"]),
    scope=st.sampled_from(["global", "tensor"]),
)
def test_against_numpy(seed, count, method, density, election, scope):
    rng = np.random.default_rng(seed)
    deltas, weights = [random_delta(rng) for _ in range(count)], rng.uniform(-2, 2, count).tolist()
    xs = [flat(delta) for delta in deltas]
    ends = np.cumsum([int(np.prod(s)) for s in SHAPES.values()])[:-1]
    if method != "linear":
        xs = [
            pruned(x, density)
            if scope == "global"
            else np.concatenate([pruned(part, density) for part in np.split(x, ends)])
            for x in xs
        ]
    expected = merged(xs, weights, election if method == "ties" else None)
    options = {} if method == "linear" else {"density": density, "scope": scope}
    result = merge(*deltas, weights=weights, method=method, majority_sign_method=election, **options)
    np.testing.assert_array_equal(flat(result), expected.astype(np.float32).astype(np.float64))
    if method == "linear":
        np.testing.assert_array_equal(flat(compose(*deltas, weights=weights)), flat(result))


@pytest.mark.parametrize("election", ["total", "frequency"])
@pytest.mark.parametrize("method", ["ties", "magnitude_prune"])
def test_against_peft(method, election):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    rng = np.random.default_rng(3)
    deltas, weights, density = [random_delta(rng) for _ in range(3)], [0.5, 1.0, -2.0], 0.3
    for delta in deltas:  # PEFT's topk chooses among equal values at random
        delta.values = torch.from_numpy(rng.permutation(delta.mask.nnz).astype(np.float32) + 1) / 8
        delta.values *= torch.from_numpy(rng.choice([-1, 1], delta.mask.nnz))
    options = {"majority_sign_method": election} if method == "ties" else {}
    dense = [torch.from_numpy(flat(delta)) for delta in deltas]
    expected = getattr(merge_utils, method)(dense, torch.tensor(weights, dtype=torch.float64), density, **options)
    result = merge(*deltas, weights=weights, method=method, density=density, **options)
    np.testing.assert_array_equal(flat(result), expected.float().double().numpy())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_against_mergekit(method):
    """mergekit trims by tensor, to one entry at least, elects the signs of weighted values, and divides by the sum of
    the agreeing weights: with weights of 1 it is our TIES with scope="tensor". Its task arithmetic is "linear".
    """
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    base = pytest.importorskip("mergekit.merge_methods.base")
    rng = np.random.default_rng(4)
    deltas, density = [random_delta(rng) for _ in range(3)], 0.4
    for delta in deltas:  # distinct magnitudes, whose sums are exact in float32
        delta.values = torch.from_numpy(rng.permutation(delta.mask.nnz).astype(np.float32) + 1) / 8
        delta.values *= torch.from_numpy(rng.choice([-1, 1], delta.mask.nnz))
    weights = [1.0] * 3 if method == "ties" else [0.5, 1.0, -2.0]
    options = {"method": "ties", "density": density, "scope": "tensor"} if method == "ties" else {}
    result = to_dense(merge(*deltas, weights=weights, **options))
    parameters = {"weight": base.PerInputValues(list(enumerate(weights)))}
    parameters |= {"density": base.PerInputValues([(i, density) for i in range(3)])}
    parameters |= {"int8_mask": False, "normalize": method == "ties", "rescale": False, "lambda": 1.0}
    for name, shape in SHAPES.items():
        entries = [base.TensorEntry("base", torch.zeros(shape, dtype=torch.float64), is_base=True)]
        entries += [base.TensorEntry(i, torch.from_numpy(to_dense(delta)[name])) for i, delta in enumerate(deltas)]
        expected = registry.get(method).merge_group(base.TensorGroup(entries), **parameters)
        np.testing.assert_array_equal(result[name], expected.float().double().numpy())


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare(method):
    rng = np.random.default_rng(0)
    mask = CSRMask.from_dense({"w": torch.ones(300, 200, dtype=torch.bool)})
    deltas = [SparseDelta(mask, torch.from_numpy(rng.standard_normal(mask.nnz).astype(np.float32))) for _ in range(2)]
    kept = [merge(delta, method="dare_linear", density=0.3, seed=7) for delta in deltas]
    for delta, one in zip(deltas, kept):
        assert abs(one.mask.density - 0.3) < 0.01
        expected = (delta.mask.project(delta.values, one.mask).double() / 0.3).float()
        assert torch.equal(one.values, expected)
    result = merge(*deltas, method=method, density=0.3, seed=7)
    again = merge(*(delta.to("cpu") for delta in deltas), method=method, density=0.3, seed=7)
    other = merge(*deltas, method=method, density=0.3, seed=8)
    assert result.mask == again.mask
    assert torch.equal(result.values, again.values)
    assert result.mask != other.mask
    # the second delta's entries are drawn independently of the first's
    both = (kept[0].mask & merge(deltas[0], deltas[1] * 0.0, method="dare_linear", density=0.3, seed=7).mask).nnz
    assert both == kept[0].mask.nnz
    assert abs(result.mask.density - (1 - 0.7**2)) < 0.02


def test_products_and_weights():
    rng = np.random.default_rng(1)
    delta = random_delta(rng)
    assert torch.equal((0.5 * delta).values, delta.values * 0.5)
    assert torch.equal((-delta).values, -delta.values)
    assert (delta * 2).mask == delta.mask
    zero = compose(delta, delta, weights=[1, -1])
    assert not bool(zero.values.any())
    with pytest.raises(TypeError):
        delta * "2"


def test_low_terms_are_scaled():
    tuned, base = {"w": torch.tensor([1e-9, 1.0])}, {"w": torch.tensor([0.1, 0.3])}
    delta = SparseDelta.from_models(tuned, base)
    assert delta.low is not None
    back = compose(compose(delta, weights=[0.5]), compose(delta, weights=[0.5]))
    back.apply_(base, strict=False)
    assert torch.equal(base["w"], tuned["w"])


def test_infinities_beside_low_terms():
    base, infinite = {"w": torch.tensor([0.1, 0.3])}, float("inf")
    small = SparseDelta.from_models({"w": torch.tensor([1e-9, 1.0])}, base)
    assert small.low is not None
    compose(small, SparseDelta(small.mask, torch.tensor([infinite, 0.0]))).apply_(base)
    assert base["w"].tolist() == [infinite, 1.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "slerp"}, "method must be one of"),
        ({"method": "ties"}, "density must be above 0"),
        ({"method": "ties", "density": 0}, "density must be above 0"),
        ({"method": "linear", "density": 0.5}, "density: method 'linear'"),
        ({"weights": [1.0]}, "weights must be one number for each of the 2"),
        ({"weights": [1.0, float("nan")]}, r"weights\[1\] must be a finite number"),
        ({"majority_sign_method": "median"}, "majority_sign_method must be"),
        ({"scope": "row"}, "scope must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_wrong_options(options, message):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=message):
        merge(random_delta(rng), random_delta(rng), **options)


def test_many_deltas_and_values_without_rank():
    rng = np.random.default_rng(0)
    deltas = [random_delta(rng, 0.1) for _ in range(70)]
    weights = rng.uniform(-1, 1, 70).tolist()
    expected = sum(w * flat(delta) for w, delta in zip(weights, deltas))
    np.testing.assert_allclose(flat(compose(*deltas, weights=weights)), expected, rtol=1e-6, atol=1e-12)
    with pytest.raises(ValueError, match="at most 64 deltas, got 70"):
        merge(*deltas, method="ties", density=0.1)
    deltas[1].values[0] = float("nan")
    with pytest.raises(ValueError, match=r"deltas\[1\] has NaN or infinite values in tensor"):
        merge(*deltas[:3], method="magnitude_prune", density=0.1)


def test_heads_are_united():
    rng = np.random.default_rng(0)
    head = torch.ones(2)
    one, two = random_delta(rng, dense={"head": head}), random_delta(rng)
    assert torch.equal(merge(one, two, weights=[0.1, 2.0]).dense["head"], head)
    with pytest.raises(ValueError, match="'head' is in two deltas"):
        merge(one, random_delta(rng, dense={"head": head + 1}))
    with pytest.raises(ValueError, match="at least one delta"):
        merge()
    with pytest.raises(TypeError, match=r"deltas\[1\] must be a SparseDelta"):
        merge(one, {"w": head})
