"""eigh and eigvalsh of batches, of every implementation, against float64 torch.linalg."""

import pytest
import torch

from deftx_kernels.denoise import decompositions
from tests.conftest import Implementation, implementations

OPS = ("eigh", "eigvalsh")
DTYPES = [torch.float32, torch.float64]


def symmetric(count, n, dtype, seed=0):
    a = torch.randn(count, n, n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return a + a.mT


def with_eigenvalues(values, dtype):
    values = torch.as_tensor(values, dtype=torch.float64)
    n = len(values)
    q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)).Q
    a = (q * values) @ q.mT
    return ((a + a.mT) / 2).to(dtype)[None]


def assert_decomposed(implementation, a, limit=60):
    """Errors in units of rounding of the largest eigenvalue; LAPACK's and ours grow more slowly than with n."""
    n, eps = a.shape[-1], torch.finfo(a.dtype).eps
    exact = torch.linalg.eigvalsh(a.double())
    one = exact.abs().amax(-1).clamp(min=1e-300) * eps * limit
    there = a.to(implementation.device)
    alone, (values, vectors) = implementation.ops.eigvalsh(there), implementation.ops.eigh(there)
    for found in (alone, values):
        assert found.dtype == a.dtype
        assert found.shape == exact.shape
        assert bool(((found.cpu() - exact).abs() <= one[:, None]).all())
        assert bool((found.diff(dim=-1) >= 0).all())
    assert vectors.shape == a.shape
    v = vectors.cpu().double()
    assert bool((((v * values.cpu().double()[:, None]) @ v.mT - a).abs() <= one[:, None, None]).all())
    assert float((v.mT @ v - torch.eye(n, dtype=torch.float64)).abs().max()) <= limit * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "n"), [(1, 1), (3, 2), (4, 17), (2, 34), (5, 64), (1, 133)])
def test_random_matrices(implementation, request, count, n, dtype):
    if implementation.name == "emulated" and n == 64:
        pytest.skip("a minute in the emulator")
    if n != 34:  # the race checks of both dtypes' kernels
        request.getfixturevalue("no_racecheck")
    assert_decomposed(implementation, symmetric(count, n, dtype))


def spectra(n):
    i = torch.arange(n, dtype=torch.float64)
    return {
        "equal": torch.ones(n),
        "clusters": torch.cat([torch.ones(4), 2 * torch.ones(n - 4)]),
        "rank 3": torch.where(i < 3, 3 - i, 0),
        "rank 3 and rounding": torch.where(i < 3, 3 - i, 1e-17 * i),
        "falling": 10.0**-i,
        "large": 1e30 * (i - 7),
        "small": 1e-30 * (i - 7),
        "pairs of both signs": (i // 2 + 1) * (-1) ** i,
    }


def special(n, dtype):
    """Many of their columns need no reflection, and many of their eigenvalues are equal, or rounding."""
    i = torch.arange(n, dtype=dtype)
    beside = torch.ones(n - 1, dtype=dtype)
    return {
        "zero": torch.zeros(n, n, dtype=dtype),
        "identity": torch.eye(n, dtype=dtype),
        "diagonal, descending": torch.diag(n - i),
        "diagonal, zero first": torch.diag((i + 1) // 2 % (n // 2) * (-1) ** i),  # bisection begins at the eigenvalue 0
        "ones": torch.ones(n, n, dtype=dtype),
        "tridiagonal": torch.diag(beside, 1) + torch.diag(beside, -1),
        "graded down": torch.diag(10.0**-i) + 1e-12,
        "graded up": torch.diag(10.0 ** (i - n)) + 1e-12,
        "two blocks": torch.block_diag(*symmetric(2, n // 2, dtype)),
    }


@pytest.mark.usefixtures("no_racecheck")
@pytest.mark.parametrize("dtype", DTYPES)
def test_special_matrices(implementation, dtype):
    n = 18
    matrices = [with_eigenvalues(values, dtype)[0] for values in spectra(n).values()]
    assert_decomposed(
        implementation, torch.stack([*matrices, *special(n, dtype).values()])
    )  # a batch: quick in the emulator


@pytest.mark.usefixtures("no_racecheck")
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(implementation, bad):
    if implementation.name == "reference":
        pytest.skip("LAPACK refuses, or gives NaN, by its version")
    a = symmetric(2, 12, torch.float32)
    a[1, 3, 5] = a[1, 5, 3] = bad
    for values in (
        implementation.ops.eigvalsh(a.to(implementation.device)),
        implementation.ops.eigh(a.to(implementation.device))[0],
    ):
        assert values[1].isnan().all()
        assert values[0].isfinite().all()


@pytest.mark.usefixtures("no_racecheck")
def test_equal_calls_give_equal_bits_and_leave_the_argument(implementation):
    a = symmetric(3, 20, torch.float32).to(implementation.device)
    kept = a.clone()
    values, vectors = implementation.ops.eigh(a)
    alone = implementation.ops.eigvalsh(a)
    with torch.inference_mode():
        again = implementation.ops.eigh(a.clone())
        assert torch.equal(implementation.ops.eigvalsh(a.clone()), alone)
    assert torch.equal(again[0], values)
    assert torch.equal(again[1], vectors)
    assert torch.equal(a, kept)
    last = implementation.ops.eigh(a[2:].contiguous())  # whatever else is in the batch
    assert torch.equal(last[0][0], values[2])
    assert torch.equal(last[1][0], vectors[2])


@pytest.mark.parametrize("shape", [(0, 3, 3), (2, 0, 0)])
def test_nothing(implementation, shape):
    a = torch.zeros(shape, device=implementation.device)
    assert implementation.ops.eigvalsh(a).shape == shape[:2]
    values, vectors = implementation.ops.eigh(a)
    assert values.shape == shape[:2]
    assert vectors.shape == shape


def clustered(n, dtype):
    """Clusters, equal eigenvalues, low rank and rounding, blocks: what inverse iteration is sensitive to."""
    i, generator = torch.arange(n, dtype=torch.float64), torch.Generator().manual_seed(5)
    low = torch.randn(n, 7, generator=generator, dtype=torch.float64)
    matrices = {
        "two values": with_eigenvalues(1 + (i < n // 2), dtype),
        "one cluster": with_eigenvalues(1 + 1e-7 * i, dtype),
        "one cluster, rounding": with_eigenvalues(1 + 3e-16 * i, dtype),
        "clusters": with_eigenvalues(i // 30 + 1e-9 * i, dtype),
        "exponential": with_eigenvalues(torch.exp(-i / 10), dtype),
        "both signs": with_eigenvalues(torch.linspace(-1, 1, n), dtype),
        "low rank": (low @ low.mT).to(dtype)[None],
        "low rank and a multiple of the identity": (low @ low.mT + 1e-4 * torch.eye(n)).to(dtype)[None],
        "Wilkinson": (torch.diag((i - n // 2).abs()) + special(n, torch.float64)["tridiagonal"]).to(dtype)[None],
        "equal blocks": torch.block_diag(
            *[torch.ones(10, 10, dtype=dtype)] * (n // 10), torch.eye(n % 10, dtype=dtype)
        )[None],
    }
    for name, values in spectra(n).items():
        matrices[name] = with_eigenvalues(values, dtype)
    return [*matrices.values(), *(m[None] for m in special(n, dtype).values())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [96, 300])
def test_spectra_of_many_rows_on_the_cpu(n, dtype):
    ours = Implementation("c++", "cpu", torch.ops.deftx)
    for a in clustered(n, dtype):
        assert_decomposed(ours, a, limit=200)


@implementations("emulated", "cuda")
@pytest.mark.usefixtures("no_racecheck")
@pytest.mark.parametrize("dtype", DTYPES)
def test_spectra_of_many_rows_on_a_gpu(implementation, dtype):
    matrices = clustered(32 if implementation.name == "emulated" else 300, dtype)
    assert_decomposed(implementation, torch.cat(matrices), limit=100)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize(("count", "n"), [(5, 64), (1, 300), (3, 300)])
def test_threads(threads, count, n):
    """One matrix a thread, and all threads on one matrix: the same bits."""
    a = symmetric(count, n, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = *torch.ops.deftx.eigh(a), torch.ops.deftx.eigvalsh(a)
    torch.set_num_threads(threads)
    try:
        found = *torch.ops.deftx.eigh(a), torch.ops.deftx.eigvalsh(a)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(x, y) for x, y in zip(found, expected))


def kept(eigenvalues, rank=0, energy=0.0, median=0.0):  # [n], ascending
    """How many of them a truncation keeps."""
    if rank:
        return rank
    squares = eigenvalues.clamp(min=0).flip(0)
    if squares[0] == 0:
        return 0
    if energy:
        sums = squares.cumsum(0)
        return int((sums < energy * sums[-1]).sum()) + 1
    return int((squares.sqrt() > median * squares.sqrt().quantile(0.5)).sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rule",
    [{"rank": 20}, {"rank": 250}, {"rank": 149}, {"energy": 0.3}, {"energy": 0.98}, {"median": 1.2}, {"energy": 1.0}],
    ids=str,
)
def test_the_vectors_that_a_truncation_needs(rule, dtype):
    """Of the fewer eigenvalues, kept or others, and 16 beyond; of blocks and clusters, too. The values are those of
    all.
    """
    n, beyond, generator = 300, 16, torch.Generator().manual_seed(6)
    i = torch.arange(n, dtype=torch.float64)
    matrices = [
        with_eigenvalues(torch.linspace(0, 1, n), dtype)[0],
        with_eigenvalues(1 + i // 60 + 1e-9 * i, dtype)[0],
        torch.block_diag(
            *[with_eigenvalues(1 + torch.rand(20, generator=generator) + i[:20], dtype)[0] for _ in range(n // 20)]
        ),
        torch.diag(1 + i).to(dtype),
        torch.zeros(n, n, dtype=dtype),
    ]
    a = torch.stack(matrices)
    all_values = torch.ops.deftx.eigh(a)[0]
    values, vectors = torch.ops.deftx.eigh(a, **rule)
    assert torch.equal(values, all_values)
    limit = 200 * torch.finfo(dtype).eps
    for w, v, matrix in zip(values.double(), vectors.double(), a.double()):
        count, needed = kept(w, **rule), torch.zeros(n, dtype=torch.bool)
        if 2 * count > n:
            needed[: n - count + beyond] = True
        else:
            needed[max(n - count - beyond, 0) :] = True
        v, w = v[:, needed], w[needed]
        assert float((v.mT @ v - torch.eye(len(w), dtype=torch.float64)).abs().max()) <= limit
        assert float((matrix @ v - v * w).abs().max()) <= limit * max(float(w.abs().max()), 1e-300)
    given = (vectors != 0).any(1).sum(1)
    assert bool((given[:2] < n).all()) == (rule != {"rank": 149})  # in the middle nothing is saved


@pytest.mark.parametrize(
    "rule",
    [
        {"rank": -1},
        {"rank": 6},
        {"energy": -1.0},
        {"energy": 1.5},
        {"energy": float("nan")},
        {"median": -1.0},
        {"median": float("inf")},
        {"rank": 2, "energy": 0.5},
    ],
    ids=str,
)
def test_an_impossible_rule_is_an_error(rule):
    with pytest.raises(RuntimeError, match=next(iter(rule))):
        torch.ops.deftx.eigh(symmetric(2, 5, torch.float32), **rule)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("count", "n", "dtype"), [(73, 768, torch.float32), (224, 144, torch.float64), (4, 1024, torch.float64)]
)
def test_sizes_of_models(count, n, dtype):
    w = torch.randn(count, n + 100, n, generator=torch.Generator().manual_seed(1), dtype=dtype).cuda()
    a = w.mT @ w
    a = (a + a.mT) / 2
    exact = torch.linalg.eigvalsh(a.double())
    one = exact[:, -1:] * torch.finfo(dtype).eps
    assert bool(((decompositions.eigvalsh(a) - exact).abs() <= 60 * one).all())
    values, vectors = decompositions.eigh(a)
    assert bool(((values - exact).abs() <= 60 * one).all())
    v = vectors.double()
    assert (
        float((v.mT @ v - torch.eye(n, device="cuda", dtype=torch.float64)).abs().max()) <= 200 * torch.finfo(dtype).eps
    )
    assert bool((((v * values.double()[:, None]) @ v.mT - a).abs() <= 200 * one[..., None]).all())
