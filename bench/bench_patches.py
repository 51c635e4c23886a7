"""The operators of sparse patches, of tensors of which 1 % or 0.1 % of the elements change, against plain torch; steps
of SparseAdamW that track their changes against steps that do not.
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from bench.harness import Call, Case, Choice, Workload, workload
from bench.rows import OURS
from bench.shapes import numel, random_tensors
from deftx_kernels import SparseAdamW, topk_mask
from deftx_kernels.kernels.tensors import INTEGERS
from deftx_kernels.ops import reference

OPS = {
    "bit_diff": "the entries at which the bits of two lists of tensors differ, and the values there",
    "flat_exchange_": "values at given entries of tensors exchanged with others",
    "bit_checksum": "a checksum of each tensor's bits",
    "set_bits": "the numbers of the bits that are set in words",
    "tracked_step": "one step of SparseAdamW with a float32 master that marks what it changes; density 1: every entry",
}
SIZES = ("tiny", "minilm", "512M")
SETTINGS = [(torch.bfloat16, 0.01), (torch.float32, 0.01), (torch.bfloat16, 0.001)]
HALF = SETTINGS[::2]
STEP_SIZES, STEP_SETTINGS = ("tiny", "minilm"), [(torch.bfloat16, 0.05), (torch.bfloat16, 1.0)]
UNTRACKED = "SparseAdamW without track_changes"
ops = torch.ops.deftx


def workloads(choice: Choice) -> Iterator[Workload]:
    for size in choice.sizes:
        for setting in choice.settings(HALF if size == "512M" else SETTINGS):  # 1 GB of bfloat16
            for op, case in (("bit_diff", diff_case), ("flat_exchange_", exchange_case), ("bit_checksum", sum_case)):
                yield workload(case, op, size, setting, choice.device)
    for size in (s for s in choice.sizes if s in STEP_SIZES):
        for setting in choice.settings(HALF):
            yield workload(bits_case, "set_bits", size, setting, choice.device)
        for setting in choice.settings(STEP_SETTINGS):
            yield workload(step_case, "tracked_step", size, setting, choice.device)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(INTEGERS[tensor.element_size()])


def touched(elements: int, item: int, density: float, device: str) -> float:
    """Bytes of the cache lines (on a GPU: sectors) that hold random entries of tensors."""
    each = (32 if device == "cuda" else 64) / item
    return (1 - (1 - density) ** each) * elements * item


class Problem:
    """Tensors before and after a share of their elements changed by one in the last bit, and these entries."""

    def __init__(self, size: str, dtype: torch.dtype, density: float, device: str) -> None:
        generator = torch.Generator(device).manual_seed(1)
        self.old = list(random_tensors(size, dtype, device).values())
        self.new, index = [], []
        for tensor in self.old:
            chosen = torch.rand(tensor.numel(), generator=generator, device=device) < density
            self.new.append(tensor.clone())
            bits(self.new[-1])[chosen] ^= 1
            index.append(chosen.nonzero().view(-1))
        self.index = index  # int64, what plain torch indexes with
        counts = [0, *map(len, index)]
        self.entries = torch.tensor(counts, device=device).cumsum(0), torch.cat(index).to(torch.int32)
        self.values, self.before = (
            torch.cat([t.view(-1)[i] for t, i in zip(tensors, index)]) for tensors in (self.new, self.old)
        )
        self.nnz, self.element = len(self.values), dtype.itemsize
        self.bytes = sum(t.nbytes for t in self.new)


def diff_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    problem = Problem(size, dtype, density, device)

    def plain() -> tuple[Tensor, ...]:
        found = [(bits(a) != bits(b)).nonzero().view(-1) for a, b in zip(problem.new, problem.old)]
        counts = torch.tensor([0, *map(len, found)], device=device)
        values = torch.cat([t.view(-1)[i] for t, i in zip(problem.new, found)])
        return counts.cumsum(0), torch.cat(found).to(torch.int32), values

    def check(result: tuple[Tensor, ...]) -> str | None:
        same = all(map(torch.equal, result[:2], problem.entries)) and torch.equal(bits(result[2]), bits(problem.values))
        return None if same else "the entries differ"

    implementations: dict[str, Callable] = {
        OURS: lambda: lambda: ops.bit_diff(problem.new, problem.old),
        "torch != and nonzero": lambda: plain,
    }
    return Case(2 * problem.bytes + problem.nnz * (4 + problem.element), implementations, check)


def exchange_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    """Each call writes what the call before it replaced."""
    problem = Problem(size, dtype, density, device)

    def alternating(exchange: Callable[[list[Tensor], Tensor], Tensor]) -> Callable[[], Call]:
        def make() -> Call:
            mine, values = [t.clone() for t in problem.old], problem.values.clone()

            def call() -> tuple[list[Tensor], Tensor]:
                nonlocal values
                values = exchange(mine, values)
                return mine, values

            return call

        return make

    def indexed(mine: list[Tensor], values: Tensor) -> Tensor:
        parts = values.split([len(i) for i in problem.index])
        before = [t.view(-1)[i] for t, i in zip(mine, problem.index)]
        for tensor, i, part in zip(mine, problem.index, parts):
            tensor.view(-1)[i] = part
        return torch.cat(before)

    def copied() -> Call:
        mine, states = [t.clone() for t in problem.old], [problem.new, problem.old]

        def call() -> tuple[list[Tensor], Tensor]:
            states.reverse()
            for tensor, other in zip(mine, states[1]):
                tensor.copy_(other)
            return mine, problem.before if states[1] is problem.new else problem.values

        return call

    def check(result: tuple[list[Tensor], Tensor]) -> str | None:
        written = problem.new if torch.equal(bits(result[1]), bits(problem.before)) else problem.old
        values = problem.before if written is problem.new else problem.values
        same = all(torch.equal(bits(a), bits(b)) for a, b in zip(result[0], written))
        return None if same and torch.equal(bits(result[1]), bits(values)) else "the tensors or the values differ"

    def exchanged(mine: list[Tensor], values: Tensor) -> Tensor:
        ops.flat_exchange_(mine, *problem.entries, values)
        return values

    implementations: dict[str, Callable] = {
        OURS: alternating(exchanged),
        "torch index": alternating(indexed),
        "torch copy_ of whole tensors": copied,
    }
    lines = touched(numel(size), problem.element, density, device)  # read and written
    moved = round(problem.nnz * (4 + 2 * problem.element) + 2 * lines)
    return Case(moved, implementations, check)


def sum_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    problem = Problem(size, dtype, density, device)
    expected = reference.bit_checksum(problem.new)

    def digests() -> Tensor:
        for tensor in problem.new:
            hashlib.sha256(bits(tensor).numpy()).digest()
        return expected

    implementations: dict[str, Callable] = {OURS: lambda: lambda: ops.bit_checksum(problem.new)}
    if device == "cpu":
        implementations["hashlib.sha256"] = lambda: digests
    else:
        implementations["torch, the same sum"] = lambda: lambda: reference.bit_checksum(problem.new)
    return Case(problem.bytes, implementations, lambda sums: None if torch.equal(sums, expected) else "the sums differ")


def bits_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    """A bit for each element, in one part; baselines need one byte for each bit on the way."""
    elements = numel(size)
    flags = torch.rand(elements, generator=torch.Generator(device).manual_seed(1), device=device) < density
    expected = flags.nonzero().view(-1).to(torch.int32)
    places = 1 << torch.arange(8, dtype=torch.uint8, device=device)
    flags = torch.nn.functional.pad(flags, (0, -elements % 32)).view(-1, 8)
    octets = (flags * places).sum(1, dtype=torch.uint8)
    words, starts = octets.view(torch.int32), torch.tensor([0, elements], device=device)

    def plain() -> Tensor:
        return (octets[:, None] & places).view(-1).nonzero().view(-1).to(torch.int32)

    def unpacked() -> Tensor:
        return torch.from_numpy(np.flatnonzero(np.unpackbits(octets.numpy(), bitorder="little")).astype(np.int32))

    implementations: dict[str, Callable] = {
        OURS: lambda: lambda: ops.set_bits(words, starts)[1],
        "torch & and nonzero": lambda: plain,
    }
    implementations |= {"numpy unpackbits": lambda: unpacked} if device == "cpu" else {}
    moved = words.nbytes + expected.nbytes
    return Case(moved, implementations, lambda found: None if torch.equal(found, expected) else "other numbers")


def step_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    """The marks are not taken: a step adds those of what it changes, as between two patches."""
    mask = None if density == 1 else topk_mask(random_tensors(size, torch.float32, device, seed=2), density=density)
    grads = random_tensors(size, dtype, device, seed=1)

    def stepping(track_changes: bool) -> Callable[[], Call]:
        def make() -> Call:
            params = {n: torch.nn.Parameter(t) for n, t in random_tensors(size, dtype, device).items()}
            for name, parameter in params.items():
                parameter.grad = grads[name]
            options = dict(lr=3e-5, master=True, track_changes=track_changes)
            optimizer = SparseAdamW(params.items(), mask, **options)

            def call() -> list[Tensor]:
                optimizer.step()
                return [p.detach() for p in params.values()]

            return call

        return make

    expected = stepping(False)()()

    def check(result: list[Tensor]) -> str | None:
        same = all(torch.equal(bits(a), bits(b)) for a, b in zip(result, expected))
        return None if same else "the weights differ"

    elements, item = numel(size), dtype.itemsize
    columns = 0 if mask is None else mask.col_indices.element_size()
    moved = round(elements * density * (24 + columns) + 3 * touched(elements, item, density, device))
    implementations: dict[str, Callable] = {OURS: stepping(True), UNTRACKED: stepping(False)}
    return Case(moved, implementations, check, served_by="sparse_adamw_")
