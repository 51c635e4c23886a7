"""The commands: the whole run (vectors, their sums, zero-shot evaluation, costs, report), one vector, evaluation."""

import hashlib
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from deftx_kernels.delta import SparseDelta
from deftx_kernels.files import write_json
from deftx_kernels.train import costs, models, processes, report
from deftx_kernels.train.checkpoints import finish, finished
from deftx_kernels.train.checks import parse_pairs
from deftx_kernels.train.config import EvalConfig, Recipe, RunConfig, TrainLanguageConfig, TrainTaskConfig, to_dict
from deftx_kernels.train.data import Corpus, check_labels, load_corpus
from deftx_kernels.train.data_config import AmericasNLIData, Columns, FilesData, MasakhaNERData, NusaxData, named_files
from deftx_kernels.train.deltas import load_delta
from deftx_kernels.train.readers import read_task
from deftx_kernels.train.recipes import dense_phase, learn
from deftx_kernels.train.runs import open_run
from deftx_kernels.train.seed_run import SeedRun
from deftx_kernels.train.tokens import task_collator, tokenize_task
from deftx_kernels.train.trainer import Runtime, evaluate, with_deltas
from deftx_kernels.train.vectors import Vector, VectorBuilder, check_fit, check_texts


def run(config: RunConfig, console: Console | None = None) -> dict:
    """Run the pipeline and write the run folder: config.json, metrics.json, deltas/, phases/, figures/, report.md.

    An interrupted run continues where it stopped. Returns the metrics. Under torchrun or accelerate launch the phases
    are trained data-parallel.

    Raises:
        ValueError: bad settings, data or model files, by name; a phase that diverged; a run folder that holds a run
            with other settings or data, or that another process uses.
        OSError: a file of the run cannot be written.
    """
    processes.join(config.device)
    console = Console(quiet=True) if processes.rank() else console or Console()
    began = time.perf_counter()
    corpus, tokenizer = processes.main_first(lambda: (load_corpus(config.data), models.load_tokenizer(config.model)))
    check_fit(config.model, tokenizer, corpus.task, config.task, config.recipes)
    if set(config.recipes) != {"full"}:
        check_fit(config.model, tokenizer, "masked-lm", config.language, config.recipes)
        check_texts(corpus, tokenizer, [*corpus.targets, *(corpus.sources if config.source_vector else [])])
    run_dir = Path(config.run_dir)
    fingerprints = {"model": models.model_hash(config.model), **corpus.hashes()}
    with open_run(config, run_dir, fingerprints, [models.resolve_model(config.model), *data_paths(config.data)]):
        scores: list[dict] = []
        phases: list[dict] = []
        overlaps: list[dict] = []
        for number, seed in enumerate(config.seeds):
            folder = run_dir if number == 0 else run_dir / f"seed-{seed}"
            seed_run = SeedRun(config, corpus, tokenizer, seed, folder, console)
            seed_run.learn_all()
            scores += seed_run.evaluate_all()
            phases += seed_run.phases
            overlaps += seed_run.overlaps()
        metrics: dict[str, Any] = {"data": corpus.sizes(), "scores": scores, "phases": phases, "overlaps": overlaps}
        metrics["costs"] = None
        if config.cost_steps:
            measure = partial(measure_costs, config, corpus, tokenizer, run_dir, console)
            metrics["costs"] = processes.on_main(measure)
        metrics |= {"world_size": processes.world_size(), "seconds": time.perf_counter() - began}

        def write() -> None:
            write_json(run_dir / "metrics.json", metrics)
            report.write(run_dir, to_dict(config), metrics)

        processes.on_main(write)
    report.print_tables(to_dict(config), metrics, console)
    console.print(f"Report: {run_dir / 'report.md'}   ({metrics['seconds']:.0f} s)")
    return metrics


def data_paths(data: Any) -> list[Path]:
    """The files that a data configuration names. A run folder may be beside them, and never deletes them."""
    if isinstance(data, (NusaxData, AmericasNLIData, MasakhaNERData)):
        return sorted(path for path in Path(data.data_dir).glob("*/*") if path.suffix in (".csv", ".tsv", ".txt"))
    if isinstance(data, FilesData):
        pairs = [*parse_pairs(data.test, "test").values(), *parse_pairs(data.text, "text").values()]
        return [path for _, path in named_files([*data.train, *data.validation])] + pairs
    return []


def measure_costs(config: RunConfig, corpus: Corpus, tokenizer, run_dir: Path, console: Console) -> dict | None:
    """Memory and time of a task step, dense against the first recipe's mask, each in a fresh process."""
    recipe = next((found for text in config.recipes if (found := Recipe.of(text)).name in ("deft-x", "lt-sft")), None)
    if recipe is None:
        return None
    folder = run_dir / "phases/costs"
    if (saved := finished(folder)) is not None and saved.get("cost_steps") == config.cost_steps:
        return saved
    console.print("[bold]memory and step time[/], dense and sparse, each in a fresh process")
    from_vector = config.source_vector and len(corpus.sources) == 1
    vector = run_dir / "phases" / (f"task-{recipe.folder}" if config.source_vector else "task")
    start = vector / "start" if from_vector else run_dir / "phases/base"
    rows = tokenize_task(corpus.train, tokenizer, corpus.labels, config.task.max_length).shuffle(seed=config.seeds[0])
    collator, size = task_collator(tokenizer, corpus.task), config.task.batch_size
    count = min(costs.WARM_UP + config.cost_steps, max(1, len(rows) // size))
    batches = [collator([rows[j] for j in range(i * size, min((i + 1) * size, len(rows)))]) for i in range(count)]
    batches = [{n: torch.as_tensor(value) for n, value in batch.items() if n != "language"} for batch in batches]
    mask = vector / recipe.folder / "mask.safetensors"
    measured = costs.compare(start, mask, batches, config.cost_steps, config.device, corpus.task)
    metrics = {"recipe": str(recipe), "cost_steps": config.cost_steps, **measured}
    if processes.world_size() > 1:
        metrics["measured_on"] = "rank 0, in one process"
    finish(folder, metrics)
    return metrics


def train_language(config: TrainLanguageConfig) -> Path:
    """Learn a language vector; returns its folder (with recipe "full", that of the tuned model)."""
    processes.join(config.device)
    corpus, tokenizer = processes.main_first(lambda: (load_corpus(config), models.load_tokenizer(config.model)))
    check_fit(config.model, tokenizer, "masked-lm", config.settings, [config.recipe])
    check_texts(corpus, tokenizer, [config.language])
    parts = corpus.hashes()
    fingerprints = {name.removesuffix(f" of {config.language}"): value for name, value in parts.items()}

    def vector(builder: VectorBuilder) -> Vector:
        start = builder.mlm_start(config.settings, [config.language])
        return builder.language(config.language, start, config.settings)

    paths = [path for path in (config.text, config.validation) if path is not None]
    return _train(config, corpus, tokenizer, fingerprints, paths, vector)


def train_task(config: TrainTaskConfig) -> Path:
    """Learn a task vector; returns its folder (with recipe "full", that of the tuned model)."""
    processes.join(config.device)
    corpus, tokenizer = processes.main_first(lambda: (load_corpus(config), models.load_tokenizer(config.model)))
    added = [load_delta(path) for path in config.start_from]
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
        recipe = Recipe.of(config.recipe)
        if recipe.name == "full":
            dense_phase(vector, runtime)
            return vector.folder / "dense/model"
        learn(vector, recipe, runtime)
        return vector.deltas / recipe.folder / vector.name


def delta_hash(delta: SparseDelta) -> str:
    """SHA-256 (hex) of a delta's entries, values and whole tensors."""
    digest = hashlib.sha256(delta.mask.fingerprint().encode())
    for name, tensor in [("", delta.values), *sorted(delta.dense.items())]:
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tasks_of(metadata: dict) -> list[dict]:
    """The metadata of the task vectors of a delta: its own, or those of the deltas that it is the sum of."""
    if "labels" in metadata:
        return [metadata]
    return [task for part in metadata.get("composed_of", []) for task in tasks_of(part)]


def evaluate_vectors(config: EvalConfig) -> dict[str, float]:
    """{"macro_f1", "accuracy", "n"} on a labelled file; with entity tags also "entity_f1".

    Raises:
        ValueError: none or several of the vectors are task vectors.
    """
    processes.join(config.device)
    deltas = [load_delta(path) for path in config.vectors]
    tasks = [task for delta in deltas for task in tasks_of(delta.metadata)]
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
