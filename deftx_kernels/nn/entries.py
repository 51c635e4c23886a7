"""An entry is a masked parameter: its dense tensor and its compact values, which are synchronised when they are used.

An optimizer step over the values writes them into the dense tensor: in `SparseAdamW`'s own launch, or in a hook after
the step of any other torch optimizer. All other changes are detected at the next use, by comparing the version counters
of the two tensors. Writes through `.data` do not change these, so the parameters also record reads of their `.data`.
A use without changes compares two integers and launches nothing on the device.

FSDP2 replaces both tensors by DTensors, of which each rank has a part. These are synchronised in `sharded.py`.
"""

import copy
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.weak import TensorWeakRef

from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.shards import is_dtensor
from deftx_kernels.nn.autocast_copy import AutocastCopy, is_capturing, write_copies
from deftx_kernels.nn.expert_masks import ExpertMasks
from deftx_kernels.nn.functional import is_traced
from deftx_kernels.validation import values_name


class MaskedParameter(NamedTuple):
    """The tensors of a masked parameter, and the mask of that one tensor (under its name in the model)."""

    dense: nn.Parameter  # any shape
    values: nn.Parameter  # [nnz]
    mask: CSRMask


class TrackedParameter(nn.Parameter):
    """A parameter whose tracker records reads and assignments of `.data`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    tracker: Optional["ChangeTracker"] = None

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        alias = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        if self.tracker is not None and not torch.compiler.is_compiling():
            self.tracker.add_alias(alias)
        return alias

    @data.setter
    def data(self, tensor: Tensor) -> None:
        if self.tracker is not None:
            self.tracker.check_dtype(self, tensor)
        Tensor.data.__set__(self, tensor)  # type: ignore[attr-defined]
        if self.tracker is not None:
            self.tracker.set_assigned(tensor)

    def __deepcopy__(self, memo):
        """Copies of values are views of one buffer again. The copied entry will set their tracker."""
        entry = _entry_of(self)
        if entry is not None and entry.values is self and not self.is_meta:
            storage = self.untyped_storage()
            if storage._cdata not in memo.get("torch", {}):  # the whole buffer is copied now
                for other in list(entry.buffer.entries):
                    other.synchronise_if_possible()
            data = torch.empty(0, dtype=self.dtype, device=self.device)
            storage = copy.deepcopy(storage, memo)
            data.set_(storage, self.storage_offset(), self.shape, self.stride())  # type: ignore[arg-type]
        else:
            data = self.detach().clone(memory_format=torch.preserve_format)
        return type(self)(data, self.requires_grad)

    def __reduce_ex__(self, protocol):  # files hold plain parameters
        return torch._utils._rebuild_parameter, (self.detach(), self.requires_grad, OrderedDict())


def _version(tensor: Tensor) -> int:
    try:
        return tensor._version
    except RuntimeError:  # inference tensors have none
        return 0


class ChangeTracker:
    """Detects writes to one of an entry's two tensors since they were last synchronised, also through an alias."""

    def __init__(self, entry: "Entry", is_values: bool) -> None:
        self.entry, self.is_values = weakref.ref(entry), is_values
        self.reset()

    def reset(self) -> None:
        self.version = -1  # differs from every version
        self.has_new_data = False
        self.data_was_read = False  # by code that may write through NumPy, which changes no version
        self.aliases: list[tuple[Tensor, int]] = []  # with their versions
        self.assigned: Tensor | None = None  # to `.data`; kept, as it may be a view of a buffer that is written later

    def add_alias(self, alias: Tensor) -> None:
        if len(self.aliases) > 16:
            self._drop_unused_aliases()
        self.aliases.append((alias, _version(alias)))
        self.data_was_read = True

    def check_dtype(self, tensor: Tensor, data: Tensor) -> None:
        entry = self.entry()
        if self.is_values and entry is not None and data.dtype != tensor.dtype and not entry.is_replaceable:
            types = f"{tensor.dtype}, got {data.dtype}"
            raise TypeError(f"the values of {entry.name!r} are {types}: cast the model with .to(dtype)")

    def set_assigned(self, data: Tensor) -> None:
        self.has_new_data, self.assigned = True, data
        self.aliases.append((data, _version(data)))

    @property
    def is_watched(self) -> bool:
        """Whether other code may write, or has written, the tensor without its version counter."""
        return bool(self.aliases) or self.has_new_data or self.data_was_read

    def has_changed(self, tensor: Tensor) -> bool:
        if self.has_new_data or _version(tensor) != self.version:
            return True
        return bool(self.aliases) and any(_version(alias) != version for alias, version in self.aliases)

    def mark_synchronised(self, tensor: Tensor) -> None:
        if self.aliases:
            self._drop_unused_aliases()
            self.aliases = [(alias, _version(alias)) for alias, _ in self.aliases]
        self.version, self.has_new_data, self.data_was_read = _version(tensor), False, False

    def _drop_unused_aliases(self) -> None:
        """Drop the aliases that only this list refers to, after recording whether they were written."""
        aliases, self.aliases = self.aliases, []
        self.has_new_data |= any(_version(alias) != version for alias, version in aliases)
        weak = [(TensorWeakRef(alias), version) for alias, version in aliases]
        del aliases
        self.aliases += [(alias, version) for ref, version in weak if (alias := ref()) is not None]


class Entry:
    """The state of one masked parameter, shared by all modules that own it (tied weights)."""

    copy: AutocastCopy | None = None
    is_sharded = False  # the two tensors are DTensors
    gathered_dtype: torch.dtype | None = None  # of a sharded dense tensor, at the first forward
    values: Any  # [nnz]: a parameter

    def __init__(self, mask: CSRMask, dense: nn.Parameter, buffer: "ValuesBuffer", start: int) -> None:
        self.mask, self.buffer, self.start = mask, buffer, start  # `start`: the first of its values in the buffer
        self.dense_required_grad = dense.requires_grad  # before sparsify
        self.synchronised_dtype = dense.dtype  # of the dense tensor
        self.expert_masks = ExpertMasks()  # of a weight of experts
        self.is_replaceable = False  # while torch casts or loads all parameters of a module
        buffer.entries.add(self)
        self.owners: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        _entries[id(self)] = self
        dense.requires_grad_(False)
        # Nothing is trained where the mask has no entries: FSDP2 does not take empty gradients.
        self._track(dense, TrackedParameter(buffer.view_of(self, dense.device), requires_grad=mask.nnz > 0))
        self.mark_synchronised()

    @property
    def name(self) -> str:
        return self.mask.names[0]

    @property
    def dense(self) -> Any:
        """The dense tensor, which the modules keep alive; None where a wrapper (FSDP2) has replaced it."""
        return self._dense()

    @property
    def replaced_message(self) -> str:
        return f"{self.name!r} is sparsified and has been replaced or resized since: densify the model first"

    @property
    def sharded_apart_message(self) -> str:
        return f"{self.name!r} and its values must be sharded (FSDP2) together, or neither of them"

    def _track(self, dense: nn.Parameter, values: nn.Parameter) -> None:
        self.dense_tracker, self.values_tracker = ChangeTracker(self, False), ChangeTracker(self, True)
        self._dense, self.values = weakref.ref(dense), values
        self.set_tensors(dense, values)

    def set_tensors(self, dense: nn.Parameter, values: nn.Parameter) -> None:
        if self.copy is not None and self.dense is not dense:
            self.copy.key = None
        for old, new in ((self.dense, dense), (self.values, values)):
            if old is not new and isinstance(old, TrackedParameter):
                old.tracker = None
        self.values = values
        # torch casts a DTensor by swapping it, which fails where there is a weak reference
        self._dense = (lambda: dense) if self.is_sharded else weakref.ref(dense)  # type: ignore[assignment]
        for tensor, tracker in ((dense, self.dense_tracker), (values, self.values_tracker)):
            if type(tensor) is nn.Parameter:
                tensor.__class__ = TrackedParameter  # type: ignore[assignment]
            if isinstance(tensor, TrackedParameter):
                if tensor.tracker is not tracker:
                    tracker.reset()
                tensor.tracker = tracker

    def find_shards(self) -> None:
        """Take the DTensors by which FSDP2 has replaced the two tensors in the modules that own them."""
        owned = ((m, a) for m in self.owners for a, e in m.__dict__.get("_masked_entries", {}).items() if e is self)
        if self.is_sharded or (first := next(owned, None)) is None:
            return
        parameters, attr = first[0]._parameters, first[1]
        dense: Any = parameters.get(attr)
        values: Any = parameters.get(values_name(attr))
        if is_dtensor(dense) and is_dtensor(values):
            self.copy, self.is_sharded, self.buffer.data = None, True, None
            self.mask = self.mask.to(values.device_mesh.device_type)  # fully_shard moves parameters there
            self.set_tensors(dense, values)

    def check_gathered(self) -> None:
        """RuntimeError in a forward after a cast of shards that were gathered before: FSDP2 keeps the buffers of that
        time, and would read other bytes than the weights'.
        """
        dtype = self.dense.dtype
        if self.gathered_dtype not in (None, dtype):
            raise RuntimeError(
                f"{self.name!r} was cast from {self.gathered_dtype} to {dtype} after a forward, which FSDP2 does not "
                "support: cast the model before its first forward"
            )
        self.gathered_dtype = dtype

    def release(self) -> None:
        """Make the dense tensor a plain parameter again."""
        self.copy = None
        for tensor in (self.dense, self.values):
            if isinstance(tensor, TrackedParameter):
                tensor.tracker = None
        if type(self.dense) is TrackedParameter:
            self.dense.__class__ = nn.Parameter  # type: ignore[assignment]
        self.dense.requires_grad_(self.dense_required_grad)

    def __getstate__(self) -> dict[str, Any]:  # the copied modules add themselves to the owners
        left_out = ("owners", "dense_tracker", "values_tracker", "_dense")
        return {**{k: v for k, v in vars(self).items() if k not in left_out}, "dense": self.dense}

    def __setstate__(self, state: dict[str, Any]) -> None:
        dense = state.pop("dense")
        vars(self).update(state, owners=weakref.WeakSet())
        self.buffer.entries.add(self)
        _entries[id(self)] = self
        self._track(dense, self.values)

    # ---- synchronisation ----
    def synchronise(self) -> None:
        """Write changed values into the dense tensor; if only that was changed, read the values from it. Nothing for
        shards, which `sharded.py` synchronises.
        """
        if self.is_sharded:
            return
        if self.values_tracker.has_changed(self.values):
            self.write_values()
        elif self.dense_tracker.has_changed(self.dense):
            self.read_values()
        elif self.values_tracker.data_was_read or self.dense_tracker.data_was_read:
            # may have been written through NumPy: compare the contents
            if self.values.device.type == "cpu" and not self.is_synchronised():
                (self.write_values if self.values_tracker.data_was_read else self.read_values)()
            self.mark_synchronised()

    def synchronise_if_possible(self) -> None:
        """`synchronise`, unless the dense tensor is resized or on meta."""
        if self.dense is not None and self.dense.shape == self.mask.shapes[0] and not self.dense.is_meta:
            self.synchronise()

    # ---- the copy for autocast ----
    def autocast_weight(self, dtype: torch.dtype) -> Tensor | None:
        """The dense tensor in autocast's dtype, if the entry keeps a copy that is current; after `synchronise`."""
        if self.copy is None or self.dense_tracker.is_watched:
            return None
        return self.copy.of(self.dense, dtype)

    def refresh_copy(self) -> None:
        """Bring a copy up to date that a captured graph reads."""
        if self.copy is not None:
            if self.dense_tracker.is_watched:
                self.copy.key = None
            self.copy.refresh(self.dense)

    def current_copy(self) -> AutocastCopy | None:
        """The copy, if a write of the values into the dense tensor has to be repeated in it. Call it before the write:
        a captured one without a current copy ends the use of copies.
        """
        if self.copy is None:
            return None
        if not self.dense_tracker.is_watched and self.copy.is_current(self.dense):
            return self.copy
        self.copy.key = None
        if is_capturing(self.dense):
            self.copy.disable()
        return None

    def mark_synchronised(self) -> None:
        if self.copy is not None and self.dense_tracker.is_watched:
            self.copy.key = None
        self.dense_tracker.mark_synchronised(self.dense)
        self.values_tracker.mark_synchronised(self.values)
        self.synchronised_dtype = self.dense.dtype

    def write_values(self) -> None:
        """Write the values into the dense tensor."""
        if self.dense is None or self.dense.shape != self.mask.shapes[0]:
            raise RuntimeError(self.replaced_message)
        copy = self.current_copy()
        if self.dense.is_contiguous():  # mask.scatter_ without its checks, since the hook runs this for every tensor
            values = self.values.detach().to(self.dense.dtype).contiguous()
            torch.ops.deftx.csr_scatter_([self.dense.detach()], self.mask.crow_indices, self.mask.col_indices, values)
            if not self.dense.is_inference():
                torch.autograd.graph.increment_version(self.dense)
        else:
            self.mask.scatter_({self.name: self.dense}, self.values)
        if copy is not None:
            write_copies([(copy, self.dense)], self.mask, self.values)
        self.mark_synchronised()

    def read_values(self) -> None:
        """Read the values from the dense tensor. Values that round to what it holds stay, in their precision."""
        with torch.no_grad():
            found = self.mask.gather({self.name: self.dense})
            same = self.values.to(self.synchronised_dtype).to(found.dtype) == found
            if not bool(same.all()):
                self.values.copy_(torch.where(same, self.values, found.to(self.values.dtype)))
        # The dense tensor alone was cast: now it holds more digits of the values, or fewer.
        if self.synchronised_dtype != self.dense.dtype:
            self.write_values()
        self.mark_synchronised()

    def write_values_resized(self) -> None:
        """Write changed values into a dense tensor that gained or lost rows (`resize_token_embeddings`)."""
        if not self.values_tracker.has_changed(self.values):
            return
        rows = min(len(self.dense), self.mask.shapes[0][0])
        chosen = self.mask.to_dense()[self.name][:rows]
        self.dense.detach()[:rows][chosen] = self.values.detach()[: int(chosen.sum())].to(self.dense.dtype)
        self.mark_synchronised()

    def matches(self, dense: Tensor | None, values: Tensor | None) -> bool:
        """Whether a dense tensor has these values at the mask's entries. True where one is missing, and for other
        shapes, which torch reports.
        """
        if dense is None or values is None:
            return True
        if dense.shape != self.mask.shapes[0] or values.shape != self.values.shape:
            return True
        return self.are_near(self.mask.to(dense.device).gather({self.name: dense}), values)

    def are_near(self, found: Tensor, values: Tensor) -> bool:
        """Whether entries of a dense tensor are these values: exactly, or in 16 bits within one rounding, since states
        that are averaged or cast round the two separately.
        """
        dtypes = [torch.finfo(dtype) for dtype in (found.dtype, values.dtype, self.synchronised_dtype)]
        rtol, atol = max(((i.eps, i.tiny) for i in dtypes if i.bits == 16), default=(0.0, 0.0))
        wanted = values.to(found).to(torch.float64)
        return torch.allclose(found.to(torch.float64), wanted, rtol=rtol, atol=atol, equal_nan=True)

    def is_synchronised(self) -> bool:
        """Whether the dense tensor holds the values: compares the contents."""
        found, wanted = self.mask.gather({self.name: self.dense}), self.values.detach().to(self.dense.dtype)
        return torch.allclose(found, wanted, rtol=0.0, atol=0.0, equal_nan=True)


_entries: weakref.WeakValueDictionary[int, Entry] = weakref.WeakValueDictionary()  # all of them, by their ids


class ValuesBuffer:
    """One flat buffer for all values of a dtype. Each values parameter is a view of it."""

    def __init__(self, data: Tensor | None, nnz: int, dtype: torch.dtype) -> None:
        self.data = data  # [nnz]; None in a copy, whose values share a storage already
        self.nnz, self.dtype = nnz, dtype
        self.entries: weakref.WeakSet[Entry] = weakref.WeakSet()

    def __reduce__(self):
        return ValuesBuffer, (None, self.nnz, self.dtype)

    def view_of(self, entry: Entry, device: torch.device) -> Tensor:
        """The memory of an entry's values on a device, as a tensor with its own version counter (slices share one)."""
        if self.data is None or self.data.device != device:
            self.data = torch.empty(self.nnz, dtype=self.dtype, device=device)
        with torch.inference_mode(False):
            view = torch.empty(0, dtype=self.dtype, device=device)
            return view.set_(self.data.untyped_storage(), entry.start, (entry.mask.nnz,), (1,))  # type: ignore[arg-type]


class DifferentiableWeight(Tensor):
    """A masked parameter read as an attribute: its gradient is that of the values, its `.data` the dense tensor's."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _is_param = True  # isinstance(weight, nn.Parameter), as `Module.get_parameter` requires
    entry: Entry

    @classmethod
    def of(cls, weight: Tensor, entry: Entry) -> Tensor:
        """`weight`, a function of the entry's values, as this class; unchanged under a tracer."""
        if is_traced():
            return weight
        weight = weight.as_subclass(cls)
        weight.entry = entry
        return weight

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


# ---- optimizers ----
def _entry_of(parameter: Tensor) -> Entry | None:
    tracker = parameter.tracker if isinstance(parameter, TrackedParameter) else None
    return None if tracker is None else tracker.entry()


def entries_of(parameters: Iterable[Tensor]) -> dict[int, Entry]:
    """id(values) → entry, for those of the tensors that are the compact values of a sparsified model."""
    parameters = list(parameters)
    pairs = ((parameter, _entry_of(parameter)) for parameter in parameters)
    found = {id(parameter): entry for parameter, entry in pairs if entry is not None and entry.values is parameter}
    if dtensors := {id(parameter) for parameter in parameters if is_dtensor(parameter)}:
        for entry in [entry for ref in _entries.valuerefs() if (entry := ref()) is not None]:
            entry.find_shards()
            if id(entry.values) in dtensors:
                found[id(entry.values)] = entry
    return found


def _write_values_after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if getattr(optimizer, "writes_masked_weights", False):
        return
    trained: list[Entry] = []
    frozen: list[Entry] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (entry := _entry_of(parameter)) is not None:
                (trained if entry.values is parameter else frozen).append(entry)
    for entry in trained:
        if entry.values.grad is None:
            entry.synchronise()
        else:  # not every optimizer increments the version counter
            entry.write_values()
    if frozen and not trained:
        warnings.warn(
            f"this {type(optimizer).__name__} was made before sparsify: it does not train "
            f"{min(e.name for e in frozen)!r} and others, which are frozen now. Make the optimizer after sparsify",
            stacklevel=4,
        )


register_optimizer_step_post_hook(_write_values_after_step)
