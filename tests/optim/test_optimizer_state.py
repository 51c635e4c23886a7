"""Groups, masks, state dicts, hooks and copies of SparseAdamW."""

import copy
import pickle

import pytest
import torch
from optimizer_setup import (
    MASKED,
    ORIGIN,
    assert_near,
    assert_same_bits,
    backward,
    both,
    differ,
    full_mask,
    label,
    make_mask,
    make_model,
    set_grads,
    setup,
    through_file,
    train,
    trained,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler

from deftx_kernels import CSRMask, SparseAdamW, sparsify

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- groups ----
@both
def test_options_of_groups(sparsified):
    """Each group as an optimizer of its own; the last one is added later."""
    options = [
        {"lr": 0.03, "state_dtype": torch.bfloat16},
        {"lr": 0.01, "weight_decay": 0.3, "betas": (0.5, 0.8), "eps": 1e-3},
        {"maximize": True, "l1": 0.1},
    ]
    ends = []
    for in_one in (True, False):
        model, mask = make_model(torch.float32), make_mask()
        if sparsified:
            sparsify(model, mask)
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        groups = [{"params": [(n, p) for n, p in named if n[0] == digit], **o} for digit, o in zip("013", options)]
        if in_one:
            optimizers = [SparseAdamW(groups[:2], mask)]
            optimizers[0].add_param_group(groups[2])
            assert optimizers[0].state_dict()["param_groups"][0]["state_dtype"] == torch.bfloat16
        else:
            masks = [mask.restrict([n for n in MASKED if n[0] == digit]) for digit in "01"]
            masks.append(CSRMask.from_dense({"none": torch.zeros(1, dtype=torch.bool)}))
            optimizers = [SparseAdamW([group], m) for group, m in zip(groups, masks)]
        for i in range(10):
            model.zero_grad()
            backward(model, i)
            for o in optimizers:
                o.step()
        ends.append(weights(model))
    assert_same_bits(*ends)


def test_groups_without_trainable_parameters_keep_their_place():
    model, mask = make_model(), make_mask(names=["1.weight"])
    model[0].requires_grad_(False)
    named = list(model.named_parameters())
    optimizer = SparseAdamW([{"params": named[:1]}, {"params": iter(named[1:])}, {"params": []}], mask, lr=0.1)
    assert [len(g["params"]) for g in optimizer.param_groups] == [0, 4, 0]
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda i: 5.0, lambda i: 0.0, lambda i: 7.0])
    start = weights(model)
    assert_same_bits(train(model, optimizer, 2, scheduler=scheduler), start)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.0, pytest.approx(0.7)]
    other = SparseAdamW([{"params": named[:1]}, {"params": named[1:]}, {"params": []}], mask)
    other.load_state_dict(through_file(optimizer.state_dict()))


ELSEWHERE = nn.Sequential(nn.Identity(), nn.Linear(4, 6).double())
sparsify(ELSEWHERE, make_mask(0.9, names=["1.bias", "1.weight"]))


def bad_groups():
    leaf = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    return {
        "no names": ([leaf], {}, TypeError, "pairs"),
        "a tensor": (leaf, {}, TypeError, "pairs"),
        "half the names": ([("a", leaf), leaf], {}, TypeError, "pairs"),
        "negative lr": ([("a", leaf)], {"lr": -1.0}, ValueError, "lr"),
        "negative lr tensor": ([("a", leaf)], {"lr": torch.tensor(-1.0)}, ValueError, "lr"),
        "an lr for each entry": ([("a", leaf)], {"lr": torch.ones(2)}, ValueError, "lr"),
        "negative decay": ([("a", leaf)], {"weight_decay": -0.1}, ValueError, "weight_decay"),
        "betas": ([("a", leaf)], {"betas": (1.0, 0.5)}, ValueError, "betas"),
        "eps": ([("a", leaf)], {"eps": float("nan")}, ValueError, "eps"),
        "l1": ([("a", leaf)], {"l1": -1}, ValueError, "l1"),
        "state_dtype": ([("a", leaf)], {"state_dtype": torch.float16}, ValueError, "state_dtype"),
        "seed": ([("a", leaf)], {"seed": -1}, ValueError, "seed"),
        "large seed": ([("a", leaf)], {"seed": 2**31}, ValueError, "seed"),
        "shape": ([("1.weight", leaf)], {}, ValueError, "shape"),
        "another mask": (list(ELSEWHERE.named_parameters()), {}, ValueError, "another mask"),
        "no leaf": ([("a", leaf * 2)], {}, ValueError, "non-leaf"),
        "a name that is taken": (
            [("1.weight", nn.Parameter(torch.ones(6, 4, dtype=torch.float64)))],
            {},
            ValueError,
            "another group already",
        ),
    }


@pytest.mark.parametrize("case", bad_groups())
def test_a_refused_group_changes_nothing(case):
    params, options, error, message = bad_groups()[case]
    (model, optimizer), (twin, other) = trained(2), trained(2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": params, **options})
    assert_same_bits(optimizer.state_dict(), before)
    assert_same_bits(train(model, optimizer, 2, first=2), train(twin, other, 2, first=2))


def test_bad_arguments():
    model, mask, pair = make_model(), make_mask(), nn.Parameter(torch.ones(2, 2))
    named = list(model.named_parameters())
    with pytest.raises(TypeError, match="mask must be a CSRMask or None, got str"):
        SparseAdamW(named, "all")
    with pytest.raises(ValueError, match="'1.weight', which is not among"):
        SparseAdamW([(n, p) for n, p in named if n != "1.weight"], mask)
    with pytest.raises(ValueError, match="more than one parameter group"):
        SparseAdamW([{"params": named}, {"params": named[:1]}], mask)
    with pytest.raises(ValueError, match="more than one parameter group"):
        SparseAdamW(named, mask).add_param_group({"params": named[-1:]})
    with pytest.warns(UserWarning, match="duplicate parameters"):
        SparseAdamW([*named, named[0]], mask)
    with pytest.raises(ValueError, match="two parameters are named 'w'"):  # or the first would silently stay
        SparseAdamW([("w", pair), ("w", nn.Parameter(torch.ones(2, 2)))], full_mask(w=(2, 2)))
    with pytest.raises(ValueError, match="set master=True"):
        setup(dtype=torch.float16, stochastic_rounding=True)


# ---- update_mask ----
def test_new_entries_decay_to_their_present_weight():
    """Entries in both masks keep the point that they decay to."""
    model, optimizer = setup(decay_to=ORIGIN, lr=0.1, weight_decay=0.5)
    old, new = make_mask(), make_mask(0.6, seed=9)
    start = weights(model)
    optimizer.update_mask(new)
    set_grads(model, 0.0)
    optimizer.step()
    origin = old.scatter_({n: torch.zeros_like(start[n]) for n in MASKED}, ORIGIN)
    was = old.to_dense()
    for name, chosen in new.to_dense().items():
        stayed, w, before = chosen & was[name], weights(model)[name], start[name]
        assert 0 < stayed.sum() < chosen.sum()
        torch.testing.assert_close(w[stayed], (before - 0.05 * (before - origin[name]))[stayed], rtol=0, atol=1e-15)
        assert torch.equal(w[~stayed], before[~stayed]), name


@pytest.mark.parametrize("options", [{}, {"decay_to": ORIGIN, "l1": 0.01}], ids=label)
def test_update_mask_keeps_the_trajectory_of_entries_that_stay(options):
    """With a mask of more entries, those of the old one continue as without the update, given the same gradients."""
    old, new = make_mask(), make_mask() | make_mask(0.6, seed=9)
    ends = []
    for update in (True, False):
        model, optimizer = setup(**options)
        for i in range(6):
            set_grads(model, seed=i)
            if update and i == 3:
                optimizer.update_mask(new)
                for name in MASKED:
                    moments = optimizer.state[model.get_parameter(name)]["exp_avg"]
                    dense = new[name].scatter_({name: torch.zeros(model.get_parameter(name).shape).double()}, moments)
                    assert torch.equal(dense[name] != 0, old.to_dense()[name])  # those of new entries start with 0
            optimizer.step()
        ends.append({n: w[old.to_dense()[n]] for n, w in weights(model).items() if n in MASKED})
    assert_near(*ends)


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (None, TypeError),
        (make_mask(names=["0.weight"]), ValueError),
        (full_mask(**dict.fromkeys(MASKED, (2, 2))), ValueError),
        (make_mask(0.6), ValueError),
    ],
    ids=["none", "names", "shapes", "entries in a frozen tensor"],
)
def test_a_refused_update_changes_nothing(mask, error):
    """The optimizer's own mask covers a frozen tensor, in which it has no entry."""
    old = CSRMask.from_dense({n: m & (n != "0.weight") for n, m in make_mask().to_dense().items()})
    ends = []
    for refused in (True, False):
        model = make_model()
        model[0].requires_grad_(False)
        origin = torch.ones(old.nnz, dtype=torch.float64)
        optimizer = SparseAdamW(model.named_parameters(), old, lr=1e-2, decay_to=origin)
        train(model, optimizer, 2)
        if refused:
            with pytest.raises(error):
                optimizer.update_mask(mask)
            assert optimizer.mask is old
        ends.append(train(model, optimizer, 2, first=2))
    assert_same_bits(*ends)


def test_the_mask_of_a_sparsified_model_cannot_change():
    _model, optimizer = setup(True)
    with pytest.raises(ValueError, match="densify"):
        optimizer.update_mask(make_mask(0.6))


# ---- state dicts ----
@both
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {"lr": torch.tensor(0.01)}),
        (torch.bfloat16, {"master": True, "state_dtype": torch.bfloat16, "stochastic_rounding": True, "seed": 3}),
        (torch.bfloat16, {"stochastic_rounding": True}),
    ],
    ids=label,
)
def test_state_dict(sparsified, dtype, options):
    """Deterministic, survives a file, and both a copy and the file continue bit by bit, dtypes as they were."""
    model, optimizer = setup(sparsified, dtype, **options)
    scheduler = lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    train(model, optimizer, 3, scheduler=scheduler)
    state = optimizer.state_dict()
    assert_same_bits(state, optimizer.state_dict())
    saved, copied = through_file(state), copy.deepcopy(state)
    saved_model, saved_scheduler = copy.deepcopy(model.state_dict()), through_file(scheduler.state_dict())
    assert_same_bits(saved, state)
    expected = train(model, optimizer, 3, first=3, scheduler=scheduler)
    for loaded in (saved, copied):
        before = copy.deepcopy(loaded)
        other, resumed = setup(sparsified, dtype, model_seed=4, **options)
        other.load_state_dict(saved_model)
        scheduler = lr_scheduler.LinearLR(resumed, 1.0, 0.1, 6)
        resumed.load_state_dict(loaded)
        scheduler.load_state_dict(saved_scheduler)
        assert_same_bits(resumed.state_dict(), before)
        assert_same_bits(train(other, resumed, 3, first=3, scheduler=scheduler), expected)
        assert_same_bits(resumed.state_dict(), optimizer.state_dict())
        assert_same_bits(loaded, before)  # what was loaded is no view of the state


@pytest.mark.parametrize("kind", [float, int])
def test_a_step_that_is_a_number(kind):
    model, optimizer = trained(3)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["step"] = kind(entry["step"])
    other, resumed = setup()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    assert_same_bits(train(other, resumed, 2, first=3), train(model, optimizer, 2, first=3))


def test_hooks_of_state_dicts():
    _, optimizer = trained(2)
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("before"))
    # a hook may keep something of its own in the state, as in torch's tests
    optimizer.register_state_dict_pre_hook(lambda o: o.state.__setitem__("note", 1))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    state = optimizer.state_dict()
    assert (calls, state["note"]) == (["before"], 1)
    _, other = setup()

    def adapt(_, given):
        adapted = copy.deepcopy(given)
        adapted["param_groups"][0]["lr"] = 0.003
        for entry in adapted["state"].values():
            if isinstance(entry, dict):
                entry["exp_avg"] *= 2
        return adapted

    other.register_load_state_dict_pre_hook(adapt)
    other.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    other.load_state_dict(state)
    assert calls == ["before", 0.003]
    assert optimizer.state.pop("note") == other.state.pop("note") == 1
    for one, two in zip(optimizer.state.values(), other.state.values()):
        assert torch.equal(two["exp_avg"], 2 * one["exp_avg"])
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


def test_a_hook_after_loading_sees_what_was_loaded_and_may_change_it():
    """float32 moments of bfloat16 parameters, not their rounding."""
    _, optimizer = trained(2, dtype=torch.bfloat16)
    _, other = setup(dtype=torch.bfloat16)
    seen = []

    def hook(o):
        for entry in o.state.values():
            seen.append(entry["exp_avg"].dtype)
            entry["exp_avg"].zero_()

    other.register_load_state_dict_post_hook(hook)
    other.load_state_dict(optimizer.state_dict())
    assert all(float(entry["exp_avg"].abs().sum()) == 0 for entry in other.state.values())
    assert seen[: len(MASKED)] == [torch.float32] * len(MASKED)


def test_an_emptied_state_begins_anew():
    """As with torch's optimizers: moments and step counts are those of `optimizer.state`, also for what is saved."""
    model, optimizer = trained(3)
    fresh, other = setup()
    fresh.load_state_dict(model.state_dict())
    optimizer.state.clear()
    assert_same_bits(train(model, optimizer, 2, first=3), train(fresh, other, 2, first=3))
    assert_same_bits(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "step"])
@both
def test_tensors_of_the_state_may_be_replaced(sparsified, key):
    """As load hooks and other code do; the other tensors of the state stay."""
    (model, optimizer), (twin, other) = trained(2, sparsified), trained(2, sparsified)
    for state in optimizer.state.values():
        state[key] = state[key].clone().add_(1)
    for state in other.state.values():
        state[key].add_(1)
    assert_same_bits(train(model, optimizer, 2, first=2), train(twin, other, 2, first=2))
    assert_same_bits(optimizer.state_dict()["state"], other.state_dict()["state"])


def test_hooks_of_steps():
    model, optimizer = setup()
    calls = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    handle = optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    train(model, optimizer, 1)
    handle.remove()
    train(model, optimizer, 1)
    assert calls == ["before", "after", "before"]


def state_of(make_optimizer=SparseAdamW, mask=None, in_two=False, without=None):
    model = make_model()
    named = [(n, p) for n, p in model.named_parameters() if n != without]
    params = [{"params": named[:2]}, {"params": named[2:]}] if in_two else named
    optimizer = make_optimizer(params, mask or make_mask()) if make_optimizer is SparseAdamW else make_optimizer(params)
    train(model, optimizer, 2)
    return optimizer.state_dict()


def rolled_mask():
    """As many entries in each tensor, at other positions."""
    return CSRMask.from_dense({n: t.flatten().roll(1).view(t.shape) for n, t in make_mask().to_dense().items()})


@both
@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"make_optimizer": torch.optim.AdamW}, "has no mask_fingerprints"),
        ({"in_two": True}, "number of parameter groups"),
        ({"without": "3.bias"}, "doesn't match the size"),
        ({"mask": rolled_mask()}, r"another mask.*'0\.\w+' has \d+ entries at other positions"),
        ({"mask": make_mask(0.9)}, r"another mask.*'0\.\w+' has \d+ entries there and \d+ here"),
        ({"mask": make_mask(names=["0.weight", "1.weight"])}, r"'1\.bias\w*' was not masked and is masked now"),
        ({"mask": make_mask(names=[*MASKED, "3.bias"])}, r"'3\.bias' was masked and is not masked now"),
    ],
    ids=label,
)
def test_a_refused_state_changes_nothing(sparsified, state, message):
    (model, optimizer), (twin, other) = trained(2, sparsified), trained(2, sparsified)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_of(**state))
    assert_same_bits(optimizer.state_dict(), before)
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    assert_same_bits(train(model, optimizer, 2, first=2), train(twin, other, 2, first=2))


@both
def test_a_state_without_newer_options_gets_their_defaults(sparsified):
    """As with torch's optimizers, also if this one was made with another value: the state is of a run without it."""
    (model, optimizer), (twin, other) = trained(2, sparsified), trained(2, sparsified)
    state = optimizer.state_dict()
    for option in ("l1", "maximize", "master", "state_dtype", "stochastic_rounding", "seed"):
        del state["param_groups"][0][option]
    fresh, late = setup(sparsified, maximize=True)
    fresh.load_state_dict(model.state_dict())
    late.load_state_dict(state)
    assert_same_bits(train(fresh, late, 2, first=2), train(twin, other, 2, first=2))


def test_a_state_of_renamed_parameters_is_refused_by_their_names():
    mask = CSRMask.from_dense({f"model.{n}": t for n, t in make_mask().to_dense().items()})
    renamed = SparseAdamW([(f"model.{n}", p) for n, p in make_model().named_parameters()], mask)
    message = r"belongs to other parameters: it has '0\.weight' where this optimizer has 'model\.0\.weight'"
    with pytest.raises(ValueError, match=message):
        renamed.load_state_dict(trained(1)[1].state_dict())


COPIERS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: through_file(pair, weights_only=False),
}


@pytest.mark.parametrize("copier", COPIERS)
@pytest.mark.parametrize("options", [{}, {"decay_to": ORIGIN, "lr": torch.tensor(0.02)}], ids=["", "decay_to"])
@both
def test_copies_train_on_with_the_same_bits(sparsified, options, copier):
    model, optimizer = setup(sparsified, **options)
    start = train(model, optimizer, 3)
    other, twin = COPIERS[copier]((model, optimizer))
    assert_same_bits(twin.state_dict(), optimizer.state_dict())
    assert {k for k in vars(twin) if k[0] != "_"} == {k for k in vars(optimizer) if k[0] != "_"}
    assert twin.mask == optimizer.mask
    expected = train(other, twin, 3, first=3)
    assert_same_bits(weights(model), start)  # nothing is shared
    assert_same_bits(train(model, optimizer, 3, first=3), expected)
    assert differ(expected, start)


@pytest.mark.parametrize(
    ("dtype", "options", "sparsified", "each"),
    [
        (torch.float32, {}, False, 8),
        (torch.float32, {}, True, 8),
        (torch.float32, {"state_dtype": torch.bfloat16}, False, 4),
        (torch.bfloat16, {}, False, 8),
        (torch.bfloat16, {"state_dtype": torch.bfloat16}, True, 4),
        (torch.bfloat16, {"master": True}, False, 12),
        (torch.bfloat16, {"master": True, "state_dtype": torch.bfloat16}, False, 8),
        (torch.bfloat16, {"master": True}, True, 8),  # the values are the master
        (torch.float64, {"state_dtype": torch.bfloat16, "master": True}, False, 16),
    ],
)
def test_bytes_of_the_state(dtype, options, sparsified, each):
    mask = make_mask()
    model, optimizer = setup(sparsified, dtype, **options)
    assert not optimizer.state
    train(model, optimizer, 2)
    states = [optimizer.state[p] for n, p in model.named_parameters() if n[0] in "01" and p.requires_grad]
    assert {s["exp_avg"].dtype for s in states} == {options.get("state_dtype", torch.float32)} or dtype.itemsize == 8
    tensors = [t for state in states for t in state.values()]
    assert sum(t.nbytes for t in tensors) == each * mask.nnz + 4 * len(MASKED)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    assert sum(storages.values()) == each * mask.nnz + 4 * len(MASKED)


def test_repr():
    text = repr(setup(weight_decay=0.125)[1])
    assert text.startswith("SparseAdamW (")
    assert "weight_decay: 0.125" in text
