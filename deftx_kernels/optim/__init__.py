"""AdamW steps at masked entries: a function for custom loops, and an optimizer."""

from deftx_kernels.optim.functional import sparse_adamw
from deftx_kernels.optim.optimizer import SparseAdamW

__all__ = ["SparseAdamW", "sparse_adamw"]
