"""`track_changes` and `take_patch`: patches against `SparsePatch.diff` of copies of the model, and receivers."""

import contextlib
import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optimizer_setup import backward, bits, make_mask, make_model, set_grads, train
from torch import nn

from deftx_kernels import CSRMask, SparseAdamW, SparsePatch, densify, sparsify

pytestmark = pytest.mark.usefixtures("one_thread")
bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


def plain(model):
    """A copy of the plain model, whose bits are those of the dense tensors."""
    copied = copy.deepcopy(model)
    with contextlib.suppress(ValueError):
        densify(copied)
    return copied


class Pair:
    """A trainer and a receiver, which gets every patch."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer = model, optimizer
        self.last = plain(model)
        self.receiver = plain(model)

    def take(self, exactly=False):
        """Take a patch, compare it with the difference since the last one, and apply it."""
        patch, present = self.optimizer.take_patch(self.model), plain(self.model)
        expected = SparsePatch.diff(present, self.last)
        for name in expected.names:
            indices, values = patch.flat(name)
            found = torch.isin(indices, expected.flat(name)[0])
            assert torch.equal(indices[found], expected.flat(name)[0]), name
            assert torch.equal(bits(values[found]), bits(expected.flat(name)[1])), name
        if exactly:
            assert (patch.names, patch.nnz) == (expected.names, expected.nnz)
        assert (patch.before, patch.after, patch.tied) == (expected.before, expected.after, expected.tied)
        patch.apply_(self.receiver)
        for (name, got), want in zip(self.receiver.state_dict().items(), present.state_dict().values()):
            assert torch.equal(bits(got), bits(want)), name
        self.last = present
        return patch


def make_pair(dtype=f32, masked=True, sparsified=False, **options):
    model, mask = make_model(dtype), make_mask() if masked else None
    if sparsified:
        sparsify(model, mask)
    return Pair(model, SparseAdamW(model.named_parameters(), mask, track_changes=True, **({"lr": 1e-3} | options)))


OPTIONS = {
    "float32": dict(dtype=f32),
    "float64": dict(dtype=f64, l1=1e-3),
    "float16, master": dict(dtype=f16, master=True, lr=1e-4),
    "bfloat16": dict(dtype=bf16),
    "bfloat16, master": dict(dtype=bf16, master=True, lr=1e-4),
    "bfloat16, stochastic rounding": dict(
        dtype=bf16, stochastic_rounding=True, state_dtype=bf16, seed=3, lr=1e-5, weight_decay=0.0
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["masked", "full", "sparsified"])
@pytest.mark.parametrize("name", OPTIONS)
def test_single_steps_are_the_exact_differences(name, kind):
    pair = make_pair(masked=kind != "full", sparsified=kind == "sparsified", **OPTIONS[name])
    changed = 0
    for i in range(22):
        train(pair.model, pair.optimizer, 1, first=i)
        changed += pair.take(exactly=True).nnz
    assert changed


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "full"])
@pytest.mark.parametrize("name", OPTIONS)
def test_training_is_the_same_with_tracking(name, masked):
    options = {"lr": 1e-3} | OPTIONS[name]
    dtype = options.pop("dtype")
    models = [make_model(dtype) for _ in range(2)]
    names = ("0.weight", "1.bias", "1.weight", "3.bias", "3.weight")
    mask = make_mask(names=names) if masked else None  # every tensor, so that both use one kernel
    optimizers = [SparseAdamW(m.named_parameters(), mask, track_changes=t, **options) for m, t in zip(models, (0, 1))]
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, 3)
    for one, other in zip(*(m.parameters() for m in models)):
        assert torch.equal(bits(one), bits(other))
    for one, other in zip(*(o.state.values() for o in optimizers)):
        assert all(torch.equal(bits(one[key]), bits(other[key])) for key in one)


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "full"])
def test_real_layers_on_several_threads(masked):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768), nn.LayerNorm(768)).to(bf16)
    mask = CSRMask.from_dense({"0.weight": torch.rand(3072, 768) < 0.05}) if masked else None
    options = dict(lr=1e-5, master=True, track_changes=True)
    pair = Pair(model, SparseAdamW(model.named_parameters(), mask, **options))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for seed in (1, 2):
            set_grads(model, seed=seed)
            pair.optimizer.step()
            patch = pair.take(exactly=True)
            assert 0 < patch.nnz < 0.5 * sum(p.numel() for p in model.parameters())
    finally:
        torch.set_num_threads(before)


def test_without_a_mask_it_is_dense_adamw():
    model, other = make_model(f64), make_model(f64)
    options = dict(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.99))
    optimizer, reference = SparseAdamW(model.named_parameters(), None, **options), torch.optim.AdamW(
        other.named_parameters(), **options
    )  # fmt: skip
    for i in range(5):
        for m, o in ((model, optimizer), (other, reference)):
            o.zero_grad()
            backward(m, i)
            if i == 2:
                m[3].bias.grad = None
            o.step()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        assert optimizer.state[p]["exp_avg"].shape == p.shape
        assert float(optimizer.state[p]["step"]) == float(reference.state[q]["step"])
    assert {f for g in optimizer.param_groups for f in g["mask_fingerprints"]} == {""}
    total = optimizer.clip_grad_norm_(1.0)
    torch.testing.assert_close(total.double(), nn.utils.get_total_norm([p.grad for p in model.parameters()]).double())


def test_a_state_without_a_mask_resumes_bit_identically():
    options = dict(lr=1e-3, master=True, state_dtype=bf16, stochastic_rounding=True, seed=1)
    model, optimizer = make_model(bf16), None
    optimizer = SparseAdamW(model.named_parameters(), None, **options)
    train(model, optimizer, 3)
    resumed = copy.deepcopy(model)
    other = SparseAdamW(resumed.named_parameters(), None, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, other)):
        train(m, o, 3, first=3)
    assert all(torch.equal(bits(p), bits(q)) for p, q in zip(model.parameters(), resumed.parameters()))


def test_bad_arguments():
    model = make_model(f32)
    with pytest.raises(ValueError, match="decay_to needs a mask"):
        SparseAdamW(model.named_parameters(), None, decay_to=torch.zeros(3))
    optimizer = SparseAdamW(model.named_parameters(), None)
    with pytest.raises(ValueError, match="made without one"):
        optimizer.update_mask(make_mask())
    with pytest.raises(ValueError, match="track_changes=True"):
        optimizer.take_patch(model)
    sparsify(model, make_mask())
    with pytest.raises(ValueError, match="is sparsified"):
        SparseAdamW(model.named_parameters(), None)


def test_an_error_clears_nothing():
    pair = make_pair()
    train(pair.model, pair.optimizer, 2)
    for model, message in (
        (make_model(), "model lacks a tensor of shape .* not a copy"),
        (pair.model[0], "model lacks a tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            pair.optimizer.take_patch(model)
    with pytest.raises(ValueError, match="model_version"):
        pair.optimizer.take_patch(pair.model, model_version=-1)
    pair.take()
    assert pair.optimizer.take_patch(pair.model, model_version=7).model_version == 7
    pair.model.register_buffer("new", torch.zeros(2))
    with pytest.raises(ValueError, match="'new'"):
        pair.optimizer.take_patch(pair.model)


def test_other_writes_and_buffers_are_in_the_patch_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2), nn.Linear(2, 2))
    model[3].requires_grad_(False)
    pair = Pair(model, SparseAdamW(model.named_parameters(), None, lr=1e-3, track_changes=True))
    assert pair.take().nnz == 0  # of buffers, before the first step
    for i in range(3):
        model(torch.randn(8, 4)).sum().backward()
        pair.optimizer.step()
        if i == 1:
            with torch.no_grad():
                model[0].weight[0, 0] += 1
                model[3].bias.add_(1)
            pair.optimizer.step()
        patch = pair.take()
        assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(patch.names)
        assert ("3.bias" in patch.names) == (i == 1)
    with torch.no_grad():  # the same bits again
        model[0].weight.copy_(model[0].weight.clone())
    assert pair.take().nnz == 0
    model[0].weight.data = model[0].weight.data + 1
    assert pair.take().names == ("0.weight",)


def test_a_write_through_data_is_found_by_the_receiver():
    pair = make_pair(masked=False)
    pair.take()
    train(pair.model, pair.optimizer, 1)
    pair.optimizer.zero_grad()
    pair.model[1].weight.data.view(-1)[3] += 1
    set_grads([pair.model[1].bias], 1.0)
    pair.optimizer.step()
    patch = pair.optimizer.take_patch(pair.model)
    if patch.flat("1.weight")[0].numel() < 24:
        with pytest.raises(ValueError, match=r"1\.weight"):
            patch.apply_(pair.receiver)


def test_changes_survive_new_masks_groups_and_buckets():
    pair = make_pair(lr=1e-2)
    train(pair.model, pair.optimizer, 2)
    pair.optimizer.update_mask(make_mask(seed=5))
    train(pair.model, pair.optimizer, 2, first=2)
    for i in range(4, 7):  # buckets are divided
        pair.optimizer.zero_grad()
        backward(pair.model, i)
        pair.model[1].weight.grad = None
        pair.optimizer.step()
    extra = nn.Parameter(torch.ones(3))
    pair.model.register_parameter("extra", extra)
    pair.last.register_parameter("extra", nn.Parameter(torch.ones(3)))
    pair.receiver.register_parameter("extra", nn.Parameter(torch.ones(3)))
    pair.optimizer.add_param_group({"params": [("extra", extra)]})
    extra.grad = torch.ones(3)
    pair.optimizer.step()
    assert "extra" in pair.take().names


def test_a_loaded_state_and_copies_begin_anew():
    pair = make_pair(dtype=bf16, masked=False, master=True)
    train(pair.model, pair.optimizer, 2)
    state = pickle.loads(pickle.dumps(pair.optimizer.state_dict()))
    pair.optimizer.load_state_dict(state)
    pair.last, pair.receiver = plain(pair.model), plain(pair.model)
    train(pair.model, pair.optimizer, 1, first=2)
    pair.take(exactly=True)
    copied = Pair(*copy.deepcopy((pair.model, pair.optimizer)))
    train(copied.model, copied.optimizer, 1, first=3)
    copied.take(exactly=True)
    train(pair.model, pair.optimizer, 1, first=3)
    pair.take(exactly=True)


@pytest.mark.parametrize("dtype", [f32, f16], ids=str)
@pytest.mark.parametrize("track", [True, False])
def test_a_run_may_go_on_with_or_without_tracking(dtype, track):
    """Of parameters outside the mask, whose moments are float32 with tracking and of their dtype without."""
    models, optimizers = [make_model(dtype) for _ in range(2)], []
    for model, tracked in zip(models, (track, not track)):
        optimizers.append(SparseAdamW(model.named_parameters(), make_mask(), lr=1e-3, track_changes=tracked))
    train(models[0], optimizers[0], 2)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    models[1].load_state_dict(models[0].state_dict())
    for model, optimizer in zip(models, optimizers):
        train(model, optimizer, 1, first=2)
    for one, other in zip(*(m.parameters() for m in models)):
        torch.testing.assert_close(one, other, rtol=1e-2 if dtype == f16 else 1e-6, atol=1e-4)


def test_tied_and_not_contiguous_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last))
    model.head = nn.Linear(8, 12, bias=False)
    model.head.weight = model[0].weight
    assert not model[1].weight.is_contiguous()
    mask = CSRMask.from_dense({"1.weight": torch.rand(4, 3, 2, 2) < 0.5})
    for chosen in (mask, None):
        pair = Pair(model, SparseAdamW(model.named_parameters(), chosen, lr=1e-2, track_changes=True))
        for seed in (1, 2):
            set_grads(model, seed=seed)
            pair.optimizer.step()
            assert pair.take(exactly=True).tied == {"head.weight": "0.weight"}


def test_skipped_steps_of_a_grad_scaler_change_nothing():
    pair = make_pair(dtype=f32, masked=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for i in range(4):
        pair.optimizer.zero_grad()
        ids = torch.arange(6) + i
        scaler.scale(pair.model(ids).square().sum()).backward()
        if i == 2:
            pair.model[1].weight.grad[0, 0] = torch.inf
        scaler.step(pair.optimizer)
        scaler.update()
        assert (pair.take(exactly=True).nnz == 0) == (i == 2)


ACTIONS = ["step", "step", "step", "write", "take", "mask", "skip", "partial", "closure"]


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.sampled_from(ACTIONS), min_size=1, max_size=12), st.sampled_from([f32, bf16]), st.booleans())
def test_any_sequence_of_actions(actions, dtype, masked):
    pair = make_pair(dtype=dtype, masked=masked, master=True, lr=1e-3)
    pair.take()  # without it, the first patch is of what changes from the first step on
    for i, action in enumerate(actions):
        pair.optimizer.zero_grad()
        if action == "take":
            pair.take()
        elif action == "write":
            with torch.no_grad():
                pair.model[1 + 2 * (i % 2)].weight[0, 1] += 0.25
        elif action == "mask" and masked:
            pair.optimizer.update_mask(make_mask(seed=i))
        elif action == "closure":
            pair.optimizer.step(lambda i=i: backward(pair.model, i))
        else:
            backward(pair.model, i)
            if action == "partial":
                pair.model[0].weight.grad = None
            pair.optimizer.found_inf = torch.tensor(1.0) if action == "skip" else None
            pair.optimizer.step()
            pair.optimizer.found_inf = None
    pair.take()
