"""Evaluation of a task model with vectors added to it."""

import contextlib
import tempfile
from collections.abc import Sequence

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from deftx_kernels.delta import SparseDelta, compose
from deftx_kernels.train.trainer import Runtime, score


def evaluate(
    model: PreTrainedModel, dataset: Dataset, collator, runtime: Runtime, batch_size: int = 64
) -> dict[str, float]:
    """{"macro_f1", "accuracy", "n"} of a classifier on a tokenized data set.

    Raises:
        ValueError: an output of the model is NaN or infinite.
    """
    lengths = [len(ids) for ids in dataset["input_ids"]]
    by_length = dataset.select(sorted(range(len(lengths)), key=lengths.__getitem__))  # less padding
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_eval_batch_size=batch_size,
            bf16=runtime.bf16,
            use_cpu=runtime.device == "cpu",
            dataloader_pin_memory=torch.cuda.is_available(),
            disable_tqdm=True,
            report_to="none",
        )
        prediction = Trainer(model=model, args=args, data_collator=collator).predict(by_length)
    if not np.isfinite(prediction.predictions).all():
        raise ValueError("evaluation: outputs of the model are NaN or infinite, so it is not scored")
    return score(torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids))


@contextlib.contextmanager
def with_vectors(model: PreTrainedModel, vectors: Sequence[SparseDelta]):
    """`model` with the sum of `vectors` added, and exactly as before afterwards."""
    if not vectors:
        yield model
        return
    total = vectors[0] if len(vectors) == 1 else compose(*vectors)
    with total.applied(model):
        yield model
