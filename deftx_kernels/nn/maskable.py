"""Which tensors and modules `sparsify` masks, and which modules compute compact gradients directly."""

from typing import Any

import torch
from torch import nn

from deftx_kernels.kernels.tensors import FLOATS
from deftx_kernels.nn.experts import weights_of_experts
from deftx_kernels.validation import check_writable, values_name


def check_trainable(tensors: dict[str, Any]) -> None:
    """TypeError or ValueError naming the first of a model's tensors (by name) that cannot be masked."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(f"model[{name!r}] must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
        if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
            raise ValueError(f"model[{name!r}] has gradient hooks: register them on its values, after sparsify")
        if tensor.is_inference():
            raise ValueError(f"model[{name!r}] was made in inference_mode, which backward cannot use: load it outside")
    check_writable({f"model[{name!r}]": tensor for name, tensor in tensors.items()})


def check_module(module: nn.Module, owned: dict[str, str]) -> None:
    """ValueError where the module cannot be masked. `owned`: its masked parameters, attribute → name in the model."""
    first = next(iter(owned.values()))
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{first!r} belongs to a script module, which cannot be masked")
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(f"{first!r} belongs to an embedding with max_norm, which rewrites its weight in every forward")
    for attr, name in owned.items():
        if hasattr(module, values_name(attr)):
            raise ValueError(
                f"the module that owns {name!r} has an attribute {values_name(attr)!r}, the name of its values"
            )


def is_matmul(cls: type) -> bool:
    return cls is nn.Linear or (cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers."))


def compact_attributes(module: Any, owned: dict[str, str]) -> frozenset[str]:
    """The parameters among these whose compact gradients the module can compute directly."""
    if "forward" in vars(module):  # set on the instance (accelerate's hooks): it reads the parameters as attributes
        return frozenset()
    cls = type(module)
    if is_matmul(cls) or cls is nn.Embedding:
        known = "weight" in owned and owned.keys() <= {"weight", "bias"}
        return frozenset(owned if known and not getattr(module, "scale_grad_by_freq", False) else ())
    return weights_of_experts(module, owned)
