"""sparse_adamw and SparseAdamW against dense optimizers and other sparse ones."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import (
    GRAPH,
    MODULES,
    Call,
    Case,
    Choice,
    Setting,
    Workload,
    available_bytes,
    imported,
    too_large,
    workload,
)
from bench.rows import OURS
from bench.shapes import copies, random_tensors
from deftx_kernels import SparseAdamW, sparse_adamw, topk_mask
from deftx_kernels.train.tensors import state_bytes

OPS = {
    "sparse_adamw": "one step of AdamW at the masked entries of a model's tensors, by our function",
    "optimizer_step": "the same step by optimizers as users make them, with the memory that training holds",
}
SIZES = ("tiny", "10M", "minilm", "50M", "bert", "xlmr", "llama1b")
ONE_DENSITY = ("10M", "bert", "llama1b")
# Nine optimizers fit side by side, and 8-bit ones quantize tensors of these shapes.
OPTIMIZER_SIZES = ("tiny", "minilm")
# A step large enough for bfloat16, an eps large enough for float16. No decay: SparseAdam has none.
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-7, "weight_decay": 0.0}
FUSED, FOREACH, MASK_FOREACH = "torch AdamW fused", "torch AdamW foreach", "mask + torch AdamW foreach"
LIFT, SPARSE_ADAM, MASK_SPARSE_ADAM = "LIFT's step", "torch SparseAdam", "sparse_mask + torch SparseAdam"

Parameters = dict[str, torch.nn.Parameter]


def workloads(choice: Choice) -> Iterator[Workload]:
    for size in choice.sizes:
        for setting in choice.settings(default(size, choice.device)):
            for kind in ("dense", "compact"):
                title = f"{size}, {kind} gradient"
                yield workload(adamw_case, "sparse_adamw", size, setting, choice.device, kind, title=title)
    for size in (s for s in choice.sizes if s in OPTIMIZER_SIZES):
        for setting in choice.settings(default(size, choice.device)[:1]):
            yield workload(optimizer_case, "optimizer_step", size, setting, choice.device)


def default(size: str, device: str) -> list[Setting]:
    # Llama in bfloat16, as such a model is stored; float32 with gradients and a baseline would not fit 24 GB.
    dtypes = [torch.bfloat16] if size == "llama1b" else [torch.float32]
    if device == "cuda":
        dtypes = [torch.float32, torch.bfloat16]
    return [(dtype, density) for dtype in dtypes for density in ((0.05,) if size in ONE_DENSITY else (0.05, 0.01))]


# ---- the inputs that all share ----
class Problem:
    """Parameters, gradients and a mask, and the masked entries after one step of AdamW in float64."""

    def __init__(self, size: str, dtype: torch.dtype, density: float, device: str) -> None:
        self.mask = topk_mask(random_tensors(size, torch.float32, device, seed=2), density=density)
        self.params, self.grads = (random_tensors(size, dtype, device, seed=seed) for seed in (0, 1))
        # No gradient is tiny: AdamW adds eps to the root of the corrected second moment, SparseAdam and LIFT to that
        # of the moment itself, 1/32 of it at the first step. From |gradient| = 0.1 on, the difference is below the
        # tolerance.
        for gradient in self.grads.values():
            gradient.add_(torch.where(gradient < 0, -0.1, 0.1))
        self.compact = self.mask.gather(self.grads)
        exact = torch.nn.Parameter(self.mask.gather(self.params).double())
        exact.grad = self.compact.double()
        torch.optim.AdamW([exact], **SETTINGS).step()
        self.expected = exact.detach()
        values = torch.cat([self.expected, *map(sample, self.params.values())])
        self.tolerance = max(1e-5, torch.finfo(dtype).eps * largest(values))
        self.bytes = self.mask.numel * dtype.itemsize  # of the parameters; the gradients have as many

    def check(self, result: dict[str, Tensor]) -> str | None:
        fault = self.deviation(self.mask.gather(result).double() - self.expected, "at the masked entries")
        # Every gradient is large enough to change its entry: a masked optimizer changes the masked entries, a dense
        # one all of them.
        moved = sum(int(torch.count_nonzero(result[n] != t)) for n, t in self.params.items())
        if fault or moved == self.mask.nnz:
            return fault
        if moved != self.mask.numel:
            return f"{moved} entries have moved, neither the {self.mask.nnz} of the mask nor all"
        step = SETTINGS["lr"]  # of any gradient, the first time
        over = [sample(result[n]) - sample(t) + step * sample(self.grads[n]).sign() for n, t in self.params.items()]
        return self.deviation(torch.cat(over), "outside the mask")

    def deviation(self, difference: Tensor, where: str) -> str | None:
        worst = largest(difference)
        return None if worst <= self.tolerance else f"{worst:.1e} from AdamW in float64 {where}"

    @property
    def state_dtype(self) -> torch.dtype:
        """Of our moments: on a GPU as the baselines', the parameters'; on the CPU at least float32."""
        dtype = next(iter(self.params.values())).dtype
        return dtype if self.mask.device.type == "cuda" else torch.promote_types(dtype, torch.float32)

    def bytes_moved(self, compact: bool) -> int:
        """By a sparse step: moments read and written, the index, and parameters (read and written) and dense gradients
        in whole sectors (cache lines on the CPU)."""
        mask, itemsize = self.mask, next(iter(self.params.values())).element_size()
        sector = 32 if mask.device.type == "cuda" else 64
        touched = (1 - (1 - mask.density) ** (sector / itemsize)) * mask.numel * itemsize
        gradient = mask.nnz * itemsize if compact else touched
        state = 4 * self.state_dtype.itemsize
        return round(mask.nnz * (state + mask.col_indices.element_size()) + 2 * touched + gradient)

    @cached_property
    def keep(self) -> dict[str, Tensor]:
        """The mask as bool tensors."""
        return self.mask.to_dense()

    @cached_property
    def sparse_grads(self) -> dict[str, Tensor]:
        """The masked entries of the gradients as torch's sparse COO tensors."""
        options = {"is_coalesced": True, "check_invariants": False}
        return {
            n: torch.sparse_coo_tensor(self.keep[n].nonzero().T, values, self.params[n].shape, **options)
            for n, values in self.mask.split(self.compact).items()
        }

    def implementation(self, baseline: "Baseline", note: Callable[[Parameters, Any], None] | None = None):
        """An optimizer's step and its preparation. `note` is then called with parameters and optimizer."""

        def make() -> Call:
            mine = {n: torch.nn.Parameter(t.clone()) for n, t in self.params.items()}
            for name, gradient in (baseline.gradients() if baseline.gradients else self.grads).items():
                mine[name].grad = gradient
            optimizer = baseline.optimizer(mine)

            def call() -> dict[str, Tensor]:
                baseline.prepare(mine)
                optimizer.step()
                if note:
                    note(mine, optimizer)
                return {n: p.detach() for n, p in mine.items()}

            return call

        return make


def largest(tensor: Tensor) -> float:
    """The largest magnitude; 0 of an empty tensor."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def sample(tensor: Tensor) -> Tensor:  # float64 [at most 4096]
    """The first entries: enough to tell a dense step from another change, in tensors of any size."""
    return tensor.flatten()[:4096].double()


# ---- the baselines ----
@dataclass
class Baseline:
    optimizer: Callable[[Parameters], Any]
    gradients: Callable[[], dict[str, Tensor]] | None = None  # None: the shared ones, which it does not write to
    prepare: Callable[[Parameters], None] = lambda parameters: None  # before each step
    needs: int = 0  # bytes at its peak, beside the shared inputs
    mask_bytes: int = 0


class LiftStep:
    """The step of LIFT (Liu et al. 2025) as in its authors' optimizer, re-implemented.

    A bool mask of each tensor is in main memory and copied to the parameter's device in each step. The gradient it
    selects updates compact moments; the compact update is written over the gradient, whose other entries are set to 0,
    and all of it is added to the parameter. A second call finds that update instead of a gradient from backward: other
    numbers, the same amount of work.
    """

    def __init__(self, parameters: Parameters, masks: dict[str, Tensor]) -> None:
        self.parameters, self.masks, self.count = parameters, masks, 0
        self.state: dict[torch.nn.Parameter, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self) -> None:
        self.count += 1
        beta1, beta2 = SETTINGS["betas"]
        rate = SETTINGS["lr"] * math.sqrt(1 - beta2**self.count) / (1 - beta1**self.count)
        for name, parameter in self.parameters.items():
            chosen = self.masks[name].to(parameter.device)
            picked = parameter.grad[chosen]
            if parameter not in self.state:
                self.state[parameter] = {"exp_avg": torch.zeros_like(picked), "exp_avg_sq": torch.zeros_like(picked)}
            first, second = self.state[parameter].values()
            first.mul_(beta1).add_(picked, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(picked, picked, value=1 - beta2)
            parameter.grad[chosen] = first / second.sqrt().add_(SETTINGS["eps"])
            parameter.grad[~chosen] = 0
            parameter.add_(parameter.grad, alpha=-rate)


def torch_adamw(**implementation: bool) -> Callable[[Parameters], torch.optim.AdamW]:
    return lambda parameters: torch.optim.AdamW(parameters.values(), **SETTINGS, **implementation)


def torch_sparse_adam(parameters: Parameters) -> torch.optim.SparseAdam:
    return torch.optim.SparseAdam(parameters.values(), **{k: v for k, v in SETTINGS.items() if k != "weight_decay"})


def dense_baselines(problem: Problem) -> dict[str, Baseline]:
    """The baselines with dense gradients, the most important first."""
    mask, size = problem.mask, problem.bytes

    def zero_the_others(parameters: Parameters) -> None:  # as LT-SFT does before a dense step
        for name, parameter in parameters.items():
            parameter.grad.mul_(problem.keep[name])

    def own() -> dict[str, Tensor]:
        return copies(problem.grads)

    def lift(parameters: Parameters) -> LiftStep:
        return LiftStep(parameters, problem.keep if mask.device.type == "cpu" else mask.to("cpu").to_dense())

    # fused: parameters and two moments. foreach: also gradients, the roots of its moments and a bool mask. LIFT:
    # parameters, gradients and mask, compact moments and the positions of the mask's entries.
    lift_needs = 2 * size + mask.numel + 32 * mask.nnz
    return {
        FUSED: Baseline(torch_adamw(fused=True), needs=3 * size),
        LIFT: Baseline(lift, own, needs=lift_needs, mask_bytes=mask.numel),
        MASK_FOREACH: Baseline(torch_adamw(foreach=True), own, zero_the_others, 5 * size + mask.numel, mask.numel),
    }


def sparse_adam(problem: Problem, compact: bool) -> Baseline:
    """SparseAdam takes sparse gradients: made beforehand where ours takes compact gradients; selected from dense ones
    by torch's `sparse_mask` in each step where ours selects them too."""

    def select(parameters: Parameters) -> None:
        for name, parameter in parameters.items():
            parameter.grad = problem.grads[name].sparse_mask(problem.sparse_grads[name])

    # Parameters, two dense moments, the sparse gradients' positions and values, and compact tensors of the step.
    needs = 3 * problem.bytes + problem.mask.numel + 64 * problem.mask.nnz
    if compact:
        return Baseline(torch_sparse_adam, lambda: problem.sparse_grads, needs=needs)
    return Baseline(torch_sparse_adam, dict, select, needs)


def free_bytes(device: str) -> int:
    if device == "cpu":
        return available_bytes()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


# ---- the cases ----
def our_step(problem: Problem, compact: bool, at_once: bool = False) -> Call:
    """Ours, with dense or compact gradients, on copies of the parameters. The moments are made in the first step like
    the baselines': a peak counts all moments or none; or else `at_once`."""
    mask, params = problem.mask, copies(problem.params)
    gradient = problem.compact if compact else problem.grads
    step, lr = (torch.tensor(x, device=mask.device) for x in (0.0, SETTINGS["lr"]))
    options = {k: v for k, v in SETTINGS.items() if k != "lr"}
    state: list[Tensor] = []

    def make_state() -> None:
        state.extend(torch.zeros(mask.nnz, dtype=problem.state_dtype, device=mask.device) for _ in range(2))

    def call() -> dict[str, Tensor]:
        if not state:
            make_state()
        step.add_(1)
        sparse_adamw(params, gradient, *state, step, mask, lr=lr, **options)
        return params

    if at_once:
        make_state()
    return call


def replayed(problem: Problem, compact: bool) -> Call:
    """Ours as a captured CUDA graph: the kernel without Python and launch."""
    our_step(problem, compact)()  # compiles the kernel
    call, graph = our_step(problem, compact, at_once=True), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        params = call()

    def replay() -> dict[str, Tensor]:
        graph.replay()
        return params

    return replay


def adamw_case(size: str, dtype: torch.dtype, density: float, device: str, kind: str) -> Case:
    """One step, ours with dense or compact gradients. The baselines' moments have the parameters' dtype."""
    compact = kind == "compact"
    problem = Problem(size, dtype, density, device)
    implementations: dict[str, Callable] = {OURS: lambda: our_step(problem, compact)}
    if device == "cuda":
        implementations[f"{OURS}{GRAPH}"] = lambda: replayed(problem, compact)
    our_needs = len(implementations) * problem.bytes + 40 * problem.mask.nnz  # moments, and the check's float64
    others = dense_baselines(problem)
    others[SPARSE_ADAM if compact else MASK_SPARSE_ADAM] = sparse_adam(problem, compact)
    # All are held while timed.
    absent = too_large({n: one.needs for n, one in others.items()}, free_bytes(device) - our_needs, together=True)
    implementations |= {name: problem.implementation(one) for name, one in others.items()}
    moved = problem.bytes_moved(compact)
    case = Case(moved, implementations, problem.check, served_by="sparse_adamw_", absent=absent)
    case.apart = tuple(name for name in implementations if name.endswith(GRAPH))
    return case


def optimizer_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    """One step of optimizers as users make them, and the bytes that training holds."""
    problem = Problem(size, dtype, density, device)
    mask = problem.mask
    footprints: dict[str, dict[str, int]] = {}

    def ours(**options: Any) -> Baseline:
        def optimizer(parameters: Parameters) -> SparseAdamW:
            return SparseAdamW(parameters.items(), mask, **SETTINGS, **options)

        return Baseline(optimizer, mask_bytes=mask.crow_indices.nbytes + mask.col_indices.nbytes)

    def adamw_8bit(package: str, parameters: Parameters) -> Any:
        return imported(MODULES[package])[0].AdamW8bit(parameters.values(), **SETTINGS)

    steps = {OURS: ours(), f"{OURS}, bfloat16 state": ours(state_dtype=torch.bfloat16, stochastic_rounding=True)}
    steps |= {FOREACH: Baseline(torch_adamw(foreach=True))} | dense_baselines(problem)
    steps |= {f"{name} AdamW8bit": Baseline(partial(adamw_8bit, name)) for name in ("bitsandbytes", "torchao")}

    def note(name: str, parameters: Parameters, optimizer: Any) -> None:
        if name not in footprints:
            held = {"weight": sum(p.nbytes for p in parameters.values()), "state": state_bytes(optimizer)}
            held |= {"gradient": sum(p.grad.nbytes for p in parameters.values()), "mask": steps[name].mask_bytes}
            footprints[name] = held

    implementations = {name: problem.implementation(one, partial(note, name)) for name, one in steps.items()}
    case = Case(problem.bytes_moved(compact=False), implementations, problem.check, rounds=5)
    case.served_by, case.parameters, case.footprints = "sparse_adamw_", mask.numel, footprints
    return case
