"""sparse_adamw and SparseAdamW against dense optimizers and other sparse ones."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from bench.bench_csr import copies
from bench.harness import Case, Choice, Footprint, Setting, Work, available_bytes, imported
from bench.rows import OURS
from bench.shapes import SIZES as SHAPES
from bench.shapes import random_tensors
from deftx_kernels import SparseAdamW, sparse_adamw, topk_mask
from deftx_kernels.train.tensors import state_bytes

OPS = {
    "sparse_adamw": "one step of AdamW at the masked entries of a model's tensors, by our function",
    "optimizer_step": "the same step by optimizers as users make them, with the memory that training holds",
}
SIZES = ("tiny", "10M", "minilm", "50M", "bert", "xlmr", "llama1b")
GROWTH = ("10M", "bert", "llama1b")  # further points of curves over the number of parameters, at one density
# nine optimizers side by side fit, and 8-bit ones quantise tensors of these shapes
OPTIMIZER_SIZES = ("tiny", "minilm")
# A step that bfloat16 shows, and an eps that float16 does. No decay: SparseAdam has none, and training under a mask
# uses none.
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-7, "weight_decay": 0.0}
FUSED, FOREACH, MASK_FOREACH, LIFT = (
    "torch AdamW fused",
    "torch AdamW foreach",
    "mask + torch AdamW foreach",
    "LIFT's step",
)
SPARSE_ADAM, MASK_SPARSE_ADAM = "torch SparseAdam", "sparse_mask + torch SparseAdam"

Parameters = dict[str, torch.nn.Parameter]


def works(choice: Choice) -> Iterator[Work]:
    for size in choice.sizes:
        for dtype, density in choice.settings(usual(size, choice.device)):
            for kind in ("dense", "compact"):
                made = (partial(adamw_case, s, dtype, density, choice.device, kind) for s in (size, "tiny"))
                yield Work("sparse_adamw", size, f"{size}, {kind} gradient", dtype, density, choice.device, *made)
    for size in (s for s in choice.sizes if s in OPTIMIZER_SIZES):
        for dtype, density in choice.settings(usual(size, choice.device)[:1]):
            made = (partial(optimizer_case, s, dtype, density, choice.device) for s in (size, "tiny"))
            yield Work("optimizer_step", size, size, dtype, density, choice.device, *made)


def usual(size: str, device: str) -> list[Setting]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if size == "llama1b":  # as such a model is held; float32 with its gradients and a peer would not fit 24 GB
        dtype = torch.bfloat16
    return [(dtype, density) for density in ((0.05,) if size in GROWTH else (0.05, 0.01))]


# ---- the inputs that all share ----


class Problem:
    """Parameters, gradients and a mask, and the masked entries after one step of AdamW in float64."""

    def __init__(self, size: str, dtype: torch.dtype, density: float, device: str) -> None:
        shapes = SHAPES[size]()
        self.mask = topk_mask(random_tensors(shapes, torch.float32, device, seed=2), density=density)
        self.params, self.grads = random_tensors(shapes, dtype, device), random_tensors(shapes, dtype, device, seed=1)
        # None is tiny: AdamW adds eps to the root of the corrected second moment, SparseAdam and LIFT to that of the
        # moment as it is, at the first step 1/32 of it. Where |gradient| >= 0.1, eps is less than the tolerance in
        # either place.
        for gradient in self.grads.values():
            gradient.add_(torch.where(gradient < 0, -0.1, 0.1))
        self.compact = self.mask.gather(self.grads)
        exact = torch.nn.Parameter(self.mask.gather(self.params).double())
        exact.grad = self.compact.double()
        torch.optim.AdamW([exact], **SETTINGS).step()
        self.expected = exact.detach()
        values = torch.cat([self.expected, *map(some, self.params.values())])
        self.tolerance = max(1e-5, torch.finfo(dtype).eps * largest(values))
        self.bytes = self.mask.numel * dtype.itemsize  # of the parameters; the gradients have as many

    def check(self, result: dict[str, Tensor]) -> str | None:
        fault = self.deviation(self.mask.gather(result).double() - self.expected, "at the masked entries")
        # No gradient is so small that a step would not show: a masked optimizer moves the masked entries, a dense one
        # all of them.
        moved = sum(int(torch.count_nonzero(result[n] != t)) for n, t in self.params.items())
        if fault or moved == self.mask.nnz:
            return fault
        if moved != self.mask.numel:
            return f"{moved} entries have moved, neither the {self.mask.nnz} of the mask nor all"
        step = SETTINGS["lr"]  # of any gradient, the first time
        over = [some(result[n]) - some(t) + step * some(self.grads[n]).sign() for n, t in self.params.items()]
        return self.deviation(torch.cat(over), "outside the mask")

    def deviation(self, difference: Tensor, where: str) -> str | None:
        worst = largest(difference)
        return None if worst <= self.tolerance else f"{worst:.1e} from AdamW in float64 {where}"

    def bytes_moved(self, compact: bool) -> int:
        """By a sparse step: float32 moments read and written, the index, and parameters (read and written) and dense
        gradients, whole sectors (on the CPU cache lines) at a time."""
        mask, itemsize = self.mask, next(iter(self.params.values())).element_size()
        sector = 32 if mask.device.type == "cuda" else 64
        touched = (1 - (1 - mask.density) ** (sector / itemsize)) * mask.numel * itemsize
        gradient = mask.nnz * itemsize if compact else touched
        return round(mask.nnz * (16 + mask.col_indices.element_size()) + 2 * touched + gradient)

    @cached_property
    def keep(self) -> dict[str, Tensor]:
        """The mask as bool tensors."""
        return self.mask.to_dense()

    @cached_property
    def sparse_grads(self) -> dict[str, Tensor]:
        """The masked entries of the gradients as torch's sparse COO tensors."""
        return {
            n: torch.sparse_coo_tensor(
                self.keep[n].nonzero().T, values, self.params[n].shape, is_coalesced=True, check_invariants=False
            )
            for n, values in self.mask.split(self.compact).items()
        }

    def stepper(self, peer: "Peer", note: Callable[[Parameters, Any], None] = lambda parameters, optimizer: None):
        """A provider: a step of an optimizer, and what goes before it. `note` is told of parameters and optimizer
        thereafter.
        """

        def make():
            mine = {n: torch.nn.Parameter(t.clone()) for n, t in self.params.items()}
            for name, gradient in peer.gradients().items():
                mine[name].grad = gradient
            optimizer = peer.optimizer(mine)

            def call() -> dict[str, Tensor]:
                peer.prepare(mine)
                optimizer.step()
                note(mine, optimizer)
                return {n: p.detach() for n, p in mine.items()}

            return call

        return make


def largest(tensor: Tensor) -> float:
    """The largest magnitude; 0 of a tensor without entries."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def some(tensor: Tensor) -> Tensor:  # float64 [at most 4096]
    """Some entries: enough to tell a dense step from another change, of tensors of any size."""
    return tensor.flatten()[:4096].double()


# ---- the peers ----


@dataclass
class Peer:
    optimizer: Callable[[Parameters], Any]
    gradients: Callable[[], dict[str, Tensor]]  # copies where it writes to them
    prepare: Callable[[Parameters], None] = lambda parameters: None  # before each step
    needs: int = 0  # bytes at its peak, beside the inputs that all share
    mask_bytes: int = 0


class LiftStep:
    """The step of LIFT (Liu et al. 2025) as its authors' optimizer takes it, written anew.

    A bool mask of each tensor lies in main memory and is brought to the parameter's device in each step. The gradient
    picked by it updates compact moments; the compact update is written over the gradient, the rest of which is set to
    0, and all of it is added to the parameter. A second call finds that update in place of a gradient from backward:
    other numbers, the same work.
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


def torch_adamw(**implementation):
    return lambda parameters: torch.optim.AdamW(parameters.values(), **SETTINGS, **implementation)


def torch_sparse_adam(parameters: Parameters) -> torch.optim.SparseAdam:
    return torch.optim.SparseAdam(parameters.values(), **{k: v for k, v in SETTINGS.items() if k != "weight_decay"})


def dense_peers(problem: Problem) -> dict[str, Peer]:
    """Those that take dense gradients, the most important first."""
    mask, size = problem.mask, problem.bytes

    def zero_the_others(parameters: Parameters) -> None:  # as LT-SFT does before a dense step
        for name, parameter in parameters.items():
            parameter.grad.mul_(problem.keep[name])

    def own() -> dict[str, Tensor]:
        return copies(problem.grads)

    def lift(parameters: Parameters) -> LiftStep:
        return LiftStep(parameters, problem.keep if mask.device.type == "cpu" else mask.to("cpu").to_dense())

    # Parameters and two moments. Of the second: gradients, the roots of its moments and a bool mask, too. Of the third:
    # parameters, gradients and mask, compact moments and the positions of the mask's entries.
    fused = Peer(torch_adamw(fused=True), lambda: problem.grads, needs=3 * size)
    foreach = Peer(torch_adamw(foreach=True), own, zero_the_others, needs=5 * size + mask.numel, mask_bytes=mask.numel)
    lifts = Peer(lift, own, needs=2 * size + mask.numel + 32 * mask.nnz, mask_bytes=mask.numel)
    return {FUSED: fused, LIFT: lifts, MASK_FOREACH: foreach}


def sparse_adam(problem: Problem, compact: bool) -> Peer:
    """SparseAdam takes gradients that are sparse tensors. Where ours is handed compact gradients, these are made
    beforehand; where ours picks them out of dense ones, so does this peer: by torch's `sparse_mask`, in each step."""

    def pick(parameters: Parameters) -> None:
        for name, parameter in parameters.items():
            parameter.grad = problem.grads[name].sparse_mask(problem.sparse_grads[name])

    # Parameters, two dense moments, the sparse gradients' positions and values, and compact tensors of the step.
    needs = 3 * problem.bytes + problem.mask.numel + 64 * problem.mask.nnz
    if compact:
        return Peer(torch_sparse_adam, lambda: problem.sparse_grads, needs=needs)
    return Peer(torch_sparse_adam, dict, pick, needs)


def that_fit(peers: dict[str, Peer], room: int) -> tuple[dict[str, Peer], dict[str, str]]:
    """(those for which there is memory beside those before them, why the others are absent): all are held while they
    are timed.
    """
    fitting, absent = {}, {}
    for name, peer in peers.items():
        if peer.needs <= room:
            fitting[name], room = peer, room - peer.needs
        else:
            absent[name] = (
                f"needs {peer.needs / 1e9:.1f} GB of memory, {max(0, room) / 1e9:.1f} GB are free beside the others"
            )
    return fitting, absent


def free_bytes(device: str) -> int:
    if device == "cpu":
        return available_bytes()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


# ---- the works ----


class OurStep:
    """Ours, of dense or compact gradients, on copies of the parameters."""

    def __init__(self, problem: Problem, compact: bool) -> None:
        self.mask, self.params = problem.mask, copies(problem.params)
        self.gradient = problem.compact if compact else problem.grads
        self.step, self.lr = (torch.tensor(x, device=self.mask.device) for x in (0.0, SETTINGS["lr"]))
        self.options = {k: v for k, v in SETTINGS.items() if k != "lr"}
        self.state: list[Tensor] = []

    def make_state(self) -> None:
        dtype = torch.promote_types(next(iter(self.params.values())).dtype, torch.float32)
        self.state = [torch.zeros(self.mask.nnz, dtype=dtype, device=self.mask.device) for _ in range(2)]

    def __call__(self) -> dict[str, Tensor]:
        if not self.state:  # made in the first step, as the peers' are: a peak counts either all moments or none
            self.make_state()
        self.step.add_(1)
        sparse_adamw(self.params, self.gradient, *self.state, self.step, self.mask, lr=self.lr, **self.options)
        return self.params


def replayed(problem: Problem, compact: bool) -> Callable[[], dict[str, Tensor]]:
    """Ours as a captured CUDA graph: the kernel without Python and launch."""
    OurStep(problem, compact)()  # compiles the kernel
    step, graph = OurStep(problem, compact), torch.cuda.CUDAGraph()
    step.make_state()
    with torch.cuda.graph(graph):
        step()

    def call() -> dict[str, Tensor]:
        graph.replay()
        return step.params

    return call


def adamw_case(size: str, dtype: torch.dtype, density: float, device: str, kind: str) -> Case:
    """One step, ours of dense or compact gradients. The peers' moments have the parameters' dtype, ours are float32."""
    compact = kind == "compact"
    problem = Problem(size, dtype, density, device)
    mask = problem.mask
    ours: dict[str, Callable] = {OURS: lambda: OurStep(problem, compact)}
    if device == "cuda":
        ours[f"{OURS}, CUDA graph"] = lambda: replayed(problem, compact)
    peers = dense_peers(problem) | {SPARSE_ADAM if compact else MASK_SPARSE_ADAM: sparse_adam(problem, compact)}
    our_needs = len(ours) * problem.bytes + 40 * mask.nnz  # moments, and the check's float64
    peers, absent = that_fit(peers, free_bytes(device) - our_needs)
    providers = ours | {name: problem.stepper(peer) for name, peer in peers.items()}
    return Case(problem.bytes_moved(compact), providers, problem.check, served_by="sparse_adamw_", absent=absent)


def optimizer_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    """One step of optimizers as users make them, and the bytes that training holds."""
    problem = Problem(size, dtype, density, device)
    mask = problem.mask
    absent: dict[str, str] = {}
    footprints: dict[str, Footprint] = {}

    def shared() -> dict[str, Tensor]:
        return problem.grads

    def ours(**options) -> Peer:
        def optimizer(parameters: Parameters) -> SparseAdamW:
            return SparseAdamW(parameters.items(), mask, **SETTINGS, **options)

        return Peer(optimizer, shared, mask_bytes=mask.crow_indices.nbytes + mask.col_indices.nbytes)

    ways = {OURS: ours(), "deftx, bfloat16 state": ours(state_dtype=torch.bfloat16, stochastic_rounding=True)}
    ways |= {FOREACH: Peer(torch_adamw(foreach=True), shared)} | dense_peers(problem)
    for package in ("bitsandbytes", "torchao"):
        module, reason = imported(f"{package}.optim")
        if module:
            ways[f"{package} AdamW8bit"] = Peer(
                lambda p, module=module: module.AdamW8bit(p.values(), **SETTINGS), shared
            )
        else:
            absent[f"{package} AdamW8bit"] = reason

    def notes(name: str, mask_bytes: int) -> Callable[[Parameters, Any], None]:
        def note(parameters: Parameters, optimizer: Any) -> None:
            if name not in footprints:
                weights, gradients = (
                    sum(t.nbytes for t in ts) for ts in zip(*((p, p.grad) for p in parameters.values()))
                )
                footprints[name] = Footprint(weights, gradients, state_bytes(optimizer), mask_bytes)

        return note

    providers = {name: problem.stepper(way, notes(name, way.mask_bytes)) for name, way in ways.items()}
    return Case(
        problem.bytes_moved(compact=False), providers, problem.check, rounds=5, served_by="sparse_adamw_", absent=absent,
        parameters=mask.numel, footprints=footprints,
    )  # fmt: skip
