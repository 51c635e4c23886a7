"""masked_linear, masked_embedding, sparsify and densify against dense gradients gathered by the mask."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deftx_kernels import (
    CSRMask,
    MaskedEmbedding,
    MaskedLinear,
    SparseAdamW,
    densify,
    masked_embedding,
    masked_linear,
    sparsify,
    topk_mask,
)
from deftx_kernels.nn import masked_parameters

transformers = pytest.importorskip("transformers")


def random_mask(shape, density=0.3, seed=0, name="tensor"):
    return topk_mask({name: torch.randn(shape, generator=torch.Generator().manual_seed(seed))}, density=density)


# ---- the functions ----


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_masked_linear_gradcheck(density, bias):
    weight, mask = torch.randn(5, 4, dtype=torch.float64), random_mask((5, 4), density)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
    values = mask.gather({"tensor": weight}).requires_grad_()

    def function(x, values, b=None):
        # forward reads the weight, which holds the values: put them there, so that numerical differences see them
        w = mask.scatter_({"tensor": weight.clone()}, values.detach())["tensor"]
        return masked_linear(x, w, values, mask, b)

    assert torch.autograd.gradcheck(function, (x, values) if b is None else (x, values, b))


def test_masked_embedding_gradcheck():
    weight, mask = torch.randn(7, 4, dtype=torch.float64), random_mask((7, 4), 0.5)
    ids = torch.tensor([[0, 3, 3], [6, 1, 0]])
    values = mask.gather({"tensor": weight}).requires_grad_()

    def function(values):
        w = mask.scatter_({"tensor": weight.clone()}, values.detach())["tensor"]
        return masked_embedding(ids, w, values, mask)

    assert torch.autograd.gradcheck(function, (values,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_equal_the_dense_ones(dtype):
    torch.manual_seed(0)
    x, weight, mask = torch.randn(4, 6, 8).to(dtype), torch.randn(10, 8).to(dtype), random_mask((10, 8))
    upstream = torch.randn(4, 6, 10).to(dtype)
    values = mask.gather({"tensor": weight}).float().requires_grad_()
    ours = x.clone().requires_grad_()
    masked_linear(ours, weight, values, mask).backward(upstream)
    dense = weight.double().requires_grad_()
    theirs = x.double().requires_grad_()
    F.linear(theirs, dense).backward(upstream.double())
    tolerance = dict(atol=1e-5, rtol=1e-5) if dtype == torch.float32 else dict(atol=0.1, rtol=2e-2)
    torch.testing.assert_close(values.grad.double(), mask.gather({"tensor": dense.grad}), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, **tolerance)
    assert values.grad.dtype == torch.float32


@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding_padding(padding_idx):
    weight, mask = torch.randn(6, 4), random_mask((6, 4), 0.6)
    ids = torch.tensor([0, 2, 5, 5, 2])
    values = mask.gather({"tensor": weight}).requires_grad_()
    out = masked_embedding(ids, weight, values, mask, padding_idx)
    upstream = torch.randn(5, 4)
    out.backward(upstream)
    dense = weight.clone().requires_grad_()
    F.embedding(ids, dense, padding_idx).backward(upstream)
    assert torch.equal(out, weight[ids])
    torch.testing.assert_close(values.grad, mask.gather({"tensor": dense.grad}))


def test_autocast_and_accumulation():
    torch.manual_seed(0)
    weight, mask, x = torch.randn(10, 8), random_mask((10, 8)), torch.randn(3, 8)
    values = mask.gather({"tensor": weight}).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = masked_linear(x, weight, values, mask, torch.zeros(10))
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, F.linear(x, weight, torch.zeros(10)))
    out.float().sum().backward()
    once = values.grad.clone()
    masked_linear(x, weight, values, mask).sum().backward()
    masked_linear(x, weight, values, mask).sum().backward()
    torch.testing.assert_close(values.grad, 3 * once, atol=0.2, rtol=2e-2)
    assert values.grad.dtype == torch.float32


def test_forward_makes_no_copy_of_the_weight():
    """SpIEL, RoSA and SHiRA clone the weight in every forward."""
    model = sparsify(mlp(), mlp_mask())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(IDS)
    weights = {p.untyped_storage().data_ptr() for n, p in model.named_parameters() if n.endswith("weight")}
    sizes = {p.numel() for n, p in model.named_parameters() if n.endswith("weight")}
    saved = [t for t in kept if t.numel() in sizes and t.is_floating_point()]
    assert len(saved) >= 2
    assert all(t.untyped_storage().data_ptr() in weights for t in saved)


def test_second_derivatives_are_refused_and_bad_arguments_named():
    weight, mask = torch.randn(3, 4), random_mask((3, 4))
    values = mask.gather({"tensor": weight}).requires_grad_()
    x = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(masked_linear(x, weight, values, mask).square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiat"):
        gradient.sum().backward()
    with pytest.raises(ValueError, match=r"weight's shape \[4, 3\]"):
        masked_linear(x, weight.t(), values, mask)
    with pytest.raises(ValueError, match="values must be compact"):
        masked_linear(x, weight, values[:-1], mask)
    with pytest.raises(ValueError, match="padding_idx must be within the 3 rows"):
        masked_embedding(torch.tensor([0]), weight, values, mask, padding_idx=3)
    two = CSRMask.from_dense({"a": torch.ones(3, 4, dtype=torch.bool), "b": torch.ones(1, dtype=torch.bool)})
    with pytest.raises(ValueError, match="mask must cover one tensor"):
        masked_linear(x, weight, values, two)


# ---- whole models ----


def architectures():
    tiny = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, max_position_embeddings=32)
    bert = transformers.BertConfig(**tiny, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    roberta = transformers.XLMRobertaConfig(
        **tiny, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=1
    )
    gpt2 = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    llama = transformers.LlamaConfig(**tiny, intermediate_size=24, num_key_value_heads=2, tie_word_embeddings=False)
    return {
        "bert": lambda: transformers.BertForMaskedLM(bert),  # decoder tied to the embeddings
        "xlm-r": lambda: transformers.XLMRobertaForSequenceClassification(roberta),
        "gpt2": lambda: transformers.GPT2LMHeadModel(gpt2),  # Conv1D, tied
        "llama": lambda: transformers.LlamaForCausalLM(llama),
    }


def loss_of(model, seed=3):
    ids = torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(seed))
    attention = torch.ones_like(ids)
    attention[1, 4:] = 0
    labels = torch.tensor([0, 1, 0]) if "Sequence" in type(model).__name__ else ids
    return model(input_ids=ids, attention_mask=attention, labels=labels).loss


@pytest.mark.parametrize("architecture", ["bert", "xlm-r", "gpt2", "llama"])
def test_gradients_of_architectures(architecture):
    torch.manual_seed(0)
    model = architectures()[architecture]().eval()
    plain = copy.deepcopy(model)
    mask = topk_mask(
        {n: torch.randn(p.shape) for n, p in model.named_parameters() if "norm" not in n.lower() and "ln_" not in n}, density=0.2
    )
    before = {n: (type(m), p) for n, m in model.named_modules() for p in [dict(m._parameters)]}
    keys = list(model.state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparsify(model, mask)
    slow = [str(w.message) for w in caught if "trained through a dense gradient" in str(w.message)]
    assert len(slow) == (1 if architecture == "bert" else 0)  # cls.predictions.bias stands in a module of its own
    expected, got = loss_of(plain), loss_of(model)
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    dense = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named_parameters()}
    records = masked_parameters(model)
    assert list(records) == list(mask.names)
    for name, part in mask.split(mask.gather(dense)).items():
        gradient = records[name].values.grad
        gradient = torch.zeros_like(part) if gradient is None else gradient
        torch.testing.assert_close(gradient, part, atol=1e-6, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
        assert records[name].dense.grad is None
    outside = {n: p.grad for n, p in plain.named_parameters() if n not in mask}
    for name, parameter in model.named_parameters():
        if name in outside and parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, outside[name], atol=1e-6, rtol=1e-4)
    densify(model)
    assert list(model.state_dict()) == keys
    assert {n: type(m) for n, m in model.named_modules()} == {n: t for n, (t, _) in before.items()}
    assert all(p.requires_grad for p in model.parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


@pytest.mark.parametrize("make", ["SparseAdamW", "AdamW", "SGD"])
def test_any_optimizer_trains_a_sparsified_model(make):
    torch.manual_seed(0)
    model = architectures()["bert"]().eval()
    mask = topk_mask({n: torch.randn(p.shape) for n, p in model.named_parameters() if "LayerNorm" not in n}, density=0.1)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsify(model, mask)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = {
        "SparseAdamW": lambda: SparseAdamW(model.named_parameters(), mask, lr=1e-2),
        "AdamW": lambda: torch.optim.AdamW(trainable, lr=1e-2),
        "SGD": lambda: torch.optim.SGD(trainable, lr=1e-1, momentum=0.9),
    }[make]()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        for record in masked_parameters(model).values():
            assert torch.equal(record.mask.gather({record.mask.names[0]: record.dense}), record.values), (
                "the dense tensor is up to date"
            )
    assert losses[-1] < losses[0]
    if make == "SparseAdamW":
        copied = copy.deepcopy(model)
        torch.testing.assert_close(loss_of(copied), loss_of(model))
        with torch.no_grad():
            torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.0).step()
    densify(model)
    for name, selected in mask.to_dense().items():
        start, end = dict(plain.named_parameters())[name], dict(model.named_parameters())[name]
        assert torch.equal(start[~selected], end[~selected]), name


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False))


def mlp_mask(density=0.3):
    return topk_mask(
        {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) for n, p in mlp().named_parameters()}, density=density
    )


IDS = torch.randint(0, 20, (5, 6), generator=torch.Generator().manual_seed(4))


def test_sparsify_structure():
    model, mask = mlp(), mlp_mask()
    assert sparsify(model, mask) is model
    assert isinstance(model[0], MaskedEmbedding)
    assert isinstance(model[1], MaskedLinear)
    assert not model[1].weight.requires_grad
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == {"0.values", "1.values", "1.bias_values", "3.values"}
    assert sum(p.numel() for p in trainable.values()) == mask.nnz
    assert len({p.untyped_storage().data_ptr() for p in trainable.values()}) == 1, "one flat buffer"
    with pytest.raises(ValueError, match="sparsified already"):
        sparsify(model, mask)
    densify(model)
    with pytest.raises(ValueError, match="not sparsified"):
        densify(model)


def test_compile_without_graph_breaks():
    model = sparsify(mlp(), mlp_mask())
    expected = model(IDS)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(IDS)
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_checkpointing_functional_call_state_dict_and_requires_grad():
    model = sparsify(mlp(), mlp_mask())
    model(IDS).square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    checkpoint(model, IDS, use_reentrant=False).square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)
    doubled = {n: 2 * p.detach() for n, p in model.named_parameters()}
    assert not torch.equal(torch.func.functional_call(model, doubled, (IDS,)), model(IDS))
    fresh = sparsify(mlp().apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None), mlp_mask())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), model(IDS))
    model.zero_grad()
    model[1].values.requires_grad_(False)
    model(IDS).sum().backward()
    assert model[1].values.grad is None
    assert model[0].values.grad is not None
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16


def test_module_used_twice_and_frozen_inputs():
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    plain = copy.deepcopy(model)
    mask = topk_mask({"0.weight": torch.randn(6, 6)}, k=9)
    sparsify(model, mask)
    x = torch.randn(4, 6)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    torch.testing.assert_close(shared.values.grad, mask.gather({"0.weight": plain[0].weight.grad}))
    torch.testing.assert_close(shared.bias.grad, plain[0].bias.grad)


def test_unsupported_owners_fall_back_with_one_warning():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3, 2, 2))
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x @ self.scale.sum(0).repeat(2, 2))

    torch.manual_seed(0)
    model = Odd()
    plain = copy.deepcopy(model)
    mask = topk_mask({n: torch.randn(p.shape) for n, p in model.named_parameters()}, k=8)
    with pytest.warns(UserWarning, match="3 masked tensors belong to no Linear.*norm.bias, norm.weight, scale"):
        sparsify(model, mask)
    x = torch.randn(5, 4)
    model(x).square().sum().backward()
    plain(x).square().sum().backward()
    got = torch.cat([r.values.grad for r in masked_parameters(model).values()])
    torch.testing.assert_close(got, mask.gather({n: p.grad for n, p in plain.named_parameters()}))
    with torch.no_grad():
        model.scale_values.add_(1.0)
    densify(model)
    assert type(model) is Odd
    selected = mask.to_dense()["scale"]
    torch.testing.assert_close(model.scale[selected], plain.scale[selected] + 1)
    assert torch.equal(model.scale[~selected], plain.scale[~selected])


def test_sparsify_refuses_what_does_not_fit_and_changes_nothing():
    model = mlp()
    with pytest.raises(ValueError, match="model lacks tensor 'x'"):
        sparsify(model, CSRMask.from_dense({"x": torch.ones(2, dtype=torch.bool)}))
    with pytest.raises(ValueError, match=r"model\['1.weight'\] has shape"):
        sparsify(model, CSRMask.from_dense({"1.weight": torch.ones(2, dtype=torch.bool)}))
    assert type(model[1]) is nn.Linear


def test_save_pretrained_after_densify(tmp_path):
    torch.manual_seed(0)
    model = architectures()["xlm-r"]().eval()
    expected = loss_of(model)
    mask = topk_mask(
        {n: p.detach() for n, p in model.named_parameters() if "encoder" in n and n.endswith("weight") and "Norm" not in n},
        density=0.1,
    )
    densify(sparsify(model, mask)).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loss_of(again), expected)
