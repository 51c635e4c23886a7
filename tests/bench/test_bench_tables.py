"""Rows and the tables made of them: rows are only added, runs do not mix, a target tells what was measured and what was
not.
"""

import csv

import pytest

from bench import __main__ as program
from bench import rows as bench_rows
from bench import tables
from bench.families import SIZES
from bench.rows import COLUMNS, OURS, append, newest, package_of
from bench.targets import NOT_MEASURED, TARGETS, Target, measured, of_device, of_machine

OLD, NEW = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"


def row(**fields):
    usual = {"date": NEW, "op": "topk_mask", "provider": OURS, "backend": "c++", "size": "minilm", "dtype": "float32"}
    usual |= {
        "density": "0.05",
        "p20_ms": "0.9",
        "p50_ms": "1.0",
        "p80_ms": "1.2",
        "times_ours": "1.0",
        "share_of_floor": "0.5",
    }
    return (
        dict.fromkeys(COLUMNS, "") | usual | {"device": "here", "threads": "2", "torch": "2", "commit": "abc"} | fields
    )


# ---- rows ----


def test_rows_of_one_run_stand_side_by_side(tmp_path):
    append(
        [row(date=OLD, p50_ms="9"), row(date=OLD, provider="peer", times_ours="7"), row(date=OLD, provider="gone")],
        tmp_path / "topk.csv",
    )
    append([row(date=OLD, size="xlmr", p50_ms="5", commit="earlier")], tmp_path / "topk.csv")
    append([row(p50_ms="3"), row(provider="peer", times_ours="2")], tmp_path / "topk.csv")
    found = {(r["size"], r["provider"], r["p50_ms"]) for r in newest(tmp_path)}
    assert found == {("minilm", OURS, "3"), ("minilm", "peer", "1.0"), ("xlmr", OURS, "5")}


def test_rows_of_an_op_that_has_moved_to_an_earlier_file_are_history(tmp_path):
    append([row(date=OLD, p50_ms="9"), row(date=OLD, provider="gone")], tmp_path / "train.csv")
    append([row(p50_ms="3")], tmp_path / "masked.csv")
    assert [(r["provider"], r["p50_ms"]) for r in newest(tmp_path)] == [(OURS, "3")]


def test_works_timed_with_a_replaced_implementation_are_history(tmp_path):
    before = [row(date=OLD, size="xlmr", backend="reference"), row(date=OLD, size="xlmr", provider="peer", backend="")]
    append([*before, row(date=OLD, op="mask_or", size="xlmr", backend="c++")], tmp_path / "topk.csv")
    append([row(backend="c++"), row(provider="peer", backend="")], tmp_path / "topk.csv")
    found = {(r["op"], r["size"], r["provider"]) for r in newest(tmp_path)}
    assert found == {("topk_mask", "minilm", OURS), ("topk_mask", "minilm", "peer"), ("mask_or", "xlmr", OURS)}


def test_rows_of_an_older_header_stay(tmp_path):
    path = tmp_path / "csr.csv"
    path.write_text("date,op,provider\nlong ago,csr_gather,deftx\n")
    append([{"date": "today", "op": "csr_gather", "provider": "torch", "state_bytes_per_param": "8"}], path)
    append([{"date": "tomorrow", "op": "csr_gather"}], path)
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [tuple(r) for r in found] == [COLUMNS] * 3
    assert [(r["date"], r["provider"], r["state_bytes_per_param"]) for r in found] == [
        ("long ago", "deftx", ""), ("today", "torch", "8"), ("tomorrow", "", ""),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("provider", "package"),
    [
        ("numpy.take", "numpy"),
        ("PEFT LoRA", "peft"),
        ("scipy csr", "scipy"),
        ("torch index", ""),
        (OURS, ""),
        ("mask + torch", ""),
    ],
)
def test_package_of_a_provider(monkeypatch, provider, package):
    monkeypatch.setattr(bench_rows, "version", lambda name: "7.1")
    assert package_of(provider) == (f"{package} 7.1" if package else "")


# ---- training steps ----


def test_training_steps_of_each_model_stand_in_a_line():
    ours = row(op="training_step", size="bert, 8x128 tokens", p50_ms="1610", peak_extra_mb="1250")
    rows = [
        ours,
        ours | {"provider": "a", "times_ours": "1.274", "peak_extra_mb": "2187"},
        ours | {"provider": "b", "times_ours": ""},
    ]
    other = row(op="training_step", size="mini", p50_ms="200", peak_extra_mb="")
    cpu, gpu = tables.of_training([*rows, other, other | {"provider": "b", "times_ours": "3"}]).split("\n\n")
    assert cpu.splitlines() == [
        "| one step, CPU | ours | a | b |",
        "| --- | --- | --- | --- |",
        "| bert, 8x128 tokens, float32, 5 % | 1.61 s, 1.25 GB | 1.27 x, 2.19 GB | not measured |",
        "| mini, float32, 5 % | 200.0 ms | not measured | 3.00 x |",
    ]
    assert gpu == "GPU: not measured."


def test_training_steps_in_several_dtypes_do_not_mix():
    f32 = row(op="training_step", p50_ms="1000", parameters="2")
    bf16 = f32 | {"dtype": "bfloat16", "p50_ms": "500"}
    small = f32 | {"size": "small", "parameters": "1"}
    rows = [f32, bf16, small, f32 | {"provider": "a", "times_ours": "2"}, bf16 | {"provider": "a", "times_ours": "3"}]
    assert tables.of_training(rows).splitlines()[2:5] == [
        "| small, float32, 5 % | 1.00 s | not measured |",
        "| minilm, float32, 5 % | 1.00 s | 2.00 x |",
        "| minilm, bfloat16, 5 % | 500.0 ms | 3.00 x |",
    ]


# ---- targets ----

RATIO = Target("cpu", "the work", "topk_mask", "minilm", "float32", "0.05", 2.0, peer="peer")


@pytest.mark.parametrize(
    ("times", "verdict"), [("2.000", "2.00 x"), ("1.990", "**1.99 x, missed**"), ("31.4", "31.4 x")]
)
def test_ratio_target(times, verdict):
    rows = [row(), row(provider="peer", times_ours=times), row(provider="other", times_ours="9")]
    assert tables.verdict(RATIO, measured(RATIO, rows)) == verdict


@pytest.mark.parametrize(
    ("fields", "rows"),
    [
        ({}, []),
        ({}, [row()]),  # the peer was absent
        ({}, [row(density="0.01"), row(provider="peer", density="0.01", times_ours="3")]),
        ({}, [row(dtype="bfloat16"), row(provider="peer", dtype="bfloat16", times_ours="3")]),
        ({"quantity": "peak of the peer's"}, [row(peak_extra_mb="1"), row(provider="peer")]),
        ({"quantity": "peak of the input's", "peer": ""}, [row()]),
    ],
)
def test_what_was_not_measured_is_said_to_be_so(fields, rows):
    target = Target(**{**vars(RATIO), **fields})
    assert tables.verdict(target, measured(target, rows)) == NOT_MEASURED


@pytest.mark.parametrize(
    ("quantity", "bound", "ours", "value", "met"),
    [
        ("ms", 10, {"p50_ms": "9.5"}, 9.5, True),
        ("ms", 10, {"p50_ms": "10.5"}, 10.5, False),
        ("share of the floor", 0.7, {"share_of_floor": "0.71"}, 0.71, True),
        ("share of the floor", 0.7, {"share_of_floor": "0.69"}, 0.69, False),
        ("peak of the peer's", 0.4, {"peak_extra_mb": "40"}, 0.4, True),
        ("peak of the peer's", 0.4, {"peak_extra_mb": "41"}, 0.41, False),
        ("peak of the input's", 0.3, {"size": "10M", "peak_extra_mb": "12"}, 0.3, True),
        ("peak of the input's", 0.3, {"size": "10M", "peak_extra_mb": "13"}, 0.325, False),
    ],
)
def test_other_targets(quantity, bound, ours, value, met):
    target = Target(
        "cpu", "the work", "topk_mask", ours.get("size", "minilm"), "float32", "0.05", bound, quantity, "peer"
    )
    found = measured(target, [row(**ours), row(**ours | {"provider": "peer", "peak_extra_mb": "100"})])
    assert found == pytest.approx(value)
    assert target.met(found) == met
    assert ("missed" in tables.verdict(target, found)) == (not met)


def test_of_each_work_the_machine_that_timed_it_last_counts():
    cpus = [row(date=OLD, device="old Xeon"), row(device="new Xeon")]
    gpu = row(date=OLD, device="H200", driver="600.1")
    assert of_device([*cpus, gpu], "cpu") == cpus[1:]
    assert of_device([*cpus, gpu], "cuda") == [gpu]
    assert of_device(cpus, "cuda") == []
    others = [row(date=OLD, device="old Xeon", size=size) for size in ("a", "b")]
    assert of_device([*cpus, *others], "cpu") == [cpus[1], *others]
    assert of_machine([*cpus, gpu], "cpu") == cpus[1:]
    assert of_machine([*cpus, *others, gpu], "cpu") == [cpus[0], *others]
    assert of_machine(cpus, "cuda") == []


def test_targets_measured_on_several_machines_name_theirs():
    text = tables.of_targets([row(device="a Xeon", size="50M", density="0.05"), row(device="an EPYC", size="minilm")])
    line = next(line for line in text.splitlines() if "peak memory" in line)
    assert line.endswith("| a Xeon |")


def test_the_table_of_targets_has_every_target_and_no_gpu_figure_without_a_gpu():
    text = tables.of_targets([row()])
    cpu, gpu = text.split("GPU: not measured.")
    assert "here, 2 threads; torch 2; 2026-01-02; commit abc" in cpu
    lines = [line for line in gpu.splitlines() if line.startswith("|")][2:]
    assert len(lines) == sum(t.device == "cuda" for t in TARGETS)
    assert all(line.endswith(f"| {NOT_MEASURED} |") for line in lines)


def test_targets_name_works_and_providers_that_exist(monkeypatch):
    """Each CPU target's work is listed by its family, and its peer is one of that work's providers."""
    from bench.families import FAMILIES, works
    from bench.harness import Choice

    listed = {}
    for device in ("cpu", "cuda"):
        for family in FAMILIES:
            for work in works(family, Choice(device, SIZES)):
                listed[device, work.op, work.title, work.dtype_name, work.density_text] = work
    tiny = {}
    for target in TARGETS:
        key = (target.device, target.op, target.title, target.dtype, target.density)
        assert key in listed, f"no work for {target}"
        if target.peer and target.device == "cpu":
            case = tiny.setdefault(key, listed[key].tiny())
            assert target.peer in {*case.providers, *case.absent}, f"no such provider: {target}"


# ---- every work ----


def test_table_of_works():
    rows = [row(p50_ms="3"), row(provider="slow", times_ours="4.200"), row(provider="near", times_ours="1.100")]
    text = tables.of_works(rows)
    assert "## here\n\nhere, 2 threads; torch 2; 2026-01-02; commit abc.\n" in text
    assert "| minilm, float32, 5 % | 3.00 ms | 0.90 ms to 1.20 ms | 50% |  | near 1.100, slow 4.200 |" in text
    assert text.endswith("## GPU\n\nNot measured.\n")


def test_table_of_training_steps():
    ours = row(op="training_step", p50_ms="250", peak_extra_mb="1234.5", state_bytes_per_param="0.4")
    text = tables.of_works([ours, ours | {"provider": "peer", "times_ours": "2.000", "p50_ms": "500"}])
    assert "| 250.0 ms (4 steps/s, 0.40 B of state) |" in text
    assert "| 1234 MB | peer 2.000 (2 steps/s, 1234 MB, 0.40 B of state) |" in text


def test_tables_are_written_between_the_marks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text(f"before\n{program.BEGIN}\nold \\1\n{program.END}\nafter\n")
    append([row()], tmp_path / "rows/topk.csv")
    assert program.main(["table", "--out", str(tmp_path / "rows")]) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith(f"before\n{program.BEGIN}\nCPU: not measured.\n\nGPU: not measured.\n\nCPU: here")
    assert text.endswith(f"{program.END}\nafter\n")
    assert "old" not in text
    assert "### topk_mask" in (tmp_path / "rows/README.md").read_text()


def test_tables_without_rows_or_marks_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(SystemExit, match="no rows"):
        program.main(["table", "--out", str(tmp_path / "rows")])
    append([row()], tmp_path / "rows/topk.csv")
    with pytest.raises(SystemExit, match="has no <!-- bench:begin"):
        program.main(["table", "--out", str(tmp_path / "rows")])
    assert (tmp_path / "README.md").read_text() == "no marks"
