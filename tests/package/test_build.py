"""setup.py: wheels, their tags and their contents, from a copy of the source tree."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CXX = ("c++", "g++", "clang++")
NATIVE = re.compile(r"libdeftx_\w+\.(so|dylib|dll)$")

if not (ROOT / "setup.py").exists():
    pytest.skip("these tests need the source tree", allow_module_level=True)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The source tree without what builds leave in it; its build/ lives as long as the tests of this file."""
    tree = tmp_path_factory.mktemp("build") / "source"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", "_build_info.json", ".*_cache"
    )
    shutil.copytree(ROOT, tree, ignore=ignored)
    if os.name == "posix" and has_cxx():  # half of the time: the optimized build is what all other tests run
        compiler = next(filter(None, map(shutil.which, CXX)))
        (tree.parent / "c++").write_text(f'#!/bin/sh\nexec "{compiler}" "$@" -O0\n')
        (tree.parent / "c++").chmod(0o755)
    return tree


def run(tree, command, mode, **environment):
    keep = {k: v for k, v in os.environ.items() if k not in ("DEFTX_BUILD", "CUDA_HOME", "CUDA_PATH", "CXX")}
    if (compiler := tree.parent / "c++").exists():
        keep["CXX"] = str(compiler)
    environment = {**keep, "DEFTX_BUILD": mode, **environment}
    return subprocess.run(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wheel(tree, mode, **environment):
    """Builds a wheel. Returns (its tag, its files, its _build_info.json, its path)."""
    out = tree.parent / "wheels"
    shutil.rmtree(out, ignore_errors=True)
    options = ["-q", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(out)]
    done = run(tree, [sys.executable, "-m", "pip", "wheel", *options, "."], mode, **environment)
    assert done.returncode == 0, done.stdout[-5000:]
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        info = json.loads(archive.read("deftx_kernels/_build_info.json"))
        return path.stem.split("-", 2)[2], archive.namelist(), info, path


def has_cxx():
    return any(map(shutil.which, CXX))


def test_none(tree):
    tag, files, info, _ = wheel(tree, "none")
    assert tag == "py3-none-any"
    assert "deftx_kernels/ops/schemas.py" in files
    assert not any(map(NATIVE.search, files))
    assert info["cpu"] == info["cuda"] == {"built": False, "reason": "DEFTX_BUILD=none"}


@pytest.mark.skipif(not has_cxx(), reason="no C++ compiler")
def test_cpu_then_none(tree):
    """One wheel for every Python; nothing of it remains in the next wheel from the same tree."""
    tag, files, info, path = wheel(tree, "cpu")
    assert re.fullmatch(r"py3-none-(linux|macosx|win).*", tag)
    assert [f for f in files if NATIVE.search(f)] == [f for f in files if f.startswith("deftx_kernels/libdeftx_cpu.")]
    assert sum(map(bool, map(NATIVE.search, files))) == 1
    assert info["cpu"]["built"]
    assert info["cpu"]["compiler"]
    assert info["torch"]
    assert info["cuda"] == {"built": False, "reason": "DEFTX_BUILD=cpu"}

    folder = tree.parent / "unpacked"
    shutil.unpack_archive(path, folder, "zip")
    library = next(folder.glob("deftx_kernels/libdeftx_cpu.*"))
    if shutil.which("nm"):
        symbols = subprocess.run(["nm", "-D", library], text=True, capture_output=True, check=True).stdout
        assert "aoti_torch" in symbols
        assert not re.search(r"\bPy[A-Z_]|\b_Py", symbols)
    script = "import deftx_kernels as d; print(d.__file__, d.backends()['csr_add_']['cpu'].name)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        text=True,
        capture_output=True,
    )
    assert done.stdout.split() == [str(folder / "deftx_kernels/__init__.py"), "c++"], done.stderr

    tag, files, _, _ = wheel(tree, "none")
    assert tag == "py3-none-any"
    assert not any(map(NATIVE.search, files))


@pytest.mark.skipif(not has_cxx(), reason="no C++ compiler")
def test_inplace_and_incremental(tree):
    """What an editable install does: the library beside the sources, and no second compilation."""
    command = [sys.executable, "setup.py", "build_native", "--inplace"]
    assert run(tree, command, "cpu").returncode == 0
    library = next((tree / "deftx_kernels").glob("libdeftx_cpu.*"))
    objects = {p: p.stat().st_mtime_ns for p in (tree / "build/native").rglob("*.o")}
    assert objects
    assert run(tree, command, "cpu").returncode == 0
    assert {p: p.stat().st_mtime_ns for p in objects} == objects
    assert run(tree, command, "none").returncode == 0
    assert not library.exists()


@pytest.mark.skipif(not has_cxx(), reason="no C++ compiler")
def test_an_error_in_the_sources_is_loud(tree):
    broken = tree / "csrc/cpu/broken.cpp"
    broken.write_text("#error on purpose\n")
    try:
        done = run(tree, [sys.executable, "setup.py", "build_native"], "cpu")
    finally:
        broken.unlink()
    assert done.returncode != 0
    assert "on purpose" in done.stdout


def test_missing_tools(tree):
    """auto records the reason; a mode that asks for the library fails and names what is missing."""
    script = "import runpy, shutil; shutil.which = lambda *a, **k: None; runpy.run_path('setup.py')"

    def probe(mode):
        return run(
            tree,
            [sys.executable, "-c", f"import sys; sys.argv = ['setup.py', '-q', 'build_native', '--inplace']\n{script}"],
            mode,
        )

    info = tree / "deftx_kernels/_build_info.json"
    done = probe("auto")
    assert done.returncode == 0, done.stdout
    reasons = json.loads(info.read_text())
    assert "was not found" in reasons["cpu"]["reason"] or "no C++ compiler" in reasons["cpu"]["reason"]
    assert reasons["cuda"]["reason"]
    for mode in ("cpu", "cuda", "everything"):
        done = probe(mode)
        assert done.returncode != 0
        assert f"DEFTX_BUILD={mode}" in done.stdout.replace("'", "")
