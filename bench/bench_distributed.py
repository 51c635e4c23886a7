"""distributed_step: one step of fine-tuning in two processes, ours against dense AdamW under DDP and FSDP2.

The models, masks and settings are those of the training steps (bench_steps.py), in float32. Each of the two processes
of a gloo group on the CPU, over the loopback device, has one thread and half of the batch. An implementation has
processes of its own, which wait while others take a step. Where memory is short for all at once, the processes of one
end before those of the next start, and steps are not interleaved.

- ours: a sparsified model under DDP, which all-reduces compact gradients.
- "masked_allreduce_hook": a plain model under DDP, of whose dense gradients the masked entries are all-reduced.
- "sparsified, FSDP2": a sparsified model, then sharded by `fully_shard`: FSDP2 reduces compact gradients.
- "FSDP2" (ours): a plain model, sharded by `fully_shard`, and `SparseAdamW`; gradients are dense.
- "DDP" and "FSDP2": `torch.optim.AdamW(fused=True)`.
- "PEFT LoRA": rank 16 at all linear layers, under DDP. It trains fewer values: a point of reference.

DDP runs at its best settings here: gradients are views of its buckets, and buffers, which are constant, are not sent.
FSDP2 has a group for each layer and one for the rest.

Check: the mean over the processes of the losses of three steps is that of the same method in one process with the
whole batch.

Measured in the first process, in the third of these steps: the bytes that it sends with ring algorithms, from what
`CollectiveCounter` sees (sent_bytes_per_param), the bytes that the operating system says it has written
(wire_bytes_per_param: gloo's reduce-scatter is an all-reduce), the bytes of parameters, gradients, optimizer state and
masks, and the peak of memory in that step, without what was in use before the model was made. Nothing is counted in the
steps that are timed. All bytes per parameter are divided by the parameters of the whole model.
"""

import os
import shutil
import statistics
import tempfile
import traceback
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench import scale
from bench.bench_steps import LORA, LORA_RANK, SETTINGS, Trainers, flops, fused_adamw, has, peft_config
from bench.collectives import CollectiveCounter, written_bytes
from bench.harness import Case, Choice, Workload, available_bytes, too_large, trim, workload
from bench.rows import OURS
from bench.step_models import MODELS, build, make_batch
from deftx_kernels import CSRMask, SparseAdamW, sparsify
from deftx_kernels.distributed import MaskedAllreduceState, masked_allreduce_hook
from deftx_kernels.mask.shards import local_tensor
from deftx_kernels.nn import masked_parameters, sharded
from deftx_kernels.train.tensors import memory_in_use, peak_bytes, state_bytes

OPS = {"distributed_step": "one step of fine-tuning in two processes of one thread: forward, loss, backward, optimizer"}
SIZES = ("tiny", "minilm", "xlmr")
WORLD = 2
DDP, FSDP2 = "DDP", "FSDP2"
HOOK, SPARSIFIED_FSDP2 = f"{OURS}, masked_allreduce_hook", f"{OURS}, sparsified, FSDP2"
OURS_FSDP2 = f"{OURS}, FSDP2"
DENSE_DDP, DENSE_FSDP2, LORA_DDP = "DDP, torch AdamW fused", "FSDP2, torch AdamW fused", f"{LORA}, DDP"
# Name → method, and what the model is wrapped in.
IMPLEMENTATIONS = {
    OURS: ("sparsified", DDP),
    HOOK: ("masked", DDP),
    SPARSIFIED_FSDP2: ("sparsified", FSDP2),
    OURS_FSDP2: ("masked", FSDP2),
    DENSE_DDP: ("dense", DDP),
    DENSE_FSDP2: ("dense", FSDP2),
    LORA_DDP: ("LoRA", DDP),
}
# Name → the method that has the same losses in one process.
REFERENCES = {name: "sparsified" if method == "masked" else method for name, (method, _) in IMPLEMENTATIONS.items()}
CHECKED_STEPS = 3
SECONDS = 600  # that the processes have for an answer
PRELOADED = [  # imported once for all processes
    "bench.bench_distributed",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "transformers.models.bert.modeling_bert",
    "transformers.models.xlm_roberta.modeling_xlm_roberta",
    "peft",
]


def workloads(choice: Choice) -> Iterator[Workload]:
    """None on a GPU: two processes of NCCL need two."""
    for size in choice.sizes if choice.device == "cpu" and dist.is_gloo_available() else ():
        # XLM-R base takes minutes at each density.
        densities = [(torch.float32, 0.05), *([(torch.float32, 0.01)] if size == "minilm" else [])]
        for setting in choice.settings(densities):
            title = f"{size}, {MODELS[size]}"
            yield workload(distributed_case, "distributed_step", size, setting, choice.device, title=title)


# ---- in one process ----
class Training:
    """A method's model and optimizer, on this rank's part of the batch. `wrapped`: in DDP, FSDP2 or nothing ("")."""

    def __init__(
        self, size: str, dtype: torch.dtype, mask: CSRMask, method: str, wrapped: str, rank: int = 0, world: int = 1
    ) -> None:
        shape = MODELS[size]
        self.batch = {name: t.chunk(world)[rank] for name, t in make_batch(shape, dtype, "cpu").items()}
        self.masks: list[CSRMask] = []
        self.hook_state: MaskedAllreduceState | None = None
        torch.manual_seed(0)  # of LoRA's start
        model = build(shape, dtype, "cpu")
        if method == "sparsified":
            sparsify(model, mask)
        elif method == "LoRA":
            model = with_lora(model, mask)
        self.model = shard(model) if wrapped == FSDP2 else model
        if method in ("dense", "LoRA"):
            self.optimizer: torch.optim.Optimizer = fused_adamw(model)
        else:
            self.optimizer = SparseAdamW(model.named_parameters(), mask, **SETTINGS)
            self.masks = [mask, *(record.mask for record in masked_parameters(model).values())]
        if wrapped == DDP:
            options = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
            self.model = nn.parallel.DistributedDataParallel(model, **options)
            if method == "masked":
                self.hook_state = MaskedAllreduceState(self.model.named_parameters(), mask)
                self.model.register_comm_hook(self.hook_state, masked_allreduce_hook)

    def backward(self) -> Tensor:
        """The loss, float32 []."""
        logits = self.model(self.batch["input_ids"]).logits
        loss = nn.functional.cross_entropy(logits.float(), self.batch["labels"])
        loss.backward()
        return loss.detach()

    def step(self) -> float:
        """The loss before the step."""
        loss = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)

    def count(self, before: int | None) -> dict[str, Any]:
        """What a step sends and holds, in bytes, and its loss. `before`: memory in use before the model was made."""
        found: dict[str, Any] = {}

        def counted_step() -> None:
            written = written_bytes()
            with CollectiveCounter() as counter:
                found["loss"] = float(self.backward())
                found["gradient"] = bytes_of(p.grad for p in self.model.parameters() if p.grad is not None)
                self.optimizer.step()
            if written is not None:
                found["wire"] = (written_bytes() or 0) - written
            self.optimizer.zero_grad()
            found["sent"] = round(counter.traffic.sent(dist.get_world_size()))

        peak = peak_bytes(counted_step, before=before)
        if not found:  # this system reports no peak
            counted_step()
        found["weight"] = bytes_of(self.model.parameters())
        found["state"] = state_bytes(self.optimizer)
        indices = (t for m in self.held_masks() for t in (m.crow_indices, m.col_indices))
        found["mask"] = bytes_of(t for t in indices if t is not None)  # a FullMask has no columns
        return found if peak is None else found | {"peak": peak}

    def held_masks(self) -> list[CSRMask]:
        """All masks that training keeps: the whole one, those of layers, of the optimizer's buckets, of the rows of
        sharded layers, and of DDP's buckets."""
        held = [*self.masks, *(bucket.mask for bucket in getattr(self.optimizer, "_buckets", ()))]
        held += [batch.mask for batch in sharded._batches.get(self.optimizer, ([], []))[1]]
        return held if self.hook_state is None else [*held, *self.hook_state._of_buckets.values()]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of this rank's parts; shared memory counts once."""
    storages = (local_tensor(t).untyped_storage() for t in tensors)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def shard(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model.base_model.encoder.layer:
        fully_shard(layer)
    return fully_shard(model)


def with_lora(model: nn.Module, mask: CSRMask) -> nn.Module:
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft_config(LORA, mask.nnz, model)).train()


# ---- two processes ----
def serve(connection: Any, rank: int, store: Path, mask: Path, *arguments: Any) -> None:
    """A process: answers requests with ("", result), or with (an error's traceback, None), until there are no more."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of FSDP2's calls of torch.distributed
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        limit = timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=limit)
        size, dtype, method, wrapped = arguments
        masked = CSRMask.load(mask)
        before = memory_in_use()
        training = Training(size, dtype, masked, method, wrapped, rank, WORLD)
        requests = {"step": training.step, "count": partial(training.count, before)}
        while (request := connection.recv()) is not None:
            connection.send(("", requests[request]()))
    except EOFError:
        pass  # the other end is gone
    except Exception:
        connection.send((traceback.format_exc(), None))


def stop(processes: list[Any], connections: list[Any]) -> None:
    for connection in connections:
        connection.close()
    for process in processes:
        process.terminate()
        process.join()


class Processes:
    """The processes of an implementation. A call takes a step in both and returns this object, for the check."""

    def __init__(self, name: str, size: str, dtype: torch.dtype, mask: Path) -> None:
        self.name, self.losses = name, []
        context = get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        pipes = [context.Pipe() for _ in range(WORLD)]
        self.connections = [ours for ours, _ in pipes]
        arguments = mask.parent / uuid.uuid4().hex, mask, size, dtype, *IMPLEMENTATIONS[name]
        self.members = [
            context.Process(target=serve, args=(theirs, rank, *arguments), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        self.close = weakref.finalize(self, stop, self.members, self.connections)
        for process, (_, theirs) in zip(self.members, pipes):
            process.start()
            theirs.close()

    def ask(self, request: str) -> list[Any]:
        """The answers of all processes. RuntimeError if one fails: the others may wait for it without end."""
        for connection in self.connections:
            connection.send(request)
        answers = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(SECONDS):
                raise RuntimeError(f"process {rank} does not answer")
            try:
                error, answer = connection.recv()
            except EOFError:
                error = "it has ended"
            if error:
                raise RuntimeError(f"process {rank}: {error}")
            answers.append(answer)
        return answers

    def __call__(self) -> "Processes":
        self.losses.append(statistics.mean(self.ask("step")))
        return self


# ---- the case ----
# What each sends and holds, by the model and the density, as bench/scale.py computes it.
COSTS: dict[str, Callable[[scale.Model, float], scale.Cost]] = {
    OURS: lambda model, density: scale.compact_ddp(model, WORLD, density),
    HOOK: lambda model, density: scale.compact_ddp(model, WORLD, density, sparsified=False),
    SPARSIFIED_FSDP2: lambda model, density: scale.sparsified_fsdp2(model, WORLD, density),
    OURS_FSDP2: lambda model, density: scale.masked_fsdp2(model, WORLD, density),
    DENSE_DDP: lambda model, _: scale.dense_ddp(model, WORLD),
    DENSE_FSDP2: lambda model, _: scale.dense_fsdp2(model, WORLD),
    LORA_DDP: lambda model, _: scale.lora_ddp(model, WORLD, LORA_RANK),
}


def distributed_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    if not has("transformers"):
        return Case(0, {}, lambda result: None, absent={OURS: "transformers is not installed"})
    trainers, folder = Trainers(size, dtype, density, device), Path(tempfile.mkdtemp())
    trainers.mask.save(folder / "mask.safetensors")
    expected = cache(partial(losses_of_one_process, size, dtype, trainers.mask))

    def make(name: str) -> Processes:
        expected(REFERENCES[name])  # before the processes take the memory
        return Processes(name, size, dtype, folder / "mask.safetensors")

    # Values and moments are read and written, columns read, the weights of linear layers read, by each process.
    moved = 4 * trainers.linears + trainers.mask.nnz * (24 + trainers.mask.col_indices.element_size())
    model = scale.step_model(size)
    held = {name: sum(cost(model, density).memory.values()) for name, cost in COSTS.items()}
    needs = {name: WORLD * (each + 4 * model.numel()) for name, each in held.items()}  # with activations
    makers: dict[str, Callable] = {name: partial(make, name) for name in IMPLEMENTATIONS}
    absent = too_large(needs, available_bytes()) | ({} if has("peft") else {LORA_DDP: "peft is not installed"})
    case = Case(WORLD * moved, makers, lambda result: None, flops(trainers), absent=absent, peaks={})
    case.one_by_one = sum(needs.values()) > available_bytes()
    case.rounds, case.served_by, case.parameters = MODELS[size].rounds, "masked_linear_grad", trainers.numel
    case.check = partial(check, case.footprints, case.peaks, expected)
    weakref.finalize(case, shutil.rmtree, folder, ignore_errors=True)
    return case


def losses_of_one_process(size: str, dtype: torch.dtype, mask: CSRMask, method: str) -> list[float]:
    training = Training(size, dtype, mask, method, "")
    losses = [training.step() for _ in range(CHECKED_STEPS)]
    del training
    trim()
    return losses


def check(footprints: dict, peaks: dict, expected: Callable[[str], list[float]], processes: Processes) -> str | None:
    """Whether losses are those of one process; also fills in the bytes of the case."""
    while len(processes.losses) < CHECKED_STEPS - 1:  # before the last DDP makes its buckets anew
        processes()
    counts = processes.ask("count")
    processes.losses.append(statistics.mean(found.pop("loss") for found in counts))
    if fault := wrong_losses(processes.losses, expected(REFERENCES[processes.name])):
        return fault
    if "peak" in counts[0]:
        peaks[processes.name] = counts[0].pop("peak") / 1e6
    footprints[processes.name] = counts[0]
    return None


def wrong_losses(losses: list[float], expected: list[float]) -> str | None:
    """How losses differ from those of one process: the first by rounding, the others by 1 % of the change so far."""
    for i, (loss, known) in enumerate(zip(losses, expected, strict=True)):
        if not abs(loss - known) <= 1e-6 * known + 0.01 * abs(known - expected[0]):
            return f"loss {loss} after {i} steps, in one process {known}"
    return None
