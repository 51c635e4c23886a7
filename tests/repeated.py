"""Many blocks at the same time, over and over: every run must give the same bits. `make gpu` runs it without the
sanitizers, whose inputs are too small for blocks to meet: python tests/repeated.py [device] [elements] [runs]
"""

import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deftx_kernels import (
    CSRMask,
    SparsePatch,
    masked_embedding,
    masked_linear,
    sparse_adamw,
    svd_denoise,
    topk_mask,
)

Case = Callable[[], list[Tensor]]


def bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().view(torch.uint8) if t.dim() else t.detach().view(1).view(torch.uint8)


def parts(mask: CSRMask) -> list[Tensor]:
    return [mask.crow_indices, mask.col_indices]


def selection(device: str, n: int, generator: torch.Generator) -> Iterator[tuple[str, Case]]:
    columns = 2048
    for dtype in (torch.float32, torch.bfloat16):
        scores = {"a": torch.randn(n // columns, columns, generator=generator).to(dtype), "b": torch.ones(n // 7)}
        scores["b"] = scores["b"].to(dtype)  # ties among many blocks
        there = {name: t.to(device) for name, t in scores.items()}
        for scope in ("global", "tensor", "row"):
            assert topk_mask(there, density=0.05, scope=scope).to("cpu") == topk_mask(scores, density=0.05, scope=scope)
            yield (
                f"topk_mask, {dtype}, {scope}",
                lambda there=there, scope=scope: parts(topk_mask(there, density=0.05, scope=scope)),
            )
        one, two = (topk_mask({"a": x["a"]}, density=0.05) for x in (there, {"a": there["a"].roll(1)}))
        yield f"sets of masks, {dtype}", lambda a=one, b=two: [*parts(a & b), *parts(a | b), *parts(a - b)]
        dense = one.to_dense()
        yield f"from_dense, {dtype}", lambda dense=dense: parts(CSRMask.from_dense(dense))


def steps(device: str, n: int, generator: torch.Generator) -> Iterator[tuple[str, Case]]:
    for dtype in (torch.float32, torch.bfloat16):
        weight = {"a": torch.randn(n // 2048, 2048, generator=generator).to(device, dtype)}
        grad = {"a": torch.randn(n // 2048, 2048, generator=generator).to(device, dtype)}
        mask = topk_mask(grad, density=0.05)

        def step(grads, dtype=dtype, weight=weight, mask=mask) -> list[Tensor]:
            params = {"a": weight["a"].clone()}
            master = mask.gather(params).float()
            state = [torch.zeros(mask.nnz, device=device) for _ in range(2)]
            sparse_adamw(params, grads, *state, 1, mask, lr=0.1, weight_decay=0.1, values=master)
            return [params["a"], *state, master]

        compact = mask.gather(grad)
        yield f"sparse_adamw, {dtype}, dense", lambda step=step, grad=grad: step(grad)
        yield f"sparse_adamw, {dtype}, compact", lambda step=step, grad=compact: step(grad)
        inputs = [list(grad.values()), *parts(mask)]
        yield f"csr_square_sum, {dtype}", lambda inputs=inputs: [torch.ops.deftx.csr_square_sum(*inputs)]
        new = {"a": torch.where(torch.rand(weight["a"].shape, device=device) < 0.01, grad["a"], weight["a"])}

        def patch(new=new, old=weight) -> list[Tensor]:
            return list(SparsePatch.diff(new, old).flat("a"))

        yield f"bit_diff, {dtype}", patch


def layers(device: str, size: int, generator: torch.Generator) -> Iterator[tuple[str, Case]]:
    """Gradients of masked layers of [size, size]. On a GPU, an entry's gradient has the same bits in every mask."""
    for dtype in (torch.bfloat16, torch.float32):
        x, upstream = (torch.randn(2048, size, generator=generator).to(device, dtype) for _ in range(2))
        weight = torch.zeros(size, size, dtype=dtype, device=device)
        scores = torch.randn(size, size, generator=generator).to(device)
        few, all_entries = topk_mask(scores, density=0.05), topk_mask(scores, density=1.0)

        def gradient(mask, x=x, upstream=upstream, weight=weight) -> Tensor:
            values = torch.zeros(mask.nnz, device=device, requires_grad=True)
            masked_linear(x, weight, values, mask).backward(upstream)
            return values.grad

        if device != "cpu":
            dense = gradient(all_entries).view(size, size)
            assert torch.equal(few.gather({"tensor": dense}), gradient(few)), f"masked_linear, {dtype}: epilogue"
        yield f"masked_linear, {dtype}", lambda gradient=gradient, few=few: [gradient(few)]
        ids = torch.randint(0, size, (8, 2048), generator=generator).to(device)

        def embedding(mask=few, weight=weight, ids=ids, upstream=upstream) -> list[Tensor]:
            values = torch.zeros(mask.nnz, device=device, requires_grad=True)
            masked_embedding(ids, weight, values, mask).backward(upstream.expand(8, *upstream.shape))
            return [values.grad]

        yield f"masked_embedding, {dtype}", embedding


def denoising(device: str, n: int, generator: torch.Generator) -> Iterator[tuple[str, Case]]:
    side = min(768, max(64, int((n / 32) ** 0.5)))
    delta = torch.randn(16, side, side, generator=generator).to(device)
    rules = ({"rank": side // 12}, {"energy": 0.9}, {"rank": side // 12, "residual_density": 0.05})
    yield from ((f"svd_denoise, {rule}", lambda rule=rule: [svd_denoise(delta, **rule)]) for rule in rules)


def main(device: str = "cuda", elements: int = 20_000_000, runs: int = 20) -> None:
    generator = torch.Generator().manual_seed(0)
    count = 0
    for cases in (
        selection(device, elements, generator),
        steps(device, elements, generator),
        layers(device, min(4096, int(elements**0.5) // 32 * 32), generator),
        denoising(device, elements, generator),
    ):
        for name, case in cases:
            first = case()
            for run in range(1, runs):
                for one, again in zip(first, case(), strict=True):
                    assert torch.equal(bits(one), bits(again)), f"{name}: run {run} differs"
            count += 1
    print(f"{count} cases of about {elements:,} elements: the same bits in {runs} runs")


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((str, int, int), sys.argv[1:])))
