"""`deftx doctor`: every operator on every implementation present, checked against its float64 oracle, with its speed."""

import functools
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels import _library, _ops, reference


class Row(NamedTuple):
    """One operator on one implementation of one device."""

    op: str
    device: str
    backend: str
    serves: bool  # what a call of the operator on this device runs
    correct: bool
    error: float | None  # largest error relative to the largest value; 0 for integers
    milliseconds: float | None  # median
    note: str  # what is wrong


def run(device: str | None = None, *, repeats: int = 5) -> list[Row]:
    """Check every operator.

    Args:
        device: "cpu" or "cuda"; by default both where there is a GPU.
        repeats: timed calls for each row, after one that is not timed.

    Raises:
        ValueError: an unknown device.
    """
    if device not in (None, *_library.DEVICES):
        raise ValueError(f"device must be one of {', '.join(_library.DEVICES)}, got {device!r}")
    devices = [d for d in _library.DEVICES if device in (None, d) and (d != "cuda" or torch.cuda.is_available())]
    if not devices:
        raise ValueError(f"device {device!r}: {absent().get('cuda', 'there is no CUDA device')}")
    return [row for op, served in _library.backends().items() for d in devices for row in _check(op, d, served[d], repeats)]


def absent() -> dict[str, str]:
    """Implementation that is not on this machine → why ("no kernel for this op" is no reason of the machine's)."""
    others = [b.others for served in _library.backends().values() for b in served.values()]
    names = ("c++", "cuda", "triton")
    reasons = {n: {o[n] for o in others if n in o} - {_library.NO_KERNEL} for n in names}
    return {n: "; ".join(sorted(r)) for n, r in reasons.items() if r and not any(n == b for b in _serving())}


def _serving() -> set[str]:
    return {b.name for served in _library.backends().values() for b in served.values()}


def _check(op: str, device: str, served: _library.Backend, repeats: int) -> list[Row]:
    arguments = _CASES[op]()
    expected = _outputs(op, getattr(reference, op), [_moved(a, "cpu", torch.float64) for a in arguments])
    rows = []
    runnable: dict[str, Callable] = {served.name: getattr(torch.ops.deftx, op), "reference": getattr(reference, op)}
    for name, function in runnable.items():
        serves = name == served.name
        try:
            error = _error(_outputs(op, function, [_moved(a, device) for a in arguments]), expected)
            duration = _duration(function, [_moved(a, device) for a in arguments], device, repeats)
            note = "" if error <= _TOLERANCE else f"error above {_TOLERANCE:g}"
            rows.append(Row(op, device, name, serves, not note, error, 1e3 * duration, note))
        except Exception as failure:  # a broken backend is a finding to report, whatever it raises
            rows.append(Row(op, device, name, serves, False, None, None, f"{type(failure).__name__}: {failure}"))
    return rows


# ---- running and comparing ----

_TOLERANCE = 1e-5


def _moved(argument: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    """A copy on the device, floating tensors in the dtype; a function gives the argument that belongs to a dtype."""
    if callable(argument):
        return _moved(argument(dtype or torch.float32), device)
    if isinstance(argument, list) and argument and isinstance(argument[0], Tensor):
        return [_moved(a, device, dtype) for a in argument]
    if isinstance(argument, Tensor):
        return argument.to(device, dtype if dtype is not None and argument.is_floating_point() else argument.dtype, copy=True)
    return dtype if isinstance(argument, torch.dtype) and dtype is not None else argument


def _outputs(op: str, function: Callable, arguments: list[Any]) -> list[Tensor]:
    """What the operator returned and what it wrote."""
    result = function(*arguments)
    returned = [result] if isinstance(result, Tensor) else list(result or ())
    if op == "truncated_svd":  # singular vectors have free signs: the product is what is determined
        U, S, Vh = returned
        return [(U * S[..., None, :]) @ Vh, S]
    if op == "eigh":
        values, vectors = returned
        return [values, (vectors * values[..., None, :]) @ vectors.mT]
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
                worst, float(difference / want.abs().max().clamp(min=1e-30)) if torch.isfinite(difference) else float("inf")
            )
    return worst


def _duration(function: Callable, arguments: list[Any], device: str, repeats: int) -> float:
    times = []
    for i in range(repeats + 1):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function(*arguments)
        if device == "cuda":
            torch.cuda.synchronize()
        if i:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


# ---- one case for each operator: 1 to 2 million elements, float32 ----


def _tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator) for s in ((1024, 1024), (1000,), (256, 64, 8), ())]


def _mask(tensors: list[Tensor], density: float = 0.05) -> tuple[Tensor, Tensor]:
    crow, col, _ = reference.topk_mask(tensors, [], [round(density * sum(t.numel() for t in tensors))], _ops.SCOPES["global"])
    return crow, col


def _csr_case(*more: Any, values: bool = True) -> list[Any]:
    tensors = _tensors()
    crow, col = _mask(tensors)
    return [tensors, crow, col, *([torch.linspace(-1, 1, len(col))] if values else []), *more]


def _adamw_case() -> list[Any]:
    tensors = _tensors()
    crow, col = _mask(tensors)
    state = [torch.linspace(0.1, 1, len(col)) for _ in range(2)]
    step, lr = torch.tensor(3.0), torch.tensor(0.01)
    gradients = [t.flip(0) if t.dim() else t.clone() for t in tensors]
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


def _linear_case() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    x, gradient = torch.randn(256, 1024, generator=generator), torch.randn(256, 768, generator=generator)
    return [gradient, x, *_mask([gradient.mT @ x]), torch.float32]


def _embedding_case() -> list[Any]:
    generator = torch.Generator().manual_seed(2)
    gradient, ids = torch.randn(2048, 256, generator=generator), torch.randint(0, 4000, (2048,), generator=generator)
    return [gradient, ids, *_mask([torch.randn(4000, 256, generator=generator)]), 1, torch.float32]


def _matrices() -> Tensor:
    """Low rank and noise, so that the leading triplets are determined."""
    generator = torch.Generator().manual_seed(3)
    left, right = torch.randn(2, 256, 8, generator=generator), torch.randn(2, 8, 384, generator=generator)
    return left @ right + 0.01 * torch.randn(2, 256, 384, generator=generator)


def _bits(magnitude: float, dtype: torch.dtype) -> int:
    return int(reference.magnitude_bits(torch.tensor([magnitude], dtype=dtype)))


def _cut(dtype: torch.dtype) -> Tensor:
    """Keeps the residuals above 1 of both matrices of `_factors`, and the first of those that are 1."""
    return torch.tensor([[_bits(1, dtype), 0], [_bits(1, dtype), 40_000]])


def _factors(*more: Any) -> list[Any]:
    """Factors of -1, 0 and 1, and their product with a few multiples of 1/4 added: exact in every dtype and order of summation."""
    generator = torch.Generator().manual_seed(5)
    left, right = (torch.randint(-1, 2, (2, s, 6), generator=generator).float() for s in (512, 1024))
    noise = torch.tensor([0, 0.25, -0.25, 1, 4])[torch.randint(0, 5, (2, 512, 1024), generator=generator)]
    return [left @ right.mT + noise, left, right, *more]


def _denoise_case() -> list[Any]:
    matrices = list(_matrices())
    totals = torch.stack([w.double().square().sum() for w in matrices])
    return [matrices, [torch.empty_like(w) for w in matrices], totals, 0, 0.9, 0.0, 0.01, 2, None, 2]


_CASES: dict[str, Callable[[], list[Any]]] = {
    "csr_gather": lambda: _csr_case(values=False),
    "csr_scatter_": _csr_case,
    "csr_add_": lambda: _csr_case(0.5),
    "csr_combine": lambda: [*_mask(_tensors()), *_mask([t.flip(0) if t.dim() else t for t in _tensors()]), _ops.OPERATIONS["or"]],
    "dense_to_csr": lambda: [[t > 1.5 for t in _tensors()]],
    "topk_mask": lambda: [_tensors(), [], [50_000], _ops.SCOPES["global"]],
    # Bits are those of a dtype, so these two have float64 scores from the start.
    "magnitude_histogram": lambda: [[t.double() for t in _tensors()], 0, 48],
    "threshold_mask": lambda: [[t.double() for t in _tensors()], 0x4000 << 48, [0] * 4],  # above 2
    "truncated_svd": lambda: [_matrices(), 8, 2, torch.randn(256, 24, generator=torch.Generator().manual_seed(4))],
    "svd_denoise_": _denoise_case,
    "eigh": lambda: [_matrices() @ _matrices().mT],
    "eigvalsh": lambda: [_matrices() @ _matrices().mT],
    "residual_cut": lambda: _factors(250_000),
    "low_rank_denoised": lambda: _factors(_cut),
    "low_rank_histogram": lambda: _factors(_cut, 0, lambda dtype: 8 * dtype.itemsize - 16),
    "low_rank_mask": lambda: _factors(_cut, functools.partial(_bits, 6), [1000, 0]),
    "sparse_adamw_": _adamw_case,
    "csr_square_sum": lambda: _csr_case(values=False),
    "masked_linear_grad": _linear_case,
    "masked_embedding_grad": _embedding_case,
}
assert _CASES.keys() == _ops.SCHEMAS.keys()


# ---- printing ----


def versions() -> dict[str, str]:
    """What an issue report needs."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform(), "threads": str(torch.get_num_threads())}
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
        console = Console(width=120)
    for name, value in versions().items():
        console.print(f"{name:16} {value}", highlight=False)
    for name, reason in absent().items():
        console.print(f"{name + ' kernels':16} {reason}", highlight=False)
    table = Table()
    for column in ("op", "device", "backend", "serves", "check"):
        table.add_column(column, no_wrap=True)
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    noted = any(row.note for row in rows)
    if noted:
        table.add_column("note")
    for row in rows:
        cells = [row.op, row.device, row.backend, "yes" if row.serves else "", "[green]correct" if row.correct else "[red]WRONG"]
        cells += ["" if row.error is None else f"{row.error:.1e}", "" if row.milliseconds is None else f"{row.milliseconds:.2f} ms"]
        table.add_row(*cells, *([row.note] if noted else []))
    console.print(table)
