"""What the readers and writers of the formats share."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from deftx_kernels.delta.sparse_delta import SparseDelta
from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import check_mask_layout

Entries = tuple[torch.Size, Tensor, Tensor]  # a tensor's shape, row-major flat indices int64 [n], and values [n]


def mask_and_values(tensors: Mapping[str, Entries]) -> tuple[CSRMask, Tensor]:
    """Mask and compact float32 values. Values of one index are added up."""
    names = sorted(tensors)
    shapes = [tensors[n][0] for n in names]
    check_mask_layout(names, shapes)
    indices = [torch.empty(0, dtype=torch.int64, device="cpu")]
    values = [torch.empty(0, dtype=torch.float32, device="cpu")]
    start = 0
    for name, shape in zip(names, shapes):
        flat, position = torch.unique(tensors[name][1], return_inverse=True)
        sums = torch.zeros(len(flat), dtype=torch.float32, device="cpu")
        values.append(sums.index_add_(0, position, tensors[name][2].to(torch.float32)))
        indices.append(flat + start)
        start += shape.numel()
    return CSRMask.from_flat_indices(names, shapes, torch.cat(indices)), torch.cat(values)


def warn_of_low_terms(delta: SparseDelta, format: str) -> None:
    """UserWarning if the delta has low terms, which no other format has."""
    if delta.low is not None:
        warnings.warn(
            f"{format}'s format has no low terms: those of {len(delta.low[0])} of {delta.mask.nnz} entries are "
            "left out, so base + delta is not the tuned tensor bit for bit there",
            UserWarning,
            stacklevel=3,
        )
