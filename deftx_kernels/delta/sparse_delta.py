"""SparseDelta: made from two models, added to a model, composed, saved and loaded."""

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from deftx_kernels.delta import storage
from deftx_kernels.delta.arithmetic import Terms, rounded, weighted_sum
from deftx_kernels.delta.card import CARD_NAME, model_card
from deftx_kernels.delta.change import Change
from deftx_kernels.delta.exact import Low, exact_differences
from deftx_kernels.delta.fingerprints import fingerprint, update
from deftx_kernels.delta.models import Model, checked_mask, checked_targets, current_tensors, match_tensors
from deftx_kernels.delta.renaming import picked_entries, renamed_parts, tensor_names
from deftx_kernels.files import reading
from deftx_kernels.mask import CSRMask
from deftx_kernels.validation import check_plain, check_readable, is_number, same_bits, usable_in_backward

_DENSE = "dense."


class SparseDelta:
    """What fine-tuning changed: differences at the entries of a mask, and whole tensors such as the head.

    Args:
        mask: the entries.
        values: compact [mask.nnz], the differences (float32).
        dense: name → tensor that replaces the model's (a head, an integer buffer). Not scaled, not added.
        metadata: JSON-serialisable: method, base_model, base_fingerprint (name → that of the base's tensor),
            base_dtype (if the mask's tensors had one), tied (further name → name here of a tensor that the base had
            twice), lossy (the dtype that the values were rounded to), k, settings.
        low: low terms, for the entries where no float32 difference gives the tuned tensor back bit for bit: positions
            in the compact order, integer [m], ascending, and what is added to base + value there, float64 [m].
            `values` alone is the float32 nearest to the difference. None, also as the attribute, if there are none.

    Raises:
        ValueError, TypeError: `values` are not compact or not floating point; a tensor is both in mask and dense, or
            not plain in dense (a DTensor, on meta); low, base_fingerprint or tied have another form.

    Example:
        >>> base, tuned = {"w": torch.zeros(3)}, {"w": torch.tensor([0.0, 0.5, 0.0])}
        >>> delta = SparseDelta.from_models(tuned, base)
        >>> delta.mask.nnz, delta.values
        (1, tensor([0.5000]))
        >>> with delta.applied(base):
        ...     base["w"]
        tensor([0.0000, 0.5000, 0.0000])
        >>> base["w"]
        tensor([0., 0., 0.])
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
            if not isinstance(found, Mapping) or any(not isinstance(s, str) for s in (*found, *found.values())):
                raise TypeError(f"metadata: {key} must be a mapping of names to {what}")

    def __repr__(self) -> str:
        method = self.metadata.get("method", "unknown")
        return f"SparseDelta(method={method}, {self.mask!r}, dense={sorted(self.dense)})"

    def to(self, device: torch.device | str) -> "SparseDelta":
        """This delta on a device."""
        dense = {n: t.to(device) for n, t in self.dense.items()}
        low = None if self.low is None else (self.low[0].to(device), self.low[1].to(device))
        return SparseDelta(self.mask.to(device), self.values.to(device), dense, self.metadata, low)

    def renamed(self, names: Mapping[str, str]) -> "SparseDelta":
        """This delta with other names of its tensors: old name → new name; tensors that are not in `names` keep theirs.

        Raises:
            ValueError: the delta has no tensor of an old name, or two of its tensors would have one name.
        """
        return SparseDelta(*renamed_parts(self.mask, self.values, self.dense, self.metadata, self.low, names))

    def with_prefix(self, prefix: str) -> "SparseDelta":
        """This delta for a model that has its base as a part: `delta.with_prefix("bert.")` for that of an encoder."""
        return self.renamed({n: prefix + n for n in tensor_names(self.mask, self.dense, self.metadata)})

    def without_prefix(self, prefix: str) -> "SparseDelta":
        """The inverse of `with_prefix`. ValueError, naming the tensor, if a name does not begin with the prefix."""
        own = tensor_names(self.mask, self.dense, self.metadata)
        if other := [n for n in own if not n.startswith(prefix)]:
            raise ValueError(f"prefix: the delta's tensor {other[0]!r} does not begin with {prefix!r}")
        return self.renamed({n: n.removeprefix(prefix) for n in own})

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
                in the metadata has the others. Buffers of a module count if both have them: those that differ and
                are not in the mask are kept whole.
            mask: the entries that may differ; by default those that do. Bits are compared: 0.0 and -0.0 differ.
            dense: names of tensors to keep whole. Tensors that only `tuned` has are kept whole, too.
            metadata: goes into the delta's. `inexact_entries` is added: how many entries no difference can give back
                exactly (some of float64 or of another dtype in `tuned`, infinities and NaN in `base`, payloads of NaN).

        Raises:
            ValueError: a tensor is missing in `tuned`, has another shape, differs outside the mask, or is on the meta
                device; tensors of `base` share a part of their memory, or are tied and differ in `tuned`.
            TypeError: the mask covers a tensor that is not floating point; a tensor is not plain (a DTensor).
        """
        matched = match_tensors(tuned, base, mask, dense)
        new, old, tied, whole = matched.tuned, matched.base, matched.tied, matched.whole
        mask = checked_mask(matched, mask)
        values, low, inexact = exact_differences(mask, old, new)
        details = {
            **(metadata or {}),
            "k": mask.nnz,
            "inexact_entries": inexact,
            "base_fingerprint": fingerprint({n: old[n] for n in mask.names}),
        }
        if len(dtypes := {old[n].dtype for n in mask.names}) == 1:
            details["base_dtype"] = _dtype_name(dtypes.pop())
        if copies := {n: first for n, first in tied.items() if n != first and (first in mask or first in whole)}:
            details["tied"] = copies
        return cls(mask, values, {n: new[n].clone() for n in sorted(whole)}, details, low)

    # ---- on models ----
    def apply_(self, model: Model, alpha: float = 1.0, dense: bool = True, *, strict: bool = True) -> None:
        """model += alpha * delta at the mask's entries, in float32 or better; with `dense`, copy the whole tensors,
        too.

        If the base had a tensor under several names, each of them that `model` has is written, copies included.

        Raises:
            ValueError: the model lacks a tensor, has it in another shape or where it cannot be written, has two of the
                delta's tensors in the same memory, or has one in an open `applied` block or with an active adapter;
                with `strict` also if its tensors are not the base's (by fingerprint; deltas that this library added
                before do not count), copies of a tied tensor differ (without `strict` they stay as they are) or the
                delta has been added already, unless `alpha` removes it. The tensors are named. After any error the
                model is unchanged.
            TypeError: a tensor is not floating point or not a plain tensor (a DTensor).
        """
        change = self._change(model, alpha, dense, strict)
        change.check_not_open()
        self._check_base(change)
        change.write()

    @contextlib.contextmanager
    def applied(self, model: Model, alpha: float = 1.0, dense: bool = True, *, strict: bool = True) -> Iterator[Model]:
        """`with delta.applied(model):` the model has the delta, and afterwards every touched entry is restored bit for
        bit.

        Several may be open on one model and be closed in any order: the model then is its base with those that are
        still open. Errors as `apply_`. Entries and whole tensors of the delta that other code changes meanwhile are
        restored, too, with a RuntimeWarning. If tensors of the model are replaced meanwhile, the new ones are restored.

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
            with contextlib.suppress(RuntimeWarning):  # if warnings are errors: that of the block is raised
                if messages := " ".join(filter(None, change.close())):
                    warnings.warn(messages, RuntimeWarning, stacklevel=3)
            raise
        not_restored, overwritten = change.close()
        if not_restored:
            raise RuntimeError(f"{not_restored} {overwritten}".rstrip())
        if overwritten:
            warnings.warn(overwritten, RuntimeWarning, stacklevel=3)

    def check_base(self, model: Model, strict: bool = True) -> None:
        """ValueError or TypeError, as in `apply_`, unless this delta can be added to the model."""
        self._check_base(self._change(model, 1.0, dense=True, strict=strict))

    def _change(self, model: Model, alpha: float, dense: bool, strict: bool) -> Change:
        """The addition to the model's tensors, after every check but those of their content."""
        if not is_number(alpha):
            raise ValueError(f"alpha must be a finite number, got {alpha!r}")
        whole = self.dense if dense else {}
        targets, copies = checked_targets(model, self.mask, whole, self.metadata.get("tied", {}), strict)
        identity, base = self.content_hash() if strict else None, self.metadata.get("base_fingerprint", {})
        current = functools.partial(current_tensors, model)
        return Change(self.mask, self.values, self.low, whole, targets, copies, current, alpha, identity, base)

    def _check_base(self, change: Change) -> None:
        """ValueError, where histories are read, unless the tensors are the base's and do not have this delta yet."""
        histories = change.read_histories()
        if wrong := [n for n, found in histories.items() if change.base.get(n, found.base) != found.base]:
            model, dtype = self.metadata.get("base_model"), self.metadata.get("base_dtype")
            if dtype is not None and dtype != (now := _dtype_name(change.tensors[wrong[0]].dtype)):
                raise ValueError(
                    f"model's tensor {wrong[0]!r} is {now}, the delta was made for a base in {dtype}: strict=False "
                    f"adds it and rounds each sum to {now} once"
                )
            raise ValueError(
                f"model is not the base of this delta{f' ({model})' if model else ''}: {len(wrong)} of "
                f"{len(self.mask)} tensors have other values, the first is {wrong[0]!r} (strict=False applies it "
                "anyway)"
            )
        for name, found in histories.items():
            present = found.deltas.get(str(change.identity), 0.0)
            if present and present + change.alpha:
                raise ValueError(
                    f"this delta has been added to model's tensor {name!r} already, with alpha = {present}: "
                    f"alpha = {-present} removes it (strict=False adds it again)"
                )

    def content_hash(self) -> str:
        """SHA-256 (hex) of mask, values and low terms."""
        sha = hashlib.sha256(self.mask.fingerprint().encode())
        for tensor in (self.values, *(self.low or ())):
            update(sha, tensor)
        return sha.hexdigest()

    # ---- arithmetic ----
    @property
    def terms(self) -> Terms:
        """Mask, values and low terms."""
        return Terms(self.mask, self.values, self.low)

    def restricted(self, names: Mapping[str, str]) -> "SparseDelta":
        """The delta of some of the mask's tensors, without whole ones. `names`: name → name in the result."""
        mask, values, low = picked_entries(self.mask, self.values, self.low, names)
        base, tied = self.metadata.get("base_fingerprint", {}), self.metadata.get("tied", {})
        metadata = {
            **self.metadata,
            "base_fingerprint": {new: base[name] for name, new in names.items() if name in base},
            "tied": {n: names[first] for n, first in tied.items() if names.get(first, n) != n},
        }
        return SparseDelta(mask, values, None, metadata, low)

    def __mul__(self, factor: float) -> "SparseDelta":
        """factor * delta. Whole tensors are not scaled."""
        return compose(self, weights=[factor]) if is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> "SparseDelta":
        return self * -1.0

    def compose(*deltas: "SparseDelta", weights: Sequence[float] | None = None) -> "SparseDelta":
        """The sum of deltas of one base: `compose(task, language)`, as in Ansell et al. (2022), eq. 2.

        Values are added in float64 and rounded once to float32; if one delta has a low term, the sum has one, too.
        Whole tensors are united.

        Args:
            weights: factor of each delta's values, 1 by default. Whole tensors are not scaled.

        Raises:
            ValueError: no delta; deltas of different bases; a whole tensor that two deltas hold with different values;
                weights that are not finite, or another number of them than deltas.

        Example:
            >>> base = {"w": torch.zeros(3)}
            >>> task = SparseDelta.from_models({"w": torch.tensor([0.0, 1.0, 2.0])}, base)
            >>> language = SparseDelta.from_models({"w": torch.tensor([0.5, 1.0, 0.0])}, base)
            >>> compose(task, language, weights=[1.0, 0.5]).apply_(base)
            >>> base["w"]
            tensor([0.2500, 1.5000, 2.0000])
        """
        factors = checked_weights(deltas, weights, "compose")
        total = weighted_sum([delta.terms for delta in deltas], factors)
        details = {"method": "compose"} | ({} if weights is None else {"weights": factors})
        return combined(deltas, total, details)

    # ---- files ----
    def save_pretrained(self, directory: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
        """Write `sparse_delta.safetensors` and `sparse_delta_config.json`.

        After a crash, a kill or an error (a full disk), the folder holds either the old delta or the new one. Of
        several concurrent writers the last one wins.

        Args:
            dtype: float32 by default; float16 or bfloat16 give the smaller, lossy form (without low terms). Config and
                metadata then have the dtype as `lossy`, also if the delta is loaded and saved again, and lack
                `inexact_entries`.

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
        counts = storage.row_counts(self.mask.crow_indices)
        tensors = {"row_counts": counts, "col_indices": self.mask.col_indices, "values": values}
        if self.low is not None and dtype == torch.float32:
            positions = self.low[0].to(torch.int32) if self.mask.nnz < 2**31 else self.low[0]
            tensors |= {"low_indices": positions, "low_values": self.low[1]}
        tensors |= {_DENSE + n: t for n, t in self.dense.items()}
        metadata = dict(self.metadata)
        if dtype != torch.float32:
            metadata["lossy"] = _dtype_name(dtype)
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
            "values_dtype": _dtype_name(dtype),
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
        if Path(path).is_file():
            raise FileNotFoundError(f"{path} is a file: a sparse delta is the folder that holds it")
        folder = storage.find_folder(path, revision, [storage.WEIGHTS_NAME, storage.CONFIG_NAME])
        config, tensors = storage.load(folder)
        with reading(folder / storage.WEIGHTS_NAME, "sparse delta"):
            if not isinstance(config["dense"], list) or not isinstance(config["metadata"], dict):
                raise ValueError("its configuration must have dense as a list and metadata as an object")
            old = tensors.pop("crow_indices", None)  # format version 2
            crow = storage.crow_indices(tensors.pop("row_counts")) if old is None else old
            mask = CSRMask(config["names"], config["shapes"], crow, tensors.pop("col_indices"))
            values = tensors.pop("values")
            low = (tensors.pop("low_indices"), tensors.pop("low_values")) if "low_indices" in tensors else None
            dense = {n: tensors.pop(_DENSE + n) for n in config["dense"]}
            if tensors:
                raise ValueError(f"it holds tensor {min(tensors)!r}, which its configuration does not name")
            delta = cls(mask, values, dense, config["metadata"], low)
        return delta if mask.device == torch.device(device) else delta.to(device)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        dtype: torch.dtype | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload sparse delta",
    ) -> str:
        """Upload to a repository of the Hugging Face hub, which is created if needed. Returns the commit's URL.

        A model card (README.md) is added where the repository has none.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, dtype)
            # with the namespace, which uploads need
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if not api.file_exists(repo_id, CARD_NAME):
                lossy = {} if dtype in (None, torch.float32) else {"lossy": _dtype_name(dtype)}
                card = model_card(repo_id, self.mask, self.dense, self.metadata | lossy)
                (Path(folder) / CARD_NAME).write_text(card, encoding="utf-8")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message))


compose = SparseDelta.compose


def checked_weights(
    deltas: Sequence[SparseDelta], weights: Sequence[float] | None, function: str, argument: str = "deltas"
) -> list[float]:
    """The weights, 1 by default. TypeError or ValueError naming what is wrong with the deltas or their weights."""
    if not deltas:
        raise ValueError(f"{function} needs at least one delta")
    for i, delta in enumerate(deltas):
        if not isinstance(delta, SparseDelta):
            raise TypeError(f"{argument}[{i}] must be a SparseDelta, got {type(delta).__name__}")
    if weights is None:
        return [1.0] * len(deltas)
    if isinstance(weights, str) or not isinstance(weights, Sequence) or len(weights) != len(deltas):
        raise ValueError(f"weights must be one number for each of the {len(deltas)} deltas, got {weights!r}")
    for i, weight in enumerate(weights):
        if not is_number(weight):
            raise ValueError(f"weights[{i}] must be a finite number, got {weight!r}")
    return [float(weight) for weight in weights]


def united_tensors(deltas: Sequence[SparseDelta]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Whole tensors and tied names of all deltas. ValueError for one with two values, or sparse in another delta."""
    dense: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for delta in deltas:
        for name, tensor in delta.dense.items():
            if not same_bits(dense.setdefault(name, tensor), tensor):
                raise ValueError(f"dense tensor {name!r} is in two deltas with different values")
        tied |= delta.metadata.get("tied", {})
    if both := [n for n in dense if any(n in delta.mask for delta in deltas)]:
        raise ValueError(f"tensor {both[0]!r} is sparse in one delta and whole in another")
    return dense, tied


def combined(deltas: Sequence[SparseDelta], terms: Terms, details: Mapping[str, Any]) -> SparseDelta:
    """A delta of these terms with the union of the deltas' whole tensors; `details` begin its metadata.

    Raises:
        ValueError: deltas of different bases; a whole tensor that two deltas hold with different values.
    """
    dense, tied = united_tensors(deltas)
    base: dict[str, str] = {}
    for i, delta in enumerate(deltas):
        for name, value in delta.metadata.get("base_fingerprint", {}).items():
            if base.setdefault(name, value) != value:
                raise ValueError(f"deltas[{i}] was made for another base: tensor {name!r} has another fingerprint")
    left_out = ("base_fingerprint", "tied")
    parts = [{k: v for k, v in d.metadata.items() if k not in left_out} for d in deltas]
    metadata = {**details, "k": terms.mask.nnz, "base_fingerprint": base, "composed_of": parts}
    for key in ("base_model", "base_dtype"):
        first = deltas[0].metadata.get(key)
        if first is not None and all(d.metadata.get(key) == first for d in deltas):
            metadata[key] = first
    if tied:
        metadata["tied"] = tied
    if lossy := [d.metadata["lossy"] for d in deltas if d.metadata.get("lossy")]:
        metadata["lossy"] = lossy[0]
    values, low = rounded(terms)
    return SparseDelta(terms.mask, values, dense, metadata, low)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked_low(low: Low | None, mask: CSRMask) -> Low | None:
    if low is None or not len(low[0]):
        return None
    positions, terms = low
    if positions.dtype not in (torch.int32, torch.int64) or positions.dim() != 1:
        raise TypeError(f"low[0] must be int32 or int64 [m], got {positions.dtype} {list(positions.shape)}")
    if terms.dtype != torch.float64 or terms.shape != positions.shape:
        raise TypeError(f"low[1] must be float64 {list(positions.shape)}, got {terms.dtype} {list(terms.shape)}")
    positions = usable_in_backward(positions.detach()).to(mask.device, torch.int64)
    if int(positions[0]) < 0 or int(positions[-1]) >= mask.nnz or bool((positions.diff() <= 0).any()):
        raise ValueError(f"low[0] must ascend within [0, nnz) = [0, {mask.nnz})")
    return positions, usable_in_backward(terms.detach()).to(mask.device)
