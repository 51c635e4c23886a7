"""The masked parameters of an optimizer, in buckets that are stepped by one launch each."""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask
from deftx_kernels.optim.functional import check_targets, step_targets
from deftx_kernels.validation import scalar


class Bucket:
    """Masked parameters of one group, dtype and device: their compact state is one flat buffer, a step one launch."""

    def __init__(self, group: dict[str, Any], state: dict[Tensor, Any], compact: bool) -> None:
        self.group, self.state, self.compact = group, state, compact
        # name in the mask → (dense tensor, the optimizer's parameter)
        self.members: dict[str, tuple[Tensor, Tensor]] = {}
        # name in the mask → what tells changes of its dense tensor, of a sparsified model
        self.watches: dict[str, Any] = {}

    def build(self, mask: CSRMask, decay_to: dict[str, Tensor] | None) -> None:
        self.members = dict(sorted(self.members.items()))
        for name, (tensor, _) in self.members.items():
            if tensor.is_meta:
                raise ValueError(
                    f"named_params[{name!r}] is on meta: the model needs its weights before the first step"
                )
        self.positions = {name: mask.places[name] for name in self.members}
        self.mask = mask if len(self.members) == len(mask) else mask.restrict(list(self.members))
        dense, _ = next(iter(self.members.values()))
        self.mask = self.mask.to(dense.device)
        self.parts: dict[str, CSRMask] = {}  # of members that were stepped on their own
        compute = torch.float64 if dense.dtype == torch.float64 else torch.float32
        self.decay_to = (
            None if decay_to is None else torch.cat([decay_to[n] for n in self.members]).to(dense.device, compute)
        )
        state_dtype = compute if compute == torch.float64 else self.group["state_dtype"] or compute
        self.dense, self.params = [d for d, _ in self.members.values()], [p for _, p in self.members.values()]
        self.entries = [self.state[p] for p in self.params]
        self.views: list[tuple[dict[str, Any], str, Tensor]] = []  # a parameter's state, key and tensor in it
        self.flat = {key: self._flat(key, state_dtype) for key in ("exp_avg", "exp_avg_sq")}
        if not self.compact and self.group["master"] and dense.dtype in (torch.float16, torch.bfloat16):
            self.flat["values"] = self._flat("values", compute)
        self.steps, self.step_of = self._steps(dense.device)
        # One launch has one step number; parameters that once were without a gradient are stepped on their own.
        self.together = len(set(self.steps.tolist())) == 1
        self.values: Tensor | None = None  # of the members, one after the other
        self.apart = False  # the members' values are no views of one buffer
        self.places: tuple | None = None  # of the tensors that a step writes, when they were checked

    def _steps(self, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """float32 [members]: the numbers of steps, and the view of each in its member's state."""
        steps = torch.zeros(len(self.members), dtype=torch.float32, device=device)
        for entry, view in zip(self.entries, views := list(steps.unbind())):
            if "step" in entry:
                view.copy_(entry["step"])
            entry["step"] = view
            self.views.append((entry, "step", view))
        return steps, views

    def _flat(self, key: str, dtype: torch.dtype) -> Tensor:
        """[nnz]: the members' state one after the other, of which each member's state is a view."""
        old = dict(zip(self.members, [entry.get(key) for entry in self.entries]))
        saved = next((t.dtype for t in old.values() if t is not None), dtype)  # a loaded state keeps its dtype
        if key == "values":
            flat = self.mask.gather({n: d for n, (d, _) in self.members.items()}).to(saved)
        else:
            flat = torch.zeros(self.mask.nnz, dtype=saved, device=self.mask.device)
        for before, entry, view in zip(old.values(), self.entries, self.mask.split(flat).values()):
            if before is not None:
                view.copy_(before)
            entry[key] = view
            self.views.append((entry, key, view))
        return flat

    def is_stale(self) -> bool:
        """Whether someone has put other tensors into the optimizer's state, or taken these out."""
        if not all(map(is_, map(self.state.get, self.params), self.entries)):
            return True
        if self.compact and any(p.tracker is None for p in self.params):  # type: ignore[attr-defined]  # densified
            return True
        return any(entry.get(key) is not view for entry, key, view in self.views)

    def part(self, name: str) -> CSRMask:
        if name not in self.parts:
            self.parts[name] = self.mask[name]
        return self.parts[name]

    def square_sums(self) -> Tensor:
        """float64 [any number]: sums of the squares of masked gradients, which together are those of all members."""
        grads = {name: p.grad for name, p in zip(self.members, self.params) if p.grad is not None}
        if self.compact:
            norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads.values()]
            return (
                torch.stack(norms).square() if norms else torch.zeros(0, dtype=torch.float64, device=self.mask.device)
            )
        if len(grads) == len(self.members):
            return self.mask.square_sum(grads)[None]
        sums = [self.part(name).square_sum({name: grad}) for name, grad in grads.items()]
        return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.float64, device=self.mask.device)

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        grads = [p.grad for p in self.params]
        present = [g is not None for g in grads]
        if not any(present):
            return
        if self.together and all(present):
            self._step_all(grads, grad_scale, found_inf)  # type: ignore[arg-type]
            return
        self.together = False
        flat = {key: self.mask.split(tensor) for key, tensor in self.flat.items()}
        decay = {} if self.decay_to is None else self.mask.split(self.decay_to)
        for name, dense, param, step in zip(self.members, self.dense, self.params, self.step_of):
            if param.grad is None:
                continue
            mask, own = self.part(name), {key: parts[name] for key, parts in flat.items()}
            values = param.detach() if self.compact else own.get("values")
            check_targets({name: dense}, own["exp_avg"], own["exp_avg_sq"], values, mask)
            grad = param.grad if self.compact else {name: param.grad}
            self._launch(mask, [dense], grad, own, values, decay.get(name), step, step, grad_scale, found_inf)

    def _step_all(self, present: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        places = *_places(self.dense), *(_places(self.params) if self.compact else ())
        if places != self.places:  # as nearly never: between two steps a model may have been moved, cast or loaded
            self.values = _adjacent([p.detach() for p in self.params]) if self.compact else self.flat.get("values")
            self.apart = self.compact and self.values is None
            if self.apart:
                self.values = torch.cat([p.detach() for p in self.params])
            params = dict(zip(self.members, self.dense))
            check_targets(params, self.flat["exp_avg"], self.flat["exp_avg_sq"], self.values, self.mask)
            self.places = places
        elif self.apart:
            torch.cat([p.detach() for p in self.params], out=self.values)
        grads = torch.cat(present) if self.compact else dict(zip(self.members, present))
        step = self.step_of[0]
        self._launch(
            self.mask, self.dense, grads, self.flat, self.values, self.decay_to, self.steps, step, grad_scale, found_inf
        )  # fmt: skip
        if self.apart and self.values is not None:
            # The owners of this memory (other processes, FSDP) see the step there.
            parts = self.values.split([p.numel() for p in self.params])
            torch._foreach_copy_([p.detach() for p in self.params], list(parts))

    def _launch(
        self, mask: CSRMask, targets: list[Tensor], grads: Any, flat: dict[str, Tensor], values: Tensor | None,
        decay_to: Tensor | None, steps: Tensor, step: Tensor, grad_scale: Tensor | None, found_inf: Tensor | None,
    ) -> None:  # fmt: skip
        group = self.group
        # A schedule may end a rounding error below 0, so that the sign is checked where a group is added, not here.
        lr = group["lr"] if isinstance(group["lr"], Tensor) else scalar(float(group["lr"]), "lr", mask.device)
        # The first tensor's place in the upper half: launches of one step share no random number.
        seed = group["seed"] + (self.positions[mask.names[0]] << 32)
        steps.add_(1.0)
        try:
            step_targets(
                targets, grads, flat["exp_avg"], flat["exp_avg_sq"], step, mask, lr=lr, betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], decay_to=decay_to, l1=group["l1"], maximize=group["maximize"], values=values,
                grad_scale=grad_scale, found_inf=found_inf, stochastic_rounding=group["stochastic_rounding"], seed=seed,
            )  # fmt: skip
        except Exception:
            steps.sub_(1.0)
            raise
        if found_inf is not None:  # a skipped step does not count
            steps.sub_(found_inf.to(steps).view(()))
        for name, dense in zip(mask.names, targets):  # the dense tensors were changed by what changed the values
            if name in self.watches:
                self.watches[name].version = dense._version


def _places(tensors: list[Tensor]) -> list[tuple]:
    """What tells that a tensor, known to be the same object, still is what it was when it was checked."""
    return [(t.data_ptr(), t.dtype, t.shape) for t in tensors]


def _adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """The one tensor of which the parts are successive views, as `sparsify` makes them; None where something moved them
    apart.
    """
    filled = [p for p in parts if p.numel()]
    if not filled:
        return parts[0]
    storage, end = filled[0].untyped_storage().data_ptr(), filled[0].storage_offset()
    for part in filled:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != end or not part.is_contiguous():
            return None
        end += part.numel()
    return filled[0].as_strided((sum(p.numel() for p in filled),), (1,))
