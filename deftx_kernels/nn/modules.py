"""The masked modules, and the functions that convert a model to them and back."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deftx_kernels.mask import CSRMask
from deftx_kernels.nn.autocast_copy import AutocastCopy
from deftx_kernels.nn.entries import DifferentiableWeight, Entry, ValuesBuffer
from deftx_kernels.nn.experts import Experts, expert_attribute
from deftx_kernels.nn.functional import (
    autocast_dtype,
    gather_gradient,
    is_traced,
    masked_embedding_unchecked,
    masked_linear_unchecked,
    raise_in_backward,
    scattered_copy,
)
from deftx_kernels.nn.maskable import check_module, check_trainable, compact_attributes, is_matmul
from deftx_kernels.nn.sharded import after_apply, shards_match, synchronise_shards
from deftx_kernels.ops.schemas import compute_dtype
from deftx_kernels.validation import plain_name, usable_in_backward, values_name

_FROZEN = "_frozen_by_sparsify"  # attribute of a module: the names of its parameters that `sparsify` has frozen


class Masked(nn.Module):
    """Mixin of all modules with masked parameters. `sparsify` changes the class of a module to one with this mixin."""

    _masked_entries: dict[str, Entry]  # by the parameter's name in the module
    _dense_class: type
    _compact: frozenset[str]  # the masked parameters whose compact gradients the module computes directly
    _parameters: dict[str, Any]

    def __init__(self, *_, **__) -> None:
        raise TypeError(f"a {type(self).__name__} is made by sparsify(model, mask)")

    def _masked(self, attr: str) -> tuple[Tensor, Tensor, CSRMask]:
        """Dense tensor, values and mask of a parameter, synchronised for a forward."""
        entry = self._masked_entries[attr]
        parameters, name = self._parameters, values_name(attr)
        dense, values = parameters.get(attr), parameters.get(name)
        if dense is None or values is None:  # FSDP1 replaces them by views during a forward
            dense, values = self.__dict__.get(attr), self.__dict__.get(name)
        if dense is None or values is None or dense.shape != entry.mask.shapes[0]:
            raise RuntimeError(entry.replaced_message)
        if values is not entry.values:  # torch.func.functional_call, FSDP
            if entry.is_sharded:  # gathered by FSDP2 from parts that are synchronised
                if not torch.compiler.is_compiling():
                    entry.check_gathered()
                return dense, values, entry.mask
            if is_traceable_wrapper_subclass(values):
                raise ValueError(entry.sharded_apart_message)
            return scattered_copy(dense, values, entry.mask), values, entry.mask
        if dense is entry.dense and not torch.compiler.is_compiling():
            entry.synchronise()
        return dense, values, entry.mask

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        for attr, entry in self.__dict__.get("_masked_entries", {}).items():
            if name not in (attr, values_name(attr)):
                continue
            if name == attr and isinstance(param, DifferentiableWeight) and param.entry is entry:
                return  # `tie_weights` of weights that are tied already
            if param is not entry.dense and param is not entry.values and not entry.is_replaceable:
                raise ValueError(f"{entry.name!r} is sparsified: densify the model before its {name} is replaced")
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        self._synchronise_if_possible()
        before = {a: (self._parameters[a], entry.values.detach()) for a, entry in self._masked_entries.items()}
        with self._replaceable_parameters():
            super()._apply(fn, recurse)
        for attr, entry in self._masked_entries.items():
            old_dense, old_values = before[attr]
            dense, values = self._parameters[attr], self._parameters[values_name(attr)]
            if entry.is_sharded:
                after_apply(entry, dense, values, old_values)
                continue
            if entry.dense is not old_dense:  # torch made new parameters for another owner: use them here too
                if entry.dense is not None:
                    self._parameters[attr], self._parameters[values_name(attr)] = entry.dense, entry.values
                continue
            if values.dtype != (dtype := compute_dtype(dense.dtype)):  # a cast to 16 bits leaves values in 32 bits
                Tensor.data.__set__(values, old_values.to(dense.device, dtype))  # type: ignore[attr-defined]
                values.grad = None if values.grad is None else values.grad.to(dtype)
            if values.device != old_values.device and not values.is_meta and values.dtype == entry.buffer.dtype:
                values.data = entry.buffer.view_of(entry, values.device).copy_(values.detach())
            entry.set_tensors(dense, values)
            if not dense.is_meta:
                entry.mask = entry.mask.to(dense.device)
                entry.write_values()
        return self

    @contextmanager
    def _replaceable_parameters(self) -> Iterator[None]:
        for entry in self._masked_entries.values():
            entry.is_replaceable = True
        try:
            yield
        finally:
            for entry in self._masked_entries.values():
                entry.is_replaceable = False

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for attr, entry in self._masked_entries.items():
            entry.find_shards()
            if not entry.is_sharded:
                self._masked(attr)  # synchronises
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for attr, entry in self._masked_entries.items():
            name = prefix + values_name(attr)
            if entry.is_sharded:
                continue
            if not keep_vars:
                destination[name] = _with_own_storage(destination[name])
                entry.values_tracker.add_alias(destination[name])
            if len(entry.owners) > 1:  # tied values under the first name only: safetensors raises for shared tensors
                mine = destination[name]
                others = (t for n, t in destination.items() if n != name and n.endswith("values"))
                if any(
                    t.device == mine.device and t.shape == mine.shape and t.data_ptr() == mine.data_ptr()
                    for t in others
                ):
                    del destination[name]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Loads values, which are then written into the dense tensors, or those of a plain model from its weights."""
        for attr, entry in self._masked_entries.items():
            given = state_dict.get(prefix + attr), state_dict.get(prefix + values_name(attr))
            entry.find_shards()
            if not (shards_match(entry, *given) if entry.is_sharded else entry.matches(*given)):
                name = prefix + attr
                error_msgs.append(f"the values of {name} do not belong to this model's mask: saved with another mask.")
                return
        tied = {attr for attr, entry in self._masked_entries.items() if len(entry.owners) > 1}
        if tied:  # load_state_dict(assign=True) would untie them
            metadata = {**metadata, "assign_to_params_buffers": False}
        with self._replaceable_parameters():  # by load_state_dict(assign=True)
            super()._load_from_state_dict(
                state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        for attr, entry in self._masked_entries.items():
            name = prefix + values_name(attr)
            entry.set_tensors(self._parameters[attr], self._parameters[values_name(attr)])
            if entry.dense.is_meta:
                continue
            has_values = name in state_dict and state_dict[name].shape == entry.values.shape
            if entry.is_sharded:
                synchronise_shards(entry, has_values)
            elif has_values:
                entry.write_values()
            else:
                entry.read_values()
            if name in missing_keys and (attr in tied or prefix + attr in state_dict):
                missing_keys.remove(name)

    def _synchronise_if_possible(self) -> None:
        for entry in self._masked_entries.values():
            entry.find_shards()
            entry.synchronise_if_possible()

    def __reduce_ex__(self, protocol):  # pickle cannot import classes that are made at run time
        self._synchronise_if_possible()
        state = super().__reduce_ex__(max(int(protocol), 2))[2]
        return _without_state, (self._dense_class, frozenset(self._masked_entries), self._compact), state

    def __setstate__(self, state):
        super().__setstate__(state)
        for attr, entry in self._masked_entries.items():
            entry.owners.add(self)
            self._parameters[attr], self._parameters[values_name(attr)] = entry.dense, entry.values


class _Direct(Masked):
    """Mixin of the modules that compute compact gradients directly."""

    @property
    def masks(self) -> dict[str, CSRMask]:
        """The masks of the masked parameters, by their names in the module."""
        return {attr: entry.mask for attr, entry in self._masked_entries.items()}


def _masked_attribute(attr: str) -> property:
    """The property of a module that returns a masked parameter with a gradient for its values."""

    def read(module: Masked) -> Any:
        if attr not in module._parameters and attr not in module.__dict__:
            raise AttributeError(attr)
        entry, present = module._masked_entries[attr], module._parameters.get(attr)
        if present is not None and is_traceable_wrapper_subclass(present):  # a DTensor, which FSDP2 looks for
            entry.find_shards()
            if not entry.is_sharded:
                raise ValueError(entry.sharded_apart_message)
            return present
        if entry.dense is not None and entry.dense.shape != entry.mask.shapes[0]:  # `resize_token_embeddings` reads it
            weight = raise_in_backward(entry.dense, entry.values, entry.replaced_message)
            return DifferentiableWeight.of(weight, entry)
        dense, values, mask = module._masked(attr)
        if not (torch.is_grad_enabled() and values.requires_grad):
            return dense
        return DifferentiableWeight.of(gather_gradient(dense, values, mask), entry)

    def write(module: Masked, tensor: Tensor) -> None:  # FSDP1, during a forward
        module.__dict__[attr] = tensor

    return property(read, write, lambda module: module.__dict__.pop(attr, None))


class _Matmul(_Direct):
    bias: Any
    weight: Any = _masked_attribute("weight")
    _transposed = False

    def forward(self, input: Tensor) -> Tensor:
        bias = self._masked("bias") if "bias" in self._masked_entries else (self.bias,)
        weight, values, mask = self._masked("weight")
        entry = self._masked_entries["weight"]
        if entry.copy is not None and weight is entry.dense and values is entry.values and not is_traced():
            dtype = autocast_dtype(input)
            copy = None if dtype is None else entry.autocast_weight(dtype)
            weight = weight if copy is None else copy  # the cast of a tensor of that dtype does nothing
        return masked_linear_unchecked(input, weight, values, mask, *bias, transposed=self._transposed)


class MaskedLinear(_Matmul, nn.Linear):
    """`nn.Linear` of which only the mask's entries are trained, as the compact parameter `values`. Made by `sparsify`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        >>> mask = CSRMask.from_dense({"0.weight": torch.ones(2, 3).triu() > 0})
        >>> layer = sparsify(model, mask)[0]
        >>> type(layer).__name__, layer.values.shape, layer.masks["weight"].nnz
        ('MaskedLinear', torch.Size([5]), 5)
    """


class MaskedEmbedding(_Direct, nn.Embedding):
    """`nn.Embedding` of which only the mask's entries are trained, as the compact parameter `values`. Made by
    `sparsify`.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(4, 2))
        >>> mask = CSRMask.from_dense({"0.weight": torch.ones(4, 2).tril() > 0})
        >>> layer = sparsify(model, mask)[0]
        >>> type(layer).__name__, layer.values.shape, layer.masks["weight"].nnz
        ('MaskedEmbedding', torch.Size([7]), 7)
    """

    weight: Any = _masked_attribute("weight")

    def forward(self, input: Tensor) -> Tensor:
        return masked_embedding_unchecked(input, *self._masked("weight"), self.padding_idx)


class _MaskedExperts(Experts, _Direct):
    """Modules with weights of experts. Their other parameters, biases of experts, have dense gradients."""


@cache
def _masked_class(original: Any, attrs: frozenset[str], compact: frozenset[str]) -> type:
    members: dict[str, Any] = {attr: _masked_attribute(attr) for attr in attrs}
    if not compact:
        return type(f"Masked{original.__name__}", (Masked, original), members)
    if not is_matmul(original) and original is not nn.Embedding:
        members |= {attr: expert_attribute(attr, members[attr]) for attr in compact}
        return type(f"Masked{original.__name__}", (_MaskedExperts, original), members)
    if original not in (nn.Linear, nn.Embedding):
        return type("MaskedConv1D", (_Matmul, original), {**members, "_transposed": True})
    base = MaskedLinear if original is nn.Linear else MaskedEmbedding
    return type(base.__name__, (base,), members) if "bias" in attrs else base


def _without_state(original: type, attrs: frozenset[str], compact: frozenset[str]) -> nn.Module:
    """The module that pickle and deepcopy give a state."""
    return nn.Module.__new__(_masked_class(original, attrs, compact))


# ---- sparsify ----
def sparsify(
    model: nn.Module, mask: CSRMask, *, freeze_others: bool = False, autocast_copies: bool = False
) -> nn.Module:
    """Train only the mask's entries: replace, in place, the modules that own the mask's tensors by masked ones.

    Each masked tensor is frozen and gets a compact trainable parameter: `values` beside `weight`, `NAME_values` beside
    NAME. Values are float32 (float64 for float64 tensors), also after the model is cast, and views of one flat buffer.
    Tied tensors share their values. Those of a tensor without masked entries are frozen. Parameters that the mask does
    not name (norms, biases, embeddings, the head) keep their `requires_grad`: by default they are trained densely; with
    `freeze_others` they are frozen until `densify`.

    `nn.Linear`, `nn.Embedding` and transformers' `Conv1D` compute compact gradients directly, and so do weights of
    experts [experts, m, n] in products with one expert, `torch.bmm` and `grouped_mm`: torch.compile leaves such modules
    out of its graphs, and in a captured step their gradients are dense. For any other tensor, those of subclasses
    included, a dense gradient is computed, gathered and dropped. For weights of norms and other tensors of one
    dimension that costs nothing; one warning names the larger ones.

    Values and dense tensors are synchronised by the step of any torch optimizer, by `load_state_dict` and by the next
    forward (not by a compiled one). Forward also detects writes through `.data` and, on the CPU, through its NumPy
    array. What is written into masked entries of a dense tensor (a merged LoRA adapter) is read into the values; where
    both were written, the values are kept. A state dict holds values and dense tensors; that of a plain model can be
    loaded, too.

    FSDP2: call `fully_shard` after `sparsify`; with the model on meta, no rank needs all weights. Dense tensors and
    values are sharded, gradients and their communication are compact. After a step of any torch optimizer, which all
    ranks take, they exchange the values that are in another one's rows. A sharded model stays sparsified:
    `nn.plain_tensors` has the weights, `integrations.sparse_delta` what was learned. What other code writes into shards
    of values reaches the weights with the next step; what it writes into masked entries of weights is lost then, unless
    `model.load_state_dict(nn.plain_tensors(model))` reads it into the values before. The first step of an optimizer,
    but no later one, is a ValueError where the two differ. FSDP2 trains parameters of one dtype: beside the values of
    16-bit weights, freeze the others. It takes no cast after the first forward.

    A masked `weight` that is read as an attribute (by a fused loss over `lm_head.weight`) has a gradient that reaches
    the values; it is dense during backward. The parameter itself, from `named_parameters`, is frozen.

    Args:
        model: the plain model on the mask's device, or on meta. It must contain all modules that share a masked tensor.
        mask: over some of its `named_parameters()`.
        freeze_others: train nothing but the mask's entries.
        autocast_copies: under autocast, keep a 16-bit copy of the float32 weight of each Linear and Conv1D, which takes
            half as much memory again. The weights are then not cast in forward and again in backward: an optimizer step
            writes the entries into both. The results are the same bit for bit. A copy is made anew after any other
            write that version counters or `.data` show; write the weight with torch, not through NumPy or DLPack.

    Returns:
        The same model.

    Raises:
        ValueError: the model is sparsified already, lacks a tensor of the mask, has it in another shape or on another
            device, or in a module that cannot be masked (a script module, an embedding with `max_norm`).
        TypeError: a tensor of the mask is not floating point, or is a DTensor (of a model that is sharded already).
            After any error the model is unchanged.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> mask = CSRMask.from_dense({"weight": torch.ones(2, 3).triu() > 0})
        >>> _ = sparsify(model, mask)
        >>> [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
        [('bias', (2,)), ('values', (5,))]
    """
    if any(isinstance(m, Masked) for m in model.modules()):
        raise ValueError("model is sparsified already: densify(model) first")
    named = {plain_name(n): p for n, p in model.named_parameters()}
    if sharded := [n for n in mask.names if type(named.get(n)).__name__ == "DTensor"]:
        raise TypeError(
            f"model[{sharded[0]!r}] is a DTensor: call fully_shard after sparsify, or train the sharded model with "
            "SparseAdamW and the mask, without sparsify"
        )
    on_meta = mask.names and all(getattr(named.get(n), "is_meta", False) for n in mask.names)
    tensors = dict(zip(mask.names, (mask.to("meta") if on_meta else mask).checked_tensors(named, "model")))
    check_trainable(tensors)
    name_of = {id(t): n for n, t in tensors.items()}
    # module, its new class, attribute → name in the model, the attributes with compact gradients
    plan: list[tuple[Any, type, dict[str, str], frozenset[str]]] = []
    gathered: set[str] = set()  # those whose dense gradients take memory
    for module in model.modules():
        if owned := {a: name_of[id(p)] for a, p in module._parameters.items() if id(p) in name_of}:
            check_module(module, owned)
            compact = compact_attributes(module, owned)
            cls: Any = type(module)
            plan.append((module, _masked_class(cls, frozenset(owned), compact), owned, compact))
            gathered.update(n for a, n in owned.items() if a not in compact and tensors[n].dim() > 1 + bool(compact))
    if gathered:
        warnings.warn(
            f"{len(gathered)} masked tensors belong to no Linear, Embedding, Conv1D or experts and are trained "
            f"through a dense gradient that is then gathered: {', '.join(sorted(gathered))}",
            stacklevel=2,
        )
    entries = _make_entries(mask, tensors)
    for module, masked_class, owned, compact in plan:
        for attr, name in owned.items():
            module.register_parameter(values_name(attr), entries[name].values)
            entries[name].owners.add(module)
        module.__dict__.update(_masked_entries={a: entries[n] for a, n in owned.items()}, _dense_class=type(module))
        module.__dict__["_compact"] = compact
        module.__class__ = masked_class
        if autocast_copies and issubclass(masked_class, _Matmul):
            entries[owned["weight"]].copy = AutocastCopy()
    if freeze_others:
        _freeze_others(model, {id(entry.values) for entry in entries.values()})
    return model


def _freeze_others(model: nn.Module, values: set[int]) -> None:
    """Freeze all parameters but the values. Each module keeps the names of its own, and so do copies of the model."""
    for module in model.modules():
        others = [n for n, p in module._parameters.items() if p is not None and p.requires_grad and id(p) not in values]
        for name in others:
            module._parameters[name].requires_grad_(False)  # type: ignore[union-attr]
        if others:
            module.__dict__[_FROZEN] = others


def _make_entries(mask: CSRMask, tensors: dict[str, Any]) -> dict[str, Entry]:
    """Name → entry, with one buffer per dtype of the values."""
    entries = {}
    for dtype in (torch.float32, torch.float64):
        if names := [n for n, t in tensors.items() if compute_dtype(t.dtype) == dtype]:
            part = mask if len(names) == len(mask) else mask.restrict(names)
            meta = tensors[names[0]].is_meta
            data = torch.empty(part.nnz, device="meta") if meta else usable_in_backward(part.gather(tensors))
            buffer, start = ValuesBuffer(data.to(dtype), part.nnz, dtype), 0
            for name in part.names:
                entries[name] = Entry(part[name], tensors[name], buffer, start)
                start += entries[name].mask.nnz
    return entries


def _with_own_storage(view: Tensor) -> Tensor:
    """The same memory as a tensor with its own storage: savers raise for views of one buffer, or drop them."""
    if type(view) is not Tensor or view.device.type not in ("cpu", "cuda") or not view.numel():
        return view
    return torch.from_dlpack(view)


# ---- densify, and the tensors of sparsified models ----
def densify(model: nn.Module) -> nn.Module:
    """Convert back, in place: modules, names and `requires_grad` as before `sparsify`, with the trained weights.

    A tensor that has gained or lost rows since (`resize_token_embeddings`) keeps the trained entries of the remaining
    rows.

    Raises:
        ValueError: the model is not sparsified, or a masked tensor has been replaced since, or is tied to a masked one
            outside of the model. The model is then unchanged.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> mask = CSRMask.from_dense({"weight": torch.ones(2, 3).triu() > 0})
        >>> _ = sparsify(model, mask).values.data.fill_(7.0)
        >>> densify(model).weight[0].tolist(), list(model.state_dict())
        ([7.0, 7.0, 7.0], ['weight', 'bias'])
    """
    owners = [m for m in model.modules() if isinstance(m, Masked)]
    if not owners:
        raise ValueError("model is not sparsified")
    for owner in owners:
        for attr, entry in owner._masked_entries.items():
            entry.find_shards()
            if entry.is_sharded:
                raise ValueError(
                    f"{entry.name!r} is sharded (FSDP2), so the model stays sparsified: deftx_kernels.nn.plain_tensors("
                    "model) has the plain model's tensors, for torch.distributed.checkpoint"
                )
            if not set(map(id, entry.owners)) <= set(map(id, owners)):
                raise ValueError(f"{entry.name!r} is tied to a module outside of this model: densify the whole model")
            dense = owner._parameters.get(attr)
            if dense is None or dense is not entry.dense or dense.shape[1:] != entry.mask.shapes[0][1:]:
                raise ValueError(f"{entry.name!r} has been replaced or resized since it was sparsified")
    for owner in owners:
        for attr, entry in owner._masked_entries.items():
            if entry.dense.shape == entry.mask.shapes[0]:
                entry.synchronise()
            else:
                entry.write_values_resized()
            del owner._parameters[values_name(attr)]
    for owner in owners:
        for entry in owner.__dict__.pop("_masked_entries").values():
            entry.release()
        owner.__class__ = owner.__dict__.pop("_dense_class")
        del owner.__dict__["_compact"]
    for module in model.modules():
        for name in module.__dict__.pop(_FROZEN, ()):
            if (parameter := module._parameters.get(name)) is not None:
                parameter.requires_grad_(True)
    return model
