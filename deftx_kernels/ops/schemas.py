"""Every operator of the library: its schema and its fake kernel, on one page.

Conventions shared by all operators
    tensors, params, scores   the tensors of a mask in the mask's order, contiguous. Tensor i stands for the rows
                              [rows_i, columns_i] = (shape[0], prod(shape[1:])); a tensor of fewer than two dimensions
                              is one row
    crow_indices              int64 [rows + 1], rows = sum of rows_i: where each row's entries begin
    col_indices               uint16 or int32 [nnz], strictly ascending within each row
    compact tensors           [nnz], in that order

Public functions validate their arguments; kernels repeat only the checks that memory safety needs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.kernels.tensors import rows_and_columns

NAMESPACE = "deftx"

# Kept for the life of the process: when a Library is garbage-collected, its operators are removed.
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

# Choices that operators take as integers; csrc/stable.h has the same codes. They are not strings: each string passed to
# a compiled operator leaks (LibTorch's stable ABI, 2.10).
SCOPES = {"global": 0, "tensor": 1, "row": 2}
OPERATIONS = {"and": 0, "or": 1, "sub": 2}
ELECTIONS = {"none": 0, "total": 1, "frequency": 2}

MAX_SUMMED_MASKS = 64  # of one csr_sum: a GPU kernel takes their addresses as parameters, of which there are 4 KB

SCHEMAS = {
    # values[i] = the tensors' entry i of the mask. All tensors have one dtype, which is the result's.
    "csr_gather": "(Tensor[] tensors, Tensor crow_indices, Tensor col_indices) -> Tensor",
    # entry i of the tensors = values[i]. `values` has the tensors' dtype.
    "csr_scatter_": "(Tensor(a!)[] tensors, Tensor crow_indices, Tensor col_indices, Tensor values) -> ()",
    # entry i of the tensors += alpha * values[i], computed in float32 (float64 where tensors or values are) and rounded
    # once. `values` has the tensors' dtype, or is float32 or float64. `former`, of the tensors' dtype, receives the
    # entries from before. `done`, bool [], is set to True at the end.
    "csr_add_": (
        "(Tensor(a!)[] tensors, Tensor crow_indices, Tensor col_indices, Tensor values, float alpha,"
        " Tensor(b!)? former=None, Tensor(c!)? done=None) -> ()"
    ),
    # Undoes a csr_add_ with `former`: entry i of the tensors = former[i]. Returns int64 [tensors]: how many entries of
    # each did not have the bits of the sum.
    "csr_restore_": (
        "(Tensor(a!)[] tensors, Tensor crow_indices, Tensor col_indices, Tensor former, Tensor values, float alpha)"
        " -> Tensor"
    ),
    # The entries of two masks over the same rows: OPERATIONS "and", "or" or "sub" (in the first, not in the second).
    # The result's col_indices have the dtype of col_indices.
    "csr_combine": (
        "(Tensor crow_indices, Tensor col_indices, Tensor other_crow_indices, Tensor other_col_indices, int operation)"
        " -> (Tensor crow_indices, Tensor col_indices)"
    ),
    # The weighted sum of compact tensors of several masks over the same rows, at the entries of one mask (their union,
    # or any other). For entry e of the mask and each j whose mask has e: x_j = values[j] there; others do not count.
    # ELECTIONS "none": sum_j weights[j] * x_j. "total", "frequency" (TIES, Yadav et al. 2023, as PEFT's ties): the
    # elected sign is + where sum_j x_j (total) or sum_j sign(x_j) (frequency) is >= 0, else -; then the sum of
    # weights[j] * x_j over the j with sign(x_j) == the elected sign, divided by max(1, their number). 0 and NaN have
    # no sign. Computed in float64, terms added in the order of j, and rounded once to dtype (float32 or float64). 0
    # where there is no term. All col_indices have one dtype; there are at most MAX_SUMMED_MASKS masks.
    "csr_sum": (
        "(Tensor crow_indices, Tensor col_indices, Tensor[] other_crow_indices, Tensor[] other_col_indices,"
        " Tensor[] values, float[] weights, int election, ScalarType dtype) -> Tensor"
    ),
    # The mask of the True entries of bool tensors.
    "dense_to_csr": "(Tensor[] dense) -> (Tensor crow_indices, Tensor col_indices)",
    # The score of an entry is |scores[i]|, or |scores[i] - base[i]| where base is not empty: a difference in float32,
    # in float64 where any tensor of the call is float64. The tensors may have several floating dtypes; scores are
    # compared exactly. SCOPES "global": k = [k]; "tensor": k[i] entries of tensor i; "row": k[i] entries of each row of
    # tensor i. `bad` int64 [2], on the CPU: (-1, -1), or (tensor, flat index) of the first NaN or infinite score;
    # then the other results are undefined.
    "topk_mask": (
        "(Tensor[] scores, Tensor[] base, int[] k, int scope) -> (Tensor crow_indices, Tensor col_indices, Tensor bad)"
    ),
    # The two steps of a radix select, for callers that add histograms up over ranks or over tensors that are not all in
    # memory. Magnitude bits: the bits of |score| as an integer, which has the order of the magnitudes. All scores have
    # one dtype. Counts the scores whose bits >> (shift + 16) are `prefix` by the next 16 bits, (bits >> shift) &
    # 0xFFFF: int64 [65536]. shift: a multiple of 16.
    "magnitude_histogram": "(Tensor[] scores, int prefix, int shift) -> Tensor",
    # The mask of the scores whose bits are above `threshold` and of each tensor's first ties[i] whose bits equal it
    # (all of them where they are fewer); ties[i] is at most the number of the tensor's elements.
    "threshold_mask": "(Tensor[] scores, int threshold, int[] ties) -> (Tensor crow_indices, Tensor col_indices)",
    # Eigenvalues, ascending, and eigenvectors (columns) of symmetric matrices [b, n, n]. For Gram matrices of which a
    # truncation keeps `rank` values, the share `energy` of their sum, or the singular values above `median` times their
    # median, the vectors that it does not need may be zero. It needs those of the kept values or of the others,
    # whichever are fewer, and the 16 next to them.
    "eigh": (
        "(Tensor matrices, int rank=0, float energy=0., float median=0.) -> (Tensor eigenvalues, Tensor eigenvectors)"
    ),
    # The eigenvalues alone.
    "eigvalsh": "(Tensor matrices) -> Tensor",
    # The last step of denoising, of matrices delta [b, m, n] whose low-rank parts L = left @ right.mT are given as
    # factors left [b, m, r] and right [b, n, r], all float32 or all float64; H = delta - L. An entry of H is kept where
    # its magnitude bits are above cut[i, 0], or equal to it at a flat index (within the matrix) below cut[i, 1]; there
    # the denoised entry is delta's own, elsewhere L's. Only the results are written to memory.
    # The cut that keeps the `keep` largest entries of each H, of equal ones the first: int64 [b, 2].
    "residual_cut": "(Tensor delta, Tensor left, Tensor right, int keep) -> Tensor",
    # L + prune(H) [b, m, n].
    "low_rank_denoised": "(Tensor delta, Tensor left, Tensor right, Tensor cut) -> Tensor",
    # float32 matrices x[i] [..., m, n], of one shape, as sums of bfloat16 ones: x0 = x[i] rounded, x1 = (x[i] - x0)
    # rounded, x2 likewise. Slot s of columns[i], along the columns [..., m, len(column_slots) * n], becomes part
    # column_slots[s]; slot s of rows[i], along the rows [..., len(row_slots) * m, n], part row_slots[s].
    "split_bf16_": ("(Tensor[] x, Tensor(a!)? columns, int[] column_slots, Tensor(b!)? rows, int[] row_slots) -> ()"),
    # One AdamW step at the masked entries. grads: the dense gradients, or one compact tensor where compact_grads.
    # Computed in float32 (float64 for float64 params). values, decay_to: compact, of that dtype; decay_to may have the
    # params'. exp_avg, exp_avg_sq: compact, of that dtype or, both, bfloat16 (float64 params: float64).
    # step, lr, grad_scale, found_inf: one-element tensors on the params' device, float32, float64, int32 or int64.
    # seed, in [0, 2**63): bfloat16 state, and bfloat16 params without values, are rounded stochastically: the words 1,
    # 2 and 0 of Philox4x32-10 with the key seed and the counter (entry, step), both as (low 32 bits, high 32 bits), are
    # for exp_avg, exp_avg_sq and the parameter; a word's low 16 bits are added to the float32 bits, whose upper 16 are
    # kept (NaN: rounded to nearest).
    # Without col_indices every element of the params is an entry, in their order: each tensor counts as one row, and
    # crow_indices int64 [tensors + 1] holds where they begin.
    # changed: int32 [ceil(nnz / 32)]; bit j % 32 of word j // 32 is set where the bits stored in the params at entry j
    # differ from those that were there. Other bits stay.
    "sparse_adamw_": (
        "(Tensor(a!)[] params, Tensor[] grads, bool compact_grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
        " Tensor(d!)? values, Tensor crow_indices, Tensor? col_indices, Tensor step, Tensor lr, float beta1,"
        " float beta2, float eps, float weight_decay, Tensor? decay_to, float l1, bool maximize, Tensor? grad_scale,"
        " Tensor? found_inf, int? seed, Tensor(e!)? changed=None) -> ()"
    ),
    # The sum of the masked entries' squares, float64 [], in an order that depends on nothing but their number.
    "csr_square_sum": "(Tensor[] tensors, Tensor crow_indices, Tensor col_indices) -> Tensor",
    # The masked entries of grad_output.T @ input: [N, m], [N, n], and the mask of one [m, n] tensor -> dtype [nnz].
    "masked_linear_grad": (
        "(Tensor grad_output, Tensor input, Tensor crow_indices, Tensor col_indices, ScalarType dtype) -> Tensor"
    ),
    # The masked entries of an embedding's weight gradient: grad_output [N, d], indices int [N] -> dtype [nnz].
    # Rows equal to padding_idx receive no gradient (-1: none).
    "masked_embedding_grad": (
        "(Tensor grad_output, Tensor indices, Tensor crow_indices, Tensor col_indices, int padding_idx,"
        " ScalarType dtype) -> Tensor"
    ),
    # The next four read and write bits: dtypes whose elements have 1, 2, 4 or 8 bytes, compared and moved as integers.
    # Entries of n tensors are given by offsets int64 [n + 1], those of tensor i are offsets[i] ... offsets[i + 1] - 1,
    # and by indices int32 or int64 [nnz], flat within their tensor and strictly ascending there.
    #
    # The entries at which the bits of new[i] and old[i] differ (-0.0 is not 0.0, NaNs are compared by their bits), and
    # new's values there. indices: int32 where every tensor has at most MAX_INT32_ELEMENTS, else int64. All tensors are
    # contiguous and have one dtype, new[i] and old[i] one shape. Without tensors: int32, float32, on the CPU.
    "bit_diff": "(Tensor[] new, Tensor[] old) -> (Tensor offsets, Tensor indices, Tensor values)",
    # Writes values [nnz] at the entries of contiguous tensors, and what was there before into values. One dtype. Called
    # again, it takes the exchange back.
    "flat_exchange_": "(Tensor(a!)[] tensors, Tensor offsets, Tensor indices, Tensor(b!) values) -> ()",
    # int64 [n]: a checksum of each contiguous tensor's bits, linear in its 32-bit words: reference_bits.bit_checksum
    # defines it. One dtype.
    "bit_checksum": "(Tensor[] tensors) -> Tensor",
    # int64 [n]: what to add, modulo 2**64, to the checksums when the entries go from old to new. Both [nnz], one dtype.
    # indices need not ascend.
    "bit_checksum_change": "(Tensor offsets, Tensor indices, Tensor old, Tensor new) -> Tensor",
    # The bits that are set in words int32 [w]: bit j of word k, the lowest first, is number 32 k + j. Part i of n has
    # the numbers starts[i] ... starts[i + 1] - 1, starts int64 [n + 1], and its indices count from starts[i].
    # indices: int32 where the words have at most MAX_INT32_ELEMENTS bits, else int64.
    "set_bits": "(Tensor words, Tensor starts) -> (Tensor offsets, Tensor indices)",
}

MAX_INT32_ELEMENTS = 2**31 - 1
MAX_UINT16_COLUMNS = 65_536


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a dtype are computed in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def column_dtype(shapes: Sequence[Sequence[int]]) -> torch.dtype:
    """uint16 where every tensor has at most 65,536 columns, else int32."""
    return torch.uint16 if all(rows_and_columns(s)[1] <= MAX_UINT16_COLUMNS for s in shapes) else torch.int32


def index_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """int32 for flat indices of tensors of at most 2**31 - 1 elements each, else int64."""
    return torch.int32 if all(t.numel() <= MAX_INT32_ELEMENTS for t in tensors) else torch.int64


class AdamWArgs(NamedTuple):
    """The arguments of the operator `sparse_adamw_`, in the schema's order."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    compact_grads: bool
    exp_avg: Tensor  # [nnz]
    exp_avg_sq: Tensor  # [nnz]
    values: Tensor | None  # [nnz]
    crow_indices: Tensor  # int64 [rows + 1], or [tensors + 1] without col_indices
    col_indices: Tensor | None  # uint16 or int32 [nnz]
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
    changed: Tensor | None = None  # int32 [ceil(nnz / 32)]


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    """The tensors among an operator's arguments, those in lists included."""
    flat = [x for a in arguments for x in (a if isinstance(a, list | tuple) else (a,))]
    return [x for x in flat if isinstance(x, Tensor)]


# ---- fake kernels ----
def _returns_nothing(*arguments: Any) -> None:
    return None


def _indices(like: Tensor, rows: int, nnz: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return like.new_empty(rows + 1, dtype=torch.int64), like.new_empty(nnz, dtype=dtype)


def _indices_of(tensors: Sequence[Tensor], nnz: Any = None) -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices over the tensors. nnz None: it depends on the data."""
    shapes = [t.shape for t in tensors]
    nnz = torch.library.get_ctx().new_dynamic_size() if nnz is None else nnz
    return _indices(tensors[0], sum(rows_and_columns(s)[0] for s in shapes), nnz, column_dtype(shapes))


def _csr_combine(crow_indices, col_indices, other_crow_indices, other_col_indices, operation):
    nnz = torch.library.get_ctx().new_dynamic_size()
    return _indices(crow_indices, crow_indices.shape[0] - 1, nnz, col_indices.dtype)


def _csr_sum(crow_indices, col_indices, *rest):
    return col_indices.new_empty(col_indices.shape, dtype=rest[-1])


def _topk_mask(scores, base, k, scope):
    rows = [rows_and_columns(s.shape)[0] for s in scores]
    nnz = sum(n * r for n, r in zip(k, rows, strict=True)) if scope == SCOPES["row"] else sum(k)
    return *_indices_of(scores, nnz), torch.empty(2, dtype=torch.int64, device="cpu")


def _masked_grad(grad_output, other, crow_indices, col_indices, *rest):
    return grad_output.new_empty(col_indices.shape, dtype=rest[-1])


def _bit_diff(new, old):
    like = new[0] if new else torch.empty(0)
    nnz = torch.library.get_ctx().new_dynamic_size()
    indices = like.new_empty(nnz, dtype=index_dtype(new))
    return like.new_empty(len(new) + 1, dtype=torch.int64), indices, like.new_empty(nnz)


def bits_dtype(words: Tensor) -> torch.dtype:
    """Of the numbers of bits in int32 words."""
    return torch.int32 if 32 * words.numel() <= MAX_INT32_ELEMENTS else torch.int64


def _set_bits(words, starts):
    nnz = torch.library.get_ctx().new_dynamic_size()
    return starts.new_empty(starts.shape), words.new_empty(nnz, dtype=bits_dtype(words))


def _bit_checksum(tensors):
    return (tensors[0] if tensors else torch.empty(0)).new_empty(len(tensors), dtype=torch.int64)


FAKES: dict[str, Callable] = {
    "csr_gather": lambda tensors, crow_indices, col_indices: tensors[0].new_empty(col_indices.shape),
    "csr_scatter_": _returns_nothing,
    "csr_add_": _returns_nothing,
    "csr_restore_": lambda tensors, crow_indices, *_: crow_indices.new_empty(len(tensors)),
    "csr_combine": _csr_combine,
    "csr_sum": _csr_sum,
    "dense_to_csr": _indices_of,
    "topk_mask": _topk_mask,
    "magnitude_histogram": lambda scores, prefix, shift: scores[0].new_empty(1 << 16, dtype=torch.int64),
    "threshold_mask": lambda scores, threshold, ties: _indices_of(scores),
    "eigh": lambda matrices, *_: (matrices.new_empty(matrices.shape[:-1]), torch.empty_like(matrices).mT),
    "eigvalsh": lambda matrices: matrices.new_empty(matrices.shape[:-1]),
    "residual_cut": lambda delta, left, right, keep: delta.new_empty(delta.shape[0], 2, dtype=torch.int64),
    "low_rank_denoised": lambda delta, left, right, cut: torch.empty_like(delta),
    "split_bf16_": _returns_nothing,
    "sparse_adamw_": _returns_nothing,
    "csr_square_sum": lambda tensors, crow_indices, col_indices: col_indices.new_empty((), dtype=torch.float64),
    "masked_linear_grad": _masked_grad,
    "masked_embedding_grad": _masked_grad,
    "bit_diff": _bit_diff,
    "flat_exchange_": _returns_nothing,
    "bit_checksum": _bit_checksum,
    "bit_checksum_change": lambda offsets, indices, old, new: offsets.new_empty(offsets.shape[0] - 1),
    "set_bits": _set_bits,
}


def _on_one_device(op: str, fake: Callable) -> Callable:
    """`fake` behind a check: for tensors on "meta" and others with data torch calls the fake kernel, which would return
    uninitialized memory."""

    @functools.wraps(fake)
    def run(*arguments):
        devices = {t.device for t in tensors_of(arguments)}
        if len(devices) > 1:
            raise ValueError(
                f"{NAMESPACE}::{op}: all tensors must be on one device, got {', '.join(sorted(map(str, devices)))}"
            )
        return fake(*arguments)

    return run


for _op, _schema in SCHEMAS.items():
    LIBRARY.define(_op + _schema)
    torch.library.register_fake(f"{NAMESPACE}::{_op}", _on_one_device(_op, FAKES[_op]), lib=LIBRARY)
