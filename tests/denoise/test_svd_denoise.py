"""The kernels behind svd_denoise: their accuracy promises on larger matrices, their ways out of float32, and whole
models.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import deftx_kernels as dk
from deftx_kernels import select_mask, svd_denoise, topk_mask, truncated_svd
from deftx_kernels.denoise import batches, gram, products, projector, subspace

SPECTRA = {
    "noise": None,
    "low rank and noise": lambda i, n: torch.where(i < 12, 3.0 / (1 + 0.2 * i), 1 - 0.9 * i / n),
    "slow power": lambda i, n: (1.0 + i) ** -0.25,
    "power": lambda i, n: 1 / (1.0 + i),
    "exponential": lambda i, n: 0.95**i,
    "steep": lambda i, n: 0.6**i,
    "step at the rank": lambda i, n: torch.where(i < 24, 1.3, 1.0),
    "steps": lambda i, n: torch.where(i < 20, 1.5, torch.where(i < 60, 1.2, 1.0)),
    "linear": lambda i, n: 1 - 0.99 * i / n,
    "clusters": lambda i, n: torch.where(i < n // 2, 1.0, 0.5),
    "flat": lambda i, n: torch.ones_like(i),
    "deficient": lambda i, n: torch.where(i < 30, 1.0 / (1 + i), 0.0),
}
SHAPES = [(160, 160), (400, 150), (130, 390), (300, 300)]


def matrix(shape, spectrum, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    if SPECTRA[spectrum] is None:
        return torch.randn(m, n, generator=generator, dtype=torch.float64).to(dtype)
    short = min(m, n)
    left = torch.linalg.qr(torch.randn(m, short, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, short, generator=generator, dtype=torch.float64)).Q
    i = torch.arange(short, dtype=torch.float64)
    singular = SPECTRA[spectrum](i, short) * (1 if spectrum == "flat" else 1 - 1e-4 * i / short)  # no two are equal
    return ((left * singular) @ right.mT).to(dtype)


def numpy_svd(a):
    return np.linalg.svd(a.double().numpy(), full_matrices=False)


@pytest.fixture
def on_split_products(monkeypatch):
    """The way of CUDA tensors, on CPU tensors: products of bfloat16 parts, projectors in place of eigenvectors."""
    monkeypatch.setattr(products, "splits", lambda x: x.dtype == torch.float32)


# ---- a fixed rank ----
def assert_near_optimal(a, result, rank, rounding=3e-6):
    _, singular, _ = numpy_svd(a)
    best = math.sqrt((singular[rank:] ** 2).sum())
    residual = np.linalg.norm(a.double().numpy() - result.double().numpy())
    assert residual <= 1.02 * best + rounding * np.linalg.norm(singular)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES), st.sampled_from(list(SPECTRA)), st.integers(1, 48), st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64]), st.integers(0, 3), st.sampled_from([0, 4, 16]),
)  # fmt: skip
@example((160, 160), "step at the rank", 23, 0, torch.float32, 0, 4)
@example((400, 150), "step at the rank", 24, 3, torch.float32, 0, 8)
@example((300, 300), "steps", 59, 3, torch.float32, 0, 12)
@example((300, 300), "steps", 59, 2, torch.float32, 0, 15)
@example((160, 160), "steep", 36, 0, torch.float64, 0, 4)
@example((130, 390), "steep", 16, 0, torch.float64, 0, 0)
@example((130, 390), "steep", 48, 0, torch.float64, 0, 4)
def test_residual_of_a_fixed_rank_is_within_two_percent_of_the_best(
    shape, spectrum, rank, seed, dtype, n_iter, oversample
):
    a = matrix(shape, spectrum, seed, dtype)
    result, info = svd_denoise(a, rank=rank, n_iter=n_iter, oversample=oversample, return_info=True)
    assert_near_optimal(a, result, rank, 3e-6 if dtype == torch.float32 else 1e-9)
    assert int(info["rank"]) == rank
    lost = np.linalg.norm(a.double().numpy() - result.double().numpy()) / np.linalg.norm(a.double().numpy())
    assert float(info["residual"]) == pytest.approx(lost, abs=1e-3 if spectrum in ("steep", "deficient") else 1e-5)
    assert float(info["energy"]) == pytest.approx(1 - lost**2, abs=1e-6)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_fixed_rank_on_split_products(on_split_products, shape, spectrum):
    a = matrix(shape, spectrum, 1)
    assert_near_optimal(a, svd_denoise(a, rank=20), 20, 3e-5)


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_matrices_are_split_once_for_all_products(on_split_products, monkeypatch, shape):
    sizes = []
    split = products.split
    monkeypatch.setattr(products, "split", lambda x, *rest, **out: (sizes.append(x.numel()), split(x, *rest, **out))[1])
    a = torch.stack([matrix(shape, "noise", s) for s in range(3)])
    svd_denoise(a, rank=20, batch_bytes=1 << 30)
    assert sizes.count(a[0].numel()) == 3
    assert max(sizes) == a[0].numel()


@pytest.mark.parametrize("rule", [{"rank": 20}, {"energy": 0.9}, {"energy": 0.999}])
@pytest.mark.parametrize("shape", [(400, 150), (130, 390), (300, 300)])
def test_cublas_takes_operands_and_results_as_they_are(on_split_products, monkeypatch, shape, rule):
    """Rows or columns one after the other, no overlap: torch copies others before, and a result after, a product on
    CUDA.
    """
    product, seen = products.product_, []

    def watched(out, a, b, *rest, **options):
        for x in (out, a, b):
            (i, j), (m, n) = x.stride()[1:], x.shape[1:]
            seen.append((j == 1 and i >= max(n, 1)) or (i == 1 and j >= max(m, 1)))
        assert a.dtype == b.dtype == torch.bfloat16
        return product(out, a, b, *rest, **options)

    monkeypatch.setattr(products, "product_", watched)
    monkeypatch.setattr(projector, "product_", watched)
    svd_denoise(torch.stack([matrix(shape, "exponential", s) for s in range(2)]), **rule)
    assert seen
    assert all(seen)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_residual_on_split_products_is_pruned_from_factors(on_split_products, monkeypatch, shape):
    a = matrix(shape, "noise", 1)
    used = []
    prune = subspace.prune_from_factors
    monkeypatch.setattr(subspace, "prune_from_factors", lambda *x: (used.append(1), prune(*x))[1])
    low = svd_denoise(a, rank=20)
    result, info = svd_denoise(a, rank=20, residual_density=0.1, return_info=True)
    assert used
    kept = result == a
    assert int(kept.sum()) == round(0.1 * a.numel())
    torch.testing.assert_close(result[~kept], low[~kept], atol=1e-4, rtol=0)
    assert float((a - low)[kept].abs().min()) >= float((a - low)[~kept].abs().max()) - 1e-3
    assert float(info["residual"]) == pytest.approx(float((a - result).norm() / a.norm()), rel=1e-4)


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
        assert_near_optimal(a[i], (U[i] * S[i]) @ Vh[i], 40)
    _, singular, _ = numpy_svd(a[0])
    if spectrum in ("exponential", "power", "deficient"):
        torch.testing.assert_close(S[0].double(), torch.from_numpy(singular[:40].copy()), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("step", [1.15, 1.2, 1.25])
def test_a_step_of_the_spectrum_at_a_rank_that_is_not_small(step):
    """The second iteration gains little there, and its residual is still 1.02 to 1.024 of the best."""
    n, rank = 384, 64
    i = torch.arange(n, dtype=torch.float64)
    left, right = (torch.linalg.qr(matrix((n, n), "noise", s, torch.float64)).Q for s in (0, 1))
    singular = torch.where(i < rank, step, 1.0) * (1 - 1e-4 * i / n)
    a = ((left * singular) @ right.mT).float()
    assert_near_optimal(a, svd_denoise(a, rank=rank), rank)


def test_more_iterations_where_the_residual_is_not_yet_near(monkeypatch):
    """A step just above the noise hides from the first iterations; with no oversampling two of them do not do."""
    a = torch.stack([matrix((300, 300), "noise", 3), matrix((300, 300), "steep", 3)])
    calls = []
    orthonormal = subspace.orthonormal_rows
    monkeypatch.setattr(subspace, "orthonormal_rows", lambda z: (calls.append(len(z)), orthonormal(z))[1])
    result = svd_denoise(a, rank=45, oversample=0, n_iter=0)
    assert calls[:2] == [2, 2]
    assert len(calls) > 3
    assert calls[-1] == 1, "the steep one is finished before the noise"
    for i in range(2):
        assert_near_optimal(a[i], result[i], 45)


# ---- an energy ----
def assert_exact_truncation(a, result, info, energy, tolerance=5e-5):
    u, s, vh = numpy_svd(a)
    share = np.cumsum(s**2) / (s**2).sum()
    rank = int(np.searchsorted(share, energy) + 1)
    assert int(info["rank"]) == rank
    exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert np.linalg.norm(result.double().numpy() - exact) <= tolerance * np.linalg.norm(exact)
    assert float(info["energy"]) == pytest.approx(share[rank - 1], abs=2e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*SHAPES, (40, 40), (90, 30)]),
    st.sampled_from([s for s in SPECTRA if s not in ("flat", "deficient")]),
    st.floats(0.02, 0.9999), st.integers(0, 99), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_energy_gives_the_rank_and_the_truncation_of_exact_arithmetic(shape, spectrum, energy, seed, dtype):
    a = matrix(shape, spectrum, seed, dtype)
    assert_exact_truncation(a, *svd_denoise(a, energy=energy, return_info=True), energy)


@pytest.mark.parametrize("strength", [1, 30, 1000])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.9999, 0.9999999])
def test_directions_far_above_the_noise(strength, energy):
    """The Gram matrix has their squares: float32 cannot tell the directions of the noise apart, and float64 must help."""
    noise = matrix((320, 260), "noise", 4)
    a = noise + strength * noise[:, :6] @ noise[:6] / 16
    result, info = svd_denoise(a, energy=energy, return_info=True)
    u, s, vh = numpy_svd(a)
    rank = int(np.searchsorted(np.cumsum(s**2) / (s**2).sum(), energy) + 1)
    assert int(info["rank"]) == rank
    exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
    assert np.linalg.norm(result.double().numpy() - exact) <= 5e-5 * np.linalg.norm(exact)


def test_all_energy_is_all_of_the_matrix():
    for spectrum in ("noise", "deficient", "steep"):
        a = matrix((160, 160), spectrum, 5)
        result, info = svd_denoise(a, energy=1.0, return_info=True)
        torch.testing.assert_close(result, a, atol=1e-6, rtol=1e-5)
        assert float(info["residual"]) < 1e-6
    low = matrix((160, 160), "deficient", 5, torch.float64)
    assert int(svd_denoise(low, energy=1.0, return_info=True)[1]["rank"]) == 30


def of_values(n, singular, seed=0):
    """A float64 matrix [n, n] with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q for _ in "uv")
    return (u * singular) @ v.mT


@pytest.mark.parametrize("energy", [1.0, 1 - 1e-15, 1 - 2e-14])
@pytest.mark.parametrize("n", [64, 256])
def test_float64_directions_that_a_gram_matrix_does_not_know(n, energy):
    singular = torch.full((n,), 1e-7, dtype=torch.float64)
    singular[:5] = 1
    w = of_values(n, singular)
    result, info = svd_denoise(w, energy=energy, return_info=True)
    left = float((w - result).norm() / w.norm())
    assert left <= 1.2 * (1 - energy) ** 0.5 + 1e-14
    assert float(info["residual"]) == pytest.approx(left, rel=1e-2, abs=1e-14)
    base = torch.randn(n, n, generator=torch.Generator().manual_seed(1)) * 0.05
    update = (
        0.005
        * torch.randn(n, 8, generator=torch.Generator().manual_seed(2))
        @ torch.randn(8, n, generator=torch.Generator().manual_seed(3))
    )
    delta = (base + update).double() - base.double()  # rounded to float32 as a tuned model is
    assert float((svd_denoise(delta, energy=energy) - delta).norm() / delta.norm()) < 1e-6


@pytest.mark.parametrize(
    ("n", "rank", "second", "rest"),
    [
        (64, 20, 1e-3, 1e-6), (256, 100, 1e-2, 1e-6), (128, 25, 1e-2, 1e-6), (256, 50, 1e-2, 2e-7), (256, 100, 1e-2, 1e-5),
        (64, 20, 1e-2, 1e-5), (256, 100, 1e-2, 1e-4), (256, 100, 1e-3, 1e-4), (256, 100, 1e-2, 1e-3),
    ],
)  # fmt: skip
def test_a_given_rank_of_a_matrix_that_is_almost_of_that_rank(n, rank, second, rest):
    """Errors of float32 eigenvectors, small beside the matrix, are as large as what is left of it."""
    singular = torch.full((n,), rest, dtype=torch.float64)
    singular[:rank], singular[0] = second, 1
    w = of_values(n, singular).float()
    best = float(torch.linalg.svdvals(w.double())[rank:].norm())
    result, info = svd_denoise(w, rank=rank, return_info=True)
    left = float((w.double() - result.double()).norm())
    assert left <= 1.02 * best
    assert float(info["residual"]) == pytest.approx(left / float(w.double().norm()), rel=2e-3)


@pytest.mark.parametrize("rule", [{"rank": 8}, {"rank": 100}, {"energy": 0.99}, {"energy": 1.0}, {"rank": 12}], ids=str)
@pytest.mark.parametrize("noise", [0.0, 1e-4, 1e-2])
def test_the_reported_residual_is_that_of_the_result(rule, noise):
    generator = torch.Generator().manual_seed(4)
    w = torch.randn(300, 8, generator=generator) @ torch.randn(8, 200, generator=generator)
    w += noise * torch.randn(300, 200, generator=generator)
    kept = w.clone()
    result, info = svd_denoise(w, return_info=True, **rule)
    assert torch.equal(w, kept)
    left = float((w.double() - result.double()).norm() / w.double().norm())
    assert float(info["residual"]) == pytest.approx(left, rel=5e-3, abs=1e-9)


@pytest.mark.parametrize("n", [256, 700, 1600])
def test_rounding_of_sums_of_float32_eigenvalues_is_within_what_settles_a_rank(n):
    """Two directions and nothing else: the rest is rounding, of which negative values count as zero."""
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(n + n // 4, 2, generator=generator), torch.randn(n, 2, generator=generator)
    w, second = u[:, :1] @ v[:, :1].mT, u[:, 1:] @ v[:, 1:].mT
    w += second * (w.norm() / second.norm() * 2e-5**0.5)
    shares = []
    for x in (w, w.double()):
        found = torch.empty(n, n, dtype=x.dtype)
        gram._gram_(found, x)
        shares.append(torch.ops.deftx.eigvalsh(found[None])[0].double().flip(-1).clamp(min=0).cumsum(0))
    error = float((shares[0] / shares[0][-1] - shares[1] / shares[1][-1]).abs().max())
    assert error < gram._SUM_ROUNDING * max(1.0, (n / 256) ** 0.5) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
def test_a_default_batch_is_within_its_memory_limit(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for n in (64, 768, 1024, 1536, 2300, 4096):
        for test_matrix, most in ((None, threads << 24), (torch.empty(n, 24), threads << 23)):
            each = 4 * (6 * n * n if test_matrix is None else 8 * n * 24)
            count = batches._batch(torch.Size((n, n)), torch.float32, torch.device("cpu"), test_matrix, None)
            assert count == 1 or count * each <= most
            assert count % threads == 0 or count < threads


def with_gap(relative, rank, seed):
    """Noise [260, 260] whose singular value after the first `rank` ones is smaller than the one before by this share of
    it.
    """
    u, s, vh = numpy_svd(matrix((260, 260), "noise", seed))
    s[rank] = s[rank - 1] * (1 - relative)
    share = np.cumsum(s**2) / (s**2).sum()
    return torch.from_numpy((u * s) @ vh).float(), float(share[rank - 2] + share[rank - 1]) / 2


def test_a_small_gap_at_the_cut_is_settled_in_a_window(monkeypatch):
    errors, settled = [], gram._settled_basis
    monkeypatch.setattr(gram, "_spectrum_float64", lambda w: pytest.fail("float64 is not needed here"))

    def watched(w, squares, vectors, rank, given):
        u, s, vh = numpy_svd(w)
        exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
        errors.append(
            np.linalg.norm((w @ vectors[:, :rank] @ vectors[:, :rank].mT).numpy() - exact) / np.linalg.norm(exact)
        )
        return settled(w, squares, vectors, rank, given)

    monkeypatch.setattr(gram, "_settled_basis", watched)
    for seed in range(4):
        a, energy = with_gap(3e-6, 120, seed)
        assert_exact_truncation(a, *svd_denoise(a, energy=energy, return_info=True), energy)
    assert max(errors) > 1e-4, "plain float32 eigenvectors would not have done"


@pytest.mark.parametrize("case", ["rank", "truncation"])
def test_float64_where_float32_cannot_settle(monkeypatch, case):
    calls, precise = [], gram._spectrum_float64
    monkeypatch.setattr(gram, "_spectrum_float64", lambda w: (calls.append(1), precise(w))[1])
    if case == "rank":  # an energy next to what 120 directions hold
        a, _ = with_gap(1e-2, 120, 0)
        _, s, _ = numpy_svd(a)
        energy = float((s[:120] ** 2).sum() / (s**2).sum()) * (1 + 2e-9)
    else:
        noise = matrix((260, 260), "noise", 0)
        a, energy = noise + 100 * noise[:, :8] @ noise[:8], 0.99999
    assert_exact_truncation(a, *svd_denoise(a, energy=energy, return_info=True), energy)
    assert calls


@pytest.mark.parametrize("spectrum", [s for s in SPECTRA if s not in ("flat", "deficient")])
@pytest.mark.parametrize("shape", [(300, 300), (600, 270), (90, 200)])
def test_energy_by_projectors(on_split_products, monkeypatch, shape, spectrum):
    made = []
    projector = gram.spectral_projector
    monkeypatch.setattr(gram, "spectral_projector", lambda *a: (made.append(len(a[0])), projector(*a))[1])
    a = torch.stack([matrix(shape, spectrum, s) for s in range(2)])
    result, info = svd_denoise(a, energy=0.9, return_info=True)
    for i in range(2):
        assert_exact_truncation(a[i], result[i], {k: v[i] for k, v in info.items()}, 0.9)
    if spectrum in ("noise", "exponential", "linear") and min(shape) > 256:
        assert made, "a gap like this is wide enough for products"


@pytest.mark.parametrize("residual_density", [0.0, 0.05])
@pytest.mark.parametrize("batch_bytes", [None, 1, 3 << 20])
def test_matrices_of_one_short_side_by_projectors(on_split_products, monkeypatch, batch_bytes, residual_density):
    """Tall, wide and square ones, several of some shapes, one of them on its own way: as each alone, in float64."""
    shapes = [(300, 130), (130, 300), (130, 130), (300, 130), (700, 130), (130, 300), (2, 130, 130)]
    delta = {f"{i}": torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)}
    delta["3"] = matrix((300, 130), "steps", 1)  # no gap at the cut: eigenvectors
    taken = []
    project = gram._project_all
    monkeypatch.setattr(gram, "_project_all", lambda *a: (taken.append(len(a[0])), project(*a))[1])
    monkeypatch.setattr(gram, "ROWS", 256)
    result, info = svd_denoise(
        delta, energy=0.8, residual_density=residual_density, batch_bytes=batch_bytes, return_info=True
    )
    for name, a in delta.items():
        want, its = svd_denoise(a.double(), energy=0.8, residual_density=residual_density, return_info=True)
        assert torch.equal(info[name]["rank"], its["rank"])
        error = result[name] - want
        if residual_density:  # the last entry that is kept of two that are nearly equal
            assert int((error.abs() > 1e-2).sum()) <= 2
            error[error.abs() > 1e-2] = 0
        assert float(error.norm() / want.norm()) < 5e-5, name
        torch.testing.assert_close(info[name]["residual"], its["residual"], atol=1e-4, rtol=0)
    assert (max(taken) > 1) == (batch_bytes != 1)
    assert sum(taken) >= 6


def test_a_projector_that_failed_is_replaced(on_split_products, monkeypatch):
    monkeypatch.setattr(gram, "spectral_projector", lambda grams, values, rank: torch.full_like(grams, 0.3))
    a = matrix((300, 300), "exponential", 0)
    assert_exact_truncation(a, *svd_denoise(a, energy=0.9, return_info=True), 0.9)


# ---- whole models ----
def model(dtype=torch.float32):
    generator = torch.Generator().manual_seed(6)
    shapes = {
        "a": (90, 60),
        "b": (60, 90),
        "c": (90, 60),
        "bias": (60,),
        "conv": (4, 3, 40, 50),
        "d": (90, 60),
        "row": (1, 70),
    }
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("rule", [{"rank": 5}, {"energy": 0.8}, {"rank": "gavish-donoho"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_matrix_as_if_it_were_alone(rule, dtype):
    delta = model(dtype)
    kept = {n: t.clone() for n, t in delta.items()}
    calls = []
    result, info = svd_denoise(
        delta, residual_density=0.1, return_info=True, batch_bytes=1 << 20, progress=lambda *a: calls.append(a), **rule
    )
    assert all(torch.equal(delta[n], kept[n]) for n in delta), "the argument is left as it was"
    assert calls[0] == (0, 17)
    assert calls[-1] == (17, 17)
    assert sorted(calls) == calls
    for name, tensor in delta.items():
        if tensor.dim() < 2:
            continue
        alone, its_info = svd_denoise(tensor, residual_density=0.1, return_info=True, batch_bytes=1, **rule)
        torch.testing.assert_close(result[name], alone)
        for key in ("rank", "energy", "residual"):
            assert info[name][key].shape == tensor.shape[:-2]
            torch.testing.assert_close(info[name][key], its_info[key])
        lost = torch.linalg.matrix_norm(tensor.double() - result[name].double()) / torch.linalg.matrix_norm(
            tensor.double()
        )
        torch.testing.assert_close(info[name]["residual"], lost, atol=5e-3 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_views_and_transposed_tensors():
    a = torch.randn(2, 64, 130, generator=torch.Generator().manual_seed(7))
    for view in (a.mT, a[:, ::2, 1:100], a.expand(2, 64, 130)):
        for rule in ({"rank": 4}, {"energy": 0.7}):
            torch.testing.assert_close(
                svd_denoise(view, **rule), svd_denoise(view.contiguous(), **rule), atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("rule", [{"rank": 5}, {"energy": 0.8}])
def test_precision_flags_do_not_matter_and_are_left_as_found(rule):
    a = matrix((300, 300), "noise", 8)
    expected = svd_denoise(a, **rule)
    vectors = truncated_svd(a, 5)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("medium", "high"):
            torch.set_float32_matmul_precision(precision)
            flag = torch.backends.mkldnn.matmul.fp32_precision
            assert torch.equal(svd_denoise(a, **rule), expected)
            assert all(torch.equal(x, y) for x, y in zip(truncated_svd(a, 5), vectors))
            total, test_matrix, nowhere = (
                a.double().square().sum()[None],
                torch.randn(300, 21),
                torch.zeros(1, 1).expand_as(a),
            )
            with pytest.raises(RuntimeError, match="single memory location"):  # found when the products are made
                torch.ops.deftx.svd_denoise_([a], [nowhere], total, 5, 0.0, 0.0, 0.0, 2, test_matrix, 1)
            assert torch.get_float32_matmul_precision() == precision
            assert torch.backends.mkldnn.matmul.fp32_precision == flag
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 2.0**e) for e in (-80, -30, 20, 30, 33, 80)]
    + [(torch.float64, 2.0**-110), (torch.float64, 2.0**600)],
)
def test_entries_whose_squares_leave_the_range_of_the_dtype(dtype, scale):
    a = torch.stack([matrix((130, 90), "low rank and noise", s, dtype) for s in range(2)])
    b = a.clone()
    b[1] *= scale
    for rule in (
        {"rank": 8}, {"rank": 40}, {"rank": 90}, {"energy": 0.8}, {"energy": 1.0}, {"rank": 8, "residual_density": 0.1},
        {"rank": "gavish-donoho"},
    ):  # fmt: skip
        expected, info = svd_denoise(a, return_info=True, **rule)
        result, its_info = svd_denoise(b, return_info=True, **rule)
        torch.testing.assert_close(result[0], expected[0])
        torch.testing.assert_close(result[1] / scale, expected[1], atol=1e-6, rtol=1e-5)
        for key in info:
            torch.testing.assert_close(its_info[key], info[key], atol=1e-6, rtol=1e-5)
    U, S, Vh = truncated_svd(b, 8)
    expected = svd_denoise(a, rank=8)
    torch.testing.assert_close(
        (U * (S / torch.tensor([1.0, scale], dtype=dtype)[:, None])[:, None]) @ Vh, expected, atol=1e-5, rtol=1e-4
    )


def test_nothing_is_written_where_an_entry_is_not_finite():
    delta = model()
    delta["d"][3, 4] = math.nan
    before = {n: t.clone() for n, t in delta.items()}
    calls = []
    with pytest.raises(ValueError, match=r"delta\['d'\] holds nan at flat index 184"):
        svd_denoise(delta, rank=2, progress=lambda *a: calls.append(a))
    assert not calls, "found before any work is done"
    assert all(torch.equal(delta[n], before[n]) or n == "d" for n in delta)


def test_equal_calls_give_equal_results():
    delta = model()
    for rule in ({"rank": 5}, {"energy": 0.8}):
        first, second = (svd_denoise(delta, residual_density=0.05, **rule) for _ in range(2))
        assert all(torch.equal(first[n], second[n]) for n in delta)
    a = matrix((300, 300), "noise", 9)
    drawn = [svd_denoise(a, rank=5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_selection_of_some_denoised_tensors_with_information():
    base = model()
    tuned = {n: t + 0.1 * model()[n].flip(0) for n, t in base.items()}
    delta = {n: tuned[n] - base[n] for n in base}
    rule = {"energy": 0.7, "residual_density": 0.02}
    mask, info = select_mask(tuned, base, density=0.1, denoise_names=["a", "conv", "bias"], return_info=True, **rule)
    expected, wanted = svd_denoise({n: delta[n] for n in ("a", "conv")}, return_info=True, **rule)
    assert mask == topk_mask(delta | expected, density=0.1)
    assert {n for n, i in info.items() if i is not None} == {"a", "conv"}
    for name in ("a", "conv"):
        assert all(torch.equal(info[name][k], wanted[name][k]) for k in wanted[name])
    with pytest.raises(ValueError, match="denoise_names holds 'z'"):
        select_mask(tuned, base, k=3, rank=2, denoise_names=["z"])
    with pytest.raises(TypeError, match="denoise_names must be an iterable"):
        select_mask(tuned, base, k=3, rank=2, denoise_names="a")
    with pytest.raises(ValueError, match="denoise_names needs a rank or an energy"):
        select_mask(tuned, base, k=3, denoise_names=["a"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("residual_density", [0.0, 0.1, 1.0])
def test_selection_from_factors_writes_no_denoised_difference(monkeypatch, residual_density, dtype):
    base = model(dtype)
    tuned = {n: t + 0.1 * model(dtype)[n].flip(0) for n, t in base.items()}
    rule = {"rank": 5, "residual_density": residual_density}
    expected = select_mask(tuned, base, density=0.2, **rule)
    calls = []
    mask = select_mask(tuned, base, density=0.2, keep_factors=True, progress=lambda *a: calls.append(a), **rule)
    assert mask.nnz == expected.nnz
    assert (mask - expected).nnz <= 2, "the two ways round differently"
    assert calls[-1] == (7, 7)
    assert sorted(calls) == calls
    if residual_density == 0.1:
        monkeypatch.setattr(torch.ops.deftx, "low_rank_mask", lambda *_: pytest.fail("used"))
        with pytest.raises(pytest.fail.Exception, match="used"):
            select_mask(tuned, base, density=0.2, keep_factors=True, **rule)
    for bad in ({"energy": 0.5}, {"rank": 5, "scope": "row"}, {"rank": 5, "return_info": True}, {}):
        with pytest.raises(ValueError, match="keep_factors needs an int rank"):
            select_mask(tuned, base, density=0.2, keep_factors=True, **bad)


@pytest.mark.parametrize("residual_density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("more", [{}, {"keep_factors": True}, {"return_info": True}, {"denoise_names": ["a"]}])
def test_selection_refuses_entries_that_are_not_finite(residual_density, more):
    base = model()
    tuned = {n: t + 0.1 for n, t in base.items()}
    tuned["b"][2, 3] = math.inf
    with pytest.raises(ValueError, match=r"tuned\['b'\] - base\['b'\] holds inf at flat index 183"):
        select_mask(tuned, base, density=0.2, rank=5, residual_density=residual_density, **more)


def test_backends_name_the_library():
    served = dk.backends()["svd_denoise_"]["cpu"]
    assert served.name == "blas"
    assert served.others["reference"] == "blas comes first"


# ---- many small matrices, and ranks that are a large share of the short side ----
def small_tensors():
    """Filters of convolutions, experts of a few rows, and matrices whose squares leave the range of float64."""
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "conv": (40, 30, 3, 3),
        "other conv": (7, 3, 3),
        "wide": (20, 10, 5, 7),
        "expert": (32, 50),
        "column": (70, 1),
        "one": (1, 1),
    }
    tensors = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    tensors["wide"] = tensors["wide"].to(torch.bfloat16)
    tensors["zero"] = torch.zeros(4, 3, 3)
    tensors["huge"] = torch.randn(5, 6, generator=generator, dtype=torch.float64) * 1e200
    tensors["tiny"] = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64) * 1e-200
    return tensors


@pytest.mark.parametrize(
    ("batch_bytes", "residual_density"), [(None, 0.0), (None, 0.3), (1, 0.3), (20_000, 0.0), (20_000, 1.0)]
)
@pytest.mark.parametrize(
    "rule", [{"energy": 0.9}, {"energy": 1.0}, {"rank": 1}, {"rank": 100}, {"rank": "gavish-donoho"}], ids=str
)
def test_small_matrices(rule, batch_bytes, residual_density):
    delta, calls = small_tensors(), []
    result, info = svd_denoise(
        delta, **rule, residual_density=residual_density, return_info=True, batch_bytes=batch_bytes,
        progress=lambda *done: calls.append(done),
    )  # fmt: skip
    assert calls[-1] == (sum(t[..., 0, 0].numel() for t in delta.values()),) * 2
    for name, tensor in delta.items():
        scale = {"huge": 1e200, "tiny": 1e-200}.get(name, 1.0)
        exact = (tensor.double() / scale).reshape(-1, *tensor.shape[-2:])
        found = (result[name].double() / scale).reshape(exact.shape)
        ranks, energies, residuals = (info[name][key].view(-1) for key in ("rank", "energy", "residual"))
        U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
        sums = S.square().cumsum(1)
        for i, (w, got, r) in enumerate(zip(exact, found, ranks.tolist())):
            if sums[i, -1] == 0:
                assert (r, float(energies[i]), float(residuals[i])) == (
                    0 if isinstance(rule.get("rank"), str) or "energy" in rule else r,
                    1,
                    0,
                )
                continue
            if "energy" in rule:
                assert r == int((sums[i] < rule["energy"] * sums[i, -1] * (1 - 1e-12)).sum()) + 1
            elif rule["rank"] != "gavish-donoho":
                assert r == min(rule["rank"], *w.shape)
            assert float(energies[i]) == pytest.approx(float(sums[i, r - 1] / sums[i, -1]) if r else 0.0, abs=1e-9)
            low = (U[i, :, :r] * S[i, :r]) @ Vh[i, :r]
            keep = round(residual_density * w.numel())
            index = (w - low).abs().reshape(-1).topk(keep).indices
            low.view(-1)[index] = w.reshape(-1)[index]
            rounding = 2**-8 if tensor.dtype == torch.bfloat16 else 1e-6
            assert float((got - low).norm()) <= rounding * float(w.norm())
            if residual_density < 1:
                assert float(residuals[i]) == pytest.approx(float((w - low).norm() / w.norm()), abs=1e-6)


def test_many_small_matrices_take_few_calls(monkeypatch):
    calls, right = [], torch.ops.deftx.svd_denoise_
    monkeypatch.setattr(torch.ops.deftx, "svd_denoise_", lambda *a: calls.append(len(a[0])) or right(*a))
    svd_denoise(
        {"conv": torch.randn(128, 128, 3, 3)} | {f"expert {i}": torch.randn(4, 4) for i in range(2000)}, energy=0.9
    )
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("shape", "rank", "spikes"),
    [
        ((384, 384), 64, 0),
        ((384, 384), 64, 20),
        ((384, 384), 128, 3),
        ((768, 768), 256, 0),
        ((768, 768), 256, 20),
        ((1024, 256), 80, 0),
    ],
)
def test_a_rank_that_is_a_large_share_is_exact(shape, rank, spikes):
    """Noise is the hard case: subspace iteration found 70 to 86 % of the largest 5 % of the entries there."""
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(shape, generator=generator)
    a += spikes * torch.randn(shape[0], 20, generator=generator) @ torch.randn(20, shape[1], generator=generator)
    result = svd_denoise(a, rank=rank)
    U, S, Vh = torch.linalg.svd(a.double(), full_matrices=False)
    exact = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert float((result - exact).norm() / exact.norm()) < 1e-3
    k = round(0.05 * a.numel())
    same = torch.zeros(a.numel(), dtype=torch.int64)
    for scores in (result, exact):
        same[scores.abs().view(-1).topk(k).indices] += 1
    assert int((same == 2).sum()) >= 0.999 * k
