"""CSRMask, which entries of tensors are trained, and its layout: rows, columns, dtypes."""

from deftx_kernels.kernels.tensors import signed
from deftx_kernels.mask.csr_mask import CSRMask
from deftx_kernels.ops.schemas import column_dtype, rows_and_columns

__all__ = ["CSRMask", "column_dtype", "rows_and_columns", "signed"]
