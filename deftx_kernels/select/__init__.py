"""Exact top-k masks from scores, from two models, and from the weights of one model."""

from deftx_kernels.select.functional import low_rank_mask, select_mask, topk_mask
from deftx_kernels.select.starting import init_mask, mask_from_weights, matches_ending, plain_modules, target_weights

__all__ = [
    "init_mask",
    "low_rank_mask",
    "mask_from_weights",
    "matches_ending",
    "plain_modules",
    "select_mask",
    "target_weights",
    "topk_mask",
]
