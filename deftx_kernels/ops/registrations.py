"""Registers what Python implements: the reference for every device, and the Triton kernels for CUDA tensors."""

import functools
from collections.abc import Callable

import torch

from deftx_kernels.ops import checks, library, reference, schemas

# The operators that have a Triton kernel.
TRITON = (
    "sparse_adamw_",
    "csr_square_sum",
    "masked_linear_grad",
    "masked_embedding_grad",
    "residual_cut",
    "low_rank_denoised",
)
_LOW_RANK = ("residual_cut", "low_rank_denoised")


def _float32_or(kernel: Callable, plain: Callable) -> Callable:
    """`kernel` for float32 matrices, else the plain-torch function."""

    @functools.wraps(kernel)
    def op(delta, *rest):
        return (kernel if delta.dtype == torch.float32 else plain)(delta, *rest)

    return op


def triton_kernels() -> dict[str, Callable]:
    """Each operator's kernel, behind the operator's checks."""
    from deftx_kernels.kernels import low_rank
    from deftx_kernels.kernels.masked_embedding_grad import masked_embedding_grad
    from deftx_kernels.kernels.masked_linear_grad import masked_linear_grad
    from deftx_kernels.kernels.sparse_adamw import sparse_adamw_
    from deftx_kernels.kernels.square_sum import csr_square_sum

    return {
        # Of two ops the kernels look at the mask's tensors themselves: not each time anew.
        "sparse_adamw_": checks.checked("sparse_adamw_", sparse_adamw_, looks_at_tensors=True),
        "csr_square_sum": checks.checked("csr_square_sum", csr_square_sum, looks_at_tensors=True),
        "masked_linear_grad": checks.checked("masked_linear_grad", masked_linear_grad),
        "masked_embedding_grad": checks.checked("masked_embedding_grad", masked_embedding_grad),
        **{op: checks.checked(op, _float32_or(getattr(low_rank, op), getattr(reference, op))) for op in _LOW_RANK},
    }


def _register_reference() -> None:
    for op in schemas.SCHEMAS:
        function = checks.checked(op, getattr(reference, op), reads_contents=True)
        schemas.LIBRARY.impl(op, function, "CompositeExplicitAutograd")


def _register_triton() -> None:
    if torch.version.cuda is None:
        library.absent("triton", f"torch {torch.__version__} has no CUDA")
        return
    try:
        functions = triton_kernels()
    except ImportError as error:
        library.absent("triton", f"triton cannot be imported ({error}); pip install 'deftx-kernels[triton]'")
        return
    for op, function in functions.items():
        schemas.LIBRARY.impl(op, function, "CUDA")
        library.register(op, "cuda", "triton")


_register_reference()
_register_triton()
