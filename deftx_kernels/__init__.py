"""Kernels for composable sparse fine-tuning: denoise, select, train and add sparse differences of models."""

from deftx_kernels import _library, _ops  # noqa: F401  (the schemas first, then the compiled kernels)

_library.load()

import deftx_kernels.backends  # noqa: E402, F401  (then the kernels that Python registers)
from deftx_kernels import interop  # noqa: E402
from deftx_kernels._library import backends  # noqa: E402
from deftx_kernels.delta import SparseDelta, compose  # noqa: E402
from deftx_kernels.functional import (  # noqa: E402
    masked_embedding,
    masked_linear,
    select_mask,
    sparse_adamw,
    svd_denoise,
    topk_mask,
    truncated_svd,
)
from deftx_kernels.mask import CSRMask  # noqa: E402
from deftx_kernels.nn import MaskedEmbedding, MaskedLinear, densify, sparsify  # noqa: E402
from deftx_kernels.optim import SparseAdamW  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "CSRMask",
    "MaskedEmbedding",
    "MaskedLinear",
    "SparseAdamW",
    "SparseDelta",
    "backends",
    "compose",
    "densify",
    "interop",
    "masked_embedding",
    "masked_linear",
    "select_mask",
    "sparse_adamw",
    "sparsify",
    "svd_denoise",
    "topk_mask",
    "truncated_svd",
]
