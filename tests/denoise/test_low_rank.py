"""residual_cut and the three operators of L + prune(H), the same tests for every implementation.

Which entries are kept depends on the last bits of L, so an implementation is judged by its own: L is what
low_rank_denoised returns for a cut that keeps nothing, and must be close to the float64 product; from there on
everything is exact, against NumPy sorts.
"""

import importlib
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import deftx_kernels  # noqa: F401  (registers the operators)
from deftx_kernels.ops import reference

BACKENDS = [
    "reference",
    pytest.param("triton-sm80", marks=pytest.mark.cuda_on_cpu),
    pytest.param("gpu", marks=pytest.mark.gpu),
]
INFINITY = 0x7F80_0000


class Backend(NamedTuple):
    """The operators on CPU tensors: `backend.residual_cut(delta, left, right, keep)`."""

    name: str
    tool: Any = None
    launches: list | None = None
    racecheck: bool = True  # of the emulated kernels: takes most of their time

    def __getattr__(self, op: str):
        def run(*arguments):
            if self.name == "reference":
                return getattr(reference, op)(*arguments)
            if self.name == "gpu":
                result = getattr(torch.ops.deftx, op)(*(a.cuda() if isinstance(a, Tensor) else a for a in arguments))
                return result.cpu() if isinstance(result, Tensor) else tuple(r.cpu() for r in result)
            from deftx_kernels.kernels import low_rank

            with self.tool.override(racecheck=self.racecheck) as log:
                result = getattr(low_rank, op)(*arguments)
            self.launches[:] = log
            return result

        return run


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    if request.param != "triton-sm80":
        return Backend(request.param)
    pytest.importorskip("triton")
    tool = request.getfixturevalue("cuda_on_cpu")
    return Backend(request.param, importlib.import_module(f"{tool.__name__}.triton_on_cpu"), [])


# ---- problems and oracles ----
class Problem(NamedTuple):
    delta: Tensor  # [b, m, n]
    left: Tensor  # [b, m, r]
    right: Tensor  # [b, n, r]


def random_problem(b: int, m: int, n: int, r: int) -> Problem:
    generator = torch.Generator().manual_seed(b + 7 * m + 31 * n + 101 * r)
    return Problem(*(torch.randn(shape, generator=generator) for shape in ((b, m, n), (b, m, r), (b, n, r))))


def tied_problem(b: int, m: int, n: int) -> Problem:
    """L = 0 and few magnitudes, both signs of zero among them; matrix i has values of its own."""
    generator = torch.Generator().manual_seed(m + n)
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 1.5, -3.0])
    delta = values[torch.randint(len(values), (b, m, n), generator=generator)]
    return Problem(delta * torch.arange(1, b + 1)[:, None, None], torch.zeros(b, m, 3), torch.ones(b, n, 3))


def keep_nothing(b: int) -> Tensor:
    return torch.tensor([[INFINITY, 0]] * b)


def bits(x: Tensor) -> np.ndarray:
    return x.numpy().view(np.int32)


def magnitudes(x: Tensor) -> np.ndarray:
    return bits(x) & 0x7FFF_FFFF


def largest(x: Tensor, keep: int) -> np.ndarray:
    """Of each matrix, bool: its `keep` largest entries, of equal ones the first."""
    chosen = np.zeros(x.shape, bool)
    for key, flat in zip(magnitudes(x).reshape(len(x), -1), chosen.reshape(len(x), -1)):
        flat[np.lexsort((np.arange(len(key)), -key))[:keep]] = True
    return chosen


def low_rank_part(backend: Backend, problem: Problem) -> Tensor:
    return backend.low_rank_denoised(*problem, keep_nothing(len(problem.delta)))


def check_denoised(backend: Backend, problem: Problem, keep: int, low: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The cut and L + prune(H), checked. `low`: low_rank_part(backend, problem)."""
    cut = backend.residual_cut(*problem, keep)
    assert cut.dtype == torch.int64
    assert cut.shape == (len(problem.delta), 2)
    denoised = backend.low_rank_denoised(*problem, cut)
    low = low_rank_part(backend, problem) if low is None else low
    kept = largest(problem.delta - low, keep)
    assert (kept.reshape(len(kept), -1).sum(1) == keep).all()
    want = np.where(kept, bits(problem.delta), bits(low))
    assert np.array_equal(bits(denoised), want), f"{(bits(denoised) != want).sum()} entries differ"
    return cut, denoised


def check_mask(backend: Backend, problem: Problem, cut: Tensor, denoised: Tensor, k: int) -> None:
    """The k largest scores of all matrices, and the histograms on the way there."""
    b, m, n = denoised.shape
    key = magnitudes(denoised)
    threshold = int(np.sort(key, axis=None)[-k])
    for prefix, shift in ((0, 16), (threshold >> 16, 0)):
        histogram = backend.low_rank_histogram(*problem, cut, prefix, shift)
        counted = key[key >> 16 == prefix] if shift == 0 else key
        assert histogram.dtype == torch.int64
        assert np.array_equal(histogram.numpy(), np.bincount((counted >> shift).ravel() & 0xFFFF, minlength=1 << 16))
    tied = (key == threshold).reshape(b, -1).sum(1)
    left, ties = k - int((key > threshold).sum()), []
    for count in tied:
        ties.append(min(left, int(count)))
        left -= ties[-1]
    for quotas in (ties, [*(int(t) // 2 for t in tied[:-1]), min(int(tied[-1]) + 1, m * n)]):
        crow, col = backend.low_rank_mask(*problem, cut, threshold, quotas)
        equal = (key == threshold).reshape(b, -1)
        first = equal & (equal.cumsum(1) <= np.array(quotas)[:, None])
        mask = ((key > threshold).reshape(b, -1) | first).reshape(b * m, n)
        assert crow.tolist() == [0, *mask.sum(1).cumsum()]
        assert np.array_equal(col.numpy(), mask.nonzero()[1])
        assert col.dtype == (torch.uint16 if n <= 65_536 else torch.int32)
        if quotas is ties:
            assert len(col) == k


# ---- tests ----
# (b, m, n, r); a tile is 64 x 128 with 16 columns of the factors at a time.
SHAPES = [
    (1, 1, 1, 0),
    (1, 1, 1, 1),
    (2, 1, 300, 5),
    (1, 200, 1, 64),
    (3, 7, 5, 33),
    (1, 65, 130, 33),
    (2, 64, 128, 16),
    (2, 70, 136, 0),
]


@pytest.mark.parametrize("shape", [*SHAPES, (1, 40, 50, 64)], ids=str)
def test_the_low_rank_part_is_accurate(backend, shape):
    problem = random_problem(*shape)
    low = low_rank_part(backend, problem)
    want = problem.left.double() @ problem.right.double().mT
    assert low.dtype == torch.float32
    assert (low - want).norm() <= 5e-6 * want.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cut_keeps_exactly_the_largest_residuals(backend, shape):
    problem = random_problem(*shape)
    low = low_rank_part(backend, problem)
    count = problem.delta[0].numel()
    for keep in {0, 1, -(-count // 10), count}:
        cut, _ = check_denoised(backend, problem, keep, low)
        if keep == 0:
            assert torch.equal(cut, keep_nothing(len(problem.delta)))


@pytest.mark.parametrize("shape", [(1, 1, 300), (2, 5, 9), (1, 150, 3), (2, 66, 140)], ids=str)
def test_of_equal_residuals_the_first_are_kept(backend, shape):
    """Shares that end among the 3, the 1 and the zeros."""
    problem = tied_problem(*shape)
    low = low_rank_part(backend, problem)
    for share in (0.05, 0.5, 0.8):
        check_denoised(backend, problem, round(share * problem.delta[0].numel()), low)


def test_every_end_of_the_ties(backend):
    """Ties in one row, over several rows and over several tiles: kept up to each border."""
    delta = torch.zeros(1, 66, 130)
    places = [(0, 3), (0, 127), (0, 128), (2, 0), (63, 129), (64, 0), (65, 5), (65, 129)]
    for row, column in places:
        delta[0, row, column] = -2.0
    problem = Problem(delta, torch.zeros(1, 66, 0), torch.zeros(1, 130, 0))
    for keep in (2, 3, 5, 6):
        cut = backend.residual_cut(*problem, keep)
        denoised = backend.low_rank_denoised(*problem, cut)
        assert denoised[0].nonzero().tolist() == [list(p) for p in places[:keep]]


def test_one_matrix_with_ties_and_one_without(backend):
    tied, plain = tied_problem(1, 9, 11), random_problem(1, 9, 11, 3)
    problem = Problem(*(torch.cat(pair) for pair in zip(tied, plain)))
    cut, denoised = check_denoised(backend, problem, 20)
    check_mask(backend, problem, cut, denoised, 70)


def test_nothing_but_zeros(backend):
    problem = Problem(torch.zeros(2, 5, 140), torch.zeros(2, 5, 2), torch.zeros(2, 140, 2))
    cut, denoised = check_denoised(backend, problem, 139)
    check_mask(backend, problem, cut, denoised, 900)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_histogram_and_mask_of_the_denoised(backend, shape):
    problem = random_problem(*shape)
    count = problem.delta.numel()
    cut, denoised = check_denoised(backend, problem, -(-count // len(problem.delta) // 5))
    check_mask(backend, problem, cut, denoised, -(-count // 3))


@pytest.mark.parametrize("k", [1, 500, 15_000])
def test_mask_of_equal_scores(backend, k):
    problem = tied_problem(2, 66, 140)
    cut, denoised = check_denoised(backend, problem, 66 * 140 // 2)
    check_mask(backend, problem, cut, denoised, k)


@pytest.mark.parametrize("ties", [[0, 5], [12, 0], [1, 12]])
def test_ties_of_one_matrix_are_not_those_of_another(backend, ties):
    problem = Problem(torch.ones(2, 3, 4), torch.zeros(2, 3, 1), torch.zeros(2, 4, 1))
    crow, col = backend.low_rank_mask(
        *problem, torch.zeros(2, 2, dtype=torch.int64), int(magnitudes(torch.tensor(1.0))), ties
    )
    mask = (np.arange(12) < np.array(ties)[:, None]).reshape(6, 4)
    assert crow.tolist() == [0, *mask.sum(1).cumsum()]
    assert col.tolist() == mask.nonzero()[1].tolist()


def test_a_cut_at_each_matrix(backend):
    """Thresholds and ends that differ, one of each kind: nothing, everything, some of the ties."""
    problem = tied_problem(3, 4, 6)
    one = int(magnitudes(torch.tensor(3.0)))  # in the third matrix, a third of its entries
    cut = torch.tensor([[INFINITY, 0], [0, 24], [one, 13]])
    denoised = backend.low_rank_denoised(*problem, cut)
    key = magnitudes(problem.delta[2])
    kept = (key > one) | (key == one) & (np.arange(24).reshape(4, 6) < 13)
    assert 0 < (key[kept] == one).sum() < (key == one).sum()
    assert not denoised[0].any()
    assert torch.equal(denoised[1], problem.delta[1])
    assert np.array_equal(denoised[2].numpy(), np.where(kept, problem.delta[2].numpy(), 0))


def test_more_than_65536_columns(backend):
    backend = backend._replace(racecheck=False)
    problem = random_problem(1, 2, 65_700, 2)
    cut, denoised = check_denoised(backend, problem, 100)
    threshold = int(np.sort(magnitudes(denoised), axis=None)[-50])
    crow, col = backend.low_rank_mask(*problem, cut, threshold, [1])
    assert col.dtype == torch.int32
    assert np.array_equal(col.numpy(), largest(denoised, 50)[0].nonzero()[1])
    assert crow[-1] == 50


def test_no_matrix(backend):
    problem = random_problem(0, 3, 4, 2)
    assert backend.residual_cut(*problem, 5).shape == (0, 2)
    assert backend.low_rank_denoised(*problem, keep_nothing(0).view(0, 2)).shape == (0, 3, 4)


def test_ties_are_looked_for_only_where_they_matter(backend):
    if backend.name != "triton-sm80":
        pytest.skip("counts launches")
    backend.residual_cut(*random_problem(1, 8, 9, 2), 10)
    assert len(backend.launches) == 2  # a histogram a round
    backend.residual_cut(*tied_problem(1, 8, 9), 1)
    assert len(backend.launches) == 4
    backend.residual_cut(*tied_problem(1, 8, 9), 72)
    assert len(backend.launches) == 2
    backend.residual_cut(*tied_problem(1, 8, 9), 0)
    assert len(backend.launches) == 0


def test_offsets_beyond_31_bits(cuda_on_cpu):
    """9 GB of address space, of which a few pages are touched: the last tile of a matrix of more than 2**31 entries."""
    pytest.importorskip("triton")
    from deftx_kernels.kernels.low_rank import _Scores

    tool = importlib.import_module(f"{cuda_on_cpu.__name__}.triton_on_cpu")
    m, n = 2**25, 65
    delta = torch.empty(1, m, n)
    delta[0, -64:] = 0.0
    delta[0, -1] = torch.arange(n)
    scores = _Scores(delta, torch.empty(1, m, 0), torch.empty(1, n, 0))
    with tool.override():
        found = scores._launch("rows", torch.zeros(1, 64, n, dtype=torch.int32), torch.tensor([m // 64 - 1]))
    assert torch.equal(found.view(torch.float32), delta[:, -64:])


def test_other_dtypes_go_to_the_plain_functions():
    from deftx_kernels.backends.triton import _float32_or

    op = _float32_or(lambda delta, keep: ("kernel", keep), lambda delta, keep: ("plain", keep))
    assert op(torch.zeros(1), 3) == ("kernel", 3)
    assert op(torch.zeros(1, dtype=torch.float64), 3) == ("plain", 3)


@pytest.mark.parametrize("shape", [(2, 330, 650, 40), (3, 512, 2048, 64), (1, 4096, 4096, 7)], ids=str)
def test_matrices_of_many_tiles(backend, shape):
    if backend.name != "gpu" and shape[2] > 1000:
        pytest.skip("takes long without a GPU")
    backend = backend._replace(racecheck=False)
    problem = random_problem(*shape)
    problem = problem._replace(delta=problem.delta * shape[3] ** 0.5)
    cut, denoised = check_denoised(backend, problem, problem.delta[0].numel() // 10)
    check_mask(backend, problem, cut, denoised, problem.delta.numel() // 20)


@pytest.mark.gpu
def test_float64_on_the_gpu():
    problem = Problem(*(t.double() for t in random_problem(2, 30, 50, 4)))
    on_gpu = Problem(*(t.cuda() for t in problem))
    cut = torch.ops.deftx.residual_cut(*on_gpu, 99)
    nothing = torch.tensor([[0x7FF0 << 48, 0]] * 2).cuda()  # no residual is above infinity
    low, denoised = (torch.ops.deftx.low_rank_denoised(*on_gpu, c) for c in (nothing, cut))
    assert ((denoised != low).view(2, -1).sum(1) == 99).all()
    torch.testing.assert_close(low.cpu(), problem.left @ problem.right.mT)
