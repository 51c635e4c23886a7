"""`make gpu`: builds and tests everything on a machine with a GPU, in under ten minutes: python3 tests/run_gpu.py

Needs no network, no virtual environment and no installation: the torch, nvcc and pytest of the python3 that runs it. The libraries
are built inside the source tree. A step that fails or outlasts its limit does not keep the next ones from running; the last lines
say what each step came to, and the exit status is 0 only if all is well. Whole output: gpu.log, in $OUT if that is set, else in
build/. Benchmark rows go to $OUT as well, else to bench/results/.
"""

import ast
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
LOG = (OUT or ROOT / "build") / "gpu.log"
TOTAL = 570  # seconds for everything
LEFT_OUT = ("test_build", "test_cli", "test_train_")  # wheels and the driver: the CPU suite's business


class Result(NamedTuple):
    step: str
    state: str  # "passed", "FAILED", "not run"
    seconds: float
    note: str
    output: str


def environment() -> dict[str, str]:
    """The variables that every step runs with: this tree's package, this Python's programs, no downloads."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    homes = [f"{os.environ[k]}/bin" for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PATH"] = os.pathsep.join([*folders[:1], *homes, *folders[1:]])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "COLUMNS": "120"}
    return env | {"HF_HUB_OFFLINE": "1", "TRITON_CACHE_DIR": str(ROOT / "build/triton")}


ENV = environment()


def execute(command: list, limit: float) -> tuple[int | None, str]:
    """(exit status or None where the limit was outlasted, output). The output goes to the log as it comes."""
    with LOG.open("ab") as log:
        log.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        log.flush()
        start = log.tell()
        process = subprocess.Popen(
            [str(c) for c in command], cwd=ROOT, env=ENV, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with LOG.open("rb") as log:
        log.seek(start)
        return code, log.read().decode(errors="replace")


def here(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def tool(name: str, *more: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([ENV["PATH"], *more]))


# ---- the steps: each returns the commands to try, one after the other until one succeeds ----


def nvidia_smi() -> list[list[str]]:
    program = tool("nvidia-smi", "/usr/local/nvidia/bin")
    query = "--query-gpu=name,driver_version,memory.total,memory.used,utilization.gpu"
    return [[program, query, "--format=csv,noheader"]] if program else []


def build(python: str) -> list[list[str]]:
    """setup.py, and if this setuptools is too old for pyproject.toml, CMake itself."""
    by_cmake = [python, __file__, "cmake"]
    return [["env", "DEFTX_BUILD=cuda", python, "setup.py", "build_native", "--inplace"], by_cmake]


def build_by_cmake() -> None:
    """The libraries into the package, as setup.py does it, for this machine's GPU alone."""
    import json

    import torch

    folder = ROOT / "build/gpu"
    shutil.rmtree(folder, ignore_errors=True)
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (8, 0)
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "TORCH_DIR": Path(torch.__path__[0]).as_posix(),
        "DEFTX_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": tool("nvcc") or "nvcc",
        "CMAKE_CUDA_ARCHITECTURES": f"{major}{minor}-real",
    }
    generator = ["-G", "Ninja"] if tool("ninja") else []
    cmake = tool("cmake") or "cmake"
    subprocess.run([cmake, "-S", ROOT, "-B", folder, *generator, *(f"-D{k}={v}" for k, v in settings.items())], check=True)
    subprocess.run([cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)], check=True)
    for library in ("cpu", "cuda"):
        shutil.copy2(folder / f"lib/libdeftx_{library}.so", ROOT / "deftx_kernels")
    built = {"built": True, "compiler": "CMake, by tests/run_gpu.py"}
    info = {"mode": "cuda", "torch": torch.__version__, "stable_abi": "2.10", "cpu": built, "cuda": built}
    (ROOT / "deftx_kernels/_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


VERSIONS = """
import importlib.metadata as m, sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("triton", "setuptools", "cmake", "ninja", "pytest", "hypothesis", "numpy", "transformers"):
    try: print(name, m.version(name), end="  ")
    except m.PackageNotFoundError: print(name, "absent", end="  ")
print()
assert torch.cuda.is_available(), "torch sees no CUDA device: nothing that follows says anything about GPUs"
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), f"{torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB")
assert torch.ones(3, device="cuda").sum().item() == 3
"""

DOCTOR = """
import sys
from deftx_kernels import doctor
rows = doctor.run()
try: doctor.print_table(rows)
except ImportError:
    for row in rows: print(*row, sep=" | ")
devices = {r.device for r in rows}
wrong = [f"{r.op} {r.device} {r.backend}: {r.note}" for r in rows if not r.correct]
slow = [f"{device} kernels: {reason}" for device, reason in doctor.absent().items()]
print(f"{len(rows)} checks on {', '.join(sorted(devices))}, {len(wrong)} wrong", *wrong, *slow, sep="\\n")
sys.exit(bool(wrong or slow or "cuda" not in devices))
"""


def tiny() -> None:
    """A few launches of each kernel on small, odd shapes, for compute-sanitizer; results compared with the oracle on the CPU."""
    import torch

    from deftx_kernels import masked_embedding, masked_linear, reference, sparse_adamw, topk_mask

    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (37, 301), "b": (5,), "c": (3, 7001), "d": (), "e": (129, 3, 5)}
    for dtype in (torch.float32, torch.bfloat16):
        host = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
        grads = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
        mask = topk_mask(host, density=0.13)
        values = torch.randn(mask.nnz, generator=generator)
        there, device_mask = {n: t.cuda() for n, t in host.items()}, mask.to("cuda")

        def same(there=there, host=host, tolerance=0.0):
            torch.cuda.synchronize()
            for name, tensor in host.items():
                torch.testing.assert_close(there[name].cpu(), tensor, rtol=tolerance, atol=tolerance)

        indices = (mask.crow_indices, mask.col_indices)
        assert torch.equal(device_mask.gather(there).cpu(), reference.csr_gather(list(host.values()), *indices))
        device_mask.add_(there, values.cuda(), alpha=0.5)
        reference.csr_add_(list(host.values()), *indices, values, 0.5)
        same()
        device_mask.scatter_(there, values.cuda())
        reference.csr_scatter_(list(host.values()), *indices, values.to(dtype))
        same()
        for compact in (False, True):
            states = [[torch.zeros(mask.nnz, device=d) for _ in range(2)] for d in ("cuda", "cpu")]
            for params, state, m, device in ((there, states[0], device_mask, "cuda"), (host, states[1], mask, "cpu")):
                gradients = values.to(device) if compact else {n: g.to(device) for n, g in grads.items()}
                sparse_adamw(params, gradients, *state, 1, m, lr=0.1, weight_decay=0.1)
            same(tolerance=1e-5 if dtype == torch.float32 else 2e-2)
        x, upstream = (torch.randn(130, n, generator=generator).to(dtype) for n in (301, 37))
        ids = torch.randint(0, 37, (130,), generator=generator)
        one, gradients = topk_mask(torch.randn(37, 301, generator=generator), density=0.13), []
        for device in ("cuda", "cpu"):
            weight, m = torch.ones(37, 301, dtype=dtype, device=device), one.to(device)
            values = m.gather({"tensor": weight}).float().requires_grad_()
            masked_linear(x.to(device), weight, values, m).backward(upstream.to(device))
            masked_embedding(ids.to(device), weight, values, m, padding_idx=3).backward(x.to(device))
            gradients.append(values.grad.cpu())
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    print("tiny run: every result agrees with the oracle")


def sanitize(name: str) -> list[list[str]]:
    sanitizer = tool("compute-sanitizer", "/usr/local/cuda/compute-sanitizer")
    if sanitizer is None:
        return []
    # One allocation per tensor, not torch's pool: else accesses beyond a tensor stay inside the pool, and unseen.
    program = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer]
    return [[*program, "--tool", name, "--error-exitcode", "9", "--report-api-errors", "no", sys.executable, __file__, "tiny"]]


def absent(source: Path, seen: frozenset = frozenset()) -> set[str]:
    """Packages that a file imports, itself or through deftx_kernels, and that are not here."""
    missing = set()
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        else:
            continue
        for name in names:
            top = name.partition(".")[0]
            if top == "deftx_kernels":
                path = ROOT.joinpath(*name.split("."))
                for file in (path.with_suffix(".py"), path / "__init__.py"):
                    if file.exists() and file not in seen:
                        missing |= absent(file, seen | {file})
            elif not here(top) and not (ROOT / "tests" / f"{top}.py").exists():
                missing.add(top)
    return missing


def test_files() -> list[str]:
    """The tests that this machine has the packages for."""
    chosen = []
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        missing = absent(file)
        if missing or file.stem.startswith(LEFT_OUT):
            print(file.name + (f" (needs {', '.join(sorted(missing))})" if missing else ""))
        else:
            chosen.append(str(file.relative_to(ROOT)))
    return chosen


def pytest(files: list[str], marks: str, limit: int, processes: int = 1) -> list[list[str]]:
    if not here("pytest"):
        return []
    options = [f"--timeout={limit}"] if here("pytest_timeout") else []
    if processes > 1 and here("xdist"):
        options += [f"--numprocesses={processes}", "--dist=loadfile"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "--continue-on-collection-errors", "-p", "no:cacheprovider"]
    threads = ["env", "OMP_NUM_THREADS=1"] if processes > 1 else []
    return [[*threads, *command, "--durations=5", *options, *files]]


# ---- running them ----


CLOSING = re.compile(r"^=* ?\d+ (passed|failed|skipped|deselected|error).* in |ERROR SUMMARY|RACECHECK SUMMARY")


def note_of(output: str, code: int | None, limit: float) -> str:
    """What the summary says of a step: pytest's closing line, a sanitizer's summary, or the last line."""
    if code is None:
        return f"stopped after {limit:.0f} s"
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    known = [x for x in lines if CLOSING.search(x)]
    return re.sub(r"^[=\s]+|[=\s]+$", "", (known or lines or [""])[-1])[:150]


def run(step: str, plan: Callable[[], list[list[str]]], limit: float, deadline: float, tail: int = 40) -> Result:
    """One step: the commands that `plan` gives, until one succeeds. The last lines of its output are shown."""
    print(f"\n==== {step}", flush=True)
    started = time.monotonic()
    try:
        commands = plan()
    except Exception as error:  # whatever it is, the other steps go on
        traceback.print_exc(file=sys.stdout)
        return Result(step, "FAILED", 0.0, f"{type(error).__name__}: {error}", "")
    if not commands:
        print("not run: the program for it is not here")
        return Result(step, "not run", 0.0, "the program for it is not here", "")
    state, note, output = "FAILED", "no time was left", ""
    for command in commands:
        allowed = min(limit, deadline - time.monotonic())
        if allowed < 5:
            break
        try:
            code, output = execute(command, allowed)
        except OSError as error:
            code, output = 127, str(error)
        note = note_of(output, code, allowed)
        state = "passed" if code == 0 else "FAILED"
        if code == 0 and step.endswith("tests") and " passed" not in note:
            state, note = "FAILED", f"no test passed: {note}"
        if "--error-exitcode" in command and code != 0 and "Device not supported" in output:  # the sanitizer's limit, not a fault
            state = "not run"
        lines = output.splitlines()
        shown = lines[-tail:] if state != "passed" or step != "build" else lines[-2:]
        print("\n".join(line[:200] for line in shown), flush=True)
        if state == "passed":
            break
        print(f"-- {state}: exit status {code}, {' '.join(c for c in command if len(c) < 200)}"[:240], flush=True)
    return Result(step, state, time.monotonic() - started, note, output)


def main() -> int:
    sys.stdout.reconfigure(errors="replace")  # the doctor's table may hold what this terminal cannot show
    started = time.monotonic()
    deadline = started + TOTAL
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_bytes(b"")
    python, rows = sys.executable, str(OUT or ROOT / "bench/results")
    # What the targets are about, the slowest peers last: rows are added work by work, so a limit costs only what is not yet timed.
    bench = [python, "-m", "bench", "--targets", "--device", "cuda", "--rounds", "9", "--out", rows, "--family"]
    bench += ["topk", "train", "masked", "steps", "svd"]
    gpu, cpu = "gpu", "not gpu and not cuda_on_cpu and not slow"
    results = []
    for step, plan, limit, tail in (
        ("GPU", nvidia_smi, 20, 5),
        ("versions", lambda: [[python, "-c", VERSIONS]], 90, 12),
        ("build", lambda: build(python), 150, 40),
        ("doctor", lambda: [[python, "-c", DOCTOR]], 120, 60),
        ("GPU tests", lambda: pytest(test_files(), gpu, 100), 200, 40),
        ("memcheck", lambda: sanitize("memcheck"), 90, 15),
        ("racecheck", lambda: sanitize("racecheck"), 90, 15),
        ("benchmark", lambda: [bench], 230, 100),
        # Last, because the least new: the CPU kernels and the pure Python parts on this torch and this Python.
        ("CPU tests", lambda: pytest(test_files(), cpu, 60, max(1, (os.cpu_count() or 1) // 2)), TOTAL, 40),
    ):
        results.append(run(step, plan, limit, deadline, tail))

    doctor = next(r for r in results if r.step == "doctor")
    print("\n\n==== op x backend x correct x time\n" + "\n".join(line[:160] for line in doctor.output.splitlines()[-45:]))
    print("\n==== summary")
    for r in results:
        print(f"{r.step:12} {r.state:8} {r.seconds:6.1f} s  {r.note}")
    bad = [r.step for r in results if r.state == "FAILED"]
    took = time.monotonic() - started
    print(f"{len(results) - len(bad)} steps without fault, {len(bad)} failed, {took:.0f} s; all output: {LOG}")
    return 1 if bad else 0


if __name__ == "__main__":
    if sys.argv[1:] == ["tiny"]:
        tiny()
    elif sys.argv[1:] == ["cmake"]:
        build_by_cmake()
    else:
        sys.exit(main())
