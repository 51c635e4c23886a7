"""SparseAdamW against torch.optim.AdamW; state, groups, scalers, resume. The kernel itself is tested in
test_sparse_adamw.py.
"""

import copy
import io

import pytest
import torch
from torch import nn

from deftx_kernels import CSRMask, SparseAdamW, densify, sparse_adamw, sparsify, topk_mask


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 3)).to(
        dtype
    )
    for p in model[3].parameters():
        p.requires_grad_(False)
    return model


def make_mask(model, density=0.3, names=("0.weight", "1.weight", "1.bias")):
    generator = torch.Generator().manual_seed(1)
    return topk_mask(
        {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters() if n in names},
        density=density,
    )


def batches(n, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(0, 20, (6, 4), generator=generator), torch.randint(0, 3, (6, 4), generator=generator))
        for _ in range(n)
    ]


def train(model, optimizer, data, scheduler=None):
    for ids, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), labels.flatten()).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("sparsified", [False, True])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}, {"maximize": True}])
def test_density_one_equals_adamw(sparsified, options):
    reference, model = make_model(), make_model()
    mask = make_mask(model, 1.0)
    if sparsified:
        sparsify(model, mask)
    data = batches(50)
    expected = train(
        reference, torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, **options), data
    )
    train(model, SparseAdamW(model.named_parameters(), mask, lr=1e-2, **options), data)
    got = dict((densify(model) if sparsified else model).named_parameters())
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name].detach(), tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("sparsified", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_outside_the_mask_stay_bit_identical_under_weight_decay(sparsified, dtype):
    """composable-sft multiplies the gradient by the mask, and weight decay then moves every weight."""
    model = make_model(dtype)
    mask = make_mask(model)
    with torch.no_grad():
        model[1].weight.view(-1)[:3] = -0.0
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    if sparsified:
        sparsify(model, mask)
    after = train(model, SparseAdamW(model.named_parameters(), mask, lr=1e-2, weight_decay=0.5), batches(10))
    for name, selected in mask.to_dense().items():
        assert torch.equal(bits(after[name])[~selected], bits(before[name])[~selected]), name
        assert not torch.equal(after[name][selected], before[name][selected]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsified", [False, True])
def test_state_dict_resumes_bit_identically(dtype, sparsified):
    data = batches(12)

    def fresh(seed=0):
        model = make_model(dtype, seed)
        mask = make_mask(make_model(dtype))
        if sparsified:
            sparsify(model, mask)
        optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2, master=not sparsified)
        return model, optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 12)

    model, optimizer, scheduler = fresh()
    train(model, optimizer, data[:6], scheduler)
    file = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}, file
    )
    file.seek(0)
    expected = train(model, optimizer, data[6:], scheduler)
    saved = torch.load(file, weights_only=True)
    model, optimizer, scheduler = fresh(seed=5)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
    resumed = train(model, optimizer, data[6:], scheduler)
    for name, tensor in expected.items():
        assert torch.equal(bits(tensor), bits(resumed[name])), name


def test_state_is_compact_and_float32():
    model = make_model(torch.bfloat16)
    mask = make_mask(model)
    optimizer = SparseAdamW(model.named_parameters(), mask)
    train(model, optimizer, batches(2))
    for name, p in model.named_parameters():
        if name in mask:
            assert optimizer.state[p]["exp_avg"].shape == (mask[name].nnz,)
            assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float32
    assert float(optimizer.state[model[1].weight]["step"]) == 2


def test_a_state_of_another_mask_is_refused():
    model = make_model()
    one, other = make_mask(model), make_mask(model, 0.2)
    state = SparseAdamW(model.named_parameters(), one).state_dict()
    with pytest.raises(
        ValueError, match="with another mask than this optimizer's: '0.weight' has .. entries there and .. here"
    ):
        SparseAdamW(model.named_parameters(), other).load_state_dict(state)


def test_parameter_groups_and_add_param_group():
    reference, model = make_model(), make_model()
    mask = make_mask(model, 1.0)
    named = dict(model.named_parameters())
    optimizer = SparseAdamW([{"params": [("0.weight", named["0.weight"])], "lr": 1e-3, "weight_decay": 0.0},
                             {"params": [(n, p) for n, p in named.items() if n.startswith("1")]}], mask, lr=1e-2)  # fmt: skip
    optimizer.add_param_group({"params": [(n, p) for n, p in named.items() if n.startswith("4")], "betas": (0.5, 0.9)})
    plain = torch.optim.AdamW([{"params": [reference[0].weight], "lr": 1e-3, "weight_decay": 0.0},
                               {"params": list(reference[1].parameters())},
                               {"params": list(reference[4].parameters()), "betas": (0.5, 0.9)}], lr=1e-2)  # fmt: skip
    data = batches(20)
    expected, got = train(reference, plain, data), train(model, optimizer, data)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


def test_parameters_without_a_gradient_are_skipped_and_keep_their_own_step():
    reference, model = make_model(), make_model()
    mask = make_mask(model, 1.0)
    a = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2)
    b = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
    for i, (ids, labels) in enumerate(batches(6)):
        for m, o in ((reference, a), (model, b)):
            o.zero_grad()
            nn.functional.cross_entropy(m(ids).flatten(0, 1), labels.flatten()).backward()
            if i % 2:
                m[1].bias.grad = None
            o.step()
    for p, q in zip(reference.parameters(), model.parameters()):
        torch.testing.assert_close(q, p, atol=1e-5, rtol=1e-4)
    assert float(b.state[model[1].bias]["step"]) == 3


@pytest.mark.parametrize("sparsified", [False, True])
def test_grad_scaler_skips_overflows_and_unscales(sparsified):
    reference, model = make_model(), make_model()
    mask = make_mask(model, 1.0)
    if sparsified:
        sparsify(model, mask)
    plain = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], lr=1e-2, fused=True)
    ours = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
    for m, o in ((reference, plain), (model, ours)):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        for i, (ids, labels) in enumerate(batches(6)):
            o.zero_grad()
            loss = nn.functional.cross_entropy(m(ids).flatten(0, 1), labels.flatten())
            scaler.scale(loss * (float("inf") if i == 3 else 1.0)).backward()
            scaler.step(o)
            scaler.update()
    got = dict((densify(model) if sparsified else model).named_parameters())
    for name, p in reference.named_parameters():
        torch.testing.assert_close(got[name], p, atol=1e-5, rtol=1e-4)


def test_clip_grad_norm_and_closure():
    model = sparsify(make_model(), mask := make_mask(make_model()))
    optimizer = SparseAdamW(model.named_parameters(), mask)
    ids, labels = batches(1)[0]

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    before = float(closure().detach())
    assert float(optimizer.step(closure).detach()) == before
    total = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert float(total) <= 0.1 + 1e-5


def test_l1_and_decay_pull_towards_the_origin_given():
    model = make_model()
    mask = make_mask(model)
    start = mask.gather(dict(model.named_parameters()))
    with torch.no_grad():
        mask.add_(dict(model.named_parameters()), torch.ones(mask.nnz))
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=0.1, weight_decay=0.5, l1=1.0, decay_to=start)
    for _ in range(100):
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        optimizer.step()
    assert float((mask.gather(dict(model.named_parameters())) - start).abs().max()) < 0.2


def test_update_mask_carries_moments_over():
    model = make_model()
    old, new = make_mask(model, 0.4), make_mask(model, 0.2)
    optimizer = SparseAdamW(model.named_parameters(), old, lr=1e-2)
    train(model, optimizer, batches(3))
    moments = {
        n: old[n].scatter_({n: torch.zeros(p.shape)}, optimizer.state[p]["exp_avg"])[n]
        for n, p in model.named_parameters()
        if n in old
    }
    optimizer.update_mask(new)
    for name, p in model.named_parameters():
        if name in new:
            assert torch.equal(
                optimizer.state[p]["exp_avg"], new[name].gather({name: moments[name] * old.to_dense()[name]})
            )
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    after = train(model, optimizer, batches(2))
    for name, selected in new.to_dense().items():
        assert torch.equal(after[name][~selected], before[name][~selected])
    with pytest.raises(ValueError, match="same tensors"):
        optimizer.update_mask(new["1.bias"])
    sparsified = sparsify(make_model(), old)
    with pytest.raises(ValueError, match="densify"):
        SparseAdamW(sparsified.named_parameters(), old).update_mask(new)


def test_values_moved_apart_still_work():
    """`.to()` and deepcopy give every module its own buffer."""
    model = sparsify(make_model(), mask := make_mask(make_model()))
    twin = copy.deepcopy(model)
    data = batches(5)
    a = train(model, SparseAdamW(model.named_parameters(), mask, lr=1e-2), data)
    b = train(twin, SparseAdamW(twin.named_parameters(), mask, lr=1e-2), data)
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_bad_arguments():
    model = make_model()
    mask = make_mask(model)
    with pytest.raises(TypeError, match="mask must be a CSRMask"):
        SparseAdamW(model.named_parameters(), None)
    with pytest.raises(TypeError, match="pairs"):
        SparseAdamW(model.parameters(), mask)
    with pytest.raises(ValueError, match="'1.weight', which is not among"):
        SparseAdamW(((n, p) for n, p in model.named_parameters() if n != "1.weight"), mask)
    for options, message in (
        ({"lr": -1}, "lr"),
        ({"betas": (1.0, 0.9)}, "betas"),
        ({"eps": -1}, "eps"),
        ({"weight_decay": -1}, "weight_decay"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseAdamW(model.named_parameters(), mask, **options)
    sparsify(model, mask)
    with pytest.raises(ValueError, match="another mask"):
        SparseAdamW(model.named_parameters(), make_mask(make_model(), 0.1))


def functional_arguments():
    mask = CSRMask.from_dense({"w": torch.eye(3, dtype=torch.bool)})
    return dict(
        params={"w": torch.ones(3, 3)},
        grads={"w": torch.ones(3, 3)},
        exp_avg=torch.zeros(3),
        exp_avg_sq=torch.zeros(3),
        step=1,
        mask=mask,
        lr=0.1,
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"step": 0}, ValueError, "step must be an int from 1"),
        ({"step": torch.tensor(1.0, dtype=torch.bfloat16)}, ValueError, "step must be a 0-d tensor of 32 bits"),
        ({"exp_avg": torch.zeros(4)}, ValueError, r"exp_avg must be compact, \[nnz\] = \[3\]"),
        (
            {"exp_avg_sq": torch.zeros(3, dtype=torch.bfloat16)},
            ValueError,
            "exp_avg and exp_avg_sq must have the same dtype",
        ),
        ({"exp_avg": torch.zeros(3).half()}, ValueError, "exp_avg must be contiguous torch.float32 or torch.bfloat16"),
        ({"values": torch.zeros(3).bfloat16()}, ValueError, "values must be contiguous torch.float32 for"),
        ({"stochastic_rounding": True, "seed": -1}, ValueError, "seed must be at least 0"),
        ({"stochastic_rounding": True, "seed": 0.5}, TypeError, "seed must be an int"),
        ({"stochastic_rounding": True, "seed": 2**63}, ValueError, r"seed must be less than 2\*\*63"),
        (
            {"params": {"w": torch.ones(3, 3).half()}, "stochastic_rounding": True},
            ValueError,
            "not defined for float16 params",
        ),
        ({"grads": {"w": torch.ones(2, 3)}}, ValueError, r"grads\['w'\] has shape"),
        ({"grads": torch.ones(9)}, ValueError, "grads must be compact"),
        ({"params": {"w": torch.ones(3, 3, dtype=torch.int32)}}, TypeError, r"params\['w'\] must be float32"),
        ({"values": torch.ones(2)}, ValueError, "values must be compact"),
        ({"decay_to": torch.ones(2)}, ValueError, "decay_to must be compact"),
        ({"lr": -0.1}, ValueError, "lr must be a number, at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas"),
        ({"l1": -1.0}, ValueError, "l1"),
    ],
)
def test_functional_bad_arguments_change_nothing(change, error, message):
    arguments = functional_arguments() | change
    before = copy.deepcopy({k: v for k, v in arguments.items() if k in ("params", "exp_avg", "exp_avg_sq")})
    with pytest.raises(error, match=message):
        sparse_adamw(**arguments)
    assert torch.equal(arguments["params"]["w"], before["params"]["w"])
    assert torch.equal(arguments["exp_avg"], before["exp_avg"])


def test_step_counter_passes_256():
    """SpIEL's bfloat16 counter never passes 1 (and bfloat16 cannot count past 256)."""
    model = make_model(torch.bfloat16)
    optimizer = SparseAdamW(model.named_parameters(), make_mask(model))
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    for _ in range(300):
        optimizer.step()
    assert {float(s["step"]) for s in optimizer.state.values()} == {300.0}
