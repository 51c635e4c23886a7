"""Which tensors are denoised together, so that some of them alone get the bits that they have among all."""

import pytest
import torch

from deftx_kernels import svd_denoise
from deftx_kernels.denoise.batches import denoise
from deftx_kernels.denoise.plans import Layout, together, with_drawn_matrices, work
from deftx_kernels.denoise.rule import check_rule
from tests.denoise.oracle import noise

SHAPES = {f"{i}.{n}": s for i in range(4) for n, s in (("a", (90, 61)), ("b", (61, 90)), ("c", (75, 75)))}
SHAPES |= {"conv": (40, 9, 3, 3), "conv2": (50, 5, 3, 3), "conv3": (7, 3, 3), "stack": (7, 90, 61), "row": (1, 50)}


def denoised(tensors, rule):
    outs = {n: torch.empty_like(t) for n, t in tensors.items()}
    infos = denoise(tensors, outs, {n: n for n in tensors}, rule)
    return {n: (outs[n], *infos[n].values()) for n in tensors}


@pytest.fixture(params=[1, pytest.param(2, marks=pytest.mark.multithreaded)])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [{"rank": 5}, {"rank": 5, "generator": 3}, {"energy": 0.8}])
def test_a_list_alone_has_the_bits_of_all(threads, rule, dtype):
    tensors = {n: noise(*s, seed=i, dtype=dtype) for i, (n, s) in enumerate(SHAPES.items())}
    layouts = {n: Layout.of(t) for n, t in tensors.items()}

    def made():
        seed = rule.get("generator")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return check_rule(rule.get("rank"), rule.get("energy"), 0.05, generator=generator, batch_bytes=1 << 17)

    lists = together(layouts, made())
    assert sorted(n for names in lists for n in names) == sorted(tensors)
    assert 6 < len(lists) < len(tensors), "neither one by one nor all together"
    expected, drawn = denoised(tensors, made()), with_drawn_matrices(made(), layouts.values())
    for names in lists:
        for name, found in denoised({n: tensors[n] for n in names}, drawn).items():
            assert all(map(torch.equal, found, expected[name])), name


def test_lists_on_a_gpu():
    layouts = {n: Layout(torch.Size(s), torch.float32, torch.device("meta")) for n, s in SHAPES.items()}
    assert together(layouts, check_rule(5, None, 0.0)) == [[n] for n in SHAPES]


@pytest.mark.parametrize("rule", [{"rank": 3}, {"rank": 30}, {"energy": 0.8}])
def test_bits_do_not_depend_on_the_address(rule):
    for m, n in ((83, 87), (53, 76), (358, 174), (395, 261), (43, 61), (55, 89)):
        a = noise(m, n, dtype=torch.float64)
        moved = torch.empty(a.numel() + 1, dtype=a.dtype)[1:].view(a.shape).copy_(a)
        assert torch.equal(svd_denoise(moved, **rule), svd_denoise(a, **rule)), (m, n)


def test_work_grows_with_the_matrices():
    def of(*shape, rank=None):
        rule = check_rule(rank, None if rank else 0.9, 0.0)
        return work(Layout(torch.Size(shape), torch.float32, torch.device("cpu")), rule)

    assert of(768, 768) < of(3072, 768) == of(768, 3072) < of(2, 3072, 768) == 2 * of(3072, 768)
    assert of(768, 768, rank=16) < of(768, 768, rank=64) < of(768, 768)
    assert of(768, 768, rank=700) == of(768, 768)
    assert of(0, 3, 3) == 0 < of(9, 3, 3)
