"""Registers what Python implements: the reference for every device, and the Triton kernels for CUDA tensors."""

import functools
from collections.abc import Callable

import torch

from deftx_kernels.ops import checks, library, reference, schemas

# The operators that have a Triton kernel.
TRITON = (
    "csr_square_sum",
    "sparse_adamw_",
    "masked_linear_grad",
    "masked_embedding_grad",
    "residual_cut",
    "low_rank_denoised",
    "split_bf16_",
)


def reference_functions() -> dict[str, Callable]:
    """Each operator's plain-torch function, behind the operator's checks."""
    return {op: checks.checked(op, getattr(reference, op), reads_contents=True) for op in schemas.SCHEMAS}


def triton_kernels() -> dict[str, Callable]:
    """Each operator's Triton launcher, behind the operator's checks."""
    from deftx_kernels.kernels import low_rank, masked_embedding_grad, masked_linear_grad, split_bf16, square_sum
    from deftx_kernels.kernels import sparse_adamw as adamw

    launchers: dict[str, Callable] = {
        "csr_square_sum": square_sum.csr_square_sum,
        "sparse_adamw_": lambda *arguments: adamw.sparse_adamw_(schemas.AdamWArgs(*arguments)),
        "masked_linear_grad": masked_linear_grad.masked_linear_grad,
        "masked_embedding_grad": masked_embedding_grad.masked_embedding_grad,
        "residual_cut": _unless_float64("residual_cut", low_rank.residual_cut),
        "low_rank_denoised": _unless_float64("low_rank_denoised", low_rank.low_rank_denoised),
        "split_bf16_": split_bf16.split_bf16_,
    }
    # Two of the launchers check the mask's tensors themselves, and skip the check for tensors of an earlier call.
    own_checks = ("csr_square_sum", "sparse_adamw_")
    return {op: checks.checked(op, launchers[op], checks_tensors=op in own_checks) for op in TRITON}


def _unless_float64(op: str, kernel: Callable) -> Callable:
    """`kernel`, but the reference for float64 matrices: a limit that `library.LIMITS` lists."""

    @functools.wraps(kernel)
    def run(delta, *rest):
        return (getattr(reference, op) if delta.dtype == torch.float64 else kernel)(delta, *rest)

    return run


def _register_triton() -> None:
    if torch.version.cuda is None:
        library.absent("triton", f"torch {torch.__version__} has no CUDA")
        return
    try:
        kernels = triton_kernels()
    except ImportError as error:
        library.absent("triton", f"triton cannot be imported ({error}); pip install 'deftx-kernels[triton]'")
        return
    for op, kernel in kernels.items():
        schemas.LIBRARY.impl(op, kernel, "CUDA")
        library.register(op, "cuda", "triton")


for _op, _function in reference_functions().items():
    schemas.LIBRARY.impl(_op, _function, "CompositeExplicitAutograd")
_register_triton()
