"""SparseAdamW: AdamW with state and steps of the size of the mask, or of every entry; its changes as patches."""

import inspect
import math
from collections import ChainMap
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.shards import errors_on_all_ranks, local_entries, mesh_of_rows, meshes_of
from deftx_kernels.nn import entries_of
from deftx_kernels.optim.arguments import (
    as_lists,
    check_covered,
    check_entry,
    check_masked,
    check_memory,
    check_options,
    check_ranks_agree,
    check_same_mask,
    check_stepped_whole,
    checked_for_mask,
    name_in_mask,
    tensors_in,
    trainable,
)
from deftx_kernels.optim.bucket import Bucket, Pairs
from deftx_kernels.optim.dense import step_dense, total_norm
from deftx_kernels.optim.full import FullMask
from deftx_kernels.optim.tracking import ChangeTracker
from deftx_kernels.optim.whole_state import Masked, change_entries, local_state, whole_state
from deftx_kernels.validation import is_number


class SparseAdamW(Optimizer):
    """`torch.optim.AdamW` (Loshchilov & Hutter 2019) at the entries of a mask, or, without one, at every entry.

    Parameters that the mask covers, and the compact `values` of a model that `sparsify` changed with it, get compact
    moments (8 bytes for each entry in float32) and steps of one kernel launch; entries outside the mask stay
    bit-identical. The other trainable parameters get ordinary fused AdamW. At density 1 it equals `torch.optim.AdamW`.

    Gradients may be dense (`param.grad`) or compact. LR schedulers, `torch.amp.GradScaler`, closures, CUDA graphs (with
    `lr` as a tensor on the device) and compiled models are supported. `torch.nn.utils.clip_grad_norm_` counts every
    entry of a dense gradient, also those outside the mask; the method `clip_grad_norm_` counts what is trained.

    Of parameters that FSDP2 has sharded by rows (DTensors placed `Shard(0)`, or `Replicate()`, on a 1-D mesh), each
    rank steps its rows and keeps their compact state. The mask is that of the whole tensors. All ranks make the
    optimizer, with the same mask, and call `clip_grad_norm_`, `state_dict`, `load_state_dict` and `update_mask`
    together; `track_changes` and mask None are not supported. Of a model that was sharded after `sparsify`, each rank
    has an equal part of each tensor's values, with their state, and all ranks call `step`, too.

    Args:
        named_params: `model.named_parameters()`, or parameter groups whose "params" are (name, parameter) pairs.
            Parameters that need no gradient are left out. Prefixes of `torch.compile`, activation checkpointing and
            DistributedDataParallel in the names are ignored.
        mask: the entries to train; None: every entry of every parameter (dense AdamW). The options below that name
            masked entries then apply to all.
        lr: learning rate, a float or a 0-d tensor.
        betas, eps, weight_decay, maximize: as in `torch.optim.AdamW`. Groups may set these and the options below
            themselves.
        l1: adds the subgradient of l1 * |w - decay_to| at masked entries.
        decay_to: compact [mask.nnz]: the point to which decay and l1 pull masked entries; by default 0. For all groups.
        master: keep a float32 copy of the masked entries of 16-bit parameters (the values of a sparsified model are
            one).
        state_dtype: of the masked entries' moments: torch.float32 (default; float64 for float64 parameters) or
            torch.bfloat16.
        stochastic_rounding: of masked entries kept in bfloat16 (moments; parameters without a float32 copy).
        seed: of the stochastic rounding, 0 <= seed < 2**31. Runs with one seed are equal bit by bit, also resumed ones.
        track_changes: mark the entries whose stored bits the steps change, one bit for each entry, for `take_patch`.
            Parameters that the mask does not cover are then stepped by this library's kernel, too, with float32 moments
            (float64 for float64 parameters).

    Raises:
        ValueError, TypeError: parameters without names, a value out of range, a mask that does not fit the parameters,
            or that covers a tensor which is not among them. With DTensors, a ValueError on every rank, also if the
            ranks' masks or parameters differ.

    Example:
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> mask = CSRMask.from_dense({"weight": torch.eye(2, dtype=torch.bool)})
        >>> optimizer = SparseAdamW(model.named_parameters(), mask, lr=0.5, weight_decay=0.0)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> model.weight.detach()
        tensor([[0.5000, 1.0000],
                [1.0000, 0.5000]])
    """

    # Read by torch.amp.GradScaler: it passes grad_scale and found_inf instead of unscaling and synchronising.
    _step_supports_amp_scaling = True
    _buckets: list[Bucket] | None = None  # of parameters that the kernel steps; None until the next step needs them
    _dense_params: list[list[Tensor]]  # the other parameters of each group
    _clip_divisor: Tensor | None  # what the next step divides gradients by
    _tracker: ChangeTracker | None = None

    def __init__(
        self,
        named_params: Iterable[Any],
        mask: CSRMask | None,
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
        track_changes: bool = False,
    ) -> None:
        defaults: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, l1=l1)
        defaults |= dict(maximize=maximize, master=master, state_dtype=state_dtype)
        defaults |= dict(stochastic_rounding=stochastic_rounding, seed=seed)
        named_params = as_lists(named_params)
        meshes = meshes_of(tensors_in(named_params))
        with errors_on_all_ranks(meshes):
            if mask is not None and not isinstance(mask, CSRMask):
                raise TypeError(f"mask must be a CSRMask or None, got {type(mask).__name__}")
            self.mask, self._decay_to = mask, None
            if decay_to is not None:
                if mask is None:
                    raise ValueError("decay_to needs a mask: without one, every entry decays to 0")
                mask.check_compact(decay_to, "decay_to")
                self._decay_to = mask.split(decay_to.detach())
            self._tracker = ChangeTracker() if track_changes else None
            self.param_groups = []
            self._reset_buckets()
            super().__init__(named_params, defaults)
            self._divide_parameters()
        check_ranks_agree(self.param_groups, meshes)
        if meshes and (parts := self._decay_to) is not None:
            for name, entries in ((m.names[0], local_entries(m, p)) for p, m in self._masked_params() if m is not None):
                parts[name] = parts[name][entries].clone()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: a dict whose "params" are (name, parameter) pairs, with options of its own."""
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, got {type(param_group).__name__}")
        group = {**self.defaults, **param_group}
        group["params"] = [(name_in_mask(n, self.mask), p) for n, p in trainable(param_group["params"])]
        group.setdefault("param_names", [])  # of a group without trainable parameters
        check_options(group)
        names, params = [n for n, _ in group["params"]], [p for _, p in group["params"]]
        for entry in entries_of(params).values():
            name = entry.mask.names[0]
            if self.mask is None:
                raise ValueError(f"{name!r} is sparsified: give its mask, or densify the model to train every entry")
            if name not in self.mask or self.mask[name] != entry.mask.to(self.mask.device):
                raise ValueError(f"{name!r} was sparsified with another mask than this optimizer's")
        pairs, full_pairs = self._pairs(names, params)
        for name, (dense, _) in full_pairs.items():
            check_stepped_whole(name, dense)
        present = [group_pairs for both in self._pairs_by_group() for group_pairs in both]
        dense_tensors = {name: dense for group_pairs in present for name, (dense, _) in group_pairs.items()}
        for name, (dense, param) in (pairs | full_pairs).items():
            if dense_tensors.get(name, dense) is not dense:
                raise ValueError(f"a parameter named {name!r} is in another group already")
            if name in full_pairs and self.mask is not None:
                continue  # the options of masked entries do not apply
            has_float32 = param is not dense or group["master"]
            if group["stochastic_rounding"] and dense.dtype == torch.float16 and not has_float32:
                raise ValueError(
                    f"stochastic_rounding is not defined for float16 parameters such as {name!r}: set master=True"
                )
        super().add_param_group(group)
        self._set_fingerprints(group, pairs)
        self._reset_buckets()

    @property
    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _pairs_by_group(self) -> list[tuple[Pairs, Pairs]]:
        for group in self.param_groups:
            check_memory(group["param_names"], group["params"])
        return [self._pairs(g["param_names"], g["params"]) for g in self.param_groups]

    def _pairs(self, names: list[str], params: list[Tensor]) -> tuple[Pairs, Pairs]:
        """The parameters that the mask covers; and those of the others of which the kernel steps every entry."""
        pairs, full_pairs = {} if self.mask is None else self._covered_pairs(names, params, self.mask), Pairs()
        if self.mask is None or self._tracker is not None:
            covered = {id(param) for _, param in pairs.values()}
            for name, param in zip(names, params):
                if id(param) not in covered and full_pairs.setdefault(name, (param, param))[0] is not param:
                    raise ValueError(f"two parameters are named {name!r}")
        return pairs, full_pairs

    def _covered_pairs(self, names: list[str], params: list[Tensor], mask: CSRMask) -> Pairs:
        pairs: Pairs = {}
        entries = entries_of(params)
        shapes = dict(zip(mask.names, mask.shapes))
        for name, param in zip(names, params):
            dense = param
            if entry := entries.get(id(param)):
                name, dense = entry.mask.names[0], entry.dense
                check_entry(entry, self._tracker is not None)
            elif not check_masked(name, param, shapes, self._tracker is not None):
                continue
            if name in pairs and pairs[name][0] is not dense:
                raise ValueError(f"two parameters are named {name!r}")
            pairs[name] = dense, param
        return pairs

    def _divide_parameters(self) -> tuple[dict[tuple, Pairs], dict[tuple, Pairs], list[list[Tensor]]]:
        """The pairs of each bucket: of masked parameters, by (group, dtype, device, is dense, mesh of the rows), and of
        those of which every entry is stepped. And each group's other parameters.
        """
        buckets: dict[tuple, Pairs] = {}
        full_buckets: dict[tuple, Pairs] = {}
        others = []
        for i, (pairs, full_pairs) in enumerate(self._pairs_by_group()):
            for name, (dense, param) in pairs.items():
                key = i, dense.dtype, dense.device, param is dense, mesh_of_rows(param)
                buckets.setdefault(key, {})[name] = dense, param
            for name, (param, _) in full_pairs.items():
                full_buckets.setdefault((i, param.dtype, param.device), {})[name] = param, param
            taken = {id(param) for _, param in (pairs | full_pairs).values()}
            others.append([p for p in self.param_groups[i]["params"] if id(p) not in taken])
        if self.mask is not None:
            check_covered(self.mask, chain.from_iterable(buckets.values()))
        return buckets, full_buckets, others

    def _prepared_buckets(self) -> list[Bucket]:
        """The buckets, made at the first step (until then the model may be moved), and again if `state` was changed."""
        if self._buckets is None or any(bucket.needs_rebuild() for bucket in self._buckets):
            self._reset_buckets(keep_clipping=True)
            masked, full, self._dense_params = self._divide_parameters()
            track, buckets = self._tracker is not None, []
            for (i, *_), pairs in masked.items():
                assert self.mask is not None
                given = self.param_groups[i], self.state, pairs, self.mask, self._decay_to
                buckets.append(Bucket(*given, track))
            shapes = {n: dense.shape for pairs in full.values() for n, (dense, _) in pairs.items()}
            for (i, _, device), pairs in full.items():
                group = self.param_groups[i]
                options = group if self.mask is None else ChainMap(_OPTIONS_OUTSIDE_MASK, group)
                buckets.append(Bucket(options, self.state, pairs, FullMask(shapes, device), None, track))
            self._buckets = buckets
        return self._buckets

    def _reset_buckets(self, keep_clipping: bool = False) -> None:
        """Parameters, state or mask have changed: the next step makes the buckets anew."""
        if self._tracker is not None:
            self._tracker.keep_marks(self._buckets or ())
        self._buckets, self._dense_params = None, []
        if not keep_clipping:
            self._clip_divisor = None

    @property
    def writes_masked_weights(self) -> bool:
        """Whether a step itself writes the dense tensors of a sparsified model. Read by the post-step hook of `nn`."""
        return any(bucket.is_compact for bucket in self._buckets or ())

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
        buckets = self._split_buckets()
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if self._clip_divisor is not None:
            divisor = self._clip_divisor
            grad_scale = divisor if grad_scale is None else grad_scale * divisor.to(grad_scale)
        if self._tracker is not None:
            self._tracker.before_step(buckets)
        for bucket in buckets:
            bucket.step(grad_scale, found_inf)
        if self._tracker is not None:
            self._tracker.after_step(buckets)
        for group, params in zip(self.param_groups, self._dense_params):
            step_dense(group, params, self.state, grad_scale, found_inf)
        self._clip_divisor = None
        return loss

    def _split_buckets(self) -> list[Bucket]:
        """The buckets, divided such that all parameters of each take the same step, or none."""
        before = self._prepared_buckets()
        self._buckets = [part for bucket in before for part in bucket.split()]
        if self._tracker is not None:
            kept = set(map(id, self._buckets))
            self._tracker.divided += [bucket for bucket in before if id(bucket) not in kept]
        return self._buckets

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, error_if_nonfinite: bool = False) -> Tensor:
        """Clip the norm of the gradients that the next `step` uses, in one read of the masked gradients.

        Unlike `torch.nn.utils.clip_grad_norm_`, it counts only the masked entries of a dense gradient. The gradients
        stay as they are: `step` scales them as it reads them, and `zero_grad` cancels the clipping. With a GradScaler,
        call it after `unscale_`, as torch's.

        Args:
            max_norm: at least 0; infinity clips nothing.
            error_if_nonfinite: RuntimeError if the norm is NaN or infinite (waits for the device).

        Returns:
            The Euclidean norm of all masked gradients and those of the other parameters together, before clipping:
                float32 [].
        """
        if not (max_norm == math.inf or (is_number(max_norm) and max_norm >= 0)):
            raise ValueError(f"max_norm must be a number, at least 0, got {max_norm!r}")
        buckets = self._prepared_buckets()
        total = total_norm(buckets, chain.from_iterable(self._dense_params), self._params)
        if error_if_nonfinite and not math.isfinite(float(total)):
            raise RuntimeError(f"the norm of the gradients is {float(total)}, so they cannot be clipped")
        total = total.float()
        # torch multiplies by min(1, max_norm / (norm + 1e-6)); a step divides by the inverse.
        self._clip_divisor = ((total + 1e-6) / max_norm).clamp(min=1.0)
        return total

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        self._clip_divisor = None

    # ---- state ----
    def _set_fingerprints(self, group: dict[str, Any], pairs: Pairs) -> None:
        """Store in the group, and so in a state dict, the number and fingerprint of each parameter's masked entries."""
        masks = [mask for _, mask in self._with_masks(group, pairs)]
        group["mask_fingerprints"] = ["" if m is None else f"{m.nnz}:{m.fingerprint()[:32]}" for m in masks]

    def _with_masks(self, group: dict[str, Any], pairs: Pairs) -> list[Masked]:
        names = {id(param): name for name, (_, param) in pairs.items()}
        return [(p, self.mask[names[id(p)]] if self.mask and id(p) in names else None) for p in group["params"]]

    def _masked_params(self) -> list[Masked]:
        """All parameters in the order of a state dict, each with its mask, of the whole tensor, or None."""
        groups = zip(self.param_groups, self._pairs_by_group())
        return [pair for group, (pairs, _) in groups for pair in self._with_masks(group, pairs)]

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`. Of sharded parameters (FSDP2), it has the whole compact tensors, on
        every rank, and the other tensors as DTensors: all ranks call it. `torch.distributed.checkpoint` (with
        `get_optimizer_state_dict`) saves it and loads it on any number of ranks.
        """
        if not meshes_of(self._params):
            return super().state_dict()

        def whole_state_hook(_, state_dict: dict[str, Any]) -> dict[str, Any]:  # runs first
            return {**state_dict, "state": whole_state(state_dict["state"], dict(enumerate(self._masked_params())))}

        hook = self.register_state_dict_post_hook(whole_state_hook, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; training resumes bit-identically. ValueError, before any change, for that of another mask.

        Tracking begins anew: the next patch has what the steps from now on change.
        """
        loaded: dict[str, Any] = {}

        masked = self._masked_params()

        def check_state_hook(_, adapted: dict[str, Any]) -> dict[str, Any]:  # runs last, after hooks that change it
            with errors_on_all_ranks(meshes_of(param for param, _ in masked)):
                check_same_mask(adapted["param_groups"], self.param_groups)
                saved_ids = chain.from_iterable(g["params"] for g in adapted["param_groups"])
                loaded.update(adapted, state=local_state(adapted["state"], zip(saved_ids, masked)))
            return dict(loaded)

        # Runs first after loading: torch has cast the state to the parameters' dtype, which rounds float32 moments.
        def restore_state_dtype_hook(_) -> None:
            saved_ids = chain.from_iterable(g["params"] for g in loaded["param_groups"])
            for saved_id, (param, _) in zip(saved_ids, masked):
                for key, value in loaded["state"].get(saved_id, {}).items():
                    if isinstance(value, Tensor):
                        self.state[param][key] = value.detach().to(param.device, copy=True)

        hooks = [
            self.register_load_state_dict_pre_hook(check_state_hook),
            self.register_load_state_dict_post_hook(restore_state_dtype_hook, prepend=True),
        ]
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()
        self._reset_buckets()

    def __getstate__(self) -> dict[str, Any]:
        tracker = None if self._tracker is None else ChangeTracker()
        return {**super().__getstate__(), "mask": self.mask, "_decay_to": self._decay_to, "_tracker": tracker}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in _OPTION_DEFAULTS.items():  # a state of an older version lacks newer options
                group.setdefault(option, default)
            for param in group["params"]:
                entry = self.state.get(param, {})
                if "step" in entry and not isinstance(entry["step"], Tensor):
                    entry["step"] = torch.tensor(float(entry["step"]), dtype=torch.float32, device=param.device)
        self._tracker = None if self._tracker is None else ChangeTracker()
        self._buckets = None  # with their marks
        self._reset_buckets()

    def update_mask(self, mask: CSRMask) -> None:
        """Train another set of entries of the same tensors from now on (LIFT).

        Entries in both masks keep their moments, master copy and `decay_to`. New entries start with moments of 0 and,
        with `decay_to`, decay to their present weight.

        Raises:
            ValueError: the mask covers other tensors, or a covered model is sparsified (densify it and sparsify it
                again). Nothing has changed then.
        """
        pairs_by_group = [pairs for pairs, _ in self._pairs_by_group()]
        meshes = meshes_of(self._params)
        with errors_on_all_ranks(meshes):
            dense_tensors = checked_for_mask(mask, self.mask, chain(*(pairs.items() for pairs in pairs_by_group)))
        check_ranks_agree(mask.fingerprint(), meshes)
        assert self.mask is not None
        for name, tensor in dense_tensors.items():
            change_entries(self.state[tensor], self._decay_to, tensor, self.mask[name], mask[name])
        self._reset_buckets()  # while the marks have the old mask's order
        self.mask = mask
        for group, pairs in zip(self.param_groups, pairs_by_group):
            self._set_fingerprints(group, pairs)

    # ---- changes ----
    @torch.no_grad()
    def take_patch(self, model: Any, *, model_version: int = 0) -> Any:
        """What has changed in a model since the last call, as a SparsePatch; with `track_changes=True`.

        The patch has every entry whose stored bits the steps since then changed, with its present value: also one that
        was changed and changed back. There is no copy of the weights: the version that the patch was made for is that
        of the last call, or, at first, that before the first step, of which checksums are kept; the present version
        takes one read of the model. An error leaves the marks as they are.

        Tensors that the optimizer does not step (buffers, frozen parameters) and stepped tensors that other code has
        written between steps are in the patch whole if their checksum has changed. Not seen is a write to a stepped
        tensor through its `.data` or NumPy: the receiver's verification finds it. What buffers, and parameters
        that another optimizer steps, held before the first step is not known: if training changes them, call this once
        before the first step, which gives an empty patch. State dicts and copies of the optimizer hold no marks: after
        `load_state_dict`, the next patch is that of the steps since.

        Args:
            model: the module of the parameters, plain or sparsified (the patch is of the plain model's tensors), or a
                mapping of names to tensors.
            model_version: the number of the present version.

        Raises:
            ValueError: the optimizer does not track changes; the model lacks a tensor that it steps, or has other
                tensors, shapes or dtypes than at the last call.

        Example:
            >>> model = torch.nn.Linear(3, 1).bfloat16()
            >>> receiver = torch.nn.Linear(3, 1).bfloat16()
            >>> _ = receiver.load_state_dict(model.state_dict())
            >>> optimizer = SparseAdamW(model.named_parameters(), None, lr=1e-2, track_changes=True)
            >>> model(torch.ones(3).bfloat16()).backward()
            >>> optimizer.step()
            >>> optimizer.take_patch(model).apply_(receiver)
            >>> torch.equal(receiver.weight, model.weight)
            True
        """
        if self._tracker is None:
            raise ValueError("this optimizer does not track changes: make it with track_changes=True")
        masked, full, _ = self._divide_parameters()
        tensors = [dense for pairs in (*masked.values(), *full.values()) for dense, _ in pairs.values()]
        return self._tracker.take_patch(model, model_version, self._buckets or (), tensors)


_OPTION_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(SparseAdamW.__init__).parameters.items()
    if parameter.default is not parameter.empty and name not in ("decay_to", "track_changes")
}
# Of parameters that the mask does not cover, where the kernel steps them.
_OPTIONS_OUTSIDE_MASK = dict(l1=0.0, master=False, state_dtype=None, stochastic_rounding=False)
