"""The commands that learn and evaluate single vectors."""

import hashlib
from pathlib import Path

import torch
from datasets import concatenate_datasets

from deftx_kernels.delta import SparseDelta
from deftx_kernels.train import models, starts
from deftx_kernels.train.config import EvalConfig, Recipe, TrainLanguageConfig, TrainTaskConfig
from deftx_kernels.train.data import Columns, check_labels, content_hash, read_task, read_text, training_labels
from deftx_kernels.train.evaluate import evaluate, with_vectors
from deftx_kernels.train.recipes import Vector, dense_phase, learn
from deftx_kernels.train.runs import open_run
from deftx_kernels.train.tokens import task_collator, tokenize_task
from deftx_kernels.train.trainer import Runtime
from deftx_kernels.train.vectors import load_vector


def train_language(config: TrainLanguageConfig) -> Path:
    """Learn a language vector; returns its folder (with recipe "full", that of the tuned model)."""
    text = read_text(config.text, config.text_column)
    validation = None if config.validation is None else read_text(config.validation, config.text_column)
    tokenizer = models.load_tokenizer(config.model)
    starts.check_fit(config.model, tokenizer, "masked-lm", config.settings, [config.recipe])
    fingerprints = {"model": models.model_hash(config.model), "text": content_hash(text)}
    if validation is not None:
        fingerprints["validation text"] = content_hash(validation)
    inputs = [path for path in (models.resolve_model(config.model), config.text, config.validation) if path is not None]
    run_dir, runtime = Path(config.run_dir), Runtime(config.seed, config.device)
    with open_run(config, run_dir, fingerprints, inputs):
        phases = run_dir / "phases"
        start = starts.masked_lm_start(config.model, config.settings, text, tokenizer, phases / "mlm-head", runtime)
        examples = starts.language_examples(text, validation, tokenizer, config.settings, config.seed)
        metadata = {"base_model": config.model, "seed": config.seed}
        vector = starts.language_vector(
            config.language, start, examples, config.settings, phases, run_dir / "deltas", metadata
        )  # fmt: skip
        return _learn(vector, config.recipe, runtime)


def train_task(config: TrainTaskConfig) -> Path:
    """Learn a task vector; returns its folder (with recipe "full", that of the tuned model)."""
    columns = Columns(config.text_column, config.pair_column, config.label_column, config.kind)
    train = concatenate_datasets([read_task(path, columns) for path in config.train])
    labels = training_labels(train)
    validation = (
        concatenate_datasets([read_task(path, columns) for path in config.validation]) if config.validation else None
    )
    if validation is not None:
        check_labels(validation, labels, "validation")
    vectors = tuple(load_vector(path) for path in config.start_from)
    tokenizer = models.load_tokenizer(config.model)
    starts.check_fit(config.model, tokenizer, config.kind, config.settings, [config.recipe])
    fingerprints = {"model": models.model_hash(config.model), "training data": content_hash(train)}
    if validation is not None:
        fingerprints["validation data"] = content_hash(validation)
    fingerprints |= {f"vector {number}": vector_hash(vector) for number, vector in enumerate(vectors, start=1)}
    inputs: list[str | Path] = [
        models.resolve_model(config.model),
        *config.train,
        *config.validation,
        *config.start_from,
    ]
    run_dir, runtime = Path(config.run_dir), Runtime(config.seed, config.device)
    with open_run(config, run_dir, fingerprints, inputs):
        phases = run_dir / "phases"
        start = starts.classifier_start(config.model, labels, config.kind, phases / "base", config.seed)
        base = None
        if vectors:
            base = start
            start = starts.classifier_start(config.model, labels, config.kind, phases / "start", config.seed, vectors)
        examples = starts.task_examples(train, validation, tokenizer, labels, config.kind, config.settings)
        metadata = {"base_model": config.model, "seed": config.seed, "start_from": config.start_from}
        vector = starts.task_vector(
            start, base, labels, config.kind, examples, config.settings, phases / "task", run_dir / "deltas", metadata
        )  # fmt: skip
        return _learn(vector, config.recipe, runtime)


def vector_hash(vector: SparseDelta) -> str:
    """SHA-256 (hex) of a vector's entries, values and whole tensors."""
    digest = hashlib.sha256(vector.mask.fingerprint().encode())
    for name, tensor in [("", vector.values), *sorted(vector.dense.items())]:
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _learn(vector: Vector, recipe: Recipe, runtime: Runtime) -> Path:
    if recipe == "full":
        dense_phase(vector, runtime)
        return vector.folder / "dense/model"
    learn(vector, recipe, runtime)
    return vector.deltas / recipe / vector.name


def evaluate_vectors(config: EvalConfig) -> dict[str, float]:
    """{"macro_f1", "accuracy", "n"} on a labelled file.

    Raises:
        ValueError: none or several of the vectors are task vectors.
    """
    vectors = [load_vector(path) for path in config.vectors]
    tasks = [vector.metadata for vector in vectors if "labels" in vector.metadata]
    if len(tasks) != 1:
        raise ValueError(f"vectors: exactly one task vector (with labels in its metadata) is needed, not {len(tasks)}")
    task = tasks[0]
    if lacking := [name for name in ("task", "max_length", "base_model") if name not in task]:
        raise ValueError(f"vectors: the metadata of the task vector lack {lacking[0]!r}")
    rows = read_task(config.test, Columns(config.text_column, config.pair_column, config.label_column, task["task"]))
    check_labels(rows, task["labels"], str(config.test))
    base = config.model or task["base_model"]
    tokenizer = models.load_tokenizer(base)
    model = models.load_classifier(base, task["labels"], task["task"])
    tokenized = tokenize_task(rows, tokenizer, task["labels"], task["max_length"])
    with with_vectors(model, vectors):
        return evaluate(
            model, tokenized, task_collator(tokenizer, task["task"]), Runtime(device=config.device), config.batch_size
        )
