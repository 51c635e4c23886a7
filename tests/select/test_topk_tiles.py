"""topk_mask on tensors of whole tiles, beside parts of tiles: what the CUDA kernels do with each differs."""

import numpy as np
import pytest
import torch

from deftx_kernels.ops.schemas import SCOPES
from tests.operators import FLOATS
from tests.select.topk_problem import TILE, check_topk, counts, kernels_of, own_ops, tensor

OPS = ("topk_mask",)

# Scores, and what they are subtracted from: kernels for one dtype, for 16 bits, and for any.
DTYPES = [
    ([torch.float32], []),
    ([torch.bfloat16], []),
    ([torch.float16], []),
    ([torch.float64], []),
    ([torch.float32, torch.bfloat16, torch.float16], []),
    ([torch.float32], [torch.float32]),
    ([torch.bfloat16], [torch.bfloat16]),
    ([torch.float32], [torch.bfloat16, torch.float16]),
    ([torch.float64], [torch.float32]),
]
dtypes = pytest.mark.parametrize(
    ("scored", "base"), DTYPES, ids=lambda d: "+".join(str(x)[6:] for x in d) if d else "none"
)
RACE_CHECKED = (DTYPES[0], DTYPES[1], DTYPES[7])
SHAPES = [(2, TILE), (TILE - 8,), (3, TILE), (2 * TILE + 9,), (5,), (TILE,)]


def some_aligned(shapes, chosen, kind, rng, device, every=2):
    """Of `every` tensors one is aligned."""
    return [tensor(s, chosen[i % len(chosen)], kind, rng, device, i % every == 0) for i, s in enumerate(shapes)]


@pytest.fixture
def run(implementation):
    return own_ops(implementation)


@dtypes
@pytest.mark.parametrize("kind", ["normal", "few", "equal", "subnormal"])
def test_topk_of_whole_tiles_and_parts(request, run, scored, base, kind):
    if kind != "few" or (scored, base) not in RACE_CHECKED:
        request.getfixturevalue("no_racecheck")
    rng = np.random.default_rng(21)
    scores = some_aligned(SHAPES, scored, kind, rng, run.device)
    others = some_aligned(SHAPES, base, kind, rng, run.device, every=3) if base else []
    for scope, share in (("global", 0.05), ("tensor", 0.5), ("global", 0.99)):
        check_topk(run, scores, others, counts(SHAPES, scope, share, rng), scope)


def near_the_median(tiles: int, distinct: int, rng) -> np.ndarray:
    """Ten tiles of scores around 1, some with `distinct` values that no other score lies between."""
    x = rng.uniform(0.1, 1.9, (10, TILE))
    x[4 : 4 + tiles] = 1 + rng.integers(0, distinct, (tiles, TILE)) * 2.0**-23
    return x.reshape(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("tiles", "distinct", "fit"), [(1, 200, True), (4, 1, False), (4, 2, False)])
def test_topk_of_a_tile_of_candidates(implementation, run, dtype, tiles, distinct, fit):
    """A bracket holds all of a tile's scores. Those of one tile fit the list, which is full within another."""
    x = near_the_median(tiles, distinct, np.random.default_rng(22))
    scores = [torch.from_numpy(x).to(dtype).to(implementation.device)]
    for base in ([], [torch.zeros_like(scores[0])]) if dtype == torch.float32 else ([],):
        kernels = kernels_of(implementation, lambda base=base: check_topk(run, scores, base, [len(x) // 2], "global"))
        assert kernels is None or ("restart_kernel" in kernels) != fit


@pytest.mark.usefixtures("no_racecheck")
@dtypes
def test_topk_names_the_first_bad_score_of_a_whole_tile(run, scored, base):
    rng = np.random.default_rng(23)
    shapes = [(9,), (4, TILE), (TILE + 1,)]
    bad = [float("nan"), float("inf"), -float("inf"), -float("nan")]
    for i, place in enumerate((0, 255, TILE - 1, TILE, 2 * TILE + 1024 + 8 * 31 + 7, 4 * TILE - 1)):
        scores = some_aligned(shapes, scored, "normal", rng, run.device)
        others = some_aligned(shapes, base, "normal", rng, run.device) if base else []
        scores[1] = scores[1].clone()  # aligned
        wrong = others if others and i % 2 else scores
        wrong[1].view(-1)[place] = bad[i % 4]
        wrong[1].view(-1)[-1] = bad[(i + 1) % 4]
        wrong[2].view(-1)[0] = bad[(i + 2) % 4]
        _, _, found = run.topk_mask(scores, others, counts(shapes, "global", 0.3, rng), SCOPES["global"])
        assert found.tolist() == [1, place]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_topk_of_none_and_of_all(run, dtype, scope):
    shapes = [(2, TILE), (TILE - 1,)]
    for kind in ("normal", "zero"):
        scores = some_aligned(shapes, [dtype], kind, np.random.default_rng(24), run.device)
        for share in (0.0, 1.0):
            check_topk(run, scores, [], counts(shapes, scope, share, None), scope)
