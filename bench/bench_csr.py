"""csr_gather, csr_scatter_, csr_add_ against indexing in torch, NumPy and CuPy, and SciPy's sum of a dense and a sparse
matrix.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Case, Choice, Work, imported
from bench.rows import OURS
from bench.shapes import SIZES as SHAPES
from bench.shapes import random_tensors
from deftx_kernels import topk_mask

OPS = {
    "csr_gather": "the masked entries of dense tensors, picked into one compact tensor",
    "csr_scatter_": "a compact tensor written to the masked entries of dense tensors",
    "csr_add_": "a compact tensor added to the masked entries of dense tensors",
}
SIZES = ("tiny", "minilm")
SETTINGS = [(torch.float32, 0.05), (torch.float32, 0.01), (torch.bfloat16, 0.05)]


def works(choice: Choice) -> Iterator[Work]:
    for size in choice.sizes:
        for dtype, density in choice.settings(SETTINGS):
            for op, case in (("csr_gather", gather_case), ("csr_scatter_", scatter_case), ("csr_add_", add_case)):
                made = (partial(case, s, dtype, density, choice.device) for s in (size, "tiny"))
                yield Work(op, size, size, dtype, density, choice.device, *made)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in tensors.items()}


class Problem:
    """Dense tensors, a mask of them and a compact tensor."""

    def __init__(self, size: str, dtype: torch.dtype, density: float, device: str) -> None:
        shapes = SHAPES[size]()
        self.tensors = random_tensors(shapes, dtype, device)
        self.mask = topk_mask(random_tensors(shapes, torch.float32, device, seed=1), density=density)
        self.values = torch.randn(self.mask.nnz, generator=torch.Generator().manual_seed(2)).to(device, dtype)
        self.parts = list(self.mask.split(self.values).values())
        # What the peers index with, made beforehand: int64, flat, for each tensor.
        self.index = [t.view(-1).nonzero().view(-1) for t in self.mask.to_dense().values()]
        self.on_cpu = device == "cpu"

    def bytes(self, dense_accesses: int) -> int:
        mask = self.mask
        index = 8 * len(mask.crow_indices) + mask.col_indices.element_size() * mask.nnz
        return index + (1 + dense_accesses) * self.values.element_size() * mask.nnz

    def each(self, tensors: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(flat tensor, positions, values) of each tensor."""
        return zip((t.view(-1) for t in tensors.values()), self.index, self.parts)

    def in_place(self, write: Callable[[dict[str, Tensor]], object]):
        """A provider that writes to copies of the tensors."""

        def make():
            mine = copies(self.tensors)

            def call() -> dict[str, Tensor]:
                write(mine)
                return mine

            return call

        return make


def cupy_arrays(problem: Problem, tensors: dict[str, Tensor]) -> tuple[Any, list[tuple[Any, Any, Any]]]:
    import cupy

    return cupy, [tuple(map(cupy.from_dlpack, x)) for x in problem.each(tensors)]


def gpu_peer(problem: Problem, name: str, provider) -> tuple[dict[str, Any], dict[str, str]]:
    """({name: provider}, absent) where CuPy can take part: on a GPU, in a dtype that it has."""
    if problem.on_cpu or problem.values.dtype == torch.bfloat16:
        return {}, {}
    module, reason = imported("cupy")
    return ({name: provider}, {}) if module else ({}, {name: reason})


def gather_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    problem = Problem(size, dtype, density, device)
    mask, tensors = problem.mask, problem.tensors
    picked = torch.cat([t[i] for t, i, _ in problem.each(tensors)])

    def cupy_take():
        cupy, arrays = cupy_arrays(problem, tensors)
        return lambda: torch.from_dlpack(cupy.concatenate([a.take(i) for a, i, _ in arrays]))

    providers: dict[str, Callable] = {
        OURS: lambda: lambda: mask.gather(tensors),
        "torch index": lambda: lambda: torch.cat([t[i] for t, i, _ in problem.each(tensors)]),
        "torch.take": lambda: lambda: torch.cat([torch.take(t, i) for t, i, _ in problem.each(tensors)]),
    }
    if problem.on_cpu and dtype == torch.float32:
        import numpy as np

        arrays = [(t.numpy(), i.numpy()) for t, i, _ in problem.each(tensors)]
        providers["numpy.take"] = lambda: lambda: torch.from_numpy(np.concatenate([a.take(i) for a, i in arrays]))
    peers, absent = gpu_peer(problem, "cupy.take", cupy_take)

    def check(result: Tensor) -> str | None:
        return None if torch.equal(result, picked) else "the gathered values differ"

    return Case(problem.bytes(1), providers | peers, check, absent=absent)


def scatter_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    problem = Problem(size, dtype, density, device)
    expected = copies(problem.tensors)
    put(problem, expected, accumulate=False)
    providers = {
        OURS: problem.in_place(lambda mine: problem.mask.scatter_(mine, problem.values)),
        "torch index_put_": problem.in_place(lambda mine: put(problem, mine, accumulate=False)),
        "torch scatter_": problem.in_place(lambda mine: [t.scatter_(0, i, v) for t, i, v in problem.each(mine)]),
    }
    return Case(problem.bytes(1), providers, agreement(expected, 0))


def add_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    problem = Problem(size, dtype, density, device)
    mask, tensors = problem.mask, problem.tensors
    expected = {n: t.double() for n, t in tensors.items()}
    for tensor, i, v in problem.each(expected):
        tensor[i] += v.double()

    def cupy_scatter_add():
        from cupyx import scatter_add

        mine = copies(tensors)
        _, arrays = cupy_arrays(problem, mine)

        def call() -> dict[str, Tensor]:
            for array, i, v in arrays:
                scatter_add(array, i, v)
            return mine

        return call

    providers: dict[str, Callable] = {
        OURS: problem.in_place(lambda mine: mask.add_(mine, problem.values)),
        "torch index_put_": problem.in_place(lambda mine: put(problem, mine, accumulate=True)),
        "torch index_add_": problem.in_place(lambda mine: [t.index_add_(0, i, v) for t, i, v in problem.each(mine)]),
    }
    if problem.on_cpu and dtype == torch.float32:
        import scipy.sparse

        sparse = {
            n: scipy.sparse.csr_array(_csr(problem, n), shape=mask.sparse_csr(n, problem.values).shape)
            for n in mask.names
        }
        arrays_2d = {n: tensors[n].numpy().reshape(sparse[n].shape) for n in tensors}
        providers["scipy dense + csr"] = lambda: (
            lambda: {n: torch.from_numpy(arrays_2d[n] + sparse[n]).view(tensors[n].shape) for n in tensors}
        )
    peers, absent = gpu_peer(problem, "cupyx.scatter_add", cupy_scatter_add)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, 1e-2)
    return Case(problem.bytes(2), providers | peers, agreement(expected, tolerance), absent=absent)


def put(problem: Problem, tensors: dict[str, Tensor], accumulate: bool) -> None:
    for tensor, i, v in problem.each(tensors):
        tensor.index_put_((i,), v, accumulate=accumulate)


def agreement(expected: dict[str, Tensor], tolerance: float) -> Callable[[dict[str, Tensor]], str | None]:
    def check(result: dict[str, Tensor]) -> str | None:
        for name, tensor in expected.items():
            if not torch.allclose(result[name].double(), tensor.double(), rtol=tolerance, atol=tolerance):
                return f"tensor {name} differs"
        return None

    return check


def _csr(problem: Problem, name: str) -> tuple[Any, Any, Any]:
    matrix = problem.mask.sparse_csr(name, problem.values)
    return matrix.values().numpy(), matrix.col_indices().numpy(), matrix.crow_indices().numpy()
