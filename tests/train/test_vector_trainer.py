"""Accumulated batches: gradients and logged losses are those of one batch of all their examples."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from train_vectors import RUNTIME, language_settings, language_vector, phase, task_settings, task_vector
from transformers import TrainerCallback

from deftx_kernels.files import read_json, write_json
from deftx_kernels.train.recipes import dense_phase


class Gradients(TrainerCallback):
    def __init__(self):
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.found = self.found or found


@pytest.mark.parametrize(("kind", "model_kwargs"), [("task", True), ("language", True), ("language", False)])
def test_accumulated_batches_are_one_batch(tiny_bert, tmp_path, monkeypatch, kind, model_kwargs):
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "model"))
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **no_dropout})
    once = phase(max_steps=1, max_grad_norm=0.0, eval_every=1)
    found = []
    for size, accumulation in ((8, 1), (4, 2)):
        gradients, make = Gradients(), task_vector if kind == "task" else language_vector
        settings = task_settings(once) if kind == "task" else language_settings(once, head_steps=0)
        settings = dataclasses.replace(settings, batch_size=size, accumulation=accumulation)
        runtime = dataclasses.replace(RUNTIME, callbacks=(gradients,))
        vector = make(str(folder), tmp_path / str(size), settings)
        if not model_kwargs:  # an architecture whose forward takes no further arguments
            monkeypatch.setattr("transformers.BertForMaskedLM.accepts_loss_kwargs", False, raising=False)
        ((_, loss),) = dense_phase(vector, runtime)["loss"]
        found.append((gradients.found, loss))
    (whole, loss), (accumulated, sum_of_two) = found
    assert sum_of_two == pytest.approx(loss, rel=1e-4)
    for name, gradient in whole.items():
        torch.testing.assert_close(accumulated[name], gradient, rtol=1e-4, atol=1e-6)
