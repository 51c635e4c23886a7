"""The addition of a delta to the tensors of a model: all or nothing, and it can be undone bit for bit."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from deftx_kernels.delta.exact import Low, base_plus_delta, bits_differ
from deftx_kernels.delta.fingerprints import fingerprint
from deftx_kernels.delta.histories import Addition, History, find_histories, forget, record
from deftx_kernels.kernels.tensors import FLOATS
from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import has_memory


class Sum(NamedTuple):
    """What is added to the entries of a mask, whose tensors have one device and dtype."""

    mask: CSRMask
    values: Tensor  # [nnz]
    low: Low | None
    before: Tensor  # [nnz], the entries from before
    done: Tensor  # bool []: whether `before` is filled. The sum can be in the tensors only then.

    def after(self, alpha: float) -> Tensor:
        """[nnz], the sum. It is computed again where it is needed, rather than kept."""
        return base_plus_delta(self.before, self.values, alpha, self.low)

    def write(self, tensors: Mapping[str, Tensor], alpha: float) -> None:
        """One pass over the entries: they are read, kept in `before` and replaced by the sum."""
        if self.before.dtype in FLOATS:
            self.mask.add_(tensors, self.values, alpha, former=self.before, done=self.done)
            if self.low is not None:
                self._replace_low(tensors, alpha, with_terms=True)
            return
        self.before.copy_(self.mask.gather(tensors))  # 8 bits
        self.done.fill_(True)
        self.mask.scatter_(tensors, self.after(alpha))

    def restore(self, tensors: Mapping[str, Tensor], alpha: float) -> set[str]:
        """Undo `write`, in one pass over the entries. Returns the names of tensors in which other code has changed
        some. Those that were cast are not compared.
        """
        if tensors[self.mask.names[0]].dtype != self.before.dtype:
            self.mask.scatter_(tensors, self.before)
            return set()
        if self.before.dtype in FLOATS:
            changed = set() if self.low is None else self._replace_low(tensors, alpha, with_terms=False)
            counts = self.mask.restore_(tensors, self.before, self.values, alpha)
            return changed | {n for n, count in zip(self.mask.names, counts.tolist()) if count}
        found = self.mask.gather(tensors)
        self.mask.scatter_(tensors, self.before)
        return self._differing(self.mask, found, self.after(alpha))

    def _replace_low(self, tensors: Mapping[str, Tensor], alpha: float, with_terms: bool) -> set[str]:
        """Where there are low terms, at few entries, put the sum with them in place of that without, or the reverse.
        Returns the names of tensors that had something else.
        """
        assert self.low is not None
        positions, terms = self.low
        before, values, mask = self.before[positions], self.values[positions], self.mask.at(positions)
        low = torch.arange(len(positions), device=positions.device), terms
        sums = [base_plus_delta(before, values, alpha), base_plus_delta(before, values, alpha, low)]
        found = mask.gather(tensors)
        mask.scatter_(tensors, sums[with_terms])
        return self._differing(mask, found, sums[not with_terms])

    @staticmethod
    def _differing(mask: CSRMask, found: Tensor, expected: Tensor) -> set[str]:
        off = bits_differ(found, expected)
        return {n for n, flags in mask.split(off).items() if bool(flags.any())} if bool(off.any()) else set()


@dataclass(eq=False)
class Change:
    """The addition of alpha times a delta to the tensors of a model, which have been checked."""

    mask: CSRMask
    values: Tensor
    low: Low | None
    dense: dict[str, Tensor]  # name → tensor that replaces the model's
    tensors: dict[str, Tensor]  # name → tensor of the model, for all names in mask, dense and copies
    copies: dict[str, str]  # further name → name in mask or dense of the tensor that it is a copy of
    current_tensors: Callable[[], Mapping[str, Tensor]]  # returns the model's tensors by name
    alpha: float
    identity: str | None  # content hash of the delta, or None to neither read nor write histories
    base: Mapping[str, str]  # name → fingerprint of the tensor that the delta was made for
    written: list[Sum] = field(default_factory=list)
    replaced: dict[str, Tensor] = field(default_factory=dict)  # name → whole tensor before
    contents: dict[str, str] = field(default_factory=dict)  # name → fingerprint before
    histories: dict[str, History] = field(default_factory=dict)  # name → history before
    additions: list[Addition] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.dense = self.dense | {n: self.dense[first] for n, first in self.copies.items() if first in self.dense}

    def check_not_open(self) -> None:
        """ValueError if one of the tensors is in an open change, whose end would restore it."""
        for change in _OPEN:
            held = change.memory()
            for name, tensor in self.tensors.items():
                if _memory(tensor) in held:
                    where = f"model's tensor {name!r} is in an open `applied` block or has an active adapter"
                    raise ValueError(f"{where}, whose end would undo this")

    def read_histories(self) -> dict[str, History]:
        """Name → history of each tensor in the mask; empty without an identity. Hashes these tensors."""
        if self.identity is not None:
            self.contents = fingerprint({n: self.tensors[n] for n in self.mask.names})
            self.histories = find_histories(self.tensors, self.contents, self.base)
        return self.histories

    def write(self, until_closed: bool = False) -> None:
        """Add the delta and record it in the tensors' histories. If that fails, the tensors are restored."""
        self.written = self._sums()
        self.replaced = {n: self.tensors[n].detach().clone() for n in self.dense}
        try:
            for one in self.written:
                one.write(self.tensors, self.alpha)
            for name, tensor in self.dense.items():
                self.tensors[name].detach().copy_(tensor)
            self.additions = self._additions()
            record(self.additions, self.tensors, until_closed)
        except BaseException:
            self._restore(self.tensors)
            raise

    def _sums(self) -> list[Sum]:
        """What is to be added, of each device and dtype."""
        sums = []
        for mask, part in _groups(self.mask, self.tensors, split=bool(self.copies)):
            values, low = self.values[part].to(mask.device), _low_within(self.low, part, mask.device)
            copies = [n for n, first in self.copies.items() if mask.names == (first,)]
            renamed = [CSRMask.unchecked([n], mask.shapes, mask.crow_indices, mask.col_indices) for n in copies]
            for one in (mask, *renamed):
                before = torch.empty_like(values, dtype=self.tensors[one.names[0]].dtype)
                sums.append(Sum(one, values, low, before, torch.zeros((), dtype=torch.bool, device=mask.device)))
        return sums

    def _additions(self) -> list[Addition]:
        """What was written to the tensors that have a history."""
        additions: list[Addition] = []
        for one in self.written if self.histories else []:
            mask, parts = one.mask, [one.mask.split(entries) for entries in (one.before, one.after(self.alpha))]
            for name in [n for n in mask.names if n in self.histories]:
                history = self.histories[name].after(str(self.identity), self.alpha)
                old, new = (part[name] for part in parts)
                additions.append(Addition(mask[name], old, new, name, self.contents[name], history))
        return additions

    def open(self) -> None:
        """`write` until `close`."""
        _OPEN.append(self)
        try:
            self.write(until_closed=True)
        except BaseException:
            self._restore(self.tensors)  # an interrupt may come after the last write
            _OPEN.remove(self)
            raise

    @property
    def is_open(self) -> bool:
        return self in _OPEN

    def close(self) -> tuple[str, str]:
        """Restore every touched entry, in one pass over them. Changes that were opened later on the same tensors are
        undone first and applied again afterwards. A change that is not open is left as it is.

        Returns:
            Two messages, "" if there is nothing to report: what could not be restored, and what other code had written.
        """
        try:
            return self._close() if self.is_open else ("", "")
        except BaseException:  # an interrupt: entries are restored to stored values, which can be done twice
            self._close()
            raise
        finally:
            _end(self)

    def _close(self) -> tuple[str, str]:
        later: list[Change] = []
        former = {id(self): self._update_tensors()}
        after = _OPEN[_OPEN.index(self) + 1 :]
        touched = self.memory() if after else set()
        for change in after:
            former[id(change)] = change._update_tensors()
            if touched & change.memory():
                later.append(change)
                touched |= change.memory()
        overwritten: list[str] = []
        misfits: list[str] = []
        for change in reversed([self, *later]):
            forget(change.additions)
            own, changed = change._take_out()
            overwritten += changed
            if former[id(change)]:  # other code may still use these tensors
                change._restore(change.tensors | former[id(change)])
            misfits += own
            if own:
                change.written, change.replaced = [], {}
        for change in later:
            if change.written or change.replaced:
                change.read_histories()
                change.write(until_closed=True)
        self.written, self.replaced = [], {}
        not_restored = others = ""
        if misfits:
            not_restored = (
                f"model's tensors {sorted(set(misfits))} have another shape or kind than when a delta was applied and "
                "were left as they are; all others were restored. Open deltas on these tensors are no longer applied"
            )
        if overwritten:
            others = (
                f"entries of {overwritten[0]!r} (tensors in all: {len(set(overwritten))}) were changed while a delta "
                "was applied; those that the delta covers are restored to what they were before"
            )
        return not_restored, others

    def keep(self) -> None:
        """End an open change and leave the delta in the tensors."""
        forget(self.additions)
        _end(self)

    def not_finite(self) -> str | None:
        """The name of a tensor that has NaN or infinities where the change wrote."""
        for one in self.written:
            for name, values in one.mask.split(one.after(self.alpha)).items():
                if not bool(values.isfinite().all()):
                    return name
        return next((n for n in self.dense if not bool(self.tensors[n].isfinite().all())), None)

    def memory(self) -> set[tuple]:
        """The memory of the tensors: that of a module is also that of its state dict."""
        return {_memory(t) for t in self.tensors.values()} - {()}

    def _update_tensors(self) -> dict[str, Tensor]:
        """Replace the tensors by those that the model has now. Returns the replaced ones by name."""
        current = self.current_tensors()
        former: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            now = current[name] if isinstance(current.get(name), Tensor) else tensor
            same = now is tensor or (_memory(now) and _memory(now) == _memory(tensor))
            if not same:
                former[name] = tensor
        self.tensors |= {n: current[n] for n in former}
        return former

    def _restore(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Restore every tensor that can be restored. Returns the names of the others."""
        misfits = self._misfits(tensors)
        for one in [one for one in self.written if bool(one.done)]:
            for mask, part in _groups(one.mask, tensors, misfits):
                mask.scatter_(dict(tensors), one.before[part].to(mask.device))
        for name, old in self.replaced.items():
            if name not in misfits:
                tensors[name].detach().copy_(old)
        return misfits

    def _misfits(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Names of the tensors that cannot hold their former content, because their shape or kind has changed."""
        held = [(n, one.before.dtype, s) for one in self.written for n, s in zip(one.mask.names, one.mask.shapes)]
        held += [(n, old.dtype, old.shape) for n, old in self.replaced.items()]
        return [n for n, dtype, shape in held if not _can_hold(tensors[n], dtype, shape)]

    def _take_out(self) -> tuple[list[str], list[str]]:
        """Restore every tensor that can be restored. Returns the names of the others, and of those that other code has
        changed since.
        """
        changed: list[str] = []
        misfits = self._misfits(self.tensors)
        for one in [one for one in self.written if bool(one.done)]:
            for mask, part in _groups(one.mask, self.tensors, misfits):
                values, before = (t[part].to(mask.device) for t in (one.values, one.before))
                low = _low_within(one.low, part, mask.device)
                changed += sorted(Sum(mask, values, low, before, one.done).restore(self.tensors, self.alpha))
        for name, old in self.replaced.items():
            now = self.tensors[name].detach()
            if name in misfits:
                continue
            if now.dtype == old.dtype and bool(bits_differ(self.dense[name].to(now.device, now.dtype), now).any()):
                changed.append(name)
            now.copy_(old)
        return misfits, changed


_OPEN: list[Change] = []  # in the order in which they were opened


def _end(change: Change) -> None:
    if change in _OPEN:
        _OPEN.remove(change)


def reopen(changes: Sequence[Change]) -> None:
    """Register copies of open changes, which were made with copies of their tensors."""
    _OPEN.extend(changes)


def _memory(tensor: Tensor) -> tuple:
    return (tensor.device, tensor.data_ptr(), tensor.shape) if has_memory(tensor) else ()


def _groups(
    mask: CSRMask, tensors: Mapping[str, Tensor], without: Sequence[str] = (), split: bool = False
) -> Iterator[tuple[CSRMask, slice]]:
    """The mask, or one for each tensor where device or dtype differ, on its device; with the range of its entries."""
    kinds = {(tensors[n].device, tensors[n].dtype) for n in mask.names}
    if len(kinds) == 1 and not split and not any(n in mask for n in without):
        yield mask.to(next(iter(kinds))[0]), slice(0, mask.nnz)
        return
    start = 0
    for name in mask.names:
        one = mask[name]
        if name not in without:
            yield one.to(tensors[name].device), slice(start, start + one.nnz)
        start += one.nnz


def _low_within(low: Low | None, part: slice, device: torch.device) -> Low | None:
    """The low terms of a range of the entries."""
    if low is None:
        return None
    start, end = torch.searchsorted(low[0], torch.tensor([part.start, part.stop], device=low[0].device)).tolist()
    return (low[0][start:end] - part.start).to(device), low[1][start:end].to(device)


def _can_hold(tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether the content of a tensor of this dtype and shape can be written to `tensor`."""
    usable = has_memory(tensor) or (tensor.numel() == 0 and not tensor.is_meta)
    writable = not tensor.is_inference() or torch.is_inference_mode_enabled()
    return usable and writable and tensor.shape == shape and torch.can_cast(dtype, tensor.dtype)
