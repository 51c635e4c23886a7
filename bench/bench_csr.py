"""csr_gather, csr_scatter_, csr_add_ against indexing in torch, NumPy and CuPy, and SciPy's dense + sparse sum."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import Call, Case, Choice, Workload, workload
from bench.rows import OURS
from bench.shapes import copies, random_tensors
from deftx_kernels import topk_mask

OPS = {
    "csr_gather": "the masked entries of dense tensors, gathered into one compact tensor",
    "csr_scatter_": "a compact tensor written to the masked entries of dense tensors",
    "csr_add_": "a compact tensor added to the masked entries of dense tensors",
}
SIZES = ("tiny", "minilm")
SETTINGS = [(torch.float32, 0.05), (torch.float32, 0.01), (torch.bfloat16, 0.05)]


def workloads(choice: Choice) -> Iterator[Workload]:
    for size in choice.sizes:
        for setting in choice.settings(SETTINGS):
            for op, case in (("csr_gather", gather_case), ("csr_scatter_", scatter_case), ("csr_add_", add_case)):
                yield workload(case, op, size, setting, choice.device)


class Problem:
    """Dense tensors, a mask of them and a compact tensor."""

    def __init__(self, size: str, dtype: torch.dtype, density: float, device: str) -> None:
        self.tensors = random_tensors(size, dtype, device)
        self.mask = topk_mask(random_tensors(size, torch.float32, device, seed=1), density=density)
        self.values = torch.randn(self.mask.nnz, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        self.parts = list(self.mask.split(self.values).values())
        # What the baselines index with, made beforehand: int64, flat, for each tensor.
        self.index = [t.view(-1).nonzero().view(-1) for t in self.mask.to_dense().values()]
        self.in_numpy = device == "cpu" and dtype == torch.float32
        self.in_cupy = device != "cpu" and dtype != torch.bfloat16  # a dtype that CuPy has

    def bytes(self, dense_accesses: int) -> int:
        mask = self.mask
        index = 8 * len(mask.crow_indices) + mask.col_indices.element_size() * mask.nnz
        return index + (1 + dense_accesses) * self.values.element_size() * mask.nnz

    def each(self, tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(flat tensor, positions, values) of each tensor."""
        return zip((t.view(-1) for t in tensors.values()), self.index, self.parts)

    def arrays(self, convert: Callable[[Tensor], Any], tensors: dict[str, Tensor]) -> list[tuple[Any, Any, Any]]:
        return [tuple(map(convert, x)) for x in self.each(tensors)]

    def put(self, tensors: dict[str, Tensor], accumulate: bool) -> None:
        for tensor, i, v in self.each(tensors):
            tensor.index_put_((i,), v, accumulate=accumulate)

    def in_place(self, write: Callable[[dict[str, Tensor]], object]) -> Callable[[], Call]:
        """An implementation that writes to copies of the tensors."""

        def make() -> Call:
            mine = copies(self.tensors)

            def call() -> dict[str, Tensor]:
                write(mine)
                return mine

            return call

        return make


def gather_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    problem = Problem(size, dtype, density, device)
    mask, tensors = problem.mask, problem.tensors
    gathered = torch.cat([t[i] for t, i, _ in problem.each(tensors)])

    def numpy_take() -> Call:
        arrays = problem.arrays(Tensor.numpy, tensors)
        return lambda: torch.from_numpy(np.concatenate([a.take(i) for a, i, _ in arrays]))

    def cupy_take() -> Call:
        import cupy

        arrays = problem.arrays(cupy.from_dlpack, tensors)
        return lambda: torch.from_dlpack(cupy.concatenate([a.take(i) for a, i, _ in arrays]))

    def check(result: Tensor) -> str | None:
        return None if torch.equal(result, gathered) else "the gathered values differ"

    implementations: dict[str, Callable] = {
        OURS: lambda: lambda: mask.gather(tensors),
        "torch index": lambda: lambda: torch.cat([t[i] for t, i, _ in problem.each(tensors)]),
        "torch.take": lambda: lambda: torch.cat([torch.take(t, i) for t, i, _ in problem.each(tensors)]),
    }
    implementations |= {"numpy.take": numpy_take} if problem.in_numpy else {}
    implementations |= {"cupy.take": cupy_take} if problem.in_cupy else {}
    return Case(problem.bytes(1), implementations, check)


def scatter_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    problem = Problem(size, dtype, density, device)
    expected = copies(problem.tensors)
    problem.put(expected, accumulate=False)
    implementations = {
        OURS: problem.in_place(lambda mine: problem.mask.scatter_(mine, problem.values)),
        "torch index_put_": problem.in_place(lambda mine: problem.put(mine, accumulate=False)),
        "torch scatter_": problem.in_place(lambda mine: [t.scatter_(0, i, v) for t, i, v in problem.each(mine)]),
    }
    return Case(problem.bytes(1), implementations, checker(expected, 0))


def add_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    problem = Problem(size, dtype, density, device)
    mask, tensors, values = problem.mask, problem.tensors, problem.values
    expected = {n: t.double() for n, t in tensors.items()}
    for tensor, i, v in problem.each(expected):
        tensor[i] += v.double()

    def cupy_scatter_add() -> Call:
        import cupy
        from cupyx import scatter_add

        mine = copies(tensors)
        arrays = problem.arrays(cupy.from_dlpack, mine)

        def call() -> dict[str, Tensor]:
            for array, i, v in arrays:
                scatter_add(array, i, v)
            return mine

        return call

    def scipy_sum() -> Call:
        import scipy.sparse

        matrices = {n: mask.sparse_csr(n, values) for n in mask.names}
        parts = {n: [x.numpy() for x in (m.values(), m.col_indices(), m.crow_indices())] for n, m in matrices.items()}
        sparse = {n: scipy.sparse.csr_array(tuple(parts[n]), shape=m.shape) for n, m in matrices.items()}
        dense = {n: tensors[n].numpy().reshape(sparse[n].shape) for n in tensors}
        return lambda: {n: torch.from_numpy(dense[n] + sparse[n]).view(tensors[n].shape) for n in tensors}

    implementations: dict[str, Callable] = {
        OURS: problem.in_place(lambda mine: mask.add_(mine, values)),
        "torch index_put_": problem.in_place(lambda mine: problem.put(mine, accumulate=True)),
        "torch index_add_": problem.in_place(lambda mine: [t.index_add_(0, i, v) for t, i, v in problem.each(mine)]),
    }
    implementations |= {"scipy dense + csr": scipy_sum} if problem.in_numpy else {}
    implementations |= {"cupyx.scatter_add": cupy_scatter_add} if problem.in_cupy else {}
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, 1e-2)
    return Case(problem.bytes(2), implementations, checker(expected, tolerance))


def checker(expected: dict[str, Tensor], tolerance: float) -> Callable[[dict[str, Tensor]], str | None]:
    def check(result: dict[str, Tensor]) -> str | None:
        for name, tensor in expected.items():
            if not torch.allclose(result[name].double(), tensor.double(), rtol=tolerance, atol=tolerance):
                return f"tensor {name} differs"
        return None

    return check
