"""What `make gpu` tells of its steps: the GPU is not needed for that."""

import subprocess
import sys
import time

import pytest
import run_gpu
from run_gpu import Step, failures, note_of, phase, phases

from bench import __main__ as bench

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


@pytest.mark.parametrize("options", [["-n", "2", "--dist=worksteal"], ["-p", "no:xdist"]], ids=["xdist", "alone"])
def test_each_error_is_told_once_with_its_tests(tmp_path, options):
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


def test_of_tests_that_were_stopped_the_names_are_told():
    lines = (
        "[gw1] [  3%] PASSED tests/test_a.py::test_b[1] \n[gw0] [  4%] FAILED tests/test_a.py::test_b[(2, 3)-cuda] \n"
    )
    assert failures(lines) == ["tests/test_a.py::test_b[(2, 3)-cuda]"]
    assert failures("nothing") == []


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setattr(run_gpu, "LOG", tmp_path / "gpu.log")
    return tmp_path / "gpu.log"


def python(text):
    return lambda: [[sys.executable, "-c", text]]


def test_steps_of_a_group_run_together_and_none_keeps_another_from_running(log, monkeypatch, capsys):
    monkeypatch.setitem(run_gpu.SECONDS, "check", 30)
    wait = "import time; time.sleep(1); print('slept')"
    groups = [
        [
            Step("a", python(wait), 20),
            Step("b", python(wait), 20),
            Step("too slow", python("import time; time.sleep(60)"), 6),
        ],
        [
            Step("wrong", python("print('told'); 1 / 0"), 20),
            Step("absent", list, 20),
            Step("raises", lambda: 1 / 0, 20),
        ],
        [Step("some tests", python("print('5 deselected in 1s')"), 20)],
        [
            Step(
                "second way",
                lambda: [[sys.executable, "-c", "1 / 0"], [sys.executable, "-c", "print('built')"]],
                20,
                shown=1,
            )
        ],
    ]
    started = time.monotonic()
    results = {r.step: r for r in phase("check", groups)}
    assert time.monotonic() - started < 20
    states = {
        "a": "passed",
        "b": "passed",
        "too slow": "FAILED",
        "wrong": "FAILED",
        "absent": "not run",
        "raises": "FAILED",
    }
    assert {n: r.state for n, r in results.items()} == states | {"some tests": "FAILED", "second way": "passed"}
    assert results["too slow"].note.startswith("stopped after 6 s")
    assert results["some tests"].note.startswith("no test passed")
    shown, whole = capsys.readouterr().out, log.read_text()
    assert "ZeroDivisionError" in shown
    assert "slept" in whole
    assert "\nbuilt" in shown
    assert [p.name for p in log.parent.iterdir()] == ["gpu.log"]


def test_a_sanitizers_first_complaints_are_shown(log, capsys):
    text = "========= COMPUTE-SANITIZER\\n" + "".join(f"========= complaint {i}\\n" for i in range(40))
    phase("check", [[Step("memcheck", python(f"print('{text}'); raise SystemExit(9)"), 20)]])
    shown = capsys.readouterr().out
    assert "complaint 0" in shown
    assert "complaint 20" not in shown


def test_the_phases_are_within_their_time():
    assert sum(run_gpu.SECONDS[name] for name in ("check", "measure")) <= 500
    for groups in phases().values():
        assert all(step.limit <= 285 for steps in groups for step in steps)
        assert [steps[0].name for steps in groups[:3]] == ["GPU", "versions", "build"]
    assert {f"tests/{name}.py" for name in ("bench/test_bench", "mask/test_csr", "optim/test_sparse_adamw")} <= set(
        run_gpu.test_files()
    )


def test_the_programs_know_their_arguments():
    commands = [c for groups in phases().values() for steps in groups for step in steps for c in step.plan()]
    options = [bench.parser().parse_args(c[3:]) for c in commands if c[1:3] == ["-m", "bench"]]
    assert {o.command for o in options} == {"run", "machine", "counters"}
    assert {f for o in options if o.command == "run" for f in o.family} == {"topk", "train", "masked", "steps", "svd"}


def test_without_a_gpu_nothing_else_is_run(log, capsys):
    wrong = [Step("versions", python("1 / 0"), 20)]
    assert len(phase("check", [wrong, [Step("other", python("1"), 20)]])) == 1
