"""The checks of the benchmark's families: what they accept and what they report as wrong."""

import pytest
import torch

from bench import bench_steps, bench_svd, bench_topk, bench_train
from bench.rows import OURS
from deftx_kernels import CSRMask, SparseAdamW, sparsify

F32 = torch.float32

# ---- a selection ----
SCORES = {"a": torch.tensor([[3.0, -1.0], [0.5, 2.0]]), "b": torch.tensor([2.0, -2.0, 0.0])}
SHAPES = {n: t.shape for n, t in SCORES.items()}


def fault_of(result, k, ties=False):
    return bench_topk.fault(result, SHAPES, lambda n: SCORES[n].abs(), k, ties)


@pytest.mark.parametrize("chosen", [[0, 3, 4], [0, 3, 5], [0, 4, 5]])  # any of the tied
def test_right_selections(chosen):
    flat = torch.zeros(7, dtype=torch.bool).index_fill_(0, torch.tensor(chosen), True)
    named = {"a": flat[:4].view(2, 2), "b": flat[4:]}
    for form in (torch.tensor(chosen), flat, named, CSRMask.from_dense(named)):
        assert fault_of(form, 3) is None


@pytest.mark.parametrize(
    ("chosen", "k", "ties", "part"),
    [
        ([0, 3], 3, False, "2 entries"),
        ([0, 3, 4, 5], 3, False, "4 entries"),
        ([0, 1, 3], 3, False, "other entries"),
        ([3, 4, 5], 3, False, "other entries"),
        ([3, 0, 4], 3, False, "ascend"),
        ([0, 3, 3], 3, False, "ascend"),
        ([0, 3, 7], 3, False, "outside"),
        ([-1, 0, 3], 3, False, "outside"),
        ([0, 1, 3, 4, 5], 3, True, "above the smallest"),
        ([0, 3], 3, True, "2 entries"),
        ([0, 3, 4, 5], 3, True, None),  # ties may exceed k where allowed
    ],
)
def test_wrong_selections(chosen, k, ties, part):
    fault = fault_of(torch.tensor(chosen), k, ties)
    assert part in fault if part else fault is None


@pytest.mark.parametrize("k", [1, 100, 999, 1000])
def test_baselines_select_exactly_k_of_ties(k):
    values = torch.randint(-3, 4, (1000,), generator=torch.Generator().manual_seed(0)).float()
    baselines, _ = bench_topk.selections(values.abs, lambda: values.abs().numpy(), k, 1000, "cpu")
    for name, make in baselines.items():
        assert bench_topk.fault(make()(), {"a": values.shape}, lambda n: values.abs(), k) is None, name


# ---- a training step ----
@pytest.mark.parametrize("name", ["ours", "dense", "dense_mask"])
def test_steps_as_a_graph(monkeypatch, name):
    """On the CPU, `captured_step` is the loop; its first step is checked like that of any other run."""
    trainers = bench_steps.Trainers("tiny linears", F32, 0.02, "cpu")
    check = bench_steps.checker(trainers)
    make = trainers.captured(name, getattr(trainers, name))
    run = make()
    assert run() is run
    assert run.name == name
    assert check(run) is None
    assert run.optimizer.state_dict()["state"][0]["step"] == 1
    monkeypatch.setitem(bench_steps.SETTINGS, "lr", 2e-4)
    twice = make()()
    monkeypatch.undo()
    assert "of a step away" in check(twice)


def other_start(model, mask):
    with torch.no_grad():
        model[0].weight.mul_(1.01)
    return sparsify(model, mask)


def double_rate(named, mask, lr, **options):
    return SparseAdamW(named, mask, lr=2 * lr, **options)


def no_step(named, mask, **options):
    return torch.optim.SGD([p for _, p in named], lr=0.0)


def all_but_the_first(model):
    return torch.optim.Adam(list(model.parameters())[1:])


DECAY = bench_steps.SETTINGS | {"weight_decay": 0.01}


@pytest.mark.parametrize(
    ("name", "replaced", "by", "part"),
    [
        *((name, "SETTINGS", bench_steps.SETTINGS, None) for name in (OURS, bench_steps.DENSE, bench_steps.DENSE_MASK)),
        (OURS, "sparsify", other_start, "first loss"),
        (OURS, "SparseAdamW", double_rate, "of a step away"),
        (OURS, "SparseAdamW", no_step, "of a step away"),
        (bench_steps.DENSE, "fused_adamw", all_but_the_first, "0.weight has not moved"),
        (bench_steps.DENSE_MASK, "SETTINGS", DECAY, "outside the mask have moved"),
    ],
)
def test_what_the_check_says_of_a_first_step(monkeypatch, name, replaced, by, part):
    monkeypatch.setattr(bench_steps, replaced, by)
    case = bench_steps.step_case("tiny linears", F32, 0.02, "cpu")
    fault = case.check(case.implementations[name]()())
    assert part in fault if part else fault is None


@pytest.mark.parametrize(
    ("package", "absent"), [("peft", {bench_steps.SHIRA, bench_steps.LORA}), ("transformers", {OURS})]
)
def test_absent_packages_are_named(monkeypatch, package, absent):
    monkeypatch.setattr(bench_steps, "has", lambda name: name != package)
    case = bench_steps.step_case("tiny", F32, 0.05, "cpu")
    assert case.absent == dict.fromkeys(absent, f"{package} is not installed")
    assert not absent & case.implementations.keys()


def test_shira_trains_as_many_values_as_its_rank_allows():
    linears = torch.nn.Sequential(torch.nn.Linear(30, 10), torch.nn.Linear(10, 10))
    assert [bench_steps.shira_rank(values, linears) for values in (0, 60, 119, 151, 10**6)] == [1, 1, 2, 3, 5]


def all_right(case):
    faults = {name: case.check(make()()) for name, make in case.implementations.items()}
    return faults == dict.fromkeys(case.implementations)


def test_every_implementation_of_a_language_model_with_tied_weights_is_right():
    assert all_right(bench_steps.step_case("tiny llama", F32, 0.05, "cpu"))


# ---- an optimizer's step ----
@pytest.fixture(scope="module", params=["dense", "compact"])
def adamw(request):
    return bench_train.adamw_case("tiny", F32, 0.05, "cpu", request.param)


def test_every_call_takes_a_step(adamw):
    """Three calls on one gradient are three steps of AdamW; LIFT overwrites its gradient, so its entries only move."""
    problem = bench_train.Problem("tiny", F32, 0.05, "cpu")
    exact = torch.nn.Parameter(problem.mask.gather(problem.params).double())
    exact.grad = problem.compact.double()
    optimizer = torch.optim.AdamW([exact], **bench_train.SETTINGS)
    for _ in range(3):
        optimizer.step()
    for name, make in adamw.implementations.items():
        call = make()
        call(), call()
        after = problem.mask.gather(call()).double()
        if name != bench_train.LIFT:
            assert float((after - exact.detach()).abs().max()) < 1e-5, name
        else:
            assert float((after - problem.mask.gather(problem.params)).abs().min()) > 0


def test_wrong_adamw_steps(adamw):
    result = {n: t.clone() for n, t in adamw.implementations[OURS]()().items()}
    assert adamw.check(result) is None
    assert "at the masked entries" in adamw.check({n: t + 1e-3 for n, t in result.items()})
    mask = bench_train.Problem("tiny", F32, 0.05, "cpu").mask
    name = mask.names[0]
    outside = mask.to_dense()[name].logical_not().nonzero()[0]
    result[name][tuple(outside)] += 1
    assert "entries have moved" in adamw.check(result)


def test_baselines_without_memory_are_absent_with_what_they_need(monkeypatch):
    monkeypatch.setattr(bench_train, "available_bytes", lambda: 0)
    case = bench_train.adamw_case("tiny", F32, 0.05, "cpu", "dense")
    assert list(case.implementations) == [OURS]
    assert all("GB of memory" in reason for reason in case.absent.values())
    assert bench_train.FUSED in case.absent


# ---- denoising ----
@pytest.mark.parametrize("rule", [{"rank": 64}, {"energy": 0.9}])
def test_wrong_denoising(rule):
    case = bench_svd.denoise_case("tiny", F32, None, "cpu", 1, rule)
    assert all_right(case)
    result = case.implementations[OURS]()()
    name = min(result)
    for wrong in (result[name] * 1.1, result[name].flip(0), torch.zeros_like(result[name])):
        assert name in case.check(result | {name: wrong})
    assert "missing" in case.check({n: t for n, t in result.items() if n != name})


@pytest.mark.parametrize("rule", [{"rank": 64}, {"energy": 0.9}])
def test_wrong_selection_after_denoising(rule):
    case = bench_svd.selection_case("tiny", F32, 0.05, "cpu", rule)
    mask = case.implementations[OURS]()()
    assert case.check(mask) is None
    assert "instead of" in case.check(mask[mask.names[0]])
    other = bench_svd.selection_case("tiny", F32, 0.05, "cpu", {"rank": 8}).implementations[OURS]()()
    assert "of the entries are right" in case.check(other)
