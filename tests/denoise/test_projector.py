"""The spectral projector of matrix products against float64 numpy.linalg.svd, with float32 products and with bfloat16
ones.
"""

import numpy as np
import pytest
import torch

from deftx_kernels.denoise import products, projector
from tests.denoise import oracle
from tests.denoise.oracle import with_singular_values

both_products = pytest.mark.parametrize("product", ["float32", "split"])


def spectrum_matrix(m, n, singular, seed=0):
    return with_singular_values((m, n), torch.as_tensor(singular), seed).float()


def noise(m, n, seed=0):
    return oracle.noise(m, n, seed=seed)


def low_rank_and_noise(n, seed=0):
    return noise(n, 5, seed) @ noise(5, n, seed + 1) + 0.05 * noise(n, n, seed + 2)


MATRICES = {
    "one": noise(1, 1),
    "two": noise(2, 2),
    "three": noise(7, 3, 2),
    "square noise": noise(65, 65),
    "tall noise": noise(384, 96),
    "wide noise": noise(40, 96),
    "low rank and noise": low_rank_and_noise(80),
    "decaying": spectrum_matrix(64, 64, 0.7 ** np.arange(64)),
    "harmonic": spectrum_matrix(70, 64, 1 / (1 + np.arange(64.0))),
    "clustered": spectrum_matrix(64, 64, np.where(np.arange(64) < 20, 1.0, 0.9) + 1e-6 * np.arange(64)),
    "low rank": spectrum_matrix(64, 48, 1 / (1 + np.arange(6.0))),
}


def gram_of(w, dtype=torch.float32):
    return (w.double().mT @ w.double()).to(dtype)


def relative_gaps(w):
    squares = np.linalg.svd(w.double().numpy(), compute_uv=False) ** 2
    squares = np.append(squares, np.zeros(w.shape[1] + 1 - len(squares)))
    return (squares[:-1] - squares[1:]) / squares[0]  # [n]: of ranks 1 ... n


def error(w, projector, rank):
    want = oracle.svd_denoise(w, rank=rank).result
    return oracle.distance(w.double() @ projector.double(), want) / float(want.norm())


def project(grams, ranks, product="float32"):
    grams = torch.stack(grams)
    eigenvalues = torch.linalg.eigvalsh(grams)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "uses_split_products", lambda x: product == "split")
        return projector.spectral_projector(grams, eigenvalues, torch.tensor(ranks))


def assert_projector(p, rank, tolerance=2e-3):
    assert p.dtype == torch.float32
    assert abs(p.trace().item() - rank) < tolerance
    assert abs((p * p).sum().item() - rank) < tolerance


@both_products
@pytest.mark.parametrize("name", MATRICES)
def test_it_truncates_at_any_rank(name, product):
    w = MATRICES[name]
    n = w.shape[1]
    gaps = relative_gaps(w)
    energy = np.cumsum(np.linalg.svd(w.double().numpy(), compute_uv=False) ** 2)
    shares = [int(np.searchsorted(energy, share * energy[-1])) + 1 for share in (0.5, 0.9, 0.99)]
    ranks = sorted(
        {r for r in (1, 2, 5, 6, 20, n // 2, n - 1, n, *shares) if 1 <= r <= n and (r == n or gaps[r - 1] > 1e-3)}
    )
    assert ranks
    tolerance = {"float32": 8e-6, "split": 5e-5}[product]
    for rank in ranks:
        p = project([gram_of(w)], [rank], product)[0]
        assert error(w, p, rank) < tolerance, rank
        assert_projector(p, rank)


@pytest.mark.parametrize("energy", [0.9, 0.0])
def test_n_768(energy):
    w = noise(768, 768, 5)
    want = oracle.svd_denoise(w, energy=energy)
    for product, tolerance in (("float32", 5e-6), ("split", 5e-5)):
        p = project([gram_of(w)], [want.rank], product)[0]
        assert oracle.distance(w.double() @ p.double(), want.result) < tolerance * float(want.result.norm())
        assert_projector(p, want.rank)


@pytest.mark.parametrize(
    ("product", "gap", "tolerance"),
    [("float32", 1e-5, 5e-5), ("float32", 1e-4, 1e-5), ("split", 1e-4, 5e-5), ("split", 1e-3, 3e-5)],
)
def test_small_gap(product, gap, tolerance):
    upper = np.linspace(1, 0.75, 128)
    w = spectrum_matrix(256, 256, np.sqrt(np.append(upper, upper[-1] - gap - np.linspace(0, 0.4, 128))), 3)
    p = project([gram_of(w)], [128], product)[0]
    assert relative_gaps(w)[127] == pytest.approx(gap, rel=0.05)
    assert error(w, p, 128) < tolerance
    assert_projector(p, 128)


@both_products
def test_a_batch_of_all_kinds(product):
    n = 48
    ws = [noise(n, n, 1), noise(4 * n, n, 2), low_rank_and_noise(n, 3), spectrum_matrix(n, n, 0.7 ** np.arange(n))]
    ws += [noise(n, n, 4), noise(n, n, 5), torch.zeros(n, n), 1e15 * noise(n, n, 6), 1e-15 * noise(n, n, 7)]
    ranks = [20, 40, 5, 3, 0, n, 0, 1, 24]
    ps = project([gram_of(w) for w in ws], ranks, product)
    assert ps.shape == (len(ws), n, n)
    for w, p, rank in zip(ws, ps, ranks, strict=True):
        assert_projector(p, rank)
        if rank:
            assert error(w, p, rank) < 5e-5
    for p, want in ((ps[4], torch.zeros(n, n)), (ps[5], torch.eye(n)), (ps[6], torch.zeros(n, n))):
        torch.testing.assert_close(p, want, rtol=0, atol=projector.TOLERANCE)


def test_split_products_with_a_large_common_diagonal():
    w = noise(1024, 256, 8)
    assert error(w, project([gram_of(w)], [1], "split")[0], 1) < 2.5e-5


def test_ranks_zero_and_n_cost_no_product(monkeypatch):
    monkeypatch.setattr(projector, "product_", None)
    grams = torch.stack([gram_of(noise(5, 5)), torch.zeros(5, 5)])
    p = projector.spectral_projector(grams, torch.linalg.eigvalsh(grams), torch.tensor([5, 0]))
    assert torch.equal(p, torch.stack([torch.eye(5), torch.zeros(5, 5)]))


def test_dtypes_layouts_and_no_side_effect():
    w = noise(30, 24)
    gram = gram_of(w, torch.float64)[None]
    strided = torch.empty(1, 48, 24)[:, ::2].copy_(gram)
    for g in (gram, strided):
        before = g.clone()
        values = torch.linalg.eigvalsh(gram)
        for eigenvalues in (values, values.float()):
            p = projector.spectral_projector(g, eigenvalues, torch.tensor([7]))
            assert p.dtype == torch.float32
            assert error(w, p[0], 7) < 5e-6
        assert torch.equal(g, before)
    for shape in ((0, 4, 4), (3, 0, 0)):
        p = projector.spectral_projector(
            torch.zeros(shape), torch.zeros(shape[:2]), torch.zeros(shape[0], dtype=torch.int64)
        )
        assert p.shape == shape


@both_products
@pytest.mark.parametrize("gap", [0.0, 1e-9])
def test_an_unresolved_gap_shows_in_the_sum_of_squares(product, gap):
    values = np.append(np.linspace(2, 1, 20), np.linspace(1 - gap, 0.1, 20))
    gram = torch.diag(torch.from_numpy(values)).float()  # diagonal: nothing but the eigenvalues 20 and 21 is at stake
    p = project([gram], [20], product)[0]
    assert abs((p * p).sum().item() - 20) > 0.1
    assert torch.isfinite(p).all()


def test_nan_ends():
    p = projector.spectral_projector(torch.full((1, 4, 4), torch.nan), torch.full((1, 4), torch.nan), torch.tensor([2]))
    assert torch.isnan(p).any()


def apply(steps, x, rounding=0.0):
    generator = np.random.default_rng(0)
    for degree, t in steps:
        x = x + t * x**degree
        x += rounding * np.abs(x).max() * generator.uniform(-1, 1, x.shape)
    return x


INTERVALS = [
    (1e-6, 1),
    (1e-6, 1e-6),
    (1e-4, 0.13),
    (1e-4, 0.6),
    (0.01, 0.2),
    (0.3, 0.4),
    (0.9, 0.9),
    (1e-5, 0.45),
    (0.1, 0.15),
    (1, 1),
]


@pytest.mark.parametrize(("low", "short"), INTERVALS)
def test_schedule_takes_the_intervals_to_the_sign(low, short):
    steps, size = projector.schedule(low, short)
    x = np.concatenate([np.geomspace(low, 1, 20001), -np.geomspace(low, short, 20001)])
    assert np.abs(apply(steps, x) / size - np.sign(x)).max() <= projector.TOLERANCE
    if steps:  # the largest eigenvalues may be larger than what they are known to be
        x = np.array([1 + 1e-3, -short * (1 + 1e-3)])
        assert np.abs(apply(steps, x) / size - np.sign(x)).max() <= 2 * projector.TOLERANCE


@pytest.mark.parametrize(
    ("low", "short"), [(1e-6, 1), (1e-6, 1e-6), (1e-4, 0.13), (1e-5, 0.45), (0.01, 0.2), (0.1, 0.15), (0.1, 1)]
)
def test_rounding_errors_change_no_sign_and_are_not_amplified(low, short):
    steps, size = projector.schedule(low, short)
    if short > 1e-3:
        x = np.concatenate([np.geomspace(max(low, 1e-3), 1, 20001), -np.geomspace(max(low, 1e-3), short, 20001)])
    else:
        x = np.geomspace(1e-3, 1, 20001)
    assert np.abs(apply(steps, x, 1e-5) / size - np.sign(x)).max() <= 1e-4
    # rounding may bring some here: their signs are lost, but they must not diverge
    x = np.linspace(-max(low, 5e-5), low, 1001)
    assert np.abs(apply(steps, x, 1e-5) / size).max() <= 1 + 1e-4


@pytest.mark.parametrize(
    ("low", "short", "most"),
    [
        (1.0, 1.0, 0),
        (0.1, 1.0, 12),
        (1e-2, 1.0, 16),
        (1e-3, 1.0, 22),
        (1e-4, 1.0, 26),
        (1e-3, 0.18, 20),
        (1e-3, 1e-3, 14),
    ],
)
def test_schedule_is_short(low, short, most):
    assert sum(degree - 1 for degree, _ in projector.schedule(low, short)[0]) <= most


def test_smaller_gaps_than_the_smallest_cost_no_more_steps():
    for low in (1e-9, 0.0, -1.0):
        assert projector.schedule(low, 1.0) == projector.schedule(projector.SMALLEST, 1.0)
