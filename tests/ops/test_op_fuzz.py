"""Operators called directly with damaged arguments: a result, or an error that says what is wrong, and nothing else.

Every call begins with valid arguments, small ones, of which some are then spoiled: sizes, dtypes, devices, layouts,
what index arrays hold, the lengths of lists, numbers. Between hostile calls the valid ones must still give the
reference's result. `python tests/ops/test_op_fuzz.py LIBRARY CALLS SEED [OP...]` does the same in a process of its own,
with another build of the CPU library, and prints each call before it is made.
"""

import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    _load = torch.ops.load_library
    torch.ops.load_library = lambda path: _load(sys.argv[1] if Path(path).name.startswith("libdeftx_cpu") else path)

import deftx_kernels  # noqa: F401, E402  (registers the operators)
from deftx_kernels import doctor  # noqa: E402
from deftx_kernels.ops import checks, library, reference, schemas  # noqa: E402
from deftx_kernels.ops.schemas import tensors_of  # noqa: E402
from tests.conftest import Implementation, implementations  # noqa: E402
from tests.ops.fuzz_inputs import FLOATS, VALID, Maker  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- damage ----
INTEGERS = [-1, 0, 1, 2, 15, 16, 17, 31, 32, 48, 64, 65_535]
INTEGERS += [2**20, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**31), -(2**63)]
NUMBERS = [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1.0, 2.0, 1e308, 1e-320]
DTYPES = [*FLOATS, torch.bool, torch.complex64]
DTYPES += [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64]
HOSTILE_SHAPES = [(), (0,), (1,), (3,), (0, 3), (3, 0), (2, 2), (1, 2, 3)]
HOSTILE_SHAPES += [(0, 2**62), (2**62, 0), (3, 2**40, 0), (2, 0, 0)]


def hostile_tensor(t: Tensor, rng: random.Random) -> Tensor:
    """A tensor that differs in one respect."""
    if t.layout != torch.strided or t.is_meta or max(t.shape, default=0) > 2**40:
        return t  # damaged already

    def contents() -> Tensor:
        if t.numel() == 0:
            return torch.zeros(1, dtype=t.dtype)
        t2 = t.clone()
        flat = t2.reshape(-1)
        for _ in range(rng.choice([1, 1, 2, t.numel()])):
            at = rng.randrange(len(flat))
            if t.is_floating_point():
                flat[at : at + 1] = torch.tensor([rng.choice(NUMBERS)], dtype=torch.float64).to(t.dtype)
            elif t.dtype != torch.bool and not t.is_complex():
                info = torch.iinfo(t.dtype)
                near = int(flat[at]) + rng.choice([-1, 1, 3])
                number = rng.choice([*INTEGERS, info.min, info.max, near, rng.randrange(10)])
                # Through int64: indexing has no kernel for every unsigned dtype.
                number = min(max(number, info.min), info.max)
                flat[at : at + 1] = torch.tensor([number], dtype=torch.int64).to(t.dtype)
        return flat.view(t.shape)

    def one_dimension(change: Callable[[Tensor, int], Tensor]) -> Tensor:
        return change(t, rng.randrange(t.dim())) if t.dim() else t.view(1)

    damages: list[Callable[[], Tensor]] = [
        *[contents] * 3,
        lambda: t.to(rng.choice(DTYPES)),
        lambda: one_dimension(lambda x, d: x.narrow(d, 0, max(x.shape[d] - 1, 0)).contiguous()),
        lambda: one_dimension(lambda x, d: torch.cat([x, x.narrow(d, 0, min(1, x.shape[d]))], d)),
        lambda: t.unsqueeze(0),
        lambda: t.reshape(-1),
        lambda: t.new_zeros(rng.choice(HOSTILE_SHAPES)),
        lambda: t.to("meta"),
        lambda: t.to("meta"),
        lambda: torch.stack([t, t], -1)[..., 0],
        lambda: t.mT if t.dim() > 1 else t,
        lambda: t.new_zeros(()).expand(t.shape),
        lambda: t.new_zeros(1, 1).expand(3, 2),
        lambda: t[torch.arange(len(t) - 1, -1, -1)] if t.dim() else t,
        lambda: t.to_sparse() if t.dim() and t.dtype in FLOATS else t,
        lambda: torch._neg_view(t) if t.dtype in FLOATS else t,
        lambda: torch.conj(t) if t.is_complex() else t.to(torch.complex64),
    ]
    return rng.choice(damages)()


def hostile_list(values: list, rng: random.Random) -> list:
    others = [
        list,
        lambda: values[:-1],
        lambda: values[1:],
        lambda: [*values, *values[-1:]],
        lambda: values[::-1],
        lambda: values[:1] * max(len(values), 2),
    ]
    if values and rng.random() < 0.7:
        at = rng.randrange(len(values))
        return [*values[:at], hostile(values[at], rng), *values[at + 1 :]]
    return rng.choice(others)()


def hostile(value: Any, rng: random.Random) -> Any:
    if isinstance(value, Tensor):
        return hostile_tensor(value, rng)
    if isinstance(value, list):
        return hostile_list(value, rng)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([*INTEGERS, value - 1, value + 1])
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if isinstance(value, str):
        return rng.choice(["", "other", "row", "tensor", "and", "sub"])
    if isinstance(value, torch.dtype):
        return rng.choice(DTYPES)
    assert value is None
    return rng.choice([None, torch.ones(()), torch.zeros(3, 2), torch.ones(4)])


def damaged(op: str, arguments: list[Any], rng: random.Random) -> list[Any]:
    arguments = list(arguments)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at = rng.randrange(len(arguments))
        arguments[at] = hostile(arguments[at], rng)
    names = [a.name for a in getattr(torch.ops.deftx, op).default._schema.arguments]
    # An index into a schema of several types: None stands for a tensor or a number.
    return [7 if n == "seed" and isinstance(a, Tensor) else a for n, a in zip(names, arguments)]


# ---- calls ----
ERRORS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)
# What torch and the emulator of CUDA say where a check of ours is missing.
INTERNAL = ("INTERNAL ASSERT", "please report a bug", "CUDA error", "Triton Error")


def copied(arguments: Any) -> Any:
    return [copied(a) if isinstance(a, list) else a.clone() if isinstance(a, Tensor) else a for a in arguments]


def described(argument: Any) -> str:
    if isinstance(argument, Tensor):
        strides = argument.stride() if argument.layout == torch.strided else "-"
        short = f"{argument.dtype}{list(argument.shape)} strides {strides}"
        small = argument.device.type == "cpu" and argument.layout == torch.strided and 0 < argument.numel() <= 12
        return f"<{short} {argument.device}{' ' + str(argument.tolist()) if small else ''}>"
    return f"[{', '.join(map(described, argument))}]" if isinstance(argument, list) else repr(argument)


def hostile_call(implementation: Implementation, op: str, arguments: list[Any]) -> None:
    devices = {t.device for t in tensors_of(arguments)}
    text = f"{op}({', '.join(map(described, arguments))})"  # before the call, which may write
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*failed the check", RuntimeWarning)  # of what is not finite
            getattr(implementation.ops, op)(*arguments)
    except Exception as error:
        emulator = type(error).__module__.startswith("cuda_on_cpu") or type(error).__module__.startswith("shared")
        internal = emulator or any(i in str(error) for i in INTERNAL)
        if not isinstance(error, ERRORS) or internal or not str(error).strip():
            raise AssertionError(f"{text}\nraised {type(error).__name__}: {error}") from error
    else:
        assert len(devices) < 2, f"{text}\ntook tensors of several devices"


def check_valid(implementation: Implementation, op: str, arguments: list[Any]) -> None:
    text = f"{op}({', '.join(map(described, arguments))})"
    results = []
    for function in (getattr(implementation.ops, op), getattr(reference, op)):
        given = copied(arguments)
        results.append(doctor.outputs(op, function(*given), given))
    for got, want in zip(*results, strict=True):
        tolerance = 0.0 if not want.is_floating_point() else 2e-2 if want.dtype.itemsize == 2 else 1e-3
        assert got.shape == want.shape, text
        wide = [x.to(torch.int64 if x.dtype == torch.uint16 else torch.float64) for x in (got, want)]
        torch.testing.assert_close(*wide, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{text}\n{m}")


def fuzz(
    implementation: Implementation, ops: list[str], calls: int, seed: int, valid_every: int = 10, trace: bool = False
) -> None:
    rng = random.Random(seed)
    for op in ops:
        for i in range(-(-calls // len(ops))):
            arguments = VALID[op](Maker(rng))
            if i % valid_every == 0:
                check_valid(implementation, op, arguments)
            bad = damaged(op, arguments, rng)
            if trace:
                print(f"{op}({', '.join(map(described, bad))})", flush=True)
            hostile_call(implementation, op, bad)
    for op in ops:  # is the heap still sound?
        check_valid(implementation, op, VALID[op](Maker(rng)))


# ---- tests ----
def test_every_operator_has_valid_arguments():
    assert VALID.keys() == schemas.SCHEMAS.keys()


CALLS = {"c++": 300, "reference": 300, "emulated": 60, "triton-sm80": 40}


@implementations(*CALLS)
@pytest.mark.parametrize("times", [1, pytest.param(16, marks=pytest.mark.slow)])
def test_hostile_calls(implementation, times):
    """The emulators check the bounds of every access."""
    ops = list(schemas.SCHEMAS)  # torch.ops.deftx has them all
    if implementation.name == "reference":
        ops = list(checks.CHECKS)
    elif implementation.name != "c++":
        ops = [op for op in ops if implementation.can_run(op)]
    every = 10 if implementation.name in ("c++", "reference") else 5
    # Two programs may write one element where a mask is wrong.
    with implementation.without_racecheck():
        fuzz(implementation, ops, times * CALLS[implementation.name], seed=1, valid_every=every)


@pytest.mark.parametrize("crow", [[0, 1, -(2**63), 3], [0, 3, 1, 3], [0, 1, 2**63 - 1, 3]], ids=str)
@implementations("c++", "reference")
def test_row_pointers_that_descend(implementation, crow):
    """The ranges of rows that occur may not overlap, either: two threads would write one entry."""
    col = torch.tensor([0, 1, 0], dtype=torch.uint16)
    arguments = [torch.randn(4, 8), torch.tensor([0, 1, 1, 2]), torch.tensor(crow), col, -1, torch.float32]
    with pytest.raises((RuntimeError, ValueError), match="crow_indices must ascend"):
        implementation.ops.masked_embedding_grad(*arguments)


def test_written_tensors_that_share_memory_are_refused():
    p = torch.zeros(2, 4)
    crow, col = torch.tensor([0, 1, 2, 3, 4]), torch.tensor([0, 1, 0, 1], dtype=torch.uint16)
    with pytest.raises(RuntimeError, match="share memory"):
        torch.ops.deftx.csr_add_([p, p], crow, col, torch.ones(4), 1.0)
    assert not p.any()


def test_tensors_without_columns_may_have_too_many_rows():
    with pytest.raises(RuntimeError, match="2\\*\\*63"):
        torch.ops.deftx.dense_to_csr([torch.zeros(2**62, 0, dtype=torch.bool)] * 4)


def test_an_emptied_storage_is_refused():
    t = torch.zeros(2, 4)
    t.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="no memory of its size"):
        torch.ops.deftx.csr_gather([t], torch.tensor([0, 1, 1]), torch.tensor([0], dtype=torch.uint16))


# ---- under sanitizers ----
def runtime_library(name: str) -> str:
    """A library of the compiler's."""
    compiler = os.environ.get("CXX", "g++")
    try:
        path = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{compiler} is not there or is not like GCC")
    if not Path(path).is_absolute():
        pytest.skip(f"{compiler} has no {name}")
    return path


@pytest.fixture(scope="session")
def sanitized() -> tuple[Path, dict[str, str]]:
    """csrc/cpu with AddressSanitizer and UndefinedBehaviorSanitizer, and the environment of a process that loads it."""
    cmake = pytest.importorskip("cmake", reason="needs cmake to build csrc/cpu")
    pytest.importorskip("ninja", reason="needs ninja to build csrc/cpu")
    if "cpu" in library.errors:
        pytest.skip(f"the cpu library was {library.errors['cpu']}")
    # libstdc++ beside it: else the sanitizer does not find the function that throws.
    preload = " ".join(map(runtime_library, ("libasan.so", "libstdc++.so.6")))
    # A copy of no bytes may begin at no address.
    folder, flags = ROOT / "build/asan", "-fsanitize=address,undefined -fno-sanitize=nonnull-attribute"
    programs = Path(cmake.CMAKE_BIN_DIR)
    configure = [programs / "cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DTORCH_DIR={torch.__path__[0]}"]
    configure += [f"-DCMAKE_CXX_FLAGS={flags} -fno-omit-frame-pointer -g1", f"-DCMAKE_MODULE_LINKER_FLAGS={flags}"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in (configure, [programs / "cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    environment |= {
        "LD_PRELOAD": preload,
        "PYTHONMALLOC": "malloc",  # Python's own allocator hides what is beside a buffer
        "ASAN_OPTIONS": "detect_leaks=0:protect_shadow_gap=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }
    return folder / "lib/libdeftx_cpu.so", environment


def run_sanitized(sanitized: tuple[Path, dict[str, str]], *command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=sanitized[1], cwd=ROOT)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hostile_calls_under_sanitizers(sanitized):
    done = run_sanitized(sanitized, __file__, str(sanitized[0]), "5000", "4")
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-8000:]
    assert done.stdout.splitlines()[-1] == "done"
    assert "AddressSanitizer" not in done.stderr
    assert "runtime error" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_sanitizer_sees_torch_tensors(sanitized):
    """An access beside a tensor of torch's, by a function of C, ends the process."""
    code = "import ctypes, torch; t = torch.zeros(4, dtype=torch.uint8); ctypes.memset(t.data_ptr() + 4, 0, 64)"
    done = run_sanitized(sanitized, "-c", code)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


if __name__ == "__main__":
    torch.set_num_threads(2)
    compiled = Implementation("c++", "cpu", torch.ops.deftx)
    fuzz(compiled, sys.argv[4:] or list(schemas.SCHEMAS), int(sys.argv[2]), int(sys.argv[3]), trace=True)
    print("done")
