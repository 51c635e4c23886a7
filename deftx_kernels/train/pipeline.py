"""The commands: the whole run (vectors, their sums, zero-shot evaluation, costs, report), one vector, evaluation."""

import hashlib
import itertools
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from deftx_kernels.delta import SparseDelta
from deftx_kernels.files import write_json
from deftx_kernels.train import costs, models, report
from deftx_kernels.train.checkpoints import finish, finished
from deftx_kernels.train.config import (
    METHODS,
    Columns,
    EvalConfig,
    FilesData,
    NusaxData,
    Recipe,
    RunConfig,
    TrainLanguageConfig,
    TrainTaskConfig,
    parse_pairs,
    to_dict,
)
from deftx_kernels.train.data import Corpus, check_labels, load_corpus
from deftx_kernels.train.deltas import load_delta
from deftx_kernels.train.readers import read_task
from deftx_kernels.train.recipes import dense_phase, learn
from deftx_kernels.train.runs import open_run
from deftx_kernels.train.tokens import task_collator, tokenize_task
from deftx_kernels.train.trainer import Runtime, evaluate, with_deltas
from deftx_kernels.train.vectors import Vector, VectorBuilder, check_fit


def run(config: RunConfig, console: Console | None = None) -> dict:
    """Run the pipeline and write the run folder: config.json, metrics.json, deltas/, phases/, figures/, report.md.

    An interrupted run continues where it stopped. Returns the metrics.

    Raises:
        ValueError: bad settings, data or model files, by name; a phase that diverged; a run folder that holds a run
            with other settings or data, or that another process uses.
        OSError: a file of the run cannot be written.
    """
    console = console or Console()
    began = time.perf_counter()
    corpus = load_corpus(config.data)
    tokenizer = models.load_tokenizer(config.model)
    check_fit(config.model, tokenizer, corpus.task, config.task, config.recipes)
    if set(config.recipes) != {"full"}:
        check_fit(config.model, tokenizer, "masked-lm", config.language, config.recipes)
    run_dir = Path(config.run_dir)
    fingerprints = {"model": models.model_hash(config.model), **corpus.hashes()}
    with open_run(config, run_dir, fingerprints, [models.resolve_model(config.model), *data_paths(config.data)]):
        scores: list[dict] = []
        phases: list[dict] = []
        for number, seed in enumerate(config.seeds):
            folder = run_dir if number == 0 else run_dir / f"seed-{seed}"
            seed_run = SeedRun(config, corpus, tokenizer, seed, folder, console)
            seed_run.learn_all()
            scores += seed_run.evaluate_all()
            phases += seed_run.phases
        metrics: dict[str, Any] = {"data": corpus.sizes(), "scores": scores, "phases": phases, "costs": None}
        if config.cost_steps:
            metrics["costs"] = measure_costs(config, corpus, tokenizer, run_dir, console)
        metrics["seconds"] = time.perf_counter() - began
        write_json(run_dir / "metrics.json", metrics)
        report.write(run_dir, to_dict(config), metrics)
    report.print_tables(metrics, console)
    console.print(f"Report: {run_dir / 'report.md'}   ({metrics['seconds']:.0f} s)")
    return metrics


def data_paths(data: Any) -> list[Path]:
    """The files that a data configuration names. A run folder may be beside them, and never deletes them."""
    if isinstance(data, NusaxData):
        return sorted(Path(data.data_dir).glob("*/*.csv"))
    if isinstance(data, FilesData):
        pairs = [*parse_pairs(data.test, "test").values(), *parse_pairs(data.text, "text").values()]
        return [Path(path) for path in [*data.train, *data.validation, *pairs]]
    return []


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
        self.recipes: list[Recipe] = [recipe for recipe in config.recipes if recipe != "full"]
        self.needs_dense = any(recipe != "lift" for recipe in config.recipes)
        self.languages = list(corpus.targets) + (list(corpus.sources) if config.source_vector else [])
        self.phases: list[dict] = []
        self.deltas: dict[tuple[str, str], SparseDelta] = {}  # by recipe and vector
        self._total = (len(self.languages) + 1) * (len(self.recipes) + self.needs_dense)
        self._counter = itertools.count(1)

    def learn_all(self) -> None:
        """Language vectors first: with source_vector, the task starts from one."""
        sources = self.corpus.sources
        if self.recipes:
            self.console.print("[bold]MLM head[/] · a new one is trained with the body frozen")
            start = self.builder.mlm_start(self.config.language, self.languages)
            for language in self.languages:
                vector = self.builder.language(language, start, self.config.language)
                self._learn(vector, f"language {language}", self.recipes)
        if not self.config.source_vector:
            self._learn(self.builder.task(self.config.task, sources=sources), "task", self.recipes)
            return
        for recipe in self.recipes:
            folder = f"task-{recipe}"
            added = self._source_deltas(recipe)
            vector = self.builder.task(self.config.task, added, f"{folder}/start", folder, sources=sources)
            self._learn(vector, "task", [recipe])

    def _source_deltas(self, recipe: Recipe) -> list[SparseDelta]:
        """The source language's vector, where the task was trained on top of it."""
        return [self.deltas[recipe, f"language-{self.corpus.sources[0]}"]] if self.config.source_vector else []

    def _learn(self, vector: Vector, title: str, recipes: list[Recipe]) -> None:
        def heading(what: str) -> None:
            self.console.print(f"[bold cyan]\\[{next(self._counter)}/{self._total}][/] [bold]{title}[/] · {what}")

        def record(method: str, metrics: dict) -> None:
            self.phases.append({"seed": self.seed, "vector": vector.name, "method": method, **metrics})

        if self.needs_dense:
            heading("full fine-tuning (dense phase)")
            record("dense", dense_phase(vector, self.runtime))
        for recipe in recipes:
            heading(f"{METHODS[recipe]} (selection and sparse phase)")
            self.deltas[recipe, vector.name], metrics = learn(vector, recipe, self.runtime)
            record(recipe, metrics)

    def evaluate_all(self) -> list[dict]:
        """Scores by language: of full fine-tuning, and of each recipe alone and with the language's vector."""
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

        if self.needs_dense and not self.config.source_vector:
            add(load(self.folder / "phases/task/dense/model"), "full", "task", tests)
        model = load(self.builder.base())
        for recipe in self.recipes:
            task = self.deltas[recipe, "task"]
            with with_deltas(model, [task, *self._source_deltas(recipe)]):  # as in the task's training
                add(model, recipe, "task", tests)
            for language in corpus.targets:
                with with_deltas(model, [task, self.deltas[recipe, f"language-{language}"]]):
                    add(model, recipe, "composed", [language])
        finish(folder, {"scores": scores})
        return scores


def measure_costs(config: RunConfig, corpus: Corpus, tokenizer, run_dir: Path, console: Console) -> dict | None:
    """Memory and time of a task step, dense against the first recipe's mask, each in a fresh process."""
    recipe = next((name for name in config.recipes if name in ("deft-x", "lt-sft")), None)
    if recipe is None:
        return None
    folder = run_dir / "phases/costs"
    if (saved := finished(folder)) is not None and saved.get("cost_steps") == config.cost_steps:
        return saved
    console.print("[bold]memory and step time[/], dense and sparse, each in a fresh process")
    vector = run_dir / "phases" / (f"task-{recipe}" if config.source_vector else "task")
    start = vector / "start" if config.source_vector else run_dir / "phases/base"
    rows = tokenize_task(corpus.train, tokenizer, corpus.labels, config.task.max_length).shuffle(seed=config.seeds[0])
    collator, size = task_collator(tokenizer, corpus.task), config.task.batch_size
    count = min(costs.WARM_UP + config.cost_steps, max(1, len(rows) // size))
    batches = [collator([rows[j] for j in range(i * size, min((i + 1) * size, len(rows)))]) for i in range(count)]
    batches = [{name: torch.as_tensor(value) for name, value in batch.items()} for batch in batches]
    mask = vector / recipe / "mask.safetensors"
    measured = costs.compare(start, mask, batches, config.cost_steps, config.device, corpus.task)
    metrics = {"recipe": recipe, "cost_steps": config.cost_steps, **measured}
    finish(folder, metrics)
    return metrics


def train_language(config: TrainLanguageConfig) -> Path:
    """Learn a language vector; returns its folder (with recipe "full", that of the tuned model)."""
    corpus = load_corpus(config)
    tokenizer = models.load_tokenizer(config.model)
    check_fit(config.model, tokenizer, "masked-lm", config.settings, [config.recipe])
    parts = corpus.hashes()
    fingerprints = {name.removesuffix(f" of {config.language}"): value for name, value in parts.items()}

    def vector(builder: VectorBuilder) -> Vector:
        start = builder.mlm_start(config.settings, [config.language])
        return builder.language(config.language, start, config.settings)

    paths = [path for path in (config.text, config.validation) if path is not None]
    return _train(config, corpus, tokenizer, fingerprints, paths, vector)


def train_task(config: TrainTaskConfig) -> Path:
    """Learn a task vector; returns its folder (with recipe "full", that of the tuned model)."""
    corpus = load_corpus(config)
    added = [load_delta(path) for path in config.start_from]
    tokenizer = models.load_tokenizer(config.model)
    check_fit(config.model, tokenizer, config.kind, config.settings, [config.recipe])
    fingerprints = corpus.hashes()
    fingerprints |= {f"vector {number}": delta_hash(delta) for number, delta in enumerate(added, start=1)}

    def vector(builder: VectorBuilder) -> Vector:
        return builder.task(config.settings, added, start_from=config.start_from)

    paths = [*config.train, *config.validation, *config.start_from]
    return _train(config, corpus, tokenizer, fingerprints, paths, vector)


def _train(config: TrainLanguageConfig | TrainTaskConfig, corpus, tokenizer, fingerprints, paths, make_vector) -> Path:
    """Learn one vector in its run folder."""
    run_dir, runtime = Path(config.run_dir), Runtime(config.seed, config.device)
    fingerprints = {"model": models.model_hash(config.model), **fingerprints}
    with open_run(config, run_dir, fingerprints, [models.resolve_model(config.model), *paths]):
        vector = make_vector(VectorBuilder(config.model, corpus, tokenizer, runtime, run_dir))
        if config.recipe == "full":
            dense_phase(vector, runtime)
            return vector.folder / "dense/model"
        learn(vector, config.recipe, runtime)
        return vector.deltas / config.recipe / vector.name


def delta_hash(delta: SparseDelta) -> str:
    """SHA-256 (hex) of a delta's entries, values and whole tensors."""
    digest = hashlib.sha256(delta.mask.fingerprint().encode())
    for name, tensor in [("", delta.values), *sorted(delta.dense.items())]:
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def evaluate_vectors(config: EvalConfig) -> dict[str, float]:
    """{"macro_f1", "accuracy", "n"} on a labelled file.

    Raises:
        ValueError: none or several of the vectors are task vectors.
    """
    deltas = [load_delta(path) for path in config.vectors]
    tasks = [delta.metadata for delta in deltas if "labels" in delta.metadata]
    if len(tasks) != 1:
        raise ValueError(f"vectors: exactly one task vector (with labels in its metadata) is needed, not {len(tasks)}")
    task = tasks[0]
    if lacking := [name for name in ("task", "max_length", "base_model") if name not in task]:
        raise ValueError(f"vectors: the metadata of the task vector lack {lacking[0]!r}")
    names = {name: getattr(config, name) for name in ("text_column", "pair_column", "label_column")}
    columns = Columns(**names, kind=task["task"])
    rows = read_task(config.test, columns)
    check_labels(rows, task["labels"], str(config.test))
    base = config.model or task["base_model"]
    tokenizer = models.load_tokenizer(base)
    model = models.load_classifier(base, task["labels"], task["task"])
    tokenized = tokenize_task(rows, tokenizer, task["labels"], task["max_length"])
    collator, runtime = task_collator(tokenizer, task["task"]), Runtime(device=config.device)
    with with_deltas(model, deltas):
        return evaluate(model, tokenized, collator, runtime, config.batch_size)
