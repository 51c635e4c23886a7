"""`sparse_adamw`: the public function. Arguments are checked here, once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import (
    check_float,
    check_floats,
    check_hyperparameters,
    check_int,
    check_writable,
    scalar,
)


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

    Everything outside the mask stays bit-identical. There is no host synchronisation; with `step` and `lr` as tensors
    on the device, a CUDA graph may hold it.

    Args:
        params: name → dense tensor, of one floating dtype.
        grads: name → dense gradient, or one compact tensor [nnz].
        exp_avg, exp_avg_sq: compact moments, float32 or, both, bfloat16 (float64 for float64 params). Updated.
        step: the number of this step, from 1: an int, or a 0-d tensor that the kernel reads on the device.
        lr: learning rate, a float or a 0-d tensor.
        weight_decay: decoupled decay: w -= lr * weight_decay * (w - decay_to).
        decay_to: compact; by default 0.
        l1: adds the subgradient l1 * sign(w - decay_to) to the gradient.
        maximize: ascend.
        values: compact float32 master copy of the entries; it is then what is updated, and params receive its rounding.
        grad_scale: gradients are divided by this 0-d tensor.
        found_inf: a 0-d tensor; where it is not zero, nothing changes.
        stochastic_rounding: what is kept in bfloat16 (moments; params without `values`) is rounded up or down by
            chance, each neighbour as likely as the result is near to it, so that steps below half a unit in the last
            place count in the mean (nearest rounding drops them: with beta2 = 0.999, bfloat16 moments then never
            decay).
        seed: of that chance, 0 <= seed < 2**63. The result is a function of the arguments alone: Philox4x32-10 (Salmon
            et al. 2011) with the key `seed`, at (entry, step).

    Raises:
        ValueError, TypeError: an argument is out of range, or of another shape, dtype or device than the mask and the
            params ask for. Nothing has changed then.
    """
    targets = check_targets(params, exp_avg, exp_avg_sq, values, mask)
    if decay_to is not None:
        mask.check_compact(decay_to, "decay_to")
        check_float(decay_to, "decay_to")
    step_targets(
        targets, grads, exp_avg, exp_avg_sq, step, mask, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, decay_to=decay_to,
        l1=l1, maximize=maximize, values=values, grad_scale=grad_scale, found_inf=found_inf,
        stochastic_rounding=stochastic_rounding, seed=seed,
    )  # fmt: skip


def check_targets(
    params: Mapping[str, Tensor], exp_avg: Tensor, exp_avg_sq: Tensor, values: Tensor | None, mask: CSRMask
) -> list[Tensor]:
    """The tensors that a step writes; the params among them in the mask's order."""
    targets = mask.checked_tensors(params, "params")
    dtype = targets[0].dtype
    if check_floats(targets, mask.names, "params") != {dtype}:
        name, tensor = next((n, t) for n, t in zip(mask.names, targets) if t.dtype != dtype)
        raise ValueError(
            f"params[{name!r}] is {tensor.dtype}, params[{mask.names[0]!r}] {dtype}: one dtype a call is needed"
        )
    _check_state(_state(exp_avg, exp_avg_sq, values), mask, dtype)
    if not all(t.is_contiguous() for t in targets):  # the kernel gets copies of those
        check_writable(_labelled(targets, mask))
    return targets


def _state(exp_avg: Tensor, exp_avg_sq: Tensor, values: Tensor | None) -> dict[str, Tensor]:
    return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq} | ({} if values is None else {"values": values})


def _labelled(targets: list[Tensor], mask: CSRMask) -> dict[str, Tensor]:
    return {f"params[{name!r}]": tensor for name, tensor in zip(mask.names, targets)}


def step_targets(
    targets: list[Tensor], grads: Mapping[str, Tensor] | Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int | Tensor,
    mask: CSRMask, *, lr: float | Tensor, betas: tuple[float, float], eps: float, weight_decay: float, decay_to: Tensor | None,
    l1: float, maximize: bool, values: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None,
    stochastic_rounding: bool, seed: int,
) -> None:  # fmt: skip
    """`sparse_adamw` of tensors that have been checked, by `check_targets`, and `decay_to`."""
    dtype = targets[0].dtype
    if decay_to is not None:
        decay_to = decay_to.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).contiguous()
    if stochastic_rounding:
        check_int(seed, "seed", 0)
        if seed >= 2**63:
            raise ValueError(f"seed must be less than 2**63, got {seed}")
        if dtype == torch.float16 and values is None:
            raise ValueError("stochastic_rounding is not defined for float16 params: keep a float32 master in values")
    beta1, beta2 = check_hyperparameters(lr, betas, eps, weight_decay, l1)
    gradients, is_compact = _gradients(grads, mask, dtype)
    scalars = [
        scalar(step, "step", mask.device, least=1),
        scalar(lr, "lr", mask.device),
        None if grad_scale is None else scalar(grad_scale, "grad_scale", mask.device),
        None if found_inf is None else scalar(found_inf, "found_inf", mask.device),
    ]
    with torch.no_grad():
        dense = [t.contiguous() for t in targets]
        try:
            torch.ops.deftx.sparse_adamw_(
                dense, gradients, is_compact, exp_avg, exp_avg_sq, values, mask.crow_indices, mask.col_indices, scalars[0],
                scalars[1], beta1, beta2, float(eps), float(weight_decay), decay_to, float(l1), bool(maximize), scalars[2],
                scalars[3], seed if stochastic_rounding else None,
            )  # fmt: skip
        except (RuntimeError, ValueError):
            check_writable(_labelled(targets, mask) | _state(exp_avg, exp_avg_sq, values))  # names what shares memory
            raise
        for tensor, copy in zip(targets, dense):
            if copy is not tensor:
                tensor.copy_(copy)
    torch.autograd.graph.increment_version(targets)


def _check_state(state: Mapping[str, Tensor], mask: CSRMask, dtype: torch.dtype) -> None:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for argument, compact in state.items():
        mask.check_compact(compact, argument)
        allowed = {compute} if argument == "values" or compute == torch.float64 else {compute, torch.bfloat16}
        if compact.dtype not in allowed or not compact.is_contiguous():
            kinds = " or ".join(sorted(map(str, allowed), reverse=True))
            raise ValueError(f"{argument} must be contiguous {kinds} for {dtype} params, got {compact.dtype}")
    if (first := state["exp_avg"].dtype) != (second := state["exp_avg_sq"].dtype):
        raise ValueError(f"exp_avg and exp_avg_sq must have the same dtype, got {first} and {second}")


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
            chosen = [g.to(torch.float64 if dtype == torch.float64 else torch.float32) for g in chosen]
        return [g.contiguous() for g in chosen], False
