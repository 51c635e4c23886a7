"""Sparsified models of transformers: gradients, autocast, checkpointing, torch.compile, saved models, PEFT."""

import copy

import pytest
import torch
from torch.utils._pytree import tree_leaves

from deftx_kernels import SparseAdamW, densify, topk_mask
from tests.nn.sparsified_models import X, compact_gradients, linears, mask_of, sparsified

transformers = pytest.importorskip("transformers")

# ---- architectures ----
SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, max_position_embeddings=32)
ENCODER = dict(**SIZES, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def encoder(name, head, tie=True):
    config = getattr(transformers, f"{name}Config")(**ENCODER, tie_word_embeddings=tie)
    return getattr(transformers, f"{name}For{head}")(config)


def gpt2(tie=True):
    sizes = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **dropout, tie_word_embeddings=tie))


def llama(tie=False):
    config = transformers.LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=tie)
    return transformers.LlamaForCausalLM(config)


ARCHITECTURES = {
    "bert, mlm": lambda: encoder("Bert", "MaskedLM"),
    "bert, mlm, untied": lambda: encoder("Bert", "MaskedLM", False),
    "bert, classes": lambda: encoder("Bert", "SequenceClassification"),
    "xlm-r, mlm": lambda: encoder("XLMRoberta", "MaskedLM"),
    "xlm-r, mlm, untied": lambda: encoder("XLMRoberta", "MaskedLM", False),
    "xlm-r, classes": lambda: encoder("XLMRoberta", "SequenceClassification"),
    "xlm-r, tokens": lambda: encoder("XLMRoberta", "TokenClassification"),
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
        *((a, w, torch.float64, 0.3) for a in ("xlm-r, mlm", "gpt2") for w in list(MASKS)[2:]),
        *((a, "everything", torch.bfloat16, 0.3) for a in ("xlm-r, classes", "gpt2", "llama")),
        ("bert, classes", "everything", torch.float32, 0.0),
    ],
)
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
