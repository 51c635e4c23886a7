"""`sparse_adamw`, and the step that it shares with the optimizer."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask
from deftx_kernels.ops.schemas import AdamWArgs, compute_dtype
from deftx_kernels.validation import check_float, check_floats, check_hyperparameters, check_int, check_writable, scalar


class StepOptions(NamedTuple):
    """The options of a step, as in `sparse_adamw`."""

    lr: float | Tensor
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    l1: float
    maximize: bool
    stochastic_rounding: bool
    seed: int


class CompactState(NamedTuple):
    """The compact tensors [nnz] of a step; all but `decay_to` are updated."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    values: Tensor | None
    decay_to: Tensor | None

    def updated(self) -> dict[str, Tensor]:
        tensors = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return tensors if self.values is None else {**tensors, "values": self.values}


def sparse_adamw(
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor] | Tensor,
    exp_avg: Tensor,  # [nnz]
    exp_avg_sq: Tensor,  # [nnz]
    step: int | Tensor,
    mask: CSRMask,
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_to: Tensor | None = None,  # [nnz]
    l1: float = 0.0,
    maximize: bool = False,
    values: Tensor | None = None,  # [nnz]
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding: bool = False,
    seed: int = 0,
) -> None:
    """One step of `torch.optim.AdamW` (Loshchilov & Hutter 2019) at the mask's entries, in place.

    Entries outside the mask stay bit-identical. There is no host synchronisation; with `step` and `lr` as tensors on
    the device, the step can be captured in a CUDA graph.

    Args:
        params: name → dense tensor, of one floating dtype.
        grads: name → dense gradient, or one compact tensor [nnz].
        exp_avg, exp_avg_sq: compact moments, float32 or, both, bfloat16 (float64 for float64 params). Updated.
        step: the number of this step, from 1: an int, or a 0-d tensor that is read on the device.
        lr: learning rate, a float or a 0-d tensor.
        betas, eps, maximize: as in `torch.optim.AdamW`.
        weight_decay: decoupled decay: w -= lr * weight_decay * (w - decay_to).
        decay_to: compact; by default 0.
        l1: adds the subgradient l1 * sign(w - decay_to) to the gradient.
        values: compact float32 master copy of the entries. The step updates it and rounds it into params.
        grad_scale: gradients are divided by this 0-d tensor.
        found_inf: a 0-d tensor; if it is not zero, nothing changes.
        stochastic_rounding: round what is stored in bfloat16 (moments; params without `values`) up or down at random,
            with probabilities that make the mean exact. Rounding to nearest drops updates below half a unit in the
            last place: with beta2 = 0.999, bfloat16 moments then never decay.
        seed: of the stochastic rounding, 0 <= seed < 2**63. The random numbers are those of Philox4x32-10 (Salmon et
            al. 2011) with the key `seed`, at (entry, step): equal arguments give equal results.

    Raises:
        ValueError, TypeError: an argument is out of range, or its shape, dtype or device does not fit the mask and
            params. Nothing has changed then.

    Example:
        >>> weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> mask = CSRMask.from_dense({"weight": weight > 2})
        >>> exp_avg, exp_avg_sq = torch.zeros(mask.nnz), torch.zeros(mask.nnz)
        >>> grads = {"weight": torch.ones(2, 2)}
        >>> sparse_adamw({"weight": weight}, grads, exp_avg, exp_avg_sq, 1, mask, lr=0.5)
        >>> weight
        tensor([[1.0000, 2.0000],
                [2.5000, 3.5000]])
    """
    state = CompactState(exp_avg, exp_avg_sq, values, decay_to)
    options = StepOptions(lr, betas, eps, weight_decay, l1, maximize, stochastic_rounding, seed)
    targets = check_targets(params, state, mask)
    if decay_to is not None:
        mask.check_compact(decay_to, "decay_to")
        check_float(decay_to, "decay_to")
    apply_step(targets, grads, state, step, mask, options, grad_scale, found_inf)


def check_targets(params: Mapping[str, Tensor], state: CompactState, mask: CSRMask) -> list[Tensor]:
    """Check the tensors that a step writes; returns the params in the mask's order."""
    targets = mask.checked_tensors(params, "params")
    dtype = targets[0].dtype
    if check_floats(targets, mask.names, "params") != {dtype}:
        name, tensor = next((n, t) for n, t in zip(mask.names, targets) if t.dtype != dtype)
        raise ValueError(
            f"params[{name!r}] is {tensor.dtype}, params[{mask.names[0]!r}] {dtype}: all must have one dtype"
        )
    compute = compute_dtype(dtype)
    for argument, compact in state.updated().items():
        mask.check_compact(compact, argument)
        allowed = {compute} if argument == "values" or compute == torch.float64 else {compute, torch.bfloat16}
        if compact.dtype not in allowed or not compact.is_contiguous():
            dtypes = " or ".join(sorted(map(str, allowed), reverse=True))
            raise ValueError(f"{argument} must be contiguous {dtypes} for {dtype} params, got {compact.dtype}")
    if (first := state.exp_avg.dtype) != (second := state.exp_avg_sq.dtype):
        raise ValueError(f"exp_avg and exp_avg_sq must have the same dtype, got {first} and {second}")
    if not all(t.is_contiguous() for t in targets):  # the operator gets copies, so cannot see whether memory overlaps
        check_writable(_labelled(targets, mask))
    return targets


def _labelled(targets: list[Tensor], mask: CSRMask) -> dict[str, Tensor]:
    return {f"params[{name!r}]": tensor for name, tensor in zip(mask.names, targets)}


def apply_step(
    targets: list[Tensor],
    grads: Mapping[str, Tensor] | Tensor,
    state: CompactState,
    step: int | Tensor,
    mask: CSRMask,
    options: StepOptions,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    changed: Tensor | None = None,  # int32 [ceil(nnz / 32)]
) -> None:
    """`sparse_adamw` of targets and state that `check_targets` has checked, and of a checked `decay_to`. In `changed`,
    if given, the bits of the entries that change are set (see the operator `sparse_adamw_`).
    """
    dtype, device, decay_to = targets[0].dtype, mask.device, state.decay_to
    if decay_to is not None:
        decay_to = decay_to.detach().to(compute_dtype(dtype)).contiguous()
    if options.stochastic_rounding:
        check_int(options.seed, "seed", 0)
        if options.seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63, got {options.seed}")
        if dtype == torch.float16 and state.values is None:
            raise ValueError("stochastic_rounding is not defined for float16 params: keep a float32 master in values")
    beta1, beta2 = check_hyperparameters(options.lr, options.betas, options.eps, options.weight_decay, options.l1)
    gradients, is_compact = _gradients(grads, mask, dtype)
    with torch.no_grad():
        dense = [t.contiguous() for t in targets]
    arguments = AdamWArgs(
        params=dense,
        grads=gradients,
        compact_grads=is_compact,
        **state._replace(decay_to=decay_to)._asdict(),
        crow_indices=mask.crow_indices,
        col_indices=mask.col_indices,
        step=scalar(step, "step", device, least=1),
        lr=scalar(options.lr, "lr", device),
        beta1=beta1,
        beta2=beta2,
        eps=float(options.eps),
        weight_decay=float(options.weight_decay),
        l1=float(options.l1),
        maximize=bool(options.maximize),
        grad_scale=None if grad_scale is None else scalar(grad_scale, "grad_scale", device),
        found_inf=None if found_inf is None else scalar(found_inf, "found_inf", device),
        seed=options.seed if options.stochastic_rounding else None,
        changed=changed,
    )
    with torch.no_grad():
        try:
            torch.ops.deftx.sparse_adamw_(*arguments)
        except (RuntimeError, ValueError):
            check_writable(_labelled(targets, mask) | state.updated())  # names the tensors that share memory
            raise
        for tensor, copy in zip(targets, dense):
            if copy is not tensor:
                tensor.copy_(copy)
    torch.autograd.graph.increment_version(targets)


def _gradients(grads: Mapping[str, Tensor] | Tensor, mask: CSRMask, dtype: torch.dtype) -> tuple[list[Tensor], bool]:
    """What the operator takes: dense gradients of one dtype, or one compact tensor."""
    if isinstance(grads, Tensor):
        mask.check_compact(grads, "grads")
        check_float(grads, "grads")
        return [grads.detach().contiguous()], True
    chosen = mask.checked_tensors(grads, "grads")
    dtypes = check_floats(chosen, mask.names, "grads")
    with torch.no_grad():
        if dtypes != {dtype}:
            chosen = [g.to(compute_dtype(dtype)) for g in chosen]
        return [g.contiguous() for g in chosen], False
