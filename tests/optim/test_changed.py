"""`changed` and steps of every entry (without col_indices) in sparse_adamw_, the same tests for every implementation.

`check_step` compares the bits with those of the parameters before and after the step.
"""

import math

import pytest
import torch
from adamw_problem import SMALL, Layout, Options, Problem, bf16, bits, check_step, f16, f32, f64, same_bits

from tests.conftest import INTERPRETED, implementations

OPS = ("sparse_adamw_",)
pytestmark = pytest.mark.usefixtures("one_thread")
FULL = Layout([*SMALL.shapes, (3, 350)], 1.0)
CASES = {
    "float32": Options(),
    "float32, master, compact": Options(master=True, compact_grads=True, decay_to=f32, l1=0.01),
    "float64": Options(dtype=f64, grad_scale=2.0),
    "float16, small steps": Options(dtype=f16, lr=1e-4, maximize=True),
    "bfloat16, small steps": Options(dtype=bf16, lr=1e-3, grad_dtype=f32),
    "bfloat16, master": Options(dtype=bf16, master=True, lr=1e-4, weight_decay=0.0),
    "bfloat16, seed": Options(dtype=bf16, state=bf16, seed=2**33 + 1, lr=1e-3),
    "bfloat16, compact, master, seed": Options(
        dtype=bf16, grad_dtype=f16, compact_grads=True, master=True, state=bf16, seed=5, lr=1e-3
    ),
}  # fmt: skip


def skip_rounding_of_the_interpreter(options: Options) -> None:
    if INTERPRETED and options.dtype == bf16:
        pytest.skip("Triton's interpreter rounds float32 to the nearest bfloat16 wrongly")


@pytest.mark.parametrize("full", [False, True], ids=["masked", "full"])
@pytest.mark.parametrize("name", CASES)
def test_bits_of_the_entries_that_change(implementation, name, full):
    options = CASES[name]
    skip_rounding_of_the_interpreter(options)
    plain = Problem(FULL if full else SMALL, Options(**vars(options) | {"full": full}), seed=3)
    marked = Problem(FULL if full else SMALL, Options(**vars(options) | {"full": full, "changed": True}), seed=3)
    for number in (1, 2, 3):
        check_step(plain, implementation, number)
        check_step(marked, implementation, number)
    assert same_bits(plain.snapshot(), marked.snapshot())
    assert marked.marked().any()
    if "small" in name or ("master" in name and options.dtype == bf16):
        assert not marked.marked().all()


@pytest.mark.parametrize("full", [False, True], ids=["masked", "full"])
def test_zeros_and_nans_are_compared_by_their_bits(implementation, full):
    """A master of 0 beside a stored -0.0 changes it; a NaN that becomes another one is a change, the same is none."""
    options = Options(master=True, full=full, changed=True, weight_decay=0.0, compact_grads=True)
    problem = Problem(Layout([(5, 1)], 1.0), options)
    problem.params[0].copy_(torch.tensor([-0.0, 0.0, math.nan, math.nan, 1.0])[:, None])
    bits(problem.params[0])[3] += 1
    problem.values.copy_(torch.tensor([0.0, 0.0, math.nan, math.nan, 1.0]))
    before = bits(problem.params[0]).clone()
    problem.step(implementation, [torch.zeros(5)], 1)
    assert torch.equal(problem.marked(), bits(problem.params[0]) != before)
    assert problem.marked()[[0, 1, 4]].tolist() == [True, False, False]


@pytest.mark.parametrize("full", [False, True], ids=["masked", "full"])
def test_a_step_that_is_skipped_marks_nothing_and_clears_nothing(implementation, full):
    problem = Problem(FULL if full else SMALL, Options(found_inf=1.0, full=full, changed=True))
    problem.changed.fill_(0x5A5A)
    problem.step(implementation, problem.grads(), 1)
    assert (problem.changed == 0x5A5A).all()


@implementations("c++")
@pytest.mark.parametrize("full", [False, True], ids=["masked", "full"])
@pytest.mark.parametrize("options", [Options(lr=1e-4), Options(dtype=bf16, master=True, lr=1e-3)], ids=["f32", "bf16"])
def test_threads_do_not_matter(implementation, options, full):
    """No word belongs to two threads, however the entries are divided."""
    layout = Layout([(3, 7), (768, 300), (5,), (101, 307), (33,)], 1.0 if full else 0.5)
    results = []
    for threads in (1, 2, 3):
        problem = Problem(layout, Options(**vars(options) | {"full": full, "changed": True}))
        torch.set_num_threads(threads)
        try:
            for number in (1, 2):
                check_step(problem, implementation, number)
        finally:
            torch.set_num_threads(1)
        results.append([*problem.snapshot(), problem.changed])
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"changed": torch.zeros(1, dtype=torch.int32)}, r"changed must have shape \[(ceil\(nnz / 32\))?"),
        ({"changed": torch.zeros(40, dtype=torch.int64)}, "changed must be int32"),
        ({"changed": torch.zeros(80, dtype=torch.int32)[::2]}, "changed must be contiguous"),
        ({"crow_indices": torch.tensor([0, 9])}, "crow_indices must"),
    ],
)
def test_bad_arguments_change_nothing(implementation, change, error):
    problem = Problem(FULL, Options(full=True, changed=True))
    assert problem.changed.shape == (40,)
    before = problem.snapshot()
    arguments = problem.arguments(problem.grads(), 1)._replace(**change)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=error):
        implementation.on_cpu("sparse_adamw_", *arguments)
    assert same_bits(before, problem.snapshot())


@implementations("reference", "c++")
def test_starts_that_do_not_fit_are_refused(implementation):
    problem = Problem(FULL, Options(full=True))
    wrong = problem.crow_indices.clone()
    wrong[2] += 1
    with pytest.raises((RuntimeError, ValueError), match="crow_indices must"):
        implementation.on_cpu("sparse_adamw_", *problem.arguments(problem.grads(), 1)._replace(crow_indices=wrong))
