"""The whole run: language vectors, task vectors, their sums, zero-shot evaluation, costs, report."""

import itertools
import json
import shutil
import time
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import set_seed

from deftx_kernels.delta import SparseDelta
from deftx_kernels.train import costs, models, report
from deftx_kernels.train.config import LanguageConfig, PhaseConfig, RunConfig, TaskConfig, differences, to_dict
from deftx_kernels.train.data import Corpus, load_corpus
from deftx_kernels.train.evaluate import evaluate, with_vectors
from deftx_kernels.train.recipes import Vector, dense_phase, finish, finished, learn, save_model, write_json
from deftx_kernels.train.tokens import MaskedLanguageCollator, mask_once, task_collator, tokenize_task, tokenize_text
from deftx_kernels.train.trainer import Examples, Runtime, train_phase

VALIDATION_SHARE = 0.05  # of unlabelled text, where there is no validation text


def run(config: RunConfig, console: Console | None = None) -> dict:
    """Run the pipeline and write the run folder: config.json, metrics.json, deltas/, phases/, figures/, report.md.

    An interrupted run continues where it stopped. Returns the metrics.

    Raises:
        ValueError: bad settings or data, or a run folder that holds a run with other settings.
    """
    console = console or Console()
    began = time.perf_counter()
    corpus = load_corpus(config.data)
    tokenizer = models.load_tokenizer(config.model)
    run_dir = Path(config.run_dir)
    open_run(config, run_dir)
    scores: list[dict] = []
    phases: list[dict] = []
    for number, seed in enumerate(config.seeds):
        folder = run_dir if number == 0 else run_dir / f"seed-{seed}"
        one = SeedRun(config, corpus, tokenizer, seed, folder, console)
        one.learn_all()
        scores += one.evaluate_all()
        phases += one.phases
    metrics = {"data": describe(corpus), "scores": scores, "phases": phases, "costs": None}
    if config.cost_steps:
        metrics["costs"] = measure_costs(config, corpus, tokenizer, run_dir, console)
    metrics["seconds"] = time.perf_counter() - began
    write_json(run_dir / "metrics.json", metrics)
    report.write(run_dir, to_dict(config), metrics)
    report.print_tables(metrics, console)
    console.print(f"Report: {run_dir / 'report.md'}   ({metrics['seconds']:.0f} s)")
    return metrics


def open_run(config: RunConfig, run_dir: Path) -> None:
    """Write config.json, or check that the one in the folder has the same settings."""
    settings = to_dict(config)
    for name in ("overwrite", "run_dir"):
        settings.pop(name)
    path = run_dir / "config.json"
    if path.is_file():
        changed = differences(json.loads(path.read_text()), settings)
        if changed and not config.overwrite:
            raise ValueError(
                f"run_dir {run_dir} holds a run with other settings ({'; '.join(changed[:3])}): choose another run_dir, or overwrite"
            )
        if changed:
            shutil.rmtree(run_dir)
    elif run_dir.is_dir() and any(run_dir.iterdir()):
        raise ValueError(f"run_dir {run_dir} is not empty and holds no run (no config.json)")
    write_json(path, settings)


class SeedRun:
    """The vectors and scores of one seed, in one folder."""

    def __init__(
        self, config: RunConfig, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, seed: int, folder: Path, console: Console
    ):
        self.config, self.corpus, self.tokenizer, self.seed, self.folder, self.console = (
            config, corpus, tokenizer, seed, folder, console,
        )  # fmt: skip
        self.runtime = Runtime(seed=seed, device=config.device, report_to=tuple(config.report_to))
        self.recipes = [recipe for recipe in config.recipes if recipe != "full"]
        self.needs_dense = any(recipe != "lift" for recipe in config.recipes)
        self.languages = list(corpus.targets) + (list(corpus.sources) if config.source_vector else [])
        self.phases: list[dict] = []
        self.vectors: dict[tuple[str, str], SparseDelta] = {}
        vectors = len(self.languages) + 1
        per_vector = len(self.recipes) + self.needs_dense
        self._total, self._counter = vectors * per_vector, itertools.count(1)

    def learn_all(self) -> None:
        """Language vectors first: with source_vector, the task starts from one."""
        start = prepare_masked_lm(self.config, self._all_text(), self.tokenizer, self.folder / "phases/mlm-head", self.runtime)
        for language in self.languages:
            self._learn(self.language_vector(language, start), f"language {language}", self.recipes)
        if not self.config.source_vector:
            self._learn(self.task_vector(None), "task", self.recipes)
            return
        for recipe in self.recipes:
            self._learn(self.task_vector(recipe), "task", [recipe])

    def _all_text(self) -> Dataset:
        texts = [text for language in self.languages for text in self.corpus.text[language]["text"]]
        return Dataset.from_dict({"text": texts})

    def language_vector(self, language: str, start: Path) -> Vector:
        """What is learned from the unlabelled text of one language."""
        settings = self.config.language
        examples = language_examples(
            self.corpus.text[language], self.corpus.text_validation.get(language), self.tokenizer, settings, self.seed
        )
        return Vector(
            f"language-{language}", start, partial(load_masked_lm, tie_decoder=settings.tie_decoder), examples, settings,
            self.folder / "phases" / f"language-{language}", self.folder / "deltas", keep_head=False,
            metadata={"base_model": str(self.config.model), "language": language, "seed": self.seed},
        )  # fmt: skip

    def task_vector(self, source_recipe: str | None) -> Vector:
        """What is learned from the labelled text, starting from the model plus the source vector of `source_recipe`."""
        settings, corpus = self.config.task, self.corpus
        folder = self.folder / "phases" / ("task" if source_recipe is None else f"task-{source_recipe}")
        source = [] if source_recipe is None else [self.vectors[source_recipe, f"language-{corpus.sources[0]}"]]
        start = self.base() if not source else prepare_classifier(self.config, corpus, folder / "start", self.seed, source)
        return Vector(
            "task", start, partial(models.load_classifier, labels=corpus.labels, task=corpus.task),
            task_examples(corpus.train, corpus.validation, self.tokenizer, corpus.labels, corpus.task, settings), settings,
            folder, self.folder / "deltas", keep_head=True, base=self.base() if source else None,
            metadata={
                "base_model": str(self.config.model), "labels": corpus.labels, "task": corpus.task, "sources": corpus.sources,
                "seed": self.seed,
            },
        )  # fmt: skip

    def base(self) -> Path:
        """The folder of the pretrained model with an untrained head, which vectors are added to."""
        return prepare_classifier(self.config, self.corpus, self.folder / "phases/base", self.seed, [])

    def _learn(self, vector: Vector, title: str, recipes: list[str]) -> None:
        if any(recipe != "lift" for recipe in recipes) or "full" in self.config.recipes:
            self._heading(title, "dense phase")
            self._record(vector, "dense", dense_phase(vector, self.runtime))
        for recipe in recipes:
            self._heading(title, f"{report.METHODS[recipe]}: selection and sparse phase")
            delta, facts = learn(vector, recipe, self.runtime)
            self.vectors[recipe, vector.name] = delta
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
        collator = task_collator(self.tokenizer, corpus.task)
        tests = {
            name: tokenize_task(rows, self.tokenizer, corpus.labels, self.config.task.max_length) for name, rows in corpus.test.items()
        }
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
            with with_vectors(model, [task]):
                for language in tests:
                    add(model, recipe, "task", language)
            for language in self.languages:
                if language in tests:
                    with with_vectors(model, [task, self.vectors[recipe, f"language-{language}"]]):
                        add(model, recipe, "composed", language)
        finish(saved, {"scores": scores})
        return scores


def load_masked_lm(folder: Path, tie_decoder: bool):
    """The MLM model of a folder."""
    return models.load_masked_lm(folder, tie_decoder)[0]


def prepare_masked_lm(
    config: RunConfig, text: Dataset, tokenizer: PreTrainedTokenizerBase, folder: Path, runtime: Runtime
) -> Path:
    """The folder of theta0 for language vectors: the model with its MLM head, a new one trained with the body frozen."""
    if finished(folder) is not None:
        return folder / "model"
    set_seed(runtime.seed)
    settings = config.language
    model, new_head = models.load_masked_lm(config.model, settings.tie_decoder)
    facts = {"new_head": new_head}
    if new_head and settings.head_steps:
        models.freeze_for_head(model)
        phase = PhaseConfig(lr=settings.head_lr, max_steps=settings.head_steps, keep_best=False)
        facts |= train_phase(model, language_examples(text, None, tokenizer, settings, runtime.seed), settings, phase, folder, runtime)
    save_model(model.to("cpu"), folder / "model")
    finish(folder, facts)
    return folder / "model"


def prepare_classifier(config: RunConfig, corpus: Corpus, folder: Path, seed: int, vectors: list[SparseDelta]) -> Path:
    """The folder of theta0 for a task vector: the model with a new head drawn from `seed`, plus `vectors`."""
    if not folder.is_dir():
        set_seed(seed)
        classifier = models.load_classifier(config.model, corpus.labels, corpus.task)
        for vector in vectors:
            vector.apply_(classifier)
        folder.parent.mkdir(parents=True, exist_ok=True)
        save_model(classifier, folder)
    return folder


def task_examples(train, validation, tokenizer, labels: list[str], task: str, settings: TaskConfig) -> Examples:
    """Labelled rows, tokenized."""
    rows = [None if part is None else tokenize_task(part, tokenizer, labels, settings.max_length) for part in (train, validation)]
    return Examples(rows[0], rows[1], task_collator(tokenizer, task))


def language_examples(text, validation, tokenizer, settings: LanguageConfig, seed: int) -> Examples:
    """Unlabelled rows, tokenized. Without validation text 5 % are held out where a best checkpoint is to be chosen."""
    if validation is None and (settings.dense.keep_best or settings.sparse.keep_best) and len(text) >= 1 / VALIDATION_SHARE:
        parts = text.train_test_split(VALIDATION_SHARE, seed=seed)
        text, validation = parts["train"], parts["test"]
    collator = MaskedLanguageCollator(tokenizer, settings.mlm_probability, seed)
    train = tokenize_text(text, tokenizer, settings.max_length, settings.pack)
    if validation is not None:
        validation = mask_once(tokenize_text(validation, tokenizer, settings.max_length, settings.pack), collator)
    return Examples(train, validation, collator, masked_lm=True)


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
    if (facts := finished(folder)) is not None:
        return facts
    console.print("[bold]memory and step time[/], dense and sparse, each in a fresh process")
    vector = run_dir / "phases" / (f"task-{recipe}" if config.source_vector else "task")
    rows = tokenize_task(corpus.train, tokenizer, corpus.labels, config.task.max_length).shuffle(seed=config.seeds[0])
    collator, size = task_collator(tokenizer, corpus.task), config.task.batch_size
    count = min(costs.WARM_UP + config.cost_steps, max(1, len(rows) // size))
    batches = [dict(collator([rows[j] for j in range(i * size, min((i + 1) * size, len(rows)))])) for i in range(count)]
    batches = [{name: torch.as_tensor(value) for name, value in batch.items()} for batch in batches]
    start = vector / "start" if config.source_vector else run_dir / "phases/base"
    facts = costs.compare(
        start, vector / recipe / "mask.safetensors", batches, config.cost_steps, config.device, corpus.task
    )  # fmt: skip
    facts["recipe"] = recipe
    finish(folder, facts)
    return facts
