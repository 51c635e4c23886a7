"""torch.library.opcheck on every operator (schema, fake kernel, dispatch), and the doctor."""

import pytest
import torch

from deftx_kernels import doctor
from deftx_kernels.ops import schemas

SMALL = 64  # the doctor's cases, for layers of this width


@pytest.mark.parametrize("op", schemas.SCHEMAS)
def test_opcheck(op):
    arguments = [doctor.moved(a, "cpu") for a in doctor.CASES[op](SMALL)]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    if op == "topk_mask":  # the number of columns in each row is in the data, and so is crow_indices; shapes are not
        tests = tests[:3]
    torch.library.opcheck(getattr(torch.ops.deftx, op).default, tuple(arguments), test_utils=tests)


def test_every_schema_has_an_oracle_and_a_case():
    from deftx_kernels.ops import reference

    assert all(callable(getattr(reference, op)) for op in schemas.SCHEMAS)
    assert doctor.CASES.keys() == schemas.SCHEMAS.keys() | {"truncated_svd", "svd_denoise"}


def test_the_order_of_the_arguments_of_an_adamw_step():
    names = [a.name for a in torch.ops.deftx.sparse_adamw_.default._schema.arguments]
    assert names == list(schemas.AdamWArgs._fields)


def test_doctor_finds_every_op_correct_and_a_wrong_one_wrong(monkeypatch):
    rows = doctor.run("cpu", repeats=1, width=SMALL)
    assert {r.op for r in rows} == set(doctor.CASES)
    assert all(r.correct for r in rows), [r for r in rows if not r.correct]
    right = doctor.reference.csr_gather
    monkeypatch.setattr(doctor.reference, "csr_gather", lambda *a: right(*a) * (1 + 1e-3))
    assert not all(r.correct for r in doctor.run("cpu", repeats=1, width=SMALL, names=["csr_gather"]))
    with pytest.raises(ValueError, match="device must be one of"):
        doctor.run("tpu")


@pytest.fixture
def serving():
    """serving("eigh", ...): whether each row of the serving implementation is correct."""
    before = torch.get_num_threads()

    def check(*names: str, threads: int = 1, width: int = doctor.WIDTH) -> dict[str, bool]:
        torch.set_num_threads(threads)
        rows = doctor.run("cpu", repeats=1, width=width, names=list(names))
        assert torch.get_num_threads() == threads
        return {r.op: r.correct for r in rows if r.serves}

    yield check
    torch.set_num_threads(before)


@pytest.mark.multithreaded
def test_doctor_checks_real_layers_with_the_callers_threads(serving, monkeypatch):
    """An eigensolver that is wrong for several matrices of 640 rows and more on several threads, as MKL's was on some
    CPUs.
    """
    right = torch.ops.deftx.eigh
    seen = set()

    def wrong(matrices, *rule):
        values, vectors = right(matrices, *rule)
        seen.add((torch.get_num_threads(), *matrices.shape))
        if torch.get_num_threads() > 1 and matrices.shape[0] > 1 and matrices.shape[-1] >= 640:
            vectors = vectors.clone()
            vectors[-1, :, 0] = vectors[-1, :, 1]
            values = values.flip(-1)
        return values, vectors

    monkeypatch.setattr(torch.ops.deftx, "eigh", wrong)
    ops = ("eigh", "svd_denoise", "csr_gather")
    assert serving(*ops, threads=2, width=SMALL) == dict.fromkeys(ops, True)
    with pytest.warns(RuntimeWarning, match="failed the check"):  # which denoising makes: its own result is right
        assert serving(*ops, threads=2) == {"eigh": False, "svd_denoise": True, "csr_gather": True}
    assert (2, 3, 768, 768) in seen


@pytest.mark.parametrize("wrong_call", [1, 2])
def test_doctor_compares_the_first_call_and_a_later_one(serving, monkeypatch, wrong_call):
    right, calls = torch.ops.deftx.csr_scatter_, []

    def wrong(tensors, crow, col, values):
        calls.append(1)
        right(tensors, crow, col, values * (2 if len(calls) == wrong_call else 1))

    monkeypatch.setattr(torch.ops.deftx, "csr_scatter_", wrong)
    assert serving("csr_scatter_", width=SMALL) == {"csr_scatter_": False}
    assert len(calls) == 2


@pytest.mark.parametrize("what", ["values", "vectors"])
def test_doctor_proves_its_own_eigenvectors(serving, monkeypatch, what):
    right = torch.linalg.eigh

    def wrong(matrices):
        values, vectors = right(matrices)
        if matrices.dtype == torch.float64 and what == "values":
            values = values + 1e-6 * values.abs().max()
        elif matrices.dtype == torch.float64:
            vectors = vectors.roll(1, -1)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", wrong)
    ops = ("eigh", "eigvalsh", "truncated_svd", "svd_denoise")
    assert serving(*ops, width=SMALL) == dict.fromkeys(ops, False)
    notes = {r.note.partition(",")[0] for r in doctor.run("cpu", repeats=1, width=SMALL, names=list(ops))}
    assert notes == {"torch.linalg.eigh in float64 is wrong on this machine"}
