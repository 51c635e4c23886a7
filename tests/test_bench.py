"""The benchmark at its smallest size: every family runs, a wrong provider is told, rows of different runs do not mix."""

import csv

import pytest
import torch

from bench import __main__ as program
from bench import bench_steps, bench_topk, harness, shapes
from bench.harness import COLUMNS, OURS, fresh_peak, peak_extra
from deftx_kernels import CSRMask, SparseAdamW, sparsify, topk_mask

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OPS = {
    "csr": {"csr_gather", "csr_scatter_", "csr_add_"},
    "topk": {"topk_mask", "select_mask", "mask_or", "mask_and", "mask_sub"},
    "svd": {"svd_denoise", "truncated_svd", "select_mask"},
    "train": {"sparse_adamw", "optimizer_step"},
    "masked": {"masked_linear_grad", "masked_embedding_grad"},
    "steps": {"training_step"},
}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the program on the tiny size: (exit status, rows by file)."""
    monkeypatch.setattr(harness, "fresh_peak", lambda again, provider, device: None)  # a process a provider: too long for here
    monkeypatch.setattr(harness, "ceilings", lambda device, dtype: (1e10, 1e10))

    def run(*arguments):
        status = program.main([*arguments, "--size", "tiny", "--rounds", "1", "--out", str(tmp_path)])
        rows = {}
        for path in tmp_path.glob("*.csv"):
            with path.open(newline="") as file:
                rows[path.stem] = list(csv.DictReader(file))
        return status, rows

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("family", OPS)
def test_every_family_runs(bench, family, device):
    status, rows = bench("--only", family, "--device", device)
    assert status == 0
    assert list(rows) == [family]
    assert {r["op"] for r in rows[family] if r["provider"] == OURS} == OPS[family]
    assert all(tuple(r) == COLUMNS and float(r["p50_ms"]) > 0 and float(r["times_ours"]) > 0 for r in rows[family])
    assert len({r["provider"] for r in rows[family]}) > 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda scores, density: topk_mask({n: -1 / t.abs() for n, t in scores.items()}, density=density),  # the smallest
        lambda scores, density: topk_mask(scores, density=density / 2),
    ],
)
def test_wrong_provider_is_told_and_gets_no_row(bench, monkeypatch, capsys, wrong):
    monkeypatch.setattr(bench_topk, "topk_mask", wrong)
    status, rows = bench("--only", "topk", "--device", "cpu")
    assert status == 1
    assert "WRONG topk_mask, deftx, tiny" in capsys.readouterr().out
    kept = [r for r in rows["topk"] if r["op"] == "topk_mask"]
    assert OURS not in {r["provider"] for r in kept}
    assert "numpy partition" in {r["provider"] for r in kept}


def test_provider_that_raises_is_told(bench, monkeypatch, capsys):
    def fails(*arguments, **options):
        raise RuntimeError("out of order")

    monkeypatch.setattr(bench_topk, "select_mask", fails)
    status, _ = bench("--only", "topk", "--device", "cpu")
    assert status == 1
    assert "RuntimeError: out of order" in capsys.readouterr().out


def test_absent_provider_is_named(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench_topk, "available_bytes", lambda: 0)
    status, rows = bench("--only", "topk", "--device", "cpu")
    assert status == 0
    assert f"{bench_topk.LT_SFT:31} absent: needs" in capsys.readouterr().out
    assert bench_topk.LT_SFT not in {r["provider"] for r in rows["topk"]}


# ---- the check of a selection ----

SCORES = {"a": torch.tensor([[3.0, -1.0], [0.5, 2.0]]), "b": torch.tensor([2.0, -2.0, 0.0])}
SHAPES = {n: t.shape for n, t in SCORES.items()}


def told(result, k, ties=False):
    return bench_topk.fault(result, SHAPES, lambda n: SCORES[n].abs(), k, ties)


@pytest.mark.parametrize("form", ["positions", "flat bool", "bool by name", "mask"])
def test_right_selections(form):
    for chosen in ([0, 3, 4], [0, 3, 5], [0, 4, 5]):  # whichever of the tied
        flat = torch.zeros(7, dtype=torch.bool).index_fill_(0, torch.tensor(chosen), True)
        named = {"a": flat[:4].view(2, 2), "b": flat[4:]}
        forms = {"positions": torch.tensor(chosen), "flat bool": flat, "bool by name": named, "mask": CSRMask.from_dense(named)}
        assert told(forms[form], 3) is None


@pytest.mark.parametrize(
    ("chosen", "k", "part"),
    [
        ([0, 3], 3, "2 entries"),
        ([0, 3, 4, 5], 3, "4 entries"),
        ([0, 1, 3], 3, "other entries"),
        ([3, 4, 5], 3, "other entries"),
        ([3, 0, 4], 3, "ascend"),
        ([0, 3, 3], 3, "ascend"),
        ([0, 3, 7], 3, "outside"),
        ([-1, 0, 3], 3, "outside"),
    ],
)
def test_wrong_selections(chosen, k, part):
    assert part in told(torch.tensor(chosen), k)


def test_ties_may_exceed_k_only_where_allowed():
    assert told(torch.tensor([0, 3, 4, 5]), 3, ties=True) is None
    assert "above the smallest" in told(torch.tensor([0, 1, 3, 4, 5]), 3, ties=True)
    assert told(torch.tensor([0, 3]), 3, ties=True) is not None


def test_peers_choose_exactly_k_among_ties():
    values = torch.randint(-3, 4, (1000,), generator=torch.Generator().manual_seed(0)).float()
    for k in (1, 100, 999, 1000):
        peers, _ = bench_topk.selections(values.abs, lambda: values.abs().numpy(), k, 1000, "cpu")
        for name, make in peers.items():
            fault = bench_topk.fault(make()(), {"a": values.shape}, lambda n: values.abs(), k)
            assert fault is None, f"{name}, k = {k}: {fault}"


# ---- the check of a training step ----


@pytest.fixture
def first_step(tmp_path):
    """What is said of a provider's first step on a small stack of linear layers."""

    def told(name):
        case = bench_steps.step_case("tiny linears", "cpu", str(tmp_path))
        return case.check(case.providers[name]()())

    return told


@pytest.mark.parametrize("name", [OURS, bench_steps.DENSE, bench_steps.DENSE_MASK])
def test_right_steps(first_step, name):
    assert first_step(name) is None


def other_start(model, mask):
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    return sparsify(model, mask)


@pytest.mark.parametrize(
    ("name", "replaced", "by", "part"),
    [
        (OURS, "sparsify", other_start, "first loss"),
        (OURS, "SparseAdamW", lambda named, mask, lr, **options: SparseAdamW(named, mask, lr=2 * lr, **options), "of a step away"),
        (OURS, "SparseAdamW", lambda named, mask, **options: torch.optim.SGD([p for _, p in named], lr=0.0), "of a step away"),
        (bench_steps.DENSE, "fused_adamw", lambda model: torch.optim.Adam(list(model.parameters())[1:]), "0.weight has not moved"),
        (bench_steps.DENSE_MASK, "SETTINGS", bench_steps.SETTINGS | {"weight_decay": 0.01}, "outside the mask have moved"),
    ],
)
def test_wrong_steps(first_step, monkeypatch, name, replaced, by, part):
    monkeypatch.setattr(bench_steps, replaced, by)
    assert part in first_step(name)


@pytest.mark.parametrize(("package", "absent"), [("peft", {bench_steps.SHIRA, bench_steps.LORA}), ("transformers", {OURS})])
def test_absent_packages_are_named(tmp_path, monkeypatch, package, absent):
    monkeypatch.setattr(bench_steps, "has", lambda name: name != package)
    case = bench_steps.step_case("tiny", "cpu", str(tmp_path))
    assert case.absent == dict.fromkeys(absent, f"{package} is not installed")
    assert not absent & case.providers.keys()


def test_shira_trains_as_many_values_as_its_rank_allows():
    linears = torch.nn.Sequential(torch.nn.Linear(30, 10), torch.nn.Linear(10, 10))
    assert [bench_steps.shira_rank(values, linears) for values in (0, 60, 119, 151, 10**6)] == [1, 1, 2, 3, 5]


# ---- sizes, peaks, rows ----


@pytest.mark.parametrize(("size", "elements"), [("minilm", 22.3e6), ("50M", 50e6), ("xlmr", 277.5e6), ("llama7b", 6.48e9)])
def test_sizes(size, elements):
    numel = sum(torch.Size(s).numel() for s in shapes.SIZES[size]().values())
    assert numel == pytest.approx(elements, rel=2e-3)


def test_peak_of_a_fresh_process():
    case = bench_topk.topk_case("minilm", torch.float32, 0.05, "cpu")
    if peak_extra(lambda: None, "cpu") is None:
        pytest.skip("this system does not tell a process's peak memory")
    peak = fresh_peak(case.again, "numpy partition", "cpu")
    assert peak > 1.9 * 89.2  # the magnitudes and the partitioned copy, 89.2 MB each
    assert peak < 4 * 89.2


def test_peak_of_a_process_that_fails(capsys):
    assert fresh_peak(bench_topk.topk_case, "nobody", "cpu") is None
    assert "peak memory of nobody was not measured" in capsys.readouterr().out


def row(**fields):
    usual = {
        "date": "2026-01-02T00:00:00Z",
        "op": "topk_mask",
        "provider": OURS,
        "backend": "c++",
        "size": "minilm",
        "dtype": "float32",
    }
    usual |= {"density": "0.05", "p50_ms": "1.0", "times_ours": "1.0", "share_of_floor": "0.5", "device": "here", "threads": "2"}
    return dict.fromkeys(COLUMNS, "") | usual | {"torch": "2", "commit": "abc"} | fields


def test_rows_of_one_run_stand_side_by_side(tmp_path):
    old, new = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    harness.append(
        [row(date=old, p50_ms="9"), row(date=old, provider="peer", times_ours="7"), row(date=old, provider="gone")],
        tmp_path / "topk.csv",
    )
    harness.append([row(date=old, size="xlmr", p50_ms="5", commit="earlier")], tmp_path / "topk.csv")
    harness.append([row(date=new, p50_ms="3"), row(date=new, provider="peer", times_ours="2")], tmp_path / "topk.csv")
    found = program.newest(tmp_path)
    assert {(r["size"], r["provider"], r["p50_ms"]) for r in found} == {
        ("minilm", OURS, "3"),
        ("minilm", "peer", "1.0"),
        ("xlmr", OURS, "5"),
    }
    text = program.table(found)
    assert text.startswith("here, 2 threads, torch 2, 2026-01-01, 2026-01-02, commit earlier, abc:")
    assert "| topk_mask | minilm, float32, 5% | c++ | 3.00 ms | 50% | peer 2.00 |" in text
    assert "| topk_mask | xlmr, float32, 5% | c++ | 5.00 ms | 50% |  |" in text
    assert "gone" not in text


def test_table_of_training_steps(tmp_path):
    ours = row(op="training_step", p50_ms="250", peak_extra_mb="1234.5", state_bytes_per_param="0.4")
    harness.append([ours, ours | {"provider": "peer", "times_ours": "2", "p50_ms": "500"}], tmp_path / "steps.csv")
    text = program.table(program.newest(tmp_path))
    assert "| 250.00 ms (4 steps/s, 1234 MB, 0.40 B) | 50% | peer 2.00 (2 steps/s, 1234 MB, 0.40 B) |" in text


def test_rows_of_an_op_that_has_moved_to_an_earlier_file_are_history(tmp_path):
    old, new = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    harness.append([row(date=old, p50_ms="9"), row(date=old, provider="gone")], tmp_path / "train.csv")
    harness.append([row(date=new, p50_ms="3")], tmp_path / "masked.csv")
    assert [(r["provider"], r["p50_ms"]) for r in program.newest(tmp_path)] == [(OURS, "3")]


def test_works_timed_with_a_replaced_implementation_are_history(tmp_path):
    old, new = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    before = [row(date=old, size="xlmr", backend="reference"), row(date=old, size="xlmr", provider="peer", backend="")]
    harness.append([*before, row(date=old, op="mask_or", size="xlmr", backend="c++")], tmp_path / "topk.csv")
    harness.append([row(date=new, backend="c++"), row(date=new, provider="peer", backend="")], tmp_path / "topk.csv")
    found = {(r["op"], r["size"], r["provider"]) for r in program.newest(tmp_path)}
    assert found == {("topk_mask", "minilm", OURS), ("topk_mask", "minilm", "peer"), ("mask_or", "xlmr", OURS)}


def test_rows_of_an_older_header_stay(tmp_path):
    path = tmp_path / "csr.csv"
    path.write_text("date,op,provider\nlong ago,csr_gather,deftx\n")
    harness.append([{"date": "today", "op": "csr_gather", "provider": "torch", "state_bytes_per_param": "8"}], path)
    harness.append([{"date": "tomorrow", "op": "csr_gather"}], path)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(r) for r in rows] == [COLUMNS] * 3
    assert [(r["date"], r["provider"], r["state_bytes_per_param"]) for r in rows] == [
        ("long ago", "deftx", ""), ("today", "torch", "8"), ("tomorrow", "", ""),
    ]  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]
