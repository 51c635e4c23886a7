"""csr_gather, csr_scatter_, csr_add_ against indexing in torch and NumPy, and SciPy's sum of a dense and a sparse matrix."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bench.harness import OURS, Case
from bench.shapes import SIZES as SHAPES
from bench.shapes import random_tensors
from deftx_kernels import CSRMask, topk_mask

SIZES = ("tiny", "minilm")


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in tensors.items()}


def flat_indices(mask: CSRMask) -> list[Tensor]:
    """What the peers index with, made beforehand: int64, flat, for each tensor."""
    return [t.view(-1).nonzero().view(-1) for t in mask.to_dense().values()]


def cases(device: str, quick: bool, sizes: tuple[str, ...]) -> Iterator[Case]:
    works = [(torch.float32, 0.05), (torch.float32, 0.01), (torch.bfloat16, 0.05)]
    for size in sizes:
        shapes = SHAPES[size]()
        for dtype, density in works[:1] if quick else works:
            tensors = random_tensors(shapes, dtype, device)
            mask = topk_mask(random_tensors(shapes, torch.float32, device, seed=1), density=density)
            values = torch.randn(mask.nnz, generator=torch.Generator().manual_seed(2)).to(device, dtype)
            yield from _cases(size, tensors, mask, values, density)


def _cases(size: str, tensors: dict[str, Tensor], mask: CSRMask, values: Tensor, density: float) -> Iterator[Case]:
    device, dtype, index = mask.device.type, values.dtype, flat_indices(mask)
    parts = list(mask.split(values).values())
    picked = torch.cat([t.reshape(-1)[i] for t, i in zip(tensors.values(), index)])
    row_bytes = 8 * len(mask.crow_indices) + mask.col_indices.element_size() * mask.nnz
    common = {"size": size, "dtype": dtype, "density": density}

    def in_place(write: Callable[[list[Tensor]], None]):
        def make():
            mine = copies(tensors)
            flat = [t.view(-1) for t in mine.values()]

            def call():
                write(flat)
                return mine

            return call

        return make

    def ours_in_place(write: Callable[[dict[str, Tensor]], object]):
        def make():
            mine = copies(tensors)
            return lambda: write(mine)

        return make

    def agrees(expected: dict[str, Tensor], tolerance: float):
        def check(result: dict[str, Tensor]) -> str | None:
            for name, tensor in expected.items():
                if not torch.allclose(result[name].double(), tensor.double(), rtol=tolerance, atol=tolerance):
                    return f"tensor {name} differs"
            return None

        return check

    gather = {
        OURS: lambda: lambda: mask.gather(tensors),
        "torch index": lambda: lambda: torch.cat([t.view(-1)[i] for t, i in zip(tensors.values(), index)]),
        "torch.take": lambda: lambda: torch.cat([torch.take(t, i) for t, i in zip(tensors.values(), index)]),
    }
    if device == "cpu" and dtype == torch.float32:
        import numpy as np

        arrays = [(t.view(-1).numpy(), i.numpy()) for t, i in zip(tensors.values(), index)]
        gather["numpy.take"] = lambda: lambda: torch.from_numpy(np.concatenate([a.take(i) for a, i in arrays]))
    itemsize = values.element_size()
    same = lambda got: None if torch.equal(got, picked) else "the gathered values differ"  # noqa: E731
    yield Case("csr_gather", bytes=row_bytes + 2 * itemsize * mask.nnz, providers=gather, check=same, **common)

    def put(flat: list[Tensor], accumulate: bool) -> None:
        for tensor, i, v in zip(flat, index, parts):
            tensor.index_put_((i,), v, accumulate=accumulate)

    def assign(flat: list[Tensor]) -> None:
        for tensor, i, v in zip(flat, index, parts):
            tensor.scatter_(0, i, v)

    def add(flat: list[Tensor]) -> None:
        for tensor, i, v in zip(flat, index, parts):
            tensor.index_add_(0, i, v)

    expected = copies(tensors)
    put([t.view(-1) for t in expected.values()], accumulate=False)
    scatter = {
        OURS: ours_in_place(lambda mine: mask.scatter_(mine, values)),
        "torch index_put_": in_place(lambda flat: put(flat, accumulate=False)),
        "torch scatter_": in_place(assign),
    }
    yield Case("csr_scatter_", bytes=row_bytes + 2 * itemsize * mask.nnz, providers=scatter, check=agrees(expected, 0), **common)

    expected = {n: t.double() for n, t in tensors.items()}
    for tensor, i, v in zip(expected.values(), index, parts):
        tensor.view(-1)[i] += v.double()
    adding = {
        OURS: ours_in_place(lambda mine: mask.add_(mine, values)),
        "torch index_put_": in_place(lambda flat: put(flat, accumulate=True)),
        "torch index_add_": in_place(add),
    }
    if device == "cpu" and dtype == torch.float32:
        import scipy.sparse

        sparse = {n: scipy.sparse.csr_array(_csr(mask, n, values), shape=mask.sparse_csr(n, values).shape) for n in mask.names}
        arrays_2d = {n: tensors[n].numpy().reshape(sparse[n].shape) for n in tensors}
        adding["scipy dense + csr"] = lambda: (
            lambda: {n: torch.from_numpy(arrays_2d[n] + sparse[n]).view(tensors[n].shape) for n in tensors}
        )
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    yield Case("csr_add_", bytes=row_bytes + 3 * itemsize * mask.nnz, providers=adding, check=agrees(expected, tolerance), **common)


def _csr(mask: CSRMask, name: str, values: Tensor):
    matrix = mask.sparse_csr(name, values)
    return matrix.values().numpy(), matrix.col_indices().numpy(), matrix.crow_indices().numpy()
