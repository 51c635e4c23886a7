"""The counts in machine code, on code written by hand, and the comparison with the committed table."""

import csv
import re

import machine_code
import machine_code_table
import pytest
from machine_code import Count, Instruction

# A loop over vectors with a rare case in it, scalar loads for the tail, and an inner loop that loads little.
CODE = """
0000 MOV R1, c[0x0][0x28]
0010 @P0 BRA 0x0100
0020 LDG.E.128 R4, [R2.64]
0030 LDG.E.128.CONSTANT R8, [R2.64]
0040 @!P1 BRA 0x0070
0050 STS [R20], R4
0060 BAR.SYNC.DEFER_BLOCKING 0x0
0070 LDG.E.U16 R12, [R6.64]
0080 @P2 BRA 0x0070
0090 STG.E [R2.64], R4
00a0 BRA.DIV UR8, 0x0140
00b0 @P0 BRA 0x0020
00c0 BRA P1, 0x00e0
00d0 MOV R1, R2
00e0 EXIT
0100 LDG.E.U8 R4, [R2.64]
0110 STG.E.U8 [R2.64], R4
0120 @P0 BRA 0x0100
0130 BRA 0x00e0
0140 SHFL.IDX R1, R2, R3, R4
0150 RET.REL.NODEC R2 0x0
"""


def code(text):
    lines = re.findall(r"^(\w{4}) (@!?\w+ )?(\S+) ?(.*)$", text, re.M)
    return [Instruction(int(at, 16), bool(predicate), opcode, rest) for at, predicate, opcode, rest in lines]


def test_the_main_path():
    assert machine_code.analyse(code(CODE), 128).main.wide == 2  # by instructions, the inner loop
    found = machine_code.analyse(code(CODE), 128, streaming=True)
    assert (found.loop, found.threads, found.instructions) == (True, 128, 21)
    # Two loads of 16 bytes, not the rare case; one iteration of the inner loop.
    assert found.main == Count(wide=32, bytes=38, instructions=8, shared=0, barriers=0)
    assert found.longest == 10
    expected = (32 * 32 / machine_code.BANDWIDTH) / (8 / machine_code.ISSUE)
    assert found.bandwidth_share == min(1, expected)


def test_loops():
    flow = machine_code.ControlFlow(code(CODE))
    loops = {loop.header: sorted(loop.blocks) for loop in flow.loops}
    inner, tail = [0x70], [0x100]
    assert loops == {0x20: [at for at in flow.blocks if 0x20 <= at < 0xC0], 0x70: inner, 0x100: tail}
    assert 0x140 not in {to for after in flow.next.values() for to in after}  # the branch for diverged lanes


def test_without_a_loop():
    text = "0000 LDG.E R4, [R2.64]\n0010 @P0 BRA 0x0040\n0020 FADD R4, R4, R5\n0030 LDS R1, [R4]\n"
    found = machine_code.analyse(code(text + "0040 STG.E [R2.64], R4\n0050 EXIT"), 32)
    assert not found.loop
    assert found.main == Count(wide=8, bytes=8, instructions=4, shared=0, barriers=0)
    assert found.longest == 6


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDG.E.128.CONSTANT", 16), ("STG.E.64", 8), ("LDG.E", 4), ("LDG.E.U16", 2), ("LD.E.S8", 1), ("REDG.E.ADD", 4),
        ("LDGSTS.E.BYPASS.128", 16), ("LDS.128", 0), ("FADD", 0),
    ],
)  # fmt: skip
def test_bytes(opcode, size):
    assert Instruction(0, False, opcode, "").bytes == size


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "warps"),
    [(256, 32, 0, 64), (256, 80, 0, 24), (1024, 64, 0, 32), (128, 255, 0, 8), (256, 32, 112 << 10, 16), (32, 9, 0, 32)],
)
def test_occupancy(threads, registers, shared, warps):
    assert machine_code.occupancy(90, threads, registers, shared) == warps


# ---- the committed table ----
@pytest.fixture
def rows():
    with machine_code_table.TABLE.open(newline="") as file:
        file.readline()
        return list(csv.DictReader(file))[:3]


@pytest.fixture(autouse=True)
def same_compilers(monkeypatch):
    with machine_code_table.TABLE.open() as file:
        made_with = file.readline().removeprefix("# ").strip()
    monkeypatch.setattr(machine_code_table, "toolchain", lambda: made_with)


def test_an_equal_table_is_no_fault(rows):
    assert not list(machine_code_table.worse_than_table(rows))


@pytest.mark.parametrize(("name", "factor"), [("instructions", 1.06), ("shared_accesses", 1.06), ("warps", 0.94)])
def test_worse_is_a_fault(rows, name, factor, monkeypatch, tmp_path):
    monkeypatch.setattr(machine_code_table, "TABLE", tmp_path / "table.csv")
    rows[1][name] = 10.0
    machine_code_table.write_table(rows)
    changed = [dict(row) for row in rows]
    changed[1][name] = 10 * factor
    (fault,) = machine_code_table.worse_than_table(changed)
    assert rows[1]["variant"] in fault
    assert name in fault
    changed[1][name] = 10 / factor
    assert not list(machine_code_table.worse_than_table(changed))
    changed[1][name] = 10 * (1 + (factor - 1) / 2)
    assert not list(machine_code_table.worse_than_table(changed))


def test_a_new_kernel_is_a_fault(rows):
    (fault,) = machine_code_table.worse_than_table([rows[0] | {"variant": "another"}])
    assert "not in machine_code.csv" in fault


def test_other_compilers_are_not_compared(rows, monkeypatch, capsys):
    monkeypatch.setattr(machine_code_table, "toolchain", lambda: "nvcc 99.0.1, triton 9.9.9")
    assert not list(machine_code_table.worse_than_table([rows[0] | {"instructions": 1e9}]))
    assert "Not compared" in capsys.readouterr().out
