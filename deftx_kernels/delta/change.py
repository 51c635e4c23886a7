"""A delta on the tensors of a model: written whole or not at all, and taken back bit for bit, in whatever order several
are.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate

import torch
from torch import Tensor

from deftx_kernels.delta.exact import Low, differs, total
from deftx_kernels.delta.fingerprints import History, digest, fingerprint, history, known, remember
from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import has_memory


class Change:
    """The addition of a delta to tensors that fit it.

    Args:
        mask, values, low: of the delta. dense: the whole tensors to copy.
        tensors: name → tensor of the model, for all of these.
        aliases: further names in `tensors` → the name of the delta's tensor that they are copies of, and are to stay.
        live: the model's tensors by name, as they are when it is called.
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
        tensors: dict[str, Tensor],
        aliases: Mapping[str, str],
        live: Callable[[], Mapping[str, Tensor]],
        alpha: float,
        identity: str | None,
        base: Mapping[str, str],
    ) -> None:
        self.mask, self.values, self.low, self.tensors, self.live = mask, values, low, tensors, live
        self.dense = {**dense, **{n: dense[first] for n, first in aliases.items() if first in dense}}
        self.aliases = {n: first for n, first in aliases.items() if first in mask}
        self.alpha, self.identity, self.base = alpha, identity, base
        # mask, entries before and after; of one device and dtype each
        self.before: list[tuple[CSRMask, Tensor, Tensor]] = []
        self.whole: dict[str, Tensor] = {}  # name → tensor before
        self.found: dict[str, History] = {}  # name → history before
        self.now: dict[str, str] = {}  # name → fingerprint before

    def check_free(self) -> None:
        """ValueError where an open change holds a tensor, which it would restore."""
        for change in list(_OPEN):
            held = change.identities()
            for name, tensor in self.tensors.items():
                if _identity(tensor) in held:
                    raise ValueError(
                        f"model's tensor {name!r} is in an open `applied` block, whose end would undo this"
                    )

    def histories(self) -> dict[str, History]:
        """Name → history of each tensor of the mask; empty without an identity."""
        if self.identity is None:
            return {}
        self.now = fingerprint({n: self.tensors[n] for n in self.mask.names})
        below = _OPEN[: _OPEN.index(self)] if self in _OPEN else list(_OPEN)
        for name, now in self.now.items():
            if not known(now):
                _remember_open(below, self.tensors[name], now)
        self.found = {n: history(now, self.base.get(n)) for n, now in self.now.items()}
        return self.found

    def write(self, remember: bool = False) -> None:
        """Add the delta; where that fails, the tensors are as they were. `remember`: and let them count as their base
        with it.
        """
        self.before = []
        for mask, values, low in self._parts():
            old = mask.gather(self.tensors)
            self.before.append((mask, old, total(old, values, self.alpha, low)))
        self.whole = {n: self.tensors[n].detach().clone() for n in self.dense}
        try:
            for mask, _, new in self.before:
                mask.scatter_(self.tensors, new)
            for name, tensor in self.dense.items():
                self.tensors[name].detach().copy_(tensor)
            if remember:
                self._remember()
        except BaseException:
            self._put_back(self.tensors)
            raise

    def _remember(self) -> None:
        for name, now in fingerprint({n: self.tensors[n] for n in self.found}).items():
            remember(now, self.found[name].after(str(self.identity), self.alpha))

    def open(self) -> None:
        """`write` until `close`."""
        self.write()
        _OPEN.append(self)

    def close(self) -> tuple[str, str]:
        """Restore every touched entry. Changes that were opened later on the same tensors are taken back first, then
        made again.

        Returns:
            What could not be restored, and what had been changed in another way: messages, "" where there is nothing to
                say.
        """
        opened = list(_OPEN)
        later: list[Change] = []
        changed: list[str] = []
        lost: list[str] = []
        replaced = {id(self): self._follow()}
        touched = self.identities()
        for change in opened[opened.index(self) + 1 :]:
            replaced[id(change)] = change._follow()
            if touched & change.identities():
                later.append(change)
                touched |= change.identities()
        try:
            for change in reversed([self, *later]):
                changed += change._otherwise_written()
                own = change._put_back(change.tensors)
                if replaced[id(change)]:  # the model may not be all that has them
                    change._put_back({**change.tensors, **replaced[id(change)]})
                lost += own
                if own:
                    change.before, change.whole = [], {}
        finally:
            _OPEN.remove(self)
        for change in later:
            if change.before or change.whole:
                change.histories()
                change.write()
        unlike = written = ""
        if lost:
            unlike = (
                f"model's tensors {sorted(set(lost))} have another shape or kind than when a delta was applied and are left: "
                "all others are, and deltas still open on these tensors are off"
            )
        if changed:
            written = (
                f"entries of {changed[0]!r} (tensors in all: {len(set(changed))}) were changed while a delta was applied; those "
                "that the delta covers are restored to what they were before"
            )
        return unlike, written

    def identities(self) -> set[tuple]:
        """What tells the tensors from others: their memory, so that a module and its state dict are one model."""
        return {_identity(t) for t in self.tensors.values()} - {()}

    def _follow(self) -> dict[str, Tensor]:
        """Go over to the tensors that the model has now; those that it had."""
        live = self.live()
        replaced: dict[str, Tensor] = {}
        for name, tensor in self.tensors.items():
            now = live.get(name, tensor)
            if (
                isinstance(now, Tensor)
                and now is not tensor
                and (not _identity(now) or _identity(now) != _identity(tensor))
            ):
                replaced[name] = tensor
        self.tensors |= {n: live[n] for n in replaced}
        return replaced

    def _put_back(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """Restore every tensor that fits; the names of the others."""
        lost: list[str] = []
        for whole, before, _ in self.before:
            for mask, old in _fitting(whole, before, tensors, lost):
                mask.scatter_(dict(tensors), old)
        for name, old in self.whole.items():
            if _fits(tensors[name], old.dtype, old.shape):
                tensors[name].detach().copy_(old)
            else:
                lost.append(name)
        return lost

    def _otherwise_written(self) -> list[str]:
        """Names of the tensors whose entries are not those that were written; of the same dtype, since a cast is no
        other write.
        """
        found: list[str] = []
        for whole, _, after in self.before:
            for mask, new in _fitting(whole, after, self.tensors, []):
                entries = mask.gather(self.tensors)
                if entries.dtype == new.dtype and bool((off := differs(entries, new)).any()):
                    found += [n for n, part in mask.split(off).items() if bool(part.any())]
        for name, old in self.whole.items():
            now = self.tensors[name]
            same = now.dtype == old.dtype and _fits(now, old.dtype, old.shape)
            if same and bool(differs(self.dense[name].to(now.device, now.dtype), now).any()):
                found.append(name)
        return found

    def _parts(self) -> list[tuple[CSRMask, Tensor, Low | None]]:
        """The delta, in one part where its tensors are of one device and dtype, else by tensor; each on the tensors'
        device.
        """
        names, low = self.mask.names, self.low
        kinds = {(t.device, t.dtype) for t in (self.tensors[n] for n in names)}
        if len(kinds) == 1 and not self.aliases:
            device = next(iter(kinds))[0]
            return [
                (
                    self.mask.to(device),
                    self.values.to(device),
                    None if low is None else (low[0].to(device), low[1].to(device)),
                )
            ]
        values = self.mask.split(self.values)
        starts = list(accumulate((len(v) for v in values.values()), initial=0))
        ends = (
            [0] * len(starts)
            if low is None
            else torch.searchsorted(low[0], torch.tensor(starts, device=low[0].device)).tolist()
        )
        copies = {first: [n for n, other in self.aliases.items() if other == first] for first in self.aliases.values()}
        parts = []
        for i, name in enumerate(names):
            device, own = self.tensors[name].device, None
            if low is not None and ends[i] < ends[i + 1]:
                place = slice(ends[i], ends[i + 1])
                own = (low[0][place] - starts[i]).to(device), low[1][place].to(device)
            one, value = self.mask[name].to(device), values[name].to(device)
            parts.append((one, value, own))
            parts += [
                (CSRMask([n], one.shapes, one.crow_indices, one.col_indices), value, own) for n in copies.get(name, ())
            ]
        return parts


_OPEN: list[Change] = []  # in the order in which they were opened


def _identity(tensor: Tensor) -> tuple:
    return (tensor.device, tensor.data_ptr(), tensor.shape) if has_memory(tensor) else ()


def _remember_open(opened: list[Change], tensor: Tensor, now: str) -> None:
    """Give content with fingerprint `now` its history, where it is what the newest of the open changes on the tensor
    made.

    It is not hashed when a change is opened: few are followed by another.
    """
    place = _identity(tensor)
    for change in reversed(opened):
        for name, other in change.tensors.items():
            if place and _identity(other) == place:
                if name in change.found and name not in change._otherwise_written():
                    before = {name: tensor.detach().clone()}
                    for mask, old, _ in change.before:
                        if name in mask:
                            mask[name].to(tensor.device).scatter_(before, mask.part(name, old).to(tensor.device))
                    if digest(before[name]) == change.now[name]:
                        remember(now, change.found[name].after(str(change.identity), change.alpha))
                return


def _fitting(
    mask: CSRMask, compact: Tensor, tensors: Mapping[str, Tensor], lost: list[str]
) -> Iterator[tuple[CSRMask, Tensor]]:
    """Mask and compact tensor on the tensors' device, by tensor where they are not of one device and dtype. `lost` gets
    misfits.
    """
    split = mask.split(compact)
    misfits = {n for n, shape in zip(mask.names, mask.shapes) if not _fits(tensors[n], compact.dtype, shape)}
    kinds = {(tensors[n].device, tensors[n].dtype) for n in mask.names}
    if len(kinds) == 1 and not misfits:
        device = next(iter(kinds))[0]
        yield mask.to(device), compact.to(device)
        return
    for name in mask.names:
        if name in misfits:
            lost.append(name)
        else:
            yield mask[name].to(tensors[name].device), split[name].to(tensors[name].device)


def _fits(tensor: Tensor, dtype: torch.dtype, shape: torch.Size) -> bool:
    """Whether `tensor` can be given back what one of this dtype and shape held."""
    usable = has_memory(tensor) or (tensor.numel() == 0 and not tensor.is_meta)
    writable = not tensor.is_inference() or torch.is_inference_mode_enabled()
    return usable and writable and tensor.shape == shape and torch.can_cast(dtype, tensor.dtype)
