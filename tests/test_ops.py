"""torch.library.opcheck on every operator: schema, fake kernel, and what the dispatcher makes of them."""

import pytest
import torch

from deftx_kernels import _ops, doctor


@pytest.mark.parametrize("op", _ops.SCHEMAS)
def test_opcheck(op):
    arguments = [doctor._moved(a, "cpu") for a in doctor._CASES[op]()]
    tests = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
    if op == "topk_mask":  # the number of columns in each row is in the data, and so is crow_indices; shapes are not
        tests = tests[:3]
    torch.library.opcheck(getattr(torch.ops.deftx, op).default, tuple(arguments), test_utils=tests)


def test_every_schema_has_an_oracle_and_a_case():
    from deftx_kernels import reference

    assert all(callable(getattr(reference, op)) for op in _ops.SCHEMAS)
    assert doctor._CASES.keys() == _ops.SCHEMAS.keys()


def test_doctor_finds_every_op_correct_and_a_wrong_one_wrong(monkeypatch):
    rows = doctor.run("cpu", repeats=1)
    assert {r.op for r in rows} == set(_ops.SCHEMAS)
    assert all(r.correct for r in rows), [r for r in rows if not r.correct]
    right = doctor.reference.csr_gather
    monkeypatch.setattr(doctor.reference, "csr_gather", lambda *a: right(*a) * (1 + 1e-3))
    assert not all(r.correct for r in doctor.run("cpu", repeats=1) if r.op == "csr_gather")
    with pytest.raises(ValueError, match="device must be one of"):
        doctor.run("tpu")
