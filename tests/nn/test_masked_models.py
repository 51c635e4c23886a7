"""Whole sparsified models: transformers' architectures, optimizers, PEFT, FSDP, memory and threads."""

import copy
import gc
import multiprocessing
import sys
import threading
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from deftx_kernels import CSRMask, SparseAdamW, densify, topk_mask
from deftx_kernels.nn import masked_parameters
from tests.nn.sparsified_models import (
    IDS,
    X,
    assert_synchronised,
    compact_gradients,
    linears,
    mask_of,
    mlp,
    sgd,
    sparsified,
    trainable,
)

transformers = pytest.importorskip("transformers")

# ---- architectures ----
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, max_position_embeddings=32)
ENCODER = dict(**SIZES, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def bert(head, tie=True):
    return getattr(transformers, f"BertFor{head}")(transformers.BertConfig(**ENCODER, tie_word_embeddings=tie))


def xlmr(head, tie=True):
    config = transformers.XLMRobertaConfig(**ENCODER, pad_token_id=1, tie_word_embeddings=tie)
    return getattr(transformers, f"XLMRobertaFor{head}")(config)


def gpt2(tie=True):
    sizes = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, tie_word_embeddings=tie))


def llama(tie=False):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=tie)
    return transformers.LlamaForCausalLM(config)


ARCHITECTURES = {
    "bert, mlm": lambda: bert("MaskedLM"),
    "bert, mlm, untied": lambda: bert("MaskedLM", False),
    "bert, classes": lambda: bert("SequenceClassification"),
    "xlm-r, mlm": lambda: xlmr("MaskedLM"),
    "xlm-r, mlm, untied": lambda: xlmr("MaskedLM", False),
    "xlm-r, classes": lambda: xlmr("SequenceClassification"),
    "xlm-r, tokens": lambda: xlmr("TokenClassification"),
    "gpt2": gpt2,
    "gpt2, untied": lambda: gpt2(False),
    "llama": llama,
    "llama, tied": lambda: llama(True),
}


def is_embedding(name, parameter):
    return any(word in name for word in ("embed", "wte", "wpe"))


MASKS = {
    "everything": lambda n, p: True,
    "matrices": lambda n, p: p.dim() == 2,
    "linear": lambda n, p: p.dim() == 2 and not is_embedding(n, p),
    "embeddings": is_embedding,
    "biases and norms": lambda n, p: p.dim() == 1,
}
TOLERANCES = {
    torch.float64: dict(atol=1e-10, rtol=1e-10),
    torch.float32: dict(atol=1e-7, rtol=1e-5),
    torch.bfloat16: dict(atol=2e-2, rtol=2e-2),  # dense gradients are rounded where the compact ones are not
}


def make(architecture, dtype=torch.float32):
    torch.manual_seed(0)
    return ARCHITECTURES[architecture]().to(dtype).eval()


def batch(model):
    """Two rows of seven tokens, and one of four with padding."""
    ids = torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(3))
    attention = torch.ones_like(ids)
    attention[1, 4:] = 0
    ids[1, 4:] = model.config.pad_token_id or 0
    labels = ids.where(attention == 1, -100)
    if "Sequence" in type(model).__name__:
        labels = torch.tensor([0, 1, 0])
    elif "Token" in type(model).__name__:
        labels = ids % 2
    return dict(input_ids=ids, attention_mask=attention, labels=labels)


def loss_of(model):
    return model(**batch(model)).loss


def gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@pytest.mark.parametrize(
    ("architecture", "which", "dtype", "density"),
    [
        *((a, "matrices", torch.float32, 0.2) for a in ARCHITECTURES),
        *((a, "everything", torch.float64, 1.0) for a in ("bert, mlm", "xlm-r, tokens", "gpt2", "llama, tied")),
        *((a, w, torch.float64, 0.3) for a in ("xlm-r, mlm", "gpt2") for w in ("linear", "embeddings", "biases and norms")),
        *((a, "everything", torch.bfloat16, 0.3) for a in ("xlm-r, classes", "gpt2", "llama")),
        ("bert, classes", "everything", torch.float32, 0.0),
    ],
)  # fmt: skip
def test_gradients_of_architectures(architecture, which, dtype, density):
    model, plain = make(architecture, dtype), make(architecture, dtype)
    mask = mask_of(model, density, only=MASKS[which]) if density else topk_mask(dict(model.named_parameters()), k=1)
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    sparsified(model, mask)
    expected, got = loss_of(plain), loss_of(model)
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    dense = {n: gradient(p) for n, p in plain.named_parameters()}
    found = compact_gradients(model)
    assert list(found) == list(mask.names)
    for name, part in mask.split(mask.gather(dense)).items():
        torch.testing.assert_close(found[name].to(dtype), part, **TOLERANCES[dtype], msg=lambda m, n=name: f"{n}: {m}")
        if not name.endswith("key.bias"):  # whose gradient is 0 but for rounding
            assert (found[name] - part).norm() <= 0.01 * part.norm(), name
    for name, parameter in model.named_parameters():
        if name in mask:
            assert parameter.grad is None
        elif name in dense and parameter.requires_grad:
            torch.testing.assert_close(gradient(parameter), dense[name])
    densify(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    assert all(p.requires_grad for p in model.parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))


@pytest.mark.parametrize("architecture", ["bert, mlm", "gpt2", "llama"])
def test_autocast_of_architectures(architecture):
    """Activations are bit for bit those of the dense model; gradients, which are not rounded to 16 bits, are closer to
    the exact ones.
    """
    model, plain = make(architecture), make(architecture)
    exact = copy.deepcopy(plain).double()
    mask = mask_of(model, 0.3, only=MASKS["matrices"])
    sparsified(model, mask)
    outputs = [], []
    for one, seen in zip((model, plain), outputs):
        for module in one.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _, args, out, seen=seen: seen.extend(tree_leaves(out)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(one)
        loss.backward()
    loss_of(exact).backward()
    assert len(outputs[0]) > 10
    assert torch.bfloat16 in {t.dtype for t in outputs[0]}
    for ours, theirs in zip(*outputs):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    got = torch.cat(list(compact_gradients(model).values()))
    assert got.dtype == torch.float32
    dense, reference = (mask.gather({n: p.grad for n, p in m.named_parameters()}) for m in (plain, exact))
    torch.testing.assert_close(got, dense, atol=5e-3 * float(dense.abs().max()), rtol=2e-2)
    assert (got - reference).norm() <= 1.05 * (dense - reference).norm()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["bert, mlm", "gpt2"])
def test_gradient_checkpointing(architecture, reentrant):
    model = sparsified(make(architecture))
    loss_of(model).backward()
    expected = compact_gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    loss_of(model.train()).backward()
    torch.testing.assert_close(compact_gradients(model), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    model = sparsified(mlp())
    model(IDS).square().mean().backward()
    expected = compact_gradients(model)
    model.zero_grad()
    checkpoint(model[1:], model[0](IDS), use_reentrant=reentrant).square().mean().backward()
    torch.testing.assert_close(compact_gradients(model), expected)


@pytest.mark.parametrize("architecture", ["bert, classes", "llama"])
def test_whole_models_compile_without_graph_breaks(architecture):
    torch._dynamo.reset()
    model = make(architecture)
    body, layers = (model.bert.encoder, "layer") if "bert" in architecture else (model.model, "layers")
    setattr(body, layers, getattr(body, layers)[:1])  # a second one would be compiled alike
    sparsified(model)
    loss_of(model).backward()
    expected = compact_gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**batch(model)).loss.backward()
    torch.testing.assert_close(compact_gradients(model), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["bert, classes", "xlm-r, mlm", "gpt2", "llama, tied"])
def test_saved_models_load_as_plain_ones(architecture, tmp_path):
    """With the trained weights, whether the model was still sparsified (tied values are stored once) or not."""
    model = make(architecture)
    mask = mask_of(model)
    sparsified(model, mask)
    assert model.num_parameters(only_trainable=True) == mask.nnz
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
    loss_of(model).backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "sparsified")
    expected = loss_of(model)
    densify(model).save_pretrained(tmp_path / "dense")
    weights = dict(model.named_parameters())
    for folder in ("sparsified", "dense"):
        again = type(model).from_pretrained(tmp_path / folder).eval()
        loaded = dict(again.named_parameters())
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(p, weights[n]) for n, p in loaded.items())
        assert torch.equal(loss_of(again), expected)


def test_a_replaced_embedding_is_refused():
    model = sparsified(make("bert, mlm"))
    model.get_input_embeddings().weight.data = torch.zeros(60, 16)  # as resize_token_embeddings does
    with pytest.raises(RuntimeError, match="word_embeddings.weight' is sparsified and has been replaced or resized"):
        loss_of(model)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("rows", [60, 30])
def test_densify_after_resize_token_embeddings(rows, tie):
    model = make("llama, tied" if tie else "llama")
    mask = mask_of(model)
    sparsified(model, mask)
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=0.1)
    loss_of(model).backward()
    optimizer.step()
    trained = densify(copy.deepcopy(model))
    model.resize_token_embeddings(rows)
    ids, embedding = torch.arange(4)[None], model.get_input_embeddings()
    for use in (lambda: model(ids), lambda: embedding.weight.sum().backward(), model.state_dict):
        with pytest.raises(RuntimeError, match="resized since: densify the model first"):
            use()
    densify(model)
    model(ids)
    kept = min(rows, 50)
    for name in ["model.embed_tokens.weight", *([] if tie else ["lm_head.weight"])]:
        assert torch.equal(model.get_parameter(name)[:kept], trained.get_parameter(name)[:kept])
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


# ---- PEFT ----
def test_lora_on_a_sparsified_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(sparsified(make("bert, classes")), config)
    loss_of(wrapped.base_model.model).backward()
    assert {n.split(".")[-3] for n, p in wrapped.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


def test_lora_merges_into_a_sparsified_model():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0", "2", "4"], init_lora_weights=False)
    lora = peft.get_peft_model(sparsified(linears()), config)
    expected = lora(X)
    merged = lora.merge_and_unload()
    torch.testing.assert_close(merged(X), expected)
    torch.testing.assert_close(densify(merged)(X), expected)


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
    with pytest.warns(UserWarning, match=r"was made before sparsify: it trains nothing of '0\.weight'"):
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


def test_a_mask_of_everything_trains_as_the_plain_model():
    """Also a weight that is read as an attribute."""
    model, plain = linears(), linears()
    sparsified(
        model, CSRMask.from_dense({n: torch.ones_like(p, dtype=torch.bool) for n, p in model.named_parameters()})
    )
    for each in (model, plain):
        optimizer = sgd(each)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.linear(each[0](X), each[2].weight, each[2].bias).square().mean().backward()
            optimizer.step()
    for (name, a), b in zip(densify(model).named_parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, msg=name)


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
    parameters = list(model.parameters())[::-1]
    buffer = torch.cat([p.detach().flatten() for p in parameters])
    for p, part in zip(parameters, buffer.split([p.numel() for p in parameters])):
        p.data = part.view_as(p)
    addresses = [p.data_ptr() for p in model.parameters()]
    assert train(model) == train(alone)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert torch.equal(buffer, torch.cat([p.detach().flatten() for p in list(alone.parameters())[::-1]]))


def test_shared_memory():
    model, alone = copy.deepcopy(sparsified(linears())).share_memory(), sparsified(linears())
    process = multiprocessing.get_context("fork").Process(target=train, args=(model,))
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


def test_fsdp_version_2(process_group):
    """It trains; saving the shards, whose masked entries are stale, is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    expected = sparsified(linears())
    model = fully_shard(sparsified(linears()), mesh=init_device_mesh("cpu", (1,)))
    losses = train(model, sgd(model, lr=0.01))
    assert losses == pytest.approx(train(expected, sgd(expected, lr=0.01)), rel=1e-6)
    with pytest.raises(RuntimeError, match=r"'0\.weight' is sharded"):
        model.state_dict()


def test_models_in_threads():
    interval, errors = sys.getswitchinterval(), []
    sys.setswitchinterval(1e-5)

    def run():
        try:
            for _ in range(30):
                model = sparsified(linears())
                train(model, sgd(model, lr=0.01))
                densify(model)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors


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
