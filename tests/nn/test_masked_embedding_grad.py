"""masked_embedding_grad against float64 sums of rows, the same tests for every implementation.

Bounds and the values outside the mask are those of test_masked_linear_grad.py.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import Implementation, implementations
from tests.nn.gradient_checks import (
    BF16,
    BROKEN_CSR,
    FP16,
    FP32,
    FP64,
    assert_within,
    csr,
    equal_with_nan,
    random_mask,
    results_by_threads,
    run_examples,
    skip_unsupported,
    small_masks,
    unit_roundoff,
)

OPS = ("masked_embedding_grad",)
pytestmark = pytest.mark.usefixtures("one_thread")


class Case:
    """Gradients of tokens, their indices, and a mask of [vocabulary, d]."""

    def __init__(self, indices: Tensor, mask: Tensor, dtype=FP32, padding_idx=-1, *, int32=False) -> None:
        generator = torch.Generator().manual_seed(len(indices) + 7 * mask.shape[0] + 31 * mask.shape[1])
        self.indices, self.mask, self.padding_idx = indices, mask, padding_idx
        self.grad_output = torch.randn(len(indices), mask.shape[1], generator=generator, dtype=FP64).to(dtype)
        self.grad_output[:, ~mask.any(0)] = torch.nan
        self.grad_output[(indices == padding_idx) | ~mask.any(1)[indices.long()]] = torch.inf
        self.csr, self.row = csr(mask, int32), mask.nonzero()[:, 0]

    def run(self, implementation: Implementation, dtype: torch.dtype = FP32) -> Tensor:
        arguments = self.grad_output, self.indices, *self.csr, self.padding_idx, dtype
        return implementation.on_cpu("masked_embedding_grad", *arguments)

    def entries(self, magnitudes: bool = False) -> Tensor:
        """float64 [nnz]: the gradient without padding_idx, or the sums of its terms' magnitudes."""
        g = self.grad_output.double().nan_to_num(0, 0, 0)
        sums = torch.zeros(self.mask.shape, dtype=FP64).index_add_(0, self.indices, g.abs() if magnitudes else g)
        return sums[self.mask]

    def check(self, implementation: Implementation, dtype: torch.dtype = FP32) -> Tensor:
        before = self.grad_output.clone(), self.indices.clone()
        got = self.run(implementation, dtype)
        assert got.dtype == dtype
        assert got.shape == self.csr[1].shape
        count = torch.bincount(self.indices, minlength=len(self.mask))[self.row]
        want, bound = self.entries(), self.entries(magnitudes=True) * (count + 2) * unit_roundoff(dtype)
        zero = (count == 0) | (self.row == self.padding_idx)
        assert_within(got, want.where(~zero, 0), bound)
        assert not got[zero].any()
        assert equal_with_nan(before[0], self.grad_output)
        assert torch.equal(before[1], self.indices)
        return got


def token_ids(vocabulary: int, count: int) -> Tensor:
    """With Zipf's frequencies: a few words are most of the text."""
    chance = 1 / torch.arange(1, vocabulary + 1, dtype=FP64)
    return torch.multinomial(chance, count, replacement=True, generator=torch.Generator().manual_seed(0))


def shuffled(indices: Tensor) -> Tensor:
    return indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 127, 128, 129, 500])
def test_numbers_of_tokens(implementation, count):
    """The Triton kernel sums blocks of 64 positions."""
    Case(token_ids(20, count), random_mask(20, 30, 0.4)).check(implementation)


@pytest.mark.parametrize(
    "dtypes",
    [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP16, FP16), (FP32, FP32), (FP64, FP64), (BF16, FP64), (FP32, BF16)],
    ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes),
)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_dtypes(implementation, dtypes, index):
    if implementation.name == "triton-sm80" and index == torch.int32 and dtypes[0] != FP32:
        pytest.skip("reads indices alike for all dtypes")
    skip_unsupported(implementation, *dtypes)
    Case(token_ids(20, 150).to(index), random_mask(20, 30, 0.4), dtypes[0]).check(implementation, dtypes[1])


@pytest.mark.parametrize("count", [64, 100, 1100, 5000])
def test_all_tokens_equal(implementation, count):
    if implementation.name.startswith("triton") and count > 2000:
        pytest.skip("slow")
    Case(torch.full((count,), 3), random_mask(5, 40, 0.5)).check(implementation)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_two_frequent_words(implementation, dtype):
    """Each more often than a block is long, with rare ones before, between and after them."""
    skip_unsupported(implementation, dtype)
    indices = shuffled(torch.cat([torch.full((150,), 4), torch.full((300,), 8), torch.arange(12)]))
    Case(indices, random_mask(12, 50, 0.6), dtype).check(implementation)


@pytest.mark.parametrize("padding_idx", [-1, 0, 3, 5])
def test_padding(implementation, padding_idx):
    """Also finite gradients of padding tokens are left out."""
    indices = shuffled(torch.cat([torch.full((200,), max(padding_idx, 0)), token_ids(6, 100)]))
    case = Case(indices, random_mask(6, 20, 0.6))
    case.padding_idx = padding_idx
    assert padding_idx < 0 or case.entries()[case.row == padding_idx].any()
    case.check(implementation)


def test_all_tokens_padding(implementation):
    assert not Case(torch.full((130,), 2), random_mask(4, 20, 0.6), padding_idx=2).check(implementation).any()


def test_rows_without_entries_and_the_last_row(implementation):
    mask = random_mask(9, 25, 0.5)
    mask[[0, 3, 4]] = False
    for last in (True, False):
        mask[8] = last
        Case(torch.tensor([8, 0, 3, 8, 4, 1, 8]), mask).check(implementation)


@pytest.mark.parametrize("density", [0.05, 1.0])
@pytest.mark.parametrize("count", [50, 150])
def test_long_rows(implementation, density, count):
    """More entries than the Triton kernel reads at a time: in all rows, or in two long ones."""
    mask = random_mask(30, 300, density)
    mask[[1, 4]] = True
    Case(token_ids(30, count), mask).check(implementation)


def test_one_row_and_one_column(implementation):
    Case(torch.zeros(70, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)).check(implementation)
    Case(torch.zeros(3, dtype=torch.int64), random_mask(1, 200, 0.5)).check(implementation)


def test_int32_columns(implementation):
    Case(token_ids(4, 20), random_mask(4, 30, 0.5), int32=True).check(implementation)
    mask = torch.zeros(3, 66_000, dtype=torch.bool)
    mask[:, [0, 65_535, 65_536, 65_999]] = True
    Case(torch.tensor([2, 0, 2]), mask).check(implementation)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_empty_inputs(implementation, index):
    got = Case(torch.zeros(0, dtype=index), random_mask(4, 30, 0.5), BF16).run(implementation, BF16)
    assert got.dtype == BF16
    assert len(got) > 0
    assert not got.any()
    empty = Case(torch.zeros(3, dtype=index), torch.zeros(4, 30, dtype=torch.bool))
    assert empty.run(implementation).shape == (0,)


def test_deterministic(implementation):
    case = Case(token_ids(10, 400), random_mask(10, 40, 0.5))
    first = case.run(implementation)
    assert torch.equal(first, case.run(implementation))
    if implementation.name == "c++":
        assert all(torch.equal(first, r) for r in results_by_threads(lambda: case.run(implementation)))


def test_small_masks(implementation):
    @given(small_masks(), st.data())
    def test(mask, data):
        index = st.integers(0, len(mask) - 1)
        indices = torch.tensor(data.draw(st.lists(index, max_size=150)), dtype=torch.int64)
        Case(indices, mask, padding_idx=data.draw(st.one_of(st.just(-1), index))).check(implementation)

    run_examples(implementation, test)


WRONG_ARGUMENTS = {  # (arguments, the one that the message names)
    "index too large": (lambda g, i, crow, col: (g, i + 1, crow, col), "indices"),
    "negative index": (lambda g, i, crow, col: (g, i - 1, crow, col), "indices"),
    "tokens differ": (lambda g, i, crow, col: (g[1:].contiguous(), i, crow, col), "grad_output"),
    "column too large": (lambda g, i, crow, col: (g[:, :-1].contiguous(), i, crow, col), "col_indices"),
    "floating indices": (lambda g, i, crow, col: (g, i.float(), crow, col), "indices"),
    "not a matrix": (lambda g, i, crow, col: (g.view(-1), i, crow, col), "grad_output"),
    **{
        name: (lambda g, i, crow, col, broken=BROKEN_CSR[name]: (g, i, *broken(crow, col)), argument)
        for name, argument in [
            ("negative column", "col_indices"),
            ("crow ends late", "crow_indices"),
            ("crow too short", "indices"),
            ("crow descends", "crow_indices"),
        ]
    },
}


@implementations("c++")
@pytest.mark.parametrize("wrong", WRONG_ARGUMENTS)
def test_wrong_arguments_raise(implementation, wrong):
    arguments, named = WRONG_ARGUMENTS[wrong]
    case = Case(torch.tensor([0, 3, 4, 1, 2]), torch.ones(5, 20, dtype=torch.bool))
    with pytest.raises((RuntimeError, IndexError), match=named):
        implementation.ops.masked_embedding_grad(*arguments(case.grad_output, case.indices, *case.csr), -1, FP32)


# ---- the Triton kernel ----
@implementations("triton-sm80", "triton-interpreter", "cuda")
def test_indices_out_of_range_are_skipped(implementation):
    """Forward has raised for them already; here nothing outside the memory may be read or written."""
    case = Case(torch.tensor([4, 0, 4, 2]), torch.ones(5, 20, dtype=torch.bool))
    got = case.run(implementation)
    case.indices = torch.tensor([4, 0, 4, 2, 5, 5, -3, 2**40, *[-7] * 100])
    case.grad_output = torch.cat([case.grad_output, torch.ones(104, 20)])
    assert torch.equal(case.run(implementation), got)


@implementations("triton-sm80", "triton-interpreter")
def test_offsets_beyond_31_bits(implementation):
    """7 GB of address space, of which a few pages are touched: the last tokens begin beyond element 2**31."""
    tokens, d = 200, 2**24
    case = Case(torch.zeros(tokens, dtype=torch.int64), random_mask(1, 100, 0.3))
    gradients, case.grad_output = case.grad_output, torch.empty(tokens, d)
    case.grad_output[:, :100] = gradients
    got = case.run(implementation)
    case.grad_output = gradients
    assert_within(got, case.entries(), case.entries(magnitudes=True) * 202 * 2.0**-24)


# ---- on a GPU ----
@implementations("cuda")
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_many_tokens(implementation, dtype):
    case = Case(token_ids(5000, 16_384), random_mask(5000, 768, 0.1), dtype)
    assert torch.equal(case.check(implementation), case.run(implementation))


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    """Also not masked_linear_grad."""
    case = Case(token_ids(50, 2000), random_mask(50, 200, 0.1), BF16)
    grad_output, indices, crow, col = (t.cuda() for t in (case.grad_output, case.indices, *case.csr))
    linear_grad = torch.randn(2000, 50, device="cuda", dtype=BF16)

    def both() -> list[Tensor]:
        first = torch.ops.deftx.masked_linear_grad(linear_grad, grad_output, crow, col, FP32)
        return [first, torch.ops.deftx.masked_embedding_grad(grad_output, indices, crow, col, -1, FP32)]

    first = both()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(a.is_cuda and equal_with_nan(a, b) for a, b in zip(first, again))
