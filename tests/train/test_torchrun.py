"""Runs in several processes: they end with the files and metrics of one process, also after one of them is killed."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from train_tiny import sentence, write_csv
from train_vectors import LABELS, RUNTIME, builder, labelled, phase, task_settings

from deftx_kernels import CSRMask, SparseDelta, cli
from deftx_kernels.train import checkpoints, global_batches, models, processes, recipes, trainer
from deftx_kernels.train.global_batches import LengthGroups, RankPart
from deftx_kernels.train.tokens import IGNORED
from tests.process_groups import CONTEXT

PHASE = {"lr": "0.01", "max-steps": "4", "eval-every": "2", "weight-decay": "0.01"}
TIMES = ("seconds", "median_step_seconds", "resumed_from")  # what may differ from run to run
LIMIT = 250  # seconds
STORES: list[torch.distributed.TCPStore] = []


# ---- processes ----


def environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun sets. Its store is in the agent, here in the process of the tests."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    found = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    found["OMP_NUM_THREADS"] = "1"  # without it accelerate warns
    return {**found, **{name: str(value) for name, value in names.items()}} if world > 1 else {}


def call(function: Callable, arguments: tuple, environ: dict[str, str], log: Path) -> None:
    """In a process of its own: `function`, its output in `log`."""
    os.environ.update(environ)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    torch.set_num_threads(1)
    signal.alarm(LIMIT)
    code = 1
    try:
        code = function(*arguments) or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def start(folder: Path, world: int, function: Callable, *arguments, new_store: bool = True) -> list:
    """The processes; their logs are folder/log-<rank>."""
    if new_store:
        STORES.append(torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    store = STORES[-1]
    folder.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(world):
        what = (function, arguments, environment(rank, world, store.port), folder / f"log-{rank}")
        started.append(CONTEXT.Process(target=call, args=what))
        started[-1].start()
    return started


def logs(folder: Path) -> list[str]:
    """What the processes wrote, without DDP's hint that find_unused_parameters, Trainer's default, was not needed."""
    lines = (path.read_text().splitlines() for path in sorted(folder.glob("log-*")))
    return ["".join(f"{line}\n" for line in found if "find_unused_parameters" not in line) for found in lines]


def together(folder: Path, world: int, function: Callable, *arguments, **options) -> list[int]:
    """The exit codes."""
    started = start(folder, world, function, *arguments, **options)
    for process in started:
        process.join()
    return [process.exitcode for process in started]


# ---- runs ----


def command(model: str, data: Path, run_dir: Path, **changes: str) -> list[str]:
    """A run with the language vectors in a shared folder beside its own."""
    options = {"batch-size": "8", "accumulation": "2", "max-length": "24", **changes}
    options |= {f"{phase}.{name}": value for phase in ("dense", "sparse") for name, value in PHASE.items()}
    of_vectors = [x for v in ("task", "language") for name, value in options.items() for x in (f"--{v}.{name}", value)]
    arguments = ["run", "nusax", "--data-dir", str(data), "--sources", "source", "--model", model, "--device", "cpu"]
    arguments += ["--cost-steps", "0", "--language.head-steps", "2", "--recipes", "deft-x", "--language.no-pack"]
    return [*arguments, *of_vectors, "--run-dir", str(run_dir), "--language-vectors", str(run_dir.parent / "vectors")]


@pytest.fixture(scope="module")
def still_bert(tiny_bert, tmp_path_factory) -> str:
    """tiny_bert without dropout, which differs between ranks."""
    folder = tmp_path_factory.mktemp("still-bert")
    for path in Path(tiny_bert).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Of numbers of examples that are no multiples of a batch or of 2."""
    folder = tmp_path_factory.mktemp("data")
    for number, language in enumerate(("source", "first")):
        for split, first, count in (("train", 0, 45), ("valid", 100, 17), ("test", 200, 25)):
            rows = [(i, *sentence(i + 31 * number)) for i in range(first, first + count)]
            write_csv(folder / language / f"{split}.csv", rows)
    return folder


@pytest.fixture(scope="module")
def finished(still_bert, data, tmp_path_factory) -> Path:
    """The folder of a run in one process, one/run, and of the same in two, two/run."""
    folder = tmp_path_factory.mktemp("runs")
    for name, world in (("one", 1), ("two", 2)):
        arguments = command(still_bert, data, folder / name / "run")
        assert together(folder / name, world, cli.main, arguments) == [0] * world, logs(folder / name)
    return folder


def files(folder: Path) -> set[str]:
    """Of a run and of its language vectors."""
    found = (path for name in ("run", "vectors") for path in (folder / name).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in found}


def metrics(run_dir: Path):
    def kept(value):
        if isinstance(value, dict):
            return {name: kept(inner) for name, inner in value.items() if name not in TIMES}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    return kept(json.loads((run_dir / "metrics.json").read_text()))


def test_two_processes_end_like_one(finished):
    one, two = (metrics(finished / name / "run") for name in ("one", "two"))
    assert files(finished / "one") == files(finished / "two")
    assert (one.pop("world_size"), two.pop("world_size")) == (1, 2)
    assert one["scores"] == two["scores"]
    assert len(one["phases"]) == len(two["phases"]) == 4
    for first, second in zip(one["phases"], two["phases"]):
        assert (first["world_size"], second["world_size"]) == (1, 2)
        assert first["steps"] == second["steps"] == 4
        for name in ("loss", "validation_loss"):
            assert [step for step, _ in first[name]] == [step for step, _ in second[name]] == [2, 4]
            losses = [[loss for _, loss in found[name]] for found in (first, second)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-3)
        if "perplexity" in first:
            assert second["perplexity"] == pytest.approx(first["perplexity"], rel=1e-3)
    for vector in ("run/phases/task", "vectors/phases/language-first"):
        masks = [CSRMask.load(finished / f"{name}/{vector}/deft-x/mask.safetensors") for name in ("one", "two")]
        assert masks[0].nnz == masks[1].nnz
        assert (masks[0] & masks[1]).nnz > 0.95 * masks[0].nnz
    said = logs(finished / "two")
    assert said[0].count("Report:") == 1
    assert "of 2 processes" in (finished / "two/run/report.md").read_text()
    assert not said[1]


def test_a_second_call_repeats_nothing(finished, still_bert, data, monkeypatch):
    shutil.copytree(finished / "two/run", finished / "two/again")  # the call writes metrics of one process
    monkeypatch.setattr(recipes, "train_phase", lambda *_, **__: pytest.fail("trained again"))
    arguments = command(still_bert, data, finished / "two/again")
    with contextlib.redirect_stdout(io.StringIO()):
        assert cli.main(arguments) == 0


def test_evaluation_is_that_of_one_process(finished, data, still_bert, tmp_path):
    vectors = [
        str(finished / f"one/{name}") for name in ("run/deltas/deft-x/task", "vectors/deltas/deft-x/language-first")
    ]
    arguments = ["eval", "--test", str(data / "first/test.csv"), "--device", "cpu", "--vectors", *vectors]
    arguments += ["--batch-size", "7", "--model", str(finished / "one/run/phases/base")]
    tokenizer = Path(still_bert)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (finished / "one/run/phases/base" / name).write_bytes((tokenizer / name).read_bytes())
    assert together(tmp_path, 2, cli.main, arguments) == [0, 0], logs(tmp_path)
    scores = metrics(finished / "one/run")["scores"]
    (expected,) = (s for s in scores if (s["kind"], s["language"]) == ("composed", "first"))
    found = json.loads(logs(tmp_path)[0].splitlines()[-1])
    assert found == {name: expected[name] for name in found}
    assert not logs(tmp_path)[1]


# ---- errors ----


def test_a_batch_that_cannot_be_divided(still_bert, data, tmp_path):
    arguments = command(still_bert, data, tmp_path / "run", **{"batch-size": "3"})
    assert together(tmp_path, 2, cli.main, arguments) == [2, 2]
    said = "".join(logs(tmp_path))
    assert said.count("batch_size = 3, which 2 processes divide, is not a multiple of 2") == 1
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def failing(rank: int, arguments: list[str]) -> int:
    """The command, with an error in the dense phase of one rank."""

    def fail(*_, **__):
        raise ValueError("out of luck")

    if os.environ["RANK"] == str(rank):
        if rank == 0:
            checkpoints.write_json = fail
        else:
            recipes.train_phase = fail
    return cli.main(arguments)


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_ends_all(still_bert, data, tmp_path, rank):
    codes = together(tmp_path, 2, failing, rank, command(still_bert, data, tmp_path / "run"))
    assert 0 not in codes
    assert codes[rank] == 2
    said = logs(tmp_path)
    assert "deftx: out of luck\n" in said[rank]
    assert "out of luck" not in said[1 - rank]
    assert "Traceback" not in "".join(said)


def test_settings_that_cannot_be_trained_together(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="mpirun started several"):
        processes.join("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP: deftx trains with DDP"):
        processes.join("cpu")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes on a machine with 1 GPUs"):
        processes.join("auto")


# ---- batches ----


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("count", [1, 4, 6, 7])
def test_the_parts_of_a_batch(monkeypatch, world, count):
    def collate(rows):
        return {"x": torch.tensor([row["x"] for row in rows]), "labels": torch.tensor([row["labels"] for row in rows])}

    rows = [{"x": i, "labels": [i, IGNORED, i] if i % 3 else [i, IGNORED, IGNORED]} for i in range(count)]
    monkeypatch.setattr(global_batches, "world_size", lambda: world)
    parts = []
    for rank in range(world):
        monkeypatch.setattr(global_batches, "rank", lambda rank=rank: rank)
        parts.append(RankPart(collate)(rows))
    assert len({len(part["x"]) for part in parts}) == 1
    assert torch.cat([part["x"] for part in parts])[:count].tolist() == list(range(count))
    labels = torch.cat([part["labels"] for part in parts])
    assert labels[:count].tolist() == [row["labels"] for row in rows]
    assert bool((labels[count:] == IGNORED).all())
    assert {part["rows"] for part in parts} == {count}
    labelled_here = torch.tensor([float((part["labels"] != IGNORED).sum()) for part in parts])
    shares = torch.tensor([part["share"] for part in parts])
    assert torch.allclose(shares, labelled_here / labelled_here.mean())


def test_the_order_of_length_groups():
    rows = [{"input_ids": [0] * (1 + i % 7)} for i in range(40)]
    orders = []
    for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0)):
        sampler = LengthGroups(8, rows, seed)
        torch.manual_seed(len(orders))
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]
    assert all(sorted(order) == list(range(40)) for order in orders)


def train_by_source(model: str, folder: Path) -> None:
    """Both phases with the vectors of two source languages; losses and counts of validated examples as JSON."""
    processes.join("cpu")
    rows = labelled(0, 41).add_column("language", [i % 2 for i in range(41)])
    build = builder(model, folder, rows)
    build.corpus.validation = labelled(100, 97).add_column("language", [int(i > 33) for i in range(97)])
    score, counts = trainer.classification_metrics, set()

    def counted(prediction, labels=()):
        counts.add((len(prediction.predictions), len(prediction.label_ids)))
        return score(prediction, labels)

    trainer.classification_metrics = counted
    settings = task_settings(phase(max_steps=4, eval_every=2))
    settings.accumulation = 2
    vector = build.task(settings, by_source=[some_delta(build.base(), seed) for seed in (1, 2)])
    mask = CSRMask.from_dense({"bert.encoder.layer.0.attention.self.query.weight": torch.eye(32) > 0})
    found = [recipes.dense_phase(vector, RUNTIME), recipes.sparse_phase(vector, mask, folder / "sparse", RUNTIME)[1]]
    if processes.rank() == 0:
        losses = [metrics["loss"] for metrics in found]
        scores = [metrics["validation_macro_f1"] for metrics in found]
        (folder / "found.json").write_text(json.dumps([losses, scores, sorted(counts)]))
    processes.leave()


def some_delta(base: Path, seed: int) -> SparseDelta:
    model = models.load_classifier(base, LABELS)
    name = "bert.encoder.layer.1.output.dense.weight"
    weight = model.get_parameter(name).detach()
    random = torch.Generator().manual_seed(seed)
    mask = CSRMask.from_dense({name: torch.rand(weight.shape, generator=random) < 0.3})
    tuned = {name: weight.clone()}
    mask.add_(tuned, 0.3 * torch.randn(mask.nnz, generator=random))
    return SparseDelta.from_models(tuned, {name: weight}, mask=mask)


def test_several_source_languages(still_bert, tmp_path):
    for name, world in (("one", 1), ("two", 2)):
        assert together(tmp_path / name, world, train_by_source, still_bert, tmp_path / name) == [0] * world, logs(
            tmp_path / name
        )
    one, two = (json.loads((tmp_path / name / "found.json").read_text()) for name in ("one", "two"))
    for first, second in zip(one[0], two[0]):
        assert [step for step, _ in first] == [step for step, _ in second] == [2, 4]
        assert [loss for _, loss in second] == pytest.approx([loss for _, loss in first], rel=1e-3)
    assert one[1] == two[1]
    assert one[2] == two[2] == [[97, 97]]


# ---- restarts ----


def wait_for(path: Path, alive: Callable[[], bool]) -> None:
    while not path.exists():
        assert alive(), f"it ended before it wrote {path}"
        time.sleep(0.05)


def joining(restart: int) -> int:
    """Join, and end without leaving if this is not a restart."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(restart)
    processes.join("cpu")
    processes.barrier()
    if processes.rank() == 0:
        assert processes.first_to_fail()
    if restart:
        processes.leave()
    return 3 - restart


def test_a_restart_in_the_same_store(tmp_path):
    """torchrun keeps its store, with the addresses and marks of the processes that were killed."""
    assert together(tmp_path, 2, joining, 0) == [3, 3], logs(tmp_path)
    assert together(tmp_path, 2, joining, 1, new_store=False) == [2, 2], logs(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_killed_and_called_again(tiny_bert, data, tmp_path, killed):
    """With dropout and batches of similar length, whose order depends on the epoch."""
    more = ["--task.group-by-length", "--language.group-by-length"]
    for name in ("whole", "run"):
        (tmp_path / name).mkdir()
    whole = [*command(tiny_bert, data, tmp_path / "whole/run"), *more]
    assert together(tmp_path / "whole", 2, cli.main, whole) == [0, 0], logs(tmp_path / "whole")
    arguments = [*command(tiny_bert, data, tmp_path / "run/run"), *more]
    for phase_folder in ("run/phases/task/dense", "vectors/phases/language-first/deft-x"):
        started = start(tmp_path / "run", 2, cli.main, arguments)
        state = tmp_path / f"run/{phase_folder}/checkpoints/checkpoint-2/trainer_state.json"
        wait_for(state, started[0].is_alive)
        started[killed].kill()
        for process in started:
            process.join()
    assert together(tmp_path / "run", 2, cli.main, arguments) == [0, 0], logs(tmp_path / "run")
    assert metrics(tmp_path / "run/run") == metrics(tmp_path / "whole/run")
    resumed = [p["resumed_from"] for p in json.loads((tmp_path / "run/run/metrics.json").read_text())["phases"]]
    assert resumed.count("checkpoint-2") == 2


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_continued_with_another_number_of_processes(finished, still_bert, data, tmp_path, first, second):
    """Without dropout it ends like a run in one process."""
    arguments = command(still_bert, data, tmp_path / "run")
    started = start(tmp_path, first, cli.main, arguments)
    wait_for(tmp_path / "run/phases/task/dense/checkpoints/checkpoint-2/trainer_state.json", started[0].is_alive)
    for process in started:
        process.kill()
        process.join()
    assert together(tmp_path, second, cli.main, arguments) == [0] * second, logs(tmp_path)
    one, found = metrics(finished / "one/run"), metrics(tmp_path / "run")
    assert found["scores"] == one["scores"]
    assert found["world_size"] == second
    assert found["phases"][0]["loss"][1][1] == pytest.approx(one["phases"][0]["loss"][1][1], rel=1e-3)


def launcher(*arguments: str) -> subprocess.Popen:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", *arguments], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill(finished, still_bert, data, tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    process = launcher(*torchrun, "-m", "deftx_kernels.cli", *command(still_bert, data, tmp_path / "run"))
    wait_for(
        tmp_path / "run/phases/task/dense/checkpoints/checkpoint-2/trainer_state.json", lambda: process.poll() is None
    )
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if "RANK" in p.environ()]
    next(p for p in ranks if p.environ()["RANK"] == "0").kill()
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert said.count("Report:") == 1
    assert metrics(tmp_path / "run") == metrics(finished / "two/run")
    assert files(tmp_path) == files(finished / "two")


@pytest.mark.slow
def test_accelerate_launch(finished, still_bert, data, tmp_path):
    options = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    accelerate = ["accelerate.commands.launch", "--multi_gpu", *options, "--main_process_port", "0"]
    process = launcher(*accelerate, "-m", "deftx_kernels.cli", *command(still_bert, data, tmp_path / "run"))
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert metrics(tmp_path / "run") == metrics(finished / "two/run")


@pytest.mark.slow
def test_two_machines(finished, still_bert, data, tmp_path):
    """Two launchers of one process each, as on two machines with a shared folder."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{s.getsockname()[1]}"
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", where]
    torchrun = ["torch.distributed.run", *options, "--rdzv-id", "deftx", "--local-addr", "127.0.0.1"]
    arguments = ["-m", "deftx_kernels.cli", *command(still_bert, data, tmp_path / "run")]
    machines = [launcher(*torchrun, *arguments) for _ in range(2)]
    said = [process.communicate()[0] for process in machines]
    assert [process.returncode for process in machines] == [0, 0], said
    assert "".join(said).count("Report:") == 1
    assert metrics(tmp_path / "run") == metrics(finished / "two/run")
    assert files(tmp_path) == files(finished / "two")
