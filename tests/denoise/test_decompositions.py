"""Decompositions are checked against their matrix: a solver that is wrong is found, and its results are replaced."""

import re
import warnings

import pytest
import torch

from deftx_kernels import svd_denoise, truncated_svd
from deftx_kernels.denoise import subspace
from deftx_kernels.denoise.decompositions import eigh, eigvalsh, svd
from tests.conftest import ROOT
from tests.denoise.oracle import noise, with_singular_values

DTYPES = [torch.float32, torch.float64]


def grams(count, n, dtype=torch.float32, seed=0):
    w = torch.randn(count, n + 20, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (w.mT @ w).to(dtype)


def like(v):
    """Noise of the shape and dtype of v."""
    return noise(*v.shape, seed=1, dtype=v.dtype)


# What a faulty solver may give of one matrix: (eigenvalues [n], eigenvectors [n, n]) -> the same.
FAULTS = {
    "noise": lambda w, v: (w, torch.linalg.qr(like(v)).Q),
    "not orthonormal": lambda w, v: (w, like(v) / v.shape[0] ** 0.5),
    "one vector twice": lambda w, v: (w, torch.cat([v[:, 1:2], v[:, 1:]], 1)),
    "vectors twice": lambda w, v: (w, torch.cat([v[:, 1:2], v[:, 1:-1], v[:, -2:-1]], 1)),
    "one vector of noise": lambda w, v: (w, torch.cat([like(v[:, :1]) / v.shape[0] ** 0.5, v[:, 1:]], 1)),
    "vectors in another order": lambda w, v: (w, v.flip(-1)),
    "an eigenvalue that is lost": lambda w, v: (torch.cat([w[:-1], w[-2:-1]]), v),
    "eigenvalues of noise": lambda w, v: (like(w).sort().values, v),
    "descending": lambda w, v: (w.flip(-1), v.flip(-1)),
    "zeros for vectors": lambda w, v: (w, torch.zeros_like(v)),
    "NaN": lambda w, v: (torch.full_like(w, float("nan")), torch.full_like(v, float("nan"))),
    "zeros": lambda w, v: (torch.zeros_like(w), torch.zeros_like(v)),
}


def broken(fault, at):
    """The operators eigh and eigvalsh, wrong for matrix `at` of a batch."""
    right = torch.ops.deftx.eigh

    def wrong_eigh(matrices, *rule):
        values, vectors = (x.clone() for x in right(matrices, *rule))
        i = min(at, len(matrices) - 1)
        values[i], vectors[i] = FAULTS[fault](values[i], vectors[i])
        return values, vectors

    return wrong_eigh, lambda matrices: wrong_eigh(matrices)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("fault", "n"), [(f, n) for f in FAULTS for n in (5, 96)] + [(f, 700) for f in FAULTS if "one" in f or "lost" in f]
)
def test_a_wrong_eigenproblem_is_solved_again(monkeypatch, fault, n, dtype):
    a = grams(3, n, dtype)
    right = [x.clone() for x in eigh(a)]
    wrong, wrong_values = broken(fault, at=1)
    monkeypatch.setattr(torch.ops.deftx, "eigh", wrong)
    monkeypatch.setattr(torch.ops.deftx, "eigvalsh", wrong_values)
    with pytest.warns(RuntimeWarning, match=f"eigenvectors of 1 of 3 matrices of {n} x {n}.*failed the check"):
        values, vectors = eigh(a)
    for i in (0, 2):
        assert torch.equal(values[i], right[0][i])
        assert torch.equal(vectors[i], right[1][i])
    exact = torch.linalg.eigvalsh(a[1].double())
    limit = 60 * torch.finfo(dtype).eps
    assert float((values[1] - exact).abs().max()) <= limit * float(exact[-1])
    v = vectors[1].double()
    assert float((v.mT @ v - torch.eye(n, dtype=torch.float64)).abs().max()) <= limit
    assert float(((v * values[1].double()) @ v.mT - a[1]).abs().max()) <= limit * float(exact[-1])
    if "vector" not in fault and fault not in ("noise", "not orthonormal"):
        with pytest.warns(RuntimeWarning, match="eigenvalues of 1 of 3"):
            assert float((eigvalsh(a)[1] - exact).abs().max()) <= limit * float(exact[-1])


def test_what_every_solver_gets_wrong_is_an_error(monkeypatch):
    wrong, _ = broken("noise", at=0)
    monkeypatch.setattr(torch.ops.deftx, "eigh", wrong)
    monkeypatch.setattr(torch.linalg, "eigh", lambda a: (torch.zeros(a.shape[:-1]), torch.zeros(a.shape)))
    with (
        pytest.warns(RuntimeWarning, match="failed the check"),
        pytest.raises(RuntimeError, match="wrong results for the eigenvectors of 1 of 2 matrices of 30 x 30"),
    ):
        eigh(grams(2, 30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 5), (3, 3), (16, 16), (40, 25), (25, 40), (130, 128), (30, 700)])
def test_no_false_alarm(shape, dtype):
    """pyproject.toml makes the warning an error in every test; here many spectra of one size."""
    m, n = shape
    r, count = min(shape), 20 if max(shape) < 100 else 4 if max(shape) < 200 else 1
    i = torch.arange(r, dtype=torch.float64)
    for s in (torch.ones(r), 10.0**-i, (1 + i) ** -1.5, torch.where(i < 3, 3 - i, 0), torch.zeros(r), 1 + 1e-9 * i):
        a = torch.stack([with_singular_values(shape, s, seed) for seed in range(count)]).to(dtype)
        U, S, Vh = svd(a)
        assert (U.shape, S.shape, Vh.shape) == ((count, m, r), (count, r), (count, r, n))
        gram = a.mT @ a
        values, _ = eigh((gram + gram.mT) / 2)
        assert values.shape == (count, n)
        eigvalsh((gram + gram.mT) / 2)


@pytest.mark.parametrize("fault", ["singular values", "U", "Vh", "NaN", "descending"])
def test_a_wrong_singular_value_decomposition_is_made_again(monkeypatch, fault):
    right = torch.linalg.svd

    def wrong(a, **options):
        U, S, Vh = (x.clone() for x in right(a, **options))
        if a.shape[-2] > a.shape[-1]:  # the second solver's is the transpose
            if fault == "singular values":
                S[0, 0] *= 1.1
            elif fault == "U":
                U[0, :, 0] = U[0, :, 1]
            elif fault == "Vh":
                Vh[0] = Vh[0].flip(0)
            elif fault == "NaN":
                S[0] = float("nan")
            else:
                U, S, Vh = U.flip(-1), S.flip(-1), Vh.flip(-2)
        return U, S, Vh

    a = noise(2, 40, 30, seed=1)
    monkeypatch.setattr(torch.linalg, "svd", wrong)
    with pytest.warns(
        RuntimeWarning, match="singular value decomposition of . of 2 matrices of 40 x 30.*failed the check"
    ):
        U, S, Vh = svd(a)
    assert float(((U * S[:, None]) @ Vh - a).abs().max()) < 1e-5
    with pytest.warns(RuntimeWarning, match="failed the check"):
        U, S, Vh = truncated_svd(a, 30)
    assert float(((U * S[:, None]) @ Vh - a).abs().max()) < 1e-5


@pytest.mark.parametrize("fault", ["vectors twice", "zeros for vectors", "NaN"])
@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"rank": "gavish-donoho"}, {"rank": 20}, {"rank": 60}], ids=str)
def test_denoising_with_a_wrong_eigensolver_is_right(monkeypatch, rule, fault):
    a = noise(3, 200, 150, seed=1) + 3 * noise(3, 200, 5, seed=2) @ noise(3, 5, 150, seed=3)
    expected, info = svd_denoise(a, **rule, return_info=True)
    wrong, wrong_values = broken(fault, at=0)
    monkeypatch.setattr(torch.ops.deftx, "eigh", wrong)
    monkeypatch.setattr(torch.ops.deftx, "eigvalsh", wrong_values)
    with pytest.warns(RuntimeWarning, match="failed the check"):
        found, its_info = svd_denoise(a, **rule, return_info=True)
    assert torch.equal(its_info["rank"], info["rank"])
    assert float((found - expected).norm() / expected.norm()) < 5e-5


def test_rows_that_cholesky_left_dependent_are_found(monkeypatch):
    z = noise(2, 20, 90, seed=1)
    right = subspace.orthonormal_rows(z)
    solve = torch.linalg.solve_triangular

    def wrong(*arguments, **options):
        found = solve(*arguments, **options)
        found[1, 3] = found[1, 4]
        return found

    monkeypatch.setattr(torch.linalg, "solve_triangular", wrong)
    q = subspace.orthonormal_rows(z)
    assert float((q @ q.mT - torch.eye(20)).abs().max()) < 1e-5
    assert float((q - right).abs().max()) < 1e-4
    monkeypatch.setattr(torch.linalg, "qr", lambda a: (torch.zeros_like(a), torch.zeros(20, 20)))
    with pytest.raises(RuntimeError, match="QR"):
        subspace.orthonormal_rows(z)


def body(source, begin):
    """What stands between the first brace after `begin` and the one that closes it."""
    begin, depth = source.index("{", begin) + 1, 1
    end = begin
    while depth:
        depth += {"{": 1, "}": -1}.get(source[end], 0)
        end += 1
    return source[begin:end]


def test_no_library_call_inside_a_parallel_region():
    """BLAS and LAPACK, and whatever else goes through the dispatcher, are called by the thread that called the
    operator.
    """
    calls = re.compile(
        r"torch_call_dispatcher|aoti_torch_cpu|torch::stable::(?!parallel_for|get_num_threads)\w+\(|dlsym"
    )
    regions = 0
    for path in sorted((ROOT / "csrc" / "cpu").iterdir()):
        source = re.sub(r"//[^\n]*", "", path.read_text())
        for match in re.finditer(r"\b(?:parallel_for|for_each_chunk|schedule_?)\(", source):
            depth, end = 1, match.end()
            while depth:
                depth += {"(": 1, ")": -1}.get(source[end], 0)
                end += 1
            regions += 1
            region = source[match.end() : end]
            if name := re.search(r",\s*(\w+)\)$", region):  # a lambda of the same function, handed over by its name
                begin = re.search(rf"auto {name.group(1)} = \[", source)
                region += "" if begin is None else body(source, begin.end())
            found = calls.search(region)
            assert found is None, f"{path.name}: {found.group()} inside a parallel region"
    assert regions > 30
    for name in ("eigh.cpp", "tridiagonal.h", "tridiagonal_eigen.h"):
        text = (ROOT / "csrc" / "cpu" / name).read_text()
        assert "matmul" not in text
        assert "dispatcher" not in text


def test_a_right_result_is_returned_as_it_is():
    a = grams(2, 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x, y in zip(eigh(a), torch.ops.deftx.eigh(a)):
            assert torch.equal(x, y)
