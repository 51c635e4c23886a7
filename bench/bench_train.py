"""sparse_adamw against torch.optim.AdamW on the dense tensors; masked_linear_grad against the dense weight gradient."""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.bench_csr import copies
from bench.harness import OURS, Case
from bench.shapes import SIZES as SHAPES
from bench.shapes import random_tensors
from deftx_kernels import CSRMask, sparse_adamw, topk_mask

SIZES = ("tiny", "minilm")
# A step that bfloat16 shows.
SETTINGS = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def cases(device: str, quick: bool, sizes: tuple[str, ...]) -> Iterator[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for size in sizes:
        for density in (0.05,) if quick else (0.05, 0.01):
            yield adamw_case(size, dtype, density, device)
            yield linear_case(dtype, density, device)


def adamw_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    """One step. The peers' moments have the parameters' dtype, ours are float32."""
    shapes = SHAPES[size]()
    params, grads = random_tensors(shapes, dtype, device), random_tensors(shapes, dtype, device, seed=1)
    mask = topk_mask(random_tensors(shapes, torch.float32, device, seed=2), density=density)
    compact = mask.gather(grads)
    oracle = {n: torch.nn.Parameter(t.double().cpu()) for n, t in params.items()}
    for name, parameter in oracle.items():
        parameter.grad = grads[name].double().cpu()
    torch.optim.AdamW(oracle.values(), **SETTINGS).step()
    expected = mask.gather({n: p.detach().to(device) for n, p in oracle.items()})

    def ours(gradient):
        def make():
            mine = copies(params)
            state = [torch.zeros(mask.nnz, dtype=torch.float32, device=device) for _ in range(2)]
            step, lr = torch.zeros((), device=device), torch.tensor(SETTINGS["lr"], device=device)
            options = {k: v for k, v in SETTINGS.items() if k != "lr"}

            def call() -> dict[str, Tensor]:
                step.add_(1)
                sparse_adamw(mine, gradient, *state, step, mask, lr=lr, **options)
                return mine

            return call

        return make

    def dense(masked: bool, **implementation):
        def make():
            mine = {n: torch.nn.Parameter(t.clone()) for n, t in params.items()}
            keep = mask.to_dense()
            optimizer = torch.optim.AdamW(mine.values(), **SETTINGS, **implementation)
            for name, parameter in mine.items():
                parameter.grad = grads[name].clone()

            def call() -> dict[str, Tensor]:
                if masked:  # LT-SFT: zero the other gradients, then a dense step
                    for name, parameter in mine.items():
                        parameter.grad.mul_(keep[name])
                optimizer.step()
                return {n: p.detach() for n, p in mine.items()}

            return call

        return make

    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps * float(expected.abs().max())

    def check(result: dict[str, Tensor]) -> str | None:
        worst = float((mask.gather(result).double() - expected).abs().max())
        return None if worst <= tolerance else f"{worst:.1e} from AdamW in float64 at the masked entries"

    providers = {
        OURS: ours(grads),
        "deftx, compact gradient": ours(compact),
        "torch AdamW fused": dense(False, fused=True),
        "mask + torch AdamW foreach": dense(True, foreach=True),
    }
    # float32 moments read and written, the index, and the gather of gradient and parameter, whole 32-byte sectors at a time.
    itemsize = dtype.itemsize
    touched = (1 - (1 - density) ** (32 / itemsize)) * mask.numel * itemsize
    moved = mask.nnz * (16 + mask.col_indices.element_size()) + 3 * touched
    return Case("sparse_adamw", size, dtype, density, round(moved), providers, check, rounds=9, backend_of="sparse_adamw_")


def linear_case(dtype: torch.dtype, density: float, device: str, tokens: int = 2048) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 384, generator=generator).to(device, dtype)
    gradient = torch.randn(tokens, 1536, generator=generator).to(device, dtype)
    mask: CSRMask = topk_mask(torch.randn(1536, 384, generator=generator).to(device), density=density)
    keep = mask.to_dense()["tensor"]
    exact = (gradient.double().mT @ x.double())[keep]
    rounding = torch.finfo(dtype).eps * float(exact.abs().max()) + 1e-6 * tokens

    def check(result: Tensor) -> str | None:
        got = result[keep] if result.dim() == 2 else result
        worst = float((got.double() - exact).abs().max())
        return None if worst <= rounding else f"{worst:.1e} from the product in float64, at most {rounding:.1e} is right"

    providers = {
        OURS: lambda: lambda: torch.ops.deftx.masked_linear_grad(gradient, x, mask.crow_indices, mask.col_indices, dtype),
        "dense product": lambda: lambda: gradient.mT @ x,
        "dense product + grad[mask]": lambda: lambda: (gradient.mT @ x)[keep],
    }
    moved = (x.numel() + gradient.numel() + mask.nnz) * dtype.itemsize
    flops = 2.0 * tokens * 384 * 1536
    size = f"{tokens} tokens, 1536x384"
    return Case("masked_linear_grad", size, dtype, density, moved, providers, check, flops=flops, rounds=25)
