"""Files and matrices of other libraries: composable-sft, PEFT, and CSR matrices of torch, SciPy and CuPy."""

from deftx_kernels.delta.interop.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_type
from deftx_kernels.delta.interop.composable_sft import SFT_NAME, from_composable_sft, to_composable_sft
from deftx_kernels.delta.interop.csr import from_csr, to_cupy_csr, to_scipy_csr
from deftx_kernels.delta.interop.lora import from_peft_lora
from deftx_kernels.delta.interop.shira import SHIRA_CONFIG, SHIRA_WEIGHTS, from_peft_shira, to_peft_shira
from deftx_kernels.delta.interop.supertuning import from_peft_supertuning

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "SFT_NAME",
    "SHIRA_CONFIG",
    "SHIRA_WEIGHTS",
    "adapter_type",
    "from_composable_sft",
    "from_csr",
    "from_peft_lora",
    "from_peft_shira",
    "from_peft_supertuning",
    "to_composable_sft",
    "to_cupy_csr",
    "to_peft_shira",
    "to_scipy_csr",
]
