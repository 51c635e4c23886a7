"""Problems for sparse_adamw_, with torch.optim.AdamW in float64 as the oracle.

Each step is checked from the state before it, with a bound on the rounding errors of that one step (`bounds`). What is
stored in 16 bits must be the rounding of some result within that bound: to nearest, or to either neighbour with a seed.
Outside the mask, parameters hold NaN, infinities and -0.0, dense gradients hold NaN, and not one bit may change.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from deftx_kernels.ops.schemas import AdamWArgs, compute_dtype, rows_and_columns
from tests.conftest import INTERPRETED

BLOCK = 512  # entries of one Triton program
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
State = tuple[Tensor, Tensor, Tensor]  # weight, exp_avg, exp_avg_sq


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
    full: bool = False  # without col_indices; for layouts of density 1
    changed: bool = False  # marks the entries whose bits change

    @property
    def compute(self) -> torch.dtype:
        return compute_dtype(self.dtype)

    @property
    def stochastic(self) -> tuple[bool, bool]:
        """Whether the parameter, and the state, are rounded stochastically."""
        seeded = self.seed is not None
        return seeded and self.dtype == torch.bfloat16 and not self.master, seeded and self.state == torch.bfloat16


def skip_what_the_interpreter_cannot(o: Options) -> None:
    if INTERPRETED and any(d == bf16 and not stochastic for d, stochastic in zip((o.dtype, o.state), o.stochastic)):
        pytest.skip("Triton's interpreter rounds float32 to the nearest bfloat16 wrongly")


@dataclass
class Layout:
    shapes: list[tuple[int, ...]]
    density: float
    col_dtype: torch.dtype = torch.uint16
    masks: list[Tensor] = field(default_factory=list)

    def draw(self, generator: torch.Generator) -> "Layout":
        return replace(self, masks=[torch.rand(s, generator=generator) < self.density for s in self.shapes])

    def csr(self) -> tuple[Tensor, Tensor]:
        rows = [m.reshape(rows_and_columns(m.shape)) for m in self.masks]
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
    "more tensors than one search step": Layout([(2, 3)] * 150 + [(3,), ()], 0.7),
    "mostly empty rows": Layout([(3000, 4), (0, 4), (2000, 1)], 0.01),
    "int32 columns": Layout([(3, 70_000), (2, 2)], 0.003, torch.int32),
    "largest uint16 column": Layout([(1, 65_536)], 0.01),
}


class Problem:
    """Parameters, state and masks on the CPU; every draw comes from one seed."""

    def __init__(self, layout: Layout, options: Options, seed: int = 0) -> None:
        self.generator, self.steps = torch.Generator().manual_seed(seed), 0
        self.layout, self.options = layout.draw(self.generator), options
        self.crow_indices, self.col_indices = self.layout.csr()
        self.nnz = self.col_indices.numel()
        if options.full:
            ends = torch.tensor([0, *(m.numel() for m in self.layout.masks)])
            self.crow_indices, self.col_indices = ends.cumsum(0), None
        self.changed = torch.zeros(-(-self.nnz // 32), dtype=torch.int32) if options.changed else None
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

    def grads(self, draw: Callable[[tuple[int, ...], torch.dtype], Tensor] | None = None) -> list[Tensor]:
        """Drawn by `draw(shape, dtype)`; by default normal numbers."""
        o = self.options
        dense = [(draw or self.randn)(s, o.grad_dtype or o.dtype) for s in self.layout.shapes]
        for g, mask in zip(dense, self.layout.masks):
            g[~mask] = math.nan
        return [self.layout.gather(dense)] if o.compact_grads else dense

    def exact_grads(self) -> list[Tensor]:
        """Of 12 significant bits."""

        def draw(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            sizes = torch.randint(1 << 11, 1 << 12, shape, generator=self.generator)
            return (sizes * (2 * torch.randint(2, shape, generator=self.generator) - 1)).to(dtype) / 1024

        return self.grads(draw)

    def snapshot(self) -> list[Tensor]:
        tensors = [*self.params, self.exp_avg, self.exp_avg_sq] + ([] if self.values is None else [self.values])
        return [bits(t).clone() for t in tensors]

    def arguments(self, grads: list[Tensor], number: int) -> AdamWArgs:
        o = self.options
        scale, found_inf = (None if x is None else torch.tensor(x) for x in (o.grad_scale, o.found_inf))
        step, lr = torch.tensor(number, dtype=o.step_dtype), torch.tensor([o.lr], dtype=o.lr_dtype)
        return AdamWArgs(
            self.params,
            grads,
            o.compact_grads,
            self.exp_avg,
            self.exp_avg_sq,
            self.values,
            self.crow_indices,
            self.col_indices,
            step,
            lr,
            *o.betas,
            o.eps,
            o.weight_decay,
            self.decay_to,
            o.l1,
            o.maximize,
            scale,
            found_inf,
            o.seed,
            self.changed,
        )

    def marked(self) -> Tensor:
        """bool [nnz]: the entries whose bits are set in `changed`, of which no others are."""
        if self.changed is None:
            return torch.zeros(self.nnz, dtype=torch.bool)
        flags = (self.changed[:, None] >> torch.arange(32) & 1).bool().view(-1)
        assert not flags[self.nnz :].any()
        return flags[: self.nnz]

    def step(self, implementation, grads: list[Tensor], number: int) -> None:
        """Emulated kernels are checked for races in the first step: the following ones are the same launch."""
        with implementation.without_racecheck() if self.steps else contextlib.nullcontext():
            implementation.on_cpu("sparse_adamw_", *self.arguments(grads, number))
        self.steps += 1
        if implementation.name == "triton-sm80":
            assert len(implementation.ops.launches) <= 1, "one launch for all tensors"


def bits(t: Tensor) -> Tensor:
    return t.reshape(-1).view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other))


# ---- oracle ----
def adamw(o: Options, dtype: torch.dtype, state: State, g: Tensor, origin: Tensor | None, number: int) -> State:
    """One step of torch.optim.AdamW. Decay toward `origin` is decay toward 0 of the distance to it."""
    w, m, v, g = (t.to(dtype) for t in (*state, g))
    origin = torch.zeros_like(w) if origin is None else origin.to(dtype)
    w = w - origin
    g = g / (o.grad_scale or 1.0) + (-1 if o.maximize else 1) * o.l1 * torch.sign(w)
    lr = torch.tensor(o.lr, dtype=o.lr_dtype).item()
    options = dict(lr=lr, beta1=o.betas[0], beta2=o.betas[1], eps=o.eps, weight_decay=o.weight_decay)
    step, m, v = torch.tensor(float(number - 1)), m.clone(), v.clone()
    torch_adamw([w], [g], [m], [v], [], [step], foreach=False, amsgrad=False, maximize=o.maximize, **options)
    return w + origin, m, v


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
    bias1, bias2 = (-math.expm1(number * math.log(b) if b else -math.inf) for b in o.betas)
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


def check_step(problem: Problem, implementation, number: int) -> Tensor:
    """One step, checked; returns the compact gradient it was given."""
    o, layout = problem.options, problem.layout
    grads = problem.grads()
    state = (problem.weight().clone(), problem.exp_avg.clone(), problem.exp_avg_sq.clone())
    g = grads[0] if o.compact_grads else layout.gather(grads)
    before, marked = problem.snapshot(), problem.marked()
    problem.step(implementation, grads, number)
    for i, (old, new, mask) in enumerate(zip(before, problem.params, layout.masks)):
        outside = ~mask.reshape(-1)
        assert torch.equal(old[outside], bits(new)[outside]), f"tensor {i} changed outside the mask"
    if o.changed:
        differs = [bits(new) != old for old, new in zip(before, problem.params)]
        at_entries = torch.cat([d[mask.reshape(-1)] for d, mask in zip(differs, layout.masks)])
        assert torch.equal(problem.marked(), marked | at_entries), f"step {number}: wrong marks"

    result = adamw(o, torch.float64, state, g, problem.decay_to, number)
    limits = bounds(o, state, g, problem.decay_to, number, result)
    got = {"weight": problem.weight(), "exp_avg": problem.exp_avg, "exp_avg_sq": problem.exp_avg_sq}
    for (name, new), want, limit in zip(got.items(), result, limits):
        if new.dtype == o.compute:
            error = (new.double() - want).abs()
            assert (error <= limit).all(), f"step {number}, {name}: {(error / limit).max():.3g} times the bound"
        else:
            ends = (want - limit).to(o.compute), (want + limit).to(o.compute)
            low, high = rounding_range(*ends, new.dtype, o.stochastic[name != "weight"])
            wrong = int(((new < low) | (new > high)).sum())
            assert not wrong, f"step {number}, {name}: {wrong} are not the rounding of a result within its bound"
    if problem.values is not None:
        rounded = [layout.gather(problem.params)], [problem.values.to(o.dtype)]
        assert same_bits(*rounded), f"step {number}: the parameter is not its master, rounded to nearest even"
    return g


def rounding_range(low: Tensor, high: Tensor, dtype: torch.dtype, stochastic: bool) -> tuple[Tensor, Tensor]:
    """The smallest and the largest number of the dtype that anything between `low` and `high` may be rounded to."""
    down, up = low.to(dtype), high.to(dtype)
    if stochastic:
        down = torch.where(down > low, torch.nextafter(down, torch.full_like(down, -math.inf)), down)
        up = torch.where(up < high, torch.nextafter(up, torch.full_like(up, math.inf)), up)
    return down, up
