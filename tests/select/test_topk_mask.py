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
from deftx_kernels.select.streaming import StreamingTopK, by_rounds

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.sampled_from([(), (1,), (0,), (9,), (3, 5), (4, 0), (2, 3, 4)]), min_size=1, max_size=4)


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
        assert np.array_equal(
            dense[name].numpy().reshape(-1), oracle(vector(tensor), round(density * tensor.numel()))
        ), name
    dense = topk_mask(scores, density=density, scope="row").to_dense()
    for name, tensor in scores.items():
        rows = (
            vector(tensor).reshape(1 if tensor.dim() < 2 else tensor.shape[0], -1)
            if tensor.numel()
            else np.zeros((0, 0))
        )
        for got, row in zip(dense[name].numpy().reshape(rows.shape), rows):
            assert np.array_equal(got, oracle(row, round(density * len(row))))


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


def test_thread_count_does_not_matter():
    scores = {"a": torch.randn(300, 70).round(decimals=1), "b": torch.randn(501).round(decimals=1)}
    before = torch.get_num_threads()
    try:
        masks = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            masks.append(topk_mask(scores, density=0.1))
    finally:
        torch.set_num_threads(before)
    assert masks[0] == masks[1] == masks[2]


def test_mixed_dtypes_are_compared_exactly():
    scores = {
        "a": torch.tensor([1.0, 1.0 + 2**-20], dtype=torch.float32),
        "b": torch.tensor([1.0, 1.0078125], dtype=torch.bfloat16),
    }
    dense = topk_mask(scores, k=2).to_dense()
    assert dense["a"].tolist() == [False, True]
    assert dense["b"].tolist() == [False, True]


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
    with pytest.raises(ValueError, match="several devices"):
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distinct", [1, 3, 50])
def test_groups_with_ties(dtype, distinct):
    """The two ways over groups of tensors, where ties lie in several tensors and groups, and k falls on, before and
    after them.
    """
    generator = torch.Generator().manual_seed(distinct)
    scores = [
        torch.randint(1 - distinct, distinct, s, generator=generator).to(dtype)
        for s in [(5, 7), (9,), (0, 3), (4, 3, 2), (6, 6)]
    ]
    groups = [scores[:2], scores[2:4], scores[4:]]
    numel = sum(t.numel() for t in scores)
    for k in range(numel + 1):
        want = topk_mask({str(i): t for i, t in enumerate(scores)}, k=k)
        for crow, col in (
            streamed(groups, k, dtype),
            by_rounds(lambda: groups, k, torch.uint16, dtype, torch.device("cpu")),
        ):
            assert torch.equal(crow, want.crow_indices), k
            assert torch.equal(col.to(torch.int32), want.col_indices.to(torch.int32)), k


def streamed(groups, k, dtype):
    found = StreamingTopK(k, torch.uint16, dtype, torch.device("cpu"))
    for group in groups:
        found.add(group)
    return found.csr()


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers that are cut often, in pieces."""
    monkeypatch.setattr(streaming, "_LEAST_ROOM", 3)
    monkeypatch.setattr(streaming, "_PIECE", 5)


GROUPS = st.lists(
    st.lists(st.sampled_from([(), (1,), (0,), (9,), (3, 5), (4, 0), (2, 3, 4)]), min_size=1, max_size=3), max_size=12
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(GROUPS, st.integers(0, 999), st.sampled_from([torch.float32, torch.float64]), st.integers(1, 60), st.data())
def test_many_small_groups(small_buffers, groups, seed, dtype, distinct, data):
    """Of `distinct` magnitudes, 0 among them, in no order, ascending and descending: what is selected is that of all at
    once.
    """
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
    assert torch.equal(crow, want.crow_indices)
    assert torch.equal(col.to(torch.int32), want.col_indices.to(torch.int32))
    assert col.untyped_storage().nbytes() == 2 * k


def test_the_buffer_is_seldom_cut(monkeypatch):
    """Scores in no order: about 4 log(n / k) times, however many groups there are; ascending ones: once for k / 4 of
    them.
    """
    cuts, cut = [], StreamingTopK._cut
    monkeypatch.setattr(StreamingTopK, "_cut", lambda self, more: cuts.append(1) or cut(self, more))
    generator = torch.Generator().manual_seed(0)
    k, scores = 1 << 15, torch.rand(1 << 19, generator=generator)
    for groups in (512, 2048):
        cuts.clear()
        streamed([[part] for part in scores.chunk(groups)], k, torch.float32)
        assert len(cuts) <= 14  # 4 log(16) = 11
    cuts.clear()
    streamed([[part] for part in scores.sort().values.chunk(2048)], k, torch.float32)
    assert len(cuts) <= 4 * (1 << 19) / k + 1
    cuts.clear()
    # a tie with the k-th comes too late
    streamed([[part] for part in torch.ones(1 << 19).chunk(2048)], k, torch.float32)
    assert len(cuts) <= 2


def test_select_mask_differences_are_float32_or_better():
    tuned, base = models(torch.bfloat16)
    expected = topk_mask({n: tuned[n].float() - base[n].float() for n in base}, k=30)
    assert select_mask(tuned, base, k=30) == expected
    tuned, base = models(torch.float32, torch.float64)
    assert select_mask(tuned, base, k=30) == topk_mask({n: tuned[n] - base[n].double() for n in base}, k=30)


def test_select_mask_residual_density_one_is_lt_sft():
    tuned, base = models()
    assert select_mask(tuned, base, k=40, energy=0.9, residual_density=1.0) == select_mask(tuned, base, k=40)
    assert select_mask(tuned, base, k=40, rank=1, residual_density=1) == select_mask(tuned, base, k=40)


def test_select_mask_of_modules_and_names():
    torch.manual_seed(0)
    base, tuned = (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3)) for _ in range(2))
    mask = select_mask(tuned, base, density=0.5, names=["0.weight", "0.bias"])
    assert mask.names == ("0.bias", "0.weight")
    assert mask.nnz == 8
    calls = []
    select_mask(tuned, base, k=1, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (4, 4)


def test_select_mask_bad_arguments():
    tuned, base = models()
    with pytest.raises(ValueError, match="tuned lacks tensor 'l3.weight'"):
        select_mask({n: t for n, t in tuned.items() if n != "l3.weight"}, base, k=1)
    with pytest.raises(ValueError, match="base lacks tensor 'head'"):
        select_mask(tuned, base, k=1, names=["head"])
    with pytest.raises(ValueError, match="'l0.weight' has shape"):
        select_mask(tuned | {"l0.weight": torch.ones(2)}, base, k=1)
    with pytest.raises(ValueError, match="residual_density = 0.5 needs a rank or an energy"):
        select_mask(tuned, base, k=1, residual_density=0.5)
    with pytest.raises(ValueError, match="exactly one of rank and energy"):
        select_mask(tuned, base, k=1, rank=1, energy=0.5)
    with pytest.raises(ValueError, match="twice"):
        select_mask(tuned, base, k=1, names=["l0.weight", "l0.weight"])
    broken = tuned | {"l1.weight": torch.full((6, 8), float("nan"))}
    for rule in ({}, {"energy": 0.9}):
        with pytest.raises(ValueError, match=r"tuned\['l1.weight'\] - base\['l1.weight'\] holds nan at flat index 0"):
            select_mask(broken, base, k=1, **rule)


def test_empty_and_full_masks():
    scores = {"a": torch.randn(3, 4), "b": torch.empty(0, 2)}
    assert topk_mask(scores, k=0).nnz == 0
    assert topk_mask(scores, density=1.0) == CSRMask.from_dense(
        {"a": torch.ones(3, 4, dtype=torch.bool), "b": torch.ones(0, 2, dtype=torch.bool)}
    )


def available_bytes():
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


@pytest.mark.skipif(available_bytes() < 8e9, reason="needs 8 GB of free memory")
def test_more_than_two_to_the_31_scores():
    """Every row holds all finite magnitudes of bfloat16, ascending, so that the mask is known: each row's last columns."""
    columns = 0x7F80  # the bits of infinity
    rows = 2**31 // columns + 9
    scores = torch.arange(columns, dtype=torch.int16).repeat(rows, 1).view(torch.bfloat16)
    assert scores.numel() > 2**31
    mask = topk_mask(scores, k=100 * rows + 12_345)
    assert mask.nnz == 100 * rows + 12_345
    counts = mask.crow_indices.diff()
    assert bool((counts[:12_345] == 101).all())
    assert bool((counts[12_345:] == 100).all())
    col = mask.col_indices.to(torch.int32)
    assert torch.equal(
        col[: 101 * 12_345].view(-1, 101), torch.arange(columns - 101, columns, dtype=torch.int32).expand(12_345, -1)
    )
    assert torch.equal(
        col[101 * 12_345 :].view(-1, 100),
        torch.arange(columns - 100, columns, dtype=torch.int32).expand(rows - 12_345, -1),
    )


MEASURED_SELECTION = """
import sys, torch
from deftx_kernels import select_mask
generator = torch.Generator().manual_seed(0)
base = {f"{i:02}": torch.randn(256, 4096, generator=generator) for i in range(32)}
tuned = {n: t + t.roll(7) for n, t in base.items()}
few = dict(list(base.items())[:1])
rule = eval(sys.argv[1])
select_mask(few, {n: t + 1 for n, t in few.items()}, density=0.1, **rule)  # what libraries take the first time
def read(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
open("/proc/self/clear_refs", "w").write("5")  # VmHWM becomes VmRSS
before = read("VmRSS")
select_mask(tuned, base, density=float(sys.argv[2]), **rule)
print(1024 * (read("VmHWM") - before) / (4 * sum(t.numel() for t in base.values())))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells a process's peak memory")
@pytest.mark.parametrize(
    ("rule", "density"),
    [("{}", 0.5), ("dict(energy=0.5)", 0.05), ("dict(energy=0.5)", 0.5), ("dict(rank=8)", 0.13)],
)
def test_select_mask_needs_little_memory(rule, density):
    """0.3 of the model, the resulting mask included, and what the denoising of one tensor (1/32 of the model) needs."""
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # no holes in glibc's heap
    run = subprocess.run(
        [sys.executable, "-c", MEASURED_SELECTION, rule, str(density)], capture_output=True, text=True, env=exact
    )
    assert run.returncode == 0, run.stderr
    share = float(run.stdout)
    assert share <= 0.3 + (0 if rule == "{}" else 3 / 32)


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


def test_low_rank_mask_bad_arguments():
    weights, _ = models()
    with pytest.raises(TypeError, match="rank must be an int"):
        low_rank_mask(weights, rank=0.5, k=1)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        low_rank_mask(weights, rank=0, k=1)
    with pytest.raises(ValueError, match="exactly one of k and density"):
        low_rank_mask(weights, rank=1)
    with pytest.raises(TypeError, match=r"weights\['i'\] must be float32"):
        low_rank_mask(weights | {"i": torch.ones(2, 2, dtype=torch.int32)}, rank=1, k=1)
    with pytest.raises(ValueError, match=r"weights\['l1.weight'\] holds nan at flat index 0"):
        low_rank_mask(weights | {"l1.weight": torch.full((6, 8), float("nan"))}, rank=1, k=1)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux tells a process's peak memory")
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_low_rank_mask_needs_little_memory(scope):
    """The mask, 2 bytes for each of its entries, and what one tensor needs (1/32 of the model), not a second model."""
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    call = f'low_rank_mask(tuned, density=0.05, scope="{scope}", rank=8)'
    assert "select_mask(tuned, base, density=float(sys.argv[2]), **rule)" in MEASURED_SELECTION
    script = MEASURED_SELECTION.replace("select_mask(tuned, base, density=float(sys.argv[2]), **rule)", call)
    script = "from deftx_kernels.select import low_rank_mask" + script
    run = subprocess.run([sys.executable, "-c", script, "dict(rank=8)"], capture_output=True, text=True, env=exact)
    assert run.returncode == 0, run.stderr
    # or a score beside each column, and room for a quarter more
    mask = 0.05 * 2 / 4 * (1 if scope == "tensor" else 3.75)
    assert float(run.stdout) <= mask + 6 / 32
