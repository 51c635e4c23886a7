"""What an operator's arguments must be, for the implementations that Python registers: one function for each operator.

`functional` and the classes above it have checked what users gave. A direct call of `torch.ops.deftx.*` reaches an
implementation as it is, and a size or an index that does not fit would let a kernel read or write other memory. The
compiled libraries check the same in C++. Nothing here reads a tensor's elements: a GPU would have to be waited for.
`contents` does, for the reference.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_WIDE_FLOATS = frozenset((torch.float32, torch.float64))
_COLUMNS = frozenset((torch.uint16, torch.int32))
_SCALARS = frozenset((torch.float32, torch.float64, torch.int32, torch.int64))


def checked(op: str, function: Callable, *, reads_contents: bool = False, looks_at_tensors: bool = False) -> Callable:
    """`function`, an implementation of the operator, behind the operator's checks.

    reads_contents: also check the elements of crow_indices, col_indices and indices, for a function that waits for the
        device.
    looks_at_tensors: the function itself checks the tensors of the mask.
    """
    check = (_WITHOUT_TENSORS if looks_at_tensors else CHECKS).get(op)
    if check is None:
        return function
    contents = _CONTENTS.get(op) if reads_contents else None

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        check(*arguments)
        if contents is not None:
            contents(*arguments)
        return function(*arguments)

    return run


_STRIDED = torch.strided


# ---- tensors and numbers ----
def _tensor(t: Tensor, name: str, device: torch.device, dtypes: frozenset[torch.dtype]) -> None:
    if t.dtype in dtypes and t.device == device and t.layout is _STRIDED:
        return
    if t.dtype not in dtypes:
        raise TypeError(
            f"{name} must be {' or '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))}, got {t.dtype}"
        )
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, the other arguments are on {device}")
    raise TypeError(f"{name} must be a dense (strided) tensor, got layout {t.layout}")


def _contiguous(t: Tensor, name: str, device: torch.device, dtypes: frozenset[torch.dtype]) -> None:
    _tensor(t, name, device, dtypes)
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _shape(t: Tensor, name: str, shape: tuple[int, ...], what: str) -> None:
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {what} = {list(shape)}, got {list(t.shape)}")


def _number(value: float, name: str, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def _compact(t: Tensor, name: str, device: torch.device, dtypes: frozenset[torch.dtype], nnz: int) -> None:
    _contiguous(t, name, device, dtypes)
    _shape(t, name, (nnz,), "[nnz]")


def _scalar(t: Tensor, name: str, device: torch.device) -> None:
    _tensor(t, name, device, _SCALARS)
    if t.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {list(t.shape)}")


# ---- masks ----
_INT64 = frozenset((torch.int64,))


def _mask(
    crow_indices: Tensor,  # int64 [rows + 1]
    col_indices: Tensor,  # uint16 or int32 [nnz]
    device: torch.device,
    rows: int | None = None,
) -> None:
    _contiguous(crow_indices, "crow_indices", device, _INT64)
    _contiguous(col_indices, "col_indices", device, _COLUMNS)
    if crow_indices.dim() != 1 or col_indices.dim() != 1 or crow_indices.numel() == 0:
        raise ValueError(
            f"crow_indices must have shape [rows + 1] and col_indices [nnz], got {list(crow_indices.shape)} and"
            f" {list(col_indices.shape)}"
        )
    found = crow_indices.numel() - 1
    if rows is not None and found != rows:
        raise ValueError(f"crow_indices has {found + 1} elements; {rows} rows need {rows + 1}")
    if found == 0 and col_indices.numel():
        raise ValueError(f"a mask without rows must have no entries, col_indices has {col_indices.shape[0]}")


def _rows_and_columns(t: Tensor) -> tuple[int, int]:
    return (t.shape[0], math.prod(t.shape[1:])) if t.dim() > 1 else (1, t.numel())


def _dense(
    tensors: Sequence[Tensor], name: str, device: torch.device, dtypes: frozenset[torch.dtype] | None = None
) -> None:
    """Tensors of a mask: contiguous, of one dtype."""
    for i, t in enumerate(tensors):
        _contiguous(t, f"{name}[{i}]", device, frozenset((tensors[0].dtype,)) if i or dtypes is None else dtypes)


def _apart(tensors: Sequence[Tensor], name: str) -> None:
    """Tensors that are written must not share memory: which of two writes stays would be chance."""
    spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel())
    if any(end > start for (_, end), (start, _) in zip(spans, spans[1:])):
        raise ValueError(f"two of {name} share memory")


def _csr(
    tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, dtypes: frozenset[torch.dtype] | None = None
) -> None:
    device = col_indices.device
    _mask(crow_indices, col_indices, device, sum(_rows_and_columns(t)[0] for t in tensors))
    _dense(tensors, "tensors", device, dtypes)


def csr_gather(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor) -> None:
    _csr(tensors, crow_indices, col_indices)


def csr_scatter_(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, values: Tensor) -> None:
    _csr(tensors, crow_indices, col_indices)
    if tensors:
        _compact(values, "values", col_indices.device, frozenset((tensors[0].dtype,)), col_indices.shape[0])
    _apart(tensors, "tensors")


def csr_add_(
    tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, values: Tensor, alpha: float
) -> None:
    _csr(tensors, crow_indices, col_indices, _FLOATS)
    if tensors:
        _compact(
            values, "values", col_indices.device, frozenset((torch.float32, tensors[0].dtype)), col_indices.shape[0]
        )
    _apart(tensors, "tensors")


def csr_square_sum_mask(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor) -> None:
    _mask(crow_indices, col_indices, col_indices.device)


def csr_square_sum(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor) -> None:
    _csr(tensors, crow_indices, col_indices, _FLOATS)


# ---- AdamW ----
def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    compact_grads: bool,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    values: Tensor | None,
    crow_indices: Tensor,
    col_indices: Tensor,
    *rest: Any,
) -> None:
    _csr(params, crow_indices, col_indices, _FLOATS)
    if params:
        sparse_adamw_compact(
            params, grads, compact_grads, exp_avg, exp_avg_sq, values, crow_indices, col_indices, *rest
        )
        if not compact_grads:
            _dense(grads, "grads", col_indices.device, _gradient_dtypes(params[0].dtype))
            for i, (p, g) in enumerate(zip(params, grads)):
                _shape(g, f"grads[{i}]", p.shape, "of its parameter")
    written = [exp_avg, exp_avg_sq, *([] if values is None else [values])]
    _apart([*params, *written], "params, exp_avg, exp_avg_sq and values")


def _gradient_dtypes(param: torch.dtype) -> frozenset[torch.dtype]:
    return frozenset((param,)) if param == torch.float64 else frozenset((param, torch.float32))


def sparse_adamw_compact(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    compact_grads: bool,
    exp_avg: Tensor,  # [nnz]
    exp_avg_sq: Tensor,  # [nnz]
    values: Tensor | None,  # [nnz]
    crow_indices: Tensor,  # int64 [rows + 1]
    col_indices: Tensor,  # uint16 or int32 [nnz]
    step: Tensor,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay_to: Tensor | None,  # [nnz]
    l1: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: int | None,
) -> None:
    """All but the dense tensors."""
    if not params:
        raise ValueError("params must hold at least one tensor")
    device, nnz, dtype = col_indices.device, col_indices.shape[0], params[0].dtype
    if dtype not in _FLOATS:
        raise TypeError(f"params must be float16, bfloat16, float32 or float64, got {dtype}")
    wide = dtype == torch.float64
    compute = frozenset((torch.float64 if wide else torch.float32,))
    state = compute if wide else compute | {torch.bfloat16}
    _mask(crow_indices, col_indices, device)
    _compact(exp_avg, "exp_avg", device, state, nnz)
    _compact(exp_avg_sq, "exp_avg_sq", device, frozenset((exp_avg.dtype,)), nnz)
    if values is not None:
        _compact(values, "values", device, compute, nnz)
    if decay_to is not None:
        _compact(decay_to, "decay_to", device, compute | {dtype}, nnz)
    if len(grads) != (1 if compact_grads else len(params)):
        raise ValueError(
            f"grads must be {'one compact tensor' if compact_grads else 'one tensor for each of params'}, got {len(grads)}"
        )
    if compact_grads:
        _compact(grads[0], "grads", device, _FLOATS, nnz)
    _scalar(step, "step", device)
    _scalar(lr, "lr", device)
    if grad_scale is not None:
        _scalar(grad_scale, "grad_scale", device)
    if found_inf is not None:
        _scalar(found_inf, "found_inf", device)
    if seed is not None and seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


# ---- masked weight gradients ----
def masked_linear_grad(
    grad_output: Tensor, input: Tensor, crow_indices: Tensor, col_indices: Tensor, dtype: torch.dtype
) -> None:
    device = col_indices.device
    _tensor(grad_output, "grad_output", device, _FLOATS)
    _tensor(input, "input", device, _FLOATS)
    if grad_output.dim() != 2 or input.dim() != 2 or grad_output.shape[0] != input.shape[0]:
        raise ValueError(
            f"grad_output [N, m] and input [N, n] must be matrices of as many rows, got {list(grad_output.shape)} and"
            f" {list(input.shape)}"
        )
    _mask(crow_indices, col_indices, device, grad_output.shape[1])
    if input.shape[1] == 0 and col_indices.shape[0]:
        raise ValueError(
            f"input has no columns, so that the mask must have no entries; col_indices has {col_indices.shape[0]}"
        )
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")


_INDICES = frozenset((torch.int32, torch.int64))


def masked_embedding_grad(
    grad_output: Tensor,
    indices: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    padding_idx: int,
    dtype: torch.dtype,
) -> None:
    device = col_indices.device
    _tensor(grad_output, "grad_output", device, _FLOATS)
    _tensor(indices, "indices", device, _INDICES)
    if grad_output.dim() != 2 or indices.dim() != 1 or grad_output.shape[0] != indices.shape[0]:
        raise ValueError(
            f"grad_output [N, d] must have a row for each of the indices [N], got {list(grad_output.shape)} and"
            f" {list(indices.shape)}"
        )
    _mask(crow_indices, col_indices, device)
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")


# ---- truncated SVD ----


def eigvalsh(matrices: Tensor) -> None:
    _tensor(matrices, "matrices", matrices.device, _WIDE_FLOATS)
    if matrices.dim() != 3 or matrices.shape[1] != matrices.shape[2]:
        raise ValueError(f"matrices must have shape [b, n, n], got {list(matrices.shape)}")


def eigh(matrices: Tensor, rank: int = 0, energy: float = 0.0, median: float = 0.0) -> None:
    eigvalsh(matrices)
    _number(rank, "rank", 0, matrices.shape[1])
    _number(energy, "energy", 0.0, 1.0)
    _number(median, "median", 0.0, 1e30)
    if (rank > 0) + (energy > 0) + (median > 0) > 1:
        raise ValueError(f"at most one of rank, energy and median may be above 0, got {rank}, {energy} and {median}")


# ---- L + prune(H) from factors ----
def _factors(
    delta: Tensor,  # [b, m, n]
    left: Tensor,  # [b, m, r]
    right: Tensor,  # [b, n, r]
    cut: Tensor | None = None,  # int64 [b, 2]
) -> None:
    device = delta.device
    _contiguous(delta, "delta", device, _WIDE_FLOATS)
    same = frozenset((delta.dtype,))
    _contiguous(left, "left", device, same)
    _contiguous(right, "right", device, same)
    if delta.dim() != 3 or left.dim() != 3:
        raise ValueError(
            f"delta must have shape [b, m, n] and left [b, m, r], got {list(delta.shape)} and {list(left.shape)}"
        )
    b, m, n = delta.shape
    r = left.shape[2]
    _shape(left, "left", (b, m, r), "[b, m, r]")
    _shape(right, "right", (b, n, r), "[b, n, r]")
    if cut is not None:
        _contiguous(cut, "cut", device, _INT64)
        _shape(cut, "cut", (b, 2), "[b, 2]")


def residual_cut(delta: Tensor, left: Tensor, right: Tensor, keep: int) -> None:
    _factors(delta, left, right)
    _number(keep, "keep", 0, delta.shape[1] * delta.shape[2])


def low_rank_denoised(delta: Tensor, left: Tensor, right: Tensor, cut: Tensor) -> None:
    _factors(delta, left, right, cut)


_WITHOUT_TENSORS: dict[str, Callable[..., None]] = {
    "csr_square_sum": csr_square_sum_mask,
    "sparse_adamw_": sparse_adamw_compact,
}
CHECKS: dict[str, Callable[..., None]] = {
    "csr_gather": csr_gather,
    "csr_scatter_": csr_scatter_,
    "csr_add_": csr_add_,
    "csr_square_sum": csr_square_sum,
    "sparse_adamw_": sparse_adamw_,
    "masked_linear_grad": masked_linear_grad,
    "masked_embedding_grad": masked_embedding_grad,
    "eigh": eigh,
    "eigvalsh": eigvalsh,
    "residual_cut": residual_cut,
    "low_rank_denoised": low_rank_denoised,
}


# ---- what the arrays hold, for the reference ----
def _ascends(
    crow_indices: Tensor,  # int64 [rows + 1]
    col_indices: Tensor,  # [nnz]
    columns: Tensor,  # int64 [rows]: of each row
) -> None:
    nnz = col_indices.shape[0]
    if not bool((crow_indices[0] == 0) & (crow_indices[-1] == nnz) & (crow_indices[1:] >= crow_indices[:-1]).all()):
        raise ValueError(f"crow_indices must ascend from 0 to nnz = {nnz}")
    row = torch.repeat_interleave(torch.arange(len(columns), device=columns.device), crow_indices.diff())
    col = col_indices.to(torch.int64)
    right = (col >= 0) & (col < columns[row])
    right[1:] &= (row[1:] > row[:-1]) | (col[1:] > col[:-1])
    if not bool(right.all()):
        raise ValueError(
            "col_indices must ascend strictly within each row and be less than the row's number of columns"
        )


def _csr_contents(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, *rest: Any) -> None:
    columns = [torch.full((r,), c, device=col_indices.device) for r, c in map(_rows_and_columns, tensors)]
    _ascends(crow_indices, col_indices, torch.cat(columns) if columns else crow_indices[:0])


def _adamw_contents(params: Sequence[Tensor], *rest: Any) -> None:
    _csr_contents(params, rest[5], rest[6])


def _linear_contents(
    grad_output: Tensor, input: Tensor, crow_indices: Tensor, col_indices: Tensor, dtype: torch.dtype
) -> None:
    _ascends(crow_indices, col_indices, torch.full_like(crow_indices[1:], input.shape[1]))


def _embedding_contents(
    grad_output: Tensor,
    indices: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    padding_idx: int,
    dtype: torch.dtype,
) -> None:
    rows = crow_indices.shape[0] - 1
    _ascends(crow_indices, col_indices, torch.full_like(crow_indices[1:], grad_output.shape[1]))
    if not bool(((indices >= 0) & (indices < rows)).all()):
        raise ValueError(f"indices must be at least 0 and less than {rows}")


_CONTENTS: dict[str, Callable[..., None]] = {
    "csr_gather": _csr_contents,
    "csr_scatter_": _csr_contents,
    "csr_add_": _csr_contents,
    "csr_square_sum": _csr_contents,
    "sparse_adamw_": _adamw_contents,
    "masked_linear_grad": _linear_contents,
    "masked_embedding_grad": _embedding_contents,
}
