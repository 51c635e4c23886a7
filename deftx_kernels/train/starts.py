"""What a vector starts from (theta0, as a model folder) and what it is trained on (tokenized examples)."""

from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from deftx_kernels.delta import SparseDelta
from deftx_kernels.train import models
from deftx_kernels.train.config import LanguageConfig, PhaseConfig, TaskConfig
from deftx_kernels.train.recipes import Vector, finish, finished, save_model
from deftx_kernels.train.tokens import MaskedLanguageCollator, mask_once, task_collator, tokenize_task, tokenize_text
from deftx_kernels.train.trainer import Examples, Runtime, train_phase

VALIDATION_SHARE = 0.05  # of unlabelled text, where there is no validation text


def masked_lm_start(
    model: str, settings: LanguageConfig, text: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, runtime: Runtime
) -> Path:
    """The folder of theta0 for language vectors: the model with its MLM head. A new head is trained with the body frozen."""
    if finished(folder) is not None:
        return folder / "model"
    set_seed(runtime.seed)
    masked_lm, new_head = models.load_masked_lm(model, settings.tie_decoder)
    facts = {"new_head": new_head}
    if new_head and settings.head_steps:
        models.freeze_for_head(masked_lm)
        phase = PhaseConfig(lr=settings.head_lr, max_steps=settings.head_steps, keep_best=False)
        examples = language_examples(text, None, tokenizer, settings, runtime.seed)
        facts |= train_phase(masked_lm, examples, settings, phase, folder, runtime)
    save_model(masked_lm.to("cpu"), folder / "model")
    finish(folder, facts)
    return folder / "model"


def classifier_start(
    model: str, labels: list[str], task: str, folder: Path, seed: int, vectors: tuple[SparseDelta, ...] = ()
) -> Path:
    """The folder of theta0 for a task vector: the model with a new head drawn from `seed`, plus `vectors`."""
    if not folder.is_dir():
        set_seed(seed)
        classifier = models.load_classifier(model, labels, task)
        for vector in vectors:
            vector.apply_(classifier)
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(classifier, folder)
    return folder


def language_vector(
    language: str, start: Path, examples: Examples, settings: LanguageConfig, phases: Path, deltas: Path, metadata: dict
) -> Vector:
    """A language vector to learn; the MLM head is no part of it."""
    name = f"language-{language}"
    load = partial(_load_masked_lm, tie_decoder=settings.tie_decoder)
    return Vector(name, start, load, examples, settings, phases / name, deltas, False, metadata={**metadata, "language": language})


def task_vector(
    start: Path,
    base: Path | None,
    labels: list[str],
    task: str,
    examples: Examples,
    settings: TaskConfig,
    folder: Path,
    deltas: Path,
    metadata: dict,
) -> Vector:
    """A task vector to learn, with its head."""
    load = partial(models.load_classifier, labels=labels, task=task)
    facts = {**metadata, "labels": labels, "task": task, "max_length": settings.max_length}
    return Vector("task", start, load, examples, settings, folder, deltas, True, base=base, metadata=facts)


def _load_masked_lm(folder: Path, tie_decoder: bool) -> PreTrainedModel:
    return models.load_masked_lm(folder, tie_decoder)[0]


def task_examples(
    train: Dataset, validation: Dataset | None, tokenizer, labels: list[str], task: str, settings: TaskConfig
) -> Examples:
    """Labelled rows, tokenized."""
    rows = [None if part is None else tokenize_task(part, tokenizer, labels, settings.max_length) for part in (train, validation)]
    return Examples(rows[0], rows[1], task_collator(tokenizer, task))


def language_examples(text: Dataset, validation: Dataset | None, tokenizer, settings: LanguageConfig, seed: int) -> Examples:
    """Unlabelled rows, tokenized. Without validation text 5 % are held out where a best checkpoint is to be chosen."""
    choose = settings.dense.keep_best or settings.sparse.keep_best
    if validation is None and choose and len(text) >= 1 / VALIDATION_SHARE:
        parts = text.train_test_split(VALIDATION_SHARE, seed=seed)
        text, validation = parts["train"], parts["test"]
    collator = MaskedLanguageCollator(tokenizer, settings.mlm_probability, seed)
    train = tokenize_text(text, tokenizer, settings.max_length, settings.pack)
    if validation is not None:
        validation = mask_once(tokenize_text(validation, tokenizer, settings.max_length, settings.pack), collator)
    return Examples(train, validation, collator, masked_lm=True)
