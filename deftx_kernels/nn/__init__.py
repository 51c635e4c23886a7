"""`masked_linear`, `masked_embedding`, and masked modules: `sparsify` converts a model to them, `densify` back.

Each masked parameter keeps its dense tensor, frozen, and gets a compact trainable `values` parameter, so that
gradients, optimizer state and all-reduce are of size nnz.
"""

from deftx_kernels.nn.autocast_copy import copies_in_graphs, write_copies
from deftx_kernels.nn.entries import entries_of
from deftx_kernels.nn.functional import masked_embedding, masked_linear
from deftx_kernels.nn.modules import MaskedEmbedding, MaskedLinear, densify, sparsify
from deftx_kernels.nn.plain import masked_parameters, plain_tensors
from deftx_kernels.nn.sharded import check_shards

__all__ = [
    "MaskedEmbedding",
    "MaskedLinear",
    "check_shards",
    "copies_in_graphs",
    "densify",
    "entries_of",
    "masked_embedding",
    "masked_linear",
    "masked_parameters",
    "plain_tensors",
    "sparsify",
    "write_copies",
]
