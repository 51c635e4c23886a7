"""One plain-torch implementation per operator: the oracle in float64, and the portable fallback on every device.

Written for clarity, not for speed: tests compare the compiled kernels with these functions. Arguments: `schemas.py`.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from deftx_kernels.kernels.tensors import FLOATS, INTEGERS, rows_and_columns
from deftx_kernels.ops.reference_adamw import philox, sparse_adamw_  # noqa: F401
from deftx_kernels.ops.reference_bits import bit_checksum, bit_checksum_change, bit_diff, flat_exchange_, set_bits  # noqa: F401
from deftx_kernels.ops.reference_csr import csr_add_, csr_gather, csr_restore_, csr_scatter_  # noqa: F401
from deftx_kernels.ops.schemas import ELECTIONS, OPERATIONS, SCOPES, column_dtype, compute_dtype

_CHUNK = 1 << 22  # elements of temporary memory per step


def _matrix(tensor: Tensor) -> Tensor:
    """The [rows, columns] view of a contiguous tensor that a CSRMask uses."""
    return tensor.view(rows_and_columns(tensor.shape))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


# ---- CSR ----
def _keys(crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    """int64 [nnz]: ascending, equal for equal entries of masks over the same rows."""
    rows = torch.arange(len(crow_indices) - 1, device=crow_indices.device)
    return torch.repeat_interleave(rows << 32, crow_indices.diff()) + col_indices.to(torch.int64)


def _check_mask(crow_indices: Tensor, col_indices: Tensor, prefix: str = "") -> None:
    crow, col = f"{prefix}crow_indices", f"{prefix}col_indices"
    for tensor, name in ((crow_indices, crow), (col_indices, col)):
        _require(tensor.is_contiguous(), f"{name} must be contiguous")
    _require(crow_indices.dim() == 1 and crow_indices.dtype == torch.int64, f"{crow} must be int64 [rows + 1]")
    narrow_or_wide = col_indices.dtype in (torch.uint16, torch.int32)
    _require(col_indices.dim() == 1 and narrow_or_wide, f"{col} must be uint16 or int32 [nnz]")


def _check_rows(crow_indices: Tensor, nnz: int, crow: str) -> None:
    ends = int(crow_indices[0]), int(crow_indices[-1])
    _require(ends == (0, nnz), f"{crow} must run from 0 to nnz = {nnz}, got {ends}")
    _require(bool((crow_indices.diff() >= 0).all()), f"{crow} must not descend")


def csr_combine(
    crow_indices: Tensor, col_indices: Tensor, other_crow_indices: Tensor, other_col_indices: Tensor, operation: int
) -> tuple[Tensor, Tensor]:
    _require(operation in OPERATIONS.values(), f"operation must be 0 (and), 1 (or) or 2 (sub), got {operation}")
    _check_mask(crow_indices, col_indices)
    _check_mask(other_crow_indices, other_col_indices, "other_")
    _require(
        len(crow_indices) == len(other_crow_indices) > 0,
        f"crow_indices has {len(crow_indices)} elements and other_crow_indices has {len(other_crow_indices)};"
        " both must have one per row and one more",
    )
    _require(col_indices.dtype == other_col_indices.dtype, "col_indices and other_col_indices must have the same dtype")
    _require(
        len(crow_indices) > 1 or len(col_indices) + len(other_col_indices) == 0,
        f"a mask without rows must have no entries, col_indices has {len(col_indices)} and other_col_indices has"
        f" {len(other_col_indices)}",
    )
    _check_rows(crow_indices, len(col_indices), "crow_indices")
    _check_rows(other_crow_indices, len(other_col_indices), "other_crow_indices")
    mine, theirs = _keys(crow_indices, col_indices), _keys(other_crow_indices, other_col_indices)
    if operation == OPERATIONS["or"]:
        keys = torch.unique(torch.cat([mine, theirs]))
    else:
        common = torch.isin(mine, theirs, assume_unique=True)
        keys = mine[common] if operation == OPERATIONS["and"] else mine[~common]
    crow = torch.searchsorted(keys, torch.arange(len(crow_indices), device=keys.device) << 32)
    return crow, (keys & 0xFFFF_FFFF).to(torch.int32).to(col_indices.dtype)


def csr_sum(
    crow_indices: Tensor,
    col_indices: Tensor,
    other_crow_indices: Sequence[Tensor],
    other_col_indices: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[float],
    election: int,
    dtype: torch.dtype,
) -> Tensor:
    elect, keys = election != ELECTIONS["none"], _keys(crow_indices, col_indices)
    elected = torch.zeros(keys.shape, dtype=torch.float64, device=keys.device)
    found = []  # of each mask: its entries among those of the result, and their values
    for crow, col, compact in zip(other_crow_indices, other_col_indices, values):
        theirs = _keys(crow, col)
        index = torch.searchsorted(theirs, keys)
        at = (index < len(theirs)).nonzero().view(-1)
        at = at[theirs[index[at]] == keys[at]]
        x = compact[index[at]].to(torch.float64)
        found.append((at, x))
        elected[at] += x if election == ELECTIONS["total"] else x.sign()
    positive = elected >= 0
    # x + -0.0 is x for every x: a sum of -0.0 alone is -0.0.
    total, count = torch.full_like(elected, -0.0), torch.zeros_like(elected)
    for (at, x), weight in zip(found, weights):
        if elect:
            chosen = torch.where(positive[at], x > 0, x < 0)
            at, x = at[chosen], x[chosen]
        total[at] += weight * x
        count[at] += 1
    mean = total / count.clamp(min=1) if elect else total
    return torch.where(count > 0, mean, 0.0).to(dtype)


def dense_to_csr(dense: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    _require(len(dense) > 0, "dense must hold at least one tensor")
    for i, tensor in enumerate(dense):
        _require(tensor.dtype == torch.bool, f"dense: tensor {i} must be bool, got {tensor.dtype}")
        _require(tensor.is_contiguous(), f"dense: tensor {i} must be contiguous")
    return _csr([t.view(-1).nonzero().view(-1) for t in dense], [_matrix(t) for t in dense])


def _csr(index: Sequence[Tensor], matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """From the ascending flat indices of each tensor's entries."""
    counts, columns_found = [], []
    for flat, matrix in zip(index, matrices):
        rows, columns = matrix.shape
        row = flat // max(columns, 1)
        counts.append(torch.bincount(row, minlength=rows))
        columns_found.append((flat - row * columns).to(torch.int32))
    crow_indices = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0))
    return crow_indices, torch.cat(columns_found).to(column_dtype([m.shape for m in matrices]))


# ---- exact top-k ----
def magnitude_bits(x: Tensor) -> Tensor:
    """|x| as integers in the same order; infinity and NaN come last."""
    integer = INTEGERS[x.element_size()]
    return x.view(integer) & torch.iinfo(integer).max


def infinity_bits(dtype: torch.dtype) -> int:
    return int(magnitude_bits(torch.tensor([math.inf], dtype=dtype)))


def _check_scores(scores: Sequence[Tensor], name: str = "scores") -> None:
    _require(len(scores) > 0, f"{name} must hold at least one tensor")
    for i, tensor in enumerate(scores):
        _require(
            tensor.dtype in FLOATS,
            f"{name}: tensor {i} must be float32, float64, bfloat16 or float16, got {tensor.dtype}",
        )
        _require(tensor.is_contiguous(), f"{name}: tensor {i} must be contiguous")


def _check_one_dtype(scores: Sequence[Tensor]) -> int:
    """Returns the number of bits of a score."""
    _check_scores(scores)
    _require(
        all(s.dtype == scores[0].dtype for s in scores), f"scores must have one dtype, got {[s.dtype for s in scores]}"
    )
    return 8 * scores[0].element_size()


def _histogram(x: Tensor, prefix: int, shift: int) -> Tensor:
    histogram = torch.zeros(1 << 16, dtype=torch.int64, device=x.device)
    for chunk in x.view(-1).split(_CHUNK):
        bits = magnitude_bits(chunk)
        if shift + 16 < 8 * x.element_size():
            bits = bits[(bits >> (shift + 16)) == prefix]
        histogram += torch.bincount((bits >> shift) & 0xFFFF, minlength=1 << 16)
    return histogram


def magnitude_histogram(scores: Sequence[Tensor], prefix: int, shift: int) -> Tensor:
    bits = _check_one_dtype(scores)
    _require(0 <= shift < bits and shift % 16 == 0, f"shift must be a multiple of 16 in [0, {bits}), got {shift}")
    length = bits - 16 - shift
    _require(0 <= prefix < 1 << length, f"prefix must be the first {length} bits of a score, got {prefix}")
    return functools.reduce(Tensor.add_, (_histogram(s, prefix, shift) for s in scores))


def radix_select(
    histogram: Callable[[int, int], Tensor],  # (prefix, shift) -> int64 [65536], as the operator magnitude_histogram
    element_size: int,  # bytes of a score
    k: int,
) -> tuple[int, int, int]:
    """The bits of the k-th largest magnitude, how many equal to it are of the first k, and how many there are."""
    prefix, remaining, tied = 0, k, 0
    for shift in range(8 * element_size - 16, -1, -16):
        counts = histogram(prefix, shift).flip(0)
        cumulative = counts.cumsum(0)
        position = int(torch.searchsorted(cumulative, remaining))
        tied = int(counts[position])
        remaining -= int(cumulative[position]) - tied
        prefix = (prefix << 16) | (0xFFFF - position)
    return prefix, remaining, tied


def kth_magnitude(parts: Callable[[], Iterable[Tensor]], k: int) -> tuple[int, int]:
    """`radix_select` of contiguous parts, made anew for each round, so that they need not all be in memory."""

    def histogram(prefix: int, shift: int) -> Tensor:
        return functools.reduce(Tensor.add_, (_histogram(p, prefix, shift) for p in parts()))

    return radix_select(histogram, next(iter(parts())).element_size(), k)[:2]


def take(x: Tensor, threshold: int, ties: int) -> tuple[Tensor, int]:
    """Ascending flat indices of |x| above the threshold and of the first `ties` equal to it; the ties that are left."""
    found = []
    for start, chunk in zip(range(0, x.numel(), _CHUNK), x.view(-1).split(_CHUNK)):
        bits = magnitude_bits(chunk)
        index = (bits >= threshold).nonzero().view(-1)
        tied = bits[index] == threshold
        index = index[~tied | (tied.cumsum(0) <= ties)]
        ties -= min(ties, int(tied.sum()))
        found.append(index + start)
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=x.device), ties


def threshold_mask(scores: Sequence[Tensor], threshold: int, ties: Sequence[int]) -> tuple[Tensor, Tensor]:
    most = (1 << (_check_one_dtype(scores) - 1)) - 1
    _require(0 <= threshold <= most, f"threshold must be the bits of a magnitude, from 0 to {most}, got {threshold}")
    _require(len(ties) == len(scores), f"ties must have one number for each tensor, got {len(ties)} for {len(scores)}")
    for i, (n, tensor) in enumerate(zip(ties, scores)):
        _require(
            0 <= n <= tensor.numel(), f"ties must be from 0 to the {tensor.numel()} entries of tensor {i}, got {n}"
        )
    return _csr([take(s, threshold, n)[0] for s, n in zip(scores, ties)], [_matrix(s) for s in scores])


def _top_per_row(matrix: Tensor, k: int) -> Tensor:
    """Ascending flat indices of the k largest |x| of each row."""
    rows, columns = matrix.shape
    order = magnitude_bits(matrix).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (order.sort(dim=1).values + torch.arange(rows, device=matrix.device)[:, None] * columns).view(-1)


def _check_topk(scores: Sequence[Tensor], base: Sequence[Tensor], k: Sequence[int], scope: int) -> None:
    _check_scores(scores)
    if base:
        _check_scores(base, "base")
        _require(len(base) == len(scores), "base must be empty or have as many tensors as scores")
        for i, (b, s) in enumerate(zip(base, scores)):
            _require(b.numel() == s.numel(), f"base: tensor {i} has {b.numel()} elements, its scores have {s.numel()}")
    _require(scope in SCOPES.values(), f"scope must be 0 (global), 1 (tensor) or 2 (row), got {scope}")
    if scope == SCOPES["row"]:
        most = [_matrix(s).shape[1] for s in scores]
    else:
        most = [s.numel() for s in scores]
        most = [sum(most)] if scope == SCOPES["global"] else most
    _require(len(k) == len(most), f"k must have one number for each selection, {len(most)}, got {len(k)}")
    for n, limit in zip(k, most):
        _require(0 <= n <= limit, f"k must be from 0 to {limit}, got {n}")


def topk_mask(
    scores: Sequence[Tensor], base: Sequence[Tensor], k: Sequence[int], scope: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check_topk(scores, base, k, scope)
    dtype = torch.float32 if base else scores[0].dtype
    for tensor in (*scores, *base):
        dtype = torch.promote_types(dtype, tensor.dtype)
    device = scores[0].device

    def score(i: int) -> Tensor:  # computed again in each pass, so that not all differences are in memory
        x = scores[i].to(dtype)
        return x - base[i].view_as(x).to(dtype) if base else x

    parts = range(len(scores))
    for i in parts:
        finite = magnitude_bits(score(i)).view(-1) < infinity_bits(dtype)
        if not bool(finite.all()):
            bad = [i, int((~finite).to(torch.uint8).argmax())]
            break
    else:
        bad = [-1, -1]
    if bad[0] >= 0:
        k = [0] * len(k)
    if scope == SCOPES["global"]:
        threshold, ties = kth_magnitude(lambda: map(score, parts), k[0]) if k[0] else (infinity_bits(dtype), 0)
    found = []
    for i in parts:
        x = score(i)
        if scope == SCOPES["global"]:
            index, ties = take(x, threshold, ties)
        elif k[i] == 0 or x.numel() == 0:
            index = torch.empty(0, dtype=torch.int64, device=device)
        elif scope == SCOPES["tensor"]:
            index, _ = take(x, *kth_magnitude(functools.partial(iter, [x]), k[i]))
        else:
            index = _top_per_row(_matrix(x), k[i])
        found.append(index)
    return *_csr(found, [_matrix(s) for s in scores]), torch.tensor(bad)


# ---- denoising ----
def eigh(matrices: Tensor, rank: int = 0, energy: float = 0.0, median: float = 0.0) -> tuple[Tensor, Tensor]:
    return torch.linalg.eigh(matrices)


def eigvalsh(matrices: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrices)


def split_bf16_(
    x: Sequence[Tensor],
    columns: Tensor | None,
    column_slots: Sequence[int],
    rows: Tensor | None,
    row_slots: Sequence[int],
) -> None:
    for i, rest in enumerate(x):
        parts = []
        for _ in range(max(*column_slots, *row_slots, 0) + 1):
            parts.append(rest.to(torch.bfloat16))
            rest = rest - parts[-1].float()
        if columns is not None:
            torch.cat([parts[s] for s in column_slots], -1, out=columns[i])
        if rows is not None:
            torch.cat([parts[s] for s in row_slots], -2, out=rows[i])


def _residual(delta: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """L and H of one matrix."""
    low = left @ right.mT
    return low, (delta - low).contiguous()


def residual_cut(delta: Tensor, left: Tensor, right: Tensor, keep: int) -> Tensor:
    cuts = []
    for d, u, v in zip(delta, left, right):
        if keep == 0:
            cuts.append([infinity_bits(delta.dtype), 0])
            continue
        _, residual = _residual(d, u, v)
        threshold, ties = kth_magnitude(functools.partial(iter, [residual]), keep)
        tied = (magnitude_bits(residual).view(-1) == threshold).nonzero().view(-1)
        cuts.append([threshold, int(tied[ties - 1]) + 1])
    return torch.tensor(cuts, dtype=torch.int64, device=delta.device).view(-1, 2)


def low_rank_denoised(delta: Tensor, left: Tensor, right: Tensor, cut: Tensor) -> Tensor:
    denoised = torch.empty_like(delta)
    for i, (d, u, v) in enumerate(zip(delta, left, right)):
        low, residual = _residual(d, u, v)
        bits = magnitude_bits(residual)
        index = torch.arange(bits.numel(), device=bits.device).view(bits.shape)
        threshold, end = cut[i].tolist()
        denoised[i] = torch.where((bits > threshold) | (bits == threshold) & (index < end), d, low)
    return denoised


def csr_square_sum(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor) -> Tensor:
    return csr_gather(tensors, crow_indices, col_indices).to(torch.float64).square().sum()


# ---- masked weight gradients ----
def masked_linear_grad(
    grad_output: Tensor,  # [N, m]
    input: Tensor,  # [N, n]
    crow_indices: Tensor,  # int64 [m + 1]
    col_indices: Tensor,  # [nnz]
    dtype: torch.dtype,
) -> Tensor:
    """Computed by blocks of rows, of which only the masked entries are kept: there is no [m, n] buffer."""
    compute = compute_dtype(dtype)
    x = input.to(compute)
    m, n = grad_output.shape[1], input.shape[1]
    out = torch.empty(col_indices.shape, dtype=dtype, device=grad_output.device)
    block = max(1, _CHUNK // max(1, n))
    edges = [*range(0, m, block), m]
    bounds = crow_indices[edges].tolist()
    for i, (first, last) in enumerate(zip(edges, edges[1:])):
        dense = grad_output[:, first:last].to(compute).mT @ x
        start, end = bounds[i], bounds[i + 1]
        crow, col = crow_indices[first : last + 1] - start, col_indices[start:end]
        out[start:end] = csr_gather([dense.contiguous()], crow, col).to(dtype)
    return out


def masked_embedding_grad(
    grad_output: Tensor,  # [N, d]
    indices: Tensor,  # integer [N]
    crow_indices: Tensor,  # int64 [vocabulary + 1]
    col_indices: Tensor,  # [nnz]
    padding_idx: int,
    dtype: torch.dtype,
) -> Tensor:
    """Sums only the rows that occur, and keeps only the masked entries: there is no [vocabulary, d] buffer."""
    out = torch.zeros(col_indices.shape, dtype=dtype, device=grad_output.device)
    used = indices != padding_idx
    rows, inverse = torch.unique(indices[used].to(torch.int64), return_inverse=True)
    sums = torch.zeros(len(rows), grad_output.shape[1], dtype=compute_dtype(dtype), device=grad_output.device)
    sums.index_add_(0, inverse, grad_output[used].to(sums.dtype))
    start, counts = crow_indices[rows], crow_indices[rows + 1] - crow_indices[rows]
    row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    within = torch.arange(len(row), device=rows.device) - (counts.cumsum(0) - counts)[row]
    position = start[row] + within
    out[position] = sums[row, col_indices.to(torch.int64)[position]].to(dtype)
    return out
