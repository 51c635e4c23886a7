"""topk_mask, magnitude_histogram, threshold_mask, dense_to_csr against NumPy, the same tests for every implementation.

The oracle sorts: by -|x|, then by position. It knows nothing of bits, brackets or tiles.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from deftx_kernels.ops.schemas import SCOPES

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
MIXTURES = [[d] for d in FLOATS] + [[torch.float32, torch.bfloat16], [torch.bfloat16, torch.float16], FLOATS]
SHAPES = [(), (1,), (7,), (0,), (1, 1), (3, 0), (0, 5), (4, 9), (3, 2, 5), (2, 1, 3, 2), (40, 3), (2, 300)]
MANY = 330  # tensors, each with a tile of its own: more warps than the emulated device holds
TILE = 4096  # elements of the CUDA kernels' unit of work; also the size up to which a tensor is its own sample
INTEGER = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@pytest.fixture
def run(provider):
    """run.topk_mask(...): the provider's op, or a skip where it has none of its own."""

    class Ops:
        def __getattr__(self, op):
            if not provider.can_run(op):
                pytest.skip(f"{provider.name} has no {op} of its own")
            return getattr(provider.ops, op)

    return Ops()


# ---- data ----


def values(kind: str, n: int, rng) -> np.ndarray:
    if kind == "normal":
        return rng.standard_normal(n)
    if kind == "few":  # distinct magnitudes, both signs
        return (rng.standard_normal(n) * 2).round()
    if kind == "equal":
        return rng.choice([-1.5, 1.5], n)
    if kind == "zero":
        return rng.choice([-0.0, 0.0], n)
    if kind == "subnormal":  # of float16, bfloat16 and float32: multiples of the smallest one
        return rng.integers(-9, 10, n) * float(rng.choice([2.0**-24, 2.0**-133, 2.0**-149]))
    if kind == "wide":  # many exponents
        return np.exp2(rng.uniform(-14, 15, n)) * rng.choice([-1, 1], n)
    raise ValueError(kind)


KINDS = ["normal", "normal", "few", "equal", "zero", "subnormal", "wide"]


def tensor(shape, dtype, kind, rng, device="cpu", aligned=True) -> Tensor:
    n = int(np.prod(shape))
    flat = torch.zeros(n + (not aligned), dtype=dtype, device=device)[not aligned :]
    flat.copy_(torch.from_numpy(values(kind, n, rng)))
    return flat.view(shape)


def tensors(shapes, dtypes, kind, rng, device="cpu", aligned=True) -> list[Tensor]:
    return [tensor(s, dtypes[i % len(dtypes)], kind, rng, device, aligned) for i, s in enumerate(shapes)]


def matrix_shape(shape) -> tuple[int, int]:
    return (1, int(np.prod(shape))) if len(shape) < 2 else (shape[0], int(np.prod(shape[1:])))


def double(t: Tensor) -> np.ndarray:
    return t.detach().cpu().to(torch.float64).numpy().reshape(-1)


# ---- the oracle ----


def magnitudes(scores, base) -> list[np.ndarray]:
    if not base:
        return [np.abs(double(s)) for s in scores]
    real = np.float64 if any(t.dtype == torch.float64 for t in [*scores, *base]) else np.float32
    with np.errstate(all="ignore"):
        return [
            np.abs(double(s).astype(real) - double(b).astype(real)).astype(np.float64) for s, b in zip(scores, base)
        ]


def largest(x: np.ndarray, k: int) -> np.ndarray:
    """bool like x."""
    chosen = np.zeros(x.shape, bool)
    chosen[np.lexsort((np.arange(len(x)), -x))[:k]] = True
    return chosen


def selected(scores, base, k, scope) -> list[np.ndarray]:
    """bool [rows, columns] for each tensor."""
    flat = magnitudes(scores, base)
    shapes = [matrix_shape(s.shape) for s in scores]
    if scope == "global":
        ends = np.cumsum([len(x) for x in flat])[:-1]
        return [m.reshape(s) for m, s in zip(np.split(largest(np.concatenate(flat), k[0]), ends), shapes)]
    if scope == "tensor":
        return [largest(x, n).reshape(s) for x, n, s in zip(flat, k, shapes)]
    return [
        np.array([largest(row, n) for row in x.reshape(s)], bool).reshape(s) if s[0] else np.zeros(s, bool)
        for x, n, s in zip(flat, k, shapes)
    ]


def check_csr(crow, col, masks, device):
    wide = any(m.shape[1] > 65_536 for m in masks)
    assert crow.dtype == torch.int64
    assert col.dtype == (torch.int32 if wide else torch.uint16)
    assert crow.device.type == col.device.type == device
    np.testing.assert_array_equal(
        crow.cpu().numpy(), np.cumsum([0, *np.concatenate([m.sum(1) for m in masks])], dtype=np.int64)
    )
    np.testing.assert_array_equal(col.cpu().numpy(), np.concatenate([np.nonzero(m)[1] for m in masks]))


def check_topk(run, scores, base, k, scope):
    crow, col, bad = run.topk_mask(scores, base, k, SCOPES[scope])
    assert bad.device.type == "cpu"
    assert bad.dtype == torch.int64
    assert bad.tolist() == [-1, -1]
    check_csr(crow, col, selected(scores, base, k, scope), scores[0].device.type)


def counts(shapes, scope, share, rng) -> list[int]:
    """A k for each, of which the share is wanted; None: any."""
    matrices = [matrix_shape(s) for s in shapes]
    sizes = {
        "global": [sum(r * c for r, c in matrices)],
        "tensor": [r * c for r, c in matrices],
        "row": [c for _, c in matrices],
    }
    return [round(share * n) if share is not None else int(rng.integers(0, n + 1)) for n in sizes[scope]]


def explore(provider, strategy, check):
    """Runs hypothesis, with fewer examples for the slow ones."""
    examples = 25 if provider.name in ("reference", "emulated") else 100
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings(max_examples=examples, deadline=None, suppress_health_check=quiet, database=None)(given(strategy)(check))()


# ---- topk_mask ----


class Example(NamedTuple):
    shapes: list
    dtypes: list
    base_dtypes: list | None
    kind: str
    scope: str
    share: float | None
    aligned: bool
    seed: int


few_shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=6)
examples = st.builds(
    Example,
    few_shapes,
    st.sampled_from(MIXTURES),
    st.one_of(st.none(), st.sampled_from(MIXTURES)),
    st.sampled_from(KINDS),
    st.sampled_from(["global", "tensor", "row"]),
    st.sampled_from([None, None, 0.05, 0.5, 0.0, 1.0]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)


def test_topk(provider, run):
    def check(e: Example):
        rng = np.random.default_rng(e.seed)
        scores = tensors(e.shapes, e.dtypes, e.kind, rng, provider.device, e.aligned)
        base = tensors(e.shapes, e.base_dtypes, e.kind, rng, provider.device) if e.base_dtypes else []
        check_topk(run, scores, base, counts(e.shapes, e.scope, e.share, rng), e.scope)

    explore(provider, examples, check)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda d: "+".join(str(x)[6:] for x in d))
def test_topk_dtypes(provider, run, dtypes):
    """More elements than a sample holds."""
    rng = np.random.default_rng(1)
    shapes = [(30, 301), (5,), (3, 1501), (40, 0), (1, TILE)]
    for kind, scope, share in (("few", "global", 0.05), ("normal", "tensor", None)):
        check_topk(
            run, tensors(shapes, dtypes, kind, rng, provider.device), [], counts(shapes, scope, share, rng), scope
        )
    scores, base = (tensors(shapes, d, "normal", rng, provider.device) for d in (dtypes, dtypes[::-1]))
    check_topk(run, scores, base, counts(shapes, "global", 0.3, rng), "global")


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("size", [TILE - 1, TILE, TILE + 1, 257, 1023])
def test_topk_tile_edges(provider, run, size, scope):
    rng = np.random.default_rng(size)
    shapes = [(size,), (1, size), (size, 1), (3, size // 3), (2,)]
    check_topk(
        run, tensors(shapes, [torch.float32], "few", rng, provider.device), [], counts(shapes, scope, 0.4, rng), scope
    )


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_topk_unaligned(provider, run, scope):
    rng = np.random.default_rng(2)
    shapes = [(30, 150), (9,), (3, 2, 5)]
    for dtypes in ([torch.float32], [torch.bfloat16], [torch.float64, torch.float16]):
        scores = tensors(shapes, dtypes, "normal", rng, provider.device, aligned=False)
        base = tensors(shapes, [torch.bfloat16], "normal", rng, provider.device, aligned=False)
        k = counts(shapes, scope, 0.3, rng)
        check_topk(run, scores, [], k, scope)
        check_topk(run, scores, base, k, scope)


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_topk_many_tensors(provider, run, scope):
    rng = np.random.default_rng(3)
    shapes = (SHAPES[:9] * MANY)[:MANY]
    for kind in ("normal", "equal") if scope == "global" else ("few",):
        scores = tensors(shapes, FLOATS[:3], kind, rng, provider.device)
        check_topk(run, scores, [], counts(shapes, scope, None, rng), scope)


def test_topk_larger_than_the_grid(provider, run):
    """More tiles than the emulated device has warps, samples and candidates for several blocks."""
    rng = np.random.default_rng(4)
    shapes = [(1200, 768), (768,), (300, 500), (2, 70_000)]
    scores = tensors(shapes, [torch.float32], "normal", rng, provider.device)
    check_topk(run, scores, [], counts(shapes, "global", 0.05, rng), "global")
    check_topk(run, [s.bfloat16() for s in scores], [], counts(shapes, "tensor", 0.05, rng), "tensor")


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(torch.float32, 0.5), (torch.float32, 0.7), (torch.bfloat16, 0.5), (torch.bfloat16, 0.1), (torch.float64, 0.7)],
)
@pytest.mark.parametrize("distinct", [1, 2, 200])
def test_topk_heavy_ties(provider, run, request, distinct, dtype, share):
    """More ties at the threshold than a list of candidates takes: one key in the bracket, two, and too many to be sure."""
    rng = np.random.default_rng(5)
    shapes = [(40, 768), (9,), (20, 500)]
    n = 40 * 768 + 9 + 20 * 500
    x = rng.permutation(np.arange(n) % 2 if distinct == 2 else rng.integers(0, distinct, n)) + 1.0
    ends = np.cumsum([int(np.prod(s)) for s in shapes])[:-1]
    scores = [torch.from_numpy(p.reshape(s)).to(dtype).to(provider.device) for p, s in zip(np.split(x, ends), shapes)]
    check_topk(run, scores, [], [round(n * share)], "global")
    if provider.name == "emulated":
        restarted = any("restart_kernel" in launch.name for launch in request.getfixturevalue("emulated").launches)
        assert restarted or distinct == 200
        request.getfixturevalue("emulated").clear()
    if dtype == torch.float32:
        sizes = [int(np.prod(s)) for s in shapes]
        check_topk(run, scores, [torch.zeros_like(s) for s in scores], [round(m * share) for m in sizes], "tensor")


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_topk_when_the_sample_misleads(provider, run, request, scope):
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
    scores = [torch.from_numpy(x).to(torch.float32).to(provider.device)]
    before = (
        tensors([(2,)] * 299, [torch.float32], "normal", np.random.default_rng(7), provider.device)
        if scope == "tensor"
        else []
    )
    check_topk(run, before + scores, [], [1] * len(before) + [n // 2], scope)
    if provider.name == "emulated" and scope != "row":
        assert any("count_all_kernel" in launch.name for launch in request.getfixturevalue("emulated").launches)
        request.getfixturevalue("emulated").clear()


def test_topk_wide_rows(provider, run):
    rng = np.random.default_rng(7)
    shapes = [(2, 65_537), (3, 5), (1, 65_536), (70_000,)]
    scores = tensors(shapes, [torch.bfloat16], "normal", rng, provider.device)
    for scope in ("global", "tensor", "row"):
        check_topk(run, scores, [], counts(shapes, scope, 0.1, rng), scope)


def test_topk_difference_is_taken_in_the_wider_dtype(provider, run):
    """1 + 2^-12 - 1 is zero in bfloat16 and float16; float64 tells what float32 cannot."""
    for dtype, tiny in ((torch.float32, 2.0**-12), (torch.float64, 2.0**-40)):
        scores = [torch.tensor([1.0, 1 + tiny, 1.0, 1 - 2 * tiny], dtype=dtype, device=provider.device)]
        base = [torch.ones(4, dtype=torch.bfloat16, device=provider.device)]
        crow, col, _ = run.topk_mask(scores, base, [2], SCOPES["global"])
        assert (crow.tolist(), col.tolist()) == ([0, 2], [1, 3])


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda d: "+".join(str(x)[6:] for x in d))
def test_topk_names_the_first_score_that_is_not_finite(provider, run, dtypes, scope):
    rng = np.random.default_rng(8)
    shapes = [(), (0, 5), (20, 301), (3, 0), (9,), (2, 40)]
    places = [(0, 0), (2, TILE), (2, 20 * 301 - 1), (5, 79)]
    for i, (at, index) in enumerate(places):
        scores = tensors(shapes, dtypes, "normal", rng, provider.device)
        base = tensors(shapes, [torch.float32], "normal", rng, provider.device) if i % 2 else []
        for t, j in places[i:]:
            wrong = base if base and j % 2 else scores
            wrong[t].view(-1)[j] = [float("nan"), float("inf"), -float("inf")][(i + j) % 3]
        _, _, bad = run.topk_mask(scores, base, counts(shapes, scope, (0.0, 0.3, 1.0)[i % 3], rng), SCOPES[scope])
        assert bad.tolist() == [at, index]


def test_topk_infinite_difference(provider, run):
    """Finite tensors whose float32 difference is not."""
    a = torch.tensor([1.0, 3e38, 2.0], device=provider.device)
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


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["normal", "few", "bits"])
def test_histogram(provider, run, dtype, kind):
    rng = np.random.default_rng(9)
    shapes = [(70, 301), (), (0, 3), (9,), (1, TILE)]
    make = {"bits": lambda s: random_bits(s, dtype, rng, provider.device)}
    scores = [make.get(kind, lambda s: tensor(s, dtype, kind, rng, provider.device))(s) for s in shapes]
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


def test_histogram_larger_than_the_grid(provider, run):
    scores = tensors([(700, 768), (9,)], [torch.bfloat16], "normal", np.random.default_rng(10), provider.device)
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
def test_threshold(provider, run, dtype, kind):
    rng = np.random.default_rng(11)
    shapes = [(70, 301), (), (0, 3), (9,), (5, 0), (1, TILE), (20, 3)]
    make = {"bits": lambda s: random_bits(s, dtype, rng, provider.device)}
    scores = [make.get(kind, lambda s: tensor(s, dtype, kind, rng, provider.device))(s) for s in shapes]
    here = int(key_bits(scores[0])[77])
    highest = 2 ** (8 * dtype.itemsize - 1) - 1
    for threshold, most in ((here, 0), (here, 5000), (here, 10**12), (here + 1, 2), (0, 5000), (highest, 2)):
        if threshold <= highest:
            check_threshold(run, scores, threshold, [int(rng.integers(0, min(most, s.numel()) + 1)) for s in scores])


def test_threshold_many_tensors(provider, run):
    rng = np.random.default_rng(12)
    scores = tensors((SHAPES[:9] * MANY)[:MANY], [torch.bfloat16], "few", rng, provider.device)
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
def test_dense(provider, run, shapes, density):
    rng = np.random.default_rng(13)
    masks = [rng.random(matrix_shape(s)) < density for s in shapes]
    for aligned in (True, False):
        dense = []
        for m, s in zip(masks, shapes):
            flat = torch.zeros(m.size + (not aligned), dtype=torch.bool, device=provider.device)[not aligned :]
            dense.append(flat.copy_(torch.from_numpy(m.reshape(-1))).view(s))
        check_csr(*run.dense_to_csr(dense), masks, provider.device)


def test_dense_larger_than_the_grid(provider, run):
    mask = np.random.default_rng(14).random((1700, 768)) < 0.1
    check_csr(*run.dense_to_csr([torch.from_numpy(mask).to(provider.device)]), [mask], provider.device)


# ---- all of them ----


def test_threads_do_not_matter(provider, run):
    if provider.name != "c++":
        pytest.skip("about the CPU library's threads")
    rng = np.random.default_rng(15)
    shapes = [(300, 1000), (2, 30_000), (9,), (70_000, 1)]
    scores, base = (tensors(shapes, [torch.float32, torch.bfloat16], "few", rng) for _ in range(2))
    one_dtype = [s.to(torch.bfloat16) for s in scores]
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        try:
            found = [
                run.magnitude_histogram(one_dtype, 0, 0),
                *run.threshold_mask(one_dtype, 0x4000, [10_000, 5, 0, 70_000]),
            ]
            found += run.dense_to_csr([s > 1 for s in scores])
            for scope in ("global", "tensor", "row"):
                k = counts(shapes, scope, 0.1, rng)
                found += [*run.topk_mask(scores, [], k, SCOPES[scope]), *run.topk_mask(scores, base, k, SCOPES[scope])]
            results.append([f.numpy() for f in found])
        finally:
            torch.set_num_threads(before)
    for result in results[1:]:
        for one, other in zip(results[0], result):
            np.testing.assert_array_equal(one, other)


ONE, HUGE = 0x3F80_0000, 1 << 62  # the bits of 1.0; elements
WRONG = {
    "topk_mask: no tensors": ("topk_mask", lambda d: ([], [], [0], 0)),
    "topk_mask: integers": ("topk_mask", lambda d: ([torch.ones(4, dtype=torch.int32, device=d)], [], [1], 0)),
    "topk_mask: strided": ("topk_mask", lambda d: ([torch.ones(4, 6, device=d)[:, ::2]], [], [1], 0)),
    "topk_mask: strided base": (
        "topk_mask",
        lambda d: ([torch.ones(4, 3, device=d)], [torch.ones(4, 6, device=d)[:, ::2]], [1], 0),
    ),
    "topk_mask: k too large": ("topk_mask", lambda d: ([torch.ones(4, device=d)], [], [5], 0)),
    "topk_mask: k of a tensor too large": ("topk_mask", lambda d: ([torch.ones(2, 2, device=d)] * 2, [], [4, 5], 1)),
    "topk_mask: k of a row too large": ("topk_mask", lambda d: ([torch.ones(2, 2, device=d)], [], [3], 2)),
    "topk_mask: k times rows overflows": ("topk_mask", lambda d: ([torch.ones(4, 2, device=d)], [], [HUGE], 2)),
    "topk_mask: k negative": ("topk_mask", lambda d: ([torch.ones(4, device=d)], [], [-1], 1)),
    "topk_mask: k too short": ("topk_mask", lambda d: ([torch.ones(4, device=d)] * 2, [], [1], 1)),
    "topk_mask: k too long": ("topk_mask", lambda d: ([torch.ones(4, device=d)] * 2, [], [1, 1], 0)),
    "topk_mask: scope negative": ("topk_mask", lambda d: ([torch.ones(4, device=d)], [], [1], -1)),
    "topk_mask: scope unknown": ("topk_mask", lambda d: ([torch.ones(4, device=d)], [], [1], 3)),
    "topk_mask: base too small": (
        "topk_mask",
        lambda d: ([torch.ones(4, device=d)], [torch.ones(3, device=d)], [1], 0),
    ),
    "topk_mask: base too short": (
        "topk_mask",
        lambda d: ([torch.ones(4, device=d)] * 2, [torch.ones(4, device=d)], [1], 0),
    ),
    "topk_mask: rows overflow": ("topk_mask", lambda d: ([torch.ones(HUGE, 0, device=d)] * 4, [], [0], 0)),
    "topk_mask: rows beyond memory": ("topk_mask", lambda d: ([torch.ones(HUGE, 0, device=d)], [], [0], 2)),
    "magnitude_histogram: no tensors": ("magnitude_histogram", lambda d: ([], 0, 0)),
    "magnitude_histogram: two dtypes": (
        "magnitude_histogram",
        lambda d: ([torch.ones(4, device=d), torch.ones(4, device=d).half()], 0, 0),
    ),
    "magnitude_histogram: shift negative": ("magnitude_histogram", lambda d: ([torch.ones(4, device=d)], 0, -16)),
    "magnitude_histogram: shift too large": ("magnitude_histogram", lambda d: ([torch.ones(4, device=d)], 0, 32)),
    "magnitude_histogram: shift between": ("magnitude_histogram", lambda d: ([torch.ones(4, device=d)], 0, 8)),
    "magnitude_histogram: prefix negative": ("magnitude_histogram", lambda d: ([torch.ones(4, device=d)], -1, 0)),
    "magnitude_histogram: prefix too large": ("magnitude_histogram", lambda d: ([torch.ones(4, device=d)], 1 << 16, 0)),
    "magnitude_histogram: prefix of nothing": ("magnitude_histogram", lambda d: ([torch.ones(4, device=d)], 1, 16)),
    "threshold_mask: no tensors": ("threshold_mask", lambda d: ([], 3, [])),
    "threshold_mask: two dtypes": (
        "threshold_mask",
        lambda d: ([torch.ones(4, device=d), torch.ones(4, device=d).half()], 3, [1, 1]),
    ),
    "threshold_mask: ties too short": ("threshold_mask", lambda d: ([torch.ones(4, device=d)] * 2, 3, [1])),
    "threshold_mask: ties negative": (
        "threshold_mask",
        lambda d: ([torch.full((64, 64), 3.0, device=d)], ONE, [-4090]),
    ),
    "threshold_mask: ties lowest": ("threshold_mask", lambda d: ([torch.ones(4, device=d)] * 2, ONE, [0, -(2**63)])),
    "threshold_mask: ties too large": ("threshold_mask", lambda d: ([torch.ones(4, device=d)] * 2, ONE, [4, 5])),
    "threshold_mask: threshold negative": ("threshold_mask", lambda d: ([torch.ones(4, device=d)], -1, [0])),
    "threshold_mask: threshold too large": ("threshold_mask", lambda d: ([torch.ones(4, device=d)], 1 << 31, [0])),
    "threshold_mask: threshold of a wider dtype": (
        "threshold_mask",
        lambda d: ([torch.ones(4, device=d).half()], ONE, [0]),
    ),
    "dense_to_csr: no tensors": ("dense_to_csr", lambda d: ([],)),
    "dense_to_csr: floats": ("dense_to_csr", lambda d: ([torch.ones(4, device=d)],)),
    "dense_to_csr: strided": ("dense_to_csr", lambda d: ([torch.ones(4, 6, dtype=torch.bool, device=d)[:, ::2]],)),
    "dense_to_csr: rows overflow": ("dense_to_csr", lambda d: ([torch.ones(HUGE, 0, dtype=torch.bool, device=d)] * 4,)),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_raise(run, provider, wrong):
    op, arguments = WRONG[wrong]
    with pytest.raises((RuntimeError, ValueError)):
        getattr(run, op)(*arguments(provider.device))
