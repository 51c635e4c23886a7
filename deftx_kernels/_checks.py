"""The checks of arguments that `functional` and its neighbours share. Each raises ValueError or TypeError, naming the argument."""

import math
import numbers
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask

FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})


def check_hyperparameters(lr, betas, eps, weight_decay, l1) -> tuple[float, float]:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor of one element, got shape {list(lr.shape)}")
    elif not (is_number(lr) and lr >= 0):
        raise ValueError(f"lr must be a number, at least 0, got {lr!r}")
    if len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    for name, value in (("eps", eps), ("weight_decay", weight_decay), ("l1", l1)):
        if not (is_number(value) and value >= 0):
            raise ValueError(f"{name} must be at least 0, got {value}")
    return float(betas[0]), float(betas[1])


def scalar(value: float | Tensor, name: str, device: torch.device, least: int | None = None) -> Tensor:
    """A one-element tensor on the device; a 16-bit one is refused, since a bfloat16 counter never passes 256."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"{name} must be a 0-d tensor of 32 bits or more, got {value.dtype} {list(value.shape)}")
        return value.detach().to(device, non_blocking=True)
    if not is_number(value) or (least is not None and (value < least or value != int(value))):
        raise ValueError(f"{name} must be {'a number' if least is None else f'an int from {least}'}, got {value!r}")
    return torch.full((), value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)


def check_masked(weight: Tensor, values: Tensor, mask: CSRMask) -> None:
    if len(mask.names) != 1 or mask.shapes[0] != weight.shape or weight.dim() != 2:
        raise ValueError(
            f"mask must cover one tensor of weight's shape {list(weight.shape)}, it covers {[list(s) for s in mask.shapes]}"
        )
    mask.check_compact(values, "values")
    if weight.device != mask.device:
        raise ValueError(f"weight is on {weight.device}, the mask on {mask.device}: move one with .to()")


def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_int(value: object, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_float(tensor: object, label: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{label} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{label} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{label} must be a dense (strided) tensor, got layout {tensor.layout}")


def check_floats(tensors: Sequence[Tensor], names: Sequence[str], argument: str) -> set[torch.dtype]:
    """`check_float` of each tensor, for less than a call each. Their dtypes."""
    if all(isinstance(t, Tensor) for t in tensors):
        dtypes = {t.dtype for t in tensors}
        if dtypes <= FLOATS and {t.layout for t in tensors} <= {torch.strided}:
            return dtypes
    for name, tensor in zip(names, tensors):
        check_float(tensor, f"{argument}[{name!r}]")
    raise AssertionError("one of them is to be refused")


def check_devices(tensors: Mapping[str, Tensor], argument: str) -> None:
    devices = {t.device for t in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"{argument} lie on several devices: {', '.join(sorted(map(str, devices)))}")


def check_finite(tensor: Tensor, label: str) -> None:
    if math.isfinite(float(tensor.sum())):  # one read; a finite sum that overflows is looked at once more
        return
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        index = int((~finite).reshape(-1).to(torch.uint8).argmax())
        raise ValueError(f"{label} holds {float(tensor.reshape(-1)[index])} at flat index {index}: every entry must be finite")


def check_matrix(tensor: object, label: str) -> None:
    check_float(tensor, label)
    assert isinstance(tensor, Tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{label} must have at least 2 dimensions [..., m, n], got shape {list(tensor.shape)}")
    check_finite(tensor.detach(), label)
