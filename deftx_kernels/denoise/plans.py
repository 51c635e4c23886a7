"""Which matrices are computed together, and how much work that is: from the shapes of tensors alone.

The last bits of a product may depend on the other products of its batch, and on where its factors are in memory. So a
matrix has the same bits wherever its whole batch is the same.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.denoise.rule import Rule
from deftx_kernels.ops.schemas import compute_dtype

_SMALL_SIDE, _SMALL_MATRIX = 32, 1 << 16  # the short side and the entries of a small matrix at most
_SMALL_BATCH = 1 << 20  # entries of the small matrices of one batch


class Layout(NamedTuple):
    """Of a tensor [..., m, n]."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "Layout":
        return cls(tensor.shape, tensor.dtype, tensor.device)

    @property
    def matrices(self) -> int:
        return math.prod(self.shape[:-2])

    @property
    def is_small(self) -> bool:
        n, m = sorted(self.shape[-2:])
        return n <= _SMALL_SIDE and m * n <= _SMALL_MATRIX


Layouts = Mapping[Any, Layout]  # by name, of tensors that are not empty


# ---- batches ----
class Part(NamedTuple):
    """Some of the matrices of a tensor."""

    name: Any
    start: int
    stop: int


def small_batches(layouts: Layouts, rule: Rule) -> Iterator[list[Part]]:
    """The batches of the tensors of small matrices: those of one shape, dtype and device, as many as the limit allows.

    Of small matrices, calls for each one would take longer than a batched singular value decomposition.
    """
    groups: dict[Layout, list[Part]] = {}
    for name, layout in layouts.items():
        if layout.is_small:
            most = _most_small(layout, rule)
            group = groups.setdefault(layout._replace(shape=layout.shape[-2:]), [])
            group += [Part(name, i, min(i + most, layout.matrices)) for i in range(0, layout.matrices, most)]
    for layout, group in groups.items():
        most, batch, count = _most_small(layout, rule), list[Part](), 0
        for part in group:
            if batch and count + part.stop - part.start > most:
                yield batch
                batch, count = [], 0
            batch.append(part)
            count += part.stop - part.start
        yield batch


def _most_small(layout: Layout, rule: Rule) -> int:
    entries = _SMALL_BATCH if rule.batch_bytes is None else rule.batch_bytes // 64
    return max(1, entries // math.prod(layout.shape[-2:]))


class Group(NamedTuple):
    """Matrices of one shape (with an energy: of one short side), dtype and device."""

    matrices: list[tuple[Any, int]]  # name of the tensor, index in it
    first: Layout  # of the first matrix
    columns: int | None  # of the test matrix; None: truncated exactly
    size: int  # of a batch: how many consecutive matrices are computed together


def large_groups(layouts: Layouts, rule: Rule) -> Iterator[Group]:
    """The other tensors' matrices, in the order in which they are computed."""
    groups: dict[tuple, list[tuple[Any, Layout]]] = {}
    for name, layout in layouts.items():
        if not layout.is_small:
            m, n = layout.shape[-2:]
            # A GPU decomposes the Gram matrices of all layers at once: one after the other would leave it mostly idle.
            size = (m, n) if rule.energy is None else min(m, n)
            groups.setdefault((size, layout.dtype, layout.device), []).append((name, layout))
    for group in groups.values():
        group.sort(key=lambda x: x[1].shape[-2:])  # stable
        first = group[0][1]._replace(shape=group[0][1].shape[-2:])
        columns = width_of_test_matrix(first, rule)
        matrices = [(name, i) for name, layout in group for i in range(layout.matrices)]
        yield Group(matrices, first, columns, batch_size(first, columns, rule.batch_bytes))


def width_of_test_matrix(layout: Layout, rule: Rule) -> int | None:
    """How many columns the test matrix of matrices that are not small has; None where they are truncated exactly."""
    shape = layout.shape[-2:]
    rank = rule.fixed_rank(shape)
    # In float64 a Gram matrix would lose what is below 1e-8 of the largest singular value.
    if rank is None or (compute_dtype(layout.dtype) != torch.float64 and _exact_is_as_fast(rank, shape)):
        return None
    return rule.test_columns(shape)


def _exact_is_as_fast(rank: int, shape: Sequence[int]) -> bool:
    """Whether the exact truncation takes no longer than subspace iteration (measured: noise and power laws, 384 to 1024
    columns, square and four times as tall, one and two cores of an AMD EPYC).
    """
    short = min(shape)
    return rank * (6 if short <= 512 or max(shape) >= 4 * short else 4) >= short


def batch_size(layout: Layout, columns: int | None, limit: int | None) -> int:
    """How many matrices [m, n] are computed together."""
    (n, m), dtype, device = sorted(layout.shape), compute_dtype(layout.dtype), layout.device
    # Memory per matrix: its products with the test matrix; or its Gram matrix, eigenvectors and LAPACK's workspace.
    # On CUDA: two bfloat16 parts, together as large as the matrix, and copies of the matrices that take more iterations
    # than the rest; or two copies of its Gram matrix, the projector, a power of it, and three operands of products,
    # each 1.5 times as large.
    cuda = device.type == "cuda"
    if columns is None:
        size = (9 if cuda else 6) * n * n * dtype.itemsize
    else:
        size = ((2 * m * n if cuda else 0) + 4 * (m + n) * columns) * dtype.itemsize
    if limit is None and cuda:
        # What torch keeps but does not use is free: else batches, and with them the last bits, would depend on history.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = (torch.cuda.mem_get_info(device)[0] + cached) // 4
    if limit is not None:
        return max(1, limit // size)
    # 8 or 16 MiB per thread: larger batches take longer to page in than they save (measured with 2 threads).
    threads = torch.get_num_threads()
    count = (threads << (24 if columns is None else 23)) // size
    return max(1, count // threads * threads if count > threads else count)  # as many matrices for each thread


# ---- tensors divided among several calls, or among the ranks of a process group ----
def together(layouts: Layouts, rule: Rule) -> list[list[Any]]:
    """The names in lists: `denoise` of the tensors of one list gives the bits of `denoise` of them all.

    On a GPU each tensor is a list, since a batch may hold all matrices of a model: there the last bits may differ.
    """
    found: list[list[Any]] = []
    batches = [[part.name for part in batch] for batch in small_batches(layouts, rule)]
    for group in large_groups(layouts, rule):
        starts = range(0, len(group.matrices), group.size)
        batches += [[name for name, _ in group.matrices[i : i + group.size]] for i in starts]
    for batch in batches:
        names = list(dict.fromkeys(batch))
        if found and found[-1][-1] == names[0]:  # the batch before has other matrices of this tensor
            found[-1] += names[1:]
        else:
            found.append(names)
    on_cpu = [names for names in found if layouts[names[0]].device.type == "cpu"]
    return on_cpu + [[name] for name, layout in layouts.items() if layout.device.type != "cpu"]


def with_drawn_matrices(rule: Rule, layouts: Iterable[Layout]) -> Rule:
    """The rule with the test matrices that one call of `denoise` for all tensors would draw from its generator."""
    if rule.generator is None:
        return rule
    drawn: dict[Layout, Tensor | None] = {}
    for layout in layouts:
        key = layout._replace(shape=layout.shape[-2:])
        if not layout.is_small and key not in drawn:
            drawn[key] = test_matrix_of(key, rule)
    return rule._replace(drawn=drawn)


def test_matrix_of(layout: Layout, rule: Rule) -> Tensor | None:
    """Of matrices [m, n] that are not small; None where they are truncated exactly."""
    if rule.drawn is not None:
        return rule.drawn[layout]
    if width_of_test_matrix(layout, rule) is None:
        return None
    return rule.test_matrix(layout.shape, compute_dtype(layout.dtype), layout.device)


def work(layout: Layout, rule: Rule) -> float:
    """An estimate of the time to denoise a tensor, in multiplications of the product of a Gram matrix.

    The factors are from matrices of 128 to 1536 columns, square to fifteen times as tall, on one core of an AMD EPYC.
    Unknown: how many iterations the values need, and which matrices need float64.
    """
    n, m = sorted(layout.shape[-2:])
    columns = None if layout.is_small else width_of_test_matrix(layout, rule)
    each = n * n * (m + 2.5 * n) if columns is None else 12.0 * m * n * columns
    return layout.matrices * (each + 150.0 * m * n)
