"""The model of memory and communication: its models' shapes, its agreement with what two processes sent and held, and
the table and figure made from it.
"""

import csv

import pytest

from bench import bench_distributed as family
from bench import scale
from bench.rows import RESULTS, by_workload, newest

RANKS = family.WORLD
EXACT = 1e-4  # relative
# How many of a mask's entries are in the first rank's rows, and how many values of others are sent, is chance.
CHANCE = {"state": 0.01, "mask": 0.01}
CHANCES = {family.OURS_FSDP2: CHANCE, family.SPARSIFIED_FSDP2: CHANCE | {"sent": 0.001, "gradient": 0.001}}
HEADERS = {"wire": 0.005}  # of gloo's messages
MEASURED = by_workload(row for row in newest(RESULTS) if row["op"] in family.OPS)


@pytest.mark.parametrize(
    ("model", "parameters"),
    list(zip(scale.LLAMAS, (8_030_261_248, 70_553_706_496, 405_853_388_800))),
    ids=("8B", "70B", "405B"),
)
def test_parameters(model, parameters):
    assert model.numel() == parameters


@pytest.mark.parametrize("workload", MEASURED, ids=" ".join)
def test_bytes_of_two_processes(workload):
    rows, model = MEASURED[workload], scale.step_model(workload[1].partition(",")[0])
    assert rows.keys() == family.COSTS.keys()
    for name, row in rows.items():
        assert int(row["parameters"]) == model.numel()
        cost = family.COSTS[name](model, float(row["density"]))
        expected = {"sent": cost.traffic.sent(RANKS), "wire": cost.traffic.sent_by_gloo(RANKS)}
        expected |= {what: cost.memory[what] for what in ("weight", "gradient", "state")}
        expected["mask"] = cost.memory.get("mask", 0) + cost.memory.get("host_mask", 0)
        tolerances = HEADERS | CHANCES.get(name, {})
        for what, size in expected.items():
            found = model.numel() * float(row[f"{what}_bytes_per_param"])
            assert found == pytest.approx(size, rel=tolerances.get(what, EXACT), abs=model.numel() * 1e-6), (name, what)


def test_rows_measured():
    assert {(size.partition(",")[0], density) for _, size, _, density in MEASURED} == {
        ("minilm", "0.05"),
        ("minilm", "0.01"),
        ("xlmr", "0.05"),
    }


def test_committed_table():
    with (RESULTS / "scale.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert found == [dict.fromkeys(scale.COLUMNS, "") | {k: str(v) for k, v in row.items()} for row in scale.table()]


def test_small_tensors_count_one_row_for_each_rank():
    wide = scale.Model("wide", 1, (scale.Parameter((3, 10)),))
    assert [scale.dense_fsdp2(wide, n).memory["weight"] for n in (1, 2, 3, 8)] == [120, 80, 40, 40]
    assert [scale.dense_fsdp2(wide, n).traffic.reduce_scatter for n in (1, 2, 3, 8)] == [120, 160, 120, 320]


def test_command(tmp_path, monkeypatch):
    from bench import __main__ as program

    monkeypatch.setattr(scale, "LLAMAS", scale.LLAMAS[:2])
    assert program.main(["scale", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "scale.csv").read_text().count("\n") == 1 + 2 * len(list(scale.methods())) * len(scale.GPUS)
    assert (tmp_path / "scale.png").stat().st_size > 10_000


@pytest.mark.parametrize(("size", "text"), [(80e9, "80 GB"), (1e12, "1 TB"), (3, "3 B"), (0, "0 B")])
def test_readable(size, text):
    assert scale.readable(size) == text
