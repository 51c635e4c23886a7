"""Random problems for masked_linear_grad, with a float64 oracle and a derived error bound."""

import pytest
import torch
from torch import Tensor

from tests.conftest import Implementation
from tests.nn.gradient_checks import BF16, FP16, FP32, FP64, assert_within, csr, equal_with_nan, unit_roundoff

all_dtypes = pytest.mark.parametrize(
    "dtypes",  # of grad_output, the input and the result
    [
        (BF16, BF16, BF16),
        (FP16, FP16, FP32),
        (FP16, FP16, FP16),
        (FP64, FP64, FP64),
        (BF16, FP32, FP32),
        (FP16, BF16, FP32),
        (FP64, FP32, FP32),
        (BF16, BF16, FP64),
        (FP32, FP32, BF16),
    ],
    ids=lambda dtypes: "-".join(str(d).removeprefix("torch.") for d in dtypes),
)
gpu_dtypes = pytest.mark.parametrize(
    "dtypes",  # of both inputs, and of the result
    [(BF16, FP32), (BF16, BF16), (FP16, FP32), (FP32, FP32), (FP64, FP64)],
    ids=str,
)


class Case:
    """Random tokens, and a mask of [m, n]."""

    def __init__(self, tokens: int, mask: Tensor, grad_dtype=FP32, input_dtype=None, *, int32=False, clean=False):
        generator = torch.Generator().manual_seed(tokens + 7 * mask.shape[0] + 31 * mask.shape[1])
        self.mask = mask
        self.grad_output = torch.randn(tokens, mask.shape[0], generator=generator, dtype=FP64).to(grad_dtype)
        self.input = torch.randn(tokens, mask.shape[1], generator=generator, dtype=FP64).to(input_dtype or grad_dtype)
        if not clean:
            self.grad_output[:, ~mask.any(1)] = torch.nan
            self.input[:, ~mask.any(0)] = torch.inf
        self.csr = csr(mask, int32)

    def run(self, implementation: Implementation, dtype: torch.dtype = FP32) -> Tensor:
        return implementation.on_cpu("masked_linear_grad", self.grad_output, self.input, *self.csr, dtype)

    def entries(self, magnitudes: bool = False) -> Tensor:
        """float64 [nnz]: the gradient, or the sums of its terms' magnitudes."""
        g, x = (t.double().nan_to_num(0, 0, 0) for t in (self.grad_output, self.input))
        return ((g.abs().T @ x.abs()) if magnitudes else g.T @ x)[self.mask]

    def bound(self, dtype: torch.dtype = FP32, product_error: float = 0.0) -> Tensor:
        """4: tensor cores truncate where others round, and inputs of a wider dtype are rounded to the compute dtype."""
        return self.entries(magnitudes=True) * (4 * (len(self.input) + 2) * unit_roundoff(dtype) + product_error)

    def check(self, implementation: Implementation, dtype: torch.dtype = FP32, product_error: float = 0.0) -> Tensor:
        """`product_error`: the relative error of one product, beside the rounding of the compute dtype."""
        before = self.grad_output.clone(), self.input.clone()
        got = self.run(implementation, dtype)
        assert got.dtype == dtype
        assert got.shape == self.csr[1].shape
        assert_within(got, self.entries(), self.bound(dtype, product_error))
        assert equal_with_nan(self.grad_output, before[0])
        assert equal_with_nan(self.input, before[1])
        return got
