"""Sparsified models as a whole: transformers' architectures, optimizers, states and files, casts, functional calls."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from deftx_kernels import CSRMask, SparseAdamW, densify, sparsify, topk_mask
from deftx_kernels.nn import masked_parameters

transformers = pytest.importorskip("transformers")


def mask_of(model, density=0.3, seed=1, only=lambda name, p: True):
    generator = torch.Generator().manual_seed(seed)
    scores = {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters() if only(n, p)}
    return (
        topk_mask(scores, density=density)
        if density < 1
        else CSRMask.from_dense({n: t == t for n, t in scores.items()})
    )


def sparsified(model, mask):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*trained through a dense gradient")
        return sparsify(model, mask)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def compact_gradients(model):
    """Name → gradient of the values, 0 where there is none."""
    records = masked_parameters(model)
    return {n: torch.zeros_like(r.values) if r.values.grad is None else r.values.grad for n, r in records.items()}


def check_in_step(model):
    """Every dense tensor holds its values."""
    records = masked_parameters(model)
    assert records
    for name, (dense, values, mask) in records.items():
        assert torch.equal(mask.gather({name: dense}), values.to(dense.dtype)), name


# ---- architectures ----

SIZES = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=50, max_position_embeddings=32)
ENCODER = dict(**SIZES, intermediate_size=24, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def bert(kind, tie=True):
    return getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**ENCODER, tie_word_embeddings=tie))


def xlmr(kind, tie=True):
    config = transformers.XLMRobertaConfig(**ENCODER, pad_token_id=1, tie_word_embeddings=tie)
    return getattr(transformers, f"XLMRobertaFor{kind}")(config)


def gpt2(tie=True):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            bos_token_id=0, eos_token_id=0, tie_word_embeddings=tie,
        )
    )  # fmt: skip


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
MASKS = {
    "everything": lambda n, p: True,
    "matrices": lambda n, p: p.dim() == 2,
    "linear": lambda n, p: p.dim() == 2 and not any(word in n for word in ("embed", "wte", "wpe")),
    "embeddings": lambda n, p: any(word in n for word in ("embed", "wte", "wpe")),
    "biases and norms": lambda n, p: p.dim() == 1,
}


def make(architecture, dtype=torch.float32):
    torch.manual_seed(0)
    return ARCHITECTURES[architecture]().to(dtype).eval()


def batch(model):
    """Two rows of seven tokens and one of four, the rest of which is padding."""
    ids = torch.randint(2, 50, (3, 7), generator=torch.Generator().manual_seed(3))
    attention = torch.ones_like(ids)
    attention[1, 4:] = 0
    padding = model.config.pad_token_id
    ids[1, 4:] = 0 if padding is None else padding
    kind = type(model).__name__
    labels = (
        torch.tensor([0, 1, 0])
        if "Sequence" in kind
        else ids % 2
        if "Token" in kind
        else ids.where(attention == 1, -100)
    )
    return dict(input_ids=ids, attention_mask=attention, labels=labels)


def loss_of(model, part=slice(None)):
    return model(**{name: tensor[part] for name, tensor in batch(model).items()}).loss


@pytest.mark.parametrize(
    ("architecture", "which", "dtype", "density"),
    [
        *((a, "matrices", torch.float32, 0.2) for a in ARCHITECTURES),
        *((a, "everything", torch.float64, 1.0) for a in ("bert, mlm", "xlm-r, tokens", "gpt2", "llama, tied")),
        *(
            (a, w, torch.float64, 0.3)
            for a in ("xlm-r, mlm", "gpt2")
            for w in ("linear", "embeddings", "biases and norms")
        ),
        *((a, "everything", torch.bfloat16, 0.3) for a in ("xlm-r, classes", "gpt2", "llama")),
        ("bert, classes", "everything", torch.float32, 1e-9),
    ],
)
def test_gradients_of_architectures(architecture, which, dtype, density):
    model, plain = make(architecture, dtype), make(architecture, dtype)
    mask = (
        mask_of(model, density, only=MASKS[which]) if density > 1e-6 else topk_mask(dict(model.named_parameters()), k=1)
    )
    keys, types = list(model.state_dict()), [type(m) for m in model.modules()]
    sparsified(model, mask)
    expected, got = loss_of(plain), loss_of(model)
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    dense = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in plain.named_parameters()}
    tolerance = {
        torch.float64: dict(atol=1e-10, rtol=1e-10),
        torch.float32: dict(atol=1e-7, rtol=1e-5),
        torch.bfloat16: dict(atol=2e-2, rtol=2e-2),  # dense gradients are rounded where the compact ones are not
    }[dtype]
    found = compact_gradients(model)
    assert list(found) == list(mask.names)
    for name, part in mask.split(mask.gather(dense)).items():
        torch.testing.assert_close(found[name].to(dtype), part, **tolerance, msg=lambda m, name=name: f"{name}: {m}")
        if not name.endswith("key.bias"):  # whose gradient is 0 but for rounding
            assert (found[name] - part).norm() <= 0.01 * part.norm(), name
    for name, parameter in model.named_parameters():
        if name in mask:
            assert parameter.grad is None
        elif name in dense and parameter.requires_grad:
            torch.testing.assert_close(
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad, dense[name]
            )
    densify(model)
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == types
    assert all(p.requires_grad for p in model.parameters())
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, dict(model.named_parameters())[name])


@pytest.mark.parametrize("architecture", ["bert, mlm", "gpt2", "llama"])
def test_autocast_of_architectures(architecture):
    """Activations bit for bit those of the dense model under autocast; gradients, which are not rounded to 16 bits, are
    closer.
    """
    model, plain = make(architecture), make(architecture)
    exact = copy.deepcopy(plain).double()
    mask = mask_of(model, 0.3, only=MASKS["matrices"])
    sparsified(model, mask)
    seen = [], []
    for one, outputs in zip((model, plain), seen):
        for module in one.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda _, args, out, outputs=outputs: outputs.extend(tree_leaves(out)))
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(one)
        loss.backward()
    loss_of(exact).backward()
    assert len(seen[0]) > 10
    assert torch.bfloat16 in {t.dtype for t in seen[0]}
    for ours, theirs in zip(*seen):
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
    model = make(architecture)
    sparsified(model, mask_of(model))
    loss_of(model).backward()
    expected = compact_gradients(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    loss_of(model.train()).backward()
    for name, gradient in compact_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("architecture", ["bert, classes", "llama"])
def test_whole_models_compile_without_graph_breaks(architecture):
    torch._dynamo.reset()
    model = make(architecture)
    sparsified(model, mask_of(model))
    loss_of(model).backward()
    expected = compact_gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**batch(model)).loss.backward()
    for name, gradient in compact_gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["bert, classes", "xlm-r, mlm", "gpt2", "llama, tied"])
def test_saved_models_load_as_plain_ones(architecture, tmp_path):
    """Trained weights in place, whether the model is sparsified still (tied values are stored once) or not any more."""
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
        assert {n: tuple(p.shape) for n, p in again.named_parameters()} == {
            n: tuple(p.shape) for n, p in weights.items()
        }
        assert all(torch.equal(p, weights[n]) for n, p in again.named_parameters())
        assert torch.equal(loss_of(again), expected)


def test_an_embedding_that_is_resized_is_refused():
    model = make("bert, mlm")
    sparsified(model, mask_of(model))
    model.get_input_embeddings().weight.data = torch.zeros(60, 16)  # as resize_token_embeddings does
    with pytest.raises(RuntimeError, match="word_embeddings.weight' is sparsified and has been replaced or resized"):
        loss_of(model)


def test_lora_on_a_sparsified_model():
    peft = pytest.importorskip("peft")
    model = make("bert, classes")
    sparsified(model, mask_of(model))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    loss_of(wrapped.base_model.model).backward()
    assert {n.split(".")[-3] for n, p in wrapped.named_parameters() if p.grad is not None} == {"lora_A", "lora_B"}


# ---- optimizers ----

IDS = torch.randint(0, 20, (6, 5), generator=torch.Generator().manual_seed(4))


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    layers = (
        nn.Embedding(20, 8, padding_idx=0),
        nn.Linear(8, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 4, bias=False),
    )
    return nn.Sequential(*layers).to(dtype)


def small(dtype=torch.float32, seed=1):
    model = mlp(dtype)
    mask = mask_of(model, seed=seed)
    return sparsified(model, mask), mask


def square(model, ids=IDS):
    return model(ids).float().square().mean()


@pytest.mark.parametrize("name", ["SparseAdamW", "AdamW", "SGD", "LBFGS", "two", "part"])
def test_any_optimizer_trains_a_sparsified_model(name):
    """As it trains a dense model whose gradients are masked; after each step, and within a closure, weights are up to
    date.
    """
    model, mask = small()
    plain, chosen = mlp(), mask.to_dense()
    for n, p in plain.named_parameters():
        p.register_hook(lambda g, c=chosen[n]: g * c)
    kinds = {
        "SparseAdamW": lambda ps: [torch.optim.AdamW(ps, lr=0.05, weight_decay=0.0)],
        "AdamW": lambda ps: [torch.optim.AdamW(ps, lr=0.05, weight_decay=0.0)],
        "SGD": lambda ps: [torch.optim.SGD(ps, lr=0.5, momentum=0.9)],
        "LBFGS": lambda ps: [torch.optim.LBFGS(ps, lr=0.5, max_iter=4, line_search_fn="strong_wolfe")],
        "two": lambda ps: [torch.optim.SGD(ps[:2], lr=0.5), torch.optim.SGD(ps[2:], lr=0.1)],
        "part": lambda ps: [torch.optim.SGD(ps[1:3], lr=0.5)],
    }
    ours = {n: r.values for n, r in masked_parameters(model).items()}
    order = [n for n, _ in plain.named_parameters()]
    runs = []
    for m, parameters in ((model, [ours[n] for n in order]), (plain, list(plain.parameters()))):
        optimizers, losses = kinds[name](parameters), []
        if m is model and name == "SparseAdamW":
            optimizers = [SparseAdamW(model.named_parameters(), mask, lr=0.05, weight_decay=0.0)]

        def closure(m=m, losses=losses):
            m.zero_grad()
            loss = square(m)
            loss.backward()
            losses.append(loss.detach())
            return loss

        for _ in range(5):
            for optimizer in optimizers:
                optimizer.step(closure)
                if m is model:
                    check_in_step(m)
        runs.append(torch.stack(losses))
    torch.testing.assert_close(*runs, atol=1e-5, rtol=1e-3)
    assert runs[0][-1] < 0.9 * runs[0][0]
    densify(model)
    start = dict(mlp().named_parameters())
    for n, p in model.named_parameters():
        assert torch.equal(p[~chosen[n]], start[n][~chosen[n]]), n


def test_accumulation_is_in_place_and_equals_one_batch():
    model, _ = small()
    seen = []
    model[1].values.register_hook(lambda g: seen.append("hook"))
    model[1].values.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    (square(model, IDS[:3]) / 2).backward()
    first = model[1].values.grad
    (square(model, IDS[3:]) / 2).backward()
    assert model[1].values.grad is first
    got = {n: g.clone() for n, g in compact_gradients(model).items()}
    model.zero_grad(set_to_none=False)
    assert model[1].values.grad is first
    assert not first.any()
    square(model).backward()
    torch.testing.assert_close(compact_gradients(model), got)
    assert seen == ["hook", "accumulated"] * 3
    model.zero_grad()
    model[1].values.requires_grad_(False)
    model[1].bias_values.requires_grad_(False)
    model[2].values.requires_grad_(False)
    square(model).backward()
    assert model[1].values.grad is model[1].bias_values.grad is model[2].values.grad is None
    assert model[0].values.grad is not None


@pytest.mark.parametrize(
    "make_optimizer",
    [lambda m: torch.optim.SGD(m.parameters()), lambda m: SparseAdamW(m.named_parameters(), mask_of(m))],
)
def test_an_optimizer_made_before_sparsify_warns(make_optimizer):
    model = mlp()
    optimizer = make_optimizer(model)
    sparsified(model, mask_of(model))
    square(model).backward()
    with pytest.warns(UserWarning, match=r"was made before sparsify: it trains nothing of '0\.weight'"):
        optimizer.step()
    other = mlp()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    square(other).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_copies_and_averages_train_on_their_own():
    model, _ = small()
    twin = copy.deepcopy(model)
    start = parameters_to_vector(model.parameters()).clone()
    square(twin).backward()
    torch.optim.SGD(trainable(twin), lr=0.5).step()
    check_in_step(twin)
    assert torch.equal(parameters_to_vector(model.parameters()), start)
    assert not torch.equal(twin(IDS), model(IDS))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(trainable(model), lr=0.5)
    before = copy.deepcopy(model)
    for _ in range(2):
        square(model).backward()
        optimizer.step()
        average.update_parameters(model)
    average(IDS)  # brings the dense tensors up to date
    check_in_step(average)
    assert square(model) < square(average) < square(before)
    ema = [v.detach().clone() for v in trainable(average)]
    with torch.no_grad():  # weights that are swapped in by hand, as for an evaluation
        for p, e in zip(trainable(before), ema):
            p.copy_(e)
    assert torch.equal(before(IDS), average(IDS))


# ---- states and casts ----


def tied(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)).to(dtype)
    model[1].weight = model[0].weight
    mask = mask_of(model)
    return sparsified(model, mask), mask


def shaken(model, seed=0):
    """Other weights; values with digits that 16 bits do not hold."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("which", [small, tied])
def test_state_of_a_sparsified_model(which, assign, dtype):
    source, target = shaken(which(dtype)[0]), which(dtype)[0]
    state = {n: t.clone() for n, t in source.state_dict().items()}
    assert sum("values" in n for n in state) == len(masked_parameters(source)), "tied values once"
    target.load_state_dict(state, assign=assign)
    check_in_step(target)
    assert torch.equal(target[0].values, source[0].values)
    assert torch.equal(target(IDS), source(IDS))
    assert target[0].values.requires_grad
    assert not masked_parameters(target)["0.weight"].dense.requires_grad
    square(target).backward()
    torch.optim.SGD(trainable(target), lr=0.5).step()
    check_in_step(target)
    assert not torch.equal(target(IDS), source(IDS))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("which", [small, tied])
def test_state_of_a_plain_model(which, strict):
    """Its weights are taken over, and stay: values that were left behind would overwrite them in the next step."""
    model, _ = which()
    plain = densify(shaken(which()[0]))
    state = plain.state_dict()
    assert model.load_state_dict(state, strict=strict) == ([], [])
    check_in_step(model)
    square(model).backward()
    torch.optim.SGD(trainable(model), lr=0.0).step()
    assert torch.equal(model(IDS), plain(IDS))
    del state["0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*0\.weight"):
        model.load_state_dict(state)


def test_values_alone_are_a_state():
    source, target = shaken(small()[0]), small()[0]
    for name, dense in small()[0].named_parameters():
        if "values" not in name:
            source.get_submodule(name[0])._parameters[name[2:]].data.copy_(dense)
    values = {n: t for n, t in source.state_dict().items() if "values" in n}
    target.load_state_dict(values, strict=False)
    check_in_step(target)
    assert torch.equal(target(IDS), source(IDS))


def test_state_of_another_mask_is_refused():
    torch.manual_seed(0)
    linear = nn.Linear(8, 4, bias=False)
    one, other = (sparsify(copy.deepcopy(linear), mask_of(linear, seed=seed)) for seed in (1, 2))
    before = other.weight.clone()
    with pytest.raises(RuntimeError, match="values of weight are not those at this model's mask"):
        other.load_state_dict(shaken(one).state_dict())
    assert torch.equal(other.weight, before)
    with pytest.raises(RuntimeError, match="size mismatch for 0.values"):
        small()[0].load_state_dict(sparsified(mlp(), mask_of(mlp(), density=0.2)).state_dict())


def test_casts_keep_values_in_32_bits_and_ties():
    for model in (small()[0], tied()[0]):
        shaken(model)
        model(IDS)
        values = model[0].values.detach().clone()
        square(model).backward()
        model.to(torch.bfloat16)
        check_in_step(model)
        assert model[0].weight.dtype == torch.bfloat16
        assert model[0].values.dtype == model[0].values.grad.dtype == torch.float32
        square(model).backward()
        assert torch.equal(model.float()[0].values, values), "the cast to 16 bits and back costs no digit"
        check_in_step(model)
        model.double()
        assert model[0].values.dtype == model[0].values.grad.dtype == torch.float64
        check_in_step(model)
    assert model[0].values is model[1].values
    assert model.to("meta")[0].values.is_meta
    assert model[0].masks["weight"].device.type == "cpu", "so that it can come back"


# ---- functional calls, checkpointing, inference ----


def test_functional_calls_use_the_values_they_are_given():
    for model in (small()[0], tied()[0]):
        values = {n: p.detach() + 1 for n, p in model.named_parameters() if p.requires_grad}
        out = torch.func.functional_call(model, values, (IDS,))
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in values.items():
                moved.get_parameter(name).copy_(value)
        assert not torch.equal(out, model(IDS))
        assert torch.equal(out, moved(IDS))
        square(moved).backward()
        gradients = torch.func.grad(
            lambda v, model=model: torch.func.functional_call(model, v, (IDS,)).square().mean()
        )(values)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, moved.get_parameter(name).grad)
        check_in_step(model)
    model, _ = small()
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(IDS), model(IDS))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(model)(IDS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    model, _ = small()
    square(model).backward()
    expected = compact_gradients(model)
    model.zero_grad()
    hidden = model[0](IDS)
    checkpoint(model[1:], hidden, use_reentrant=reentrant).square().mean().backward()
    torch.testing.assert_close(compact_gradients(model), expected)


def test_inference():
    model, _ = small()
    expected, kept = model(IDS), []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        assert torch.equal(model.eval()(IDS), expected)
    assert not kept
    with torch.inference_mode():
        assert torch.equal(model(IDS), expected)
        assert torch.equal(copy.deepcopy(model)(IDS), expected)
    assert torch.equal(torch.export.export(model, (IDS,)).module()(IDS), expected)
