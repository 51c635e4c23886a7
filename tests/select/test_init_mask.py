"""init_mask: each method against NumPy in float64, the targets against PEFT."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deftx_kernels import init_mask, sparsify


def layers(*shapes, dtype=torch.float32, seed=0):
    """Linear layers whose weights have a decaying spectrum, as trained ones."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential()
    for out, features in shapes:
        linear = nn.Linear(features, out)
        r = min(out, features)
        left, right = (torch.randn(n, r, generator=generator) for n in (out, features))
        linear.weight.data = ((left * torch.arange(1, r + 1) ** -0.7) @ right.T / r).to(dtype)
        model.append(linear)
    return model


def scores(model, method, rank, seed):
    """Name → float64 scores, the largest of which are selected."""
    found = {}
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            continue
        weight = p.detach().double().numpy()
        if method == "lift":
            short = weight if weight.shape[0] <= weight.shape[1] else weight.T
            left = np.linalg.eigh(short @ short.T)[1][:, ::-1][:, :rank]
            low = left @ (left.T @ short)
            found[name] = np.abs(low if short is weight else low.T)
        elif method == "magnitude":
            found[name] = np.abs(weight)
        else:  # torch's CPU generator is MT19937, seeded with 32 bits; a float64 takes the low 53 bits of two draws
            digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            generator = np.random.RandomState(int.from_bytes(digest, "little") & 0xFFFFFFFF)
            draws = generator.randint(0, 2**32, 2 * weight.size, dtype=np.uint64).reshape(-1, 2)
            bits = (draws[:, 0] << np.uint64(32) | draws[:, 1]) & np.uint64(2**53 - 1)
            found[name] = (bits / 2**53).reshape(weight.shape)
    return found


def groups(found, scope):
    """The sets of entries that are selected from separately, as lists of (name, index)."""
    if scope == "global":
        return [[(n, ...) for n in found]]
    return [[(n, row)] for n, s in found.items() for row in (range(len(s)) if scope == "row" else [...])]


def assert_largest(mask, found, scope, density, rtol):
    dense = {n: t.numpy() for n, t in mask.to_dense().items()}
    assert dense.keys() == found.keys()
    for group in groups(found, scope):
        chosen = np.concatenate([dense[n][i].ravel() for n, i in group])
        score = np.concatenate([found[n][i].ravel() for n, i in group])
        assert chosen.sum() == round(density * score.size)
        if chosen.any() and not chosen.all():
            assert score[chosen].min() >= score[~chosen].max() * (1 - rtol)


@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
@pytest.mark.parametrize("method", ["lift", "magnitude", "random"])
@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=3),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_selects_the_largest_scores(method, scope, sizes, density, seed, dtype):
    model = layers(*sizes, dtype=dtype)
    mask = init_mask(model, method=method, density=density, rank=4, scope=scope, seed=seed)
    rtol = {"lift": 1e-4, "magnitude": 0.0, "random": 0.0}[method]
    assert_largest(mask, scores(model, method, 4, seed), scope, density, rtol)
    assert init_mask(model, method=method, density=density, rank=4, scope=scope, seed=seed) == mask


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["lift", "magnitude", "random"])
def test_real_sizes(method):
    model = layers((3072, 768))
    mask = init_mask(model, method=method, density=0.05)
    assert_largest(mask, scores(model, method, 128, 0), "tensor", 0.05, {"lift": 1e-4}.get(method, 0.0))


@pytest.mark.multithreaded
@pytest.mark.parametrize("method", ["lift", "magnitude", "random"])
def test_one_thread_and_two(method):
    model, masks = layers((3072, 768)), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        masks.append(init_mask(model, method=method, density=0.05))
    torch.set_num_threads(before)
    # LIFT's scores come from torch's matrix products, which may round otherwise with another number of threads
    assert (masks[0] & masks[1]).nnz >= masks[0].nnz * (0.9999 if method == "lift" else 1)


def test_random_masks_are_uniform_and_independent():
    model = layers((64, 96), (64, 96))
    counts = sum(
        init_mask(model, method="random", k=1536, seed=s)["0.weight"].to_dense()["0.weight"] for s in range(99)
    )
    # of 99 draws at density 1/4: mean 24.75, standard deviation 4.31; 6,144 entries
    assert counts.float().mean().item() == 24.75
    assert counts.float().std().item() == pytest.approx(4.31, rel=0.05)
    assert counts.max().item() < 24.75 + 6 * 4.31
    mask = init_mask(model, method="random", k=1536)
    one, other = (mask.to_dense()[f"{i}.weight"] for i in (0, 1))
    assert (one & other).sum().item() == pytest.approx(1536 / 4, rel=0.25)
    alone = init_mask(model.to(torch.bfloat16), method="random", k=1536, target_modules=["1"])
    assert alone == mask["1.weight"]  # whatever the dtype and the other targets are


# ---- targets ----
def transformer(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    if kind == "gpt2":  # its layers are Conv1D
        sizes = dict(vocab_size=20, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    if kind == "llama":
        config = transformers.LlamaConfig(**small, num_key_value_heads=2, tie_word_embeddings=True)
        return transformers.LlamaForCausalLM(config)
    config = transformers.RobertaConfig(**small, num_labels=3, pad_token_id=1)
    return getattr(transformers, kind)(config)


TARGETS = {
    "all-linear": ("gpt2", "llama", "RobertaForMaskedLM", "RobertaForSequenceClassification"),
    "All-Linear": ("llama",),
    ("q_proj", "layers.1.mlp.up_proj"): ("llama",),
    ("lm_head", "embed_tokens"): ("llama",),
    r".*\.1\..*(query|value)": ("RobertaForMaskedLM",),
    ("word_embeddings", "query"): ("RobertaForSequenceClassification",),
}


@pytest.mark.parametrize(("targets", "kind"), [(t, k) for t, kinds in TARGETS.items() for k in kinds])
def test_targets_are_those_of_peft(targets, kind):
    peft = pytest.importorskip("peft")
    wanted = targets if isinstance(targets, str) else list(targets)
    model = transformer(kind)
    task = "SEQ_CLS" if "Sequence" in kind else None
    config = peft.LoraConfig(target_modules=wanted, task_type=task, fan_in_fan_out=kind == "gpt2")
    modules = peft.get_peft_model(transformer(kind), config).base_model.targeted_module_names
    first = {id(p): n for n, p in model.named_parameters()}
    mask = init_mask(model, method="magnitude", density=0.1, target_modules=wanted)
    assert set(mask.names) == {first[id(model.get_submodule(n).weight)] for n in modules}
    sparsify(model, mask, freeze_others=True)


@pytest.mark.parametrize("kind", ["RobertaForTokenClassification", "RobertaForQuestionAnswering"])
def test_no_head_is_a_linear_target(kind):
    """For these, PEFT's "all-linear" takes the head as well and then fails to train it whole."""
    mask = init_mask(transformer(kind), method="magnitude", density=0.1)
    assert len(mask) == 2 * 6
    assert all(n.startswith("roberta.encoder.layer.") for n in mask.names)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(method="largest"), ValueError, "method must be one of lift, magnitude, random, got 'largest'"),
        (dict(k=3), ValueError, "exactly one of k and density"),
        (dict(density=1.5), ValueError, "density must be in"),
        (dict(density=None, k=65, method="random"), ValueError, "k = 65 is more than the 64 entries of tensor '0.w"),
        (dict(scope="layer", method="random"), ValueError, "scope must be one of"),
        (dict(rank=0), ValueError, "rank must be at least 1"),
        (dict(seed=-1), ValueError, "seed must be at least 0"),
        (dict(target_modules=["1"]), ValueError, "'1' matches no module that has a weight. Some of the model's: 0, 2"),
        (dict(target_modules=["0", "x"]), ValueError, "'x' matches no module"),
        (dict(target_modules=[]), ValueError, "matches no module"),
        (dict(target_modules="[02]."), ValueError, r"'\[02\]\.' matches no module"),
        (dict(target_modules="("), ValueError, "no regular expression"),
        (dict(target_modules=[0]), TypeError, "target_modules must be names, got 0"),
    ],
)
def test_bad_arguments(options, error, match):
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(error, match=match):
        init_mask(model, **{"density": 0.1, **options})


def test_weights_of_experts_are_no_target():
    model = nn.Sequential(nn.Linear(8, 8), nn.Module())
    model[1].up_proj = nn.Parameter(torch.ones(2, 8, 8))
    assert init_mask(model, density=0.1).names == ("0.weight",)
    with pytest.raises(ValueError, match="'1' matches no .*: 0. Weights of experts, such as '1.up_proj', are selected"):
        init_mask(model, density=0.1, target_modules=["1"])


def test_bad_models():
    model = nn.Sequential(nn.Linear(8, 8))
    sparsify(model, init_mask(model, density=0.1))
    with pytest.raises(ValueError, match="model is sparsified"):
        init_mask(model, density=0.1)
    with pytest.raises(TypeError, match="must be a torch.nn.Module"):
        init_mask({"w": torch.ones(2, 2)}, density=0.1)
    diverged = nn.Sequential(nn.Linear(8, 8))
    nn.init.constant_(diverged[0].weight, torch.nan)
    with pytest.raises(ValueError, match="0.weight.*holds nan at flat index 0"):
        init_mask(diverged, density=0.1)
    quantized = nn.Sequential(nn.Linear(8, 8))
    quantized[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"model\['0.weight'\] must be float32"):
        init_mask(quantized, density=0.1)
