"""Truncation by Gram matrices, and what CUDA tensors use: products of bfloat16 parts, projectors for eigenvectors."""

import pytest
import torch

from deftx_kernels import svd_denoise
from deftx_kernels.denoise import gram, products, projector, subspace
from tests.denoise import oracle
from tests.denoise.oracle import SHAPES, SPECTRA, assert_exact_truncation, assert_near_optimal, distance, matrix, noise


@pytest.fixture
def on_split_products(monkeypatch):
    """The implementation for CUDA tensors, on CPU tensors."""
    monkeypatch.setattr(products, "uses_split_products", lambda x: x.dtype == torch.float32)


def watch(monkeypatch, module, name, note):
    """Appends note(*arguments) of each call of module.name to a list, which is returned."""
    found, function = [], getattr(module, name)

    def watched(*arguments, **options):
        found.append(note(*arguments))
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, watched)
    return found


# ---- eigenvectors ----
@pytest.mark.parametrize("n", [256, 700, 1600])
def test_rounding_of_sums_of_float32_eigenvalues_is_within_the_bound(n):
    """Two directions and nothing else: the rest is rounding, of which negative values count as zero."""
    u, v = noise(n + n // 4, 2), noise(n, 2, seed=1)
    w, second = u[:, :1] @ v[:, :1].mT, u[:, 1:] @ v[:, 1:].mT
    w += second * (w.norm() / second.norm() * 2e-5**0.5)
    shares = []
    for x in (w, w.double()):
        found = torch.empty(n, n, dtype=x.dtype)
        gram._gram_matrix_(found, x)
        shares.append(torch.ops.deftx.eigvalsh(found[None])[0].double().flip(-1).clamp(min=0).cumsum(0))
    error = float((shares[0] / shares[0][-1] - shares[1] / shares[1][-1]).abs().max())
    assert error < gram._SUM_ROUNDING * max(1.0, (n / 256) ** 0.5) * torch.finfo(torch.float32).eps


def with_gap(relative, rank, seed):
    """Noise [260, 260] whose singular value after the first `rank` ones is smaller than the one before by this share of
    it, and an energy between those of the two ranks.
    """
    u, s, vh = oracle.svd(matrix((260, 260), "noise", seed))
    s[rank] = s[rank - 1] * (1 - relative)
    share = s.square().cumsum(0) / s.square().sum()
    return ((u * s) @ vh).float(), float(share[rank - 2] + share[rank - 1]) / 2


def test_a_small_gap_at_the_cut_is_resolved_in_a_window(monkeypatch):
    monkeypatch.setattr(gram, "_spectrum_float64", lambda w: pytest.fail("float64 is not needed here"))

    def error(w, squares, vectors, rank, given):
        exact = oracle.svd_denoise(w, rank=rank).result
        return distance(w @ vectors[:, :rank] @ vectors[:, :rank].mT, exact) / float(exact.norm())

    errors = watch(monkeypatch, gram, "_accurate_basis", error)
    for seed in range(4):
        a, energy = with_gap(3e-6, 120, seed)
        assert_exact_truncation(a, *svd_denoise(a, energy=energy, return_info=True), energy)
    assert max(errors) > 1e-4, "plain float32 eigenvectors would not have been accurate"


@pytest.mark.parametrize("case", ["rank", "truncation"])
def test_float64_where_float32_is_not_accurate(monkeypatch, case):
    calls = watch(monkeypatch, gram, "_spectrum_float64", len)
    if case == "rank":  # an energy next to what 120 directions hold
        a, _ = with_gap(1e-2, 120, 0)
        energy = oracle.svd_denoise(a, rank=120).energy * (1 + 2e-9)
    else:
        w = matrix((260, 260), "noise", 0)
        a, energy = w + 100 * w[:, :8] @ w[:8], 0.99999
    assert_exact_truncation(a, *svd_denoise(a, energy=energy, return_info=True), energy)
    assert calls


# ---- projectors ----
@pytest.mark.parametrize("spectrum", [s for s in SPECTRA if s not in ("flat", "deficient")])
@pytest.mark.parametrize("shape", [(300, 300), (600, 270), (90, 200)])
def test_energy_by_projectors(on_split_products, monkeypatch, shape, spectrum):
    made = watch(monkeypatch, gram, "spectral_projector", lambda *_: 1)
    a = torch.stack([matrix(shape, spectrum, s) for s in range(2)])
    result, info = svd_denoise(a, energy=0.9, return_info=True)
    for i in range(2):
        assert_exact_truncation(a[i], result[i], {k: v[i] for k, v in info.items()}, 0.9)
    if spectrum in ("noise", "exponential", "linear") and min(shape) > 256:
        assert made, "a gap like this is wide enough for products"


@pytest.mark.parametrize("residual_density", [0.0, 0.05])
@pytest.mark.parametrize("batch_bytes", [None, 1, 3 << 20])
def test_matrices_of_one_short_side_by_projectors(on_split_products, monkeypatch, batch_bytes, residual_density):
    """Tall, wide and square ones, several of some shapes, one of them by eigenvectors: as each alone, in float64."""
    shapes = [(300, 130), (130, 300), (130, 130), (300, 130), (700, 130), (130, 300), (2, 130, 130)]
    delta = {f"{i}": noise(*s, seed=i) for i, s in enumerate(shapes)}
    delta["3"] = matrix((300, 130), "steps", 1)  # no gap at the cut: eigenvectors
    taken = watch(monkeypatch, gram, "_project_all", lambda matrices, *_: len(matrices))
    monkeypatch.setattr(gram, "ROWS", 256)
    rule = {"energy": 0.8, "residual_density": residual_density, "return_info": True}
    result, info = svd_denoise(delta, batch_bytes=batch_bytes, **rule)
    for name, a in delta.items():
        want, its = svd_denoise(a.double(), **rule)
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


# ---- products of bfloat16 parts ----
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_fixed_rank_on_split_products(on_split_products, shape, spectrum):
    a = matrix(shape, spectrum, 1)
    assert_near_optimal(a, svd_denoise(a, rank=20), 20, 3e-5)


@pytest.mark.parametrize("shape", SHAPES[1:3])
def test_a_batch_is_split_once_for_all_products(on_split_products, monkeypatch, shape):
    """The matrices, and the factors of their approximations."""
    calls = watch(monkeypatch, torch.ops.deftx, "split_bf16_", lambda x, *_: [t.shape for t in x])
    a = torch.stack([matrix(shape, "noise", s) for s in range(3)])
    result = svd_denoise(a, rank=20, batch_bytes=1 << 30)
    m, n = max(shape), min(shape)
    assert [c for c in calls if len(c) > 1] == [[shape] * 3, [(m, 20)] * 3, [(20, n)] * 3]
    assert not any(c[0][-2:] in (shape, shape[::-1]) for c in calls if len(c) == 1)
    for x, low in zip(a, result):
        assert_near_optimal(x, low, 20, 3e-5)


def test_matrices_are_copied_only_where_others_of_the_batch_are_done(on_split_products, monkeypatch):
    chosen = watch(monkeypatch, products.SplitBF16, "__getitem__", lambda x, some: (len(x), len(some)))
    steps = watch(monkeypatch, subspace, "orthonormal_rows", len)
    slow = matrix((300, 300), "noise", 0)
    svd_denoise(slow[None], rank=20, oversample=0)
    assert len(steps) > 4
    assert chosen == []
    fast = torch.zeros_like(slow)
    fast[:10, :10] = slow[:10, :10]
    svd_denoise(torch.stack([fast, slow]), rank=20, oversample=0, batch_bytes=1 << 30)
    assert chosen == [(2, 1)]


def test_matrices_are_split_where_they_are_for_gram_matrices_and_projections(on_split_products, monkeypatch):
    monkeypatch.setattr(gram, "ROWS", 128)
    calls = watch(monkeypatch, torch.ops.deftx, "split_bf16_", lambda x, *_: [t.shape for t in x])
    a = [matrix((300, 300), "noise", s) for s in range(3)]
    result = svd_denoise(a, energy=0.8, batch_bytes=1 << 30)
    parts = [[(rows, 300)] * 3 for rows in (128, 128, 44)]
    assert [c for c in calls if len(c) > 1] == [*parts, [(300, 300)] * 3, [(300, 300)] * 3]
    for x, found in zip(a, result):
        want = svd_denoise(x.double(), energy=0.8)
        assert float((found - want).norm() / want.norm()) < 5e-5


@pytest.mark.parametrize("rule", [{"rank": 20}, {"energy": 0.9}, {"energy": 0.999}])
@pytest.mark.parametrize("shape", [(400, 150), (130, 390), (300, 300)])
def test_cublas_takes_operands_and_results_as_they_are(on_split_products, monkeypatch, shape, rule):
    """Rows or columns one after the other, no overlap: torch copies others before, and a result after, a product on
    CUDA.
    """

    def is_fit(out, a, b, *_):
        assert a.dtype == b.dtype == torch.bfloat16
        layouts = [(*x.stride()[1:], *x.shape[1:]) for x in (out, a, b)]
        return all((j == 1 and i >= max(n, 1)) or (i == 1 and j >= max(m, 1)) for i, j, m, n in layouts)

    seen = [watch(monkeypatch, module, "product_", is_fit) for module in (products, projector, gram, subspace)]
    svd_denoise(torch.stack([matrix(shape, "exponential", s) for s in range(2)]), **rule)
    assert seen[0]
    assert seen[2] or seen[3] or rule == {"energy": 0.999}  # by eigenvectors
    assert all(map(all, seen))


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_residual_on_split_products_is_pruned_from_factors(on_split_products, monkeypatch, shape):
    a = matrix(shape, "noise", 1)
    used = watch(monkeypatch, subspace, "prune_from_factors", lambda *_: 1)
    low = svd_denoise(a, rank=20)
    result, info = svd_denoise(a, rank=20, residual_density=0.1, return_info=True)
    assert used
    kept = result == a
    assert int(kept.sum()) == round(0.1 * a.numel())
    torch.testing.assert_close(result[~kept], low[~kept], atol=1e-4, rtol=0)
    assert float((a - low)[kept].abs().min()) >= float((a - low)[~kept].abs().max()) - 1e-3
    assert float(info["residual"]) == pytest.approx(float((a - result).norm() / a.norm()), rel=1e-4)
