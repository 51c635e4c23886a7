"""Masked modules: `sparsify` puts them into a model, `densify` takes them out again.

Each masked parameter keeps its dense tensor, frozen, and gets a compact trainable `values` parameter. Gradients,
optimizer state and all-reduce are then of size nnz. `entries` keeps the two alike, `modules` computes with them.
"""

from deftx_kernels.nn.entries import Entry, MaskedParameter, entries_of, values_name
from deftx_kernels.nn.functional import masked_embedding, masked_linear
from deftx_kernels.nn.modules import (
    MaskedEmbedding,
    MaskedLinear,
    densify,
    masked_parameters,
    plain_tensors,
    sparsify,
)

__all__ = [
    "Entry",
    "MaskedEmbedding",
    "MaskedLinear",
    "MaskedParameter",
    "densify",
    "entries_of",
    "masked_embedding",
    "masked_linear",
    "masked_parameters",
    "plain_tensors",
    "sparsify",
    "values_name",
]
