"""Programs that train, save and load models they know nothing of: TRL, accelerate, safetensors, hub mixins, averaged
weights.

Trained entries of a sparsified model are those of the plain model with the same mask; what a saver writes comes back
whole.
"""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn

from deftx_kernels import SparseAdamW, densify, sparsify, topk_mask
from deftx_kernels.nn import masked_parameters

pytest.importorskip("transformers")
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.usefixtures("one_thread")
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "a", "small", "big", "red", "house"]
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def llama(tied, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS) + len(SPECIAL),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(dtype)


def choose(model, density=0.3):
    """A mask over all matrices, the head and the embedding included."""
    generator = torch.Generator().manual_seed(1)
    return topk_mask(
        {n: torch.rand(p.shape, generator=generator) for n, p in model.named_parameters() if p.dim() == 2},
        density=density,
    )


IDS = torch.randint(3, 18, (4, 6), generator=torch.Generator().manual_seed(2))


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def sparsified(tied, dtype, steps=2):
    """A sparsified model that has been trained, its mask and its optimizer."""
    model = llama(tied, dtype)
    mask = choose(model)
    sparsify(model, mask)
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
    train(model, optimizer, steps)
    return model, mask, optimizer


def snapshot(model):
    """Every tensor of a sparsified model by its name: dense tensors and values."""
    found = {n: r.values.detach().clone() for n, r in masked_parameters(model).items()}
    return {"values " + n: t for n, t in found.items()} | plain_snapshot(densify(copy.deepcopy(model)))


def plain_snapshot(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(model, expected):
    found = snapshot(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def fresh(tied, dtype, mask):
    """A model of other weights, sparsified with this mask."""
    return sparsify(llama(tied, dtype, seed=9), mask)


# ---- savers ----
@TIED
@DTYPE
def test_safetensors_save_model(tied, dtype, tmp_path):
    model, mask, _ = sparsified(tied, dtype)
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    loaded = fresh(tied, dtype, mask)
    safetensors.torch.load_model(loaded, tmp_path / "model.safetensors")
    assert_same(loaded, snapshot(model))


@TIED
@DTYPE
def test_accelerate_save_state_and_save_model(tied, dtype, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, mask, optimizer = sparsified(tied, dtype)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = snapshot(model)
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(model, tmp_path / "model")
    train(model, optimizer)
    after = snapshot(model)
    assert any(not torch.equal(after[n], before[n]) for n in before)
    accelerator.load_state(tmp_path / "state")
    assert_same(model, before)
    train(model, optimizer)  # the optimizer's state is back, too
    assert_same(model, after)
    loaded = fresh(tied, dtype, mask)
    safetensors.torch.load_model(loaded, tmp_path / "model" / "model.safetensors")
    assert_same(loaded, before)
    plain = llama(tied, dtype, seed=9)
    accelerate.load_checkpoint_in_model(plain, tmp_path / "model")
    accelerator.free_memory()
    for name, tensor in plain_snapshot(plain).items():
        assert torch.equal(tensor, before[name]), name


@TIED
@DTYPE
def test_transformers_save_pretrained(tied, dtype, tmp_path):
    model, mask, _ = sparsified(tied, dtype)
    model.save_pretrained(tmp_path)
    plain, info = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert {n.rpartition(".")[2] for n in info["unexpected_keys"]} <= {"values"}
    expected = snapshot(model)
    for name, tensor in plain_snapshot(plain).items():
        assert torch.equal(tensor, expected[name]), name
    loaded = fresh(tied, dtype, mask)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    missing, unexpected = loaded.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # transformers leaves tied weights out
    assert_same(loaded, expected)


class Tagger(nn.Module):
    def __init__(self, size: int = 12, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(size, 8)
        self.head = nn.Linear(8, size)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


@TIED
@DTYPE
def test_a_hub_mixin(tied, dtype, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    kind = type("HubTagger", (Tagger, hub.PyTorchModelHubMixin), {})
    torch.manual_seed(0)
    model = kind(size=10, tied=tied).to(dtype)
    mask = topk_mask({n: torch.rand(p.shape) for n, p in model.named_parameters() if p.dim() == 2}, density=0.4)
    sparsify(model, mask)
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(10)).float().logsumexp(-1).sum().backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    plain = kind.from_pretrained(tmp_path)
    expected = snapshot(model)
    for name, tensor in plain_snapshot(plain.to(dtype)).items():
        assert torch.equal(tensor, expected[name]), name
    loaded = sparsify(kind(size=10, tied=tied).to(dtype), mask)
    safetensors.torch.load_model(loaded, tmp_path / "model.safetensors")
    assert_same(loaded, expected)


# ---- weights that are averaged, copied and flattened ----
def averaged(average, model, decay=0.9):
    """As timm's ModelEma: the state's tensors are written one by one, in place."""
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values()):
            mine.copy_(mine * decay + (1 - decay) * theirs)


def test_an_average_of_a_state_dict():
    model, _, optimizer = sparsified(False, torch.float32)
    average, plain = copy.deepcopy(model), densify(copy.deepcopy(model))
    for _ in range(3):
        train(model, optimizer, steps=1)
        averaged(average, model)
        averaged(plain, densify(copy.deepcopy(model)))
        torch.testing.assert_close(average(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(densify(average).parameters(), plain.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@TIED
def test_averaged_model(tied):
    averages = torch.optim.swa_utils
    model, _, optimizer = sparsified(tied, torch.float32)
    rule = averages.get_ema_multi_avg_fn(0.9)
    average = averages.AveragedModel(model, multi_avg_fn=rule)
    plain = averages.AveragedModel(densify(copy.deepcopy(model)), multi_avg_fn=rule)
    for _ in range(3):
        train(model, optimizer, steps=1)
        average.update_parameters(model)
        plain.update_parameters(densify(copy.deepcopy(model)))
        torch.testing.assert_close(average(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(densify(average.module).parameters(), plain.module.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@TIED
def test_vector_to_parameters(tied):
    model, _, _ = sparsified(tied, torch.float32)
    plain = densify(copy.deepcopy(model))
    mask = choose(plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    vector = nn.utils.parameters_to_vector(trained) * 1.5
    nn.utils.vector_to_parameters(vector, trained)
    dense = dict(plain.named_parameters())
    with torch.no_grad():
        mask.scatter_(dense, mask.gather(dense) * 1.5)
        for name, tensor in dense.items():
            if name not in mask:
                tensor.mul_(1.5)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    for mine, theirs in zip(densify(model).parameters(), plain.parameters()):
        assert torch.equal(mine, theirs)


# ---- TRL ----
@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(SPECIAL + WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sentence(i, length=6):
    return " ".join(WORDS[(i * 5 + j * j) % len(WORDS)] for j in range(length))


def sft(model, optimizer, tokenizer, options):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_dict({"text": [sentence(i) for i in range(8)]})
    return SFTTrainer(
        model, SFTConfig(**options), train_dataset=data, processing_class=tokenizer, optimizers=(optimizer, None)
    )


def dpo(model, optimizer, tokenizer, options):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = range(8)
    data = {"prompt": [sentence(i, 3) for i in rows], "chosen": [" " + sentence(i + 1) for i in rows]}
    data = Dataset.from_dict(data | {"rejected": [" " + sentence(i + 2) for i in rows]})
    reference = densify(copy.deepcopy(model)) if masked_parameters(model) else copy.deepcopy(model)
    return DPOTrainer(
        model,
        reference,
        DPOConfig(**options),
        train_dataset=data,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )


@pytest.mark.parametrize(
    ("trainer", "tied"),
    [
        pytest.param(sft, False, id="sft-untied"),
        pytest.param(dpo, True, id="dpo-tied"),
        pytest.param(sft, True, id="sft-tied", marks=pytest.mark.slow),
        pytest.param(dpo, False, id="dpo-untied", marks=pytest.mark.slow),
    ],
)
def test_trl(trainer, tied, tokenizer, tmp_path):
    """Default losses, which read `lm_head.weight` instead of calling the head."""
    pytest.importorskip("trl")
    options = {
        "output_dir": str(tmp_path), "max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 0,
        "max_grad_norm": 0.0, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "max_length": 16,
    }  # fmt: skip
    start = llama(tied)
    mask = choose(start)
    results = []
    for dense in (True, False):
        model = copy.deepcopy(start) if dense else sparsify(copy.deepcopy(start), mask)
        # Adam divides small gradients by themselves: their rounding errors would be steps of the size of the others.
        optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2, eps=1e-4)
        run = trainer(model, optimizer, tokenizer, options)
        run.train()
        losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
        results.append((losses, model if dense else densify(model)))
    (losses, plain), (other_losses, other) = results
    assert losses == pytest.approx(other_losses, rel=1e-5)
    outside = {n: ~t for n, t in mask.to_dense().items()}
    tensors = zip(start.named_parameters(), plain.parameters(), other.parameters())
    for (name, before), one, two in tensors:
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
        if name in mask:
            assert torch.equal(two[outside[name]], before[outside[name]])
            moved = (two - before).abs()[~outside[name]]
            assert moved.median() > 1e-3, name
