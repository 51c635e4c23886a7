"""Files of other tools: the public names of `deftx_kernels.delta.interop`."""

from deftx_kernels.delta.interop import *  # noqa: F403
from deftx_kernels.delta.interop import __all__ as __all__
