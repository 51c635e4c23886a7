"""A masked parameter: its dense tensor and its compact values, and how the two are kept alike.

The step of any torch optimizer writes the values into the dense tensors (`SparseAdamW` does so in its own launch). Whatever else
changes one of the two is found at the next use: by torch's version counters, or, where `.data` goes round these, because the
parameters tell when someone asks for it. A use that finds nothing costs two comparisons and no work on the device.
"""

import copy
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from deftx_kernels.mask import CSRMask

if TYPE_CHECKING:
    from deftx_kernels.nn.modules import Masked


class MaskedParameter(NamedTuple):
    """A masked parameter: the dense tensor, its compact values, and the mask of that one tensor (named as in the model)."""

    dense: nn.Parameter  # any shape
    values: nn.Parameter  # [nnz]
    mask: CSRMask


def values_name(leaf: str) -> str:
    """The name of the compact parameter beside the parameter `leaf`."""
    return "values" if leaf == "weight" else f"{leaf}_values"


class WatchedParameter(nn.Parameter):
    """A parameter whose entry learns when someone asks for its `data`: what is written there moves no version counter."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    watch: Optional["Watch"] = None

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        if self.watch is not None:
            self.watch.before_change()
        alias = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        if self.watch is not None:
            self.watch.aliases.append(TensorWeakRef(alias))
        return alias

    @data.setter
    def data(self, tensor: Tensor) -> None:
        if self.watch is not None:
            self.watch.before_change()
        Tensor.data.__set__(self, tensor)  # type: ignore[attr-defined]

    def __deepcopy__(self, memo):
        """Values that are views of one buffer are so in a copy, too. The copy's entry will watch it."""
        if self.watch is not None and self.watch.is_values and not self.is_meta:
            storage = copy.deepcopy(self.untyped_storage(), memo)
            data = torch.empty(0, dtype=self.dtype, device=self.device)
            data.set_(storage, self.storage_offset(), self.shape, self.stride())  # type: ignore[arg-type]
        else:
            data = self.detach().clone(memory_format=torch.preserve_format)
        return type(self)(data, self.requires_grad)

    def __reduce_ex__(self, protocol):  # a plain parameter for whoever reads the file
        plain = self.detach()
        return torch._utils._rebuild_parameter, (plain, self.requires_grad, OrderedDict())


class Watch:
    """Whether one of an entry's two tensors may have been changed since they were alike."""

    def __init__(self, entry: "Entry", is_values: bool) -> None:
        self.entry, self.is_values = weakref.ref(entry), is_values
        self.version = -1
        self.touched = False  # someone has had its `data`
        self.aliases: list[TensorWeakRef] = []  # and may still have
        self.bits: Tensor | None = None  # of the values, before

    def before_change(self) -> None:
        if torch.compiler.is_compiling():
            return
        entry = self.entry()
        if self.is_values and not self.touched and entry is not None:
            self.bits = _sum_of_bits(entry.values)
        self.touched = True

    def may_have_changed(self, tensor: Tensor) -> bool:
        return self.touched or _version(tensor) != self.version

    def has_changed(self, tensor: Tensor) -> bool:
        """The same, certainly."""
        if _version(tensor) != self.version or self.bits is None:
            return True
        return self.bits.device != tensor.device or not torch.equal(_sum_of_bits(tensor), self.bits)

    def settle(self, tensor: Tensor) -> None:
        """What the tensor holds now is known."""
        self.version = _version(tensor)
        if self.touched:
            self.aliases = [a for a in self.aliases if a() is not None]
            self.touched = bool(self.aliases)
            self.bits = _sum_of_bits(tensor) if self.touched and self.is_values else None


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # inference tensors have none
        return 0


def _sum_of_bits(values: Tensor) -> Tensor:
    """int64 []: another for nearly every other content."""
    bits = values.detach().contiguous().view(torch.int32 if values.element_size() == 4 else torch.int64)
    return bits.sum(dtype=torch.int64)


class Entry:
    """What the modules that own one masked tensor share."""

    def __init__(self, mask: CSRMask, dense: nn.Parameter, flat: "Flat", start: int) -> None:
        self.mask, self.flat, self.start = mask, flat, start  # of its values in the flat buffer
        self.required_grad = dense.requires_grad  # before
        self.owners: weakref.WeakSet[Masked] = weakref.WeakSet()
        dense.requires_grad_(False)
        self._watch(dense, WatchedParameter(flat.part(self, mask.device)))
        self.settle()

    @property
    def name(self) -> str:
        return self.mask.names[0]

    def _watch(self, dense: nn.Parameter, values: nn.Parameter) -> None:
        self.watches = Watch(self, False), Watch(self, True)
        self._dense, self.values = weakref.ref(dense), values
        self.adopt(dense, values)

    @property
    def dense(self) -> Any:
        """The dense tensor, which the modules keep alive; None where a wrapper (FSDP2) has put others in its place."""
        return self._dense()

    def adopt(self, dense: nn.Parameter, values: nn.Parameter) -> None:
        """These are its tensors from now on."""
        for tensor in (self.dense, self.values):
            if isinstance(tensor, WatchedParameter):
                tensor.watch = None
        self._dense, self.values = weakref.ref(dense), values
        for tensor, watch in zip((dense, values), self.watches):
            if type(tensor) is nn.Parameter:
                tensor.__class__ = WatchedParameter  # type: ignore[assignment]
            if isinstance(tensor, WatchedParameter):
                tensor.watch = watch

    def release(self) -> None:
        """The dense tensor is a plain parameter again."""
        for tensor in (self.dense, self.values):
            if isinstance(tensor, WatchedParameter):
                tensor.watch = None
        if type(self.dense) is WatchedParameter:
            self.dense.__class__ = nn.Parameter  # type: ignore[assignment]
        self.dense.requires_grad_(self.required_grad)

    def __getstate__(self) -> dict[str, Any]:  # of a copy or a pickle, whose modules say that they own it
        kept = {k: v for k, v in vars(self).items() if k not in ("owners", "watches", "_dense")}
        return {**kept, "dense": self.dense}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dense = state.pop("dense")
        vars(self).update(state, owners=weakref.WeakSet())
        self._watch(dense, self.values)

    # ---- keeping the two alike ----

    def update(self) -> None:
        """Make the two alike: the dense tensor takes the values; where it alone was changed, these take what it holds."""
        dense, values = self.watches
        dense_may, values_may = dense.may_have_changed(self.dense), values.may_have_changed(self.values)
        if values_may and values.has_changed(self.values):
            self.write()
        elif dense_may:
            self.read()
        elif values_may:
            self.settle()

    def update_before_a_copy(self) -> None:
        """The same, of an entry that may be in pieces (resized, sharded)."""
        if self.dense is not None and self.dense.shape == self.mask.shapes[0]:
            self.update()

    def settle(self) -> None:
        """The two are alike now."""
        self.watches[0].settle(self.dense)
        self.watches[1].settle(self.values)

    def write(self) -> None:
        """The values into the dense tensor."""
        if self.dense.is_contiguous():  # mask.scatter_ without its checks: the hook calls this for every tensor
            values = self.values.detach().to(self.dense.dtype).contiguous()
            torch.ops.deftx.csr_scatter_([self.dense.detach()], self.mask.crow_indices, self.mask.col_indices, values)
            if not self.dense.is_inference():
                torch.autograd.graph.increment_version(self.dense)
        else:
            self.mask.scatter_({self.name: self.dense}, self.values)
        self.settle()

    def read(self) -> None:
        """The values from the dense tensor; where they are what was rounded to it, they keep their precision."""
        with torch.no_grad():
            found = self.mask.gather({self.name: self.dense})
            kept = self.values.to(found.dtype) == found
            if not bool(kept.all()):
                self.values.copy_(torch.where(kept, self.values, found.to(self.values.dtype)))
        self.settle()

    def fits(self, dense: Tensor, values: Tensor) -> bool:
        """Whether a state's dense tensor has its values at the mask's entries; other shapes are for torch to refuse."""
        if dense.shape != self.mask.shapes[0] or values.shape != self.values.shape:
            return True
        found = self.mask.to(dense.device).gather({self.name: dense})
        return torch.allclose(found, values.to(found), rtol=0.0, atol=0.0, equal_nan=True)

    def write_resized(self) -> None:
        """The values into a dense tensor that has got or lost rows (`resize_token_embeddings`) and holds the others of the old."""
        watch = self.watches[1]
        if not (watch.may_have_changed(self.values) and watch.has_changed(self.values)):
            return
        places = self.mask._keys()
        inside = places < self.dense.numel()
        with torch.no_grad():
            flat = self.dense.detach().flatten()
            flat[places[inside]] = self.values.detach().to(self.dense.dtype)[inside]
            self.dense.copy_(flat.view_as(self.dense))
        self.settle()


class Flat:
    """The one buffer of all values of a dtype, of which each values parameter is a view."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer: Tensor | None = buffer  # [nnz]; None in a copy, whose values know their memory
        self.nnz, self.dtype = buffer.numel(), buffer.dtype

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "buffer": None}

    def part(self, entry: Entry, device: torch.device) -> Tensor:
        """The memory of an entry's values on a device."""
        if self.buffer is None or self.buffer.device != device:
            self.buffer = torch.empty(self.nnz, dtype=self.dtype, device=device)
        return self.buffer[entry.start : entry.start + entry.mask.nnz]


# ---- the weight as an attribute -----------------------------------------------------------------------------------------


class LiveWeight(Tensor):
    """A masked parameter as others read it, outside of its module's forward: its gradient reaches the values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _is_param = True  # isinstance(weight, nn.Parameter), as `Module.get_parameter` asks
    entry: Entry

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.entry.dense.data

    @data.setter
    def data(self, tensor: Tensor) -> None:
        self.entry.dense.data = tensor

    def __reduce_ex__(self, protocol):
        return self.entry.dense.__reduce_ex__(protocol)


def live_weight(weight: Tensor, entry: Entry) -> Tensor:
    """A tensor with a gradient for the entry's values, whose `data` is that of the dense tensor."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return weight
    live = weight.as_subclass(LiveWeight)
    live.entry = entry
    return live


# ---- optimizers ---------------------------------------------------------------------------------------------------------


def _entry_of(parameter: Tensor) -> Entry | None:
    watch = getattr(parameter, "watch", None) if isinstance(parameter, WatchedParameter) else None
    return watch.entry() if watch is not None else None


def entries_of(parameters: Iterable[Tensor]) -> dict[int, Entry]:
    """id(values) → entry, for those of the tensors that are the compact values of a sparsified model."""
    found = ((parameter, _entry_of(parameter)) for parameter in parameters)
    return {id(parameter): entry for parameter, entry in found if entry is not None and entry.values is parameter}


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if getattr(optimizer, "writes_masked_weights", False):
        return
    ours: list[Entry] = []
    frozen: list[Entry] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (entry := _entry_of(parameter)) is not None:
                (ours if entry.values is parameter else frozen).append(entry)
    for entry in ours:
        entry.write()
    if frozen and not ours:
        warnings.warn(
            f"this {type(optimizer).__name__} was made before sparsify: it trains nothing of {min(e.name for e in frozen)!r} and "
            "others, which are frozen now. Make it after sparsify, over the values",
            stacklevel=4,
        )


register_optimizer_step_post_hook(_after_step)
