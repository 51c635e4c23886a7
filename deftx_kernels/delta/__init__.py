"""SparseDelta: the sparse difference of two models; saved, loaded, added to a model and to one another."""

from deftx_kernels.delta.adapters import SparseAdapters
from deftx_kernels.delta.fingerprints import fingerprint
from deftx_kernels.delta.merging import merge
from deftx_kernels.delta.sparse_delta import SparseDelta, compose
from deftx_kernels.delta.storage import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "SparseAdapters", "SparseDelta", "compose", "fingerprint", "merge"]
