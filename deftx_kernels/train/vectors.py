"""A vector to learn: the model that it starts from (theta0, as a model folder) and its tokenized examples."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from deftx_kernels.delta import SparseDelta
from deftx_kernels.select.functional import selected_counts
from deftx_kernels.train import models, processes
from deftx_kernels.train.callbacks import DivergenceGuard
from deftx_kernels.train.checkpoints import finish, finished_model, save_model
from deftx_kernels.train.config import LanguageConfig, PhaseConfig, Recipe, TaskConfig, VectorConfig
from deftx_kernels.train.data import Corpus
from deftx_kernels.train.sources import SourceVectors
from deftx_kernels.train.tokens import (
    MaskedLanguageCollator,
    check_known,
    mask_once,
    task_collator,
    tokenize_task,
    tokenize_text,
)
from deftx_kernels.train.trainer import Examples, Runtime, mlm_head, train_phase

VALIDATION_SHARE = 0.05  # of unlabelled text, where there is no validation text


@dataclass
class Vector:
    """One vector to learn: its start, its examples and its folders."""

    name: str
    start: Path
    """Folder of the model that training begins with (theta0), a transformers model folder."""
    load: Callable[[Path], PreTrainedModel]
    examples: Examples
    config: VectorConfig
    folder: Path
    """Of its phases."""
    deltas: Path
    """The delta by a recipe is saved as deltas/<recipe>/<name>."""
    keep_head: bool
    """Whether the head belongs to the vector (a task) or is dropped (a language)."""
    base: Path | None = None
    """Folder of the model that the vector will be added to, where that is not theta0 (a task trained on top of a source
    language vector)."""
    metadata: dict = field(default_factory=dict)
    theta0: Path | None = None
    """Folder of theta0 where `start` is another model: that of a later iteration."""


@dataclass
class VectorBuilder:
    """Makes the vectors of one model, corpus and seed; the folders of their starts are in `folder`/phases."""

    model: str
    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    runtime: Runtime
    folder: Path

    def language(self, language: str, start: Path, config: LanguageConfig) -> Vector:
        """A language vector on `mlm_start`; the MLM head is not part of it."""
        text, validation = self._text(language, config)
        examples = language_examples(text, validation, self.tokenizer, config, self.runtime.seed)
        return self._vector(
            f"language-{language}",
            start,
            partial(_load_masked_lm, tie_decoder=config.tie_decoder),
            examples,
            config,
            keep_head=False,
            metadata={"language": language},
        )

    def _text(self, language: str, config: LanguageConfig) -> tuple[Dataset, Dataset | None]:
        """The text to train on, and for validation. If there is none, 5 % of the text where a phase keeps its best
        checkpoint.
        """
        text, validation = self.corpus.text[language], self.corpus.text_validation.get(language)
        choose = config.dense.keep_best or config.sparse.keep_best
        if validation is None and choose and len(text) >= 1 / VALIDATION_SHARE:
            parts = text.train_test_split(VALIDATION_SHARE, seed=self.runtime.seed)
            text, validation = parts["train"], parts["test"]
        return text, validation

    def in_turn(self, languages: Sequence[str]) -> Iterator[str]:
        """The languages in the order in which their vectors can be made."""
        return iter(languages)

    def task(
        self,
        config: TaskConfig,
        added: Sequence[SparseDelta] = (),
        start: str = "start",
        folder: str = "task",
        by_source: Sequence[SparseDelta] = (),
        **metadata,
    ) -> Vector:
        """A task vector with its head, on the pretrained model plus the deltas `added`.

        Args:
            start: folder of that sum, in phases.
            folder: folder of the vector's phases, in phases.
            by_source: the vector of each source language, which is in the weights while its examples are trained on.
        """
        corpus, base = self.corpus, self.base()
        train, validation = (
            None if rows is None else tokenize_task(rows, self.tokenizer, corpus.labels, config.max_length)
            for rows in (corpus.train, corpus.validation)
        )
        examples = Examples(
            train,
            validation,
            task_collator(self.tokenizer, corpus.task),
            labels=corpus.labels,
            metric=corpus.metric,
            source_vectors=SourceVectors(by_source) if by_source else None,
        )
        metadata |= {"labels": corpus.labels, "task": corpus.task, "max_length": config.max_length}
        metadata |= {"source_vectors": corpus.sources} if by_source else {}
        return self._vector(
            "task",
            self._classifier(start, added) if added else base,
            partial(models.load_classifier, labels=corpus.labels, task=corpus.task),
            examples,
            config,
            keep_head=True,
            folder=folder,
            base=base if added else None,
            metadata=metadata,
        )

    def _vector(self, name, start, load, examples, config, *, keep_head, metadata, folder=None, base=None) -> Vector:
        metadata = {"base_model": str(self.model), "seed": self.runtime.seed, **metadata}
        phases, deltas = self.folder / "phases" / (folder or name), self.folder / "deltas"
        return Vector(name, start, load, examples, config, phases, deltas, keep_head, base, metadata)

    def base(self) -> Path:
        """The folder of the pretrained model with an untrained head, to which vectors are added."""
        return self._classifier("base")

    def _classifier(self, name: str, added: Sequence[SparseDelta] = ()) -> Path:
        folder = self.folder / "phases" / name

        def make() -> None:
            set_seed(self.runtime.seed)  # of the head
            classifier = models.load_classifier(self.model, self.corpus.labels, self.corpus.task)
            for delta in added:
                delta.apply_(classifier)
            save_model(classifier, folder)
            finish(folder, {"vectors": len(added)})

        if finished_model(folder, folder) is None:
            processes.on_main(make)
        return folder

    def mlm_start(self, config: LanguageConfig, languages: Sequence[str]) -> Path:
        """The folder of theta0 for language vectors: the model with its MLM head. A new head is trained with the body
        frozen, on the text of all `languages`.
        """
        folder = self.folder / "phases/mlm-head"
        if finished_model(folder, folder / "model") is not None:
            return folder / "model"
        set_seed(self.runtime.seed)
        masked_lm, new_head = models.load_masked_lm(self.model, config.tie_decoder)
        metrics = {"new_head": new_head}
        if new_head and config.head_steps:
            models.freeze_for_head(masked_lm)
            phase = PhaseConfig(lr=config.head_lr, max_steps=config.head_steps, keep_best=False)
            # Not the texts that are held out: they measure the perplexity before the vectors, too.
            parts = [self._text(name, config)[0]["text"] for name in languages]
            text = Dataset.from_dict({"text": [line for part in parts for line in part]})
            examples = language_examples(text, None, self.tokenizer, config, self.runtime.seed)
            guard = DivergenceGuard("MLM head", config.head_lr)
            metrics |= train_phase(masked_lm, examples, config, phase, folder, self.runtime, guard)
        save_model(masked_lm.to("cpu"), folder / "model")
        finish(folder, metrics)
        return folder / "model"


def _load_masked_lm(folder: Path, tie_decoder: bool) -> PreTrainedModel:
    return models.load_masked_lm(folder, tie_decoder)[0]


def language_examples(
    text: Dataset, validation: Dataset | None, tokenizer, config: LanguageConfig, seed: int
) -> Examples:
    """Unlabelled rows, tokenized."""
    collator = MaskedLanguageCollator(tokenizer, config.mlm_probability, seed)
    train = tokenize_text(text, tokenizer, config.max_length, config.pack)
    if validation is not None:
        validation = mask_once(tokenize_text(validation, tokenizer, config.max_length, config.pack), collator)
    vocabulary = None
    if config.vocabulary == "text":
        parts = [train["input_ids"], [] if validation is None else validation["labels"]]
        ids = torch.unique(torch.tensor([token for rows in parts for row in rows for token in row]))
        vocabulary = ids[ids >= 0]  # without IGNORED
    return Examples(train, validation, collator, masked_lm=True, vocabulary=vocabulary)


def check_texts(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, languages: Iterable[str]) -> None:
    """Raises ValueError where the tokenizer knows nothing of a language's text. Before any training."""
    for language in languages:
        for name, texts in {"text": corpus.text, "validation text": corpus.text_validation}.items():
            if language in texts:
                check_known(texts[language], tokenizer, f"{name} of {language!r}")


def check_fit(
    model: str, tokenizer: PreTrainedTokenizerBase, task: str, config: VectorConfig, recipes: Iterable[Recipe | str]
) -> None:
    """Whether settings fit a model, from its configuration alone: before any training, without its weights.

    Args:
        task: "classification", "token-classification" or "masked-lm".

    Raises:
        ValueError: a batch that cannot be divided among the processes; a tokenizer with more tokens than the model has
            embeddings; max_length above the model's positions; a selection of more entries than it has, or of none;
            for "masked-lm", a tokenizer without a mask token.
    """
    processes.check_batch_size(config.batch_size)
    outline = models.outline(model, task)
    if task == "masked-lm":
        MaskedLanguageCollator(tokenizer)
        mlm_head(outline)
    if len(tokenizer) > (rows := len(outline.get_input_embeddings().weight)):
        what = f"its tokenizer has {len(tokenizer)} tokens, but the model embeddings for {rows}"
        raise ValueError(f"model {model!r}: {what}")
    positions = models.position_count(outline)
    if positions is not None and config.max_length > positions:
        limit = f"{positions}, the positions of model {model!r}"
        raise ValueError(f"max_length must be at most {limit}, not {config.max_length}")
    for recipe in map(Recipe.of, recipes):
        if recipe.name == "full":
            continue
        selection = recipe.selection(config.selection)
        density = selection.density if selection.k is None else None
        names, scope = models.maskable_names(outline), str(selection.scope)
        if recipe.name == "lift":  # its density holds for each matrix, its k for all together
            names, scope = models.linear_names(outline), "tensor" if selection.k is None else "global"
        shapes = [outline.get_parameter(name).shape for name in names]
        try:
            counts = selected_counts(names, shapes, selection.k, density, scope)
        except ValueError as error:
            raise ValueError(f"selection, {recipe} on model {model!r}: {error}") from None
        if not any(counts):
            raise ValueError(f"selection.density = {density} is less than one entry of model {model!r}")
