"""Kernels for composable sparse fine-tuning: denoise, select, train and add sparse differences of models."""

from deftx_kernels import interop
from deftx_kernels.delta import PatchReader, PatchWriter, SparseAdapters, SparseDelta, SparsePatch, compose, merge
from deftx_kernels.denoise import eigh, eigvalsh, svd_denoise, truncated_svd
from deftx_kernels.mask import CSRMask
from deftx_kernels.nn import MaskedEmbedding, MaskedLinear, densify, masked_embedding, masked_linear, sparsify
from deftx_kernels.ops import backends
from deftx_kernels.optim import SparseAdamW, sparse_adamw
from deftx_kernels.select import init_mask, select_mask, topk_mask

__version__ = "0.1.0"

__all__ = [
    "CSRMask",
    "MaskedEmbedding",
    "MaskedLinear",
    "PatchReader",
    "PatchWriter",
    "SparseAdamW",
    "SparseAdapters",
    "SparseDelta",
    "SparsePatch",
    "backends",
    "compose",
    "densify",
    "eigh",
    "eigvalsh",
    "init_mask",
    "interop",
    "masked_embedding",
    "masked_linear",
    "merge",
    "select_mask",
    "sparse_adamw",
    "sparsify",
    "svd_denoise",
    "topk_mask",
    "truncated_svd",
]
