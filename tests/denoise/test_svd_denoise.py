"""svd_denoise against float64 numpy.linalg.svd: its rules, structures, dtypes and accuracy promises."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deftx_kernels import select_mask, svd_denoise, topk_mask
from deftx_kernels.denoise import batches, plans, subspace
from tests.denoise import oracle
from tests.denoise.oracle import (
    SHAPES,
    SMALL_SPECTRA,
    SPECTRA,
    assert_exact_truncation,
    assert_near_optimal,
    distance,
    matrix,
    noise,
    with_singular_values,
)
from tests.denoise.test_truncated_svd import SMALL_SHAPES

DTYPES = [torch.float32, torch.float64]


# ---- a fixed rank ----
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SHAPES),
    st.sampled_from(list(SPECTRA)),
    st.integers(1, 48),
    st.integers(0, 99),
    st.sampled_from(DTYPES),
    st.integers(0, 3),
    st.sampled_from([0, 4, 16]),
)
@example((160, 160), "step at the rank", 23, 0, torch.float32, 0, 4)
@example((400, 150), "step at the rank", 24, 3, torch.float32, 0, 8)
@example((300, 300), "steps", 59, 3, torch.float32, 0, 12)
@example((300, 300), "steps", 59, 2, torch.float32, 0, 15)
@example((160, 160), "steep", 36, 0, torch.float64, 0, 4)
@example((130, 390), "steep", 16, 0, torch.float64, 0, 0)
@example((130, 390), "steep", 48, 0, torch.float64, 0, 4)
def test_residual_of_a_fixed_rank_is_within_two_percent_of_the_best(
    shape, spectrum, rank, seed, dtype, n_iter, oversample
):
    a = matrix(shape, spectrum, seed, dtype)
    result, info = svd_denoise(a, rank=rank, n_iter=n_iter, oversample=oversample, return_info=True)
    assert_near_optimal(a, result, rank, 3e-6 if dtype == torch.float32 else 1e-9)
    assert int(info["rank"]) == rank
    lost = distance(a, result) / float(a.double().norm())
    assert float(info["residual"]) == pytest.approx(lost, abs=1e-3 if spectrum in ("steep", "deficient") else 1e-5)
    assert float(info["energy"]) == pytest.approx(1 - lost**2, abs=1e-6)


@pytest.mark.parametrize("step", [1.15, 1.2, 1.25])
def test_a_step_of_the_spectrum_at_a_rank_that_is_not_small(step):
    """The second iteration gains little there, and its residual is still 1.02 to 1.024 of the best."""
    n, rank = 384, 64
    i = torch.arange(n, dtype=torch.float64)
    a = with_singular_values((n, n), torch.where(i < rank, step, 1.0) * (1 - 1e-4 * i / n)).float()
    assert_near_optimal(a, svd_denoise(a, rank=rank), rank)


def test_more_iterations_where_the_residual_is_not_yet_near(monkeypatch):
    """A step just above the noise hides from the first iterations; without oversampling two of them are too few."""
    a = torch.stack([matrix((300, 300), "noise", 3), matrix((300, 300), "steep", 3)])
    calls = []
    orthonormal = subspace.orthonormal_rows
    monkeypatch.setattr(subspace, "orthonormal_rows", lambda z: (calls.append(len(z)), orthonormal(z))[1])
    result = svd_denoise(a, rank=45, oversample=0, n_iter=0)
    assert calls[:2] == [2, 2]
    assert len(calls) > 3
    assert calls[-1] == 1, "the steep one is finished before the noise"
    for i in range(2):
        assert_near_optimal(a[i], result[i], 45)


@pytest.mark.parametrize(
    ("n", "rank", "second", "rest"),
    [
        (64, 20, 1e-3, 1e-6),
        (256, 100, 1e-2, 1e-6),
        (128, 25, 1e-2, 1e-6),
        (256, 50, 1e-2, 2e-7),
        (256, 100, 1e-2, 1e-5),
        (64, 20, 1e-2, 1e-5),
        (256, 100, 1e-2, 1e-4),
        (256, 100, 1e-3, 1e-4),
        (256, 100, 1e-2, 1e-3),
    ],
)
def test_a_given_rank_of_a_matrix_that_is_almost_of_that_rank(n, rank, second, rest):
    """Errors of float32 eigenvectors, small beside the matrix, are as large as what is left of it."""
    singular = torch.full((n,), rest, dtype=torch.float64)
    singular[:rank], singular[0] = second, 1
    w = with_singular_values((n, n), singular).float()
    result, info = svd_denoise(w, rank=rank, return_info=True)
    left = distance(w, result)
    assert left <= 1.02 * float(torch.linalg.svdvals(w.double())[rank:].norm())
    assert float(info["residual"]) == pytest.approx(left / float(w.double().norm()), rel=2e-3)


@pytest.mark.parametrize(
    ("shape", "rank", "spikes"),
    [
        ((384, 384), 64, 0),
        ((384, 384), 64, 20),
        ((384, 384), 128, 3),
        ((768, 768), 256, 0),
        ((768, 768), 256, 20),
        ((1024, 256), 80, 0),
    ],
)
def test_a_rank_that_is_a_large_share_is_exact(shape, rank, spikes):
    """Noise is the hard case: subspace iteration found 70 to 86 % of the largest 5 % of the entries there."""
    a = noise(*shape, seed=rank)
    a += spikes * noise(shape[0], 20, seed=1) @ noise(20, shape[1], seed=2)
    result, exact = svd_denoise(a, rank=rank), oracle.svd_denoise(a, rank=rank).result
    assert distance(result, exact) < 1e-3 * float(exact.norm())
    k = round(0.05 * a.numel())
    same = torch.zeros(a.numel(), dtype=torch.int64)
    for scores in (result, exact):
        same[scores.abs().view(-1).topk(k).indices] += 1
    assert int((same == 2).sum()) >= 0.999 * k


# ---- an energy, or a threshold ----
@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*SHAPES, (40, 40), (90, 30)]),
    st.sampled_from([s for s in SPECTRA if s not in ("flat", "deficient")]),
    st.floats(0.02, 0.9999),
    st.integers(0, 99),
    st.sampled_from(DTYPES),
)
def test_energy_gives_the_rank_and_the_truncation_of_exact_arithmetic(shape, spectrum, energy, seed, dtype):
    a = matrix(shape, spectrum, seed, dtype)
    assert_exact_truncation(a, *svd_denoise(a, energy=energy, return_info=True), energy)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(SMALL_SHAPES),
    st.sampled_from(list(SMALL_SPECTRA)),
    st.floats(0.05, 0.999),
    st.integers(0, 99),
    st.sampled_from(DTYPES),
)
def test_energy_of_small_matrices(shape, spectrum, energy, seed, dtype):
    a = matrix(shape, spectrum, seed, dtype)
    result, info = svd_denoise(a, energy=energy, return_info=True)
    want, got = oracle.svd_denoise(a, energy=energy), int(info["rank"])
    if got != want.rank:  # a share that meets the energy to rounding may fall on either side
        assert abs(got - want.rank) == 1
        assert oracle.svd_denoise(a, rank=min(got, want.rank)).energy == pytest.approx(energy, abs=1e-6)
        want = oracle.svd_denoise(a, rank=got)
    assert result.dtype == dtype
    if spectrum != "flat":  # of equal singular values any subspace is right
        assert distance(result, want.result) <= 5e-5 * float(a.double().norm())
    assert float(info["energy"]) == pytest.approx(want.energy, abs=1e-6)


@pytest.mark.parametrize("strength", [1, 30, 1000])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.9999, 0.9999999])
def test_directions_far_above_the_noise(strength, energy):
    """The Gram matrix has their squares: float32 cannot tell the directions of the noise apart, float64 is needed."""
    w = matrix((320, 260), "noise", 4)
    a = w + strength * w[:, :6] @ w[:6] / 16
    assert_exact_truncation(a, *svd_denoise(a, energy=energy, return_info=True), energy)


@pytest.mark.parametrize("spectrum", ["noise", "deficient", "steep"])
def test_all_energy_is_all_of_the_matrix(spectrum):
    a = matrix((160, 160), spectrum, 5)
    result, info = svd_denoise(a, energy=1.0, return_info=True)
    torch.testing.assert_close(result, a, atol=1e-6, rtol=1e-5)
    assert float(info["residual"]) < 1e-6
    if spectrum == "deficient":
        low = matrix((160, 160), spectrum, 5, torch.float64)
        assert int(svd_denoise(low, energy=1.0, return_info=True)[1]["rank"]) == 30


@pytest.mark.parametrize("energy", [1.0, 1 - 1e-15, 1 - 2e-14])
@pytest.mark.parametrize("n", [64, 256])
def test_float64_directions_that_a_gram_matrix_does_not_know(n, energy):
    singular = torch.full((n,), 1e-7, dtype=torch.float64)
    singular[:5] = 1
    w = with_singular_values((n, n), singular)
    result, info = svd_denoise(w, energy=energy, return_info=True)
    left = distance(w, result) / float(w.norm())
    assert left <= 1.2 * (1 - energy) ** 0.5 + 1e-14
    assert float(info["residual"]) == pytest.approx(left, rel=1e-2, abs=1e-14)
    base, update = noise(n, n, seed=1) * 0.05, 0.005 * noise(n, 8, seed=2) @ noise(8, n, seed=3)
    delta = (base + update).double() - base.double()  # rounded to float32 as a tuned model is
    assert distance(svd_denoise(delta, energy=energy), delta) < 1e-6 * float(delta.norm())


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
def test_gavish_donoho_rank(shape):
    """The threshold is known in closed form for square matrices: 2.858 times the median singular value."""
    signal = 8 * matrix(shape, "low rank", 1, torch.float64) * math.sqrt(shape[0])
    noisy = signal + 0.05 * noise(*shape, dtype=torch.float64)
    _, info = svd_denoise(noisy, rank="gavish-donoho", return_info=True)
    _, s, _ = oracle.svd(noisy)
    if shape[0] == shape[1]:
        assert int(info["rank"]) == int((s > 2.858 * torch.quantile(s, 0.5)).sum())
    assert int(info["rank"]) == min(shape) // 4
    _, info = svd_denoise(noise(*shape, seed=1), rank="gavish-donoho", return_info=True)
    assert int(info["rank"]) == 0


# ---- the residual ----
@pytest.mark.parametrize("rule", [{"rank": 8}, {"rank": 100}, {"energy": 0.99}, {"energy": 1.0}, {"rank": 12}], ids=str)
@pytest.mark.parametrize("strength", [0.0, 1e-4, 1e-2])
def test_the_reported_residual_is_that_of_the_result(rule, strength):
    w = noise(300, 8, seed=4) @ noise(8, 200, seed=5) + strength * noise(300, 200, seed=6)
    kept = w.clone()
    result, info = svd_denoise(w, return_info=True, **rule)
    assert torch.equal(w, kept)
    left = distance(w, result) / float(w.double().norm())
    assert float(info["residual"]) == pytest.approx(left, rel=5e-3, abs=1e-9)


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.6}])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.5])
def test_residual_keeps_the_largest_entries_of_h(rule, density):
    a = matrix((20, 16), "decaying", 2, torch.float64)
    low = svd_denoise(a, **rule)
    result = svd_denoise(a, residual_density=density, **rule)
    h = (a - low).view(-1)
    kept = (result - low).view(-1) != 0
    assert int(kept.sum()) == round(density * a.numel())
    torch.testing.assert_close(result.view(-1)[kept], a.view(-1)[kept], rtol=0, atol=0)
    if density:
        assert float(h[kept].abs().min()) >= float(h[~kept].abs().max())


def test_residual_density_one_is_the_difference_itself():
    a = torch.randn(3, 20, 16)
    assert torch.equal(svd_denoise(a, residual_density=1, rank=2), a)
    result, info = svd_denoise(a, residual_density=1, energy=0.5, return_info=True)
    assert torch.equal(result, a)
    assert info["rank"].shape == (3,)
    assert not info["residual"].any()


# ---- whole models ----
def model(dtype=torch.float32):
    generator = torch.Generator().manual_seed(6)
    shapes = {
        "a": (90, 60),
        "b": (60, 90),
        "c": (90, 60),
        "bias": (60,),
        "conv": (4, 3, 40, 50),
        "d": (90, 60),
        "row": (1, 70),
    }
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


@pytest.mark.parametrize("rule", [{"rank": 5}, {"energy": 0.8}, {"rank": "gavish-donoho"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_matrix_as_if_it_were_alone(rule, dtype):
    delta = model(dtype)
    kept = {n: t.clone() for n, t in delta.items()}
    calls = []
    result, info = svd_denoise(
        delta, residual_density=0.1, return_info=True, batch_bytes=1 << 20, progress=lambda *a: calls.append(a), **rule
    )
    assert all(torch.equal(delta[n], kept[n]) for n in delta), "the argument is left as it was"
    assert (calls[0], calls[-1]) == ((0, 17), (17, 17))
    assert sorted(calls) == calls
    for name, tensor in delta.items():
        if tensor.dim() < 2:
            continue
        alone, its_info = svd_denoise(tensor, residual_density=0.1, return_info=True, batch_bytes=1, **rule)
        torch.testing.assert_close(result[name], alone)
        for key in ("rank", "energy", "residual"):
            assert info[name][key].shape == tensor.shape[:-2]
            torch.testing.assert_close(info[name][key], its_info[key])
        exact = tensor.double()
        lost = torch.linalg.matrix_norm(exact - result[name].double()) / torch.linalg.matrix_norm(exact)
        torch.testing.assert_close(info[name]["residual"], lost, atol=5e-3 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_structures_dtypes_and_vectors():
    a, v = torch.randn(6, 5, dtype=torch.bfloat16), torch.randn(4)
    result, info = svd_denoise({"a": a, "v": v}, rank=2, return_info=True)
    assert list(result) == ["a", "v"]
    assert result["a"].dtype == torch.bfloat16
    assert torch.equal(result["v"], v)
    assert result["v"] is not v
    assert info["v"] is None
    assert int(info["a"]["rank"]) == 2
    exact = oracle.svd_denoise(a, rank=2).result
    assert distance(result["a"], exact) < 2**-8 * float(exact.norm())
    assert isinstance(svd_denoise([a, v], rank=2), list)
    assert isinstance(svd_denoise((a, v), rank=2), tuple)
    assert svd_denoise(torch.randn(2, 3, 6, 5), rank=99).shape == (2, 3, 6, 5)
    batch = torch.randn(2, 30, 20)
    for i in range(2):
        torch.testing.assert_close(svd_denoise(batch, energy=0.7)[i], svd_denoise(batch[i], energy=0.7))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3), (0, 3, 4)])
def test_empty_matrices(shape):
    result, info = svd_denoise(torch.empty(shape), energy=0.9, return_info=True)
    assert result.shape == shape
    assert info["rank"].shape == shape[:-2]


@pytest.mark.parametrize("rule", [{"rank": 4}, {"energy": 0.7}])
def test_views_and_transposed_tensors(rule):
    a = noise(2, 64, 130, seed=7)
    for view in (a.mT, a[:, ::2, 1:100], a.expand(2, 64, 130)):
        torch.testing.assert_close(svd_denoise(view, **rule), svd_denoise(view.contiguous(), **rule), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, 2.0**e) for e in (-80, -30, 20, 30, 33, 80)]
    + [(torch.float64, 2.0**-110), (torch.float64, 2.0**600)],
)
def test_entries_whose_squares_leave_the_range_of_the_dtype(dtype, scale):
    a = torch.stack([matrix((130, 90), "low rank and noise", s, dtype) for s in range(2)])
    b = a.clone()
    b[1] *= scale
    for rule in (
        {"rank": 8},
        {"rank": 40},
        {"rank": 90},
        {"energy": 0.8},
        {"energy": 1.0},
        {"rank": 8, "residual_density": 0.1},
        {"rank": "gavish-donoho"},
    ):
        expected, info = svd_denoise(a, return_info=True, **rule)
        result, its_info = svd_denoise(b, return_info=True, **rule)
        torch.testing.assert_close(result[0], expected[0])
        torch.testing.assert_close(result[1] / scale, expected[1], atol=1e-6, rtol=1e-5)
        for key in info:
            torch.testing.assert_close(its_info[key], info[key], atol=1e-6, rtol=1e-5)


def test_equal_calls_give_equal_results():
    delta = model()
    for rule in ({"rank": 5}, {"energy": 0.8}):
        first, second = (svd_denoise(delta, residual_density=0.05, **rule) for _ in range(2))
        assert all(torch.equal(first[n], second[n]) for n in delta)
    a = matrix((300, 300), "noise", 9)
    drawn = [svd_denoise(a, rank=5, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("threads", [1, 2, 3, 8, 64])
def test_a_default_batch_is_within_its_memory_limit(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for n in (64, 768, 1024, 1536, 2300, 4096):
        for columns, most in ((None, threads << 24), (24, threads << 23)):
            each = 4 * (6 * n * n if columns is None else 8 * n * 24)
            layout = plans.Layout(torch.Size((n, n)), torch.float32, torch.device("cpu"))
            count = plans.batch_size(layout, columns, None)
            assert count == 1 or count * each <= most
            assert count % threads == 0 or count < threads


# ---- many small matrices ----
def small_tensors():
    """Filters of convolutions, experts of a few rows, and matrices whose squares leave the range of float64."""
    shapes = {
        "conv": (8, 5, 3, 3),
        "other conv": (7, 3, 3),
        "wide": (4, 3, 5, 7),
        "expert": (32, 50),
        "column": (70, 1),
        "one": (1, 1),
    }
    tensors = {n: noise(*s, seed=i) for i, (n, s) in enumerate(shapes.items())}
    tensors["wide"] = tensors["wide"].to(torch.bfloat16)
    tensors["zero"] = torch.zeros(4, 3, 3)
    tensors["huge"] = noise(5, 6, dtype=torch.float64) * 1e200
    tensors["tiny"] = noise(2, 5, 6, dtype=torch.float64) * 1e-200
    return tensors


@pytest.mark.parametrize(
    ("batch_bytes", "residual_density"), [(None, 0.0), (None, 0.3), (1, 0.3), (20_000, 0.0), (20_000, 1.0)]
)
@pytest.mark.parametrize(
    "rule", [{"energy": 0.9}, {"energy": 1.0}, {"rank": 1}, {"rank": 100}, {"rank": "gavish-donoho"}], ids=str
)
def test_small_matrices(rule, batch_bytes, residual_density):
    delta, calls = small_tensors(), []
    result, info = svd_denoise(
        delta,
        **rule,
        residual_density=residual_density,
        return_info=True,
        batch_bytes=batch_bytes,
        progress=lambda *done: calls.append(done),
    )
    assert calls[-1] == (sum(t[..., 0, 0].numel() for t in delta.values()),) * 2
    for name, tensor in delta.items():
        scale = {"huge": 1e200, "tiny": 1e-200}.get(name, 1.0)
        exact = (tensor.double() / scale).reshape(-1, *tensor.shape[-2:])
        found = (result[name].double() / scale).reshape(exact.shape)
        numbers = zip(*(info[name][key].view(-1).tolist() for key in ("rank", "energy", "residual")))
        rounding = 2**-8 if tensor.dtype == torch.bfloat16 else 1e-6
        for w, got, (rank, energy, residual) in zip(exact, found, numbers):
            want = oracle.svd_denoise(w, **rule, residual_density=residual_density)
            assert rank == want.rank
            assert distance(got, want.result) <= rounding * float(w.norm())
            assert energy == pytest.approx(want.energy, abs=1e-9)
            assert residual == pytest.approx(want.residual, abs=1e-6)


def test_many_small_matrices_take_few_calls(monkeypatch):
    calls, denoise = [], batches.denoise_by_svd
    monkeypatch.setattr(batches, "denoise_by_svd", lambda *a: calls.append(len(a[0])) or denoise(*a))
    experts = {f"expert {i}": torch.randn(4, 4) for i in range(2000)}
    svd_denoise({"conv": torch.randn(128, 128, 3, 3)} | experts, energy=0.9)
    assert len(calls) == 2


# ---- selection of denoised differences ----
def test_selection_of_some_denoised_tensors_with_information():
    base = model()
    tuned = {n: t + 0.1 * model()[n].flip(0) for n, t in base.items()}
    delta = {n: tuned[n] - base[n] for n in base}
    rule = {"energy": 0.7, "residual_density": 0.02}
    mask, info = select_mask(tuned, base, density=0.1, denoise_names=["a", "conv", "bias"], return_info=True, **rule)
    expected, wanted = svd_denoise({n: delta[n] for n in ("a", "conv")}, return_info=True, **rule)
    assert mask == topk_mask(delta | expected, density=0.1)
    assert {n for n, i in info.items() if i is not None} == {"a", "conv"}
    for name in ("a", "conv"):
        assert all(torch.equal(info[name][k], wanted[name][k]) for k in wanted[name])
    with pytest.raises(ValueError, match="denoise_names holds 'z'"):
        select_mask(tuned, base, k=3, rank=2, denoise_names=["z"])
    with pytest.raises(TypeError, match="denoise_names must be an iterable"):
        select_mask(tuned, base, k=3, rank=2, denoise_names="a")
    with pytest.raises(ValueError, match="denoise_names needs a rank or an energy"):
        select_mask(tuned, base, k=3, denoise_names=["a"])


@pytest.mark.parametrize("residual_density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("more", [{}, {"return_info": True}, {"denoise_names": ["a"]}], ids=str)
def test_selection_refuses_entries_that_are_not_finite(residual_density, more):
    base = model()
    tuned = {n: t + 0.1 for n, t in base.items()}
    tuned["b"][2, 3] = math.inf
    with pytest.raises(ValueError, match=r"tuned\['b'\] - base\['b'\] holds inf at flat index 183"):
        select_mask(tuned, base, density=0.2, rank=5, residual_density=residual_density, **more)


# ---- errors ----
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of rank and energy"),
        ({"rank": 1, "energy": 0.5}, ValueError, "exactly one of rank and energy"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": "best"}, ValueError, "gavish-donoho"),
        ({"rank": 1.5}, TypeError, "rank must be an int"),
        ({"energy": 0.0}, ValueError, r"energy must be in \(0, 1\]"),
        ({"energy": 1.1}, ValueError, r"energy must be in \(0, 1\]"),
        ({"rank": 1, "residual_density": -0.1}, ValueError, r"residual_density must be in \[0, 1\]"),
        ({"rank": 1, "oversample": -1}, ValueError, "oversample"),
        ({"rank": 1, "n_iter": -1}, ValueError, "n_iter"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        svd_denoise(torch.ones(9, 9), **arguments)


def test_bad_tensors_are_named():
    with pytest.raises(ValueError, match=r"delta\[1\] holds inf"):
        svd_denoise([torch.ones(2, 2), torch.full((2, 2), math.inf)], energy=0.5)
    with pytest.raises(TypeError, match="must be float32"):
        svd_denoise(torch.ones(3, 3, dtype=torch.int64), rank=1)
    with pytest.raises(TypeError, match="tensor, a mapping or a sequence"):
        svd_denoise("delta", rank=1)


def test_nothing_is_written_where_an_entry_is_not_finite():
    delta = model()
    delta["d"][3, 4] = math.nan
    before = {n: t.clone() for n, t in delta.items()}
    calls = []
    with pytest.raises(ValueError, match=r"delta\['d'\] holds nan at flat index 184"):
        svd_denoise(delta, rank=2, progress=lambda *a: calls.append(a))
    assert not calls, "found before any matrix is denoised"
    assert all(torch.equal(delta[n], before[n]) or n == "d" for n in delta)
