"""Stochastic rounding in sparse_adamw_, the same tests for every implementation.

Where every implementation must compute the same float32 numbers, seeded results must equal the reference's in every
bit.
"""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from adamw_problem import (
    LAYOUTS,
    SMALL,
    Layout,
    Options,
    Problem,
    bf16,
    bits,
    f16,
    f32,
    f64,
    rounding_range,
    same_bits,
    skip_what_the_interpreter_cannot,
)
from torch import Tensor

from deftx_kernels.ops import reference
from tests.conftest import INTERPRETED, Implementation, implementations

OPS = ("sparse_adamw_",)
pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCE = Implementation("reference", "cpu", reference)
all_but_reference = implementations("c++", "triton-sm80", "triton-interpreter", "cuda")


def philox_words(key: list[int], counter: list[int]) -> list[int]:
    """Philox4x32-10 by the paper (Salmon et al. 2011), in Python's integers."""
    a, b, c, d = counter
    for i in range(10):
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        product0, product1 = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (product1 >> 32) ^ b ^ k0, product1 % 2**32, (product0 >> 32) ^ d ^ k1, product0 % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_in_the_tests_has_the_published_answers(counter, key, words):
    """Random123's kat_vectors."""
    counter, key, words = ([int(x, 16) for x in text.split()] for text in (counter, key, words))
    assert philox_words(key, counter) == words


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1, 0x299F31D0A4093822])
@pytest.mark.parametrize("step", [0, 1, 2**32 - 1, 2**32, 2**40 + 12345])
def test_philox(seed, step):
    words = reference.philox(seed, torch.tensor(step), 300)
    split = lambda x: [x % 2**32, x >> 32]  # noqa: E731
    assert words.T.tolist() == [philox_words(split(seed), split(entry) + split(step)) for entry in range(300)]


# With betas and eps of 0, and gradients of at most 12 significant bits, m = g and v = g * g are exact, sqrt(v) = |g|,
# and w - lr * g / |g| is rounded once: no implementation may differ in a bit. Rounding to bfloat16 removes 4 bits of m
# and up to 16 of v.
EXACT = Options(dtype=bf16, state=bf16, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, lr=0.0123)


def check_against_reference(implementation, layout: Layout, options: Options, numbers: tuple[int, ...]) -> None:
    problem, oracle = (Problem(layout, options) for _ in range(2))
    for number in numbers:
        problem.step(implementation, problem.exact_grads(), number)
        oracle.step(REFERENCE, oracle.exact_grads(), number)
        assert same_bits(problem.snapshot(), oracle.snapshot()), number


@all_but_reference
@pytest.mark.parametrize("changed", [{}, {"dtype": f32}, {"state": None}], ids=str)
@pytest.mark.parametrize(("seed", "compact_grads"), [(0, True), (2**32 + 7, False), (2**63 - 1, True)])
def test_seeded_steps_are_the_references_in_every_bit(implementation, seed, compact_grads, changed):
    options = replace(EXACT, grad_dtype=f32, compact_grads=compact_grads, seed=seed, **changed)
    check_against_reference(implementation, LAYOUTS["three programs"], options, (1, 2, 2**32 + 1))


@all_but_reference
@pytest.mark.parametrize("name", LAYOUTS)
def test_seeded_steps_of_every_layout_are_the_references_in_every_bit(implementation, name):
    variants = [{}, {"dtype": f32}, {"state": None}] if implementation.name == "c++" else [{}]
    for compact_grads, changed in itertools.product((False, True), variants):
        options = replace(EXACT, grad_dtype=f32, compact_grads=compact_grads, seed=2**32 + 7, **changed)
        check_against_reference(implementation, LAYOUTS[name], options, (2**32 + 1,))


def test_seeds_and_steps_round_differently(implementation):
    def after(seed: int, number: int) -> list[Tensor]:
        problem = Problem(LAYOUTS["one full program"], replace(EXACT, grad_dtype=f32, seed=seed))
        with implementation.without_racecheck():
            problem.step(implementation, problem.exact_grads(), number)
        return [problem.weight().clone(), problem.exp_avg, problem.exp_avg_sq]

    first = after(5, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, after(5, 1)))
    for seed, number in ((6, 1), (5 + 2**32, 1), (5, 2), (5, 2**32 + 1)):
        for name, a, b in zip(("weight", "exp_avg", "exp_avg_sq"), first, after(seed, number)):
            # Two independent roundings of a number differ with probability 2 p (1 - p), on average over p a third.
            assert 0.15 < (a != b).double().mean() < 0.5, (name, seed, number)


def test_stochastic_rounding_is_right_in_the_mean(implementation):
    """Each number is rounded up with the probability that makes the mean exact, within 4 standard deviations."""
    problem = Problem(Layout([(3, 1000), (5000,)], 1.0), replace(EXACT, seed=11, compact_grads=True, lr=0.3 * 2**-8))
    for p in problem.params:
        p.fill_(1.0)
    g = torch.full((problem.nnz,), 1 + 0.3125 * 2**-7)  # g * g = 1 + 0.626 * 2**-7
    with implementation.without_racecheck():
        problem.step(implementation, [g], 1)
    w = torch.tensor(1.0) - torch.tensor(problem.options.lr, dtype=f32)
    for exact, got in ((w, problem.weight()), (g[0], problem.exp_avg), (g[0] * g[0], problem.exp_avg_sq)):
        low, high = rounding_range(exact, exact, bf16, stochastic=True)
        share = float((exact - low) / (high.float() - low.float()))
        assert 0.2 < share < 0.8
        assert ((got == low) | (got == high)).all()
        found = (got == high).double().mean()
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / problem.nnz)
    up = torch.stack([problem.weight() == 1, problem.exp_avg > 1, problem.exp_avg_sq > 1]).double()
    others = torch.corrcoef(up) - torch.eye(3)
    assert (others.abs() < 4 / math.sqrt(problem.nnz)).all(), "the three numbers of an entry are rounded independently"


@pytest.mark.parametrize("seed", [None, 12])
def test_decay_that_nearest_rounding_drops_counts_in_the_mean(implementation, seed):
    """Many times 0.999 of 1: each step is below half a unit in the last place of bfloat16."""
    options = Options(state=bf16, compact_grads=True, seed=seed)
    skip_what_the_interpreter_cannot(options)
    problem = Problem(Layout([(2000,)], 1.0), options)
    problem.exp_avg_sq.fill_(1.0)
    steps = 20 if implementation.name.startswith("triton") else 50
    for number in range(1, steps + 1):
        problem.step(implementation, [torch.zeros(problem.nnz)], number)
    mean = problem.exp_avg_sq.double().mean()
    if seed is None:
        assert mean == 1
    else:  # a number's variance grows by at most a quarter of a squared unit, 2**-8, in a step
        assert abs(mean - 0.999**steps) < 4 * math.sqrt(steps / 4 / problem.nnz) * 2**-8


def test_bfloat16_numbers_stay(implementation):
    """With lr = 0, each parameter is a bfloat16 number already; so are the moments of such gradients."""
    problem = Problem(Layout([(100, 9)], 1.0), replace(EXACT, seed=8, lr=0.0, compact_grads=True))
    subnormal = 0.5 if INTERPRETED else 3 * 2.0**-133  # Triton's interpreter reads such a bfloat16 wrongly
    special = torch.tensor([0.0, -2.0, 1.0, -1.5, 2.0**-126, subnormal, 255 * 2.0**120, -255 * 2.0**120, math.nan])
    problem.params[0].copy_(special.expand(100, 9))
    gradient = torch.tensor([1.0, 2.0, 3.0, 0.125, 7.0, -15.0, 2.0**-20, 2.0**60, -11.0]).repeat(100)
    before = problem.weight().clone()
    problem.step(implementation, [gradient], 1)
    assert torch.equal(problem.exp_avg.float(), gradient)
    assert torch.equal(problem.exp_avg_sq.float(), gradient * gradient)
    number = ~before.isnan()
    assert torch.equal(bits(before[number]), bits(problem.weight()[number]))
    assert problem.weight()[~number].isnan().all()


def test_infinities_and_nan_stay(implementation):
    """A NaN has any bits below its exponent: adding to them must not make an infinity or a zero of it."""
    problem = Problem(Layout([(1000,)], 1.0), replace(EXACT, seed=9, betas=(0.9, 0.999), compact_grads=True))
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7F800000, -0x00800000], dtype=torch.int64)
    g = patterns.to(torch.int32).view(f32).repeat(167)[:1000]
    problem.step(implementation, [g], 1)
    nan = g.isnan()
    assert problem.exp_avg[nan].isnan().all()
    assert problem.exp_avg_sq[nan].isnan().all()
    assert problem.weight().isnan().all()
    assert torch.equal(problem.exp_avg[~nan].float(), g[~nan])
    assert (problem.exp_avg_sq[~nan] == math.inf).all()

    problem = Problem(Layout([(1000,)], 1.0), replace(EXACT, seed=9, lr=3e38, compact_grads=True))
    problem.params[0].fill_(-255 * 2.0**120)
    problem.step(implementation, [torch.ones(1000)], 1)
    assert (problem.weight() == -math.inf).all()


@pytest.mark.parametrize(
    "options",
    [
        Options(l1=0.01),
        Options(dtype=f64, compact_grads=True),
        Options(dtype=f16, master=True, grad_dtype=f32),
        Options(dtype=bf16, master=True),
    ],
    ids=["f32", "f64", "f16, master", "bf16, master"],
)
def test_a_seed_changes_nothing_where_nothing_is_rounded_stochastically(implementation, options):
    skip_what_the_interpreter_cannot(options)
    plain, seeded = Problem(SMALL, options), Problem(SMALL, replace(options, seed=2**33 + 1))
    for problem in (plain, seeded):
        for number in (1, 2):
            with implementation.without_racecheck():  # test_sparse_adamw.py has these options
                problem.step(implementation, problem.grads(), number)
    assert same_bits(plain.snapshot(), seeded.snapshot())
