"""How `make gpu` runs its steps and reads their output; needs no GPU."""

import importlib.util
import re
import subprocess
import sys
import time

import pytest
import repeated
import run_gpu
from run_gpu import Step, failures, note_of, phase, phases

from bench import __main__ as bench

WITH_XDIST = ["-n", "1", "--dist=worksteal"]
xdist = pytest.mark.skipif(not run_gpu.installed("xdist"), reason="pytest-xdist is not installed")

FAILING = """
import pytest
@pytest.mark.parametrize("n", range(5))
def test_close(n):
    assert n == 0, f"Tensor-likes are not close!\\n\\nMismatched: 3 / 3\\nGreatest absolute difference: {n}.0 at (0,)"
@pytest.mark.parametrize("name", ["[(2, 3)] - a", "b"])
def test_raises(name):
    raise RuntimeError(f"CUDA error: an illegal memory access at {id(name)}\\n\\nmore about it")
def test_right():
    pass
"""


@pytest.mark.parametrize("options", [pytest.param(WITH_XDIST, marks=xdist), ["-p", "no:xdist"]], ids=["xdist", "alone"])
def test_each_error_is_printed_once_with_its_tests(tmp_path, options):
    (tmp_path / "test_x.py").write_text(FAILING)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", *options, "test_x.py"]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=run_gpu.ENV).stdout
    close, raises = failures(output)
    assert close.startswith("4 x test_close[")
    assert "and 2 more\n    test_x.py:5" in close.replace("in test_close", "")
    assert "Tensor-likes are not close!" in close
    assert "Greatest absolute difference: " in close
    assert raises.startswith("2 x test_raises[")
    assert "RuntimeError: CUDA error: an illegal memory access" in raises
    assert note_of(output, 1, 9).startswith("6 failed, 2 passed in ")
    assert note_of(output, None, 9).startswith("stopped after 9 s: 6 failed")


LOSES = """
import lost_context, pytest
lost = False
lost_context.context_is_lost = lambda: lost
@pytest.mark.parametrize("n", range(6))
def test_context(n):
    global lost
    assert not lost, "a CUDA call of a process whose context is lost"
    if n == 1:
        lost = True
        raise RuntimeError("CUDA error: an illegal memory access")
"""


@pytest.mark.parametrize(
    ("options", "passed"), [pytest.param(WITH_XDIST, 5, marks=xdist), (["-p", "no:xdist"], 1)], ids=["xdist", "alone"]
)
def test_a_lost_context_fails_one_test(tmp_path, options, passed):
    (tmp_path / "test_x.py").write_text(LOSES)
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-p", "lost_context"]
    env = run_gpu.ENV | {"PYTHONPATH": str(run_gpu.ROOT / "tests")}
    done = subprocess.run([*command, *options, "test_x.py"], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert f" {passed} passed" in done.stdout
    assert {line.split("::")[1][:15] for line in done.stdout.splitlines() if "FAILED" in line} == {"test_context[1]"}
    assert "illegal memory access" in "".join(failures(done.stdout))
    assert "was lost in test_x.py::test_context[1]" in done.stdout + done.stderr


def test_large_inputs_over_and_over_here(capsys):
    repeated.main("cpu", 30_000, 2)
    assert "the same bits in 2 runs" in capsys.readouterr().out


def test_of_a_stopped_pytest_the_failed_tests_are_named():
    lines = "[gw1] [  3%] PASSED tests/test_a.py::b[1] \n[gw0] [  4%] FAILED tests/test_a.py::b[(2, 3)-cuda] \n"
    assert failures(lines) == ["tests/test_a.py::b[(2, 3)-cuda]"]
    assert failures("nothing") == []


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu, "LOG", tmp_path / "gpu.log")
    return tmp_path / "gpu.log"


def python(*programs):
    return lambda: [[sys.executable, "-c", text] for text in programs]


STEPS = {  # → plan, limit, state
    "a": (python("import time; time.sleep(1); print('slept')"), 20, "passed"),
    "b": (python("import time; time.sleep(1)"), 20, "passed"),
    "too slow": (python("import time; time.sleep(60)"), 6, "FAILED"),
    "wrong": (python("print('first'); 1 / 0"), 20, "FAILED"),
    "absent": (list, 20, "not run"),
    "raises": (lambda: 1 / 0, 20, "FAILED"),
    "some tests": (python("print('5 deselected in 1s')"), 20, "FAILED"),
    "second command": (python("1 / 0", "print('built')"), 20, "passed"),
}


def test_steps_run_together_and_none_stops_another(log, monkeypatch, capsys):
    monkeypatch.setitem(run_gpu.SECONDS, "check", 60)
    steps = [Step(name, plan, limit, shown=1) for name, (plan, limit, _) in STEPS.items()]
    started = time.monotonic()
    results = {r.step: r for r in phase("check", [steps[:3], steps[3:6], steps[6:7], steps[7:]])}
    assert time.monotonic() - started < 40
    assert {n: r.state for n, r in results.items()} == {name: state for name, (*_, state) in STEPS.items()}
    assert results["too slow"].note.startswith("stopped after 6 s")
    assert results["some tests"].note.startswith("no test passed")
    shown = capsys.readouterr().out
    assert "ZeroDivisionError" in shown
    assert "\nbuilt" in shown
    assert "slept" in log.read_text()
    assert [p.name for p in log.parent.iterdir()] == ["gpu.log"]


def test_a_sanitizers_first_errors_are_shown(log, capsys):
    text = "========= COMPUTE-SANITIZER\\n" + "".join(f"========= complaint {i}\\n" for i in range(40))
    phase("check", [[Step("memcheck", python(f"print('{text}'); raise SystemExit(9)"), 20)]])
    shown = capsys.readouterr().out
    assert "complaint 0" in shown
    assert "complaint 20" not in shown


def test_without_a_gpu_nothing_else_is_run(log):
    wrong = [Step("versions", python("1 / 0"), 20)]
    assert len(phase("check", [wrong, [Step("other", python("1"), 20)]])) == 1


def test_a_file_is_left_out_only_for_a_package_that_is_not_installed():
    """In a process like that of `make gpu`, in which the tests' folder is no package."""
    tests = str(run_gpu.ROOT / "tests")
    program = f"import sys; sys.path.insert(0, {tests!r}); import run_gpu; print(len(run_gpu.test_files()))"
    command = [sys.executable, "-I", "-c", program]
    *left_out, count = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    needed = {package for line in left_out for package in re.findall(r"needs (.*)\)", line)}
    assert not {p for names in needed for p in names.split(", ") if importlib.util.find_spec(p)}
    others = [*run_gpu.ROOT.glob("tests/train/test_*.py"), run_gpu.ROOT / "tests/package/test_build.py"]
    assert int(count) + len(left_out) + len(others) == len(list((run_gpu.ROOT / "tests").rglob("test_*.py")))


# torch, triton, NumPy, pytest, hypothesis, transformers, peft and what these install.
BARE = (
    "torch triton numpy _pytest pytest hypothesis transformers peft accelerate safetensors tokenizers huggingface_hub"
)
BARE = {*BARE.split(), *["filelock", "packaging", "psutil", "rich"]}


@pytest.fixture
def bare_machine(monkeypatch):
    monkeypatch.setattr(run_gpu, "installed", lambda package: package in BARE | sys.stdlib_module_names)
    cached = (run_gpu.imports, run_gpu.test_files)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_the_gpu_tests_and_the_benchmark_need_few_packages(bare_machine):
    tests = set(run_gpu.pytest("gpu", 100, 1)[0])
    for file in (run_gpu.ROOT / "tests").rglob("test_*.py"):
        name, text = file.relative_to(run_gpu.ROOT).as_posix(), file.read_text()
        if re.search(r"mark\.gpu|^OPS = |@implementations\(", text, re.M):
            assert name in tests, run_gpu.absent(file)
    programs = [*(run_gpu.ROOT / "bench").glob("bench_*.py"), *run_gpu.ROOT.glob("tests/*.py")]
    for file in (run_gpu.ROOT / "bench/__main__.py", run_gpu.ROOT / "bench/step_models.py", *programs):
        assert not run_gpu.absent(file), file
    assert run_gpu.absent(run_gpu.ROOT / "deftx_kernels/cli.py") == {"tyro"}


def test_phases_are_within_their_time_and_their_programs_know_their_arguments():
    assert sum(run_gpu.SECONDS[name] for name in ("check", "measure")) <= 530
    steps = [step for groups in phases().values() for group in groups for step in group]
    assert all(step.limit <= 285 for step in steps)
    for groups in phases().values():
        assert [group[0].name for group in groups[:3]] == ["GPU", "versions", "build"]
    names = ("bench/test_bench", "mask/test_csr", "optim/test_sparse_adamw")
    assert {f"tests/{name}.py" for name in names} <= set(run_gpu.test_files())
    commands = [c for step in steps for c in step.plan()]
    options = [bench.parser().parse_args(c[3:]) for c in commands if c[1:3] == ["-m", "bench"]]
    assert {o.command for o in options} == {"run", "machine", "counters"}
    assert {f for o in options if o.command == "run" for f in o.family} == {"topk", "train", "masked", "steps", "svd"}
