"""Sparse fine-tuning in the style of PEFT: a configuration, the sparsified model, and its delta."""

import re
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from deftx_kernels import validation
from deftx_kernels.delta import SparseDelta, fingerprint
from deftx_kernels.delta.models import persistent_buffers
from deftx_kernels.mask import CSRMask
from deftx_kernels.mask.shards import gather_entries, whole_tensor
from deftx_kernels.nn import masked_parameters, plain_tensors, sparsify
from deftx_kernels.select import mask_from_weights, matches_ending, plain_modules, target_weights

_RECORD = "_sparse_base"  # attribute of the model: its BaseRecord


@dataclass(frozen=True)
class SparseConfig:
    """What to train, as the configurations of PEFT's adapters say it.

    Example:
        >>> from deftx_kernels.integrations import SparseConfig
        >>> SparseConfig(density=0.01, target_modules=["query", "value"], modules_to_save=["classifier"]).method
        'lift'
    """

    density: float | None = None
    """The fraction of the weights to train, per `scope`. Either this or `k`."""
    k: int | None = None
    """The number of entries to train, per `scope`."""
    method: str = "lift"
    """ "lift", "magnitude" or "random", as in `init_mask`."""
    rank: int = 128
    """Of "lift"."""
    target_modules: str | Iterable[str] = "all-linear"
    """ "all-linear", a list of name endings, or a regular expression, as in `init_mask`. None of them covers the joint
    weights of a mixture's experts: give `get_sparse_model` a mask of these."""
    modules_to_save: Iterable[str] | None = None
    """Names or endings of modules that are trained densely and stored whole: a new head, norms."""
    scope: str = "tensor"
    """ "tensor", "row" or "global", as in `topk_mask`."""
    seed: int = 0
    """Of "random"."""
    density_pattern: Mapping[str, float] | None = None
    """Name or ending of a module, or a regular expression of it → the density of its weight, in place of `density`, as
    PEFT's `rank_pattern`. Not with scope "global"."""

    def __post_init__(self) -> None:
        """Make lists and dicts of other collections, and Python floats of densities: settings are stored as JSON."""
        for field in ("target_modules", "modules_to_save"):
            names = getattr(self, field)
            if isinstance(names, Iterable) and not isinstance(names, str):
                object.__setattr__(self, field, sorted(names) if isinstance(names, Set) else list(names))
        if validation.is_number(self.density):
            object.__setattr__(self, "density", float(cast(float, self.density)))
        if self.density_pattern:
            pattern = {n: float(d) if validation.is_number(d) else d for n, d in self.density_pattern.items()}
            object.__setattr__(self, "density_pattern", pattern)


@dataclass
class BaseRecord:
    """What `sparse_delta` needs of the model before training."""

    mask: str  # its fingerprint
    entries: dict[str, Tensor]  # name → compact [nnz of the tensor], on the CPU, in the dtype of the base
    buffers: dict[str, Tensor]  # the persistent ones
    fingerprints: dict[str, str]  # of the masked tensors
    tied: dict[str, str]  # further name → first name of the same tensor
    metadata: dict[str, Any]


def get_sparse_model(model: nn.Module, config: SparseConfig, mask: CSRMask | None = None) -> nn.Module:
    """Sparsify a model, in place: the mask's entries and `modules_to_save` are trained, all else is frozen.

    Any loop and any Trainer can train it; `sparse_delta(model)` is what it has learned. Besides the trained values the
    model keeps those of the base (on the CPU), so that no second copy of the base is needed.

    Args:
        model: the plain model.
        config: what to train.
        mask: the entries to train (from `select_mask`, or from a saved delta), on the model's device. Then only
            `modules_to_save` of `config` is used.

    Returns:
        The same model.

    Raises:
        ValueError, TypeError: as `init_mask` and `sparsify`; a name in `modules_to_save` that no module has; a mask
            that covers a tensor of these modules. The model is then unchanged.

    Example:
        >>> from deftx_kernels.integrations import SparseConfig, get_sparse_model, print_trainable_parameters
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2))
        >>> config = SparseConfig(density=0.25, method="magnitude", modules_to_save=["1"])
        >>> print_trainable_parameters(get_sparse_model(model, config))
        trainable params: 34 || all params: 90 || trainable%: 37.7778
    """
    if not isinstance(config, SparseConfig):
        raise TypeError(f"config must be a SparseConfig, got {type(config).__name__}")
    tensors = validation.all_tensors(model, "model")
    inner = validation.unwrapped(model)
    saved = _parameters_to_save(inner, config.modules_to_save or ())
    metadata: dict[str, Any] = {"settings": asdict(config)}
    if mask is None:
        weights = {n: tensors[n] for n in target_weights(model, config.target_modules, without=saved)}
        mask = _chosen_mask(weights, config)
        metadata["method"] = config.method
    if not isinstance(mask, CSRMask):
        raise TypeError(f"mask must be a CSRMask, got {type(mask).__name__}")
    for name in saved:
        if name in mask:
            raise ValueError(f"mask covers {name!r}, which is in modules_to_save")
    if base_model := getattr(getattr(inner, "config", None), "name_or_path", None):
        metadata["base_model"] = base_model
    mask.checked_tensors(tensors, "model")
    record = BaseRecord(
        mask=mask.fingerprint(),
        entries={n: mask[n].gather(tensors).cpu() for n in mask.names},
        buffers={n: t.detach().clone() for n, t in persistent_buffers(inner).items()},
        fingerprints=fingerprint({n: tensors[n] for n in mask.names}),
        tied={n: first for n, first in validation.tied_names(tensors, "model").items() if n != first},
        metadata=metadata,
    )
    sparsify(inner, mask, freeze_others=True)
    for parameter in saved.values():
        parameter.requires_grad_(True)
    inner.__dict__[_RECORD] = record
    return model


def sparse_delta(model: nn.Module, metadata: Mapping[str, Any] | None = None) -> SparseDelta:
    """What a model of `get_sparse_model` has learned: `sparse_delta(model).save_pretrained(folder)`.

    It is `SparseDelta.from_models(model, base)`, without the base: the differences at the mask's entries, and whole
    tensors: all other trainable parameters (those of `modules_to_save`) and the persistent buffers that have changed.

    Args:
        model: sparsified by `get_sparse_model`, before `densify`; also in DistributedDataParallel or torch.compile. If
            it is sharded with FSDP2, all ranks call this, and gather the masked entries and those whole tensors.
        metadata: goes into the delta's.

    Returns:
        A delta on the CPU.

    Raises:
        ValueError: the model was not made by `get_sparse_model`, or was densified since.

    Example:
        >>> from deftx_kernels.integrations import SparseConfig, get_sparse_model, sparse_delta
        >>> model = get_sparse_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), SparseConfig(k=4, method="random"))
        >>> _ = model[0].values.data.add_(1.0)
        >>> sparse_delta(model).values.round(decimals=3)
        tensor([1., 1., 1., 1.])
    """
    record, model = base_record(model), validation.unwrapped(model)
    masked = masked_parameters(model)
    tensors = plain_tensors(model)  # synchronised
    mask = _joined_mask(masked).to("cpu")
    now = {n: gather_entries(m.mask, tensors[n]).cpu() for n, m in masked.items()}
    every = CSRMask.from_dense({n: torch.ones_like(t, dtype=torch.bool) for n, t in now.items()})
    difference = SparseDelta.from_models(now, record.entries, every)
    dense = {n: t for n, t in tensors.items() if t.requires_grad and n not in masked}
    for name, buffer in persistent_buffers(model).items():
        if name not in record.buffers or not validation.same_bits(buffer, record.buffers[name]):
            dense[name] = buffer
    details = {**record.metadata, **(metadata or {}), "k": mask.nnz, "base_fingerprint": record.fingerprints}
    details |= {
        key: difference.metadata[key] for key in ("base_dtype", "inexact_entries") if key in difference.metadata
    }
    if tied := {n: first for n, first in record.tied.items() if first in mask or first in dense}:
        details["tied"] = tied
    dense = {n: whole_tensor(t).detach().to("cpu", copy=True) for n, t in dense.items()}
    return SparseDelta(mask, difference.values, dense, details, difference.low)


def base_record(model: nn.Module) -> BaseRecord:
    """What `get_sparse_model` has kept of the base. ValueError unless it made the model, which is sparsified still."""
    model = validation.unwrapped(model)
    record = model.__dict__.get(_RECORD)
    masked = masked_parameters(model)
    if record is None or not masked or _joined_mask(masked).fingerprint() != record.mask:  # sparsified again since
        raise ValueError(
            "model is not a sparsified one of get_sparse_model: of other models, SparseDelta.from_models(model, base) "
            "makes the delta"
        )
    return record


def _joined_mask(masked: Mapping[str, Any]) -> CSRMask:
    return CSRMask.joined([m.mask for m in masked.values()])


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many parameters are trained, in PEFT's format. Values count once, as entries of their tensors.

    Example:
        >>> from deftx_kernels.integrations import print_trainable_parameters
        >>> print_trainable_parameters(torch.nn.Linear(3, 2))
        trainable params: 8 || all params: 8 || trainable%: 100.0000
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in plain_tensors(model).values())
    print(
        f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / max(total, 1):.4f}"
    )


def _chosen_mask(weights: Mapping[str, Tensor], config: SparseConfig) -> CSRMask:
    """The mask of the configuration: one for each of its densities, joined."""
    options = {key: getattr(config, key) for key in ("method", "k", "rank", "scope", "seed")}
    pattern = config.density_pattern
    if not pattern:
        return mask_from_weights(weights, density=config.density, **options)
    if config.scope == "global" or config.density is None:
        raise ValueError(
            f"density_pattern needs a density and scope 'tensor' or 'row', got density={config.density}, "
            f"scope={config.scope!r}"
        )
    groups: dict[str | None, dict[str, Tensor]] = {None: {}} | {key: {} for key in pattern}
    for name, weight in weights.items():
        groups[_first_match(pattern, name.removesuffix(".weight"))][name] = weight
    parts: dict[str, CSRMask] = {}
    for key, group in groups.items():
        if group:
            density = config.density if key is None else pattern[key]
            one = mask_from_weights(group, density=density, **options)
            parts |= {n: one[n] for n in one.names}
        elif key is not None:
            raise ValueError(f"density_pattern: {key!r} is the first match of none of the target modules")
    return CSRMask.joined([parts[n] for n in sorted(parts)])


def _first_match(pattern: Mapping[str, float], module: str) -> str | None:
    for key in pattern:
        try:
            if re.fullmatch(rf"(.*\.)?({key})", module):
                return key
        except re.error as error:
            raise ValueError(f"density_pattern: {key!r} is no regular expression: {error}") from None
    return None


def _parameters_to_save(model: nn.Module, modules_to_save: Iterable[str]) -> dict[str, nn.Parameter]:
    """Name → parameter of the modules that are trained densely."""
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save must be a list of names, got the string {modules_to_save!r}")
    owned: set[int] = set()
    for ending in modules_to_save:
        found = [m for n, m in plain_modules(model).items() if matches_ending(n, ending)]
        if not any(True for m in found for _ in m.parameters()):
            some = ", ".join(n for n, _ in model.named_children())
            raise ValueError(f"modules_to_save: {ending!r} is no module with parameters. The model has {some}")
        owned |= {id(p) for m in found for p in m.parameters()}
    saved = {validation.plain_name(n): p for n, p in model.named_parameters() if id(p) in owned}
    for name, parameter in saved.items():
        if not parameter.is_floating_point():
            raise TypeError(f"modules_to_save: {name!r} is {parameter.dtype}, which cannot be trained")
    return saved
