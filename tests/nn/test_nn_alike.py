"""What others do with a sparsified model: writes past autograd, weights read as attributes, memory that others own."""

import copy
import gc
import multiprocessing
import pickle
import sys
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from deftx_kernels import CSRMask, SparseAdamW, densify, sparsify, topk_mask
from deftx_kernels.nn import masked_parameters, plain_tensors

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def half(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return topk_mask({n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}, density=0.5)


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).to(dtype)


def sparsified(dtype=torch.float32):
    model = mlp(dtype)
    return sparsify(model, half(model))


def values_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def output(model):
    with torch.no_grad():
        return model(X.to(next(model.parameters()).dtype))


# ---- values and dense tensors ----
def held_alias(model):
    """The aliases are taken first, and written to after forwards."""
    aliases = [p.data for p in values_of(model)]
    for _ in range(2):
        output(model)
        for alias in aliases:
            alias.sub_(1.0)


def by_foreach_copy(model):
    torch._foreach_copy_([p.data for p in values_of(model)], [p.detach() * 2 for p in values_of(model)])


def by_assignment(model):
    for p in values_of(model):
        p.data = p.detach() * 2


def by_averages(model):
    for p in model.parameters():  # of every parameter, as averages of weights are swapped in
        p.data.mul_(2.0)


def by_a_buffer(model):
    """Values become views of somebody's buffer, which is then trained."""
    buffer = flattened(model, values_of(model))
    output(model)
    with torch.no_grad():
        buffer.mul_(2.0)


def by_state_dict(model):
    output(model)
    for tensor in model.state_dict().values():
        tensor.mul_(2.0)


def by_permutation(model):
    for p in values_of(model):
        p.data = p.data.flip(0)


def by_numpy(model):
    for p in values_of(model):
        p.data.numpy()[...] *= 2


WAYS = {
    "buffer": by_a_buffer,
    "state dict": by_state_dict,
    "permutation": by_permutation,
    "NumPy": by_numpy,
    "data": lambda m: [p.data.mul_(2.0) for p in values_of(m)],
    "part of data": lambda m: [p.data.view(-1)[::2].mul_(2.0) for p in values_of(m)],
    "held alias": held_alias,
    "foreach copy": by_foreach_copy,
    "assignment": by_assignment,
    "vector_to_parameters": lambda m: vector_to_parameters(parameters_to_vector(values_of(m)) * 2, values_of(m)),
    "averages": by_averages,
    "no_grad": lambda m: [p.detach().mul_(2.0) for p in values_of(m)],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_values_that_are_changed_in_any_way_are_seen(way, dtype):
    for source in (lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        model = source(sparsified(dtype))
        before = output(model)
        WAYS[way](model)
        after = output(model)
        assert not torch.equal(after, before)
        for name, record in masked_parameters(model).items():
            assert torch.equal(record.mask.gather({name: record.dense}), record.values.to(dtype)), name
        assert torch.equal(output(densify(model)), after)
        assert {type(p) for p in model.parameters()} == {nn.Parameter}


def test_a_read_of_data_changes_nothing():
    """Also while what was read is kept: no write into the dense tensors that a backward still needs."""
    model = sparsified()
    kept = [p.data for p in model.parameters()]
    loss = model(X).sum() + model(X).sum()
    loss.backward()
    assert all(p.grad is not None for p in values_of(model))
    assert kept


def merged_by_data(linear, change):
    linear.weight.data += change


def merged_by_assignment(linear, change):
    linear.weight.data = linear.weight.data + change


@torch.no_grad()
def merged_in_place(linear, change):
    linear.weight.add_(change)


@torch.no_grad()
def merged_without_gradients(linear, change):
    linear.weight.data += change


def merged_by_name(linear, change):
    dict(linear.named_parameters())["weight"].data.add_(change)


@pytest.mark.parametrize("then", ["densify", "forward", "state_dict", "step", "copy", "cast"])
@pytest.mark.parametrize(
    "merge", [merged_by_data, merged_by_assignment, merged_in_place, merged_without_gradients, merged_by_name]
)
def test_what_is_added_to_a_weight_stays(merge, then):
    """As when a LoRA adapter is merged: into masked entries, too."""
    model, plain = sparsified(torch.bfloat16), mlp(torch.bfloat16)
    change = torch.randn(8, 8, generator=torch.Generator().manual_seed(3)).bfloat16()
    for layer in (0, 2, 4):
        merge(model[layer], change)
        plain[layer].weight.data += change
    if then == "forward":
        assert torch.equal(output(model), output(plain))
    if then == "state_dict":
        assert all(torch.equal(model.state_dict()[f"{i}.weight"], plain[i].weight) for i in (0, 2, 4))
    if then == "copy":
        model = copy.deepcopy(model)
    if then == "cast":
        model.double().bfloat16()
    if then == "step":
        model(X.bfloat16()).sum().backward()
        torch.optim.SGD(values_of(model), lr=0.0).step()
    for p, q in zip(densify(model).parameters(), plain.parameters()):
        assert torch.equal(p, q)


def test_an_edit_stays_where_a_step_trains_other_tensors():
    model = sparsified()
    model[0](X).sum().backward()
    with torch.no_grad():
        model[4].weight.add_(1.0)
    expected = model[4].weight.detach().clone()
    torch.optim.SGD(values_of(model), lr=0.1).step()
    assert torch.equal(densify(model)[4].weight, expected)


def test_optimizers_in_backward():
    """One for each parameter, stepped by a hook and so before the backward of earlier layers."""
    models = [sparsified(), sparsified()]
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in values_of(models[0])}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step)
    whole = torch.optim.SGD(values_of(models[1]), lr=0.1)
    for _ in range(2):
        for model in models:
            model(X).square().sum().backward()
        whole.step()
        whole.zero_grad()
    assert torch.equal(output(models[0]), output(models[1]))


def cast(parameters, dtype):
    for p in parameters:
        p.data = p.data.to(dtype)


def test_casts_tensor_by_tensor():
    """Values keep their digits when their dense tensors are cast; they are not cast themselves."""
    model = sparsified(torch.bfloat16)
    with torch.no_grad():
        for p in values_of(model):
            p.add_(1e-5)
    output(model)
    digits = [p.detach().clone() for p in values_of(model)]
    cast([r.dense for r in masked_parameters(model).values()], torch.float32)
    output(model)
    assert all(torch.equal(p, d) for p, d in zip(values_of(model), digits))
    assert torch.equal(masked_parameters(model)["0.weight"].mask.gather({"0.weight": model[0].weight}), model[0].values)
    with pytest.raises(
        TypeError, match=r"the values of '0\.bias' are torch.float32, got torch.bfloat16: cast the model with"
    ):
        cast(values_of(model)[::-1][-2:], torch.bfloat16)


def test_gradient_hooks_are_refused():
    model = mlp()
    model[0].weight.register_hook(lambda grad: grad * 0)
    with pytest.raises(ValueError, match=r"model\['0\.weight'\] has gradient hooks"):
        sparsify(model, half(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_are_averaged_or_cast(dtype):
    one, two = sparsified(dtype), sparsified(dtype)
    WAYS["data"](two)
    states = one.state_dict(), two.state_dict()
    soup = {n: (t + states[1][n]) / 2 for n, t in states[0].items()}
    one.load_state_dict(soup)
    assert torch.equal(one[0].values, soup["0.values"])
    one.load_state_dict({n: t.half() for n, t in soup.items()})
    assert output(one).isfinite().all()
    one.load_state_dict(soup)
    soup["0.values"] = soup["0.values"].flip(0)
    with pytest.raises(RuntimeError, match="saved with another mask"):
        one.load_state_dict(soup)


def test_an_optimizer_of_a_densified_model_is_refused():
    model = sparsified()
    optimizer = SparseAdamW(model.named_parameters(), half(mlp()), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    weights = parameters_to_vector(densify(model).parameters()).detach().clone()
    with pytest.raises(ValueError, match="not among the trainable named_params"):
        optimizer.step()
    assert torch.equal(parameters_to_vector(model.parameters()), weights)


def test_functional_call_with_a_plain_state():
    model, other = sparsified(), mlp()
    with torch.no_grad():
        vector_to_parameters(torch.arange(216.0) / 216, other.parameters())
    state = dict(other.named_parameters())
    torch.testing.assert_close(torch.func.functional_call(model, state, X), other(X))


def test_a_model_on_meta_comes_back():
    model = sparsified()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    expected = output(model)
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(output(model), expected)


def test_parts_that_are_sparsified_one_by_one():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    for part in model:
        sparsify(part, half(part))
    with pytest.raises(ValueError, match="two masked tensors are named 'weight'"):
        masked_parameters(model)


def test_peft_merges_into_a_sparsified_model():
    peft = pytest.importorskip("peft")
    model = sparsified()
    lora = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "2", "4"], init_lora_weights=False))
    expected = output(lora)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(output(merged), expected)
    torch.testing.assert_close(output(densify(merged)), expected)


def test_values_win_where_both_were_changed():
    model = sparsified()
    record = masked_parameters(model)["0.weight"]
    record.dense.data.zero_()
    record.values.data.fill_(3.0)
    output(model)
    assert set(record.dense.detach().unique().tolist()) == {0.0, 3.0}


def test_plain_tensors():
    model, plain = sparsified(), mlp()
    assert plain_tensors(model).keys() == plain_tensors(plain).keys() == dict(plain.named_parameters()).keys()
    values_of(model)[0].data.fill_(7.0)
    assert 7.0 in plain_tensors(model)["0.weight"]


# ---- weights that are read as attributes ----
class Head(nn.Module):
    """A language model's ends, whose loss reads the head's weight (fused losses do)."""

    def __init__(self, tie):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(12, 4), nn.Linear(4, 12, bias=False)
        if tie:
            self.head.weight = self.embedding.weight

    def forward(self, ids, read):
        return read(self.embedding(ids), self.head).square().sum()


class Fused(torch.autograd.Function):
    """A kernel that asks for each argument whether it needs a gradient, and sees no Python subclass."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        ctx.asked = weight.requires_grad
        return x @ weight.detach().T

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        assert ctx.asked
        return grad @ weight, grad.flatten(0, -2).T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None


READS = {
    "transposed": lambda x, head: x @ head.weight.T,
    "linear": lambda x, head: nn.functional.linear(x, head.weight),
    "a copy": lambda x, head: x @ head.weight.float().mT,
    "fused": lambda x, head: Fused.apply(x, head.weight),
    "state": lambda x, head: x @ head.get_parameter("weight").T,
    "forward": lambda x, head: head(x),
}


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("read", READS)
def test_weights_read_as_attributes_get_their_gradient(read, tie):
    ids = torch.tensor([[1, 2, 3], [3, 4, 11]])
    plain, model = Head(tie), Head(tie)
    mask = half(model)
    sparsify(model, mask)
    plain(ids, READS[read]).backward()
    model(ids, READS[read]).backward()
    found = {n: r.values.grad for n, r in masked_parameters(model).items()}
    for name, expected in mask.split(mask.gather({n: p.grad for n, p in plain.named_parameters()})).items():
        torch.testing.assert_close(found[name], expected)
    assert all(r.dense.grad is None for r in masked_parameters(model).values())


def test_an_attribute_is_the_parameter_for_who_takes_no_gradient():
    model = sparsified()
    with torch.no_grad():
        assert model[0].weight is dict(model.named_parameters())["0.weight"]
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.data_ptr() == model[0].weight.data.data_ptr()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model[0].weight)), mlp()[0].weight)
    model.requires_grad_(False)
    assert not model[0].weight.requires_grad


@pytest.mark.parametrize("no_grad", [False, True])
def test_tied_weights_can_be_tied_again(no_grad):
    model = Head(tie=True)
    sparsify(model, half(model))
    with torch.set_grad_enabled(not no_grad):
        model.head.weight = model.embedding.weight
    assert model.head.values is model.embedding.values
    other = nn.Linear(4, 12, bias=False)
    with pytest.raises(ValueError, match="Cannot assign non-leaf"):
        other.weight = model.embedding.weight


# ---- other shapes ----
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("rows", [17, 7])
def test_densify_after_resize_token_embeddings(rows, tie):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tie,
    )
    model = transformers.LlamaForCausalLM(config)
    sparsify(model, half(model))
    optimizer = SparseAdamW(model.named_parameters(), half(densified_copy(model)), lr=0.1)
    model(torch.arange(7)[None]).logits.square().sum().backward()
    optimizer.step()
    trained = densified_copy(model)
    names = ["model.embed_tokens.weight", *([] if tie else ["lm_head.weight"])]
    model.resize_token_embeddings(rows)
    embedding = model.get_input_embeddings()
    for use in (lambda: model(torch.arange(4)[None]), lambda: embedding.weight.sum().backward(), model.state_dict):
        with pytest.raises(RuntimeError, match="resized since: densify the model first"):
            use()
    densify(model)
    model(torch.arange(4)[None])
    for name in names:
        kept = min(rows, 12)
        assert torch.equal(model.get_parameter(name)[:kept], trained.get_parameter(name)[:kept])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def densified_copy(model):
    return densify(copy.deepcopy(model))


# ---- memory that others own ----
def train(model, mask, steps=3):
    optimizer, losses = SparseAdamW(model.named_parameters(), mask, lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def flattened(model, parameters=None):
    """Each parameter a view of a buffer, in another order, as engines of sharded training have them."""
    parameters = parameters or list(model.parameters())[::-1]
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, buffer.split([p.numel() for p in parameters])):
        p.data = part.view_as(p)
    return buffer


def test_memory_of_parameters_stays_where_it_is():
    mask = half(mlp())
    alone, model = sparsified(), sparsified()
    buffer = flattened(model)
    places = [p.data_ptr() for p in model.parameters()]
    assert train(model, mask) == train(alone, mask)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert torch.equal(buffer, torch.cat([p.detach().flatten() for p in list(alone.parameters())[::-1]]))


def test_shared_memory():
    mask, model = half(mlp()), copy.deepcopy(sparsified()).share_memory()
    process = multiprocessing.get_context("fork").Process(target=train, args=(model, mask))
    process.start()
    process.join()
    alone = sparsified()
    train(alone, mask)
    assert torch.equal(output(model), output(alone))
    assert torch.equal(output(densify(model)), output(alone))


@pytest.mark.filterwarnings("ignore:.*FSDP.*")
def test_fsdp_version_1():
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    mask, expected = half(mlp()), train(sparsified(), half(mlp()))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = FSDP(sparsified(), use_orig_params=True, device_id=torch.device("cpu"))
        assert train(wrapped, mask) == expected
    finally:
        dist.destroy_process_group()


def test_models_in_threads():
    interval, errors = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-5)

    def work():
        try:
            for _ in range(30):
                model = sparsified()
                optimizer = torch.optim.SGD(values_of(model), lr=0.01)
                for _ in range(3):
                    model(X).sum().backward()
                    optimizer.step()
                densify(model)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    try:
        for step in ("start", "join"):
            for thread in threads:
                getattr(thread, step)()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


def test_a_dropped_model_is_freed_at_once():
    """Without the garbage collector, which knows nothing of a GPU's memory."""
    model = sparsified()
    other = copy.deepcopy(model)
    refs = [weakref.ref(p) for p in model.parameters()]
    gc.disable()
    try:
        del model
        assert not [r for r in refs if r() is not None]
    finally:
        gc.enable()
    densify(other)


def test_mask_of_everything():
    """A mask of density 1 trains a weight that is read as an attribute like the plain one."""
    model, plain = mlp(), mlp()
    mask = CSRMask.from_dense({n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()})
    sparsify(model, mask)
    for each, parameters in ((model, values_of(model)), (plain, list(plain.parameters()))):
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.linear(each[0](X), each[2].weight, each[2].bias).square().mean().backward()
            optimizer.step()
    for (name, a), b in zip(densify(model).named_parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, msg=name)


def test_fsdp_version_2():
    """It trains; what it cannot do, saving shards that hold stale entries, is refused by name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def sgd(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(X).square().sum()
            loss.backward()
            optimizer.step()
        return loss.item()

    expected = sgd(sparsified())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(sparsified(), mesh=init_device_mesh("cpu", (1,)))
        assert sgd(model) == pytest.approx(expected, rel=1e-6)
        with pytest.raises(RuntimeError, match=r"'0\.weight' is sharded"):
            model.state_dict()
    finally:
        dist.destroy_process_group()
