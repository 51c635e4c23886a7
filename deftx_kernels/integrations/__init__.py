"""Entry points in the style of PEFT, and captured training steps. `deftx_kernels.integrations.transformers` is for its
Trainer and for TRL's.
"""

from deftx_kernels.integrations.captured import captured_step
from deftx_kernels.integrations.sparse_model import (
    SparseConfig,
    get_sparse_model,
    print_trainable_parameters,
    sparse_delta,
)

__all__ = [
    "SparseConfig",
    "captured_step",
    "get_sparse_model",
    "print_trainable_parameters",
    "sparse_delta",
]
