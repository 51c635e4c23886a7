"""The operators: importing this folder defines them, loads the compiled libraries and registers the Python kernels."""

from deftx_kernels.ops import library, schemas

library.load()  # after the schemas, before the registrations from Python

from deftx_kernels.ops import registrations  # noqa: E402
from deftx_kernels.ops.library import backends  # noqa: E402

__all__ = ["backends", "library", "registrations", "schemas"]
