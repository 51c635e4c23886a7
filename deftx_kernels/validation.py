"""Checks of arguments, shared by the public functions. Each raises ValueError or TypeError, naming the argument."""

import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from deftx_kernels.kernels.tensors import FLOATS, INTEGERS, SCALARS, overlapping, rows_and_columns

_PLAIN = frozenset({Tensor, nn.Parameter})  # the classes of nearly all tensors
_TRACED = (FakeTensor, FunctionalTensor)  # what torch.export and other tracers use instead of tensors
_ASYNC = "AsyncCollectiveTensor"  # the result of a collective, which every operator waits for


# ---- numbers ----
def is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_int(value: object, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_hyperparameters(lr, betas, eps, weight_decay, l1) -> tuple[float, float]:
    """The hyperparameters of AdamW. Returns betas as floats."""
    if isinstance(lr, Tensor):
        check_plain(lr, "lr")
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
    """A one-element tensor on the device. ValueError for a 16-bit one: a bfloat16 counter does not count beyond 256."""
    if isinstance(value, Tensor):
        check_plain(value, name)
        if value.numel() != 1 or value.dtype not in SCALARS:
            raise ValueError(
                f"{name} must be a 0-d tensor of 32 bits or more (float32, float64, int32 or int64), got {value.dtype} "
                f"{list(value.shape)}"
            )
        if value.is_meta and device.type != "meta":
            raise ValueError(f"{name} is on meta: its value cannot be read")
        if device.type == "cuda" and value.device.type == "cpu" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{name} is on the CPU: in a CUDA graph it must be on {device}, where replays read its value"
            )
        # A copy from pinned memory that nothing waits for would read what its owner writes after this call.
        return value.detach().to(device, non_blocking=not value.is_pinned())
    if not is_number(value) or (least is not None and (value < least or value != int(value))):
        raise ValueError(f"{name} must be {'a number' if least is None else f'an int from {least}'}, got {value!r}")
    return torch.full((), value, dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)


# ---- tensors ----
def check_mapping(value: object, argument: str, other: str = "") -> None:
    """TypeError unless this is a mapping; `other`: what else the argument may be."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{argument} must be {other}a mapping of names to tensors, got {type(value).__name__}")


def check_plain(tensor: object, label: str) -> None:
    """TypeError unless this is a dense tensor: not nested, sparse, quantized or of a class that holds other tensors,
    such as DTensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{label} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested:
        raise TypeError(f"{label} must be a dense (strided) tensor, got a nested one")
    cls = type(tensor)
    if _holds_other_tensors(tensor) and not isinstance(tensor, _TRACED) and cls.__name__ != _ASYNC:
        advice = ": take its to_local() or full_tensor()" if cls.__name__ == "DTensor" else ""
        raise TypeError(f"{label} must be a plain tensor, got a {cls.__name__}{advice}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{label} must be a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.is_quantized:
        raise TypeError(f"{label} must not be quantized, got {tensor.dtype}")


def are_plain(tensors: Sequence[Any]) -> bool:
    """A fast test before `check_plain` of each tensor. False also for some that `check_plain` takes."""
    if not {type(t) for t in tensors} <= _PLAIN:
        return False
    return {(t.is_nested, t.is_quantized, t.layout) for t in tensors} <= {(False, False, torch.strided)}


def _holds_other_tensors(tensor: Tensor) -> bool:
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def check_float(tensor: object, label: str) -> None:
    """`check_plain`, and of a floating dtype that the operators take."""
    check_plain(tensor, label)
    assert isinstance(tensor, Tensor)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{label} must be float32, float64, float16 or bfloat16, got {tensor.dtype}")


def check_floats(tensors: Sequence[Tensor], names: Sequence[str], argument: str) -> set[torch.dtype]:
    """`check_float` of each tensor, without a call for each in the common case. Returns their dtypes."""
    if not (are_plain(tensors) and {t.dtype for t in tensors} <= FLOATS):
        for name, tensor in zip(names, tensors):
            check_float(tensor, f"{argument}[{name!r}]")
    return {t.dtype for t in tensors}


def check_readable(tensor: Tensor, label: str) -> None:
    """ValueError unless the tensor's elements can be read now."""
    batched = torch._C._functorch.is_batchedtensor(tensor)
    if tensor.is_meta or batched or isinstance(tensor, _TRACED):
        state = "on meta" if tensor.is_meta else "batched by torch.vmap" if batched else "being traced"
        raise ValueError(f"{label} is {state}: its elements cannot be read")


def check_devices(tensors: Mapping[str, Tensor], argument: str) -> None:
    """ValueError unless the tensors are on one device, and their elements can be read."""
    first, device = next(((n, t.device) for n, t in tensors.items()), ("", None))
    for name, tensor in tensors.items():
        if tensor.device != device:
            label = f"{argument}[{name!r}]"
            raise ValueError(f"{label} is on {tensor.device}, {argument}[{first!r}] on {device}: one device is needed")
    for name, tensor in tensors.items():
        check_readable(tensor, f"{argument}[{name!r}]")


def check_finite(tensor: Tensor, label: str, start: int = 0) -> None:
    """ValueError unless every entry is finite. `start`: the flat index of the first one in the tensor of the label."""
    if math.isfinite(float(tensor.sum())):  # one pass; the sum of finite entries may overflow
        return
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        raise_not_finite(tensor, label, int((~finite).reshape(-1).to(torch.uint8).argmax()), start)


def raise_not_finite(tensor: Tensor, label: str, index: int, start: int = 0) -> NoReturn:
    value = float(tensor.detach().reshape(-1)[index])
    raise ValueError(f"{label} holds {value} at flat index {start + index}: every entry must be finite")


def usable_in_backward(tensor: Tensor) -> Tensor:
    """The tensor itself; a copy of one that was made in inference_mode, which autograd does not take."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


# ---- memory ----
def has_memory(tensor: Tensor) -> bool:
    """Whether the tensor's elements are at its `data_ptr()`."""
    if _holds_other_tensors(tensor) or tensor.is_nested or tensor.is_meta:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False
    return tensor.layout == torch.strided and tensor.numel() > 0


def _memory_span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the tensor's first byte and of the byte after its last one."""
    start = tensor.data_ptr()
    if tensor.is_contiguous():
        return start, start + tensor.nbytes
    length = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return start, start + length * tensor.element_size()


def check_writable(tensors: Mapping[str, Tensor]) -> None:
    """ValueError, naming a label, unless the tensors can be written in place: no two elements share memory.

    The operators check most of this themselves. Called where they cannot, and to name the tensors in the error.
    """
    if torch.compiler.is_compiling():
        return
    without_gaps = {}
    for label, tensor in tensors.items():
        if tensor.is_neg() or tensor.is_conj():
            raise ValueError(
                f"{label} is a view that negates or conjugates other memory: it cannot be written in place"
            )
        if not has_memory(tensor):
            continue
        if torch._debug_has_internal_overlap(tensor) == 1:
            raise ValueError(f"elements of {label} share memory: it cannot be written in place")
        start, end = _memory_span(tensor)
        if end - start == tensor.nbytes:  # views with gaps may be interleaved
            without_gaps[label] = tensor
    if pair := overlapping(list(without_gaps.values())):
        one, other = (list(without_gaps)[i] for i in pair)
        raise ValueError(f"{one} and {other} share memory: the result of writing both would be undefined")


# ---- models as arguments ----
def unwrapped(model: nn.Module) -> nn.Module:
    """The model within DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        inner = model._modules.get("_orig_mod")
        if inner is None and isinstance(model, (DataParallel, DistributedDataParallel)):
            inner = model.module
        if inner is None:
            return model
        model = inner


def reshard(model: nn.Module) -> None:
    """Make DTensors the parameters of a model that FSDP2 has sharded, also after a forward without a backward, which
    leaves gathered copies in their place: in the dtype of a `MixedPrecisionPolicy`, and without effect when written.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing insert."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def values_name(attribute: str) -> str:
    """The name of the compact values of a sparsified module's parameter."""
    return "values" if attribute == "weight" else f"{attribute}_values"


def dense_name(name: str) -> str:
    """The parameter whose compact values have this name; any other name is returned as it is."""
    owner, dot, attribute = name.rpartition(".")
    return owner + dot + ("weight" if attribute == "values" else attribute.removesuffix("_values"))


def all_tensors(model: Mapping[str, Tensor] | nn.Module, argument: str) -> dict[str, Tensor]:
    """A module's named parameters, or a mapping's items, detached. Tied tensors are under each of their names.
    ValueError for a sparsified model, TypeError for anything else.
    """
    if isinstance(model, nn.Module):
        reshard(model)
        model = {plain_name(n): p for n, p in unwrapped(model).named_parameters(remove_duplicate=False)}
    check_mapping(model, argument, "a module or ")
    for name, tensor in model.items():
        if not isinstance(name, str):
            raise TypeError(f"{argument} must have names that are strings, got {name!r}")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{argument}[{name!r}] must be a torch.Tensor, got {type(tensor).__name__}")
    for name, tensor in model.items():
        dense = model.get(dense_name(name)) if dense_name(name) != name else None
        if dense is not None and tensor.dim() == 1 and tensor.numel() <= dense.numel() and tensor.is_floating_point():
            raise ValueError(
                f"{argument} is sparsified ({name!r} beside {dense_name(name)!r}): densify(model) first, or, to "
                "read it only, pass nn.plain_tensors(model)"
            )
    return {n: t.detach() for n, t in model.items()}


def untied(tensors: Mapping[str, Tensor], argument: str) -> dict[str, Tensor]:
    """The tensors in the order of their names, tied ones only under the first. Errors as `tied_names`."""
    return {n: tensors[n] for n, first in sorted(tied_names(tensors, argument).items()) if n == first}


def tied_names(tensors: Mapping[str, Tensor], argument: str) -> dict[str, str]:
    """Name → the first of the names of the same tensor: of the same memory, dtype, shape and strides. ValueError where
    tensors share a part of their memory.
    """
    first: dict[Any, str] = {}
    tied, spans = {}, []
    for name, tensor in tensors.items():
        tied[name] = name
        # an expanded tensor is read, never written
        if not has_memory(tensor) or torch._debug_has_internal_overlap(tensor) == 1:
            continue
        start, end = _memory_span(tensor)
        tied[name] = first.setdefault((tensor.device, start, tensor.dtype, tensor.shape, tensor.stride()), name)
        if tied[name] == name:
            spans.append((str(tensor.device), start, end, name))
    cluster: list[tuple[str, int, int, str]] = []
    for span in sorted(spans):
        if cluster and (span[0] != cluster[0][0] or span[1] >= max(end for _, _, end, _ in cluster)):
            _check_apart(cluster, tensors, argument)
            cluster = []
        cluster.append(span)
    _check_apart(cluster, tensors, argument)
    return tied


def _check_apart(spans: list[tuple[str, int, int, str]], tensors: Mapping[str, Tensor], argument: str) -> None:
    """ValueError where tensors of overlapping spans have a byte in common (columns of one matrix have none)."""
    if len(spans) < 2:
        return
    origin, end = spans[0][1], max(end for _, _, end, _ in spans)
    taken = torch.zeros(end - origin, dtype=torch.bool, device="cpu")
    for _, start, _, name in spans:
        tensor, size = tensors[name], tensors[name].element_size()
        own = taken.as_strided((*tensor.shape, size), (*(size * step for step in tensor.stride()), 1), start - origin)
        if bool(own.any()):
            raise ValueError(f"{argument}[{name!r}] shares a part of its memory with another tensor")
        own.fill_(True)


def tied_in_either(base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, str]:
    """`tied`, the `tied_names` of the base, and names of tensors that are tied in `tuned` and equal in the base."""
    tied = dict(tied)
    for name, first in tied_names({n: tuned[n] for n in base if n in tuned}, "tuned").items():
        if name != first and tied[name] == name and same_bits(base[name], base[first]):
            tied[name] = tied[first]
    return {n: tied[first] for n, first in tied.items()}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape, dtype and content, bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    pair = [t.detach().resolve_conj().resolve_neg().contiguous() for t in (one, other.to(one.device))]
    size = pair[0].element_size()
    return torch.equal(*(t.view(-1).view(INTEGERS[min(size, 8)]) for t in pair))  # bytes take several times as long


def with_tied_names(tuned: Mapping[str, Tensor], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """`tuned` with the first name of each tied tensor of the base, also where it has only another. ValueError where
    tensors that are tied in the base differ.
    """
    found = dict(tuned)
    for name, first in tied.items():
        if name != first and name in found:
            other = found.setdefault(first, found[name])
            one = found[name].to(other.device)
            if one.data_ptr() != other.data_ptr() and (one.shape != other.shape or bool((one != other).any())):
                raise ValueError(f"base has one tensor as {first!r} and {name!r}, which differ in tuned")
    return found


def check_mask_layout(names: Sequence[str], shapes: Sequence[Sequence[int]]) -> None:
    """ValueError or TypeError unless a mask can have tensors of these names and shapes."""
    for argument, given in (("names", names), ("shapes", shapes)):
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"{argument} must be a sequence, got {type(given).__name__}")
    if others := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"names must be strings, got {others[0]!r}")
    if len(names) != len(shapes):
        raise ValueError(f"names and shapes differ in length: {len(names)} and {len(shapes)}")
    for before, after in zip(names, names[1:]):
        if before >= after:
            raise ValueError(f"names must be unique and ascending, got {before!r} before {after!r}")
    for name, shape in zip(names, shapes):
        sizes = shape if isinstance(shape, Sequence) else [None]
        if any(isinstance(n, bool) or not hasattr(n, "__index__") for n in sizes):
            raise TypeError(f"tensor {name!r} must have a shape of ints, got {shape!r}")
        if any(n < 0 for n in shape):
            raise ValueError(f"tensor {name!r} of shape {tuple(shape)} has a negative size")
        if rows_and_columns(shape)[1] > torch.iinfo(torch.int32).max:
            raise ValueError(f"tensor {name!r} of shape {tuple(shape)} has more than 2**31 - 1 columns")
    if sum(math.prod(max(1, n) for n in shape) for shape in shapes) > torch.iinfo(torch.int64).max:
        raise ValueError("shapes: the tensors have more than 2**63 - 1 elements")
