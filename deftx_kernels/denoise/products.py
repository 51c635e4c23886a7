"""Matrix products of float32 accuracy at the speed of the matrix units, whatever the user's precision flags are.

On CUDA float32 products are made of bfloat16 ones, summed in float32: cuBLAS' float32 product would be slow, or as
inaccurate as the user's TF32 flag. With x = x0 + x1, both bfloat16, a @ b is a0 b0 + a0 b1 + a1 b0; the omitted a1 b1
is about 2**-16 of the result. Entries must be finite. Every operand is split in one pass that writes its parts where
the product reads them; the operands of a batch of matrices in one launch. There are two forms:

    deep    [a1 | a0 | a0] @ [b0; b1; b0]: one product, 3 times as deep, whose result is written once (`matmul`,
            `matmul_`)
    wide    a0 @ [b0 | b1], then a1 @ b0: a large a is split once for many products with matrices of few columns
            (`SplitBF16`)

Memory traffic was counted (bench/NOTES.md, "Denoising: products") but not timed on a GPU yet.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEFT, RIGHT = (1, 0, 0), (0, 1, 0)  # the parts of a deep product's operands, pair by pair

Matrices = Tensor | Sequence[Tensor]  # [..., m, n], or b matrices [m, n] of one shape, which may lie apart: [b, m, n]


def uses_split_products(x: Tensor) -> bool:
    """Whether products of x are made of bfloat16 ones."""
    return x.is_cuda and x.dtype == torch.float32


def matmul(a: "Tensor | Operand", b: "Tensor | Operand") -> Tensor:
    """a @ b of [m, k] and [k, n] or [b, m, k] and [b, k, n], float32 or float64. On the CPU inside `full_precision`."""
    if not isinstance(a, Tensor):
        assert isinstance(b, Tensor)
        return a.times(b)
    if not isinstance(b, Tensor):
        return b.after(a)
    if not uses_split_products(a):
        return a @ b
    if a.dim() == 2:
        return matmul(a[None], b[None])[0]
    out = a.new_empty(len(a), a.shape[1], b.shape[2])
    return product_(out, split(a, LEFT, -1), split(b, RIGHT, -2))


def rough_matmul(a: "Tensor | Operand", b: "Tensor | Operand") -> Tensor:
    """As `matmul`, but of `SplitBF16` only the first part: a third of the work, an error of at most 2**-8."""
    if isinstance(a, SplitBF16) and isinstance(b, Tensor):
        left, right, count = a.first, b.to(torch.bfloat16), len(a)
    elif isinstance(b, SplitBF16) and isinstance(a, Tensor):
        left, right, count = a.to(torch.bfloat16), b.first, len(b)
    else:
        return matmul(a, b)
    out = torch.empty(count, left.shape[-2], right.shape[-1], dtype=torch.float32, device=left.device)
    return product_(out, left.expand(count, -1, -1), right.expand(count, -1, -1))


def matmul_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out [m, n] = a @ b, as `matmul`."""
    if uses_split_products(a):
        product_(out[None], split(a[None], LEFT, -1), split(b[None], RIGHT, -2))
    else:
        torch.mm(a, b, out=out)


@dataclass(frozen=True)
class SplitBF16:
    """Float32 matrices [b, m, n], split once for many products with matrices of a few columns or rows."""

    first: Tensor  # bfloat16 [b, m, n]
    second: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "SplitBF16":  # [b, m, n]
        return cls(*split(x, (0, 1), -1).tensor_split(2, -1))

    @classmethod
    def stacked(cls, matrices: Sequence[Tensor], workspace: Tensor) -> "SplitBF16":
        """Of matrices [m, n] of one shape, written into a contiguous float32 workspace of at least as many entries."""
        count, (m, n) = len(matrices), matrices[0].shape
        parts = workspace.view(-1)[: count * m * n].view(torch.bfloat16).view(count, m, 2 * n)
        return cls(*split(matrices, (0, 1), -1, out=parts).tensor_split(2, -1))

    @property
    def shape(self) -> torch.Size:
        return self.first.shape

    @property
    def mT(self) -> "SplitBF16":
        return SplitBF16(self.first.mT, self.second.mT)

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, chosen: list[int]) -> "SplitBF16":
        return SplitBF16(self.first[chosen], self.second[chosen])

    def times(self, b: Tensor) -> Tensor:  # [b or none, n, l] -> [b, m, l]
        """self @ b."""
        count, m, _ = self.shape
        columns = b.shape[-1]
        thin = split(b, (0, 1), -1).expand(count, -1, -1)
        sums = b.new_empty(count, m, 2 * columns)
        product_(sums, self.first, thin)
        product_(sums[..., :columns], self.second, thin[..., :columns], add=1)
        return sums[..., :columns] + sums[..., columns:]

    def after(self, a: Tensor) -> Tensor:  # [b or none, l, m] -> [b, l, n]
        """a @ self."""
        count, _, n = self.shape
        rows = a.shape[-2]
        thin = split(a, (0, 1), -2).expand(count, -1, -1)
        sums = a.new_empty(count, 2 * rows, n)
        product_(sums, thin, self.first)
        product_(sums[:, :rows], thin[:, :rows], self.second, add=1)
        return sums[:, :rows] + sums[:, rows:]


@dataclass(frozen=True)
class SeparateMatrices:
    """Matrices [m, n] of one shape, for many products with matrices of a few columns or rows, one after the other.

    A BLAS uses all threads for each matrix. In a batch it may use one thread per matrix: then threads idle at the end.
    """

    each: Sequence[Tensor]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.each), *self.each[0].shape))

    def __len__(self) -> int:
        return len(self.each)

    def __getitem__(self, chosen: list[int]) -> "SeparateMatrices":
        return SeparateMatrices([self.each[i] for i in chosen])

    def times(self, b: Tensor) -> Tensor:  # [b or none, n, l] -> [b, m, l]
        """self @ b."""
        count, m, _ = self.shape
        out = b.new_empty(count, m, b.shape[-1])
        for w, x, target in zip(self.each, b.expand(count, -1, -1), out):
            torch.mm(w, x, out=target)
        return out

    def after(self, a: Tensor) -> Tensor:  # [b or none, l, m] -> [b, l, n]
        """a @ self; as self.mT @ a.mT, which takes a tenth less."""
        count, _, n = self.shape
        out = a.new_empty(count, n, a.shape[-2])
        for w, x, target in zip(self.each, a.expand(count, -1, -1), out):
            torch.mm(w.mT, x.mT, out=target)
        return out.mT


Operand = SplitBF16 | SeparateMatrices


def gram_(out: Tensor, chunks: Iterable[Matrices]) -> None:  # [b, n, n], each [b, rows, n] or b of [rows, n]
    """out = w.mT @ w, exactly symmetric, of w split into three parts (the omitted products are about 2**-24 of it).

    Four products instead of the six for two different matrices: w0' w1 and w1' w0, say, are each other's transposes.
    """
    b, n, _ = out.shape
    sums = out.new_empty(b, n, 3 * n)  # w0' w0 + w1' w1 | w0' w1 | w0' w2
    for i, rows in enumerate(chunks):
        parts = split(rows, (0, 1, 2), -1)
        first, second = parts[..., :n], parts[..., n : 2 * n]
        product_(sums, first.mT, parts, add=1 if i else 0)
        product_(sums[..., :n], second.mT, second, add=1)
    even, one, two = sums.view(b, n, 3, n).unbind(2)
    half = torch.add(one + two, even, alpha=0.5)
    torch.add(half, half.mT, out=out)


def product_(
    out: Tensor,  # float32 [b, m, n]
    a: Tensor,  # [b, m, k], bfloat16; float32 where products are not split
    b: Tensor,  # [b, k, n]
    add: float = 0,
) -> Tensor:
    """out = a @ b, summed in float32; with `add`, out += add * a @ b."""
    if not a.is_cuda:  # products of bfloat16 numbers are exact in float32
        product = a.float() @ b.float()
        return out.add_(product, alpha=add) if add else out.copy_(product)
    # The addend must be `out`: some releases of torch add to what `out` holds, others copy the addend there first.
    return torch.baddbmm(out, a, b, out_dtype=torch.float32, beta=1 if add else 0, alpha=add or 1, out=out)


def left_operand(x: Tensor) -> Tensor:
    """x [..., m, k] as the left operand of `product_`."""
    return split(x, LEFT, -1) if uses_split_products(x) else x


def right_operand(x: Tensor) -> Tensor:
    """x [..., k, n] as the right operand of `product_`."""
    return split(x, RIGHT, -2) if uses_split_products(x) else x


def both_operands(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [b, n, n] as the left and as the right operand of `product_`: it is read once for both."""
    if not uses_split_products(x):
        return x, x
    b, n, _ = x.shape
    left, right = (x.new_empty(shape, dtype=torch.bfloat16) for shape in ((b, n, 3 * n), (b, 3 * n, n)))
    torch.ops.deftx.split_bf16_([x], left[None], list(LEFT), right[None], list(RIGHT))
    return left, right


def split(x: Matrices, slots: Sequence[int], dim: int, out: Tensor | None = None) -> Tensor:
    """Parts of x [..., m, n] beside each other along the columns (dim -1) or rows (dim -2): slot s holds part slots[s].

    float32 [..., m, n] -> bfloat16 [..., m, s * n] or [..., s * m, n]. `out`, if given, is contiguous. A transposed x
    gives a transposed result: it is read in the order of its memory.
    """
    tensors = [x] if isinstance(x, Tensor) else list(x)
    if out is None:
        if all(t.stride(-1) != 1 and t.stride(-2) == 1 for t in tensors):
            return split(x.mT if isinstance(x, Tensor) else [t.mT for t in tensors], slots, -3 - dim).mT
        shape = list(x.shape) if isinstance(x, Tensor) else [len(tensors), *tensors[0].shape]
        shape[dim] *= len(slots)
        out = tensors[0].new_empty(shape, dtype=torch.bfloat16)
    parts: tuple = out[None] if isinstance(x, Tensor) else out, list(slots)
    torch.ops.deftx.split_bf16_(tensors, *(parts if dim == -1 else (None, [])), *(parts if dim == -2 else (None, [])))
    return out


_precision_lock = threading.Lock()
_precision_users: list[str] = []  # the setting to restore, once for each caller


@contextlib.contextmanager
def full_precision(device_type: str = "cpu") -> Iterator[None]:
    """Without gradients and autocast, and with float32 products on the CPU in float32, which
    torch.set_float32_matmul_precision("medium") would compute in bfloat16.

    The setting is global to the process: of callers in several threads, the first changes it and the last restores it.
    """
    flags = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _precision_lock:
        _precision_users.append(_precision_users[0] if _precision_users else flags.fp32_precision)
        flags.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _precision_lock:
            before = _precision_users.pop()
            if not _precision_users:
                flags.fp32_precision = before
