"""`deftx doctor`: every operator on every implementation present, checked against its float64 oracle, with its speed."""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.ops import library, reference, schemas


class Row(NamedTuple):
    """One operator on one implementation of one device."""

    op: str
    device: str
    backend: str
    serves: bool  # what a call of the operator on this device runs
    shape: str  # of its largest tensor
    correct: bool
    error: float | None  # largest error relative to the largest value; 0 for integers
    milliseconds: float | None  # median
    note: str  # what is wrong


class _Called(NamedTuple):
    """What an implementation gave, not compared yet."""

    row: Row
    results: list[list[Tensor]]  # of the first call and of the last one, on the CPU


WIDTH = 768  # of the layers that the operators are checked on: a faulty LAPACK can be right on small matrices


def run(device: str | None = None, *, repeats: int = 5, width: int = WIDTH) -> list[Row]:
    """Check every operator, with as many threads as the caller's, from the first call on.

    Args:
        device: "cpu" or "cuda"; by default both where there is a GPU.
        repeats: timed calls for each row at the most, after the first; slow ones are called once or twice.
        width: of the layers; that of a BERT base by default.

    Raises:
        ValueError: an unknown device.
    """
    if device not in (None, *library.DEVICES):
        raise ValueError(f"device must be one of {', '.join(library.DEVICES)}, got {device!r}")
    devices = [d for d in library.DEVICES if device in (None, d) and (d != "cuda" or torch.cuda.is_available())]
    if not devices:
        raise ValueError(f"device {device!r}: {absent().get('cuda', 'there is no CUDA device')}")
    # All calls come before the first oracle: nothing has been run, or set, that could hide a fault.
    called = [
        (op, [c for d in devices for c in _called(op, d, served[d], repeats, width)])
        for op, served in library.backends().items()
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for op, calls in called for row in _compared(op, calls, width)]
    finally:
        torch.set_num_threads(threads)


def absent() -> dict[str, str]:
    """Implementation that is not on this machine → why ("no kernel for this op" is no reason of the machine's)."""
    others = [b.others for served in library.backends().values() for b in served.values()]
    names = ("c++", "cuda", "triton")
    reasons = {n: {o[n] for o in others if n in o} - {library.NO_KERNEL} for n in names}
    return {n: "; ".join(sorted(r)) for n, r in reasons.items() if r and not any(n == b for b in _serving())}


def _serving() -> set[str]:
    return {b.name for served in library.backends().values() for b in served.values()}


def _called(op: str, device: str, served: library.Backend, repeats: int, width: int) -> list[_Called]:
    arguments = _CASES[op](width)
    called = []
    runnable: dict[str, Callable] = {served.name: getattr(torch.ops.deftx, op), "reference": getattr(reference, op)}
    for name, function in runnable.items():
        serves = name == served.name
        row = Row(op, device, name, serves, _shape(arguments), True, None, None, "")
        try:
            results, seconds = _calls(op, function, arguments, device, repeats, serves)
            called.append(_Called(row._replace(milliseconds=1e3 * seconds), results))
        except Exception as failure:  # a broken backend is a finding to report, whatever it raises
            called.append(_Called(row._replace(correct=False, note=f"{type(failure).__name__}: {failure}"), []))
    return called


def _compared(op: str, called: list[_Called], width: int) -> list[Row]:
    """The rows, with what float64 says of them."""
    try:
        arguments = [_moved(a, "cpu", torch.float64) for a in _CASES[op](width)]
        expected = _outputs(op, _oracle(op)(*arguments), arguments)
    except _NoOracle as failure:
        return [row._replace(correct=False, note=row.note or str(failure)) for row, _ in called]
    rows = []
    for row, results in called:
        if results:
            error = max(_error(outputs, expected) for outputs in results)
            tolerance = _DECOMPOSITION_TOLERANCE if op in _DECOMPOSING else _TOLERANCE
            note = "" if error <= tolerance else f"error above {tolerance:g}"
            row = row._replace(correct=not note, error=error, note=note)
        rows.append(row)
    return rows


def _shape(arguments: list[Any]) -> str:
    """Of the largest tensor; before it the number of tensors of a list in which all have this shape."""
    largest, label = -1, ""
    for argument in arguments:
        tensors = [t for t in (argument if isinstance(argument, list) else [argument]) if isinstance(t, Tensor)]
        for tensor in tensors:
            if tensor.numel() > largest:
                largest, shape = tensor.numel(), list(tensor.shape)
                shape = (
                    [len(tensors), *shape]
                    if len(tensors) > 1 and all(t.shape == tensor.shape for t in tensors)
                    else shape
                )
                label = "×".join(map(str, shape))
    return label


# ---- running and comparing ----

_TOLERANCE = 1e-5
# what svd_denoise promises of a truncation; eigenvectors of 768 rows, by LAPACK in float32: 1e-5
_DECOMPOSITION_TOLERANCE = 5e-5


def _moved(argument: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A copy on the device, floating tensors in the dtype; a function gives the argument that belongs to a dtype."""
    if callable(argument):
        return _moved(argument(dtype or torch.float32), device)
    if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
        return [_moved(a, device, dtype) for a in argument]
    if isinstance(argument, Tensor):
        return argument.to(
            device, dtype if dtype is not None and argument.is_floating_point() else argument.dtype, copy=True
        )
    return dtype if isinstance(argument, torch.dtype) and dtype is not None else argument


def _outputs(op: str, result: Any, arguments: list[Any]) -> list[Tensor]:
    """What the operator returned and what it wrote."""
    returned = [result] if isinstance(result, Tensor) else list(result or ())
    if op == "truncated_svd":  # singular vectors have free signs: the product is what is determined
        U, S, Vh = returned
        return [(U * S[..., None, :]) @ Vh, S]
    if op == "eigh":
        values, vectors = returned
        return [values, (vectors * values[..., None, :]) @ vectors.mT, vectors.mT @ vectors]
    if op == "residual_cut":  # bits are those of a dtype, and several ends of the ties keep the same entries
        dtype = arguments[0].dtype
        return [returned[0][:, 0].to({4: torch.int32, 8: torch.int64}[dtype.itemsize]).view(dtype)]
    if op == "low_rank_histogram":  # which bin a magnitude has depends on the dtype
        return [returned[0][returned[0] > 0]]
    if op.endswith("_"):
        for argument in arguments:
            returned += argument if isinstance(argument, list) else [argument] if isinstance(argument, Tensor) else []
    return returned


def _error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    worst = 0.0
    for got, want in zip(outputs, expected, strict=True):
        if got.shape != want.shape:
            return float("inf")
        if not got.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(got.cpu().to(torch.int64), want.to(torch.int64)) else float("inf"))
        elif want.numel():
            difference = (got.cpu().to(torch.float64) - want).abs().max()
            worst = max(
                worst,
                float(difference / want.abs().max().clamp(min=1e-30)) if torch.isfinite(difference) else float("inf"),
            )
    return worst


_SECONDS = 0.5  # for the calls of one implementation, after those that it needs


def _calls(
    op: str, function: Callable, arguments: list[Any], device: str, repeats: int, serves: bool
) -> tuple[list[list[Tensor]], float]:
    """What the first call and the last one gave, and the median duration in seconds, without the first if there are
    others.
    """
    times: list[float] = []
    results = []
    while not times or (len(times) == 1 and serves) or (len(times) <= repeats and sum(times) < _SECONDS):
        given = [_moved(a, device) for a in arguments]
        _wait(device)
        start = time.perf_counter()
        result = function(*given)
        _wait(device)
        times.append(time.perf_counter() - start)
        if len(times) == 1:
            results.append([t.cpu() for t in _outputs(op, result, given)])
    if len(times) > 1:
        results.append([t.cpu() for t in _outputs(op, result, given)])
    return results, statistics.median(times[1:] or times)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


# ---- the oracle: the plain-torch functions in float64, on one thread, with eigenvectors that are proved ----


class _NoOracle(RuntimeError):
    """LAPACK is wrong in float64, too."""


def _oracle(op: str) -> Callable:
    return _DECOMPOSING[op] if op in _DECOMPOSING else getattr(reference, op)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:  # float64 [..., n, n]
    """torch.linalg.eigh, whose result is proved: orthonormal vectors, A V = V L, the trace and the norm."""
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
                f"torch.linalg.eigh in float64 is wrong on this machine, so nothing is known: {what}: {float(error.max()):.0e}"
            )
    return values, vectors


def _svd(a: Tensor, full_matrices: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # float64 [..., m, n]
    """By the eigenvectors of the Gram matrix of the short side: a third of the time, and exact enough for large
    singular values.
    """
    wide = a.shape[-2] < a.shape[-1]
    tall = a.mT if wide else a
    squares, vectors = _eigh(tall.mT @ tall)
    V, S = vectors.flip(-1), squares.flip(-1).clamp(min=0).sqrt()
    U = (tall @ V) / S.clamp(min=1e-300)[..., None, :]
    return (V, S, U.mT) if wide else (U, S, V.mT)


_DECOMPOSING: dict[str, Callable] = {
    "eigh": _eigh,
    "eigvalsh": lambda matrices: _eigh(matrices)[0],
}


# ---- one case for each operator, of layers of a width: at 768, two to three million elements, float32 ----

_GLOBAL, _OR = schemas.SCOPES["global"], schemas.OPERATIONS["or"]


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


def _adamw_case(width: int) -> list[Any]:
    tensors, gradients = _tensors(width), _flipped(width)
    crow, col = _tensors_mask(width)
    state = [torch.linspace(0.1, 1, len(col)) for _ in range(2)]
    step, lr = torch.tensor(3.0), torch.tensor(0.01)
    return [
        tensors,
        gradients,
        False,
        *state,
        None,
        crow,
        col,
        step,
        lr,
        0.9,
        0.999,
        1e-8,
        0.01,
        None,
        0.0,
        False,
        None,
        None,
        None,
    ]


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
    """[3, width, 4/3 width]: rank 8, noise and a few large entries, so that what is to be found is determined."""
    generator = torch.Generator().manual_seed(3)
    m, n = width, 4 * width // 3
    found = torch.randn(3, m, 8, generator=generator) @ torch.randn(3, 8, n, generator=generator)
    found += 0.01 * torch.randn(3, m, n, generator=generator)
    for w in found:
        w.view(-1)[torch.randperm(m * n, generator=generator)[: round(_SPIKES * m * n)]] += 3
    return found


def _grams(width: int) -> Tensor:
    return _matrices(width) @ _matrices(width).mT


def _svd_case(width: int) -> list[Any]:
    return [_matrices(width), 8, 2, torch.randn(width, 24, generator=torch.Generator().manual_seed(4))]


def _bits(magnitude: float, dtype: torch.dtype) -> int:
    return int(reference.magnitude_bits(torch.tensor([magnitude], dtype=dtype)))


def _cut(width: int) -> Callable[[torch.dtype], Tensor]:
    """Keeps the residuals above 1 of both matrices of `_factors`, and the first of those that are 1."""
    return lambda dtype: torch.tensor([[_bits(1, dtype), 0], [_bits(1, dtype), width * width // 3]])


def _factors(width: int, *more: Any) -> list[Any]:
    """Factors of -1, 0 and 1, and their product with a few multiples of 1/4 added: exact in every dtype and order of
    summation.
    """
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randint(-1, 2, (2, s, 6), generator=generator).float() for s in (width, 3 * width))
    noise = torch.tensor([0, 0.25, -0.25, 1, 4])[torch.randint(0, 5, (2, width, 3 * width), generator=generator)]
    return [left @ right.mT + noise, left, right, *more]


def _denoise_case(width: int) -> list[Any]:
    matrices = list(_matrices(width))
    totals = torch.stack([w.double().square().sum() for w in matrices])
    return [matrices, [torch.empty_like(w) for w in matrices], totals, 0, 0.9, 0.0, _SPIKES, 2, None, len(matrices)]


_CASES: dict[str, Callable[[int], list[Any]]] = {
    "csr_gather": lambda n: _csr_case(n, values=False),
    "csr_scatter_": _csr_case,
    "csr_add_": lambda n: _csr_case(n, 0.5),
    "csr_combine": lambda n: [*_tensors_mask(n), *_mask(_flipped(n)), _OR],
    "dense_to_csr": lambda n: [[t > 1.5 for t in _tensors(n)]],
    "topk_mask": lambda n: [_tensors(n), [], [n * n // 5], _GLOBAL],
    # Bits are those of a dtype, so these two have float64 scores from the start.
    "magnitude_histogram": lambda n: [[t.double() for t in _tensors(n)], 0, 48],
    "threshold_mask": lambda n: [[t.double() for t in _tensors(n)], 0x4000 << 48, [0] * 4],  # above 2
    "eigh": lambda n: [_grams(n)],
    "eigvalsh": lambda n: [_grams(n)],
    "residual_cut": lambda n: _factors(n, 3 * n * n // 2),
    "low_rank_denoised": lambda n: _factors(n, _cut(n)),
    "sparse_adamw_": _adamw_case,
    "csr_square_sum": lambda n: _csr_case(n, values=False),
    "masked_linear_grad": _linear_case,
    "masked_embedding_grad": _embedding_case,
}
assert _CASES.keys() == schemas.SCHEMAS.keys()


# ---- printing ----


def versions() -> dict[str, str]:
    """What an issue report needs."""
    from importlib.metadata import PackageNotFoundError, version

    asked = os.environ.get("OMP_NUM_THREADS")
    threads = f"{torch.get_num_threads()} ({'torch default' if asked is None else f'OMP_NUM_THREADS={asked}'})"
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
        cells = [
            row.op,
            row.device,
            row.backend,
            "yes" if row.serves else "",
            row.shape,
            "[green]correct" if row.correct else "[red]WRONG",
        ]
        cells += [
            "" if row.error is None else f"{row.error:.1e}",
            "" if row.milliseconds is None else f"{row.milliseconds:.2f} ms",
        ]
        table.add_row(*cells, *([row.note] if noted else []))
    console.print(table)
