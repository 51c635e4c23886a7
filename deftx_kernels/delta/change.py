"""A delta on the tensors of a model: written whole or not at all, and taken back bit for bit, in whatever order several are."""

import warnings
from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor

from deftx_kernels.delta.exact import Low, differs, total
from deftx_kernels.delta.fingerprints import History, fingerprint, history, remember, remembered
from deftx_kernels.mask import CSRMask


class Change:
    """The addition of a delta to tensors that fit it.

    Args:
        mask, values, low: of the delta. dense: the whole tensors to copy.
        tensors: name → tensor of the model, for all of these.
        alpha: the factor of the values.
        identity: the delta's content hash, or None where histories are neither read nor written.
        base: name → fingerprint of the tensor that the delta was made for.
    """

    def __init__(
        self,
        mask: CSRMask,
        values: Tensor,
        low: Low | None,
        dense: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        alpha: float,
        identity: str | None,
        base: Mapping[str, str],
    ) -> None:
        self.mask, self.values, self.low, self.dense = mask, values, low, dense
        self.tensors, self.alpha, self.identity, self.base = tensors, alpha, identity, base
        self.before: list[tuple[CSRMask, Tensor, Tensor]] = []  # mask, entries before and after; of one device and dtype each
        self.whole: list[tuple[str, Tensor]] = []  # name, tensor before
        self.remembered: dict[str, History | None] = {}

    def histories(self) -> dict[str, History]:
        """Name → history of each tensor of the mask; empty without an identity."""
        if self.identity is None:
            return {}
        found = fingerprint({n: self.tensors[n] for n in self.mask.names})
        return {n: history(self.tensors[n], now, self.base.get(n)) for n, now in found.items()}

    def write(self, known: Mapping[str, History]) -> None:
        """Add the delta; where that fails, the tensors are as they were. `known`: the histories."""
        self.remembered = {n: remembered(self.tensors[n]) for n in known}
        self.before = []
        for mask, values, low in self._parts():
            old = mask.gather(self.tensors)
            self.before.append((mask, old, total(old, values, self.alpha, low)))
        self.whole = [(n, self.tensors[n].detach().clone()) for n in self.dense]
        try:
            for mask, _, new in self.before:
                mask.scatter_(self.tensors, new)
            for name, tensor in self.dense.items():
                self.tensors[name].detach().copy_(tensor)
            for name, now in fingerprint({n: self.tensors[n] for n in known}).items():
                remember(self.tensors[name], known[name].after(now, str(self.identity), self.alpha))
        except BaseException:
            self._put_back()
            raise

    def open(self, known: Mapping[str, History]) -> None:
        """`write` until `close`."""
        self.write(known)
        _OPEN.append(self)

    def close(self) -> None:
        """Restore every touched entry. Changes that were opened later on the same tensors are taken back first, then made again."""
        later: list[Change] = []
        touched, opened = self._identities(), list(_OPEN)
        for change in opened[opened.index(self) + 1 :]:
            if touched & change._identities():
                later.append(change)
                touched |= change._identities()
        for change in reversed([self, *later]):
            change._warn_of_other_writes()
            change._put_back()
        _OPEN.remove(self)
        for change in later:
            change.write(change.histories())

    def _identities(self) -> set[int]:
        return {id(t) for t in self.tensors.values()}

    def _put_back(self) -> None:
        for mask, old, _ in self.before:
            device = self.tensors[mask.names[0]].device  # the model may have been moved since
            mask.to(device).scatter_(self.tensors, old.to(device))
        for name, tensor in self.whole:
            self.tensors[name].detach().copy_(tensor)
        for name, known in self.remembered.items():
            remember(self.tensors[name], known)

    def _warn_of_other_writes(self) -> None:
        for mask, _, new in self.before:
            device = self.tensors[mask.names[0]].device
            found = mask.to(device).gather(self.tensors)
            if found.dtype == new.dtype and bool(differs(found, new.to(device)).any()):
                warnings.warn(
                    f"entries of {mask.names[0]!r} or later tensors were changed while a delta was applied; those that the delta "
                    "covers are restored to what they were before",
                    RuntimeWarning,
                    stacklevel=5,
                )

    def _parts(self) -> list[tuple[CSRMask, Tensor, Low | None]]:
        """The delta, in one part where its tensors are of one device and dtype, else by tensor; each on the tensors' device."""
        names, low = self.mask.names, self.low
        kinds = {(t.device, t.dtype) for t in (self.tensors[n] for n in names)}
        if len(kinds) == 1:
            device = next(iter(kinds))[0]
            return [(self.mask.to(device), self.values.to(device), None if low is None else (low[0].to(device), low[1].to(device)))]
        values = self.mask.split(self.values)
        starts = list(accumulate((len(v) for v in values.values()), initial=0))
        ends = [0] * len(starts) if low is None else torch.searchsorted(low[0], torch.tensor(starts, device=low[0].device)).tolist()
        parts = []
        for i, name in enumerate(names):
            device, own = self.tensors[name].device, None
            if low is not None and ends[i] < ends[i + 1]:
                place = slice(ends[i], ends[i + 1])
                own = (low[0][place] - starts[i]).to(device), low[1][place].to(device)
            parts.append((self.mask[name].to(device), values[name].to(device), own))
        return parts


_OPEN: list[Change] = []  # in the order in which they were opened
