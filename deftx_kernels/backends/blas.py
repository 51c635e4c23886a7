"""What is made of torch's own matrix products and decompositions (BLAS and LAPACK, cuBLAS and cuSOLVER), on both
devices.
"""

from deftx_kernels import _library, _op_checks, _ops
from deftx_kernels.kernels import svd

for _name in ("truncated_svd", "svd_denoise_"):
    for _device in _library.DEVICES:
        _ops.LIBRARY.impl(_name, _op_checks.checked(_name, getattr(svd, _name)), _device.upper())
        _library.register(_name, _device, "blas")
