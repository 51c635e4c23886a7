"""topk_mask, select_mask and the set operations of masks, against PyTorch, NumPy, SciPy, CuPy and LT-SFT's selection.

Every provider does the whole job, from named tensors to a mask, boolean tensors or ascending flat positions.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import shapes
from bench.harness import OURS, Case, available_bytes
from deftx_kernels import CSRMask, select_mask, topk_mask

SIZES = tuple(shapes.SIZES)
WORKS = {
    "minilm": [(torch.float32, 0.05)],
    "50M": [(torch.float32, 0.01), (torch.float32, 0.05), (torch.float32, 0.3), (torch.bfloat16, 0.05)],
    "xlmr": [(torch.float32, 0.05)],
    "tiny": [(torch.float32, 0.05), (torch.bfloat16, 0.05)],
    "llama7b": [(torch.bfloat16, 0.05)],
}
PAIRS = ("tiny", "minilm", "xlmr")  # sizes of select_mask and of the set operations


def cases(device: str, quick: bool, sizes: tuple[str, ...]) -> Iterator[Case]:
    for size in sizes:
        for dtype, density in WORKS[size]:
            yield topk_case(size, dtype, density, device)
        if size in PAIRS:
            yield select_case(size, 0.05, device)
            yield from set_cases(size, 0.05, device)


# ---- topk_mask ----------------------------------------------------------------------------------------------------------


def topk_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    scores = shapes.random_tensors(shapes.SIZES[size](), dtype, device)
    numel = sum(t.numel() for t in scores.values())
    k = round(density * numel)

    def magnitudes() -> Tensor:
        return torch.cat([t.reshape(-1) for t in scores.values()]).abs_()

    def numpy_magnitudes() -> np.ndarray:
        if dtype == torch.bfloat16:  # NumPy has none: magnitudes are in the order of their bits
            bits = np.concatenate([t.view(torch.int16).numpy().reshape(-1) for t in scores.values()])
            return np.bitwise_and(bits, 0x7FFF, out=bits)
        joined = np.concatenate([t.numpy().reshape(-1) for t in scores.values()])
        return np.abs(joined, out=joined)

    peers, absent = selections(magnitudes, numpy_magnitudes, k, numel, device)
    return Case(
        "topk_mask",
        size,
        dtype,
        density,
        bytes=numel * dtype.itemsize + numel // 4 + 4 * k,
        providers={OURS: lambda: lambda: topk_mask(scores, density=density)} | peers,
        check=lambda result: fault(result, {n: t.shape for n, t in scores.items()}, lambda n: scores[n].abs(), k),
        rounds=3 if numel > 10**8 else 7,  # of xlmr a peer takes up to 12 s
        absent=absent,
        again=partial(topk_case, size=size, dtype=dtype, density=density, device=device),
    )


def selections(
    magnitudes: Callable[[], Tensor], numpy_magnitudes: Callable[[], np.ndarray], k: int, numel: int, device: str
) -> tuple[dict[str, Callable], dict[str, str]]:
    """The peers that choose the k largest of a flat tensor, and those that cannot be had here, each with the reason."""

    def topk_sort() -> Tensor:
        return torch.topk(magnitudes(), k, sorted=False).indices.sort().values

    def topk_scatter() -> Tensor:
        chosen = torch.topk(magnitudes(), k, sorted=False).indices
        return torch.zeros(numel, dtype=torch.bool, device=device).scatter_(0, chosen, True)

    def kthvalue() -> Tensor:
        values = magnitudes()
        threshold = torch.kthvalue(values, numel - k + 1).values
        chosen = (values >= threshold).nonzero().view(-1)
        if len(chosen) == k:
            return chosen
        tied = (values[chosen] == threshold).nonzero().view(-1)
        keep = torch.ones_like(chosen, dtype=torch.bool)
        keep[tied[k - len(chosen) :]] = False
        return chosen[keep]

    def cupy_partition() -> Tensor:
        # CuPy allocates from torch's pool: nothing is held twice, and its peak is seen.
        pool = cupy.cuda.PythonFunctionAllocator(
            lambda bytes, device: torch.cuda.caching_allocator_alloc(bytes, device),
            lambda pointer, device: torch.cuda.caching_allocator_delete(pointer),
        )
        values = magnitudes()
        if values.dtype == torch.bfloat16:  # CuPy has none: magnitudes are in the order of their bits
            values = values.view(torch.int16)
        with cupy.cuda.using_allocator(pool.malloc):
            return torch.from_dlpack(largest(cupy, cupy.from_dlpack(values), k)).clone()

    peers: dict[str, Callable] = {
        "torch.topk + sort": lambda: topk_sort,
        "torch.topk + mask": lambda: topk_scatter,
        "torch.kthvalue": lambda: kthvalue,
    }
    absent = {}
    if device == "cuda":
        cupy, reason = imported("cupy")
        if cupy:
            peers["cupy partition"] = lambda: cupy_partition
        else:
            absent["cupy partition"] = reason
    else:
        peers["numpy partition"] = lambda: lambda: torch.from_numpy(largest(np, numpy_magnitudes(), k))
    if numel >= 2**31:
        absent |= dict.fromkeys(peers, "measured below 2**31 elements only")
        peers = {}
    return peers, absent


def largest(library: Any, values: Any, k: int) -> Any:
    """Ascending positions of the k largest, exactly k, by `partition` of NumPy or CuPy."""
    threshold = library.partition(values, len(values) - k)[len(values) - k].copy()  # CuPy's scalar would hold the whole
    chosen = library.flatnonzero(values >= threshold)
    if len(chosen) > k:
        tied = library.flatnonzero(values[chosen] == threshold)
        keep = library.ones(len(chosen), dtype=bool)
        keep[tied[k - len(chosen) :]] = False
        chosen = chosen[keep]
    return chosen


def imported(name: str) -> tuple[Any, str]:
    try:
        return import_module(name), ""
    except ImportError as error:
        return None, f"{name} does not import: {error}"


def fault(result: Any, shapes: dict[str, torch.Size], magnitude: Callable[[str], Tensor], k: int, ties: bool = False) -> str | None:
    """What is wrong with a selection, where `ties` more than k if all beyond k equal the smallest.

    The k chosen are the largest if and only if none that is left out is larger than the smallest chosen. That needs no truth
    computed beforehand, and no more memory than one tensor takes.
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
    """Name → flat positions within the tensor, of a mask, of boolean tensors by name, or of one flat tensor for all, by name."""
    if isinstance(result, CSRMask):
        for name in shapes:
            one = result[name]
            rows = torch.arange(len(one.crow_indices) - 1, device=one.device).repeat_interleave(one.crow_indices.diff())
            columns = shapes[name].numel() // max(1, len(one.crow_indices) - 1)
            yield name, rows * columns + one.col_indices.to(torch.int64)
    elif isinstance(result, dict):
        for name in shapes:
            yield name, result[name].reshape(-1).nonzero().view(-1)
    else:
        flat = result.nonzero().view(-1) if result.dtype == torch.bool else result
        ends = np.cumsum([s.numel() for s in shapes.values()]).tolist()
        bounds = torch.searchsorted(flat, torch.tensor([0, *ends], device=flat.device)).tolist()
        bounds[0], bounds[-1] = 0, len(flat)  # what lies outside of all tensors is for `fault` to see
        for i, (name, shape) in enumerate(shapes.items()):
            yield name, flat[bounds[i] : bounds[i + 1]] - (ends[i] - shape.numel())


# ---- select_mask, without denoising --------------------------------------------------------------------------------------


def select_case(size: str, density: float, device: str) -> Case:
    room = available_bytes()  # before the models are there
    base = shapes.random_tensors(shapes.SIZES[size](), torch.float32, device)
    tuned = shapes.random_tensors(shapes.SIZES[size](), torch.float32, device, seed=1)
    for name, tensor in tuned.items():
        tensor.mul_(0.01).add_(base[name])
    numel = sum(t.numel() for t in base.values())
    k = round(density * numel)

    def differences() -> Tensor:
        flat, start = torch.empty(numel, device=device), 0
        for name, tensor in base.items():
            part = flat[start : start + tensor.numel()].view(tensor.shape)
            torch.sub(tuned[name], tensor, out=part)
            start += tensor.numel()
        return flat.abs_()

    def numpy_differences() -> np.ndarray:
        flat, start = np.empty(numel, np.float32), 0
        for name, tensor in base.items():
            part = flat[start : start + tensor.numel()].reshape(tensor.shape)
            np.subtract(tuned[name].numpy(), tensor.numpy(), out=part)
            start += tensor.numel()
        return np.abs(flat, out=flat)

    peers, absent = selections(differences, numpy_differences, k, numel, device)
    need = 72 * numel  # 40 to 56 bytes an element for the list and its array, and the two models
    if room < need:
        absent[LT_SFT] = f"needs {need / 1e9:.0f} GB of main memory for models and list, {room / 1e9:.0f} GB are free"
    else:
        peers[LT_SFT] = lambda: lambda: lt_sft(tuned, base, k)

    def check(result: Any) -> str | None:
        sizes = {n: t.shape for n, t in base.items()}
        return fault(result, sizes, lambda n: (tuned[n] - base[n]).abs_(), k, ties=isinstance(result, dict))

    return Case(
        "select_mask",
        size,
        torch.float32,
        density,
        bytes=8 * numel + numel // 4 + 4 * k,
        providers={OURS: lambda: lambda: select_mask(tuned, base, density=density)} | peers,
        check=check,
        rounds=3 if numel > 10**8 else 5,
        backend_of="topk_mask",
        once=(LT_SFT,),
        absent=absent,
        again=partial(select_case, size=size, density=density, device=device),
    )


LT_SFT = "LT-SFT's way"


def lt_sft(tuned: dict[str, Tensor], base: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """LT-SFT's selection, re-implemented from its description: every difference in one Python list, its k-th largest by
    `np.partition`, and whatever is not below it. Ties exceed k."""
    differences: list[float] = []
    for name, tensor in base.items():
        differences.extend((tuned[name] - tensor).abs().view(-1).tolist())
    threshold = np.partition(differences, len(differences) - k)[len(differences) - k]
    return {n: (tuned[n] - t).abs() >= float(threshold) for n, t in base.items()}


# ---- set operations ------------------------------------------------------------------------------------------------------


def set_cases(size: str, density: float, device: str) -> Iterator[Case]:
    """Of two masks that share half of their entries, as two fine-tunings of one model might."""
    layout = shapes.SIZES[size]()
    mine = shapes.random_tensors(layout, torch.float32, device)
    a = topk_mask(mine, density=density)
    theirs = shapes.random_tensors(layout, torch.float32, device, seed=1)
    for name, tensor in theirs.items():
        tensor.mul_(0.5).add_(mine.pop(name))
    b = topk_mask(theirs, density=density)
    del mine, theirs
    numel, rows = a.numel, len(a.crow_indices) - 1
    keys, other = flat_positions(a), flat_positions(b)
    names = dict(zip(a.names, a.shapes))

    def unique(operation: str) -> Tensor:
        if operation == "or":
            return torch.unique(torch.cat([keys, other]))
        found, counts = torch.unique(torch.cat([keys, other] if operation == "and" else [keys, other, other]), return_counts=True)
        return found[counts == (2 if operation == "and" else 1)]

    ours = {"or": lambda: a | b, "and": lambda: a & b, "sub": lambda: a - b}
    scipy, reason = imported("scipy.sparse")
    if device == "cuda":
        scipy, reason = None, "SciPy works in host memory"
    if scipy:
        x, y = (stacked(scipy, mask) for mask in (a, b))
        one_pass = {"or": lambda: x.maximum(y), "and": lambda: x.multiply(y), "sub": lambda: x > y}
    for operation, call in ours.items():
        providers: dict[str, Callable] = {OURS: lambda call=call: call}
        if scipy:
            providers["scipy csr"] = lambda operation=operation: one_pass[operation]
        providers["torch.unique"] = lambda operation=operation: lambda: unique(operation)
        expected = membership(keys, other, numel, operation)

        def check(result: Any, expected: Tensor = expected) -> str | None:
            if isinstance(result, Tensor):
                found = result
            elif isinstance(result, CSRMask):
                found = flat_positions(result)
            else:
                found = unstacked(result, names)
            return None if torch.equal(found, expected) else "other entries than the right ones"

        index = a.col_indices.element_size()
        yield Case(
            f"mask_{operation}",
            size,
            torch.bool,
            density,
            bytes=3 * 8 * rows + index * (a.nnz + b.nnz + len(expected)),
            providers=providers,
            check=check,
            rounds=7,
            backend_of="csr_combine",
            absent={} if scipy else {"scipy csr": reason},
        )


def flat_positions(mask: CSRMask) -> Tensor:
    """Ascending int64 positions, the tensors standing one after the other by name."""
    starts = np.cumsum([0, *(s.numel() for s in mask.shapes)]).tolist()
    each = positions(mask, dict(zip(mask.names, mask.shapes)))
    return torch.cat([position + start for start, (_, position) in zip(starts, each)])


def membership(keys: Tensor, other: Tensor, numel: int, operation: str) -> Tensor:
    """The truth, by two dense boolean vectors."""
    a, b = (torch.zeros(numel, dtype=torch.bool, device=keys.device).index_fill_(0, x, True) for x in (keys, other))
    a = a.logical_or_(b) if operation == "or" else a.logical_and_(b if operation == "and" else b.logical_not_())
    return a.nonzero().view(-1)


def stacked(scipy: Any, mask: CSRMask) -> Any:
    """All tensors as one SciPy matrix, one above the other, with 32-bit indices: its fastest form."""
    columns = max(math.prod(s[1:]) if len(s) > 1 else s.numel() for s in mask.shapes)
    crow, col = (t.to(torch.int32).numpy() for t in (mask.crow_indices, mask.col_indices))
    matrix = scipy.csr_array((np.ones(mask.nnz, dtype=bool), col, crow), shape=(len(crow) - 1, columns))
    matrix.has_canonical_format = True
    return matrix


def unstacked(matrix: Any, layout: dict[str, torch.Size]) -> Tensor:
    """flat_positions of a SciPy matrix."""
    widths = [(s[0], math.prod(s[1:])) if len(s) > 1 else (1, s.numel()) for s in layout.values()]
    row_sizes = np.repeat([w for _, w in widths], [r for r, _ in widths])
    starts = np.concatenate([[0], np.cumsum(row_sizes)[:-1]])
    return torch.from_numpy(np.repeat(starts, np.diff(matrix.indptr)) + matrix.indices)
