"""backends(), and what happens when a compiled library is missing or cannot be loaded."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import deftx_kernels
from deftx_kernels.denoise import decompositions
from deftx_kernels.ops import library, reference, registrations, schemas


def test_every_op_is_served_and_every_other_implementation_has_a_reason():
    table = deftx_kernels.backends()
    assert list(table) == list(schemas.SCHEMAS)
    for devices in table.values():
        assert list(devices) == ["cpu", "cuda"]
        for device, backend in devices.items():
            known = {"c++", "reference"} if device == "cpu" else {"cuda", "triton", "reference"}
            assert {backend.name, *backend.others} == known
            assert backend.name not in backend.others
            assert all(backend.others.values())


def test_the_table_is_what_the_dispatcher_runs():
    tensors, crow, col = (
        [torch.arange(6.0).view(2, 3)],
        torch.tensor([0, 1, 2]),
        torch.tensor([2, 0], dtype=torch.uint16),
    )
    assert torch.ops.deftx.csr_gather(tensors, crow, col).tolist() == [2.0, 3.0]
    with torch.profiler.profile() as profile:
        torch.ops.deftx.csr_gather(tensors, crow, col)
    # only the reference is made of torch's own ops
    plain = any(event.key == "aten::index" for event in profile.key_averages())
    assert plain == (library.backends()["csr_gather"]["cpu"].name == "reference")


def test_python_backends_are_listed(monkeypatch):
    monkeypatch.setattr(library, "_registered", {})
    monkeypatch.setattr(library, "_absent", {})
    monkeypatch.setattr(
        library,
        "_has_kernel",
        lambda op, key: (op, key) == ("topk_mask", "CUDA") or key == "CompositeExplicitAutograd",
    )
    library.register("topk_mask", "cuda", "triton")
    library.absent("triton", "triton was not found")
    table = library.backends()
    assert table["topk_mask"]["cuda"].name == "triton"
    assert table["topk_mask"]["cuda"].others["reference"] == "triton takes precedence"
    assert table["eigh"]["cuda"].others["triton"] == "triton was not found"
    with pytest.raises(ValueError, match="no_op"):
        library.register("no_op", "cuda", "triton")
    with pytest.raises(ValueError, match="tpu"):
        library.register("topk_mask", "tpu", "triton")


# ---- limits: what runs where a condition holds, seen by what is called ----
def test_limits_belong_to_the_serving_implementation(monkeypatch):
    assert {op for op, _ in library.LIMITS} == {
        "eigh",
        "eigvalsh",
        "residual_cut",
        "low_rank_denoised",
        "masked_linear_grad",
    }
    table = deftx_kernels.backends()
    for op, devices in table.items():
        for backend in devices.values():
            assert backend.limits == library.LIMITS.get((op, backend.name), {})
    monkeypatch.setattr(library, "_serving", lambda op, device: "triton")
    assert library.backends()["residual_cut"]["cuda"].limits == {"float64": "reference"}
    monkeypatch.setattr(library, "_serving", lambda op, device: "cuda")
    assert library.backends()["eigh"]["cuda"].limits == {f"more than {library.MAX_EIGH_ROWS} rows": "torch.linalg"}


@pytest.mark.parametrize("op", ["eigh", "eigvalsh"])
@pytest.mark.parametrize("rows", [library.MAX_EIGH_ROWS, library.MAX_EIGH_ROWS + 1])
def test_limit_of_rows(monkeypatch, op, rows):
    """Of matrices on a GPU, for which anything with their shape stands here."""
    called = []
    monkeypatch.setattr(torch.ops.deftx, op, lambda a: called.append("deftx") or (a, a))
    monkeypatch.setattr(torch.linalg, op, lambda a: called.append("torch.linalg") or (a, a))
    monkeypatch.setattr(decompositions, "_checked", lambda matrices, found, *rest: found)
    getattr(decompositions, op)(SimpleNamespace(is_cuda=True, shape=(1, rows, rows)))
    instead = library.LIMITS[op, "cuda"][f"more than {library.MAX_EIGH_ROWS} rows"]
    assert called == [instead if rows > library.MAX_EIGH_ROWS else "deftx"]


@pytest.mark.parametrize("op", ["residual_cut", "low_rank_denoised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_limit_of_dtypes(monkeypatch, op, dtype):
    pytest.importorskip("triton")
    from deftx_kernels.kernels import low_rank

    called = []
    monkeypatch.setattr(low_rank, op, lambda *arguments: called.append("triton"))
    monkeypatch.setattr(reference, op, lambda *arguments: called.append("reference"))
    factors = [torch.ones(shape, dtype=dtype) for shape in ((2, 3, 4), (2, 3, 1), (2, 4, 1))]
    last = 3 if op == "residual_cut" else torch.zeros(2, 2, dtype=torch.int64)
    registrations.triton_kernels()[op](*factors, last)
    assert called == [library.LIMITS[op, "triton"]["float64"] if dtype == torch.float64 else "triton"]


@pytest.mark.parametrize("density", [0.19, 0.21])
def test_limit_of_density(density):
    if library.backends()["masked_linear_grad"]["cpu"].name != "c++":
        pytest.skip("a limit of the C++ kernel")
    nnz = round(density * 100)
    crow, col = torch.arange(101) * nnz, torch.arange(nnz).repeat(100).to(torch.uint16)
    with torch.profiler.profile() as profile:
        torch.ops.deftx.masked_linear_grad(torch.ones(8, 100), torch.ones(8, 100), crow, col, torch.float32)
    called = {event.key.replace("aten::", "torch.") for event in profile.key_averages()}
    assert (library.LIMITS["masked_linear_grad", "c++"]["density above 0.2"] in called) == (density > 0.2)


@pytest.mark.parametrize("tokens", [2047, 2048])
def test_limit_of_strips(monkeypatch, tokens):
    """On a device of one multiprocessor, as which the CPU counts."""
    pytest.importorskip("triton")
    from deftx_kernels.kernels import masked_linear_grad, product_strips

    called = []
    monkeypatch.setattr(masked_linear_grad, "gather_by_strips", lambda *arguments: called.append("torch.mm"))
    monkeypatch.setattr(masked_linear_grad, "_launch", lambda *arguments: called.append("triton"))
    x = torch.ones(tokens, 256, dtype=torch.bfloat16)
    crow, col = torch.arange(257), torch.zeros(256, dtype=torch.uint16)
    registrations.triton_kernels()["masked_linear_grad"](x, x, crow, col, torch.float32)
    ((condition, instead),) = library.LIMITS["masked_linear_grad", "triton"].items()
    assert called == [instead if tokens >= 2048 else "triton"]
    (_, half), (_, tf32), (_, single), (_, double) = product_strips.TILES.values()
    assert half == tf32 == 2048
    assert f"2048 tokens (float32 without TF32: {single}, float64: {double})" in condition
    assert f"density 1/{product_strips.SPARSEST}" in condition


@pytest.mark.skipif(bool(torch.version.cuda), reason="about a torch without CUDA")
def test_without_cuda_the_reason_says_so():
    assert library.errors["cuda"] == "not loaded: this torch has no CUDA"
    assert deftx_kernels.backends()["csr_gather"]["cuda"].others["cuda"] == "not loaded: this torch has no CUDA"


def test_a_gpu_that_is_too_old_is_served_by_nothing(monkeypatch):
    op = "csr_gather"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((9, 0), (7, 5))[index])
    monkeypatch.setattr(library, "_serving", lambda op, device: {"cpu": "c++", "cuda": "cuda"}[device])
    served = library.backends()[op]
    assert served["cuda"].name == "none"
    assert served["cuda"].others["cuda"] == "needs compute capability 8.0 or newer: cuda:1 (GPU 1) has 7.5"
    assert served["cpu"].name == "c++"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 6))
    assert library.backends()[op]["cuda"].name == "cuda"


def fresh(monkeypatch, folder: Path):
    monkeypatch.setattr(library, "_FOLDER", folder)
    monkeypatch.setattr(library, "_loaded", False)
    monkeypatch.setattr(library, "errors", {})


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        (None, "source tree"),
        ({"cpu": {"built": False, "reason": "no C++ compiler was found"}}, "not built: no C[+][+] compiler was found"),
    ],
)
def test_a_missing_library_warns_once(monkeypatch, tmp_path, info, reason, recwarn):
    fresh(monkeypatch, tmp_path)
    if info:
        (tmp_path / "_build_info.json").write_text(json.dumps(info))
    with pytest.warns(RuntimeWarning, match=f"cpu library is missing .*{reason}.* pip install"):
        library.load()
    recwarn.clear()
    library.load()
    assert not recwarn.list


def test_a_library_that_cannot_be_loaded_says_why(monkeypatch, tmp_path):
    fresh(monkeypatch, tmp_path)
    (tmp_path / f"libdeftx_cpu{library._SUFFIX}").write_bytes(b"not a library")
    (tmp_path / "_build_info.json").write_text(
        json.dumps({"torch": "2.99", "cpu": {"built": True, "compiler": "g++ 99"}})
    )
    with pytest.warns(
        RuntimeWarning, match=r"failed to load: .*built with g\+\+ 99 against torch 2\.99; this is torch 2\."
    ):
        library.load()
    assert "failed to load" in library.errors["cpu"]
    assert str(tmp_path) not in library.errors["cpu"]


def test_import_is_quiet_where_nothing_is_missing():
    """And loads no second copy, whatever imports the package first."""
    if "cpu" in library.errors or (torch.version.cuda and "cuda" in library.errors):
        pytest.skip("a library is missing here")
    script = (
        "import deftx_kernels, importlib, deftx_kernels.ops.library as l; l.load(); l.load(); print(sorted(l.errors))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ("[]" if torch.version.cuda else "['cuda']")
