"""Deltas and masks that the commands read: folders, files or hub ids. Needs only the core."""

from pathlib import Path

from deftx_kernels.delta import CONFIG_NAME, SparseDelta
from deftx_kernels.delta.interop import SFT_NAME, SHIRA_CONFIG, from_composable_sft, from_peft_shira
from deftx_kernels.mask import CSRMask

OTHER_FORMATS = {SFT_NAME: "composable-sft", SHIRA_CONFIG: "PEFT"}


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


def load_any(path: str) -> SparseDelta | CSRMask:
    """The delta or mask at `path`, in any format that this library reads."""
    folder = Path(path)
    if folder.is_file():
        if folder.suffix == ".safetensors" and not (folder.parent / CONFIG_NAME).is_file():
            return CSRMask.load(folder)
        folder = folder.parent
    if (folder / SFT_NAME).is_file():
        return from_composable_sft(folder)
    if (folder / SHIRA_CONFIG).is_file():
        return from_peft_shira(folder)
    return SparseDelta.from_pretrained(str(folder))


def comparison(one: SparseDelta, other: SparseDelta) -> dict[str, dict[str, float]]:
    """What two deltas share, by tensor and in "all tensors".

    Returns:
        {name: first, second (entries of each), shared (entries of both), cosine (of the differences, entries that one
        lacks being 0), sign_conflicts (share of the shared entries whose signs differ)}; 0 where nothing is shared.
    """
    union, both = one.mask | other.mask, one.mask & other.mask
    rows: dict[str, dict[str, float]] = {}
    values = [delta.values.double() for delta in (one, other)]
    first, second = (delta.mask.project(x, both) for delta, x in zip((one, other), values))
    products, conflicts = first * second, (first * second < 0).double()
    for name in ("all tensors", *union.names):
        everything = name == "all tensors"

        def part(mask, compact, name=name, everything=everything):
            return compact if everything else mask.part(name, compact) if name in mask else compact[:0]

        x, y = (part(delta.mask, v) for delta, v in zip((one, other), values))
        shared = part(both, products)
        norms = float(x.norm() * y.norm())
        rows[name] = {
            "first": len(x),
            "second": len(y),
            "shared": len(shared),
            "cosine": float(shared.sum()) / norms if norms else 0.0,
            "sign_conflicts": float(part(both, conflicts).mean()) if len(shared) else 0.0,
        }
    return rows


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
