"""csr_sum against a dense sum in NumPy's float64, bit for bit, the same tests for every implementation."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from deftx_kernels.ops.schemas import ELECTIONS, MAX_SUMMED_MASKS
from tests.operators import FLOATS, csr_of, explore, replaced, with_threads

OPS = ("csr_sum",)

WIDTHS = [torch.uint16, torch.int32]
OUTPUTS = [torch.float32, torch.float64]
SPECIAL = [np.nan, np.inf, -np.inf, -0.0, 0.0, 1.0, -1.0]


class Problem:
    """Masks over the same rows, at the entries of which random compact tensors are summed."""

    def __init__(self, entries, masks, seed=0, widths=torch.uint16, dtypes=FLOATS, special=0.2):
        rng = np.random.default_rng(seed)
        self.entries, self.masks, self.width = entries, masks, widths  # bool [rows, columns]
        self.weights = [float(w) for w in rng.choice([1.0, -0.5, 0.1, 3.7, 0.0], len(masks))]
        self.values = []
        for j, mask in enumerate(masks):
            x = rng.standard_normal(int(mask.sum()))
            x = np.where(rng.random(len(x)) < special, rng.choice(SPECIAL, len(x)), x)
            self.values.append(torch.from_numpy(x).to(dtypes[(seed + j) % len(dtypes)]))

    def arguments(self, election="none", dtype=torch.float32, device="cpu"):
        """Each tensor begins one element into its storage, so that nothing is aligned by chance."""

        def moved(x):
            return torch.cat([x[:1], x] if len(x) else [x.new_zeros(1)]).to(device)[1:]

        columns = np.uint16 if self.width == torch.uint16 else np.int32
        csr = [[moved(torch.from_numpy(t)) for t in csr_of([m], columns)] for m in (self.entries, *self.masks)]
        crow, col = [c for c, _ in csr], [c for _, c in csr]
        values = [moved(x) for x in self.values]
        return [crow[0], col[0], crow[1:], col[1:], values, self.weights, ELECTIONS[election], dtype]

    def expected(self, election, dtype) -> np.ndarray:
        votes, total, count = np.zeros(self.entries.shape), np.full(self.entries.shape, -0.0), 0
        dense = []
        for mask, compact in zip(self.masks, self.values):
            dense.append(np.zeros(mask.shape))
            dense[-1][mask] = compact.double().numpy()
        with np.errstate(all="ignore"):
            for x in dense:
                votes = votes + (x if election == "total" else (x > 0).astype(float) - (x < 0))
            for mask, x, weight in zip(self.masks, dense, self.weights):
                counts = mask if election == "none" else np.where(votes >= 0, x > 0, x < 0)
                total = np.where(counts, total + weight * x, total)
                count = count + counts
            if election != "none":
                total = total / np.maximum(count, 1)
            total = np.where(np.asarray(count) > 0, total, 0.0)[self.entries]
            return total.astype(np.float32 if dtype == torch.float32 else np.float64)

    def check(self, implementation):
        for election in ELECTIONS:
            for dtype in OUTPUTS:
                found = implementation.ops.csr_sum(*self.arguments(election, dtype, implementation.device))
                assert found.dtype == dtype
                assert_same_bits(found.cpu().numpy(), self.expected(election, dtype), f"{election}, {dtype}")


def assert_same_bits(found: np.ndarray, expected: np.ndarray, what: str) -> None:
    """A NaN is any NaN."""
    assert found.shape == expected.shape, what
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected), err_msg=what)
    integer = np.int32 if found.itemsize == 4 else np.int64
    found, expected = (np.nan_to_num(x, posinf=np.inf, neginf=-np.inf).view(integer) for x in (found, expected))
    np.testing.assert_array_equal(found, expected, err_msg=what)


def random_masks(shape, densities, seed, empty=0.0, relation="any"):
    """bool [rows, columns] of the result and of each mask; a share `empty` of the rows is empty in each."""
    rng = np.random.default_rng(seed)
    entries, *masks = [
        (rng.random(shape) < d) & (rng.random((shape[0], 1)) >= empty) for d in (densities[0], *densities[1:])
    ]
    if relation == "union":
        entries = np.logical_or.reduce(masks) if masks else entries
    return entries, masks


@pytest.mark.usefixtures("no_racecheck")
def test_random(implementation):
    """0 to 5 masks of several dtypes, empty rows, no rows, empty and full masks."""
    shapes = [(0, 0), (1, 0), (1, 1), (1, 7), (3, 5), (5, 1), (40, 3), (2, 300), (1, 900), (700, 2)]
    examples = st.tuples(
        st.sampled_from(shapes),
        st.lists(st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]), min_size=1, max_size=6),
        st.integers(0, 2**32 - 1),
        st.sampled_from([0.0, 0.5, 0.95]),
        st.sampled_from(["any", "union", "union"]),
        st.sampled_from(WIDTHS),
    )

    def check_example(example):
        shape, densities, seed, empty, relation, width = example
        Problem(*random_masks(shape, densities, seed, empty, relation), seed, width).check(implementation)

    explore(implementation, examples, check_example, few=12, many=40)


# Around the sizes at which the kernels take another path: the C++ kernel's blocks of 256 entries, the CUDA kernel's
# tiles of 2048 and 1024 rows to a tile; columns above 32,767 and above 65,535.
@pytest.mark.parametrize(
    ("shape", "densities", "width"),
    [
        ((1, 256), (1.0, 0.5), torch.uint16),
        ((1, 257), (1.0, 1.0, 0.9), torch.int32),
        ((1, 2049), (1.0, 0.5, 0.01), torch.uint16),
        ((1025, 2), (1.0, 0.9, 0.3), torch.uint16),
        ((2100, 1), (1.0, 0.5), torch.int32),
        ((1, 66_000), (0.01, 0.01, 0.02, 0.001), torch.int32),
        ((2, 65_536), (0.01, 0.02, 0.02), torch.uint16),
    ],
    ids=str,
)
def test_edges(implementation, shape, densities, width):
    Problem(*random_masks(shape, densities, shape[0], relation="union"), 1, width).check(implementation)
    Problem(*random_masks(shape, densities, shape[1]), 2, width).check(implementation)


@pytest.mark.usefixtures("no_racecheck")
def test_one_mask_keeps_its_values(implementation):
    """With the weight 1, for each dtype, -0.0, infinities and subnormal numbers included."""
    numbers = torch.tensor([-0.0, 0.0, float("inf"), float("-inf"), 1e-7, -6e4, 1.5, 1e-40], dtype=torch.float64)
    mask = np.ones((2, len(numbers) // 2), dtype=bool)
    for dtype in FLOATS:
        problem = Problem(mask, [mask])
        problem.values, problem.weights = [numbers.to(dtype)], [1.0]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        found = implementation.ops.csr_sum(*problem.arguments("none", wide, implementation.device))
        assert_same_bits(found.cpu().numpy(), numbers.to(dtype).to(wide).numpy(), str(dtype))


@pytest.mark.usefixtures("no_racecheck")
def test_elections_by_hand(implementation):
    """total: 3 - 1 - 1 is positive; frequency: two of three are negative. Ties elect +, and 0 has no sign."""
    columns = [[3.0, -1.0, -1.0], [1.0, -1.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    expected = {"none": [2.0, -1.0, -4.0, 0.0], "total": [6.0, 2.0, -4.0, 0.0], "frequency": [-2.0, 2.0, -4.0, 0.0]}
    mask = np.ones((1, 4), dtype=bool)
    problem = Problem(mask, [mask] * 3)
    problem.values = [torch.tensor([c[j] for c in columns]) for j in range(3)]
    problem.weights = [2.0, 3.0, 1.0]
    for election, sums in expected.items():
        found = implementation.ops.csr_sum(*problem.arguments(election, torch.float32, implementation.device))
        assert found.tolist() == sums, election


@pytest.mark.usefixtures("no_racecheck")
def test_most_masks(implementation):
    densities = [0.5] * (MAX_SUMMED_MASKS + 2)
    entries, masks = random_masks((20, 9), densities, 0, relation="any")
    Problem(entries, masks[:-1], special=0.0).check(implementation)
    with pytest.raises((RuntimeError, ValueError), match=f"at most {MAX_SUMMED_MASKS} masks, got 65"):
        implementation.ops.csr_sum(*Problem(entries, masks).arguments(device=implementation.device))


@pytest.mark.parametrize("shape", [(800, 400), (1, 200_000), (60_000, 3)], ids=str)
def test_threads_do_not_matter(implementation, shape):
    """Not even where columns are not sorted and the result has no meaning. Several pieces of 16,384 entries."""
    if implementation.name != "c++":
        pytest.skip("about the CPU library's threads")
    problem = Problem(*random_masks(shape, (0.5, 0.4, 0.3), 1, empty=0.1 if shape[0] > 1 else 0), 3, torch.int32)
    rng = np.random.default_rng(0)
    for election in ELECTIONS:
        arguments = problem.arguments(election, torch.float64)
        unsorted = [torch.from_numpy(rng.integers(-9, 400, len(c), dtype=np.int32)) for c in arguments[3]]
        for given in (arguments, [*arguments[:3], unsorted, *arguments[4:]]):
            results = list(with_threads(lambda given=given: implementation.ops.csr_sum(*given), (1, 2, 4)))
            for found in results:
                assert_same_bits(found.numpy(), results[0].numpy(), election)
        assert_same_bits(
            implementation.ops.csr_sum(*arguments).numpy(), problem.expected(election, torch.float64), election
        )


@pytest.mark.parametrize("shape", [(768, 3072), (250_002, 768)], ids=str)
def test_real_layers(implementation, shape):
    """Of the embedding the first and the last rows are compared: they have the same pattern and values as others."""
    if implementation.name != "c++":
        pytest.skip("too slow")
    some = 768
    problem = Problem(*random_masks((some, shape[1]), (0, 0.05, 0.05, 0.05), 4, relation="union"), special=0.0)
    repeats, rest = divmod(shape[0], some)
    assert rest < some
    arguments = problem.arguments("total")

    def repeated(x):  # the pattern again and again, and its first rows
        return np.concatenate([x] * repeats + [x[:rest]])

    large = Problem.__new__(Problem)
    large.entries, large.width, large.weights = problem.entries, problem.width, problem.weights
    crow, col, values = [], [], []
    for c, k, v in zip((arguments[0], *arguments[2]), (arguments[1], *arguments[3]), (None, *arguments[4])):
        counts = repeated(c.diff().numpy())
        crow.append(torch.from_numpy(np.concatenate([[0], counts.cumsum()])))
        last = int(c[rest])
        col.append(torch.from_numpy(np.concatenate([k.numpy()] * repeats + [k.numpy()[:last]])))
        values.append(None if v is None else torch.cat([v] * repeats + [v[:last]]))
    found = implementation.ops.csr_sum(crow[0], col[0], crow[1:], col[1:], values[1:], *arguments[5:])
    expected = problem.expected("total", torch.float32)
    n = len(expected)
    assert_same_bits(found[:n].numpy(), expected, "first rows")
    assert_same_bits(found[(repeats - 1) * n : repeats * n].numpy(), expected, "last whole part")
    assert_same_bits(found[repeats * n :].numpy(), expected[: int(arguments[0][rest])], "rest")


# What is wrong -> (the changed arguments, by number; what the message names)
WRONG_STRUCTURE = {
    "election unknown": ({6: lambda x: 3}, r"election must be 0 \(none\), 1 \(total\) or 2 \(frequency\), got 3"),
    "election negative": ({6: lambda x: -1}, "election must be .* got -1"),
    "dtype": ({7: lambda x: torch.bfloat16}, "dtype must be float32 or float64"),
    "crow int32": ({0: lambda x: x.int()}, "^crow_indices must be int64"),
    "crow empty": ({0: lambda x: x[:0]}, "^crow_indices "),
    "crow 2-D": ({0: lambda x: x[None]}, "^crow_indices must "),
    "col int64": ({1: lambda x: x.long()}, "^col_indices must be (int32 or uint16|uint16 or int32)"),
    "fewer crow": ({2: lambda x: x[:1]}, "must have one element for each mask, got 1, 2, 2, 2"),
    "fewer col": ({3: lambda x: x[:1]}, "must have one element for each mask, got 2, 1, 2, 2"),
    "fewer values": ({4: lambda x: x[:1]}, "must have one element for each mask, got 2, 2, 1, 2"),
    "more weights": ({5: lambda x: [*x, 1.0]}, "must have one element for each mask, got 2, 2, 2, 3"),
    "other crow int32": ({2: lambda x: [x[0], x[1].int()]}, r"^other_crow_indices\[1\] must be int64"),
    "other rows": ({2: lambda x: [x[0], x[1][:-1]]}, r"^other_crow_indices\[1\] has 20 elements; 20 rows need 21"),
    "other col 2-D": ({3: lambda x: [x[0][None], x[1]]}, r"other_col_indices\[0\]"),
    "dtypes differ": ({3: lambda x: [x[0], x[1].int()]}, r"^other_col_indices\[1\] must (be uint16|have the dtype)"),
    "values int": ({4: lambda x: [x[0].int(), x[1]]}, r"^values\[0\] must be "),
    "values short": ({4: lambda x: [x[0], x[1][:-1]]}, r"^values\[1\] must have shape \["),
    "values strided": ({4: lambda x: [x[0].repeat_interleave(2)[::2], x[1]]}, r"^values\[0\] must be contiguous"),
    "no rows": ({0: lambda x: x[:1], 2: lambda x: [c[:1] for c in x]}, "without rows"),
}
WRONG_CROW = {
    "begins late": lambda crow: replaced(crow, 0, 1),
    "ends early": lambda crow: replaced(crow, -1, int(crow[-1]) - 1),
    "ends late": lambda crow: replaced(crow, -1, int(crow[-1]) + 1),
    "descends": lambda crow: replaced(crow, 5, int(crow[4]) - 1),
    "overshoots": lambda crow: replaced(crow, 2, 2**40),
    "negative": lambda crow: replaced(crow, 3, -(2**40)),
}


def _arguments(implementation, election="total"):
    problem = Problem(*random_masks((20, 30), (0.5, 0.5, 0.5), 0))
    return problem.arguments(election, torch.float32, implementation.device)


@pytest.mark.parametrize("wrong", WRONG_STRUCTURE)
def test_bad_arguments_raise(implementation, wrong):
    changes, message = WRONG_STRUCTURE[wrong]
    arguments = _arguments(implementation)
    for i, change in changes.items():
        arguments[i] = change(arguments[i])
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message.replace("^", r"(^|\n|: )")):
        implementation.ops.csr_sum(*arguments)


@pytest.mark.parametrize(("i", "message"), [(0, "(?<!other_)crow_indices must"), (2, r"other_crow_indices\[1\] must")])
@pytest.mark.parametrize("wrong", WRONG_CROW)
def test_bad_crow(implementation, wrong, i, message):
    """The CPU library and the reference name it; a GPU's host code cannot see it, the kernel stays inside memory."""
    arguments = _arguments(implementation)
    change = WRONG_CROW[wrong]
    arguments[i] = change(arguments[i]) if i == 0 else [arguments[i][0], change(arguments[i][1])]
    if implementation.name in ("c++", "reference"):
        with pytest.raises((RuntimeError, ValueError), match=message):
            implementation.ops.csr_sum(*arguments)
    else:
        implementation.ops.csr_sum(*arguments)


def test_unsorted_columns_stay_inside_memory(implementation):
    """The emulator faults on any other access."""
    rng = np.random.default_rng(7)
    arguments = _arguments(implementation)
    for i in range(3 if implementation.name == "emulated" else 30):
        col, *others = (
            torch.from_numpy(rng.integers(-(2**31), 2**31, len(c)).astype(np.int32)).to(implementation.device)
            for c in (arguments[1], *arguments[3])
        )
        given = [arguments[0], col, arguments[2], others, *arguments[4:6], i % 3, arguments[7]]
        assert implementation.ops.csr_sum(*given).shape == col.shape
