"""Sparse deltas of a model's linear layers: switched, active in a forward pass, loaded, and merged."""

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.harness import Call, Case, Choice, Workload, available_bytes, too_large, workload
from bench.rows import OURS
from bench.shapes import SHAPES, Shapes, copies, numel, random_tensors
from deftx_kernels import SparseAdapters, SparseDelta, interop, merge, topk_mask

OPS = {
    "adapter_switch": "another adapter put into the weights of the linear layers in place of the active one",
    "adapter_forward": "one layer after the other with an active adapter, 512 tokens",
    "delta_load": "an adapter of the linear layers read from its file; in brackets the bytes of the file per value",
    "merge_ties": "three deltas trimmed to a share of the entries of all tensors together, signs elected, and averaged",
}
SIZES = ("tiny", "minilm", "xlmr")
SETTINGS = [(torch.float32, 0.05), (torch.float32, 0.01), (torch.bfloat16, 0.05)]
LORA_RANK, TOKENS = 16, 512
TRIMMED = 0.6  # the share of each delta's entries that TIES keeps


def workloads(choice: Choice) -> Iterator[Workload]:
    for size in choice.sizes:
        for setting in choice.settings(SETTINGS):
            yield workload(switch_case, "adapter_switch", size, setting, choice.device)
        for setting in choice.settings(SETTINGS[:1]):
            yield workload(forward_case, "adapter_forward", size, setting, choice.device)
            yield workload(load_case, "delta_load", size, setting, choice.device)
            yield workload(ties_case, "merge_ties", size, setting, choice.device, title=f"{size}, all tensors")


def linear_shapes(size: str) -> Shapes:
    return {n: s for n, s in SHAPES[size].items() if len(s) == 2 and "." in n}


def random_delta(shapes: Shapes, density: float, device: str, seed: int) -> SparseDelta:
    mask = topk_mask(random_tensors(shapes, torch.float32, device, seed=seed), density=density)
    values = torch.randn(mask.nnz, generator=torch.Generator().manual_seed(seed)).to(device)
    return SparseDelta(mask, 0.01 * values)


def layers(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module with these weights of linear layers."""
    model = nn.Module()
    for name, tensor in tensors.items():
        layer = nn.Linear(tensor.shape[1], tensor.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(tensor.clone(), requires_grad=False)
        model.add_module(name.replace(".", "_"), layer)
    return model


def peft_model(tensors: Mapping[str, Tensor], density: float, kind: str) -> nn.Module:
    """The layers with random adapters "one" and "two" of PEFT: LoRA, or SHiRA of this density."""
    import peft

    options = {"target_modules": ".*", "inference_mode": True}

    def config(seed: int) -> Any:
        if kind == "PEFT LoRA":
            return peft.LoraConfig(r=LORA_RANK, init_lora_weights=False, **options)
        r = min(int(density * t.numel() / sum(t.shape)) for t in tensors.values())
        return peft.ShiraConfig(r=max(r, 1), random_seed=seed, init_weights=False, **options)

    model = peft.get_peft_model(layers(tensors), config(1), adapter_name="one")
    model.add_adapter("two", config(2))
    return model


# ---- switches and forward passes ----
class Adapters:
    """A model, two adapters of it, and what each of them makes of its weights."""

    def __init__(self, size: str, dtype: torch.dtype, density: float, device: str) -> None:
        self.density = density
        self.tensors = random_tensors(linear_shapes(size), dtype, device)
        shapes = linear_shapes(size)
        self.deltas = {
            name: random_delta(shapes, density, device, seed) for seed, name in enumerate(("one", "two"), start=1)
        }
        self.tuned = {name: copies(self.tensors) for name in self.deltas}
        for name, delta in self.deltas.items():
            delta.apply_(self.tuned[name], strict=False)

    def alternating(self, write: Callable[[str], object], state: dict[str, Tensor] | None) -> Call:
        """Each call writes the adapter that is not active."""
        names = itertools.cycle(("two", "one"))
        write("one")

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

    def merged(self, kind: str) -> Call:
        model = peft_model(self.tensors, self.density, kind)
        model.base_model.merge_adapter(["two"])

        def write(name: str) -> None:
            model.base_model.unmerge_adapter()
            model.base_model.merge_adapter([name])

        return self.alternating(write, None)

    def check(self, result: tuple[str, dict[str, Tensor] | None]) -> str | None:
        name, state = result
        if state is None or all(torch.equal(state[n], t) for n, t in self.tuned[name].items()):
            return None
        return "the weights are not the base's plus the adapter's"

    def forward(self, kind: str) -> Call:
        """The layers with our adapter "one", with its weights copied, or with PEFT's adapter, not merged."""
        if kind.startswith("PEFT"):
            modules = list(peft_model(self.tensors, self.density, kind).base_model.model.children())
        else:
            modules = list(layers(self.tensors if kind == OURS else self.tuned["one"]).children())
        if kind == OURS:
            weights = {name: module.weight for name, module in zip(self.tensors, modules)}
            SparseAdapters(weights, self.deltas).set_adapter("one")
        inputs = [torch.ones(TOKENS, t.shape[1], dtype=t.dtype, device=t.device) for t in self.tensors.values()]

        @torch.no_grad()
        def call() -> tuple[str, list[nn.Module], list[Tensor]]:
            return kind, modules, [module(x) for module, x in zip(modules, inputs)]

        return call

    def check_forward(self, result: tuple[str, list[nn.Module], list[Tensor]]) -> str | None:
        """Our layers have the tuned weights bit for bit; PEFT's random adapters change the outputs of the base, which
        are the sums of its weights' rows.
        """
        kind, modules, outputs = result
        if not kind.startswith("PEFT"):
            same = all(torch.equal(m.weight, t) for m, t in zip(modules, self.tuned["one"].values(), strict=True))
            return None if same else "the layers do not have the tuned weights"
        sums = [base.sum(1) for base in self.tensors.values()]
        same = all(torch.allclose(out[0], one, rtol=1e-3, atol=0.01) for out, one in zip(outputs, sums, strict=True))
        return "no adapter is active" if same else None


def switch_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    adapters = Adapters(size, dtype, density, device)
    implementations: dict[str, Callable[[], Call]] = {
        OURS: adapters.ours,
        "torch copy_, whole": adapters.whole_copies,
        "torch index_put_": adapters.indexed,
        "PEFT LoRA, merged": partial(adapters.merged, "PEFT LoRA"),
        "PEFT SHiRA, merged": partial(adapters.merged, "PEFT SHiRA"),
    }
    entries = sum(delta.mask.nnz for delta in adapters.deltas.values())
    return Case(2 * entries * dtype.itemsize, implementations, adapters.check, served_by="csr_add_")


def forward_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    adapters = Adapters(size, dtype, density, device)
    kinds = (OURS, "torch, merged", "PEFT LoRA", "PEFT SHiRA")
    elements = sum(t.numel() for t in adapters.tensors.values())
    moved = (elements + TOKENS * sum(sum(t.shape) for t in adapters.tensors.values())) * dtype.itemsize
    implementations = {kind: partial(adapters.forward, kind) for kind in kinds}
    flops = 2.0 * TOKENS * elements
    return Case(moved, implementations, adapters.check_forward, flops)


# ---- files ----
def load_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    """Each file holds the same entries; that of the whole tensors holds zeros beside them."""
    delta = random_delta(linear_shapes(size), density, device, seed=1)
    linear = delta.renamed({n: n.replace(".", "_") + ".weight" for n in delta.mask.names})
    folder = tempfile.TemporaryDirectory()
    whole = {n: torch.zeros(s) for n, s in zip(delta.mask.names, delta.mask.shapes)}
    path = {name: Path(folder.name) / name for name in ("deftx", "shira", "sft", "whole")}
    delta.save_pretrained(path["deftx"])
    interop.to_peft_shira(linear, path["shira"])
    interop.to_composable_sft(delta, path["sft"])
    path["whole"].mkdir()
    save_file(delta.mask.scatter_(whole, delta.values.cpu()), path["whole"] / "model.safetensors")
    total = float(delta.values.double().sum())

    def ours() -> Tensor:
        return SparseDelta.from_pretrained(path["deftx"]).values

    def shira() -> list[Tensor]:
        from peft.utils import load_peft_weights

        return [t for n, t in load_peft_weights(str(path["shira"]), "cpu").items() if n.endswith("shira_weight")]

    def composable_sft() -> list[Tensor]:
        """As that library's SFT: a pickle."""
        file = torch.load(path["sft"] / "pytorch_diff.bin", map_location="cpu", weights_only=False)
        return [entries["values"] for entries in file["diffs"].values()]

    def tensors() -> list[Tensor]:
        mapped = load_file(path["whole"] / "model.safetensors")
        return [t.clone() for t in mapped.values()]  # read

    def check(result: Tensor | list[Tensor]) -> str | None:
        found = sum(float(t.double().sum()) for t in ([result] if isinstance(result, Tensor) else result))
        return None if math.isclose(found, total, rel_tol=1e-6, abs_tol=1e-3) else "other values"

    loaders = {OURS: ours, "composable-sft": composable_sft, "PEFT SHiRA": shira, "safetensors, whole tensors": tensors}
    files = dict(zip(loaders, ("deftx", "sft", "shira", "whole")))
    sizes = {name: sum(f.stat().st_size for f in path[file].iterdir()) for name, file in files.items()}
    implementations = {name: partial(kept, folder, load) for name, load in loaders.items()}
    case = Case(sizes[OURS], implementations, check, library="safetensors")
    case.parameters, case.footprints = delta.mask.nnz, {name: {"file": size} for name, size in sizes.items()}
    return case


def kept(folder: tempfile.TemporaryDirectory, load: Call) -> Call:
    """The loader, which keeps the folder of its file."""
    return partial(lambda _: load(), folder)


# ---- merging ----
class Merging:
    """Three deltas of all of a model's tensors, merged by TIES."""

    def __init__(self, size: str, density: float, device: str) -> None:
        self.deltas = [random_delta(SHAPES[size], density, device, seed) for seed in (1, 2, 3)]
        self.share = TRIMMED * density

    def dense(self) -> list[dict[str, Tensor]]:
        """Of each delta its tensors."""
        mask = self.deltas[0].mask
        zeros = {n: torch.zeros(s, device=mask.device) for n, s in zip(mask.names, mask.shapes)}
        return [delta.mask.scatter_(copies(zeros), delta.values) for delta in self.deltas]

    def ours(self) -> Call:
        return lambda: merge(*self.deltas, method="ties", density=self.share)

    def torch_global(self) -> Call:
        given = [torch.cat([t.view(-1) for t in tensors.values()]) for tensors in self.dense()]
        k = int(self.share * len(given[0]))

        def call() -> Tensor:
            trimmed = torch.zeros(len(given), len(given[0]), device=given[0].device)
            for row, x in zip(trimmed, given):
                index = x.abs().topk(k, sorted=False).indices
                row[index] = x[index]
            elected = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
            agree = trimmed * elected > 0
            return trimmed.mul_(agree).sum(0) / agree.sum(0).clamp_(min=1)

        return call

    def mergekit(self) -> Call:
        """Tensor by tensor, as mergekit merges, which trims by tensor."""
        from mergekit.merge_methods import registry
        from mergekit.merge_methods.base import PerInputValues, TensorEntry, TensorGroup

        given, method, ids = self.dense(), registry.get("ties"), range(3)
        shared: dict[str, Any] = {"int8_mask": False, "normalize": True, "rescale": False, "lambda": 1.0}
        shared |= {"weight": PerInputValues([(i, 1.0) for i in ids])}
        shared |= {"density": PerInputValues([(i, self.share) for i in ids])}

        def call() -> dict[str, Tensor]:
            merged = {}
            for name in given[0]:
                base = TensorEntry("base", torch.zeros_like(given[0][name]), is_base=True)
                entries = [base, *(TensorEntry(i, tensors[name]) for i, tensors in enumerate(given))]
                merged[name] = method.merge_group(TensorGroup(entries), **shared)
            return merged

        return call

    def check(self, result: SparseDelta | Tensor | dict[str, Tensor]) -> str | None:
        """Against the deltas trimmed and merged by another path; entries of equal magnitude may be chosen otherwise."""
        scope = "tensor" if isinstance(result, dict) else "global"
        expected = merge(*self.deltas, method="ties", density=self.share, scope=scope)
        mask = expected.mask
        if isinstance(result, SparseDelta):
            same = result.mask == mask and torch.equal(result.values, expected.values)
            return None if same else "another delta"
        if isinstance(result, Tensor):
            found = result[mask.flat_indices()]
            total = result.count_nonzero()
        else:
            found = mask.gather(result)
            total = sum(t.count_nonzero() for t in result.values())
        wrong = int((~torch.isclose(found, expected.values, rtol=1e-5)).sum()) + abs(int(total) - mask.nnz)
        return f"{wrong} entries differ" if wrong > 1e-5 * mask.nnz + 10 else None


def ties_case(size: str, dtype: torch.dtype, density: float, device: str) -> Case:
    merging = Merging(size, density, device)
    implementations = {OURS: merging.ours, "torch, global top-k": merging.torch_global, "mergekit": merging.mergekit}
    needs = {OURS: 1.0 * numel(size), "torch, global top-k": 40.0 * numel(size), "mergekit": 24.0 * numel(size)}
    absent = too_large(needs, available_bytes()) if device == "cpu" else {}
    moved = 3 * sum(delta.values.nbytes for delta in merging.deltas)
    case = Case(moved, implementations, merging.check, served_by="csr_sum", absent=absent, rounds=5)
    if numel(size) > 1e8:  # the baselines take minutes
        case.isolated, case.rounds = True, 2
    return case
