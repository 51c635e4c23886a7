"""SparseAdamW: AdamW whose state and work are of the size of the mask."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from deftx_kernels._checks import check_hyperparameters
from deftx_kernels.functional import sparse_adamw
from deftx_kernels.mask import CSRMask
from deftx_kernels.nn import owners_of


class SparseAdamW(Optimizer):
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019) at the entries of a mask.

    Parameters that the mask covers, and the compact `values` of a model that `sparsify` changed with it, get compact float32
    moments (8 bytes for each entry) and steps of one kernel launch; entries outside the mask stay bit-identical. The other
    trainable parameters get ordinary fused AdamW. At density 1 it equals `torch.optim.AdamW`.

    Args:
        named_params: `model.named_parameters()`, or parameter groups whose "params" are (name, parameter) pairs. Parameters that
            need no gradient are left out.
        mask: the entries to train.
        lr: learning rate, a float or a 0-d tensor.
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`. Groups may set their own.
        l1: adds the subgradient of l1 * |w - decay_to| at masked entries.
        decay_to: compact [mask.nnz]: where decay and l1 pull masked entries to; by default 0.
        master: keep a float32 copy of the masked entries of 16-bit parameters (the values of sparsified models are one already).

    Raises:
        ValueError, TypeError: no names, a value out of range, a mask that does not fit the parameters, or that covers a tensor
            which is not among them.
    """

    # Read by torch.amp.GradScaler: it hands grad_scale and found_inf over instead of unscaling and synchronising.
    _step_supports_amp_scaling = True
    # Read by the hook of `nn`: the dense tensors of sparsified models are written by the step itself.
    writes_masked_weights = True

    def __init__(
        self,
        named_params: Iterable[Any],
        mask: CSRMask,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        l1: float = 0.0,
        decay_to: Tensor | None = None,  # [nnz]
        maximize: bool = False,
        master: bool = False,
    ) -> None:
        if not isinstance(mask, CSRMask):
            raise TypeError(f"mask must be a CSRMask, got {type(mask).__name__}")
        if decay_to is not None:
            mask.check_compact(decay_to, "decay_to")
        self.mask = mask
        self._decay_to = None if decay_to is None else mask.split(decay_to.detach())
        self._buckets: list[_Bucket] | None = None
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, l1=l1, maximize=maximize, master=master)
        super().__init__(_trainable(named_params), defaults)
        covered = {r.mask.names[0] for r in self._masked_values().values()} | {
            n for g in self.param_groups for n in g["param_names"]
        }
        for name, (start, end) in zip(mask.names, zip(mask._bounds, mask._bounds[1:])):
            if name not in covered and end > start:
                raise ValueError(f"mask covers {name!r}, which is not among the trainable named_params")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        group = {**self.defaults, **param_group}
        check_hyperparameters(group["lr"], group["betas"], group["eps"], group["weight_decay"], group["l1"])
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if "param_names" not in added:
            self.param_groups.pop()
            raise ValueError("named_params must be (name, parameter) pairs, such as model.named_parameters()")
        added["mask_fingerprint"] = self.mask.fingerprint()
        for record in owners_of(added["params"]).values():
            name = record.mask.names[0]
            if name not in self.mask or self.mask[name] != record.mask:
                raise ValueError(f"{name!r} was sparsified with another mask than this optimizer's")
        self._buckets = None

    def _masked_values(self):
        return owners_of(p for g in self.param_groups for p in g["params"])

    @torch.no_grad()
    def step(self, closure=None):
        """One step; parameters without a gradient are skipped, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._buckets is None:
            self._buckets = self._build()
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for bucket in self._buckets:
            bucket.step(scale, found)
        for group in self.param_groups:
            self._dense_step(group, scale, found)
        return loss

    def _covered(self, group: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Name in the mask → (dense tensor, compact values or None) of a group."""
        records = owners_of(group["params"])
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for name, param in zip(group["param_names"], group["params"]):
            if record := records.get(id(param)):
                found[record.mask.names[0]] = (record.dense, param)
            elif name in self.mask:
                found[name] = (param, None)
        return found

    def _build(self) -> "list[_Bucket]":
        """One bucket, and so one launch, for each group, dtype, device and kind of gradient."""
        buckets: dict[tuple, _Bucket] = {}
        for i, group in enumerate(self.param_groups):
            for name, (dense, values) in self._covered(group).items():
                key = (i, dense.dtype, dense.device, values is None)
                bucket = buckets.setdefault(key, _Bucket(group, self.state, compact=values is not None))
                bucket.members[name] = (dense, dense if values is None else values)
        for bucket in buckets.values():
            bucket.build(self.mask, self._decay_to)
        return list(buckets.values())

    def _dense_step(self, group: dict[str, Any], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        covered = {id(values if values is not None else dense) for dense, values in self._covered(group).values()}
        params = [p for p in group["params"] if id(p) not in covered and p.grad is not None]
        by_kind: dict[tuple, list[Tensor]] = {}
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
            by_kind.setdefault((p.dtype, p.device), []).append(p)
        for same in by_kind.values():
            states = [self.state[p] for p in same]
            grads = [p.grad for p in same if p.grad is not None]
            moments = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
            adamw(
                same, grads, *moments, [], [s["step"] for s in states], fused=True, grad_scale=grad_scale, found_inf=found_inf,
                amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
            )  # fmt: skip

    # ---- state ----

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit-identically. ValueError where the state belongs to another mask."""
        for i, (saved, group) in enumerate(zip(state_dict["param_groups"], self.param_groups)):
            if saved.get("mask_fingerprint") != group["mask_fingerprint"]:
                raise ValueError(
                    f"param_groups[{i}]: the state was saved with mask {saved.get('mask_fingerprint')}, "
                    f"this optimizer has mask {group['mask_fingerprint']} ({self.mask!r})"
                )
        super().load_state_dict(state_dict)
        # torch casts floating state to the parameter's dtype, which would round float32 moments of 16-bit parameters.
        saved_ids = chain.from_iterable(g["params"] for g in state_dict["param_groups"])
        params = chain.from_iterable(g["params"] for g in self.param_groups)
        for saved_id, param in zip(saved_ids, params):
            for key, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][key] = value.detach().to(param.device, copy=True)
        self._buckets = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buckets = None

    def update_mask(self, mask: CSRMask) -> None:
        """Train another set of entries of the same tensors from now on (LIFT); moments of entries that stay are carried over.

        Raises:
            ValueError: the mask covers other tensors, or a covered model is sparsified (densify it and sparsify it again).
        """
        if (mask.names, mask.shapes) != (self.mask.names, self.mask.shapes):
            raise ValueError("mask must cover the same tensors as the one that it replaces")
        if self._masked_values():
            raise ValueError(
                "the values of a sparsified model belong to its mask: densify and sparsify it, and make a new optimizer"
            )
        for group in self.param_groups:
            for name, (dense, _) in self._covered(group).items():
                state = self.state[dense]
                for key in ("exp_avg", "exp_avg_sq"):
                    if key in state:
                        state[key] = self.mask[name].project(state[key], mask[name])
                if "values" in state:  # entries that join start from the weights
                    joined = mask[name].gather({name: dense}).to(state["values"].dtype)
                    stayed = self.mask[name].project(torch.ones_like(state["values"]), mask[name]) == 1
                    state["values"] = torch.where(stayed, self.mask[name].project(state["values"], mask[name]), joined)
            group["mask_fingerprint"] = mask.fingerprint()
        if self._decay_to is not None:
            self._decay_to = {n: self.mask[n].project(v, mask[n]) for n, v in self._decay_to.items()}
        self.mask = mask
        self._buckets = None


class _Bucket:
    """Covered parameters of one group, dtype and device: their compact state is one flat buffer, a step one launch."""

    def __init__(self, group: dict[str, Any], state: dict[Tensor, Any], compact: bool) -> None:
        self.group, self.state, self.compact = group, state, compact
        self.members: dict[str, tuple[Tensor, Tensor]] = {}  # name in the mask → (dense tensor, the optimizer's parameter)

    def build(self, mask: CSRMask, decay_to: dict[str, Tensor] | None) -> None:
        self.members = dict(sorted(self.members.items()))
        self.mask = mask if set(self.members) == set(mask.names) else mask.restrict(list(self.members))
        dense, _ = next(iter(self.members.values()))
        self.mask = self.mask.to(dense.device)
        dtype = torch.float64 if dense.dtype == torch.float64 else torch.float32
        self.decay_to = None if decay_to is None else torch.cat([decay_to[n] for n in self.members]).to(dense.device, dtype)
        self.flat = {key: self._flat(key, dtype) for key in ("exp_avg", "exp_avg_sq")}
        if not self.compact and self.group["master"] and dense.dtype in (torch.float16, torch.bfloat16):
            self.flat["values"] = self._flat("values", dtype)
        self.steps = []
        for _, param in self.members.values():
            self.steps.append(self.state[param].setdefault("step", torch.zeros((), dtype=torch.float32, device=dense.device)))
        # One launch has one step number; parameters that once were without a gradient are stepped on their own.
        self.together = len({float(s) for s in self.steps}) == 1

    def _flat(self, key: str, dtype: torch.dtype) -> Tensor:
        """[nnz]: the members' state one after the other, of which each member's state is a view."""
        sizes = self.mask.split(torch.empty(self.mask.nnz, dtype=dtype, device=self.mask.device))
        if all(key in self.state[p] for _, p in self.members.values()):
            flat = torch.cat([self.state[p][key].view(-1) for _, p in self.members.values()])
        elif key == "values":
            flat = self.mask.gather({n: d for n, (d, _) in self.members.items()}).to(dtype)
        else:
            flat = torch.zeros(self.mask.nnz, dtype=dtype, device=self.mask.device)
            for name, (_, param) in self.members.items():
                if key in self.state[param]:
                    self.mask.split(flat)[name].copy_(self.state[param][key])
        for (name, (_, param)), view in zip(self.members.items(), self.mask.split(flat).values()):
            self.state[param][key] = view.view(sizes[name].shape)
        return flat

    def step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        active = [name for name, (_, param) in self.members.items() if param.grad is not None]
        if not active:
            return
        if self.together and len(active) == len(self.members):
            self._launch(self.mask, active, self.flat, self.decay_to, self.steps, grad_scale, found_inf)
            return
        self.together = False
        parts = {key: self.mask.split(flat) for key, flat in self.flat.items()}
        decay = None if self.decay_to is None else self.mask.split(self.decay_to)
        for name, step in zip(self.members, self.steps):
            if name in active:
                flat = {key: part[name] for key, part in parts.items()}
                toward = None if decay is None else decay[name]
                self._launch(self.mask[name], [name], flat, toward, [step], grad_scale, found_inf)

    def _launch(self, mask, names, flat, decay_to, steps, grad_scale, found_inf) -> None:
        grads: Any
        torch._foreach_add_(steps, 1.0)
        params = {n: self.members[n][0] for n in names}
        copies: list[Tensor] = []
        if self.compact:
            grads, values, copies = self._compact(names)
        else:
            grads, values = {n: self.members[n][1].grad for n in names}, flat.get("values")
        group = self.group
        sparse_adamw(
            params, grads, flat["exp_avg"], flat["exp_avg_sq"], steps[0], mask, lr=group["lr"], betas=group["betas"],
            eps=group["eps"], weight_decay=group["weight_decay"], decay_to=decay_to, l1=group["l1"], maximize=group["maximize"],
            values=values, grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip
        if copies:
            torch._foreach_copy_(copies, list(mask.split(values).values()))
        if found_inf is not None:  # a skipped step does not count
            torch._foreach_sub_(steps, [found_inf.to(steps[0]).view(())] * len(steps))

    def _compact(self, names: list[str]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradient and values of sparsified parameters, both [nnz]; and where to copy the values back to if they are a copy."""
        parameters = [self.members[n][1] for n in names]
        grad = torch.cat([p.grad for p in parameters])  # type: ignore[misc]
        values = [p.detach() for p in parameters]
        flat = _adjacent(values)
        return (grad, torch.cat(values), values) if flat is None else (grad, flat, [])


def _adjacent(parts: list[Tensor]) -> Tensor | None:
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


def _trainable(named_params: Iterable[Any]) -> list[Any]:
    """Parameters or groups of them without those that need no gradient."""
    items = list(named_params)
    if items and isinstance(items[0], dict):
        groups = [{**g, "params": _trainable(g["params"])} for g in items]
        return [g for g in groups if g["params"]]
    for item in items:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)):
            raise TypeError("named_params must be (name, parameter) pairs, such as model.named_parameters()")
    return [(name, param) for name, param in items if param.requires_grad]
