"""csr_combine against NumPy's set operations, the same tests for every implementation."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from deftx_kernels.ops.schemas import OPERATIONS as CODES
from tests.operators import explore, replaced, with_threads

OPS = ("csr_combine",)

OPERATIONS = {
    "and": np.intersect1d,
    "or": np.union1d,
    "sub": lambda mine, theirs: np.setdiff1d(mine, theirs, assume_unique=True),
}
WIDTHS = [torch.uint16, torch.int32]


def keys_of(crow: Tensor, col: Tensor) -> np.ndarray:
    """int64 [nnz]: (row << 32) + column."""
    rows = np.repeat(np.arange(len(crow) - 1), np.diff(crow.cpu().numpy()))
    return (rows << 32) + col.cpu().numpy().astype(np.int64)


def mask_of(keys: np.ndarray, rows: int, dtype: torch.dtype, device="cpu") -> tuple[Tensor, Tensor]:
    """crow_indices and col_indices, one element into their storage, so that nothing is aligned by chance."""
    crow = np.searchsorted(keys, np.arange(-1, rows + 1) << 32)
    col = np.concatenate([[0], keys & 0xFFFF_FFFF]).astype(np.uint16 if dtype == torch.uint16 else np.int32)
    return torch.from_numpy(crow).to(device)[1:], torch.from_numpy(col).to(device)[1:]


def random_keys(rng, rows: int, columns: int, density: float) -> np.ndarray:
    """Uniform, without a matrix of that size where it would be large."""
    if rows * columns <= 1 << 20:
        flat = np.nonzero(rng.random(rows * columns) < density)[0]
    else:
        flat = np.unique(rng.integers(0, rows * columns, int(density * rows * columns)))
    return (flat // max(columns, 1) << 32) + flat % max(columns, 1)


def check(implementation, mine: np.ndarray, theirs: np.ndarray, rows: int, dtype: torch.dtype):
    a, b = mask_of(mine, rows, dtype, implementation.device), mask_of(theirs, rows, dtype, implementation.device)
    before = [t.clone() for t in (*a, *b)]
    for operation, expected in OPERATIONS.items():
        crow, col = implementation.ops.csr_combine(*a, *b, CODES[operation])
        assert (crow.dtype, col.dtype) == (torch.int64, dtype)
        assert crow.shape == (rows + 1,)
        crow_expected, col_expected = mask_of(expected(mine, theirs), rows, dtype)
        np.testing.assert_array_equal(crow.cpu().numpy(), crow_expected.numpy(), err_msg=operation)
        np.testing.assert_array_equal(col.cpu().numpy(), col_expected.numpy(), err_msg=operation)
    for now, then in zip((*a, *b), before):
        np.testing.assert_array_equal(now.cpu().numpy(), then.cpu().numpy())


def random_pair(rows, columns, densities, seed, relation="any", empty=0.0):
    """Two key arrays; a share `empty` of the rows is empty in the first mask, another in the second."""
    rng = np.random.default_rng(seed)
    mine, theirs = (random_keys(rng, rows, columns, d) for d in densities)
    if empty:
        mine, theirs = (k[(rng.random(rows) >= empty)[k >> 32]] for k in (mine, theirs))
    if relation == "equal":
        theirs = mine
    elif relation == "disjoint":
        theirs = np.setdiff1d(theirs, mine)
    elif relation == "subset":
        theirs = mine[rng.random(len(mine)) < 0.5]
    return mine, theirs


@pytest.mark.usefixtures("no_racecheck")
def test_random(implementation):
    """Empty rows, no rows, empty and full masks, equal and disjoint ones."""
    shapes = [(0, 0), (1, 0), (1, 1), (1, 7), (3, 5), (5, 1), (40, 3), (2, 300), (1, 900), (700, 2), (1500, 1)]
    density = st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0])
    examples = st.tuples(
        st.sampled_from(shapes),
        st.tuples(density, density),
        st.integers(0, 2**32 - 1),
        st.sampled_from(["any", "any", "equal", "disjoint", "subset"]),
        st.sampled_from([0.0, 0.5, 0.95]),
        st.sampled_from(WIDTHS),
    )

    def check_example(example):
        shape, densities, seed, relation, empty, dtype = example
        check(implementation, *random_pair(*shape, densities, seed, relation, empty), shape[0], dtype)

    explore(implementation, examples, check_example, few=20 if implementation.name == "emulated" else 100)


# Around the sizes at which the kernels take another path: words of 32 entries, tiles of 2048, 1024 rows to a tile,
# several tiles to a block.
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "densities"),
    [
        (1, 32, (1.0, 1.0)),
        (1, 33, (1.0, 0.5)),
        (1, 2048, (1.0, 0.1)),
        (3, 683, (1.0, 1.0)),
        (1023, 2, (1.0, 0.9)),
        (1025, 3, (0.9, 1.0)),
        (2100, 1, (1.0, 0.5)),
        (6000, 1, (0.3, 0.001)),
        (80_000, 1, (1.0, 0.001)),
        (2, 40_000, (1.0, 0.001)),
        (2, 40_000, (0.001, 1.0)),
    ],
    ids=str,
)
def test_tile_edges(implementation, request, rows, columns, densities, dtype):
    if dtype == torch.uint16:  # checked for races by test_one_long_row_among_short_ones
        request.getfixturevalue("no_racecheck")
    check(implementation, *random_pair(rows, columns, densities, seed=rows), rows, dtype)


@pytest.mark.usefixtures("no_racecheck")
@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_columns_at_the_ends(implementation, dtype):
    """The smallest and the largest column there can be, at either side of a row's end."""
    last = 65_535 if dtype == torch.uint16 else 2**31 - 2
    mine = np.array([0, last, (1 << 32) + last, 2 << 32, (2 << 32) + last])
    theirs = np.array([last, 1 << 32, (1 << 32) + last, 2 << 32, (3 << 32) + last])
    check(implementation, mine, theirs, 5, dtype)


LARGE = {
    "one row": (1, 200_000, (0.5, 0.4), "any", 0.0),
    "one full row": (1, 100_000, (1.0, 0.7), "any", 0.0),
    "one row, disjoint": (1, 200_000, (0.5, 0.4), "disjoint", 0.0),
    "equal": (1000, 500, (0.3, 0.3), "equal", 0.0),
    "full": (500, 300, (1.0, 1.0), "any", 0.0),
    "mostly empty rows": (150_000, 300, (0.005, 0.004), "any", 0.9),
    "no entries": (300_000, 5, (0.0, 0.0), "any", 0.0),
    "one mask empty": (1000, 500, (0.4, 0.0), "any", 0.0),
    "short rows": (30_000, 40, (0.1, 0.1), "any", 0.0),
}


@pytest.mark.parametrize("case", LARGE)
def test_large(implementation, case):
    """Several of the C++ kernel's pieces of 32,768 rows and entries, with boundaries within rows and between them."""
    if implementation.name == "emulated":
        pytest.skip("too slow in the emulator")
    rows, columns, densities, relation, empty = LARGE[case]
    for dtype in WIDTHS if columns <= 65_536 else [torch.int32]:
        check(implementation, *random_pair(rows, columns, densities, 5, relation, empty), rows, dtype)


@pytest.mark.parametrize("dtype", WIDTHS, ids=str)
def test_one_long_row_among_short_ones(implementation, dtype):
    scale = 1 if implementation.name == "emulated" else 10
    rng = np.random.default_rng(3)
    short = [random_keys(rng, 500 * scale, 3, 0.3) for _ in range(2)]
    long = [random_keys(rng, 1, 5000 * scale, 0.5) + (200 << 32) for _ in range(2)]
    mine, theirs = (np.union1d(s, k) for s, k in zip(short, long))
    check(implementation, mine, theirs, 500 * scale, dtype)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_threads_do_not_matter(implementation, operation):
    """Not even where the columns are not sorted and the result has no meaning."""
    if implementation.name != "c++":
        pytest.skip("about the CPU library's threads")
    rng = np.random.default_rng(0)
    sorted_pair = [mask_of(k, 800, torch.int32) for k in random_pair(800, 400, (0.5, 0.4), 1)]
    unsorted = [(crow, torch.from_numpy(rng.integers(-9, 400, len(col), dtype=np.int32))) for crow, col in sorted_pair]
    for (a, b), is_sorted in [(sorted_pair, True), (unsorted, False)]:
        results = list(with_threads(lambda a=a, b=b: implementation.ops.csr_combine(*a, *b, CODES[operation])))
        for crow, col in results:
            assert torch.equal(crow, results[0][0])
            assert torch.equal(col, results[0][1])
        if is_sorted:
            expected = OPERATIONS[operation](keys_of(*a), keys_of(*b))
            np.testing.assert_array_equal(keys_of(*results[0]), expected)


# What is wrong -> (csr_combine's arguments -> csr_combine's arguments, what the message names)
WRONG_STRUCTURE = {
    "operation unknown": (lambda a: [*a[:4], 3], r"operation must be 0 \(and\), 1 \(or\) or 2 \(sub\), got 3"),
    "operation negative": (lambda a: [*a[:4], -1], "operation must be .* got -1"),
    "crow int32": (lambda a: [a[0].int(), *a[1:]], "^crow_indices must be int64"),
    "other crow int32": (lambda a: [*a[:2], a[2].int(), *a[3:]], "^other_crow_indices must be int64"),
    "crow 2-D": (lambda a: [a[0][None], *a[1:]], "^crow_indices must be int64"),
    "crow empty": (lambda a: [a[0][:0], a[1], a[2][:0], *a[3:]], "^crow_indices has 0 elements"),
    "rows differ": (lambda a: [a[0][:-1], *a[1:]], "crow_indices has 20 elements and other_crow_indices has 21"),
    "no rows": (lambda a: [a[0][:1], a[1], a[2][:1], *a[3:]], "without rows"),
    "col int64": (lambda a: [a[0], a[1].long(), *a[2:]], "^col_indices must be uint16 or int32"),
    "other col 2-D": (lambda a: [*a[:3], a[3][None], a[4]], "^other_col_indices must be uint16 or int32"),
    "dtypes differ": (lambda a: [*a[:3], a[3].to(torch.uint16), a[4]], "same dtype"),
    "col not contiguous": (lambda a: [a[0], a[1].repeat_interleave(2)[::2], *a[2:]], "^col_indices must be contiguous"),
}
WRONG_CROW = {
    "begins late": lambda crow: replaced(crow, 0, 1),
    "ends early": lambda crow: replaced(crow, -1, int(crow[-1]) - 1),
    "ends late": lambda crow: replaced(crow, -1, int(crow[-1]) + 1),
    "descends": lambda crow: replaced(crow, 5, int(crow[4]) - 1),
    "overshoots": lambda crow: replaced(crow, 2, 2**40),
    "negative": lambda crow: replaced(crow, 3, -(2**40)),
}


def _arguments(implementation, operation="or"):
    pair = [mask_of(k, 20, torch.int32, implementation.device) for k in random_pair(20, 30, (0.5, 0.5), 0)]
    return [*pair[0], *pair[1], CODES[operation]]


@pytest.mark.parametrize("wrong", WRONG_STRUCTURE)
def test_bad_arguments_raise(implementation, wrong):
    change, message = WRONG_STRUCTURE[wrong]
    with pytest.raises((RuntimeError, ValueError), match=message.replace("^", r"(^|\n|: )")):
        implementation.ops.csr_combine(*change(_arguments(implementation)))


@pytest.mark.parametrize(("i", "message"), [(0, "(?<!other_)crow_indices must"), (2, "other_crow_indices must")])
@pytest.mark.parametrize("wrong", WRONG_CROW)
def test_bad_crow(implementation, wrong, i, message):
    """The CPU library and the reference name it; a GPU's host code cannot see it, the kernels stay inside memory."""
    for operation in OPERATIONS:
        arguments = _arguments(implementation, operation)
        arguments[i] = WRONG_CROW[wrong](arguments[i])
        if implementation.name in ("c++", "reference"):
            with pytest.raises((RuntimeError, ValueError), match=message):
                implementation.ops.csr_combine(*arguments)
        else:
            implementation.ops.csr_combine(*arguments)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unsorted_columns_stay_inside_memory(implementation, operation):
    """The emulator faults on any other access; on the CPU the result's structure shows that all pieces met."""
    if implementation.name == "reference":
        pytest.skip("the reference sorts")
    rng = np.random.default_rng(7)
    crow, _, other_crow, _, _ = _arguments(implementation)
    for _ in range(3 if implementation.name == "emulated" else 50):
        col, other_col = (
            torch.from_numpy(rng.integers(-(2**31), 2**31, int(c[-1])).astype(np.int32)).to(implementation.device)
            for c in (crow, other_crow)
        )
        result, col_out = implementation.ops.csr_combine(crow, col, other_crow, other_col, CODES[operation])
        assert (int(result[0]), int(result[-1])) == (0, len(col_out))
        assert bool((result.diff() >= 0).all())
