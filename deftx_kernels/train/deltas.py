"""Deltas and masks that the commands read: folders, files or hub ids. Needs only the core."""

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from deftx_kernels.delta import CONFIG_NAME, WEIGHTS_NAME, SparseDelta
from deftx_kernels.delta.checkpoint import weight_files
from deftx_kernels.delta.interop import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    SFT_NAME,
    adapter_type,
    from_composable_sft,
    from_peft_lora,
    from_peft_shira,
    from_peft_supertuning,
)
from deftx_kernels.delta.storage import local_folder
from deftx_kernels.files import reading
from deftx_kernels.mask import CSRMask

OTHER_FORMATS = {SFT_NAME: "composable-sft", ADAPTER_CONFIG: "PEFT"}
ADAPTERS = ("SHIRA", "SUPERTUNING", "LORA")
FILES = (CONFIG_NAME, WEIGHTS_NAME, SFT_NAME, ADAPTER_CONFIG, ADAPTER_WEIGHTS)  # of all formats


def load_delta(path: str) -> SparseDelta:
    """A delta from a folder or the hub.

    Raises:
        ValueError: there is none, it is damaged, or it is of another library; the message names it.
    """
    try:
        return SparseDelta.from_pretrained(path)
    except FileNotFoundError as error:
        for name, library in OTHER_FORMATS.items():
            if (Path(path) / name).is_file():
                raise ValueError(f"delta {path!r} is of {library}: run `deftx convert {path} FOLDER` first") from None
        raise ValueError(f"delta {path!r}: {error}") from error


def load_any(
    path: str, base: Path | None = None, density: float | None = None, k: int | None = None
) -> SparseDelta | CSRMask:
    """The delta or mask at `path`, in any format that this library reads: a file, a folder, or a repository of the hub.

    Args:
        base: folder of the base model, for PEFT adapters.
        density, k: how many entries of a LoRA adapter to keep.

    Raises:
        ValueError: a damaged file, a folder of no known format, or an adapter that needs another of the arguments.
        FileNotFoundError: there is no such folder or repository.
    """
    folder = Path(path)
    if folder.is_file():
        if folder.suffix == ".safetensors" and not (folder.parent / CONFIG_NAME).is_file():
            return CSRMask.load(folder)
        folder = folder.parent
    folder = local_folder(folder, None, FILES)
    found = adapter_type(folder) if (folder / ADAPTER_CONFIG).is_file() else None
    if found != "LORA" and (density, k) != (None, None):
        raise ValueError(f"density and k are for a LoRA adapter, which {path} is not")
    if found is not None:
        return _load_adapter(folder, found, base, density, k)
    if (folder / SFT_NAME).is_file():
        return from_composable_sft(folder)
    if not (folder / CONFIG_NAME).is_file():
        names = f"{CONFIG_NAME} (deftx), {SFT_NAME} (composable-sft), {ADAPTER_CONFIG} (PEFT)"
        raise ValueError(f"{path} is no delta of a known format: it holds none of {names}")
    return SparseDelta.from_pretrained(folder)


def comparison(one: SparseDelta, other: SparseDelta) -> dict[str, dict[str, float]]:
    """What two deltas share, by tensor and in "all tensors".

    Returns:
        {name: first, second (entries of each), shared (entries of both), cosine (of the differences, entries that one
        lacks being 0), sign_conflicts (share of the shared entries whose signs differ)}; 0 where nothing is shared.
    """
    both = one.mask & other.mask
    values = [delta.values.double() for delta in (one, other)]
    in_both = [delta.mask.project(x, both) for delta, x in zip((one, other), values)]
    product = in_both[0] * in_both[1]

    def row(x: Tensor, y: Tensor, shared: Tensor) -> dict[str, float]:
        norms = float(x.norm() * y.norm())
        return {
            "first": len(x),
            "second": len(y),
            "shared": len(shared),
            "cosine": float(shared.sum()) / norms if norms else 0.0,
            "sign_conflicts": float((shared < 0).double().mean()) if len(shared) else 0.0,
        }

    first, second = values
    rows = {"all tensors": row(first, second, product)}
    parts = [mask.split(x) for mask, x in zip((one.mask, other.mask, both), (*values, product))]
    for name in both.names:
        x, y, shared = (part.get(name, product[:0]) for part in parts)
        rows[name] = row(x, y, shared)
    return rows


def _load_adapter(folder: Path, found: str, base: Path | None, density: float | None, k: int | None) -> SparseDelta:
    if found not in ADAPTERS:
        raise ValueError(f"{folder} is a PEFT adapter of type {found}: of {', '.join(ADAPTERS)} a delta can be made")
    if found == "LORA" and density is None and k is None:
        raise ValueError(f"{folder} is a LoRA adapter: give density or k, how many entries of its products to keep")
    if found == "SUPERTUNING" and base is None:
        raise ValueError(f"{folder} is a Super-Tuning adapter: give base, the folder of its base model")
    tensors = None if base is None else base_tensors(base)
    if found == "LORA":
        return from_peft_lora(folder, density=density, k=k, base=tensors)
    if tensors is None:
        return from_peft_shira(folder)
    return from_peft_shira(folder, tensors) if found == "SHIRA" else from_peft_supertuning(folder, tensors)


def base_tensors(folder: Path) -> dict[str, Tensor]:
    """Name → tensor of a checkpoint in safetensors files, which are mapped into memory, not read.

    Raises:
        FileNotFoundError: there are none.
        ValueError: one is damaged; the message names it.
    """
    tensors: dict[str, Tensor] = {}
    for name in weight_files(folder):
        with reading(folder / name, "checkpoint"), safe_open(folder / name, framework="pt") as file:
            tensors |= {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118 (a safe_open is not a mapping)
    return tensors


def overlap(one: SparseDelta, other: SparseDelta) -> dict[str, float]:
    """What two deltas of one base share.

    Returns:
        shared: entries of both; share: of the entries of the smaller; by_chance: the share of two random masks;
        sign_conflicts: share of the shared entries whose signs differ (0 where none is shared).
    """
    both = one.mask & other.mask
    first, second = (delta.mask.project(delta.values, both) for delta in (one, other))
    smaller, larger = sorted((one.mask.nnz, other.mask.nnz))
    return {
        "shared": both.nnz,
        "share": both.nnz / max(1, smaller),
        "by_chance": larger / max(1, one.mask.numel, other.mask.numel),
        "sign_conflicts": float((first * second < 0).double().mean()) if both.nnz else 0.0,
    }
