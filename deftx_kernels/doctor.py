"""`deftx doctor`: every operator on every implementation, and denoising, checked against float64, with its speed."""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.denoise import svd_denoise, truncated_svd
from deftx_kernels.kernels.tensors import INTEGERS
from deftx_kernels.ops import library, reference, schemas


class Row(NamedTuple):
    """One operator or function on one implementation of one device."""

    op: str
    device: str
    backend: str
    serves: bool  # whether a call on this device runs this implementation
    shape: str  # of its largest tensor
    correct: bool
    error: float | None  # largest error relative to the largest value; 0 for integers
    milliseconds: float | None  # median
    note: str  # what is wrong


class _Call(NamedTuple):
    """An implementation's results, not compared yet."""

    row: Row
    results: list[list[Tensor]]  # of the first call and of the last one, on the CPU


WIDTH = 768  # of the layers that the operators are checked on: a faulty LAPACK can be right on small matrices


def run(
    device: str | None = None, *, repeats: int = 5, width: int = WIDTH, names: list[str] | None = None
) -> list[Row]:
    """Check every operator and the denoising functions, with the caller's number of threads.

    Args:
        device: "cpu" or "cuda"; by default both where there is a GPU.
        repeats: timed calls for each row at the most, after the first; slow ones are called once or twice.
        width: of the layers; that of a BERT base by default.
        names: which operators and functions; all of CASES by default.

    Raises:
        ValueError: an unknown device.
    """
    if device not in (None, *library.DEVICES):
        raise ValueError(f"device must be one of {', '.join(library.DEVICES)}, got {device!r}")
    devices = [d for d in library.DEVICES if device in (None, d) and (d != "cuda" or torch.cuda.is_available())]
    if not devices:
        raise ValueError(f"device {device!r}: {absent().get('cuda', 'there is no CUDA device')}")
    # All calls come before the first float64 reference, so that nothing that it runs or sets can hide a fault.
    calls = {
        name: [call for d in devices for call in _calls(name, d, repeats, width)]
        for name in (CASES if names is None else names)
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for name, found in calls.items() for row in _compared(name, found, width)]
    finally:
        torch.set_num_threads(threads)


def absent() -> dict[str, str]:
    """Implementation that is not on this machine → why ("no kernel for this op" does not depend on the machine)."""
    backends = [b for served in library.backends().values() for b in served.values()]
    serving = {b.name for b in backends}
    names = ("c++", "cuda", "triton")
    reasons = {n: {b.others[n] for b in backends if n in b.others} - {library.NO_KERNEL} for n in names}
    return {n: "; ".join(sorted(r)) for n, r in reasons.items() if r and n not in serving}


def _calls(name: str, device: str, repeats: int, width: int) -> list[_Call]:
    arguments = CASES[name](width)
    if name in FUNCTIONS:
        serving, runnable = "python", {"python": FUNCTIONS[name]}
    else:
        serving = library.backends()[name][device].name
        runnable = {serving: getattr(torch.ops.deftx, name), "reference": getattr(reference, name)}
    called = []
    for backend, function in runnable.items():
        row = Row(name, device, backend, backend == serving, _shape(arguments), True, None, None, "")
        try:
            results, seconds = _timed(name, function, arguments, device, repeats, backend == serving)
            called.append(_Call(row._replace(milliseconds=1e3 * seconds), results))
        except Exception as failure:  # a broken backend is a result to report, whatever it raises
            called.append(_Call(row._replace(correct=False, note=f"{type(failure).__name__}: {failure}"), []))
    return called


def _compared(name: str, called: list[_Call], width: int) -> list[Row]:
    """The rows, compared with float64."""
    try:
        arguments = [moved(a, "cpu", torch.float64) for a in CASES[name](width)]
        oracle = _DECOMPOSITIONS.get(name) or getattr(reference, name)
        expected = outputs(name, oracle(*arguments), arguments)
    except _NoOracle as failure:
        return [row._replace(correct=False, note=row.note or str(failure)) for row, _ in called]
    rows = []
    for row, results in called:
        if results:
            error = max(_error(found, expected) for found in results)
            tolerance = _DECOMPOSITION_TOLERANCE if name in _DECOMPOSITIONS else _TOLERANCE
            note = "" if error <= tolerance else f"error above {tolerance:g}"
            row = row._replace(correct=not note, error=error, note=note)
        rows.append(row)
    return rows


def _shape(arguments: list[Any]) -> str:
    """Of the largest tensor; before it the number of tensors of a list in which all have this shape."""
    lists = [[t for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)] for a in arguments]
    tensors = max(filter(None, lists), key=lambda ts: max(t.numel() for t in ts))
    shape = list(max(tensors, key=Tensor.numel).shape)
    if len(tensors) > 1 and all(list(t.shape) == shape for t in tensors):
        shape = [len(tensors), *shape]
    return "×".join(map(str, shape))


# ---- running and comparing ----
_TOLERANCE = 1e-5
# svd_denoise's documented error of a truncation; eigenvectors of 768 rows, by LAPACK in float32: 1e-5
_DECOMPOSITION_TOLERANCE = 5e-5


def moved(argument: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A copy on the device, floating tensors in the dtype; a function makes the argument that belongs to a dtype."""
    if callable(argument):
        return moved(argument(dtype or torch.float32), device)
    if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
        return [moved(a, device, dtype) for a in argument]
    if isinstance(argument, Tensor):
        wanted = dtype if dtype is not None and argument.is_floating_point() else argument.dtype
        return argument.to(device, wanted, copy=True)
    return dtype if isinstance(argument, torch.dtype) and dtype is not None else argument


def outputs(name: str, result: Any, arguments: list[Any]) -> list[Tensor]:
    """What the operator or function returned and wrote, in a form that can be compared."""
    returned = [result] if isinstance(result, Tensor) else list(result or ())
    if name == "truncated_svd":  # singular vectors have free signs: the product is determined
        U, S, Vh = returned
        return [(U * S[..., None, :]) @ Vh, S]
    if name == "eigh":
        values, vectors = returned
        return [values, (vectors * values[..., None, :]) @ vectors.mT, vectors.mT @ vectors]
    if name == "residual_cut":  # bits depend on the dtype, and several ends of the ties keep the same entries
        dtype = arguments[0].dtype
        return [returned[0][:, 0].to(INTEGERS[dtype.itemsize]).view(dtype)]
    return returned + (schemas.tensors_of(arguments) if name.endswith("_") else [])


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    worst = 0.0
    for got, want in zip(found, expected, strict=True):
        if got.shape != want.shape:
            return float("inf")
        if not got.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(got.to(torch.int64), want.to(torch.int64)) else float("inf"))
        elif want.numel():
            error = float((got.to(torch.float64) - want).abs().max() / want.abs().max().clamp(min=1e-30))
            worst = max(worst, error if error == error else float("inf"))
    return worst


_SECONDS = 0.5  # for the calls of one implementation, after those that it needs


def _timed(
    name: str, function: Callable, arguments: list[Any], device: str, repeats: int, serves: bool
) -> tuple[list[list[Tensor]], float]:
    """Results of the first and the last call, and the median seconds: of the first call if it is the only one."""
    times: list[float] = []
    results: list[list[Tensor]] = []
    while not times or (len(times) == 1 and serves) or (len(times) <= repeats and sum(times) < _SECONDS):
        given = [moved(a, device) for a in arguments]
        _wait(device)
        start = time.perf_counter()
        result = function(*given)
        _wait(device)
        times.append(time.perf_counter() - start)
        results[1:] = [[t.cpu() for t in outputs(name, result, given)]]
    return results, statistics.median(times[1:] or times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- the oracle: plain torch in float64, on one thread; its eigenvectors are verified ----
class _NoOracle(RuntimeError):
    """LAPACK's float64 result is wrong, too: nothing to compare with."""


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:  # float64 [..., n, n]
    """torch.linalg.eigh with its result verified: orthonormal vectors, A V = V L, the trace and the norm."""
    values, vectors = torch.linalg.eigh(matrices)
    norm = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    residual = torch.linalg.vector_norm(matrices @ vectors - vectors * values[..., None, :], dim=(-2, -1))
    trace = values.sum(-1) - matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
    errors = {
        "A V - V L": residual / norm,
        "V' V - 1": torch.linalg.vector_norm(vectors.mT @ vectors - identity, dim=(-2, -1)),
        "the trace": trace.abs() / norm,
        "the norm": (torch.linalg.vector_norm(values, dim=-1) / norm - 1).abs(),
    }
    for what, error in errors.items():
        if not bool((error < 1e-10).all()):
            raise _NoOracle(
                "torch.linalg.eigh in float64 is wrong on this machine, so results cannot be checked:"
                f" {what}: {float(error.max()):.0e}"
            )
    return values, vectors


def _svd(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # float64 [..., m, n]
    """By the eigenvectors of the short side's Gram matrix: a third of the time, accurate for large singular values."""
    wide = a.shape[-2] < a.shape[-1]
    tall = a.mT if wide else a
    squares, vectors = _eigh(tall.mT @ tall)
    V, S = vectors.flip(-1), squares.flip(-1).clamp(min=0).sqrt()
    U = (tall @ V) / S.clamp(min=1e-300)[..., None, :]
    return (V, S, U.mT) if wide else (U, S, V.mT)


def _truncated(a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = _svd(a)
    return U[..., :rank], S[..., :rank], Vh[..., :rank, :]


def _denoised(matrices: Tensor, energy: float, density: float) -> list[Tensor]:  # float64 [b, m, n]
    """L + prune(H), ranks, and the shares of the sum of squares in L and, as a norm, in what is lost."""
    results, ranks, energies, residuals = [], [], [], []
    for w, U, S, Vh in zip(matrices, *_svd(matrices)):
        sums = S.square().cumsum(0)
        rank = int(torch.searchsorted(sums, energy * sums[-1])) + 1
        low = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        kept = (w - low).abs().flatten().topk(round(density * w.numel())).indices
        low.view(-1)[kept] = w.flatten()[kept]
        results.append(low)
        ranks.append(rank)
        energies.append(float(sums[rank - 1] / sums[-1]))
        residuals.append(float((w - low).norm() / w.norm()))
    numbers = [torch.tensor(x) for x in (ranks, energies, residuals)]
    return [torch.stack(results), *numbers]


def _svd_denoise(matrices: Tensor, energy: float, density: float) -> list[Tensor]:
    result, info = svd_denoise(matrices, energy=energy, residual_density=density, return_info=True)
    return [result, info["rank"], info["energy"], info["residual"]]


# Public functions that are checked beside the operators, and the oracles of all that decompose.
FUNCTIONS: dict[str, Callable] = {"truncated_svd": truncated_svd, "svd_denoise": _svd_denoise}
_DECOMPOSITIONS: dict[str, Callable] = {
    "eigh": _eigh,
    "eigvalsh": lambda matrices: _eigh(matrices)[0],
    "truncated_svd": _truncated,
    "svd_denoise": _denoised,
}


# ---- one case for each, of layers of a width: at 768, two to three million elements, float32 ----
_GLOBAL, _OR, _TOTAL = schemas.SCOPES["global"], schemas.OPERATIONS["or"], schemas.ELECTIONS["total"]


@functools.cache
def _tensors(width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator) for s in ((4 * width, width), (width,), (width // 4, 64, 8), ())]


def _flipped(width: int) -> list[Tensor]:
    return [t.flip(0) if t.dim() else t.clone() for t in _tensors(width)]


def _mask(tensors: list[Tensor], density: float = 0.05) -> tuple[Tensor, Tensor]:
    crow, col, _ = reference.topk_mask(tensors, [], [round(density * sum(t.numel() for t in tensors))], _GLOBAL)
    return crow, col


@functools.cache
def _tensors_mask(width: int) -> tuple[Tensor, Tensor]:
    return _mask(_tensors(width))


def _csr_case(width: int, *more: Any, values: bool = True) -> list[Any]:
    crow, col = _tensors_mask(width)
    return [_tensors(width), crow, col, *([torch.linspace(-1, 1, len(col))] if values else []), *more]


def _restore_case(width: int) -> list[Any]:
    """Of a tensor's entries some have the bits of the sum, others not. The sums are exact in float32 and float64."""
    tensors, crow, col, values, alpha = _csr_case(width, 0.5)
    tensors, values = [(t * 64).round() / 64 for t in tensors], (values * 64).round() / 64
    former = torch.zeros_like(values)
    reference.csr_add_(tensors, crow, col, values, alpha, former)
    return [tensors, crow, col, former, values.clamp(max=0), alpha]


def _sum_case(width: int) -> list[Any]:
    masks = [_tensors_mask(width), _mask(_flipped(width))]
    crow, col = ([m[i] for m in masks] for i in range(2))
    values = [torch.linspace(-1, 1, len(c)) for c in col]
    return [*reference.csr_combine(*masks[0], *masks[1], _OR), crow, col, values, [0.5, 2.0], _TOTAL, torch.float32]


def _adamw_case(width: int) -> list[Any]:
    crow, col = _tensors_mask(width)
    exp_avg, exp_avg_sq = (torch.linspace(0.1, 1, len(col)) for _ in range(2))
    arguments: dict[str, Any] = dict.fromkeys(schemas.AdamWArgs._fields)  # None: values, decay_to, grad_scale, ...
    arguments |= dict(params=_tensors(width), grads=_flipped(width), compact_grads=False, maximize=False)
    arguments |= dict(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, crow_indices=crow, col_indices=col)
    arguments |= dict(step=torch.tensor(3.0), lr=torch.tensor(0.01), beta1=0.9, beta2=0.999, eps=1e-8)
    arguments |= dict(weight_decay=0.01, l1=0.0)
    return list(arguments.values())


def _linear_case(width: int) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    x, gradient = torch.randn(512, width, generator=generator), torch.randn(512, 4 * width, generator=generator)
    return [gradient, x, *_mask([torch.randn(4 * width, width, generator=generator)]), torch.float32]


def _embedding_case(width: int) -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    gradient, ids = torch.randn(2048, width, generator=generator), torch.randint(0, 4000, (2048,), generator=generator)
    return [gradient, ids, *_mask([torch.randn(4000, width, generator=generator)]), 1, torch.float32]


_SPIKES = 0.01  # the share of large entries, which is what denoising keeps of H


@functools.cache
def _matrices(width: int) -> Tensor:
    """[3, width, 4/3 width]: rank 8, noise and a few large entries, so that the results are well conditioned."""
    generator = torch.Generator().manual_seed(3)
    m, n = width, 4 * width // 3
    found = torch.randn(3, m, 8, generator=generator) @ torch.randn(3, 8, n, generator=generator)
    found += 0.01 * torch.randn(3, m, n, generator=generator)
    for w in found:
        w.view(-1)[torch.randperm(m * n, generator=generator)[: round(_SPIKES * m * n)]] += 3
    return found


def _grams(width: int) -> Tensor:
    return _matrices(width) @ _matrices(width).mT


def _bits(magnitude: float, dtype: torch.dtype) -> int:
    return int(reference.magnitude_bits(torch.tensor([magnitude], dtype=dtype)))


def _cut(width: int) -> Callable[[torch.dtype], Tensor]:
    """Keeps the residuals above 1 of both matrices of `_factors`, and the first of those that are 1."""
    return lambda dtype: torch.tensor([[_bits(1, dtype), 0], [_bits(1, dtype), width * width // 3]])


def _factors(width: int, *more: Any) -> list[Any]:
    """Factors of -1, 0 and 1, and their product plus multiples of 1/4: exact in every dtype and order of summation."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randint(-1, 2, (2, s, 6), generator=generator).float() for s in (width, 3 * width))
    noise = torch.tensor([0, 0.25, -0.25, 1, 4])[torch.randint(0, 5, (2, width, 3 * width), generator=generator)]
    return [left @ right.mT + noise, left, right, *more]


def _split_case(width: int) -> list[Any]:
    x = [*_matrices(width)]
    columns, rows = (torch.cat([torch.stack(x)] * 3, dim).bfloat16() for dim in (-1, -2))
    return [x, columns, [1, 0, 0], rows, [0, 1, 0]]


def _diff_case(width: int) -> list[Any]:
    """bfloat16 tensors as integers, which the oracle does not convert, and others of which 1 % differ."""
    new = [t.bfloat16().view(torch.int16) for t in _tensors(width)]
    return [new, [t ^ (other > 2.3) for t, other in zip(new, _flipped(width))]]


def _exchange_case(width: int) -> list[Any]:
    new, old = _diff_case(width)
    return [old, *reference.bit_diff(new, old)]


def _change_case(width: int) -> list[Any]:
    _, offsets, indices, values = _exchange_case(width)
    return [offsets, indices, values.flip(0), values]


def _marks_case(width: int) -> list[Any]:
    """Parts that begin within words, of words with a third of the bits set."""
    flags = (_tensors(width)[0].view(-1, 32) > 0.4).to(torch.int64) << torch.arange(32)
    words = flags.sum(1)
    starts = torch.tensor([0, 7, width, width * width + 13, 32 * len(words)])
    return [torch.where(words > 2**31 - 1, words - 2**32, words).to(torch.int32), starts]


CASES: dict[str, Callable[[int], list[Any]]] = {
    "csr_gather": lambda n: _csr_case(n, values=False),
    "csr_scatter_": _csr_case,
    "csr_add_": lambda n: _csr_case(n, 0.5),
    "csr_restore_": _restore_case,
    "csr_combine": lambda n: [*_tensors_mask(n), *_mask(_flipped(n)), _OR],
    "csr_sum": _sum_case,
    "dense_to_csr": lambda n: [[t > 1.5 for t in _tensors(n)]],
    "topk_mask": lambda n: [_tensors(n), [], [n * n // 5], _GLOBAL],
    # Magnitude bits depend on the dtype, so these two have float64 scores from the start.
    "magnitude_histogram": lambda n: [[t.double() for t in _tensors(n)], 0, 48],
    "threshold_mask": lambda n: [[t.double() for t in _tensors(n)], 0x4000 << 48, [0] * 4],  # above 2
    "eigh": lambda n: [_grams(n)],
    "eigvalsh": lambda n: [_grams(n)],
    "residual_cut": lambda n: _factors(n, 3 * n * n // 2),
    "low_rank_denoised": lambda n: _factors(n, _cut(n)),
    "split_bf16_": _split_case,
    "sparse_adamw_": _adamw_case,
    "csr_square_sum": lambda n: _csr_case(n, values=False),
    "masked_linear_grad": _linear_case,
    "masked_embedding_grad": _embedding_case,
    "bit_diff": _diff_case,
    "flat_exchange_": _exchange_case,
    "bit_checksum": lambda n: _diff_case(n)[:1],
    "bit_checksum_change": _change_case,
    "set_bits": _marks_case,
    "truncated_svd": lambda n: [_matrices(n), 8],
    "svd_denoise": lambda n: [_matrices(n), 0.9, _SPIKES],
}
assert CASES.keys() == schemas.SCHEMAS.keys() | FUNCTIONS.keys()


# ---- printing ----
def versions() -> dict[str, str]:
    """Versions, threads and GPU, for an issue report."""
    from importlib.metadata import PackageNotFoundError, version

    variable = os.environ.get("OMP_NUM_THREADS")
    origin = "torch default" if variable is None else f"OMP_NUM_THREADS={variable}"
    threads = f"{torch.get_num_threads()} ({origin})"
    found = {"python": platform.python_version(), "platform": platform.platform(), "threads": threads}
    for package in ("deftx-kernels", "torch", "triton", "cupy-cuda13x", "numpy", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        found["gpu"] = "none" if torch.version.cuda else "none (this torch has no CUDA)"
    return found


def print_table(rows: list[Row]) -> None:
    """Versions, and one line for each row."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=140)
    for name, value in versions().items():
        console.print(f"{name:16} {value}", highlight=False)
    for name, reason in absent().items():
        console.print(f"{name + ' kernels':16} {reason}", highlight=False)
    table = Table()
    for column in ("op", "device", "backend", "serves", "shape", "check"):
        table.add_column(column, no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    noted = any(row.note for row in rows)
    if noted:
        table.add_column("note")
    for row in rows:
        check = "[green]correct" if row.correct else "[red]WRONG"
        error = "" if row.error is None else f"{row.error:.1e}"
        milliseconds = "" if row.milliseconds is None else f"{row.milliseconds:.2f} ms"
        cells = [row.op, row.device, row.backend, "yes" if row.serves else "", row.shape, check, error, milliseconds]
        table.add_row(*cells, *([row.note] if noted else []))
    console.print(table)
    for op, served in library.backends().items():
        for device in {row.device for row in rows}:
            for condition, instead in served[device].limits.items():
                console.print(f"{op} on {device}, {condition}: {instead}", highlight=False)
