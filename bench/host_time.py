"""The host's time of the GPU paths, without a GPU: python -m bench.host_time [--only WORD]

Training steps of encoders are bound by the host on a fast GPU, so what Python does before each launch is what users
wait for. Here the device's work is taken away: our operators run the real launchers of the Triton kernels on CPU
tensors of a few elements, and Triton runs its own Python up to the C function that would launch. Not paid: that
function, CUDA's own calls, and the launches of torch's own kernels, in place of which tiny ones run on the CPU. So the
figures say what a change of ours does, run before it and after it, alternately, on one machine; none is a time of a
GPU. bench/NOTES.md has some.

Printed: microseconds of the process's CPU time per call, the best of several repetitions; the calls in a training step
of XLM-R base; their product. Operators are part of the functions, layers and steps above and below them.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import triton
from deftx_kernels.backends import triton as triton_backend
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher

from bench.bench_steps import SETTINGS, WORKS, fused_adamw, maskable, skeleton
from bench.shapes import random_tensors, xlmr
from deftx_kernels import CSRMask, SparseAdamW, select_mask, sparse_adamw, sparsify, topk_mask
from deftx_kernels.kernels import masked_linear_grad
from deftx_kernels.ops import schemas

MULTIPROCESSORS = 132  # of an H100 or H200: decides how many launches a masked gradient takes
# The layers, names and number of tensors of XLM-R base, each of a few elements.
SHAPE = replace(WORKS["xlmr"], width=32, inner=64, heads=2, vocabulary=200, batch=2, tokens=8)
DENSITY = 0.1
LINEARS, EMBEDDINGS = 72, 3  # of XLM-R base


class Launcher(CudaLauncher):
    """Triton's, without the C function that calls CUDA."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.num_ctas, self.launch_cooperative_grid, self.launch_pdl = 1, False, False
        self.global_scratch_size = self.global_scratch_align = self.profile_scratch_size = (
            self.profile_scratch_align
        ) = 0
        self.launch = lambda *arguments: None


def driver() -> Any:
    """What Triton asks its active driver for."""
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 1 << 18},
        load_binary=lambda *arguments: (object(), 1, 0, 0, 1024),
    )
    return SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: 0, get_current_target=lambda: GPUTarget("cuda", 90, 32),
        launcher_cls=Launcher, utils=utils,
    )  # fmt: skip


def without_device() -> None:
    """From here on our operators with Triton kernels take their GPU path for CPU tensors."""
    triton.runtime.driver.set_active(driver())
    masked_linear_grad._multiprocessors = lambda device: MULTIPROCESSORS
    kernels = triton_backend.kernels()
    for op in ("sparse_adamw_", "csr_square_sum", "masked_linear_grad", "masked_embedding_grad"):
        kernel = kernels[op]
        schemas.LIBRARY.impl(op, kernel, "CPU", allow_override=True)
    schemas.LIBRARY.impl("topk_mask", nothing_selected, "CPU", allow_override=True)


def nothing_selected(
    scores: list[Tensor], base: list[Tensor], k: list[int], scope: int
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.uint16), torch.tensor([-1, -1])


Case = tuple[Callable[[], Any], int]  # and its calls in a training step


def tiny(tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(min(size, 4) for size in shape) for name, shape in tensors.items()}


def selections() -> Iterator[tuple[str, Callable[[], Case]]]:
    scores = random_tensors(tiny(xlmr()), torch.float32, "cpu")
    base = random_tensors(tiny(xlmr()), torch.float32, "cpu", seed=1)
    yield "topk_mask", lambda: (lambda: topk_mask(scores, density=DENSITY), 0)
    yield "select_mask", lambda: (lambda: select_mask(scores, base, density=DENSITY), 0)


def updates() -> Iterator[tuple[str, Callable[[], Case]]]:
    """AdamW at the entries of all tensors of XLM-R base."""
    params = random_tensors(tiny(xlmr()), torch.bfloat16, "cpu")
    grads = random_tensors(tiny(xlmr()), torch.bfloat16, "cpu", seed=1)
    mask = CSRMask.from_dense({n: t > 0 for n, t in grads.items()})
    m, v, compact = torch.zeros(mask.nnz), torch.zeros(mask.nnz), torch.zeros(mask.nnz)
    step, lr = torch.ones(()), torch.ones(())

    def operator(gradients: list[Tensor]) -> Callable[[], None]:
        return lambda: torch.ops.deftx.sparse_adamw_(
            list(params.values()), gradients, len(gradients) == 1, m, v, None, mask.crow_indices, mask.col_indices, step, lr,
            0.9, 0.999, 1e-8, 0.0, None, 0.0, False, None, None, None,
        )  # fmt: skip

    def function(gradients: Any) -> Callable[[], None]:
        return lambda: sparse_adamw(params, gradients, m, v, step, mask, lr=lr)

    yield "operator sparse_adamw_, dense gradients", lambda: (operator(list(grads.values())), 0)
    yield "operator sparse_adamw_, compact gradient", lambda: (operator([compact]), 1)
    yield "sparse_adamw, dense gradients", lambda: (function(grads), 0)
    yield "sparse_adamw, compact gradient", lambda: (function(compact), 0)


def optimizers() -> Iterator[tuple[str, Callable[[], Case]]]:
    def made(sparse: bool, compact: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = skeleton(SHAPE, torch.float32)
        mask = topk_mask({n: model.get_parameter(n) for n in maskable(SHAPE)}, density=DENSITY)
        if compact:
            sparsify(model, mask)
        optimizer = SparseAdamW(model.named_parameters(), mask, **SETTINGS) if sparse else fused_adamw(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn_like(parameter)
        return model, optimizer

    def step(sparse: bool, compact: bool = False) -> Case:
        model, optimizer = made(sparse, compact)
        return lambda: (optimizer.step(), model), int(compact)

    def clip(compact: bool) -> Case:
        model, optimizer = made(True, compact)
        return lambda: (optimizer.clip_grad_norm_(1.0), model), 0

    yield "torch.optim.AdamW(fused=True).step", lambda: step(False)
    yield "SparseAdamW.step, dense gradients", lambda: step(True)
    yield "SparseAdamW.step, sparsified", lambda: step(True, compact=True)
    yield "SparseAdamW.clip_grad_norm_, dense gradients", lambda: clip(False)
    yield "SparseAdamW.clip_grad_norm_, sparsified", lambda: clip(True)


def layers() -> Iterator[tuple[str, Callable[[], Case]]]:
    x, ids = torch.randn(2, 8, 32, requires_grad=True), torch.arange(16).view(2, 8)

    def layer(kind: type[nn.Module], sparse: bool) -> nn.Module:
        model = nn.Sequential(kind(32, 32))
        if sparse:
            sparsify(model, topk_mask(dict(model.named_parameters()), density=DENSITY))
        return model[0]

    def forward(kind: type[nn.Module], sparse: bool, calls: int) -> Case:
        module, given = layer(kind, sparse), x if kind is nn.Linear else ids
        return lambda: module(given), calls

    def both(kind: type[nn.Module], sparse: bool, calls: int) -> Case:
        module, given, gradient = layer(kind, sparse), x if kind is nn.Linear else ids, torch.randn(2, 8, 32)
        sources = [p for p in module.parameters() if p.requires_grad] + [x] * (kind is nn.Linear)
        return lambda: torch.autograd.grad(module(given), sources, gradient), calls

    for kind, calls in ((nn.Linear, LINEARS), (nn.Embedding, EMBEDDINGS)):
        for sparse in (False, True):
            name = ("masked " if sparse else "nn.") + kind.__name__
            for what, make in (("forward", forward), ("forward and backward", both)):
                yield (
                    f"{name}, {what}",
                    lambda make=make, kind=kind, sparse=sparse, calls=calls: make(kind, sparse, calls),
                )


def gradients() -> Iterator[tuple[str, Callable[[], Case]]]:
    g, x = torch.randn(16, 32), torch.randn(16, 32)
    ids = torch.arange(16)
    mask = topk_mask(torch.randn(32, 32), density=DENSITY)
    crow, col = mask.crow_indices, mask.col_indices
    yield (
        "operator masked_linear_grad",
        lambda: (lambda: torch.ops.deftx.masked_linear_grad(g, x, crow, col, torch.float32), LINEARS),
    )
    yield (
        "operator masked_embedding_grad",
        lambda: (lambda: torch.ops.deftx.masked_embedding_grad(g, ids, crow, col, -1, torch.float32), EMBEDDINGS),
    )


def steps() -> Iterator[tuple[str, Callable[[], Case]]]:
    ids = torch.randint(5, SHAPE.vocabulary, (SHAPE.batch, SHAPE.tokens))
    labels = torch.arange(SHAPE.batch) % 3

    def step(sparse: bool) -> Case:
        model = skeleton(SHAPE, torch.float32)
        if sparse:
            mask = topk_mask({n: model.get_parameter(n) for n in maskable(SHAPE)}, density=DENSITY)
            sparsify(model, mask)
            optimizer = SparseAdamW(model.named_parameters(), mask, **SETTINGS)
        else:
            optimizer = fused_adamw(model)

        def call() -> None:
            nn.functional.cross_entropy(model(ids).logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

        return call, 1

    yield "a whole step, dense", lambda: step(False)
    yield "a whole step, masked", lambda: step(True)


def best(call: Callable[[], Any], repeats: int) -> float:
    """Microseconds of CPU time that a call takes, the best of several repetitions of about 20 ms each."""
    for _ in range(3):
        call()
    begin = time.process_time()
    call()
    number = max(1, int(0.02 / (time.process_time() - begin)))
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        for _ in range(number):
            call()
        times.append((time.process_time() - begin) / number)
    return 1e6 * min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="what has this word in its name")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    every = [*updates(), *optimizers(), *gradients(), *layers(), *selections(), *steps()]
    made = [(name, *make()) for name, make in every if options.only in name]
    warnings.filterwarnings("ignore", "Warning only once for all operators")  # torch's, of operators registered anew
    without_device()
    for name, call, calls in made:
        us = best(call, options.repeats)
        print(f"{name:50} {us:9.1f} us  x {calls:2} {us * calls / 1000:8.2f} ms")


if __name__ == "__main__":
    main()
