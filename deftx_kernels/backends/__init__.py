"""Registrations of the operators' implementations, one thin file per kind."""

from deftx_kernels.backends import blas, reference, triton

__all__ = ["blas", "reference", "triton"]
