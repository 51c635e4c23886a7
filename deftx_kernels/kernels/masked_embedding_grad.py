"""The masked entries of an embedding's weight gradient: sums of the rows of grad_output with equal index, at masked
columns only.

The tokens are sorted by index. A segment is the part of a run of equal indices within one stretch: SEGMENT positions.
One program is launched for each position, because only the device knows the segments; the program at a segment's first
position sums it, the others end at once. A run of one segment is finished there. A longer one (a frequent word, or
unmarked padding) leaves a partial sum for each segment, and a second launch adds them up. No atomics, and an order of
summation that the indices alone decide: the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from deftx_kernels.kernels.launch import Launcher, cdiv, on

# Not timed yet.
SEGMENT = 64
OCCURRENCES, ENTRIES = 8, 128  # of a run and of a row of the mask, at a time
PARTS = 16  # partial sums at a time
NUM_WARPS = 4


@triton.jit
def _key(keys, position, size, rows, padding_idx):
    """The index at a position of the sorted ones; -1 outside them, for padding and for an index that is no row."""
    key = tl.load(keys + position, mask=(position >= 0) & (position < size), other=-1).to(tl.int64)
    return tl.where((key == padding_idx) | (key >= rows), -1, key)


@triton.jit
def _entries(crow_indices, key, nnz, d):
    """The entries of a row of the mask: whatever crow_indices holds, they are among the nnz ones and no more than d."""
    first = tl.minimum(tl.maximum(tl.load(crow_indices + key), 0), nnz)
    return first, tl.minimum(tl.load(crow_indices + key + 1), first + tl.minimum(nnz - first, d))


@triton.jit(do_not_specialize=["tokens", "rows", "nnz", "padding_idx"])
def _segment_kernel(
    grad_output,  # [tokens, d]
    keys,  # integer [tokens]: the indices, ascending
    order,  # int64 [tokens]: the token of each
    crow_indices,  # int64 [rows + 1]
    col_indices,  # uint16 or int32 [nnz]
    out,  # [nnz]
    # [stretches, 2, d]: of the run that comes from the stretch before, of the one that goes on into the next
    partial_sums,
    tokens,
    d,
    rows: tl.int64,
    nnz: tl.int64,
    padding_idx: tl.int64,
    SEGMENT: tl.constexpr,
    OCCURRENCES: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The segment that begins at a position, if one does, at every num_programs(1)-th chunk of its row's entries."""
    position = tl.program_id(0)
    stretch = position // SEGMENT
    key = _key(keys, position, tokens, rows, padding_idx)
    begins = _key(keys, position - 1, tokens, rows, padding_idx) != key
    if (key < 0) | ((position % SEGMENT != 0) & (not begins)):
        return
    limit = tl.minimum((stretch + 1) * SEGMENT, tokens)
    equal = _key(keys, position + tl.arange(0, SEGMENT), limit, rows, padding_idx) == key
    end = position + tl.sum(equal.to(tl.int32), 0)
    finished = begins & ((end < limit) | (_key(keys, limit, tokens, rows, padding_idx) != key))

    first, last = _entries(crow_indices, key, nnz, d)
    partial_sums += (2 * stretch + begins).to(tl.int64) * d
    for chunk in range(first + tl.program_id(1) * ENTRIES, last, tl.num_programs(1) * ENTRIES):
        entry = chunk + tl.arange(0, ENTRIES)
        inside = entry < last
        column = tl.load(col_indices + entry, mask=inside, other=0).to(tl.int32)
        known = inside & (column >= 0) & (column < d)
        sums = tl.zeros((ENTRIES, OCCURRENCES), partial_sums.dtype.element_ty)
        for start in range(position, end, OCCURRENCES):
            occurrence = start + tl.arange(0, OCCURRENCES)
            token = tl.load(order + occurrence, mask=occurrence < end, other=0)
            # Entries come first: where Triton knows of no contiguity, neighbours along the first axis go to
            # neighbouring lanes.
            offset = token[None, :] * d + column[:, None]
            x = tl.load(grad_output + offset, mask=known[:, None] & (occurrence < end)[None, :], other=0.0)
            sums += x.to(sums.dtype)
        total = tl.sum(sums, 1)
        if finished:
            tl.store(out + entry, total.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(partial_sums + (entry - first), total, mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows", "nnz", "padding_idx"])
def _finish_kernel(
    keys,  # integer [tokens]
    crow_indices,  # int64 [rows + 1]
    out,  # [nnz]
    partial_sums,  # [stretches, 2, d]
    tokens,
    d,
    rows: tl.int64,
    nnz: tl.int64,
    padding_idx: tl.int64,
    SEGMENT: tl.constexpr,
    PARTS: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """The sum of a run that begins in this stretch and goes on into the next, if there is one."""
    stretch = tl.program_id(0)
    key = _key(keys, (stretch + 1) * SEGMENT - 1, tokens, rows, padding_idx)
    begins = _key(keys, stretch * SEGMENT - 1, tokens, rows, padding_idx) != key
    goes_on = _key(keys, (stretch + 1) * SEGMENT, tokens, rows, padding_idx) == key
    if (key < 0) | (not begins) | (not goes_on):
        return
    first, last = _entries(crow_indices, key, nnz, d)
    for chunk in range(first + tl.program_id(1) * ENTRIES, last, tl.num_programs(1) * ENTRIES):
        entry = chunk + tl.arange(0, ENTRIES)
        inside = entry < last
        total = tl.load(partial_sums + (2 * stretch + 1).to(tl.int64) * d + (entry - first), mask=inside, other=0.0)
        start = stretch + 1
        more = True
        while more:
            part = start + tl.arange(0, PARTS)
            equal = _key(keys, part * SEGMENT, tokens, rows, padding_idx) == key
            offset = (2 * part).to(tl.int64)[:, None] * d + (entry - first)[None, :]
            total += tl.sum(tl.load(partial_sums + offset, mask=equal[:, None] & inside[None, :], other=0.0), 0)
            start += PARTS
            more = tl.sum(equal.to(tl.int32), 0) == PARTS
        tl.store(out + entry, total.to(out.dtype.element_ty), mask=inside)


_launch_segments = Launcher(_segment_kernel, num_warps=NUM_WARPS)
_launch_finish = Launcher(_finish_kernel, num_warps=NUM_WARPS)


def masked_embedding_grad(
    grad_output: Tensor,  # [N, d]
    indices: Tensor,  # integer [N]
    crow_indices: Tensor,  # int64 [vocabulary + 1]
    col_indices: Tensor,  # uint16 or int32 [nnz]
    padding_idx: int,
    dtype: torch.dtype,
) -> Tensor:
    """The operator `deftx::masked_embedding_grad` on tensors of one CUDA device. No value is read back.

    Sums are float32, or float64 where grad_output or dtype is. An index that is no row of the mask is left out.
    """
    tokens, d = grad_output.shape
    nnz, rows, device = col_indices.numel(), crow_indices.numel() - 1, grad_output.device
    out = torch.zeros(nnz, dtype=dtype, device=device)
    if nnz == 0 or tokens == 0:
        return out
    stretches = cdiv(tokens, SEGMENT)
    # For rows of the mean length; a program takes several of a longer one. A grid is at most so high.
    chunks = min(cdiv(nnz, rows * ENTRIES), 65_535)
    acc = torch.float64 if torch.float64 in (grad_output.dtype, dtype) else torch.float32
    kind = (d % 16 == 0, d == 1, max(tokens, d) >> 31)
    with on(device):
        keys, order = torch.sort(indices, stable=True)
        partial_sums = torch.empty(stretches, 2, d, dtype=acc, device=device)
        numbers = tokens, d, rows, nnz, padding_idx
        sorted_tokens = grad_output.contiguous(), keys, order, crow_indices, col_indices, out, partial_sums
        _launch_segments((tokens, chunks, 1), kind, sorted_tokens, numbers, SEGMENT, OCCURRENCES, ENTRIES)
        if stretches > 1:
            sums = (keys, crow_indices, out, partial_sums)
            _launch_finish((stretches - 1, chunks, 1), kind, sums, numbers, SEGMENT, PARTS, ENTRIES)
    return out
