"""Builds the compiled libraries (CMakeLists.txt) into the package; everything else about the package is in
pyproject.toml.

DEFTX_BUILD says what to build:
    auto   (default) the CPU library where there is a C++ compiler, the CUDA library too where there is nvcc
    cpu    the CPU library; fails without a C++ compiler
    cuda   both; fails without nvcc
    none   neither: a pure Python package, whose ops run on plain torch and Triton
What was built, with what, and why something was not, goes to deftx_kernels/_build_info.json. CMake's own variable
CUDAARCHS ("90-real") builds for other GPUs than ARCHITECTURES.
"""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.build import build

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
PACKAGE = "deftx_kernels"
ARCHITECTURES = (80, 90, 100)
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
CPU, CUDA = "cpu", "cuda"


class Missing(Exception):
    """A tool that a library needs is not here; the text is the reason that users read."""


def output(*command):
    return subprocess.run(
        [str(c) for c in command], check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ).stdout


def find_program(name):
    """A program of this Python's environment (which need not be activated), else of PATH."""
    scripts = os.pathsep.join([sysconfig.get_path("scripts"), str(Path(sys.executable).parent)])
    return shutil.which(name, path=scripts) or shutil.which(name)


def find_torch():
    """(folder, version) of the torch to build against, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Missing(
            "torch was not found where the package was built (pip install --no-build-isolation needs it installed)"
        )
    folder = Path(spec.submodule_search_locations[0])
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise Missing(f"the torch in {folder} is older than 2.10, or has no headers")
    version = re.search(r"^__version__ = ['\"]([^'\"]+)", (folder / "version.py").read_text(), re.M)
    return folder, version.group(1) if version else "unknown"


def find_cmake():
    """pip's cmake or the system's. pip's command may be a script of an environment that is gone: its binary is asked
    for first.
    """
    if importlib.util.find_spec("cmake"):
        import cmake

        binary = shutil.which("cmake", path=getattr(cmake, "CMAKE_BIN_DIR", ""))
        if binary:
            return binary
    found = find_program("cmake")
    if not found:
        raise Missing("cmake was not found (pip install cmake ninja)")
    return found


def find_cxx():
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++", "cl"]
    found = next(filter(None, map(shutil.which, names)), None)
    if not found and sys.platform != "win32":  # on Windows, CMake finds a Visual Studio that is not on PATH
        raise Missing(f"no C++ compiler was found (tried {', '.join(names)})")
    return found


def find_nvcc():
    homes = [os.environ[k] for k in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(k)]
    folders = [*(str(Path(h) / "bin") for h in homes), None, "/usr/local/cuda/bin"]
    found = next(filter(None, (shutil.which("nvcc", path=f) for f in folders)), None)
    if not found:
        raise Missing("nvcc was not found (PATH, CUDA_HOME, /usr/local/cuda)")
    return found


def architectures(nvcc):
    """(for CMake, for people): machine code for the wanted architectures that this nvcc knows, PTX of the newest."""
    if os.environ.get("CUDAARCHS"):
        wanted = os.environ["CUDAARCHS"].split(";")
        return wanted, [f"sm_{a.removesuffix('-real')}" for a in wanted]
    known = {int(n) for n in re.findall(r"compute_(\d+)\b", output(nvcc, "--list-gpu-arch"))}
    chosen = [a for a in ARCHITECTURES if a in known]
    if not chosen:
        raise Missing(f"{nvcc} compiles for none of {ARCHITECTURES}")
    newest = chosen[-1]
    return [*(f"{a}-real" for a in chosen), f"{newest}-virtual"], [*(f"sm_{a}" for a in chosen), f"compute_{newest}"]


def version_line(command):
    """The line of a compiler's --version that holds its version."""
    try:
        text = output(command, "--version")
    except (OSError, subprocess.CalledProcessError):
        return str(command)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "release" in line), lines[0] if lines else str(command))


def digest():
    """Of everything that the libraries are made from: says whether they are those of this tree, wherever they were
    built.
    """
    found = hashlib.sha256()
    for path in [ROOT / "CMakeLists.txt", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]:
        found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


class Plan:
    """What this build makes, decided before anything is compiled: the wheel's tag depends on it."""

    def __init__(self):
        self.mode = os.environ.get("DEFTX_BUILD", "auto").lower() or "auto"
        if self.mode not in ("auto", "cpu", "cuda", "none"):
            raise SystemExit(f"DEFTX_BUILD={self.mode!r}: expected auto, cpu, cuda or none")
        self.info = {
            "mode": self.mode,
            "torch": None,
            "stable_abi": "2.10",
            "sources": digest(),
            CPU: {"built": False},
            CUDA: {"built": False},
        }
        self.wanted = []
        self._try(CPU, self._plan_cpu, required=self.mode in ("cpu", "cuda"))
        self._try(CUDA, self._plan_cuda, required=self.mode == "cuda")

    def _try(self, library, plan, required):
        try:
            plan()
            self.wanted.append(library)
        except Missing as error:
            if required:
                raise SystemExit(f"DEFTX_BUILD={self.mode}: {error}") from None
            self.info[library]["reason"] = str(error)

    def _plan_cpu(self):
        if self.mode == "none":
            raise Missing("DEFTX_BUILD=none")
        self.torch, self.info["torch"] = find_torch()
        self.cmake, self.cxx = find_cmake(), find_cxx()
        self.info[CPU]["compiler"] = version_line(self.cxx) if self.cxx else "Visual Studio"

    def _plan_cuda(self):
        if self.mode in ("none", "cpu"):
            raise Missing(f"DEFTX_BUILD={self.mode}")
        if CPU not in self.wanted:
            raise Missing(self.info[CPU]["reason"])
        if sys.platform == "darwin":
            raise Missing("there is no CUDA for macOS")
        self.nvcc = find_nvcc()
        self.cuda_architectures, names = architectures(self.nvcc)
        self.info[CUDA].update(compiler=version_line(self.nvcc), architectures=names)

    def settings(self):
        """CMake's cache entries. A build folder made with others is begun afresh."""
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "TORCH_DIR": self.torch,
            "DEFTX_CUDA": "ON" if CUDA in self.wanted else "OFF",
        }
        if self.cxx:
            settings["CMAKE_CXX_COMPILER"] = self.cxx
        if CUDA in self.wanted:
            settings |= {
                "CMAKE_CUDA_COMPILER": self.nvcc,
                "CMAKE_CUDA_ARCHITECTURES": ";".join(self.cuda_architectures),
            }
            if os.environ.get("CXX"):
                settings["CMAKE_CUDA_HOST_COMPILER"] = self.cxx
        ninja = find_program("ninja")
        if ninja:
            settings["CMAKE_MAKE_PROGRAM"] = ninja
        return {k: Path(v).as_posix() if isinstance(v, Path) else v for k, v in settings.items()}


PLAN = Plan()


class BuildNative(Command):
    """`build_native`: the libraries and _build_info.json, into build_lib, or beside the sources (--inplace, editable
    installs).
    """

    description = "build the compiled libraries with CMake"
    user_options = [  # noqa: RUF012
        ("inplace", "i", "put the libraries beside the Python sources"),
        (
            "if-changed",
            None,
            "only where what is there is not made of these sources, or lacks a library or an architecture",
        ),
    ]
    boolean_options = ["inplace", "if-changed"]  # noqa: RUF012
    editable_mode = False

    def initialize_options(self):
        self.build_lib, self.inplace, self.if_changed = None, False, False

    def finalize_options(self):
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    def run(self):
        target = ROOT / PACKAGE if self.editable_mode or self.inplace else Path(self.build_lib) / PACKAGE
        target.mkdir(parents=True, exist_ok=True)
        if self.if_changed and self.up_to_date(target):
            print(f"{PACKAGE}: the libraries are those of these sources")
            return
        for library in (CPU, CUDA):  # one from an earlier build with other settings must not stay
            (target / f"libdeftx_{library}{SUFFIX}").unlink(missing_ok=True)
        if PLAN.wanted:
            built = self.compile()
            for library in PLAN.wanted:
                # A new file, not new bytes in the old one: a running process may have the old one mapped.
                shutil.copy2(built / f"libdeftx_{library}{SUFFIX}", target)
                PLAN.info[library]["built"] = True
        (target / "_build_info.json").write_text(json.dumps(PLAN.info, indent=2) + "\n")
        for library in (CPU, CUDA):
            state = PLAN.info[library]
            print(
                f"{PACKAGE}: the {library} library was "
                + ("built" if state["built"] else f"not built: {state['reason']}")
            )

    def up_to_date(self, target):
        try:
            found = json.loads((target / "_build_info.json").read_text())
        except (OSError, ValueError):
            return False
        there = all(
            (target / f"libdeftx_{library}{SUFFIX}").exists() and found[library]["built"] for library in PLAN.wanted
        )
        lacking = set(PLAN.info[CUDA].get("architectures", ())) - set(found[CUDA].get("architectures", ()))
        return there and not lacking and found.get("sources") == PLAN.info["sources"]

    def compile(self):
        folder, settings = ROOT / "build/native", PLAN.settings()
        stamp = folder / "settings.json"
        if not stamp.exists() or json.loads(stamp.read_text()) != settings:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if "CMAKE_MAKE_PROGRAM" in settings else []
        subprocess.run(
            [PLAN.cmake, "-S", ROOT, "-B", folder, *generator, *(f"-D{k}={v}" for k, v in settings.items())], check=True
        )
        stamp.write_text(json.dumps(settings, indent=2))
        subprocess.run(
            [PLAN.cmake, "--build", folder, "--config", "Release", "--parallel", str(os.cpu_count() or 1)], check=True
        )
        return folder / "lib" if (folder / f"lib/libdeftx_cpu{SUFFIX}").exists() else folder / "lib/Release"

    def get_source_files(self):
        """For the sdist."""
        return [
            "CMakeLists.txt",
            *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "csrc").rglob("*")) if p.is_file()),
        ]

    def get_outputs(self):
        names = ["_build_info.json", *(f"libdeftx_{library}{SUFFIX}" for library in PLAN.wanted)]
        return [str(Path(self.build_lib) / PACKAGE / name) for name in names]

    def get_output_mapping(self):
        return {}


class Build(build):
    """`build`, from an empty build_lib: files of an earlier build that are gone from the sources must not reach the
    wheel.
    """

    sub_commands = (*build.sub_commands, ("build_native", None))

    def run(self):
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    """py3-none-<platform>: the libraries have no Python symbols, so one wheel serves every Python."""

    def get_tag(self):
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if PLAN.wanted else (python, abi, platform)


class BinaryDistribution(Distribution):
    def has_ext_modules(self):
        return bool(PLAN.wanted)


setup(distclass=BinaryDistribution, cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel})
