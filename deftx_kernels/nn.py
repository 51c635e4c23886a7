"""Masked modules: `sparsify` puts them into a model, `densify` takes them out again.

Each masked parameter keeps its dense tensor, frozen and always up to date, and gets a compact trainable `values` parameter.
Gradients, optimizer state and all-reduce are then of size nnz. After the step of any torch optimizer a hook writes the values
into the dense tensors; `SparseAdamW` does so in its own launch.
"""

import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from deftx_kernels._masked import masked_lookup, masked_matmul, masked_tensor, scattered
from deftx_kernels.mask import CSRMask


class MaskedParameter(NamedTuple):
    """A masked parameter: the dense tensor, its compact values, and the mask of that one tensor (named as in the model)."""

    dense: nn.Parameter  # any shape
    values: nn.Parameter  # [nnz]
    mask: CSRMask


@dataclass(eq=False)
class _Entry:
    """What the modules that own one masked tensor share."""

    mask: CSRMask
    values: nn.Parameter  # [nnz]
    required_grad: bool  # of the dense tensor, before
    tied: bool = False  # whether several modules own it
    version: int = -1  # of the values that the dense tensor holds

    @property
    def name(self) -> str:
        return self.mask.names[0]

    def write(self, dense: Tensor) -> None:
        """The values into the dense tensor."""
        if dense.is_contiguous():  # mask.scatter_ without its checks: the hook calls this for every tensor
            values = self.values.detach().to(dense.dtype)
            torch.ops.deftx.csr_scatter_([dense.detach()], self.mask.crow_indices, self.mask.col_indices, values)
            torch.autograd.graph.increment_version(dense)
        else:
            self.mask.scatter_({self.name: dense}, self.values)
        self.version = _version(self.values)

    def read(self, dense: Tensor) -> None:
        """The values from the dense tensor; where they are what was rounded to it, they keep their precision."""
        with torch.no_grad():
            found = self.mask.gather({self.name: dense})
            self.values.copy_(torch.where(self.values.to(found.dtype) == found, self.values, found.to(self.values.dtype)))
        self.version = _version(self.values)

    def fits(self, dense: Tensor, values: Tensor) -> bool:
        """Whether a state's dense tensor has its values at the mask's entries; other shapes are for torch to refuse."""
        if dense.shape != self.mask.shapes[0] or values.shape != self.values.shape:
            return True
        found = self.mask.to(dense.device).gather({self.name: dense})
        return torch.allclose(found, values.to(found), rtol=0.0, atol=0.0, equal_nan=True)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_OWNERS: "weakref.WeakSet[Masked]" = weakref.WeakSet()


def values_name(leaf: str) -> str:
    """The name of the compact parameter beside the parameter `leaf`."""
    return "values" if leaf == "weight" else f"{leaf}_values"


class Masked(nn.Module):
    """Mixin of every module with masked parameters. `sparsify` makes a module one by changing its class."""

    _masked_entries: dict[str, _Entry]  # by the parameter's own name in the module
    _dense_class: type
    _parameters: dict[str, Any]

    def __init__(self, *_, **__) -> None:
        raise TypeError(f"a {type(self).__name__} is made by sparsify(model, mask)")

    def _masked(self, leaf: str) -> tuple[Tensor, Tensor, CSRMask]:
        """Dense tensor, values and mask of a masked parameter, as forward is to use them."""
        entry = self._masked_entries[leaf]
        dense, values = self._parameters.get(leaf), self._parameters.get(values_name(leaf))
        if dense is None or values is None or dense.shape != entry.mask.shapes[0]:
            raise RuntimeError(f"{entry.name!r} is sparsified and has been replaced or resized since: densify the model first")
        if values is not entry.values:  # torch.func.functional_call
            dense = scattered(dense, values, entry.mask)
        elif not torch.compiler.is_compiling() and _version(values) != entry.version:  # changed otherwise than by a whole step
            entry.write(dense)
        return dense, values, entry.mask

    def _apply(self, fn, recurse=True):
        before = {leaf: entry.values.data for leaf, entry in self._masked_entries.items()}
        super()._apply(fn, recurse)
        for leaf, entry in self._masked_entries.items():
            dense, values = self._parameters[leaf], self._parameters[values_name(leaf)]
            if values.dtype != (dtype := _values_dtype(dense)):  # a model cast to 16 bits keeps its values in 32
                values.data = before[leaf].to(dense.device, dtype)
                values.grad = None if values.grad is None else values.grad.to(dtype)
            entry.values, entry.mask = values, entry.mask.to(dense.device)
            if not dense.is_meta:
                entry.write(dense)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for leaf in self._masked_entries:
            self._masked(leaf)  # brings the dense tensor up to date
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for leaf, entry in self._masked_entries.items():
            if entry.tied:  # once, under the first of the names: safetensors refuses shared tensors
                mine = destination.pop(name := prefix + values_name(leaf))
                others = (t for n, t in destination.items() if n.endswith("values") and t.device == mine.device)
                if not any(t.shape == mine.shape and t.is_set_to(mine) for t in others):
                    destination[name] = mine

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Dense tensors and values fit each other afterwards: a state without values gives those that its dense tensors hold."""
        for leaf, entry in self._masked_entries.items():
            dense, values = state_dict.get(prefix + leaf), state_dict.get(prefix + values_name(leaf))
            if dense is not None and values is not None and not entry.fits(dense, values):
                error_msgs.append(f"the values of {prefix}{leaf} are not those at this model's mask: saved with another mask.")
                return
        if any(entry.tied for entry in self._masked_entries.values()):  # load_state_dict(assign=True) would untie
            metadata = {**metadata, "assign_to_params_buffers": False}
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        for leaf, entry in self._masked_entries.items():
            dense, entry.values = self._parameters[leaf], self._parameters[values_name(leaf)]
            name = prefix + values_name(leaf)
            if name in state_dict and state_dict[name].shape == entry.values.shape:
                entry.write(dense)
            else:
                entry.read(dense)
            if name in missing_keys and (entry.tied or prefix + leaf in state_dict):
                missing_keys.remove(name)

    def __setstate__(self, state):  # a deepcopy or an unpickled module owns its values, too
        super().__setstate__(state)
        _OWNERS.add(self)

    def __reduce_ex__(self, protocol):  # pickle would not find classes that are made at run time by name
        state = super().__reduce_ex__(max(int(protocol), 2))[2]
        return _blank, (self._dense_class, frozenset(self._masked_entries), isinstance(self, _Direct)), state


class _Direct(Masked):
    """Mixin of the modules that compute compact gradients directly."""

    @property
    def masks(self) -> dict[str, CSRMask]:
        """The masks of `weight` and, where it is masked, `bias`."""
        return {leaf: entry.mask for leaf, entry in self._masked_entries.items()}


class _Matmul(_Direct):
    bias: Any
    _transposed = False

    def forward(self, input: Tensor) -> Tensor:
        bias = self._masked("bias") if "bias" in self._masked_entries else (self.bias,)
        return masked_matmul(input, *self._masked("weight"), *bias, transposed=self._transposed)


class MaskedLinear(_Matmul, nn.Linear):
    """`nn.Linear` of which only the mask's entries are trained, as the compact parameter `values`. Made by `sparsify`."""


class MaskedEmbedding(_Direct, nn.Embedding):
    """`nn.Embedding` of which only the mask's entries are trained, as the compact parameter `values`. Made by `sparsify`."""

    def forward(self, input: Tensor) -> Tensor:
        return masked_lookup(input, *self._masked("weight"), self.padding_idx)


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


@cache
def _masked_class(original: Any, leaves: frozenset[str], direct: bool) -> type:
    if direct and original in (nn.Linear, nn.Embedding):
        return MaskedLinear if original is nn.Linear else MaskedEmbedding
    if direct:
        return type("MaskedConv1D", (_Matmul, original), {"_transposed": True})
    # Any other module reads its parameters as attributes, so a property stands before each of them.
    return type(f"Masked{original.__name__}", (Masked, original), {leaf: _property(leaf) for leaf in leaves})


def _property(leaf: str) -> property:
    return property(lambda module: masked_tensor(*module._masked(leaf)))


def _blank(original: type, leaves: frozenset[str], direct: bool) -> nn.Module:
    """What pickle and deepcopy fill."""
    return nn.Module.__new__(_masked_class(original, leaves, direct))


def sparsify(model: nn.Module, mask: CSRMask) -> nn.Module:
    """Train only the mask's entries: replace, in place, the modules that own the mask's tensors by masked ones.

    `nn.Linear`, `nn.Embedding` and transformers' `Conv1D` compute compact gradients directly. A tensor of any other module, also of
    a subclass of these, falls back to a dense gradient that is gathered and dropped; one warning names those. Each masked tensor is
    frozen and gets a compact parameter (`values` beside `weight`, `NAME_values` beside NAME), float32 or, for float64 tensors,
    float64, also after the model is cast; all of them are views of one flat buffer. Tied tensors share their values. Parameters
    outside the mask keep their `requires_grad`.

    The values are what is trained. The step of any torch optimizer over them and `load_state_dict` bring the dense tensors up to
    date, and so does the next forward (not a compiled one) where they were changed otherwise; what is written into masked entries
    of a dense tensor by hand is lost. A state dict holds values and dense tensors; that of a plain model can be loaded, too.
    Whoever reads the `weight` of a masked Linear, Embedding or Conv1D outside of its forward gets the frozen tensor.

    Args:
        model: the plain model, on the mask's device; all of it: modules elsewhere that share its tensors are not seen.
        mask: over some of its `named_parameters()`.

    Returns:
        The same model.

    Raises:
        ValueError: the model is sparsified already, lacks a tensor of the mask, has it in another shape or on another device, or in
            a module that cannot be masked (a script module, an embedding with `max_norm`). Nothing has changed then.
        TypeError: a tensor of the mask is not floating point. Nothing has changed then.
    """
    if any(isinstance(m, Masked) for m in model.modules()):
        raise ValueError("model is sparsified already: densify(model) first")
    tensors = dict(zip(mask.names, mask.select(dict(model.named_parameters()), "model")))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"model's tensor {name!r} must be floating point, got {tensor.dtype}")
    name_of = {id(t): n for n, t in tensors.items()}
    plan: list[tuple[Any, type, dict[str, str]]] = []  # module, its new class, its masked parameters' names in the model
    slow: set[str] = set()
    for module in model.modules():
        if owned := {leaf: name_of[id(p)] for leaf, p in module._parameters.items() if id(p) in name_of}:
            kind: Any = type(module)
            direct, gathers = _ways(module, owned)
            plan.append((module, _masked_class(kind, frozenset(owned), direct), owned))
            slow.update(owned.values() if gathers else ())
    if slow:
        warnings.warn(
            f"{len(slow)} masked tensors belong to no Linear, Embedding or Conv1D weight or bias and are trained through a dense "
            f"gradient that is then gathered: {', '.join(sorted(slow))}",
            stacklevel=2,
        )
    entries = _entries(mask, tensors)
    for name, owners in Counter(name for _, _, owned in plan for name in owned.values()).items():
        entries[name].tied = owners > 1
        tensors[name].requires_grad_(False)
    for module, masked_class, owned in plan:
        for leaf, name in owned.items():
            module.register_parameter(values_name(leaf), entries[name].values)
        module.__dict__.update(_masked_entries={leaf: entries[n] for leaf, n in owned.items()}, _dense_class=type(module))
        module.__class__ = masked_class
        _OWNERS.add(module)
    return model


def _ways(module: Any, owned: dict[str, str]) -> tuple[bool, bool]:
    """Whether the module computes compact gradients directly, and whether it gathers dense ones of more than a bias."""
    first = next(iter(owned.values()))
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(f"{first!r} belongs to a script module, which cannot be masked")
    if getattr(module, "max_norm", None) is not None:
        raise ValueError(f"{first!r} belongs to an embedding with max_norm, which rewrites its weight in every forward")
    for leaf, name in owned.items():
        if hasattr(module, values_name(leaf)):
            raise ValueError(f"the module that owns {name!r} has an attribute {values_name(leaf)!r}, the name of compact values")
    kind = type(module)
    matmul = kind is nn.Linear or _is_conv1d(kind)
    known = matmul or (kind is nn.Embedding and not module.scale_grad_by_freq)
    # A forward of the instance's own (accelerate's hooks) reads the parameters as attributes.
    direct = known and "weight" in owned and owned.keys() <= {"weight", "bias"} and "forward" not in vars(module)
    return direct, not direct and not (matmul and set(owned) == {"bias"})


def _values_dtype(dense: Tensor) -> torch.dtype:
    return torch.float64 if dense.dtype == torch.float64 else torch.float32


def _entries(mask: CSRMask, tensors: dict[str, Tensor]) -> dict[str, _Entry]:
    """Name → entry; the values are views of one flat buffer per dtype."""
    entries = {}
    for dtype in (torch.float32, torch.float64):
        if names := [n for n, t in tensors.items() if _values_dtype(t) == dtype]:
            part = mask if len(names) == len(mask) else mask.restrict(names)
            for name, values in part.split(part.gather(tensors).to(dtype)).items():
                entries[name] = _Entry(part[name], nn.Parameter(values), tensors[name].requires_grad)
    return entries


def densify(model: nn.Module) -> nn.Module:
    """The plain model back, in place: modules, names and `requires_grad` as before `sparsify`, the trained weights in place.

    Raises:
        ValueError: the model is not sparsified, or a masked tensor has been replaced or resized since, or is tied to a masked one
            outside of the model. Nothing has changed then.
    """
    owners = [m for m in model.modules() if isinstance(m, Masked)]
    if not owners:
        raise ValueError("model is not sparsified")
    inside = set(map(id, owners))
    outside = {id(e) for o in list(_OWNERS) if id(o) not in inside for e in o._masked_entries.values()}
    for owner in owners:
        for leaf, entry in owner._masked_entries.items():
            if id(entry) in outside:
                raise ValueError(f"{entry.name!r} is tied to a module outside of this model: densify the whole model")
            if (dense := owner._parameters.get(leaf)) is None or dense.shape != entry.mask.shapes[0]:
                raise ValueError(f"{entry.name!r} has been replaced or resized since it was sparsified")
    for owner in owners:
        for leaf, entry in owner._masked_entries.items():
            entry.write(owner._parameters[leaf])
            owner._parameters[leaf].requires_grad_(entry.required_grad)
            del owner._parameters[values_name(leaf)]
        del owner._masked_entries
        _OWNERS.discard(owner)
        owner.__class__ = owner.__dict__.pop("_dense_class")
    return model


def _owned(modules: Iterable[nn.Module]) -> Iterator[tuple[_Entry, Any]]:
    """Entry and dense tensor of each masked parameter, tied ones once for each owner."""
    for module in modules:
        if isinstance(module, Masked):
            for leaf, entry in module._masked_entries.items():
                if (dense := module._parameters.get(leaf)) is not None:
                    yield entry, dense


def masked_parameters(model: nn.Module) -> dict[str, MaskedParameter]:
    """Name in the plain model → masked parameter, tied ones once; empty for a model that is not sparsified."""
    records = {entry.name: MaskedParameter(dense, entry.values, entry.mask) for entry, dense in _owned(model.modules())}
    return dict(sorted(records.items()))


def owners_of(parameters: Iterable[Tensor]) -> dict[int, MaskedParameter]:
    """id(values) → masked parameter, for those of the tensors that are compact values of a live module."""
    wanted = {id(p) for p in parameters}
    found = ((entry, dense) for entry, dense in _owned(list(_OWNERS)) if id(entry.values) in wanted)
    return {id(entry.values): MaskedParameter(dense, entry.values, entry.mask) for entry, dense in found}


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not _OWNERS:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    writes_itself = getattr(optimizer, "writes_masked_weights", False)
    ours, frozen = {}, set()
    for entry, dense in _owned(list(_OWNERS)):
        if id(entry.values) in held:
            if writes_itself:  # without a new version of the values: forward finds them as it left them
                return
            ours[id(entry)] = entry, dense
        elif id(dense) in held:
            frozen.add(entry.name)
    for entry, dense in ours.values():
        entry.write(dense)
    if frozen and not ours:
        warnings.warn(
            f"this {type(optimizer).__name__} was made before sparsify: it trains nothing of {min(frozen)!r} and others, which are "
            "frozen now. Make it after sparsify, over the values",
            stacklevel=4,
        )


register_optimizer_step_post_hook(_after_step)
