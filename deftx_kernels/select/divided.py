"""Tensors divided over the ranks of a process group, to denoise them or to select from them.

A sharded tensor that is to be denoised is gathered on one rank, its owner, which denoises it as one process would. So
are all that one process computes in the same batch; such lists of tensors go to the rank with the least work so far,
those of most work first.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from deftx_kernels.denoise.batches import denoise
from deftx_kernels.denoise.plans import Layout, together, work
from deftx_kernels.denoise.rule import Rule
from deftx_kernels.mask.shards import attempt, exchange
from deftx_kernels.select.rows import Rows, moved
from deftx_kernels.validation import check_finite

Infos = dict[Any, dict[str, Tensor]]


class Division(NamedTuple):
    """Which rank has which rows, before and after tensors are gathered on their owners. The same on all ranks."""

    sources: Mapping[Any, Rows | None]  # None: each rank has the whole tensor
    owners: Mapping[Any, int]  # of tensors to denoise, and of replicated ones
    targets: Mapping[Any, Rows]
    lists: Sequence[Sequence[Any]]  # names of tensors to denoise: those of one list together, by one owner

    @classmethod
    def of(
        cls,
        sources: Mapping[Any, Rows | None],
        layouts: Mapping[Any, Layout],  # of the whole tensors
        group: dist.ProcessGroup | None,
        lists: Sequence[Sequence[Any]] = (),
        rule: Rule | None = None,
    ) -> "Division":
        ranks = dist.get_world_size(group)
        loads, costs = [0.0] * ranks, dict[tuple, float]()
        if rule is not None:
            costs |= {tuple(names): sum(work(layouts[name], rule) for name in names) for names in lists}
        denoised = {name for names in costs for name in names}
        for name, layout in layouts.items():
            if name not in denoised:
                if (rows := sources[name]) is None:
                    costs[name,] = float(layout.shape.numel())
                else:
                    loads = [load + rows.local_shape(rank).numel() for rank, load in enumerate(loads)]
        owners: dict[Any, int] = {}
        for names in sorted(costs, key=lambda n: -costs[n]):  # of equal costs the first
            owner = loads.index(min(loads))
            loads[owner] += costs[names]
            owners |= dict.fromkeys(names, owner)
        targets = {
            name: Rows.of_owner(layout.shape, owners[name], ranks) if name in owners else sources[name]
            for name, layout in layouts.items()
        }
        return cls(sources, owners, targets, lists)  # type: ignore[arg-type]


def lists_to_denoise(
    groups: Iterable[Iterable[Any]], layouts: Mapping[Any, Layout], rule: Rule, group: dist.ProcessGroup | None
) -> list[list[Any]]:
    """Which names to denoise together. One process calls `denoise` for one of the groups after the other; on CPUs, with
    the same number of threads, the tensors of a list alone get the same bits.
    """
    lists: list[list[Any]] = []
    for names in groups:
        lists += together({n: layouts[n] for n in names if layouts[n].shape.numel()}, rule)
        lists += [[n] for n in names if not layouts[n].shape.numel()]
    return exchange(None, lists, group)[0]  # they depend on the number of threads, on a GPU on its memory


def denoised_rows(
    values: Callable[[Any, slice], Tensor],
    division: Division,
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
        The rows by name, and the information of `svd_denoise` for the tensors that this rank denoised.

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
    mine = [{n: found[n] for n in names} for names in division.lists if division.owners[names[0]] == rank]
    error, infos = attempt(_denoise, mine, labels, rule, progress)
    exchange(error, None, group)
    return found, infos


def _denoise(
    lists: Sequence[dict[Any, Tensor]],
    labels: Mapping[Any, str],
    rule: Rule,
    progress: Callable[[int, int], None] | None,
) -> Infos:
    """Denoises the tensors in place, one list after the other."""
    total, before = sum(Layout.of(t).matrices for some in lists for t in some.values() if t.numel()), 0
    infos: Infos = {}

    def more(done: int, in_all: int) -> None:
        if progress is not None and done < in_all:
            progress(before + done, total)

    for some in lists:
        infos |= denoise(some, some, labels, rule, more)
        before += sum(Layout.of(t).matrices for t in some.values() if t.numel())
    if progress is not None:
        progress(total, total)
    return infos


def infos_of_all_ranks(mine: Infos, group: dist.ProcessGroup | None, devices: Mapping[Any, torch.device]) -> Infos:
    """The information on all denoised tensors, from that on the tensors of each rank."""
    sent = [(name, {key: x.cpu() for key, x in info.items()}) for name, info in mine.items()]
    found = {name: info for rank in exchange(None, sent, group) for name, info in rank}
    return {name: {key: x.to(devices[name]) for key, x in info.items()} for name, info in found.items()}
