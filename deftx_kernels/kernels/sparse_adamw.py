"""AdamW at the entries of a mask: one launch for all tensors, in place, nothing read back by the host.

Program p updates the entries [p * BLOCK, (p + 1) * BLOCK) of the compact order, which it finds as rows.py says. On
sm_90 a warp of a full block takes 520 instructions (bfloat16, dense gradient, master), 33 for each further halving of
the row search, and 3 barriers: 109 instructions for the scalars, 90 for divisions, 53 for handing the parameters to
threads in order, 45 for roots. BLOCK = 1024 takes 438 per 512 entries, but 108 registers in place of 72.
"""

import math
import struct
from typing import Any

import triton
import triton.language as tl

from deftx_kernels.kernels.launch import Launcher, cdiv, on
from deftx_kernels.kernels.rows import (
    GROUP,
    HEAD,
    TRITON_DTYPE,
    addresses,
    block_table,
    gradient_table,
    locate,
    locate_full,
    tensor_table,
)

# Fixed, not tuned: an autotuner would run the in-place update several times. 4 entries a thread make 16-byte loads of
# the float32 state; 56 to 96 registers (float64: 106) leave 4 to 9 programs a multiprocessor. Not timed yet.
BLOCK = 512  # a multiple of 32: no word of `changed` belongs to two programs
NUM_WARPS = 4
BITS = {2: tl.int16, 4: tl.int32, 8: tl.int64}  # by element size


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
def _words(seed, step, entry, HAS_SEED: tl.constexpr):
    """Philox4x32-10 at (entry, step), each of two 32-bit words, the lower first."""
    word0, word1, word2 = 0, 0, 0
    if HAS_SEED:
        number = tl.load(step).to(tl.int64)
        word0, word1, word2, _ = tl.philox(
            seed, entry.to(tl.uint32), (entry >> 32).to(tl.uint32), number.to(tl.uint32), (number >> 32).to(tl.uint32)
        )  # fmt: skip
    return word0, word1, word2


@triton.jit
def _round(x, word, dtype: tl.constexpr, STOCHASTIC: tl.constexpr):
    """x in the dtype. Stochastic is the rounding of float32 to bfloat16, by the low 16 bits of `word`."""
    if STOCHASTIC and dtype == tl.bfloat16:
        bits = (x.to(tl.uint32, bitcast=True) + (word & 0xFFFF)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def _mark(changed, start, old, new, inside, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Set the bits of the entries [BLOCK] whose bits differ."""
    differs = old.to(BITS, bitcast=True) != new.to(BITS, bitcast=True)
    if inside is not None:
        differs &= inside
    place = tl.arange(0, BLOCK) % 32
    word = tl.sum(tl.reshape(differs.to(tl.int32) << place, (BLOCK // 32, 32)), 1)  # of distinct powers of 2
    at = changed + start // 32 + tl.arange(0, BLOCK // 32)
    before = tl.load(at, mask=word != 0, other=0)
    tl.store(at, before | word, mask=(word & ~before) != 0)


@triton.jit
def _step(
    table, grad_table, grad, exp_avg, exp_avg_sq, values, decay_to, crow_indices, col_indices, step, lr, grad_scale,
    changed, blocks, n_tensors, start, entry, inside, beta1, beta2, log_beta1, log_beta2, eps, weight_decay, l1,
    seed, MAXIMIZE: tl.constexpr, HAS_L1: tl.constexpr, HAS_SEED: tl.constexpr, PARAM: tl.constexpr, GRAD: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    state: tl.constexpr = exp_avg.dtype.element_ty
    compute: tl.constexpr = tl.float64 if state == tl.float64 else tl.float32
    round_param: tl.constexpr = HAS_SEED and values is None  # a float32 master keeps what rounding to nearest loses
    # Loads whose addresses are known come before the search, so that both run at the same time.
    if col_indices is not None:
        columns = tl.load(col_indices + entry, mask=inside)
    m = tl.load(exp_avg + entry, mask=inside).to(compute)
    v = tl.load(exp_avg_sq + entry, mask=inside).to(compute)
    if values is not None:
        w = tl.load(values + entry, mask=inside)
    if grad is not None:
        g = tl.load(grad + entry, mask=inside).to(compute)

    if col_indices is None:
        param, source = locate_full(table, grad_table, crow_indices, blocks, n_tensors, entry, PARAM, GRAD, HEAD)
    else:
        param, source = locate(
            table, grad_table, crow_indices, blocks, n_tensors, entry, columns, PARAM, GRAD, BLOCK, GROUP, HEAD
        )  # fmt: skip
    if grad is None:
        g = tl.load(source, mask=inside).to(compute)
    if values is None or changed is not None:
        old = tl.load(param, mask=inside)
    if values is None:
        w = old.to(compute)

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
    decay = (rate * _float64(weight_decay)).to(compute)
    w -= tl.where(decay != 0, decay * distance, 0.0)  # 0 * infinity would be NaN
    m = b1.to(compute) * m + (1.0 - b1).to(compute) * g
    v = b2.to(compute) * v + (1.0 - b2).to(compute) * g * g
    w -= step_size * _div(m, _div(_sqrt(v), root_bias2) + _float64(eps).to(compute))

    word0, word1, word2 = _words(seed, step, entry, HAS_SEED)
    tl.store(exp_avg + entry, _round(m, word1, state, HAS_SEED), mask=inside)
    tl.store(exp_avg_sq + entry, _round(v, word2, state, HAS_SEED), mask=inside)
    if values is not None:
        tl.store(values + entry, w, mask=inside)
    new = _round(w, word0, PARAM, round_param)
    if changed is not None:
        _mark(changed, start, old, new, inside, BITS, BLOCK)
    tl.store(param, new, mask=inside)


# Numbers that change from step to step or from mask to mask: Triton must not compile again for some of their values.
_ANY_VALUE = [
    "nnz", "n_tensors", "beta1", "beta2", "log_beta1", "log_beta2", "eps", "weight_decay", "l1", "seed",
]  # fmt: skip


@triton.jit(do_not_specialize=_ANY_VALUE)
def _sparse_adamw_kernel(
    table,  # int64 [3, n_tensors]: address of the parameter, first row, last column
    grad_table,  # int64 [n_tensors]: address of the gradient; None with a compact gradient
    grad,  # [nnz]; None with dense gradients
    exp_avg,  # [nnz], bfloat16 or what is computed in
    exp_avg_sq,  # [nnz], likewise
    values,  # [nnz] or None
    decay_to,  # [nnz] or None
    crow_indices,  # int64 [rows + 1]
    col_indices,  # uint16 or int32 [nnz]; None: every element of the tensors is an entry, a tensor is a row
    step,  # [1]
    lr,  # [1]
    grad_scale,  # [1] or None
    found_inf,  # [1] or None
    changed,  # int32 [ceil(nnz / 32)] or None
    blocks,  # int32 [programs, HEAD + BLOCK // GROUP]; without col_indices [programs, HEAD]
    nnz: tl.int64,
    n_tensors: tl.int64,
    beta1: tl.int64,  # this and the next six: the bits of a float64
    beta2: tl.int64,
    log_beta1: tl.int64,
    log_beta2: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    l1: tl.int64,
    seed: tl.int64,
    MAXIMIZE: tl.constexpr,
    HAS_L1: tl.constexpr,
    HAS_SEED: tl.constexpr,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    BITS: tl.constexpr,  # the integer of PARAM's size
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
):
    """AdamW at BLOCK entries of the mask.

    Bytes per entry (m, v and master are read and written; f = the share of the dense tensor's 32-byte sectors that hold
    a masked entry, d = density, so an entry costs f / d dense elements):
        m, v           16, or 8 in bfloat16
        column          2 (uint16) or 4
        master          8, if there is one
        parameter       2 f/d elements (read and written; sectors are partly written, so the master saves no read)
        gradient        f/d elements if dense, 1 element if compact
    bfloat16 with dense gradients, master, float32 state, d = 5 %: 26 + 3 * 0.56 / 0.05 * 2 = 93 bytes; compact
    gradient: 73. Finding the rows adds 1/8 (`blocks`) and 8 bytes per row. `changed` adds at most 1/4, and, beside
    a master, the read of the parameter.
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
                table, grad_table, grad, exp_avg, exp_avg_sq, values, decay_to, crow_indices, col_indices, step, lr,
                grad_scale, changed, blocks, n_tensors, start, entry, None, beta1, beta2, log_beta1, log_beta2, eps,
                weight_decay, l1, seed, MAXIMIZE, HAS_L1, HAS_SEED, PARAM, GRAD, BITS, BLOCK, GROUP, HEAD,
            )  # fmt: skip
        else:
            _step(
                table, grad_table, grad, exp_avg, exp_avg_sq, values, decay_to, crow_indices, col_indices, step, lr,
                grad_scale, changed, blocks, n_tensors, start, entry, entry < end, beta1, beta2, log_beta1, log_beta2,
                eps, weight_decay, l1, seed, MAXIMIZE, HAS_L1, HAS_SEED, PARAM, GRAD, BITS, BLOCK, GROUP, HEAD,
            )  # fmt: skip


# ---- launcher ----
def _bits(*floats: float) -> tuple[int, ...]:
    return struct.unpack(f"<{len(floats)}q", struct.pack(f"<{len(floats)}d", *floats))


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


_launch = Launcher(_sparse_adamw_kernel, num_warps=NUM_WARPS)


def sparse_adamw_(args: Any) -> None:
    """The operator `deftx::sparse_adamw_` on tensors of one CUDA device. No value is read back; capturable in a CUDA
    graph.

    args: the operator's arguments as attributes, `deftx_kernels.ops.schemas.AdamWArgs`.
    """
    nnz, rows = args.exp_avg.numel(), args.crow_indices.numel() - 1
    if nnz == 0:
        return
    params, grads = args.params, args.grads
    if args.col_indices is None:  # each tensor is one row
        params = [p.view(-1) for p in params]
        grads = grads if args.compact_grads else [g.view(-1) for g in grads]
    device, written = args.exp_avg.device, addresses(params)
    dtype, grad_dtype = params[0].dtype, grads[0].dtype
    flags = (args.maximize, args.l1 != 0, args.seed is not None)
    with on(device):
        table = tensor_table(device, written, params, written, rows, written=True)
        group = None if args.col_indices is None else GROUP
        blocks = block_table(table, params, args.crow_indices, nnz, BLOCK, group)
        grad_table = None if args.compact_grads else gradient_table(device, written, grads, params)
        tensors = (
            table, grad_table, grads[0] if args.compact_grads else None, args.exp_avg, args.exp_avg_sq,
            args.values, args.decay_to if args.weight_decay or args.l1 else None, args.crow_indices, args.col_indices,
            args.step, args.lr, args.grad_scale, args.found_inf, args.changed, blocks,
        )  # fmt: skip
        beta1, beta2 = args.beta1, args.beta2
        scalars = _bits(beta1, beta2, _log(beta1), _log(beta2), args.eps, args.weight_decay, args.l1)
        _launch(
            (cdiv(nnz, BLOCK), 1, 1), (*flags, dtype, grad_dtype), tensors,
            (nnz, len(params), *scalars, args.seed or 0),
            *flags, TRITON_DTYPE[dtype], TRITON_DTYPE[grad_dtype], BITS[dtype.itemsize], BLOCK, GROUP, HEAD,
        )  # fmt: skip
