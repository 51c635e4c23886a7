"""The masked parameters of an optimizer, in buckets that are stepped by one launch each."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deftx_kernels._checks import scalar
from deftx_kernels.functional import sparse_adamw
from deftx_kernels.mask import CSRMask


class Bucket:
    """Masked parameters of one group, dtype and device: their compact state is one flat buffer, a step one launch."""

    def __init__(self, group: dict[str, Any], state: dict[Tensor, Any], compact: bool) -> None:
        self.group, self.state, self.compact = group, state, compact
        self.members: dict[str, tuple[Tensor, Tensor]] = {}  # name in the mask → (dense tensor, the optimizer's parameter)

    def build(self, mask: CSRMask, decay_to: dict[str, Tensor] | None) -> None:
        self.members = dict(sorted(self.members.items()))
        self.positions = {name: i for i, name in enumerate(mask.names) if name in self.members}
        self.mask = mask if set(self.members) == set(mask.names) else mask.restrict(list(self.members))
        dense, _ = next(iter(self.members.values()))
        self.mask = self.mask.to(dense.device)
        self.parts: dict[str, CSRMask] = {}  # of members that were stepped on their own
        compute = torch.float64 if dense.dtype == torch.float64 else torch.float32
        self.decay_to = None if decay_to is None else torch.cat([decay_to[n] for n in self.members]).to(dense.device, compute)
        state_dtype = compute if compute == torch.float64 else self.group["state_dtype"] or compute
        self.views: list[tuple[Tensor, str, Tensor]] = []  # parameter, key and tensor of each compact state
        self.flat = {key: self._flat(key, state_dtype) for key in ("exp_avg", "exp_avg_sq")}
        if not self.compact and self.group["master"] and dense.dtype in (torch.float16, torch.bfloat16):
            self.flat["values"] = self._flat("values", compute)
        self.steps = []
        for _, param in self.members.values():
            self.steps.append(self.state[param].setdefault("step", torch.zeros((), dtype=torch.float32, device=dense.device)))
        # One launch has one step number; parameters that once were without a gradient are stepped on their own.
        self.together = len({float(s) for s in self.steps}) == 1

    def _flat(self, key: str, dtype: torch.dtype) -> Tensor:
        """[nnz]: the members' state one after the other, of which each member's state is a view."""
        old = {name: self.state[param].get(key) for name, (_, param) in self.members.items()}
        saved = next((t.dtype for t in old.values() if t is not None), dtype)  # a loaded state keeps its dtype
        if key == "values":
            flat = self.mask.gather({n: d for n, (d, _) in self.members.items()}).to(saved)
        else:
            flat = torch.zeros(self.mask.nnz, dtype=saved, device=self.mask.device)
        for (name, (_, param)), view in zip(self.members.items(), self.mask.split(flat).values()):
            if (before := old[name]) is not None:
                view.copy_(before)
            self.state[param][key] = view
            self.views.append((param, key, view))
        return flat

    def is_stale(self) -> bool:
        """Whether someone has put other tensors into the optimizer's state, or taken these out."""
        return any(self.state[p].get(key) is not view for p, key, view in self.views)

    def active(self) -> list[str]:
        """The members that have a gradient."""
        return [name for name, (_, param) in self.members.items() if param.grad is not None]

    def part(self, name: str) -> CSRMask:
        if name not in self.parts:
            self.parts[name] = self.mask[name]
        return self.parts[name]

    def square_sums(self) -> list[Tensor]:
        """float64 []: sums of the squares of masked gradients, which together are those of all members."""
        grads = {name: self.members[name][1].grad for name in self.active()}
        if self.compact:
            return [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in grads.values()]  # type: ignore[arg-type]
        if len(grads) == len(self.members):
            return [self.mask.square_sum(grads)]  # type: ignore[arg-type]
        return [self.part(name).square_sum({name: grad}) for name, grad in grads.items()]  # type: ignore[dict-item]

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        active = self.active()
        if not active:
            return
        if self.together and len(active) == len(self.members):
            self._launch(self.mask, active, self.flat, self.decay_to, self.steps, grad_scale, found_inf)
            return
        self.together = False
        flat = {key: self.mask.split(tensor) for key, tensor in self.flat.items()}
        decay = None if self.decay_to is None else self.mask.split(self.decay_to)
        for name, step in zip(self.members, self.steps):
            if name in active:
                own, toward = {key: parts[name] for key, parts in flat.items()}, None if decay is None else decay[name]
                self._launch(self.part(name), [name], own, toward, [step], grad_scale, found_inf)

    def _launch(
        self, mask: CSRMask, names: list[str], flat: dict[str, Tensor], decay_to: Tensor | None, steps: list[Tensor],
        grad_scale: Tensor | None, found_inf: Tensor | None,
    ) -> None:  # fmt: skip
        grads: Any
        group, device = self.group, mask.device
        params = {n: self.members[n][0] for n in names}
        values = flat.get("values")
        if self.compact:
            grads, values = self._compact(names)
        else:
            grads = {n: self.members[n][1].grad for n in names}
        # A schedule may end a rounding error below 0, so that the sign is checked where a group is added, not here.
        lr = group["lr"] if isinstance(group["lr"], Tensor) else scalar(float(group["lr"]), "lr", device)
        # The first tensor's place in the upper half: launches of one step share no random number.
        seed = group["seed"] + (self.positions[names[0]] << 32)
        torch._foreach_add_(steps, 1.0)
        try:
            sparse_adamw(
                params, grads, flat["exp_avg"], flat["exp_avg_sq"], steps[0], mask, lr=lr, betas=group["betas"], eps=group["eps"],
                weight_decay=group["weight_decay"], decay_to=decay_to, l1=group["l1"], maximize=group["maximize"], values=values,
                grad_scale=grad_scale, found_inf=found_inf, stochastic_rounding=group["stochastic_rounding"], seed=seed,
            )  # fmt: skip
        except Exception:
            torch._foreach_sub_(steps, 1.0)
            raise
        if found_inf is not None:  # a skipped step does not count
            torch._foreach_sub_(steps, [found_inf.to(steps[0]).view(())] * len(steps))

    def _compact(self, names: list[str]) -> tuple[Tensor, Tensor]:
        """Gradient and values of sparsified parameters, both [nnz]."""
        parameters = [self.members[n][1] for n in names]
        grad = torch.cat([p.grad for p in parameters])  # type: ignore[misc]
        flat = _adjacent([p.detach() for p in parameters])
        if flat is None:  # something, such as moving or copying the model, has given each a memory of its own
            flat = torch.cat([p.detach() for p in parameters])
            for p, part in zip(parameters, flat.split([p.numel() for p in parameters])):
                p.data = part
        return grad, flat


def _adjacent(parts: Sequence[Tensor]) -> Tensor | None:
    """The one tensor of which the parts are successive views, as `sparsify` makes them; None where something moved them apart."""
    filled = [p for p in parts if p.numel()]
    if not filled:
        return parts[0]
    storage, end = filled[0].untyped_storage().data_ptr(), filled[0].storage_offset()
    for part in filled:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != end or not part.is_contiguous():
            return None
        end += part.numel()
    return filled[0].as_strided((sum(p.numel() for p in filled),), (1,))
