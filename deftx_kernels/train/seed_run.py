"""The vectors and scores of one seed."""

import itertools
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from deftx_kernels.delta import SparseDelta
from deftx_kernels.train import models
from deftx_kernels.train.checkpoints import finish, finished
from deftx_kernels.train.config import Recipe, RunConfig
from deftx_kernels.train.data import Corpus
from deftx_kernels.train.deltas import overlap
from deftx_kernels.train.language_store import open_store
from deftx_kernels.train.recipes import dense_phase, learn
from deftx_kernels.train.tokens import task_collator, tokenize_task
from deftx_kernels.train.trainer import Runtime, evaluate, with_deltas
from deftx_kernels.train.vectors import Vector, VectorBuilder


class SeedRun:
    """The vectors and scores of one seed, in one folder."""

    def __init__(
        self,
        config: RunConfig,
        corpus: Corpus,
        tokenizer: PreTrainedTokenizerBase,
        seed: int,
        folder: Path,
        console: Console,
    ):
        self.config, self.corpus, self.tokenizer, self.seed, self.folder = config, corpus, tokenizer, seed, folder
        self.console = console
        self.runtime = Runtime(seed=seed, device=config.device, report_to=tuple(config.report_to))
        self.builder = VectorBuilder(config.model, corpus, tokenizer, self.runtime, folder)
        recipes = [Recipe.of(text) for text in config.recipes]
        self.recipes = [recipe for recipe in recipes if recipe.name != "full"]
        with_full = len(self.recipes) < len(recipes)
        # Full fine-tuning of theta0 is the first phase of other recipes, but not where these start from source vectors.
        self.scores_full = with_full or (not config.source_vector and any(map(_has_dense_phase, self.recipes)))
        self.languages = list(corpus.targets) + (list(corpus.sources) if config.source_vector else [])
        self.phases: list[dict] = []
        self.deltas: dict[tuple[str, str], SparseDelta] = {}  # by recipe and vector
        dense = sum(map(_has_dense_phase, self.recipes))
        languages = len(self.languages) * (len(self.recipes) + (dense > 0))
        self._total = languages + len(self.recipes) + self.scores_full + (dense if config.source_vector else 0)
        self._counter = itertools.count(1)

    def learn_all(self) -> None:
        """The task vectors and language vectors. With source_vector, the task is trained with those of the sources."""
        sources, languages = self.corpus.sources, self.builder
        if self.recipes and self.config.language_vectors is not None:
            languages = open_store(self.config, self.builder, self.languages, self.console)
        plain = [] if self.config.source_vector else self.recipes
        if self.scores_full or plain:
            vector = self.builder.task(self.config.task, sources=sources)
            self._learn(vector, "task", plain, self.runtime, dense=self.scores_full)
        if self.recipes:
            self._learn_languages(languages)
        if not self.config.source_vector:
            return
        for recipe in self.recipes:
            folder, deltas = f"task-{recipe.folder}", self._source_deltas(recipe)
            options = {"added": deltas} if len(deltas) == 1 else {"by_source": deltas}
            vector = self.builder.task(
                self.config.task, start=f"{folder}/start", folder=folder, sources=sources, **options
            )
            self._learn(vector, "task", [recipe], self.runtime, own_dense=True)

    def _learn_languages(self, builder: VectorBuilder) -> None:
        settings, shared = self.config.language, self.config.language_vectors is not None
        self.console.print("[bold]MLM head[/] · a new one is trained with the body frozen")
        start = builder.mlm_start(settings, self.languages)
        recorded = not shared or self.seed == self.config.seeds[0]
        for language in builder.in_turn(self.languages):
            vector = builder.language(language, start, settings)
            self._learn(vector, f"language {language}", self.recipes, builder.runtime, recorded=recorded)

    def _source_deltas(self, recipe: Recipe) -> list[SparseDelta]:
        """The source languages' vectors, where the task is trained with them."""
        sources = self.corpus.sources if self.config.source_vector else []
        return [self.deltas[str(recipe), f"language-{name}"] for name in sources]

    def _learn(
        self,
        vector: Vector,
        title: str,
        recipes: list[Recipe],
        runtime: Runtime,
        dense: bool = False,
        recorded: bool = True,
        own_dense: bool = False,
    ) -> None:
        """The vector by each recipe, after its dense phase if a recipe has one or `dense` is given.

        With `own_dense` the dense phase is recorded as that of the only recipe: other recipes have other starts.
        """

        def heading(what: str) -> None:
            self.console.print(f"[bold cyan]\\[{next(self._counter)}/{self._total}][/] [bold]{title}[/] · {what}")

        def record(method: str, metrics: dict) -> None:
            if recorded:
                shared = {"shared": True} if runtime is not self.runtime else {}
                self.phases.append({"seed": runtime.seed, **shared, "vector": vector.name, "method": method, **metrics})

        if dense or any(map(_has_dense_phase, recipes)):
            heading("full fine-tuning (dense phase)")
            of_recipe = {"recipe": str(recipes[0])} if own_dense else {}
            record("dense", {**of_recipe, **dense_phase(vector, runtime)})
        for recipe in recipes:
            heading(f"{recipe.label} (selection and sparse phase)")
            self.deltas[str(recipe), vector.name], metrics = learn(vector, recipe, runtime)
            record(str(recipe), metrics)

    def overlaps(self) -> list[dict]:
        """What the task vector shares with each language vector, by recipe."""
        return [
            {
                "seed": self.seed,
                "method": str(recipe),
                "language": language,
                **overlap(self.deltas[str(recipe), "task"], self.deltas[str(recipe), f"language-{language}"]),
            }
            for recipe in self.recipes
            for language in self.languages
        ]

    def evaluate_all(self) -> list[dict]:
        """Scores by language: of full fine-tuning, and of each recipe alone and with the language's vector.

        A task vector that was trained with a single source vector is scored alone with that vector, as in training.
        """
        folder = self.folder / "phases/evaluation"
        if (saved := finished(folder)) is not None:
            return saved["scores"]
        self.console.print("[bold]zero-shot evaluation[/]")
        corpus, scores = self.corpus, []
        collator, length = task_collator(self.tokenizer, corpus.task), self.config.task.max_length
        tests = {name: tokenize_task(rows, self.tokenizer, corpus.labels, length) for name, rows in corpus.test.items()}
        load = partial(models.load_classifier, labels=corpus.labels, task=corpus.task)

        def add(model, method: str, kind: str, languages: Iterable[str]) -> None:
            for language in languages:
                result = evaluate(model, tests[language], collator, self.runtime)
                scores.append({"seed": self.seed, "method": method, "kind": kind, "language": language, **result})

        if self.scores_full:
            add(load(self.folder / "phases/task/dense/model"), "full", "task", tests)
        model = load(self.builder.base())
        for recipe in self.recipes:
            task, sources = self.deltas[str(recipe), "task"], self._source_deltas(recipe)
            with with_deltas(model, [task, *(sources if len(sources) == 1 else [])]):
                add(model, str(recipe), "task", tests)
            for language in self.languages:
                with with_deltas(model, [task, self.deltas[str(recipe), f"language-{language}"]]):
                    add(model, str(recipe), "composed", [language] if language in tests else [])
        finish(folder, {"scores": scores})
        return scores


def _has_dense_phase(recipe: Recipe) -> bool:
    return recipe.name != "lift"
