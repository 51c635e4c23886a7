"""`make gpu`: build, check and measure on a machine with a GPU: python3 tests/run_gpu.py [check] [measure] [cpu]

    check    build (or find the libraries built from these sources), then doctor, the tests marked `gpu` and the
             sanitizers at the same time, then large inputs over and over: at most four minutes
    measure  the machine's rates, the workloads with performance targets, the most important first, training steps,
             our kernels' memory traffic, and the slowest baselines: under five minutes
    cpu      the CPU tests, to check this torch and this Python

Without an argument: check and measure. Needs no network, virtual environment or installation: only the torch, nvcc and
pytest of the python3 that runs it. The libraries are built inside the source tree, unless they were copied there
(deftx_kernels/libdeftx_*.so and _build_info.json). A step that fails or exceeds its limit does not stop the next ones;
the last lines list the result of each step, and the exit status is 0 only if none failed. All output: gpu.log in $OUT
if that is set, else in build/. Benchmark rows go to $OUT as well, else to bench/results/; $DEFTX_COMMIT names the
commit of a tree without history. About 12,000 characters are printed per phase.
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
SECONDS = {"check": 240, "measure": 285, "cpu": 285}  # for each phase
PROCESSES = 12  # of the GPU tests: most of their time is compilation, and comparison with the CPU
OURS = ("deftx_kernels", "bench", "tests")
LEFT_OUT = ("tests/train/", "tests/package/test_build")  # the driver and wheels: tested by the CPU suite


class Result(NamedTuple):
    step: str
    state: str  # "passed", "FAILED", "not run"
    seconds: float
    note: str
    output: str


def environment() -> dict[str, str]:
    """The variables of every step: this tree's package, this Python's programs, no downloads."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    homes = [f"{os.environ[k]}/bin" for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["PATH"] = os.pathsep.join([*folders[:1], *homes, *folders[1:]])
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "COLUMNS": "300"}  # pytest cuts its summary to the width
    return env | {"HF_HUB_OFFLINE": "1", "TRITON_CACHE_DIR": str(ROOT / "build/triton")}


ENV = environment()


def execute(command: list, limit: float, log: Path) -> tuple[int | None, str]:
    """(exit status, None after the limit; output). The output goes to the step's log as it comes."""
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        file.flush()
        start = file.tell()
        options = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen([str(c) for c in command], cwd=ROOT, env=ENV, **options)
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
def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def tool(name: str, *more: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([ENV["PATH"], *more]))


# ---- the steps: each returns the commands to try until one succeeds ----
def nvidia_smi() -> list[list[str]]:
    program = tool("nvidia-smi", "/usr/local/nvidia/bin")
    query = "--query-gpu=name,driver_version,memory.total,memory.used,utilization.gpu"
    return [[program, query, "--format=csv,noheader"]] if program else []


def build() -> None:
    """The libraries for this machine's GPU: existing ones, else by setup.py, else by CMake alone."""
    import torch

    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    env = {**os.environ, "DEFTX_BUILD": "cuda", "CUDAARCHS": f"{major}{minor}-real"}
    by_setup = [sys.executable, "setup.py", "build_native", "--inplace"]
    for command in ([*by_setup, "--if-changed"], by_setup, [sys.executable, __file__, "cmake"]):
        # Libraries built elsewhere may not load here.
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
    """As setup.py does, where this setuptools is too old for pyproject.toml."""
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
    options = [*generator, *(f"-D{k}={v}" for k, v in settings.items())]
    cmake = tool("cmake") or "cmake"
    subprocess.run([cmake, "-S", ROOT, "-B", folder, *options], check=True)
    subprocess.run([cmake, "--build", folder, "--parallel", str(os.cpu_count() or 1)], check=True)
    for library in ("cpu", "cuda"):
        shutil.copy2(folder / f"lib/libdeftx_{library}.so", ROOT / "deftx_kernels")
    built = {"built": True, "compiler": "CMake, by tests/run_gpu.py"}
    info = {"mode": "cuda", "torch": torch.__version__, "stable_abi": "2.10", "cpu": built, "cuda": built}
    (ROOT / "deftx_kernels/_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


VERSIONS = """
import importlib.metadata as m, sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)
for name in ("triton", "setuptools", "cmake", "ninja", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis",
             "numpy", "transformers", "peft", "cupy-cuda13x"):
    try: print(name, m.version(name), end="  ")
    except m.PackageNotFoundError: print(name, "absent", end="  ")
print()
assert torch.cuda.is_available(), "torch sees no CUDA device: no later step would test a GPU"
memory = torch.cuda.mem_get_info()[1] / 2**30
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), f"{memory:.0f} GiB")
assert torch.ones(3, device="cuda").sum().item() == 3
"""

DOCTOR = """
import os, sys
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the tests keep every core busy at the same time
from deftx_kernels import doctor
rows = doctor.run()
for r in rows:
    if r.device == "cuda" or not r.correct:
        numbers = "" if r.error is None else f"{r.error:.1e} {r.milliseconds:9.3f} ms"
        state = "correct" if r.correct else "WRONG  "
        print(f"{r.op:22} {r.device:5} {r.backend:10} {state} {numbers} {r.note[:200]}".rstrip())
devices = {r.device for r in rows}
wrong = [f"{r.op} {r.device} {r.backend}" for r in rows if not r.correct]
slow = [f"{device} kernels: {reason}" for device, reason in doctor.absent().items()]
for line in slow: print(line)
print(f"{len(rows)} checks on {', '.join(sorted(devices))}, {len(wrong)} wrong", *wrong, sep=" | ")
sys.exit(bool(wrong or slow or "cuda" not in devices))
"""


def sanitize(name: str) -> list[list[str]]:
    sanitizer = tool("compute-sanitizer", "/usr/local/cuda/compute-sanitizer")
    if sanitizer is None:
        return []
    # One allocation per tensor: in torch's pool, accesses beyond a tensor would stay inside the pool, unseen.
    options = f"--tool {name} --error-exitcode 9 --report-api-errors no".split()
    return [
        ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", sanitizer, *options, sys.executable, ROOT / "tests/sanitized.py"]
    ]


@functools.cache
def imports(source: Path) -> tuple[set[Path], set[str]]:
    """(our files, packages that are not installed) that a file imports."""
    files, missing = around(source), set()
    modules = {file.stem: file for file in (ROOT / "tests").rglob("*.py")}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        else:
            continue
        for name in names:
            top = name.partition(".")[0]
            path = ROOT.joinpath(*name.split("."))
            if top not in OURS:  # a module of the tests, or a package
                path = modules.get(top, path)
            found = {file for file in (path.with_suffix(".py"), path / "__init__.py") if file.exists()}
            files |= found
            if not found and top not in OURS and not installed(top):
                missing.add(top)
    return files, missing


def around(source: Path) -> set[Path]:
    """What is imported before a file: the __init__.py of its folders, of a test also their conftest.py."""
    names = ("__init__.py", "conftest.py") if source.name.startswith("test_") else ("__init__.py",)
    folders = [f for f in source.parents if f.is_relative_to(ROOT)]
    return {folder / name for folder in folders for name in names if (folder / name).exists()} - {source}


def absent(source: Path) -> set[str]:
    """Packages that a file imports, itself or through our files, and that are not installed."""
    seen, left, missing = set(), [source], set()
    while left:
        file = left.pop()
        if file not in seen:
            seen.add(file)
            files, lacking = imports(file)
            left += files
            missing |= lacking
    return missing


@functools.cache
def test_files() -> list[str]:
    """The tests whose packages are installed, without LEFT_OUT."""
    names = {file.relative_to(ROOT).as_posix(): file for file in sorted((ROOT / "tests").rglob("test_*.py"))}
    lacking = {name: absent(file) for name, file in names.items() if not name.startswith(LEFT_OUT)}
    for name, missing in lacking.items():
        if missing:
            print(f"left out: {name} (needs {', '.join(sorted(missing))})")
    return [name for name, missing in lacking.items() if not missing]


def pytest(marks: str, limit: int, processes: int) -> list[list[str]]:
    if not installed("pytest"):
        return []
    options = [f"--timeout={limit}"] if installed("pytest_timeout") else []
    if processes > 1 and installed("xdist"):
        options += [f"--numprocesses={processes}", "--dist=worksteal"]
    options += ["--continue-on-collection-errors", "-p", "no:cacheprovider", "--tb=short", "--durations=5"]
    threads = ["env", *(["OMP_NUM_THREADS=1"] if processes > 1 else [])]
    if marks == "gpu":  # an error is raised where its kernel was launched; lost_context.py keeps it to its test
        threads.append("CUDA_LAUNCH_BLOCKING=1")
    # To save collection time in each process: the fixtures `implementation` and `provider` have GPU parameters.
    on_gpu = re.compile(r"mark\.gpu|\b(implementation|provider)\b")
    files = [f for f in test_files() if marks != "gpu" or on_gpu.search((ROOT / f).read_text())]
    return [[*threads, sys.executable, "-m", "pytest", "-v", "-m", marks, *options, *files]]


# ---- running them ----
CLOSING = re.compile(r"^=* ?\d+ (passed|failed|skipped|deselected|error).* in |ERROR SUMMARY|RACECHECK SUMMARY")
FAILED = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR) (tests/.+?)(?: - .*)?\s*$", re.M)
NUMBERS = re.compile(r"0x[0-9a-f]+|\d+(\.\d+)?(e[-+]\d+)?|True|False")


def note_of(output: str, code: int | None, limit: float) -> str:
    """A step's line in the summary: pytest's closing line, a sanitizer's summary, or the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    known = [x for x in lines if CLOSING.search(x)]
    note = re.sub(r"^[=\s]+|[=\s]+$", "", (known or lines or [""])[-1])[:150]
    return f"stopped after {limit:.0f} s: {note}" if code is None else note


def failures(output: str, most: int = 14) -> list[str]:
    """Each error in pytest's output once: its tests (two by name), where it was raised, and the first lines marked E.

    If pytest was stopped before it printed errors: the names of the failed tests.
    """
    names: dict[str, list[str]] = {}  # error without its numbers, which differ between tests → tests
    texts: dict[str, str] = {}
    for section in re.split(r"^_{3,} (?=\S)", output, flags=re.M)[1:]:
        heading, _, body = re.split(r"^[=_]{3,}", section, flags=re.M)[0].partition("\n")
        lines = [line[1:].strip()[:180] for line in body.splitlines() if line[:4] == "E   "]
        where = re.findall(r"^(\S+\.py:\d+): ", body, flags=re.M)[-1:]
        key = NUMBERS.sub("#", "".join(lines)) + "".join(where)
        names.setdefault(key, []).append(heading.rstrip("_ ")[:110])
        texts.setdefault(key, "\n    ".join([*where, *filter(None, lines[:5])]))
    if not names:
        return list(dict.fromkeys(name[:180] for name in FAILED.findall(output)))[:most]
    found = []
    for key, tests in sorted(names.items(), key=lambda item: -len(item[1])):
        more = f" and {len(tests) - 2} more" if len(tests) > 2 else ""
        found.append(f"{len(tests)} x {', '.join(tests[:2])}{more}\n    {texts[key]}")
    return found[:most] + ([f"and {len(found) - most} other errors: see the log"] if len(found) > most else [])


class Step(NamedTuple):
    name: str
    plan: Callable[[], list[list[str]]]  # the commands to try until one succeeds
    limit: float  # seconds
    shown: int = 0  # last lines of the output that are printed even if it succeeds
    most: int = 2000  # characters of them


def part_of(step: Step) -> Path:
    return LOG.parent / f"gpu-{step.name.replace(' ', '-')}.part"


def run(step: Step, deadline: float) -> Result:
    started = time.monotonic()
    part_of(step).write_bytes(b"")
    try:
        state, note, output = attempt(step, deadline)
    except Exception as error:  # the other steps go on
        state, note, output = "FAILED", f"{type(error).__name__}: {error}", traceback.format_exc()
    return Result(step.name, state, time.monotonic() - started, note, output)


def attempt(step: Step, deadline: float) -> tuple[str, str, str]:
    """State, note and output."""
    commands = step.plan()
    if not commands:
        return "not run", "its program is not installed", ""
    state, note, output = "FAILED", "no time was left", ""
    for command in commands:
        allowed = min(step.limit, deadline - time.monotonic())
        if allowed < 5:
            break
        try:
            code, output = execute(command, allowed, part_of(step))
        except OSError as error:
            code, output = 127, str(error)
        note, state = note_of(output, code, allowed), "passed" if code == 0 else "FAILED"
        if code == 0 and step.name.endswith("tests") and " passed" not in note:
            state, note = "FAILED", f"no test passed: {note}"
        # The sanitizer's limitation, not a failure.
        if "--error-exitcode" in command and code != 0 and "Device not supported" in output:
            state = "not run"
        if state == "passed":
            break
    return state, note, output


def show(result: Result, step: Step) -> None:
    """Print the errors of tests, the first errors of a sanitizer, the last lines of another step."""
    print(f"\n==== {result.step}: {result.state}, {result.seconds:.0f} s, {result.note}", flush=True)
    lines = [line[:160] for line in result.output.splitlines() if line.strip()]
    errors = failures(result.output) if result.step.endswith("tests") else []
    complaints = [line for line in lines if line.startswith("========= ")][1:]
    if errors:
        print("\n".join(errors)[:5000])
    elif result.state != "passed" and complaints:
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
                with LOG.open("ab") as log:
                    log.write(f"\n======== {step.name}\n".encode() + part_of(step).read_bytes())
                part_of(step).unlink()
                show(result, step)
                results.append(result)
        if any(r.step == "versions" and r.state == "FAILED" for r in results):
            break  # without a GPU
    return results


def phases() -> dict[str, list[list[Step]]]:
    python, rows = sys.executable, str(OUT or ROOT / "bench/results")
    first = [
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
    repeated = Step("many blocks", lambda: [[python, ROOT / "tests/repeated.py"]], 60, 2)
    bench = [python, "-m", "bench", "--device", "cuda", "--out", rows]
    targets = [*bench, "--targets", "--rounds", "9"]
    with_baselines = [*targets, "--target-baselines", "--family"]
    cpu = "not gpu and not cuda_on_cpu and not slow"
    return {
        "check": [*first, tests, [repeated]],
        "measure": [
            *first,
            [Step("machine", lambda: [[*bench, "machine"]], 60, 30, 2500)],
            # Rows are appended one by one: a limit loses only what is not yet timed. Ours comes before the baselines,
            # which take seconds a call.
            [Step("targets", lambda: [[*with_baselines, "topk", "train", "masked"]], 80, 40, 3000)],
            [Step("denoising", lambda: [[*targets, "--family", "svd", "--implementation", "deftx"]], 60, 14)],
            [Step("training steps", lambda: [[*with_baselines, "steps"]], 120, 20, 2000)],
            [Step("counters", lambda: [[*bench, "counters"]], 90, 20)],
            [Step("denoising, baselines", lambda: [[*with_baselines, "svd"]], 120, 16)],
        ],
        "cpu": [*first, [Step("CPU tests", lambda: pytest(cpu, 60, max(1, (os.cpu_count() or 1) // 2)), 285)]],
    }


def main(chosen: list[str]) -> int:
    sys.stdout.reconfigure(errors="replace")
    started, results = time.monotonic(), []
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_bytes(b"")
    for name in chosen:
        results += phase(name, phases()[name][3:] if results else phases()[name])  # versions and build once
    print("\n==== summary")
    for r in results:
        print(f"{r.step:20} {r.state:8} {r.seconds:6.1f} s  {r.note[:150]}")
    failed = sum(r.state == "FAILED" for r in results)
    took = time.monotonic() - started
    print(f"{len(results) - failed} steps without failure, {failed} failed, {took:.0f} s; all output: {LOG}")
    return 1 if failed else 0


if __name__ == "__main__":
    alone = {"build": build, "cmake": build_by_cmake}
    if sys.argv[1:] and sys.argv[1] in alone:
        alone[sys.argv[1]]()
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("phases", nargs="*", metavar="phase", help="check, measure, cpu; default: check measure")
        chosen = parser.parse_args().phases or ["check", "measure"]
        if unknown := set(chosen) - SECONDS.keys():
            parser.error(f"unknown: {', '.join(sorted(unknown))}; the phases are {', '.join(SECONDS)}")
        sys.exit(main(chosen))
