"""Imports run one way (CONTRIBUTING.md, the map of the house): read from the sources, wherever in a file an import
stands.
"""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = "deftx_kernels"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE
MODULES = {
    p.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__"): p for p in sorted(ROOT.rglob("*.py"))
}

# Layer -> the layers and modules that it may import, besides modules of its own folder. A layer is a module or a
# folder.
MIDDLE = {"delta", "nn", "optim", "interop", "doctor", "distributed"}
BASE = {"functional", "_checks", "_denoising", "_masked", "_selection", "mask", "_ops"}
ALLOWED = {
    "cli": {"train", *MIDDLE, *BASE, "_library", PACKAGE},
    "train": {"files", *MIDDLE, *BASE, PACKAGE},
    "distributed": {*MIDDLE, *BASE},
    "optim": {"nn", "_buckets", *BASE},
    "_buckets": {"functional", "_checks", "mask"},
    "delta": {"nn", "files", *BASE},
    "interop": {"delta", "files", *BASE},
    "nn": BASE,
    "doctor": {"_library", "_ops", "reference", "functional", "mask"},
    "functional": {"_checks", "_denoising", "_masked", "_selection", "mask", "_ops"},
    "_denoising": {"_checks"},
    "_masked": {"mask"},
    "_selection": {"_ops"},
    "_checks": set(),
    "mask": {"_checks", "files", "_ops"},
    "files": set(),
    "_ops": set(),
    "reference": {"_ops"},
    "_op_checks": set(),
    "_library": {"_ops"},
    "backends": {"_ops", "_op_checks", "_library", "kernels", "reference"},
    "kernels": {"_ops"},
    PACKAGE: {"_library", "backends", *MIDDLE, *BASE},  # __init__.py
}
# Layer -> every package it may import that is not of the standard library. The driver may import what it likes.
THIRD_PARTY = {
    "kernels": {"torch", "triton"},
    "reference": {"torch"},
    "_op_checks": {"torch"},
    "_ops": {"torch"},
    "functional": {"torch"},
    "_checks": {"torch"},
    "_selection": {"torch"},
    "_denoising": {"torch"},
    "_masked": {"torch"},
    "_buckets": {"torch"},
    "interop": {"torch", "numpy", "safetensors", "scipy", "cupy", "cupyx"},
    "doctor": {"torch", "rich"},
}
CORE = {"torch", "numpy", "safetensors", "huggingface_hub"}
DRIVER = {"cli", "train"}


def imports(source: str, module: str) -> set[str]:
    """Full dotted names of what a file imports: `a.b.c` for `from a.b import c`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def layer(name: str) -> str:
    """The layer of a dotted name inside the package."""
    first = name.removeprefix(PACKAGE).lstrip(".").split(".")[0]
    return first if any(m.split("/")[0] == first for m in MODULES) else PACKAGE


def faults(source: str, module: str) -> list[str]:
    own = module.split("/")[0] if module != "__init__" else PACKAGE
    found = []
    for name in sorted(imports(source, module)):
        top = name.split(".")[0]
        if top == PACKAGE:
            if layer(name) not in ALLOWED[own] | {own}:
                found.append(f"{module} imports {name}: {own} may import of the package only {sorted(ALLOWED[own])}")
        elif top not in sys.stdlib_module_names and own not in DRIVER and top not in THIRD_PARTY.get(own, CORE):
            found.append(
                f"{module} imports {name}: {own} may import of others only {sorted(THIRD_PARTY.get(own, CORE))}"
            )
    return found


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert module.split("/")[0] in ALLOWED or module == "__init__", (
        f"{module} has no place in the map: add it to ALLOWED"
    )
    assert not faults(MODULES[module].read_text(), module)


def test_the_map_has_no_circle():
    """Every layer can be put after all that it imports, the package's own name aside (only its top may import it)."""
    left = {k: v - {PACKAGE} for k, v in ALLOWED.items() if k != PACKAGE}
    left["distributed"] = left["distributed"] - {"distributed"}
    while left:
        free = {k for k, v in left.items() if not v & left.keys()}
        assert free, f"a circle among {sorted(left)}"
        left = {k: v for k, v in left.items() if k not in free}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("functional", "from deftx_kernels import reference"),
        ("functional", "import deftx_kernels.backends.triton"),
        ("nn", "from deftx_kernels.optim import SparseAdamW"),
        ("mask", "def f():\n    from deftx_kernels.functional import topk_mask"),
        ("kernels/x", "from deftx_kernels import reference"),
        ("kernels/x", "import numpy"),
        ("delta", "def f():\n    import transformers"),
        ("optim", "import deftx_kernels"),
        ("reference", "from deftx_kernels import mask"),
        ("backends/x", "from deftx_kernels.functional import topk_mask"),
    ],
)
def test_a_forbidden_import_is_found(module, source):
    assert len(faults(source, module)) == 1
