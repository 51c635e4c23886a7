"""A masked parameter: its dense tensor and its compact values, and how the two are kept alike.

The step of any torch optimizer writes the values into the dense tensors (`SparseAdamW` does so in its own launch).
Whatever else changes one of the two is found at the next use: by torch's version counters, or, where `.data` goes round
these, because the parameters tell when someone asks for it. A use that finds nothing costs two comparisons and no work
on the device.
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
    """A masked parameter: the dense tensor, its compact values, and the mask of that one tensor (named as in the
    model).
    """

    dense: nn.Parameter  # any shape
    values: nn.Parameter  # [nnz]
    mask: CSRMask


def values_name(leaf: str) -> str:
    """The name of the compact parameter beside the parameter `leaf`."""
    return "values" if leaf == "weight" else f"{leaf}_values"


class WatchedParameter(nn.Parameter):
    """A parameter that tells its watch when someone asks for its `data`: what is written there moves no version of its
    own.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    watch: Optional["Watch"] = None

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        alias = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        if self.watch is not None and not torch.compiler.is_compiling():
            self.watch.hand_out(alias)
        return alias

    @data.setter
    def data(self, tensor: Tensor) -> None:
        if self.watch is not None:
            self.watch.check_dtype(self, tensor)
        Tensor.data.__set__(self, tensor)  # type: ignore[attr-defined]
        if self.watch is not None:
            self.watch.replace(tensor)

    def __deepcopy__(self, memo):
        """Values that are views of one buffer are so in a copy, too. The copy's entry will watch it."""
        entry = _entry_of(self)
        if entry is not None and entry.values is self and not self.is_meta:
            storage = self.untyped_storage()
            if storage._cdata not in memo.get("torch", {}):  # all of the buffer is copied now
                for other in list(entry.flat.entries):
                    other.update_before_a_copy()
            data = torch.empty(0, dtype=self.dtype, device=self.device)
            storage = copy.deepcopy(storage, memo)
            data.set_(storage, self.storage_offset(), self.shape, self.stride())  # type: ignore[arg-type]
        else:
            data = self.detach().clone(memory_format=torch.preserve_format)
        return type(self)(data, self.requires_grad)

    def __reduce_ex__(self, protocol):  # files hold plain parameters
        plain = self.detach()
        return torch._utils._rebuild_parameter, (plain, self.requires_grad, OrderedDict())


class Watch:
    """Whether one of an entry's two tensors was changed since they were alike: by itself, or as another tensor over its
    memory.
    """

    def __init__(self, entry: "Entry", is_values: bool) -> None:
        self.entry, self.is_values = weakref.ref(entry), is_values
        self.forget(-1)

    def forget(self, version: int) -> None:
        """Nothing is known of it but this version."""
        self.version = version
        self.changed = False
        self.handed_out = False  # `data`, whose memory NumPy may write, too
        self.aliases: list[tuple[Tensor, int]] = []  # with their versions
        self.assigned: Tensor | None = None  # as `data`; perhaps a view of someone's buffer

    def hand_out(self, alias: Tensor) -> None:
        if len(self.aliases) > 16:
            self._drop_the_unused()
        self.aliases.append((alias, _version(alias)))
        self.handed_out = True

    def check_dtype(self, tensor: Tensor, data: Tensor) -> None:
        entry = self.entry()
        if self.is_values and entry is not None and data.dtype != tensor.dtype and not entry.is_moving:
            raise TypeError(
                f"the values of {entry.name!r} are {tensor.dtype}, got {data.dtype}: cast the model with .to(dtype)"
            )

    def replace(self, data: Tensor) -> None:
        self.changed, self.assigned = True, data
        self.aliases.append((data, _version(data)))

    def has_changed(self, tensor: Tensor) -> bool:
        if self.changed or _version(tensor) != self.version:
            return True
        return bool(self.aliases) and any(_version(alias) != version for alias, version in self.aliases)

    def settle(self, tensor: Tensor) -> None:
        """What the tensor holds now is known."""
        if self.aliases:
            self._drop_the_unused()
            self.aliases = [(alias, _version(alias)) for alias, _ in self.aliases]
        self.version, self.changed, self.handed_out = _version(tensor), False, False

    def _drop_the_unused(self) -> None:
        """Forget the aliases that nobody else holds, but not that they were written to."""
        aliases, self.aliases = self.aliases, []
        self.changed |= any(_version(alias) != version for alias, version in aliases)
        weak = [(TensorWeakRef(alias), version) for alias, version in aliases]
        del aliases
        self.aliases += [(alias, version) for ref, version in weak if (alias := ref()) is not None]


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # inference tensors have none
        return 0


class Entry:
    """What the modules that own one masked tensor share."""

    def __init__(self, mask: CSRMask, dense: nn.Parameter, flat: "Flat", start: int) -> None:
        self.mask, self.flat, self.start = mask, flat, start  # of its values in the flat buffer
        self.required_grad = dense.requires_grad  # before
        self.held = dense.dtype  # of what the dense tensor held when the two were alike
        self.is_moving = False
        flat.entries.add(self)
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
        for old, new in ((self.dense, dense), (self.values, values)):
            if old is not new and isinstance(old, WatchedParameter):
                old.watch = None
        self._dense, self.values = weakref.ref(dense), values
        for tensor, watch in zip((dense, values), self.watches):
            if type(tensor) is nn.Parameter:
                tensor.__class__ = WatchedParameter  # type: ignore[assignment]
            if isinstance(tensor, WatchedParameter):
                if tensor.watch is not watch:
                    watch.forget(-1)
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
        self.flat.entries.add(self)
        self._watch(dense, self.values)

    # ---- keeping the two alike ----

    def update(self) -> None:
        """Make the two alike: the dense tensor takes the values; where it alone was changed, these take what it holds."""
        dense, values = self.watches
        if values.has_changed(self.values):
            self.write()
        elif dense.has_changed(self.dense):
            self.read()
        elif values.handed_out or dense.handed_out:
            # NumPy, which counts no versions, has written
            if self.values.device.type == "cpu" and not self.are_alike():
                (self.write if values.handed_out else self.read)()
            self.settle()

    def update_before_a_copy(self) -> None:
        """The same, of an entry that may be in pieces (resized, sharded) or without memory."""
        if self.dense is not None and self.dense.shape == self.mask.shapes[0] and not self.dense.is_meta:
            self.update()

    def settle(self) -> None:
        """The two are alike now."""
        self.watches[0].settle(self.dense)
        self.watches[1].settle(self.values)
        self.held = self.dense.dtype

    def replaced(self) -> str:
        """The message where the dense tensor is another one."""
        return f"{self.name!r} is sparsified and has been replaced or resized since: densify the model first"

    def write(self) -> None:
        """The values into the dense tensor."""
        if self.dense is None or self.dense.shape != self.mask.shapes[0]:
            raise RuntimeError(self.replaced())
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
            kept = self.values.to(self.held).to(found.dtype) == found
            if not bool(kept.all()):
                self.values.copy_(torch.where(kept, self.values, found.to(self.values.dtype)))
        if self.held != self.dense.dtype:  # cast tensor by tensor: it can hold more of the values now, or less
            self.write()
        self.settle()

    def fits(self, dense: Tensor, values: Tensor) -> bool:
        """Whether a dense tensor has these values at the mask's entries; other shapes are for torch to refuse.

        Exactly, or in 16 bits as nearly as one rounding allows: states that are averaged or cast round the two for
            themselves.
        """
        if dense.shape != self.mask.shapes[0] or values.shape != self.values.shape:
            return True
        found = self.mask.to(dense.device).gather({self.name: dense})
        kinds = [torch.finfo(dtype) for dtype in (found.dtype, values.dtype, self.held)]
        rtol, atol = max(((i.eps, i.tiny) for i in kinds if i.bits == 16), default=(0.0, 0.0))
        wanted = values.to(found).to(torch.float64)
        return torch.allclose(found.to(torch.float64), wanted, rtol=rtol, atol=atol, equal_nan=True)

    def are_alike(self) -> bool:
        """Whether the dense tensor holds the values."""
        found, wanted = self.mask.gather({self.name: self.dense}), self.values.detach().to(self.dense.dtype)
        return bool(((found == wanted) | ((found != found) & (wanted != wanted))).all())

    def write_resized(self) -> None:
        """The values into a dense tensor that has got or lost rows (`resize_token_embeddings`) and holds the others of
        the old.
        """
        if not self.watches[1].has_changed(self.values):
            return
        places = self.mask.flat_indices()
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
        self.entries: weakref.WeakSet[Entry] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        return {"nnz": self.nnz, "dtype": self.dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, buffer=None, entries=weakref.WeakSet())

    def part(self, entry: Entry, device: torch.device) -> Tensor:
        """The memory of an entry's values on a device."""
        if self.buffer is None or self.buffer.device != device:
            self.buffer = torch.empty(self.nnz, dtype=self.dtype, device=device)
        # No slice, which would have one version counter with all others.
        with torch.inference_mode(False):
            part = torch.empty(0, dtype=self.dtype, device=device)
            return part.set_(self.buffer.untyped_storage(), entry.start, (entry.mask.nnz,), (1,))  # type: ignore[arg-type]


# ---- the weight as an attribute ----
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

    def __deepcopy__(self, memo):
        return copy.deepcopy(self.entry.dense, memo)

    def __reduce_ex__(self, protocol):
        return self.entry.dense.__reduce_ex__(protocol)


def live_weight(weight: Tensor, entry: Entry) -> Tensor:
    """A tensor with a gradient for the entry's values, whose `data` is that of the dense tensor."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return weight
    live = weight.as_subclass(LiveWeight)
    live.entry = entry
    return live


# ---- optimizers ----
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
        if entry.values.grad is None:
            entry.update()
        else:  # whatever wrote the values: not every optimizer moves their version
            entry.write()
    if frozen and not ours:
        warnings.warn(
            f"this {type(optimizer).__name__} was made before sparsify: it trains nothing of {min(e.name for e in frozen)!r} and "
            "others, which are frozen now. Make it after sparsify, over the values",
            stacklevel=4,
        )


register_optimizer_step_post_hook(_after_step)
