"""SparseDelta: made from two models, added to a model, composed, saved and loaded."""

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from deftx_kernels.delta import storage
from deftx_kernels.delta.change import Change
from deftx_kernels.delta.exact import SUMMABLE, Low, differs, exact_difference
from deftx_kernels.delta.fingerprints import fingerprint, update
from deftx_kernels.files import reading
from deftx_kernels.mask import CSRMask, usable_in_backward
from deftx_kernels.nn import masked_parameters, plain_tensors
from deftx_kernels.validation import (
    all_tensors,
    check_plain,
    check_readable,
    check_writable,
    is_number,
    plain_name,
    tied_in_either,
    tied_names,
    unwrapped,
    with_tied_names,
)

_DENSE = "dense."

Model = nn.Module | Mapping[str, Tensor]


class SparseDelta:
    """What fine-tuning changed: differences at the entries of a mask, and whole tensors such as the head.

    Args:
        mask: the entries.
        values: compact [mask.nnz], the differences (float32).
        dense: name → tensor that replaces the model's (a head, an integer buffer). Not scaled, not added.
        metadata: JSON-serialisable facts: method, base_model, base_fingerprint (name → that of the base's tensor),
            base_dtype (where the mask's tensors had one), tied (further name → name here of a tensor that the base had
            twice), lossy (the dtype that the values were rounded to), k, settings.
        low: second terms, for the entries where no float32 gives the tuned tensor back bit for bit: their places in the
            compact order, integer [m], ascending, and what is to be added to base + value there, float64 [m]. `values`
            alone is the float32 nearest to the difference. None, also as the attribute, where there are none.

    Raises:
        ValueError, TypeError: values that are not compact or not floating point; a tensor both in mask and dense, or no
            plain tensor in dense (a DTensor, on meta); low terms, a base_fingerprint or a tied of another form.
    """

    def __init__(
        self,
        mask: CSRMask,
        values: Tensor,  # [nnz]
        dense: Mapping[str, Tensor] | None = None,
        metadata: Mapping[str, Any] | None = None,
        low: Low | None = None,  # [m], [m]
    ) -> None:
        mask.check_compact(values, "values")
        if not values.is_floating_point():
            raise TypeError(f"values must be floating point, got {values.dtype}")
        for name, tensor in (dense or {}).items():
            check_plain(tensor, f"dense[{name!r}]")
            check_readable(tensor, f"dense[{name!r}]")
        self.mask = mask
        self.values = usable_in_backward(values.detach()).to(torch.float32)
        self.dense = {n: usable_in_backward(t.detach()) for n, t in (dense or {}).items()}
        self.metadata = dict(metadata or {})
        self.low = _checked_low(low, mask)
        if both := [n for n in self.dense if n in mask]:
            raise ValueError(f"dense: {both[0]!r} is covered by the mask as well")
        for key, what in (("base_fingerprint", "fingerprints"), ("tied", "names")):
            found = self.metadata.get(key, {})
            if not isinstance(found, Mapping) or not all(
                isinstance(text, str) for item in found.items() for text in item
            ):
                raise TypeError(f"metadata: {key} must be a mapping of names to {what}")

    def __repr__(self) -> str:
        method = self.metadata.get("method", "unknown")
        return f"SparseDelta(method={method}, {self.mask!r}, dense={sorted(self.dense)})"

    def to(self, device: torch.device | str) -> "SparseDelta":
        """This delta on a device."""
        dense = {n: t.to(device) for n, t in self.dense.items()}
        low = None if self.low is None else (self.low[0].to(device), self.low[1].to(device))
        return SparseDelta(self.mask.to(device), self.values.to(device), dense, self.metadata, low)

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
        """tuned - base, chosen so that base + delta gives `tuned` back bit for bit.

        Args:
            tuned, base: modules (their named parameters and persistent buffers; of a sparsified model those of the
                plain one; names as without torch.compile and DistributedDataParallel) or mappings. Tensors that are
                tied in `base`, or in `tuned` and equal in `base`, count once, under their first name in `base`; `tied`
                in the metadata has the others. Buffers of a module count where both have them: those that differ and
                are not in the mask are kept whole.
            mask: the entries that may differ; by default those that do. A difference is one of bits: 0.0 and -0.0
                differ.
            dense: names of tensors to keep whole. Tensors that only `tuned` has are kept whole, too.
            metadata: goes into the delta's. `inexact_entries` is added: how many entries no difference can carry
                exactly (some of float64 or of another dtype in `tuned`, infinities and NaN in `base`, payloads of NaN).

        Raises:
            ValueError: a tensor is missing in `tuned`, has another shape, differs outside the mask, or is on the meta
                device; tensors of `base` share a part of their memory, or are tied and differ in `tuned`.
            TypeError: the mask covers a tensor that is not floating point; something is no plain tensor (a DTensor).
        """
        old, old_buffers = _model_tensors(base, "base")
        new, new_buffers = _model_tensors(tuned, "tuned")
        wanted = set(dense)
        buffers = (old_buffers | new_buffers) & old.keys() & new.keys()
        old = {n: t for n, t in old.items() if n in new or n not in old_buffers}
        tied = tied_names(old, "base")
        new = with_tied_names({n: t for n, t in new.items() if n in old or n in wanted or n not in new_buffers}, tied)
        tied_in_tuned = tied_names({n: new[n] for n in sorted(new, key=lambda n: n not in old)}, "tuned")
        covered = () if mask is None else mask.names
        for name, first in tied_in_either(old, new).items():
            if name not in covered and not (name in wanted and first in covered):  # else they are meant to be two
                tied[name] = first
        for name in sorted(wanted - new.keys()):
            raise ValueError(f"dense names {name!r}, which tuned lacks")
        whole = {tied.get(n, n) for n in wanted} | {n for n in new.keys() - old.keys() if tied_in_tuned[n] == n}
        shared = sorted(n for n in old if n not in whole and tied[n] == n)
        for name in shared:
            if name not in new:
                raise ValueError(f"tuned lacks tensor {name!r} of base")
            if new[name].shape != old[name].shape:
                raise ValueError(
                    f"tensor {name!r} has shape {list(new[name].shape)} in tuned and {list(old[name].shape)} in base"
                )
        differing = {n: differs(new[n], old[n]) for n in shared}
        for name in [n for n in shared if n in buffers and n not in covered]:
            if bool(differing.pop(name).any()):
                whole.add(name)
        if mask is None:
            names = [n for n in differing if old[n].dtype in SUMMABLE]
            changed = [n for n in names if bool(differing[n].any())] or names
            mask = CSRMask.from_dense({n: differing[n] for n in changed})
        for name, tensor in zip(mask.names, mask.checked_tensors(old, "base")):
            if tied[name] != name:
                raise ValueError(
                    f"mask covers {name!r}, which is the tensor {tied[name]!r} of base: its mask goes by that name"
                )
            if not {tensor.dtype, new[name].dtype} <= SUMMABLE:
                raise TypeError(f"mask covers {name!r}, which is {tensor.dtype} in base and {new[name].dtype} in tuned")
            if name in differing:
                one = mask[name].to(differing[name].device)
                one.scatter_(differing, torch.zeros(one.nnz, dtype=torch.bool, device=one.device))
        for name, outside in differing.items():
            if bool(outside.any()):
                raise ValueError(
                    f"tuned differs from base in {int(outside.sum())} entries of {name!r} that neither mask nor dense covers"
                )
        values, low, inexact = _exact_differences(mask, new, old)
        facts = {
            **(metadata or {}),
            "k": mask.nnz,
            "inexact_entries": inexact,
            "base_fingerprint": fingerprint({n: old[n] for n in mask.names}),
        }
        if len(dtypes := {old[n].dtype for n in mask.names}) == 1:
            facts["base_dtype"] = str(dtypes.pop()).removeprefix("torch.")
        if aliases := {n: first for n, first in tied.items() if n != first and (first in mask or first in whole)}:
            facts["tied"] = aliases
        return cls(mask, values, {n: new[n].clone() for n in sorted(whole)}, facts, low)

    # ---- on models ----

    def apply_(self, model: Model, alpha: float = 1.0, dense: bool = True, *, strict: bool = True) -> None:
        """model += alpha * delta at the mask's entries, in float32 or better; with `dense`, copy the whole tensors,
        too.

        Where the base had a tensor under several names, each of them that `model` has is written, also where they are
        copies.

        Raises:
            ValueError: the model lacks a tensor, has it in another shape or where it cannot be written, has two of the
                delta's tensors in the same memory, or has one in an open `applied` block; with `strict` also where its
                tensors are not the base's (by fingerprint; content that this library made by adding deltas counts as
                the base that it was), copies of a tied tensor differ (without `strict` they stay as they are) or this
                delta is on them already, unless `alpha` takes it off. The tensors are named. Nothing has changed then,
                nor after any other error.
            TypeError: a tensor is not floating point or no plain tensor (a DTensor).
        """
        change = self._change(model, alpha, dense, strict)
        change.check_free()
        self._check_base(change)
        change.write(remember=strict)

    @contextlib.contextmanager
    def applied(self, model: Model, alpha: float = 1.0, dense: bool = True, *, strict: bool = True) -> Iterator[Model]:
        """`with delta.applied(model):` the delta is on the model, and afterwards every touched entry is restored bit
        for bit.

        Several may be open on one model, and be closed in any order: those that stay open are then on the base as if
        the closed one had never been. Errors as `apply_`. Entries and whole tensors of the delta that are changed in
        another way meanwhile are restored, too, with a RuntimeWarning. Of tensors that are replaced meanwhile the new
        ones are restored.

        Raises:
            RuntimeError: at the end, naming the tensors that have another shape now; all others are restored. After an
                exception in the block it is a RuntimeWarning.
        """
        change = self._change(model, alpha, dense, strict)
        self._check_base(change)
        change.open()
        try:
            yield model
        except BaseException:
            with contextlib.suppress(RuntimeWarning):  # where warnings are errors; that of the block counts
                if found := " ".join(filter(None, change.close())):
                    warnings.warn(found, RuntimeWarning, stacklevel=3)
            raise
        lost, changed = change.close()
        if lost:
            raise RuntimeError(f"{lost} {changed}".rstrip())
        if changed:
            warnings.warn(changed, RuntimeWarning, stacklevel=3)

    def _change(self, model: Model, alpha: float, dense: bool, strict: bool) -> Change:
        """The addition to the model's tensors, after every check but those of their content."""
        if not is_number(alpha):
            raise ValueError(f"alpha must be a finite number, got {alpha!r}")
        if isinstance(model, nn.Module):
            if masked_parameters(model):
                raise ValueError("model is sparsified: densify(model) before a delta is applied")
        else:
            all_tensors(model, "model")
        live = _live(model)
        whole = self.dense if dense else {}
        shapes = dict(zip(self.mask.names, self.mask.shapes)) | {n: t.shape for n, t in whole.items()}
        tied = self.metadata.get("tied", {}).items()
        aliases = {n: first for n, first in tied if first in shapes and n not in shapes and n in live}
        shapes |= {n: shapes[first] for n, first in aliases.items()}
        labels = {n: f"model's tensor {n!r}" for n in shapes}
        for name, shape in shapes.items():
            if name not in live:
                wrapped = [w + name for w in ("_orig_mod.", "module.") if w + name in live]
                has = f", but has {wrapped[0]!r}: give the tensors of the model inside its wrapper" if wrapped else ""
                raise ValueError(f"model lacks tensor {name!r} of the delta{has}")
            tensor = live[name]
            check_plain(tensor, labels[name])
            check_readable(tensor, labels[name])
            if tensor.shape != shape:
                raise ValueError(f"{labels[name]} has shape {list(tensor.shape)}, the delta was made for {list(shape)}")
            if (name in self.mask or aliases.get(name) in self.mask.positions) and tensor.dtype not in SUMMABLE:
                raise ValueError(f"{labels[name]} is {tensor.dtype}, a difference needs floating point")
            if name in whole and not torch.can_cast(whole[name].dtype, tensor.dtype):
                raise ValueError(f"{labels[name]} is {tensor.dtype}, the delta has it as {whole[name].dtype}")
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                raise ValueError(f"{labels[name]} was made in inference_mode and can be written only there")
        targets = {n: live[n] for n in shapes}
        for name, first in tied_names(targets, "model").items():
            if name != first:
                if aliases.get(name) != aliases.get(first, first):
                    raise ValueError(f"model has one tensor as {first!r} and {name!r}, the delta changes both")
                del targets[name], aliases[name]
        for name, first in list(aliases.items()):
            if not _same(targets[name], targets[first]):
                if strict:
                    raise ValueError(
                        f"{labels[name]} was tied to {first!r} in the base of this delta, here it has other values (strict=False "
                        "leaves it as it is)"
                    )
                del targets[name], aliases[name]
        check_writable({labels[n]: t for n, t in targets.items()})
        identity, base = self._identity() if strict else None, self.metadata.get("base_fingerprint", {})
        follow = functools.partial(_live, model)
        return Change(self.mask, self.values, self.low, whole, targets, aliases, follow, alpha, identity, base)

    def _check_base(self, change: Change) -> None:
        """ValueError unless the tensors are those of the delta's base and do not have it on them, where histories
        count.
        """
        found = change.histories()
        if wrong := [n for n, known in found.items() if change.base.get(n, known.base) != known.base]:
            model, dtype = self.metadata.get("base_model"), self.metadata.get("base_dtype")
            now = str(change.tensors[wrong[0]].dtype).removeprefix("torch.")
            if dtype is not None and dtype != now:
                raise ValueError(
                    f"model's tensor {wrong[0]!r} is {now}, the delta was made for a base in {dtype} (strict=False applies it all "
                    "the same)"
                )
            raise ValueError(
                f"model is not the base of this delta{f' ({model})' if model else ''}: {len(wrong)} of {len(self.mask)} tensors "
                f"have other values, the first is {wrong[0]!r} (strict=False applies it all the same)"
            )
        for name, known in found.items():
            there = known.deltas.get(str(change.identity), 0.0)
            if there and there + change.alpha:
                raise ValueError(
                    f"this delta is on model's tensor {name!r} already, with alpha = {there}: alpha = {-there} takes it off "
                    "(strict=False adds it again)"
                )

    def _identity(self) -> str:
        """The content hash by which a model remembers the delta."""
        sha = hashlib.sha256(self.mask.fingerprint().encode())
        for tensor in (self.values, *(self.low or ())):
            update(sha, tensor)
        return sha.hexdigest()

    # ---- composition ----

    def compose(*deltas: "SparseDelta") -> "SparseDelta":
        """The sum of deltas of one base: `compose(task, language)`, as in Ansell et al. (2022), eq. 2.

        Values are added in float64 and rounded once to float32; where one delta has a second term, the sum has one,
        too. Whole tensors are united.

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
        tied: dict[str, str] = {}
        for i, delta in enumerate(deltas):
            mask = mask if i == 0 else mask | delta.mask.to(mask.device)
            for name, tensor in delta.dense.items():
                if not _same(dense.setdefault(name, tensor), tensor):
                    raise ValueError(f"dense tensor {name!r} stands in two deltas with different values")
            for name, value in delta.metadata.get("base_fingerprint", {}).items():
                if base.setdefault(name, value) != value:
                    raise ValueError(f"deltas[{i}] was made for another base: tensor {name!r} has another fingerprint")
            tied |= delta.metadata.get("tied", {})
        if both := [n for n in dense if n in mask]:
            raise ValueError(f"tensor {both[0]!r} is sparse in one delta and whole in another")
        values, low = _sum(deltas, mask)
        facts = {
            "method": "compose",
            "k": mask.nnz,
            "base_fingerprint": base,
            "composed_of": [d._facts() for d in deltas],
        }
        for key in ("base_model", "base_dtype"):
            first = deltas[0].metadata.get(key)
            if first is not None and all(d.metadata.get(key) == first for d in deltas):
                facts[key] = first
        if tied:
            facts["tied"] = tied
        if lossy := [d.metadata["lossy"] for d in deltas if d.metadata.get("lossy")]:
            facts["lossy"] = lossy[0]
        return SparseDelta(mask, values, dense, facts, low)

    def _facts(self) -> dict[str, Any]:
        return {k: v for k, v in self.metadata.items() if k not in ("base_fingerprint", "tied")}

    # ---- files ----

    def save_pretrained(self, directory: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write `sparse_delta.safetensors` and `sparse_delta_config.json`.

        A crash, a kill or a full disk leave the old delta or the new one, whole; of several savers the last one counts.

        Args:
            dtype: float32 by default; float16 or bfloat16 give the smaller, lossy form (without second terms). The
                config says so, and the metadata: `lossy` is the dtype, also when the delta is loaded and saved again,
                    and `inexact_entries` goes.

        Raises:
            TypeError, ValueError: metadata that JSON cannot hold, by its key; a dtype that the values overflow. Nothing
                has been written.
            OSError: `directory` is a file, or a file cannot be written; the message names it.
        """
        dtype = dtype or torch.float32
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        values = self.values.to(dtype)
        if not bool(torch.isfinite(values).all()) and bool(torch.isfinite(self.values).all()):
            raise ValueError(f"dtype: a difference overflows {dtype}; bfloat16 and float32 have the range")
        tensors = {"crow_indices": self.mask.crow_indices, "col_indices": self.mask.col_indices, "values": values}
        if self.low is not None and dtype == torch.float32:
            places = self.low[0].to(torch.int32) if self.mask.nnz < 2**31 else self.low[0]
            tensors |= {"low_indices": places, "low_values": self.low[1]}
        tensors |= {_DENSE + n: t for n, t in self.dense.items()}
        metadata = dict(self.metadata)
        if dtype != torch.float32:
            metadata["lossy"] = str(dtype).removeprefix("torch.")
            metadata.pop("inexact_entries", None)
        for key, value in metadata.items():
            try:
                json.dumps({key: value})
            except (TypeError, ValueError, RecursionError) as error:
                raise TypeError(f"metadata[{key!r}] cannot be written as JSON: {error}") from error
        config = {
            "names": self.mask.names,
            "shapes": [list(s) for s in self.mask.shapes],
            "nnz": self.mask.nnz,
            "density": self.mask.density,
            "values_dtype": str(dtype).removeprefix("torch."),
            "lossy": bool(metadata.get("lossy")),
            "dense": sorted(self.dense),
            "metadata": metadata,
        }
        storage.save(Path(directory), {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}, config)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, revision: str | None = None, *, device: torch.device | str = "cpu"
    ) -> "SparseDelta":
        """Read a folder that `save_pretrained` wrote, or a repository of the Hugging Face hub.

        Raises:
            FileNotFoundError: there is no such folder, or a file is missing in it.
            ValueError: a file is damaged (its checksum is computed again) or of another format; the message names it.
        """
        folder = Path(path)
        if folder.is_file():
            raise FileNotFoundError(f"{path} is a file: a sparse delta is the folder that holds it")
        if not folder.is_dir():
            folder = _download(str(path), revision)
        config, tensors = storage.load(folder)
        with reading(folder / storage.WEIGHTS_NAME, "sparse delta"):
            if not isinstance(config["dense"], list) or not isinstance(config["metadata"], dict):
                raise ValueError("its configuration must have dense as a list and metadata as an object")
            mask = CSRMask(config["names"], config["shapes"], tensors.pop("crow_indices"), tensors.pop("col_indices"))
            values = tensors.pop("values")
            low = (tensors.pop("low_indices"), tensors.pop("low_values")) if "low_indices" in tensors else None
            dense = {n: tensors.pop(_DENSE + n) for n in config["dense"]}
            if tensors:
                raise ValueError(f"it holds tensor {min(tensors)!r}, which its configuration does not name")
            delta = cls(mask, values, dense, config["metadata"], low)
        return delta.to(device)

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


def _checked_low(low: Low | None, mask: CSRMask) -> Low | None:
    if low is None or not len(low[0]):
        return None
    places, values = low
    if places.dtype not in (torch.int32, torch.int64) or places.dim() != 1:
        raise TypeError(f"low[0] must be int32 or int64 [m], got {places.dtype} {list(places.shape)}")
    if values.dtype != torch.float64 or values.shape != places.shape:
        raise TypeError(f"low[1] must be float64 {list(places.shape)}, got {values.dtype} {list(values.shape)}")
    places = usable_in_backward(places.detach()).to(mask.device, torch.int64)
    if int(places[0]) < 0 or int(places[-1]) >= mask.nnz or bool((places[1:] <= places[:-1]).any()):
        raise ValueError(f"low[0] must ascend within [0, nnz) = [0, {mask.nnz})")
    return places, usable_in_backward(values.detach()).to(mask.device)


def _live(model: Model) -> dict[str, Any]:
    """Name → parameter or buffer as the model has it now, tied ones under each name."""
    if not isinstance(model, nn.Module):
        return dict(model)
    inner = unwrapped(model)
    found = (*inner.named_parameters(remove_duplicate=False), *inner.named_buffers(remove_duplicate=False))
    return {plain_name(n): t for n, t in found}


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for prefix, module in unwrapped(model).named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if name not in module._non_persistent_buffers_set:
                found[plain_name(f"{prefix}.{name}" if prefix else name)] = buffer.detach()
    return found


def _model_tensors(model: Model, argument: str) -> tuple[dict[str, Tensor], set[str]]:
    """Name → tensor, tied ones under each name, of a sparsified model those of the plain one; the names of a module's
    buffers.
    """
    sparsified = isinstance(model, nn.Module) and masked_parameters(model)
    tensors = all_tensors(plain_tensors(unwrapped(model)) if sparsified else model, argument)  # type: ignore[arg-type]
    tensors = {plain_name(n): t for n, t in tensors.items()} if sparsified else tensors
    buffers = _persistent_buffers(model) if isinstance(model, nn.Module) else {}
    tensors |= buffers
    for name, tensor in tensors.items():
        check_plain(tensor, f"{argument}[{name!r}]")
        check_readable(tensor, f"{argument}[{name!r}]")
    return tensors, set(buffers)


def _exact_differences(mask: CSRMask, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> tuple[Tensor, Low, int]:
    """`exact_difference` at the mask's entries: compact values, low terms, and the number of inexact entries."""
    values, places, rests, start, inexact = [], [], [], 0, 0
    for name in mask.names:
        one = mask[name]
        value, (place, rest), bad = exact_difference(one.gather(old), one.gather({name: new[name].to(mask.device)}))
        values.append(value)
        places.append(place + start)
        rests.append(rest)
        start += one.nnz
        inexact += bad
    return torch.cat(values), (torch.cat(places), torch.cat(rests)), inexact


def _sum(deltas: Iterable[SparseDelta], mask: CSRMask) -> tuple[Tensor, Low | None]:
    """Values and low terms of the sum, over the mask of all; low terms where a delta has one or float32 cannot hold the
    sum.
    """
    values = torch.zeros(mask.nnz, dtype=torch.float64, device=mask.device)
    low = torch.zeros_like(values)
    has_low = torch.zeros_like(values, dtype=torch.bool)
    for delta in deltas:
        own = delta.mask.to(mask.device)
        values += own.project(delta.values.to(mask.device, torch.float64), mask)
        if delta.low is not None:
            places, rest = (t.to(mask.device) for t in delta.low)
            low += own.project(rest.new_zeros(own.nnz).index_copy_(0, places, rest), mask)
            has_low |= own.project(
                torch.zeros(own.nnz, dtype=torch.bool, device=mask.device).index_fill_(0, places, True), mask
            )
    total, most = values + low, torch.finfo(torch.float32).max
    high = torch.where(total.isfinite(), total.clamp(-most, most), total).to(torch.float32)
    places = (has_low | (total.isfinite() & (total.abs() > most))).nonzero().view(-1)
    return high, (places, (values[places] - high[places].to(torch.float64)) + low[places])


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and not bool(differs(one, other).any())


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=[storage.WEIGHTS_NAME, storage.CONFIG_NAME])
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{repo_id!r} is neither a folder nor a repository that the hub gave: {error}"
        ) from error
