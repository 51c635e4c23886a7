"""The sum of several deltas."""

import pytest
import torch
from delta_examples import clones, tensors, tune

from deftx_kernels import SparseDelta, compose


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
    with pytest.raises(ValueError, match="'head' stands in two deltas"):
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
