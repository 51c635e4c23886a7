"""sparse_adamw and SparseAdamW against dense optimizers."""

import importlib
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.bench_csr import copies
from bench.harness import OURS, Case, available_bytes
from bench.shapes import SIZES as SHAPES
from bench.shapes import random_tensors
from deftx_kernels import SparseAdamW, sparse_adamw, topk_mask
from deftx_kernels.train.tensors import state_bytes as optimizer_state_bytes

SIZES = ("tiny", "minilm", "50M", "xlmr")
# A step that bfloat16 shows.
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def cases(device: str, quick: bool, sizes: tuple[str, ...]) -> Iterator[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for size in sizes:
        for density in (0.05,) if quick else (0.05, 0.01):
            yield adamw_case(size, dtype, density, device, compact=False)
            yield adamw_case(size, dtype, density, device, compact=True)
    for size in sizes:
        if size in ("tiny", "minilm"):  # six copies of a model fit, and 8-bit optimizers quantise tensors of these shapes
            yield optimizer_case(size, dtype, 0.05, device)


class Problem:
    """Parameters, gradients and a mask, and the masked entries after one step of AdamW in float64."""

    def __init__(self, size: str, dtype: torch.dtype, density: float, device: str) -> None:
        shapes = SHAPES[size]()
        self.params, self.grads = random_tensors(shapes, dtype, device), random_tensors(shapes, dtype, device, seed=1)
        self.mask = topk_mask(random_tensors(shapes, torch.float32, device, seed=2), density=density)
        self.compact = self.mask.gather(self.grads)
        exact = torch.nn.Parameter(self.mask.gather(self.params).double())
        exact.grad = self.compact.double()
        torch.optim.AdamW([exact], **SETTINGS).step()
        self.expected = exact.detach()
        self.tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * float(self.expected.abs().max())

    def check(self, result: dict[str, Tensor]) -> str | None:
        worst = float((self.mask.gather(result).double() - self.expected).abs().max())
        return None if worst <= self.tolerance else f"{worst:.1e} from AdamW in float64 at the masked entries"

    def bytes_moved(self, compact: bool) -> int:
        """By a sparse step: float32 moments read and written, the index, and parameters (read and written) and dense gradients,
        whole sectors (on the CPU cache lines) at a time."""
        mask, itemsize = self.mask, next(iter(self.params.values())).element_size()
        sector = 32 if mask.device.type == "cuda" else 64
        touched = (1 - (1 - mask.density) ** (sector / itemsize)) * mask.numel * itemsize
        gradient = mask.nnz * itemsize if compact else touched
        return round(mask.nnz * (16 + mask.col_indices.element_size()) + 2 * touched + gradient)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Copies of the parameters with their gradients."""
        mine = {n: torch.nn.Parameter(t.clone()) for n, t in self.params.items()}
        for name, parameter in mine.items():
            parameter.grad = self.grads[name].clone()
        return mine

    def stepper(self, make_optimizer, prepare=lambda parameters: None, state_bytes: dict[str, float] | None = None, name: str = ""):
        """A provider: `prepare` and a step of the optimizer made of (name, parameter) pairs."""

        def make():
            mine = self.trainable()
            optimizer = make_optimizer(mine)

            def call() -> dict[str, Tensor]:
                prepare(mine)
                optimizer.step()
                if state_bytes is not None and name not in state_bytes:
                    state_bytes[name] = optimizer_state_bytes(optimizer) / self.mask.numel
                return {n: p.detach() for n, p in mine.items()}

            return call

        return make

    def masked(self):
        """LT-SFT: zero the other gradients before a dense step."""
        keep = self.mask.to_dense()

        def prepare(parameters) -> None:
            for name, parameter in parameters.items():
                parameter.grad.mul_(keep[name])

        return prepare


def torch_adamw(**implementation):
    return lambda parameters: torch.optim.AdamW(parameters.values(), **SETTINGS, **implementation)


def adamw_case(size: str, dtype: torch.dtype, density: float, device: str, compact: bool) -> Case:
    """One step, ours of dense or compact gradients. The peers' moments have the parameters' dtype, ours are float32."""
    problem = Problem(size, dtype, density, device)
    mask = problem.mask

    def ours():
        mine = copies(problem.params)
        gradient = problem.compact if compact else problem.grads
        state = [torch.zeros(mask.nnz, dtype=torch.float32, device=device) for _ in range(2)]
        step, lr = torch.zeros((), device=device), torch.tensor(SETTINGS["lr"], device=device)
        options = {k: v for k, v in SETTINGS.items() if k != "lr"}

        def call() -> dict[str, Tensor]:
            step.add_(1)
            sparse_adamw(mine, gradient, *state, step, mask, lr=lr, **options)
            return mine

        return call

    providers = {OURS: ours}
    peers = {
        "torch AdamW fused": lambda: problem.stepper(torch_adamw(fused=True)),
        "mask + torch AdamW foreach": lambda: problem.stepper(torch_adamw(foreach=True), problem.masked()),
    }
    # Parameters, gradients and moments of both, and what foreach needs beside them.
    needed = 11 * mask.numel * dtype.itemsize
    fits = device == "cuda" or needed <= available_bytes()
    absent = {} if fits else dict.fromkeys(peers, f"{needed / 1e9:.0f} GB of free memory needed")
    providers |= {name: peer() for name, peer in peers.items() if name not in absent}
    work = f"{size}, {'compact' if compact else 'dense'} gradient"
    moved = problem.bytes_moved(compact)
    return Case(
        "sparse_adamw", work, dtype, density, moved, providers, problem.check, rounds=15, backend_of="sparse_adamw_", absent=absent
    )


def optimizer_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    """One step of optimizers as users make them, and the bytes of their state."""
    problem = Problem(size, dtype, density, device)
    state_bytes: dict[str, float] = {}  # per parameter
    absent: dict[str, str] = {}

    def ours(**options):
        return lambda parameters: SparseAdamW(parameters.items(), problem.mask, **SETTINGS, **options)

    makers = {
        OURS: ours(),
        "deftx, bfloat16 state": ours(state_dtype=torch.bfloat16, stochastic_rounding=True),
        "torch AdamW fused": torch_adamw(fused=True),
    }
    for package, name in (("bitsandbytes", "bitsandbytes AdamW8bit"), ("torchao", "torchao AdamW8bit")):
        try:
            peer = importlib.import_module(f"{package}.optim").AdamW8bit
            makers[name] = lambda parameters, peer=peer: peer(parameters.values(), **SETTINGS)
        except ImportError as error:
            absent[name] = str(error)
    providers = {n: problem.stepper(make, state_bytes=state_bytes, name=n) for n, make in makers.items()}
    foreach = "mask + torch AdamW foreach"
    providers[foreach] = problem.stepper(torch_adamw(foreach=True), problem.masked(), state_bytes, foreach)
    moved = problem.bytes_moved(compact=False)
    return Case(
        "optimizer_step", size, dtype, density, moved, providers, problem.check, rounds=5, backend_of="sparse_adamw_",
        absent=absent, state_bytes=state_bytes,
    )  # fmt: skip
