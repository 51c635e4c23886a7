"""`eigh` and `eigvalsh`, the public functions, against float64 torch.linalg. Spectra are in test_eigh.py."""

import math

import pytest
import torch

from deftx_kernels import eigh, eigvalsh
from deftx_kernels.denoise import decompositions
from tests.conftest import implementations

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
every_implementation = implementations("reference", "c++", "emulated", "cuda")


def symmetric(shape, dtype=torch.float64, seed=0):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (a + a.mT).to(dtype)


@pytest.fixture
def served(implementation, monkeypatch):
    """The device on which the functions use the implementation."""
    with implementation.without_racecheck():  # test_eigh.py checks for races
        if implementation.name in ("reference", "emulated"):
            for op in ("eigh", "eigvalsh"):
                monkeypatch.setattr(decompositions.torch.ops.deftx, op, getattr(implementation.ops, op))
        yield implementation.device


def assert_decomposed(a, device, limit=30):
    values, vectors = eigh(a.to(device))
    alone = eigvalsh(a.to(device))
    assert values.shape == alone.shape == a.shape[:-1]
    assert vectors.shape == a.shape
    assert {values.dtype, vectors.dtype, alone.dtype} == {a.dtype}
    exact, n = torch.linalg.eigvalsh(a.double()), a.shape[-1]
    scale = exact.abs().amax(-1, keepdim=True) if n else exact
    eps = torch.finfo(a.dtype).eps
    assert bool(((values.cpu().double() - exact).abs() <= limit * eps * scale).all())
    assert bool(((alone.cpu().double() - exact).abs() <= limit * eps * scale).all())
    w, v = values.cpu().double(), vectors.cpu().double()
    assert bool(((v * w[..., None, :]) @ v.mT - a.double()).abs().le(limit * eps * scale[..., None]).all())
    assert bool(((v.mT @ v - torch.eye(n, dtype=torch.float64)).abs() <= limit * eps).all())


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(13, 13), (2, 3, 6, 6), (1, 1), (3, 1, 1), (5, 0, 0), (0, 4, 4), (2, 0, 3, 3), (0, 0)]
)
def test_batches_of_any_shape(served, shape, dtype):
    assert_decomposed(symmetric(shape, dtype), served)


@every_implementation
def test_other_strides_and_sizes(served):
    a = symmetric((4, 9, 9), torch.float32)
    expected = eigh(a.to(served))
    b = a.to(served)
    for same in (b.mT, b.permute(1, 2, 0).contiguous().permute(2, 0, 1), b.repeat(1, 2, 2)[:, :9, :9]):
        assert all(torch.equal(x, y) for x, y in zip(eigh(same), expected))
    assert_decomposed(b[:1].expand(3, -1, -1).cpu(), served)
    assert torch.equal(b.cpu(), a), "the argument is left as it is"


@every_implementation
@pytest.mark.parametrize(("dtype", "power"), [(torch.float32, 100), (torch.float32, -100), (torch.float64, 900)])
def test_squares_that_leave_the_range_of_the_dtype(served, dtype, power):
    a = symmetric((2, 8, 8), dtype)
    a[1] *= 2.0**power
    assert_decomposed(a, served)
    assert torch.equal(eigh(torch.zeros(2, 3, 3, dtype=dtype)).eigenvalues, torch.zeros(2, 3, dtype=dtype))


@every_implementation
def test_only_the_lower_triangle_is_used(served):
    a = symmetric((2, 7, 7), torch.float32).to(served)
    other = a.tril() + torch.full_like(a, math.nan).triu(1)
    assert all(torch.equal(x, y) for x, y in zip(eigh(other), eigh(a)))
    assert torch.equal(eigvalsh(other), eigvalsh(a))


@pytest.mark.parametrize("function", [eigh, eigvalsh])
def test_bad_arguments(function):
    for shape in [(3,), (2, 3), (4, 3, 2), ()]:
        with pytest.raises(ValueError, match=r"^a must be square matrices \[\.\.\., n, n\], got shape"):
            function(torch.ones(shape))
    with pytest.raises(TypeError, match="^a must be float32"):
        function(torch.ones(2, 2, dtype=torch.int64))
    for bad in (math.nan, math.inf):
        a = torch.eye(3)
        a[2, 1] = bad
        with pytest.raises(ValueError, match=f"a holds {bad} at flat index 7"):
            function(a)
    a = torch.eye(2, requires_grad=True)
    with pytest.raises(ValueError, match="^a requires grad"):
        function(a)
    with torch.no_grad():
        function(a)


def test_equal_calls_give_equal_bits():
    a = symmetric((3, 20, 20), torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(eigh(a), eigh(a.clone())))
    assert eigh(a)._fields == ("eigenvalues", "eigenvectors")
