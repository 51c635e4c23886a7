"""Denoising of many matrices: those of one shape and dtype are worked on together, in batches that fit a memory limit."""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.denoise.svd import svd_denoise_
from deftx_kernels.validation import check_finite, check_int, is_number

GAVISH_DONOHO = "gavish-donoho"
_AT_A_TIME = 16  # matrices for each call of the operator, and of `progress`


class Rule(NamedTuple):
    """What `svd_denoise` was asked for, checked."""

    rank: int | str | None
    energy: float | None
    residual_density: float
    oversample: int = 16
    n_iter: int = 2
    generator: torch.Generator | None = None
    batch_bytes: int | None = None


def check_rule(
    rank: int | str | None,
    energy: float | None,
    residual_density: float,
    oversample: int = 16,
    n_iter: int = 2,
    generator: torch.Generator | None = None,
    batch_bytes: int | None = None,
) -> Rule:
    if (rank is None) == (energy is None):
        raise ValueError(f"exactly one of rank and energy is needed, got rank={rank}, energy={energy}")
    if isinstance(rank, str):
        if rank != GAVISH_DONOHO:
            raise ValueError(f"rank must be an int or {GAVISH_DONOHO!r}, got {rank!r}")
    elif rank is not None:
        check_int(rank, "rank", 1)
    if energy is not None and not (is_number(energy) and 0 < energy <= 1):
        raise ValueError(f"energy must be in (0, 1], got {energy}")
    if not (is_number(residual_density) and 0 <= residual_density <= 1):
        raise ValueError(f"residual_density must be in [0, 1], got {residual_density}")
    check_int(oversample, "oversample", 0)
    check_int(n_iter, "n_iter", 0)
    if batch_bytes is not None:
        check_int(batch_bytes, "batch_bytes", 1)
    return Rule(rank, energy, float(residual_density), oversample, n_iter, generator, batch_bytes)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """outs[name] [..., m, n] becomes L + prune(H) of the matrices of sources[name]; it is contiguous, and may be
    sources[name].

    Returns of each tensor {"rank": int64 [...], "energy": float64 [...], "residual": float64 [...]}. `progress` is
    called with (matrices done, matrices in all). Where all of H is kept, nothing is written. A NaN or an infinite entry
    is an error, raised before anything is written, that names the tensor by labels[name].
    """
    totals = _totals(sources, labels)
    # rank, energy, residual of a tensor's next matrices
    found: dict[Any, list[Sequence[Tensor]]] = {n: [] for n in sources}
    small = {name: t for name, t in sources.items() if t.numel() and _is_small(t.shape)}
    done, total = 0, sum(math.prod(t.shape[:-2]) for t in sources.values() if t.numel())
    for count in _denoise_small(small, outs, rule, found):
        if progress is not None:
            progress(done, total)
        done += count
    groups: dict[tuple, list[_Matrix]] = {}  # by shape (with an energy: by its short side), dtype and device
    for name, t in sources.items():
        if t.numel() and name not in small:
            m, n = t.shape[-2:]
            # A GPU decomposes the Gram matrices of all layers at once: one after the other they would keep it idle.
            kind = t.shape[-2:] if rule.energy is None else min(m, n)
            group = groups.setdefault((kind, t.dtype, t.device), [])
            parts = zip(t.reshape(-1, m, n), outs[name].view(-1, m, n), totals[name])
            group += [_Matrix(source, out, total, name) for source, out, total in parts]
    for (_, dtype, device), group in groups.items():
        group.sort(key=lambda w: w.source.shape)  # stable: a tensor's matrices stay in order
        shape, compute = group[0].source.shape, compute_dtype(dtype)
        rank, energy, median = _arguments(rule, shape)
        # In float64 a Gram matrix would lose what is below 1e-8 of the largest singular value.
        sketch = rank and not (compute == torch.float32 and _is_large(rank, shape))
        test_matrix = (
            random_test_matrix(shape, rank, rule.oversample, rule.generator, compute, device) if sketch else None
        )
        count = _batch(shape, compute, device, test_matrix, rule.batch_bytes)
        # Matrices in another dtype, and results that nobody keeps, take memory of their own.
        many = count if dtype != compute or rule.residual_density == 1 else max(1, _AT_A_TIME // count) * count
        for first in range(0, len(group), many):
            if progress is not None:
                progress(done, total)
            batch = group[first : first + many]
            results = _denoise_batch(batch, count, compute, rule, rank, energy, median, test_matrix)
            for name, (start, end) in _runs([w.name for w in batch]):
                found[name].append([x[start:end] for x in results])
            done += len(batch)
    if progress is not None:
        progress(done, total)
    return {name: _information(t, found[name], rule) for name, t in sources.items()}


_SMALL = 32  # the short side of small matrices
_SMALL_BATCH = 1 << 20  # entries of those that are worked on together


def _is_small(shape: torch.Size) -> bool:
    """Whether calls for each matrix would take longer than a singular value decomposition of a batch."""
    m, n = shape[-2:]
    return min(m, n) <= _SMALL and m * n <= 1 << 16


def _denoise_small(
    sources: Mapping[Any, Tensor], outs: Mapping[Any, Tensor], rule: Rule, found: dict[Any, list[Sequence[Tensor]]]
) -> Iterator[int]:
    """`denoise` of tensors of small matrices, those of one shape together. Yields how many matrices come next."""
    groups: dict[tuple, list[tuple[Any, Tensor, Tensor]]] = {}
    for name, t in sources.items():
        m, n = t.shape[-2:]
        at_a_time = max(1, (_SMALL_BATCH if rule.batch_bytes is None else rule.batch_bytes // 64) // (m * n))
        parts = zip(t.reshape(-1, m, n).split(at_a_time), outs[name].view(-1, m, n).split(at_a_time))
        groups.setdefault((m, n, t.dtype, t.device, at_a_time), []).extend((name, *part) for part in parts)
    for (m, n, dtype, device, at_a_time), group in groups.items():
        rank, energy, median = _arguments(rule, torch.Size((m, n)))
        group.reverse()  # taken from the end
        while group:
            batch: list[tuple[Any, Tensor, Tensor]] = []
            count = 0
            while group and (not batch or count + len(group[-1][1]) <= at_a_time):
                batch.append(group.pop())
                count += len(batch[-1][1])
            yield count
            matrices = [w.to(compute_dtype(dtype)) for _, w, _ in batch]
            all_kept = rule.residual_density == 1  # then the information alone is wanted
            results = [
                torch.empty_like(w) if all_kept or o.dtype != w.dtype else o for w, (_, _, o) in zip(matrices, batch)
            ]
            totals = torch.zeros(count, dtype=torch.float64, device=device)
            density = 0.0 if all_kept else rule.residual_density
            numbers = svd_denoise_(matrices, results, totals, rank, energy, median, density, rule.n_iter, None, 1)
            counts = [len(w) for w in matrices]
            for (name, _, out), result, *parts in zip(batch, results, *(x.split(counts) for x in numbers)):
                if result is not out and not all_kept:
                    out.copy_(result)
                found[name].append(parts)


def _runs(names: list[Any]) -> list[tuple[Any, tuple[int, int]]]:
    """(name, (where a run of equal names begins, and where it ends))."""
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    return [(names[start], (start, end)) for start, end in zip(starts, [*starts[1:], len(names)])]


def _denoise_batch(
    batch: list[_Matrix],
    count: int,
    dtype: torch.dtype,
    rule: Rule,
    rank: int,
    energy: float,
    median: float,
    test_matrix: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    all_kept = rule.residual_density == 1  # then L + H is the matrix itself, and only the information is wanted
    sources, outs, scales, totals = [], [], [], []
    for w in batch:
        source, scale, total = w.source.to(dtype), 1.0, w.total
        # Beyond, the squares of the Gram matrix's entries leave the range of float32.
        if not 1e-18 * source.numel() < total < 1e18:
            source, scale, total = _rescaled(source)
        sources.append(source.contiguous())
        outs.append(torch.empty_like(sources[-1]) if all_kept or w.out.dtype != dtype else w.out)
        scales.append(scale)
        totals.append(total)
    sums = torch.tensor(totals, dtype=torch.float64, device=sources[0].device)
    density = 0.0 if all_kept else rule.residual_density
    found = svd_denoise_(sources, outs, sums, rank, energy, median, density, rule.n_iter, test_matrix, count)
    for w, out, scale in zip(batch, outs, scales):
        if scale != 1:
            out /= scale
        if out is not w.out and not all_kept:
            w.out.copy_(out)
    return found


def _totals(sources: Mapping[Any, Tensor], labels: Mapping[Any, str]) -> dict[Any, list[float]]:
    """The sum of squares of each matrix [m, n] of the tensors: float32 sums of rows, added up in float64."""
    sums = {}
    for name, t in sources.items():
        work = t.to(compute_dtype(t.dtype))
        sums[name] = torch.linalg.vector_norm(work, dim=-1).to(torch.float64).square().sum(-1).view(-1)
    on_device: dict[torch.device, list[Any]] = {}
    for name, x in sums.items():
        on_device.setdefault(x.device, []).append(name)
    found: dict[Any, list[float]] = {}
    for names in on_device.values():  # the host waits once for each device
        each = iter(torch.cat([sums[n] for n in names]).tolist())
        found |= {n: list(itertools.islice(each, len(sums[n]))) for n in names}
    for name, numbers in found.items():
        if not all(map(math.isfinite, numbers)):
            check_finite(sources[name], labels[name])  # or only the squares are not
    return found


def _rescaled(w: Tensor) -> tuple[Tensor, float, float]:
    """w times a power of 2 that brings its largest entry near 1, that power, and the sum of squares of the product."""
    largest = float(w.abs().amax())
    if largest == 0:
        return w, 1.0, 0.0
    limit = 1000 if w.dtype == torch.float64 else 120  # the power is a number of the dtype
    power = 2.0 ** max(-limit, min(limit, -math.frexp(largest)[1]))
    scaled = w * power
    return scaled, power, float(torch.linalg.vector_norm(scaled, dim=-1).to(torch.float64).square().sum())


def _information(tensor: Tensor, found: list[Sequence[Tensor]], rule: Rule) -> dict[str, Tensor]:
    """What `denoise` returns of a tensor, from its matrices' rank, energy and residual."""
    batch, device = tensor.shape[:-2], tensor.device
    if found:
        rank, energy, residual = (torch.cat(x).view(batch) if len(x) > 1 else x[0].view(batch) for x in zip(*found))
    else:  # empty matrices
        rank = torch.zeros(batch, dtype=torch.int64, device=device)
        energy, residual = (torch.full(batch, x, dtype=torch.float64, device=device) for x in (1.0, 0.0))
    return {
        "rank": rank,
        "energy": energy,
        "residual": torch.zeros_like(residual) if rule.residual_density == 1 else residual,
    }


def _arguments(rule: Rule, shape: torch.Size) -> tuple[int, float, float]:
    """rank, energy and median of the operator."""
    if rule.rank == GAVISH_DONOHO:
        return 0, 0.0, gavish_donoho_multiple(*shape)
    return (0, float(rule.energy or 0), 0.0) if rule.rank is None else (min(int(rule.rank), *shape), 0.0, 0.0)


def _batch(
    shape: torch.Size, dtype: torch.dtype, device: torch.device, test_matrix: Tensor | None, limit: int | None
) -> int:
    """How many matrices are worked on at a time."""
    m, n = max(shape), min(shape)
    # Of each matrix: its products with the test matrix; or its Gram matrix, eigenvectors and LAPACK's workspace.
    # On CUDA: two bfloat16 parts, as large as itself, and copies of those that take more iterations than the rest; or
    # two copies of its Gram matrix, what becomes its projector, a power of that, and three operands of products, 1.5
    # times as large each.
    cuda = device.type == "cuda"
    if test_matrix is None:
        elements = (9 if cuda else 6) * n * n
    else:
        elements = (2 * m * n if cuda else 0) + 4 * (m + n) * test_matrix.shape[1]
    if limit is None and cuda:
        limit = torch.cuda.mem_get_info(device)[0] // 4
    elif (
        limit is None
    ):  # 8 or 16 MiB a thread: larger batches take longer to page in than they save (measured, 2 threads)
        threads = torch.get_num_threads()
        count = (threads << (24 if test_matrix is None else 23)) // (elements * dtype.itemsize)
        return max(1, count // threads * threads if count > threads else count)  # as many matrices for each of them
    return max(1, limit // (elements * dtype.itemsize))


def _is_large(rank: int, shape: Sequence[int]) -> bool:
    """Whether the exact truncation takes no longer than subspace iteration (measured: noise and power laws, 384 to 1024
    columns, square and four times as tall, one and two cores of an AMD EPYC)."""
    short = min(shape)
    return rank * (6 if short <= 512 or max(shape) >= 4 * short else 4) >= short


def random_test_matrix(
    shape: Sequence[int],
    rank: int,
    oversample: int,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """Gaussian [min(m, n), rank + oversample], or None where the decomposition of the whole is the better way."""
    short, columns = min(shape[-2:]), rank + oversample
    if 2 * columns >= short:
        return None
    if generator is None:
        generator = torch.Generator(device=device).manual_seed(0)
    return torch.randn(short, columns, dtype=dtype, device=generator.device, generator=generator).to(device)


# ---- Gavish and Donoho's rank ----
@functools.cache
def gavish_donoho_multiple(m: int, n: int) -> float:
    """The optimal hard threshold for singular values of noise of unknown level, in units of their median (2014, eqs. 11
    and 4).
    """
    beta = min(m, n) / max(m, n)
    threshold = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
    # Their mu_beta is the median of the law of squared singular values, so its root stands beside a median of singular
    # values.
    return threshold / math.sqrt(_marchenko_pastur_median(beta))


def _marchenko_pastur_median(beta: float) -> float:
    """The median of the Marchenko-Pastur law of aspect ratio beta, from its distribution function."""
    lower, upper = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # t = lower + (upper - lower) sin^2(u) takes the square-root ends out of the integrand.
    u = torch.linspace(0, math.pi / 2, 20_001, dtype=torch.float64, device="cpu")  # whatever the default device
    s2, c2 = torch.sin(u) ** 2, torch.cos(u) ** 2
    t = lower + (upper - lower) * s2
    density = (upper - lower) ** 2 * s2 * c2 / (math.pi * beta * t)
    density[0] = density[1] if lower == 0 else density[0]
    mass = torch.cumulative_trapezoid(density, u)
    return float(t[1:][torch.searchsorted(mass, mass[-1] / 2)])
