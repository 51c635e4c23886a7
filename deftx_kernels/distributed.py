"""One mask, and one patch, for a process group.

`topk_mask`, `select_mask` and `init_mask` select over all ranks' parts of scores or models, sharded or replicated: the
same mask on every rank, as one process selects. `svd_denoise` divides matrices over the ranks.

FSDP2: `SparseAdamW` takes DTensors that are placed by rows (`Shard(0)`) and a mask of the whole tensors. `local_mask`
returns the mask of this rank's rows, for `deftx_kernels.sparse_adamw` on local tensors.

A model that is sparsified, and then sharded with FSDP2 or wrapped in DDP, needs only the same mask on all ranks: its
trainable parameters are ordinary (compact) ones. For `SparseAdamW` on a plain model under DDP, `masked_allreduce_hook`
all-reduces only the masked entries of dense gradients.

`diff_patch` compares two versions of a model whose parameters are sharded by rows, `apply_patch_` writes a patch to
one. Ranks exchange the entries that changed, never weights.
"""

from deftx_kernels.delta.sharded import apply_patch_, diff_patch
from deftx_kernels.mask.over_ranks import broadcast_mask, check_same_mask, local_mask
from deftx_kernels.optim.masked_allreduce import MaskedAllreduceState, masked_allreduce_hook
from deftx_kernels.select.sharded import init_mask, select_mask, svd_denoise, topk_mask

__all__ = [
    "MaskedAllreduceState",
    "apply_patch_",
    "broadcast_mask",
    "check_same_mask",
    "diff_patch",
    "init_mask",
    "local_mask",
    "masked_allreduce_hook",
    "select_mask",
    "svd_denoise",
    "topk_mask",
]
