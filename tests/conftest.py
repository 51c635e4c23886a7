"""Fixtures shared by all tests: who runs an operator (`provider`), and the compiled GPU code executed on the CPU
(`emulated`).
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock

import deftx_kernels  # noqa: F401  (registers the operators)
from deftx_kernels.ops import library, reference

ROOT = Path(__file__).resolve().parents[1]


class Provider(NamedTuple):
    """Someone who runs the operators of `schemas.SCHEMAS`: `provider.ops.csr_gather(...)` on tensors of `provider.device`."""

    name: str  # "reference", "c++", "emulated" (nvcc's output, executed on CPU tensors), "cuda"
    device: str
    ops: Any

    def can_run(self, op: str) -> bool:
        """Whether an implementation of its own serves the op, rather than the reference."""
        if self.name in ("reference", "emulated"):
            return hasattr(self.ops, op)
        return library.backends()[op][self.device].name == self.name


PROVIDERS = [
    "reference",
    "c++",
    pytest.param("emulated", marks=pytest.mark.cuda_on_cpu),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


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
    return emulated


@pytest.fixture(scope="module")
def one_thread():
    """For thousands of operations on a few hundred numbers: on a busy machine, waiting for threads took most of the
    time.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Of the session, so that hypothesis may call a test many times with one provider.
@pytest.fixture(scope="session", params=PROVIDERS)
def provider(request) -> Provider:
    name = request.param
    if name == "reference":
        return Provider(name, "cpu", reference)
    if name == "emulated":
        return Provider(name, "cpu", request.getfixturevalue("emulated").ops)
    device = "cpu" if name == "c++" else "cuda"
    if device in library.errors:
        pytest.skip(f"the {device} library was {library.errors[device]}")
    return Provider(name, device, torch.ops.deftx)


# Tests of operators that `make test` runs once more, with torch's default number of threads: `--threads=default`.
OPERATORS = {
    "test_csr",
    "test_csr_combine",
    "test_eigh",
    "test_low_rank",
    "test_masked_grad",
    "test_sparse_adamw",
    "test_square_sum",
    "test_topk_ops",
}


def pytest_addoption(parser):
    parser.addoption(
        "--threads",
        choices=["one", "default"],
        help="one: without the tests marked multithreaded; default: those, and the tests of operators, of what runs on threads",
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
    provider = params.get("provider", params.get("backend", "c++"))
    return multithreaded or (item.module.__name__ in OPERATORS and provider in ("c++", "cpu"))


# Files of a few long tests, first: a process that begins one last would be waited for.
LONG = [
    "test_train_pipeline",
    "test_topk_ops",
    "test_svd_denoise",
    "test_build",
    "test_memory",
    "test_train_recipes",
    "test_linearity",
]


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONG.index(item.module.__name__) if item.module.__name__ in LONG else len(LONG))
    if threads := config.getoption("threads"):
        left_out = [item for item in items if not _in_pass(item, threads)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _in_pass(item, threads)]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
