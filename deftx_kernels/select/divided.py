"""Tensors divided over the ranks of a process group, to denoise them or to select from them.

A matrix that is sharded by rows is gathered on one rank, its owner, which denoises it as one process would. Matrices go
to the rank with the least work so far, those of most work first. A stack of matrices that is sharded along its first
dimension stays where it is.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deftx_kernels.denoise.batches import denoise, work
from deftx_kernels.denoise.rule import Rule
from deftx_kernels.select.rows import Rows, moved
from deftx_kernels.shards import attempt, exchange
from deftx_kernels.validation import check_finite

Infos = dict[Any, dict[str, Tensor]]


class Division(NamedTuple):
    """Which rank has which rows, before and after tensors are gathered on their owners. The same on all ranks."""

    sources: Mapping[Any, Rows | None]  # None: each rank has the whole tensor
    owners: Mapping[Any, int]  # of replicated tensors, and of sharded matrices to denoise
    targets: Mapping[Any, Rows]

    @classmethod
    def of(
        cls,
        sources: Mapping[Any, Rows | None],
        tensors: Mapping[Any, tuple[torch.Size, torch.dtype]],  # of the whole tensors
        denoised: Iterable[Any],
        rule: Rule | None,
        group: dist.ProcessGroup | None,
    ) -> "Division":
        ranks, noisy = dist.get_world_size(group), set(denoised)

        def cost(name: Any, shape: torch.Size) -> float:
            return work(shape, tensors[name][1], rule) if rule is not None and name in noisy else shape.numel()

        loads, costs = [0.0] * ranks, {}
        for name, (shape, _) in tensors.items():
            if (rows := sources[name]) is None or (name in noisy and len(shape) == 2):
                costs[name] = cost(name, shape)
            else:
                loads = [load + cost(name, rows.local_shape(rank)) for rank, load in enumerate(loads)]
        owners = {}
        for name in sorted(costs, key=lambda n: -costs[n]):  # of equal costs the first
            owners[name] = loads.index(min(loads))
            loads[owners[name]] += costs[name]
        targets = {
            name: Rows.of_owner(shape, owners[name], ranks) if name in owners else sources[name]
            for name, (shape, _) in tensors.items()
        }
        return cls(sources, owners, targets)  # type: ignore[arg-type]


def denoised_rows(
    values: Callable[[Any, slice], Tensor],
    division: Division,
    denoised: Iterable[Any],
    rule: Rule,
    labels: Mapping[Any, str],
    group: dist.ProcessGroup | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[Any, Tensor], Infos]:
    """This rank's rows of all tensors, as `division.targets` divides them: denoised, where they are to be.

    Args:
        values: makes some of the rows that this rank has of a tensor, contiguous and in new memory.
        progress: called with (matrices done, matrices in all) of this rank.

    Returns:
        The rows by name, and the information of `svd_denoise` for the matrices that this rank denoised.

    Raises:
        ValueError: on all ranks, for a NaN or infinite entry of any rank, or where denoising fails on one.
    """
    rank, found, errors = dist.get_rank(group), {}, []
    for name, target in division.targets.items():
        source = division.sources[name]
        part = values(name, target.range(rank) if source is None else slice(None))
        source = target if source is None else source
        errors.append(attempt(check_finite, part, labels[name], source.start(rank))[0])
        found[name] = moved(part, source, target, group)
    exchange(next((e for e in errors if e is not None), None), None, group)
    noisy = {n: found[n] for n in denoised if division.owners.get(n, rank) == rank}
    error, infos = attempt(denoise, noisy, noisy, labels, rule, progress, errors=Exception)
    exchange(error, None, group)
    return found, infos


def infos_of_all_ranks(
    mine: Infos, division: Division, group: dist.ProcessGroup | None, devices: Mapping[Any, torch.device]
) -> Infos:
    """The information on all denoised tensors: of a stack of matrices each rank has a part."""
    sent = [(name, {key: x.cpu() for key, x in info.items()}) for name, info in mine.items()]
    parts: dict[Any, list[dict[str, Tensor]]] = {}
    for rank in exchange(None, sent, group):
        for name, info in rank:
            parts.setdefault(name, []).append(info)
    return {
        name: {
            key: (x if name in division.owners else torch.cat([info[key] for info in infos])).to(devices[name])
            for key, x in infos[0].items()
        }
        for name, infos in parts.items()
    }
