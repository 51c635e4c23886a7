"""Weights of experts [experts, m, n]: compact gradients of transformers' mixtures of experts, as those of autograd."""

import copy
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deftx_kernels import CSRMask, SparseAdamW, SparseDelta, densify, sparsify
from deftx_kernels.mask import column_dtype
from deftx_kernels.nn import masked_parameters, plain_tensors
from deftx_kernels.nn.expert_masks import ExpertMasks
from tests.nn.sparsified_models import assert_synchronised, compact_gradients, mask_of

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("error:.*(dense gradient|as a dense tensor)")

SIZES = dict(vocab_size=40, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
SIZES |= dict(num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1)
MODELS = {  # configuration, model, its own settings
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", dict(num_local_experts=12)),
    "Qwen3Moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", dict(num_experts=12, moe_intermediate_size=16)),
    "GptOss": ("GptOssConfig", "GptOssForCausalLM", dict(num_local_experts=12)),  # transposed, with biases
    "Llama4": ("Llama4TextConfig", "Llama4ForCausalLM", dict(num_local_experts=3, intermediate_size_mlp=24)),  # bmm
}
EVERY = [(m, i) for m in ("Mixtral", "Qwen3Moe", "GptOss") for i in ("eager", "batched_mm", "grouped_mm")]
EVERY.append(("Llama4", "eager"))
IDS = torch.randint(2, 40, (1, 4), generator=torch.Generator().manual_seed(3))  # of 12 experts, some get no tokens
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def make(name, dispatch="eager", dtype=torch.float32):
    config, model, settings = MODELS[name]
    torch.manual_seed(0)
    if name != "Llama4":
        settings = settings | dict(num_experts_per_tok=2)
    model = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **settings))
    model.config._experts_implementation = dispatch
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.2)
    return model.to(dtype)


def experts_mask(model, density=0.3):
    """Without entries in the first expert of the first weight."""
    mask = mask_of(model, density, only=lambda n, p: "experts" in n)
    dense = mask.to_dense()
    next(t for t in dense.values() if t.dim() == 3)[0] = False
    return CSRMask.from_dense(dense)


def loss_of(model):
    return model(IDS, labels=IDS).loss


def assert_near(got, expected, tolerance):
    """Entry by entry, relative to the largest one."""
    assert got.keys() == expected.keys()
    for name in expected:
        want = expected[name].double()
        assert (got[name].double() - want).abs().max() <= tolerance * want.abs().max(), name


def gradients(model, loss=loss_of):
    """The compact gradients, and the others."""
    model.zero_grad()
    loss(model).backward()
    masked = {id(p.values) for p in masked_parameters(model).values()}
    return compact_gradients(model), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None and id(p) not in masked
    }


def dense_gradients(model, mask, loss=loss_of):
    """Those of a plain model: compact, and of the other tensors."""
    loss(model).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: mask[n].gather(grads) for n in mask.names}, {n: g for n, g in grads.items() if n not in mask}


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 300, 400), (2, 1, 70_000), (1, 5, 1), (4, 3, 0), (0, 3, 2)], ids=str)
def test_masks_of_experts(shape):
    dense = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    dense[:1] = False
    mask, cache = CSRMask.from_dense({"w": dense}), ExpertMasks()
    masks = cache.of(mask)
    assert masks == tuple(CSRMask.from_dense({f"w[{i}]": part}) for i, part in enumerate(dense))
    assert all(m.col_indices.dtype == column_dtype([m.shapes[0]]) for m in masks)
    assert cache.of(mask) is masks
    assert [m.nnz for m in cache.of(mask - mask)] == [0] * len(dense)


# ---- models ----
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "bf16"])
@pytest.mark.parametrize(("name", "dispatch"), EVERY)
def test_gradients_of_models(name, dispatch, wide):
    """In float64, which torch's grouped_mm does not have, or float32, and in bfloat16."""
    dtype = torch.bfloat16 if not wide else torch.float32 if dispatch == "grouped_mm" else torch.float64
    plain, model = make(name, dispatch, dtype), make(name, dispatch, dtype)
    mask, classes = experts_mask(model), [type(m) for m in model.modules()]
    sparsify(model, mask)
    loss = loss_of(plain)
    assert torch.equal(loss_of(model), loss)
    expected, got = dense_gradients(plain, mask), gradients(model)
    for ours, theirs in zip(got, expected):
        assert_near(ours, theirs, TOLERANCES[dtype])
    if name != "Llama4":  # which gives every expert all tokens
        parts = [
            p for n, g in got[0].items() if n.endswith("proj") for p in g.split(mask[n].crow_indices.diff().tolist())
        ]
        empty = [not p.count_nonzero() for p in parts]
        assert any(empty)
        assert not all(empty)
    densify(model)
    assert [type(m) for m in model.modules()] == classes
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert "_compact" not in {k for m in model.modules() for k in vars(m)}


@pytest.mark.parametrize(("name", "dispatch"), EVERY)
def test_autocast(name, dispatch):
    def loss(model):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(model)

    plain, model = make(name, dispatch), make(name, dispatch)
    sparsify(model, mask := experts_mask(model))
    assert torch.equal(loss(model), loss(plain))
    exact = dense_gradients(make(name, dispatch), mask)[0]
    got, expected = gradients(model, loss)[0], dense_gradients(plain, mask, loss)[0]
    for name in mask.names:
        assert got[name].dtype == torch.float32
        scale = exact[name].norm()
        assert (got[name] - expected[name]).norm() <= 0.02 * scale, name
        assert (got[name] - exact[name]).norm() <= 1.1 * (expected[name] - exact[name]).norm() + 1e-3 * scale, name


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.* is deprecated")
@pytest.mark.parametrize(("dispatch", "reentrant"), [("eager", False), ("batched_mm", True), ("grouped_mm", False)])
def test_gradient_checkpointing(dispatch, reentrant):
    model = make("Qwen3Moe", dispatch).train()
    sparsify(model, experts_mask(model))
    expected = gradients(model)[0]
    model.gradient_checkpointing_enable(dict(use_reentrant=reentrant))
    assert_near(gradients(model)[0], expected, 1e-6)


def mixtral_experts(dispatch, **sizes):
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(**sizes)
    config._experts_implementation = dispatch
    torch.manual_seed(0)
    module = MixtralExperts(config)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(0, 0.1)
    return module


@pytest.mark.parametrize("dispatch", ["eager", "grouped_mm"])
def test_compiled_models_leave_experts_out_of_their_graphs(dispatch):
    torch._dynamo.reset()
    experts = mixtral_experts(dispatch, hidden_size=16, intermediate_size=24, num_local_experts=4)
    model = nn.ModuleDict({"first": nn.Linear(16, 16), "experts": experts})
    routing = torch.tensor([[0, 2], [2, 1], [0, 2]]), torch.rand(3, 2)
    x = torch.randn(3, 16)

    def forward(x):
        return model["experts"](model["first"](x).relu(), *routing).square().sum()

    sparsify(model, mask_of(model))
    expected = gradients(model, lambda _: forward(x))[0]
    compiled = torch.compile(forward, backend="eager")
    assert_near(gradients(model, lambda _: compiled(x))[0], expected, 1e-6)
    if dispatch == "grouped_mm":  # the loop of eager breaks graphs by itself
        torch._dynamo.reset()
        whole = torch.compile(forward, backend="eager", fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(whole(x), forward(x))
        with pytest.raises(torch._dynamo.exc.Unsupported, match="_outside_of_graphs"):
            whole(x)


class Allocations(TorchDispatchMode):
    """The largest tensor with new memory that an operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize(("name", "dispatch"), EVERY)
def test_no_dense_gradient_is_made(name, dispatch):
    """Nor any other tensor of the size of all experts (batched_mm copies matrices in forward, by its nature)."""
    model = make(name, dispatch)
    smallest = min(p.numel() for n, p in model.named_parameters() if n.endswith("experts.down_proj"))
    ids, found = IDS[:, :1], []
    for mask in (None, experts_mask(model)):
        if mask is not None:
            sparsify(model, mask)
        loss = model(ids, labels=ids).logits.square().sum()
        with Allocations() as backward:
            loss.backward()
        found.append(backward.largest)
    assert found[0] >= smallest > found[1]


@pytest.mark.parametrize("dispatch", ["eager", "grouped_mm"])
def test_training_and_saving(dispatch, tmp_path):
    """As SparseAdamW on the plain model: weights, state dicts, copies, deltas and saved models."""
    plain, model = make("Mixtral", dispatch), make("Mixtral", dispatch)
    base, mask = copy.deepcopy(plain), experts_mask(model)
    sparsify(model, mask, freeze_others=True)
    for name, p in plain.named_parameters():
        p.requires_grad_(name in mask)
    for m in (plain, model):
        optimizer = SparseAdamW(((n, p) for n, p in m.named_parameters() if p.requires_grad), mask, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(m).backward()
            optimizer.step()
    assert_synchronised(model)
    wanted = dict(plain.named_parameters())
    for name, tensor in plain_tensors(model).items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_near(gradients(other)[0], gradients(model)[0], 1e-7)
    other = make("Mixtral", dispatch)
    sparsify(other, mask).load_state_dict(model.state_dict())
    assert torch.equal(loss_of(other), loss_of(model))
    delta = SparseDelta.from_models(model, base, mask)
    model.save_pretrained(tmp_path)
    saved = type(plain).from_pretrained(tmp_path, experts_implementation=dispatch)
    densify(model)
    assert torch.equal(loss_of(saved), loss_of(model))
    delta.apply_(base)
    assert torch.equal(loss_of(base), loss_of(model))


# ---- modules ----
class Loop(nn.Module):
    """Reads its weight outside of gradients first, by Python ints, transposed, cast, and in products with x first."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.num_experts = 4
        self.weight = nn.Parameter(torch.randn(4, 3, 5, dtype=dtype))

    def forward(self, x):  # [t, 5]
        with torch.no_grad():
            shape = self.weight.shape
        last = F.linear(x, self.weight[-1], bias=torch.ones(3, dtype=x.dtype))
        first = last @ self.weight.to(x.dtype)[torch.tensor(0)]
        second = torch.mm(x, self.weight[1].T) + F.linear(first, self.weight[1])
        pairs = torch.bmm(self.weight.mT[torch.tensor([2, 0, 2, -1])], second[:4].unsqueeze(-1))
        every = torch.matmul(x.expand(shape[0], *x.shape), self.weight.transpose(1, 2))
        return first.sum() + second.square().sum() + pairs.square().sum() + every.square().sum()


def test_products_of_all_kinds():
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    model = Loop()
    model(x).backward()
    dense, d_x = model.weight.grad, x.grad
    model.weight.grad = x.grad = None
    sparsify(model, mask := mask_of(model, 0.5))
    model(x).backward()
    torch.testing.assert_close(model.values.grad, mask.gather({"weight": dense}))
    torch.testing.assert_close(x.grad, d_x)
    for trained in (model.values, x):  # each alone
        for other in (model.values, x):
            other.grad, other.requires_grad = None, other is trained
        model(x).backward()
        torch.testing.assert_close(trained.grad, d_x if trained is x else mask.gather({"weight": dense}))


def modules():
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHExperts
    from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts

    torch.manual_seed(0)
    routing = torch.tensor([[0, 2], [2, 1], [0, 2]]), torch.rand(3, 2)
    x = torch.randn(3, 8)
    nemotron = NemotronHConfig(
        n_routed_experts=4, hidden_size=8, moe_intermediate_size=6, moe_latent_size=None, experts_implementation="eager"
    )
    filter_ = SimpleNamespace(
        intermediate_size=6, num_local_experts=4, hidden_size=8, swiglu_alpha=1.7, swiglu_limit=7.0,
        _experts_implementation="eager",
    )  # fmt: skip
    yield "up projection only", NemotronHExperts(nemotron), (x, *routing)
    yield "casts to float32", OpenAIPrivacyFilterExperts(filter_), (x, *routing)
    yield "list of inputs", JetMoeParallelExperts(4, 8, 6), (x, [1, 0, 2, 0])


@pytest.mark.parametrize("case", [0, 1, 2])
def test_other_modules(case):
    _, module, inputs = list(modules())[case]
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    mask = mask_of(module)
    module(*inputs).square().sum().backward()
    expected = {n: mask[n].gather({n: p.grad}) for n, p in module.named_parameters()}
    module.zero_grad()
    sparsify(module, mask)
    module(*inputs).square().sum().backward()
    assert_near(compact_gradients(module), expected, 1e-5)


def test_grouped_mm_of_transformers_without_that_of_torch(monkeypatch):
    """The operator that transformers uses for other dtypes and devices."""
    from transformers.integrations import moe

    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *_: False)
    plain, model = make("GptOss", "grouped_mm", torch.float64), make("GptOss", "grouped_mm", torch.float64)
    sparsify(model, mask := experts_mask(model))
    assert_near(gradients(model)[0], dense_gradients(plain, mask)[0], 1e-10)


class Einsum(Loop):
    def forward(self, x):
        return torch.einsum("ti,eoi->teo", x, self.weight).sum() + F.linear(x, self.weight[2]).square().sum()


class Constants(Loop):
    def forward(self, x):
        weight = self.weight
        with torch.no_grad():
            constant = F.linear(x, weight[0]), weight[2], weight.mT
        products = F.linear(x, weight[1]), F.linear(x, constant[1]), torch.bmm(x.expand(4, *x.shape), constant[2])
        return constant[0].sum() + sum(product.square().sum() for product in products)


class Checkpointed(Loop):
    def forward(self, x):
        def part(x, expert):
            return F.linear(x, self.weight[expert]).square()

        parts = (torch.utils.checkpoint.checkpoint(part, x, e, use_reentrant=e > 1) for e in range(4))
        return sum(part.sum() for part in parts)


@pytest.mark.parametrize("cls", [Constants, Checkpointed])
def test_parts_of_a_forward_without_gradients_and_checkpointed(cls):
    torch.manual_seed(0)
    x, model = torch.randn(6, 5, dtype=torch.float64, requires_grad=True), cls()
    model(x).backward()
    dense, d_x = model.weight.grad, x.grad
    model.weight.grad = x.grad = None
    sparsify(model, mask := mask_of(model, 0.5))
    model(x).backward()
    torch.testing.assert_close(model.values.grad, mask.gather({"weight": dense}))
    torch.testing.assert_close(x.grad, d_x)


def test_a_weight_that_other_modules_read_has_a_dense_gradient_and_warns():
    model = Loop()
    sparsify(model, mask_of(model, 0.5))
    with pytest.warns(UserWarning, match="the gradient of 'weight', .* other code reads them"):
        model.weight[1].square().sum().backward()


def test_a_dense_gradient_warns_once_and_is_right():
    torch.manual_seed(0)
    x, model = torch.randn(6, 5), Einsum(torch.float32)
    model(x).backward()
    dense = model.weight.grad
    model.weight.grad = None
    sparsify(model, mask := mask_of(model, 0.5))
    with pytest.warns(UserWarning, match="the gradient of 'weight', weights of experts, is computed as a dense tensor"):
        model(x).backward()
    torch.testing.assert_close(model.values.grad, mask.gather({"weight": dense}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x).backward()


def test_a_captured_step_has_dense_gradients_and_warns(monkeypatch):
    """It cannot read how many tokens each expert has."""
    from deftx_kernels.nn import experts

    monkeypatch.setattr(experts, "is_capturing", lambda tensor: True)
    plain, model = make("Mixtral", "grouped_mm"), make("Mixtral", "grouped_mm")
    sparsify(model, mask := experts_mask(model))
    with pytest.warns(UserWarning, match="weights of experts, is computed as a dense tensor .* in a captured step"):
        assert_near(gradients(model)[0], dense_gradients(plain, mask)[0], 1e-6)


def test_other_tensors_of_three_dimensions_keep_the_dense_gradient():
    model = Loop()
    del model.num_experts
    with pytest.warns(UserWarning, match=r"belong to no Linear, Embedding, Conv1D or experts .*: weight$"):
        sparsify(model, mask_of(model))
    assert type(model).__mro__[1].__name__ == "Masked"


@pytest.mark.multithreaded
@pytest.mark.parametrize("dispatch", ["eager", "grouped_mm"])
def test_a_layer_of_real_width(dispatch):
    plain = mixtral_experts(dispatch, hidden_size=768, intermediate_size=1024, num_local_experts=6)
    x, weights = torch.randn(200, 768), torch.rand(200, 2)
    experts = torch.stack([torch.randperm(5)[:2] for _ in range(200)])  # none for the last one
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = copy.deepcopy(plain)
        sparsify(model, mask := mask_of(model, 0.02))
        plain(x, experts, weights).square().sum().backward()
        model(x, experts, weights).square().sum().backward()
    finally:
        torch.set_num_threads(before)
    grads = {n: p.grad for n, p in plain.named_parameters()}
    assert_near(compact_gradients(model), {n: mask[n].gather(grads) for n in mask.names}, 1e-5)
    assert not any(g.split(mask[n].crow_indices.diff().tolist())[-1].any() for n, g in compact_gradients(model).items())
