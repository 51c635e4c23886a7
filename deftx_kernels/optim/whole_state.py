"""The state of parameters that are sharded over ranks, in terms of whole tensors: so a state dict does not depend on
the number of ranks. Compact tensors become whole ones [nnz], the other tensors stay DTensors.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.shards import (
    check_same,
    compact_bounds,
    gather_all,
    is_dtensor,
    local_entries,
    local_part,
    local_tensor,
    mesh_of_rows,
    meshes_of,
    row_bounds,
)

COMPACT = ("exp_avg", "exp_avg_sq", "values")
# A parameter, and the mask of its whole tensor if the optimizer's mask covers it.
Masked = tuple[Tensor, CSRMask | None]


def whole_state(state: Mapping[Any, Any], params: Mapping[Any, Masked]) -> dict[Any, Any]:
    """The state with whole compact tensors in place of this rank's parts. All ranks of the meshes call it.

    Args:
        state, params: by the ids of the parameters in a state dict.
    """
    found = {i: dict(entry) if isinstance(entry, dict) else entry for i, entry in state.items()}
    batches: dict[tuple[Any, torch.dtype], list[tuple[Any, str, CSRMask]]] = {}
    for i, (param, mask) in params.items():
        if mask is None or (mesh := mesh_of_rows(param)) is None:
            continue
        for key in COMPACT:
            if key in found.get(i, ()):
                batches.setdefault((mesh, found[i][key].dtype), []).append((i, key, mask))
    meshes = meshes_of((param for param, _ in params.values()), of_rows=True)
    layout = [(str(dtype), [(i, key) for i, key, _ in batch]) for (_, dtype), batch in batches.items()]
    check_same(
        layout,
        "the optimizer's state on rank 0 differs from that of ranks {ranks}",
        [m for m in meshes if m is not None],
    )
    for (mesh, _), batch in batches.items():
        bounds = [compact_bounds(mask, params[i][0], mesh.size()) for i, _, mask in batch]
        sizes = [[b[rank + 1] - b[rank] for b in bounds] for rank in range(mesh.size())]
        flat = torch.cat([found[i][key] for i, key, _ in batch])
        ranks = gather_all(flat, mesh.get_group(), [sum(s) for s in sizes])
        for (i, key, _), parts in zip(batch, zip(*(part.split(s) for part, s in zip(ranks, sizes)))):
            found[i][key] = torch.cat(parts)
    return found


def local_state(state: Mapping[Any, Any], params: Iterable[tuple[Any, Masked]]) -> dict[Any, Any]:
    """This rank's part of a whole state. ValueError where a tensor does not have the shape of the whole one."""
    found = dict(state)
    for i, (param, mask) in params:
        if not isinstance(found.get(i), dict):
            continue
        if not is_dtensor(param):
            if any(map(is_dtensor, found[i].values())):
                raise ValueError(
                    "the state has DTensors for a parameter that is none: load it with torch.distributed.checkpoint"
                )
            continue
        found[i] = dict(found[i])
        for key in COMPACT:
            if isinstance(value := found[i].get(key), Tensor):
                found[i][key] = _local_value(value, param, mask, key)
    return found


def _local_value(value: Tensor, param: Any, mask: CSRMask | None, key: str) -> Tensor:
    shape = param.shape if mask is None else torch.Size((mask.nnz,))
    if value.shape != shape:
        of = "a parameter" if mask is None else repr(mask.names[0])
        raise ValueError(
            f"the state's {key} of {of} has shape {list(value.shape)}, the whole tensor {list(shape)}: load what "
            "state_dict returned, which is the same on every rank"
        )
    if mask is not None:
        return value[local_entries(mask, param)].clone()
    if is_dtensor(value):
        return value
    from torch.distributed.tensor import DTensor

    mesh = param.device_mesh
    if mesh_of_rows(param) is not None:
        start, stop = row_bounds(shape, mesh.size())[mesh.get_local_rank() :][:2]
        value = value[start:stop]
    layout: dict[str, Any] = dict(run_check=False, shape=param.shape, stride=param.stride())
    return DTensor.from_local(value.to(param.device, copy=True), mesh, param.placements, **layout)


def change_entries(
    state: dict[str, Any], decay_to: dict[str, Tensor] | None, tensor: Tensor, old: CSRMask, new: CSRMask
) -> None:
    """Another mask for a parameter with this state, and for its part of `decay_to`."""
    dense, (name,) = local_tensor(tensor), old.names
    old, new = (local_part(mask, tensor).to(dense.device) for mask in (old, new))
    for key in ("exp_avg", "exp_avg_sq"):
        if key in state:
            state[key] = old.project(state[key], new)
    if "values" in state:
        state["values"] = _project_or_gather(state["values"], old, new, dense)
    if decay_to is not None:
        projected = _project_or_gather(decay_to[name].to(dense.device), old, new, dense)
        decay_to[name] = projected.to(decay_to[name].device)


def _project_or_gather(compact: Tensor, old: CSRMask, new: CSRMask, dense: Tensor) -> Tensor:
    """A compact tensor of the new mask: from the old one at entries in both masks, from the weight at new entries."""
    in_both = old.project(torch.ones_like(compact), new) == 1
    return torch.where(in_both, old.project(compact, new), new.gather({new.names[0]: dense}).to(compact.dtype))
