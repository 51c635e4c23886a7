"""Registrations of the operators' implementations, one thin file per kind."""

from deftx_kernels.backends import reference, triton

__all__ = ["reference", "triton"]
