"""SparseAdamW with LR schedulers, GradScaler, gradient clipping, wrapped models and transformers.Trainer."""

import numpy as np
import pytest
import torch
from optimizer_setup import (
    assert_near,
    assert_same_bits,
    backward,
    bits,
    both,
    differ,
    make_mask,
    make_model,
    set_grads,
    setup,
    through_file,
    train,
    weights,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim import lr_scheduler

from deftx_kernels import CSRMask, SparseAdamW, densify, sparsify, topk_mask

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- schedulers ----
SCHEDULERS = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, [lambda i: 0.9**i, lambda i: 1 / (1 + i)]),
    "numpy": lambda o: lr_scheduler.LambdaLR(o, lambda i: np.float32(0.9) ** i),
    "linear to 0": lambda o: lr_scheduler.LinearLR(o, 0.1, 0.0, 4),  # ends, by rounding, at -5e-20
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 10),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 15),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.05, total_steps=25),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1, threshold=0.1),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 5), lr_scheduler.ExponentialLR(o, 0.8)], [5]
    ),
}


def in_groups(model, lr):
    """Two groups with a learning rate each; the first holds a masked parameter, the second the others of both kinds."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    second = {"params": named[1:], "lr": lr[1], "weight_decay": 0.2, "betas": (0.8, 0.9)}
    return [{"params": named[:1], "lr": lr[0]}, second]


@both
@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tensor, sparsified):
    reference, model, mask = make_model(), make_model(), make_mask(1.1)
    if sparsified:
        sparsify(model, mask)
    ends, rates = [], []
    for m in (reference, model):
        lr = [torch.tensor(x, dtype=torch.float64) if tensor else x for x in (0.02, 0.01)]
        o = torch.optim.AdamW(in_groups(m, lr)) if m is reference else SparseAdamW(in_groups(m, lr), mask)
        ends.append(train(m, o, 24, scheduler=SCHEDULERS[name](o)))
        rates.append([float(x) for g in o.param_groups for x in (g["lr"], *g["betas"])])
    # torch goes on computing in the float32 of such a rate.
    assert_near(ends[1], ends[0], 24 * torch.finfo(torch.float32).eps if name == "numpy" else 1e-12)
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0][0] != 0.02


# ---- GradScaler ----
@both
def test_grad_scaler_skips_overflows_and_unscales(sparsified):
    reference = make_model(torch.float32)
    model, optimizer = setup(sparsified, torch.float32, mask=make_mask(1.1))
    plain = torch.optim.AdamW(reference.parameters(), lr=1e-2, fused=True)
    for m, o in ((reference, plain), (model, optimizer)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for i in range(6):
            o.zero_grad()
            loss = nn.functional.cross_entropy(m(torch.arange(10)), torch.arange(10) % 3)
            scaler.scale(loss * (float("inf") if i == 3 else 1.0)).backward()
            scaler.step(o)
            scaler.update()
    assert_near(weights(model), weights(reference), 1e-5)
    assert {float(s["step"]) for s in optimizer.state.values()} == {5.0}


# ---- clipping ----
def norm_of(model, mask):
    """float64: of the masked gradients and those of the other parameters."""
    grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    chosen = mask.to_dense()
    return torch.cat([g[chosen[n]] if n in chosen else g.flatten() for n, g in grads.items()]).norm()


@both
@pytest.mark.parametrize("max_norm", [0, 0.05, 1e6])
@pytest.mark.parametrize("without", [(), ("1.weight", "1.values", "3.bias")])
def test_clip_grad_norm(sparsified, max_norm, without):
    mask = make_mask()
    model, optimizer = setup(sparsified, torch.float32, eps=1e-3)
    twin, other = setup(sparsified, torch.float32, eps=1e-3)
    for i in range(4):
        for m, o in ((model, optimizer), (twin, other)):
            o.zero_grad()
            backward(m, i)
            for n, p in m.named_parameters():
                p.grad = None if n in without else p.grad
        before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = optimizer.clip_grad_norm_(max_norm)
        expected = norm_of(model, mask)
        assert (norm.dtype, norm.shape) == (torch.float32, ())
        torch.testing.assert_close(norm.double(), expected, rtol=2e-7, atol=0)
        assert_same_bits({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, before)
        if sparsified:
            theirs = nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
            torch.testing.assert_close(norm, theirs)
        else:
            for p in twin.parameters():
                if p.grad is not None:
                    p.grad *= min(1.0, max_norm / (float(expected) + 1e-6))
        optimizer.step()
        other.step()
    assert_near(weights(model), weights(twin), 1e-6)
    if max_norm == 0.05:  # it does clip
        assert differ(weights(model), train(*setup(sparsified, torch.float32, eps=1e-3), 4))


@pytest.mark.parametrize("clear", ["zero_grad", "step", "clip again"])
def test_clipping_counts_for_one_step(clear):
    (model, optimizer), (twin, other) = setup(eps=1e-2), setup(eps=1e-2)
    for m, o in ((model, optimizer), (twin, other)):
        backward(m, 0)
        if clear == "step":
            o.clip_grad_norm_(1e-3)
            o.step()
    if clear == "step":
        other.zero_grad()
        set_grads(twin)
        set_grads(model)
    else:
        optimizer.clip_grad_norm_(1e-3)
    if clear == "clip again":
        optimizer.clip_grad_norm_(1e3)
    if clear == "zero_grad":
        optimizer.zero_grad()
        backward(model, 0)
    optimizer.step()
    other.step()
    assert_same_bits(weights(model), weights(twin))


@both
def test_clipping_with_a_grad_scaler(sparsified):
    model, optimizer = setup(sparsified, torch.float32, eps=1e-3)
    twin, other = setup(sparsified, torch.float32, eps=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for i in range(4):
        optimizer.zero_grad()
        ids = torch.randint(0, 10, (8,), generator=torch.Generator().manual_seed(i))
        scaler.scale(model(ids).square().mean() * (float("inf") if i == 1 else 1)).backward()
        scaler.unscale_(optimizer)
        norm = optimizer.clip_grad_norm_(0.01)
        start = weights(model)
        scaler.step(optimizer)
        scaler.update()
        if i == 1:
            assert not torch.isfinite(norm)
            assert_same_bits(weights(model), start)
            continue
        other.zero_grad()
        twin(ids).square().mean().backward()
        torch.testing.assert_close(other.clip_grad_norm_(0.01), norm)
        other.step()
    assert_near(weights(model), weights(twin), 1e-6)
    assert {float(s["step"]) for s in optimizer.state.values()} == {3.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["0.weight", "3.bias"])
def test_gradients_that_are_not_finite(value, where):
    model, optimizer = setup()
    backward(model, 0)
    model[1].weight.grad[~make_mask().to_dense()["1.weight"]] = value
    assert torch.isfinite(optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True))  # what is not trained does not count
    model.get_parameter(where).grad[:] = value
    assert not torch.isfinite(optimizer.clip_grad_norm_(1.0))
    with pytest.raises(RuntimeError, match="norm of the gradients"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)


@pytest.mark.parametrize("max_norm", [-1.0, float("nan"), "1", None, True])
def test_clip_grad_norm_refuses(max_norm):
    optimizer = setup()[1]
    with pytest.raises(ValueError, match="max_norm"):
        optimizer.clip_grad_norm_(max_norm)
    assert float(optimizer.clip_grad_norm_(1.0)) == 0  # there are no gradients


# ---- wrapped models ----
class Replica(nn.Module):
    """DistributedDataParallel's names."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, ids):
        return self.module(ids)


def compiled(model):
    return torch.compile(model, backend="eager")


def checkpointed(model):
    for i in (1, 3):
        model[i] = checkpoint_wrapper(model[i])
    return model


WRAPPERS = {
    "compile": compiled,
    "replica": Replica,
    "checkpoint": checkpointed,
    "replica of compile": lambda m: Replica(compiled(m)),
    "compile of replica": lambda m: compiled(Replica(checkpointed(m))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@both
def test_names_of_wrapped_models(sparsified, wrapper):
    """The wrapped model trains as the plain one, and its optimizer's state loads there."""
    model, optimizer = setup(sparsified)
    inner = make_model()
    if sparsified:
        sparsify(inner, make_mask())
    wrapped = WRAPPERS[wrapper](inner)
    assert any(w in n for n, _ in wrapped.named_parameters() for w in ("module.", "_orig_mod."))
    other = SparseAdamW(wrapped.named_parameters(), make_mask(), lr=1e-2)
    assert_same_bits([*train(model, optimizer, 3).values()], [*train(wrapped, other, 3).values()])
    fresh, resumed = setup(sparsified)
    fresh.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_file(other.state_dict()))
    assert_same_bits(train(fresh, resumed, 2, first=3), train(model, optimizer, 2, first=3))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_mask_made_of_the_wrapped_model(wrapper):
    wrapped = WRAPPERS[wrapper](make_model())
    before = weights(wrapped)
    mask = CSRMask.from_dense({n: torch.ones(p.shape, dtype=torch.bool) for n, p in wrapped.named_parameters()})
    after = train(wrapped, SparseAdamW(wrapped.named_parameters(), mask), 1)
    assert all(differ({n: after[n]}, before) for n in mask.names)


@pytest.mark.parametrize("wrap", [nn.Identity(), Replica, compiled], ids=["plain", "replica", "compile"])
def test_a_model_with_a_module_of_that_name(wrap):
    model = Replica(nn.Linear(2, 2))
    mask = CSRMask.from_dense({"module.weight": torch.eye(2, dtype=torch.bool)})
    wrapped = wrap(model)
    optimizer = SparseAdamW(wrapped.named_parameters(), mask, weight_decay=0.5)
    before = weights(model)["module.weight"]
    wrapped(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(model.module.weight == before, ~torch.eye(2, dtype=torch.bool))


# ---- transformers.Trainer ----
STEPS, HALF, LR = 24, 12, 1e-2


class Examples(torch.utils.data.Dataset):
    """Random tokens; the first one decides the label."""

    ids = torch.randint(0, 6, (40, 4), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i, 0] % 2}


def make_bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=6,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    return transformers.BertForSequenceClassification(config)  # with dropout: resuming restores random numbers, too


def bert_mask(model):
    named = {n: p.detach() for n, p in model.named_parameters() if p.dim() == 2}
    return topk_mask({n: p for n, p in named.items() if "classifier" not in n and "pooler" not in n}, density=0.1)


def run_trainer(folder, sparsified, stop=None, resume=None, **options):
    """Parameters of the plain model, and the learning rates, gradient norms and losses of each step."""
    transformers = pytest.importorskip("transformers")
    rates, norms, losses = [], [], []

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, model=None, **_):
            rates.append(optimizer.param_groups[0]["lr"])
            norms.append(float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()))

        def on_log(self, args, state, control, logs=None, **_):
            losses.extend([logs["loss"]] if "loss" in logs else [])

        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == stop

    model = make_bert()
    mask = bert_mask(model)
    if sparsified:
        sparsify(model, mask)
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=LR, **options)
    scheduler = lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        max_steps=STEPS,
        save_steps=HALF,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        logging_steps=1,
        dataloader_pin_memory=False,
    )
    optimizers = optimizer, scheduler
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Examples(), optimizers=optimizers, callbacks=[Watch()]
    )
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == (stop or STEPS)
    return dict((densify(model) if sparsified else model).named_parameters()), rates, norms, losses


@pytest.mark.parametrize(
    ("sparsified", "options"),
    [
        (False, {}),
        (True, {}),
        (True, {"state_dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 1}),
    ],
    ids=["plain", "sparsified", "sparsified, bfloat16 state"],
)
def test_trainer(tmp_path, sparsified, options):
    """Learns, by the schedule and with clipped gradients; only the mask's entries move; an interrupted run ends the
    same.
    """
    start = dict(make_bert().named_parameters())
    whole, rates, norms, losses = run_trainer(tmp_path / "whole", sparsified, **options)
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])
    assert rates == pytest.approx([LR * (1 - i / STEPS) for i in range(STEPS)])
    assert max(norms) < 0.501
    assert sum(norm > 0.499 for norm in norms) > 2  # some were clipped
    for name, chosen in bert_mask(make_bert()).to_dense().items():
        assert torch.equal(bits(whole[name])[~chosen], bits(start[name])[~chosen]), name
    moved = [n for n in whole if not torch.equal(whole[n], start[n])]
    assert len(moved) > 0.8 * len(whole)

    run_trainer(tmp_path / "broken", sparsified, stop=HALF, **options)
    checkpoint = str(tmp_path / f"broken/checkpoint-{HALF}")
    resumed, resumed_rates, *_ = run_trainer(tmp_path / "broken", sparsified, resume=checkpoint, **options)
    assert resumed_rates == rates[HALF:]
    assert_same_bits(resumed, whole)
