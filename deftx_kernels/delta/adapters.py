"""SparseAdapters: sparse deltas as the named adapters of a model, with PEFT's verbs."""

import contextlib
import functools
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

from torch import nn

from deftx_kernels.delta.arithmetic import weighted_sum
from deftx_kernels.delta.change import Change, reopen
from deftx_kernels.delta.merging import MergeMethod, merge
from deftx_kernels.delta.models import Model, check_not_8_bit, checked_targets, current_tensors
from deftx_kernels.delta.sparse_delta import SparseDelta, checked_weights, united_tensors


class SparseAdapters:
    """Several deltas of one base on one model: added by name, switched, weighed, combined, merged.

    The model keeps its speed, since an active adapter is in its weights. A switch reads and writes the entries of the
    adapters that were active and of those that are to be. With none active, the model is the base bit for bit, whatever
    was active before. Other code should not write to the model's covered entries while an adapter is active: they are
    restored to the base's, with a RuntimeWarning.

    Args:
        model: a module, or a mapping of names to tensors. None of the adapters is active at first.
        adapters: name → SparseDelta, or a folder or repository of one.

    Raises:
        as `add_adapter`; TypeError for a model or `adapters` of another type.

    Example:
        >>> import torch
        >>> base = {"w": torch.zeros(3)}
        >>> task = SparseDelta.from_models({"w": torch.tensor([0.0, 1.0, 2.0])}, base)
        >>> adapters = SparseAdapters(base, {"task": task})
        >>> adapters.set_adapter("task")
        >>> base["w"]
        tensor([0., 1., 2.])
        >>> with adapters.disable_adapter():
        ...     base["w"]
        tensor([0., 0., 0.])
    """

    def __init__(self, model: Model, adapters: Mapping[str, SparseDelta | str | os.PathLike] | None = None) -> None:
        if not isinstance(model, nn.Module | Mapping):
            raise TypeError(f"model must be a module or a mapping of names to tensors, got {type(model).__name__}")
        if not isinstance(adapters or {}, Mapping):
            raise TypeError(f"adapters must be a mapping of names to deltas or paths, got {type(adapters).__name__}")
        self.model = model
        self._deltas: dict[str, SparseDelta] = {}
        self._active: dict[str, float] = {}  # name → weight
        self._open: list[Change] = []  # the change that is in the model, if any
        weakref.finalize(self, _release, self._open)  # the model then keeps what is active
        for name, delta in (adapters or {}).items():
            self.add_adapter(name, delta)

    def __copy__(self) -> NoReturn:
        raise TypeError("two SparseAdapters would share what is active: copy.deepcopy copies the model as well")

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a deep copy or a pickle: its model is another one, in which the same adapters are active."""
        self.__dict__.update(state)
        reopen(self._open)
        weakref.finalize(self, _release, self._open)

    def __repr__(self) -> str:
        return f"SparseAdapters({list(self._deltas)}, active={self.active_adapters})"

    def __contains__(self, name: object) -> bool:
        return name in self._deltas

    def __getitem__(self, name: str) -> SparseDelta:
        """The delta of an adapter."""
        return self._deltas[self._known(name)]

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters, in the order in which they were added."""
        return list(self._deltas)

    @property
    def active_adapters(self) -> list[str]:
        """Names of those that are in the model's weights."""
        return list(self._active)

    def add_adapter(
        self, name: str, delta: SparseDelta | str | os.PathLike, revision: str | None = None, *, strict: bool = True
    ) -> None:
        """Add an adapter, which does not activate it.

        Args:
            delta: a delta, or a folder or repository of one, with its `revision`.
            strict: whether the model (without its active adapters) must be the delta's base. False adds a delta of
                another base, or of the same one in another dtype: each sum is rounded to that of the model.

        Raises:
            ValueError: the name is taken; the model is not the base (`strict`), lacks a tensor, or has it in another
                shape or in 8 bits, by name; errors of `SparseDelta.from_pretrained`.
            TypeError: something else than a delta or a path.
        """
        self._check_new("name", name)
        if isinstance(delta, str | os.PathLike):
            delta = SparseDelta.from_pretrained(delta, revision)
        elif not isinstance(delta, SparseDelta):
            raise TypeError(f"delta must be a SparseDelta or the path of one, got {type(delta).__name__}")
        with self.disable_adapter():
            check_not_8_bit(delta.mask.names, current_tensors(self.model))
            delta.check_base(self.model, strict)
        self._deltas[name] = delta

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter, from the model's weights as well."""
        name = self._known(name)
        if name in self._active:
            self._activate({one: weight for one, weight in self._active.items() if one != name})
        del self._deltas[name]

    def set_adapter(self, names: str | Sequence[str], weights: float | Sequence[float] | None = None) -> None:
        """Make these the active adapters: base + the weighted sum of their values, in float64 and rounded once.

        Args:
            names: one name or several; an empty list: none, the base.
            weights: factor of each, 1 by default. Whole tensors (a head) are not scaled.

        Raises:
            ValueError, KeyError: an unknown name, a name twice, bad weights; adapters that have a whole tensor with
                different values. The model is unchanged.
        """
        names = [names] if isinstance(names, str) else list(names)
        if len(set(names)) < len(names):
            raise ValueError(f"names must not repeat, got {names}")
        deltas = [self[name] for name in names]
        several = weights if weights is None or isinstance(weights, Sequence) else [weights]
        factors = checked_weights(deltas, several, "set_adapter") if names or several else []
        self._activate(dict(zip(names, factors)))

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[Model]:
        """`with adapters.disable_adapter():` the model is the base; afterwards the same adapters are active again."""
        active = dict(self._active)
        self._activate({})
        try:
            yield self.model
        finally:
            if not self._active:
                self._activate({name: weight for name, weight in active.items() if name in self._deltas})

    def add_weighted_adapter(
        self,
        names: str | Sequence[str],
        weights: Sequence[float],
        new_name: str,
        combination_type: MergeMethod = "linear",
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
        seed: int = 0,
    ) -> None:
        """Add an adapter that `merge` makes of others. Arguments as there. It is not activated.

        Raises:
            ValueError, KeyError: `new_name` is taken, an unknown name, and as `merge`.
        """
        self._check_new("new_name", new_name)
        self._deltas[new_name] = merge(
            *(self[name] for name in ([names] if isinstance(names, str) else names)),
            weights=weights,
            method=combination_type,
            density=density,
            majority_sign_method=majority_sign_method,
            seed=seed,
        )

    def merge_and_unload(self, safe_merge: bool = False) -> Model:
        """Leave the active adapters in the model's weights for good, remove all adapters, and return the model.

        Args:
            safe_merge: refuse NaN and infinities, before anything is changed.

        Raises:
            ValueError: `safe_merge`, and a tensor has one where an active adapter changes it, by name.
        """
        for change in self._open if safe_merge else []:
            if broken := change.not_finite():
                raise ValueError(f"model's tensor {broken!r} has NaN or infinities with {self.active_adapters} active")
        _release(self._open)
        self._active, self._deltas = {}, {}
        return self.model

    # ---- the model's weights ----
    def _known(self, name: str) -> str:
        if name not in self._deltas:
            raise KeyError(f"no adapter {name!r}; there are {list(self._deltas)}")
        return name

    def _check_new(self, argument: str, name: str) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{argument} must be a string that is not empty, got {name!r}")
        if name in self._deltas:
            raise ValueError(f"{argument}: there is an adapter {name!r} already; delete_adapter({name!r}) removes it")

    def _activate(self, active: dict[str, float]) -> None:
        """Replace the active adapters. Every check comes before the first write."""
        same = list(active.items()) == list(self._active.items())  # in this order, which is that of the sum
        if same and bool(active) == bool(self._open):  # they differ after an interrupt
            return
        change = self._change(active) if active else None
        self._active, messages = {}, ("", "")
        if self._open:
            messages = self._open[-1].close()
            self._open.clear()
        if messages[0]:
            raise RuntimeError(" ".join(messages).rstrip())
        if change is not None:
            self._open.append(change)  # before it is in the model, so that an interrupt loses nothing
            self._active = active
            try:
                change.open()
            except BaseException:
                if not change.is_open:
                    self._active = {}
                    self._open.clear()
                raise
        if messages[1]:
            warnings.warn(messages[1], RuntimeWarning, stacklevel=3)

    def _change(self, active: Mapping[str, float]) -> Change:
        deltas = [self._deltas[name] for name in active]
        weights = list(active.values())
        total = deltas[0].terms if weights == [1.0] else weighted_sum([delta.terms for delta in deltas], weights)
        dense, tied = united_tensors(deltas)
        targets, copies = checked_targets(self.model, total.mask, dense, tied, strict=False)  # as `add_adapter` was
        current = functools.partial(current_tensors, self.model)
        return Change(*total, dense, targets, copies, current, 1.0, None, {})


def _release(changes: list[Change]) -> None:
    while changes:
        changes.pop().keep()
