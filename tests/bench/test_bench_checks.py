"""The checks of the benchmark's families: what they accept and what they refuse."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from bench import bench_steps, bench_svd, bench_topk, bench_train
from bench.rows import OURS
from deftx_kernels import CSRMask, SparseAdamW, sparsify

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
        forms = {
            "positions": torch.tensor(chosen),
            "flat bool": flat,
            "bool by name": named,
            "mask": CSRMask.from_dense(named),
        }
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


@pytest.fixture
def pretended_graphs(monkeypatch):
    """CUDA graphs whose replay is the step itself, on the CPU; what the replays of the next graph do can be replaced."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replays = SimpleNamespace(do=None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.do()))
    return replays


@pytest.mark.parametrize("name", ["ours", "dense", "dense_mask"])
def test_steps_as_a_graph(tmp_path, pretended_graphs, name):
    trainers = bench_steps.Trainers("tiny linears", "cpu", str(tmp_path), torch.float32, 0.02)
    make = getattr(trainers, name)
    captured = trainers.captured(name, lambda capturable: make() if name != "ours" else make(capturable=capturable))()
    pretended_graphs.do = captured.run
    assert captured() is captured
    expected = float(trainers.loss(trainers.model()).detach())
    assert captured.fault(expected, 1e-5) is None
    assert "of the dense model" in captured.fault(1.01 * expected, 1e-5)
    assert captured.run.optimizer.state_dict()["state"][0]["step"] == 5  # three, the one that is captured, and a replay
    pretended_graphs.do = lambda: setattr(captured.run, "loss", float("nan"))
    assert "of the first replay nan" in captured().fault(expected, 1e-5)


def other_start(model, mask):
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    return sparsify(model, mask)


@pytest.mark.parametrize(
    ("name", "replaced", "by", "part"),
    [
        (OURS, "sparsify", other_start, "first loss"),
        (
            OURS,
            "SparseAdamW",
            lambda named, mask, lr, **options: SparseAdamW(named, mask, lr=2 * lr, **options),
            "of a step away",
        ),
        (
            OURS,
            "SparseAdamW",
            lambda named, mask, **options: torch.optim.SGD([p for _, p in named], lr=0.0),
            "of a step away",
        ),
        (
            bench_steps.DENSE,
            "fused_adamw",
            lambda model: torch.optim.Adam(list(model.parameters())[1:]),
            "0.weight has not moved",
        ),
        (
            bench_steps.DENSE_MASK,
            "SETTINGS",
            bench_steps.SETTINGS | {"weight_decay": 0.01},
            "outside the mask have moved",
        ),
    ],
)
def test_wrong_steps(first_step, monkeypatch, name, replaced, by, part):
    monkeypatch.setattr(bench_steps, replaced, by)
    assert part in first_step(name)


@pytest.mark.parametrize(
    ("package", "absent"), [("peft", {bench_steps.SHIRA, bench_steps.LORA}), ("transformers", {OURS})]
)
def test_absent_packages_are_named(tmp_path, monkeypatch, package, absent):
    monkeypatch.setattr(bench_steps, "has", lambda name: name != package)
    case = bench_steps.step_case("tiny", "cpu", str(tmp_path))
    assert case.absent == dict.fromkeys(absent, f"{package} is not installed")
    assert not absent & case.providers.keys()


def test_shira_trains_as_many_values_as_its_rank_allows():
    linears = torch.nn.Sequential(torch.nn.Linear(30, 10), torch.nn.Linear(10, 10))
    assert [bench_steps.shira_rank(values, linears) for values in (0, 60, 119, 151, 10**6)] == [1, 1, 2, 3, 5]


def test_every_way_of_a_language_model_with_tied_weights_is_right(tmp_path):
    case = bench_steps.step_case("tiny llama", "cpu", str(tmp_path), torch.float32)
    assert {name: case.check(make()()) for name, make in case.providers.items()} == dict.fromkeys(case.providers)


# ---- the check of an optimizer's step ----


@pytest.fixture(scope="module", params=["dense", "compact"])
def adamw(request):
    return bench_train.adamw_case("tiny", torch.float32, 0.05, "cpu", request.param)


def test_every_step_does_its_work_each_time(adamw):
    """Three steps of the peers on one gradient are three steps of AdamW, none skips any work (LIFT's writes over its
    gradient).
    """
    problem = bench_train.Problem("tiny", torch.float32, 0.05, "cpu")
    exact = torch.nn.Parameter(problem.mask.gather(problem.params).double())
    exact.grad = problem.compact.double()
    optimizer = torch.optim.AdamW([exact], **bench_train.SETTINGS)
    for _ in range(3):
        optimizer.step()
    for name, make in adamw.providers.items():
        call = make()
        call(), call()
        after = problem.mask.gather(call()).double()
        if name != bench_train.LIFT:
            assert float((after - exact.detach()).abs().max()) < 1e-5, name
        else:
            assert float((after - problem.mask.gather(problem.params)).abs().min()) > 0


def test_wrong_adamw_steps(adamw):
    result = {n: t.clone() for n, t in adamw.providers[OURS]()().items()}
    assert adamw.check(result) is None
    assert "at the masked entries" in adamw.check({n: t + 1e-3 for n, t in result.items()})
    problem = bench_train.Problem("tiny", torch.float32, 0.05, "cpu")
    one_more = {n: t.clone() for n, t in result.items()}
    name = problem.mask.names[0]
    outside = problem.mask.to_dense()[name].logical_not().nonzero()[0]
    one_more[name][tuple(outside)] += 1
    assert "entries have moved" in adamw.check(one_more)


def test_peers_without_memory_are_absent_with_what_they_need(monkeypatch):
    monkeypatch.setattr(bench_train, "available_bytes", lambda: 0)
    case = bench_train.adamw_case("tiny", torch.float32, 0.05, "cpu", "dense")
    assert list(case.providers) == [OURS]
    assert all("GB of memory" in reason for reason in case.absent.values())
    assert bench_train.FUSED in case.absent


# ---- the checks of denoising ----


@pytest.mark.parametrize("rule", [{"rank": 64}, {"energy": 0.9}])
def test_wrong_denoising(rule):
    case = bench_svd.linears_case("tiny", 1, rule, "cpu")
    assert {name: case.check(make()()) for name, make in case.providers.items()} == dict.fromkeys(case.providers)
    result = case.providers[OURS]()()
    name = min(result)
    for wrong in (result[name] * 1.1, result[name].flip(0), torch.zeros_like(result[name])):
        assert name in case.check(result | {name: wrong})
    assert "missing" in case.check({n: t for n, t in result.items() if n != name})


@pytest.mark.parametrize("rule", [{"rank": 64}, {"energy": 0.9}])
def test_wrong_selection_after_denoising(rule):
    case = bench_svd.selection_case("tiny", rule, torch.float32, 0.05, "cpu")
    mask = case.providers[OURS]()()
    assert case.check(mask) is None
    assert "in place of" in case.check(mask[mask.names[0]])
    other = bench_svd.selection_case("tiny", {"rank": 8}, torch.float32, 0.05, "cpu").providers[OURS]()()
    assert "of the entries are right" in case.check(other)
