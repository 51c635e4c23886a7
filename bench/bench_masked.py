"""masked_linear_grad and masked_embedding_grad against the dense weight gradients of torch, and its sampled product.

The dense product has autograd's layout: for `y = x @ W.T` it computes grad_y.T @ x. Baselines with `grad[mask]` take
flat positions made beforehand, its fastest form. Ours writes float32, the dtype of compact values.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor

from bench.harness import Case, Choice, Workload, workload
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


def workloads(choice: Choice) -> Iterator[Workload]:
    device = choice.device
    default = [(torch.bfloat16 if device == "cuda" else torch.float32, density) for density in (0.05, 0.01, 0.3)]
    if device == "cpu":
        default.append((torch.bfloat16, 0.05))
    for size in choice.sizes:
        for setting in choice.settings(default):
            problems = [("masked_linear_grad", linear_case, (shape, *LINEARS["tiny"])) for shape in LINEARS[size]]
            problems.append(("masked_embedding_grad", embedding_case, (EMBEDDINGS[size], EMBEDDINGS["tiny"])))
            for op, case, of in problems:
                title = f"{TOKENS} tokens, {of[0][0]}x{of[0][1]}"
                yield workload(case, op, size, setting, device, title=title, of=of)


def random_mask(shape: tuple[int, int], density: float, device: str) -> CSRMask:
    generator = torch.Generator(device).manual_seed(2)
    return topk_mask(torch.randn(shape, generator=generator, device=device), density=density)


def checker(mask: CSRMask, exact: Callable[[], Tensor], tolerance: float) -> Callable[[Tensor], str | None]:
    """Compares compact, dense or sparse gradients at the masked entries with `exact()`, dense and in float64."""

    @cache
    def expected() -> Tensor:
        return mask.gather({"tensor": exact()})

    def check(result: Tensor) -> str | None:
        dense = result.to_dense() if result.is_sparse else result
        got = mask.gather({"tensor": dense}) if dense.dim() == 2 else dense
        if not mask.nnz:
            return None if not len(got) else f"{len(got)} entries of an empty mask"
        allowed = tolerance * float(expected().abs().max()) + 1e-6 * TOKENS
        worst = float((got.double() - expected()).abs().max())
        return None if worst <= allowed else f"{worst:.1e} from the sum in float64, {allowed:.1e} allowed"

    return check


def linear_case(shape: tuple[int, int], dtype: torch.dtype, density: float, device: str) -> Case:
    m, n = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, n, generator=generator).to(device, dtype)
    gradient = torch.randn(TOKENS, m, generator=generator).to(device, dtype)
    mask = random_mask((m, n), density, device)
    positions, indices = mask.flat_indices(), (mask.crow_indices, mask.col_indices)

    def sampled() -> Callable[[], Tensor]:
        matrix = mask.sparse_csr("tensor", torch.zeros(mask.nnz, dtype=dtype, device=device))
        # Written over the values of the mask's own matrix: a new result would begin as a copy of it.
        return lambda: torch.sparse.sampled_addmm(matrix, gradient.mT, x, beta=0.0, out=matrix).values()

    implementations = {
        OURS: lambda: lambda: torch.ops.deftx.masked_linear_grad(gradient, x, *indices, torch.float32),
        "dense product": lambda: lambda: gradient.mT @ x,
        "dense product + grad[mask]": lambda: lambda: torch.take(gradient.mT @ x, positions),
        SAMPLED: sampled,
    }
    exists = dtype in (torch.float32, torch.float64)
    absent = {} if exists else {SAMPLED: "torch has it in float32 and float64 only"}
    check = checker(mask, lambda: gradient.double().mT @ x.double(), torch.finfo(dtype).eps)
    moved = (x.numel() + gradient.numel()) * dtype.itemsize + mask.nnz * (4 + mask.col_indices.element_size())
    flops = 2.0 * TOKENS * mask.nnz  # of the masked entries, at the rate of a matrix product
    return Case(moved, implementations, check, flops=flops, rounds=25, absent=absent)


def embedding_case(shape: tuple[int, int, int], dtype: torch.dtype, density: float, device: str) -> Case:
    vocabulary, width, padding = shape
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(TOKENS, width, generator=generator).to(device, dtype)
    ids = token_ids(TOKENS, vocabulary, generator)
    ids = torch.where(torch.rand(TOKENS, generator=generator) < 0.3, padding, ids).to(device)
    mask = random_mask((vocabulary, width), density, device)
    positions, indices = mask.flat_indices(), (mask.crow_indices, mask.col_indices)
    kept = ids != padding

    def dense() -> Tensor:
        return torch.ops.aten.embedding_dense_backward(gradient, ids, vocabulary, padding, False)

    def sparse() -> Tensor:
        return torch.ops.aten.embedding_sparse_backward(gradient, ids, vocabulary, padding, False).coalesce()

    def exact() -> Tensor:
        total = torch.zeros(vocabulary, width, dtype=torch.float64, device=device)
        return total.index_add_(0, ids[kept], gradient[kept].double())

    implementations = {
        OURS: lambda: lambda: torch.ops.deftx.masked_embedding_grad(gradient, ids, *indices, padding, torch.float32),
        "torch dense": lambda: dense,
        "torch dense + grad[mask]": lambda: lambda: torch.take(dense(), positions),
        "torch sparse=True, coalesced": lambda: sparse,
    }
    # torch sums the gradients of a row in their own dtype: each addition may round.
    most = int(ids[kept].bincount().max()) if kept.any() else 1
    check = checker(mask, exact, torch.finfo(dtype).eps * most**0.5)
    rows = len(ids.unique())
    moved = gradient.numel() * dtype.itemsize + ids.numel() * 8 + mask.nnz * 4 + round(rows * width * density) * 4
    return Case(moved, implementations, check)
