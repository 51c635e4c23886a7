"""The masked entries of grad_output.T @ input: a dense product on tensor cores of which only the mask's entries are
stored.

Each program computes one tile of the product in registers. First it reads from the CSR structure which entries of the
tile are in the mask: one bit each, 32 columns to a word. The program of a tile without entries ends there, before it
reads an input. At the end, the entry at a set bit is stored at its row's first position plus the number of bits set
before it. There is no [m, n] buffer. Where the tiles are too few for the device, the tokens are split as well, into
compact partial sums that a second launch adds up. No atomics, and an order of summation that depends on shapes and
device alone: the same bits in every run. Large layers are served by product_strips.py.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from deftx_kernels.kernels.launch import Launcher, cdiv, on
from deftx_kernels.kernels.product_strips import gather_by_strips, strip_rows
from deftx_kernels.kernels.rows import TRITON_DTYPE

# Rows, columns and tokens of a tile. Fixed, not tuned: chosen so that nothing spills, and that on sm_90 and sm_100 two
# programs of 16-bit tiles share a multiprocessor (128 registers), one searching while the other multiplies. Not timed.
TILES = {2: (128, 128, 64), 4: (128, 64, 32), 8: (128, 64, 16)}  # by the inputs' bytes per element
NUM_WARPS = 8
NUM_STAGES = 3
GROUP = 8  # rows of tiles that run one after the other, so that they find the same columns of the input in the cache
WAYS = 16  # of the search for the tile's first column in each row: two rounds for up to 272 entries
CHUNK = 16  # entries of each row that are read at a time
SUM_BLOCK = 1024  # entries of a program that adds up partial sums

# What a program and the launch that adds up cost beside the products, in steps over BLOCK_K tokens: an estimate.
_OVERHEAD = 8
_SCRATCH = 1 << 23  # partial sums at most: 32 MB of float32 stay in the cache


@triton.jit
def _popcount(x):
    # LLVM makes one instruction of this; the intrinsic itself is not known to Triton's interpreter.
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return ((((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _skip_columns(col_indices, first, count, column, WAYS: tl.constexpr):
    """Moves each row's first entry [rows] forward, and its count down, by the entries in columns before `column`."""
    way = (tl.arange(0, WAYS) + 1)[:, None]
    extra = count  # this many of the entries that remain may have to be skipped
    while tl.max(extra) > 0:
        stride = tl.maximum(tl.cdiv(extra, WAYS), 1)
        probe = way * stride[None, :]
        inside = probe <= extra[None, :]
        before = inside & (
            tl.load(col_indices + (first[None, :] + probe - 1), mask=inside, other=0).to(tl.int32) < column
        )
        passed = tl.sum(before.to(tl.int32), 0) * stride
        first += passed
        count -= passed
        extra = tl.minimum(stride - 1, extra - passed)
    return first, count


@triton.jit
def _mask_words(col_indices, first, count, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr):
    """uint32 [BLOCK_N // 32, BLOCK_M]: bit j of word w is set where the row has an entry in column `column` + 32 w + j.

    `first` and `count` [BLOCK_M]: each row's entries from `column` on. The rows are the last axis, so that one thread
    computes the sums over a chunk: across lanes they cost 128 shuffles.
    """
    word = tl.arange(0, BLOCK_N // 32)[None, :, None]
    words = tl.zeros((BLOCK_N // 32, BLOCK_M), tl.uint32)
    done = 0
    more = tl.max(count) > 0
    while more:
        entry = done + tl.arange(0, CHUNK)[None, :]
        inside = entry < count[:, None]
        at = tl.load(col_indices + (first[:, None] + entry), mask=inside, other=0).to(tl.int32) - column
        at = tl.trans(tl.where(inside, at, BLOCK_N))
        bit = tl.full(at.shape, 1, tl.uint32) << (at & 31)
        words += tl.sum(tl.where((at >> 5)[:, None, :] == word, bit[:, None, :], 0), 0)
        done += CHUNK
        more = tl.max(((tl.max(at, 0) < BLOCK_N) & (done < count)).to(tl.int32)) > 0
    return words


@triton.jit(do_not_specialize=["tokens", "m", "tokens_each", "nnz"])
def _masked_linear_grad_kernel(
    grad_output,  # [tokens, grad_stride]: the columns from m on are padding
    input,  # [tokens, input_stride]
    crow_indices,  # int64 [m + 1]
    col_indices,  # uint16 or int32 [nnz]
    out,  # [splits, nnz]: one sum over `tokens_each` tokens in each row
    tokens,
    m,
    grad_stride,  # both strides are multiples of 16, so that loads take 16 bytes
    input_stride,
    tokens_each,
    nnz: tl.int64,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    WAYS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of the product over one part of the tokens."""
    tiles_n = tl.cdiv(input_stride, BLOCK_N)
    in_group = GROUP * tiles_n
    first_tile = tl.program_id(0) // in_group * GROUP
    tiles = tl.minimum(tl.cdiv(m, BLOCK_M) - first_tile, GROUP)
    within = tl.program_id(0) % in_group
    first_row = (first_tile + within % tiles) * BLOCK_M
    first_column = within // tiles * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    column = first_column + tl.arange(0, BLOCK_N)

    # Entries are counted from the tile's first one on, in 32 bits. Whatever crow_indices holds, they are below nnz.
    base = tl.minimum(tl.maximum(tl.load(crow_indices + first_row), 0), nnz)
    end_of_tile = base + tl.minimum(nnz - base, 0x7FFFFFFF - CHUNK)
    col_indices += base
    out += base + tl.program_id(1) * nnz
    first = tl.load(crow_indices + row, mask=row < m, other=0)
    count = tl.load(crow_indices + row + 1, mask=row < m, other=0)
    first = (tl.minimum(tl.maximum(first, base), end_of_tile) - base).to(tl.int32)
    count = tl.maximum((tl.minimum(tl.maximum(count, base), end_of_tile) - base).to(tl.int32) - first, 0)
    first, count = _skip_columns(col_indices, first, count, first_column, WAYS)
    words = _mask_words(col_indices, first, count, first_column, BLOCK_M, BLOCK_N, CHUNK)
    if tl.max((words != 0).to(tl.int32)) == 0:
        return

    start = tl.program_id(1) * tokens_each
    end = tl.minimum(start + tokens_each, tokens)
    k = tl.arange(0, BLOCK_K)
    grad_tile = grad_output + (start + k).to(tl.int64)[:, None] * grad_stride + row[None, :]
    input_tile = input + (start + k).to(tl.int64)[:, None] * input_stride + column[None, :]
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for token in range(start, end, BLOCK_K):
        # No arithmetic between load and product: operands stay in shared memory (ptxas corrupts wgmma's in registers).
        inside = (token + k < end)[:, None]
        g = tl.load(grad_tile, mask=inside & (row < grad_stride)[None, :], other=0.0)
        x = tl.load(input_tile, mask=inside & (column < input_stride)[None, :], other=0.0)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION, out_dtype=ACC)
        grad_tile += step * grad_stride
        input_tile += step * input_stride

    # Bits and positions are made with the rows last, as in words: so each thread adds up the bits of a word.
    ones = _popcount(words)
    position = first[None, :] + (tl.cumsum(ones, 0) - ones)  # of the first entry of a word
    bit = ((words[None, :, :] >> tl.arange(0, 32)[:, None, None]) & 1).to(tl.int32)
    position = tl.permute(position[None, :, :] + (tl.cumsum(bit, 0) - bit), (2, 1, 0))
    value = acc.to(out.dtype.element_ty).reshape(BLOCK_M, BLOCK_N // 32, 32)
    tl.store(out + position, value, mask=tl.permute(bit, (2, 1, 0)) != 0)


@triton.jit(do_not_specialize=["splits", "nnz"])
def _sum_kernel(
    partial_sums,  # [splits, nnz]
    out,  # [nnz]
    splits,
    nnz: tl.int64,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < nnz
    total = tl.zeros((BLOCK,), partial_sums.dtype.element_ty)
    for _ in range(splits):
        total += tl.load(partial_sums + entry, mask=inside, other=0.0)
        partial_sums += nnz
    tl.store(out + entry, total.to(out.dtype.element_ty), mask=inside)


# ---- launcher ----
@functools.lru_cache(maxsize=1024)
def _splits(tiles: int, steps: int, most: int, multiprocessors: int) -> int:
    """Into how many parts `steps` steps over the tokens go, at most `most`: the fewest of the cheapest."""

    def cost(splits: int) -> int:
        rounds = cdiv(tiles * splits, multiprocessors)
        return rounds * (cdiv(steps, splits) + _OVERHEAD) + (_OVERHEAD if splits > 1 else 0)

    return min(range(1, most + 1), key=cost)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, in `dtype`, with zeros appended to the rows up to a multiple of 16 elements."""
    if x.dtype != dtype:
        x = x.to(dtype)
    padding = -x.shape[1] % 16
    return torch.nn.functional.pad(x, (0, padding)) if padding else x.contiguous()


_launch = Launcher(_masked_linear_grad_kernel, num_warps=NUM_WARPS, num_stages=NUM_STAGES)
_launch_sum = Launcher(_sum_kernel, num_warps=4)


def masked_linear_grad(
    grad_output: Tensor,  # [N, m]
    input: Tensor,  # [N, n]
    crow_indices: Tensor,  # int64 [m + 1]
    col_indices: Tensor,  # uint16 or int32 [nnz]
    dtype: torch.dtype,
) -> Tensor:
    """The operator `deftx::masked_linear_grad` on tensors of one CUDA device. No value is read back; capturable in a
    CUDA graph.

    Two inputs of one 16-bit dtype are multiplied as they are, others in float32, or in float64 where one of the three
    dtypes is; sums are float32, or float64. float32 products follow torch.backends.cuda.matmul. `strip_rows` decides
    between the fused kernel and strips.
    """
    tokens, m = grad_output.shape
    nnz, device = col_indices.numel(), grad_output.device
    if nnz == 0 or tokens == 0:
        return torch.zeros(nnz, dtype=dtype, device=device)
    operand = torch.promote_types(grad_output.dtype, input.dtype)
    if dtype == torch.float64:
        operand = dtype
    acc = torch.float64 if operand == torch.float64 else torch.float32
    block_m, block_n, block_k = TILES[operand.itemsize]
    if max(m, block_m * input.shape[1]) > 2**31 - block_m:  # a tile counts its rows and entries in 32 bits
        raise ValueError(f"masked_linear_grad: a weight of {m} x {input.shape[1]} is too large for the Triton kernel")
    tiles = cdiv(m, block_m) * cdiv(input.shape[1], block_n)
    steps, multiprocessors = cdiv(tokens, block_k), _multiprocessors(device)
    precision = "tf32" if operand == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    rows = strip_rows(tokens, m, input.shape[1], nnz, operand.itemsize, precision, multiprocessors)
    with on(device):
        grad_output, input = _operand(grad_output, operand), _operand(input, operand)
        out = torch.empty(nnz, dtype=dtype, device=device)
        if rows:
            gather_by_strips(grad_output, input, crow_indices, col_indices, out, rows, acc)
            return out
        splits = _splits(tiles, steps, min(steps, multiprocessors, max(_SCRATCH // nnz, 1)), multiprocessors)
        tokens_each = cdiv(steps, splits) * block_k
        splits = cdiv(tokens, tokens_each)
        sums = torch.empty(splits, nnz, dtype=acc, device=device) if splits > 1 else out
        _launch(
            (tiles, splits, 1), (acc, precision, tokens >> 31), (grad_output, input, crow_indices, col_indices, sums),
            (tokens, m, grad_output.shape[1], input.shape[1], tokens_each, nnz),
            TRITON_DTYPE[acc], precision, block_m, block_n, block_k, GROUP, WAYS, CHUNK,
        )  # fmt: skip
        if splits > 1:
            _launch_sum((cdiv(nnz, SUM_BLOCK), 1, 1), (), (sums, out), (splits, nnz), SUM_BLOCK)
    return out
