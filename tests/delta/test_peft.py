"""Adapters of PEFT, written and read: the outputs are those of PEFT's own model."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from deftx_kernels import CSRMask, SparseDelta, interop, topk_mask

peft = pytest.importorskip("peft")
pytorch_utils = pytest.importorskip("transformers.pytorch_utils")


class Model(nn.Module):
    """`fc` is also the end of `inner.fc`'s name."""

    def __init__(self, conv1d=False):
        super().__init__()
        torch.manual_seed(0)
        self.config = {"model_type": "custom"}
        self.emb = nn.Embedding(20, 12)
        self.inner = nn.Module()
        self.inner.fc = pytorch_utils.Conv1D(30, 12) if conv1d else nn.Linear(12, 30)
        self.fc = pytorch_utils.Conv1D(16, 30) if conv1d else nn.Linear(30, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, ids):
        return self.head(self.fc(torch.tanh(self.inner.fc(self.emb(ids)))))


IDS = torch.arange(20).view(4, 5)


def delta_of(model, density=0.05, names=("fc.weight", "inner.fc.weight"), low=False):
    generator = torch.Generator().manual_seed(1)
    tensors = {n: model.state_dict()[n] for n in names}
    mask = topk_mask({n: torch.randn(t.shape, generator=generator) for n, t in tensors.items()}, density=density)
    terms = (torch.tensor([0]), torch.tensor([1e-20], dtype=torch.float64)) if low else None
    values = torch.randn(mask.nnz, generator=generator)
    return SparseDelta(mask, values, metadata={"base_model": "me/base"}, low=terms)


@torch.no_grad()
def outputs(model):
    return model.eval()(IDS)


@pytest.mark.parametrize("names", [("fc.weight", "inner.fc.weight"), ("fc.weight",)])
def test_peft_loads_a_shira_adapter_and_gives_the_same_outputs(tmp_path, names):
    model = Model()
    delta = delta_of(model, names=names)
    interop.to_peft_shira(delta, tmp_path, model)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    targets = {n.removeprefix("base_model.model.") for n, m in loaded.named_modules() if hasattr(m, "shira_weight")}
    assert {f"{n}.weight" for n in targets} == set(names)
    again = interop.from_peft_shira(tmp_path, model)
    assert again.mask == delta.mask
    assert torch.equal(again.values, delta.values)
    assert again.metadata["base_model"] == "me/base"
    before = outputs(model)
    delta.apply_(model)
    assert torch.equal(outputs(loaded), outputs(model))
    assert not torch.equal(before, outputs(model))


def test_what_a_shira_adapter_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    model = Model()
    embedding = delta_of(model, names=["emb.weight", "fc.weight"])
    bias = SparseDelta(CSRMask.from_dense({"fc.bias": torch.ones(16, dtype=torch.bool)}), torch.ones(16))
    full = delta_of(model, 0.4, names=["fc.weight"])
    small = CSRMask.from_dense({"head.weight": torch.eye(4, 16, dtype=torch.bool)})
    uneven = full.compose(SparseDelta(small, torch.ones(4)))
    none = SparseDelta(CSRMask.from_dense({"fc.weight": torch.zeros(16, 30, dtype=torch.bool)}), torch.empty(0))
    whole = SparseDelta(small, torch.ones(4), {"head.bias": torch.ones(4)})
    folder = tmp_path / "out"
    for delta, base, message in (
        (embedding, model, "'emb.weight' is the weight of a module of class Embedding"),
        (bias, None, r"'fc.bias' of shape \[16\] is not the weight of a linear layer"),
        (uneven, None, r"192 entries of 'fc.weight' need r = 5, with which 'head.weight' of shape \[4, 16\] would"),
        (none, None, "no entries"),
        (whole, None, "has 'head.bias' as a whole"),
        (full, {"fc.weight": torch.ones(30, 16)}, r"'fc.weight' is of shape \[30, 16\] in base"),
        (full, {"x": torch.ones(2)}, "'fc.weight' is missing in base"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.to_peft_shira(delta, folder, base)
    assert not folder.exists()
    with pytest.warns(UserWarning, match="SHiRA's format has no low terms: those of 1 of"):
        interop.to_peft_shira(delta_of(model, low=True), folder)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.filterwarnings("ignore:save_precomputed_indices=False")
def test_a_supertuning_adapter_gives_the_outputs_of_peft(tmp_path, stored, largest):
    model = Model()
    settings = {"save_precomputed_indices": stored, "select_top": largest, "init_weights": False}
    config = peft.SupertuningConfig(target_modules=["fc"], modules_to_save=["head"], sparsity=0.9, **settings)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    adapted.base_model.model.head.modules_to_save["default"].weight.data.neg_()
    adapted.save_pretrained(tmp_path)
    assert any("indices" in n for n in load_file(tmp_path / interop.ADAPTER_WEIGHTS)) == stored
    delta = interop.from_peft_supertuning(tmp_path, model)
    assert delta.mask.names == ("fc.weight", "inner.fc.weight")
    assert delta.mask.nnz == 47 + 35  # int(numel * (1 - 0.9)), in floating point
    assert sorted(delta.dense) == ["head.bias", "head.weight"]
    delta.apply_(model)
    torch.testing.assert_close(outputs(model), outputs(adapted))
    with pytest.raises(ValueError, match=r"base lacks 'inner.fc.weight'|base lacks 'fc.weight'"):
        interop.from_peft_supertuning(tmp_path, {"x": torch.ones(1)})
    path = tmp_path / interop.ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 4}))
    with pytest.raises(ValueError, match="adapter_config.json: r = 4: a low-rank part"):
        interop.from_peft_supertuning(tmp_path, model)


PATTERNS = {"rank_pattern": {"inner.fc": 5}, "alpha_pattern": {"inner.fc": 7.5, "^fc": 3}}
LORA = {"plain": {}, "rslora": {"use_rslora": True}, "patterns": PATTERNS, "conv1d": {"fan_in_fan_out": True}}


def lora_adapter(folder, model, **settings):
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["fc"], "init_lora_weights": False, **settings}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("name", LORA)
def test_a_lora_adapter_as_its_largest_entries(tmp_path, name):
    model = Model(conv1d=name == "conv1d")
    adapted = lora_adapter(tmp_path, model, modules_to_save=["head"], **LORA[name])
    products = {
        f"{n}.weight": m.get_delta_weight("default").detach()
        for n, m in adapted.base_model.model.named_modules()
        if hasattr(m, "lora_A")
    }
    delta = interop.from_peft_lora(tmp_path, density=1.0, base=model)
    dense = delta.mask.scatter_({n: torch.zeros_like(t) for n, t in products.items()}, delta.values)
    for target, product in products.items():
        torch.testing.assert_close(dense[target], product)
    sparse = interop.from_peft_lora(tmp_path, k=100)
    assert sparse.mask == topk_mask(dense, k=100)
    assert torch.equal(sparse.values, sparse.mask.gather(dense))
    assert sorted(sparse.dense) == ["head.bias", "head.weight"]
    delta.apply_(model)
    torch.testing.assert_close(outputs(model), outputs(adapted), atol=1e-5, rtol=1e-5)


def test_a_lora_product_is_never_held_with_the_others(tmp_path, monkeypatch):
    """Of eight layers of 1.4 M elements, the products are made one at a time, and once more for the values."""
    tensors, made = {}, []
    for i in range(8):
        tensors[f"base_model.model.{i}.lora_A.weight"] = torch.randn(2, 1200)
        tensors[f"base_model.model.{i}.lora_B.weight"] = torch.randn(1200, 2)
    save_file(tensors, tmp_path / interop.ADAPTER_WEIGHTS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (tmp_path / interop.ADAPTER_CONFIG).write_text(json.dumps(config))
    streaming = interop.from_peft_lora.__globals__["select_by_groups"]

    def counted(scores, *rest):
        return streaming(lambda names: made.append(len(names)) or scores(names), *rest)

    monkeypatch.setitem(interop.from_peft_lora.__globals__, "select_by_groups", counted)
    assert interop.from_peft_lora(tmp_path, density=0.01).mask.nnz == round(0.01 * 8 * 1200 * 1200)
    assert made == [1] * 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"target_modules": ["emb"]}, "'emb.lora_embedding_A' cannot be converted"),
    ],
)
def test_lora_settings_that_no_sparse_delta_can_hold(tmp_path, settings, message):
    lora_adapter(tmp_path, Model(), **settings)
    with pytest.raises(ValueError, match=re.escape(message)):
        interop.from_peft_lora(tmp_path, density=0.1)


def test_tensors_that_the_base_has_twice(tmp_path):
    """PEFT gives the head a tensor of its own, which a base with one tensor cannot hold."""

    def tied():
        model = Model()
        model.emb = nn.Embedding(4, 16)
        model.head.weight = model.emb.weight
        return model

    model = tied()
    for folder, settings in (("saved", {"modules_to_save": ["head"]}), ("adapted", {"target_modules": ["head", "fc"]})):
        adapted = lora_adapter(tmp_path / folder, model, **settings)
        if folder == "saved":
            assert set(interop.from_peft_lora(tmp_path / folder, density=1.0, base=model).dense) == {
                "emb.weight",
                "head.bias",
            }
            adapted.base_model.model.head.modules_to_save["default"].weight.data.neg_()
            adapted.save_pretrained(tmp_path / folder)
        with pytest.raises(ValueError, match="'head.weight' and 'emb.weight' are one tensor in base"):
            interop.from_peft_lora(tmp_path / folder, density=1.0, base=model)
    lora_adapter(tmp_path / "both", model, modules_to_save=["head"])
    tensors = load_file(tmp_path / "both" / interop.ADAPTER_WEIGHTS)
    changed = tensors["base_model.model.head.weight"] * 2
    tensors |= {f"base_model.model.{n}.weight": changed.clone() for n in ("head", "emb")}
    tensors["base_model.model.fc.base_layer.weight"] = model.fc.weight  # which PEFT saves of embeddings
    save_file(tensors, tmp_path / "both" / interop.ADAPTER_WEIGHTS)
    interop.from_peft_lora(tmp_path / "both", density=0.0, base=model).apply_(model)
    assert torch.equal(model.emb.weight, changed)
    assert model.head.weight is model.emb.weight


def test_a_lora_adapter_that_does_not_fit(tmp_path):
    lora_adapter(tmp_path, Model())
    path = tmp_path / interop.ADAPTER_CONFIG
    config = json.loads(path.read_text())
    for arguments, message in (
        ({}, "exactly one of k and density"),
        ({"density": 2}, "density must be in"),
        ({"density": 0.1, "base": {"x": torch.ones(1)}}, "'fc.weight' is missing in base"),
        ({"density": 0.1, "base": Model(conv1d=True)}, r"'fc.weight' is of shape \[30, 16\] in base"),
    ):
        with pytest.raises(ValueError, match=message):
            interop.from_peft_lora(tmp_path, **arguments)
    for changed, message in (
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"lora_alpha": "8"}, "lora_alpha of 'fc' must be a finite number"),
        ({"alpha_pattern": {"(": 1}}, "not a readable LoRA adapter"),
        ({"peft_type": "SHIRA"}, "type 'SHIRA', not LORA"),
    ):
        path.write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=message):
            interop.from_peft_lora(tmp_path, density=0.1)


def test_adapters_are_read_from_the_hub(tmp_path, monkeypatch):
    interop.to_peft_shira(delta_of(Model()), tmp_path)
    asked = []

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert interop.from_peft_shira("me/adapter", Model(), revision="v1").mask.nnz
    assert asked == [("me/adapter", "v1", [interop.ADAPTER_CONFIG, interop.ADAPTER_WEIGHTS])]
