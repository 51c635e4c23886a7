"""topk_mask, magnitude_histogram, threshold_mask, dense_to_csr against NumPy, in every implementation."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from deftx_kernels.ops.schemas import SCOPES
from tests.operators import FLOATS, MANY, SHAPES, explore, matrix_shape, with_threads
from tests.select.topk_problem import (
    KINDS,
    TILE,
    check_csr,
    check_random,
    check_topk,
    counts,
    kernels_of,
    own_ops,
    tensor,
    tensors,
)

OPS = ("topk_mask", "magnitude_histogram", "threshold_mask", "dense_to_csr")

MIXTURES = [[d] for d in FLOATS] + [[torch.float32, torch.bfloat16], [torch.bfloat16, torch.float16], FLOATS]
INTEGER = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@pytest.fixture
def run(implementation):
    return own_ops(implementation)


# ---- topk_mask ----


every_scope = pytest.mark.parametrize("scope", ["global", "tensor", "row"])
mixtures = pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda d: "+".join(str(x)[6:] for x in d))


def test_topk(implementation, run):
    examples = st.tuples(
        st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6),
        st.sampled_from(MIXTURES),
        st.sampled_from(["global", "tensor", "row"]),
        st.sampled_from([None, None, 0.05, 0.5, 0.0, 1.0]),
        st.sampled_from(KINDS),
        st.one_of(st.just([]), st.sampled_from(MIXTURES)),
        st.booleans(),
        st.integers(0, 2**32 - 1),
    )
    explore(implementation, examples, lambda example: check_random(run, *example))


@pytest.mark.usefixtures("no_racecheck")
@mixtures
def test_topk_dtypes(run, dtypes):
    """More elements than a sample holds."""
    shapes = [(30, 301), (5,), (3, 1501), (40, 0), (1, TILE)]
    check_random(run, shapes, dtypes, "global", 0.05, "few")
    check_random(run, shapes, dtypes, "tensor", None)
    check_random(run, shapes, dtypes, "global", 0.3, base_dtypes=dtypes[::-1])


@pytest.mark.usefixtures("no_racecheck")
@every_scope
@pytest.mark.parametrize("size", [TILE - 1, TILE, TILE + 1, 257, 1023])
def test_topk_tile_edges(run, size, scope):
    check_random(run, [(size,), (1, size), (size, 1), (3, size // 3), (2,)], [torch.float32], scope, 0.4, "few")


@every_scope
def test_topk_unaligned(run, scope):
    """With race checks: every size of keys and every scope, with and without base."""
    shapes = [(30, 150), (9,), (3, 2, 5)]
    for dtypes in ([torch.float32], [torch.bfloat16], [torch.float64, torch.float16]):
        for base in ([], [torch.bfloat16]):
            check_random(run, shapes, dtypes, scope, 0.3, base_dtypes=base, aligned=False)


@pytest.mark.usefixtures("no_racecheck")
@every_scope
def test_topk_many_tensors(run, scope):
    for kind in ("normal", "equal") if scope == "global" else ("few",):
        check_random(run, (SHAPES[:9] * MANY)[:MANY], FLOATS[:3], scope, None, kind)


def test_topk_larger_than_the_grid(run):
    """More tiles than the emulated device has warps, samples and candidates for several blocks."""
    shapes = [(1200, 768), (768,), (300, 500), (2, 70_000)]
    check_random(run, shapes, [torch.float32], "global", 0.05)
    check_random(run, shapes, [torch.bfloat16], "tensor", 0.05)


# Of the cases below, those with race checks: a restart with keys of each size.
RACE_CHECKED = [(2, torch.float32, 0.5), (2, torch.bfloat16, 0.5), (2, torch.float64, 0.7)]


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(torch.float32, 0.5), (torch.float32, 0.7), (torch.bfloat16, 0.5), (torch.bfloat16, 0.1), (torch.float64, 0.7)],
)
@pytest.mark.parametrize("distinct", [1, 2, 200])
def test_topk_heavy_ties(implementation, run, request, distinct, dtype, share):
    """More ties at the threshold than a list of candidates takes: one key in the bracket, two, and too many to know."""
    if (distinct, dtype, share) not in RACE_CHECKED:
        request.getfixturevalue("no_racecheck")
    rng = np.random.default_rng(5)
    shapes = [(40, 768), (9,), (20, 500)]
    n = 40 * 768 + 9 + 20 * 500
    x = rng.permutation(np.arange(n) % 2 if distinct == 2 else rng.integers(0, distinct, n)) + 1.0
    ends = np.cumsum([int(np.prod(s)) for s in shapes])[:-1]
    scores = [
        torch.from_numpy(p.reshape(s)).to(dtype).to(implementation.device) for p, s in zip(np.split(x, ends), shapes)
    ]
    kernels = kernels_of(implementation, lambda: check_topk(run, scores, [], [round(n * share)], "global"))
    assert kernels is None or "restart_kernel" in kernels or distinct == 200
    if dtype == torch.float32:
        sizes = [int(np.prod(s)) for s in shapes]
        check_topk(run, scores, [torch.zeros_like(s) for s in scores], [round(m * share) for m in sizes], "tensor")


@pytest.mark.usefixtures("no_racecheck")
@every_scope
def test_topk_when_the_sample_misleads(implementation, run, scope):
    """The scores that the CUDA kernel samples are all smaller than the others: its bracket holds none of what it
    should. With scope "tensor" they are in the second batch of tensors that share counters."""
    n, samples = 1 << 16, 4096
    x = np.random.default_rng(6).uniform(1, 2, n)
    for i in range(samples):  # as sampled_element of topk.cu
        h = i
        for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            h = ((h ^ h >> 33) * multiplier) % 2**64
        stretch = n // samples
        x[i * stretch + ((h >> 32) * stretch >> 32)] *= 1e-3
    scores = [torch.from_numpy(x).to(torch.float32).to(implementation.device)]
    small = tensors([(2,)] * 299, [torch.float32], "normal", np.random.default_rng(7), implementation.device)
    before = small if scope == "tensor" else []
    k = [1] * len(before) + [n // 2]
    kernels = kernels_of(implementation, lambda: check_topk(run, before + scores, [], k, scope))
    assert kernels is None or scope == "row" or "count_all_kernel" in kernels


@pytest.mark.usefixtures("no_racecheck")
@every_scope
def test_topk_wide_rows(run, scope):
    check_random(run, [(2, 65_537), (3, 5), (1, 65_536), (70_000,)], [torch.bfloat16], scope, 0.1)


def test_topk_difference_is_taken_in_the_wider_dtype(implementation, run):
    """1 + 2^-12 - 1 is zero in bfloat16 and float16; float64 tells what float32 cannot."""
    for dtype, tiny in ((torch.float32, 2.0**-12), (torch.float64, 2.0**-40)):
        scores = [torch.tensor([1.0, 1 + tiny, 1.0, 1 - 2 * tiny], dtype=dtype, device=implementation.device)]
        base = [torch.ones(4, dtype=torch.bfloat16, device=implementation.device)]
        crow, col, _ = run.topk_mask(scores, base, [2], SCOPES["global"])
        assert (crow.tolist(), col.tolist()) == ([0, 2], [1, 3])


@pytest.mark.usefixtures("no_racecheck")
@every_scope
@mixtures
def test_topk_names_the_first_score_that_is_not_finite(implementation, run, dtypes, scope):
    rng = np.random.default_rng(8)
    shapes = [(), (0, 5), (20, 301), (3, 0), (9,), (2, 40)]
    places = [(0, 0), (2, TILE), (2, 20 * 301 - 1), (5, 79)]
    for i, (at, index) in enumerate(places):
        scores = tensors(shapes, dtypes, "normal", rng, implementation.device)
        base = tensors(shapes, [torch.float32], "normal", rng, implementation.device) if i % 2 else []
        for t, j in places[i:]:
            wrong = base if base and j % 2 else scores
            wrong[t].view(-1)[j] = [float("nan"), float("inf"), -float("inf")][(i + j) % 3]
        _, _, bad = run.topk_mask(scores, base, counts(shapes, scope, (0.0, 0.3, 1.0)[i % 3], rng), SCOPES[scope])
        assert bad.tolist() == [at, index]


def test_topk_infinite_difference(implementation, run):
    """Finite tensors whose float32 difference is not."""
    a = torch.tensor([1.0, 3e38, 2.0], device=implementation.device)
    assert run.topk_mask([a], [-a], [1], SCOPES["global"])[2].tolist() == [0, 1]
    assert run.topk_mask([a.double()], [-a], [1], SCOPES["global"])[2].tolist() == [-1, -1]


# ---- magnitude_histogram, threshold_mask ----


def key_bits(t: Tensor) -> np.ndarray:
    """The bits of |x|, from the bytes."""
    size = t.dtype.itemsize
    raw = t.detach().cpu().contiguous().view(-1).view(getattr(torch, f"int{8 * size}")).numpy().view(INTEGER[size])
    return raw & INTEGER[size]((1 << (8 * size - 1)) - 1)


def random_bits(shape, dtype, rng, device) -> Tensor:
    """Any bits: infinities and NaN among them."""
    n = int(np.prod(shape))
    flat = torch.from_numpy(rng.integers(0, 256, (n + 1) * dtype.itemsize, dtype=np.uint8)).view(dtype)
    return flat.to(device)[1:].view(shape)


def tensors_of(kind, shapes, dtype, rng, device):
    if kind == "bits":
        return [random_bits(s, dtype, rng, device) for s in shapes]
    return [tensor(s, dtype, kind, rng, device) for s in shapes]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["normal", "few", "bits"])
def test_histogram(implementation, run, dtype, kind):
    rng = np.random.default_rng(9)
    scores = tensors_of(kind, [(70, 301), (), (0, 3), (9,), (1, TILE)], dtype, rng, implementation.device)
    keys = np.concatenate([key_bits(s) for s in scores]).astype(np.uint64)
    total = 8 * dtype.itemsize
    prefix = 0
    for shift in range(total - 16, -1, -16):
        for wanted in {prefix, prefix ^ 1} if shift + 16 < total else {0}:
            here = keys if shift + 16 >= total else keys[keys >> np.uint64(shift + 16) == wanted]
            expected = np.bincount((here >> np.uint64(shift) & np.uint64(0xFFFF)).astype(np.int64), minlength=1 << 16)
            found = run.magnitude_histogram(scores, wanted, shift)
            assert found.dtype == torch.int64
            np.testing.assert_array_equal(found.cpu().numpy(), expected)
        prefix = int(keys[1234] >> np.uint64(shift))


def test_histogram_larger_than_the_grid(implementation, run):
    scores = tensors([(700, 768), (9,)], [torch.bfloat16], "normal", np.random.default_rng(10), implementation.device)
    expected = np.bincount(np.concatenate([key_bits(s) for s in scores]), minlength=1 << 16)
    np.testing.assert_array_equal(run.magnitude_histogram(scores, 0, 0).cpu().numpy(), expected)


def check_threshold(run, scores, threshold: int, quotas):
    masks = []
    for s, quota in zip(scores, quotas):
        keys = key_bits(s).astype(np.int64)
        tie = keys == threshold
        masks.append(((keys > threshold) | (tie & (np.cumsum(tie) <= quota))).reshape(matrix_shape(s.shape)))
    check_csr(*run.threshold_mask(scores, threshold, quotas), masks, scores[0].device.type)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["normal", "few", "zero", "bits"])
def test_threshold(implementation, run, request, dtype, kind):
    rng = np.random.default_rng(11)
    shapes = [(70, 301), (), (0, 3), (9,), (5, 0), (1, TILE), (20, 3)]
    scores = tensors_of(kind, shapes, dtype, rng, implementation.device)
    here = int(key_bits(scores[0])[77])
    highest = 2 ** (8 * dtype.itemsize - 1) - 1
    if kind != "few":
        request.getfixturevalue("no_racecheck")
    for threshold, most in ((here, 0), (here, 5000), (here, 10**12), (here + 1, 2), (0, 5000), (highest, 2)):
        if threshold <= highest:
            check_threshold(run, scores, threshold, [int(rng.integers(0, min(most, s.numel()) + 1)) for s in scores])


def test_threshold_many_tensors(implementation, run):
    rng = np.random.default_rng(12)
    scores = tensors((SHAPES[:9] * MANY)[:MANY], [torch.bfloat16], "few", rng, implementation.device)
    two = int(key_bits(torch.tensor([2.0], dtype=torch.bfloat16))[0])
    check_threshold(run, scores, two, [int(rng.integers(0, min(3, s.numel()) + 1)) for s in scores])


# ---- dense_to_csr ----


@pytest.mark.parametrize("density", [0.0, 0.05, 0.24, 0.26, 1.0])
@pytest.mark.parametrize(
    "shapes",
    [
        [(), (1,), (0,), (5, 0), (0, 4), (3, 2, 5)],
        [(TILE - 1,), (TILE,), (TILE + 1,)],
        [(TILE, 1), (TILE, 2), (300, 31), (300, 32), (300, 33), (40, 127), (40, 128), (40, 129)],
        [(9, 1023), (9, 1024), (9, 1025), (3, 5000)],
        [(2, 65_536)],
        [(2, 65_537), (4, 4)],
        [(40_000, 0), (3,), (40_000, 1)],
        [(2,)] * MANY,
    ],
    ids=lambda s: str(s[:3]),
)
def test_dense(implementation, run, shapes, density):
    rng = np.random.default_rng(13)
    masks = [rng.random(matrix_shape(s)) < density for s in shapes]
    for aligned in (True, False):
        dense = []
        for m, s in zip(masks, shapes):
            flat = torch.zeros(m.size + (not aligned), dtype=torch.bool, device=implementation.device)[not aligned :]
            dense.append(flat.copy_(torch.from_numpy(m.reshape(-1))).view(s))
        check_csr(*run.dense_to_csr(dense), masks, implementation.device)


def test_dense_larger_than_the_grid(implementation, run):
    mask = np.random.default_rng(14).random((1700, 768)) < 0.1
    check_csr(*run.dense_to_csr([torch.from_numpy(mask).to(implementation.device)]), [mask], implementation.device)


# ---- all of them ----


def test_threads_do_not_matter(implementation, run):
    if implementation.name != "c++":
        pytest.skip("about the CPU library's threads")
    rng = np.random.default_rng(15)
    shapes = [(300, 1000), (2, 30_000), (9,), (70_000, 1)]
    scores, base = (tensors(shapes, [torch.float32, torch.bfloat16], "few", rng) for _ in range(2))
    one_dtype = [s.to(torch.bfloat16) for s in scores]
    k = {scope: counts(shapes, scope, 0.1, rng) for scope in SCOPES}

    def results():
        found = [
            run.magnitude_histogram(one_dtype, 0, 0),
            *run.threshold_mask(one_dtype, 0x4000, [10_000, 5, 0, 70_000]),
            *run.dense_to_csr([s > 1 for s in scores]),
        ]
        for scope, code in SCOPES.items():
            found += [*run.topk_mask(scores, [], k[scope], code), *run.topk_mask(scores, base, k[scope], code)]
        return [f.numpy() for f in found]

    first, *others = with_threads(results)
    for other in others:
        for one, two in zip(first, other):
            np.testing.assert_array_equal(one, two)


ONE, HUGE = 0x3F80_0000, 1 << 62  # the bits of 1.0; elements
# "op: what is wrong" -> the op's arguments, made of ones(*shape) on the device
WRONG = {
    "topk_mask: no tensors": lambda ones: ([], [], [0], 0),
    "topk_mask: integers": lambda ones: ([ones(4).int()], [], [1], 0),
    "topk_mask: strided": lambda ones: ([ones(4, 6)[:, ::2]], [], [1], 0),
    "topk_mask: strided base": lambda ones: ([ones(4, 3)], [ones(4, 6)[:, ::2]], [1], 0),
    "topk_mask: k too large": lambda ones: ([ones(4)], [], [5], 0),
    "topk_mask: k of a tensor too large": lambda ones: ([ones(2, 2)] * 2, [], [4, 5], 1),
    "topk_mask: k of a row too large": lambda ones: ([ones(2, 2)], [], [3], 2),
    "topk_mask: k times rows overflows": lambda ones: ([ones(4, 2)], [], [HUGE], 2),
    "topk_mask: k negative": lambda ones: ([ones(4)], [], [-1], 1),
    "topk_mask: k too short": lambda ones: ([ones(4)] * 2, [], [1], 1),
    "topk_mask: k too long": lambda ones: ([ones(4)] * 2, [], [1, 1], 0),
    "topk_mask: scope negative": lambda ones: ([ones(4)], [], [1], -1),
    "topk_mask: scope unknown": lambda ones: ([ones(4)], [], [1], 3),
    "topk_mask: base too small": lambda ones: ([ones(4)], [ones(3)], [1], 0),
    "topk_mask: base too short": lambda ones: ([ones(4)] * 2, [ones(4)], [1], 0),
    "topk_mask: rows overflow": lambda ones: ([ones(HUGE, 0)] * 4, [], [0], 0),
    "topk_mask: rows beyond memory": lambda ones: ([ones(HUGE, 0)], [], [0], 2),
    "magnitude_histogram: no tensors": lambda ones: ([], 0, 0),
    "magnitude_histogram: two dtypes": lambda ones: ([ones(4), ones(4).half()], 0, 0),
    "magnitude_histogram: shift negative": lambda ones: ([ones(4)], 0, -16),
    "magnitude_histogram: shift too large": lambda ones: ([ones(4)], 0, 32),
    "magnitude_histogram: shift between": lambda ones: ([ones(4)], 0, 8),
    "magnitude_histogram: prefix negative": lambda ones: ([ones(4)], -1, 0),
    "magnitude_histogram: prefix too large": lambda ones: ([ones(4)], 1 << 16, 0),
    "magnitude_histogram: prefix of nothing": lambda ones: ([ones(4)], 1, 16),
    "threshold_mask: no tensors": lambda ones: ([], 3, []),
    "threshold_mask: two dtypes": lambda ones: ([ones(4), ones(4).half()], 3, [1, 1]),
    "threshold_mask: ties too short": lambda ones: ([ones(4)] * 2, 3, [1]),
    "threshold_mask: ties negative": lambda ones: ([3 * ones(64, 64)], ONE, [-4090]),
    "threshold_mask: ties lowest": lambda ones: ([ones(4)] * 2, ONE, [0, -(2**63)]),
    "threshold_mask: ties too large": lambda ones: ([ones(4)] * 2, ONE, [4, 5]),
    "threshold_mask: threshold negative": lambda ones: ([ones(4)], -1, [0]),
    "threshold_mask: threshold too large": lambda ones: ([ones(4)], 1 << 31, [0]),
    "threshold_mask: threshold of a wider dtype": lambda ones: ([ones(4).half()], ONE, [0]),
    "dense_to_csr: no tensors": lambda ones: ([],),
    "dense_to_csr: floats": lambda ones: ([ones(4)],),
    "dense_to_csr: strided": lambda ones: ([ones(4, 6).bool()[:, ::2]],),
    "dense_to_csr: rows overflow": lambda ones: ([ones(HUGE, 0).bool()] * 4,),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_raise(run, implementation, wrong):
    arguments = WRONG[wrong](lambda *shape: torch.ones(shape, device=implementation.device))
    with pytest.raises((RuntimeError, ValueError)):
        getattr(run, wrong.split(":")[0])(*arguments)
