"""csr_gather, csr_scatter_, csr_add_, csr_restore_ against NumPy, the same tests for every implementation.

The oracle never looks at crow_indices or col_indices: it takes the entries of the boolean arrays that the mask was made
from, moves bytes, and adds in float64.
"""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.operators import FLOATS, MANY, SHAPES, bits, csr_of, explore, matrix_shape, replaced, with_threads

OPS = ("csr_gather", "csr_scatter_", "csr_add_", "csr_restore_")

DTYPES = [*FLOATS, torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64]
UNUSUAL = [torch.float8_e4m3fn, torch.uint16, torch.complex64]  # torch itself cannot index some of them
ROUNDING = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-149, torch.float64: 2.0**-1074, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


class Case:
    """Tensors of random bits, and a mask over them."""

    def __init__(self, shapes, dtype, density=0.3, seed=0, wide=False, device="cpu", masks=None):
        self.rng = np.random.default_rng(seed)
        self.dtype, self.device = dtype, device
        matrices = [matrix_shape(s) for s in shapes]
        self.masks = masks or [self.rng.random(m) < density for m in matrices]
        self.nnz = int(sum(m.sum() for m in self.masks))
        self.tensors = [self.random(s) for s in shapes]
        wide = wide or any(c > 65_536 for _, c in matrices)
        self.crow, self.col = (torch.from_numpy(x).to(device) for x in csr_of(self.masks, [np.uint16, np.int32][wide]))

    def random(self, shape) -> Tensor:
        """Random bits, one element into their storage, so that nothing is aligned by chance."""
        n = int(np.prod(shape)) + 1
        if self.dtype == torch.bool:
            flat = torch.from_numpy(self.rng.integers(0, 2, n, dtype=np.uint8)).view(torch.bool)
        else:
            flat = torch.from_numpy(self.rng.integers(0, 256, n * self.dtype.itemsize, dtype=np.uint8)).view(self.dtype)
        return flat.to(self.device)[1:].view(shape)

    def normal(self, shape, dtype) -> Tensor:
        return torch.from_numpy(self.rng.standard_normal(shape)).to(dtype).to(self.device)

    def entries(self, tensors) -> np.ndarray:
        """[nnz, bytes of an element]: the oracle's csr_gather."""
        return np.concatenate([bits(t)[m.reshape(-1)] for t, m in zip(tensors, self.masks)])

    def rest(self, tensors) -> list[np.ndarray]:
        """Everything outside the mask."""
        return [bits(t)[~m.reshape(-1)] for t, m in zip(tensors, self.masks)]

    def check_rest(self, before: list[np.ndarray]):
        for now, then in zip(self.rest(self.tensors), before):
            np.testing.assert_array_equal(now, then)


def check_moves(implementation, case: Case):
    """csr_gather and csr_scatter_ move bytes, and csr_scatter_ touches nothing else."""
    gathered = implementation.ops.csr_gather(case.tensors, case.crow, case.col)
    assert gathered.shape == (case.nnz,)
    assert gathered.dtype == case.dtype
    np.testing.assert_array_equal(bits(gathered), case.entries(case.tensors))
    values, before = case.random((case.nnz,)), case.rest(case.tensors)
    assert implementation.ops.csr_scatter_(case.tensors, case.crow, case.col, values) is None
    np.testing.assert_array_equal(case.entries(case.tensors), bits(values))
    case.check_rest(before)


def check_add(implementation, case: Case, values_dtype, alpha: float):
    """csr_add_ computes in float32 (float64) and rounds once; the other entries keep their bits, NaN included.
    csr_restore_ undoes it and counts what was not the sum.
    """
    for t, m in zip(case.tensors, case.masks):
        inside = torch.from_numpy(m.reshape(-1)).to(case.device)
        t.view(-1)[inside] = case.normal(int(m.sum()), case.dtype)
    values, before = case.normal(case.nnz, values_dtype), case.rest(case.tensors)
    csr = case.tensors, case.crow, case.col
    old = implementation.ops.csr_gather(*csr)
    former, done = torch.zeros_like(old), torch.zeros((), dtype=torch.bool, device=case.device)
    implementation.ops.csr_add_(*csr, values, alpha, former, done)
    assert bool(done)
    np.testing.assert_array_equal(bits(former), bits(old))
    new = implementation.ops.csr_gather(*csr).cpu()
    case.check_rest(before)
    product = alpha * values.double().cpu().numpy()
    exact = old.cpu().double().numpy() + product
    wide = torch.float64 if torch.float64 in (case.dtype, values_dtype) else torch.float32
    # float64 is rounded to float32 first and then to 16 bits
    rounding = ROUNDING[case.dtype] + (ROUNDING[torch.float32] if case.dtype.itemsize == 2 else 0)
    error = ROUNDING[wide] * (np.abs(product) + np.abs(exact)) + rounding * np.abs(exact)
    assert np.all(np.abs(new.double().numpy() - exact) <= 2 * error + SMALLEST[case.dtype])
    # product and sum are rounded one by one, on every device alike
    real = np.float64 if wide == torch.float64 else np.float32
    total = old.cpu().double().numpy().astype(real) + real(alpha) * values.double().cpu().numpy().astype(real)
    np.testing.assert_array_equal(bits(new), bits(torch.from_numpy(total).to(case.dtype)))
    check_restore(implementation, case, values, alpha, former, before)


def check_restore(implementation, case: Case, values, alpha, former, rest):
    """After other code has changed the sign of every third element of every second tensor."""
    changed = []
    for i, (t, m) in enumerate(zip(case.tensors, case.masks)):
        flips = torch.zeros(m.size, dtype=torch.bool)
        flips[:: 3 if i % 2 else m.size + 1] = True
        flips &= torch.from_numpy(m.reshape(-1))
        changed.append(int(flips.sum()))
        bytes_of = t.view(-1).view(torch.uint8).view(-1, case.dtype.itemsize)
        bytes_of[:, -1] ^= 128 * flips.to(torch.uint8).to(case.device)
    found = implementation.ops.csr_restore_(case.tensors, case.crow, case.col, former, values, alpha)
    assert found.dtype == torch.int64
    assert found.tolist() == changed
    np.testing.assert_array_equal(case.entries(case.tensors), bits(former))
    case.check_rest(rest)


def cases(dtypes):
    few = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6)
    many = st.builds(lambda s: (s * MANY)[:MANY], st.lists(st.sampled_from(SHAPES[:7]), min_size=1, max_size=4))
    densities = st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0])
    seeds = st.integers(0, 2**32 - 1)
    arguments = st.tuples(st.one_of(few, few, few, many), st.sampled_from(dtypes), densities, seeds, st.booleans())
    return arguments.map(lambda a: lambda device: Case(*a, device))


def test_moves(implementation):
    dtypes = DTYPES if implementation.name == "reference" else DTYPES + UNUSUAL
    explore(implementation, cases(dtypes), lambda make: check_moves(implementation, make(implementation.device)))


def test_add(implementation):
    def check(example):
        make, values, alpha = example
        case = make(implementation.device)
        check_add(implementation, case, values or case.dtype, float(np.float32(alpha)))

    alphas = st.sampled_from([1.0, -1.0, 0.0, 0.3, -2.5, 1e-3])
    values = st.sampled_from([None, torch.float32, torch.float64])
    explore(implementation, st.tuples(cases(FLOATS), values, alphas), check)


# Around the sizes at which the CUDA kernel takes another path: a tile of 2048 entries, 512 rows to a tile, many tiles
# to a block.
@pytest.mark.parametrize(
    ("shapes", "density"),
    [
        ([(1, 2047)], 1.0),
        ([(1, 2048), (1,)], 1.0),
        ([(3, 683), (5,)], 1.0),
        ([(511, 4), (4,)], 1.0),
        ([(512, 4)], 1.0),
        ([(513, 3), (7, 70)], 1.0),
        ([(3000, 4), (20, 200)], 0.05),
        ([(20_000, 1)], 0.001),
        ([(140_000, 1)], 0.5),
        ([(2, 70_000)], 0.01),
        ([(130, 640), (7,), (90, 300)], 0.9),
    ],
    ids=str,
)
def test_tile_edges(implementation, shapes, density):
    check_moves(implementation, Case(shapes, torch.float32, density, device=implementation.device))
    check_add(implementation, Case(shapes, torch.bfloat16, density, device=implementation.device), torch.float32, 0.5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "values", [None, torch.float32, torch.float64], ids=["the tensors' dtype", "float32", "float64"]
)
def test_add_rounds_once(implementation, dtype, values):
    case = Case([(50, 60), (9,)], dtype, 0.5, device=implementation.device)
    check_add(implementation, case, values or dtype, float(np.float32(0.3)))


def test_uneven_rows(implementation):
    """Full rows beside thousands of empty ones, in tensors of many sizes."""
    masks = [np.zeros((3000, 8), bool), np.ones((2, 5000), bool), np.zeros((1, 64), bool), np.zeros((600, 30), bool)]
    masks[0][[0, 1500, 2999]] = True
    masks[3][-1, -1] = True
    shapes = [m.shape for m in masks]
    check_moves(implementation, Case(shapes, torch.int16, masks=masks, device=implementation.device))


def test_no_tensors(implementation):
    if implementation.name == "reference":
        pytest.skip("the reference takes the dtype of its result from the first tensor")
    sizes = {1: torch.int64, 0: torch.int32}
    crow, col = (torch.zeros(n, dtype=dtype, device=implementation.device) for n, dtype in sizes.items())
    assert implementation.ops.csr_gather([], crow, col).shape == (0,)
    implementation.ops.csr_scatter_([], crow, col, torch.zeros(0, device=implementation.device))
    none = torch.zeros(0, device=implementation.device)
    implementation.ops.csr_add_([], crow, col, none, 1.0)
    assert implementation.ops.csr_restore_([], crow, col, none, none, 1.0).tolist() == []


def test_offsets_beyond_32_bits(implementation, request):
    """Elements beyond 2^31 and 2^32. The memory is never touched elsewhere, so that the test needs little of it."""
    if implementation.name == "emulated":  # it compares all bytes of read-only arguments before and after
        emulated = request.getfixturevalue("emulated")
        request.addfinalizer(lambda: setattr(emulated, "check_mutation", True))
        emulated.check_mutation = False
    columns = 2**31 - 1
    tensors = [torch.empty(n, dtype=torch.uint8, device=implementation.device) for n in (5, 3 * columns)]
    tensors[1] = tensors[1].view(3, columns)
    entries = [(0, 4), (1, 0), (1, columns - 1), (2, 7), (3, 0), (3, columns - 1)]  # (stacked row, column)
    col = torch.tensor([c for _, c in entries], dtype=torch.int32, device=implementation.device)
    crow = torch.tensor([0, 1, 3, 4, 6], device=implementation.device)
    values = torch.arange(1, 7, dtype=torch.uint8, device=implementation.device)
    implementation.ops.csr_scatter_(tensors, crow, col, values)
    found = [tensors[0][c] if r == 0 else tensors[1][r - 1, c] for r, c in entries]
    assert torch.stack(found).tolist() == values.tolist()
    assert implementation.ops.csr_gather(tensors, crow, col).tolist() == values.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads_do_not_matter(implementation, dtype):
    if implementation.name != "c++":
        pytest.skip("about the CPU library's threads")

    def results():
        case = Case([(300, 1000), (2, 30_000), (9,)], dtype, 0.5)
        csr, values = (case.tensors, case.crow, case.col), case.normal(case.nnz, dtype)
        former = torch.empty_like(values)
        implementation.ops.csr_add_(*csr, values, 0.7, former)
        sums = [bits(implementation.ops.csr_gather(*csr)), *map(bits, case.tensors)]
        changed = implementation.ops.csr_restore_(*csr, former, values.flip(0), 0.7)
        return [*sums, bits(former), bits(changed), *map(bits, case.tensors)]

    first, *others = with_threads(results)
    for other in others:
        for one, two in zip(first, other):
            np.testing.assert_array_equal(one, two)


# What is wrong -> (the case, csr_add_'s arguments) -> csr_add_'s arguments
WRONG_STRUCTURE = {
    "crow too short": lambda c, a: [a[0], a[1][:-1], *a[2:]],
    "crow too long": lambda c, a: [a[0], torch.cat([a[1], a[1][-1:]]), *a[2:]],
    "crow int32": lambda c, a: [a[0], a[1].int(), *a[2:]],
    "col int64": lambda c, a: [*a[:2], a[2].long(), a[3]],
    "col 2-D": lambda c, a: [*a[:2], a[2][None], a[3]],
    "values too short": lambda c, a: [*a[:3], a[3][:-1]],
    "values 2-D": lambda c, a: [*a[:3], a[3][None]],
    "values not contiguous": lambda c, a: [*a[:3], a[3].repeat_interleave(2)[::2]],
    "values int32": lambda c, a: [*a[:3], a[3].int()],
    "tensor missing": lambda c, a: [a[0][:-1], *a[1:]],
    "no tensors": lambda c, a: [[], a[1][:1], *a[2:]],
    "tensor not contiguous": lambda c, a: [[a[0][0].repeat(1, 2)[:, ::2], *a[0][1:]], *a[1:]],
    "two dtypes": lambda c, a: [[a[0][0].double(), *a[0][1:]], *a[1:]],
    "integers": lambda c, a: [[t.int() for t in a[0]], *a[1:]],
}
WRONG_CONTENT = {
    "column too large": lambda c, a: [*a[:2], replaced(a[2], 3, 20), a[3]],
    "last column too large": lambda c, a: [*a[:2], replaced(a[2], -1, 6), a[3]],
    "column negative": lambda c, a: [*a[:2], replaced(a[2], 0, -1), a[3]],
    "column very negative": lambda c, a: [*a[:2], replaced(a[2], 20, -(2**31)), a[3]],
    "columns repeat": lambda c, a: [*a[:2], replaced(a[2], 5, 4), a[3]],
    "columns descend": lambda c, a: [*a[:2], replaced(a[2], 5, 3), a[3]],
    "crow begins late": lambda c, a: [a[0], replaced(a[1], 0, 1), *a[2:]],
    "crow ends early": lambda c, a: [a[0], replaced(a[1], -1, c.nnz - 1), *a[2:]],
    "crow ends late": lambda c, a: [a[0], replaced(a[1], -1, c.nnz + 1), *a[2:]],
    "crow descends": lambda c, a: [a[0], replaced(a[1], 2, 5), *a[2:]],
    "crow overshoots": lambda c, a: [a[0], replaced(a[1], 2, 2**40), *a[2:]],
    "crow negative": lambda c, a: [a[0], replaced(a[1], 1, -(2**40)), *a[2:]],
}


@pytest.mark.parametrize("at", [1, 49_999, 50_000, 50_001, 99_999])
def test_a_repeated_column_is_found_where_threads_meet(implementation, at):
    if implementation.name != "c++":
        pytest.skip("about the CPU library's threads")
    case = Case([(1, 100_000)], torch.uint8, 1.0)
    for _ in with_threads(lambda: None, [2]):
        with pytest.raises(RuntimeError, match="ascend"):
            implementation.ops.csr_gather(case.tensors, case.crow, replaced(case.col, at, at - 1))


def _wrong_case(implementation, wrong):
    case = Case([(5, 20), (6,)], torch.float32, 1.0, device=implementation.device)
    tensors, crow, col, values = wrong(case, [case.tensors, case.crow, case.col, case.normal(case.nnz, torch.float32)])
    return case, tensors, crow, col, values


@pytest.mark.parametrize("wrong", [*WRONG_STRUCTURE, *WRONG_CONTENT])
def test_bad_arguments_raise_and_change_nothing(implementation, wrong):
    if implementation.name == "reference" or (wrong in WRONG_CONTENT and implementation.name != "c++"):
        pytest.skip("the reference checks nothing, and a GPU's host code cannot see the contents: see the next test")
    case, tensors, crow, col, values = _wrong_case(implementation, (WRONG_STRUCTURE | WRONG_CONTENT)[wrong])
    before = [bits(t) for t in [*case.tensors, *tensors]]
    former = torch.zeros_like(case.normal(case.nnz, torch.float32))
    calls = [
        lambda: implementation.ops.csr_add_(tensors, crow, col, values, 1.0),
        lambda: implementation.ops.csr_restore_(tensors, crow, col, former, values, 1.0),
    ]
    if wrong != "integers":
        calls.append(lambda: implementation.ops.csr_scatter_(tensors, crow, col, values))
        if "values" not in wrong:
            calls.append(lambda: implementation.ops.csr_gather(tensors, crow, col))
    for call in calls:
        with pytest.raises(RuntimeError, match=r"must|has|dtype"):
            call()
    for t, then in zip([*case.tensors, *tensors], before):
        np.testing.assert_array_equal(bits(t), then)


@pytest.mark.parametrize("wrong", WRONG_CONTENT)
def test_bad_contents_stay_inside_memory(implementation, wrong):
    if implementation.name not in ("emulated", "cuda"):
        pytest.skip("about kernels whose host code cannot see the contents")
    _, tensors, crow, col, values = _wrong_case(implementation, WRONG_CONTENT[wrong])
    implementation.ops.csr_gather(tensors, crow, col)  # the emulator faults on any access outside the arguments
    implementation.ops.csr_scatter_(tensors, crow, col, values)
    former = torch.zeros_like(values)
    implementation.ops.csr_add_(tensors, crow, col, values, 1.0, former)
    implementation.ops.csr_restore_(tensors, crow, col, former, values, 1.0)


def test_sixteen_byte_elements_are_refused(implementation):
    if implementation.name == "reference":
        pytest.skip("the reference takes any dtype")
    case = Case([(5, 20)], torch.complex128, device=implementation.device)
    with pytest.raises(RuntimeError, match="16 bytes"):
        implementation.ops.csr_gather(case.tensors, case.crow, case.col)


@pytest.mark.gpu
def test_cuda_graph():
    """Nothing waits for the device or copies from the host: the ops can be captured, and replayed on new values."""
    case = Case([(300, 200)] * 200, torch.float32, 0.2, device="cuda")
    values = torch.ones(case.nnz, device="cuda")
    with torch.no_grad():
        for t in case.tensors:
            t.zero_()
    torch.ops.deftx.csr_add_(case.tensors, case.crow, case.col, values, 0.0)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.ops.deftx.csr_add_(case.tensors, case.crow, case.col, values, 1.0)
        out = torch.ops.deftx.csr_gather(case.tensors, case.crow, case.col)
    for total in (1.0, 3.0):
        graph.replay()
        assert out.unique().tolist() == [total]
        values.fill_(2.0)
