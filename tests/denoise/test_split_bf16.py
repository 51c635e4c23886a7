"""split_bf16_ and `products.split` before it: the same bits from every implementation, wherever they are written."""

import math

import pytest
import torch
from torch import Tensor

from deftx_kernels import svd_denoise
from deftx_kernels.denoise import products
from tests.conftest import IMPLEMENTATIONS, Implementation, implementations

OPS = ("split_bf16_",)
# Triton's own interpreter rounds to bfloat16 wrongly.
no_interpreter = implementations(*(n for n in IMPLEMENTATIONS if n not in ("c++", "emulated", "triton-interpreter")))

# (batch..., m, n); a tile is 32 x 128.
SHAPES = [
    (1, 1),
    (5, 130),
    (40, 16),
    (3, 1, 7),
    (2, 70, 1),
    (2, 33, 144),
    (2, 3, 4, 5),
    (1, 32, 128),
    (0, 3),
    (2, 5, 0),
    (0, 3, 4),
]
SLOTS = [(0, 1), (1, 0, 0), (0, 1, 0), (0, 1, 2), (2,)]


def split(implementation: Implementation, x: list[Tensor], slots: tuple[int, ...], dim: int) -> list[Tensor]:
    """The op's results on the CPU; x keeps its strides on every device."""
    if implementation.device == "cuda":
        memory = {t.data_ptr() - 4 * t.storage_offset(): t.untyped_storage().cuda() for t in x}
        new = torch.empty(0, device="cuda").set_
        x = [new(memory[t.data_ptr() - 4 * t.storage_offset()], t.storage_offset(), t.shape, t.stride()) for t in x]
    shape = [len(x), *x[0].shape]
    shape[dim] *= len(slots)
    out = torch.full((math.prod(shape) + 2,), 7.0, dtype=torch.bfloat16, device=x[0].device)
    parts = out[1:-1].view(shape), list(slots)
    implementation.ops.split_bf16_(x, *(parts if dim == -1 else (None, [])), *(parts if dim == -2 else (None, [])))
    if implementation.name == "triton-sm80":
        assert len(implementation.ops.launches) == (x[0].numel() > 0), "one launch for all matrices"
    assert bool((out[[0, -1]] == 7).all())  # nothing beside it was written
    return list(out[1:-1].view(shape).cpu())


def expected(x: Tensor, slots: tuple[int, ...], dim: int) -> Tensor:
    parts = []
    for _ in range(3):
        parts.append(x.to(torch.bfloat16))
        x = x - parts[-1].float()
    return torch.cat([parts[s] for s in slots], dim)


def numbers(*shape: int) -> Tensor:
    """Of all magnitudes that denoising may meet, both zeros, halves of the last bit kept, and numbers that bfloat16
    holds.
    """
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-60, 60, shape, generator=generator)
    special = [0.0, -0.0, 1.0, -3.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-17, 1 + 2**-9, 1e-40, -3e-45, 2.0**126]
    chosen = torch.randint(4 * len(special), shape, generator=generator)
    return torch.where(chosen < len(special), torch.tensor(special)[chosen % len(special)], x)


def assert_same(found: Tensor, want: Tensor) -> None:
    assert found.dtype == torch.bfloat16
    assert found.shape == want.shape
    different = found.contiguous().view(torch.int16) != want.contiguous().view(torch.int16)
    assert not different.any(), f"{int(different.sum())} entries differ"


def test_parts_add_up():
    x = numbers(50, 60).clamp(-(2.0**60), 2.0**60)
    for count, error in ((2, 2.0**-16), (3, 2.0**-24)):
        parts = products.split(x, range(count), -1).double().view(50, count, 60)
        assert bool(((parts.sum(1) - x.double()).abs() <= error * x.double().abs() + 1e-40).all())


@pytest.mark.usefixtures("no_racecheck")
@no_interpreter
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_rounding_part_after_part(implementation, shape, dim):
    x = numbers(*shape)
    some = implementation.name == "triton-sm80" and shape not in ((5, 130), (2, 33, 144))
    for slots in SLOTS[3:4] if some else SLOTS:  # each of the other shapes with all parts
        assert_same(*split(implementation, [x], slots, dim), expected(x, slots, dim))


@no_interpreter
@pytest.mark.parametrize("dim", [-1, -2])
def test_strided_matrices(implementation, dim):
    x = numbers(3, 41, 66)
    views = [x.mT, x[:, 3:20, 5:30], x[::2, ::3, :64], x[:, ::2, ::2], x[1].expand(2, 41, 66), x[:1].mT, x[..., 7:8]]
    for view in [*views, x[:, 7:8].mT]:
        assert_same(*split(implementation, [view], (0, 1), dim), expected(view, (0, 1), dim))
        assert_same(products.split(view, (0, 1), dim), expected(view, (0, 1), dim))


@no_interpreter
@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize(
    "layout", ["contiguous", "4 bytes off", "rows", "batches", "of 4", "transposed", "two", "empty"]
)
def test_tensors_that_lie_apart(implementation, dim, layout):
    """In no order, with others between them; not a multiple of the distance of two of them."""
    x = numbers(9, 40, 144).view(-1)
    starts = [5 * 5760, 0, 7 * 5760 + 1008, 2 * 5760]
    if layout == "4 bytes off":
        starts = [s + 1 for s in starts]
    tensors = [x[s : s + 5760].view(40, 144) for s in starts]
    views = {
        "rows": lambda t: t[3:37, 16:121],
        "batches": lambda t: t.view(5, 8, 144)[1::2, :, 16:],
        "of 4": lambda t: t.view(2, 4, 5, 144)[:, 1:3],
        "transposed": lambda t: t.mT,
        "empty": lambda t: t[:0],
    }
    tensors = [views.get(layout, lambda t: t)(t) for t in tensors]
    if layout == "two":  # of several layouts
        tensors = [tensors[0][:, :40], tensors[1][:, :40].contiguous(), tensors[2][:, :40].mT]
    want = [expected(t, (1, 0, 0), dim) for t in tensors]
    for found in (split(implementation, tensors, (1, 0, 0), dim), list(products.split(tensors, (1, 0, 0), dim))):
        assert len(found) == len(tensors)
        for parts, exact in zip(found, want):
            assert_same(parts, exact)


def test_transposed_matrices_are_split_as_they_lie():
    x = numbers(2, 40, 20).mT
    assert products.split(x, (0, 1), -1).stride() == products.split(list(x), (0, 1), -1).stride() == (1600, 1, 20)


def test_into_a_given_tensor():
    x = numbers(2, 9, 130)
    for given in (x, list(x)):
        out = torch.empty(2, 9, 260, dtype=torch.bfloat16)
        assert products.split(given, (0, 1), -1, out) is out
        assert_same(out, expected(x, (0, 1), -1))


@no_interpreter
def test_both_kinds_of_operands(implementation):
    x = numbers(3, 41, 66)
    given = [t.to(implementation.device) for t in x]
    columns, rows = (torch.zeros(s, dtype=torch.bfloat16, device=given[0].device) for s in ((3, 41, 132), (3, 123, 66)))
    implementation.ops.split_bf16_(given, columns, [1, 0], rows, [0, 2, 1])
    assert_same(columns.cpu(), expected(x, (1, 0), -1))
    assert_same(rows.cpu(), expected(x, (0, 2, 1), -2))


def test_operands_of_a_square(monkeypatch):
    x = numbers(2, 9, 9)
    assert all(t is x for t in products.both_operands(x))
    monkeypatch.setattr(products, "uses_split_products", lambda x: True)
    for found, want in zip(products.both_operands(x), (products.left_operand(x), products.right_operand(x))):
        assert_same(found, want)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (lambda x, out: ([], out, [0, 1], None, []), "x must hold at least one tensor"),
        (lambda x, out: ([x, x.double()], out, [0, 1], None, []), r"x\[1\] must be float32"),
        (lambda x, out: ([x[0], x[0]], out, [0, 1], None, []), r"x\[0\] must have shape \[..., m, n\]"),
        (lambda x, out: ([x, x[:2]], out, [0, 1], None, []), r"x\[1\] must have shape \[3, 5\], as x\[0\], got"),
        (lambda x, out: ([x, x], out.float(), [0, 1], None, []), "columns must be bfloat16"),
        (lambda x, out: ([x, x], out.mT, [0, 1], None, []), "columns must be contiguous"),
        (lambda x, out: ([x, x], None, [], out, [0, 1]), "rows must have shape"),
        (lambda x, out: ([x], out, [0, 1], None, []), "columns must have shape"),
        (lambda x, out: ([x, x], out, [0], None, []), "columns must have shape"),
        (lambda x, out: ([x, x], out, [], None, []), "column_slots must be a list"),
        (lambda x, out: ([x, x], None, [], out, [0, 3]), "row_slots must be a list"),
        (lambda x, out: ([x, x], out, [0, 1], None, [0]), "row_slots must be empty where rows is None"),
        (lambda x, out: ([x, x], None, [], None, []), "columns or rows must be a tensor"),
        (lambda x, out: ([x, x], out, [0, 1], out.view(2, 6, 5), [0, 1]), "columns and rows share memory"),
    ],
)
def test_bad_arguments_raise(arguments, named):
    with pytest.raises((TypeError, ValueError), match=named):
        torch.ops.deftx.split_bf16_(*arguments(torch.ones(3, 5), torch.empty(2, 3, 10, dtype=torch.bfloat16)))


@pytest.mark.cuda_on_cpu
def test_offsets_beyond_31_bits(triton_on_cpu):
    """Address space of which a few pages are touched: matrices and rows more than 2**31 entries apart, in x and in the
    result.
    """
    from deftx_kernels.kernels.split_bf16 import split_into

    far = 2**31 + 16
    for strides in ((far, 5, 1), (5, far, 1)):
        x = torch.empty(far + 20).as_strided((2, 2, 5), strides)
        x.copy_(numbers(2, 2, 5))
        for out_strides in ((far, 10, 5, 1), (10, far, 5, 1), (10, 5, far, 1)):
            out = torch.empty(far + 40, dtype=torch.bfloat16).as_strided((2, 2, 2, 5), out_strides)  # [b, s, m, n]
            for tensors in ([x], list(x)):
                for both in ((out, (0, 1), None, ()), (None, (), out, (0, 1))):
                    with triton_on_cpu.override(extra=tensors):
                        split_into(tensors, *both)
                    assert_same(out.reshape(2, 4, 5), expected(x, (0, 1), -2))
                    out.zero_()


@implementations("triton-sm80")
@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.9}])
def test_denoising_by_the_kernel(implementation, monkeypatch, rule):
    """All that it splits, contiguous and not, wide and tall."""
    monkeypatch.setattr(products, "uses_split_products", lambda x: x.dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    shapes = {"tall": (2, 60, 50), "wide": (50, 70)}
    delta = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    want = svd_denoise(delta, oversample=4, **rule)
    calls = []
    kernel = implementation.ops.split_bf16_
    monkeypatch.setattr(torch.ops.deftx, "split_bf16_", lambda *arguments: calls.append(kernel(*arguments)))
    with implementation.without_racecheck():
        found = svd_denoise(delta, oversample=4, **rule)
    assert len(calls) > 10
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
