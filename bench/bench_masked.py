"""masked_linear_grad and masked_embedding_grad against the dense weight gradients of torch, and its product at a mask's
entries.

The dense product is laid out as autograd has it: for `y = x @ W.T` it computes grad_y.T @ x. A peer that picks the
masked entries takes flat positions that were made beforehand, the quickest form of `grad[mask]`. Ours writes float32,
as compact values are.
"""

from collections.abc import Iterator
from functools import cache, partial

import torch
from torch import Tensor

from bench.harness import Case, Choice, Work
from bench.rows import OURS
from bench.shapes import token_ids
from deftx_kernels import CSRMask, topk_mask

OPS = {
    "masked_linear_grad": "the weight gradient of a linear layer, at the masked entries alone",
    "masked_embedding_grad": "the weight gradient of an embedding, at the masked entries alone",
}
LINEARS = {
    "tiny": ((96, 160),),
    "minilm": ((384, 384), (1536, 384)),
    "xlmr": ((768, 768), (3072, 768), (768, 3072), (4096, 4096)),  # the last is Llama 7B's
}
# vocabulary, width, padding id
EMBEDDINGS = {"tiny": (200, 96, 0), "minilm": (30522, 384, 0), "xlmr": (250002, 768, 1)}
SIZES = tuple(LINEARS)
TOKENS = 2048
SAMPLED = "torch.sparse.sampled_addmm"


def works(choice: Choice) -> Iterator[Work]:
    usual = [(torch.bfloat16 if choice.device == "cuda" else torch.float32, density) for density in (0.05, 0.01, 0.3)]
    if choice.device == "cpu":
        usual.append((torch.bfloat16, 0.05))
    for size in choice.sizes:
        for dtype, density in choice.settings(usual):
            for shape in LINEARS[size]:
                made = (partial(linear_case, s, dtype, density, choice.device) for s in (shape, *LINEARS["tiny"]))
                yield Work("masked_linear_grad", size, title(shape), dtype, density, choice.device, *made)
            made = (partial(embedding_case, s, dtype, density, choice.device) for s in (size, "tiny"))
            yield Work("masked_embedding_grad", size, title(EMBEDDINGS[size][:2]), dtype, density, choice.device, *made)


def title(shape: tuple[int, ...]) -> str:
    return f"{TOKENS} tokens, {shape[0]}x{shape[1]}"


def random_mask(shape: tuple[int, int], density: float, device: str) -> CSRMask:
    return topk_mask(
        torch.randn(shape, generator=torch.Generator(device).manual_seed(2), device=device), density=density
    )


def flat_positions(mask: CSRMask) -> Tensor:  # int64 [nnz]
    return mask.to_dense()["tensor"].view(-1).nonzero().view(-1)


def checker(mask: CSRMask, exact, tolerance: float):
    """Compares compact, dense and sparse gradients at the masked entries; `exact()` is the dense gradient in float64."""

    @cache
    def expected() -> Tensor:
        return mask.gather({"tensor": exact()})

    def check(result: Tensor) -> str | None:
        dense = result.to_dense() if result.is_sparse else result
        got = mask.gather({"tensor": dense}) if dense.dim() == 2 else dense
        if not mask.nnz:
            return None if not len(got) else f"{len(got)} entries of an empty mask"
        right = tolerance * float(expected().abs().max()) + 1e-6 * TOKENS
        worst = float((got.double() - expected()).abs().max())
        return None if worst <= right else f"{worst:.1e} from the sum in float64, at most {right:.1e} is right"

    return check


def linear_case(shape: tuple[int, int], dtype: torch.dtype, density: float, device: str) -> Case:
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, n, generator=generator).to(device, dtype)
    gradient = torch.randn(TOKENS, m, generator=generator).to(device, dtype)
    mask = random_mask((m, n), density, device)
    positions = flat_positions(mask)

    def sampled():
        matrix = mask.sparse_csr("tensor", torch.zeros(mask.nnz, dtype=dtype, device=device))
        # Written over the values of the mask's own matrix: a result of its own would begin as a copy of it.
        return lambda: torch.sparse.sampled_addmm(matrix, gradient.mT, x, beta=0.0, out=matrix).values()

    providers = {
        OURS: lambda: (
            lambda: torch.ops.deftx.masked_linear_grad(gradient, x, mask.crow_indices, mask.col_indices, torch.float32)
        ),
        "dense product": lambda: lambda: gradient.mT @ x,
        "dense product + grad[mask]": lambda: lambda: torch.take(gradient.mT @ x, positions),
    }
    absent = {}
    if dtype in (torch.float32, torch.float64):
        providers[SAMPLED] = sampled
    else:
        absent[SAMPLED] = "torch has it in float32 and float64 only"
    check = checker(mask, lambda: gradient.double().mT @ x.double(), torch.finfo(dtype).eps)
    moved = (x.numel() + gradient.numel()) * dtype.itemsize + mask.nnz * (4 + mask.col_indices.element_size())
    flops = 2.0 * TOKENS * mask.nnz  # of the entries that are kept, at the rate of a matrix product
    return Case(moved, providers, check, flops=flops, rounds=25, absent=absent)


def embedding_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    vocabulary, width, padding = EMBEDDINGS[size]
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(TOKENS, width, generator=generator).to(device, dtype)
    ids = token_ids(TOKENS, vocabulary, generator)
    ids = torch.where(torch.rand(TOKENS, generator=generator) < 0.3, padding, ids).to(device)
    mask = random_mask((vocabulary, width), density, device)
    positions = flat_positions(mask)

    def dense() -> Tensor:
        return torch.ops.aten.embedding_dense_backward(gradient, ids, vocabulary, padding, False)

    def exact() -> Tensor:
        kept = ids != padding
        return torch.zeros(vocabulary, width, dtype=torch.float64, device=device).index_add_(
            0, ids[kept], gradient[kept].double()
        )

    providers = {
        OURS: lambda: (
            lambda: torch.ops.deftx.masked_embedding_grad(
                gradient, ids, mask.crow_indices, mask.col_indices, padding, torch.float32
            )
        ),
        "torch dense": lambda: dense,
        "torch dense + grad[mask]": lambda: lambda: torch.take(dense(), positions),
        "torch sparse=True, coalesced": lambda: (
            lambda: torch.ops.aten.embedding_sparse_backward(gradient, ids, vocabulary, padding, False).coalesce()
        ),
    }
    # The gradients of a row are summed in their own dtype by torch: each addition may round.
    most = int(ids[ids != padding].bincount().max()) if len(ids[ids != padding]) else 1
    check = checker(mask, exact, torch.finfo(dtype).eps * most**0.5)
    rows = len(ids.unique())
    moved = gradient.numel() * dtype.itemsize + ids.numel() * 8 + mask.nnz * 4 + round(rows * width * density) * 4
    return Case(moved, providers, check, rounds=15)
