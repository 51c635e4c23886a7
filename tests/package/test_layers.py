"""The package's layers: imports and operator calls run one way, and files and functions stay small.

`python -m pytest tests/package/test_layers.py -s` prints the order of the floors.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "deftx_kernels"
MODULES = {
    p.relative_to(ROOT / PACKAGE).with_suffix("").as_posix().removesuffix("/__init__"): p
    for p in sorted((ROOT / PACKAGE).rglob("*.py"))
}

# From the top. A door (a folder or a file) may import the doors of lower floors only.
FLOORS = [
    ["cli"],
    ["train", "integrations", "doctor"],
    ["delta"],
    ["optim", "select"],
    ["nn", "denoise"],
    ["mask"],
    ["validation", "files", "ops"],
    ["kernels"],
]
FACES = {"__init__", "distributed", "interop"}
# What a door may import that is neither ours nor of the standard library. The driver may import what it likes.
CORE = {"torch", "numpy", "safetensors", "huggingface_hub"}
THIRD_PARTY = {
    **{door: {"torch"} for door in ("denoise", "nn", "ops", "select", "validation")},
    "optim": {"torch", "numpy"},
    "kernels": {"torch", "triton"},
    "delta": {*CORE, "fsspec", "scipy", "cupy", "cupyx"},
    "doctor": {"torch", "rich"},
    "integrations": {"torch", "huggingface_hub", "transformers"},
}
DRIVER = {"cli", "train"}
FLOOR = {door: i for i, doors in enumerate(FLOORS) for door in doors}

MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 60


def door(module: str) -> str:
    return module.split("/")[0]


def imports(source: str) -> set[str]:
    """Full dotted names of what a file imports, wherever the import stands: `a.b.c` for `from a.b import c`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{'.' * node.level}{node.module}.{a.name}" for a in node.names}
    return found


def attributes(source: str) -> list[str]:
    return [node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]


def own_module(name: str) -> str:
    """The file of the package that a dotted name of it is in: `delta/exact` for `deftx_kernels.delta.exact.sums`."""
    parts = name.split(".")[1:]
    while parts and "/".join(parts) not in MODULES:
        parts.pop()
    return "/".join(parts) or "__init__"


def faults(source: str, module: str) -> list[str]:
    own, found = door(module), []
    for name in sorted(imports(source)):
        top = name.split(".")[0]
        if not top:
            found.append(f"{module}: a relative import of {name}")
        elif top == PACKAGE:
            other = own_module(name)
            if other in FACES:
                if module not in FACES and name != f"{PACKAGE}.__version__":
                    found.append(f"{module} imports {name}: inside, each name is imported from its own door")
            elif module not in FACES and door(other) != own and FLOOR[door(other)] <= FLOOR[own]:
                found.append(f"{module} imports {name}, which is not below it")
            if re.fullmatch(r"_(?!_).*", name.rpartition(".")[2]):
                found.append(f"{module} imports {name}, a name of that file's own")
        elif top not in sys.stdlib_module_names and own not in DRIVER and top not in THIRD_PARTY.get(own, CORE):
            found.append(
                f"{module} imports {name}: {own} may import of others only {sorted(THIRD_PARTY.get(own, CORE))}"
            )
    if own in ("kernels", "ops") and "deftx" in attributes(source):
        found.append(f"{module} calls an operator: kernels and ops stand below the dispatcher")
    return found


def circles(edges: dict[str, set[str]]) -> list[str]:
    """The files that import each other, directly or by way of others."""
    left = {k: v & edges.keys() for k, v in edges.items()}
    while left:
        free = {k for k, v in left.items() if not v & left.keys()}
        if not free:
            return sorted(left)
        left = {k: v for k, v in left.items() if k not in free}
    return []


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_one_way(module):
    assert door(module) in FLOOR or module in FACES, f"{module} has no floor: add its door to FLOORS"
    assert not faults(MODULES[module].read_text(), module)


@pytest.mark.parametrize("face", sorted(FACES))
def test_faces_hold_names_only(face):
    body = ast.parse(MODULES[face].read_text()).body
    assert not [ast.unparse(n) for n in body if not isinstance(n, ast.ImportFrom | ast.Assign | ast.Expr)]


def test_no_two_files_import_each_other():
    edges = {
        m: {own_module(n) for n in imports(p.read_text()) if n.startswith(f"{PACKAGE}.")} - {m}
        for m, p in MODULES.items()
    }
    folders = {m for m, p in MODULES.items() if p.name == "__init__.py"}
    assert not circles({m: e for m, e in edges.items() if m not in folders})
    assert not circles(edges)
    print("\n" + "\n  → ".join(", ".join(doors) for doors in FLOORS))


def test_top_level_has_no_private_modules_and_few_floors():
    assert not [m for m in MODULES if door(m).startswith("_") and m != "__init__"]
    assert len(FLOORS) <= 8


def test_compiled_operators_are_those_of_the_schemas():
    from deftx_kernels.ops.schemas import SCHEMAS

    for folder in ("cpu", "cuda"):
        text = "".join(p.read_text() for p in (ROOT / "csrc" / folder).glob("*.c*"))
        names = set(re.findall(r'm\.impl\(\s*"(\w+)"', text))
        assert names
        assert not names - SCHEMAS.keys()


@pytest.mark.parametrize("folder", [PACKAGE, "bench", "tests"])
def test_files_and_functions_are_short(folder):
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        source = path.read_text()
        if (lines := source.count("\n")) > MAX_FILE_LINES:
            found.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not is_kernel(node):
                length = node.end_lineno - node.lineno + 1 - docstring_lines(node)
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert not found, "\n".join(found)


def is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(d) for d in node.decorator_list)


def docstring_lines(node: ast.FunctionDef) -> int:
    first = node.body[0]
    return first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("denoise/x", "from deftx_kernels.select import topk_mask"),
        ("nn/x", "from deftx_kernels.optim import SparseAdamW"),
        ("mask", "def f():\n    from deftx_kernels.select import topk_mask"),
        ("select/x", "from deftx_kernels.optim import sparse_adamw"),
        ("kernels/x", "from deftx_kernels.ops import schemas"),
        ("kernels/x", "import numpy"),
        ("delta/x", "def f():\n    import transformers"),
        ("delta/x", "from deftx_kernels.integrations import get_sparse_model"),
        ("train/x", "from deftx_kernels.integrations import get_sparse_model"),
        ("optim/x", "from deftx_kernels import CSRMask"),
        ("ops/x", "from deftx_kernels.mask import CSRMask"),
        ("optim/x", "from deftx_kernels.nn.entries import _Entry"),
        ("optim/x", "from ..nn import sparsify"),
        ("kernels/x", "def f(x):\n    return torch.ops.deftx.csr_gather(x)"),
        ("ops/x", "from torch import ops\ny = ops.deftx"),
    ],
)
def test_a_forbidden_import_or_call_is_found(module, source):
    assert len(faults(source, module)) == 1


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c", "d"]
