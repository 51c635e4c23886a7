"""AdamW at the entries of a mask: one launch for all tensors, in place, nothing read back by the host.

Program p owns the entries [p * BLOCK, (p + 1) * BLOCK) of the compact order. It knows neither their rows nor their tensors:
both are searched for, first those of its first and last entry, then each entry's between the two. So the launch depends on
nothing but nnz, and no table of tiles has to be built, kept or synchronised with a mask.
"""

import functools
import math
import struct
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fixed, not tuned: an autotuner would run the in-place update several times. 4 entries a thread make 16-byte loads of the
# float32 state; 69 to 96 registers (float64: 110) leave 5 to 7 programs a multiprocessor. No GPU has timed these two figures yet.
BLOCK = 512
NUM_WARPS = 4
# Ways of the search for a program's first and last row: three rounds for 2,000,000 rows, where halving takes 21 dependent loads.
WAYS = 128

_TRITON_DTYPE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@triton.jit
def _float64(bits):
    """A Python float, passed as its bit pattern: Triton would round a float argument to float32."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _div(x, y):
    """x / y, correctly rounded (Triton's float32 `/` is not)."""
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def _sqrt(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def _narrow(table, low, extra, key, WAYS: tl.constexpr):
    """One round of the search for the last i in [low, low + extra] with table[i] <= key, which holds for i = low."""
    stride = tl.maximum(tl.cdiv(extra, WAYS), 1)
    probe = (tl.arange(0, WAYS) + 1) * stride
    inside = probe <= extra
    below = inside & (tl.load(table + low + probe, mask=inside, other=0) <= key)
    passed = tl.sum(below.to(tl.int32), 0) * stride
    return low + passed, tl.minimum(stride - 1, extra - passed)


@triton.jit
def _search(table, size, first_key, last_key, WAYS: tl.constexpr):
    """The last i with table[i] <= key, for two keys: both searches wait for memory at the same time."""
    first = (size * 0).to(tl.int64)
    last = first
    first_extra = size.to(tl.int64) - 1
    last_extra = first_extra
    while first_extra + last_extra > 0:
        first, first_extra = _narrow(table, first, first_extra, first_key, WAYS)
        last, last_extra = _narrow(table, last, last_extra, last_key, WAYS)
    return first, last


@triton.jit
def _search_each(table, first, last, keys):
    """For each key the last i in [first, last] with table[i] <= key, less `first`; table[first] <= key holds."""
    found = tl.zeros_like(keys).to(tl.int32)  # 64 bits would cost registers; the launcher sees to it that these are enough
    extra = (last - first).to(tl.int32)
    while extra > 0:
        half = (extra + 1) // 2
        found += tl.where(tl.load(table + first + found + half) <= keys, half, 0)
        extra -= half
    return found


@triton.jit
def _addresses_in(table, grad_table, n_tensors, tensor, row, columns, PARAM: tl.constexpr, GRAD: tl.constexpr):
    """Where the entries' parameters and dense gradients are. `tensor`: one for all entries, or one for each."""
    index = (row - tl.load(table + n_tensors + tensor)) * tl.load(table + 2 * n_tensors + tensor) + columns.to(tl.int64)
    param = tl.load(table + tensor).to(tl.pointer_type(PARAM)) + index
    source = param
    if grad_table is not None:
        source = tl.load(grad_table + tensor).to(tl.pointer_type(GRAD)) + index
    return param, source


@triton.jit
def _locate(
    table, grad_table, crow_indices, rows, n_tensors, start, end, entry, columns,
    PARAM: tl.constexpr, GRAD: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    first_row, last_row = _search(crow_indices, rows, start, end - 1, WAYS)
    row = first_row + _search_each(crow_indices, first_row, last_row, entry)
    first, last = _search(table + n_tensors, n_tensors, first_row, last_row, WAYS)
    if first == last:  # the rule; on its own it costs fewer loads and about 12 registers less than the general case
        param, source = _addresses_in(table, grad_table, n_tensors, first, row, columns, PARAM, GRAD)
    else:
        tensor = first + _search_each(table + n_tensors, first, last, row)
        param, source = _addresses_in(table, grad_table, n_tensors, tensor, row, columns, PARAM, GRAD)
    return param, source


@triton.jit
def _step(
    table, grad_table, grad, exp_avg, exp_avg_sq, values, decay_to, crow_indices, col_indices, step, lr, grad_scale,
    rows, n_tensors, start, end, entry, inside, beta1, beta2, log_beta1, log_beta2, eps, weight_decay, l1,
    MAXIMIZE: tl.constexpr, HAS_L1: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    compute = exp_avg.dtype.element_ty
    # Everything whose address is known is asked for before the search, which then runs while those loads are under way.
    columns = tl.load(col_indices + entry, mask=inside)
    m = tl.load(exp_avg + entry, mask=inside)
    v = tl.load(exp_avg_sq + entry, mask=inside)
    if values is not None:
        w = tl.load(values + entry, mask=inside)
    if grad is not None:
        g = tl.load(grad + entry, mask=inside).to(compute)

    param, source = _locate(
        table, grad_table, crow_indices, rows, n_tensors, start, end, entry, columns, PARAM, GRAD, WAYS
    )  # fmt: skip
    if grad is None:
        g = tl.load(source, mask=inside).to(compute)
    if values is None:
        w = tl.load(param, mask=inside).to(compute)

    # The scalars in float64, once a program: 1 - beta ** step in float32 would lose most digits at the first steps.
    number = tl.load(step).to(tl.float64)
    rate = tl.load(lr).to(tl.float64)
    b1 = _float64(beta1)
    b2 = _float64(beta2)
    bias1 = 1.0 - tl.exp(number * _float64(log_beta1))
    bias2 = 1.0 - tl.exp(number * _float64(log_beta2))
    step_size = _div(rate.to(compute), bias1.to(compute))
    root_bias2 = _sqrt(bias2.to(compute))

    if grad_scale is not None:
        g = _div(g, tl.load(grad_scale).to(compute))
    if MAXIMIZE:
        g = -g
    distance = w
    if decay_to is not None:
        distance = w - tl.load(decay_to + entry, mask=inside).to(compute)
    if HAS_L1:
        size = _float64(l1).to(compute)
        g += tl.where(distance > 0, size, tl.where(distance < 0, -size, 0.0))
    w -= (rate * _float64(weight_decay)).to(compute) * distance
    m = b1.to(compute) * m + (1.0 - b1).to(compute) * g
    v = b2.to(compute) * v + (1.0 - b2).to(compute) * g * g
    w -= step_size * _div(m, _div(_sqrt(v), root_bias2) + _float64(eps).to(compute))

    tl.store(exp_avg + entry, m, mask=inside)
    tl.store(exp_avg_sq + entry, v, mask=inside)
    if values is not None:
        tl.store(values + entry, w, mask=inside)
    tl.store(param, w.to(PARAM), mask=inside)


# Numbers that may change from step to step or from mask to mask: none of their values shall mean another compilation.
_ANY_VALUE = ["nnz", "rows", "n_tensors", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "weight_decay", "l1"]


@triton.jit(do_not_specialize=_ANY_VALUE)
def _sparse_adamw_kernel(
    table,  # int64 [3, n_tensors]: address of the parameter, first row, columns
    grad_table,  # int64 [n_tensors]: address of the gradient; None with a compact gradient
    grad,  # [nnz]; None with dense gradients
    exp_avg,  # [nnz]
    exp_avg_sq,  # [nnz]
    values,  # [nnz] or None
    decay_to,  # [nnz] or None
    crow_indices,  # int64 [rows + 1]
    col_indices,  # uint16 or int32 [nnz]
    step,  # [1]
    lr,  # [1]
    grad_scale,  # [1] or None
    found_inf,  # [1] or None
    nnz: tl.int64,
    rows: tl.int64,
    n_tensors: tl.int64,
    beta1: tl.int64,  # this and the next six: the bits of a float64
    beta2: tl.int64,
    log_beta1: tl.int64,
    log_beta2: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    l1: tl.int64,
    MAXIMIZE: tl.constexpr,
    HAS_L1: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):
    """AdamW at BLOCK entries of the mask.

    Bytes per entry, float32 state (m, v and master 4 + 4 each; f = the share of the dense tensor's 32-byte sectors that hold a
    masked entry, d = density, so an entry costs f / d dense elements):
        m, v           16
        column          2 (uint16) or 4
        master          8, if there is one
        parameter       2 f/d elements (read and written; sectors are partly written, so the master saves no read)
        gradient        f/d elements if dense, 1 element if compact
    bfloat16 with dense gradients, master, d = 5 %: 26 + 3 * 0.56 / 0.05 * 2 = 93 bytes; compact gradient: 73. The search adds
    8 bytes per row, and its probes hit L2.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    end = tl.minimum(start + BLOCK, nnz.to(tl.int64))
    entry = start + tl.arange(0, BLOCK)
    skip = False
    if found_inf is not None:
        skip = tl.load(found_inf) != 0
    if not skip:
        # Two copies of the body, because a load masked by `entry < nnz` cannot be a vector load: nnz has no alignment.
        if end - start == BLOCK:
            _step(
                table, grad_table, grad, exp_avg, exp_avg_sq, values, decay_to, crow_indices, col_indices, step, lr, grad_scale,
                rows, n_tensors, start, end, entry, None, beta1, beta2, log_beta1, log_beta2, eps, weight_decay, l1,
                MAXIMIZE, HAS_L1, PARAM, GRAD, WAYS,
            )  # fmt: skip
        else:
            _step(
                table, grad_table, grad, exp_avg, exp_avg_sq, values, decay_to, crow_indices, col_indices, step, lr, grad_scale,
                rows, n_tensors, start, end, entry, entry < end, beta1, beta2, log_beta1, log_beta2, eps, weight_decay, l1,
                MAXIMIZE, HAS_L1, PARAM, GRAD, WAYS,
            )  # fmt: skip


# ---- launcher -----------------------------------------------------------------------------------------------------------


def _bits(x: float) -> int:
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


@functools.lru_cache(maxsize=64)
def _layout(shapes: tuple[torch.Size, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First row and number of columns of each tensor."""
    first_rows, columns, row = [], [], 0
    for shape in shapes:
        first_rows.append(row)
        columns.append(math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape))
        row += shape[0] if len(shape) > 1 else 1
    return tuple(first_rows), tuple(columns)


_TABLES_KEPT = 64
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
# Kept tables that a captured graph reads. A graph does not say when it ends, so they stay for good: 24 bytes a tensor.
_captured: set[Tensor] = set()


def _device_table(device: torch.device, params: tuple[int, ...], numbers: tuple[int, ...]) -> Tensor:
    """`numbers` as an int64 tensor, kept for later calls with the same arguments. `params` are the parameters' addresses.

    The numbers travel as kernel arguments (`_foreach_add_` with a list of scalars takes 96 a launch) rather than by a copy from
    pinned memory: there is no host buffer that has to outlive the copy, and a stream capture may contain it with every torch.
    A kept table may be used on another stream than the one that filled it: both steps write the parameters in `params`, so
    the caller has to order them anyway.
    """
    key = (device, params, numbers)
    table = _tables.get(key)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if table is None:
        table = torch.zeros(len(numbers), dtype=torch.int64, device=device)
        torch._foreach_add_(table.unbind(), numbers)
        if not capturing:  # else its memory is the graph's, and only a replay fills it
            _tables[key] = table
            if len(_tables) > _TABLES_KEPT:
                _tables.popitem(last=False)
        return table
    _tables.move_to_end(key)
    if capturing:
        _captured.add(table)
    elif device.type == "cuda":
        table.record_stream(torch.cuda.current_stream(device))
    return table


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in tensors)


def sparse_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    compact_grads: bool,
    exp_avg: Tensor,  # [nnz]
    exp_avg_sq: Tensor,  # [nnz]
    values: Tensor | None,  # [nnz]
    crow_indices: Tensor,  # int64 [rows + 1]
    col_indices: Tensor,  # uint16 or int32 [nnz]
    step: Tensor,  # [1] or []
    lr: Tensor,  # [1] or []
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decay_to: Tensor | None,  # [nnz]
    l1: float,
    maximize: bool,
    grad_scale: Tensor | None,  # [1] or []
    found_inf: Tensor | None,  # [1] or []
) -> None:
    """The operator `deftx::sparse_adamw_` on tensors of one CUDA device. No value is read back; capturable in a CUDA graph."""
    nnz = col_indices.numel()
    if nnz == 0:
        return
    rows = crow_indices.numel() - 1
    if rows >= 2**31:  # _search_each counts the rows of a program in 32 bits
        raise ValueError(f"sparse_adamw: the mask has {rows} rows, the Triton kernel takes at most 2**31 - 1")
    device = exp_avg.device
    first_rows, columns = _layout(tuple(p.shape for p in params))
    addresses = _addresses(params)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        table = _device_table(device, addresses, addresses + first_rows + columns)
        grad_table = None if compact_grads else _device_table(device, addresses, _addresses(grads))
        _sparse_adamw_kernel[(triton.cdiv(nnz, BLOCK),)](
            table,
            grad_table,
            grads[0] if compact_grads else None,
            exp_avg,
            exp_avg_sq,
            values,
            decay_to if weight_decay or l1 else None,
            crow_indices,
            col_indices,
            step,
            lr,
            grad_scale,
            found_inf,
            nnz,
            rows,
            len(params),
            *map(_bits, (beta1, beta2, _log(beta1), _log(beta2), eps, weight_decay, l1)),
            MAXIMIZE=maximize,
            HAS_L1=l1 != 0,
            PARAM=_TRITON_DTYPE[params[0].dtype],
            GRAD=_TRITON_DTYPE[grads[0].dtype],
            BLOCK=BLOCK,
            WAYS=WAYS,
            num_warps=NUM_WARPS,
        )
