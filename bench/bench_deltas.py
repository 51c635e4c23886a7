"""Switching between adapters, and TIES merging, of a model's linear layers: deftx, PEFT, plain torch."""

import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from bench.harness import Call, Case, Choice, Workload, workload
from bench.rows import OURS
from bench.shapes import SHAPES, copies, random_tensors
from deftx_kernels import SparseAdapters, SparseDelta, merge, topk_mask

OPS = {
    "adapter_switch": "another adapter put into the weights of the linear layers in place of the active one",
    "merge_ties": "three deltas trimmed to a share of the entries of all tensors together, signs elected, and averaged",
}
SIZES = ("tiny", "minilm")
SETTINGS = [(torch.float32, 0.05), (torch.bfloat16, 0.05)]
LORA_RANK = 16
TRIMMED = 0.6  # the share of each delta's entries that TIES keeps


def workloads(choice: Choice) -> Iterator[Workload]:
    for size in choice.sizes:
        for setting in choice.settings(SETTINGS):
            yield workload(switch_case, "adapter_switch", size, setting, choice.device)
        for setting in choice.settings(SETTINGS[:1]):
            yield workload(ties_case, "merge_ties", size, setting, choice.device)


def linear_shapes(size: str) -> dict[str, tuple[int, ...]]:
    return {n: s for n, s in SHAPES[size].items() if len(s) == 2 and "." in n}


def random_delta(size: str, density: float, device: str, seed: int) -> SparseDelta:
    shapes = linear_shapes(size)
    mask = topk_mask(random_tensors(shapes, torch.float32, device, seed=seed), density=density)
    values = torch.randn(mask.nnz, generator=torch.Generator().manual_seed(seed)).to(device)
    return SparseDelta(mask, 0.01 * values)


def layers(tensors: dict[str, Tensor]) -> nn.Module:
    """A module with these weights of linear layers."""
    model = nn.Module()
    for name, tensor in tensors.items():
        layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
        model.add_module(name.replace(".", "_"), layer)
    return model


class Switch:
    """A model, two adapters of it, and what each of them makes of its weights."""

    def __init__(self, size: str, dtype: torch.dtype, density: float, device: str) -> None:
        self.tensors = random_tensors(linear_shapes(size), dtype, device)
        self.deltas = {name: random_delta(size, density, device, seed) for seed, name in enumerate("ab", start=1)}
        self.tuned = {name: copies(self.tensors) for name in self.deltas}
        for name, delta in self.deltas.items():
            delta.apply_(self.tuned[name], strict=False)

    def alternating(self, write: Callable[[str], object], state: dict[str, Tensor] | None) -> Call:
        """Each call writes the adapter that is not active."""
        names = itertools.cycle("ba")
        write("a")

        def call() -> tuple[str, dict[str, Tensor] | None]:
            name = next(names)
            write(name)
            return name, state

        return call

    def ours(self) -> Call:
        model = copies(self.tensors)
        return self.alternating(SparseAdapters(model, self.deltas).set_adapter, model)

    def whole_copies(self) -> Call:
        model = copies(self.tensors)
        return self.alternating(lambda name: [model[n].copy_(t) for n, t in self.tuned[name].items()], model)

    def indexed(self) -> Call:
        """The base's and the tuned entries of each adapter are kept."""
        model, active = copies(self.tensors), []
        kept = {}
        for name, delta in self.deltas.items():
            flat = {n: delta.mask[n].flat_indices() for n in delta.mask.names}
            kept[name] = [
                (model[n].view(-1), i, model[n].view(-1)[i], self.tuned[name][n].view(-1)[i]) for n, i in flat.items()
            ]

        def write(name: str) -> None:
            for former in active:
                for tensor, i, base, _ in kept[former]:
                    tensor[i] = base
            for tensor, i, _, tuned in kept[name]:
                tensor[i] = tuned
            active[:] = [name]

        return self.alternating(write, model)

    def lora(self) -> Call:
        import peft

        options = {"r": LORA_RANK, "target_modules": ".*", "init_lora_weights": False}
        model = peft.get_peft_model(layers(self.tensors), peft.LoraConfig(**options), adapter_name="a")
        model.add_adapter("b", peft.LoraConfig(**options))

        def write(name: str) -> None:
            model.base_model.unmerge_adapter()
            model.base_model.merge_adapter([name])

        return self.alternating(write, None)

    def check(self, result: tuple[str, dict[str, Tensor] | None]) -> str | None:
        name, state = result
        if state is None or all(torch.equal(state[n], t) for n, t in self.tuned[name].items()):
            return None
        return "the weights are not the base's plus the adapter's"


def switch_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    switch = Switch(size, dtype, density, device)
    implementations: dict[str, Callable[[], Call]] = {
        OURS: switch.ours,
        "torch copy_, whole": switch.whole_copies,
        "torch index_put_": switch.indexed,
        "PEFT LoRA, merged": switch.lora,
    }
    entries = sum(delta.mask.nnz for delta in switch.deltas.values())
    return Case(2 * entries * dtype.itemsize, implementations, switch.check, served_by="csr_scatter_")


def ties_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    deltas = [random_delta(size, density, device, seed) for seed in (1, 2, 3)]
    share, shapes = TRIMMED * density, linear_shapes(size)
    ends = [0]
    for name in deltas[0].mask.names:
        ends.append(ends[-1] + math.prod(shapes[name]))
    expected = merge(*deltas, method="ties", density=share)

    def dense(delta: SparseDelta) -> Tensor:
        flat = torch.zeros(ends[-1], device=device)
        flat[delta.mask.flat_indices()] = delta.values
        return flat

    def in_torch(trim: Callable[[Tensor], Tensor]) -> Callable[[], Call]:
        def make() -> Call:
            given = [dense(delta) for delta in deltas]

            def call() -> Tensor:
                stack = torch.stack([trim(x) for x in given])
                agree = stack.sign() == torch.where(stack.sum(0) >= 0, 1, -1)
                return (stack * agree).sum(0) / agree.sum(0).clamp(min=1)

            return call

        return make

    def globally(x: Tensor) -> Tensor:
        kept = torch.zeros_like(x)
        index = x.abs().topk(int(share * len(x))).indices
        kept[index] = x[index]
        return kept

    def by_tensor(x: Tensor) -> Tensor:
        """As mergekit: an argsort of each tensor."""
        kept = torch.zeros_like(x)
        for begin, end in zip(ends, ends[1:]):
            index = x[begin:end].abs().argsort(descending=True)[: int(share * (end - begin))] + begin
            kept[index] = x[index]
        return kept

    def check(result: SparseDelta | Tensor) -> str | None:
        if isinstance(result, SparseDelta):
            wrong = result.mask != expected.mask or not torch.equal(result.values, expected.values)
            return "another delta" if wrong else None
        return None if bool(result.isfinite().all()) else "not finite"

    implementations = {
        OURS: lambda: lambda: merge(*deltas, method="ties", density=share),
        "torch, global top-k": in_torch(globally),
        "torch, argsort by tensor": in_torch(by_tensor),
    }
    return Case(3 * sum(delta.values.nbytes for delta in deltas), implementations, check, served_by="csr_sum")
