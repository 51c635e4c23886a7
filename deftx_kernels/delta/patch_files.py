"""The files of sparse patches and of anchors: safetensors, in the layout that TRL documents for delta weight sync.

A patch has, for each tensor that changed, `NAME.indices` (flat, int32 or int64) and `NAME.values`; in the compact
layout, instead of the indices, `NAME.gaps`: a code of how many entries lie between each one and the one before it. An
anchor has the tensors of a model. The header's `sparse` ("True" for a patch), `model_version`, `sparsity` and
`changed_params` are TRL's; `config` (names, dtypes, shapes and checksums before and after, tied names) and `checksum`
are ours, and missing in files of other tools. Of these only the structure is checked.
"""

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from deftx_kernels.delta.model_state import State, TensorState, state_of, version
from deftx_kernels.delta.storage import checksum
from deftx_kernels.files import parse_json, reading, write_tensors

_VERSION = 1
_SMALL = 2**31  # int32 holds what is less

Entries = dict[str, tuple[Tensor, Tensor]]  # name → flat indices [n], ascending, and values [n]


class PatchContent(NamedTuple):
    """What a file of a patch holds: the arguments of `SparsePatch`."""

    entries: Entries
    before: State | None
    after: State | None
    tied: dict[str, str]
    model_version: int


class AnchorContent(NamedTuple):
    """What a file of an anchor holds."""

    tensors: dict[str, Tensor]
    state: State | None  # None: not known (of another tool)
    tied: dict[str, str]
    model_version: int


def write_patch(path: str | os.PathLike, content: PatchContent, compact: bool) -> None:
    """Write the file of a patch, atomically."""
    tensors: dict[str, Tensor] = {}
    for name, (indices, values) in content.entries.items():
        if compact:
            tensors[f"{name}.gaps"] = _to_gaps(indices)
        else:
            tensors[f"{name}.indices"] = indices.to(torch.int32 if int(indices[-1]) < _SMALL else torch.int64)
        tensors[f"{name}.values"] = values
    total = sum(torch.Size(s.shape).numel() for s in (content.before or {}).values())
    changed = sum(len(values) for _, values in content.entries.values())
    trl = {
        "sparse": "True",
        "model_version": str(content.model_version),
        "sparsity": str(1 - changed / total if total else 0.0),
        "changed_params": json.dumps([*content.entries]),
    }
    config: dict[str, Any] = {"encoding": "gaps" if compact else "indices", "tied": content.tied, "tensors": None}
    if content.before is not None and content.after is not None:
        states = {n: [*s, content.after[n].checksum] for n, s in content.before.items()}
        versions = {"from_version": version(content.before), "to_version": version(content.after)}
        config |= {"tensors": {n: s[:3] if s[2] == s[3] else s for n, s in states.items()}, **versions}
    _write(path, tensors, trl, config, tensors)


def read_patch(path: str | os.PathLike) -> PatchContent:
    """Read the file of a patch; tensors are mapped from the file. ValueError, naming the file, if it is damaged."""
    open(path, "rb").close()  # a folder's error names it
    with reading(path, "sparse patch"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (a safe_open is not a mapping)
        config = _config(metadata, tensors)
        if metadata.get("sparse") != "True":
            raise ValueError("its header lacks sparse = True")
        encoding = config.get("encoding", "indices")
        decode = {"indices": _from_indices, "gaps": _from_gaps}[encoding]
        names = [n.removesuffix(".values") for n in tensors if n.endswith(".values")]
        expected = {f"{name}.{part}" for name in names for part in ("values", encoding)}
        if wrong := expected ^ tensors.keys():
            raise ValueError(f"{min(wrong)!r} is missing, or not part of a tensor's {encoding} and values")
        entries = {name: (decode(name, tensors), tensors[f"{name}.values"]) for name in names}
        before, after = _states(config.get("tensors"))
        return PatchContent(entries, before, after, config.get("tied", {}), int(metadata.get("model_version", 0)))


def write_anchor(path: str | os.PathLike, content: AnchorContent) -> None:
    """Write the file of an anchor, atomically."""
    trl = {"sparse": "False", "model_version": str(content.model_version), "sparsity": "0.0"}
    state = content.state or {}
    config = {"tied": content.tied, "tensors": state, "to_version": version(state)}
    tensors = {n: t.detach().cpu().contiguous() for n, t in content.tensors.items()}
    _write(path, tensors, trl, config, {})


def read_anchor(path: str | os.PathLike) -> AnchorContent:
    """Read the file of an anchor; tensors are mapped from the file. ValueError, naming the file, if it is damaged."""
    open(path, "rb").close()  # as above
    with reading(path, "anchor"), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        config = _config(metadata, {})
        if metadata.get("sparse") != "False":
            raise ValueError("its header lacks sparse = False")
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        saved, _ = _states(config.get("tensors"))
        if saved is not None and (state := state_of(tensors)) != saved:
            wrong = min(n for n in {*state, *saved} if state.get(n) != saved.get(n))
            raise ValueError(f"tensor {wrong!r} does not have the checksum that it was saved with")
        return AnchorContent(tensors, saved, config.get("tied", {}), int(metadata.get("model_version", 0)))


# ---- headers ----
def _write(
    path: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    trl: Mapping[str, str],
    config: Mapping[str, Any],
    checked: Mapping[str, Tensor],
) -> None:
    metadata = {**trl, "config": json.dumps({"format_version": _VERSION, **config}, separators=(",", ":"))}
    write_tensors(path, tensors, {**metadata, "checksum": checksum(metadata, checked)})


def _config(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our part of the header; empty for files of other tools. ValueError unless the checksum is that of the content."""
    if not metadata.keys() & {"config", "checksum"}:
        return {}
    rest = {k: v for k, v in metadata.items() if k != "checksum"}
    if metadata.get("checksum") != checksum(rest, tensors):
        raise ValueError("its content does not have the checksum that it was saved with")
    config = parse_json(metadata["config"])
    if config["format_version"] > _VERSION:
        raise ValueError(f"written by a newer version of deftx-kernels, in format version {config['format_version']}")
    return config


def _states(saved: Mapping[str, list] | None) -> tuple[State | None, State | None]:
    """Before and after."""
    if saved is None:
        return None, None
    before = {n: TensorState(dtype, tuple(shape), sums[0]) for n, (dtype, shape, *sums) in saved.items()}
    return before, {n: state._replace(checksum=saved[n][-1]) for n, state in before.items()}


# ---- indices ----
def _from_indices(name: str, tensors: dict[str, Tensor]) -> Tensor:
    return tensors[f"{name}.indices"]


def _to_gaps(indices: Tensor) -> Tensor:
    """The Rice code of the gaps (Rice and Plaunt 1971), uint8: k; the k low bits of each gap, bit by bit; the rest in
    unary.

    A gap takes k + 1 + (gap >> k) bits: on average about 2 more than the logarithm of the mean gap.
    """
    gaps = np.diff(indices.numpy(), prepend=-1) - 1
    guess = int(gaps.mean()).bit_length()
    k = min(range(max(0, guess - 2), guess + 1), key=lambda k: k * len(gaps) + int((gaps >> k).sum()))
    unary = np.zeros(len(gaps) + int((gaps >> k).sum()), np.uint8)
    unary[np.cumsum((gaps >> k) + 1, dtype=np.int64) - 1] = 1
    planes = [np.packbits((gaps >> bit & 1).astype(np.uint8)) for bit in range(k)]
    return torch.from_numpy(np.concatenate([np.array([k], np.uint8), *planes, np.packbits(unary)]))


def _from_gaps(name: str, tensors: dict[str, Tensor]) -> Tensor:
    code, count = tensors[f"{name}.gaps"].numpy(), len(tensors[f"{name}.values"])
    k, width = int(code[0]), -(-count // 8)
    ends = np.flatnonzero(np.unpackbits(code[1 + k * width :]))
    if code.dtype != np.uint8 or k > 62 or len(ends) != count:
        raise ValueError(f"the gaps of {name!r} are not those of {count} entries")
    gaps = np.diff(ends, prepend=-1) - 1 << k
    for bit, plane in enumerate(code[1 : 1 + k * width].reshape(k, width)):
        gaps |= np.unpackbits(plane, count=count).astype(np.int64) << bit
    indices = torch.from_numpy(np.cumsum(gaps + 1) - 1)
    return indices.to(torch.int32) if count and 0 <= int(indices[-1]) < _SMALL else indices
