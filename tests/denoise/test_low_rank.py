"""residual_cut and low_rank_denoised, the same tests for every implementation.

Which entries are kept depends on the last bits of L, so an implementation is judged by its own: L is what
low_rank_denoised returns for a cut that keeps nothing, and must be close to the float64 product; from there on
everything is exact, against NumPy sorts.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import Implementation, implementations

OPS = ("residual_cut", "low_rank_denoised")
INFINITY = 0x7F80_0000


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


def low_rank_part(implementation: Implementation, problem: Problem) -> Tensor:
    return implementation.on_cpu("low_rank_denoised", *problem, keep_nothing(len(problem.delta)))


def check_denoised(
    implementation: Implementation, problem: Problem, keep: int, low: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The cut and L + prune(H), checked. `low`: low_rank_part(implementation, problem)."""
    cut = implementation.on_cpu("residual_cut", *problem, keep)
    assert cut.dtype == torch.int64
    assert cut.shape == (len(problem.delta), 2)
    denoised = implementation.on_cpu("low_rank_denoised", *problem, cut)
    low = low_rank_part(implementation, problem) if low is None else low
    kept = largest(problem.delta - low, keep)
    assert (kept.reshape(len(kept), -1).sum(1) == keep).all()
    want = np.where(kept, bits(problem.delta), bits(low))
    assert np.array_equal(bits(denoised), want), f"{(bits(denoised) != want).sum()} entries differ"
    return cut


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
    (1, 40, 50, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_low_rank_part_is_accurate_and_the_cut_keeps_exactly_the_largest_residuals(implementation, request, shape):
    if shape not in ((1, 65, 130, 33), (2, 64, 128, 16)):  # those two with race checks
        request.getfixturevalue("no_racecheck")
    problem = random_problem(*shape)
    low = low_rank_part(implementation, problem)
    want = problem.left.double() @ problem.right.double().mT
    assert low.dtype == torch.float32
    assert (low - want).norm() <= 5e-6 * want.norm()
    count = problem.delta[0].numel()
    check_denoised(implementation, problem, -(-count // 10), low)
    with implementation.without_racecheck():  # the same kernels, other numbers
        for keep in {0, 1, count}:
            cut = check_denoised(implementation, problem, keep, low)
            if keep == 0:
                assert torch.equal(cut, keep_nothing(len(problem.delta)))


@pytest.mark.parametrize("shape", [(1, 1, 300), (2, 5, 9), (1, 150, 3), (2, 66, 140)], ids=str)
def test_of_equal_residuals_the_first_are_kept(implementation, request, shape):
    """Shares that end among the 3, the 1 and the zeros."""
    if shape != (2, 66, 140):
        request.getfixturevalue("no_racecheck")
    problem = tied_problem(*shape)
    low = low_rank_part(implementation, problem)
    count = problem.delta[0].numel()
    check_denoised(implementation, problem, round(0.5 * count), low)
    with implementation.without_racecheck():
        for share in (0.05, 0.8):
            check_denoised(implementation, problem, round(share * count), low)


@pytest.mark.usefixtures("no_racecheck")
def test_every_end_of_the_ties(implementation):
    """Ties in one row, over several rows and over several tiles: kept up to each border."""
    delta = torch.zeros(1, 66, 130)
    positions = [(0, 3), (0, 127), (0, 128), (2, 0), (63, 129), (64, 0), (65, 5), (65, 129)]
    for row, column in positions:
        delta[0, row, column] = -2.0
    problem = Problem(delta, torch.zeros(1, 66, 0), torch.zeros(1, 130, 0))
    for keep in (2, 3, 5, 6):
        cut = implementation.on_cpu("residual_cut", *problem, keep)
        denoised = implementation.on_cpu("low_rank_denoised", *problem, cut)
        assert denoised[0].nonzero().tolist() == [list(p) for p in positions[:keep]]


@pytest.mark.usefixtures("no_racecheck")
def test_one_matrix_with_ties_and_one_without(implementation):
    tied, plain = tied_problem(1, 9, 11), random_problem(1, 9, 11, 3)
    problem = Problem(*(torch.cat(pair) for pair in zip(tied, plain)))
    check_denoised(implementation, problem, 20)


@pytest.mark.usefixtures("no_racecheck")
def test_nothing_but_zeros(implementation):
    problem = Problem(torch.zeros(2, 5, 140), torch.zeros(2, 5, 2), torch.zeros(2, 140, 2))
    check_denoised(implementation, problem, 139)


@pytest.mark.usefixtures("no_racecheck")
def test_a_cut_at_each_matrix(implementation):
    """Thresholds and ends that differ, one of each kind: nothing, everything, some of the ties."""
    problem = tied_problem(3, 4, 6)
    one = int(magnitudes(torch.tensor(3.0)))  # in the third matrix, a third of its entries
    cut = torch.tensor([[INFINITY, 0], [0, 24], [one, 13]])
    denoised = implementation.on_cpu("low_rank_denoised", *problem, cut)
    key = magnitudes(problem.delta[2])
    kept = (key > one) | (key == one) & (np.arange(24).reshape(4, 6) < 13)
    assert 0 < (key[kept] == one).sum() < (key == one).sum()
    assert not denoised[0].any()
    assert torch.equal(denoised[1], problem.delta[1])
    assert np.array_equal(denoised[2].numpy(), np.where(kept, problem.delta[2].numpy(), 0))


def test_more_than_65536_columns(implementation):
    if implementation.name == "triton-sm80":
        pytest.skip("half a minute; test_offsets_beyond_31_bits goes further")
    check_denoised(implementation, random_problem(1, 2, 65_700, 2), 100)


def test_no_matrix(implementation):
    problem = random_problem(0, 3, 4, 2)
    assert implementation.on_cpu("residual_cut", *problem, 5).shape == (0, 2)
    assert implementation.on_cpu("low_rank_denoised", *problem, torch.empty(0, 2, dtype=torch.int64)).shape == (0, 3, 4)


@implementations("triton-sm80")
@pytest.mark.usefixtures("no_racecheck")
def test_ties_are_looked_for_only_where_they_matter(implementation):
    def launches(problem: Problem, keep: int) -> int:
        implementation.ops.residual_cut(*problem, keep)
        return len(implementation.ops.launches)

    assert launches(random_problem(1, 8, 9, 2), 10) == 2  # a histogram a round
    assert launches(tied_problem(1, 8, 9), 1) == 4
    assert launches(tied_problem(1, 8, 9), 72) == 2
    assert launches(tied_problem(1, 8, 9), 0) == 0


@pytest.mark.cuda_on_cpu
def test_offsets_beyond_31_bits(triton_on_cpu):
    """9 GB of address space, of which a few pages are touched: the last tile of a matrix of more than 2**31 entries."""
    from deftx_kernels.kernels.low_rank import LowRankScores

    m, n = 2**25, 65
    delta = torch.empty(1, m, n)
    delta[0, -64:] = 0.0
    delta[0, -1] = torch.arange(n)
    scores = LowRankScores(delta, torch.empty(1, m, 0), torch.empty(1, n, 0))
    with triton_on_cpu.override():
        found = scores.launch("rows", torch.zeros(1, 64, n, dtype=torch.int32), torch.tensor([m // 64 - 1]))
    assert torch.equal(found.view(torch.float32), delta[:, -64:])


@pytest.mark.usefixtures("no_racecheck")
@pytest.mark.parametrize("shape", [(2, 330, 650, 40), (3, 512, 2048, 64), (1, 4096, 4096, 7)], ids=str)
def test_matrices_of_many_tiles(implementation, shape):
    if implementation.name != "cuda" and shape[2] > 1000:
        pytest.skip("takes long without a GPU")
    problem = random_problem(*shape)
    problem = problem._replace(delta=problem.delta * shape[3] ** 0.5)
    check_denoised(implementation, problem, problem.delta[0].numel() // 10)


@pytest.mark.gpu
def test_float64_is_the_references_on_a_gpu():
    """Which `backends()` lists as a limit of the Triton kernels."""
    problem = Problem(*(t.double() for t in random_problem(2, 30, 50, 4)))
    on_gpu = Problem(*(t.cuda() for t in problem))
    cut = torch.ops.deftx.residual_cut(*on_gpu, 99)
    nothing = torch.tensor([[0x7FF0 << 48, 0]] * 2).cuda()  # no residual is above infinity
    low, denoised = (torch.ops.deftx.low_rank_denoised(*on_gpu, c) for c in (nothing, cut))
    assert ((denoised != low).view(2, -1).sum(1) == 99).all()
    torch.testing.assert_close(low.cpu(), problem.left @ problem.right.mT)
