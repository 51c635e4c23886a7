"""The sum of the squares of a mask's entries: one launch for all tensors, then the sum of one number per program."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from deftx_kernels.kernels.launch import Launcher, cdiv, on
from deftx_kernels.kernels.rows import GROUP, HEAD, TRITON_DTYPE, addresses, block_table, locate, tensor_table

# 4 entries a thread take 32 to 34 registers: almost all of a multiprocessor's threads run. Not timed.
BLOCK = 512
NUM_WARPS = 4


@triton.jit(do_not_specialize=["nnz", "n_tensors"])
def _square_sum_kernel(
    table,  # int64 [3, n_tensors]: address, first row, last column
    crow_indices,  # int64 [rows + 1]
    col_indices,  # uint16 or int32 [nnz]
    partial_sums,  # float64 [programs]
    blocks,  # int32 [programs, HEAD + BLOCK // GROUP]
    nnz: tl.int64,
    n_tensors: tl.int64,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
):
    """BLOCK entries of the mask, squared and summed in float64, in which squares of float32 numbers do not overflow."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    entry = start + tl.arange(0, BLOCK)
    inside = entry < nnz
    columns = tl.load(col_indices + entry, mask=inside)
    element, _ = locate(
        table, None, crow_indices, blocks, n_tensors, entry, columns, DTYPE, DTYPE, BLOCK, GROUP, HEAD
    )  # fmt: skip
    x = tl.load(element, mask=inside, other=0.0).to(tl.float64)
    tl.store(partial_sums + tl.program_id(0), tl.sum(x * x, 0))


_launch = Launcher(_square_sum_kernel, num_warps=NUM_WARPS)


def csr_square_sum(
    tensors: Sequence[Tensor],
    crow_indices: Tensor,  # int64 [rows + 1]
    col_indices: Tensor,  # uint16 or int32 [nnz]
) -> Tensor:
    """The operator `deftx::csr_square_sum` on one CUDA device. No value is read back; capturable in a CUDA graph."""
    nnz, device = col_indices.numel(), col_indices.device
    if nnz == 0:
        return torch.zeros((), dtype=torch.float64, device=device)
    rows = crow_indices.numel() - 1
    programs = cdiv(nnz, BLOCK)
    with on(device):
        partial_sums = torch.empty(programs, dtype=torch.float64, device=device)
        # Two streams may read the same tensors at the same time: each has a table of its own.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        table = tensor_table(device, (stream,), tensors, addresses(tensors), rows)
        blocks = block_table(table, tensors, crow_indices, nnz, BLOCK, GROUP)
        dtype = tensors[0].dtype
        _launch(
            (programs, 1, 1), (dtype,), (table, crow_indices, col_indices, partial_sums, blocks), (nnz, len(tensors)),
            TRITON_DTYPE[dtype], BLOCK, GROUP, HEAD,
        )  # fmt: skip
        return partial_sums.sum()
