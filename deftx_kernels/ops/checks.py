"""Checks of the arguments of direct operator calls, for the implementations that Python registers.

Public functions check their arguments. A direct call of `torch.ops.deftx.*` bypasses these checks, and with a wrong
size or index a kernel would read or write other memory. The compiled libraries check the same in C++; for operators
without a Triton kernel, `reference` contains the checks. The checks do not read the elements of tensors, which would
wait for a GPU; only those of `contents` do, for the reference.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deftx_kernels.kernels.tensors import FLOATS, INTEGERS, SCALARS, overlapping
from deftx_kernels.ops.contents import CONTENTS
from deftx_kernels.ops.schemas import ELECTIONS, MAX_SUMMED_MASKS, AdamWArgs, compute_dtype, rows_and_columns

Dtypes = frozenset[torch.dtype]

_WIDE_FLOATS: Dtypes = frozenset((torch.float32, torch.float64))
_COLUMNS: Dtypes = frozenset((torch.uint16, torch.int32))
_INDICES: Dtypes = frozenset((torch.int32, torch.int64))
_INT32: Dtypes = frozenset((torch.int32,))
_INT64: Dtypes = frozenset((torch.int64,))


def checked(op: str, function: Callable, *, reads_contents: bool = False, checks_tensors: bool = False) -> Callable:
    """`function`, an implementation of the operator, behind the operator's checks.

    reads_contents: also check the elements of crow_indices, col_indices and indices, for a function that waits for the
        device.
    checks_tensors: the function itself checks the tensors of the mask.
    """
    check = (_WITHOUT_TENSORS if checks_tensors else CHECKS).get(op)
    if check is None:
        return function
    contents = CONTENTS.get(op) if reads_contents else None

    @functools.wraps(function)
    def run(*arguments: Any) -> Any:
        check(*arguments)
        if contents is not None:
            contents(*arguments)
        return function(*arguments)

    return run


# ---- one tensor or number ----
def _tensor(t: Tensor, name: str, device: torch.device, dtypes: Dtypes) -> None:
    if t.dtype in dtypes and t.device == device and t.layout is torch.strided:
        return
    if t.dtype not in dtypes:
        names = " or ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise TypeError(f"{name} must be {names}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name} is on {t.device}, the other arguments are on {device}")
    raise TypeError(f"{name} must be a dense (strided) tensor, got layout {t.layout}")


def _contiguous(t: Tensor, name: str, device: torch.device, dtypes: Dtypes) -> None:
    _tensor(t, name, device, dtypes)
    if not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _compact(t: Tensor | None, name: str, device: torch.device, dtypes: Dtypes, nnz: int) -> None:
    if t is not None:
        _contiguous(t, name, device, dtypes)
        if t.shape != (nnz,):
            raise ValueError(f"{name} must have shape [nnz] = [{nnz}], got {list(t.shape)}")


def _number(value: float, name: str, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value}")


def _float_dtype(dtype: torch.dtype, name: str) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")


# ---- operators with a fixed number of tensors: one row for each operator ----
class _Argument(NamedTuple):
    name: str
    dtypes: Dtypes | str  # str: the dtype of the argument of this name
    shape: tuple[str | int, ...]  # equal letters stand for equal sizes; "m + 1" is one more than "m"
    contiguous: bool = False


_MATRICES = (_Argument("matrices", _WIDE_FLOATS, ("b", "n", "n")),)
_FACTORS = (
    _Argument("delta", _WIDE_FLOATS, ("b", "m", "n"), True),
    _Argument("left", "delta", ("b", "m", "r"), True),
    _Argument("right", "delta", ("b", "n", "r"), True),
)


def _mask_arguments(rows: str) -> tuple[_Argument, ...]:
    return (
        _Argument("crow_indices", _INT64, (f"{rows} + 1",), True),
        _Argument("col_indices", _COLUMNS, ("nnz",), True),
    )


_ARGUMENTS: dict[str, tuple[_Argument, ...]] = {
    "masked_linear_grad": (
        _Argument("grad_output", FLOATS, ("N", "m")),
        _Argument("input", FLOATS, ("N", "n")),
        *_mask_arguments("m"),
    ),
    "masked_embedding_grad": (
        _Argument("grad_output", FLOATS, ("N", "d")),
        _Argument("indices", _INDICES, ("N",)),
        *_mask_arguments("rows"),
    ),
    "eigh": _MATRICES,
    "eigvalsh": _MATRICES,
    "residual_cut": _FACTORS,
    "low_rank_denoised": (*_FACTORS, _Argument("cut", _INT64, ("b", 2), True)),
}


def _check_arguments(op: str, *tensors: Tensor) -> dict[str, int]:
    """Checks the tensors, which come first among the operator's arguments. Returns the sizes by their letters."""
    sizes: dict[str, int] = {}
    dtypes: dict[str, Dtypes] = {}
    for argument, t in zip(_ARGUMENTS[op], tensors):
        wanted = argument.dtypes if isinstance(argument.dtypes, frozenset) else dtypes[argument.dtypes]
        (_contiguous if argument.contiguous else _tensor)(t, argument.name, tensors[0].device, wanted)
        dtypes[argument.name] = frozenset((t.dtype,))
        known = dict(sizes)
        if t.dim() != len(argument.shape) or not all(map(functools.partial(_fits, sizes), argument.shape, t.shape)):
            letters = {word.removesuffix(" + 1") for word in argument.shape if isinstance(word, str)}
            given = ", ".join(f"{letter} = {known[letter]}" for letter in sorted(letters & known.keys()))
            shape = ", ".join(map(str, argument.shape))
            raise ValueError(
                f"{argument.name} must have shape [{shape}]{f' with {given}' if given else ''}, got {list(t.shape)}"
            )
    if sizes.get("nnz") and sizes.get("rows", sizes.get("m")) == 0:
        raise ValueError(f"a mask without rows must have no entries, col_indices has {sizes['nnz']}")
    return sizes


def _fits(sizes: dict[str, int], word: str | int, size: int) -> bool:
    if isinstance(word, int):
        return size == word
    letter = word.removesuffix(" + 1")
    size -= letter != word
    return size >= 0 and sizes.setdefault(letter, size) == size


def masked_linear_grad(*arguments: Any) -> None:
    sizes = _check_arguments("masked_linear_grad", *arguments[:4])
    if sizes["n"] == 0 and sizes["nnz"]:
        raise ValueError(f"input has no columns, so that the mask must have no entries; col_indices has {sizes['nnz']}")
    _float_dtype(arguments[4], "dtype")


def masked_embedding_grad(*arguments: Any) -> None:
    _check_arguments("masked_embedding_grad", *arguments[:4])
    _float_dtype(arguments[5], "dtype")


def eigh(matrices: Tensor, rank: int = 0, energy: float = 0.0, median: float = 0.0) -> None:
    sizes = _check_arguments("eigh", matrices)
    _number(rank, "rank", 0, sizes["n"])
    _number(energy, "energy", 0.0, 1.0)
    _number(median, "median", 0.0, 1e30)
    if (rank > 0) + (energy > 0) + (median > 0) > 1:
        raise ValueError(f"at most one of rank, energy and median may be above 0, got {rank}, {energy} and {median}")


def residual_cut(delta: Tensor, left: Tensor, right: Tensor, keep: int) -> None:
    sizes = _check_arguments("residual_cut", delta, left, right)
    _number(keep, "keep", 0, sizes["m"] * sizes["n"])


def split_bf16_(
    x: Sequence[Tensor],
    columns: Tensor | None,
    column_slots: Sequence[int],
    rows: Tensor | None,
    row_slots: Sequence[int],
) -> None:
    if not x:
        raise ValueError("x must hold at least one tensor")
    for i, t in enumerate(x):
        _tensor(t, f"x[{i}]", x[0].device, frozenset((torch.float32,)))
        if t.dim() < 2 or t.shape != x[0].shape:
            shape = "[..., m, n]" if i == 0 else f"{list(x[0].shape)}, as x[0]"
            raise ValueError(f"x[{i}] must have shape {shape}, got {list(t.shape)}")
    if columns is None and rows is None:
        raise ValueError("columns or rows must be a tensor, got None for both")
    _parts(x, columns, "columns", column_slots, "column_slots", -1)
    _parts(x, rows, "rows", row_slots, "row_slots", -2)
    if columns is not None and rows is not None and overlapping((columns, rows)):
        raise ValueError("columns and rows share memory")


def _parts(x: Sequence[Tensor], out: Tensor | None, name: str, slots: Sequence[int], slots_name: str, dim: int) -> None:
    if out is None:
        if slots:
            raise ValueError(f"{slots_name} must be empty where {name} is None, got {list(slots)}")
        return
    _contiguous(out, name, x[0].device, frozenset((torch.bfloat16,)))
    if not slots or not all(0 <= s <= 2 for s in slots):
        raise ValueError(f"{slots_name} must be a list of 0, 1 and 2, got {list(slots)}")
    shape = [len(x), *x[0].shape]
    shape[dim] *= len(slots)
    if list(out.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {list(out.shape)}")


# ---- operators on the tensors of a mask ----
def _mask(
    crow_indices: Tensor,
    col_indices: Tensor,
    rows: int | None = None,
    crow: str = "crow_indices",
    col: str = "col_indices",
) -> None:
    device = col_indices.device
    _contiguous(crow_indices, crow, device, _INT64)
    _contiguous(col_indices, col, device, _COLUMNS)
    if crow_indices.dim() != 1 or col_indices.dim() != 1 or crow_indices.numel() == 0:
        raise ValueError(
            f"{crow} must have shape [rows + 1] and {col} [nnz], got {list(crow_indices.shape)} and"
            f" {list(col_indices.shape)}"
        )
    found = crow_indices.numel() - 1
    if rows is not None and found != rows:
        raise ValueError(f"{crow} has {found + 1} elements; {rows} rows need {rows + 1}")
    if found == 0 and col_indices.numel():
        raise ValueError(f"a mask without rows must have no entries, {col} has {col_indices.shape[0]}")


def _dense(tensors: Sequence[Tensor], name: str, device: torch.device, dtypes: Dtypes | None = None) -> None:
    for i, t in enumerate(tensors):
        _contiguous(t, f"{name}[{i}]", device, frozenset((tensors[0].dtype,)) if i or dtypes is None else dtypes)


def _apart(tensors: Sequence[Tensor], name: str) -> None:
    """Tensors that are written must not share memory: the order of two writes is undefined."""
    if overlapping(tensors):
        raise ValueError(f"two of {name} share memory")


def csr_gather(
    tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, dtypes: Dtypes | None = None
) -> None:
    _mask(crow_indices, col_indices, sum(rows_and_columns(t.shape)[0] for t in tensors))
    _dense(tensors, "tensors", col_indices.device, dtypes)


def csr_scatter_(tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, values: Tensor) -> None:
    csr_gather(tensors, crow_indices, col_indices)
    if tensors:
        _compact(values, "values", col_indices.device, frozenset((tensors[0].dtype,)), col_indices.shape[0])
    _apart(tensors, "tensors")


def csr_add_(
    tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, values: Tensor, alpha: float, *more: Any
) -> None:
    former, done = (*more, None, None)[:2]
    csr_gather(tensors, crow_indices, col_indices, FLOATS)
    device, nnz = col_indices.device, col_indices.shape[0]
    if tensors:
        _compact(values, "values", device, _WIDE_FLOATS | {tensors[0].dtype}, nnz)
        _compact(former, "former", device, frozenset((tensors[0].dtype,)), nnz)
    _apart(tensors if former is None else [*tensors, former], "tensors and former")
    if done is not None:
        _tensor(done, "done", device, frozenset((torch.bool,)))
        if done.numel() != 1:
            raise ValueError(f"done must be one bool, got shape {list(done.shape)}")


def csr_restore_(
    tensors: Sequence[Tensor], crow_indices: Tensor, col_indices: Tensor, former: Tensor, values: Tensor, alpha: float
) -> None:
    csr_add_(tensors, crow_indices, col_indices, values, alpha, former)


def csr_sum(
    crow_indices: Tensor,
    col_indices: Tensor,
    other_crow_indices: Sequence[Tensor],
    other_col_indices: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[float],
    election: int,
    dtype: torch.dtype,
) -> None:
    if election not in ELECTIONS.values():
        raise ValueError(f"election must be 0 (none), 1 (total) or 2 (frequency), got {election}")
    if dtype not in _WIDE_FLOATS:
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    counts = [len(x) for x in (other_crow_indices, other_col_indices, values, weights)]
    if len(set(counts)) > 1:
        raise ValueError(
            "other_crow_indices, other_col_indices, values and weights must have one element for each mask, got"
            f" {', '.join(map(str, counts))}"
        )
    if len(values) > MAX_SUMMED_MASKS:
        raise ValueError(f"values must be of at most {MAX_SUMMED_MASKS} masks, got {len(values)}")
    _mask(crow_indices, col_indices)
    rows, device = crow_indices.numel() - 1, col_indices.device
    for i, (crow, col, compact) in enumerate(zip(other_crow_indices, other_col_indices, values)):
        name = f"other_col_indices[{i}]"
        _contiguous(col, name, device, frozenset((col_indices.dtype,)))
        _mask(crow, col, rows, f"other_crow_indices[{i}]", name)
        _compact(compact, f"values[{i}]", device, FLOATS, col.shape[0])


def sparse_adamw_(*arguments: Any) -> None:
    args = AdamWArgs(*arguments)
    device = args.crow_indices.device
    if args.col_indices is None:
        _dense(args.params, "params", device, FLOATS)
    else:
        csr_gather(args.params, args.crow_indices, args.col_indices, FLOATS)
    if args.params:
        sparse_adamw_compact(*arguments)
        if not args.compact_grads:
            dtype = args.params[0].dtype
            _dense(args.grads, "grads", device, frozenset((dtype, compute_dtype(dtype))))
            for i, (p, g) in enumerate(zip(args.params, args.grads)):
                if g.shape != p.shape:
                    raise ValueError(
                        f"grads[{i}] must have the shape of its parameter, {list(p.shape)}, got {list(g.shape)}"
                    )
    written = [t for t in (args.exp_avg, args.exp_avg_sq, args.values, args.changed) if t is not None]
    _apart([*args.params, *written], "params, exp_avg, exp_avg_sq, values and changed")


def sparse_adamw_compact(*arguments: Any) -> None:
    """All arguments but the dense tensors."""
    args = AdamWArgs(*arguments)
    if not args.params:
        raise ValueError("params must hold at least one tensor")
    device, dtype = args.crow_indices.device, args.params[0].dtype
    _float_dtype(dtype, "params")
    compute = frozenset((compute_dtype(dtype),))
    if args.col_indices is None:
        _contiguous(args.crow_indices, "crow_indices", device, _INT64)
        if args.crow_indices.shape != (len(args.params) + 1,):
            raise ValueError(f"crow_indices must have shape [{len(args.params) + 1}] without col_indices")
        nnz = sum(p.numel() for p in args.params)
    else:
        _mask(args.crow_indices, args.col_indices)
        nnz = args.col_indices.shape[0]
    state = compute if dtype == torch.float64 else compute | {torch.bfloat16}
    _compact(args.exp_avg, "exp_avg", device, state, nnz)
    _compact(args.exp_avg_sq, "exp_avg_sq", device, frozenset((args.exp_avg.dtype,)), nnz)
    _compact(args.values, "values", device, compute, nnz)
    if args.changed is not None:
        _contiguous(args.changed, "changed", device, frozenset((torch.int32,)))
        if args.changed.shape != (words := -(-nnz // 32),):
            raise ValueError(f"changed must have shape [ceil(nnz / 32)] = [{words}], got {list(args.changed.shape)}")
    _compact(args.decay_to, "decay_to", device, compute | {dtype}, nnz)
    if len(args.grads) != (1 if args.compact_grads else len(args.params)):
        wanted = "one compact tensor" if args.compact_grads else "one tensor for each of params"
        raise ValueError(f"grads must be {wanted}, got {len(args.grads)}")
    if args.compact_grads:
        _compact(args.grads[0], "grads", device, FLOATS, nnz)
    for name in ("step", "lr", "grad_scale", "found_inf"):
        if (t := getattr(args, name)) is not None:
            _tensor(t, name, device, SCALARS)
            if t.numel() != 1:
                raise ValueError(f"{name} must have one element, got shape {list(t.shape)}")
    if args.seed is not None and args.seed < 0:
        raise ValueError(f"seed must be at least 0, got {args.seed}")


# ---- operators on bits ----
def _elements(t: Tensor, name: str) -> Dtypes:
    """The dtype of a tensor that is read as integers of its element size."""
    if t.element_size() not in INTEGERS:
        raise TypeError(f"{name} must have elements of 1, 2, 4 or 8 bytes, got {t.dtype}")
    return frozenset((t.dtype,))


def bit_checksum(tensors: Sequence[Tensor], name: str = "tensors") -> None:
    if tensors:
        _dense(tensors, name, tensors[0].device, _elements(tensors[0], f"{name}[0]"))


def bit_diff(new: Sequence[Tensor], old: Sequence[Tensor]) -> None:
    if len(new) != len(old):
        raise ValueError(f"new and old must have one tensor for each other, got {len(new)} and {len(old)}")
    bit_checksum(new, "new")
    for i, (mine, theirs) in enumerate(zip(new, old)):
        _contiguous(theirs, f"old[{i}]", new[0].device, frozenset((new[0].dtype,)))
        if mine.shape != theirs.shape:
            raise ValueError(f"old[{i}] must have the shape of new[{i}], {list(mine.shape)}, got {list(theirs.shape)}")


def _flat_entries(offsets: Tensor, indices: Tensor, count: int | None = None) -> None:
    _contiguous(offsets, "offsets", indices.device, _INT64)
    _contiguous(indices, "indices", indices.device, _INDICES)
    if offsets.dim() != 1 or indices.dim() != 1 or offsets.numel() == 0:
        raise ValueError(
            f"offsets must have shape [n + 1] and indices [nnz], got {list(offsets.shape)} and {list(indices.shape)}"
        )
    if count is not None and offsets.numel() != count + 1:
        raise ValueError(f"offsets has {offsets.numel()} elements; {count} tensors need {count + 1}")


def flat_exchange_(tensors: Sequence[Tensor], offsets: Tensor, indices: Tensor, values: Tensor) -> None:
    _flat_entries(offsets, indices, len(tensors))
    nnz, device = indices.shape[0], indices.device
    dtype = _elements(values, "values")
    _compact(values, "values", device, dtype, nnz)
    for i, t in enumerate(tensors):
        _contiguous(t, f"tensors[{i}]", device, dtype)
    _apart([*tensors, values], "tensors and values")


def bit_checksum_change(offsets: Tensor, indices: Tensor, old: Tensor, new: Tensor) -> None:
    _flat_entries(offsets, indices)
    _compact(old, "old", indices.device, _elements(old, "old"), indices.shape[0])
    _compact(new, "new", indices.device, frozenset((old.dtype,)), indices.shape[0])


def set_bits(words: Tensor, starts: Tensor) -> None:
    _contiguous(words, "words", words.device, _INT32)
    _contiguous(starts, "starts", words.device, _INT64)
    if words.dim() != 1 or starts.dim() != 1 or starts.numel() == 0:
        raise ValueError(
            f"words must have shape [w] and starts [n + 1], got {list(words.shape)} and {list(starts.shape)}"
        )


_WITHOUT_TENSORS: dict[str, Callable[..., None]] = {
    "csr_square_sum": lambda tensors, crow_indices, col_indices: _mask(crow_indices, col_indices),
    "sparse_adamw_": sparse_adamw_compact,
}
CHECKS: dict[str, Callable[..., Any]] = {
    **{check.__name__: check for check in (csr_gather, csr_scatter_, csr_sum, sparse_adamw_, eigh, residual_cut)},
    **{check.__name__: check for check in (split_bf16_, masked_linear_grad, masked_embedding_grad)},
    **{check.__name__: check for check in (bit_diff, flat_exchange_, bit_checksum, bit_checksum_change, set_bits)},
    "csr_add_": csr_add_,
    "csr_restore_": csr_restore_,
    "csr_square_sum": functools.partial(csr_gather, dtypes=FLOATS),
    **{op: functools.partial(_check_arguments, op) for op in ("eigvalsh", "low_rank_denoised")},
}
