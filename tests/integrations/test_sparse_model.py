"""get_sparse_model and its delta, against SparseDelta.from_models with the base at hand."""

import copy
import doctest
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from deftx_kernels import SparseDelta, densify, init_mask, integrations, sparsify, topk_mask
from deftx_kernels.integrations import SparseConfig, get_sparse_model, print_trainable_parameters, sparse_delta
from deftx_kernels.nn import masked_parameters

pytestmark = pytest.mark.usefixtures("one_thread")


class Tagger(nn.Module):
    """Tied ends, a norm with buffers, and a head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.decoder = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
        self.decoder.weight = self.embedding.weight
        self.layer, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(12, 3)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.to(dtype)

    def forward(self, ids):
        return self.head(self.decoder(self.norm(self.layer(self.embedding(ids)))))


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(12)).float().logsumexp(-1).sum().backward()
        optimizer.step()
    model.scratch.add_(1)


CONFIGS = {
    "all linear": SparseConfig(density=0.2, rank=2, modules_to_save=["head"]),
    "tied": SparseConfig(k=7, method="random", target_modules=["decoder", "layer"]),
    "dense norm": SparseConfig(density=0.5, method="magnitude", modules_to_save=["norm", "head"], scope="global"),
    "pattern": SparseConfig(density=0.3, density_pattern={"layer": 0.1}, target_modules=["layer", "embedding"], rank=2),
    "empty": SparseConfig(density=0.0, target_modules="layer", modules_to_save=("head",)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_delta_is_that_of_the_two_models(config, dtype, tmp_path):
    base, model = Tagger(dtype), Tagger(dtype)
    assert get_sparse_model(model, config) is model
    saved = {n for n, _ in model.named_parameters() if n.split(".")[0] in (config.modules_to_save or ())}
    assert {n for n, p in model.named_parameters() if p.requires_grad and "values" not in n} == saved
    train(model)
    delta = sparse_delta(model, {"note": "x"})
    expected = SparseDelta.from_models(model, base, delta.mask, dense=saved)
    assert torch.equal(delta.values, expected.values)
    assert (delta.low is None) == (expected.low is None)
    assert delta.dense.keys() == expected.dense.keys() > saved  # the buffers of the norm, too
    assert all(torch.equal(t, expected.dense[n]) for n, t in delta.dense.items())
    described = {"settings", "method", "note"}
    assert {k: v for k, v in delta.metadata.items() if k not in described} == expected.metadata
    assert delta.metadata["settings"]["modules_to_save"] == config.modules_to_save
    delta.save_pretrained(tmp_path)
    SparseDelta.from_pretrained(tmp_path).apply_(base)
    densify(model)
    for (name, tensor), trained in zip(base.state_dict().items(), model.state_dict().values()):
        assert torch.equal(tensor, trained), name
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="not a sparsified one of get_sparse_model"):
        sparse_delta(model)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_have_their_delta(clone):
    model = get_sparse_model(Tagger(), CONFIGS["all linear"])
    other = clone(model)
    train(model)
    train(other)
    one, two = sparse_delta(model), sparse_delta(torch.nn.DataParallel(other))
    assert torch.equal(one.values, two.values)
    assert one.values.abs().min() > 0


def test_a_given_mask_and_parameters_that_are_trained_beside_it():
    base, model = Tagger(), Tagger()
    mask = topk_mask({"layer.weight": base.layer.weight, "layer.bias": base.layer.bias}, k=9)
    get_sparse_model(model, SparseConfig(), mask)
    model.norm.weight.requires_grad_(True)  # by the user
    train(model)
    delta = sparse_delta(model)
    assert delta.mask == mask
    assert "norm.weight" in delta.dense
    delta.apply_(base)
    assert torch.equal(base(torch.arange(12)), densify(model)(torch.arange(12)))


def test_densities_by_pattern():
    def densities(pattern, **options):
        config = SparseConfig(density=0.25, density_pattern=pattern, method="magnitude", **options)
        model = get_sparse_model(nn.ModuleDict({n: nn.Linear(8, 8) for n in ("query", "key", "value")}), config)
        return {n.split(".")[0]: m.mask.density for n, m in masked_parameters(model).items()}

    assert densities({"query|key": 0.5, ".*": 0.125}) == {"query": 0.5, "key": 0.5, "value": 0.125}  # the first match
    assert densities({"value": 0.0}, scope="row") == {"query": 0.25, "key": 0.25, "value": 0.0}
    assert densities({}) == densities(None) == dict.fromkeys(("query", "key", "value"), 0.25)


def test_trainable_parameters_are_printed(capsys):
    model = get_sparse_model(Tagger(), CONFIGS["all linear"])
    nnz = sum(m.mask.nnz for m in masked_parameters(model).values())
    total = sum(p.numel() for p in Tagger().parameters())
    print_trainable_parameters(model)
    line = f"trainable params: {nnz + 39:,d} || all params: {total:,d} || trainable%: {100 * (nnz + 39) / total:.4f}"
    assert capsys.readouterr().out == line + "\n"


@pytest.mark.parametrize(
    ("options", "mask", "error", "match"),
    [
        (dict(), None, ValueError, "exactly one of k and density"),
        (dict(density=0.1, method="top"), None, ValueError, "method must be one of"),
        (dict(density=0.1, target_modules=["query"]), None, ValueError, "'query' matches no module"),
        (dict(density=0.1, target_modules=["head"], modules_to_save=["head"]), None, ValueError, "left out"),
        (dict(density=0.1, modules_to_save=["pooler"]), None, ValueError, "'pooler' is no module.*has embedding"),
        (dict(density=0.1, modules_to_save="head"), None, TypeError, "must be a list of names, got the string 'head'"),
        (dict(density=0.1, density_pattern={"query": 0.2}), None, ValueError, "'query' is the first match of none"),
        (dict(density=0.1, density_pattern={"(": 0.2}), None, ValueError, r"'\(' is no regular expression"),
        (dict(density=0.1, density_pattern={"layer": 2.0}), None, ValueError, r"density must be in \[0, 1\]"),
        (dict(k=3, density_pattern={"layer": 0.2}), None, ValueError, "density_pattern needs a density"),
        (dict(modules_to_save=["head"]), "head.weight", ValueError, "'head.weight', which is in modules_to_save"),
        (dict(), "layers.weight", ValueError, "model lacks tensor 'layers.weight'"),
    ],
)
def test_bad_arguments_change_nothing(options, mask, error, match):
    model = Tagger()
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    with pytest.raises(error, match=match):
        get_sparse_model(model, SparseConfig(**options), mask and topk_mask({mask: torch.ones(3, 12)}, k=3))
    assert not masked_parameters(model)
    assert "_sparse_base" not in vars(model)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "names",
    [{"layer"}, {"layer": 1}.keys(), ("layer",), (n for n in ["layer"])],
    ids=["set", "keys", "tuple", "generator"],
)
def test_settings_are_stored(names, tmp_path):
    config = SparseConfig(density=np.float32(0.25), method="magnitude", target_modules=names, modules_to_save={"head"})
    sparse_delta(get_sparse_model(Tagger(), config)).save_pretrained(tmp_path)
    settings = SparseDelta.from_pretrained(tmp_path).metadata["settings"]
    assert (settings["density"], settings["target_modules"], settings["modules_to_save"]) == (0.25, ["layer"], ["head"])


@pytest.mark.parametrize("first", ["wrapped", "sparsified"])
@pytest.mark.parametrize("wrap", [checkpoint_wrapper, partial(torch.compile, backend="eager")])
def test_modules_in_wrappers_have_their_names(wrap, first):
    base, model = Tagger(), Tagger()
    config = SparseConfig(density=0.2, method="magnitude", modules_to_save=["head"])
    model = get_sparse_model(model, config) if first == "sparsified" else model
    model.layer, model.head = wrap(model.layer), wrap(model.head)
    model = get_sparse_model(model, config) if first == "wrapped" else model
    train(model)
    delta = sparse_delta(model)
    assert delta.mask.names == ("embedding.weight", "layer.weight")  # the decoder is the embedding
    assert {"head.weight", "head.bias"} < delta.dense.keys()
    delta.apply_(base)
    assert torch.equal(base(torch.arange(12)), densify(model)(torch.arange(12)))


def test_bad_models():
    with pytest.raises(TypeError, match="config must be a SparseConfig, got dict"):
        get_sparse_model(Tagger(), {"density": 0.1})
    with pytest.raises(TypeError, match="mask must be a CSRMask, got dict"):
        get_sparse_model(Tagger(), SparseConfig(), {"layer.weight": torch.ones(8, 8)})
    model = get_sparse_model(Tagger(), CONFIGS["tied"])
    with pytest.raises(ValueError, match="sparsified"):
        get_sparse_model(model, CONFIGS["tied"])
    again = sparsify(
        densify(model), init_mask(model, k=7, method="random", target_modules=["decoder", "layer"], seed=1)
    )
    with pytest.raises(ValueError, match="not a sparsified one of get_sparse_model"):
        sparse_delta(again)
    other = Tagger()
    with pytest.raises(ValueError, match="not a sparsified one of get_sparse_model"):
        sparse_delta(sparsify(other, topk_mask({"layer.weight": other.layer.weight}, k=9)))


@pytest.mark.parametrize("name", integrations.__all__)
def test_example(name):
    public = getattr(integrations, name)
    [found] = doctest.DocTestFinder(recurse=False).find(public, name, globs={"torch": torch})
    assert found.examples
    assert not doctest.DocTestRunner().run(found).failed
