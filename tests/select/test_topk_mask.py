"""topk_mask and select_mask against NumPy: exactly k entries, ties by position, every dtype and scope."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deftx_kernels import CSRMask, select_mask, svd_denoise, topk_mask
from deftx_kernels.select import low_rank_mask, streaming
from deftx_kernels.select.streaming import StreamingTopK, topk_in_passes
from tests.operators import matrix_shape

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPE = st.sampled_from([(), (1,), (0,), (9,), (3, 5), (4, 0), (2, 3, 4)])
SHAPES = st.lists(SHAPE, min_size=1, max_size=4)


def oracle(vector, k):
    """bool [n]: the k largest |x|, ties to the smaller index."""
    order = np.lexsort((np.arange(len(vector)), -np.abs(vector)))
    chosen = np.zeros(len(vector), bool)
    chosen[order[:k]] = True
    return chosen


def vector(tensor):
    return tensor.detach().double().numpy().reshape(-1)


def random_scores(shapes, seed, dtype, tied):
    generator = torch.Generator().manual_seed(seed)
    scores = {f"t{i}": torch.randn(s, generator=generator) for i, s in enumerate(shapes)}
    return {n: ((t * 2).round() if tied else t).to(dtype) for n, t in scores.items()}


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.integers(0, 999), st.sampled_from(DTYPES), st.booleans(), st.floats(0, 1), st.booleans())
def test_global_scope(shapes, seed, dtype, tied, share, strided):
    scores = random_scores(shapes, seed, dtype, tied)
    if strided:
        scores = {n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in scores.items()}
    everything = np.concatenate([vector(scores[n]) for n in sorted(scores)])
    k = int(share * len(everything))
    mask = topk_mask(scores, k=k)
    assert mask.nnz == k
    dense = mask.to_dense()
    assert np.array_equal(np.concatenate([dense[n].numpy().reshape(-1) for n in sorted(dense)]), oracle(everything, k))


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 999), st.sampled_from(DTYPES), st.booleans(), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_tensor_and_row_scope(shapes, seed, dtype, tied, density):
    scores = random_scores(shapes, seed, dtype, tied)
    dense = topk_mask(scores, density=density, scope="tensor").to_dense()
    for name, tensor in scores.items():
        expected = oracle(vector(tensor), round(density * tensor.numel()))
        assert np.array_equal(dense[name].numpy().reshape(-1), expected), name
    dense = topk_mask(scores, density=density, scope="row").to_dense()
    for name, tensor in scores.items():
        rows, columns = matrix_shape(tensor.shape)
        for got, row in zip(dense[name].view(rows, columns).numpy(), vector(tensor).reshape(rows, columns)):
            assert np.array_equal(got, oracle(row, round(density * columns)))


def test_all_equal_scores_still_give_exactly_k():
    """composable-sft's `>=` threshold selects every tie."""
    scores = {"a": torch.ones(10), "b": -torch.ones(10)}
    mask = topk_mask(scores, k=13)
    assert mask.to_dense()["a"].all()
    assert mask.to_dense()["b"].nonzero().view(-1).tolist() == [0, 1, 2]


def test_largest_is_largest():
    """LIFT's released configuration selects the smallest."""
    assert topk_mask(torch.tensor([0.1, -5.0, 3.0, 0.2]), k=2).col_indices.tolist() == [1, 2]
    assert topk_mask(torch.tensor([0.1, -5.0, 3.0, 0.2]), k=2).names == ("tensor",)


def test_subnormals_signed_zeros_and_extremes():
    scores = torch.tensor([-0.0, 1e-45, -3e38, 0.0, 2e-45])
    assert topk_mask(scores, k=3).col_indices.tolist() == [1, 2, 4]
    assert topk_mask(scores, k=4).col_indices.tolist() == [0, 1, 2, 4]


def test_mixed_dtypes_are_compared_exactly():
    scores = {"a": torch.tensor([1.0, 1.0 + 2**-20]), "b": torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16)}
    assert [t.tolist() for t in topk_mask(scores, k=2).to_dense().values()] == [[False, True], [False, True]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
def test_scores_that_are_not_finite_are_named(bad, dtype, scope):
    scores = {"fine": torch.ones(3, dtype=dtype), "weight": torch.ones(2, 4, dtype=dtype)}
    scores["weight"][1, 2] = bad
    with pytest.raises(ValueError, match=r"scores\['weight'\] holds .* at flat index 6"):
        topk_mask(scores, k=1, scope=scope)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(k=-1), ValueError, "k must be at least 0"),
        (dict(k=7), ValueError, "k = 7 is more than the 6 entries"),
        (dict(k=4, scope="row"), ValueError, "each row of tensor 'w'"),
        (dict(), ValueError, "exactly one of k and density"),
        (dict(k=1, density=0.1), ValueError, "exactly one of k and density"),
        (dict(density=1.5), ValueError, r"density must be in \[0, 1\]"),
        (dict(density=float("nan")), ValueError, r"density must be in \[0, 1\]"),
        (dict(k=1.0), TypeError, "k must be an int"),
        (dict(k=True), TypeError, "k must be an int"),
        (dict(k=1, scope="layer"), ValueError, "scope must be one of"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        topk_mask({"w": torch.ones(2, 3)}, **arguments)


def test_bad_scores():
    with pytest.raises(TypeError, match=r"scores\['w'\] must be float32"):
        topk_mask({"w": torch.ones(3, dtype=torch.int32)}, k=1)
    with pytest.raises(TypeError, match="must be a tensor or a mapping"):
        topk_mask([torch.ones(3)], k=1)
    with pytest.raises(ValueError, match=r"scores\['b'\] is on meta, scores\['a'\] on cpu: one device"):
        topk_mask({"a": torch.ones(3), "b": torch.ones(3, device="meta")}, k=1)


# ---- select_mask ----


def models(dtype=torch.float32, tuned_dtype=None):
    generator = torch.Generator().manual_seed(0)
    base = {
        f"l{i}.weight": torch.randn(s, generator=generator, dtype=torch.float32)
        for i, s in enumerate([(8, 6), (6, 8), (30, 4), (5,), (2, 3, 4)])
    }
    tuned = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()}
    return {n: t.to(tuned_dtype or dtype) for n, t in tuned.items()}, {n: t.to(dtype) for n, t in base.items()}


@pytest.mark.parametrize("scope", ["global", "tensor", "row"])
@pytest.mark.parametrize(
    "rule", [{}, {"rank": 2}, {"energy": 0.8}, {"rank": "gavish-donoho"}, {"energy": 0.5, "residual_density": 0.2}]
)
@pytest.mark.parametrize("density", [0.0, 0.07, 0.6, 1.0])
def test_select_mask_equals_denoise_then_topk(scope, rule, density):
    tuned, base = models()
    delta = {n: tuned[n] - base[n] for n in base}
    expected = topk_mask(svd_denoise(delta, **rule) if rule else delta, density=density, scope=scope)
    assert select_mask(tuned, base, density=density, scope=scope, **rule) == expected


def test_select_mask_with_ties_across_groups():
    base = {f"t{i}": torch.zeros(4, 4) for i in range(6)}
    tuned = {n: torch.ones(4, 4) for n in base}
    mask = select_mask(tuned, base, k=37)
    assert [s["nnz"] for s in mask.summary().values()] == [16, 16, 5, 0, 0, 0]
    assert mask["t2"].to_dense()["t2"].view(-1).nonzero().view(-1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("distinct", "dtype"), [(1, torch.float32), (3, torch.float32), (3, torch.float64), (50, torch.float32)]
)
def test_groups_with_ties(distinct, dtype):
    """Both algorithms over groups of tensors: ties in several tensors and groups; k at, before and after them."""
    generator = torch.Generator().manual_seed(distinct)
    scores = [
        torch.randint(1 - distinct, distinct, s, generator=generator).to(dtype)
        for s in [(3, 5), (4,), (0, 3), (2, 3, 2), (4, 4)]
    ]
    groups = [scores[:2], scores[2:4], scores[4:]]
    numel = sum(t.numel() for t in scores)
    for k in range(numel + 1):
        want = topk_mask({str(i): t for i, t in enumerate(scores)}, k=k)
        in_passes = topk_in_passes(lambda: groups, k, torch.uint16, dtype, torch.device("cpu"))
        for indices in (streamed(groups, k, dtype), in_passes):
            assert CSRMask(want.names, want.shapes, *indices) == want, k


def streamed(groups, k, dtype):
    found = StreamingTopK(k, torch.uint16, dtype, torch.device("cpu"))
    for group in groups:
        found.add(group)
    return found.csr()


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers that are reduced often, in chunks."""
    monkeypatch.setattr(streaming, "_MIN_ROOM", 3)
    monkeypatch.setattr(streaming, "_CHUNK", 5)


GROUPS = st.lists(st.lists(SHAPE, min_size=1, max_size=3), max_size=12)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(GROUPS, st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 60), st.data())
def test_many_small_groups(small_buffers, groups, seed, dtype, distinct, data):
    """The selection from all at once: `distinct` magnitudes, 0 among them, in random, ascending or descending order."""
    generator = torch.Generator().manual_seed(seed)
    groups = [[(0,)], *groups]  # a group without elements
    sizes = [math.prod(s) for group in groups for s in group]
    scores = torch.randint(1 - distinct, distinct, (sum(sizes),), generator=generator).to(dtype)
    order = data.draw(st.sampled_from(["none", "ascending", "descending"]))
    if order != "none":
        scores = scores[scores.abs().argsort(descending=order == "descending")]
    parts = iter(scores.split(sizes))
    groups = [[next(parts).clone().view(s) for s in group] for group in groups]
    k = data.draw(st.integers(0, len(scores)))
    flat = [t for group in groups for t in group]
    want = topk_mask({f"{i:03}": t for i, t in enumerate(flat)}, k=k)
    crow, col = streamed(groups, k, dtype)
    assert CSRMask(want.names, want.shapes, crow, col) == want
    assert col.untyped_storage().nbytes() == 2 * k


def test_the_buffer_is_seldom_reduced(monkeypatch):
    """Random order: about 4 log(n / k) times, however many groups there are; ascending order: once per k / 4 scores."""
    calls, reduce = [], StreamingTopK._reduce
    monkeypatch.setattr(StreamingTopK, "_reduce", lambda self, more: calls.append(1) or reduce(self, more))
    generator = torch.Generator().manual_seed(0)
    k, scores = 1 << 14, torch.rand(1 << 18, generator=generator)
    for groups in (256, 1024):
        calls.clear()
        streamed([[part] for part in scores.chunk(groups)], k, torch.float32)
        assert len(calls) <= 14  # 4 log(16) = 11
    calls.clear()
    streamed([[part] for part in scores.sort().values.chunk(1024)], k, torch.float32)
    assert len(calls) <= 4 * (1 << 18) / k + 1
    calls.clear()
    # later ties with the k-th are not selected
    streamed([[part] for part in torch.ones(1 << 18).chunk(1024)], k, torch.float32)
    assert len(calls) <= 2


def test_select_mask_differences_are_float32_or_better():
    tuned, base = models(torch.bfloat16)
    expected = topk_mask({n: tuned[n].float() - base[n].float() for n in base}, k=30)
    assert select_mask(tuned, base, k=30) == expected
    tuned, base = models(torch.float32, torch.float64)
    assert select_mask(tuned, base, k=30) == topk_mask({n: tuned[n] - base[n].double() for n in base}, k=30)


def test_select_mask_residual_density_one_is_lt_sft():
    tuned, base = models()
    for rule in ({"energy": 0.9}, {"rank": 1}):
        assert select_mask(tuned, base, k=40, residual_density=1, **rule) == select_mask(tuned, base, k=40)


def test_select_mask_of_modules_and_names():
    torch.manual_seed(0)
    base, tuned = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)) for _ in range(2))
    mask = select_mask(tuned, base, density=0.5, names=["0.weight", "0.bias"])
    assert mask.names == ("0.bias", "0.weight")
    assert mask.nnz == 8
    calls = []
    select_mask(tuned, base, k=1, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (4, 4)


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({"l3.weight": None}, {}, "tuned lacks tensor 'l3.weight'"),
        ({}, {"names": ["head"]}, "base lacks tensor 'head'"),
        ({"l0.weight": torch.ones(2)}, {}, "'l0.weight' has shape"),
        ({}, {"residual_density": 0.5}, "residual_density = 0.5 needs a rank or an energy"),
        ({}, {"rank": 1, "energy": 0.5}, "exactly one of rank and energy"),
        ({}, {"names": ["l0.weight", "l0.weight"]}, "twice"),
        (
            {"l1.weight": torch.full((6, 8), math.nan)},
            {},
            r"tuned\['l1.weight'\] - base\['l1.weight'\] holds nan at flat index 0",
        ),
        (
            {"l1.weight": torch.full((6, 8), math.nan)},
            {"energy": 0.9},
            r"tuned\['l1.weight'\] - .* holds nan at flat index 0",
        ),
    ],
)
def test_select_mask_bad_arguments(changed, arguments, message):
    tuned, base = models()
    tuned = {n: t for n, t in (tuned | changed).items() if t is not None}
    with pytest.raises(ValueError, match=message):
        select_mask(tuned, base, k=1, **arguments)


def test_empty_and_full_masks():
    scores = {"a": torch.randn(3, 4), "b": torch.empty(0, 2)}
    assert topk_mask(scores, k=0).nnz == 0
    full = CSRMask.from_dense({n: torch.ones_like(t, dtype=torch.bool) for n, t in scores.items()})
    assert topk_mask(scores, density=1.0) == full


def available_bytes():
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


@pytest.mark.skipif(available_bytes() < 8e9, reason="needs 8 GB of free memory")
def test_more_than_two_to_the_31_scores():
    """Rows of all finite magnitudes of bfloat16, ascending, so the mask is known: the last columns of each row."""
    columns = 0x7F80  # the bits of infinity
    rows = 2**31 // columns + 9
    scores = torch.arange(columns, dtype=torch.int16).repeat(rows, 1).view(torch.bfloat16)
    assert scores.numel() > 2**31
    mask = topk_mask(scores, k=100 * rows + 12_345)
    counts = torch.full((rows,), 100)
    counts[:12_345] += 1
    assert torch.equal(mask.crow_indices.diff(), counts)
    col = mask.col_indices.to(torch.int32).split([101 * 12_345, mask.nnz - 101 * 12_345])
    for part, n in zip(col, (101, 100)):
        part = part.view(-1, n)
        assert torch.equal(part, torch.arange(columns - n, columns, dtype=torch.int32).expand_as(part))


ONE = 1 / 32  # of the model: a tensor
MOST_MEMORY = {  # as a fraction of the model: the resulting mask included, and what the denoising of one tensor needs
    "select_mask(tuned, base, density=0.5)": 0.3,
    "select_mask(tuned, base, density=0.05, energy=0.5)": 0.3 + 3 * ONE,
    "select_mask(tuned, base, density=0.5, energy=0.5)": 0.3 + 3 * ONE,
    "select_mask(tuned, base, density=0.13, rank=8)": 0.3 + 3 * ONE,
    # the mask: 2 bytes for each of its entries
    "low_rank_mask(tuned, density=0.05, scope='tensor', rank=8)": 0.05 * 2 / 4 + 6 * ONE,
    # a score beside each column, and room for a quarter more
    "low_rank_mask(tuned, density=0.05, scope='global', rank=8)": 0.05 * 2 / 4 * 3.75 + 6 * ONE,
}
MEASURE_MEMORY = """
import os, sys, torch
from deftx_kernels.select import low_rank_mask, select_mask
generator = torch.Generator().manual_seed(0)
base = {f"{i:02}": torch.randn(128, 4096, generator=generator) for i in range(32)}
tuned = {n: t + t.roll(7) for n, t in base.items()}
few = dict(list(base.items())[:1])
def read(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
for call in sys.argv[1:]:
    if not os.fork():  # each call in a process of its own
        for rule in ({}, {"energy": 0.5}, {"rank": 8}):  # memory that libraries keep, and their own pages
            select_mask(few, {n: t + 1 for n, t in few.items()}, density=0.1, **rule)
        open("/proc/self/clear_refs", "w").write("5")  # VmHWM becomes VmRSS
        before = read("VmRSS")
        eval(call)
        print(1024 * (read("VmHWM") - before) / (4 * sum(t.numel() for t in base.values())), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0, call
"""


@pytest.fixture(scope="module")
def measured_memory():
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # no holes in glibc's heap
    command = [sys.executable, "-c", MEASURE_MEMORY, *MOST_MEMORY]
    run = subprocess.run(command, capture_output=True, text=True, env=exact)
    assert run.returncode == 0, run.stderr
    return dict(zip(MOST_MEMORY, map(float, run.stdout.split())))


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux reports a process's peak memory"
)
@pytest.mark.parametrize("call", MOST_MEMORY)
def test_selection_needs_little_memory(measured_memory, call):
    assert 0 < measured_memory[call] <= MOST_MEMORY[call]


# ---- LIFT's selection ----


@pytest.mark.parametrize(
    "arguments", [dict(density=0.07), dict(density=0.3, scope="row"), dict(k=50, scope="global"), dict(k=0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_low_rank_mask_equals_denoise_then_topk(arguments, dtype):
    weights, _ = models(dtype)
    weights["l2.weight"] = weights["l2.weight"].t()  # not contiguous
    low, info = svd_denoise(weights, rank=2, return_info=True)
    before = {n: t.clone() for n, t in weights.items()}
    calls = []
    mask, found = low_rank_mask(weights, rank=2, return_info=True, progress=lambda *x: calls.append(x), **arguments)
    assert mask == topk_mask(low, **({"scope": "tensor"} | arguments))
    assert all(torch.equal(weights[n], before[n]) for n in weights)
    assert found["l3.weight"] is None
    assert all(torch.allclose(found[n][key], x) for n, of in info.items() if of for key, x in of.items())
    assert (calls[0], calls[-1]) == ((0, 5), (5, 5))


def test_low_rank_mask_of_16_bit_weights_compares_in_float32():
    weights, _ = models(torch.bfloat16)
    assert low_rank_mask(weights, rank=2, density=0.2) == low_rank_mask(
        {n: t.float() for n, t in weights.items()}, rank=2, density=0.2
    )


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({}, {"rank": 0.5}, "rank must be an int"),
        ({}, {"rank": 0}, "rank must be at least 1"),
        ({}, {"k": None}, "exactly one of k and density"),
        ({"i": torch.ones(2, 2, dtype=torch.int32)}, {}, r"weights\['i'\] must be float32"),
        ({"l1.weight": torch.full((6, 8), math.nan)}, {}, r"weights\['l1.weight'\] holds nan at flat index 0"),
    ],
)
def test_low_rank_mask_bad_arguments(changed, arguments, message):
    weights, _ = models()
    with pytest.raises((TypeError, ValueError), match=message):
        low_rank_mask(weights | changed, **({"rank": 1, "k": 1} | arguments))
