"""Masked modules: `sparsify` puts them into a model, `densify` takes them out again.

Each masked parameter keeps its dense tensor, frozen and always up to date, and gets a compact trainable `values` parameter.
Gradients, optimizer state and all-reduce are then of size nnz. After the step of any torch optimizer a hook writes the values
into the dense tensors; `SparseAdamW` does so in its own launch.
"""

import warnings
import weakref
from collections.abc import Iterable, Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from deftx_kernels.functional import masked_embedding, masked_linear, masked_matmul
from deftx_kernels.mask import CSRMask


class MaskedParameter(NamedTuple):
    """A masked parameter: the dense tensor, its compact values, and the mask of that one tensor (named as in the model)."""

    dense: nn.Parameter  # any shape
    values: nn.Parameter  # [nnz]
    mask: CSRMask


_OWNERS: "weakref.WeakSet[Masked]" = weakref.WeakSet()


class Masked(nn.Module):
    """Mixin of every module with masked parameters; `masks` maps a parameter's own name in the module to its CSRMask."""

    masks: dict[str, CSRMask]
    values: nn.Parameter  # [nnz], beside `weight`

    def own(self, leaf: str, values: nn.Parameter, mask: CSRMask, required_grad: bool) -> None:
        """Give the parameter `leaf` compact values, and freeze it; `densify` sets `required_grad` again."""
        self.__dict__.setdefault("masks", {})[leaf] = mask
        self.register_parameter(values_name(leaf), values)
        self.__dict__.setdefault("_required_grad", {})[leaf] = required_grad
        self._parameters[leaf].requires_grad_(False)  # type: ignore[union-attr]
        _OWNERS.add(self)

    def masked(self) -> Iterator[MaskedParameter]:
        for leaf, mask in self.masks.items():
            yield MaskedParameter(self._parameters[leaf], self._parameters[values_name(leaf)], mask)  # type: ignore[arg-type]

    def read(self, leaf: str) -> Tensor | None:
        """The dense tensor; where it is masked, its gradient goes to the compact values."""
        dense = self._parameters[leaf]
        if leaf not in self.masks:
            return dense
        mask = self.masks[leaf]
        return _GatherGradient.apply(dense, self._parameters[values_name(leaf)], mask.crow_indices, mask.col_indices)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for leaf, mask in self.masks.items():
            self.masks[leaf] = mask.to(self._parameters[leaf].device)  # type: ignore[union-attr]
        return self

    def __setstate__(self, state):  # a deepcopy or an unpickled module owns its values, too
        super().__setstate__(state)
        _OWNERS.add(self)


def values_name(leaf: str) -> str:
    """The name of the compact parameter beside the parameter `leaf`."""
    return "values" if leaf == "weight" else f"{leaf}_values"


class _GatherGradient(torch.autograd.Function):
    """The dense tensor as it is, with a gradient for its compact values alone."""

    @staticmethod
    def forward(dense, values, crow_indices, col_indices):
        return dense.view_as(dense)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, values, crow_indices, col_indices = inputs
        ctx.dtype = values.dtype
        ctx.save_for_backward(crow_indices, col_indices)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        crow_indices, col_indices = ctx.saved_tensors
        compact = torch.ops.deftx.csr_gather([grad_output.contiguous()], crow_indices, col_indices)
        return None, compact.to(ctx.dtype), None, None


class MaskedLinear(Masked, nn.Linear):
    """`nn.Linear` of which only the mask's entries are trained, as the compact parameter `values`."""

    def forward(self, input: Tensor) -> Tensor:
        return masked_linear(input, self.weight, self.values, self.masks["weight"], self.read("bias"))


class MaskedEmbedding(Masked, nn.Embedding):
    """`nn.Embedding` of which only the mask's entries are trained, as the compact parameter `values`."""

    def forward(self, input: Tensor) -> Tensor:
        return masked_embedding(input, self.weight, self.values, self.masks["weight"], self.padding_idx)


class _MaskedConv1D(Masked):
    def forward(self, x: Tensor) -> Tensor:
        return masked_matmul(x, self.get_parameter("weight"), self.values, self.masks["weight"], self.read("bias"), transposed=True)


def _read(leaf: str, module: Masked) -> Tensor | None:
    return module.read(leaf)


@cache
def _masked_class(original: type, leaves: frozenset[str]) -> tuple[type, frozenset[str]]:
    """The masked class of a module class, and the parameters that it can train only by gathering a dense gradient."""
    if "weight" in leaves:
        rest = leaves - {"weight", "bias"}
        if original is nn.Linear and not rest:
            return MaskedLinear, frozenset()
        if original is nn.Embedding and not rest:
            return MaskedEmbedding, frozenset()
        if original.__name__ == "Conv1D" and original.__module__.startswith("transformers.") and not rest:
            return type("MaskedConv1D", (_MaskedConv1D, original), {}), frozenset()
    # Any other module reads its parameters as attributes, so a property stands before each of them.
    properties = {leaf: property(partial(_read, leaf)) for leaf in leaves}
    return type(f"Masked{original.__name__}", (Masked, original), properties), leaves


def sparsify(model: nn.Module, mask: CSRMask) -> nn.Module:
    """Train only the mask's entries: replace, in place, the modules that own the mask's tensors by masked ones.

    `nn.Linear`, `nn.Embedding` and transformers' `Conv1D` compute compact weight gradients directly. A tensor of any other module
    falls back to a dense gradient that is gathered and dropped; one warning names those. Each masked tensor is frozen and gets a
    compact parameter (`values` beside `weight`, `NAME_values` beside NAME), float32 or, for float64 tensors, float64; all of them
    are views of one flat buffer. Tied tensors share their values. Parameters outside the mask keep their `requires_grad`.

    Args:
        model: the plain model, on the mask's device.
        mask: over some of its `named_parameters()`.

    Returns:
        The same model.

    Raises:
        ValueError: the model is sparsified already, lacks a tensor of the mask, or has it in another shape or on another device.
    """
    if any(isinstance(m, Masked) for m in model.modules()):
        raise ValueError("model is sparsified already: densify(model) first")
    tensors = mask.select(dict(model.named_parameters()), "model")
    for name, tensor in zip(mask.names, tensors):
        if not tensor.is_floating_point():
            raise TypeError(f"model's tensor {name!r} must be floating point, got {tensor.dtype}")
    name_of = {id(t): n for n, t in zip(mask.names, tensors)}
    required_grad = {n: t.requires_grad for n, t in zip(mask.names, tensors)}
    values = _flat_values(mask, tensors)
    slow: set[str] = set()
    for module in list(model.modules()):
        owned = {leaf: name_of[id(p)] for leaf, p in module._parameters.items() if id(p) in name_of}
        if not owned:
            continue
        masked_class, gathered = _masked_class(type(module), frozenset(owned))  # type: ignore[arg-type]
        if masked_class is MaskedEmbedding and (module.max_norm is not None or module.scale_grad_by_freq or module.sparse):
            masked_class, gathered = _masked_class.__wrapped__(type("Embedding", (nn.Embedding,), {}), frozenset(owned))
        slow.update(owned[leaf] for leaf in gathered)
        module.__dict__["_dense_class"] = type(module)
        module.__class__ = masked_class
        for leaf, name in owned.items():
            module.own(leaf, values[name], mask[name], required_grad[name])  # type: ignore[operator]
    if slow:
        warnings.warn(
            f"{len(slow)} masked tensors belong to no Linear, Embedding or Conv1D weight or bias and are trained through a dense "
            f"gradient that is then gathered: {', '.join(sorted(slow))}",
            stacklevel=2,
        )
    return model


def _flat_values(mask: CSRMask, tensors: Iterable[Tensor]) -> dict[str, nn.Parameter]:
    """Name → the parameter of its values, a view of one flat buffer per dtype."""
    named = dict(zip(mask.names, tensors))
    values = {}
    for dtype in (torch.float32, torch.float64):
        names = [n for n, t in named.items() if (t.dtype == torch.float64) == (dtype == torch.float64)]
        if not names:
            continue
        part = mask if len(names) == len(mask) else mask.restrict(names)
        flat = part.gather(named).to(dtype)
        values.update({n: nn.Parameter(v) for n, v in part.split(flat).items()})
    return values


def densify(model: nn.Module) -> nn.Module:
    """The plain model back, in place: modules, names and `requires_grad` as before `sparsify`, the trained weights in place.

    Raises:
        ValueError: the model is not sparsified.
    """
    owners = [m for m in model.modules() if isinstance(m, Masked)]
    if not owners:
        raise ValueError("model is not sparsified")
    _write_values(record for owner in owners for record in owner.masked())
    for owner in owners:
        for leaf, required_grad in owner.__dict__.pop("_required_grad").items():
            del owner._parameters[values_name(leaf)]
            owner._parameters[leaf].requires_grad_(required_grad)  # type: ignore[union-attr]
        del owner.__dict__["masks"]
        _OWNERS.discard(owner)
        owner.__class__ = owner.__dict__.pop("_dense_class")
    return model


def masked_parameters(model: nn.Module) -> dict[str, MaskedParameter]:
    """Name in the plain model → masked parameter, tied ones once; empty for a model that is not sparsified."""
    records = (r for m in model.modules() if isinstance(m, Masked) for r in m.masked())
    return dict(sorted({r.mask.names[0]: r for r in records}.items()))


def owners_of(parameters: Iterable[Tensor]) -> dict[int, MaskedParameter]:
    """id(values) → masked parameter, for those of the tensors that are compact values of a live module."""
    wanted = {id(p) for p in parameters}
    return {id(r.values): r for owner in list(_OWNERS) for r in owner.masked() if id(r.values) in wanted}


def _write_values(records: Iterable[MaskedParameter]) -> None:
    for dense, values, mask in {id(r.dense): r for r in records}.values():
        mask.scatter_({mask.names[0]: dense}, values)


def _after_step(optimizer: Optimizer, args, kwargs) -> None:
    if not getattr(optimizer, "writes_masked_weights", False) and _OWNERS:
        _write_values(owners_of(p for group in optimizer.param_groups for p in group["params"]).values())


register_optimizer_step_post_hook(_after_step)
