"""Weight sync with sparse patches: a training and a generating process; patch sizes and times by learning rate.

`python -m bench weight-sync` trains a small Llama on the project's own texts (bytes are tokens), in bfloat16 with
float32 master weights. After each step another process takes the patch, compares its weights bit for bit, and generates
a text. Then it measures the patches of further learning rates, and the time that getting a patch takes. It adds rows to
bench/results/weight_sync.csv and draws weight_sync.png from the newest ones.

`python -m bench.weight_sync FOLDER VERSIONS LAYERS HIDDEN` is the generating process.
"""

import csv
import hashlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import silence_libraries
from bench.rows import ROOT, provenance
from deftx_kernels import PatchReader, PatchWriter, SparseAdamW, SparsePatch
from deftx_kernels.files import read_json, replaced, write_json

RATES = (1e-6, 3e-6, 1e-5, 1e-4, 1e-3)
RATE = 3e-6  # usual in reinforcement learning
TEXTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md")
BATCH, LENGTH, GENERATED = 4, 128, 8  # texts, and tokens of each
WAIT = 600  # seconds that a process waits for the other one
COLUMNS = (
    "date", "op", "implementation", "parameters", "lr", "step", "changed", "bytes", "compact_bytes", "ms", "device",
    "threads", "driver", "torch", "triton", "commit",
)  # fmt: skip
Row = dict[str, Any]


# ---- training ----
def llama(layers: int, hidden: int, seed: int) -> nn.Module:
    """A Llama for bytes, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = dict(hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    tokens = dict(vocab_size=256, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens, tie_word_embeddings=True)).to(torch.bfloat16)


def texts() -> Tensor:
    """The project's texts, one after the other: bytes, int64."""
    content = b"".join((ROOT / name).read_bytes() for name in TEXTS)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).long()


class Training:
    """Steps of next-token prediction, and the patch of each."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        self.model, self.tokens = model, texts()
        self.generator = torch.Generator().manual_seed(0)
        options = dict(weight_decay=0.0, master=True, track_changes=True)
        self.optimizer = SparseAdamW(model.named_parameters(), None, lr=lr, **options)

    def step(self) -> float:
        """Returns the loss."""
        starts = torch.randint(len(self.tokens) - LENGTH, (BATCH, 1), generator=self.generator)
        ids = self.tokens[starts + torch.arange(LENGTH)]
        loss = self.model(input_ids=ids, labels=ids).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def take_patch(self) -> SparsePatch:
        """What the steps since the last call changed."""
        return self.optimizer.take_patch(self.model)


class Snapshot:
    """A copy of a model's weights, and what they became since the last call."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.copy = {n: p.detach().clone() for n, p in model.named_parameters()}

    def take_patch(self) -> SparsePatch:
        patch = SparsePatch.diff(self.model, self.copy)
        patch.apply_(self.copy, verify=False)
        return patch

    def take_entries(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The same in plain torch: flat indices and values."""
        entries = {}
        for name, parameter in self.model.named_parameters():
            new, old = (t.detach().view(-1) for t in (parameter, self.copy[name]))
            index = (new.view(torch.int16) != old.view(torch.int16)).nonzero().view(-1)
            entries[name] = index.to(torch.int32), new[index]
            old[index] = new[index]
        return entries


# ---- two processes ----
def digest(model: nn.Module) -> str:
    """SHA-256 of the state dict: of its names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def wait_for(path: Path, is_running: Callable[[], bool]) -> Any:
    """The content of a JSON file that another process writes."""
    for _ in range(100 * WAIT):
        if path.exists():
            return read_json(path)
        if not is_running():
            break
        time.sleep(0.01)
    raise RuntimeError(f"the other process has not written {path.name}")


def synchronized(folder: Path, steps: int, layers: int, hidden: int, lr: float) -> Iterator[Row]:
    """Train, and give each version to a generating process. Rows: version, loss, patch, and what the process wrote.
    RuntimeError unless its weights are the same, bit for bit, at each version.
    """
    model = llama(layers, hidden, seed=0)
    training, writer = Training(model, lr), PatchWriter(folder / "channel")
    command = [sys.executable, "-m", "bench.weight_sync", str(folder), *map(str, (steps + 1, layers, hidden))]
    receiver = subprocess.Popen(command, cwd=ROOT)
    try:
        for step in range(steps + 1):
            loss = training.step() if step else float("nan")
            patch = training.take_patch() if step else None
            number = writer.write(model, patch)
            found = wait_for(folder / f"{number}.json", lambda: receiver.poll() is None)
            if found["digest"] != (expected := digest(model)):
                raise RuntimeError(f"version {number} is {found['digest']} in the generating process, not {expected}")
            yield {"version": number, "loss": loss, "patch": patch, **found}
        if receiver.wait(WAIT):
            raise RuntimeError(f"the generating process ended with {receiver.returncode}")
    finally:
        receiver.kill()
        receiver.wait()


def generate(folder: Path, versions: int, layers: int, hidden: int) -> None:
    """Take each version, say which weights it gave, and generate from them."""
    silence_libraries()
    model, reader = llama(layers, hidden, seed=1).eval(), PatchReader(folder / "channel")
    prompt = torch.tensor([list(b"sparse ")])
    for version in range(1, versions + 1):
        deadline = time.monotonic() + WAIT
        while reader.update(model) < version:
            if time.monotonic() > deadline:
                raise RuntimeError(f"version {version} has not come")
            time.sleep(0.01)
        with torch.no_grad():
            tokens = model.generate(prompt, max_new_tokens=GENERATED, do_sample=False)[0, prompt.shape[1] :]
        write_json(folder / f"{version}.json", {"digest": digest(model), "tokens": tokens.tolist()})


# ---- measurements ----
def patch_row(patch: SparsePatch, folder: Path, op: str, lr: float, step: int) -> Row:
    """The size of a patch and of its files."""
    sizes = []
    for compact in (False, True):
        patch.save(folder / "patch", compact)
        sizes.append((folder / "patch").stat().st_size)
    return {"op": op, "lr": lr, "step": step, "changed": patch.nnz, "bytes": sizes[0], "compact_bytes": sizes[1]}


def patch_sizes(weights: dict[str, Tensor], steps: int, layers: int, hidden: int, folder: Path) -> Iterator[Row]:
    """The patches of each learning rate, from the same weights on."""
    for lr in RATES:
        model = llama(layers, hidden, seed=0)
        model.load_state_dict(weights)
        training = Training(model, lr)
        for step in range(1, steps + 1):
            training.step()
            yield patch_row(training.take_patch(), folder, "patch size", lr, step)


def times(rounds: int, layers: int, hidden: int) -> Iterator[Row]:
    """Milliseconds of getting the patch of a step: the median of the rounds, after one that is not counted."""
    model = llama(layers, hidden, seed=0)
    training = Training(model, RATE)
    methods: dict[str, Callable[[], Any]] = {
        "deftx, tracking": training.take_patch,
        "deftx, snapshot and bit_diff": Snapshot(model).take_patch,
        "torch, snapshot and !=": Snapshot(model).take_entries,
    }
    found: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds + 1):
        training.step()
        for name, method in methods.items():
            start = time.perf_counter()
            method()
            found[name].append(1000 * (time.perf_counter() - start))
    parameters = sum(p.numel() for p in model.parameters())
    for name, values in found.items():
        median = statistics.median(values[1:])
        yield {"op": "patch time", "implementation": name, "lr": RATE, "ms": f"{median:.2f}", "parameters": parameters}


def measure(out: Path, quick: bool) -> int:
    """Prove, measure, write rows and draw them."""
    silence_libraries()
    layers, hidden, steps = (2, 64, 5) if quick else (4, 256, 50)
    shared, rows = provenance("cpu"), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for row in synchronized(folder, steps, layers, hidden, RATE):
            if row["patch"] is not None:
                rows.append(patch_row(row["patch"], folder, "weight sync", RATE, row["version"] - 1))
        print(f"{steps} steps at lr {RATE:g}: the generating process had the weights of each, bit for bit")
        start = Training(llama(layers, hidden, seed=0), 1e-3)
        losses = [start.step() for _ in range(4 * steps)]
        print(f"{len(losses)} steps at lr 0.001 for the start weights: loss {losses[0]:.2f} to {losses[-1]:.2f}")
        rows += patch_sizes(start.model.state_dict(), max(5, steps // 2), layers, hidden, folder)
    parameters = sum(p.numel() for p in start.model.parameters())
    rows += times(3 if quick else 9, *((layers, hidden) if quick else (8, 1024)))
    rows = [{"parameters": parameters, **shared, **row} for row in rows]
    path = out / "weight_sync.csv"
    append(rows, path)
    plot(rows, out / "weight_sync.png")
    print(summary(rows), f"written: {path}, {path.with_suffix('.png')}", sep="\n")
    return 0


def append(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    old = list(csv.DictReader(path.open(newline=""))) if path.exists() else []
    with replaced(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows([*old, *rows])


# ---- report ----
def medians(rows: list[Row], column: str) -> list[float]:
    """Of each learning rate, over its steps: the column's median per parameter."""
    of_rate = ([r[column] / r["parameters"] for r in rows if r["op"] == "patch size" and r["lr"] == lr] for lr in RATES)
    return [statistics.median(values) for values in of_rate]


def summary(rows: list[Row]) -> str:
    """Tables in Markdown."""
    lines = ["| lr | changed | bytes per change | compact | of a bfloat16 copy |", "| --- | --- | --- | --- | --- |"]
    for lr, changed, plain, compact in zip(RATES, *(medians(rows, c) for c in ("changed", "bytes", "compact_bytes"))):
        per_change = [f"{size / changed:.1f}" if changed else "" for size in (plain, compact)]
        lines.append(f"| {lr:g} | {changed:.2%} | {' | '.join(per_change)} | {compact / 2:.2%} |")
    lines += ["", "| patch of a step, by | ms | parameters |", "| --- | --- | --- |"]
    timed = [row for row in rows if row["op"] == "patch time"]
    return "\n".join(lines + [f"| {row['implementation']} | {row['ms']} | {row['parameters']:.2g} |" for row in timed])


def plot(rows: list[Row], path: Path) -> None:
    """The sizes by learning rate, and the times."""
    import matplotlib
    from matplotlib.figure import Figure

    from bench.figures import BLUE, GREY, STYLE, WIDTH

    timed = [row for row in rows if row["op"] == "patch time"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        sizes, bars = figure.subplots(1, 2)
        for column, label, color in (("bytes", "int32 indices", GREY), ("compact_bytes", "compact", BLUE)):
            sizes.plot(RATES, [50 * size for size in medians(rows, column)], "o-", label=label, color=color)
        sizes.plot(RATES, [100 * share for share in medians(rows, "changed")], "k:", label="entries that change")
        sizes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="% of all weights")
        sizes.set_title("Patch of a step, bfloat16")
        sizes.grid(axis="y")
        sizes.legend()
        names = [row["implementation"] for row in timed]
        colors = [BLUE if name.startswith("deftx") else GREY for name in names]
        bars.barh(names, [float(row["ms"]) for row in timed], color=colors)
        bars.invert_yaxis()
        bars.set_xlabel("milliseconds")
        bars.set_title(f"Getting the patch, {timed[0]['parameters'] / 1e6:.0f} M parameters")
        figure.savefig(path, bbox_inches="tight", facecolor="white")


if __name__ == "__main__":
    generate(Path(sys.argv[1]), *map(int, sys.argv[2:5]))
