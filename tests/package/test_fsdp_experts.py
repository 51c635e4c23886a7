"""Transformers' mixtures of experts, sharded with FSDP2, on two to four of four gloo processes, against one process."""

import copy
from functools import partial

import pytest
import torch
from fsdp_models import (
    IDS,
    assert_near,
    assert_same,
    assert_synchronised,
    assert_untouched,
    check_checkpoints,
    make_mask,
    meshes,
    train,
    whole,
)
from process_groups import run_ranks
from torch import nn

from deftx_kernels import CSRMask, SparseAdamW, distributed, sparsify
from deftx_kernels.integrations import SparseConfig, get_sparse_model, sparse_delta
from deftx_kernels.nn import masked_parameters, plain_tensors
from deftx_kernels.nn.functional import _GatherGradient

transformers = pytest.importorskip("transformers", minversion="5.0")

SIZES = dict(vocab_size=13, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
SIZES |= dict(num_key_value_heads=1, head_dim=8, max_position_embeddings=8, pad_token_id=0, num_experts_per_tok=2)
MODELS = {  # configuration, model, its own settings: five experts, so the ranks' shards are uneven
    "Mixtral": ("MixtralConfig", "MixtralModel", dict(num_local_experts=5)),
    "Qwen3Moe": ("Qwen3MoeConfig", "Qwen3MoeModel", dict(num_experts=5, moe_intermediate_size=8)),
    "GptOss": ("GptOssConfig", "GptOssModel", dict(num_local_experts=5)),  # transposed, with biases
}
OPTIONS = dict(lr=1e-2, eps=1e-4)  # tiny gradients are not scaled up, nor is their rounding
WORLD = 4


def test_training():
    run_ranks((_training, _ranks_without_tokens, _checkpointing, _mixed_precision, _plain), WORLD)


def test_state(tmp_path):
    run_ranks((partial(_checkpoints, tmp_path), _states, _results), WORLD)


# ---- models ----
class Model(nn.Module):
    """Of ids: the mean of the first three features of a sequence of four tokens that begins with each."""

    def __init__(self, name="Mixtral", dispatch="eager"):
        super().__init__()
        config, model, settings = MODELS[name]
        torch.manual_seed(0)
        self.inner = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **settings))
        self.inner.config._experts_implementation = dispatch
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.2)

    def forward(self, ids):
        ids = (ids[:, None] + torch.arange(4)) % SIZES["vocab_size"]
        return self.inner(ids, use_cache=False).last_hidden_state.mean(1)[:, :3] * 1.0


def mask_of(model):
    """Without entries in one of the experts. Routers and norms are trained densely."""
    mask = make_mask(model=model)
    mask = mask.restrict([n for n in mask.names if "experts" in n or "_proj.weight" in n or "embed" in n])
    dense = mask.to_dense()
    next(t for n, t in dense.items() if n.endswith("experts.gate_up_proj"))[1] = False
    return CSRMask.from_dense(dense)


def shard(model, mesh, experts_apart=False, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model.inner.layers:
        if experts_apart:
            fully_shard(layer.mlp.experts, mesh=mesh, **options)
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def start(mesh, mask=None, name="Mixtral", dispatch="eager", **options):
    model = Model(name, dispatch)
    mask = mask or mask_of(model)
    sparsify(model, mask)
    if mesh is not None:
        shard(model, mesh, **options)
    return model, SparseAdamW(model.named_parameters(), mask, **OPTIONS)


def train_compactly(*arguments, **options):
    """`train`, in which no gradient of a weight of experts is dense."""
    gather = _GatherGradient.backward

    def backward(ctx, gradient):
        assert gradient.dim() < 3
        return gather(ctx, gradient)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_GatherGradient, "backward", backward)
        return train(*arguments, **options)


# ---- training ----
def _training(rank):
    for i, name in enumerate(MODELS):
        for j, dispatch in enumerate(("eager", "batched_mm", "grouped_mm")):
            mask = mask_of(Model(name))
            model, optimizer = start(None, mask, name, dispatch)
            losses, norms = train_compactly(model, optimizer, steps=6, max_norm=0.3)
            world, apart, parts = 2 + (i + j) % 3, bool(j % 2), (1, 2, 3)[(i + j) % 3]
            for _, mesh in meshes(rank, (world,)):
                sharded, optimizer = start(mesh, mask, name, dispatch, experts_apart=apart)
                mine = train_compactly(sharded, optimizer, mesh, steps=6, max_norm=0.3, parts=parts)
                torch.testing.assert_close(mine[0], losses, atol=1e-6, rtol=1e-5)
                torch.testing.assert_close(mine[1], norms, atol=1e-6, rtol=1e-5)
                assert_near(found := whole(sharded), whole(model))
                assert_untouched(found, mask, Model(name))
                assert_synchronised(sharded)
                of_experts = [m for n, m in masked_parameters(sharded).items() if n.endswith("_proj")]
                assert len(of_experts) == 2
                for dense, values, part in of_experts:
                    assert dense.dim() == 3
                    assert dense.grad is None
                    assert values.grad.shape == (part.nnz,)
                    assert values.grad.to_local().shape == values.to_local().shape


def _ranks_without_tokens(rank):
    """Only the second expert is trained, and only the tokens of one rank come to it."""
    from torch.distributed.fsdp import fully_shard

    def gradients(module, rows):
        module(x[rows], experts[rows], torch.ones(6, 2)[rows]).square().sum().backward()
        found = {n: m.values.grad for n, m in masked_parameters(module).items()}
        return {n: g.full_tensor() if hasattr(g, "full_tensor") else g / 2 for n, g in found.items()}

    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    experts = torch.tensor([[0, 2], [2, 0], [4, 2], [1, 3], [3, 1], [1, 4]])
    for dispatch in ("eager", "batched_mm", "grouped_mm"):
        modules = [Model("Mixtral", dispatch).inner.layers[0].mlp.experts for _ in range(2)]
        mask = make_mask(model=modules[0]).to_dense()
        mask = CSRMask.from_dense({n: t & (torch.arange(5) == 1)[:, None, None] for n, t in mask.items()})
        expected = gradients(sparsify(modules[0], mask), slice(None))
        for _, mesh in meshes(rank, (2,)):
            module = fully_shard(sparsify(modules[1], mask), mesh=mesh)
            assert_near(gradients(module, slice(3 * rank, 3 * rank + 3)), expected)


def _checkpointing(rank):
    """Each layer's forward runs again in backward."""
    mask = mask_of(Model("Qwen3Moe"))
    for _, mesh in meshes(rank, (2,)):
        found = []
        for checkpointing in (False, True):
            model, optimizer = start(mesh, mask, "Qwen3Moe", "grouped_mm")
            if checkpointing:
                model.inner.gradient_checkpointing_enable(dict(use_reentrant=False))
            found.append((train_compactly(model.train(), optimizer, mesh, steps=3)[0], whole(model)))
        torch.testing.assert_close(found[0][0], found[1][0], atol=1e-6, rtol=1e-5)
        assert_near(found[0][1], found[1][1])


def _mixed_precision(rank):
    """As FSDP2 with a plain model."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mask = mask_of(Model())
    for _, mesh in meshes(rank, (3,)):
        plain = shard(Model(), mesh, mp_policy=policy)
        losses, norms = train(plain, SparseAdamW(plain.named_parameters(), mask, **OPTIONS), mesh, 4, max_norm=0.3)
        model, optimizer = start(mesh, mask, dispatch="grouped_mm", mp_policy=policy)
        mine = train_compactly(model, optimizer, mesh, 4, max_norm=0.3)
        torch.testing.assert_close(mine[0], losses, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(mine[1], norms, atol=1e-2, rtol=1e-2)
        assert_near(found := whole(model), whole(plain), atol=5e-3)
        assert_untouched(found, mask, Model())
        assert_synchronised(model)


def _plain(rank):
    """A model that is not sparsified: dense gradients, and compact state of each rank's experts."""
    mask = mask_of(Model())
    model = Model()
    losses, norms = train(model, SparseAdamW(model.named_parameters(), mask, **OPTIONS), steps=6, max_norm=0.3)
    for _, mesh in meshes(rank, (2, 4)):
        sharded = shard(Model(), mesh)
        optimizer = SparseAdamW(sharded.named_parameters(), mask, **OPTIONS)
        mine = train(sharded, optimizer, mesh, steps=6, max_norm=0.3)
        torch.testing.assert_close(mine[0], losses, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(mine[1], norms, atol=1e-6, rtol=1e-5)
        assert_near(found := whole(sharded), whole(model))
        assert_untouched(found, mask, Model())
        local = distributed.local_mask(mask, dict(sharded.named_parameters())).summary()
        for name, param in sharded.named_parameters():
            if name in mask and local[name]["nnz"]:
                assert optimizer.state[param]["exp_avg"].shape == (local[name]["nnz"],)


# ---- state ----
def _checkpoints(folder, rank):
    check_checkpoints(rank, folder, start, ((2, 4), (None, 2), (2, None), (2, 2)))


def _states(rank):
    """A state of the sharded model, and the weights of a plain one, are loaded into the weights and the values."""
    for _, mesh in meshes(rank, (3,)):
        model, optimizer = start(mesh)
        train(model, optimizer, mesh, 2)
        before, state = whole(model), {n: t.clone() for n, t in model.state_dict().items()}
        optimizer_state = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, mesh, 2)
        after = whole(model)
        plain = shard(Model(), mesh)
        plain.load_state_dict({n: t.clone() for n, t in plain_tensors(model).items()})
        for given, expected in ((state, before), (plain.state_dict(), after), (state, before)):
            model.load_state_dict(given)
            assert_synchronised(model)
            assert_same(whole(model), expected)
        optimizer.load_state_dict(optimizer_state)
        train(model, optimizer, mesh, 2)
        assert_same(whole(model), after)
        with torch.device("meta"):
            model = Model()
        model = shard(sparsify(model, mask_of(Model())), mesh).to_empty(device="cpu")
        model.load_state_dict(plain.state_dict())
        assert_synchronised(model)
        assert_same(whole(model), after)


def _results(rank):
    """Deltas and patches of the whole model on every rank."""
    config = SparseConfig(modules_to_save=["gate", "norm", "input_layernorm", "post_attention_layernorm"])
    mask = mask_of(Model())
    for _, mesh in meshes(rank, (2, 4)):
        model = shard(get_sparse_model(Model(), config, mask), mesh)
        before = {n: t.detach().clone() for n, t in plain_tensors(model).items()}
        train(model, SparseAdamW(model.named_parameters(), mask, **OPTIONS), mesh, 3)
        with torch.no_grad():
            model(IDS)  # leaves the parameters of the root gathered
        delta = sparse_delta(model)
        patch = distributed.diff_patch(model, before, group=mesh.get_group())
        assert delta.mask == mask
        assert any(t.dim() == 3 for t in delta.mask.to_dense().values())
        expected = whole(model)
        for apply in (delta.apply_, patch.apply_):
            fresh = Model()
            apply(fresh)
            assert_same(whole(fresh), expected)
