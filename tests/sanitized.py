"""A few launches of each kernel on small, odd shapes, compared with the reference on the CPU: what compute-sanitizer
runs in `make gpu` (run_gpu.py)."""

import torch

from deftx_kernels import CSRMask, masked_embedding, masked_linear, sparse_adamw, svd_denoise, topk_mask
from deftx_kernels.ops import reference


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        masks(dtype, generator)
        gradients(dtype, generator)
    denoising(generator)
    print("sanitized run: every result agrees with the reference")


def masks(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Selection, set operations, csr_* and AdamW."""
    shapes = {"a": (37, 301), "b": (5,), "c": (3, 7001), "d": (), "e": (129, 3, 5)}
    host, grads = ({n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()} for _ in range(2))
    mask, other = topk_mask(host, density=0.13), topk_mask(grads, density=0.2)
    values = torch.randn(mask.nnz, generator=generator)
    there, device_mask = {n: t.cuda() for n, t in host.items()}, mask.to("cuda")
    indices, device_indices = ((m.crow_indices, m.col_indices) for m in (mask, device_mask))

    def compare(tolerance=0.0):
        torch.cuda.synchronize()
        for name, tensor in host.items():
            torch.testing.assert_close(there[name].cpu(), tensor, rtol=tolerance, atol=tolerance)

    for scope in ("global", "tensor", "row"):
        assert topk_mask(there, density=0.13, scope=scope).to("cpu") == topk_mask(host, density=0.13, scope=scope)
    assert (device_mask & other.to("cuda")).to("cpu") == mask & other
    assert (device_mask - other.to("cuda")).to("cpu") == mask - other
    assert CSRMask.from_dense(device_mask.to_dense()).to("cpu") == mask
    found = torch.ops.deftx.csr_square_sum(list(there.values()), *device_indices).cpu()
    torch.testing.assert_close(found, reference.csr_square_sum(list(host.values()), *indices))
    assert torch.equal(device_mask.gather(there).cpu(), reference.csr_gather(list(host.values()), *indices))
    device_mask.add_(there, values.cuda(), alpha=0.5)
    reference.csr_add_(list(host.values()), *indices, values, 0.5)
    compare()
    device_mask.scatter_(there, values.cuda())
    reference.csr_scatter_(list(host.values()), *indices, values.to(dtype))
    compare()
    for compact in (False, True):
        for params, m, device in ((there, device_mask, "cuda"), (host, mask, "cpu")):
            gradients = values.to(device) if compact else {n: g.to(device) for n, g in grads.items()}
            state = [torch.zeros(mask.nnz, device=device) for _ in range(2)]
            sparse_adamw(params, gradients, *state, 1, m, lr=0.1, weight_decay=0.1)
        compare(tolerance=1e-5 if dtype == torch.float32 else 2e-2)


def gradients(dtype: torch.dtype, generator: torch.Generator) -> None:
    """Masked layers."""
    x, upstream = (torch.randn(130, n, generator=generator).to(dtype) for n in (301, 37))
    ids = torch.randint(0, 37, (130,), generator=generator)
    mask, found = topk_mask(torch.randn(37, 301, generator=generator), density=0.13), []
    for device in ("cuda", "cpu"):
        weight, m = torch.ones(37, 301, dtype=dtype, device=device), mask.to(device)
        values = m.gather({"tensor": weight}).float().requires_grad_()
        masked_linear(x.to(device), weight, values, m).backward(upstream.to(device))
        masked_embedding(ids.to(device), weight, values, m, padding_idx=3).backward(x.to(device))
        found.append(values.grad.cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


def denoising(generator: torch.Generator) -> None:
    # Factors of -1, 0 and 1 and multiples of 1/4: exact in every order of summation.
    left, right = (torch.randint(-1, 2, (2, n, 6), generator=generator).float() for n in (70, 150))
    delta = left @ right.mT + torch.tensor([0, 0.25, -0.25, 4])[torch.randint(0, 4, (2, 70, 150), generator=generator)]
    on_gpu = [t.cuda() for t in (delta, left, right)]
    cut = torch.ops.deftx.residual_cut(*on_gpu, 999)
    denoised = reference.low_rank_denoised(delta, left, right, cut.cpu())
    assert int((denoised != left @ right.mT).sum()) <= 2 * 999
    assert torch.equal(torch.ops.deftx.low_rank_denoised(*on_gpu, cut).cpu(), denoised)
    for dtype in (torch.float32, torch.float64):  # more columns than a panel has
        w = torch.randn(3, 50, 41, generator=generator, dtype=dtype)
        a, tolerance = w.mT @ w, {"rtol": 0, "atol": 2000 * torch.finfo(dtype).eps}
        values, vectors = (x.cpu() for x in torch.ops.deftx.eigh(a.cuda()))
        torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, a, **tolerance)
        torch.testing.assert_close(torch.ops.deftx.eigvalsh(a.cuda()).cpu(), torch.linalg.eigvalsh(a), **tolerance)
    for rule in ({"rank": 4}, {"energy": 0.9}):
        w = torch.randn(2, 90, 80, generator=generator)
        exact = svd_denoise(w.double(), **rule)
        residual, best = ((w.double() - x.double()).norm() for x in (svd_denoise(w.cuda(), **rule).cpu(), exact))
        assert residual <= 1.02 * best + 1e-4 * w.norm()


if __name__ == "__main__":
    main()
