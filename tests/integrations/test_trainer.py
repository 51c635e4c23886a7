"""transformers.Trainer and TRL's SFTTrainer with a sparsified model: steps, clipping, checkpoints, resume, deltas."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from deftx_kernels import SparseAdamW, SparseDelta, densify, sparsify, topk_mask
from deftx_kernels.integrations import SparseConfig, get_sparse_model, sparse_delta

pytest.importorskip("transformers")
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from deftx_kernels.integrations.transformers import SaveDeltaCallback, optimizer_cls_and_kwargs

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["<pad>", "<eos>", "<unk>", "the", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "a", "red"]
CONFIG = SparseConfig(density=0.1, rank=4, modules_to_save=["norm"])


def llama(tied=True, dtype=torch.float32, **options):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    tokens = dict(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=None)
    config = LlamaConfig(**tokens, **sizes, num_key_value_heads=2, initializer_range=0.2, **options)
    config.tie_word_embeddings = tied
    return LlamaForCausalLM(config).to(dtype)


def data(rows=16):
    ids = torch.randint(3, len(WORDS), (rows, 8), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(folder, cls=TrainingArguments, **options):
    quiet = dict(report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1, seed=0)
    usual = dict(max_steps=4, save_steps=2, learning_rate=1e-2, weight_decay=0.1, per_device_train_batch_size=4)
    return cls(output_dir=str(folder), **{**quiet, **usual, "bf16": True, "activation_checkpointing": True, **options})


def trainer(model, args, *callbacks, cls=Trainer, **options):
    optimizer = optimizer_cls_and_kwargs(args)
    rows = options.pop("train_dataset", None) or data()
    return cls(model, args, train_dataset=rows, callbacks=[*callbacks], optimizer_cls_and_kwargs=optimizer, **options)


def logged(trained, key="loss"):
    return {log["step"]: log[key] for log in trained.state.log_history if key in log}


def weights(model):
    return {n: p.detach().clone() for n, p in densify(copy.deepcopy(model)).named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_resumed_training_equals_undisturbed(tied, dtype, tmp_path):
    """Bit for bit, with dropout, clipping and weight decay; and each checkpoint has the delta."""

    def model():
        return get_sparse_model(llama(tied, dtype, attention_dropout=0.2), CONFIG)

    args = arguments(tmp_path, max_grad_norm=0.2)
    whole = trainer(model(), args, SaveDeltaCallback())
    whole.train()
    resumed = trainer(model(), args, SaveDeltaCallback())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
    expected = weights(whole.model)
    assert_same(weights(resumed.model), expected)
    base = llama(tied, dtype)
    assert any(not torch.equal(p, expected[n]) for n, p in base.named_parameters())
    folders = tmp_path / "checkpoint-2", tmp_path / "checkpoint-4", tmp_path
    deltas = [SparseDelta.from_pretrained(folder) for folder in folders]
    assert [d.metadata["step"] for d in deltas] == [2, 4, 4]
    assert not torch.equal(deltas[0].values, deltas[1].values)
    assert torch.equal(deltas[1].values, deltas[2].values)
    deltas[2].apply_(base)
    assert_same(dict(base.named_parameters()), expected)
    again = get_sparse_model(llama(tied, dtype), SparseConfig(modules_to_save=["norm"]), deltas[0].mask)
    assert sparse_delta(again).mask == deltas[0].mask


class Gradients(TrainerCallback):
    """The norm of what the optimizer gets."""

    def __init__(self):
        self.norms = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.norms.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item())


def test_experts_that_a_resumed_trainer_does_not_load(tmp_path):
    """transformers saves Mixtral's under other names. Unless they are loaded before, the base would be trained on."""
    transformers = pytest.importorskip("transformers", minversion="5.0")

    def model():
        torch.manual_seed(0)
        sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_local_experts=4)
        heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8, vocab_size=len(WORDS))
        plain = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
        experts = {n: p.detach() for n, p in plain.named_parameters() if p.dim() == 3}
        return get_sparse_model(plain, SparseConfig(), topk_mask(experts, density=0.1))

    args = arguments(tmp_path, bf16=False)
    whole = trainer(model(), args, SaveDeltaCallback())
    whole.train()
    checkpoint = str(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="the checkpoint's '.*experts.down_proj' was not loaded"):
        trainer(model(), args, SaveDeltaCallback()).train(resume_from_checkpoint=checkpoint)
    resumed = trainer(model(), args, SaveDeltaCallback())
    resumed.model.load_state_dict(transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict())
    resumed.train(resume_from_checkpoint=checkpoint)
    assert_same(weights(resumed.model), weights(whole.model))


def test_trainer_clips_what_is_trained(tmp_path):
    plain, rows = llama(), data(4)
    model = get_sparse_model(llama(), CONFIG)
    mask = sparse_delta(model).mask
    batch = torch.tensor(rows["input_ids"])
    plain.double()(input_ids=batch, labels=batch).loss.backward()
    grads = {n: p.grad for n, p in plain.named_parameters()}
    trained = torch.cat([mask.gather({n: grads[n] for n in mask.names}), grads["model.norm.weight"]]).norm().item()
    everything = torch.cat([g.flatten() for g in grads.values()]).norm().item()
    gradients = Gradients()
    args = arguments(tmp_path, bf16=False, max_steps=1, max_grad_norm=trained / 2, save_strategy="no")
    run = trainer(model, args, gradients, train_dataset=rows)
    run.train()
    assert everything > 1.5 * trained
    assert logged(run, "grad_norm")[1] == pytest.approx(trained, rel=1e-4)
    assert gradients.norms == pytest.approx([trained / 2], rel=1e-4)


def test_optimizer_has_the_arguments_of_the_trainer(tmp_path):
    model = llama(attention_bias=True, mlp_bias=True)
    names = ("q_proj.weight", "q_proj.bias", "input_layernorm.weight")
    tensors = {n: p for n, p in model.named_parameters() if n.endswith(names)}
    get_sparse_model(model, SparseConfig(modules_to_save=["norm", "lm_head"]), topk_mask(tensors, k=8, scope="tensor"))
    args = arguments(tmp_path, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    run = trainer(model, args)
    optimizer = run.create_optimizer()
    assert isinstance(optimizer, SparseAdamW)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    ends = {"self_attn.q_proj.values", "embed_tokens.weight"}
    assert {n.partition("layers.")[2][2:] or n.removeprefix("model.") for n in decayed["param_names"]} == ends
    ends = {"self_attn.q_proj.bias_values", "input_layernorm.values", "norm.weight"}
    assert {n.partition("layers.")[2][2:] or n.removeprefix("model.") for n in others["param_names"]} == ends
    assert all((g["lr"], g["betas"], g["eps"]) == (1e-2, (0.8, 0.95), 1e-6) for g in optimizer.param_groups)
    given = optimizer_cls_and_kwargs(args, lr=3e-4, state_dtype=torch.bfloat16)[1]
    assert (given["lr"], given["state_dtype"], given["eps"]) == (3e-4, torch.bfloat16, 1e-6)


# ---- TRL ----
@pytest.fixture(scope="module")
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(dict(zip(WORDS, range(99))), unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def sft(model, folder, tokenizer, *callbacks, **options):
    trl = pytest.importorskip("trl")
    args = arguments(folder, trl.SFTConfig, max_length=16)
    rows = Dataset.from_dict({"text": [" ".join(WORDS[3 + (i + j * j) % 12] for j in range(8)) for i in range(16)]})
    options = {"processing_class": tokenizer, "train_dataset": rows, **options}
    return trainer(model, args, *callbacks, cls=trl.SFTTrainer, **options)


@pytest.mark.parametrize(("tied", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_sft_trainer(tied, dtype, tokenizer, tmp_path):
    base = llama(tied, dtype)
    run = sft(get_sparse_model(llama(tied, dtype), CONFIG), tmp_path, tokenizer, SaveDeltaCallback(dtype=None))
    run.train()
    losses = list(logged(run).values())
    assert len(losses) == 4
    delta = SparseDelta.from_pretrained(tmp_path)
    assert set(delta.dense) == {"model.norm.weight"}
    assert delta.values.count_nonzero() > 0.5 * delta.mask.nnz
    delta.apply_(base)
    assert_same(dict(base.named_parameters()), weights(run.model))


@pytest.mark.parametrize("with_callback", [False, True])
def test_a_peft_config_is_an_error(with_callback, tokenizer, tmp_path):
    peft = pytest.importorskip("peft")
    model = get_sparse_model(llama(), CONFIG)
    callbacks = [SaveDeltaCallback()] if with_callback else []
    run = sft(model, tmp_path, tokenizer, *callbacks, peft_config=peft.LoraConfig(task_type="CAUSAL_LM"))
    if with_callback:
        run.optimizer_cls_and_kwargs = None  # Trainer's own optimizer
    with pytest.raises(ValueError, match="values of this sparsified model are frozen.*drop peft_config"):
        run.train()


# ---- what is refused, and uploads ----
def test_models_and_machines_that_do_not_fit(tmp_path):
    args = arguments(tmp_path)
    factory, kwargs = optimizer_cls_and_kwargs(args)
    with pytest.raises(ValueError, match="model is not sparsified: call get_sparse_model"):
        factory()(llama(), **kwargs)
    with pytest.raises(ValueError, match="2 GPUs in one process"):
        optimizer_cls_and_kwargs(SimpleNamespace(n_gpu=2))
    plain = llama()
    names = {n: p for n, p in plain.named_parameters() if n.endswith("q_proj.weight")}
    with pytest.raises(ValueError, match="not a sparsified one of get_sparse_model"):
        SaveDeltaCallback().on_train_begin(args, None, None, model=sparsify(plain, topk_mask(names, k=5)))


@pytest.mark.parametrize("fails", [False, True])
def test_each_delta_is_pushed(fails, tmp_path, monkeypatch):
    pushed = []

    class Hub:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, name, private=None, exist_ok=False):
            return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

        def file_exists(self, repo_id, filename):
            return False

        def upload_folder(self, repo_id, folder_path, commit_message):
            if fails:
                raise ConnectionError("no network")
            pushed.append((repo_id, commit_message, SparseDelta.from_pretrained(folder_path)))

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = get_sparse_model(llama(), CONFIG)
    options = dict(output_dir=tmp_path / "run", push_to_hub=True, hub_model_id=None, hub_token="secret")
    args = SimpleNamespace(**options, hub_private_repo=None, hub_strategy="every_save")
    state = SimpleNamespace(global_step=3, is_world_process_zero=True)
    callback = SaveDeltaCallback()
    if fails:
        with pytest.warns(RuntimeWarning, match="was not pushed to 'run': no network"):
            callback.on_save(args, state, None, model=model)
    else:
        callback.on_save(args, state, None, model=model)
        args.hub_strategy = "end"
        callback.on_save(args, state, None, model=model)
        state.is_world_process_zero = False
        callback.on_save(args, SimpleNamespace(global_step=4, is_world_process_zero=False), None, model=model)
        [(repo_id, message, delta)] = pushed
        assert (repo_id, message, delta.metadata["step"]) == ("me/run", "Sparse delta, step 3", 3)
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["checkpoint-3"]


def test_all_ranks_gather_the_delta_of_a_sharded_model(tmp_path, monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    calls, state = [], SimpleNamespace(is_world_process_zero=False, global_step=2)
    monkeypatch.setattr("deftx_kernels.integrations.transformers.sparse_delta", lambda *_: calls.append(1))
    model = get_sparse_model(llama(), CONFIG)
    SaveDeltaCallback().on_train_end(arguments(tmp_path), state, None, model=model)
    assert not calls
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        SaveDeltaCallback().on_train_end(arguments(tmp_path), state, None, model=model)
        SaveDeltaCallback().on_save(arguments(tmp_path), state, None, model=model)
    finally:
        dist.destroy_process_group()
    assert len(calls) == 2
    assert not list(tmp_path.iterdir())
