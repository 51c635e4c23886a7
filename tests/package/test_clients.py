"""Client programs that train, save and load models without special cases for ours: TRL, accelerate, safetensors, hub
mixins, averaged weights.

Trained entries of a sparsified model are those of the plain model with the same mask; what is saved loads unchanged.
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
IDS = torch.randint(3, 18, (4, 6), generator=torch.Generator().manual_seed(2))


def llama(tied, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    tokens = dict(vocab_size=len(WORDS) + len(SPECIAL), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    options = dict(tie_word_embeddings=tied, initializer_range=0.2, attn_implementation="eager")
    return LlamaForCausalLM(LlamaConfig(**tokens, **sizes, num_key_value_heads=2, **options)).to(dtype)


class Tagger(nn.Module):
    def __init__(self, size: int = 12, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(size, 8)
        self.head = nn.Linear(8, size)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.embedding(ids))


def mask_of(model):
    """Over all matrices, the head and the embedding included."""
    generator = torch.Generator().manual_seed(1)
    matrices = {n: p for n, p in model.named_parameters() if p.dim() == 2}
    return topk_mask({n: torch.rand(p.shape, generator=generator) for n, p in matrices.items()}, density=0.3)


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        if isinstance(model, Tagger):
            model(torch.arange(10)).float().logsumexp(-1).sum().backward()
        else:
            model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def trained(model):
    """The model, sparsified and trained, its mask and its optimizer."""
    mask = mask_of(model)
    sparsify(model, mask)
    optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2)
    train(model, optimizer)
    return model, mask, optimizer


def weights_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def snapshot(model):
    """Each tensor of a sparsified model by its name: dense tensors and values."""
    values = {f"values {n}": p.values.detach().clone() for n, p in masked_parameters(model).items()}
    return values | weights_of(densify(copy.deepcopy(model)))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_weights(plain, expected):
    assert_equal(weights_of(plain), {n: t for n, t in expected.items() if not n.startswith("values ")})


# ---- savers ----
@TIED
@DTYPE
def test_safetensors_save_model(tied, dtype, tmp_path):
    model, mask, _ = trained(llama(tied, dtype))
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    loaded = sparsify(llama(tied, dtype, seed=9), mask)
    safetensors.torch.load_model(loaded, tmp_path / "model.safetensors")
    assert_equal(snapshot(loaded), snapshot(model))


@TIED
@DTYPE
def test_accelerate_save_state_and_save_model(tied, dtype, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, mask, optimizer = trained(llama(tied, dtype))
    model, optimizer = accelerator.prepare(model, optimizer)
    before = snapshot(model)
    accelerator.save_state(tmp_path / "state")
    accelerator.save_model(model, tmp_path / "model")
    train(model, optimizer)
    after = snapshot(model)
    assert any(not torch.equal(after[n], before[n]) for n in before)
    accelerator.load_state(tmp_path / "state")
    assert_equal(snapshot(model), before)
    train(model, optimizer)  # with the optimizer's state
    assert_equal(snapshot(model), after)
    loaded = sparsify(llama(tied, dtype, seed=9), mask)
    safetensors.torch.load_model(loaded, tmp_path / "model" / "model.safetensors")
    assert_equal(snapshot(loaded), before)
    plain = llama(tied, dtype, seed=9)
    accelerate.load_checkpoint_in_model(plain, tmp_path / "model")
    accelerator.free_memory()
    assert_weights(plain, before)


@TIED
@DTYPE
def test_transformers_save_pretrained(tied, dtype, tmp_path):
    model, mask, _ = trained(llama(tied, dtype))
    model.save_pretrained(tmp_path)
    plain, info = LlamaForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"]
    assert {n.rpartition(".")[2] for n in info["unexpected_keys"]} <= {"values"}
    assert_weights(plain, snapshot(model))
    loaded = sparsify(llama(tied, dtype, seed=9), mask)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    missing, unexpected = loaded.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # transformers leaves tied weights out
    assert_equal(snapshot(loaded), snapshot(model))


@TIED
@DTYPE
def test_hub_mixin(tied, dtype, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    cls = type("HubTagger", (Tagger, hub.PyTorchModelHubMixin), {})
    torch.manual_seed(0)
    model, mask, _ = trained(cls(size=10, tied=tied).to(dtype))
    model.save_pretrained(tmp_path)
    assert_weights(cls.from_pretrained(tmp_path).to(dtype), snapshot(model))
    loaded = sparsify(cls(size=10, tied=tied).to(dtype), mask)
    safetensors.torch.load_model(loaded, tmp_path / "model.safetensors")
    assert_equal(snapshot(loaded), snapshot(model))


# ---- averaged and flattened weights ----
def average_states(average, model, decay=0.9):
    """As timm's ModelEma: the state's tensors are written one by one, in place."""
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), model.state_dict().values()):
            mine.copy_(mine * decay + (1 - decay) * theirs)


def averaged_model(model):
    averages = torch.optim.swa_utils
    return averages.AveragedModel(model, multi_avg_fn=averages.get_ema_multi_avg_fn(0.9))


@pytest.mark.parametrize(
    ("tied", "make_average", "update"),
    [
        pytest.param(False, copy.deepcopy, average_states, id="state dicts"),
        pytest.param(False, averaged_model, lambda average, model: average.update_parameters(model), id="untied"),
        pytest.param(True, averaged_model, lambda average, model: average.update_parameters(model), id="tied"),
    ],
)
def test_averages_of_weights(tied, make_average, update):
    model, _, optimizer = trained(llama(tied))
    average, plain = make_average(model), make_average(densify(copy.deepcopy(model)))
    for _ in range(3):
        train(model, optimizer, steps=1)
        update(average, model)
        update(plain, densify(copy.deepcopy(model)))
        torch.testing.assert_close(average(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-6)
    average, plain = (getattr(m, "module", m) for m in (average, plain))
    for mine, theirs in zip(densify(average).parameters(), plain.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


@TIED
def test_vector_to_parameters(tied):
    model, mask, _ = trained(llama(tied))
    plain = densify(copy.deepcopy(model))
    parameters = [p for p in model.parameters() if p.requires_grad]
    vector = nn.utils.parameters_to_vector(parameters) * 1.5
    nn.utils.vector_to_parameters(vector, parameters)
    dense = dict(plain.named_parameters())
    with torch.no_grad():
        mask.scatter_(dense, mask.gather(dense) * 1.5)
        for name, tensor in dense.items():
            if name not in mask:
                tensor.mul_(1.5)
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert_equal(weights_of(densify(model)), weights_of(plain))


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


def sft(model, options, data_and_tools):
    from trl import SFTConfig, SFTTrainer

    data = {"text": [sentence(i) for i in range(8)]}
    return SFTTrainer(model, SFTConfig(**options), **data_and_tools(data))


def dpo(model, options, data_and_tools):
    from trl import DPOConfig, DPOTrainer

    data = {
        "prompt": [sentence(i, 3) for i in range(8)],
        "chosen": [" " + sentence(i + 1) for i in range(8)],
        "rejected": [" " + sentence(i + 2) for i in range(8)],
    }
    reference = copy.deepcopy(model)
    if masked_parameters(model):
        densify(reference)
    return DPOTrainer(model, reference, DPOConfig(**options), **data_and_tools(data))


@pytest.mark.parametrize(
    ("make_trainer", "tied"),
    [
        pytest.param(sft, False, id="sft-untied"),
        pytest.param(dpo, True, id="dpo-tied"),
        pytest.param(sft, True, id="sft-tied", marks=pytest.mark.slow),
        pytest.param(dpo, False, id="dpo-untied", marks=pytest.mark.slow),
    ],
)
def test_trl(make_trainer, tied, tokenizer, tmp_path):
    """Default losses, which read `lm_head.weight` instead of calling the head."""
    pytest.importorskip("trl")
    from datasets import Dataset

    options = {
        "output_dir": str(tmp_path),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "seed": 0,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 16,
    }
    start = llama(tied)
    mask, results = mask_of(start), []
    for dense in (True, False):
        model = copy.deepcopy(start) if dense else sparsify(copy.deepcopy(start), mask)
        # Adam divides small gradients by themselves: their rounding errors would be steps of the size of the others.
        optimizer = SparseAdamW(model.named_parameters(), mask, lr=1e-2, eps=1e-4)

        def data_and_tools(data, optimizer=optimizer):
            dataset = Dataset.from_dict(data)
            return dict(train_dataset=dataset, processing_class=tokenizer, optimizers=(optimizer, None))

        trainer = make_trainer(model, options, data_and_tools)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results.append((losses, model if dense else densify(model)))
    (losses, plain), (other_losses, other) = results
    assert losses == pytest.approx(other_losses, rel=1e-5)
    outside = {n: ~t for n, t in mask.to_dense().items()}
    for (name, before), one, two in zip(start.named_parameters(), plain.parameters(), other.parameters()):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)
        if name in mask:
            assert torch.equal(two[outside[name]], before[outside[name]])
            moved = (two - before).abs()[~outside[name]]
            assert moved.median() > 1e-3, name
