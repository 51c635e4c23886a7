"""Products of bfloat16 parts, on the CPU and on a GPU, against float64: within twice the errors of the parts and the
sums.
"""

import pytest
import torch
from torch import Tensor

from deftx_kernels.denoise import products
from deftx_kernels.denoise.products import SeparateMatrices, SplitBF16

# m, k, n
SHAPES = [(1, 1, 1), (40, 70, 50), (300, 33, 8), (8, 33, 300), (129, 257, 3), (5, 1, 6), (64, 1000, 16)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True, params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_split_products(request, monkeypatch):
    """The implementation for CUDA tensors, on both devices; new tensors are on the device of the parameter."""
    monkeypatch.setattr(products, "uses_split_products", lambda x: x.dtype == torch.float32)
    with torch.device(request.param):
        yield


def numbers(*shape: int, seed: int = 0, even: bool = False) -> Tensor:
    """Normal ones, `even` or of many magnitudes."""
    generator = torch.Generator("cpu").manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator, device="cpu")
    if not even:
        x *= 2.0 ** torch.randint(-8, 8, shape, generator=generator, device="cpu")
    return x.to(torch.get_default_device())


def assert_product(found: Tensor, a: Tensor, b: Tensor, parts: int = 2) -> None:
    """With u = 2**-8, bfloat16's rounding, what `parts` parts of x leave is at most u**parts |x|: once for a, once for
    b, and for the pairs of parts that are left out, parts - 1 of them. Float32 sums of the rest: 2**-24 for each of
    their terms.
    """
    a, b = a.double(), b.double()
    pairs = parts * (parts + 1) // 2
    bound = (2.0 ** (-8 * parts) * (parts + 1) + 2.0**-24 * pairs * a.shape[-1]) * (a.abs() @ b.abs())
    assert found.dtype == torch.float32
    assert found.shape == bound.shape
    assert bool(((found.double() - a @ b).abs() <= 2 * bound).all())


def orders(x: Tensor) -> list[Tensor]:
    """x, contiguous, as a transposed view, and as a part of a larger tensor."""
    larger = torch.full((*x.shape[:-2], x.shape[-2] + 3, x.shape[-1] + 5), torch.nan)
    larger[..., 1:-2, 2:-3] = x
    return [x, x.mT.contiguous().mT, larger[..., 1:-2, 2:-3]]


@shapes
def test_matmul(shape):
    m, k, n = shape
    for a in orders(numbers(m, k)):
        for b in orders(numbers(k, n, seed=1)):
            assert_product(products.matmul(a, b), a, b)


def test_batches():
    a, b = numbers(3, 40, 70), numbers(3, 70, 50, seed=1)
    for left, right in ((a, b), (a[0], b[0]), (a[:1], b[:1]), (a[:0], b[:0]), (a[..., :0], b[:, :0])):
        assert_product(products.matmul(left, right), left, right)


def test_two_parts_are_as_accurate_as_that():
    """Of the whole, by the norm: with one part it would be 2e-3, and it is not better than two parts can be."""
    a, b = numbers(3, 40, 70, even=True), numbers(70, 50, even=True)
    exact = a.double() @ b.double()
    error = float((products.matmul(a, b.expand(3, -1, -1)).double() - exact).norm() / exact.norm())
    assert 1e-5 / 50 < error < 1e-5


@shapes
def test_products_of_parts(shape):
    m, k, n = shape
    for a in orders(numbers(2, m, k)):
        for parts, whole in ((SplitBF16.of(a), a), (SplitBF16.of(a).mT, a.mT)):
            assert parts.shape == whole.shape
            for thin in (numbers(2, whole.shape[2], n, seed=1), numbers(whole.shape[2], n, seed=2)):
                for b in orders(thin):
                    assert_product(products.matmul(parts, b), whole, b)
                    assert products.matmul(parts, b).is_contiguous()
            for thin in (numbers(2, n, whole.shape[1], seed=1), numbers(n, whole.shape[1], seed=2)):
                for b in orders(thin):
                    assert_product(products.matmul(b, parts), b, whole)
                    assert products.matmul(b, parts).is_contiguous()


@shapes
def test_products_of_matrices_that_lie_apart(shape):
    m, k, n = shape
    for a in orders(numbers(2, m, k)):
        apart = SeparateMatrices(a.unbind())
        assert apart.shape == a.shape
        for b in (numbers(2, k, n, seed=1), numbers(k, n, seed=2)):
            for thin in orders(b):
                assert_product(products.matmul(apart, thin), a, thin)
        for b in (numbers(2, n, m, seed=1), numbers(n, m, seed=2)):
            for thin in orders(b):
                assert_product(products.matmul(thin, apart), thin, a)
                assert torch.equal(products.rough_matmul(thin, apart), products.matmul(thin, apart))
    assert_product(products.matmul(apart[[1]], numbers(k, n)), a[1:], numbers(k, n))


def test_rough_products_are_of_one_part():
    a, b = numbers(3, 40, 70, even=True), numbers(70, 50, even=True)
    for parts, whole in ((SplitBF16.of(a), a), (SplitBF16.of(a.mT.contiguous()).mT, a)):
        for found, exact in (
            (products.rough_matmul(parts, b), whole.double() @ b.double()),
            (products.rough_matmul(b.mT, parts.mT), b.mT.double() @ whole.mT.double()),
        ):
            assert found.dtype == torch.float32
            assert 1e-2 / 50 < float((found.double() - exact).norm() / exact.norm()) < 1e-2
    assert torch.equal(products.rough_matmul(a[0], b), products.matmul(a[0], b))


def test_parts_of_separate_matrices():
    matrices = [numbers(30, 20, seed=i) for i in range(3)]
    workspace = torch.empty(4, 30, 20)
    parts = SplitBF16.stacked(matrices, workspace)
    whole = torch.stack(matrices)
    assert parts.first.untyped_storage().data_ptr() == workspace.untyped_storage().data_ptr()
    assert torch.equal(parts.first, SplitBF16.of(whole).first)
    assert torch.equal(parts.second, SplitBF16.of(whole).second)
    some = [2, 0]
    assert_product(products.matmul(parts[some], numbers(20, 5)), whole[some], numbers(20, 5))


@shapes
def test_the_result_is_written_where_it_belongs(shape):
    m, k, n = shape
    a, b = numbers(m, k), numbers(k, n, seed=1)
    before = a.clone(), b.clone()
    for memory in (torch.full((m + 2, n + 2), torch.nan), torch.full((n + 2, m + 2), torch.nan).mT):
        out = memory[1:-1, 1:-1]
        products.matmul_(out, a, b)
        assert_product(out, a, b)
        assert int(memory.isnan().sum()) == memory.numel() - out.numel()
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])


@pytest.mark.parametrize(("rows", "n"), [([70], 40), ([70, 33, 1], 40), ([5], 90), ([1], 1)])
def test_gram(rows, n):
    w = numbers(sum(rows), n)
    for gram in (torch.full((n, n), torch.nan), torch.full((n, 2 * n), torch.nan)[:, :n]):
        products.gram_(gram[None], w[None].split(rows, 1))
        assert_product(gram, w.mT, w, parts=3)
        assert torch.equal(gram, gram.mT)
    w = numbers(sum(rows), n, even=True)
    products.gram_(gram[None], w[None].mT.contiguous().mT.split(rows, 1))
    exact = w.double().mT @ w.double()
    assert float((gram.double() - exact).norm() / exact.norm()) < 5e-7
    if n == 40:
        assert float((gram.double() - exact).norm() / exact.norm()) > 5e-7 / 50


def test_float64_and_the_cpu_are_not_split(monkeypatch):
    if torch.get_default_device().type != "cpu":
        pytest.skip("is about the CPU")
    a, b = numbers(20, 30), numbers(30, 10)
    assert torch.equal(products.matmul(a.double(), b.double()), a.double() @ b.double())
    monkeypatch.undo()
    assert torch.equal(products.matmul(a, b), a @ b)
    out = torch.empty(20, 10)
    products.matmul_(out, a, b)
    assert torch.equal(out, torch.mm(a, b))
