"""What a vector starts from (theta0, as a model folder) and what it is trained on (tokenized examples)."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from deftx_kernels.delta import SparseDelta
from deftx_kernels.select.functional import selected_counts
from deftx_kernels.train import models
from deftx_kernels.train.config import LanguageConfig, PhaseConfig, Recipe, TaskConfig, VectorConfig
from deftx_kernels.train.recipes import Vector, finish, finished_model, save_model
from deftx_kernels.train.tokens import MaskedLanguageCollator, mask_once, task_collator, tokenize_task, tokenize_text
from deftx_kernels.train.trainer import DivergenceGuard, Examples, Runtime, train_phase

VALIDATION_SHARE = 0.05  # of unlabelled text, where there is no validation text


def check_fit(
    model: str, tokenizer: PreTrainedTokenizerBase, task: str, settings: VectorConfig, recipes: Iterable[Recipe]
) -> None:
    """Whether settings fit a model, from its configuration alone: before any training, without its weights.

    Args:
        task: "classification", "token-classification" or "masked-lm".

    Raises:
        ValueError: a tokenizer with more tokens than the model has embeddings; max_length above the model's positions;
            a selection of more entries than it has, or of none.
    """
    outline = models.outline(model, task)
    if len(tokenizer) > (rows := len(outline.get_input_embeddings().weight)):
        raise ValueError(
            f"model {model!r}: its tokenizer has {len(tokenizer)} tokens, but the model embeddings for {rows}"
        )
    positions = models.position_count(outline)
    if positions is not None and settings.max_length > positions:
        raise ValueError(
            f"max_length must be at most {positions}, the positions of model {model!r}, not {settings.max_length}"
        )
    selection = settings.selection
    density = selection.density if selection.k is None else None
    for recipe in recipes:
        if recipe == "full":
            continue
        names, scope = models.maskable_names(outline), str(selection.scope)
        if recipe == "lift":  # its density holds for each matrix, its k for all together
            names, scope = models.linear_names(outline), "tensor" if selection.k is None else "global"
        try:
            counts = selected_counts(
                names, [outline.get_parameter(name).shape for name in names], selection.k, density, scope
            )
        except ValueError as error:
            raise ValueError(f"selection, {recipe} on model {model!r}: {error}") from None
        if not any(counts):
            raise ValueError(f"selection.density = {density} is less than one entry of model {model!r}")


def masked_lm_start(
    model: str,
    settings: LanguageConfig,
    text: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    runtime: Runtime,
) -> Path:
    """The folder of theta0 for language vectors: the model with its MLM head. A new head is trained with the body
    frozen.
    """
    if finished_model(folder, folder / "model") is not None:
        return folder / "model"
    set_seed(runtime.seed)
    masked_lm, new_head = models.load_masked_lm(model, settings.tie_decoder)
    facts = {"new_head": new_head}
    if new_head and settings.head_steps:
        models.freeze_for_head(masked_lm)
        phase = PhaseConfig(lr=settings.head_lr, max_steps=settings.head_steps, keep_best=False)
        examples = language_examples(text, None, tokenizer, settings, runtime.seed)
        facts |= train_phase(
            masked_lm, examples, settings, phase, folder, runtime, DivergenceGuard("MLM head", settings.head_lr)
        )
    save_model(masked_lm.to("cpu"), folder / "model")
    finish(folder, facts)
    return folder / "model"


def classifier_start(
    model: str, labels: list[str], task: str, folder: Path, seed: int, vectors: tuple[SparseDelta, ...] = ()
) -> Path:
    """The folder of theta0 for a task vector: the model with a new head drawn from `seed`, plus `vectors`."""
    if finished_model(folder, folder) is None:
        set_seed(seed)
        classifier = models.load_classifier(model, labels, task)
        for vector in vectors:
            vector.apply_(classifier)
        save_model(classifier, folder)
        finish(folder, {"vectors": len(vectors)})
    return folder


def language_vector(
    language: str, start: Path, examples: Examples, settings: LanguageConfig, phases: Path, deltas: Path, metadata: dict
) -> Vector:
    """A language vector to learn; the MLM head is no part of it."""
    name = f"language-{language}"
    load = partial(_load_masked_lm, tie_decoder=settings.tie_decoder)
    return Vector(
        name, start, load, examples, settings, phases / name, deltas, False, metadata={**metadata, "language": language}
    )


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
    rows = [
        None if part is None else tokenize_task(part, tokenizer, labels, settings.max_length)
        for part in (train, validation)
    ]
    return Examples(rows[0], rows[1], task_collator(tokenizer, task))


def language_examples(
    text: Dataset, validation: Dataset | None, tokenizer, settings: LanguageConfig, seed: int
) -> Examples:
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
