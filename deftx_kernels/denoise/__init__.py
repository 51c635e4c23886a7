"""Truncated SVD and denoising of weight differences."""

from deftx_kernels.denoise.functional import svd_denoise, truncated_svd

__all__ = ["svd_denoise", "truncated_svd"]
