"""SparseDelta: the sparse difference of two models; saved, loaded, added to a model and to one another."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from deftx_kernels.functional import named_tensors
from deftx_kernels.mask import CSRMask
from deftx_kernels.nn import masked_parameters

WEIGHTS_NAME = "sparse_delta.safetensors"
CONFIG_NAME = "sparse_delta_config.json"
FORMAT = "deftx_sparse_delta"
_DENSE = "dense."
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size

Model = nn.Module | Mapping[str, Tensor]


class SparseDelta:
    """What fine-tuning changed: differences at the entries of a mask, and whole tensors such as the head.

    Args:
        mask: the entries.
        values: compact [mask.nnz], the differences (float32).
        dense: name → tensor that replaces the model's (a head). Not scaled, not added.
        metadata: JSON-serialisable facts: method, base_model, base_fingerprint (name → that of the base's tensor), k, settings.

    Raises:
        ValueError, TypeError: values that are not compact or not floating point; a tensor both in mask and dense.
    """

    def __init__(
        self,
        mask: CSRMask,
        values: Tensor,  # [nnz]
        dense: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        mask.check_compact(values, "values")
        if not values.is_floating_point():
            raise TypeError(f"values must be floating point, got {values.dtype}")
        self.mask = mask
        self.values = values.detach().to(torch.float32)
        self.dense = {n: t.detach() for n, t in (dense or {}).items()}
        self.metadata = dict(metadata or {})
        if both := [n for n in self.dense if n in mask]:
            raise ValueError(f"dense: {both[0]!r} is covered by the mask as well")

    def __repr__(self) -> str:
        method = self.metadata.get("method", "unknown")
        return f"SparseDelta(method={method}, {self.mask!r}, dense={sorted(self.dense)})"

    # ---- from models ----

    @classmethod
    def from_models(
        cls,
        tuned: Model,
        base: Model,
        mask: CSRMask | None = None,
        *,
        dense: Iterable[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> "SparseDelta":
        """tuned - base in float32, chosen so that base + delta gives `tuned` back bit for bit.

        Args:
            tuned, base: modules (their named parameters) or mappings.
            mask: the entries that may differ; by default those that do.
            dense: names of tensors to keep whole. Tensors that only `tuned` has are kept whole, too.
            metadata: goes into the delta's. `inexact_entries` is added: how many entries no float32 difference can carry exactly
                (where base and tuned differ by many orders of magnitude, or are float64).

        Raises:
            ValueError: a tensor is missing in `tuned`, has another shape, or differs outside the mask.
        """
        new, old = named_tensors(tuned, "tuned"), named_tensors(base, "base")
        whole = set(dense) | (new.keys() - old.keys())
        for name in sorted(whole - new.keys()):
            raise ValueError(f"dense names {name!r}, which tuned lacks")
        shared = sorted(old.keys() - whole)
        for name in shared:
            if name not in new:
                raise ValueError(f"tuned lacks tensor {name!r} of base")
            if new[name].shape != old[name].shape:
                raise ValueError(f"tensor {name!r} has shape {list(new[name].shape)} in tuned and {list(old[name].shape)} in base")
        differs = {n: _differs(new[n], old[n]) for n in shared}
        if mask is None:
            names = [n for n in shared if old[n].is_floating_point()]
            changed = [n for n in names if bool(differs[n].any())] or names
            mask = CSRMask.from_dense({n: differs[n] for n in changed})
        mask.select(old, "base")
        for name in shared:
            outside = differs[name]
            if name in mask:
                outside = outside.clone()
                one = mask[name].to(outside.device)
                one.scatter_({name: outside}, torch.zeros(one.nnz, dtype=torch.bool, device=outside.device))
            if bool(outside.any()):
                raise ValueError(
                    f"tuned differs from base in {int(outside.sum())} entries of {name!r} that neither mask nor dense covers"
                )
        values, inexact = _exact_difference(mask, new, old)
        facts = {
            **(metadata or {}),
            "k": mask.nnz,
            "inexact_entries": inexact,
            "base_fingerprint": fingerprint({n: old[n] for n in mask.names}),
        }
        return cls(mask, values, {n: new[n].clone() for n in sorted(whole)}, facts)

    # ---- on models ----

    def apply_(self, model: Model, alpha: float = 1.0, dense: bool = True, *, strict: bool = True) -> None:
        """model += alpha * delta at the mask's entries, in float32 or better; with `dense`, copy the whole tensors, too.

        Raises:
            ValueError: the model lacks a tensor or has it in another shape; with `strict` also where its tensors are not the base's
                (by fingerprint; tensors to which this library added deltas before count as the base that they were). The tensors
                are named; nothing has changed then.
        """
        tensors = self._fitting(model, dense, strict)
        known = self._known(tensors) if strict else {}
        for mask, values in self._by_device(tensors):
            mask.add_(tensors, values, alpha)
        if dense:
            for name, tensor in self.dense.items():
                tensors[name].copy_(tensor)
        self._remember(tensors, known)

    @contextlib.contextmanager
    def applied(self, model: Model, alpha: float = 1.0, dense: bool = True, *, strict: bool = True) -> Iterator[Model]:
        """`with delta.applied(model):` the delta is on the model, and afterwards every touched entry is restored bit for bit."""
        tensors = self._fitting(model, dense, strict)
        known = self._known(tensors) if strict else {}
        before = [(mask, mask.gather({n: tensors[n]})) for m, _ in self._by_device(tensors) for n in m.names for mask in [m[n]]]
        whole = {n: tensors[n].clone() for n in self.dense} if dense else {}
        try:
            self.apply_(model, alpha, dense, strict=strict)
            yield model
        finally:
            for mask, values in before:
                mask.scatter_(tensors, values)
            for name, tensor in whole.items():
                tensors[name].copy_(tensor)
            self._remember(tensors, known)

    def _by_device(self, tensors: Mapping[str, Tensor]) -> list[tuple[CSRMask, Tensor]]:
        """The mask and the values on each device where the model has tensors."""
        by_device: dict[torch.device, list[str]] = {}
        for name in self.mask.names:
            by_device.setdefault(tensors[name].device, []).append(name)
        if len(by_device) == 1:
            device = next(iter(by_device))
            return [(self.mask.to(device), self.values.to(device))]
        parts = self.mask.split(self.values)
        return [
            (self.mask.restrict(names).to(device), torch.cat([parts[n] for n in names]).to(device))
            for device, names in by_device.items()
        ]

    def _fitting(self, model: Model, dense: bool, strict: bool) -> dict[str, Tensor]:
        """The model's tensors that the delta touches, after every check."""
        if isinstance(model, nn.Module) and masked_parameters(model):
            raise ValueError("model is sparsified: densify(model) before a delta is applied")
        live = dict(model.named_parameters()) if isinstance(model, nn.Module) else model
        named_tensors(live, "model")
        expected = dict(zip(self.mask.names, self.mask.shapes))
        if dense:
            expected |= {n: t.shape for n, t in self.dense.items()}
        for name, shape in expected.items():
            if name not in live:
                raise ValueError(f"model lacks tensor {name!r} of the delta")
            if live[name].shape != shape:
                raise ValueError(
                    f"model's tensor {name!r} has shape {list(live[name].shape)}, the delta was made for {list(shape)}"
                )
            if not live[name].is_floating_point():
                raise ValueError(f"model's tensor {name!r} is {live[name].dtype}, a delta needs floating point")
        base = self.metadata.get("base_fingerprint")
        if strict and base:
            found = self._known(live)
            if wrong := [n for n in self.mask.names if n in base and base[n] != found[n]]:
                raise ValueError(
                    f"model is not the base of this delta{_named(self.metadata.get('base_model'))}: {len(wrong)} of "
                    f"{len(self.mask)} tensors have other values, the first is {wrong[0]!r} (strict=False applies it all the same)"
                )
        # Detached views write through, and leaf parameters accept them.
        return {n: live[n].detach() if n in self.dense else live[n] for n in expected}

    def _known(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        return {n: _fingerprint_of(tensors[n]) for n in self.mask.names} if self.metadata.get("base_fingerprint") else {}

    @staticmethod
    def _remember(tensors: Mapping[str, Tensor], known: Mapping[str, str]) -> None:
        for name, value in known.items():
            _KNOWN[tensors[name]] = (value, tensors[name]._version)

    # ---- composition ----

    def compose(*deltas: "SparseDelta") -> "SparseDelta":
        """The sum of deltas of one base: `compose(task, language)`, as in Ansell et al. (2022), eq. 2.

        Values are added in float64 and rounded once to float32; whole tensors are united.

        Raises:
            ValueError: no delta; deltas of different bases; a whole tensor that two deltas hold with different values.
        """
        if not deltas:
            raise ValueError("compose needs at least one delta")
        for i, delta in enumerate(deltas):
            if not isinstance(delta, SparseDelta):
                raise TypeError(f"deltas[{i}] must be a SparseDelta, got {type(delta).__name__}")
        mask = deltas[0].mask
        dense: dict[str, Tensor] = {}
        base: dict[str, str] = {}
        for i, delta in enumerate(deltas):
            mask = mask if i == 0 else mask | delta.mask.to(mask.device)
            for name, tensor in delta.dense.items():
                if name in dense and not torch.equal(dense[name], tensor.to(dense[name].device)):
                    raise ValueError(f"dense tensor {name!r} stands in two deltas with different values")
                dense[name] = tensor
            for name, value in delta.metadata.get("base_fingerprint", {}).items():
                if base.setdefault(name, value) != value:
                    raise ValueError(f"deltas[{i}] was made for another base: tensor {name!r} has another fingerprint")
        if both := [n for n in dense if n in mask]:
            raise ValueError(f"tensor {both[0]!r} is sparse in one delta and whole in another")
        total = torch.zeros(mask.nnz, dtype=torch.float64, device=mask.device)
        for delta in deltas:
            total += delta.mask.to(mask.device).project(delta.values.to(mask.device, torch.float64), mask)
        facts = {"method": "compose", "k": mask.nnz, "base_fingerprint": base, "composed_of": [d._facts() for d in deltas]}
        models = {d.metadata.get("base_model") for d in deltas}
        if len(models) == 1 and None not in models:
            facts["base_model"] = models.pop()
        return SparseDelta(mask, total.to(torch.float32), dense, facts)

    def _facts(self) -> dict[str, Any]:
        return {k: v for k, v in self.metadata.items() if k != "base_fingerprint"}

    # ---- files ----

    def save_pretrained(self, directory: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write `sparse_delta.safetensors` and `sparse_delta_config.json`, each atomically.

        Args:
            dtype: float32 by default; float16 or bfloat16 give the smaller, lossy form, and the config says so.
        """
        dtype = dtype or torch.float32
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        values = self.values.to(dtype)
        if not bool(torch.isfinite(values).all()) and bool(torch.isfinite(self.values).all()):
            raise ValueError(f"dtype: a difference overflows {dtype}; bfloat16 and float32 have the range")
        tensors = {"crow_indices": self.mask.crow_indices, "col_indices": self.mask.col_indices, "values": values}
        tensors |= {_DENSE + n: t for n, t in self.dense.items()}
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        content = _content(tensors)
        config = {
            "format": FORMAT,
            "format_version": 1,
            "names": self.mask.names,
            "shapes": [list(s) for s in self.mask.shapes],
            "nnz": self.mask.nnz,
            "density": self.mask.density,
            "values_dtype": str(dtype).removeprefix("torch."),
            "lossy": dtype != torch.float32,
            "dense": sorted(self.dense),
            "content": content,
            "metadata": self.metadata,
        }
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"  # before any file is touched: it may refuse the metadata
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        partial = [folder / (WEIGHTS_NAME + ".partial"), folder / (CONFIG_NAME + ".partial")]
        try:
            save_file(tensors, partial[0], metadata={"format": FORMAT, "content": content})
            partial[1].write_text(text)
            os.replace(partial[0], folder / WEIGHTS_NAME)
            os.replace(partial[1], folder / CONFIG_NAME)
        finally:
            for path in partial:
                path.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, revision: str | None = None, *, device: torch.device | str = "cpu"
    ) -> "SparseDelta":
        """Read a folder that `save_pretrained` wrote, or a repository of the Hugging Face hub.

        Raises:
            FileNotFoundError: there is no such folder, or a file is missing in it.
            ValueError: a file is damaged, of another format, or the two files do not belong together.
        """
        folder = Path(path)
        if not folder.is_dir():
            folder = _download(str(path), revision)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} holds no {name}")
        try:
            config = json.loads((folder / CONFIG_NAME).read_text())
            if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("format_version") != 1:
                raise ValueError(f"{folder / CONFIG_NAME} is not a {FORMAT} configuration of version 1")
            with safe_open(folder / WEIGHTS_NAME, framework="pt", device=str(device)) as file:
                if (file.metadata() or {}).get("content") != config["content"]:
                    raise ValueError(f"{folder}: {WEIGHTS_NAME} and {CONFIG_NAME} do not belong together; save the delta again")
                mask = CSRMask(config["names"], config["shapes"], file.get_tensor("crow_indices"), file.get_tensor("col_indices"))
                dense = {n: file.get_tensor(_DENSE + n) for n in config["dense"]}
                return cls(mask, file.get_tensor("values"), dense, config["metadata"])
        except (SafetensorError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{folder} holds no readable sparse delta: {error}") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload sparse delta",
    ) -> str:
        """Upload to a repository of the Hugging Face hub, made where it does not exist. Returns the commit's address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


compose = SparseDelta.compose


# ---- fingerprints -------------------------------------------------------------------------------------------------------

# Tensor → (its fingerprint before any delta, its version when a delta had been added or taken away): deltas can be stacked.
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fingerprint(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name → 16 hexadecimal digits of a tensor's dtype, shape and bits: the same on every device, another for other values."""
    return {n: _fingerprint_of(t) for n, t in tensors.items()}


def _fingerprint_of(tensor: Tensor) -> str:
    known = _KNOWN.get(tensor)
    if known is not None and known[1] == tensor._version:
        return known[0]
    bits = tensor.detach().contiguous().view(-1).view(_INTEGER[tensor.element_size()])
    total, start = 0, 0
    for chunk in bits.split(1 << 22):
        # A sum modulo 2**64 with an odd weight for each place: exact, so independent of the order in which a device adds.
        place = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=bits.device)
        total += int(((place * 0x5851F42D4C957F2D + 0x14057B7EF767814F).bitwise_or_(1) * chunk.to(torch.int64)).sum())
        start += chunk.numel()
    text = f"{tensor.dtype} {list(tensor.shape)} {total % (1 << 64)}"
    value = hashlib.sha256(text.encode()).hexdigest()[:16]
    _KNOWN[tensor] = (value, tensor._version)
    return value


def _content(tensors: Mapping[str, Tensor]) -> str:
    """What the two files of one save have in common."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- differences --------------------------------------------------------------------------------------------------------


def _differs(new: Tensor, old: Tensor) -> Tensor:
    """bool, like `old`: where the values differ (NaN equals NaN; 0.0 equals -0.0)."""
    new = new.to(old.device)
    return (new != old) & ~((new != new) & (old != old))


def _exact_difference(mask: CSRMask, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """float32 [nnz] d with base + d = tuned where there is such a d; the number of entries where there is none."""
    values, inexact = [], 0
    for name in mask.names:
        one = mask[name]
        base, tuned = one.gather(old), one.gather({name: new[name].to(mask.device)})
        wide = torch.float64 if torch.float64 in (base.dtype, tuned.dtype) else torch.float32
        best = (tuned.to(wide) - base.to(wide)).to(torch.float32)
        infinity = torch.full_like(best, torch.inf)
        for candidate in (best, torch.nextafter(best, infinity), torch.nextafter(best, -infinity)):
            off = _added(base, best) != tuned
            if not bool(off.any()):
                break
            best = torch.where(off & (_added(base, candidate) == tuned), candidate, best)
        inexact += int((_added(base, best) != tuned).sum())
        values.append(best)
    return torch.cat(values), inexact


def _added(base: Tensor, difference: Tensor) -> Tensor:
    """base + difference as `CSRMask.add_` computes it."""
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    return (base.to(wide) + difference.to(wide)).to(base.dtype)


def _named(model: str | None) -> str:
    return f" ({model})" if model else ""


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=[WEIGHTS_NAME, CONFIG_NAME]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(f"{repo_id!r} is neither a folder nor a repository that the hub gave: {error}") from error
