"""Operators and training take no more memory than documented and free it again, measured in fresh processes."""

import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch

from bench.bench_steps import DENSE, step_workload
from bench.harness import alone, peak_extra
from bench.rows import OURS
from deftx_kernels.ops import library

EXACT = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}  # no holes in glibc's heap


def printed(script: str, *arguments: str) -> str:
    run = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=EXACT)
    assert run.returncode == 0, run.stderr
    return run.stdout


# ---- leaks ----

LEAKS = """
import ctypes, gc
import torch
from deftx_kernels.ops import schemas

class Heap(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks used free keepcost"
    _fields_ = [(n, ctypes.c_size_t) for n in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Heap

def used():
    gc.collect()
    heap = mallinfo()
    return heap.used + heap.hblkhd

tensors = [torch.randn(4, 6), torch.randn(5)]
mask = [torch.tensor([0, 1, 1, 2, 2, 3]), torch.tensor([0, 2, 3], dtype=torch.uint16)]
one = [torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 2], dtype=torch.uint16)]  # of tensors[0] alone
values, scalar = torch.ones(3), torch.ones(())
flat = [torch.tensor([0, 2, 3]), torch.tensor([0, 5, 1], dtype=torch.int32)]
cases = {
    "csr_gather": [(tensors, *mask)],
    "csr_scatter_": [(tensors, *mask, values)],
    "csr_add_": [(tensors, *mask, values, 0.5), (tensors, *mask, values, 0.5, values.clone(), torch.tensor(False))],
    "csr_restore_": [(tensors, *mask, values.clone(), values, 0.5)],
    "csr_combine": [(*mask, *mask, code) for code in schemas.OPERATIONS.values()],
    "csr_sum": [
        (*mask, [mask[0]] * 2, [mask[1]] * 2, [values] * 2, [0.5, 1.0], code, torch.float32)
        for code in schemas.ELECTIONS.values()
    ],
    "dense_to_csr": [([torch.ones(3, 3, dtype=torch.bool)],)],
    "topk_mask": [
        (tensors, base, k, schemas.SCOPES[scope])
        for base in ([], tensors)
        for scope, k in (("global", [3]), ("tensor", [3, 2]), ("row", [2, 1]))
    ],
    "magnitude_histogram": [(tensors, 0, 16)],
    "eigh": [(torch.eye(5).repeat(2, 1, 1),)],
    "eigvalsh": [(torch.eye(5).repeat(2, 1, 1),)],
    "threshold_mask": [(tensors, 100, [1, 1])],
    "sparse_adamw_": [
        schemas.AdamWArgs(
            params=tensors, grads=tensors, compact_grads=False, exp_avg=values, exp_avg_sq=values.clone(),
            values=values.clone(), crow_indices=mask[0], col_indices=mask[1], step=scalar, lr=scalar, beta1=0.9,
            beta2=0.999, eps=1e-8, weight_decay=0.0, decay_to=values, l1=0.0, maximize=False, grad_scale=scalar,
            found_inf=scalar, seed=1,
        )
    ],
    "csr_square_sum": [(tensors, *mask)],
    "masked_linear_grad": [(torch.ones(8, 4), torch.ones(8, 6), *one, torch.float32)],
    "masked_embedding_grad": [(torch.ones(8, 6), torch.zeros(8, dtype=torch.int64), *one, -1, torch.float32)],
    "bit_diff": [(tensors, [t + 1 for t in tensors])],
    "flat_exchange_": [(tensors, *flat, values)],
    "bit_checksum": [(tensors,)],
    "bit_checksum_change": [(*flat, values, values + 1)],
    "set_bits": [(torch.full((3,), -1, dtype=torch.int32), torch.tensor([3, 40, 96]))],
}
for op, arguments in cases.items():
    function = getattr(torch.ops.deftx, op)
    def call(n):
        for i in range(n):
            function(*arguments[i % len(arguments)])
    call(100)
    before = used()
    call(600)
    print(op, used() - before)
"""


def test_no_operator_leaks():
    """Of each call's arguments too: LibTorch's stable ABI makes copies of strings, lists and options."""
    served = {op for op, devices in library.backends().items() if devices["cpu"].name == "c++"}
    if not served:
        pytest.skip("the cpu library was " + library.errors["cpu"])
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("only glibc reports how much of the heap is used")
    grown = {op: int(n) for op, n in (line.split() for line in printed(LEAKS).splitlines())}
    assert grown.keys() == served
    assert {op: n for op, n in grown.items() if n > 4096} == {}  # 600 calls: less than 7 bytes a call


# ---- peaks ----

# Prints, for each case, the bytes that a selection took beside its mask.
PEAKS = """
import ctypes, sys
import torch
from deftx_kernels import select_mask, topk_mask
from deftx_kernels.ops import schemas

def read(key):
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))

def peak(count, shape, dtype, scope, with_base):
    scores = dict(enumerate(torch.randn(count, *shape, generator=generator).to(dtype).unbind()))
    scores = {f"{i:06}": t for i, t in scores.items()}
    base = {n: t.roll(1) for n, t in scores.items()} if with_base else None
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")  # VmHWM becomes VmRSS
    before = read("VmRSS")
    options = {"density": 0.05, "scope": scope}
    mask = topk_mask(scores, **options) if base is None else select_mask(scores, base, **options)
    taken = read("VmHWM") - before
    return taken - sum(t.numel() * t.element_size() for t in (mask.crow_indices, mask.col_indices))

generator = torch.Generator().manual_seed(0)
for scope in schemas.SCOPES:  # what libraries take the first time
    peak(3, (100, 100), torch.float32, scope, False), peak(3, (100, 100), torch.float32, scope, True)
for case in eval(sys.argv[1], {"torch": torch}):
    print(peak(*case))
"""
PEAK_CASES = [  # tensors, shape, dtype, scope, whether differences are selected
    (1, (6_000_000,), torch.float32, "row", False),
    (1, (6_000_000,), torch.bfloat16, "row", False),
    (1, (3, 1_000_000), torch.float64, "row", False),
    (1, (6_000_000,), torch.float32, "row", True),
    (1, (150, 40_000), torch.float32, "row", False),  # each row is a part of its own
    (1, (6000, 1000), torch.float32, "row", False),  # no row is
    (1, (6_000_000,), torch.float32, "global", False),
    (3, (2_000_000,), torch.bfloat16, "tensor", True),
    (1000, (4096,), torch.float64, "tensor", False),
    (20_000, (16,), torch.float32, "tensor", False),
    (20_000, (16,), torch.bfloat16, "row", False),
    (20_000, (16,), torch.float32, "global", False),
    (20_000, (16,), torch.float32, "tensor", True),
]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux reports peak memory")
def test_topk_mask_needs_the_memory_that_its_docstring_says():
    if "cpu" in library.errors:
        pytest.skip("the cpu library was " + library.errors["cpu"])
    taken = map(int, printed(PEAKS, repr(PEAK_CASES)).split())
    for case, found in zip(PEAK_CASES, taken, strict=True):
        count, shape, dtype, _, with_base = case
        numel, key = count * math.prod(shape), 4 if with_base and dtype != torch.float64 else dtype.itemsize
        assert found <= numel / 4 + numel * key / 32 + count * (1500 if with_base else 450) + 1e6, case


# ---- training ----


def test_32_linears_take_half_of_dense_at_most():
    """Of 512 x 512; `python -m bench --family steps --size linears` measures 2048 x 2048."""
    if peak_extra(lambda: None, "cpu") is None:
        pytest.skip("this system does not report peak memory")
    work = step_workload("small linears", "cpu", torch.float32, 0.02)
    ours, dense = (alone(work, name, 1).peak for name in (OURS, DENSE))
    weights = 32 * 512 * 512 * 4 / 1e6
    assert dense > 4 * weights  # weights, gradients and two moments: all of training is counted
    assert weights < ours <= 0.5 * dense
