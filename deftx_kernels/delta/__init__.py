"""SparseDelta: the sparse difference of two models; saved, loaded, added to a model and to one another.
SparsePatch: the bits that an update changed, and a channel for them.
"""

from deftx_kernels.delta.adapters import SparseAdapters
from deftx_kernels.delta.channel import PatchReader, PatchWriter
from deftx_kernels.delta.fingerprints import fingerprint
from deftx_kernels.delta.merging import merge
from deftx_kernels.delta.patch import SparsePatch
from deftx_kernels.delta.sparse_delta import SparseDelta, compose
from deftx_kernels.delta.storage import CONFIG_NAME, WEIGHTS_NAME
from deftx_kernels.delta.tracked import tracked_patch

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "PatchReader",
    "PatchWriter",
    "SparseAdapters",
    "SparseDelta",
    "SparsePatch",
    "compose",
    "fingerprint",
    "merge",
    "tracked_patch",
]
