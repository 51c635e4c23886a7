"""sparse_adamw_ against torch.optim.AdamW in float64, the same tests for every implementation.

Each step is checked from the state before it, with a bound on the rounding errors of that one step (`bounds`); fifty steps in a
row are checked against fifty float64 steps, with those bounds carried on from step to step.
Outside the mask, parameters hold NaN, infinities and -0.0, dense gradients hold NaN, and not one bit may change.
"""

import importlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import deftx_kernels  # noqa: F401  (registers the operators)
from deftx_kernels import _ops, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton-sm80", marks=pytest.mark.cuda_on_cpu),
    pytest.param("gpu", marks=pytest.mark.gpu),
]
if INTERPRETED:  # the variable decides what `triton.jit` makes, so this backend has a process to itself: see the last test
    BACKENDS = ["triton-interpreter"]

STEPS = 50
BLOCK = 512  # entries of one Triton program


class Backend(NamedTuple):
    """The operator on CPU tensors, in place."""

    name: str
    tool: Any = None

    def __call__(self, params: list[Tensor], grads: list[Tensor], *rest) -> None:
        if self.name == "reference":
            reference.sparse_adamw_(params, grads, *rest)
        elif self.name == "cpu":
            torch.ops.deftx.sparse_adamw_(params, grads, *rest)
        elif self.name == "gpu":
            host = [*params, *grads, *(x for x in rest if isinstance(x, Tensor))]
            device = {id(t): t.cuda() for t in host}
            there = [[device[id(t)] for t in group] for group in (params, grads)]
            torch.ops.deftx.sparse_adamw_(*there, *(device[id(x)] if isinstance(x, Tensor) else x for x in rest))
            for t in host:
                t.copy_(device[id(t)])
        else:
            from deftx_kernels.kernels.sparse_adamw import sparse_adamw_

            if self.name == "triton-interpreter":
                sparse_adamw_(params, grads, *rest)
                return
            with self.tool.override(racecheck=True, extra=[*params, *grads]) as launches:
                sparse_adamw_(params, grads, *rest)
            assert len(launches) <= 1, "one launch for all tensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Thousands of operations on a few hundred numbers: on a busy machine, waiting for threads took most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    if request.param.startswith("triton"):
        pytest.importorskip("triton")
    if request.param == "triton-sm80":
        tool = request.getfixturevalue("cuda_on_cpu")
        return Backend(request.param, importlib.import_module(f"{tool.__name__}.triton_on_cpu"))
    return Backend(request.param)


# ---- problems -----------------------------------------------------------------------------------------------------------


@dataclass
class Options:
    dtype: torch.dtype = torch.float32
    grad_dtype: torch.dtype | None = None  # None: that of the parameters
    compact_grads: bool = False
    master: bool = False
    lr: float = 1e-2
    lr_dtype: torch.dtype = torch.float64
    step_dtype: torch.dtype = torch.int64
    first_step: int = 1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    decay_to: torch.dtype | None = None
    l1: float = 0.0
    maximize: bool = False
    grad_scale: float | None = None
    found_inf: float | None = None

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


@dataclass
class Layout:
    shapes: list[tuple[int, ...]]
    density: float
    col_dtype: torch.dtype = torch.uint16
    masks: list[Tensor] = field(default_factory=list)

    def draw(self, generator: torch.Generator) -> "Layout":
        return replace(self, masks=[torch.rand(s, generator=generator) < self.density for s in self.shapes])

    def csr(self) -> tuple[Tensor, Tensor]:
        rows = [m.reshape(_ops.rows_and_columns(m.shape)) for m in self.masks]
        counts = torch.cat([r.sum(1) for r in rows])
        crow_indices = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return crow_indices, torch.cat([r.nonzero()[:, 1] for r in rows]).to(self.col_dtype)

    def gather(self, tensors: list[Tensor]) -> Tensor:
        return torch.cat([t[m] for t, m in zip(tensors, self.masks)])


SMALL = Layout([(7,), (), (5, 9), (3, 4, 5), (0, 6), (4, 0), (0,), (1, 40), (11, 7)], 0.6)
LAYOUTS = {
    "three programs": Layout([(7,), (), (5, 9), (0, 6), (1, 300), (40, 33), (4, 0)], 0.6),
    "exactly two programs": Layout([(2 * BLOCK,)], 1.0),
    "one full program": Layout([(8, BLOCK // 8)], 1.0),
    "one entry": Layout([(0, 3), (), (0,)], 1.0),
    "no entry": Layout([(3, 4), (5,)], 0.0),
    "more tensors than search ways": Layout([(2, 3)] * 150 + [(3,), ()], 0.7),
    "mostly empty rows": Layout([(3000, 4), (0, 4), (2000, 1)], 0.01),
    "int32 columns": Layout([(3, 70_000), (2, 2)], 0.003, torch.int32),
    "largest uint16 column": Layout([(1, 65_536)], 0.01),
}


class Problem:
    """Parameters, state and masks on the CPU; every draw comes from one seed."""

    def __init__(self, layout: Layout, options: Options, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.layout, self.options = layout.draw(self.generator), options
        self.crow_indices, self.col_indices = self.layout.csr()
        self.nnz = self.col_indices.numel()
        self.params = [self._fill(self.randn(s, options.dtype), m) for s, m in zip(layout.shapes, self.layout.masks)]
        self.exp_avg, self.exp_avg_sq = (torch.zeros(self.nnz, dtype=options.compute) for _ in range(2))
        if options.first_step > 1:
            self.exp_avg, self.exp_avg_sq = self.randn(self.nnz, options.compute), self.randn(self.nnz, options.compute) ** 2
        self.decay_to = None if options.decay_to is None else self.randn(self.nnz, options.decay_to)
        if self.decay_to is not None and self.nnz > 3:  # entries at the origin: their sign is 0
            self.decay_to[:3] = self.layout.gather(self.params)[:3].to(options.decay_to)
        # A master carries more digits than the parameter.
        self.values = self.layout.gather(self.params).to(options.compute) if options.master else None
        if self.values is not None and options.dtype != options.compute:
            self.values *= 1 + 1e-4 * self.randn(self.nnz, options.compute)

    def randn(self, shape, dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    @staticmethod
    def _fill(t: Tensor, mask: Tensor) -> Tensor:
        """What must survive bit by bit, outside the mask."""
        rest = (~mask).sum()
        special = torch.tensor([math.nan, -0.0, math.inf, -math.inf, 1.0, 1e-7]).to(t.dtype)
        t[~mask] = special.repeat(int(rest) // len(special) + 1)[:rest]
        return t

    def weight(self) -> Tensor:
        return self.layout.gather(self.params) if self.values is None else self.values

    def new_grads(self) -> list[Tensor]:
        o = self.options
        dense = [self.randn(s, o.grad_dtype or o.dtype) for s in self.layout.shapes]
        for g, mask in zip(dense, self.layout.masks):
            g[~mask] = math.nan
        return [self.layout.gather(dense)] if o.compact_grads else dense

    def snapshot(self) -> list[Tensor]:
        tensors = [*self.params, self.exp_avg, self.exp_avg_sq] + ([] if self.values is None else [self.values])
        return [bits(t).clone() for t in tensors]

    def step(self, backend: Backend, grads: list[Tensor], number: int) -> None:
        o = self.options
        scalar = [None if x is None else torch.tensor(x, dtype=torch.float32) for x in (o.grad_scale, o.found_inf)]
        backend(
            self.params, grads, o.compact_grads, self.exp_avg, self.exp_avg_sq, self.values,
            self.crow_indices, self.col_indices, torch.tensor(number, dtype=o.step_dtype), torch.tensor([o.lr], dtype=o.lr_dtype),
            *o.betas, o.eps, o.weight_decay, self.decay_to, o.l1, o.maximize, *scalar,
        )  # fmt: skip


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


# ---- oracle -------------------------------------------------------------------------------------------------------------


State = tuple[Tensor, Tensor, Tensor]  # weight, exp_avg, exp_avg_sq


def adamw(o: Options, dtype: torch.dtype, state: State, g: Tensor, origin: Tensor | None, number: int) -> State:
    """One step of torch.optim.AdamW. Decay toward `origin` is decay toward 0 of the distance to it."""
    w, m, v, g = (t.to(dtype) for t in (*state, g))
    origin = torch.zeros_like(w) if origin is None else origin.to(dtype)
    p = torch.nn.Parameter(w - origin)
    g = g / (o.grad_scale or 1.0)
    p.grad = g + (-1 if o.maximize else 1) * o.l1 * torch.sign(p.detach())
    lr = torch.tensor(o.lr, dtype=o.lr_dtype).item()
    opt = torch.optim.AdamW(
        [p], lr=lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, maximize=o.maximize, foreach=False, fused=False
    )
    opt.state[p] = {"step": torch.tensor(float(number - 1)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    opt.step()
    return p.detach() + origin, opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]


def bounds(
    o: Options, state: State, g: Tensor, origin: Tensor | None, number: int, result: State, before: State | None = None
) -> State:
    """How far one step in the compute dtype may be from `result`, the float64 step from `state`: first-order error analysis, with u
    the unit roundoff and one u for each rounded constant and operation. In float64 the oracle rounds as well: twice that.
    `before` are the bounds on the errors that the state came with."""
    w_before, m_before, v_before = before or (0.0, 0.0, 0.0)
    w, m, v, g = (t.double() for t in (*state, g))
    new_w, new_m, new_v = result
    unit, unit64 = torch.finfo(o.compute).eps / 2, torch.finfo(torch.float64).eps / 2
    u = 2 * unit if o.compute == torch.float64 else unit
    g = g.abs() / (o.grad_scale or 1.0) + o.l1
    distance = (w if origin is None else w - origin.double()).abs()
    (b1, b2), lr = o.betas, o.lr

    # g: scale, l1 and its sum; then for each product its constant and itself (g * g once more), and the sum.
    m_error = b1 * m_before + u * (3 * b1 * m.abs() + 6 * (1 - b1) * g)
    v_error = b2 * v_before + u * (3 * b2 * v + 10 * (1 - b2) * g * g)
    bias1, bias2 = -math.expm1(number * math.log(b1) if b1 else -math.inf), -math.expm1(number * math.log(b2) if b2 else -math.inf)
    denominator = new_v.sqrt() / math.sqrt(bias2) + o.eps
    update = lr / bias1 * new_m / denominator
    # lr, bias1, lr / bias1; bias2 and its root; root, division, eps, sum; division; product. The biases cancel in float64.
    relative = 11.5 * u + 4 * unit64 * (1 / bias1 + 0.5 / bias2)
    relative = relative + 0.5 * v_error / new_v.clamp_min(1e-300)
    update_error = update.abs() * relative + lr / bias1 / denominator * m_error
    w_error = w_before + u * (w.abs() + new_w.abs()) + 4 * u * lr * o.weight_decay * distance + update_error
    if o.compute == torch.float64 and origin is not None:
        w_error += 4 * u * origin.abs()  # the oracle's w - origin + origin
    return w_error, m_error, v_error


def check_step(problem: Problem, backend: Backend, number: int) -> Tensor:
    """One step, checked; returns the compact gradient it was given."""
    o, layout = problem.options, problem.layout
    grads = problem.new_grads()
    state = (problem.weight().clone(), problem.exp_avg.clone(), problem.exp_avg_sq.clone())
    g = grads[0] if o.compact_grads else layout.gather(grads)
    before = problem.snapshot()
    problem.step(backend, grads, number)
    for i, (old, new, mask) in enumerate(zip(before, problem.params, layout.masks)):
        outside = ~mask.reshape(-1)
        assert torch.equal(old[outside], bits(new)[outside]), f"tensor {i} changed outside the mask"

    result = adamw(o, torch.float64, state, g, problem.decay_to, number)
    limits = bounds(o, state, g, problem.decay_to, number, result)
    got = problem.weight(), problem.exp_avg, problem.exp_avg_sq
    for name, new, want, limit in zip(("weight", "exp_avg", "exp_avg_sq"), got, result, limits):
        if name == "weight" and problem.values is None and o.dtype != o.compute:
            limit = limit + half_ulp(want, o.dtype)
        error = (new.double() - want).abs()
        assert (error <= limit).all(), f"step {number}, {name}: {(error / limit).max():.3g} times the bound"
    if problem.values is not None:
        rounded = [bits(t) for t in (layout.gather(problem.params), problem.values.to(o.dtype))]
        assert torch.equal(*rounded), f"step {number}: the parameter is not its master, rounded to nearest even"
    return g


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return 0.5 * (x.abs() * info.eps).clamp_min(info.smallest_normal * info.eps)


# ---- tests --------------------------------------------------------------------------------------------------------------

CASES = {
    "defaults": Options(),
    "no decay": Options(weight_decay=0.0, lr_dtype=torch.float32, step_dtype=torch.float32),
    "compact": Options(compact_grads=True, lr=0.1),
    "decay to a point": Options(decay_to=torch.float32, weight_decay=0.3, betas=(0.8, 0.95)),
    "l1 around a point": Options(decay_to=torch.float32, l1=0.05, maximize=True, weight_decay=0.0),
    "l1 around zero": Options(l1=0.1, compact_grads=True, step_dtype=torch.float64),
    "zero betas": Options(betas=(0.0, 0.0), maximize=True, eps=1e-3),
    "scaled": Options(grad_scale=1024.5, found_inf=0.0, lr_dtype=torch.float32),
    "late": Options(first_step=999_951, betas=(0.99, 0.999_999)),
    "float64": Options(dtype=torch.float64, decay_to=torch.float64, l1=1e-3, grad_scale=3.0),
    "float64, compact float32 gradient": Options(dtype=torch.float64, grad_dtype=torch.float32, compact_grads=True),
    "float16": Options(dtype=torch.float16, decay_to=torch.float16, l1=0.01),
    "float16, float32 gradient and master": Options(dtype=torch.float16, grad_dtype=torch.float32, master=True, lr=1e-3),
    "bfloat16": Options(dtype=torch.bfloat16, lr=0.05, grad_scale=8.0),
    "bfloat16, master": Options(dtype=torch.bfloat16, master=True, lr=1e-3),
    "bfloat16, compact, all": Options(
        dtype=torch.bfloat16, grad_dtype=torch.float16, compact_grads=True, master=True, decay_to=torch.bfloat16, l1=0.02,
        maximize=True, grad_scale=0.25, found_inf=0.0, weight_decay=0.2, lr=1e-3, step_dtype=torch.int32,
    ),
}  # fmt: skip


def skip_what_the_interpreter_cannot(options: Options) -> None:
    dtypes = (options.dtype, options.grad_dtype, options.decay_to)
    if INTERPRETED and torch.bfloat16 in dtypes:
        pytest.skip("Triton's interpreter rounds float32 to bfloat16 wrongly")


@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_are_those_of_adamw(backend, name):
    options = CASES[name]
    skip_what_the_interpreter_cannot(options)
    problem = Problem(SMALL, options, seed=sorted(CASES).index(name))
    want, limits = (problem.weight().clone(), problem.exp_avg.clone(), problem.exp_avg_sq.clone()), None
    for number in range(options.first_step, options.first_step + STEPS):
        g = check_step(problem, backend, number)
        old, origin = want, problem.decay_to
        want = adamw(options, torch.float64, old, g, origin, number)
        limits = bounds(options, old, g, origin, number, want, limits)
    if options.master or options.dtype == options.compute:  # else each step's rounding of the parameter comes on top
        for new, exact, limit in zip((problem.weight(), problem.exp_avg, problem.exp_avg_sq), want, limits):
            assert ((new.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("compact_grads", [False, True], ids=["dense", "compact"])
def test_every_layout(backend, name, compact_grads):
    problem = Problem(LAYOUTS[name], Options(compact_grads=compact_grads))
    for number in (1, 2):
        check_step(problem, backend, number)


@pytest.mark.parametrize("seed", range(24))
def test_drawn_options(backend, seed):
    """Any combination; the emulated backends take a few, because each new combination is a new compilation."""
    if backend.name.startswith("triton") and seed >= 6:
        pytest.skip("the emulated backends take the first six")
    pick = lambda *values: values[torch.randint(len(values), (), generator=generator)]  # noqa: E731
    generator = torch.Generator().manual_seed(seed)
    half = torch.float16 if INTERPRETED else pick(torch.float16, torch.bfloat16)
    dtype = pick(torch.float32, half, torch.float64)
    compact_grads = pick(False, True)
    options = Options(
        dtype=dtype,
        grad_dtype=pick(None, torch.float32, half) if compact_grads else pick(None, torch.float32),
        compact_grads=compact_grads,
        master=pick(False, True),
        lr=pick(1e-4, 1e-2, 0.5),
        lr_dtype=pick(torch.float32, torch.float64),
        step_dtype=pick(torch.float32, torch.int64),
        first_step=pick(1, 2, 1000, 100_000),
        betas=pick((0.9, 0.999), (0.0, 0.5), (0.95, 0.9999)),
        eps=pick(1e-8, 1e-4),
        weight_decay=pick(0.0, 0.1),
        decay_to=pick(None, dtype, torch.float64 if dtype == torch.float64 else torch.float32),
        l1=pick(0.0, 0.01),
        maximize=pick(False, True),
        grad_scale=pick(None, 65536.0, 0.3),
        found_inf=pick(None, 0.0),
    )
    problem = Problem(SMALL, options, seed)
    for number in range(options.first_step, options.first_step + 5):
        check_step(problem, backend, number)


@pytest.mark.parametrize("found_inf", [1.0, math.nan, 2.0])
def test_found_inf_leaves_everything_as_it_was(backend, found_inf):
    options = Options(dtype=torch.float16, master=True, found_inf=found_inf, grad_scale=2.0, first_step=5)
    problem = Problem(SMALL, options)
    before = problem.snapshot()
    grads = problem.new_grads()
    grads[0].fill_(math.inf)
    problem.step(backend, grads, 5)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.snapshot()))


@pytest.mark.parametrize("number", [1, 2, 10, 1000, 1_000_000])
@pytest.mark.parametrize("beta", [0.9, 0.999, 0.999_999])
def test_bias_corrections_lose_no_digits(backend, number, beta):
    """A gradient of 1 from zero moments: w' = w - lr (1 - b1)/(1 - b1^t) / sqrt((1 - b2)/(1 - b2^t)), to 1e-6 for any step."""
    options = Options(betas=(0.5, beta), weight_decay=0.0, eps=0.0, lr=1.0, compact_grads=True)
    problem = Problem(Layout([(3,)], 1.0), options)
    problem.params[0].zero_()
    problem.step(backend, [torch.ones(3)], number)
    bias1, bias2 = -math.expm1(number * math.log(0.5)), -math.expm1(number * math.log(beta))
    want = -0.5 / bias1 / math.sqrt((1 - beta) / bias2)
    torch.testing.assert_close(problem.params[0], torch.full((3,), want), rtol=1e-6, atol=0)


def test_offsets_beyond_31_bits(backend):
    """6 GB of address space, of which a few pages are touched."""
    if backend.name in ("triton-interpreter", "gpu"):
        pytest.skip("the former copies storages; the latter would copy 6 GB to and fro")
    columns = 2**30
    weight = torch.empty(3, columns, dtype=torch.float16)
    col = torch.tensor([0, 5, columns - 1, 7, columns - 2, columns - 1], dtype=torch.int32)
    crow = torch.tensor([0, 2, 3, 6])
    flat = weight.view(-1)
    index = torch.tensor([0, 5, 2 * columns - 1, 2 * columns + 7, 3 * columns - 2, 3 * columns - 1])
    neighbours = torch.tensor([1, 4, 6, 2 * columns - 2, 2 * columns, 3 * columns - 3, columns, columns - 1, 7])
    flat[index], flat[neighbours] = 1.0, 2.0
    m, v, grad = torch.zeros(6), torch.zeros(6), torch.tensor([1.0, -1, 1, -1, 1, -1])
    backend([weight], [grad], True, m, v, None, crow, col, torch.tensor(1), torch.tensor(0.25), 0.9, 0.999, 1e-8, 0.0,
        None, 0.0, False, None, None)  # fmt: skip
    assert flat[index].tolist() == [0.75, 1.25, 0.75, 1.25, 0.75, 1.25]
    assert (flat[neighbours] == 2.0).all()


def test_tables_are_kept_by_content():
    pytest.importorskip("triton")
    from deftx_kernels.kernels import sparse_adamw as kernels

    device = torch.device("cpu")
    first = kernels._device_table(device, (1, 2), (1, 2**62 + 1, 3))
    assert first.tolist() == [1, 2**62 + 1, 3]
    assert kernels._device_table(device, (1, 2), (1, 2**62 + 1, 3)) is first
    assert kernels._device_table(device, (1, 3), (1, 2**62 + 1, 3)) is not first
    for i in range(2 * kernels._TABLES_KEPT):
        kernels._device_table(device, (i,), (i,))
    assert len(kernels._tables) == kernels._TABLES_KEPT


@pytest.mark.gpu
@pytest.mark.parametrize("compact_grads", [False, True], ids=["dense", "compact"])
def test_captured_steps_are_the_eager_ones(compact_grads):
    """Captured once with its gradients made inside the graph, replayed with new inputs, rates, step numbers and found_inf."""
    options = Options(dtype=torch.bfloat16, master=True, compact_grads=compact_grads)
    graphed, eager = (Problem(LAYOUTS["three programs"], options) for _ in range(2))
    inputs = [[g.cuda() for g in graphed.new_grads()] for _ in range(6)]

    def on_device(p: Problem):
        group = [p.exp_avg, p.exp_avg_sq, p.values, p.crow_indices, p.col_indices]
        return [t.cuda() for t in p.params], [t.cuda() for t in group]

    def step(tensors, sources, number, lr, found_inf):
        params, (m, v, values, crow, col) = tensors
        grads = [2 * g for g in sources]  # new memory: in a capture, the graph's
        torch.ops.deftx.sparse_adamw_(
            params, grads, compact_grads, m, v, values, crow, col, number, lr, 0.9, 0.999, 1e-8, 0.01,
            None, 0.0, False, None, found_inf,
        )  # fmt: skip

    number, lr, found_inf = torch.zeros((), device="cuda"), torch.zeros((), device="cuda"), torch.zeros((), device="cuda")
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
    for a, b in zip([*static[0], *static[1][:3]], [*plain[0], *plain[1][:3]]):
        assert torch.equal(bits(a), bits(b))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_interpreter():
    """The same tests once more, with the kernel in Triton's interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton-interpreter", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
