"""SparseAdamW: AdamW whose state and work are of the size of the mask."""

import inspect
import math
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from deftx_kernels.mask import CSRMask
from deftx_kernels.nn import Entry, entries_of
from deftx_kernels.optim.bucket import Bucket
from deftx_kernels.validation import check_hyperparameters, check_int, check_plain, is_number, plain_name


class SparseAdamW(Optimizer):
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019) at the entries of a mask.

    Parameters that the mask covers, and the compact `values` of a model that `sparsify` changed with it, get compact
    moments (8 bytes for each entry in float32) and steps of one kernel launch; entries outside the mask stay
    bit-identical. The other trainable parameters get ordinary fused AdamW. At density 1 it equals `torch.optim.AdamW`.

    It takes dense gradients (`param.grad`) or compact ones, and works with LR schedulers, `torch.amp.GradScaler`,
    closures, CUDA graphs (with `lr` as a tensor on the device) and compiled models. `torch.nn.utils.clip_grad_norm_`
    counts every entry of a dense gradient, also those outside the mask; the method `clip_grad_norm_` counts what is
    trained.

    Args:
        named_params: `model.named_parameters()`, or parameter groups whose "params" are (name, parameter) pairs.
            Parameters that need no gradient are left out. Prefixes of `torch.compile`, activation checkpointing and
            DistributedDataParallel do not matter.
        mask: the entries to train.
        lr: learning rate, a float or a 0-d tensor.
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`. Groups may set these and the options below
            themselves.
        l1: adds the subgradient of l1 * |w - decay_to| at masked entries.
        decay_to: compact [mask.nnz]: where decay and l1 pull masked entries to; by default 0. For all groups.
        master: keep a float32 copy of the masked entries of 16-bit parameters (the values of sparsified models are one
            already).
        state_dtype: of the masked entries' moments: torch.float32 (default; float64 for float64 parameters) or
            torch.bfloat16.
        stochastic_rounding: of masked entries kept in bfloat16 (moments; parameters without a float32 copy).
        seed: of the stochastic rounding, 0 <= seed < 2**31; with it, runs can be repeated bit by bit, and resumed.

    Raises:
        ValueError, TypeError: no names, a value out of range, a mask that does not fit the parameters, or that covers a
            tensor which is not among them.
    """

    # Read by torch.amp.GradScaler: it hands grad_scale and found_inf over instead of unscaling and synchronising.
    _step_supports_amp_scaling = True
    _buckets: list[Bucket] | None  # of the masked parameters; None until the next step needs them
    _others: list[list[Tensor]]  # of each group the other parameters
    _taken: dict[str, Tensor] | None  # name in the mask → its dense tensor, of all groups; None: not known
    _clip: Tensor | None  # what the next step divides gradients by

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
        state_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(mask, CSRMask):
            raise TypeError(f"mask must be a CSRMask, got {type(mask).__name__}")
        if decay_to is not None:
            mask.check_compact(decay_to, "decay_to")
        self.mask = mask
        self._decay_to = None if decay_to is None else mask.split(decay_to.detach())
        self._taken = {}
        self._forget()
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, l1=l1, maximize=maximize, master=master,
            state_dtype=state_dtype, stochastic_rounding=stochastic_rounding, seed=seed,
        )  # fmt: skip
        super().__init__(named_params, defaults)
        self._divide()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: a dict whose "params" are (name, parameter) pairs, with options of its own."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = {**self.defaults, **param_group}
        group["params"] = [(_plain_name(n, self.mask), p) for n, p in _trainable(param_group["params"])]
        group.setdefault("param_names", [])  # of a group without trainable parameters
        check_hyperparameters(group["lr"], group["betas"], group["eps"], group["weight_decay"], group["l1"])
        if float(group["lr"]) < 0:
            raise ValueError(f"lr must be at least 0, got {float(group['lr'])}")
        _check_storage(group)
        names, params = [n for n, _ in group["params"]], [p for _, p in group["params"]]
        records = entries_of(params)
        for record in records.values():
            name = record.mask.names[0]
            if name not in self.mask or self.mask[name] != record.mask.to(self.mask.device):
                raise ValueError(f"{name!r} was sparsified with another mask than this optimizer's")
        if self._taken is None:
            self._taken = {name: p for members in self._covered_groups() for name, (p, _) in members.items()}
        covered = self._covered(names, params, records)
        for name, (dense, values) in covered.items():
            if self._taken.get(name, dense) is not dense:
                raise ValueError(f"a parameter named {name!r} is in another group already")
            if group["stochastic_rounding"] and dense.dtype == torch.float16 and values is None and not group["master"]:
                raise ValueError(
                    f"stochastic_rounding is not defined for float16 parameters such as {name!r}: set master=True"
                )
        super().add_param_group(group)
        self._taken |= {name: dense for name, (dense, _) in covered.items()}
        self._describe_mask(group, covered)
        self._forget()

    def _covered_groups(self) -> list[dict[str, tuple[Tensor, Tensor | None]]]:
        """`_covered` of each group."""
        records = entries_of(chain.from_iterable(g["params"] for g in self.param_groups))
        return [self._covered(g["param_names"], g["params"], records) for g in self.param_groups]

    def _covered(
        self, names: list[str], params: list[Tensor], records: Mapping[int, Entry]
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Name in the mask → (dense tensor, compact values or None), of the parameters that are masked."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        dense: Tensor
        own: Tensor | None
        for name, param in zip(names, params):
            if record := records.get(id(param)):
                name, dense, own = record.mask.names[0], record.dense, param
            elif name in self.mask:
                check_plain(param, f"named_params[{name!r}]")
                if param.shape != (shape := self.mask.shapes[self.mask.places[name]]):
                    raise ValueError(f"{name!r} has shape {list(param.shape)}, the mask was made for {list(shape)}")
                dense, own = param, None
            else:
                continue
            if name in found and found[name][0] is not dense:
                raise ValueError(f"two parameters are named {name!r}")
            found[name] = (dense, own)
        return found

    def _divide(self) -> tuple[list[Bucket], list[list[Tensor]]]:
        """One bucket, and so one launch, for each group, dtype, device and kind of gradient; the other parameters of
        each group.
        """
        buckets: dict[tuple, Bucket] = {}
        masked: set[int] = set()
        missing = {n for n, start, end in zip(self.mask.names, self.mask._bounds, self.mask._bounds[1:]) if end > start}
        for i, (group, members) in enumerate(zip(self.param_groups, self._covered_groups())):
            for name, (dense, values) in members.items():
                key = (i, dense.dtype, dense.device, values is None)
                bucket = buckets.setdefault(key, Bucket(group, self.state, compact=values is not None))
                bucket.members[name] = (dense, dense if values is None else values)
                masked.add(id(bucket.members[name][1]))
                missing.discard(name)
        if missing:
            raise ValueError(f"mask covers {min(missing)!r}, which is not among the trainable named_params")
        return list(buckets.values()), [
            [p for p in group["params"] if id(p) not in masked] for group in self.param_groups
        ]

    def _prepare(self) -> list[Bucket]:
        """The buckets, made at the first step: until then the model may be moved or loaded, and state takes no memory.
        Made anew where someone has changed `state`."""
        if self._buckets is not None and any(bucket.is_stale() for bucket in self._buckets):
            self._buckets = None
        if self._buckets is None:
            buckets, self._others = self._divide()
            for bucket in buckets:
                bucket.build(self.mask, self._decay_to)
                bucket.watches = {e.name: e.dense_tracker for e in entries_of(bucket.params).values()}
            self._buckets = buckets
        return self._buckets

    def _forget(self) -> None:
        """The buckets are to be made anew: parameters, state or mask have changed."""
        self._buckets, self._others, self._clip = None, [], None

    @property
    def writes_masked_weights(self) -> bool:
        """Read by the hook of `nn`: whether a step itself writes the dense tensors of a sparsified model."""
        return any(bucket.compact for bucket in self._buckets or ())

    # ---- a step ----

    @torch.no_grad()
    def step(self, closure=None):
        """One step; parameters without a gradient are skipped, as in torch."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        if {grad.layout for grad in grads if grad is not None} - {torch.strided}:
            raise RuntimeError("SparseAdamW does not support sparse gradients")
        buckets = self._prepare()
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._clip is not None:
            scale = self._clip if scale is None else scale * self._clip.to(scale)
        for bucket in buckets:
            bucket.step(scale, found_inf)
        for group, params in zip(self.param_groups, self._others):
            self._step_dense(group, [p for p in params if p.grad is not None], scale, found_inf)
        self._clip = None
        return loss

    def _step_dense(
        self, group: dict[str, Any], params: list[Tensor], grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        by_kind: dict[tuple, list[Tensor]] = {}
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.contiguous_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.contiguous_format),
                }
            by_kind.setdefault((p.dtype, p.device), []).append(p)
        for same in by_kind.values():
            states = [self.state[p] for p in same]
            moments = [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states]
            # torch's fused kernel on the CPU takes every tensor for contiguous.
            weights, grads = [p.contiguous() for p in same], [p.grad.contiguous() for p in same if p.grad is not None]
            adamw(
                weights, grads, *moments, [], [s["step"] for s in states], fused=True, grad_scale=grad_scale, found_inf=found_inf,
                amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=group["maximize"],
            )  # fmt: skip
            for p, weight in zip(same, weights):
                if weight is not p:
                    p.copy_(weight)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the norm of the gradients that the next `step` uses; one read of the masked gradients, none is written.

        Unlike `torch.nn.utils.clip_grad_norm_` it counts of a dense gradient only the masked entries, which alone are
        trained. The gradients are left as they are: `step` scales them as it reads them. `zero_grad` takes the clipping
        back. After `GradScaler.unscale_`, as with torch's.

        Args:
            max_norm: at least 0; infinity clips nothing.
            error_if_nonfinite: RuntimeError where the norm is NaN or infinite (waits for the device).

        Returns:
            The Euclidean norm of all masked gradients and those of the other parameters together, before clipping:
                float32 [].
        """
        if not (max_norm == math.inf or (is_number(max_norm) and max_norm >= 0)):
            raise ValueError(f"max_norm must be a number, at least 0, got {max_norm!r}")
        squares = [bucket.square_sums() for bucket in self._prepare()]
        rest = [p.grad for params in self._others for p in params if p.grad is not None]
        if rest:
            squares.append(get_total_norm(rest).double().square().view(1))
        device = squares[0].device if squares else self.mask.device
        total = torch.cat([s.to(device) for s in squares]).sum().sqrt() if squares else torch.zeros((), device=device)
        if error_if_nonfinite and not math.isfinite(float(total)):
            raise RuntimeError(f"the norm of the gradients is {float(total)}, so they cannot be clipped")
        total = total.float()
        # torch multiplies by min(1, max_norm / (norm + 1e-6)); a step divides by the inverse.
        self._clip = ((total + 1e-6) / max_norm).clamp(min=1.0)
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        self._clip = None

    # ---- state ----

    def _describe_mask(self, group: dict[str, Any], covered: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        """Into the group, and so into a state dict: for each parameter the number of its masked entries and their
        fingerprint.
        """
        name_of = {id(dense if values is None else values): name for name, (dense, values) in covered.items()}
        parts = [self.mask[name_of[id(p)]] if id(p) in name_of else None for p in group["params"]]
        group["mask_fingerprints"] = ["" if m is None else f"{m.nnz}:{m.fingerprint()[:32]}" for m in parts]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume bit-identically. ValueError, before anything has changed, where the state belongs to another mask."""
        loaded: dict[str, Any] = {}

        def last_of_the_first(_, adapted: dict[str, Any]) -> None:  # sees what the other hooks have made of the state
            self._check_same_mask(adapted["param_groups"])
            loaded.update(adapted)

        # torch has cast the state to the parameters' dtype, which rounds float32 moments
        def first_of_the_last(_) -> None:
            saved_ids = chain.from_iterable(g["params"] for g in loaded["param_groups"])
            params = chain.from_iterable(g["params"] for g in self.param_groups)
            for saved_id, param in zip(saved_ids, params):
                for key, value in loaded["state"].get(saved_id, {}).items():
                    if isinstance(value, Tensor):
                        self.state[param][key] = value.detach().to(param.device, copy=True)

        hooks = [
            self.register_load_state_dict_pre_hook(last_of_the_first),
            self.register_load_state_dict_post_hook(first_of_the_last, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._forget()

    def _check_same_mask(self, saved_groups: list[dict[str, Any]]) -> None:
        differences = []
        for i, (saved, group) in enumerate(zip(saved_groups, self.param_groups)):
            theirs, ours = saved.get("mask_fingerprints"), group["mask_fingerprints"]
            if theirs is None:
                raise ValueError(
                    f"param_groups[{i}] of the state has no mask_fingerprints: it is not a state of this SparseAdamW"
                )
            names = group["param_names"]
            saved_names = saved.get("param_names", names)
            for name, saved_name, one, other in zip(names, saved_names, theirs, ours):
                if one != other and _dense_name(name) != _dense_name(saved_name):
                    raise ValueError(
                        f"param_groups[{i}] of the state belongs to other parameters: {saved_name!r} is there where this optimizer "
                        f"has {name!r}. Make the optimizer over the parameters of the run that was saved, in their order"
                    )
                if one != other:
                    differences.append(f"{name!r} {_difference(one.partition(':')[0], other.partition(':')[0])}")
        if differences:
            more = f"; and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise ValueError(
                f"the state was saved with another mask than this optimizer's: {'; '.join(differences[:3])}{more}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "mask": self.mask, "_decay_to": self._decay_to}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._taken = None
        for group in self.param_groups:
            for option, default in _OPTIONS.items():  # that a state of an older version does not know
                group.setdefault(option, default)
            for param in group["params"]:
                entry = self.state.get(param, {})
                if "step" in entry and not isinstance(entry["step"], Tensor):
                    entry["step"] = torch.tensor(float(entry["step"]), dtype=torch.float32, device=param.device)
        self._forget()

    def update_mask(self, mask: CSRMask) -> None:
        """Train another set of entries of the same tensors from now on (LIFT).

        Entries that stay keep their moments, master copy and the point that they decay to; those that join start with
        moments 0 and, where there is such a point, with their present weight as that.

        Raises:
            ValueError: the mask covers other tensors, or a covered model is sparsified (densify it and sparsify it
                again). Nothing has changed then.
        """
        if not isinstance(mask, CSRMask):
            raise TypeError(f"mask must be a CSRMask, got {type(mask).__name__}")
        if (mask.names, mask.shapes) != (self.mask.names, self.mask.shapes):
            raise ValueError("mask must cover the same tensors as the one that it replaces")
        covered = self._covered_groups()
        if any(values is not None for members in covered for _, values in members.values()):
            raise ValueError(
                "the values of a sparsified model belong to its mask: densify and sparsify it, and make a new optimizer"
            )
        trainable = {name for members in covered for name in members}
        for name, start, end in zip(mask.names, mask._bounds, mask._bounds[1:]):
            if end > start and name not in trainable:
                raise ValueError(f"mask covers {name!r}, which is not among the optimizer's parameters")
        for name, dense in ((n, dense) for members in covered for n, (dense, _) in members.items()):
            old, new = self.mask[name].to(dense.device), mask[name].to(dense.device)
            state = self.state[dense]
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    state[key] = old.project(state[key], new)
            if "values" in state:
                state["values"] = _carried_over(state["values"], old, new, dense)
            if self._decay_to is not None:
                decay_to = self._decay_to[name]
                self._decay_to[name] = _carried_over(decay_to.to(dense.device), old, new, dense).to(decay_to.device)
        self.mask = mask
        for group, members in zip(self.param_groups, covered):
            self._describe_mask(group, members)
        self._forget()


# Option of a group → its default.
_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(SparseAdamW.__init__).parameters.items()
    if parameter.default is not parameter.empty and name != "decay_to"
}


def _carried_over(compact: Tensor, old: CSRMask, new: CSRMask, dense: Tensor) -> Tensor:
    """A compact tensor of the new mask: entries that stay keep theirs, those that join get their weight."""
    stayed = old.project(torch.ones_like(compact), new) == 1
    return torch.where(stayed, old.project(compact, new), new.gather({new.names[0]: dense}).to(compact.dtype))


def _difference(saved: str, here: str) -> str:
    if not saved or not here:
        return f"was {'masked' if saved else 'not masked'} and is {'masked' if here else 'not masked'} now"
    return f"has {saved} entries there and {here} here" if saved != here else f"has {saved} entries at other places"


def _check_storage(group: Mapping[str, Any]) -> None:
    if group["state_dtype"] not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"state_dtype must be torch.float32, torch.bfloat16 or None, got {group['state_dtype']}")
    check_int(group["seed"], "seed", 0)
    if group["seed"] >= 2**31:
        raise ValueError(f"seed must be less than 2**31, got {group['seed']}")


def _trainable(named_params: Any) -> list[tuple[str, Tensor]]:
    """The pairs of parameters that need a gradient."""
    pairs = [named_params] if isinstance(named_params, Tensor) else list(named_params)
    for pair in pairs:
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            raise TypeError("named_params must be (name, parameter) pairs, such as model.named_parameters()")
    return [(name, param) for name, param in pairs if param.requires_grad]


def _dense_name(name: str) -> str:
    """The name of the dense tensor whose values a parameter of a sparsified model holds."""
    owner, leaf = name[: name.rfind(".") + 1], name[name.rfind(".") + 1 :]
    return owner + ("weight" if leaf == "values" else leaf.removesuffix("_values"))


def _plain_name(name: str, mask: CSRMask) -> str:
    """The parameter's name as the mask has it, or that in the model itself."""
    if name in mask:
        return name
    name = plain_name(name)
    inner = name.removeprefix("module.")  # of DistributedDataParallel; a model may have a module of that name, too
    return inner if inner in mask else name
