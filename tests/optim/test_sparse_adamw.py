"""sparse_adamw_ against torch.optim.AdamW in float64, the same tests for every implementation; and `sparse_adamw`.

Fifty steps in a row are checked against fifty float64 steps; emulated kernels, which are slow, take eight.
"""

import copy
import gc
import math

import pytest
import torch
from adamw_problem import (
    LAYOUTS,
    SMALL,
    Layout,
    Options,
    Problem,
    adamw,
    bf16,
    bits,
    bounds,
    check_step,
    f16,
    f32,
    f64,
    same_bits,
    skip_what_the_interpreter_cannot,
)
from torch import Tensor

from deftx_kernels import CSRMask, sparse_adamw
from deftx_kernels.ops.schemas import AdamWArgs
from tests.conftest import INTERPRETED, implementations

OPS = ("sparse_adamw_",)
pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {
    "defaults": Options(),
    "no decay": Options(weight_decay=0.0, lr_dtype=f32, step_dtype=f32),
    "compact": Options(compact_grads=True, lr=0.1),
    "decay to a point": Options(decay_to=f32, weight_decay=0.3, betas=(0.8, 0.95)),
    "l1 around a point": Options(decay_to=f32, l1=0.05, maximize=True, weight_decay=0.0),
    "l1 around zero": Options(l1=0.1, compact_grads=True, step_dtype=f64),
    "zero betas": Options(betas=(0.0, 0.0), maximize=True, eps=1e-3),
    "scaled": Options(grad_scale=1024.5, found_inf=0.0, lr_dtype=f32),
    "late": Options(first_step=999_951, betas=(0.99, 0.999_999)),
    "f64": Options(dtype=f64, decay_to=f64, l1=1e-3, grad_scale=3.0),
    "f64, compact f32 gradient": Options(dtype=f64, grad_dtype=f32, compact_grads=True),
    "f16": Options(dtype=f16, decay_to=f16, l1=0.01),
    "f16, f32 gradient and master": Options(dtype=f16, grad_dtype=f32, master=True, lr=1e-3),
    "bf16": Options(dtype=bf16, lr=0.05, grad_scale=8.0),
    "bf16, master": Options(dtype=bf16, master=True, lr=1e-3),
    "bf16, compact, all": Options(
        dtype=bf16,
        grad_dtype=f16,
        compact_grads=True,
        master=True,
        decay_to=bf16,
        l1=0.02,
        maximize=True,
        grad_scale=0.25,
        found_inf=0.0,
        weight_decay=0.2,
        lr=1e-3,
        step_dtype=torch.int32,
    ),
    "bf16 state": Options(state=bf16, decay_to=f32, weight_decay=0.3),
    "bf16 state, compact": Options(state=bf16, grad_dtype=bf16, compact_grads=True, first_step=1000),
    "bf16 state, f16": Options(dtype=f16, state=bf16, grad_dtype=f32, grad_scale=3.0),
    "bf16 state, f16, master": Options(dtype=f16, state=bf16, master=True, l1=0.01),
    "bf16 state, bf16": Options(dtype=bf16, state=bf16, lr=0.05, maximize=True),
    "bf16 state, bf16, master": Options(
        dtype=bf16, state=bf16, master=True, grad_dtype=f16, compact_grads=True, lr=1e-3
    ),
    "seed, bf16": Options(seed=1, dtype=bf16, decay_to=bf16, grad_dtype=f32),
    "seed, bf16 state": Options(seed=2**63 - 1, state=bf16, grad_dtype=f16, compact_grads=True),
    "seed, bf16 state, f16, master": Options(seed=0, dtype=f16, state=bf16, master=True, lr=1e-3),
    "seed, bf16 state, bf16": Options(seed=2**32, dtype=bf16, state=bf16, first_step=100_000, l1=0.01),
    "seed, bf16 state, bf16, master": Options(seed=3, dtype=bf16, state=bf16, master=True, lr=1e-3, step_dtype=f32),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_adamw(implementation, name):
    """Each step; and all of them in a row, where nothing is rounded to 16 bits between them."""
    options = CASES[name]
    skip_what_the_interpreter_cannot(options)
    problem = Problem(SMALL, options, seed=sorted(CASES).index(name))
    want, limits = (problem.weight().clone(), problem.exp_avg.clone(), problem.exp_avg_sq.clone()), None
    in_a_row = (options.master or options.dtype == options.compute) and options.state is None
    steps = 8 if implementation.name.startswith("triton") else 50
    for number in range(options.first_step, options.first_step + steps):
        g = check_step(problem, implementation, number)
        if in_a_row:
            old, origin = want, problem.decay_to
            want = adamw(options, f64, old, g, origin, number)
            limits = bounds(options, old, g, origin, number, want, limits)
    if in_a_row:
        for new, exact, limit in zip((problem.weight(), problem.exp_avg, problem.exp_avg_sq), want, limits):
            assert ((new.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("compact_grads", [False, True], ids=["dense", "compact"])
def test_every_layout(implementation, name, compact_grads):
    problem = Problem(LAYOUTS[name], Options(compact_grads=compact_grads))
    for number in (1, 2):
        check_step(problem, implementation, number)


@pytest.mark.parametrize("seed", range(24))
def test_random_options(implementation, seed):
    """Any combination; the emulated implementations take a few, because each new combination is a new compilation."""
    if implementation.name.startswith("triton") and seed >= 6:
        pytest.skip("the emulated implementations take the first six")
    pick = lambda *values: values[torch.randint(len(values), (), generator=generator)]  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    half = f16 if INTERPRETED else pick(f16, bf16)
    dtype = pick(f32, half, f64)
    compact_grads = pick(False, True)
    options = Options(
        dtype=dtype,
        grad_dtype=pick(None, f32, half) if compact_grads else pick(None, f32),
        compact_grads=compact_grads,
        master=pick(False, True),
        lr=pick(1e-4, 1e-2, 0.5),
        lr_dtype=pick(f32, f64),
        step_dtype=pick(f32, torch.int64),
        first_step=pick(1, 2, 1000, 100_000),
        betas=pick((0.9, 0.999), (0.0, 0.5), (0.95, 0.9999)),
        eps=pick(1e-8, 1e-4),
        weight_decay=pick(0.0, 0.1),
        decay_to=pick(None, dtype, f64 if dtype == f64 else f32),
        l1=pick(0.0, 0.01),
        maximize=pick(False, True),
        grad_scale=pick(None, 65536.0, 0.3),
        found_inf=pick(None, 0.0),
        state=None if dtype == f64 else pick(None, bf16),
        seed=pick(None, 17, 2**40 + 3),
    )
    skip_what_the_interpreter_cannot(options)
    if not compact_grads and dtype == f64:  # `sparse_adamw` converts such gradients
        options.grad_dtype = None
    problem = Problem(SMALL, options, seed)
    for number in range(options.first_step, options.first_step + 3):
        check_step(problem, implementation, number)


def test_without_decay_infinite_weights_and_negative_zeros_stay(implementation):
    """As in torch.optim.AdamW, whose factor is then 1; 0 * (w - decay_to) would be NaN."""
    problem = Problem(Layout([(3, 300)], 1.0), Options(weight_decay=0.0, decay_to=f32, compact_grads=True))
    weights = torch.tensor([math.inf, -math.inf, -0.0]).repeat(300)
    problem.params[0].copy_(weights.view(3, 300))
    problem.step(implementation, [torch.zeros(900)], 1)
    assert torch.equal(bits(problem.weight()), bits(weights))


@pytest.mark.parametrize("found_inf", [1.0, math.nan, 2.0])
def test_found_inf_leaves_everything_as_it_was(implementation, found_inf):
    options = Options(dtype=f16, master=True, found_inf=found_inf, grad_scale=2.0, first_step=5)
    problem = Problem(SMALL, options)
    before, grads = problem.snapshot(), problem.grads()
    grads[0].fill_(math.inf)
    problem.step(implementation, grads, 5)
    assert same_bits(before, problem.snapshot())


@pytest.mark.parametrize("number", [1, 2, 10, 1000, 1_000_000])
@pytest.mark.parametrize("beta", [0.9, 0.999, 0.999_999])
def test_bias_corrections_lose_no_digits(implementation, number, beta):
    """A gradient of 1 from zero moments: w' = w - lr (1 - b1)/(1 - b1^t) / sqrt((1 - b2)/(1 - b2^t)), to 1e-6 for any
    step.
    """
    options = Options(betas=(0.5, beta), weight_decay=0.0, eps=0.0, lr=1.0, compact_grads=True)
    problem = Problem(Layout([(3,)], 1.0), options)
    problem.params[0].zero_()
    problem.step(implementation, [torch.ones(3)], number)
    bias1, bias2 = -math.expm1(number * math.log(0.5)), -math.expm1(number * math.log(beta))
    want = -0.5 / bias1 / math.sqrt((1 - beta) / bias2)
    torch.testing.assert_close(problem.params[0], torch.full((3,), want), rtol=1e-6, atol=0)


@implementations("reference", "c++", "triton-sm80")  # the interpreter copies storages; a GPU would get 6 GB and back
def test_offsets_beyond_31_bits(implementation):
    """6 GB of address space, of which a few pages are touched."""
    columns = 2**30
    weight = torch.empty(3, columns, dtype=f16)
    col = torch.tensor([0, 5, columns - 1, 7, columns - 2, columns - 1], dtype=torch.int32)
    crow, flat = torch.tensor([0, 2, 3, 6]), weight.view(-1)
    index = torch.tensor([0, 5, 2 * columns - 1, 2 * columns + 7, 3 * columns - 2, 3 * columns - 1])
    neighbours = torch.tensor([1, 4, 6, 2 * columns - 2, 2 * columns, 3 * columns - 3, columns, columns - 1, 7])
    flat[index], flat[neighbours] = 1.0, 2.0
    grad = torch.tensor([1.0, -1, 1, -1, 1, -1])
    arguments = Problem(Layout([(6,)], 1.0), Options(lr=0.25, weight_decay=0.0)).arguments([grad], 1)
    arguments = arguments._replace(params=[weight], compact_grads=True, crow_indices=crow, col_indices=col)
    implementation.on_cpu("sparse_adamw_", *arguments)
    assert flat[index].tolist() == [0.75, 1.25, 0.75, 1.25, 0.75, 1.25]
    assert (flat[neighbours] == 2.0).all()


def test_tables_are_kept_by_content():
    pytest.importorskip("triton")
    from deftx_kernels.kernels import rows

    device = torch.device("cpu")
    first = rows.device_table(device, (1, 2), (1, 2**62 + 1, 3))
    assert first.tolist() == [1, 2**62 + 1, 3]
    assert rows.device_table(device, (1, 2), (1, 2**62 + 1, 3)) is first
    assert rows.device_table(device, (1, 3), (1, 2**62 + 1, 3)) is not first
    for i in range(2 * rows._TABLES_KEPT):
        rows.device_table(device, (i,), (i,))
    assert len(rows._tables) == rows._TABLES_KEPT


def wrong_crow(rows, nnz, kind):
    generator = torch.Generator().manual_seed(rows)
    if kind == "sorted":
        return torch.cat([torch.tensor([0, nnz]), torch.randint(0, nnz + 1, (rows - 1,), generator=generator)]).sort()[
            0
        ]
    return (
        torch.randint(-9, 2 * nnz, (rows + 1,), generator=generator)
        if kind == "random"
        else torch.zeros(rows + 1).long()
    )


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("kind", ["sorted", "random", "zero"])
@pytest.mark.parametrize(("rows", "nnz"), [(1, 1), (1, 70), (2, 64), (300, 1000), (700, 64), (40, 4096)])
def test_block_tables_lead_to_rows_that_exist(rows, nnz, kind, group):
    """And, in a sorted crow_indices, to each entry's own."""
    pytest.importorskip("triton")
    from deftx_kernels.kernels.rows import HEAD, block_table

    block, crow = 64, wrong_crow(rows, nnz, kind)
    tensors = [torch.empty(m, 5) for m in (rows // 3, rows // 2, 0, rows - rows // 3 - rows // 2)]
    first_rows = torch.tensor([0, rows // 3, rows // 3 + rows // 2, rows // 3 + rows // 2])
    table = torch.cat([torch.zeros(4), first_rows, torch.full((4,), 4)]).long()
    blocks = block_table(table, tensors, crow, nnz, block, group)
    assert blocks.shape == (-(-nnz // block), HEAD + (2 if group else 0))
    extra, first, last = blocks[:, :3].unbind(1)
    tensor_of = torch.searchsorted(first_rows, torch.arange(rows), right=True) - 1
    if not group:
        assert kind != "sorted" or bool((first <= last).all())
        return
    low = blocks[:, HEAD:]
    assert bool(((low >= 0) & (low + extra[:, None] < rows)).all())
    assert bool((tensor_of[low] >= first[:, None]).all() and (tensor_of[low + extra[:, None]] <= last[:, None]).all())
    if kind == "sorted":
        row = torch.searchsorted(crow, torch.arange(nnz), right=True) - 1
        near = low.flatten().repeat_interleave(32)[:nnz]
        assert bool(((near <= row) & (row <= near + extra.repeat_interleave(block)[:nnz])).all())


def test_block_tables_are_kept_with_the_mask():
    pytest.importorskip("triton")
    from deftx_kernels.kernels import rows

    def made(crow, *heights):
        tensors = [torch.empty(m, 10) for m in heights]
        table = rows.tensor_table(crow.device, (1,), tensors, rows.addresses(tensors), 10)
        return rows.block_table(table, tensors, crow, 100, 64, 32)

    crow = torch.arange(0, 101, 10)
    first = made(crow, 10)
    assert made(crow, 10) is first
    assert made(crow, 4, 6) is not first
    first = made(crow, 10)
    assert made(crow.clone(), 10) is not first
    assert made(crow, 10) is first
    crow.mul_(1)  # may have changed it
    assert made(crow, 10) is not first
    kept = len(rows._block_tables)
    del crow
    gc.collect()
    assert len(rows._block_tables) < kept


@implementations("c++")
@pytest.mark.parametrize(
    "options",
    [
        Options(decay_to=f32, l1=1e-3),
        Options(dtype=f64, compact_grads=True),
        Options(dtype=f16, master=True, state=bf16),
        Options(dtype=bf16, grad_dtype=f32, state=bf16, seed=2**35 + 1),
        Options(dtype=bf16, grad_dtype=f16, compact_grads=True, master=True, state=bf16, seed=4),
    ],
    ids=["f32", "f64", "f16", "bf16, seed", "bf16, master, seed"],
)
def test_threads_do_not_matter(implementation, options):
    layout = Layout([(300, 400), (5,), (0, 3), (1000, 60), (4, 7001)], 0.5)
    results = []
    for threads in (1, 2, 3):
        problem = Problem(layout, options)
        assert problem.nnz > 50_000
        torch.set_num_threads(threads)
        try:
            for number in (1, 2):
                problem.step(implementation, problem.grads(), number)
        finally:
            torch.set_num_threads(1)
        results.append(problem.snapshot())
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


# ---- bad arguments ----
def replaced(t: Tensor, at: int, value: int) -> Tensor:
    t = t.to(torch.int32).clone() if t.dtype == torch.uint16 else t.clone()
    t[at] = value
    return t


# What is wrong -> what replaces the operator's argument of that name, made from it.
WRONG = {
    "crow_indices too short": lambda t: t[:-1],
    "crow_indices too long": lambda t: torch.cat([t, t[-1:]]),
    "crow_indices int32": lambda t: t.int(),
    "crow_indices begins late": lambda t: replaced(t, 0, 1),
    "crow_indices ends early": lambda t: replaced(t, -1, 105),
    "crow_indices ends late": lambda t: replaced(t, -1, 107),
    "crow_indices descends": lambda t: replaced(t, 2, 5),
    "crow_indices overshoots": lambda t: replaced(t, 2, 2**40),
    "crow_indices negative": lambda t: replaced(t, 1, -(2**40)),
    "col_indices too large": lambda t: replaced(t, 3, 20),
    "col_indices too large at the end": lambda t: replaced(t, -1, 6),
    "col_indices negative": lambda t: replaced(t, 0, -1),
    "col_indices repeat": lambda t: replaced(t, 5, 4),
    "col_indices descend": lambda t: replaced(t, 5, 3),
    "col_indices int64": lambda t: t.long(),
    "exp_avg too short": lambda t: t[:-1],
    "exp_avg 2-D": lambda t: t[None],
    "exp_avg bfloat16 alone": lambda t: t.bfloat16(),
    "exp_avg_sq too long": lambda t: torch.cat([t, t]),
    "exp_avg_sq not contiguous": lambda t: t.repeat_interleave(2)[::2],
    "values too short": lambda t: t[1:],
    "values bfloat16": lambda t: t.bfloat16(),
    "decay_to too short": lambda t: t[:-1],
    "grads too few": lambda t: t[:1],
    "grads transposed": lambda t: [t[0].mT.contiguous(), t[1]],
    "grads too small": lambda t: [t[0][:4], t[1]],
    "grads too large": lambda t: [t[0], torch.cat([t[1], t[1]])],
    "grads of another dtype": lambda t: [g.half() for g in t],
    "grads not contiguous": lambda t: [t[0].mT.contiguous().mT, t[1]],
    "compact grads too short": lambda t: [t[0][:-1]],
    "compact grads 2-D": lambda t: [t[0][None]],
    "compact grads, two": lambda t: [t[0], t[0]],
    "compact grads int32": lambda t: [t[0].int()],
    "params too few": lambda t: t[:1],
    "params of two dtypes": lambda t: [t[0], t[1].double()],
    "params not contiguous": lambda t: [t[0].mT.contiguous().mT, t[1]],
    "step of two elements": lambda t: t.repeat(2),
    "lr of no element": lambda t: t[:0],
}


@pytest.mark.parametrize("wrong", WRONG)
def test_bad_arguments_raise_and_change_nothing(wrong):
    options = Options(master=True, decay_to=f32, compact_grads=wrong.startswith("compact"))
    problem = Problem(Layout([(5, 20), (6,)], 1.0), options)
    arguments = problem.arguments(problem.grads(), 1)
    name = wrong.removeprefix("compact ").replace(",", "").split()[0]
    arguments = arguments._replace(**{name: WRONG[wrong](getattr(arguments, name))})
    given = getattr(arguments, name)
    before, snapshot = copy.deepcopy(given), problem.snapshot()
    with pytest.raises(RuntimeError, match=r"must|has|dtype"):
        torch.ops.deftx.sparse_adamw_(*arguments)
    assert same_bits(snapshot, problem.snapshot())
    assert all(torch.equal(a, b) for a, b in zip(before, given))


def function_arguments():
    weight, grad = torch.ones(3, 3), torch.ones(3, 3)
    mask = CSRMask.from_dense({"w": torch.eye(3, dtype=torch.bool)})
    moments = dict(exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))
    return dict(params={"w": weight}, grads={"w": grad}, **moments, step=1, mask=mask, lr=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": 0}, ValueError, "step must be an int from 1"),
        ({"step": torch.tensor(1.0, dtype=bf16)}, ValueError, "step must be a 0-d tensor of 32 bits"),
        ({"exp_avg": torch.zeros(4)}, ValueError, r"exp_avg must be compact, \[nnz\] = \[3\]"),
        ({"exp_avg_sq": torch.zeros(3, dtype=bf16)}, ValueError, "exp_avg and exp_avg_sq must have the same dtype"),
        ({"exp_avg": torch.zeros(3).half()}, ValueError, "exp_avg must be contiguous torch.float32 or torch.bfloat16"),
        ({"values": torch.zeros(3).bfloat16()}, ValueError, "values must be contiguous torch.float32 for"),
        ({"stochastic_rounding": True, "seed": -1}, ValueError, "seed must be at least 0"),
        ({"stochastic_rounding": True, "seed": 0.5}, TypeError, "seed must be an int"),
        ({"stochastic_rounding": True, "seed": 2**63}, ValueError, r"seed must be less than 2\*\*63"),
        (
            {"params": {"w": torch.ones(3, 3).half()}, "stochastic_rounding": True},
            ValueError,
            "not defined for float16",
        ),
        ({"grads": {"w": torch.ones(2, 3)}}, ValueError, r"grads\['w'\] has shape"),
        ({"grads": torch.ones(9)}, ValueError, "grads must be compact"),
        ({"params": {"w": torch.ones(3, 3, dtype=torch.int32)}}, TypeError, r"params\['w'\] must be float32"),
        ({"values": torch.ones(2)}, ValueError, "values must be compact"),
        ({"decay_to": torch.ones(2)}, ValueError, "decay_to must be compact"),
        ({"lr": -0.1}, ValueError, "lr must be a number, at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
        ({"l1": -1.0}, ValueError, "l1"),
    ],
)
def test_bad_arguments_of_the_function_change_nothing(change, error, message):
    arguments = function_arguments() | change
    before = copy.deepcopy([arguments["params"]["w"], arguments["exp_avg"], arguments["exp_avg_sq"]])
    with pytest.raises(error, match=message):
        sparse_adamw(**arguments)
    for old, new in zip(before, (arguments["params"]["w"], arguments["exp_avg"], arguments["exp_avg_sq"])):
        assert torch.equal(old, new)


# ---- CUDA graphs ----
@implementations("cuda")
@pytest.mark.parametrize("compact_grads", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("seed", [None, 2**40 + 1])
def test_captured_steps_are_the_eager_ones(implementation, compact_grads, seed):
    """Captured once with its gradients made inside the graph, replayed with new inputs, rates, step numbers and
    found_inf.
    """
    state = None if seed is None else bf16
    options = Options(dtype=bf16, master=True, compact_grads=compact_grads, state=state, seed=seed)
    graphed, eager = (Problem(LAYOUTS["three programs"], options) for _ in range(2))
    inputs = [[g.cuda() for g in graphed.grads()] for _ in range(6)]

    def on_device(p: Problem) -> AdamWArgs:
        arguments = p.arguments([], 0)._asdict()
        moved = {k: t.cuda() for k, t in arguments.items() if isinstance(t, Tensor)}
        return AdamWArgs(**arguments | moved | {"params": [t.cuda() for t in p.params]})

    def step(arguments: AdamWArgs, sources, number, lr, found_inf):
        grads = [2 * g for g in sources]  # new memory: in a capture, the graph's
        implementation.ops.sparse_adamw_(*arguments._replace(grads=grads, step=number, lr=lr, found_inf=found_inf))

    number, lr, found_inf = (torch.zeros((), device="cuda") for _ in range(3))
    static, source = on_device(graphed), [g.clone() for g in inputs[0]]
    found_inf.fill_(1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(static, source, number, lr, found_inf)  # compiles; changes nothing, as found_inf says
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        number.add_(1)
        step(static, source, number, lr, found_inf)

    plain = on_device(eager)
    for i, given in enumerate(inputs):
        rate, skip = 1e-2 / (i + 1), float(i == 3)
        lr.fill_(rate)
        found_inf.fill_(skip)
        torch._foreach_copy_(source, given)
        graph.replay()
        step(plain, given, torch.tensor(i + 1.0, device="cuda"), lr.clone(), found_inf.clone())
    for a, b in zip(*([*x.params, x.exp_avg, x.exp_avg_sq, x.values] for x in (static, plain))):
        assert torch.equal(bits(a), bits(b))
