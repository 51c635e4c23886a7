"""Fixtures shared by all tests: the implementation of the operators under test (`implementation`), and the compiled
GPU code executed on the CPU (`emulated`).
"""

import contextlib
import functools
import gc
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from lost_context import pytest_runtest_protocol  # noqa: F401  (a hook)
from torch import Tensor

import deftx_kernels  # noqa: F401  (registers the operators)
from deftx_kernels.ops import library, registrations
from deftx_kernels.ops.schemas import tensors_of

ROOT = Path(__file__).resolve().parents[1]
# What Triton compiles for sm_80, kept beside what nvcc compiles.
os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build/triton"))
# The variable decides what `triton.jit` makes: Triton's interpreter has a process to itself, test_interpreter.py.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_range(tensor, scope):
        """Triton 3.6 makes an int of arrays of one element, for `range`; NumPy 2.4 refuses that."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_range


# ---- GPU code on the CPU ----
def find_cuda_on_cpu() -> Path | None:
    """The folder of the tool: $CUDA_ON_CPU (itself, or the folder that holds it), or shared/tools beside the
    repository.
    """
    folder = Path(os.environ.get("CUDA_ON_CPU") or ROOT.parent / "shared" / "tools")
    return next((f for f in (folder, folder / "cuda_on_cpu") if (f / "cudart_shim.cpp").exists()), None)


@pytest.fixture(scope="session")
def cuda_on_cpu():
    """The module cuda_on_cpu."""
    folder = find_cuda_on_cpu()
    if folder is None:
        pytest.skip("cuda_on_cpu was not found: set CUDA_ON_CPU to its folder")
    sys.path.insert(0, str(folder.parent))
    return importlib.import_module(folder.name)


@pytest.fixture(scope="session")
def triton_on_cpu(cuda_on_cpu):
    """The module that executes Triton's sm_80 PTX on CPU tensors: `with triton_on_cpu.override() as launches`."""
    pytest.importorskip("triton")
    return importlib.import_module(f"{cuda_on_cpu.__name__}.triton_on_cpu")


@pytest.fixture(scope="session")
def emulated(cuda_on_cpu):
    """csrc/cuda/*.cu as nvcc compiles it (kept in build/emulated), executed on CPU tensors:
    `emulated.ops.csr_gather(...)`.
    """
    if torch.version.cuda:
        pytest.skip("cuda_on_cpu needs a CPU build of torch: the real CUDA runtime must not be in the process")
    try:
        cuda_on_cpu.runtime.find_nvcc()
    except cuda_on_cpu.BuildError as error:
        pytest.skip(str(error))
    (ROOT / "build").mkdir(exist_ok=True)
    with FileLock(ROOT / "build/emulated.lock"):  # pytest-xdist: one process builds, the others find what it made
        emulated = cuda_on_cpu.build_and_load(
            sources=sorted((ROOT / "csrc/cuda").glob("*.cu")),
            include_dirs=[ROOT / "csrc"],
            namespace="deftx_emulated",
            work_dir=ROOT / "build/emulated",
            torch_target_version=0x020A000000000000,
        )
    emulated.racecheck = True
    LOADED.append(emulated)
    return emulated


LOADED: list[Any] = []  # `emulated`, once a test has used it


@pytest.fixture(autouse=True)
def _pages_of_their_own(request):
    """The emulator notices host code that reads device memory, as each tensor is in pages of its own: in its own tests.
    In all others an operator on a few elements took 88 us, not 6.
    """
    for emulated in LOADED:
        emulated.runtime.lib.coc_guard(request.node.get_closest_marker("cuda_on_cpu") is not None)


# ---- implementations under test ----
IMPLEMENTATIONS = {
    "reference": (),
    "c++": (),
    "emulated": pytest.mark.cuda_on_cpu,  # nvcc's output, executed on CPU tensors
    "triton-sm80": pytest.mark.cuda_on_cpu,  # Triton's PTX, executed on CPU tensors
    "triton-interpreter": (),
    "cuda": pytest.mark.gpu,  # what serves CUDA tensors
}


class TritonOps:
    """The Triton kernels on CPU tensors, behind the checks that they are registered with."""

    def __init__(self, emulator: Any = None) -> None:
        self.emulator = emulator  # None: Triton's interpreter
        self.racecheck = True  # takes most of an emulated kernel's time
        self.launches: list = []  # of the last call: (kernel, grid, statistics)
        self.kernels = registrations.triton_kernels()

    def __getattr__(self, op: str) -> Callable:
        if op not in self.kernels:
            raise AttributeError(op)
        return functools.partial(self.run, self.kernels[op])

    def run(self, kernel: Callable, *arguments: Any) -> Any:
        if self.emulator is None:
            return kernel(*arguments)
        # Some kernels reach their tensors through a table of addresses.
        memory = [t for t in tensors_of(arguments) if t.device.type == "cpu" and t.layout == torch.strided]
        with self.emulator.override(racecheck=self.racecheck, extra=memory) as launches:
            result = kernel(*arguments)
        self.launches = list(launches)
        return result


@dataclass
class Implementation:
    """One implementation of the operators: `implementation.ops.csr_gather(...)` on tensors of its `device`."""

    name: str  # one of IMPLEMENTATIONS
    device: str
    ops: Any
    emulator: Any = None  # where `name` is "emulated": the library, with `launches` and `racecheck`

    def can_run(self, op: str) -> bool:
        """Whether it has a kernel of its own for the op."""
        if self.name in ("c++", "cuda"):
            return library.backends()[op][self.device].name not in ("reference", "none")
        if self.name == "emulated":
            return torch._C._dispatch_has_kernel_for_dispatch_key(f"deftx_emulated::{op}", "CPU")
        return hasattr(self.ops, op)

    @contextlib.contextmanager
    def without_racecheck(self) -> Iterator[None]:
        checking = self.emulator or self.ops
        before = getattr(checking, "racecheck", None)
        if before is None:
            yield
            return
        checking.racecheck = False
        try:
            yield
        finally:
            checking.racecheck = before

    def on_cpu(self, op: str, *arguments: Any) -> Any:
        """The op on CPU tensors: they are copied to the device, and back what it returned and what it wrote."""
        if self.device == "cpu":
            return getattr(self.ops, op)(*arguments)
        there = {id(t): t.to(self.device) for t in tensors_of(arguments)}

        def moved(x: Any) -> Any:
            return list(map(moved, x)) if isinstance(x, list | tuple) else there.get(id(x), x)

        result = getattr(self.ops, op)(*map(moved, arguments))
        if op.endswith("_"):
            for t in tensors_of(arguments):
                t.copy_(there[id(t)])
        return result.cpu() if isinstance(result, Tensor) else result and tuple(t.cpu() for t in result)


# Of the session, so that hypothesis may call a test many times with one implementation.
@pytest.fixture(scope="session")
def implementation(request) -> Implementation:
    """Each implementation that has one of the operators in the file's OPS, or those of `@implementations(...)`."""
    name = request.param
    if name == "reference":
        return Implementation(name, "cpu", SimpleNamespace(**registrations.reference_functions()))
    if name == "emulated":
        emulated = request.getfixturevalue("emulated")
        return Implementation(name, "cpu", emulated.ops, emulated)
    if name.startswith("triton"):
        pytest.importorskip("triton")
        emulator = request.getfixturevalue("triton_on_cpu") if name == "triton-sm80" else None
        return Implementation(name, "cpu", TritonOps(emulator))
    device = "cpu" if name == "c++" else "cuda"
    if device in library.errors:
        pytest.skip(f"the {device} library was {library.errors[device]}")
    found = Implementation(name, device, torch.ops.deftx)
    if missing := sorted(op for op in compiled_ops(device) if not found.can_run(op)):
        pytest.fail(f"the installed {name} library has no {missing[0]}: build it again")
    return found


@pytest.fixture
def no_racecheck(implementation):
    """For tests that launch, with other data, kernels that another test checks for races."""
    with implementation.without_racecheck():
        yield


def params_of(names: list[str]) -> list:
    return [pytest.param(n, marks=IMPLEMENTATIONS[n]) for n in names if (n == "triton-interpreter") == INTERPRETED]


def implementations(*names: str):
    """Parametrizes a test with some implementations: `@implementations("c++")`."""
    return pytest.mark.parametrize("implementation", params_of(names), indirect=True)


@functools.cache
def compiled_ops(device: str) -> set[str]:
    sources = (ROOT / "csrc" / device).glob("*.c*")
    return {op for p in sources for op in re.findall(r'm\.impl\(\s*"(\w+)"', p.read_text())}


def pytest_generate_tests(metafunc):
    chosen = any(m.args[0] == "implementation" for m in metafunc.definition.iter_markers("parametrize"))
    if "implementation" not in metafunc.fixturenames or chosen:
        return
    ops = set(metafunc.module.OPS)
    has = {
        "c++": ops & compiled_ops("cpu"),
        "emulated": ops & compiled_ops("cuda"),
        "triton-sm80": ops & set(registrations.TRITON),
        "triton-interpreter": ops & set(registrations.TRITON),
    }
    names = [n for n in IMPLEMENTATIONS if has.get(n, True)]
    metafunc.parametrize("implementation", params_of(names), indirect=True, scope="session")


@pytest.fixture(scope="module", autouse=True)
def _modules_out_of_garbage_collection():
    """Millions of objects of imported modules made each collection take half a second; a Trainer starts one a run."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def one_thread():
    """For thousands of operations on a few hundred numbers: on a busy machine, waiting for threads took most of the
    time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser):
    parser.addoption(
        "--threads",
        choices=["one", "default"],
        help="one: without the tests marked multithreaded; default: those, and the operators' tests of C++ kernels",
    )


def _in_pass(item, threads: str) -> bool:
    if item.get_closest_marker("slow"):
        return False
    multithreaded = item.get_closest_marker("multithreaded") is not None
    if threads == "one":
        # Compiled, the same kernels are executed by cuda_on_cpu: the interpreter, minutes, is for machines without it.
        return not multithreaded and not (item.name == "test_triton_interpreter" and find_cuda_on_cpu())
    if any(item.get_closest_marker(m) for m in ("gpu", "cuda_on_cpu")) or item.name == "test_triton_interpreter":
        return False
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = next((params[p] for p in ("implementation", "backend") if p in params), "c++")
    return multithreaded or (hasattr(item.module, "OPS") and name in ("c++", "cpu"))


# Files of a few long tests, first: a process that begins one last would be waited for.
LONG = [
    "test_pipeline",
    "test_svd_denoise",
    "test_gram",
    "test_build",
    "test_memory",
    "test_recipes",
    "test_linearity",
]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
    if threads := config.getoption("threads"):
        left_out = [item for item in items if not _in_pass(item, threads)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _in_pass(item, threads)]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
