"""Denoising of many matrices: those of one shape and dtype together, in batches that fit a memory limit.

On the CPU the bits of a result do not depend on the other matrices. On a GPU products of batches may round otherwise
for other numbers of matrices.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.denoise import products
from deftx_kernels.denoise.gram import denoise_by_gram
from deftx_kernels.denoise.matrices import power_of_two_scale, sums_of_squares
from deftx_kernels.denoise.products import full_precision
from deftx_kernels.denoise.rule import Rule
from deftx_kernels.denoise.small import denoise_by_svd
from deftx_kernels.denoise.subspace import denoise_by_subspace
from deftx_kernels.ops.schemas import compute_dtype
from deftx_kernels.validation import check_finite

_MATRICES_PER_CALL = 16  # matrices between two calls of `progress`, at least
_SMALL_SIDE, _SMALL_MATRIX = 32, 1 << 16  # the short side and the entries of a small matrix at most
_SMALL_BATCH = 1 << 20  # entries of the small matrices of one batch

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
    matrices = {name: t for name, t in sources.items() if t.numel()}
    # Of small matrices, calls for each one would take longer than a batched singular value decomposition.
    small = {name: t for name, t in matrices.items() if _is_small(t.shape)}
    large = {name: t for name, t in matrices.items() if name not in small}
    done, total = 0, sum(math.prod(t.shape[:-2]) for t in matrices.values())
    steps = itertools.chain(_denoise_small(small, outs, rule, found), _denoise_large(large, outs, totals, rule, found))
    for count in steps:
        if progress is not None:
            progress(done, total)
        done += count
    if progress is not None:
        progress(done, total)
    return {name: _information(t, found[name], rule) for name, t in sources.items()}


def _denoise_small(
    sources: Mapping[Any, Tensor], outs: Mapping[Any, Tensor], rule: Rule, found: Found
) -> Iterator[int]:
    """`denoise` of tensors of small matrices. Yields, before each batch, how many matrices it has."""
    groups: dict[tuple, list[tuple[Any, Tensor, Tensor]]] = {}
    for name, t in sources.items():
        m, n = t.shape[-2:]
        most = max(1, (_SMALL_BATCH if rule.batch_bytes is None else rule.batch_bytes // 64) // (m * n))
        parts = zip(t.reshape(-1, m, n).split(most), outs[name].view(-1, m, n).split(most))
        groups.setdefault((m, n, t.dtype, t.device, most), []).extend((name, *part) for part in parts)
    for (_, _, dtype, device, most), group in groups.items():
        group.reverse()  # taken from the end
        while group:
            batch: list[tuple[Any, Tensor, Tensor]] = []
            count = 0
            while group and (not batch or count + len(group[-1][1]) <= most):
                batch.append(group.pop())
                count += len(batch[-1][1])
            yield count
            with full_precision(device.type):
                matrices = [w.to(compute_dtype(dtype)) for _, w, _ in batch]
                results = [_result_for(w, out, rule) for w, (_, _, out) in zip(matrices, batch)]
                numbers = denoise_by_svd(matrices, results, rule)
                counts = [len(w) for w in matrices]
                for (name, _, out), result, *parts in zip(batch, results, *(x.split(counts) for x in numbers)):
                    if result is not out and not rule.keeps_all:
                        out.copy_(result)
                    found[name].append(parts)


def _result_for(w: Tensor, out: Tensor, rule: Rule) -> Tensor:
    """Where the result is computed: `out`, or new memory if the dtype differs or the result is not kept."""
    return torch.empty_like(w) if rule.keeps_all or out.dtype != w.dtype else out


def _denoise_large(
    sources: Mapping[Any, Tensor],
    outs: Mapping[Any, Tensor],
    totals: Mapping[Any, list[float]],
    rule: Rule,
    found: Found,
) -> Iterator[int]:
    """`denoise` of the other tensors. Yields, before each batch, how many matrices it has."""
    groups: dict[tuple, list[_Matrix]] = {}  # by shape (with an energy: by its short side), dtype and device
    for name, t in sources.items():
        m, n = t.shape[-2:]
        # A GPU decomposes the Gram matrices of all layers at once: one after the other would leave it mostly idle.
        size = (m, n) if rule.energy is None else min(m, n)
        parts = zip(t.reshape(-1, m, n), outs[name].view(-1, m, n), totals[name])
        group = groups.setdefault((size, t.dtype, t.device), [])
        group += [_Matrix(source, out, total, name) for source, out, total in parts]
    for (_, dtype, device), group in groups.items():
        group.sort(key=lambda w: w.source.shape)  # stable: a tensor's matrices stay in order
        shape, compute = group[0].source.shape, compute_dtype(dtype)
        test_matrix = _test_matrix(rule, shape, dtype, device)
        count = _batch_size(shape, compute, device, test_matrix, rule.batch_bytes)
        # Matrices in another dtype, and results that are not kept, need additional memory.
        many = count if dtype != compute or rule.keeps_all else max(1, _MATRICES_PER_CALL // count) * count
        for first in range(0, len(group), many):
            batch = group[first : first + many]
            yield len(batch)
            with full_precision(device.type):
                numbers = _denoise_batch(batch, count, compute, rule, test_matrix)
            end = 0
            for name, run in itertools.groupby(w.name for w in batch):
                start, end = end, end + len(list(run))
                found[name].append([x[start:end] for x in numbers])


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
        sources.append(source.contiguous())
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


def _batch_size(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, test_matrix: Tensor | None, limit: int | None
) -> int:
    m, n = max(shape), min(shape)
    # Memory per matrix: its products with the test matrix; or its Gram matrix, eigenvectors and LAPACK's workspace.
    # On CUDA: two bfloat16 parts, together as large as the matrix, and copies of the matrices that take more iterations
    # than the rest; or two copies of its Gram matrix, the projector, a power of it, and three operands of products,
    # each 1.5 times as large.
    cuda = device.type == "cuda"
    if test_matrix is None:
        size = (9 if cuda else 6) * n * n * dtype.itemsize
    else:
        size = ((2 * m * n if cuda else 0) + 4 * (m + n) * test_matrix.shape[1]) * dtype.itemsize
    if limit is None and cuda:
        # What torch keeps but does not use is free: else batches, and with them the last bits, would depend on history.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = (torch.cuda.mem_get_info(device)[0] + cached) // 4
    if limit is not None:
        return max(1, limit // size)
    # 8 or 16 MiB per thread: larger batches take longer to page in than they save (measured with 2 threads).
    threads = torch.get_num_threads()
    count = (threads << (24 if test_matrix is None else 23)) // size
    return max(1, count // threads * threads if count > threads else count)  # as many matrices for each thread


def _is_small(shape: torch.Size) -> bool:
    n, m = sorted(shape[-2:])
    return n <= _SMALL_SIDE and m * n <= _SMALL_MATRIX


def _is_approximated(rule: Rule, shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether a matrix that is not small takes subspace iteration, where the test matrix is narrow enough."""
    rank = rule.fixed_rank(shape)
    # In float64 a Gram matrix would lose what is below 1e-8 of the largest singular value.
    return rank is not None and (dtype == torch.float64 or not _exact_is_as_fast(rank, shape))


def _test_matrix(rule: Rule, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """Of matrices that are not small; None where they are decomposed exactly."""
    if not _is_approximated(rule, shape, compute_dtype(dtype)):
        return None
    if rule.drawn is not None:
        return rule.drawn[shape, dtype, device]
    return rule.test_matrix(shape, compute_dtype(dtype), device)


def _exact_is_as_fast(rank: int, shape: Sequence[int]) -> bool:
    """Whether the exact truncation takes no longer than subspace iteration (measured: noise and power laws, 384 to 1024
    columns, square and four times as tall, one and two cores of an AMD EPYC).
    """
    short = min(shape)
    return rank * (6 if short <= 512 or max(shape) >= 4 * short else 4) >= short


# ---- for calls with some of the tensors each ----
def with_drawn_matrices(rule: Rule, tensors: Iterable[tuple[torch.Size, torch.dtype, torch.device]]) -> Rule:
    """The rule with the test matrices that one call of `denoise` with tensors of these shapes, dtypes and devices would
    draw from its generator: calls with some of the tensors each then give the results of that one.
    """
    if rule.generator is None:
        return rule
    drawn: dict[tuple, Tensor | None] = {}
    for shape, dtype, device in tensors:
        key = shape[-2:], dtype, device
        if len(shape) >= 2 and shape.numel() and not _is_small(shape) and key not in drawn:
            drawn[key] = _test_matrix(rule, *key)
    return rule._replace(drawn=drawn)


def work(shape: torch.Size, dtype: torch.dtype, rule: Rule) -> float:
    """An estimate of the time to denoise a tensor [..., m, n], in multiplications of the product of a Gram matrix.

    The factors are from matrices of 128 to 1536 columns, square to fifteen times as tall, on one core of an AMD EPYC.
    Unknown: how many iterations the values need, and which matrices need float64.
    """
    n, m = sorted(shape[-2:])
    columns = (rule.fixed_rank(shape[-2:]) or 0) + rule.oversample
    is_approximated = not _is_small(shape) and _is_approximated(rule, shape[-2:], compute_dtype(dtype))
    each = m * n * 12.0 * columns if is_approximated and 2 * columns < n else n * n * (m + 2.5 * n)
    return math.prod(shape[:-2]) * (each + 150.0 * m * n)
