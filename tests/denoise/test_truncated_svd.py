"""truncated_svd against float64 numpy.linalg.svd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deftx_kernels import truncated_svd
from tests.denoise.oracle import SHAPES, SMALL_SPECTRA, SPECTRA, assert_near_optimal, distance, matrix, svd

SMALL_SHAPES = [(1, 1), (1, 9), (9, 1), (12, 12), (30, 8), (8, 30), (64, 48)]


def product(U, S, Vh):
    return (U.double() * S.double()[..., None, :]) @ Vh.double()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SMALL_SHAPES),
    st.sampled_from(list(SMALL_SPECTRA)),
    st.integers(1, 12),
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_fixed_rank_is_near_the_optimal_one(shape, spectrum, rank, seed, dtype):
    a = matrix(shape, spectrum, seed, dtype)
    U, S, Vh = truncated_svd(a, rank)
    r = min(rank, *shape)
    assert (U.shape, S.shape, Vh.shape) == ((shape[0], r), (r,), (r, shape[1]))
    assert U.dtype == S.dtype == Vh.dtype == dtype
    assert bool((S.diff() <= 1e-6).all())
    assert_near_optimal(a, product(U, S, Vh), r, 1.4e-6 if dtype == torch.float32 else 1.4e-12)
    _, singular, _ = svd(a)
    filled = int((singular[:r] > 1e-6 * max(float(singular[0]), 1e-30)).sum())
    identity = torch.eye(filled, dtype=torch.float64)
    torch.testing.assert_close((U.double().mT @ U.double())[:filled, :filled], identity, atol=1e-4, rtol=0)


def test_randomised_path_on_large_batches():
    a = torch.stack([matrix((200, 150), "low rank and noise, small", s) for s in range(3)])
    U, S, Vh = truncated_svd(a, 8)
    for i in range(3):
        best = math.sqrt(float(svd(a[i])[1][8:].square().sum()))
        assert best * (1 - 1e-6) <= distance(a[i], product(U[i], S[i], Vh[i])) <= 1.02 * best
    again = truncated_svd(a, 8)
    assert all(torch.equal(x, y) for x, y in zip((U, S, Vh), again)), "equal calls give equal results"
    state = torch.get_rng_state()
    truncated_svd(a, 8)
    assert torch.equal(state, torch.get_rng_state()), "the user's random state is left alone"
    other = truncated_svd(a, 8, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(other[0], U)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_singular_vectors_are_orthonormal_whatever_the_rank_of_the_matrix(shape, spectrum):
    a = torch.stack([matrix(shape, spectrum, 2), torch.zeros(shape), torch.ones(shape)])
    U, S, Vh = truncated_svd(a, 40)
    identity = torch.eye(40, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(U.double().mT @ U.double(), identity, atol=1e-4, rtol=0)
    torch.testing.assert_close(Vh.double() @ Vh.double().mT, identity, atol=1e-4, rtol=0)
    assert bool((S.diff(dim=-1) <= 0).all())
    for i in range(3):
        assert_near_optimal(a[i], product(U[i], S[i], Vh[i]), 40)
    if spectrum in ("exponential", "power", "deficient"):
        torch.testing.assert_close(S[0].double(), svd(a[0])[1][:40], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 2.0**-80), (torch.float32, 2.0**80), (torch.float64, 2.0**-110), (torch.float64, 2.0**600)],
)
@pytest.mark.parametrize("rank", [8, 60])
def test_entries_whose_squares_leave_the_range_of_the_dtype(dtype, scale, rank):
    a = torch.stack([matrix((130, 90), "low rank and noise", s, dtype) for s in range(2)])
    scales = torch.tensor([1.0, scale], dtype=dtype)
    U, S, Vh = truncated_svd(a * scales[:, None, None], rank)
    torch.testing.assert_close(
        product(U, S / scales[:, None], Vh), product(*truncated_svd(a, rank)), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3), (0, 3, 4)])
def test_empty_matrices(shape):
    U, S, Vh = truncated_svd(torch.empty(shape), 2)
    r = min(2, *shape[-2:])
    assert (U.shape, S.shape, Vh.shape) == ((*shape[:-1], r), (*shape[:-2], r), (*shape[:-2], r, shape[-1]))


def test_bad_arguments():
    a = torch.ones(9, 9)
    for arguments, error in (
        ({"rank": 0}, ValueError),
        ({"rank": "gavish-donoho"}, TypeError),
        ({"rank": 1, "oversample": -1}, ValueError),
        ({"rank": 1, "n_iter": -1}, ValueError),
    ):
        with pytest.raises(error, match=list(arguments)[-1]):
            truncated_svd(a, **arguments)
    with pytest.raises(ValueError, match="a must have at least 2 dimensions"):
        truncated_svd(torch.ones(3), 1)
    a[1, 2] = math.nan
    with pytest.raises(ValueError, match="a holds nan at flat index 11"):
        truncated_svd(a, 1)
