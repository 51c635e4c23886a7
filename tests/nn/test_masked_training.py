"""Training of sparsified models: any optimizer, memory that others own, FSDP, processes and threads."""

import copy
import gc
import multiprocessing
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import parameters_to_vector

from deftx_kernels import SparseAdamW, densify
from deftx_kernels.nn import masked_parameters
from tests.nn.sparsified_models import (
    IDS,
    X,
    assert_synchronised,
    compact_gradients,
    flatten_parameters,
    linears,
    mask_of,
    mlp,
    sgd,
    sparsified,
    trainable,
)


# ---- optimizers ----
def square(model, ids=IDS):
    return model(ids).float().square().mean()


OPTIMIZERS = {
    "SparseAdamW": lambda ps: [torch.optim.AdamW(ps, lr=0.05, weight_decay=0.0)],
    "AdamW": lambda ps: [torch.optim.AdamW(ps, lr=0.05, weight_decay=0.0)],
    "SGD": lambda ps: [torch.optim.SGD(ps, lr=0.5, momentum=0.9)],
    "LBFGS": lambda ps: [torch.optim.LBFGS(ps, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")],
    "two": lambda ps: [torch.optim.SGD(ps[:2], lr=0.5), torch.optim.SGD(ps[2:], lr=0.1)],
    "part": lambda ps: [torch.optim.SGD(ps[1:3], lr=0.5)],
}


def losses_of_steps(model, optimizers, each_step=lambda model: None):
    losses = []

    def closure():
        model.zero_grad()
        loss = square(model)
        loss.backward()
        losses.append(loss.detach())
        return loss

    for _ in range(5):
        for optimizer in optimizers:
            optimizer.step(closure)
            each_step(model)
    return torch.stack(losses)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_train_a_sparsified_model(name):
    """As a dense model whose gradients are masked. Weights are synchronised after each step and within a closure."""
    model, plain = mlp(), mlp()
    mask = mask_of(model)
    chosen = mask.to_dense()
    sparsified(model, mask)
    for n, p in plain.named_parameters():
        p.register_hook(lambda g, c=chosen[n]: g * c)
    values = [masked_parameters(model)[n].values for n, _ in plain.named_parameters()]
    ours = OPTIMIZERS[name](values)
    if name == "SparseAdamW":
        ours = [SparseAdamW(model.named_parameters(), mask, lr=0.05, weight_decay=0.0)]
    losses = losses_of_steps(model, ours, assert_synchronised)
    expected = losses_of_steps(plain, OPTIMIZERS[name](list(plain.parameters())))
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-3)
    assert losses[-1] < 0.9 * losses[0]
    densify(model)
    start = dict(mlp().named_parameters())
    for n, p in model.named_parameters():
        assert torch.equal(p[~chosen[n]], start[n][~chosen[n]]), n


def test_optimizers_in_backward():
    """One for each parameter, stepped by a hook and so before the backward of earlier layers."""
    models = [sparsified(linears()), sparsified(linears())]
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in trainable(models[0])}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    whole = sgd(models[1])
    for _ in range(2):
        for model in models:
            model(X).square().sum().backward()
        whole.step()
        whole.zero_grad()
    assert torch.equal(models[0](X), models[1](X))


def test_accumulation_is_in_place_and_equals_one_batch():
    model = sparsified(mlp())
    values, calls = model[1].values, []
    values.register_hook(lambda g: calls.append("hook"))
    values.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    (square(model, IDS[:3]) / 2).backward()
    first = values.grad
    (square(model, IDS[3:]) / 2).backward()
    assert values.grad is first
    got = {n: g.clone() for n, g in compact_gradients(model).items()}
    model.zero_grad(set_to_none=False)
    assert values.grad is first
    assert not first.any()
    square(model).backward()
    torch.testing.assert_close(compact_gradients(model), got)
    assert calls == ["hook", "accumulated"] * 3
    model.zero_grad()
    frozen = [values, model[1].bias_values, model[2].values]
    for p in frozen:
        p.requires_grad_(False)
    square(model).backward()
    assert all(p.grad is None for p in frozen)
    assert model[0].values.grad is not None


@pytest.mark.parametrize(
    "make_optimizer",
    [lambda m: torch.optim.SGD(m.parameters()), lambda m: SparseAdamW(m.named_parameters(), mask_of(m))],
)
def test_an_optimizer_made_before_sparsify_warns(make_optimizer):
    model = mlp()
    optimizer = make_optimizer(model)
    sparsified(model)
    square(model).backward()
    with pytest.warns(UserWarning, match=r"was made before sparsify: it does not train '0\.weight'"):
        optimizer.step()
    other = mlp()
    square(other).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd(other).step()


def test_an_optimizer_of_a_densified_model_is_refused():
    model = sparsified(linears())
    optimizer = SparseAdamW(model.named_parameters(), mask_of(linears()), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    weights = parameters_to_vector(densify(model).parameters()).detach().clone()
    with pytest.raises(ValueError, match="not among the trainable named_params"):
        optimizer.step()
    assert torch.equal(parameters_to_vector(model.parameters()), weights)


# ---- inference, memory, processes and threads ----
def test_inference():
    model = sparsified(mlp())
    expected, saved = model(IDS), []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t), lambda t: t):
        assert torch.equal(model.eval()(IDS), expected)
    assert not saved
    with torch.inference_mode():
        assert torch.equal(model(IDS), expected)
        assert torch.equal(copy.deepcopy(model)(IDS), expected)
    assert torch.equal(torch.export.export(model, (IDS,)).module()(IDS), expected)


def train(model, optimizer=None, steps=3):
    optimizer = optimizer or SparseAdamW(model.named_parameters(), mask_of(linears()), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_copied_model_has_one_buffer():
    model, trained = sparsified(linears()), []
    for each in (copy.deepcopy(model), model):
        assert len({p.untyped_storage().data_ptr() for p in trainable(each)}) == 1
        train(each)
        assert torch.equal(each(X), densify(each)(X))
        trained.append(parameters_to_vector(each.parameters()))
    assert torch.equal(*trained)


def test_parameters_stay_in_the_memory_of_others():
    """Each parameter is a view of a buffer, in another order, as in sharded training."""
    alone, model = sparsified(linears()), sparsified(linears())
    buffer = flatten_parameters(list(model.parameters())[::-1])
    addresses = [p.data_ptr() for p in model.parameters()]
    assert train(model) == train(alone)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert torch.equal(buffer, torch.cat([p.detach().flatten() for p in list(alone.parameters())[::-1]]))


def train_in_a_fork(model):
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
    train(model)


def test_shared_memory():
    model, alone = copy.deepcopy(sparsified(linears())).share_memory(), sparsified(linears())
    process = multiprocessing.get_context("fork").Process(target=train_in_a_fork, args=(model,))
    process.start()
    process.join()
    train(alone)
    assert torch.equal(model(X), alone(X))
    assert torch.equal(densify(model)(X), alone(X))


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*FSDP.*")
def test_fsdp_version_1(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    wrapped = FSDP(sparsified(linears()), use_orig_params=True, device_id=torch.device("cpu"))
    assert train(wrapped) == train(sparsified(linears()))


def test_models_in_threads():
    def run(_):
        for _ in range(30):
            model = sparsified(linears())
            train(model, sgd(model, lr=0.01))
            densify(model)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_a_deleted_model_is_freed_at_once():
    """Without the garbage collector, which does not know of a GPU's memory."""
    model = sparsified(linears())
    other = copy.deepcopy(model)
    refs = [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        del model
        assert not [r for r in refs if r() is not None]
    finally:
        gc.enable()
    densify(other)
