"""masked_linear_grad and masked_embedding_grad against float64, the same tests for every implementation.

The oracle is a dense float64 product (or sum of rows), of which plain indexing with the boolean mask takes the entries.
Bounds on the error are derived, not chosen: a sum of N rounded terms in any order is off by at most (N + 2) u times the
sum of their magnitudes, with u half the spacing of float32 (float64) numbers, and the result is rounded once more to
its own dtype. Rows and columns without entries hold NaN and infinities, which must go nowhere.
"""

import importlib
import itertools
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import deftx_kernels  # noqa: F401  (registers the operators)
from deftx_kernels.ops import library, reference

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "reference",
    "c++",
    pytest.param("triton-sm80", marks=pytest.mark.cuda_on_cpu),
    pytest.param("gpu", marks=pytest.mark.gpu),
]
# the variable decides what `triton.jit` makes, so this backend has a process to itself: see the last test
if INTERPRETED:
    from triton.runtime import interpreter

    BACKENDS = ["triton-interpreter"]
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_range(tensor, scope):
        """Triton 3.6 makes an int of arrays of one element, for `range`; NumPy 2.4 refuses that."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_range
only_cpp = pytest.mark.parametrize("backend", ["c++"], indirect=True)
only_triton = pytest.mark.parametrize("backend", BACKENDS if INTERPRETED else BACKENDS[2:3], indirect=True)
only_triton_or_gpu = pytest.mark.parametrize("backend", BACKENDS if INTERPRETED else BACKENDS[2:], indirect=True)

pytestmark = pytest.mark.usefixtures("one_thread")


class Backend(NamedTuple):
    """The operators on CPU tensors: `backend.masked_linear_grad(grad_output, input, crow_indices, col_indices, dtype)`."""

    name: str
    tool: Any = None
    launches: list | None = None  # of the last call, where `name` is "triton-sm80"
    racecheck: bool = True  # of the emulated kernels: takes most of their time

    def needs(self, *dtypes: torch.dtype) -> None:
        if self.name == "triton-interpreter" and not all(d in (FP32, FP64) for d in dtypes):
            pytest.skip("Triton's interpreter gets 16-bit products wrong")

    def __getattr__(self, op: str):
        def run(*arguments):
            if self.name == "reference":
                return getattr(reference, op)(*arguments)
            if self.name == "c++":
                return getattr(torch.ops.deftx, op)(*arguments)
            if self.name == "gpu":
                result = getattr(torch.ops.deftx, op)(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
                assert result.is_cuda
                return result.cpu()
            function = getattr(importlib.import_module(f"deftx_kernels.kernels.{op}"), op)
            if self.name == "triton-interpreter":
                return function(*arguments)
            with self.tool.override(racecheck=self.racecheck) as log:
                result = function(*arguments)
            self.launches[:] = log
            return result

        return run


# Of the session, so that hypothesis may call a test many times with one backend.
@pytest.fixture(scope="session", params=BACKENDS)
def backend(request) -> Backend:
    if request.param == "c++":
        serving = {library.backends()[op]["cpu"].name for op in ("masked_linear_grad", "masked_embedding_grad")}
        if serving != {"c++"}:
            pytest.skip(f"served by {', '.join(sorted(serving))}")
    if request.param.startswith("triton"):
        pytest.importorskip("triton")
    if request.param == "triton-sm80":
        tool = request.getfixturevalue("cuda_on_cpu")
        return Backend(request.param, importlib.import_module(f"{tool.__name__}.triton_on_cpu"), [])
    return Backend(request.param)


def csr(mask: Tensor, wide: bool = False) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices of a bool matrix."""
    crow = torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return crow, mask.nonzero()[:, 1].to(torch.int32 if wide or mask.shape[1] > 65_536 else torch.uint16)


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density


def half_spacing(*dtypes: torch.dtype) -> float:
    return 2.0**-53 if FP64 in dtypes else 2.0**-24


def rounded_to(want: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to `dtype` may add, subnormal numbers included."""
    info = torch.finfo(dtype)
    return want.abs() * (info.eps / 2) + info.smallest_normal * info.eps / 2


def assert_within(got: Tensor, want: Tensor, bound: Tensor) -> None:
    excess = (got.double() - want).abs() - bound
    assert not excess.isnan().any()
    assert (excess <= 0).all(), (
        f"{int((excess > 0).sum())} of {len(want)} entries, the worst {float(excess.max()):.1e} beyond its bound"
    )


# ---- masked_linear_grad ----
class Linear:
    """Random tokens, and a mask of [m, n]."""

    def __init__(
        self, tokens: int, mask: Tensor, grad_dtype=BF16, input_dtype=None, *, wide=False, clean=False
    ) -> None:
        generator = torch.Generator().manual_seed(tokens + 7 * mask.shape[0] + 31 * mask.shape[1])
        self.mask = mask
        self.grad_output = torch.randn(tokens, mask.shape[0], generator=generator, dtype=FP64).to(grad_dtype)
        self.input = torch.randn(tokens, mask.shape[1], generator=generator, dtype=FP64).to(input_dtype or grad_dtype)
        if not clean:
            self.grad_output[:, ~mask.any(1)] = torch.nan
            self.input[:, ~mask.any(0)] = torch.inf
        self.crow, self.col = csr(mask, wide)

    def run(self, backend: Backend, dtype: torch.dtype) -> Tensor:
        return backend.masked_linear_grad(self.grad_output, self.input, self.crow, self.col, dtype)

    def entries(self, magnitudes: bool = False) -> Tensor:
        """float64 [nnz]"""
        g, x = (t.double().nan_to_num(0, 0, 0) for t in (self.grad_output, self.input))
        return ((g.abs().T @ x.abs()) if magnitudes else g.T @ x)[self.mask]

    def check(self, backend: Backend, dtype: torch.dtype = FP32, product: float | None = None) -> Tensor:
        """`product`: the error of one product, relative to it, where that is not the compute dtype's."""
        before = self.grad_output.clone(), self.input.clone()
        got = self.run(backend, dtype)
        assert got.dtype == dtype
        assert got.shape == self.col.shape
        want = self.entries()
        # Of the compute dtype; 4 because tensor cores cut off where others round, and inputs of a wider dtype are
        # rounded to it.
        bound = self.entries(magnitudes=True) * (4 * (len(self.input) + 2) * half_spacing(dtype) + (product or 0))
        assert_within(got, want, bound + rounded_to(want.abs() + bound, dtype))
        assert all(
            torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, (self.grad_output, self.input))
        )
        return got


# (tokens, rows, columns, density). The Triton kernel's tile has 128 rows, 128 columns and 64 tokens, for float32 128,
# 64 and 32.
SHAPES = {
    "one entry": (1, 1, 1, 1.0),
    "one row": (5, 1, 300, 0.3),
    "one column": (7, 130, 1, 0.5),
    "one tile": (64, 128, 128, 0.1),
    "one less": (63, 127, 127, 0.1),
    "one more": (65, 129, 129, 0.1),
    "one step": (32, 16, 32, 0.3),
    "many tokens": (301, 20, 40, 0.3),
    "every entry": (33, 70, 140, 1.0),
    "every entry of long rows": (3, 2, 700, 1.0),
    "nearly every entry": (10, 20, 400, 0.97),
    "two groups of tiles": (3, 1100, 130, 0.02),
    "mostly empty tiles": (4, 300, 300, 0.0002),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_every_shape(backend, name, dtype):
    if backend.name == "triton-sm80" and dtype == FP32:
        pytest.skip("takes long; test_triton_interpreter has them")
    tokens, rows, columns, density = SHAPES[name]
    backend.needs(dtype)
    Linear(tokens, random_mask(rows, columns, density), dtype).check(backend)


@pytest.mark.parametrize(
    "dtypes",  # of grad_output, the input and the result
    [(BF16, BF16, BF16), (FP16, FP16, FP32), (FP16, FP16, FP16), (FP64, FP64, FP64), (BF16, FP32, FP32), (FP16, BF16, FP32),
     (FP64, FP32, FP32), (BF16, BF16, FP64), (FP32, FP32, BF16)],
    ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes),
)  # fmt: skip
@pytest.mark.parametrize("density", [0.15, 0.7])
def test_every_dtype(backend, dtypes, density):
    if backend.name.startswith("triton") and density > 0.5:
        pytest.skip("has one way for all densities")
    *inputs, dtype = dtypes
    backend.needs(*dtypes)
    Linear(70, random_mask(130, 35, density), *inputs).check(backend, dtype)


def test_entries_at_the_borders(backend):
    """Of words of 32 columns, of tiles and of the matrix."""
    mask = torch.zeros(257, 290, dtype=torch.bool)
    for row, column in itertools.product(
        (0, 1, 127, 128, 255, 256), (0, 31, 32, 63, 64, 95, 96, 127, 128, 159, 255, 256, 289)
    ):
        mask[row, column] = True
    Linear(9, mask, FP32).check(backend)


def test_rows_of_every_kind(backend):
    """No entry, one, all, those of one tile; rows that end before a tile and rows that begin after it; the same columns
    twice.
    """
    mask = torch.zeros(11, 300, dtype=torch.bool)
    mask[1, 299] = mask[3, 0] = True
    mask[4] = True
    mask[6, 128:256] = True
    mask[7, :128] = True
    mask[8, 256:] = True
    mask[9] = mask[10] = random_mask(1, 300, 0.2)[0]
    Linear(40, mask, FP32).check(backend)
    Linear(40, mask[4:5], FP32).check(backend)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_int32_columns(backend, dtype):
    backend.needs(dtype)
    Linear(20, random_mask(40, 150, 0.2), dtype, wide=True).check(backend)


def test_more_than_65536_columns(backend):
    if backend.name == "triton-interpreter":
        pytest.skip("takes long")
    mask = torch.zeros(2, 66_000, dtype=torch.bool)
    mask[0, [0, 127, 128, 65_535, 65_536, 65_999]] = True
    mask[1, 65_500:65_900:3] = True
    Linear(3, mask, FP32).check(backend._replace(racecheck=False))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_no_entries_and_no_tokens(backend, dtype):
    """Zeros, of the right size, for an empty sum."""
    assert Linear(5, torch.zeros(4, 6, dtype=torch.bool), FP32).run(backend, dtype).shape == (0,)
    got = Linear(0, random_mask(9, 20, 0.5), FP32).run(backend, dtype)
    assert got.dtype == dtype
    assert torch.equal(got, torch.zeros(len(got), dtype=dtype))
    assert len(got) > 0


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_no_rows_or_columns(backend, shape):
    assert Linear(3, torch.zeros(shape, dtype=torch.bool), FP32).run(backend, FP32).shape == (0,)


def test_tokens_in_which_nothing_happens_change_nothing(backend):
    """Zeros behind the tokens, as padding of a batch has them, change nothing but the order of the sum."""
    case = Linear(64, random_mask(20, 30, 0.3), FP32)
    got = case.run(backend, FP32)
    padded = [torch.cat([t, torch.zeros(7, t.shape[1])]).nan_to_num(0, 0, 0) for t in (case.grad_output, case.input)]
    bound = case.entries(magnitudes=True) * 8 * 73 * 2.0**-24
    assert_within(backend.masked_linear_grad(*padded, case.crow, case.col, FP32), got.double(), bound)


def test_nan_and_infinities_reach_their_own_row_and_column_only(backend):
    mask = random_mask(20, 40, 0.5)
    case = Linear(30, mask, FP32, clean=True)
    before = case.run(backend, FP32)
    case.grad_output[7, 3] = torch.nan
    case.input[29, 39] = torch.inf
    touched = torch.zeros_like(mask)
    touched[3] = touched[:, 39] = True
    got = case.run(backend, FP32)
    assert not got[touched[mask]].isfinite().any()
    assert torch.equal(got[~touched[mask]], before[~touched[mask]])


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_the_same_call_gives_the_same_bits(backend, dtype):
    backend.needs(dtype)
    case = Linear(150, random_mask(140, 60, 0.2), dtype)
    first = case.run(backend, FP32)
    case.grad_output, case.input = case.grad_output.clone(), case.input.clone()
    assert torch.equal(first, case.run(backend, FP32))


def with_threads(threads: int, function):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@only_cpp
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("density", [0.05, 0.9])
def test_threads_do_not_matter(backend, dtype, density):
    case = Linear(300, random_mask(500, 200, density), dtype)
    result = torch.promote_types(dtype, FP32)
    results = [with_threads(threads, lambda: case.run(backend, result)) for threads in (1, 2, 3, 7)]
    assert all(torch.equal(results[0], r) for r in results[1:])
    case.check(backend, result)


@st.composite
def masks(draw) -> Tensor:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 70))
    bits = draw(st.lists(st.integers(0, 2**columns - 1), min_size=rows, max_size=rows))
    return torch.tensor([[b >> j & 1 for j in range(columns)] for b in bits], dtype=torch.bool)


def drawn(backend: Backend, test) -> None:
    """Runs hypothesis, with fewer examples for the slow ones."""
    examples = 100 if backend.name in ("reference", "c++") else 8
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.nested_given]
    settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=checks)(test)()


def test_any_small_mask(backend):
    @given(masks(), st.integers(0, 70))
    def test(mask, tokens):
        Linear(tokens, mask, FP32).check(backend)

    drawn(backend, test)


# What is wrong -> case -> arguments of the operator but the dtype.
WRONG_LINEAR = {
    "crow too short": lambda c: (c.grad_output, c.input, c.crow[:-1], c.col),
    "crow too long": lambda c: (c.grad_output, c.input, torch.cat([c.crow, c.crow[-1:]]), c.col),
    "crow ends early": lambda c: (c.grad_output, c.input, torch.cat([c.crow[:-1], c.crow[-1:] - 1]), c.col),
    "crow ends late": lambda c: (c.grad_output, c.input, torch.cat([c.crow[:-1], c.crow[-1:] + 1]), c.col),
    "crow descends": lambda c: (c.grad_output, c.input, c.crow[[0, 3, 2, 1, *range(4, len(c.crow))]], c.col),
    "column too large": lambda c: (c.grad_output, c.input[:, :-1].contiguous(), c.crow, c.col),
    "columns descend": lambda c: (c.grad_output, c.input, c.crow, c.col.to(torch.int32).flip(0)),
    "negative column": lambda c: (c.grad_output, c.input, c.crow, c.col.to(torch.int32) - 1),
    "tokens differ": lambda c: (c.grad_output, c.input[1:].contiguous(), c.crow, c.col),
    "integers": lambda c: (c.grad_output.int(), c.input.int(), c.crow, c.col),
    "not a matrix": lambda c: (c.grad_output, c.input.view(-1), c.crow, c.col),
}


@only_cpp
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("wrong", WRONG_LINEAR)
def test_bad_arguments_raise(backend, wrong, density):
    mask = random_mask(10, 20, density)
    mask[:, [0, -1]] = True
    case = Linear(8, mask, FP32, clean=True)
    with pytest.raises(RuntimeError, match=r"must|has|dtype"):
        torch.ops.deftx.masked_linear_grad(*WRONG_LINEAR[wrong](case), FP32)


# ---- of the Triton kernel alone


@only_triton
@pytest.mark.parametrize(
    ("tokens", "dtypes"), [(130, (BF16, FP32)), (190, (BF16, BF16)), (100, (FP32, FP32)), (50, (FP64, FP64))]
)
@pytest.mark.parametrize("parts", [2, 3])
def test_tokens_in_parts(backend, monkeypatch, tokens, dtypes, parts):
    """Of 3 steps, 2 parts leave the last one shorter; of 4 steps, 3 parts come to 2."""
    backend.needs(*dtypes)
    from deftx_kernels.kernels import masked_linear_grad as module

    monkeypatch.setattr(module, "_splits", lambda *_: parts)
    case = Linear(tokens, random_mask(140, 40, 0.3), dtypes[0])
    got = case.check(backend, dtypes[1])
    if backend.name == "triton-sm80":
        steps = -(-tokens // module.TILES[dtypes[0].itemsize][2])
        each = -(-steps // parts)
        assert backend.launches[0][1] == (2, -(-steps // each), 1)
        assert len(backend.launches) == 2
    assert torch.equal(got, case.run(backend, dtypes[1]))


@only_triton
def test_more_parts_than_one_program_sums(backend, monkeypatch):
    """Partial sums of more entries than a program of the second launch has."""
    from deftx_kernels.kernels import masked_linear_grad as module

    monkeypatch.setattr(module, "_splits", lambda *_: 2)
    case = Linear(33, torch.ones(30, 50, dtype=torch.bool), FP32)
    assert len(case.col) > module.SUM_BLOCK
    case.check(backend)


def test_how_many_parts():
    pytest.importorskip("triton")
    from deftx_kernels.kernels.masked_linear_grad import _splits

    assert _splits(1, 1, 1, 132) == 1
    assert _splits(1024, 32, 32, 132) == 1  # 4096 x 4096: enough tiles
    assert _splits(36, 32, 32, 132) == 3  # 768 x 768: of 132 multiprocessors, 108 instead of 36
    assert 10 <= _splits(9, 256, 132, 132) <= 14  # 384 x 384, 16384 tokens
    for tiles, steps, most in itertools.product((1, 7, 36, 144, 500), (1, 2, 9, 100), (1, 2, 50)):
        assert 1 <= _splits(tiles, steps, min(most, steps), 132) <= most


@contextmanager
def tf32_allowed():
    flags = torch.backends.cuda.matmul
    before, flags.fp32_precision = flags.fp32_precision, "tf32"
    try:
        yield 2.0**-9  # how far a product may be off: each factor is cut to 11 bits
    finally:
        flags.fp32_precision = before


@only_triton
def test_tf32_where_torch_allows_it(backend):
    case = Linear(70, random_mask(130, 35, 0.3), FP32)
    with tf32_allowed() as error:
        got = case.check(backend, product=error)
    assert torch.equal(got, case.check(backend)) == INTERPRETED


@only_triton
def test_offsets_beyond_31_bits(backend):
    """9 GB of address space, of which a few pages are touched: tokens of the first step and of the second begin beyond
    2**31.
    """
    if backend.name == "triton-interpreter":
        pytest.skip("reads what it is not shown")
    from deftx_kernels.kernels import masked_linear_grad as module

    tokens, stride = 70, 2**26
    x = torch.empty(tokens, stride, dtype=BF16)
    x[:, :128] = torch.randn(tokens, 128)
    mask = random_mask(3, 128, 0.3)
    case = Linear(tokens, mask, clean=True)
    case.input = x[:, :128]
    block_m, block_n, block_k = module.TILES[2]
    out = torch.empty(len(case.col))
    with backend.tool.override():
        module._masked_linear_grad_kernel[(1,)](
            module._operand(case.grad_output, BF16), x, case.crow, case.col, out, tokens, 3, 16, stride, tokens, len(out),
            ACC=module.TRITON_DTYPE[FP32], PRECISION="ieee", BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=module.GROUP,
            WAYS=module.WAYS, CHUNK=module.CHUNK, num_warps=module.NUM_WARPS, num_stages=module.NUM_STAGES,
        )  # fmt: skip
    assert_within(out, case.entries(), case.entries(magnitudes=True) * 4 * (tokens + 2) * 2.0**-24)


def test_too_large_a_matrix_is_refused():
    pytest.importorskip("triton")
    from deftx_kernels.kernels.masked_linear_grad import masked_linear_grad

    wide = torch.empty(1, 2**24)
    with pytest.raises(ValueError, match="too large"):
        masked_linear_grad(torch.empty(1, 1), wide, torch.tensor([0, 1]), torch.tensor([5], dtype=torch.int32), FP32)


# ---- masked_embedding_grad ----
class Embedding:
    """Gradients of tokens, their indices, and a mask of [vocabulary, d]."""

    def __init__(self, indices: Tensor, mask: Tensor, dtype=FP32, padding_idx=-1, *, wide=False) -> None:
        generator = torch.Generator().manual_seed(len(indices) + 7 * mask.shape[0] + 31 * mask.shape[1])
        self.indices, self.mask, self.padding_idx = indices, mask, padding_idx
        self.grad_output = torch.randn(len(indices), mask.shape[1], generator=generator, dtype=FP64).to(dtype)
        self.grad_output[:, ~mask.any(0)] = torch.nan
        self.grad_output[(indices == padding_idx) | ~mask.any(1)[indices.long()]] = torch.inf
        self.crow, self.col = csr(mask, wide)

    def run(self, backend: Backend, dtype: torch.dtype) -> Tensor:
        return backend.masked_embedding_grad(
            self.grad_output, self.indices, self.crow, self.col, self.padding_idx, dtype
        )

    def entries(self, magnitudes: bool = False) -> Tensor:
        """float64 [nnz]"""
        g = self.grad_output.double().nan_to_num(0, 0, 0)
        return torch.zeros(self.mask.shape, dtype=FP64).index_add_(0, self.indices, g.abs() if magnitudes else g)[
            self.mask
        ]

    def check(self, backend: Backend, dtype: torch.dtype = FP32) -> Tensor:
        before = self.grad_output.clone(), self.indices.clone()
        got = self.run(backend, dtype)
        assert got.dtype == dtype
        assert got.shape == self.col.shape
        want = self.entries()
        count = torch.bincount(self.indices, minlength=len(self.mask))[self.mask.nonzero()[:, 0]]
        bound = self.entries(magnitudes=True) * (count + 2) * half_spacing(dtype)
        assert_within(got, want, bound + rounded_to(want.abs() + bound, dtype))
        untouched = (count == 0) | (self.mask.nonzero()[:, 0] == self.padding_idx)
        assert not got[untouched].any()
        assert torch.equal(before[0].nan_to_num(7), self.grad_output.nan_to_num(7))
        assert torch.equal(before[1], self.indices)
        return got


def tokens_of(vocabulary: int, count: int, seed: int = 0) -> Tensor:
    """Word frequencies: a few words are most of the text."""
    chance = 1 / torch.arange(1, vocabulary + 1, dtype=FP64)
    return torch.multinomial(chance, count, replacement=True, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 127, 128, 129, 500])
def test_every_number_of_tokens(backend, count):
    """The Triton kernel's stretches have 64 positions."""
    Embedding(tokens_of(20, count), random_mask(20, 30, 0.4)).check(backend)


@pytest.mark.parametrize(
    "dtypes", [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32), (FP64, FP64), (BF16, FP64), (FP32, BF16)],
    ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes),
)  # fmt: skip
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_every_dtype_of_gradients_and_indices(backend, dtypes, index):
    backend.needs(*dtypes)
    Embedding(tokens_of(20, 150).to(index), random_mask(20, 30, 0.4), dtypes[0]).check(backend, dtypes[1])


@pytest.mark.parametrize("count", [64, 100, 1100, 5000])
def test_all_tokens_equal(backend, count):
    if backend.name.startswith("triton") and count > 2000:
        pytest.skip("takes long")
    Embedding(torch.full((count,), 3), random_mask(5, 40, 0.5)).check(backend)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_two_words_among_many(backend, dtype):
    """Each more often than a stretch is long, with rare ones before, between and after them."""
    indices = torch.cat([torch.full((150,), 4), torch.full((300,), 8), torch.arange(12)])
    indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]
    backend.needs(dtype)
    Embedding(indices, random_mask(12, 50, 0.6), dtype).check(backend)


@pytest.mark.parametrize("padding_idx", [-1, 0, 3, 5])
def test_padding(backend, padding_idx):
    indices = torch.cat([torch.full((200,), max(padding_idx, 0)), tokens_of(6, 100)])
    case = Embedding(indices[torch.randperm(300, generator=torch.Generator().manual_seed(0))], random_mask(6, 20, 0.6))
    case.padding_idx = padding_idx
    got = case.run(backend, FP32)
    row = case.mask.nonzero()[:, 0]
    want = case.entries()
    if padding_idx >= 0:
        assert want[row == padding_idx].any()
        want = torch.where(row == padding_idx, 0, want)
    assert_within(got, want, (case.entries(magnitudes=True) + 1e-30) * 302 * 2.0**-24)
    assert not got[row == padding_idx].any()


def test_all_tokens_padding(backend):
    case = Embedding(torch.full((130,), 2), random_mask(4, 20, 0.6), padding_idx=2)
    assert not case.check(backend).any()


def test_rows_without_entries_and_the_last_row(backend):
    mask = random_mask(9, 25, 0.5)
    mask[[0, 3, 4]] = False
    mask[8] = True
    Embedding(torch.tensor([8, 0, 3, 8, 4, 1, 8]), mask).check(backend)
    mask[8] = False
    Embedding(torch.tensor([8, 0, 3, 8, 4, 1, 8]), mask).check(backend)


@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("count", [50, 150])
def test_long_rows(backend, density, count):
    """More entries than the Triton kernel takes at a time: in all rows, and in two that are much longer than the mean."""
    mask = random_mask(30, 300, density)
    mask[[1, 4]] = True
    Embedding(tokens_of(30, count), mask).check(backend)


def test_one_row_and_one_column(backend):
    Embedding(torch.zeros(70, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)).check(backend)
    Embedding(torch.zeros(3, dtype=torch.int64), random_mask(1, 200, 0.5)).check(backend)


def test_int32_columns_of_embeddings(backend):
    Embedding(tokens_of(4, 20), random_mask(4, 30, 0.5), wide=True).check(backend)
    mask = torch.zeros(3, 66_000, dtype=torch.bool)
    mask[:, [0, 65_535, 65_536, 65_999]] = True
    Embedding(torch.tensor([2, 0, 2]), mask).check(backend)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_no_tokens_and_no_entries_of_embeddings(backend, index):
    got = Embedding(torch.zeros(0, dtype=index), random_mask(4, 30, 0.5), BF16).run(backend, BF16)
    assert got.dtype == BF16
    assert len(got) > 0
    assert not got.any()
    assert Embedding(torch.zeros(3, dtype=index), torch.zeros(4, 30, dtype=torch.bool)).run(backend, FP32).shape == (0,)


def test_the_same_embedding_gradient_in_every_run(backend):
    case = Embedding(tokens_of(10, 400), random_mask(10, 40, 0.5))
    first = case.run(backend, FP32)
    assert torch.equal(first, case.run(backend, FP32))
    if backend.name == "c++":
        results = [with_threads(threads, lambda: case.run(backend, FP32)) for threads in (1, 2, 3, 7)]
        assert all(torch.equal(first, r) for r in results)


def test_any_small_embedding(backend):
    @given(masks(), st.data())
    def test(mask, data):
        index = st.integers(0, len(mask) - 1)
        indices = torch.tensor(data.draw(st.lists(index, max_size=150)), dtype=torch.int64)
        Embedding(indices, mask, padding_idx=data.draw(st.one_of(st.just(-1), index))).check(backend)

    drawn(backend, test)


WRONG_EMBEDDING = {
    "index too large": (lambda c: (c.grad_output, c.indices + 1, c.crow, c.col), "indices"),
    "negative index": (lambda c: (c.grad_output, c.indices - 1, c.crow, c.col), "indices"),
    "tokens differ": (lambda c: (c.grad_output[1:].contiguous(), c.indices, c.crow, c.col), "grad_output"),
    "column too large": (lambda c: (c.grad_output[:, :-1].contiguous(), c.indices, c.crow, c.col), "col_indices"),
    "negative column": (lambda c: (c.grad_output, c.indices, c.crow, c.col.to(torch.int32) - 1), "col_indices"),
    "crow ends late": (
        lambda c: (c.grad_output, c.indices, torch.cat([c.crow[:-1], c.crow[-1:] + 1]), c.col),
        "crow_indices",
    ),
    "crow too short": (lambda c: (c.grad_output, c.indices, c.crow[:-1], c.col), "indices"),
    "crow descends": (lambda c: (c.grad_output, c.indices, c.crow[[0, 3, 2, 1, 4, 5]], c.col), "crow_indices"),
    "floating indices": (lambda c: (c.grad_output, c.indices.float(), c.crow, c.col), "indices"),
    "not a matrix": (lambda c: (c.grad_output.view(-1), c.indices, c.crow, c.col), "grad_output"),
}


@only_cpp
@pytest.mark.parametrize("wrong", WRONG_EMBEDDING)
def test_bad_arguments_of_embeddings_raise(backend, wrong):
    arguments, named = WRONG_EMBEDDING[wrong]
    case = Embedding(torch.tensor([0, 3, 4, 1, 2]), torch.ones(5, 20, dtype=torch.bool))
    with pytest.raises((RuntimeError, IndexError), match=named):
        torch.ops.deftx.masked_embedding_grad(*arguments(case), -1, FP32)


# ---- of the Triton kernel alone


@only_triton_or_gpu
def test_indices_outside_the_vocabulary_are_left_out(backend):
    """Forward has stopped at them already; here nothing may be read or written in their place."""
    case = Embedding(torch.tensor([4, 0, 4, 2]), torch.ones(5, 20, dtype=torch.bool))
    got = case.run(backend, FP32)
    case.indices = torch.tensor([4, 0, 4, 2, 5, 5, -3, 2**40, *[-7] * 100])
    case.grad_output = torch.cat([case.grad_output, torch.ones(104, 20)])
    assert torch.equal(case.run(backend, FP32), got)


@only_triton
def test_offsets_of_embeddings_beyond_31_bits(backend):
    """7 GB of address space, of which a few pages are touched: the last of 200 tokens begins at an element beyond
    2**31.
    """
    tokens, d = 200, 2**24
    case = Embedding(torch.zeros(tokens, dtype=torch.int64), random_mask(1, 100, 0.3))
    gradients, case.grad_output = case.grad_output, torch.empty(tokens, d)
    case.grad_output[:, :100] = gradients
    got = case.run(backend, FP32)
    case.grad_output = gradients
    assert_within(got, case.entries(), case.entries(magnitudes=True) * 202 * 2.0**-24)


# ---- on a GPU ----
@pytest.mark.gpu
@pytest.mark.parametrize("dtypes", [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32), (FP64, FP64)], ids=str)
@pytest.mark.parametrize("shape", [(2048, 768, 768), (16_384, 384, 384), (1000, 3072, 768), (777, 1111, 999)], ids=str)
def test_matrices_of_many_tiles(dtypes, shape):
    tokens, rows, columns = shape
    case = Linear(tokens, random_mask(rows, columns, 0.1), dtypes[0])
    got = case.check(Backend("gpu"), dtypes[1])
    assert torch.equal(got, case.run(Backend("gpu"), dtypes[1]))


@pytest.mark.gpu
def test_tf32_on_the_gpu():
    with tf32_allowed() as error:
        Linear(500, random_mask(700, 300, 0.1), FP32).check(Backend("gpu"), product=error)


@pytest.mark.gpu
def test_embeddings_of_many_tokens():
    indices = tokens_of(5000, 16_384)
    for dtype in (BF16, FP32):
        case = Embedding(indices, random_mask(5000, 768, 0.1), dtype)
        got = case.check(Backend("gpu"))
        assert torch.equal(got, case.run(Backend("gpu"), FP32))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    linear = Linear(2000, random_mask(300, 200, 0.1), BF16)
    embedding = Embedding(tokens_of(50, 2000), random_mask(50, 200, 0.1), BF16)
    on_gpu = [
        [t.cuda() for t in (x.grad_output, y, x.crow, x.col)]
        for x, y in ((linear, linear.input), (embedding, embedding.indices))
    ]

    def both() -> list[Tensor]:
        first = torch.ops.deftx.masked_linear_grad(*on_gpu[0], FP32)
        return [first, torch.ops.deftx.masked_embedding_grad(*on_gpu[1], -1, FP32)]

    first = both()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_interpreter():
    """The same tests once more, with the kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton-interpreter", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
