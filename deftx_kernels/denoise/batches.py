"""Denoising of many matrices: those of one shape and dtype together, in batches that fit a memory limit."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.denoise import products
from deftx_kernels.denoise.gram import denoise_by_gram
from deftx_kernels.denoise.matrices import power_of_two_scale, sums_of_squares
from deftx_kernels.denoise.plans import Group, Layout, Part, large_groups, small_batches, test_matrix_of
from deftx_kernels.denoise.products import full_precision
from deftx_kernels.denoise.rule import Rule
from deftx_kernels.denoise.small import denoise_by_svd
from deftx_kernels.denoise.subspace import denoise_by_subspace
from deftx_kernels.ops.schemas import compute_dtype
from deftx_kernels.validation import check_finite, has_memory

_ALIGNMENT = 64  # bytes: as torch allocates. The last bits of a product depend on the alignment of its factors
_MATRICES_PER_CALL = 16  # matrices between two calls of `progress`, at least

Found = dict[Any, list[Sequence[Tensor]]]  # name -> rank, energy and residual of the tensor's matrices, batch by batch


class _Matrix(NamedTuple):
    """One matrix of a tensor."""

    source: Tensor  # [m, n]
    out: Tensor
    total: float  # sum of squares
    name: Any  # of the tensor


def denoise(
    sources: Mapping[Any, Tensor],
    outs: Mapping[Any, Tensor],
    labels: Mapping[Any, str],
    rule: Rule,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Any, dict[str, Tensor]]:
    """outs[name] [..., m, n] becomes L + prune(H) of the matrices of sources[name]. It is contiguous, and may be
    sources[name]; where all of H is kept, it is not written.

    Returns for each tensor {"rank": int64 [...], "energy": float64 [...], "residual": float64 [...]}. `progress` is
    called with (matrices done, matrices in all). A NaN or an infinite entry is a ValueError that names the tensor by
    labels[name], raised before anything is written.
    """
    totals = _sums_of_squares(sources, labels)
    found: Found = {name: [] for name in sources}
    layouts = {name: Layout.of(t) for name, t in sources.items() if t.numel()}
    done, total = 0, sum(layout.matrices for layout in layouts.values())
    small = _denoise_small(small_batches(layouts, rule), sources, outs, rule, found)
    large = _denoise_large(large_groups(layouts, rule), sources, outs, totals, rule, found)
    steps = itertools.chain(small, large)
    for count in steps:
        if progress is not None:
            progress(done, total)
        done += count
    if progress is not None:
        progress(done, total)
    return {name: _information(t, found[name], rule) for name, t in sources.items()}


def _denoise_small(
    batches: Iterable[list[Part]], sources: Mapping[Any, Tensor], outs: Mapping[Any, Tensor], rule: Rule, found: Found
) -> Iterator[int]:
    """`denoise` of tensors of small matrices. Yields, before each batch, how many matrices it has."""
    for batch in batches:
        yield sum(part.stop - part.start for part in batch)
        _, dtype, device = Layout.of(sources[batch[0].name])
        m, n = sources[batch[0].name].shape[-2:]
        with full_precision(device.type):
            parts = [(sources[x.name].reshape(-1, m, n), outs[x.name].view(-1, m, n), slice(*x[1:])) for x in batch]
            matrices = [w[some].to(compute_dtype(dtype)) for w, _, some in parts]
            targets = [out[some] for _, out, some in parts]
            results = [_result_for(w, out, rule) for w, out in zip(matrices, targets)]
            numbers = denoise_by_svd(matrices, results, rule)
            counts = [len(w) for w in matrices]
            for part, out, result, *parts in zip(batch, targets, results, *(x.split(counts) for x in numbers)):
                if result is not out and not rule.keeps_all:
                    out.copy_(result)
                found[part.name].append(parts)


def _result_for(w: Tensor, out: Tensor, rule: Rule) -> Tensor:
    """Where the result is computed: `out`, or new memory if the dtype differs or the result is not kept."""
    return torch.empty_like(w) if rule.keeps_all or out.dtype != w.dtype else out


def _denoise_large(
    groups: Iterable[Group],
    sources: Mapping[Any, Tensor],
    outs: Mapping[Any, Tensor],
    totals: Mapping[Any, list[float]],
    rule: Rule,
    found: Found,
) -> Iterator[int]:
    """`denoise` of the other tensors. Yields, before each batch, how many matrices it has."""
    for matrices, first, _, count in groups:
        group: list[_Matrix] = []
        for name, run in itertools.groupby(matrices, key=lambda x: x[0]):
            m, n = sources[name].shape[-2:]
            parts = zip(run, sources[name].reshape(-1, m, n), outs[name].view(-1, m, n), totals[name])
            group += [_Matrix(*part[1:], name) for part in parts]
        compute = compute_dtype(first.dtype)
        test_matrix = test_matrix_of(first, rule)
        # Matrices in another dtype, and results that are not kept, need additional memory.
        is_copied = first.dtype != compute or rule.keeps_all
        many = count if is_copied else max(1, _MATRICES_PER_CALL // count) * count
        for start in range(0, len(group), many):
            batch = group[start : start + many]
            yield len(batch)
            with full_precision(first.device.type):
                numbers = _denoise_batch(batch, count, compute, rule, test_matrix)
            end = 0
            for name, run in itertools.groupby(w.name for w in batch):
                begin, end = end, end + len(list(run))
                found[name].append([x[begin:end] for x in numbers])


def _denoise_batch(
    batch: list[_Matrix], count: int, dtype: torch.dtype, rule: Rule, test_matrix: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rank, energy and residual of the matrices of a batch, computed `count` at a time."""
    sources, outs, scales, totals = [], [], [], []
    for w in batch:
        source, scale, total = w.source.to(dtype), 1.0, w.total
        # Outside these limits the squares of the Gram matrix's entries leave the range of float32.
        if not 1e-18 * source.numel() < total < 1e18:
            scale = float(power_of_two_scale(torch.linalg.vector_norm(source, math.inf), dtype))
            source = source * scale
            total = float(sums_of_squares(source))
        source = source.contiguous()
        # Tensors of torch.func's transforms have no address.
        is_misaligned = has_memory(source) and source.data_ptr() % _ALIGNMENT != 0
        sources.append(source.clone() if is_misaligned else source)
        outs.append(_result_for(sources[-1], w.out, rule))
        scales.append(scale)
        totals.append(total)
    sums = torch.tensor(totals, dtype=torch.float64, device=sources[0].device)
    count = min(count, len(sources))
    n, m = sorted(sources[0].shape)
    # Allocated once: the first use of new memory costs more than copying a matrix into it.
    rows = n if test_matrix is None else m if products.uses_split_products(sources[0]) else 0
    workspace = torch.empty(count, rows, n, dtype=dtype, device=sums.device)
    found = []
    for first in range(0, len(sources), count):
        some = slice(first, first + count)
        if test_matrix is None:
            found.append(denoise_by_gram(sources[some], outs[some], workspace, rule))
        else:
            found.append(denoise_by_subspace(sources[some], outs[some], workspace, sums[some], rule, test_matrix))
    ranks, captured, lost = (torch.cat(x) for x in zip(*found))
    for w, out, scale in zip(batch, outs, scales):
        if scale != 1:
            out /= scale
        if out is not w.out and not rule.keeps_all:
            w.out.copy_(out)
    whole = torch.where(sums > 0, sums, 1.0)
    energy = torch.where(sums > 0, captured / whole, 1.0).clamp(max=1.0)
    return ranks, energy, (lost / whole).clamp(min=0.0).sqrt()


def _sums_of_squares(sources: Mapping[Any, Tensor], labels: Mapping[Any, str]) -> dict[Any, list[float]]:
    """Of each matrix [m, n] of the tensors, which must be finite."""
    sums = {name: sums_of_squares(t.to(compute_dtype(t.dtype))).view(-1) for name, t in sources.items()}
    on_device: dict[torch.device, list[Any]] = {}
    for name, x in sums.items():
        on_device.setdefault(x.device, []).append(name)
    found: dict[Any, list[float]] = {}
    for names in on_device.values():  # the host waits once for each device
        numbers = iter(torch.cat([sums[n] for n in names]).tolist())
        found |= {n: list(itertools.islice(numbers, len(sums[n]))) for n in names}
    for name, totals in found.items():
        if not all(map(math.isfinite, totals)):
            check_finite(sources[name], labels[name])  # raises nothing where only the squares are infinite
    return found


def _information(tensor: Tensor, found: list[Sequence[Tensor]], rule: Rule) -> dict[str, Tensor]:
    batch, device = tensor.shape[:-2], tensor.device
    if found:
        rank, energy, residual = (torch.cat(x).view(batch) if len(x) > 1 else x[0].view(batch) for x in zip(*found))
    else:  # empty matrices
        rank = torch.zeros(batch, dtype=torch.int64, device=device)
        energy, residual = (torch.full(batch, x, dtype=torch.float64, device=device) for x in (1.0, 0.0))
    return {"rank": rank, "energy": energy, "residual": torch.zeros_like(residual) if rule.keeps_all else residual}
