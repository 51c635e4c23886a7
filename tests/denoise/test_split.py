"""The Triton kernel that splits float32 matrices into bfloat16 parts: the same bits as the plain function, wherever
they go.
"""

import importlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deftx_kernels import svd_denoise
from deftx_kernels.denoise import products

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


@pytest.fixture(
    params=[pytest.param("triton-sm80", marks=pytest.mark.cuda_on_cpu), pytest.param("gpu", marks=pytest.mark.gpu)]
)
def split(request) -> Callable[..., Tensor]:
    """`products.split` by the kernel, on CPU tensors. Triton's own interpreter rounds to bfloat16 wrongly: it is not
    among them.
    """
    pytest.importorskip("triton")
    from deftx_kernels.kernels import split as module

    if request.param == "gpu":

        def on_gpu(x, slots, dim, out=None):
            memory = x.untyped_storage().cuda()
            moved = torch.empty(0, device="cuda").set_(memory, x.storage_offset(), x.shape, x.stride())
            return products.split(moved, slots, dim, out).cpu()

        return on_gpu
    tool = importlib.import_module(f"{request.getfixturevalue('cuda_on_cpu').__name__}.triton_on_cpu")

    def emulated(x, slots, dim, out=None):
        with tool.override(racecheck=True) as launches:
            found = module.split(x, slots, dim, out)
        assert len(launches) == (x.numel() > 0), "one launch for all matrices"
        return found

    return emulated


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
        parts = products.split_plainly(x, range(count), -1).double().view(50, count, 60)
        assert bool(((parts.sum(1) - x.double()).abs() <= error * x.double().abs() + 1e-40).all())


@pytest.mark.parametrize("dim", [-1, -2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_the_plain_function(split, shape, dim):
    x = numbers(*shape)
    for slots in SLOTS:
        assert_same(split(x, slots, dim), products.split_plainly(x, slots, dim))


@pytest.mark.parametrize("dim", [-1, -2])
def test_strided_matrices(split, dim):
    x = numbers(3, 41, 66)
    views = [
        x.mT,
        x[:, 3:20, 5:30],
        x[::2, ::3, :64],
        x[:, ::2, ::2],
        x[1].expand(2, 41, 66),
        x[:1].mT,
        x[..., 7:8],
        x[:, 7:8].mT,
    ]
    for view in views:
        assert_same(split(view, (0, 1), dim), products.split_plainly(view, (0, 1), dim))


def test_transposed_matrices_are_split_as_they_lie(split):
    assert split(numbers(2, 40, 20).mT, (0, 1), -1).stride() == (1600, 1, 20)


def test_into_a_given_tensor(split, request):
    if request.node.callspec.params["split"] == "gpu":
        pytest.skip("looks at the memory around the tensor")
    x = numbers(2, 9, 130)
    for dim, shape in ((-1, (2, 9, 260)), (-2, (2, 18, 130))):
        memory = torch.full((4, *shape[1:]), 7.0, dtype=torch.bfloat16)
        out = memory[1:3]
        found = split(x, (0, 1), dim, out)
        assert found.data_ptr() == out.data_ptr()
        assert_same(out, products.split_plainly(x, (0, 1), dim))
        assert bool((memory[::3] == 7).all())


def test_offsets_beyond_31_bits(cuda_on_cpu):
    """Address space of which a few pages are touched: matrices and rows more than 2**31 entries apart, in x and in the
    result.
    """
    pytest.importorskip("triton")
    from deftx_kernels.kernels import split as module

    tool = importlib.import_module(f"{cuda_on_cpu.__name__}.triton_on_cpu")
    far = 2**31 + 16
    for strides in ((far, 5, 1), (5, far, 1)):
        x = torch.empty(far + 20).as_strided((2, 2, 5), strides)
        x.copy_(numbers(2, 2, 5))
        for places in ((far, 10, 5, 1), (10, far, 5, 1), (10, 5, far, 1)):
            out = torch.empty(far + 40, dtype=torch.bfloat16).as_strided((2, 2, 2, 5), places)  # [b, s, m, n]
            with tool.override():
                module.split_into(out, x, (0, 1))
            assert_same(out.reshape(2, 4, 5), products.split_plainly(x, (0, 1), -2))


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.9}])
def test_denoising_by_the_kernel(cuda_on_cpu, monkeypatch, rule):
    """All that it splits, contiguous and not, wide and tall."""
    pytest.importorskip("triton")
    from deftx_kernels.kernels import split as module

    tool = importlib.import_module(f"{cuda_on_cpu.__name__}.triton_on_cpu")
    monkeypatch.setattr(products, "splits", lambda x: x.dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    delta = {
        name: torch.randn(shape, generator=generator) for name, shape in {"tall": (2, 60, 50), "wide": (50, 70)}.items()
    }
    want = svd_denoise(delta, oversample=4, **rule)
    monkeypatch.setattr(products, "split", module.split)
    with tool.override() as launches:
        found = svd_denoise(delta, oversample=4, **rule)
    assert len(launches) > 10
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
