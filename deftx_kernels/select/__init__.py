"""Exact top-k masks from scores, from two models, and from low-rank approximations of weights."""

from deftx_kernels.select.functional import low_rank_mask, select_mask, topk_mask

__all__ = ["low_rank_mask", "select_mask", "topk_mask"]
