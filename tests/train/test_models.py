"""Models: damaged folders, missing weights, frozen parts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from train_vectors import LABELS, task_vector
from transformers import AutoConfig

from deftx_kernels.train import models


def test_a_model_folder_without_its_phase_json_is_made_again(tiny_bert, tmp_path):
    vector = task_vector(tiny_bert, tmp_path)
    before = load_file(vector.start / "model.safetensors")
    (vector.start / "phase.json").unlink()
    (vector.start / "model.safetensors").write_bytes(b"half")
    after = load_file(task_vector(tiny_bert, tmp_path).start / "model.safetensors")
    assert all(np.array_equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "weights cannot be loaded from .*model.safetensors"),
        ("config.json", b"{", "weights cannot be loaded from .*config.json"),
        ("tokenizer.json", b"{}", "a tokenizer cannot be loaded from .*tokenizer.json"),
        ("tokenizer.json", b"{", "a tokenizer cannot be loaded from .*tokenizer.json"),
    ],
)
def test_a_damaged_file_of_a_model_is_named(tiny_bert, tmp_path, name, content, message):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    first = models.model_hash(folder)
    path = folder / name
    path.write_bytes(path.read_bytes()[:-10] if content is None else content)
    assert models.model_hash(folder) != first
    with pytest.raises(ValueError, match=message):
        models.load_tokenizer(folder) if name == "tokenizer.json" else models.load_classifier(folder, LABELS)


def test_a_folder_that_is_missing_is_no_hub_id(tmp_path):
    with pytest.raises(ValueError, match="model '.*gone': there is no such folder"):
        models.load_classifier(tmp_path / "gone", LABELS)


@pytest.mark.parametrize("name", ["./gone", "~/gone", "some/where/gone"])
def test_a_path_is_no_hub_id_either(name):
    with pytest.raises(ValueError, match=f"model '{name}': there is no such folder"):
        models.load_tokenizer(name)


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("model_type", ["bert", "t5"])  # t5: a tokenizer of special tokens and a space
def test_a_folder_without_a_vocabulary(tiny_bert, tmp_path, config, model_type):
    """transformers makes a tokenizer that knows no word, instead of an error."""
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    for path in folder.iterdir():
        if path.name in ("tokenizer.json", "vocab.txt") or (path.name == "tokenizer_config.json" and not config):
            path.unlink()
    if model_type != "bert":
        AutoConfig.for_model(model_type).save_pretrained(folder)
        (folder / "tokenizer_config.json").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="tokenizer.json, are missing or have no vocabulary"):
        models.load_tokenizer(folder)


def test_weights_that_are_missing_or_not_finite_are_refused(tiny_bert, tmp_path):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    kept = tensors.pop(name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"lack 1 tensors of the base model, such as 'bert.{name}'"):
        models.load_classifier(folder, LABELS)
    kept[3, 4] = np.nan
    save_file({**tensors, name: kept}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"'bert.{name}' holds NaN"):
        models.load_masked_lm(folder)


def test_the_mlm_decoder_is_a_frozen_copy_or_tied(tiny_bert):
    untied, new_head = models.load_masked_lm(tiny_bert)
    models.freeze_for_vector(untied)
    decoder, words = untied.get_output_embeddings(), untied.get_input_embeddings()
    assert new_head
    assert not decoder.weight.requires_grad
    assert torch.equal(decoder.weight, words.weight)
    assert decoder.weight is not words.weight
    assert words.weight.requires_grad
    tied, _ = models.load_masked_lm(tiny_bert, tie_decoder=True)
    models.freeze_for_vector(tied)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    assert tied.get_output_embeddings().weight.requires_grad
    for model in (untied, tied):
        assert not any(p.requires_grad for name, p in model.named_parameters() if "LayerNorm" in name)
