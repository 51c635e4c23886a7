"""topk_mask, select_mask, set operations of masks and sums over them, against PyTorch, NumPy, SciPy, CuPy and LT-SFT.

Every implementation of the first three goes from named tensors or masks to a mask, boolean tensors or ascending flat
positions.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.harness import Call, Case, Choice, Workload, available_bytes, too_large, workload
from bench.rows import OURS
from bench.shapes import SHAPES, random_tensors
from deftx_kernels import CSRMask, select_mask, topk_mask
from deftx_kernels.ops.schemas import ELECTIONS

OPS = {
    "topk_mask": "the mask of the largest scores, over all tensors together",
    "select_mask": "the mask of the entries that differ most between two models: LT-SFT, after denoising DeFT-X",
    "mask_or": "the entries in one of two masks, or in both",
    "mask_and": "the entries in both of two masks",
    "mask_sub": "the entries in one mask and not in another",
    "csr_sum": "the sum of three compact tensors, each of its own mask, at the union of the masks",
}
SIZES = tuple(SHAPES)
DEFAULT = [(torch.float32, 0.05)]
SETTINGS = {  # of topk_mask, where they are not the default
    "tiny": [(torch.float32, 0.05), (torch.bfloat16, 0.05)],
    "50M": [(torch.float32, 0.01), (torch.float32, 0.05), (torch.float32, 0.3), (torch.bfloat16, 0.05)],
    "llama1b": [(torch.bfloat16, 0.05)],
    "llama7b": [(torch.bfloat16, 0.05)],
}
MODELS = ("tiny", "10M", "minilm", "bert", "xlmr", "llama1b")  # sizes of select_mask
PAIRS = ("tiny", "minilm", "xlmr")  # sizes of the set operations and sums


def workloads(choice: Choice) -> Iterator[Workload]:
    device = choice.device
    for size in choice.sizes:
        for setting in choice.settings(SETTINGS.get(size, DEFAULT)):
            yield workload(topk_case, "topk_mask", size, setting, device)
        if size in MODELS:
            for setting in choice.settings(SETTINGS[size] if size == "llama1b" else DEFAULT):
                yield workload(select_case, "select_mask", size, setting, device)
        if size in PAIRS:
            for density in choice.densities or (0.05,):
                for op in ("mask_or", "mask_and", "mask_sub"):
                    yield workload(set_case, op, size, (torch.bool, density), device, op)
                yield workload(sum_case, "csr_sum", size, (torch.float32, density), device)


# ---- topk_mask ----
def topk_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    scores = random_tensors(size, dtype, device)
    numel = sum(t.numel() for t in scores.values())
    k = round(density * numel)

    def magnitudes() -> Tensor:
        return torch.cat([t.reshape(-1) for t in scores.values()]).abs_()

    def numpy_magnitudes() -> np.ndarray:
        if dtype == torch.bfloat16:  # not in NumPy: the bits of magnitudes have the same order
            bits = np.concatenate([t.view(torch.int16).numpy().reshape(-1) for t in scores.values()])
            return np.bitwise_and(bits, 0x7FFF, out=bits)
        joined = np.concatenate([t.numpy().reshape(-1) for t in scores.values()])
        return np.abs(joined, out=joined)

    baselines, absent = selections(magnitudes, numpy_magnitudes, k, numel, device)

    def check(result: Any) -> str | None:
        return fault(result, {n: t.shape for n, t in scores.items()}, lambda n: scores[n].abs(), k)

    implementations = {OURS: lambda: lambda: topk_mask(scores, density=density)} | baselines
    moved, rounds = numel * dtype.itemsize + numel // 4 + 4 * k, 3 if numel > 10**8 else 7
    return Case(moved, implementations, check, rounds=rounds, once=slow(numel, device), absent=absent)


# Bytes of main memory per element beside the inputs: the most measured of float32 and bfloat16, rounded up.
NEEDS = {"torch.topk + sort": 22, "torch.topk + mask": 22, "torch.kthvalue": 17, "numpy partition": 10}
LARGE = 5 * 10**8  # elements above which only one baseline is fast enough on a CPU


def slow(numel: int, device: str) -> tuple[str, ...]:
    """The baselines that take 5 s a call and more: torch's on a CPU, up to 15 s at XLM-R's size."""
    return tuple(n for n in NEEDS if n.startswith("torch")) if device == "cpu" and numel > 2 * 10**8 else ()


def selections(
    magnitudes: Callable[[], Tensor], numpy_magnitudes: Callable[[], np.ndarray], k: int, numel: int, device: str
) -> tuple[dict[str, Callable], dict[str, str]]:
    """(baselines that select the k largest of a flat tensor, why some of them are absent)."""

    def topk_sort() -> Tensor:
        return torch.topk(magnitudes(), k, sorted=False).indices.sort().values

    def topk_scatter() -> Tensor:
        chosen = torch.topk(magnitudes(), k, sorted=False).indices
        return torch.zeros(numel, dtype=torch.bool, device=device).scatter_(0, chosen, True)

    def kthvalue() -> Tensor:
        values = magnitudes()
        threshold = torch.kthvalue(values, numel - k + 1).values
        return from_threshold(values, threshold, k, lambda t: t.nonzero().view(-1), partial(torch.ones, device=device))

    def numpy_partition() -> Tensor:
        return torch.from_numpy(largest(np, numpy_magnitudes(), k))

    def cupy_partition() -> Tensor:
        import cupy

        values = magnitudes()
        if values.dtype == torch.bfloat16:  # not in CuPy: the bits of magnitudes have the same order
            values = values.view(torch.int16)
        with torch_memory(cupy):
            return torch.from_dlpack(largest(cupy, cupy.from_dlpack(values), k)).clone()

    calls = {"torch.topk + sort": topk_sort, "torch.topk + mask": topk_scatter, "torch.kthvalue": kthvalue}
    calls |= {"cupy partition": cupy_partition} if device == "cuda" else {"numpy partition": numpy_partition}
    absent: dict[str, str] = {}
    if numel >= 2**31:
        absent = dict.fromkeys(calls, "measured below 2**31 elements only")
    elif device == "cpu":
        if numel > LARGE:
            absent = dict.fromkeys(slow(numel, device), "torch.topk takes about a minute a call")
        absent |= too_large({name: need * numel for name, need in NEEDS.items()}, available_bytes())
    return {n: lambda call=call: call for n, call in calls.items()}, absent


def torch_memory(cupy: Any) -> AbstractContextManager[Any]:
    """CuPy allocates from torch's pool: nothing is held twice, and its peak is measured."""
    pool = cupy.cuda.PythonFunctionAllocator(
        lambda bytes, device: torch.cuda.caching_allocator_alloc(bytes, device),
        lambda pointer, device: torch.cuda.caching_allocator_delete(pointer),
    )
    return cupy.cuda.using_allocator(pool.malloc)


def largest(library: Any, values: Any, k: int) -> Any:
    """Ascending positions of the k largest, by `partition` of NumPy or CuPy."""
    threshold = library.partition(values, len(values) - k)[len(values) - k].copy()  # CuPy's scalar would hold the whole
    return from_threshold(values, threshold, k, library.flatnonzero, library.ones)


def from_threshold(values: Any, threshold: Any, k: int, flatnonzero: Callable, ones: Callable) -> Any:
    """Ascending positions of exactly k values that are not below the k-th largest."""
    chosen = flatnonzero(values >= threshold)
    if len(chosen) > k:
        keep = ones(len(chosen), dtype=bool)
        keep[flatnonzero(values[chosen] == threshold)[k - len(chosen) :]] = False
        chosen = chosen[keep]
    return chosen


def fault(
    result: Any, shapes: dict[str, torch.Size], magnitude: Callable[[str], Tensor], k: int, ties: bool = False
) -> str | None:
    """What is wrong with a selection; with `ties` it may exceed k by entries equal to the smallest.

    The k selected are the largest if and only if no other entry exceeds the smallest selected one. That needs no
    precomputed truth, and no more memory than one tensor.
    """
    if isinstance(result, Tensor) and result.dtype != torch.bool and not bool((result[1:] > result[:-1]).all()):
        return "the positions do not ascend"
    values = []
    for name, position in positions(result, shapes):
        if len(position) and not (int(position[0]) >= 0 and int(position[-1]) < shapes[name].numel()):
            return f"tensor {name}: a position outside of it"
        if not bool((position[1:] > position[:-1]).all()):
            return f"tensor {name}: the positions do not ascend"
        values.append(magnitude(name).reshape(-1)[position])
    chosen = torch.cat(values)
    if len(chosen) < k or (len(chosen) > k and not ties):
        return f"{len(chosen)} entries were selected, not {k}"
    if len(chosen) == 0:
        return None
    smallest = chosen.min()
    above = int((chosen > smallest).sum())
    if len(chosen) > k and above >= k:
        return f"{len(chosen)} entries were selected, {above} of them above the smallest, for {k}"
    if sum(int((magnitude(n) > smallest).sum()) for n in shapes) != above:
        return "other entries than the largest were selected"
    return None


def positions(result: Any, shapes: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """(name, flat positions in that tensor) of a mask, of boolean tensors by name, or of one flat tensor for all."""
    if isinstance(result, CSRMask):
        yield from ((name, result[name].flat_indices()) for name in shapes)
    elif isinstance(result, dict):
        yield from ((name, result[name].reshape(-1).nonzero().view(-1)) for name in shapes)
    else:
        flat = result.nonzero().view(-1) if result.dtype == torch.bool else result
        ends = np.cumsum([s.numel() for s in shapes.values()]).tolist()
        bounds = torch.searchsorted(flat, torch.tensor([0, *ends], device=flat.device)).tolist()
        bounds[0], bounds[-1] = 0, len(flat)  # `fault` reports positions outside of all tensors
        for i, (name, shape) in enumerate(shapes.items()):
            yield name, flat[bounds[i] : bounds[i + 1]] - (ends[i] - shape.numel())


# ---- select_mask, without denoising ----
LT_SFT = "LT-SFT"


def select_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    room = available_bytes()  # before the models are there
    base, tuned = random_tensors(size, dtype, device), random_tensors(size, dtype, device, seed=1)
    for name, tensor in tuned.items():
        tensor.mul_(0.01).add_(base[name])
    numel = sum(t.numel() for t in base.values())
    k = round(density * numel)
    compute = torch.promote_types(dtype, torch.float32)

    def difference(name: str) -> Tensor:
        return tuned[name].to(compute) - base[name].to(compute)

    def differences() -> Tensor:
        flat, start = torch.empty(numel, dtype=compute, device=device), 0
        for name, tensor in base.items():
            part = flat[start : start + tensor.numel()].view(tensor.shape)
            torch.sub(tuned[name].to(compute), tensor.to(compute), out=part)
            start += tensor.numel()
        return flat.abs_()

    # torch subtracts for NumPy too, which has no bfloat16 and one thread.
    baselines, absent = selections(differences, lambda: differences().numpy(), k, numel, device)
    baselines[LT_SFT] = lambda: lambda: lt_sft(difference, list(base), k)
    if numel > LARGE:
        absent[LT_SFT] = "a list of so many Python numbers takes minutes a call"
    # Main memory for the models and the list: 40 to 56 bytes an element for the list and its array.
    absent |= too_large({LT_SFT: 72 * numel}, room)

    def check(result: Any) -> str | None:
        sizes = {n: t.shape for n, t in base.items()}
        return fault(result, sizes, lambda n: difference(n).abs_(), k, ties=isinstance(result, dict))

    implementations = {OURS: lambda: lambda: select_mask(tuned, base, density=density)} | baselines
    moved, rounds = 2 * dtype.itemsize * numel + numel // 4 + 4 * k, 3 if numel > 10**8 else 5
    once = (*slow(numel, device), LT_SFT)
    return Case(moved, implementations, check, rounds=rounds, served_by="topk_mask", once=once, absent=absent)


def lt_sft(difference: Callable[[str], Tensor], names: list[str], k: int) -> dict[str, Tensor]:
    """LT-SFT's selection, re-implemented from its description: all differences in one Python list, the k-th largest by
    `np.partition`, and every entry not below it. Ties exceed k."""
    listed: list[float] = []
    for name in names:
        listed.extend(difference(name).abs().view(-1).tolist())
    threshold = np.partition(listed, len(listed) - k)[len(listed) - k]
    return {n: difference(n).abs() >= float(threshold) for n in names}


# ---- set operations ----
# As one pass over sparse matrices.
ONE_PASS: dict[str, Callable[[Any, Any], Any]] = {
    "mask_or": lambda x, y: x.maximum(y),
    "mask_and": lambda x, y: x.multiply(y),
    "mask_sub": lambda x, y: x > y,
}


def set_case(size: str, dtype: torch.dtype, density: float, device: str, op: str) -> Case:
    """Of two masks that share half of their entries, as two fine-tunings of one model might."""
    a, b = two_masks(size, density, device)
    keys, other = a.flat_indices(), b.flat_indices()
    expected = membership(keys, other, a.numel, op)

    def unique() -> Tensor:
        if op == "mask_or":
            return torch.unique(torch.cat([keys, other]))
        both = op == "mask_and"
        joined = torch.cat([keys, other] if both else [keys, other, other])
        found, counts = torch.unique(joined, return_counts=True)
        return found[counts == (2 if both else 1)]

    def check(result: Any) -> str | None:
        if not isinstance(result, (CSRMask, Tensor)):  # a matrix of SciPy or CuPy
            crow, col = (torch.from_dlpack(x) for x in (result.indptr, result.indices))  # int32 [rows + 1], [nnz]
            result = CSRMask.unchecked(a.names, a.shapes, crow.long(), col)
        found = result.flat_indices() if isinstance(result, CSRMask) else result
        return None if torch.equal(found, expected) else "other entries than the right ones"

    ours = {"mask_or": lambda: a | b, "mask_and": lambda: a & b, "mask_sub": lambda: a - b}[op]
    on_gpu = device == "cuda"
    implementations: dict[str, Callable] = {OURS: lambda: ours, "torch.unique": lambda: unique}
    implementations["cupy csr" if on_gpu else "scipy csr"] = partial(csr_baseline, a, b, op, on_gpu)
    absent = {"scipy csr": "SciPy runs in host memory"} if on_gpu else {}
    rows, index = len(a.crow_indices) - 1, a.col_indices.element_size()
    moved = 3 * 8 * rows + index * (a.nnz + b.nnz + len(expected))
    return Case(moved, implementations, check, rounds=7, served_by="csr_combine", absent=absent)


def two_masks(size: str, density: float, device: str, seed: int = 0) -> tuple[CSRMask, CSRMask]:
    mine, theirs = (random_tensors(size, torch.float32, device, seed=seed + i) for i in range(2))
    a = topk_mask(mine, density=density)
    for name, tensor in theirs.items():
        tensor.mul_(0.5).add_(mine.pop(name))
    return a, topk_mask(theirs, density=density)


def csr_baseline(a: CSRMask, b: CSRMask, op: str, on_gpu: bool) -> Call:
    """A set operation of SciPy's or CuPy's sparse matrices."""
    if on_gpu:
        import cupy
        from cupyx.scipy.sparse import csr_matrix as matrix

        memory, convert = partial(torch_memory, cupy), cupy.from_dlpack
        ones = partial(cupy.ones, dtype="f")  # float32: CuPy does not test its operations on boolean sparse matrices
    else:
        from scipy.sparse import csr_array as matrix

        memory, convert, ones = nullcontext, Tensor.numpy, partial(np.ones, dtype=bool)
    # All tensors as one matrix, with 32-bit indices: the fastest form.
    columns = max(math.prod(s[1:]) if len(s) > 1 else s.numel() for s in a.shapes)
    operands = []
    with memory():
        for mask in (a, b):
            crow, col = (convert(t.to(torch.int32)) for t in (mask.crow_indices, mask.col_indices))
            operands.append(matrix((ones(mask.nnz), col, crow), shape=(len(crow) - 1, columns)))
            operands[-1].has_canonical_format = True

    def call() -> Any:
        with memory():
            return ONE_PASS[op](*operands)

    return call


def membership(keys: Tensor, other: Tensor, numel: int, op: str) -> Tensor:
    """The truth, by two dense boolean vectors."""
    a, b = (torch.zeros(numel, dtype=torch.bool, device=keys.device).index_fill_(0, x, True) for x in (keys, other))
    a = a.logical_or_(b) if op == "mask_or" else a.logical_and_(b if op == "mask_and" else b.logical_not_())
    return a.nonzero().view(-1)


# ---- sums ----
def sum_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    """Of three deltas, of which each shares half of its entries with the one before. The union is given."""
    masks = [*two_masks(size, density, device), two_masks(size, density, device, seed=1)[1]]
    union = masks[0] | masks[1] | masks[2]
    generator = torch.Generator().manual_seed(2)
    values = [torch.randn(m.nnz, generator=generator).to(device, dtype) for m in masks]
    weights = [0.5, 0.3, 0.2]
    keys, others = union.flat_indices(), [m.flat_indices() for m in masks]
    csr = [m.crow_indices for m in masks], [m.col_indices for m in masks]

    def ours() -> Tensor:
        options = (values, weights, ELECTIONS["none"], dtype)
        return torch.ops.deftx.csr_sum(union.crow_indices, union.col_indices, *csr, *options)

    def index_add() -> Tensor:
        total = torch.zeros(union.nnz, dtype=torch.float64, device=device)
        for mine, x, weight in zip(others, values, weights):
            total.index_add_(0, torch.searchsorted(keys, mine), x.double(), alpha=weight)
        return total.to(dtype)

    expected = index_add()

    def check(result: Tensor) -> str | None:
        return None if torch.allclose(result, expected, rtol=1e-6, atol=1e-9) else "the sums differ"

    implementations = {OURS: lambda: ours, "torch.searchsorted + index_add_": lambda: index_add}
    rows, index, terms = len(union.crow_indices), union.col_indices.element_size(), sum(m.nnz for m in masks)
    moved = 4 * 8 * rows + index * (union.nnz + terms) + dtype.itemsize * (union.nnz + terms)
    return Case(moved, implementations, check, rounds=7)
