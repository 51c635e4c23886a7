"""Every operator of the library: its schema and its fake kernel, on one page.

Conventions shared by all operators
    tensors, params, scores   the tensors of a mask in the mask's order, contiguous. Tensor i stands for the rows
                              [rows_i, columns_i] = (shape[0], prod(shape[1:])); a tensor of fewer than two dimensions
                              is one row
    crow_indices              int64 [rows + 1], rows = sum of rows_i: where each row's entries begin
    col_indices               uint16 or int32 [nnz], strictly ascending within each row
    compact tensors           [nnz], in that order

Arguments have been validated by `functional` when an operator runs; kernels repeat only what memory safety needs.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NAMESPACE = "deftx"

# Lives as long as the process: a Library that is collected takes its operators with it.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Choices that operators take as integers; csrc/stable.h has the same codes. They are no strings, since each string that
# a compiled operator is given leaks (LibTorch's stable ABI, 2.10), and what is never freed keeps the heap around it
# from shrinking.
SCOPES = {"global": 0, "tensor": 1, "row": 2}
OPERATIONS = {"and": 0, "or": 1, "sub": 2}

SCHEMAS = {
    # values[i] = the tensors' entry i of the mask. All tensors have one dtype, which is the result's.
    "csr_gather": "(Tensor[] tensors, Tensor crow_indices, Tensor col_indices) -> Tensor",
    # entry i of the tensors = values[i]. `values` has the tensors' dtype.
    "csr_scatter_": "(Tensor(a!)[] tensors, Tensor crow_indices, Tensor col_indices, Tensor values) -> ()",
    # entry i of the tensors += alpha * values[i], computed in float32 (float64 for float64 tensors) and rounded once.
    # `values` has the tensors' dtype or float32.
    "csr_add_": "(Tensor(a!)[] tensors, Tensor crow_indices, Tensor col_indices, Tensor values, float alpha) -> ()",
    # The entries of two masks over the same rows: OPERATIONS "and", "or" or "sub" (in the first, not in the second).
    # The result's col_indices have the dtype of col_indices.
    "csr_combine": (
        "(Tensor crow_indices, Tensor col_indices, Tensor other_crow_indices, Tensor other_col_indices, int operation)"
        " -> (Tensor crow_indices, Tensor col_indices)"
    ),
    # The mask of the True entries of bool tensors.
    "dense_to_csr": "(Tensor[] dense) -> (Tensor crow_indices, Tensor col_indices)",
    # The score of an entry is |scores[i]|, or |scores[i] - base[i]| where base is not empty: a difference in float32,
    # in float64 where any tensor of the call is float64. The tensors may have several floating dtypes; scores are
    # compared exactly. SCOPES "global": k = [k]; "tensor": k[i] entries of tensor i; "row": k[i] entries of each row of
    # tensor i. `bad` int64 [2], on the CPU, is (tensor, flat index) of the first NaN or infinite score, or (-1, -1);
    # then the rest is meaningless.
    "topk_mask": "(Tensor[] scores, Tensor[] base, int[] k, int scope) -> (Tensor crow_indices, Tensor col_indices, Tensor bad)",
    # The two steps of a radix select, for callers that add histograms up over ranks or over tensors that are not all in
    # memory. Magnitude bits: the bits of |score| as an integer, which has the order of the magnitudes. All scores have
    # one dtype. Counts the scores whose bits >> (shift + 16) are `prefix` by the next 16 bits, (bits >> shift) &
    # 0xFFFF: int64 [65536].
    # shift: a multiple of 16.
    "magnitude_histogram": "(Tensor[] scores, int prefix, int shift) -> Tensor",
    # The mask of the scores whose bits are above `threshold` and of each tensor's first ties[i] whose bits equal it
    # (all of them where they are fewer); ties[i] is at most the number of the tensor's elements.
    "threshold_mask": "(Tensor[] scores, int threshold, int[] ties) -> (Tensor crow_indices, Tensor col_indices)",
    # Eigenvalues, ascending, and eigenvectors (columns) of symmetric matrices [b, n, n]. With a rank, an energy or a
    # median, as above, of matrices whose singular values' squares these are, vectors may be zero that the truncation
    # does not need: it needs those of the values that are kept or of the others, whichever are fewer, and the 16 next
    # to them.
    "eigh": (
        "(Tensor matrices, int rank=0, float energy=0., float median=0.) -> (Tensor eigenvalues, Tensor eigenvectors)"
    ),
    # The eigenvalues alone.
    "eigvalsh": "(Tensor matrices) -> Tensor",
    # The last step of denoising, of matrices delta [b, m, n] whose low-rank parts L = left @ right.mT are given as
    # factors left [b, m, r] and right [b, n, r], all float32 or all float64; H = delta - L. An entry of H is kept where
    # its magnitude bits are above cut[i, 0], or equal to it at a flat index (within the matrix) below cut[i, 1]; there
    # the denoised entry is delta's own, elsewhere L's. Nothing but the results is written to memory.
    # The cut that keeps the `keep` largest entries of each H, of equal ones the first: int64 [b, 2].
    "residual_cut": "(Tensor delta, Tensor left, Tensor right, int keep) -> Tensor",
    # L + prune(H) [b, m, n].
    "low_rank_denoised": "(Tensor delta, Tensor left, Tensor right, Tensor cut) -> Tensor",
    # One AdamW step at the masked entries. grads: the dense gradients, or one compact tensor where compact_grads.
    # Computed in float32 (float64 for float64 params). values, decay_to: compact, of that dtype; decay_to may have the
    # params'. exp_avg, exp_avg_sq: compact, of that dtype or, both, bfloat16 (float64 params: float64).
    # step, lr, grad_scale, found_inf: one-element tensors on the params' device, float32, float64, int32 or int64.
    # seed, in [0, 2**63): bfloat16 state, and bfloat16 params without values, are rounded stochastically: the words 1,
    # 2 and 0 of Philox4x32-10 with the key seed and the counter (entry, step), both as (low 32 bits, high 32 bits), are
    # of exp_avg, exp_avg_sq and the parameter; a word's low 16 bits are added to the float32 bits, whose upper 16 are
    # kept (NaN: rounded to nearest).
    "sparse_adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, bool compact_grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? values,"
        " Tensor crow_indices, Tensor col_indices, Tensor step, Tensor lr, float beta1, float beta2, float eps, float weight_decay,"
        " Tensor? decay_to, float l1, bool maximize, Tensor? grad_scale, Tensor? found_inf, int? seed) -> ()"
    ),
    # The sum of the masked entries' squares, in float64 and in an order that depends on nothing but their number:
    # float64 [].
    "csr_square_sum": "(Tensor[] tensors, Tensor crow_indices, Tensor col_indices) -> Tensor",
    # The masked entries of grad_output.T @ input: grad_output [N, m], input [N, n], mask of one [m, n] tensor -> dtype
    # [nnz].
    "masked_linear_grad": (
        "(Tensor grad_output, Tensor input, Tensor crow_indices, Tensor col_indices, ScalarType dtype) -> Tensor"
    ),
    # The masked entries of an embedding's weight gradient: grad_output [N, d], indices int [N] -> dtype [nnz].
    # Rows equal to padding_idx receive no gradient (-1: none).
    "masked_embedding_grad": (
        "(Tensor grad_output, Tensor indices, Tensor crow_indices, Tensor col_indices, int padding_idx, ScalarType dtype) -> Tensor"
    ),
}

MAX_UINT16_COLUMNS = 65_536


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """The matrix that a tensor of this shape stands for in a CSRMask."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def column_dtype(shapes: Sequence[Sequence[int]]) -> torch.dtype:
    """uint16 where every tensor has at most 65,536 columns, else int32."""
    return torch.uint16 if all(rows_and_columns(s)[1] <= MAX_UINT16_COLUMNS for s in shapes) else torch.int32


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that operators compute in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class AdamWArgs(NamedTuple):
    """The arguments of the operator `sparse_adamw_`, in the schema's order."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    compact_grads: bool
    exp_avg: Tensor  # [nnz]
    exp_avg_sq: Tensor  # [nnz]
    values: Tensor | None  # [nnz]
    crow_indices: Tensor  # int64 [rows + 1]
    col_indices: Tensor  # uint16 or int32 [nnz]
    step: Tensor  # one element, as lr, grad_scale and found_inf
    lr: Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decay_to: Tensor | None  # [nnz]
    l1: float
    maximize: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None
    seed: int | None


for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema)


def _fake(name):
    """Registers a fake kernel, behind a check that no other one has: with some tensors on "meta" and some with data,
    torch calls the fake kernel, which would return memory that nobody has filled."""

    def register(function):
        @functools.wraps(function)
        def run(*arguments):
            flat = [
                t
                for a in arguments
                for t in (a if isinstance(a, list | tuple) else (a,))
                if isinstance(t, torch.Tensor)
            ]
            devices = {t.device for t in flat}
            if len(devices) > 1:
                raise ValueError(
                    f"{NAMESPACE}::{name}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}"
                )
            return function(*arguments)

        return torch.library.register_fake(f"{NAMESPACE}::{name}", run, lib=LIBRARY)

    return register


@_fake("csr_gather")
def _(tensors, crow_indices, col_indices):
    return tensors[0].new_empty(col_indices.shape)


@_fake("csr_scatter_")
def _(tensors, crow_indices, col_indices, values):
    return None


@_fake("csr_add_")
def _(tensors, crow_indices, col_indices, values, alpha):
    return None


def _data_dependent(like, rows, dtype):
    nnz = torch.library.get_ctx().new_dynamic_size()
    return like.new_empty(rows + 1, dtype=torch.int64), like.new_empty(nnz, dtype=dtype)


@_fake("csr_combine")
def _(crow_indices, col_indices, other_crow_indices, other_col_indices, operation):
    return _data_dependent(crow_indices, crow_indices.shape[0] - 1, col_indices.dtype)


@_fake("dense_to_csr")
def _(dense):
    return _data_dependent(
        dense[0], sum(rows_and_columns(t.shape)[0] for t in dense), column_dtype([t.shape for t in dense])
    )


@_fake("magnitude_histogram")
def _(scores, prefix, shift):
    return scores[0].new_empty(1 << 16, dtype=torch.int64)


@_fake("threshold_mask")
def _(scores, threshold, ties):
    return _data_dependent(
        scores[0], sum(rows_and_columns(s.shape)[0] for s in scores), column_dtype([s.shape for s in scores])
    )


@_fake("topk_mask")
def _(scores, base, k, scope):
    rows = [rows_and_columns(s.shape)[0] for s in scores]
    nnz = sum(n * r for n, r in zip(k, rows, strict=True)) if scope == SCOPES["row"] else sum(k)
    like = scores[0]
    crow_indices = like.new_empty(sum(rows) + 1, dtype=torch.int64)
    col_indices = like.new_empty(nnz, dtype=column_dtype([s.shape for s in scores]))
    return crow_indices, col_indices, torch.empty(2, dtype=torch.int64, device="cpu")


@_fake("eigh")
def _(matrices, rank=0, energy=0.0, median=0.0):
    return matrices.new_empty(matrices.shape[:-1]), torch.empty_like(matrices).mT


@_fake("eigvalsh")
def _(matrices):
    return matrices.new_empty(matrices.shape[:-1])


@_fake("residual_cut")
def _(delta, left, right, keep):
    return delta.new_empty(delta.shape[0], 2, dtype=torch.int64)


@_fake("low_rank_denoised")
def _(delta, left, right, cut):
    return torch.empty_like(delta)


@_fake("sparse_adamw_")
def _(
    params, grads, compact_grads, exp_avg, exp_avg_sq, values, crow_indices, col_indices, step, lr, beta1, beta2, eps,
    weight_decay, decay_to, l1, maximize, grad_scale, found_inf, seed,
):  # fmt: skip
    return None


@_fake("csr_square_sum")
def _(tensors, crow_indices, col_indices):
    return col_indices.new_empty((), dtype=torch.float64)


@_fake("masked_linear_grad")
def _(grad_output, input, crow_indices, col_indices, dtype):
    return grad_output.new_empty(col_indices.shape, dtype=dtype)


@_fake("masked_embedding_grad")
def _(grad_output, indices, crow_indices, col_indices, padding_idx, dtype):
    return grad_output.new_empty(col_indices.shape, dtype=dtype)
