"""Weights of several experts in one parameter [experts, m, n], as transformers' mixtures of experts have them.

The forward of the module runs unchanged, whatever its class and experts implementation. While it runs, it reads a
masked weight as an `ExpertsWeight`, whose products have compact gradients: those of the matrix of one expert (a loop
over the experts), of the matrices of several ones (`torch.bmm`) and of groups of tokens (`grouped_mm`). Any other use
has a dense gradient that is gathered, with a warning.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deftx_kernels.mask import CSRMask
from deftx_kernels.nn.autocast_copy import is_capturing
from deftx_kernels.nn.functional import (
    gather_gradient,
    is_traced,
    masked_bmm_unchecked,
    masked_grouped_mm_unchecked,
    masked_linear_unchecked,
)


def weights_of_experts(module: nn.Module, attrs: Iterable[str]) -> frozenset[str]:
    """Those of the module's parameters that are weights of experts: of three dimensions, the first of which is a number
    of experts that the module has as an attribute (`num_experts`).
    """
    numbers = {v for k, v in vars(module).items() if "experts" in k and type(v) is int}
    parameters = ((attr, module._parameters[attr]) for attr in attrs)
    return frozenset(a for a, p in parameters if p is not None and p.dim() == 3 and len(p) in numbers)


# ---- weights in a forward ----
class _Source(NamedTuple):
    """What all uses of a weight in one forward share."""

    values: Tensor  # [nnz]
    masks: tuple[CSRMask, ...]  # [experts]
    parts: list[Tensor]  # the values of each expert, once they are needed

    def values_of(self, expert: int) -> Tensor:
        if not self.parts:  # one split for all experts: its backward concatenates their gradients
            self.parts.extend(self.values.split([mask.nnz for mask in self.masks]))
        return self.parts[expert]


class ExpertsWeight(Tensor):
    """A masked weight [experts, m, n], or some of its matrices. Other operations than those of `_OPERATIONS` see a
    plain tensor, whose gradient is dense.
    """

    source: _Source
    experts: int | Tensor | None  # which: all, one (then of two dimensions), or int [s]
    transposed: bool  # the matrices are [n, m]

    @classmethod
    def of(cls, weight: Tensor, source: _Source, experts: int | Tensor | None, transposed: bool) -> "ExpertsWeight":
        weight = weight.as_subclass(cls)
        weight.source, weight.experts, weight.transposed = source, experts, transposed
        return weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        operation = None
        if torch.is_grad_enabled():  # without gradients the result is a constant
            operation = _OPERATIONS.get(func.__self__.__name__ if name == "__get__" else name)
        with torch._C.DisableTorchFunctionSubclass():
            out = NotImplemented if operation is None else operation(func, *args, **kwargs)
            return func(*args, **kwargs) if out is NotImplemented else out


# Operations return NotImplemented for arguments of which they make no compact gradient.
def _index(func: Callable, weight: Any, index: Any) -> Any:
    is_tensor = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.int64) and index.dim() <= 1
    if weight.experts is not None or not (is_tensor or type(index) is int):
        return NotImplemented
    if type(index) is int or index.dim() == 0:
        index = int(index)
    out = func(weight, index)
    return ExpertsWeight.of(out, weight.source, index % len(weight), weight.transposed)


def _transpose(func: Callable, weight: Any, *dims: int, **named_dims: int) -> Any:
    given = [*dims, *named_dims.values()]
    if {dim % weight.dim() for dim in given} not in (set(), {weight.dim() - 2, weight.dim() - 1}):
        return NotImplemented
    return ExpertsWeight.of(func(weight, *dims, **named_dims), weight.source, weight.experts, not weight.transposed)


def _reverse(func: Callable, weight: Any) -> Any:
    return _transpose(func, weight) if weight.dim() == 2 else NotImplemented


def _cast(func: Callable, weight: Any, *args: Any, **kwargs: Any) -> Any:
    out = func(weight, *args, **kwargs)
    if not isinstance(weight, ExpertsWeight) or out is weight or not out.is_floating_point():
        return out
    if out.device != weight.device:
        return out
    return ExpertsWeight.of(out, weight.source, weight.experts, weight.transposed)


def _linear(func: Callable, x: Any = None, weight: Any = None, bias: Any = None, **others: Any) -> Any:
    if others or not _are_operands(x, weight) or type(weight.experts) is not int:
        return NotImplemented
    values, mask = weight.source.values_of(weight.experts), weight.source.masks[weight.experts]
    # The mask is of the matrix as the parameter has it, [m, n]
    matrix = weight.mT if weight.transposed else weight
    return masked_linear_unchecked(x, matrix, values, mask, bias, transposed=weight.transposed)


def _matmul(func: Callable, x: Any = None, weight: Any = None, **others: Any) -> Any:
    if others or not _are_operands(x, weight) or type(weight.experts) is not int:
        return _bmm(func, x, weight, **others)
    values, mask = weight.source.values_of(weight.experts), weight.source.masks[weight.experts]
    matrix = weight.mT if weight.transposed else weight
    return masked_linear_unchecked(x, matrix, values, mask, None, transposed=not weight.transposed)


def _bmm(func: Callable, a: Any = None, b: Any = None, **others: Any) -> Any:
    weight_first = isinstance(a, ExpertsWeight)
    x, weight = (b, a) if weight_first else (a, b)
    if others or not _are_operands(x, weight) or not (x.dim() == weight.dim() == 3 and len(x) == len(weight)):
        return NotImplemented
    source, experts = weight.source, weight.experts
    return masked_bmm_unchecked(
        x, weight, source.values, experts, source.masks, weight_first=weight_first, transposed=weight.transposed
    )


def _grouped_mm(
    func: Callable, x: Any = None, weight: Any = None, offs: Any = None, bias: Any = None, **others: Any
) -> Any:
    has_others = bias is not None or any(value is not None for value in others.values())
    if has_others or offs is None or not _are_operands(x, weight) or weight.experts is not None or x.dim() != 2:
        return NotImplemented
    source = weight.source
    return masked_grouped_mm_unchecked(x, weight, source.values, offs, source.masks, func, transposed=weight.transposed)


def _are_operands(x: Any, weight: Any) -> bool:
    return isinstance(weight, ExpertsWeight) and isinstance(x, Tensor) and not isinstance(x, ExpertsWeight)


_OPERATIONS: dict[str, Callable] = {
    "__getitem__": _index,
    **dict.fromkeys(("transpose", "mT", "t"), _transpose),
    "T": _reverse,
    **dict.fromkeys(("to", "float", "double", "half", "bfloat16"), _cast),
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "mm"), _matmul),
    "bmm": _bmm,
    **dict.fromkeys(("_grouped_mm", "grouped_mm", "grouped_mm_fallback"), _grouped_mm),  # torch's and transformers'
}


# ---- masked modules ----
_RUNNING = threading.local()  # `forward`: the innermost running forward of a module of experts, and its sources


class Experts:
    """Mixin of masked modules of experts: in their forward, the attributes of `expert_attribute` are ExpertsWeights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling():
            return _outside_of_graphs(self, args, kwargs)
        return self.forward_with_compact_gradients(*args, **kwargs)

    def forward_with_compact_gradients(self, *args: Any, **kwargs: Any) -> Any:
        before = getattr(_RUNNING, "forward", None)
        _RUNNING.forward = self, {}
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            _RUNNING.forward = before


@torch._disable_dynamo
def _outside_of_graphs(module: Experts, args: Any, kwargs: Any) -> Any:
    """torch.compile runs it as it is: a graph would hold the dense gradients."""
    return module.forward_with_compact_gradients(*args, **kwargs)


def expert_attribute(attr: str, ordinary: property) -> property:
    """The property of an `Experts` that returns a masked weight; `ordinary`: the one of any masked parameter."""

    ordinary_read: Any = ordinary.fget

    def read(module: Any) -> Any:
        present = module._parameters.get(attr)
        if not torch.is_grad_enabled() or is_traced() or is_traceable_wrapper_subclass(present):
            return ordinary_read(module)
        running = getattr(_RUNNING, "forward", None)
        if running is not None and running[0] is module:
            return _in_forward(module, attr, running[1])
        if torch._C._current_graph_task_id() != -1:  # a checkpointed part of the forward runs again in backward
            return _in_forward(module, attr, {})
        weight, entry = ordinary_read(module), module._masked_entries[attr]
        if weight.requires_grad:
            masks, name = entry.expert_masks, entry.name
            weight.register_hook(lambda gradient: masks.warn(name))
        return weight

    return property(read, ordinary.fset, ordinary.fdel)


def _in_forward(module: Any, attr: str, sources: dict[str, tuple[Tensor, CSRMask, _Source]]) -> Tensor:
    """The masked weight as a forward sees it. Each read saves the same tensors for backward, whether it is the first
    one or not: checkpointing compares their number.
    """
    entry = module._masked_entries[attr]
    if attr not in sources:
        dense, values, mask = module._masked(attr)
        is_compact = values.requires_grad and not is_capturing(dense)
        sources[attr] = dense, mask, _Source(values, entry.expert_masks.of(mask) if is_compact else (), [])
    dense, mask, source = sources[attr]
    if not source.values.requires_grad:
        return dense
    weight, masks, name = gather_gradient(dense, source.values, mask), entry.expert_masks, entry.name
    if is_capturing(dense):  # the numbers of the experts' tokens would have to be read
        masks.warn(name)
        return weight
    weight.register_hook(lambda gradient: masks.warn(name))
    return ExpertsWeight.of(weight, source, None, False)
