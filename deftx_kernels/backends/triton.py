"""Triton kernels for CUDA tensors. Registered where torch has CUDA and triton can be imported; one compile at the first call."""

import torch

from deftx_kernels import _library, _ops


def _register() -> None:
    if torch.version.cuda is None:
        _library.absent("triton", f"torch {torch.__version__} has no CUDA")
        return
    try:
        from deftx_kernels.kernels.sparse_adamw import sparse_adamw_
    except ImportError as error:
        _library.absent("triton", f"triton cannot be imported ({error}); pip install 'deftx-kernels[triton]'")
        return
    _ops.LIBRARY.impl("sparse_adamw_", sparse_adamw_, "CUDA")
    _library.register("sparse_adamw_", "cuda", "triton")


_register()
