"""What launches a Triton kernel: an earlier call's compiled kernel, unless Triton would have compiled another one."""

import pytest
import torch

from deftx_kernels.kernels.launch import Launcher, cdiv, on

GRID = (2, 1, 1)


class Kernel:
    """In place of a JIT function: each compilation is a new one; `calls` says which kernel was launched with what."""

    def __init__(self, interpreted: bool = False) -> None:
        self.compilations, self.calls, self.interpreted = 0, [], interpreted

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.compilations += 1
            self.calls.append((self.compilations, grid, arguments, options))
            return None if self.interpreted else Compiled(self, self.compilations)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel, number: int) -> None:
        self.kernel, self.number = kernel, number

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.calls.append((self.number, grid, arguments, {}))


def test_a_compiled_kernel_is_launched_again():
    kernel, x, y = Kernel(), torch.zeros(64), torch.zeros(64)
    launch = Launcher(kernel, num_warps=4)
    launch(GRID, ("kind",), (x, None), (1, 2), "constant")
    launch((3, 1, 1), ("kind",), (y, None), (5, 6), "constant")
    (first, grid, arguments, options), (second, other_grid, others, no_options) = kernel.calls
    assert (first, grid, options) == (1, GRID, {"num_warps": 4})
    assert arguments[0] is x
    assert arguments[1:] == (None, 1, 2, "constant")
    assert (second, other_grid, no_options) == (1, (3, 1, 1), {})
    assert others[0] is y
    assert others[1:] == (None, 5, 6, "constant")


@pytest.mark.parametrize(
    ("kind", "tensors"),
    [
        (("kind",), (torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64))),
        (("kind",), (torch.zeros(64), torch.zeros(64, dtype=torch.float64))),
        (("kind",), (torch.zeros(64), None)),
        (("kind",), (torch.zeros(65)[1:], torch.zeros(64))),  # 4 bytes off: vector loads would be misaligned
        (("kind",), (torch.zeros(64), torch.zeros(66)[2:])),
        (("kind",), (torch.zeros(64, device="meta"), torch.zeros(64, device="meta"))),
        (("another kind",), (torch.zeros(64), torch.zeros(64))),
    ],
    ids=["dtype", "another dtype", "none", "alignment", "another alignment", "device", "kind"],
)
def test_another_kernel_is_compiled(kind, tensors):
    kernel = Kernel()
    launch = Launcher(kernel)
    usual = (torch.zeros(64), torch.zeros(64))
    for k, given in [(("kind",), usual), (kind, tensors), (("kind",), usual), (kind, tensors)]:
        launch(GRID, k, given, ())
    assert [call[0] for call in kernel.calls] == [1, 2, 1, 2]


def test_what_is_interpreted_is_not_kept():
    kernel = Kernel(interpreted=True)
    launch = Launcher(kernel, num_warps=4)
    for _ in range(2):
        launch(GRID, (), (torch.zeros(4),), (7,))
    assert [options for *_, options in kernel.calls] == [{"num_warps": 4}] * 2


def test_cdiv():
    assert [cdiv(x, 4) for x in range(10)] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_no_context_is_made_for_the_cpu():
    with on(torch.device("cpu")):
        assert on(torch.device("cpu")) is on(torch.device("cpu"))


@pytest.mark.gpu
def test_the_other_device_is_made_current():
    here = torch.cuda.current_device()
    with on(torch.device("cuda", here)):
        assert torch.cuda.current_device() == here
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    other = (here + 1) % torch.cuda.device_count()
    with on(torch.device("cuda", other)):
        assert torch.cuda.current_device() == other
    assert torch.cuda.current_device() == here
