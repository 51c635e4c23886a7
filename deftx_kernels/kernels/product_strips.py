"""The masked entries of grad_output.T @ input for large layers: cuBLAS multiplies strips of rows into a scratch buffer
that stays in the L2 cache, and a kernel gathers the mask's entries from it.

A strip is about one wave: as many tiles as the device has multiprocessors. There are two buffers. The entries of one
are gathered on a second stream while the next strip is multiplied into the other. A program gathers from one row, whose
entries it finds in crow_indices: the host needs no counts, so that nothing is read back, nothing is kept for a mask,
and a CUDA graph can contain all of it. No atomics, and the products run one after the other on one stream: the same
bits in every run.
"""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from deftx_kernels.kernels.launch import Launcher, cdiv

# By the operands' bytes per element and precision: columns of cuBLAS' tile of TILE_ROWS rows, as assumed for sm_90, and
# the fewest tokens with which its product takes about 32,768 cycles: 19 us, about what the host takes for a strip.
TILE_ROWS = 128
TILES = {(2, "ieee"): (256, 2048), (4, "tf32"): (128, 2048), (4, "ieee"): (128, 256), (8, "ieee"): (64, 512)}
SCRATCH = 17 << 20  # bytes of one buffer at most: 384 rows of 11,008 sums, or 1,024 of 4,096
SPARSEST = 1024  # elements per entry at most: below, tiles without entries become likely, which the fused kernel skips
IDLE = 1.2  # tiles that the waves have room for, at most, for each tile of the product

BLOCK = 512  # entries of a row that a program gathers at a time: 4 a thread. Not timed
NUM_WARPS = 4
MOST_PARTS = 64  # of a row


@triton.jit(do_not_specialize=["first_row", "nnz"])
def _gather_strip_kernel(
    product,  # [rows, stride]: the rows from `first_row` on
    crow_indices,  # int64 [m + 1]
    col_indices,  # uint16 or int32 [nnz]
    out,  # [nnz]
    first_row,
    stride,  # a multiple of 16
    nnz: tl.int64,
    BLOCK: tl.constexpr,
):
    """One row, or one of several parts of each row."""
    row = crow_indices + (first_row + tl.program_id(0))
    # Whatever the mask holds, entries are below nnz, columns below the stride, and a row ends.
    begin = tl.minimum(tl.maximum(tl.load(row), 0), nnz)
    end = tl.minimum(tl.load(row + 1), nnz)
    count = tl.minimum(tl.maximum(end - begin, 0), stride).to(tl.int32)
    product += tl.program_id(0) * stride  # SCRATCH is below 2**31
    col_indices += begin
    out += begin
    last = (stride - 1).to(tl.uint32)
    for start in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < count
        column = tl.load(col_indices + entry, mask=inside, other=0).to(tl.uint32)
        value = tl.load(product + tl.minimum(column, last), mask=inside, other=0.0)
        tl.store(out + entry, value.to(out.dtype.element_ty), mask=inside)


# ---- launcher ----
@functools.lru_cache(maxsize=1024)
def strip_rows(tokens: int, m: int, n: int, nnz: int, itemsize: int, precision: str, multiprocessors: int) -> int:
    """Rows of a strip of the [m, n] product, of equal strips that are one wave each or less; 0 where the fused kernel
    serves the call.

    Estimates for sm_90; neither has been timed. The fused kernel takes 1.25 to 1.45 times as long as the dense
    product: shared memory limits its 128 x 128 tiles to 80 % of the peak, and their epilogue has 765 instructions.
    Strips take 1.03 to 1.06 times as long where there are several full waves, even if a product leaves the gather no
    room and it runs between two products: about 5 us in all for 5 % of 4096 x 4096 entries. With one strip nothing
    overlaps, and for a product below one wave the fused kernel splits the tokens. With few tokens the host takes
    longer than the device. Waves that are not full make strips slower in proportion: at `IDLE` they should still win.
    """
    tile_n, least_tokens = TILES[itemsize, precision]
    tiles_m, tiles_n = cdiv(m, TILE_ROWS), cdiv(n, tile_n)
    in_scratch = SCRATCH // (max(itemsize, 4) * TILE_ROWS * (n + -n % 16))
    most = min(max(multiprocessors // tiles_n, 1), in_scratch)  # rows of tiles in a strip
    if tokens < least_tokens or nnz * SPARSEST < m * n or not 0 < most < tiles_m:
        return 0
    strips = cdiv(tiles_m, most)
    rows = cdiv(tiles_m, strips)
    room = strips * cdiv(rows * tiles_n, multiprocessors) * multiprocessors
    return rows * TILE_ROWS if room <= IDLE * tiles_m * tiles_n else 0


_launch = Launcher(_gather_strip_kernel, num_warps=NUM_WARPS)


@functools.lru_cache(maxsize=64)
def _side_stream(main: torch.cuda.Stream) -> torch.cuda.Stream:
    """One for each stream: a graph capture on one must not take in what another thread launches.

    Of high priority: the product after the next waits for a gather, which is short.
    """
    return torch.cuda.Stream(main.device, priority=-1)


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    """The current stream and the one for the gathers. None on the CPU."""
    if device.type != "cuda":
        return None
    main = torch.cuda.current_stream(device)
    return main, _side_stream(main)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, summed in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # products of two 16-bit numbers are exact in float32
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def gather_by_strips(
    grad_output: Tensor,  # [N, m or more], contiguous: the columns from m on are padding
    input: Tensor,  # [N, n], contiguous, of the same dtype; n is a multiple of 16
    crow_indices: Tensor,  # int64 [m + 1]
    col_indices: Tensor,  # uint16 or int32 [nnz]
    out: Tensor,  # [nnz]
    rows: int,
    acc: torch.dtype,  # of the sums: that of the operands, or float32 for 16-bit ones
) -> None:
    """out = the entries of grad_output.T @ input, `rows` rows at a time."""
    (_, n), nnz, m, device = input.shape, out.numel(), crow_indices.numel() - 1, out.device
    # Detached: mm(out=...) refuses tensors that require gradients. All views at once: each alone takes host time.
    lefts, right = grad_output.detach().mT[:m].split(rows), input.detach()
    # The current stream waits for the other one at the end, so that its memory needs no record_stream.
    buffers = torch.empty(min(len(lefts), 2), rows, n, dtype=acc, device=device).unbind()
    parts = min(cdiv(nnz, m * BLOCK), MOST_PARTS)
    streams = _streams(device)
    gathered: list[torch.cuda.Event] = []
    try:
        for i, left in enumerate(lefts):
            count = left.shape[0]
            product = buffers[i % 2] if count == rows else buffers[i % 2][:count]
            if streams is not None and i >= 2:  # until the buffer has been read
                streams[0].wait_event(gathered[i - 2])
            _multiply(left, right, product)
            if streams is not None:
                streams[1].wait_event(streams[0].record_event())
            with contextlib.nullcontext() if streams is None else torch.cuda.stream(streams[1]):
                tensors, numbers = (product, crow_indices, col_indices, out), (i * rows, n, nnz)
                _launch((count, parts, 1), (), tensors, numbers, BLOCK)
            if streams is not None:
                gathered.append(streams[1].record_event())
    finally:
        if streams is not None:
            streams[0].wait_stream(streams[1])
