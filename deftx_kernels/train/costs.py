"""Time and memory of one training step, dense and sparse: each measured in a fresh process on the same batches.

Run as `python -m deftx_kernels.train.costs REQUEST.json`; prints one line of JSON. The two processes share nothing, so
that neither measurement includes memory of the other.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from deftx_kernels.files import reading
from deftx_kernels.train.checkpoints import saving
from deftx_kernels.train.tensors import gradient_bytes, memory_in_use, peak_bytes, state_bytes

BAD_INPUT = 2  # exit code where a file cannot be read
WARM_UP = 2  # steps that are not timed: the optimizer allocates its state in the first
_TRAINED = "weights, gradients, optimizer state and activations"


def compare(
    start: Path, mask: Path, batches: list[dict], steps: int, device: str = "auto", task: str = "classification"
) -> dict:
    """{"dense": metrics, "sparse": metrics} of fine-tuning the classifier in folder `start`: all of it, or only `mask`.

    Metrics: step_seconds (p20, p50, p80), peak_bytes (see `peak_bytes_are`), gradient_bytes, optimizer_state_bytes,
    trained_entries, threads, device. `batches` are used in turn.

    Raises:
        ValueError: the model or the mask cannot be read.
        RuntimeError: a process failed otherwise.
    """
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        file, request_file = Path(folder) / "batches.pt", Path(folder) / "request.json"
        with saving(file):
            torch.save(batches, file)
        request = {"start": str(start), "batches": str(file), "steps": steps, "device": device, "task": task}
        for kind in ("dense", "sparse"):
            request_file.write_text(json.dumps({**request, "mask": str(mask) if kind == "sparse" else None}))
            command = [sys.executable, "-m", "deftx_kernels.train.costs", str(request_file)]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode != 0:
                fault = ValueError if run.returncode == BAD_INPUT else RuntimeError
                raise fault(f"measuring the {kind} step failed: {' '.join(run.stderr.strip().splitlines()[-1:])}")
            result[kind] = json.loads(run.stdout.splitlines()[-1])
    return result


def measure(start: str, mask: str | None, batches: str, steps: int, device: str, task: str) -> dict:
    """The metrics of one kind of step, in this process."""
    from deftx_kernels.mask import CSRMask
    from deftx_kernels.nn import sparsify
    from deftx_kernels.optim import SparseAdamW
    from deftx_kernels.train.models import CLASSIFIERS, freeze_for_vector

    cuda = device != "cpu" and torch.cuda.is_available()
    target = torch.device("cuda" if cuda else "cpu")
    inputs = [{name: x.to(target) for name, x in batch.items()} for batch in torch.load(batches, weights_only=True)]
    _load_libraries(target)
    before = 0 if cuda else memory_in_use() or _peak_of_process()
    with reading(start, "model folder"):
        model = CLASSIFIERS[task].from_pretrained(start, dtype=torch.float32).to(target).train()
    freeze_for_vector(model)
    optimizer: torch.optim.Optimizer
    if mask is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-5, weight_decay=0.0, fused=True)
    else:
        selected = CSRMask.load(mask, device=target)
        sparsify(model, selected)
        optimizer = SparseAdamW(model.named_parameters(), selected, lr=1e-5, weight_decay=0.0)
    result: dict = {}

    def train() -> None:
        result.update(_train(model, optimizer, inputs, steps))

    peak = peak_bytes(train, target, before)
    since = "while training"
    if peak is None:
        train()
        peak, since = _peak_of_process() - before, "since the process began"
    meaning = f"peak resident memory {since}, less that before the model was loaded: {_TRAINED}"
    return {
        **result,
        "peak_bytes": peak,
        "peak_bytes_are": f"torch.cuda.max_memory_allocated: {_TRAINED}" if cuda else meaning,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, inputs: list[dict], steps: int) -> dict:
    cuda = next(model.parameters()).is_cuda
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    seconds = []
    for step in range(WARM_UP + steps):
        synchronize()
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda and torch.cuda.is_bf16_supported()):
            loss = model(**inputs[step % len(inputs)]).loss
        loss.backward()
        gradients, entries = gradient_bytes(model), sum(p.numel() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        synchronize()
        seconds.append(time.perf_counter() - began)
    ordered = sorted(seconds[WARM_UP:])
    p20, p80 = (ordered[len(ordered) * percent // 100] for percent in (20, 80))
    return {
        "step_seconds": {"p20": p20, "p50": statistics.median(ordered), "p80": p80},
        "gradient_bytes": gradients,
        "optimizer_state_bytes": state_bytes(optimizer),
        "trained_entries": entries,
    }


def _load_libraries(device: torch.device) -> None:
    """A step of a small model, so that the code of the libraries is resident before memory is measured."""
    layers = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).to(device)
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
    layers(torch.randn(4, 16, 64, device=device)).sum().backward()
    optimizer.step()


def _peak_of_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    try:
        print(json.dumps(measure(**json.loads(Path(sys.argv[1]).read_text()))))
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(BAD_INPUT)
