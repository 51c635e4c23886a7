"""Truncated SVD and denoising of weight differences; symmetric eigenproblems."""

from deftx_kernels.denoise.eigenproblems import eigh, eigvalsh
from deftx_kernels.denoise.functional import svd_denoise, truncated_svd

__all__ = ["eigh", "eigvalsh", "svd_denoise", "truncated_svd"]
