"""sparse_adamw_ against torch.optim.AdamW in float64, the same tests for every implementation.

Each step is checked from the state before it, with a bound on the rounding errors of that one step (`bounds`); fifty
steps in a row are checked against fifty float64 steps, with those bounds carried on from step to step.
What is rounded to 16 bits must be what some result within that bound is rounded to: to nearest, or to either neighbour
with a seed. Where every implementation must compute the same float32 numbers, seeded results must equal the reference's
in every bit. Outside the mask, parameters hold NaN, infinities and -0.0, dense gradients hold NaN, and not one bit may
change.
"""

import importlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import deftx_kernels  # noqa: F401  (registers the operators)
from deftx_kernels.ops import reference, schemas

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = [
    "reference",
    "cpu",
    pytest.param("triton-sm80", marks=pytest.mark.cuda_on_cpu),
    pytest.param("gpu", marks=pytest.mark.gpu),
]
# the variable decides what `triton.jit` makes, so this backend has a process to itself: see the last test
if INTERPRETED:
    BACKENDS = ["triton-interpreter"]

pytestmark = pytest.mark.usefixtures("one_thread")

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
                sparse_adamw_(schemas.AdamWArgs(params, grads, *rest))
                return
            with self.tool.override(racecheck=True, extra=[*params, *grads]) as launches:
                sparse_adamw_(schemas.AdamWArgs(params, grads, *rest))
            assert len(launches) <= 1, "one launch for all tensors"


@pytest.fixture(params=BACKENDS)
def backend(request) -> Backend:
    if request.param.startswith("triton"):
        pytest.importorskip("triton")
    if request.param == "triton-sm80":
        tool = request.getfixturevalue("cuda_on_cpu")
        return Backend(request.param, importlib.import_module(f"{tool.__name__}.triton_on_cpu"))
    return Backend(request.param)


# ---- problems ----
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
    state: torch.dtype | None = None  # of exp_avg and exp_avg_sq; None: what is computed in
    seed: int | None = None

    @property
    def compute(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def rounds_by_chance(self) -> tuple[bool, bool]:
        """Parameter, state."""
        seeded = self.seed is not None
        return seeded and self.dtype == torch.bfloat16 and not self.master, seeded and self.state == torch.bfloat16


@dataclass
class Layout:
    shapes: list[tuple[int, ...]]
    density: float
    col_dtype: torch.dtype = torch.uint16
    masks: list[Tensor] = field(default_factory=list)

    def draw(self, generator: torch.Generator) -> "Layout":
        return replace(self, masks=[torch.rand(s, generator=generator) < self.density for s in self.shapes])

    def csr(self) -> tuple[Tensor, Tensor]:
        rows = [m.reshape(schemas.rows_and_columns(m.shape)) for m in self.masks]
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
        state = options.state or options.compute
        self.exp_avg, self.exp_avg_sq = (torch.zeros(self.nnz, dtype=state) for _ in range(2))
        if options.first_step > 1:
            self.exp_avg, self.exp_avg_sq = self.randn(self.nnz, state), self.randn(self.nnz, state) ** 2
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

    def step(self, backend: Callable, grads: list[Tensor], number: int) -> None:
        o = self.options
        scalar = [None if x is None else torch.tensor(x, dtype=torch.float32) for x in (o.grad_scale, o.found_inf)]
        backend(
            self.params, grads, o.compact_grads, self.exp_avg, self.exp_avg_sq, self.values,
            self.crow_indices, self.col_indices, torch.tensor(number, dtype=o.step_dtype), torch.tensor([o.lr], dtype=o.lr_dtype),
            *o.betas, o.eps, o.weight_decay, self.decay_to, o.l1, o.maximize, *scalar, o.seed,
        )  # fmt: skip


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


# ---- oracle ----
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
        [p],
        lr=lr,
        betas=o.betas,
        eps=o.eps,
        weight_decay=o.weight_decay,
        maximize=o.maximize,
        foreach=False,
        fused=False,
    )
    opt.state[p] = {"step": torch.tensor(float(number - 1)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    opt.step()
    return p.detach() + origin, opt.state[p]["exp_avg"], opt.state[p]["exp_avg_sq"]


def bounds(
    o: Options, state: State, g: Tensor, origin: Tensor | None, number: int, result: State, before: State | None = None
) -> State:
    """How far one step in the compute dtype may be from `result`, the float64 step from `state`: first-order error
    analysis, with u the unit roundoff and one u for each rounded constant and operation. In float64 the oracle rounds
    as well: twice that. `before` are the bounds on the errors that the state came with."""
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
    bias1, bias2 = (
        -math.expm1(number * math.log(b1) if b1 else -math.inf),
        -math.expm1(number * math.log(b2) if b2 else -math.inf),
    )
    denominator = new_v.sqrt() / math.sqrt(bias2) + o.eps
    update = lr / bias1 * new_m / denominator
    # lr, bias1, lr / bias1; bias2 and its root; root, division, eps, sum; division; product. The biases cancel in
    # float64.
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
    got = {"weight": problem.weight(), "exp_avg": problem.exp_avg, "exp_avg_sq": problem.exp_avg_sq}
    for (name, new), want, limit in zip(got.items(), result, limits):
        by_chance = o.rounds_by_chance[name != "weight"]
        if new.dtype == o.compute:
            error = (new.double() - want).abs()
            assert (error <= limit).all(), f"step {number}, {name}: {(error / limit).max():.3g} times the bound"
        else:
            low, high = rounding_range((want - limit).to(o.compute), (want + limit).to(o.compute), new.dtype, by_chance)
            wrong = int(((new < low) | (new > high)).sum())
            assert not wrong, f"step {number}, {name}: {wrong} are not what a result within its bound is rounded to"
    if problem.values is not None:
        rounded = [bits(t) for t in (layout.gather(problem.params), problem.values.to(o.dtype))]
        assert torch.equal(*rounded), f"step {number}: the parameter is not its master, rounded to nearest even"
    return g


def rounding_range(low: Tensor, high: Tensor, dtype: torch.dtype, by_chance: bool) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of the dtype that anything between `low` and `high` may be rounded to."""
    down, up = low.to(dtype), high.to(dtype)
    if by_chance:
        down = torch.where(down > low, torch.nextafter(down, torch.full_like(down, -math.inf)), down)
        up = torch.where(up < high, torch.nextafter(up, torch.full_like(up, math.inf)), up)
    return down, up


# ---- tests ----
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
    "bfloat16 state": Options(state=torch.bfloat16, decay_to=torch.float32, weight_decay=0.3),
    "bfloat16 state, compact": Options(state=torch.bfloat16, grad_dtype=torch.bfloat16, compact_grads=True, first_step=1000),
    "bfloat16 state, float16": Options(dtype=torch.float16, state=torch.bfloat16, grad_dtype=torch.float32, grad_scale=3.0),
    "bfloat16 state, float16, master": Options(dtype=torch.float16, state=torch.bfloat16, master=True, l1=0.01),
    "bfloat16 state, bfloat16": Options(dtype=torch.bfloat16, state=torch.bfloat16, lr=0.05, maximize=True),
    "bfloat16 state, bfloat16, master": Options(
        dtype=torch.bfloat16, state=torch.bfloat16, master=True, grad_dtype=torch.float16, compact_grads=True, lr=1e-3
    ),
    "seed, bfloat16": Options(seed=1, dtype=torch.bfloat16, decay_to=torch.bfloat16, grad_dtype=torch.float32),
    "seed, bfloat16 state": Options(seed=2**63 - 1, state=torch.bfloat16, grad_dtype=torch.float16, compact_grads=True),
    "seed, bfloat16 state, float16, master": Options(seed=0, dtype=torch.float16, state=torch.bfloat16, master=True, lr=1e-3),
    "seed, bfloat16 state, bfloat16": Options(seed=2**32, dtype=torch.bfloat16, state=torch.bfloat16, first_step=100_000, l1=0.01),
    "seed, bfloat16 state, bfloat16, master": Options(
        seed=3, dtype=torch.bfloat16, state=torch.bfloat16, master=True, lr=1e-3, step_dtype=torch.float32
    ),
}  # fmt: skip


def skip_what_the_interpreter_cannot(o: Options) -> None:
    stored = (o.dtype, o.state)
    if INTERPRETED and any(d == torch.bfloat16 and not by_chance for d, by_chance in zip(stored, o.rounds_by_chance)):
        pytest.skip("Triton's interpreter rounds float32 to the nearest bfloat16 wrongly")


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
    # else each step's rounding comes on top
    if (options.master or options.dtype == options.compute) and options.state is None:
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
        state=None if dtype == torch.float64 else pick(None, torch.bfloat16),
        seed=pick(None, 17, 2**40 + 3),
    )
    skip_what_the_interpreter_cannot(options)
    if not compact_grads and dtype == torch.float64:  # `functional` converts such gradients
        options.grad_dtype = None
    problem = Problem(SMALL, options, seed)
    for number in range(options.first_step, options.first_step + 5):
        check_step(problem, backend, number)


def test_without_decay_infinite_weights_and_negative_zeros_stay(backend):
    """As in torch.optim.AdamW, whose factor is then 1; 0 * (w - decay_to) would be NaN."""
    problem = Problem(Layout([(3, 300)], 1.0), Options(weight_decay=0.0, decay_to=torch.float32, compact_grads=True))
    weights = torch.tensor([math.inf, -math.inf, -0.0]).repeat(300)
    problem.params[0].copy_(weights.view(3, 300))
    problem.step(backend, [torch.zeros(900)], 1)
    assert torch.equal(bits(problem.weight()), bits(weights))


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
    """A gradient of 1 from zero moments: w' = w - lr (1 - b1)/(1 - b1^t) / sqrt((1 - b2)/(1 - b2^t)), to 1e-6 for any
    step.
    """
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
        None, 0.0, False, None, None, None)  # fmt: skip
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


# ---- stochastic rounding ----
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
    if seed == step == 0:
        assert words[:, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


# With betas and eps of 0, and gradients of at most 12 significant bits, m = g and v = g * g are exact, sqrt(v) = |g|,
# and w - lr * g / |g| is rounded once: no implementation may differ in a bit.
EXACT = Options(dtype=torch.bfloat16, state=torch.bfloat16, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, lr=0.0123)


def exact_grads(problem: Problem) -> list[Tensor]:
    """12 significant bits: of m, 4 are rounded away, of v up to 16."""
    dense = []
    for shape, mask in zip(problem.layout.shapes, problem.layout.masks):
        sizes = torch.randint(1 << 11, 1 << 12, shape, generator=problem.generator)
        signs = 2 * torch.randint(2, shape, generator=problem.generator) - 1
        g = (sizes * signs).to(problem.options.grad_dtype or problem.options.dtype) / 1024
        g[~mask] = math.nan
        dense.append(g)
    return [problem.layout.gather(dense)] if problem.options.compact_grads else dense


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("seed", "compact_grads"), [(0, True), (2**32 + 7, False), (2**63 - 1, True)])
def test_seeded_steps_are_the_references_in_every_bit(backend, name, seed, compact_grads):
    options = replace(EXACT, grad_dtype=torch.float32, compact_grads=compact_grads, seed=seed)
    for variant in (options, replace(options, dtype=torch.float32), replace(options, state=None)):
        problem, oracle = (Problem(LAYOUTS[name], variant) for _ in range(2))
        for number in (1, 2, 2**32 + 1):
            problem.step(backend, exact_grads(problem), number)
            oracle.step(Backend("reference"), exact_grads(oracle), number)
            assert all(torch.equal(a, b) for a, b in zip(problem.snapshot(), oracle.snapshot())), (variant, number)


def test_seeds_and_steps_round_differently(backend):
    options = replace(EXACT, grad_dtype=torch.float32)

    def after(seed: int, number: int) -> list[Tensor]:
        problem = Problem(LAYOUTS["one full program"], replace(options, seed=seed))
        problem.step(backend, exact_grads(problem), number)
        return [problem.weight().clone(), problem.exp_avg, problem.exp_avg_sq]

    first = after(5, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, after(5, 1)))
    for seed, number in ((6, 1), (5 + 2**32, 1), (5, 2), (5, 2**32 + 1)):
        for name, a, b in zip(("weight", "exp_avg", "exp_avg_sq"), first, after(seed, number)):
            # Two independent roundings of a number differ with probability 2 p (1 - p), on average over p a third.
            assert 0.15 < (a != b).double().mean() < 0.5, (name, seed, number)


def test_stochastic_rounding_is_right_in_the_mean(backend):
    """Each number is rounded up as often as it is near to the upper neighbour, within 4 standard deviations."""
    layout = Layout([(3, 1000), (5000,)], 1.0)
    problem = Problem(layout, replace(EXACT, seed=11, compact_grads=True, lr=0.3 * 2**-8))
    for p in problem.params:
        p.fill_(1.0)
    g = torch.full((problem.nnz,), 1 + 0.3125 * 2**-7)  # g * g = 1 + 0.626 * 2**-7
    problem.step(backend, [g], 1)
    w = torch.tensor(1.0) - torch.tensor(problem.options.lr, dtype=torch.float32)
    for exact, got in ((w, problem.weight()), (g[0], problem.exp_avg), (g[0] * g[0], problem.exp_avg_sq)):
        low, high = rounding_range(exact, exact, torch.bfloat16, by_chance=True)
        share = float((exact - low) / (high.float() - low.float()))
        assert 0.2 < share < 0.8
        assert ((got == low) | (got == high)).all()
        found = (got == high).double().mean()
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / problem.nnz)
    up = torch.stack([problem.weight() == 1, problem.exp_avg > 1, problem.exp_avg_sq > 1]).double()
    others = torch.corrcoef(up) - torch.eye(3)
    assert (others.abs() < 4 / math.sqrt(problem.nnz)).all(), "the three numbers of an entry are rounded independently"


@pytest.mark.parametrize("seed", [None, 12])
def test_decay_that_nearest_rounding_drops_counts_in_the_mean(backend, seed):
    """Fifty times 0.999 of 1: each step is below half a unit in the last place of bfloat16."""
    options = Options(state=torch.bfloat16, compact_grads=True, seed=seed)
    skip_what_the_interpreter_cannot(options)
    problem = Problem(Layout([(2000,)], 1.0), options)
    problem.exp_avg_sq.fill_(1.0)
    for number in range(1, STEPS + 1):
        problem.step(backend, [torch.zeros(problem.nnz)], number)
    mean = problem.exp_avg_sq.double().mean()
    if seed is None:
        assert mean == 1
    else:  # a number's variance grows by at most a quarter of a squared unit, 2**-8, in a step
        assert abs(mean - 0.999**STEPS) < 4 * math.sqrt(STEPS / 4 / problem.nnz) * 2**-8


def test_what_bfloat16_holds_stays(backend):
    """With lr = 0, each parameter is one of bfloat16's own numbers; so are the moments of such gradients."""
    problem = Problem(Layout([(100, 9)], 1.0), replace(EXACT, seed=8, lr=0.0, compact_grads=True))
    subnormal = 0.5 if INTERPRETED else 3 * 2.0**-133  # Triton's interpreter reads such a bfloat16 wrongly
    special = torch.tensor([0.0, -2.0, 1.0, -1.5, 2.0**-126, subnormal, 255 * 2.0**120, -255 * 2.0**120, math.nan])
    problem.params[0].copy_(special.expand(100, 9))
    gradient = torch.tensor([1.0, 2.0, 3.0, 0.125, 7.0, -15.0, 2.0**-20, 2.0**60, -11.0]).repeat(100)
    before = problem.weight().clone()
    problem.step(backend, [gradient], 1)
    assert torch.equal(problem.exp_avg.float(), gradient)
    assert torch.equal(problem.exp_avg_sq.float(), gradient * gradient)
    number = ~before.isnan()
    assert torch.equal(bits(before[number]), bits(problem.weight()[number]))
    assert problem.weight()[~number].isnan().all()


def test_infinities_and_nan_stay(backend):
    """A NaN has any bits below its exponent: adding to them must not make an infinity or a zero of it."""
    problem = Problem(Layout([(1000,)], 1.0), replace(EXACT, seed=9, betas=(0.9, 0.999), compact_grads=True))
    patterns = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800001, 0x7F800000, -0x00800000], dtype=torch.int64)
    g = patterns.to(torch.int32).view(torch.float32).repeat(167)[:1000]
    problem.step(backend, [g], 1)
    nan = g.isnan()
    assert problem.exp_avg[nan].isnan().all()
    assert problem.exp_avg_sq[nan].isnan().all()
    assert problem.weight().isnan().all()
    assert torch.equal(problem.exp_avg[~nan].float(), g[~nan])
    assert (problem.exp_avg_sq[~nan] == math.inf).all()

    problem = Problem(Layout([(1000,)], 1.0), replace(EXACT, seed=9, lr=3e38, compact_grads=True))
    problem.params[0].fill_(-255 * 2.0**120)
    problem.step(backend, [torch.ones(1000)], 1)
    assert (problem.weight() == -math.inf).all()


@pytest.mark.parametrize(
    "options",
    [
        Options(l1=0.01),
        Options(dtype=torch.float64, compact_grads=True),
        Options(dtype=torch.float16, master=True, grad_dtype=torch.float32),
        Options(dtype=torch.bfloat16, master=True),
    ],
    ids=["float32", "float64", "float16, master", "bfloat16, master"],
)
def test_a_seed_changes_nothing_where_nothing_is_rounded_by_chance(backend, options):
    skip_what_the_interpreter_cannot(options)
    plain, seeded = Problem(SMALL, options), Problem(SMALL, replace(options, seed=2**33 + 1))
    for number in (1, 2):
        for problem in (plain, seeded):
            problem.step(backend, problem.new_grads(), number)
        assert all(torch.equal(a, b) for a, b in zip(plain.snapshot(), seeded.snapshot()))


# ---- the compiled CPU kernel ----
@pytest.mark.parametrize(
    "options",
    [
        Options(decay_to=torch.float32, l1=1e-3),
        Options(dtype=torch.float64, compact_grads=True),
        Options(dtype=torch.float16, master=True, state=torch.bfloat16),
        Options(dtype=torch.bfloat16, grad_dtype=torch.float32, state=torch.bfloat16, seed=2**35 + 1),
        Options(
            dtype=torch.bfloat16,
            grad_dtype=torch.float16,
            compact_grads=True,
            master=True,
            state=torch.bfloat16,
            seed=4,
        ),
    ],
    ids=["float32", "float64", "float16", "bfloat16, seed", "bfloat16, master, seed"],
)
def test_threads_do_not_matter(options):
    layout = Layout([(300, 400), (5,), (0, 3), (1000, 60), (4, 7001)], 0.5)
    results = []
    for threads in (1, 2, 3):
        problem = Problem(layout, options)
        assert problem.nnz > 50_000
        torch.set_num_threads(threads)
        try:
            for number in (1, 2):
                problem.step(Backend("cpu"), problem.new_grads(), number)
        finally:
            torch.set_num_threads(1)
        results.append(problem.snapshot())
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result))


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
    compact_grads = wrong.startswith("compact")
    options = Options(master=True, decay_to=torch.float32, compact_grads=compact_grads)
    problem = Problem(Layout([(5, 20), (6,)], 1.0), options)
    given: list[Tensor] = []

    def backend(params, grads, *rest):
        names = [a.name for a in torch.ops.deftx.sparse_adamw_.default._schema.arguments]
        arguments = dict(zip(names, (params, grads, *rest)))
        name = wrong.removeprefix("compact ").replace(",", "").split()[0]
        arguments[name] = WRONG[wrong](arguments[name])
        given.extend(arguments[name] if isinstance(arguments[name], list) else [arguments[name]])
        before.extend(t.clone() for t in given)
        torch.ops.deftx.sparse_adamw_(**arguments)

    before: list[Tensor] = []
    snapshot = problem.snapshot()
    with pytest.raises(RuntimeError, match=r"must|has|dtype"):
        problem.step(backend, problem.new_grads(), 1)
    assert all(torch.equal(a, b) for a, b in zip(snapshot, problem.snapshot()))
    assert all(torch.equal(a, b) for a, b in zip(before, given))


@pytest.mark.gpu
@pytest.mark.parametrize("compact_grads", [False, True], ids=["dense", "compact"])
@pytest.mark.parametrize("seed", [None, 2**40 + 1])
def test_captured_steps_are_the_eager_ones(compact_grads, seed):
    """Captured once with its gradients made inside the graph, replayed with new inputs, rates, step numbers and
    found_inf.
    """
    state = None if seed is None else torch.bfloat16
    options = Options(dtype=torch.bfloat16, master=True, compact_grads=compact_grads, state=state, seed=seed)
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
            None, 0.0, False, None, found_inf, seed,
        )  # fmt: skip

    number, lr, found_inf = (
        torch.zeros((), device="cuda"),
        torch.zeros((), device="cuda"),
        torch.zeros((), device="cuda"),
    )
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


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_triton_interpreter():
    """The same tests once more, with the kernel in Triton's interpreter."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton-interpreter", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
