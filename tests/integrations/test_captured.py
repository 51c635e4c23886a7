"""captured_step: the loop that it stands for, bit for bit; a warm-up that trains nothing; what is captured again."""

import contextlib
import copy
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from deftx_kernels import SparseAdamW, sparsify, topk_mask
from deftx_kernels.integrations import captured, captured_step

pytestmark = pytest.mark.usefixtures("one_thread")
LR = 2.0**-6  # the same number in float32 and float64


class Net(nn.Module):
    """With a running mean, dropout and a parameter that no mask covers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(11, 8), nn.Linear(8, 16)
        self.norm, self.dropout, self.head = nn.BatchNorm1d(16), nn.Dropout(0.25), nn.Linear(16, 3)

    def forward(self, ids):
        return self.head(self.dropout(self.norm(torch.tanh(self.linear(self.embedding(ids).mean(1))))))


def loss_fn(model, batch):
    return nn.functional.cross_entropy(model(batch["ids"]), batch["labels"])


def make(kind, device="cpu", lr=LR, **options):
    """A model and its optimizer: "plain", "sparsified" (", copies"), "every entry" or "torch"."""
    torch.manual_seed(0)
    model = Net().to(device)
    if kind == "torch":
        return model, torch.optim.AdamW(model.parameters(), lr=lr, fused=True, capturable=device != "cpu", **options)
    if kind == "every entry":
        return model, SparseAdamW(model.named_parameters(), None, lr=lr, **options)
    mask = topk_mask(
        {n: model.get_parameter(n) for n in ("embedding.weight", "linear.weight")}, density=0.3, scope="tensor"
    )
    if kind.startswith("sparsified"):
        sparsify(model, mask, autocast_copies=kind == "sparsified, copies")
    return model, SparseAdamW(model.named_parameters(), mask, lr=lr, **options)


def batches(count, device="cpu", rows=6):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        ids, labels = (torch.randint(0, n, s, generator=generator) for n, s in ((11, (rows, 4)), (3, (rows,))))
        yield {"ids": ids.to(device), "labels": labels.to(device)}


def by_hand(model, optimizer, batch, max_norm=None, dtype=None):
    optimizer.zero_grad()
    with torch.autocast(batch["ids"].device.type, dtype, enabled=dtype is not None):
        loss = loss_fn(model, batch)
    loss.backward()
    if max_norm is not None and isinstance(optimizer, SparseAdamW):
        optimizer.clip_grad_norm_(max_norm)
    elif max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()
    return loss.detach()


def snapshot(model, optimizer):
    state = optimizer.state_dict()["state"]
    return copy.deepcopy([model.state_dict(), {i: dict(sorted(s.items())) for i, s in state.items()}])


def assert_same(one, other, **tolerance):
    for a, b in zip(one, other):
        assert a.keys() == b.keys()
        for key, x in a.items():
            if isinstance(x, dict):
                assert_same([x], [b[key]], **tolerance)
            elif tolerance:
                torch.testing.assert_close(x, b[key], **tolerance)
            else:
                assert torch.equal(x, b[key]), key


@pytest.fixture
def fake_graphs(monkeypatch):
    """CUDA graphs on the CPU: a capture takes a step, a replay takes it again. The list has the captures."""
    captures = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name in ("current_stream", "Stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, lambda: stream)
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, contextlib.nullcontext)
    monkeypatch.setattr(captured, "is_capturable", lambda device: True)
    capture = captured.CapturedStep._capture

    def fake(step):
        capture(step)
        captures.append(step)
        step._graph = SimpleNamespace(replay=lambda: step._loss.copy_(step._static_step()))

    monkeypatch.setattr(captured.CapturedStep, "_capture", fake)
    return captures


@pytest.mark.parametrize("scheduled", [False, True], ids=["constant", "scheduled"])
@pytest.mark.parametrize(("max_norm", "dtype"), [(None, None), (0.05, None), (0.5, torch.bfloat16)])
@pytest.mark.parametrize("kind", ["plain", "sparsified", "every entry", "torch"])
def test_on_the_cpu_it_is_the_loop(kind, max_norm, dtype, scheduled):
    runs = []
    for is_step in (False, True):
        model, optimizer = make(kind)
        scheduler = lr_scheduler.LinearLR(optimizer, total_iters=8) if scheduled else None
        first = next(batches(1))
        options = dict(max_grad_norm=max_norm, autocast_dtype=dtype)
        step = captured_step(model, optimizer, loss_fn, first, **options) if is_step else None
        losses = []
        for batch in batches(10):
            losses.append(step(batch) if step else by_hand(model, optimizer, batch, max_norm, dtype))
            if scheduler:
                scheduler.step()
        runs.append([*snapshot(model, optimizer), {"losses": torch.stack(losses)}])
    assert_same(*runs)


@pytest.mark.parametrize("kind", ["plain", "sparsified", "every entry"])
def test_the_warm_up_trains_nothing(kind, fake_graphs):
    model, optimizer = make(kind, weight_decay=0.1)
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    random = torch.get_rng_state()
    captured_step(model, optimizer, loss_fn, next(batches(1)), warmup=2, max_grad_norm=1.0)
    assert len(fake_graphs) == 1
    assert torch.equal(torch.get_rng_state(), random)
    after, state = snapshot(model, optimizer)
    assert_same([weights], [after])
    assert state  # allocated
    assert all(not x.count_nonzero() for s in state.values() for x in s.values())
    assert optimizer.param_groups[0]["lr"] == LR
    assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize(("max_norm", "dtype"), [(None, None), (0.05, torch.bfloat16)])
@pytest.mark.parametrize("kind", ["plain", "sparsified", "sparsified, copies", "every entry"])
def test_replays_are_the_loop(kind, max_norm, dtype, fake_graphs):
    """Rates that a schedule sets as numbers, a state that is loaded, and values that are written between the calls."""
    runs = []
    for is_step in (False, True):
        model, optimizer = make(kind)
        scheduler = lr_scheduler.StepLR(optimizer, 3, 0.5)
        options = dict(max_grad_norm=max_norm, autocast_dtype=dtype)
        step = captured_step(model, optimizer, loss_fn, next(batches(1)), **options) if is_step else None
        torch.manual_seed(7)
        losses = []
        for i, batch in enumerate(batches(10)):
            losses.append(step(batch) if step else by_hand(model, optimizer, batch, max_norm, dtype))
            scheduler.step()
            if i == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if i == 6:
                with torch.no_grad():
                    next(p for p in model.parameters() if p.requires_grad).mul_(1.5)
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        runs.append([*snapshot(model, optimizer), {"losses": torch.stack(losses)}])
    assert_same(*runs)
    assert len(fake_graphs) == 2  # the second one for the loaded state
    assert len(set(losses)) == 10


def test_what_is_captured_again(fake_graphs):
    model, optimizer = make("sparsified")
    batch = next(batches(1))
    step = captured_step(model, optimizer, loss_fn, batch)
    changes = [
        model.eval,
        model.train,
        lambda: model.norm.weight.__setattr__("data", model.norm.weight.detach().clone()),
        lambda: optimizer.param_groups[0].update(weight_decay=0.5),
        lambda: optimizer.param_groups[0].update(lr=torch.tensor(0.5)),
    ]
    for i, change in enumerate(changes):
        for _ in range(2):
            step(batch)
        assert len(fake_graphs) == 1 + i
        change()
    optimizer.param_groups[0]["lr"].fill_(0.25)
    for _ in range(2):
        step(batch)
    assert len(fake_graphs) == 1 + len(changes)


def test_batches_of_other_kinds(fake_graphs):
    """Tuples, nested containers, constants, and the mapping that tokenizers return."""
    model, optimizer = make("sparsified")

    def loss(model, batch):
        inputs, (scale, labels) = batch
        return scale * nn.functional.cross_entropy(model(inputs["ids"]), labels)

    def convert(batch):
        return [UserDict(ids=batch["ids"]), (2.0, batch["labels"])]

    step = captured_step(model, optimizer, loss, convert(next(batches(1))))
    assert len({float(step(convert(batch))) for batch in batches(3)}) == 3
    with pytest.raises(ValueError, match=r"batch\[1\]\[0\] must be 2.0, as in the example batch, got 3.0"):
        step([UserDict(ids=torch.zeros(6, 4, dtype=torch.int64)), (3.0, torch.zeros(6, dtype=torch.int64))])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(5, 4, dtype=torch.int64)}, r"batch\['ids'\] must be torch.int64 \[6, 4\].*got.*\[5, 4\]"),
        ({"labels": torch.zeros(6)}, r"batch\['labels'\] must be torch.int64 \[6\].*got torch.float32 \[6\]"),
        ({"more": torch.zeros(6)}, r"batch\['more'\] is in the batch only"),
    ],
)
def test_batches_that_differ_from_the_example(change, message):
    model, optimizer = make("plain")
    before = copy.deepcopy(model.state_dict())
    batch = next(batches(1))
    step = captured_step(model, optimizer, loss_fn, batch)
    with pytest.raises(ValueError, match=message):
        step(batch | change)
    with pytest.raises(ValueError, match=r"batch\['ids'\] is in the example only"):
        step({"labels": batch["labels"]})
    assert_same([model.state_dict()], [before])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"warmup": 0}, ValueError, "warmup must be at least 1"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be a number above 0"),
        ({"autocast_dtype": torch.float16}, ValueError, "autocast_dtype must be torch.bfloat16 or None"),
        ({"loss_fn": lambda model, batch: model(batch["ids"])}, ValueError, "loss_fn must return a scalar tensor"),
    ],
)
def test_bad_arguments(options, error, message, fake_graphs):
    model, optimizer = make("plain")
    with pytest.raises(error, match=message):
        captured_step(model, optimizer, **{"loss_fn": loss_fn, "example_batch": next(batches(1))} | options)


def test_optimizers_that_cannot_be_captured(fake_graphs):
    model, _ = make("torch")
    for optimizer, error, message in [
        (torch.optim.SGD(model.parameters(), lr=0.1), TypeError, "must be SparseAdamW, AdamW or Adam, got SGD"),
        (torch.optim.AdamW(model.parameters(), capturable=True), ValueError, "made with fused=True"),
        (torch.optim.Adam(model.parameters(), fused=True), ValueError, "made with capturable=True"),
    ]:
        with pytest.raises(error, match=message):
            captured_step(model, optimizer, loss_fn, next(batches(1)))


@pytest.mark.gpu
@pytest.mark.parametrize(("max_norm", "dtype"), [(None, None), (0.05, None), (0.5, torch.bfloat16)])
@pytest.mark.parametrize("kind", ["plain", "sparsified", "sparsified, copies", "every entry", "torch"])
def test_a_captured_step_is_the_loop(kind, max_norm, dtype):
    runs = []
    for is_step in (False, True):
        model, optimizer = make(kind, "cuda")
        model.dropout.p = 0.0
        scheduler = lr_scheduler.LinearLR(optimizer, total_iters=8)
        before, step = copy.deepcopy(model.state_dict()), None
        if is_step:
            options = dict(max_grad_norm=max_norm, autocast_dtype=dtype)
            step = captured_step(model, optimizer, loss_fn, next(batches(1)), **options)
            assert_same([before], [model.state_dict()])
        losses = []
        for i, batch in enumerate(batches(10)):
            there = {n: t.cuda() for n, t in batch.items()}
            losses.append(step(batch) if step else by_hand(model, optimizer, there, max_norm, dtype))
            scheduler.step()
            if i == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert float(next(iter(optimizer.state.values()))["step"]) == 10
        runs.append([*snapshot(model, optimizer), {"losses": torch.stack(losses)}])
    assert_same(*runs, rtol=1e-2 if dtype else 1e-4, atol=1e-2 if dtype else 1e-5)


@pytest.mark.gpu
def test_a_captured_dropout_differs_from_call_to_call():
    model, optimizer = make("sparsified", "cuda", lr=0.0)
    batch = next(batches(1))
    step = captured_step(model, optimizer, loss_fn, batch)
    assert len({float(step(batch)) for _ in range(5)}) == 5
