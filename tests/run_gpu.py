"""`make gpu`: builds, checks and measures on a machine with a GPU: python3 tests/run_gpu.py [check] [measure] [cpu]

    check    builds (or finds the libraries built from these sources), then the doctor, every test marked `gpu` and the
    sanitizers,
             all at the same time: three minutes and a half at the most
    measure  what the machine gives, the works that the targets are about, the most important first, and what our
    kernels move:
             under five minutes
    cpu      the CPU tests, the least new: that the rest works with this torch and this Python

Without an argument: check and measure. Needs no network, no virtual environment and no installation: the torch, nvcc
and pytest of the python3 that runs it. The libraries are built inside the source tree, unless they came along
(deftx_kernels/libdeftx_*.so and _build_info.json). A step that fails or outlasts its limit does not keep the next ones
from running; the last lines say what each step came to, and the exit status is 0 only if all is well. Whole output:
gpu.log, in $OUT if that is set, else in build/. Benchmark rows go to $OUT as well, else to bench/results/;
$DEFTX_COMMIT names the commit where the tree came without its history. Of each phase about 12,000 characters are
printed.
"""

import argparse
import ast
import functools
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
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
LOG = (OUT or ROOT / "build") / "gpu.log"
SECONDS = {"check": 210, "measure": 285, "cpu": 285}  # for each phase
PROCESSES = 12  # of the GPU tests: most of their time is compilation, and comparison with the CPU
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
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "COLUMNS": "300"}  # pytest cuts its summary to the width
    return env | {"HF_HUB_OFFLINE": "1", "TRITON_CACHE_DIR": str(ROOT / "build/triton")}


ENV = environment()


def execute(command: list, limit: float, log: Path) -> tuple[int | None, str]:
    """(exit status or None where the limit was outlasted, output). The output goes to the step's log as it comes."""
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            [str(c) for c in command], cwd=ROOT, env=ENV, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open("rb") as file:
        file.seek(start)
        return code, file.read().decode(errors="replace")


@functools.cache
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


def build() -> None:
    """The libraries for this machine's GPU: those that are there, else by setup.py, else by CMake alone."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    env = {**os.environ, "DEFTX_BUILD": "cuda", "CUDAARCHS": f"{major}{minor}-real"}
    by_setup = [sys.executable, "setup.py", "build_native", "--inplace"]
    for command in ([*by_setup, "--if-changed"], by_setup, [sys.executable, __file__, "cmake"]):
        # What was built elsewhere may not load here.
        if all(subprocess.run(c, cwd=ROOT, env=env).returncode == 0 for c in (command, [sys.executable, "-c", LOADS])):
            return
    sys.exit("no library was built that loads")


LOADS = """
import deftx_kernels, sys
from deftx_kernels.ops import library
served = deftx_kernels.backends()["topk_mask"]
print({device: backend.name for device, backend in served.items()}, library.errors or "")
sys.exit((served["cpu"].name, served["cuda"].name) != ("c++", "cuda"))
"""


def build_by_cmake() -> None:
    """As setup.py does it, where this setuptools is too old for pyproject.toml."""
    import json

    import torch

    folder = ROOT / "build/gpu"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "TORCH_DIR": Path(torch.__path__[0]).as_posix(),
        "DEFTX_CUDA": "ON",
        "CMAKE_CUDA_COMPILER": tool("nvcc") or "nvcc",
        "CMAKE_CUDA_ARCHITECTURES": os.environ.get("CUDAARCHS") or "native",
    }
    generator = ["-G", "Ninja"] if tool("ninja") else []
    cmake = tool("cmake") or "cmake"
    subprocess.run(
        [cmake, "-S", ROOT, "-B", folder, *generator, *(f"-D{k}={v}" for k, v in settings.items())], check=True
    )
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
import os, sys
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the tests keep every core busy at the same time
from deftx_kernels import doctor
rows = doctor.run()
for r in rows:
    if r.device == "cuda" or not r.correct:
        figures = "" if r.error is None else f"{r.error:.1e} {r.milliseconds:9.3f} ms"
        print(f"{r.op:22} {r.device:5} {r.backend:10} {'correct' if r.correct else 'WRONG  '} {figures} {r.note[:200]}".rstrip())
devices = {r.device for r in rows}
wrong = [f"{r.op} {r.device} {r.backend}" for r in rows if not r.correct]
slow = [f"{device} kernels: {reason}" for device, reason in doctor.absent().items()]
for line in slow: print(line)
print(f"{len(rows)} checks on {', '.join(sorted(devices))}, {len(wrong)} wrong", *wrong, sep=" | ")
sys.exit(bool(wrong or slow or "cuda" not in devices))
"""


def tiny() -> None:
    """A few launches of each kernel on small, odd shapes, for compute-sanitizer; results compared with the oracle on
    the CPU.
    """
    import torch

    from deftx_kernels import CSRMask, masked_embedding, masked_linear, sparse_adamw, svd_denoise, topk_mask
    from deftx_kernels.ops import reference

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

        other = topk_mask(grads, density=0.2)
        for scope in ("global", "tensor", "row"):
            assert topk_mask(there, density=0.13, scope=scope).to("cpu") == topk_mask(host, density=0.13, scope=scope)
        for got, want in (
            (device_mask & other.to("cuda"), mask & other),
            (device_mask - other.to("cuda"), mask - other),
        ):
            assert got.to("cpu") == want
        assert CSRMask.from_dense(device_mask.to_dense()).to("cpu") == mask
        indices = (mask.crow_indices, mask.col_indices)
        sums = (op(list(t.values()), m.crow_indices, m.col_indices) for op, t, m in (
            (torch.ops.deftx.csr_square_sum, there, device_mask), (reference.csr_square_sum, host, mask),
        ))  # fmt: skip
        torch.testing.assert_close(*(x.cpu() for x in sums))
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
    # Factors of -1, 0 and 1 and multiples of 1/4: exact in every order of summation.
    left, right = (torch.randint(-1, 2, (2, n, 6), generator=generator).float() for n in (70, 150))
    delta = left @ right.mT + torch.tensor([0, 0.25, -0.25, 4])[torch.randint(0, 4, (2, 70, 150), generator=generator)]
    on_gpu = [t.cuda() for t in (delta, left, right)]
    cut = torch.ops.deftx.residual_cut(*on_gpu, 999)
    denoised = reference.low_rank_denoised(delta, left, right, cut.cpu())
    assert int((denoised != left @ right.mT).sum()) <= 2 * 999
    assert torch.equal(torch.ops.deftx.low_rank_denoised(*on_gpu, cut).cpu(), denoised)
    for dtype in (torch.float32, torch.float64):  # more columns than a panel has
        w = torch.randn(3, 50, 41, generator=generator, dtype=dtype)
        a, tolerance = w.mT @ w, {"rtol": 0, "atol": 2000 * torch.finfo(dtype).eps}
        values, vectors = (x.cpu() for x in torch.ops.deftx.eigh(a.cuda()))
        torch.testing.assert_close((vectors * values[:, None]) @ vectors.mT, a, **tolerance)
        torch.testing.assert_close(torch.ops.deftx.eigvalsh(a.cuda()).cpu(), torch.linalg.eigvalsh(a), **tolerance)
    for rule in ({"rank": 4}, {"energy": 0.9}):
        w = torch.randn(2, 90, 80, generator=generator)
        want = svd_denoise(w.double(), **rule)
        residual, best = ((w.double() - x.double()).norm() for x in (svd_denoise(w.cuda(), **rule).cpu(), want))
        assert residual <= 1.02 * best + 1e-4 * w.norm()
    print("tiny run: every result agrees with the oracle")


def sanitize(name: str) -> list[list[str]]:
    sanitizer = tool("compute-sanitizer", "/usr/local/cuda/compute-sanitizer")
    if sanitizer is None:
        return []
    # One allocation per tensor, not torch's pool: else accesses beyond a tensor stay inside the pool, and unseen.
    program = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer]
    return [
        [
            *program,
            "--tool",
            name,
            "--error-exitcode",
            "9",
            "--report-api-errors",
            "no",
            sys.executable,
            __file__,
            "tiny",
        ]
    ]


def absent(source: Path, seen: set[Path] | None = None) -> set[str]:
    """Packages that a file imports, itself or through ours, and that are not here. `seen`: files not to be read again."""
    missing, seen = set(), seen if seen is not None else set()
    seen.add(source)
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        else:
            continue
        for name in names:
            top = name.partition(".")[0]
            if top in ("deftx_kernels", "bench"):
                path = ROOT.joinpath(*name.split("."))
                for file in (path.with_suffix(".py"), path / "__init__.py"):
                    if file.exists() and file not in seen:
                        missing |= absent(file, seen)
            elif not here(top) and not (ROOT / "tests" / f"{top}.py").exists():
                missing.add(top)
    return missing


@functools.cache
def test_files() -> list[str]:
    """The tests that this machine has the packages for."""
    chosen = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        missing = absent(file)
        if missing or file.stem.startswith(LEFT_OUT):
            print(file.name + (f" (needs {', '.join(sorted(missing))})" if missing else ""))
        else:
            chosen.append(str(file.relative_to(ROOT)))
    return chosen


def pytest(marks: str, limit: int, processes: int) -> list[list[str]]:
    if not here("pytest"):
        return []
    options = [f"--timeout={limit}"] if here("pytest_timeout") else []
    if processes > 1 and here("xdist"):
        options += [f"--numprocesses={processes}", "--dist=worksteal"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-m",
        marks,
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
    ]
    threads = ["env", "OMP_NUM_THREADS=1"] if processes > 1 else []
    # Only to save the time that collecting takes in each process: `provider` has a GPU among its parameters.
    files = [f for f in test_files() if marks != "gpu" or re.search(r"mark\.gpu|\bprovider\b", (ROOT / f).read_text())]
    return [[*threads, *command, "--tb=short", "--durations=5", *options, *files]]


# ---- running them ----


CLOSING = re.compile(r"^=* ?\d+ (passed|failed|skipped|deselected|error).* in |ERROR SUMMARY|RACECHECK SUMMARY")


def note_of(output: str, code: int | None, limit: float) -> str:
    """What the summary says of a step: pytest's closing line, a sanitizer's summary, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    known = [x for x in lines if CLOSING.search(x)]
    note = re.sub(r"^[=\s]+|[=\s]+$", "", (known or lines or [""])[-1])[:150]
    return f"stopped after {limit:.0f} s: {note}" if code is None else note


FAILED = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR) (tests/.+?)(?: - .*)?\s*$", re.M)


def failures(output: str, most: int = 14) -> list[str]:
    """Of pytest's output each error once: the tests that met it, two of them by name, where, and how its lines marked E
    begin.

    Where pytest was stopped, there are no errors yet: the names of the tests that had failed.
    """
    names: dict[str, list[str]] = {}  # error without its numbers, in which one error of many tests differs → tests
    texts: dict[str, str] = {}
    for section in re.split(r"^_{3,} (?=\S)", output, flags=re.M)[1:]:
        heading, _, body = re.split(r"^[=_]{3,}", section, flags=re.M)[0].partition("\n")
        lines = [line[1:].strip()[:180] for line in body.splitlines() if line[:4] == "E   "]
        where = re.findall(r"^(\S+\.py:\d+): ", body, flags=re.M)[-1:]
        text = "\n    ".join([*where, *filter(None, lines[:5])])
        key = re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?(e[-+]\d+)?|True|False", "#", "".join(lines)) + "".join(where)
        names.setdefault(key, []).append(heading.rstrip("_ ")[:110])
        texts.setdefault(key, text)
    if not names:
        return list(dict.fromkeys(name[:180] for name in FAILED.findall(output)))[:most]
    told = []
    for key, tests in sorted(names.items(), key=lambda item: -len(item[1])):
        more = f" and {len(tests) - 2} more" if len(tests) > 2 else ""
        told.append(f"{len(tests)} x {', '.join(tests[:2])}{more}\n    {texts[key]}")
    return told[:most] + ([f"and {len(told) - most} other errors: see the log"] if len(told) > most else [])


class Step(NamedTuple):
    name: str
    plan: Callable[[], list[list[str]]]  # the commands to try, one after the other until one succeeds
    limit: float  # seconds
    shown: int = 0  # last lines of the output that are shown even if it succeeds
    most: int = 2000  # characters of them


def run(step: Step, deadline: float) -> Result:
    started = time.monotonic()
    log = LOG.parent / f"gpu-{step.name.replace(' ', '-')}.part"
    log.write_bytes(b"")
    try:
        state, note, output = attempt(step, deadline, log)
    except Exception as error:  # whatever it is, the other steps go on
        state, note, output = "FAILED", f"{type(error).__name__}: {error}", traceback.format_exc()
    return Result(step.name, state, time.monotonic() - started, note, output)


def attempt(step: Step, deadline: float, log: Path) -> tuple[str, str, str]:
    """State, note and output."""
    commands = step.plan()
    if not commands:
        return "not run", "the program for it is not here", ""
    state, note, output = "FAILED", "no time was left", ""
    for command in commands:
        allowed = min(step.limit, deadline - time.monotonic())
        if allowed < 5:
            break
        try:
            code, output = execute(command, allowed, log)
        except OSError as error:
            code, output = 127, str(error)
        note, state = note_of(output, code, allowed), "passed" if code == 0 else "FAILED"
        if code == 0 and step.name.endswith("tests") and " passed" not in note:
            state, note = "FAILED", f"no test passed: {note}"
        # the sanitizer's limit, not a fault
        if "--error-exitcode" in command and code != 0 and "Device not supported" in output:
            state = "not run"
        if state == "passed":
            break
    return state, note, output


def show(result: Result, step: Step) -> None:
    """What a session reads: of tests the errors, of a sanitizer its first complaints, of another step its last lines."""
    print(f"\n==== {result.step}: {result.state}, {result.seconds:.0f} s, {result.note}", flush=True)
    lines = [line[:160] for line in result.output.splitlines() if line.strip()]
    if told := failures(result.output) if result.step.endswith("tests") else []:
        print("\n".join(told)[:5000])
    elif result.state != "passed" and (complaints := [line for line in lines if line.startswith("========= ")][1:]):
        print("\n".join(complaints[:12])[:1500])
    else:
        shown = step.shown if result.state == "passed" else max(step.shown, 25)
        print("\n".join(lines[len(lines) - shown :] if shown else [])[-step.most :])
    sys.stdout.flush()


def phase(name: str, groups: list[list[Step]]) -> list[Result]:
    """The groups one after the other, the steps of a group at the same time."""
    deadline, results = time.monotonic() + SECONDS[name], []
    for steps in groups:
        with ThreadPoolExecutor(len(steps)) as pool:
            for step, result in zip(steps, pool.map(partial(run, deadline=deadline), steps)):
                part = LOG.parent / f"gpu-{step.name.replace(' ', '-')}.part"
                with LOG.open("ab") as whole:
                    whole.write(f"\n======== {step.name}\n".encode() + part.read_bytes())
                part.unlink()
                show(result, step)
                results.append(result)
        if any(r.step == "versions" and r.state == "FAILED" for r in results):
            break  # nothing that follows would say anything about GPUs
    return results


def phases() -> dict[str, list[list[Step]]]:
    python, rows = sys.executable, str(OUT or ROOT / "bench/results")
    here_first = [
        [Step("GPU", nvidia_smi, 20, 2)],
        [Step("versions", lambda: [[python, "-c", VERSIONS]], 90, 6)],
        [Step("build", lambda: [[python, __file__, "build"]], 150, 3)],
    ]
    processes = min(PROCESSES, os.cpu_count() or 1)
    tests = [
        Step("doctor", lambda: [[python, "-c", DOCTOR]], 150, 45, 3000),
        Step("GPU tests", lambda: pytest("gpu", 100, processes), 180),
        Step("memcheck", lambda: sanitize("memcheck"), 150),
        Step("racecheck", lambda: sanitize("racecheck"), 150),
    ]
    bench = [python, "-m", "bench", "--device", "cuda", "--out", rows]
    targets = [*bench, "--targets", "--rounds", "9"]
    most = [*targets, "--target-peers", "--family", "topk", "train", "masked", "steps"]
    cpu = "not gpu and not cuda_on_cpu and not slow"
    return {
        "check": [*here_first, tests],
        "measure": [
            *here_first,
            [Step("machine", lambda: [[*bench, "machine"]], 60, 19)],
            [Step("targets", lambda: [most], 130, 60, 4000)],
            # Rows are added work by work, so a limit costs only what is not yet timed: ours, before peers that take
            # seconds a call.
            [Step("denoising", lambda: [[*targets, "--family", "svd", "--provider", "deftx"]], 60, 14)],
            [Step("counters", lambda: [[*bench, "counters"]], 90, 20)],
            [Step("denoising, peers", lambda: [[*targets, "--target-peers", "--family", "svd"]], 120, 16)],
        ],
        "cpu": [*here_first, [Step("CPU tests", lambda: pytest(cpu, 60, max(1, (os.cpu_count() or 1) // 2)), 285)]],
    }


def main(chosen: list[str]) -> int:
    sys.stdout.reconfigure(errors="replace")
    started, results = time.monotonic(), []
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_bytes(b"")
    for name in chosen:
        groups = phases()[name]
        if results:  # what the machine is, and the build, are known
            groups = groups[3:]
        results += phase(name, groups)
    print("\n==== summary")
    for r in results:
        print(f"{r.step:16} {r.state:8} {r.seconds:6.1f} s  {r.note[:150]}")
    bad = [r.step for r in results if r.state == "FAILED"]
    took = time.monotonic() - started
    print(f"{len(results) - len(bad)} steps without fault, {len(bad)} failed, {took:.0f} s; all output: {LOG}")
    return 1 if bad else 0


if __name__ == "__main__":
    alone = {"tiny": tiny, "build": build, "cmake": build_by_cmake}
    if sys.argv[1:] and sys.argv[1] in alone:
        alone[sys.argv[1]]()
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("phases", nargs="*", metavar="phase", help="check, measure, cpu; default: check measure")
        chosen = parser.parse_args().phases or ["check", "measure"]
        if unknown := set(chosen) - SECONDS.keys():
            parser.error(f"unknown: {', '.join(sorted(unknown))}; the phases are {', '.join(SECONDS)}")
        sys.exit(main(chosen))
