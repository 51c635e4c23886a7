"""The whole run: language vectors, task vectors, their sums, zero-shot evaluation, costs, report."""

import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from deftx_kernels.delta import SparseDelta
from deftx_kernels.files import write_json
from deftx_kernels.train import costs, models, report, starts
from deftx_kernels.train.config import FilesData, NusaxData, Recipe, RunConfig, parse_pairs, to_dict
from deftx_kernels.train.data import Corpus, content_hash, load_corpus
from deftx_kernels.train.evaluate import evaluate, with_vectors
from deftx_kernels.train.recipes import Vector, dense_phase, finish, finished, learn
from deftx_kernels.train.runs import open_run
from deftx_kernels.train.tokens import task_collator, tokenize_task
from deftx_kernels.train.trainer import Runtime


def run(config: RunConfig, console: Console | None = None) -> dict:
    """Run the pipeline and write the run folder: config.json, metrics.json, deltas/, phases/, figures/, report.md.

    An interrupted run continues where it stopped. Returns the metrics.

    Raises:
        ValueError: bad settings, data or model files, by name; a phase that diverged; a run folder that holds a run
            with other settings or data, or in which another process works.
        OSError: a file of the run cannot be written.
    """
    console = console or Console()
    began = time.perf_counter()
    corpus = load_corpus(config.data)
    tokenizer = models.load_tokenizer(config.model)
    starts.check_fit(config.model, tokenizer, corpus.task, config.task, config.recipes)
    if set(config.recipes) != {"full"}:
        starts.check_fit(config.model, tokenizer, "masked-lm", config.language, config.recipes)
    run_dir = Path(config.run_dir)
    fingerprints = {"model": models.model_hash(config.model), **corpus_hashes(corpus)}
    with open_run(config, run_dir, fingerprints, [models.resolve_model(config.model), *data_paths(config.data)]):
        scores: list[dict] = []
        phases: list[dict] = []
        for number, seed in enumerate(config.seeds):
            one = SeedRun(
                config, corpus, tokenizer, seed, run_dir if number == 0 else run_dir / f"seed-{seed}", console
            )
            one.learn_all()
            scores += one.evaluate_all()
            phases += one.phases
        metrics: dict[str, Any] = {"data": describe(corpus), "scores": scores, "phases": phases, "costs": None}
        if config.cost_steps:
            metrics["costs"] = measure_costs(config, corpus, tokenizer, run_dir, console)
        metrics["seconds"] = time.perf_counter() - began
        write_json(run_dir / "metrics.json", metrics)
        report.write(run_dir, to_dict(config), metrics)
    report.print_tables(metrics, console)
    console.print(f"Report: {run_dir / 'report.md'}   ({metrics['seconds']:.0f} s)")
    return metrics


def data_paths(data: Any) -> list[Path]:
    """The files that a data configuration names. A run may lie beside them in their folder, where it deletes none of
    them.
    """
    if isinstance(data, NusaxData):
        return sorted(Path(data.data_dir).glob("*/*.csv"))
    if isinstance(data, FilesData):
        pairs = [*parse_pairs(data.test, "test").values(), *parse_pairs(data.text, "text").values()]
        return [Path(path) for path in [*data.train, *data.validation, *pairs]]
    return []


def corpus_hashes(corpus: Corpus) -> dict[str, str]:
    """Name of a part of the data → hash of its rows."""
    parts = {"training data": corpus.train, "validation data": corpus.validation}
    for name, by_language in {
        "test": corpus.test,
        "text": corpus.text,
        "validation text": corpus.text_validation,
    }.items():
        parts |= {f"{name} of {language}": rows for language, rows in by_language.items()}
    return {name: content_hash(rows) for name, rows in parts.items() if rows is not None}


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
        self.recipes: list[Recipe] = [recipe for recipe in config.recipes if recipe != "full"]
        self.needs_dense = any(recipe != "lift" for recipe in config.recipes)
        self.languages = list(corpus.targets) + (list(corpus.sources) if config.source_vector else [])
        self.metadata = {"base_model": str(config.model), "seed": seed}
        self.phases: list[dict] = []
        self.vectors: dict[tuple[str, str], SparseDelta] = {}
        self._total = (len(self.languages) + 1) * (len(self.recipes) + self.needs_dense)
        self._counter = itertools.count(1)

    def learn_all(self) -> None:
        """Language vectors first: with source_vector, the task starts from one."""
        if self.recipes:
            start = self._masked_lm_start()
            for language in self.languages:
                self._learn(self._language_vector(language, start), f"language {language}", self.recipes)
        if not self.config.source_vector:
            self._learn(self._task_vector(None), "task", self.recipes)
            return
        for recipe in self.recipes:
            self._learn(self._task_vector(recipe), "task", [recipe])

    def base(self) -> Path:
        """The folder of the pretrained model with an untrained head, which vectors are added to."""
        return starts.classifier_start(
            self.config.model, self.corpus.labels, self.corpus.task, self.folder / "phases/base", self.seed
        )

    def _masked_lm_start(self) -> Path:
        text = Dataset.from_dict({"text": [line for name in self.languages for line in self.corpus.text[name]["text"]]})
        folder = self.folder / "phases/mlm-head"
        self.console.print("[bold]MLM head[/] · a new one is trained with the body frozen")
        return starts.masked_lm_start(
            self.config.model, self.config.language, text, self.tokenizer, folder, self.runtime
        )

    def _language_vector(self, language: str, start: Path) -> Vector:
        settings, corpus = self.config.language, self.corpus
        examples = starts.language_examples(
            corpus.text[language], corpus.text_validation.get(language), self.tokenizer, settings, self.seed
        )  # fmt: skip
        return starts.language_vector(
            language, start, examples, settings, self.folder / "phases", self.folder / "deltas", self.metadata
        )  # fmt: skip

    def _task_vector(self, source_recipe: str | None) -> Vector:
        """A task vector on the model, or on the model plus the source vector of `source_recipe`."""
        settings, corpus = self.config.task, self.corpus
        examples = starts.task_examples(
            corpus.train, corpus.validation, self.tokenizer, corpus.labels, corpus.task, settings
        )
        folder, start, base = self.folder / "phases/task", self.base(), None
        if source_recipe is not None:
            folder, base = self.folder / f"phases/task-{source_recipe}", start
            source = self.vectors[source_recipe, f"language-{corpus.sources[0]}"]
            start = starts.classifier_start(
                self.config.model, corpus.labels, corpus.task, folder / "start", self.seed, (source,)
            )
        metadata = {**self.metadata, "sources": corpus.sources}
        return starts.task_vector(
            start, base, corpus.labels, corpus.task, examples, settings, folder, self.folder / "deltas", metadata
        )  # fmt: skip

    def _learn(self, vector: Vector, title: str, recipes: list[Recipe]) -> None:
        if self.needs_dense:
            self._heading(title, "full fine-tuning (dense phase)")
            self._record(vector, "dense", dense_phase(vector, self.runtime))
        for recipe in recipes:
            self._heading(title, f"{report.METHODS[recipe]} (selection and sparse phase)")
            self.vectors[recipe, vector.name], facts = learn(vector, recipe, self.runtime)
            self._record(vector, recipe, facts)

    def _heading(self, title: str, what: str) -> None:
        self.console.print(f"[bold cyan]\\[{next(self._counter)}/{self._total}][/] [bold]{title}[/] · {what}")

    def _record(self, vector: Vector, method: str, facts: dict) -> None:
        self.phases.append({"seed": self.seed, "vector": vector.name, "method": method, **facts})

    def evaluate_all(self) -> list[dict]:
        """Scores on every language's test set: full fine-tuning, and each recipe alone and with the language's vector."""
        saved = self.folder / "phases/evaluation"
        if (facts := finished(saved)) is not None:
            return facts["scores"]
        self.console.print("[bold]zero-shot evaluation[/]")
        corpus, scores = self.corpus, []
        collator, length = task_collator(self.tokenizer, corpus.task), self.config.task.max_length
        tests = {name: tokenize_task(rows, self.tokenizer, corpus.labels, length) for name, rows in corpus.test.items()}
        load = partial(models.load_classifier, labels=corpus.labels, task=corpus.task)

        def add(model, method: str, kind: str, language: str) -> None:
            result = evaluate(model, tests[language], collator, self.runtime)
            scores.append({"seed": self.seed, "method": method, "kind": kind, "language": language, **result})

        if self.needs_dense and not self.config.source_vector:
            tuned = load(self.folder / "phases/task/dense/model")
            for language in tests:
                add(tuned, "full", "task", language)
        model = load(self.base())
        for recipe in self.recipes:
            task = self.vectors[recipe, "task"]
            # Without the target's vector: the model as the task was trained, so with the source's vector where it had
            # one.
            source = [self.vectors[recipe, f"language-{corpus.sources[0]}"]] if self.config.source_vector else []
            with with_vectors(model, [task, *source]):
                for language in tests:
                    add(model, recipe, "task", language)
            for language in corpus.targets:
                with with_vectors(model, [task, self.vectors[recipe, f"language-{language}"]]):
                    add(model, recipe, "composed", language)
        finish(saved, {"scores": scores})
        return scores


def describe(corpus: Corpus) -> dict:
    """Sizes of the data."""
    return {
        "task": corpus.task, "labels": corpus.labels, "sources": corpus.sources, "targets": corpus.targets,
        "train": len(corpus.train), "test": {name: len(rows) for name, rows in corpus.test.items()},
        "text": {name: len(rows) for name, rows in corpus.text.items()},
    }  # fmt: skip


def measure_costs(config: RunConfig, corpus: Corpus, tokenizer, run_dir: Path, console: Console) -> dict | None:
    """Memory and time of a task step, dense against the first recipe's mask, each in a fresh process."""
    recipe = next((name for name in config.recipes if name in ("deft-x", "lt-sft")), None)
    if recipe is None:
        return None
    folder = run_dir / "phases/costs"
    if (facts := finished(folder)) is not None and facts.get("cost_steps") == config.cost_steps:
        return facts
    console.print("[bold]memory and step time[/], dense and sparse, each in a fresh process")
    vector = run_dir / "phases" / (f"task-{recipe}" if config.source_vector else "task")
    start = vector / "start" if config.source_vector else run_dir / "phases/base"
    rows = tokenize_task(corpus.train, tokenizer, corpus.labels, config.task.max_length).shuffle(seed=config.seeds[0])
    collator, size = task_collator(tokenizer, corpus.task), config.task.batch_size
    count = min(costs.WARM_UP + config.cost_steps, max(1, len(rows) // size))
    batches = [dict(collator([rows[j] for j in range(i * size, min((i + 1) * size, len(rows)))])) for i in range(count)]
    batches = [{name: torch.as_tensor(value) for name, value in batch.items()} for batch in batches]
    mask = vector / recipe / "mask.safetensors"
    facts = {
        "recipe": recipe,
        "cost_steps": config.cost_steps,
        **costs.compare(start, mask, batches, config.cost_steps, config.device, corpus.task),
    }
    finish(folder, facts)
    return facts
