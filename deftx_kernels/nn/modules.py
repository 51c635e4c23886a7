"""The masked modules, and the two functions that put them into a model and take them out again."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deftx_kernels.mask import CSRMask, usable_in_backward
from deftx_kernels.nn.entries import Entry, Flat, LiveWeight, MaskedParameter, live_weight, values_name
from deftx_kernels.nn.functional import masked_lookup, masked_matmul, masked_tensor, scattered, without_gradient
from deftx_kernels.validation import FLOATS, check_writable


class Masked(nn.Module):
    """Mixin of every module with masked parameters. `sparsify` makes a module one by changing its class."""

    _masked_entries: dict[str, Entry]  # by the parameter's own name in the module
    _dense_class: type
    _parameters: dict[str, Any]

    def __init__(self, *_, **__) -> None:
        raise TypeError(f"a {type(self).__name__} is made by sparsify(model, mask)")

    def _masked(self, leaf: str) -> tuple[Tensor, Tensor, CSRMask]:
        """Dense tensor, values and mask of a masked parameter, as forward is to use them."""
        entry = self._masked_entries[leaf]
        parameters, name = self._parameters, values_name(leaf)
        dense, values = parameters.get(leaf), parameters.get(name)
        if dense is None or values is None:  # FSDP1 puts views of its own in their place
            dense, values = self.__dict__.get(leaf), self.__dict__.get(name)
        if dense is None or values is None or dense.shape != entry.mask.shapes[0]:
            raise RuntimeError(entry.replaced())
        if values is not entry.values:  # torch.func.functional_call, FSDP
            return scattered(dense, values, entry.mask), values, entry.mask
        if dense is entry.dense and not torch.compiler.is_compiling():
            entry.update()
        return dense, values, entry.mask

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        for leaf, entry in self.__dict__.get("_masked_entries", {}).items():
            if name == leaf and isinstance(param, LiveWeight) and param.entry is entry:
                return  # `tie_weights`, of weights that are tied
            if (
                name in (leaf, values_name(leaf))
                and param is not entry.dense
                and param is not entry.values
                and not entry.is_moving
            ):
                raise ValueError(f"{entry.name!r} is sparsified: densify the model before its {name} is replaced")
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        self._update_before_a_copy()
        before = {leaf: (self._parameters[leaf], entry.values.detach()) for leaf, entry in self._masked_entries.items()}
        with self._moving():
            super()._apply(fn, recurse)
        for leaf, entry in self._masked_entries.items():
            old_dense, old_values = before[leaf]
            dense, values = self._parameters[leaf], self._parameters[values_name(leaf)]
            if entry.dense is not old_dense:
                # another owner has got new parameters instead of new data, which is for both
                if entry.dense is not None:
                    self._parameters[leaf], self._parameters[values_name(leaf)] = entry.dense, entry.values
                continue
            if values.dtype != (dtype := _values_dtype(dense)):  # a model cast to 16 bits keeps its values in 32
                Tensor.data.__set__(values, old_values.to(dense.device, dtype))  # type: ignore[attr-defined]
                values.grad = None if values.grad is None else values.grad.to(dtype)
            if values.device != old_values.device and not values.is_meta and values.dtype == entry.flat.dtype:
                values.data = entry.flat.part(entry, values.device).copy_(values.detach())
            entry.adopt(dense, values)
            if not dense.is_meta:
                entry.mask = entry.mask.to(dense.device)
                entry.write()
        return self

    @contextmanager
    def _moving(self) -> Iterator[None]:
        """The parameters are cast or replaced by torch, all together."""
        for entry in self._masked_entries.values():
            entry.is_moving = True
        try:
            yield
        finally:
            for entry in self._masked_entries.values():
                entry.is_moving = False

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        for leaf, entry in self._masked_entries.items():
            if is_traceable_wrapper_subclass(self._parameters.get(leaf)):
                raise RuntimeError(
                    f"{entry.name!r} is sharded (FSDP2), and its shards do not hold the values: to save a state, shard a plain "
                    "model, and train it by SparseAdamW and `distributed.local_mask`"
                )
            self._masked(leaf)  # brings the two up to date
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for leaf, entry in self._masked_entries.items():
            name = prefix + values_name(leaf)
            if not keep_vars:
                destination[name] = _with_storage_of_its_own(destination[name])
                entry.watches[1].hand_out(destination[name])
            if len(entry.owners) > 1:  # once, under the first of the names: safetensors refuses shared tensors
                mine = destination[name]
                others = (
                    t for n, t in destination.items() if n != name and n.endswith("values") and t.device == mine.device
                )
                if any(t.shape == mine.shape and t.data_ptr() == mine.data_ptr() for t in others):
                    del destination[name]

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        """Dense tensors and values fit each other afterwards: a state without values gives those that its dense tensors
        hold.
        """
        for leaf, entry in self._masked_entries.items():
            dense, values = state_dict.get(prefix + leaf), state_dict.get(prefix + values_name(leaf))
            if dense is not None and values is not None and not entry.fits(dense, values):
                error_msgs.append(
                    f"the values of {prefix}{leaf} are not those at this model's mask: saved with another mask."
                )
                return
        tied = {leaf for leaf, entry in self._masked_entries.items() if len(entry.owners) > 1}
        if tied:  # load_state_dict(assign=True) would untie
            metadata = {**metadata, "assign_to_params_buffers": False}
        with self._moving():  # load_state_dict(assign=True) replaces parameters
            super()._load_from_state_dict(
                state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        for leaf, entry in self._masked_entries.items():
            name = prefix + values_name(leaf)
            entry.adopt(self._parameters[leaf], self._parameters[values_name(leaf)])
            if entry.dense.is_meta:
                continue
            if name in state_dict and state_dict[name].shape == entry.values.shape:
                entry.write()
            else:
                entry.read()
            if name in missing_keys and (leaf in tied or prefix + leaf in state_dict):
                missing_keys.remove(name)

    def __setstate__(self, state):  # a deepcopy or an unpickled module owns its values, too
        super().__setstate__(state)
        for leaf, entry in self._masked_entries.items():
            entry.owners.add(self)
            self._parameters[leaf], self._parameters[values_name(leaf)] = entry.dense, entry.values

    def _update_before_a_copy(self) -> None:
        for entry in self._masked_entries.values():
            entry.update_before_a_copy()

    def __reduce_ex__(self, protocol):  # pickle would not find classes that are made at run time by name
        self._update_before_a_copy()
        state = super().__reduce_ex__(max(int(protocol), 2))[2]
        return _blank, (self._dense_class, frozenset(self._masked_entries), isinstance(self, _Direct)), state


class _Direct(Masked):
    """Mixin of the modules that compute compact gradients directly."""

    @property
    def masks(self) -> dict[str, CSRMask]:
        """The masks of `weight` and, where it is masked, `bias`."""
        return {leaf: entry.mask for leaf, entry in self._masked_entries.items()}


def _attribute(leaf: str) -> property:
    """A masked parameter as an attribute of its module. FSDP1 puts a view of its own in its place for the time of a
    forward.
    """

    def read(module: Masked) -> Any:
        if leaf not in module._parameters and leaf not in module.__dict__:
            raise AttributeError(leaf)
        entry, present = module._masked_entries[leaf], module._parameters.get(leaf)
        if present is not None and is_traceable_wrapper_subclass(present):  # a DTensor, which FSDP2 looks for
            return present
        # `resize_token_embeddings` reads it again
        if entry.dense is not None and entry.dense.shape != entry.mask.shapes[0]:
            return live_weight(without_gradient(entry.dense, entry.values, entry.replaced()), entry)
        dense, values, mask = module._masked(leaf)
        if not (torch.is_grad_enabled() and values.requires_grad):
            return dense
        return live_weight(masked_tensor(dense, values, mask), entry)

    def write(module: Masked, tensor: Tensor) -> None:
        module.__dict__[leaf] = tensor

    return property(read, write, lambda module: module.__dict__.pop(leaf, None))


class _Matmul(_Direct):
    bias: Any
    weight: Any = _attribute("weight")
    _transposed = False

    def forward(self, input: Tensor) -> Tensor:
        bias = self._masked("bias") if "bias" in self._masked_entries else (self.bias,)
        return masked_matmul(input, *self._masked("weight"), *bias, transposed=self._transposed)


class MaskedLinear(_Matmul, nn.Linear):
    """`nn.Linear` of which only the mask's entries are trained, as the compact parameter `values`. Made by `sparsify`."""


class MaskedEmbedding(_Direct, nn.Embedding):
    """`nn.Embedding` of which only the mask's entries are trained, as the compact parameter `values`. Made by
    `sparsify`.
    """

    weight: Any = _attribute("weight")

    def forward(self, input: Tensor) -> Tensor:
        return masked_lookup(input, *self._masked("weight"), self.padding_idx)


def _is_conv1d(kind: type) -> bool:
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


@cache
def _masked_class(original: Any, leaves: frozenset[str], direct: bool) -> type:
    attributes: dict[str, Any] = {leaf: _attribute(leaf) for leaf in leaves}
    if not direct:
        return type(f"Masked{original.__name__}", (Masked, original), attributes)
    if original not in (nn.Linear, nn.Embedding):
        return type("MaskedConv1D", (_Matmul, original), {**attributes, "_transposed": True})
    known = MaskedLinear if original is nn.Linear else MaskedEmbedding
    return type(known.__name__, (known,), attributes) if "bias" in leaves else known


def _blank(original: type, leaves: frozenset[str], direct: bool) -> nn.Module:
    """What pickle and deepcopy fill."""
    return nn.Module.__new__(_masked_class(original, leaves, direct))


def sparsify(model: nn.Module, mask: CSRMask) -> nn.Module:
    """Train only the mask's entries: replace, in place, the modules that own the mask's tensors by masked ones.

    `nn.Linear`, `nn.Embedding` and transformers' `Conv1D` compute compact gradients directly. A tensor of any other
    module, also of a subclass of these, falls back to a dense gradient that is gathered and dropped; one warning names
    those. Each masked tensor is frozen and gets a compact parameter (`values` beside `weight`, `NAME_values` beside
    NAME), float32 or, for float64 tensors, float64, also after the model is cast; all of them are views of one flat
    buffer. Tied tensors share their values. Parameters outside the mask keep their `requires_grad`.

    The values are what is trained. The step of any torch optimizer over them and `load_state_dict` bring the dense
    tensors up to date, and so does the next forward (not a compiled one) where they were changed otherwise, through
    `.data`, too (on the CPU also by NumPy through that). What is written
    into masked entries of a dense tensor (a LoRA adapter that is merged) becomes their values at the next forward;
    where values were changed as well, these win. A state dict holds values and dense tensors; that of a plain model can
    be loaded, too.

    A masked `weight` that is read as an attribute (a fused loss over `lm_head.weight`, a decoder that borrows an
    embedding) is a tensor whose gradient reaches the values; that of a Linear or an Embedding is then dense, for as
    long as backward takes. The parameter itself, taken before or from `named_parameters`, is frozen.

    Args:
        model: the plain model, on the mask's device; all of it: modules elsewhere that share its tensors are not seen.
        mask: over some of its `named_parameters()`.

    Returns:
        The same model.

    Raises:
        ValueError: the model is sparsified already, lacks a tensor of the mask, has it in another shape or on another
            device, or in a module that cannot be masked (a script module, an embedding with `max_norm`). Nothing has
            changed then.
        TypeError: a tensor of the mask is not floating point. Nothing has changed then.
    """
    if any(isinstance(m, Masked) for m in model.modules()):
        raise ValueError("model is sparsified already: densify(model) first")
    tensors = dict(zip(mask.names, mask.checked_tensors(dict(model.named_parameters()), "model")))
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"model[{name!r}] must be floating point: float32, float64, float16 or bfloat16, got {tensor.dtype}"
            )
        if tensor._backward_hooks or tensor._post_accumulate_grad_hooks:
            raise ValueError(
                f"model[{name!r}] has gradient hooks, which nothing would call: register them on its values after sparsify"
            )
        if tensor.is_inference():
            raise ValueError(
                f"model[{name!r}] was made in inference_mode, so that backward cannot use it: load it outside of that"
            )
    check_writable({f"model[{name!r}]": tensor for name, tensor in tensors.items()})
    name_of = {id(t): n for n, t in tensors.items()}
    # module, its new class, its masked parameters' names in the model
    plan: list[tuple[Any, type, dict[str, str]]] = []
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
    for module, masked_class, owned in plan:
        for leaf, name in owned.items():
            module.register_parameter(values_name(leaf), entries[name].values)
            entries[name].owners.add(module)
        module.__dict__.update(
            _masked_entries={leaf: entries[n] for leaf, n in owned.items()}, _dense_class=type(module)
        )
        module.__class__ = masked_class
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
            raise ValueError(
                f"the module that owns {name!r} has an attribute {values_name(leaf)!r}, the name of compact values"
            )
    kind = type(module)
    matmul = kind is nn.Linear or _is_conv1d(kind)
    known = matmul or (kind is nn.Embedding and not module.scale_grad_by_freq)
    # A forward of the instance's own (accelerate's hooks) reads the parameters as attributes.
    direct = known and "weight" in owned and owned.keys() <= {"weight", "bias"} and "forward" not in vars(module)
    return direct, not direct and not (matmul and set(owned) == {"bias"})


def _values_dtype(dense: Tensor) -> torch.dtype:
    return torch.float64 if dense.dtype == torch.float64 else torch.float32


def _entries(mask: CSRMask, tensors: dict[str, Any]) -> dict[str, Entry]:
    """Name → entry; the values are views of one flat buffer per dtype."""
    entries = {}
    for dtype in (torch.float32, torch.float64):
        if names := [n for n, t in tensors.items() if _values_dtype(t) == dtype]:
            part = mask if len(names) == len(mask) else mask.restrict(names)
            flat, start = Flat(usable_in_backward(part.gather(tensors).to(dtype))), 0
            for name in part.names:
                entries[name] = Entry(part[name], tensors[name], flat, start)
                start += entries[name].mask.nnz
    return entries


def _with_storage_of_its_own(view: Tensor) -> Tensor:
    """The same memory as a tensor that fills its storage: savers refuse or drop views of one buffer. Writes reach the
    model.
    """
    if type(view) is not Tensor or view.device.type not in ("cpu", "cuda") or not view.numel():
        return view
    return torch.from_dlpack(view)


def densify(model: nn.Module) -> nn.Module:
    """The plain model back, in place: modules, names and `requires_grad` as before `sparsify`, the trained weights in
    place.

    A tensor that has got or lost rows since (`resize_token_embeddings`) keeps what was trained in those that are left.

    Raises:
        ValueError: the model is not sparsified, or a masked tensor has been replaced since, or is tied to a masked one
            outside of the model. Nothing has changed then.
    """
    owners = [m for m in model.modules() if isinstance(m, Masked)]
    if not owners:
        raise ValueError("model is not sparsified")
    for owner in owners:
        for leaf, entry in owner._masked_entries.items():
            if not set(map(id, entry.owners)) <= set(map(id, owners)):
                raise ValueError(f"{entry.name!r} is tied to a module outside of this model: densify the whole model")
            dense = owner._parameters.get(leaf)
            if dense is None or dense is not entry.dense or dense.shape[1:] != entry.mask.shapes[0][1:]:
                raise ValueError(f"{entry.name!r} has been replaced or resized since it was sparsified")
    for owner in owners:
        for leaf, entry in owner._masked_entries.items():
            if entry.dense.shape == entry.mask.shapes[0]:
                entry.update()
            else:
                entry.write_resized()
            del owner._parameters[values_name(leaf)]
    for owner in owners:
        for entry in owner.__dict__.pop("_masked_entries").values():
            entry.release()
        owner.__class__ = owner.__dict__.pop("_dense_class")
    return model


def masked_parameters(model: nn.Module) -> dict[str, MaskedParameter]:
    """Name in the plain model → masked parameter, tied ones once; empty for a model that is not sparsified."""
    entries: dict[str, Entry] = {}
    for module in model.modules():
        for entry in module._masked_entries.values() if isinstance(module, Masked) else ():
            if entries.setdefault(entry.name, entry) is not entry:
                raise ValueError(
                    f"two masked tensors are named {entry.name!r}: parts of the model were sparsified one by one"
                )
    return {name: MaskedParameter(e.dense, e.values, e.mask) for name, e in sorted(entries.items())}


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`named_parameters()` as those of the plain model: of a sparsified one the dense tensors, up to date, and no
    values.
    """
    values = set()
    for module in model.modules():
        if isinstance(module, Masked):
            for leaf, entry in module._masked_entries.items():
                module._masked(leaf)
                values.add(id(entry.values))
    return {name: p for name, p in model.named_parameters() if id(p) not in values}
