"""Denoising under torch's modes, transforms and settings: the same results, and state left as it was found."""

import contextlib
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deftx_kernels import svd_denoise, truncated_svd
from deftx_kernels.denoise import products
from deftx_kernels.denoise.rule import gavish_donoho_multiple
from tests.denoise.oracle import noise

TENSORS = [noise(2, 150, 90), noise(3, 5, 7), noise(100, 80, dtype=torch.bfloat16), noise(70, 60, dtype=torch.float64)]
CALLS = {
    "truncated_svd": lambda t: truncated_svd(t, 5),
    "exact svd": lambda t: truncated_svd(t, 40),
    "rank": lambda t: svd_denoise(t, rank=5, residual_density=0.1, return_info=True),
    "large rank": lambda t: svd_denoise(t, rank=40, return_info=True),
    "energy": lambda t: svd_denoise(t, energy=0.9, residual_density=0.1, return_info=True),
    "gavish-donoho": lambda t: svd_denoise([t], rank="gavish-donoho", return_info=True),
    "information": lambda t: svd_denoise({"t": t}, energy=0.9, residual_density=1, return_info=True),
}


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


class Function(TorchFunctionMode):
    def __torch_function__(self, function, types, arguments=(), options=None):
        return function(*arguments, **(options or {}))


@contextlib.contextmanager
def setting(get, put, value):
    before = get()
    put(value)
    try:
        yield
        assert get() == value, "the setting is left as it was found"
    finally:
        put(before)


@contextlib.contextmanager
def matmul_precision(value):
    flags = torch.backends.mkldnn.matmul
    before = flags.fp32_precision
    with setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, value):
        inside = flags.fp32_precision
        yield
        assert flags.fp32_precision == inside
    flags.fp32_precision = before


@contextlib.contextmanager
def default_device_meta():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


MODES = {
    "autocast bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast float16": lambda: torch.autocast("cpu", torch.float16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "device meta": lambda: torch.device("meta"),
    "default device meta": default_device_meta,
    "default dtype float64": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "default dtype bfloat16": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.bfloat16),
    "matmul precision medium": lambda: matmul_precision("medium"),
    "matmul precision high": lambda: matmul_precision("high"),
    "dispatch mode": Dispatch,
    "function mode": Function,
}


def assert_same(found, expected):
    found, expected = tree_leaves(found), tree_leaves(expected)
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected):
        assert (x.dtype, x.device, x.requires_grad) == (y.dtype, y.device, False)
        assert torch.equal(x, y)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_modes_and_settings_do_not_matter(call, mode):
    for t in TENSORS:
        expected = CALLS[call](t)
        gavish_donoho_multiple.cache_clear()
        with MODES[mode]():
            found = CALLS[call](t)
        assert_same(found, expected)
        assert all(x.is_inference() == (mode == "inference_mode") for x in tree_leaves(found))


@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_not_recorded(call):
    for t in TENSORS[:2]:
        expected = CALLS[call](t)
        assert_same(CALLS[call](t.clone().requires_grad_()), expected)
        with torch.inference_mode():
            made = t.clone()
        assert_same(CALLS[call](made), expected)
        gradient, found = torch.func.grad(lambda x: ((x * x).sum(), CALLS[call](x)), has_aux=True)(t)
        assert torch.equal(gradient, 2 * t)
        assert_same(found, expected)


def test_transforms():
    t = TENSORS[0]
    expected = truncated_svd(t, 5)
    assert_same(torch.func.functionalize(lambda x: truncated_svd(x, 5))(t), expected)
    assert_same(truncated_svd(t, 5), expected)  # nothing of the transform is kept
    for call in CALLS.values():
        with pytest.raises(ValueError, match=r"is batched by torch\.vmap"):
            torch.vmap(call)(t)
        with pytest.raises(ValueError, match="is being traced"):
            call(FakeTensorMode().from_tensor(t))
        with pytest.raises(ValueError, match="is on meta"):
            call(t.to("meta"))


def test_state_is_restored_after_an_error(monkeypatch):
    monkeypatch.setattr(torch.linalg, "svd", lambda *_, **__: pytest.fail("stop"))
    with matmul_precision("medium"), torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(pytest.fail.Exception):
            svd_denoise(TENSORS[1], energy=0.9)
        assert torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")


def test_threads_that_need_full_precision_leave_the_setting_as_it_was():
    flags = torch.backends.mkldnn.matmul
    with matmul_precision("medium"):
        before = flags.fp32_precision
        entered, leave = threading.Event(), threading.Event()

        def other():
            with products.full_precision():
                entered.set()
                leave.wait(10)

        thread = threading.Thread(target=other)
        with products.full_precision():
            thread.start()
            assert entered.wait(10)
        assert flags.fp32_precision == "ieee"  # the other one still needs it
        leave.set()
        thread.join()
        assert flags.fp32_precision == before
