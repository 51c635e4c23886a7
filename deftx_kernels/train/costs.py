"""What one training step costs, dense and sparse: each measured in a fresh process on the same batches.

Run as `python -m deftx_kernels.train.costs REQUEST.json`; prints one line of JSON. Nothing is shared between the two
processes, so neither sees memory that the other left behind.
"""

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from deftx_kernels.files import reading
from deftx_kernels.train.tensors import gradient_bytes, saving, state_bytes

BAD_INPUT = 2  # exit code where a file cannot be read
WARM_UP = 2  # steps before the clock starts: the optimizer allocates its state in the first


def compare(
    start: Path, mask: Path, batches: list[dict], steps: int, device: str = "auto", task: str = "classification"
) -> dict:
    """{"dense": facts, "sparse": facts} of fine-tuning the classifier in folder `start`, all of it or the entries of
    `mask`.

    Facts: step_seconds (p20, p50, p80), peak_bytes (see `peak_bytes_are`), gradient_bytes, optimizer_state_bytes,
    trained_entries, threads, device. `batches` are used in turn.

    Raises:
        ValueError: the model or the mask cannot be read.
        RuntimeError: a process failed otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        with saving(Path(folder)):
            torch.save(batches, Path(folder) / "batches.pt")
        result = {}
        for kind in ("dense", "sparse"):
            request = {
                "start": str(start), "mask": str(mask) if kind == "sparse" else None, "batches": str(Path(folder) / "batches.pt"),
                "steps": steps, "device": device, "task": task,
            }  # fmt: skip
            (Path(folder) / "request.json").write_text(json.dumps(request))
            command = [sys.executable, "-m", "deftx_kernels.train.costs", str(Path(folder) / "request.json")]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode != 0:
                fault = ValueError if run.returncode == BAD_INPUT else RuntimeError
                raise fault(f"measuring the {kind} step failed: {' '.join(run.stderr.strip().splitlines()[-1:])}")
            result[kind] = json.loads(run.stdout.splitlines()[-1])
    return result


def measure(start: str, mask: str | None, batches: str, steps: int, device: str, task: str) -> dict:
    """The facts of one kind of step, in this process."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    from deftx_kernels.mask import CSRMask
    from deftx_kernels.nn import sparsify
    from deftx_kernels.optim import SparseAdamW
    from deftx_kernels.train.models import freeze_for_vector

    cuda = device != "cpu" and torch.cuda.is_available()
    where = torch.device("cuda" if cuda else "cpu")
    inputs = [
        {name: tensor.to(where) for name, tensor in batch.items()} for batch in torch.load(batches, weights_only=True)
    ]
    _load_libraries(where)
    before = _resident_bytes()
    auto = AutoModelForTokenClassification if task == "token-classification" else AutoModelForSequenceClassification
    with reading(start, "model folder"):
        model = auto.from_pretrained(start, dtype=torch.float32).to(where).train()
    freeze_for_vector(model)
    optimizer: torch.optim.Optimizer
    if mask is None:
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0, fused=True
        )
    else:
        selected = CSRMask.load(mask, device=where)
        sparsify(model, selected)
        optimizer = SparseAdamW(model.named_parameters(), selected, lr=1e-5, weight_decay=0.0)
    reset = _reset_peak(cuda)
    seconds = []
    for step in range(WARM_UP + steps):
        _synchronize(cuda)
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=cuda and torch.cuda.is_bf16_supported()):
            loss = model(**inputs[step % len(inputs)]).loss
        loss.backward()
        gradients, entries = gradient_bytes(model), sum(p.numel() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()
        _synchronize(cuda)
        seconds.append(time.perf_counter() - began)
    seconds = sorted(seconds[WARM_UP:])
    return {
        "step_seconds": {f"p{q}": _quantile(seconds, q) for q in (20, 50, 80)},
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else _peak_resident_bytes(reset) - before,
        "peak_bytes_are": _meaning(cuda, reset),
        "gradient_bytes": gradients,
        "optimizer_state_bytes": state_bytes(optimizer),
        "trained_entries": entries,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def _load_libraries(where: torch.device) -> None:
    """A step of a small model, so that the code of the libraries is resident before memory is measured."""
    layers = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).to(where)
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)
    layers(torch.randn(4, 16, 64, device=where)).sum().backward()
    optimizer.step()


def _quantile(ordered: list[float], percent: int) -> float:
    return (
        statistics.median(ordered) if percent == 50 else ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
    )


def _synchronize(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def _meaning(cuda: bool, reset: bool) -> str:
    if cuda:
        return "torch.cuda.max_memory_allocated: weights, gradients, optimizer state and activations"
    since = "while training" if reset else "since the process began"
    return f"peak resident memory {since}, less that before the model was loaded: weights, gradients, optimizer state and activations"


def _reset_peak(cuda: bool) -> bool:
    """Start the peak anew, so that loading the model does not count; on the CPU that needs Linux."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _resident_bytes() -> int:
    now = _status("VmRSS")
    return now if now is not None else _peak_resident_bytes(False)


def _peak_resident_bytes(reset: bool) -> int:
    peak = _status("VmHWM") if reset else None
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    try:
        print(json.dumps(measure(**json.loads(Path(sys.argv[1]).read_text()))))
    except (ValueError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(BAD_INPUT)
