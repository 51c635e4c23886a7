"""L + prune(H) of a matrix from the factors of L, and the cut that prune needs: no [m, n] matrix of L or H is written.

Every pass computes L again, tile by tile, from left and right. A threshold found by one pass must be exact in the next.
So all passes are one kernel with several epilogues: with the same tiles and the same order of the products, every bit
of L is the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deftx_kernels.kernels.launch import Launcher, cdiv, int_kinds, on

# Fixed, not tuned: other tiles could sum in another order. Larger tiles or BLOCK_K spill registers. Not timed yet.
BLOCK_M, BLOCK_N, BLOCK_K = 64, 128, 16
NUM_WARPS = 8
NUM_STAGES = 3

_BINS = 1 << 16
_INFINITY = 0x7F80_0000  # the magnitude bits of float32's


@triton.jit(do_not_specialize=["m", "shift", "out_stride"])
def _low_rank_kernel(
    delta,  # [b, m, n]
    left,  # [b, m, r], r a multiple of BLOCK_K
    right,  # [b, n, r]
    # int64 [b]: the prefix for "histogram", magnitude bits for "ties", which tile of rows for "rows";
    # int64 [b, 2]: the cut for "denoised"
    key,
    out,  # see EPILOGUE
    m,
    n,
    r,
    shift,
    out_stride,  # from one matrix to the next, but in "denoised"
    # "denoised": out float32 [b, m, n] = L + prune(H)
    # "histogram": out int64 [b, _BINS] += the counts of the operator magnitude_histogram, of H
    # "ties": out int64 [b, tiles of rows] += how many entries of H have the bits key[i]
    # "rows": out int32 [b, at most BLOCK_M, n] = the bits of H in the rows of tile key[i]
    EPILOGUE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one matrix's L and H, and one of the epilogues."""
    program = tl.program_id(0).to(tl.int64)
    tiles_n = tl.cdiv(n, BLOCK_N)
    if EPILOGUE == "rows":
        i = program // tiles_n
        tile_m = tl.load(key + i)
    else:
        tiles_m = tl.cdiv(m, BLOCK_M)
        i = program // tiles_n // tiles_m
        tile_m = program // tiles_n % tiles_m
    row = (tile_m * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
    column = (program % tiles_n * BLOCK_N).to(tl.int32) + tl.arange(0, BLOCK_N)
    # Rows outside the matrices repeat the last one: loads without a mask, and their products are used nowhere.
    k = tl.arange(0, BLOCK_K)[None, :]
    left_row = left + (i * m + tl.minimum(row, m - 1))[:, None] * r
    right_row = right + (i * n + tl.minimum(column, n - 1))[:, None] * r
    low = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, r, BLOCK_K):
        u = tl.load(left_row + (start + k))
        v = tl.load(right_row + (start + k))
        low = tl.dot(u, v.T, low, input_precision="tf32x3")
    inside = (row < m)[:, None] & (column < n)[None, :]
    offset = (i * m + row)[:, None] * n + column[None, :]
    d = tl.load(delta + offset, mask=inside, other=0.0)
    bits = (d - low).to(tl.int32, bitcast=True) & 0x7FFFFFFF

    if EPILOGUE == "denoised":
        threshold = tl.load(key + 2 * i).to(tl.int32)
        end = tl.load(key + 2 * i + 1)  # entries equal to the threshold are kept at flat indices below it
        before_end = tl.minimum(tl.maximum(end - row.to(tl.int64) * n, 0), n).to(tl.int32)  # columns of each row
        kept = (bits > threshold) | ((bits == threshold) & (column[None, :] < before_end[:, None]))
        tl.store(out + offset, tl.where(kept, d, low), mask=inside)
    elif EPILOGUE == "histogram":
        prefix = tl.load(key + i).to(tl.int32)
        counts = out + i * out_stride
        # Zeros may be most of a matrix (rows that training never touched): one addition a tile counts them.
        zeros = tl.sum((inside & (bits == 0)).to(tl.int32))
        tl.atomic_add(counts, zeros.to(tl.int64), mask=(prefix == 0) & (zeros > 0), sem="relaxed")
        # Two shifts: one by 32 is undefined.
        counted = inside & (bits != 0) & (((bits >> 16) >> shift) == prefix)
        tl.atomic_add(
            counts + ((bits >> shift) & 0xFFFF), tl.full(bits.shape, 1, tl.int64), mask=counted, sem="relaxed"
        )
    elif EPILOGUE == "ties":
        ties = tl.sum((inside & (bits == tl.load(key + i).to(tl.int32))).to(tl.int32))
        tl.atomic_add(out + i * out_stride + tile_m, ties.to(tl.int64), mask=ties > 0, sem="relaxed")
    else:  # "rows"
        offset = (row - tile_m * BLOCK_M)[:, None] * n + column[None, :]  # 64 bits, as tile_m
        tl.store(out + i * out_stride + offset, bits, mask=inside)


# ---- launcher ----
_launch = Launcher(_low_rank_kernel, num_warps=NUM_WARPS, num_stages=NUM_STAGES)


class LowRankScores:
    """L and H of b matrices; each method is a launch or two, none waits for the device."""

    def __init__(self, delta: Tensor, left: Tensor, right: Tensor) -> None:
        self.delta = delta
        padding = (0, -left.shape[2] % BLOCK_K)
        self.left, self.right = (torch.nn.functional.pad(x, padding) if padding[1] else x for x in (left, right))
        self.b, self.m, self.n = delta.shape
        if max(self.m, self.n) > 2**31 - max(BLOCK_M, BLOCK_N):  # a tile counts its rows and columns in 32 bits
            raise ValueError(
                f"matrices of {self.m} x {self.n}: the Triton kernel takes fewer than 2**31 - {BLOCK_N} rows or columns"
            )

    def launch(self, epilogue: str, out: Tensor, key: Tensor, shift: int = 0, stride: int = 0) -> Tensor:
        tiles = cdiv(self.n, BLOCK_N) * (1 if epilogue == "rows" else cdiv(self.m, BLOCK_M))
        if self.b * tiles:
            with on(self.delta.device):
                numbers = self.m, self.n, self.left.shape[2], shift, stride
                tensors = self.delta, self.left, self.right, key, out
                kind = epilogue, *int_kinds(*numbers)
                _launch((self.b * tiles, 1, 1), kind, tensors, numbers, epilogue, BLOCK_M, BLOCK_N, BLOCK_K)
        return out

    def full(self, *shape: int, value: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.delta.device)

    def histograms(self, prefix: Tensor, shift: int) -> Tensor:
        """int64 [b, _BINS], one for each matrix and its prefix."""
        return self.launch("histogram", self.full(self.b, _BINS), prefix, shift, _BINS)

    def end_of_ties(self, threshold: Tensor, ties: Tensor) -> Tensor:
        """int64 [b]: among so many of the first entries of matrix i, ties[i] have the bits threshold[i]."""
        rows = min(self.m, BLOCK_M)
        tiles_m = cdiv(self.m, BLOCK_M)
        counts = self.launch("ties", self.full(self.b, tiles_m), threshold, stride=tiles_m)
        passed = counts.cumsum(1)
        tile = torch.searchsorted(passed, ties[:, None]).clamp_(max=tiles_m - 1)  # the one that holds the last of them
        remaining = ties[:, None] - (passed - counts).gather(1, tile)
        bits = self.full(self.b, rows * self.n, value=-1, dtype=torch.int32)
        self.launch("rows", bits, tile.view(-1), stride=rows * self.n)
        position = torch.searchsorted((bits == threshold[:, None]).cumsum(1), remaining)
        return torch.where(ties > 0, (tile * BLOCK_M * self.n + position).view(-1) + 1, 0)


def residual_cut(
    delta: Tensor,  # [b, m, n]
    left: Tensor,  # [b, m, r]
    right: Tensor,  # [b, n, r]
    keep: int,
) -> Tensor:
    """The operator `deftx::residual_cut`: a radix select of each matrix, 16 bits a round.

    The host waits once, to learn whether some matrix keeps only a part of the entries that are equal to its threshold.
    """
    residual = LowRankScores(delta, left, right)
    b, m, n = delta.shape
    if keep == 0:
        return torch.stack([residual.full(b, value=_INFINITY), residual.full(b)], 1)
    threshold = residual.full(b)
    remaining = residual.full(b, 1, value=keep)
    for shift in (16, 0):
        counts = residual.histograms(threshold, shift).flip(1)
        from_the_top = counts.cumsum(1)
        position = torch.searchsorted(from_the_top, remaining)
        tied = counts.gather(1, position)
        remaining -= from_the_top.gather(1, position) - tied
        threshold = (threshold << 16) | (_BINS - 1 - position.view(-1))
    end = torch.full_like(threshold, m * n)
    some = (remaining != tied).view(-1)
    if bool(some.any()):
        end = torch.where(some, residual.end_of_ties(threshold, remaining.view(-1)), end)
    return torch.stack([threshold, end], 1)


def low_rank_denoised(delta: Tensor, left: Tensor, right: Tensor, cut: Tensor) -> Tensor:
    """The operator `deftx::low_rank_denoised`."""
    return LowRankScores(delta, left, right).launch("denoised", torch.empty_like(delta), cut)
