"""Parameters that no bucket steps: fused AdamW. And the norm of the gradients of all parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from deftx_kernels.mask.shards import local_gradient, local_tensor, mesh_of_rows
from deftx_kernels.optim.bucket import Bucket


def step_dense(
    group: Mapping[str, Any],
    params: Iterable[Tensor],
    optimizer_state: dict[Tensor, Any],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Fused AdamW of the parameters that have a gradient. Of DTensors, whose state consists of DTensors too, each rank
    steps its part.
    """
    batches: dict[tuple, list[Tensor]] = {}
    for p in params:
        if p.grad is None:
            continue
        state = optimizer_state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        elif state["exp_avg"].dtype != p.dtype:  # loaded, of a run with track_changes
            state |= {key: state[key].to(p.dtype) for key in ("exp_avg", "exp_avg_sq")}
        batches.setdefault((p.dtype, p.device), []).append(p)
    beta1, beta2 = group["betas"]
    options = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
    options |= dict(beta1=beta1, beta2=beta2, grad_scale=grad_scale, found_inf=found_inf)
    for batch in batches.values():
        exp_avgs, exp_avg_sqs = (
            [local_tensor(optimizer_state[p][k]) for p in batch] for k in ("exp_avg", "exp_avg_sq")
        )
        steps = [optimizer_state[p]["step"] for p in batch]
        targets = [local_tensor(p) for p in batch]
        # torch's fused kernel on the CPU assumes contiguous tensors.
        weights = [t.contiguous() for t in targets]
        grads = [grad.contiguous() for grad in map(local_gradient, batch) if grad is not None]
        adamw(weights, grads, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, **options)
        for target, weight in zip(targets, weights):
            if weight is not target:
                target.copy_(weight)


def total_norm(buckets: Iterable[Bucket], dense_params: Iterable[Tensor], params: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of the gradients that a step uses: float64 []. Parts of tensors are added up over the ranks.

    Args:
        dense_params: those of no bucket.
        params: all parameters of the optimizer, also those without a gradient.
    """
    # All ranks take part in the same sums, whichever parameters have gradients: by mesh, None for whole tensors.
    devices = {mesh_of_rows(p): p.device for p in params}
    squares: dict[Any, list[Tensor]] = {mesh: [] for mesh in devices}
    for bucket in buckets:
        squares[bucket.mesh] += bucket.square_sums()
    grads: dict[Any, list[Tensor]] = {}
    for p in dense_params:
        if (grad := local_gradient(p)) is not None:
            grads.setdefault(mesh_of_rows(p), []).append(grad)
    for mesh, of_mesh in grads.items():
        if mesh is None:
            norms = [get_total_norm(of_mesh)]
        else:
            norms = [torch.linalg.vector_norm(g, dtype=torch.float64) for g in of_mesh]
        squares[mesh] += [n.double().square().view(1) for n in norms]
    totals = []
    for mesh, parts in squares.items():
        zero = torch.zeros(1, dtype=torch.float64, device=devices[mesh])
        total = torch.cat([zero, *(part.to(zero.device) for part in parts)]).sum()
        if mesh is not None:
            dist.all_reduce(total, group=mesh.get_group())
        totals.append(total)
    return torch.stack([t.to(totals[0].device) for t in totals]).sum().sqrt() if totals else torch.zeros(())
