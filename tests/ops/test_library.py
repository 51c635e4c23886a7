"""backends(), and what happens when a compiled library is missing or cannot be loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deftx_kernels
from deftx_kernels.ops import library, schemas


def test_every_op_is_served_and_every_other_implementation_has_a_reason():
    table = deftx_kernels.backends()
    assert list(table) == list(schemas.SCHEMAS)
    for op, devices in table.items():
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
    assert table["topk_mask"]["cuda"].others["reference"] == "triton comes first"
    assert table["eigh"]["cuda"].others["triton"] == "triton was not found"
    with pytest.raises(ValueError, match="no_op"):
        library.register("no_op", "cuda", "triton")
    with pytest.raises(ValueError, match="tpu"):
        library.register("topk_mask", "tpu", "triton")


@pytest.mark.skipif(bool(torch.version.cuda), reason="about a torch without CUDA")
def test_without_cuda_the_reason_says_so():
    assert library.errors["cuda"] == "not loaded: this torch has no CUDA"
    assert deftx_kernels.backends()["csr_gather"]["cuda"].others["cuda"] == "not loaded: this torch has no CUDA"


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
