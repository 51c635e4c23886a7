"""masked_linear_grad against a dense float64 product, the same tests for every implementation.

Error bounds are derived: a sum of N rounded terms in any order is off by at most (N + 2) u times the sum of their
magnitudes, with u half the spacing of float32 (float64) numbers, and the result is rounded once more to its own dtype.
Rows and columns without entries hold NaN and infinities, which must not reach a result.
"""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import INTERPRETED, implementations
from tests.nn.gradient_checks import (
    BF16,
    BROKEN_CSR,
    FP32,
    FP64,
    assert_within,
    random_mask,
    results_by_threads,
    run_examples,
    skip_unsupported,
    small_masks,
)
from tests.nn.linear_case import Case, all_dtypes, gpu_dtypes

OPS = ("masked_linear_grad",)
unchecked = pytest.mark.usefixtures("without_racecheck")
only_triton = implementations("triton-sm80", "triton-interpreter")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def without_racecheck(implementation):
    """For tests whose launches other tests of this file check for races."""
    with implementation.without_racecheck():
        yield


# (tokens, rows, columns, density). The Triton kernel's tile has 128 rows, 128 columns and 64 tokens; in float32 128,
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_shapes(implementation, shape, dtype):
    if implementation.name == "triton-sm80" and dtype == FP32:
        pytest.skip("slow; Triton's interpreter runs them")
    skip_unsupported(implementation, dtype)
    tokens, rows, columns, density = SHAPES[shape]
    case = Case(tokens, random_mask(rows, columns, density), dtype)
    races_checked = shape in ("one more", "every entry")  # several tiles of several steps; all the others launch alike
    with contextlib.nullcontext() if races_checked else implementation.without_racecheck():
        case.check(implementation)


@all_dtypes
@pytest.mark.parametrize("density", [0.15, 0.7])
def test_dtypes(implementation, dtypes, density):
    triton = implementation.name.startswith("triton")
    if triton and density > 0.5:
        pytest.skip("has one path for all densities")
    skip_unsupported(implementation, *dtypes)
    Case(70, random_mask(30 if triton else 130, 35, density), *dtypes[:2]).check(implementation, dtypes[2])


def test_entries_at_borders_of_words_tiles_and_the_matrix(implementation):
    mask = torch.zeros(257, 290, dtype=torch.bool)
    columns = (0, 31, 32, 63, 64, 95, 96, 127, 128, 159, 255, 256, 289)
    for row, column in itertools.product((0, 1, 127, 128, 255, 256), columns):
        mask[row, column] = True
    if implementation.name == "triton-sm80":
        mask = mask[:130, :160]  # two by three tiles
    Case(9, mask).check(implementation)


@unchecked
def test_row_lengths(implementation):
    """No entry, one, all, those of one tile; rows that end before a tile or begin after it; equal rows."""
    mask = torch.zeros(11, 300, dtype=torch.bool)
    mask[1, 299] = mask[3, 0] = True
    mask[4] = True
    mask[6, 128:256] = True
    mask[7, :128] = True
    mask[8, 256:] = True
    mask[9] = mask[10] = random_mask(1, 300, 0.2)[0]
    Case(40, mask).check(implementation)
    Case(40, mask[4:5]).check(implementation)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_int32_columns(implementation, dtype):
    skip_unsupported(implementation, dtype)
    Case(20, random_mask(40, 60, 0.2), dtype, int32=True).check(implementation)


@unchecked
def test_more_than_65536_columns(implementation):
    if implementation.name == "triton-interpreter":
        pytest.skip("slow")
    mask = torch.zeros(2, 66_000, dtype=torch.bool)
    mask[0, [0, 127, 128, 65_535, 65_536, 65_999]] = True
    mask[1, 65_500:65_900:3] = True
    Case(3, mask).check(implementation)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_empty_inputs(implementation, dtype):
    for shape in ((4, 6), (0, 5), (5, 0)):
        assert Case(5, torch.zeros(shape, dtype=torch.bool)).run(implementation, dtype).shape == (0,)
    got = Case(0, random_mask(9, 20, 0.5)).run(implementation, dtype)
    assert got.dtype == dtype
    assert len(got) > 0
    assert torch.equal(got, torch.zeros(len(got), dtype=dtype))


@unchecked
def test_tokens_of_zeros_change_nothing(implementation):
    """As padding at the end of a batch; only the order of the sum may change."""
    case = Case(64, random_mask(20, 30, 0.3))
    got = case.run(implementation)
    padded = [torch.cat([t, torch.zeros(7, t.shape[1])]).nan_to_num(0, 0, 0) for t in (case.grad_output, case.input)]
    bound = case.entries(magnitudes=True) * 8 * 73 * 2.0**-24
    assert_within(implementation.on_cpu("masked_linear_grad", *padded, *case.csr, FP32), got.double(), bound)


@unchecked
def test_nan_and_infinities_reach_their_own_row_and_column_only(implementation):
    mask = random_mask(20, 40, 0.5)
    case = Case(30, mask, clean=True)
    before = case.run(implementation)
    case.grad_output[7, 3] = torch.nan
    case.input[29, 39] = torch.inf
    touched = torch.zeros_like(mask)
    touched[3] = touched[:, 39] = True
    got = case.run(implementation)
    assert not got[touched[mask]].isfinite().any()
    assert torch.equal(got[~touched[mask]], before[~touched[mask]])


@unchecked
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_deterministic(implementation, dtype):
    skip_unsupported(implementation, dtype)
    case = Case(150, random_mask(140, 60, 0.2), dtype)
    first = case.run(implementation)
    case.grad_output, case.input = case.grad_output.clone(), case.input.clone()
    assert torch.equal(first, case.run(implementation))


@implementations("c++")
@pytest.mark.parametrize("dtype", [BF16, FP32, FP64], ids=str)
@pytest.mark.parametrize("density", [0.05, 0.9])
def test_number_of_threads_does_not_matter(implementation, dtype, density):
    case = Case(300, random_mask(500, 200, density), dtype)
    result_dtype = torch.promote_types(dtype, FP32)
    first = case.check(implementation, result_dtype)
    assert all(torch.equal(first, r) for r in results_by_threads(lambda: case.run(implementation, result_dtype)))


@unchecked
def test_small_masks(implementation):
    @given(small_masks(), st.integers(0, 70))
    def test(mask, tokens):
        Case(tokens, mask).check(implementation)

    run_examples(implementation, test)


WRONG_ARGUMENTS = {
    "column too large": lambda g, x, crow, col: (g, x[:, :-1].contiguous(), crow, col),
    "tokens differ": lambda g, x, crow, col: (g, x[1:].contiguous(), crow, col),
    "integers": lambda g, x, crow, col: (g.int(), x.int(), crow, col),
    "not a matrix": lambda g, x, crow, col: (g, x.view(-1), crow, col),
    **{n: lambda g, x, crow, col, broken=broken: (g, x, *broken(crow, col)) for n, broken in BROKEN_CSR.items()},
}


@implementations("c++")
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_wrong_arguments_raise(implementation, wrong, density):
    mask = random_mask(10, 20, density)
    mask[:, [0, -1]] = True
    case = Case(8, mask, clean=True)
    with pytest.raises(RuntimeError, match=r"must|has|dtype"):
        implementation.ops.masked_linear_grad(*WRONG_ARGUMENTS[wrong](case.grad_output, case.input, *case.csr), FP32)


# ---- the Triton kernel ----
@only_triton
@pytest.mark.parametrize(
    ("tokens", "dtypes", "splits"),
    [(130, (BF16, FP32), 2), (190, (BF16, BF16), 3), (100, (FP32, FP32), 3), (50, (FP64, FP64), 2)],
)
def test_split_tokens(implementation, monkeypatch, tokens, dtypes, splits):
    """The last of 2 parts of 3 steps is shorter; 3 parts of 4 steps become 2."""
    skip_unsupported(implementation, *dtypes)
    from deftx_kernels.kernels import masked_linear_grad as module

    monkeypatch.setattr(module, "_splits", lambda *_: splits)
    case = Case(tokens, random_mask(140 if splits == 2 else 20, 40, 0.3), dtypes[0])
    got = case.check(implementation, dtypes[1])
    if implementation.name == "triton-sm80":
        steps = -(-tokens // module.TILES[dtypes[0].itemsize][2])
        steps_of_a_split = -(-steps // splits)
        assert implementation.ops.launches[0][1] == (-(-len(case.mask) // 128), -(-steps // steps_of_a_split), 1)
        assert len(implementation.ops.launches) == 2
    with implementation.without_racecheck():
        assert torch.equal(got, case.run(implementation, dtypes[1]))


@only_triton
def test_partial_sums_of_several_programs(implementation, monkeypatch):
    from deftx_kernels.kernels import masked_linear_grad as module

    monkeypatch.setattr(module, "_splits", lambda *_: 2)
    case = Case(33, torch.ones(30, 50, dtype=torch.bool))
    assert len(case.csr[1]) > module.SUM_BLOCK
    case.check(implementation)


def test_number_of_splits():
    pytest.importorskip("triton")
    from deftx_kernels.kernels.masked_linear_grad import _splits

    assert _splits(1, 1, 1, 132) == 1
    assert _splits(1024, 32, 32, 132) == 1  # 4096 x 4096: tiles for all multiprocessors
    assert _splits(36, 32, 32, 132) == 3  # 768 x 768: of 132 multiprocessors, 108 instead of 36
    assert 10 <= _splits(9, 256, 132, 132) <= 14  # 384 x 384, 16384 tokens
    for tiles, steps, most in itertools.product((1, 7, 36, 144, 500), (1, 2, 9, 100), (1, 2, 50)):
        assert 1 <= _splits(tiles, steps, min(most, steps), 132) <= most


@contextlib.contextmanager
def tf32_allowed():
    flags = torch.backends.cuda.matmul
    before, flags.fp32_precision = flags.fp32_precision, "tf32"
    try:
        yield 2.0**-9  # relative error of a product whose factors are cut to 11 bits
    finally:
        flags.fp32_precision = before


@only_triton
def test_tf32_where_torch_allows_it(implementation):
    case = Case(70, random_mask(30, 35, 0.3))
    with tf32_allowed() as error:
        got = case.check(implementation, product_error=error)
    with implementation.without_racecheck():
        assert torch.equal(got, case.check(implementation)) == INTERPRETED


@implementations("triton-sm80")
def test_offsets_beyond_31_bits(implementation):
    """9 GB of address space, of which a few pages are touched: tokens of both steps begin beyond element 2**31."""
    from deftx_kernels.kernels import masked_linear_grad as module

    tokens, stride = 70, 2**26
    x = torch.empty(tokens, stride, dtype=BF16)
    x[:, :128] = torch.randn(tokens, 128)
    case = Case(tokens, random_mask(3, 128, 0.3), BF16, clean=True)
    case.input = x[:, :128]
    block_m, block_n, block_k = module.TILES[2]
    out = torch.empty(len(case.csr[1]))
    with implementation.ops.emulator.override():
        module._masked_linear_grad_kernel[(1,)](
            module._operand(case.grad_output, BF16),
            x,
            *case.csr,
            out,
            tokens,
            3,
            16,
            stride,
            tokens,
            len(out),
            ACC=module.TRITON_DTYPE[FP32],
            PRECISION="ieee",
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP=module.GROUP,
            WAYS=module.WAYS,
            CHUNK=module.CHUNK,
            num_warps=module.NUM_WARPS,
            num_stages=module.NUM_STAGES,
        )
    assert_within(out, case.entries(), case.bound())


def test_too_large_a_matrix_is_refused():
    pytest.importorskip("triton")
    from deftx_kernels.kernels.masked_linear_grad import masked_linear_grad

    wide = torch.empty(1, 2**24)
    with pytest.raises(ValueError, match="too large"):
        masked_linear_grad(torch.empty(1, 1), wide, torch.tensor([0, 1]), torch.tensor([5], dtype=torch.int32), FP32)


# ---- on a GPU ----
@implementations("cuda")
@gpu_dtypes
@pytest.mark.parametrize("shape", [(2048, 768, 768), (16_384, 384, 384), (1000, 3072, 768), (777, 1111, 999)], ids=str)
def test_matrices_of_many_tiles(implementation, dtypes, shape):
    tokens, rows, columns = shape
    case = Case(tokens, random_mask(rows, columns, 0.1), dtypes[0])
    got = case.check(implementation, dtypes[1])
    assert torch.equal(got, case.run(implementation, dtypes[1]))


@implementations("cuda")
def test_tf32_on_the_gpu(implementation):
    with tf32_allowed() as error:
        Case(500, random_mask(700, 300, 0.1)).check(implementation, product_error=error)
