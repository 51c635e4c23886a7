"""truncated_svd and svd_denoise against float64 numpy.linalg.svd."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deftx_kernels import svd_denoise, truncated_svd

SHAPES = [(1, 1), (1, 9), (9, 1), (12, 12), (30, 8), (8, 30), (64, 48)]


def matrix(shape, spectrum, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    short = min(m, n)
    left = torch.linalg.qr(torch.randn(m, short, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, short, generator=generator, dtype=torch.float64)).Q
    i = torch.arange(short, dtype=torch.float64)
    singular = {
        "flat": torch.ones(short, dtype=torch.float64),
        "decaying": 0.7**i,
        "clustered": torch.where(i < short // 2, 1.0, 0.1).to(torch.float64) + 1e-6 * i,
        "low rank": torch.where(i < max(1, short // 4), 1.0 / (1 + i), 0.0).to(torch.float64),
        "low rank and noise": torch.where(i < max(1, short // 4), 1.0 / (1 + i), 0.01).to(torch.float64),
        "zero": torch.zeros(short, dtype=torch.float64),
    }[spectrum]
    return ((left * singular) @ right.mT).to(dtype)


SPECTRA = ["flat", "decaying", "clustered", "low rank", "low rank and noise", "zero"]


def numpy_svd(a):
    return np.linalg.svd(a.double().numpy(), full_matrices=False)


def relative(got, want, scale=None):
    scale = np.linalg.norm(want if scale is None else scale)
    return np.linalg.norm(got.double().numpy() - want) / scale if scale else np.linalg.norm(got.double().numpy())


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(SPECTRA),
    st.integers(1, 12),
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_fixed_rank_is_near_the_optimal_one(shape, spectrum, rank, seed, dtype):
    a = matrix(shape, spectrum, seed, dtype)
    U, S, Vh = truncated_svd(a, rank)
    r = min(rank, *shape)
    assert U.shape == (shape[0], r)
    assert S.shape == (r,)
    assert Vh.shape == (r, shape[1])
    assert bool((S.diff() <= 1e-6).all())
    _, singular, _ = numpy_svd(a)
    eps = 1e-5 if dtype == torch.float32 else 1e-11
    best = math.sqrt((singular[r:] ** 2).sum())
    residual = np.linalg.norm(a.double().numpy() - ((U.double() * S.double()) @ Vh.double()).numpy())
    assert residual <= 1.02 * best + eps * max(singular[0], 1e-30)
    identity = torch.eye(r, dtype=torch.float64)
    filled = int((singular[:r] > 1e-6 * max(singular[0], 1e-30)).sum())
    torch.testing.assert_close(
        (U.double().mT @ U.double())[:filled, :filled], identity[:filled, :filled], atol=1e-4, rtol=0
    )


def test_randomised_path_on_large_batches():
    a = torch.stack([matrix((200, 150), "low rank and noise", s) for s in range(3)])
    U, S, Vh = truncated_svd(a, 8)
    for i in range(3):
        _, s, _ = numpy_svd(a[i])
        best = math.sqrt((s[8:] ** 2).sum())
        residual = np.linalg.norm(a[i].double().numpy() - ((U[i] * S[i]) @ Vh[i]).double().numpy())
        assert best <= residual * (1 + 1e-6)
        assert residual <= 1.02 * best
    again = truncated_svd(a, 8)
    assert all(torch.equal(x, y) for x, y in zip((U, S, Vh), again)), "equal calls give equal results"
    state = torch.get_rng_state()
    truncated_svd(a, 8)
    assert torch.equal(state, torch.get_rng_state()), "the user's random state is left alone"
    other = truncated_svd(a, 8, generator=torch.Generator().manual_seed(7))
    assert not torch.equal(other[0], U)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES), st.sampled_from(SPECTRA), st.floats(0.05, 0.999), st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_energy_rank_and_truncation(shape, spectrum, energy, seed, dtype):
    a = matrix(shape, spectrum, seed, dtype)
    result, info = svd_denoise(a, energy=energy, return_info=True)
    u, s, vh = numpy_svd(a)
    total = (s**2).sum()
    shares = np.cumsum(s**2) / total if total else np.ones(0)
    want = int(np.searchsorted(shares, energy) + 1) if total else 0
    got = int(info["rank"])
    # A share that meets the energy to rounding may fall on either side.
    near = total > 0 and np.abs(shares[max(want - 2, 0) : want + 1] - energy).min() < 1e-6
    assert got == want or (near and abs(got - want) == 1)
    assert result.dtype == dtype
    if spectrum != "flat":  # of equal singular values any subspace is right
        assert relative(result, (u[:, :got] * s[:got]) @ vh[:got], a.double().numpy()) <= 5e-5
    assert float(info["energy"]) == pytest.approx(float(shares[got - 1]) if got else 1.0, abs=1e-6)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_gavish_donoho_rank(shape):
    """The threshold is known in closed form for square matrices: 2.858 times the median singular value."""
    generator = torch.Generator().manual_seed(0)
    signal = 8 * matrix(shape, "low rank", 1, torch.float64) * math.sqrt(shape[0])
    noisy = signal + 0.05 * torch.randn(shape, generator=generator, dtype=torch.float64)
    _, info = svd_denoise(noisy, rank="gavish-donoho", return_info=True)
    _, s, _ = numpy_svd(noisy)
    if shape[0] == shape[1]:
        assert int(info["rank"]) == int((s > 2.858 * np.median(s)).sum())
    assert int(info["rank"]) == min(shape) // 4
    _, info = svd_denoise(torch.randn(shape, generator=generator), rank="gavish-donoho", return_info=True)
    assert int(info["rank"]) == 0


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.6}])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
def test_residual_keeps_the_largest_entries_of_h(rule, density):
    a = matrix((20, 16), "decaying", 2, torch.float64)
    low = svd_denoise(a, **rule)
    result = svd_denoise(a, residual_density=density, **rule)
    h = (a - low).view(-1)
    kept = (result - low).view(-1) != 0
    assert int(kept.sum()) == round(density * a.numel())
    torch.testing.assert_close(result.view(-1)[kept], a.view(-1)[kept], rtol=0, atol=0)
    if 0 < density < 1:
        assert float(h[kept].abs().min()) >= float(h[~kept].abs().max())


def test_residual_density_one_is_the_difference_itself():
    a = torch.randn(3, 20, 16)
    for arguments in ({"rank": 2}, {"energy": 0.5}, {"energy": 0.5, "return_info": True}):
        result = svd_denoise(a, residual_density=1, **arguments)
        result, info = result if "return_info" in arguments else (result, None)
        assert torch.equal(result, a)
        if info:
            assert info["rank"].shape == (3,)


def test_structures_dtypes_and_vectors():
    a, v = torch.randn(6, 5, dtype=torch.bfloat16), torch.randn(4)
    result, info = svd_denoise({"a": a, "v": v}, rank=2, return_info=True)
    assert list(result) == ["a", "v"]
    assert result["a"].dtype == torch.bfloat16
    assert torch.equal(result["v"], v)
    assert result["v"] is not v
    assert info["v"] is None
    assert int(info["a"]["rank"]) == 2
    exact = numpy_svd(a)
    assert relative(result["a"], (exact[0][:, :2] * exact[1][:2]) @ exact[2][:2]) < 2**-8
    assert isinstance(svd_denoise([a, v], rank=2), list)
    assert isinstance(svd_denoise((a, v), rank=2), tuple)
    assert svd_denoise(torch.randn(2, 3, 6, 5), rank=99).shape == (2, 3, 6, 5)
    batch = torch.randn(2, 30, 20)
    for i in range(2):
        torch.testing.assert_close(svd_denoise(batch, energy=0.7)[i], svd_denoise(batch[i], energy=0.7))


def test_empty_matrices():
    for shape in ((0, 5), (5, 0), (2, 0, 3), (0, 3, 4)):
        result, info = svd_denoise(torch.empty(shape), energy=0.9, return_info=True)
        assert result.shape == shape
        assert info["rank"].shape == shape[:-2]
        assert truncated_svd(torch.empty(shape), 2)[1].shape == (*shape[:-2], min(2, *shape[-2:]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(), ValueError, "exactly one of rank and energy"),
        (dict(rank=1, energy=0.5), ValueError, "exactly one of rank and energy"),
        (dict(rank=0), ValueError, "rank must be at least 1"),
        (dict(rank="best"), ValueError, "gavish-donoho"),
        (dict(rank=1.5), TypeError, "rank must be an int"),
        (dict(energy=0.0), ValueError, r"energy must be in \(0, 1\]"),
        (dict(energy=1.1), ValueError, r"energy must be in \(0, 1\]"),
        (dict(rank=1, residual_density=-0.1), ValueError, r"residual_density must be in \[0, 1\]"),
        (dict(rank=1, oversample=-1), ValueError, "oversample"),
        (dict(rank=1, n_iter=-1), ValueError, "n_iter"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        svd_denoise(torch.ones(9, 9), **arguments)


def test_bad_tensors_are_named():
    bad = torch.ones(3, 4)
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"delta\['w'\] holds nan at flat index 6"):
        svd_denoise({"w": bad}, rank=1)
    with pytest.raises(ValueError, match=r"delta\[1\] holds inf"):
        svd_denoise([torch.ones(2, 2), torch.full((2, 2), float("inf"))], energy=0.5)
    with pytest.raises(TypeError, match="must be float32"):
        svd_denoise(torch.ones(3, 3, dtype=torch.int64), rank=1)
    with pytest.raises(TypeError, match="tensor, a mapping or a sequence"):
        svd_denoise("delta", rank=1)
    with pytest.raises(ValueError, match="a must have at least 2 dimensions"):
        truncated_svd(torch.ones(3), 1)
