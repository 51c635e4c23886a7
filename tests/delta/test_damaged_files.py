"""Damaged and hostile files: the right content, or a ValueError or FileNotFoundError, in bounded time and memory.

`python tests/delta/test_damaged_files.py FORMAT COUNT SEED` damages one format's files COUNT times, in limited memory.
"""

import functools
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from delta_examples import save_version_2
from safetensors.torch import load, save

from deftx_kernels import CSRMask, SparseDelta, interop
from deftx_kernels.delta import CONFIG_NAME, WEIGHTS_NAME
from deftx_kernels.delta.storage import checksum

SECONDS = 2.0
MEMORY = 3 << 30  # of address space, beside what the process has when it begins
OUT_OF_MEMORY = ("MemoryError", "allocate memory", "bad_alloc")
NUMBERS = [-1, 0, 1, 7, 1.5, -(2**31), 2**31, 2**53, 2**63 - 1, 2**63, 10**30, 10**6, 10**9, True, float("nan")]
LISTS = [[], {}, [[]], {"a": 1}, [-1], [2, 3], [1 << 40], [0, 10**12], [True, 2], ["2"], float("inf")]
HOSTILE: list[Any] = [*NUMBERS, *LISTS, None, "", "a", "F32", "I64", "int64", "../../x", "é"]
DTYPES = [torch.int32, torch.int64, torch.uint16, torch.float16, torch.bool, torch.complex64, torch.float8_e4m3fn]


def example() -> SparseDelta:
    base = {"emb.weight": torch.zeros(6, 4), "norm": torch.ones(5), "scalar": torch.ones(())}
    tuned = {"emb.weight": torch.eye(6, 4), "norm": torch.tensor([1e-9, 1, 2, 1, 3]), "scalar": torch.full((), 2.0)}
    head = {"head": torch.arange(4.0), "steps": torch.tensor(7)}
    facts = {"method": "lt-sft", "base_model": "m", "settings": {"lr": float("nan"), "names": ["a"]}}
    return SparseDelta.from_models(tuned | head, base, metadata=facts)


def content(found: CSRMask | SparseDelta) -> tuple:
    """The content that was read, for comparison; with the checks that every mask and delta passes."""
    mask = found if isinstance(found, CSRMask) else found.mask
    CSRMask(mask.names, mask.shapes, mask.crow_indices, mask.col_indices)
    assert all(type(n) is str for n in mask.names)
    assert all(row["numel"] >= row["nnz"] >= 0 for row in mask.summary().values())
    if isinstance(found, CSRMask):
        return (mask.fingerprint(),)
    assert found.values.dtype == torch.float32
    low = [] if found.low is None else [t.tolist() for t in found.low]
    dense = repr([(n, t.dtype, t.shape, t.tolist()) for n, t in sorted(found.dense.items())])
    return mask.fingerprint(), found.values.tolist(), low, dense, json.dumps(found.metadata, sort_keys=True)


# ---- damage ----


def damage_bytes(data: bytes, chance: random.Random) -> bytes:
    """Flipped bits, a shorter file, bytes that are copied over others, inserted, left out or zeroed."""
    data = bytearray(data)
    kind = chance.randrange(6)
    at, length = chance.randrange(len(data)), chance.randrange(1, 64)
    if kind <= 1:
        for _ in range(chance.choice([1, 1, 2, 8])):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        data[at : at + length] = chance.randbytes(length) if chance.random() < 0.5 else data[-length:]
    elif kind == 4:
        data[at:at] = chance.choice([b"\0" * length, chance.randbytes(length), bytes(data[:length])])
    else:
        del data[at : at + length]
    return bytes(data)


def damage_value(value: Any, chance: random.Random) -> Any:
    """One item in nested lists and dictionaries is replaced, left out, doubled or renamed."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        kind = chance.randrange(8)
        rest = {k: v for k, v in value.items() if k != key}
        if kind == 0:
            return rest
        if kind == 1:
            return rest | {chance.choice(["", "x", "names", "w", f"{key}x"]): value[key]}
        return {k: damage_value(v, chance) if k == key else v for k, v in value.items()}
    if isinstance(value, list | tuple) and value and chance.random() < 0.8:
        at, kind = chance.randrange(len(value)), chance.randrange(8)
        items = list(value)
        if kind == 0:
            del items[at]
        elif kind == 1:
            items.insert(at, items[at])
        else:
            items[at] = damage_value(items[at], chance)
        return type(value)(items) if type(value) in (list, tuple) else items
    if isinstance(value, int) and not isinstance(value, bool) and chance.random() < 0.3:
        return value + chance.choice([-1, 1, 8, 1 << 32])
    return chance.choice(HOSTILE)


def damage_json(text: str, chance: random.Random) -> str:
    kind = chance.randrange(10)
    if kind == 0:
        return "[" * chance.choice([10, 1000, 100_000])
    if kind == 1:
        return damage_bytes(text.encode(), chance).decode("utf-8", "replace")
    if kind == 2:  # a key twice
        return text.replace("{", '{"names": 5, ', 1)
    return json.dumps(damage_value(json.loads(text), chance))


def damage_tensor(tensor: torch.Tensor, chance: random.Random) -> torch.Tensor:
    kind = chance.randrange(5)
    if kind == 0 and tensor.numel():
        bits = tensor.clone().view(-1).view(torch.uint8)
        bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(8)
        return bits.view(tensor.dtype).view(tensor.shape)
    if kind == 1:
        return tensor[:-1] if tensor.dim() else tensor.view(1)
    if kind == 2:
        return torch.cat([tensor.view(-1), tensor.view(-1)])
    if kind == 3:
        return tensor.to(torch.float32).to(chance.choice(DTYPES))
    return tensor.view(1, -1)


def damage_safetensors(data: bytes, chance: random.Random, sign: Callable[[dict, dict], None] | None = None) -> bytes:
    """The header, the JSON within it, or a tensor; in half of the cases, `sign` corrects the checksum."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if chance.random() < 0.3:  # the format itself
        text = damage_json(json.dumps(header), chance).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]
    tensors, metadata = load(data), header.get("__metadata__", {})
    target = chance.choice(["metadata", "json", "tensor", "names", "swap"])
    texts = [k for k, v in sorted(metadata.items()) if v.startswith("{")]
    if target == "json" and texts:
        key = chance.choice(texts)
        metadata[key] = damage_json(metadata[key], chance)
    elif target == "metadata" and metadata:
        key = chance.choice(sorted(metadata))
        metadata[key] = chance.choice(["", "x", "5", "[]", "{}", "null"])
    elif target == "names":
        name = chance.choice(sorted(tensors))
        moved = tensors[name] if chance.random() < 0.5 else tensors.pop(name)
        tensors[chance.choice(["x", "", "dense.x", name + "2"])] = moved
    elif target == "swap":
        one, other = chance.choices(sorted(tensors), k=2)
        tensors[one], tensors[other] = tensors[other], tensors[one]
    else:
        name = chance.choice(sorted(tensors))
        tensors[name] = damage_tensor(tensors[name], chance)
    if sign is not None and chance.random() < 0.5:
        sign(tensors, metadata)
    return save({n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}, metadata)


def damage_pickle(data: bytes, chance: random.Random) -> bytes:
    """The parts of torch.save's archive, each with a right checksum again."""
    with zipfile.ZipFile(_written(data)) as archive:
        parts = {m.filename: archive.read(m) for m in archive.infolist()}
    name = chance.choice([n for n in parts if parts[n]])
    name = chance.choice([name, next(n for n in parts if n.endswith("data.pkl"))])
    if chance.random() < 0.1:
        del parts[name]
    else:
        parts[name] = damage_bytes(parts[name], chance)
    path = _written(b"")
    with zipfile.ZipFile(path, "w", chance.choice([zipfile.ZIP_STORED] * 5 + [zipfile.ZIP_DEFLATED])) as archive:
        for part, body in parts.items():
            archive.writestr(part, body)
    return path.read_bytes()


def damage_sft(data: bytes, chance: random.Random) -> bytes:
    """The objects that were saved."""
    scalar = (np._core.multiarray.scalar, "numpy._core.multiarray.scalar")
    with torch.serialization.safe_globals([np.dtype, np.dtypes.Int64DType, scalar]):
        saved = torch.load(_written(data), weights_only=True)
    name = chance.choice(list(saved["diffs"]))
    encoded, values = saved["diffs"][name], saved["diffs"][name]["values"]
    kind = chance.randrange(4)
    if kind == 0:
        encoded["values"] = damage_tensor(values, chance)
    elif kind == 1:
        no_values = [torch.empty(3, device="meta"), np.float32(1), [1.0]]
        encoded["values"] = chance.choice([values.to_sparse(), values[:1].expand(10**6), *no_values])
    elif kind == 2:
        saved["diffs"][name] = damage_value(encoded, chance)
    else:
        saved = damage_value(saved, chance)
    path = _written(b"")
    torch.save(saved, path)
    return path.read_bytes()


_SCRATCH = tempfile.TemporaryDirectory()


def _written(data: bytes) -> Path:
    path = Path(_SCRATCH.name) / "file"
    path.write_bytes(data)
    return path


def sign_mask(tensors: dict, metadata: dict) -> None:
    try:
        layout = json.loads(metadata["layout"])
        text = json.dumps({"names": layout["names"], "shapes": layout["shapes"]})
    except (ValueError, KeyError, TypeError, RecursionError):
        return
    sha = hashlib.sha256(text.encode())
    for name in ("crow_indices", "col_indices"):
        if name in tensors:
            sha.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    metadata["fingerprint"] = sha.hexdigest()


def sign_delta(tensors: dict, metadata: dict) -> None:
    try:
        config = json.loads(metadata["config"])
        for key in ("content", "config_checksum"):
            config.pop(key, None)
        config["content"] = checksum(config, {n: t.contiguous() for n, t in tensors.items()})
        if config.get("format_version") != 2:
            config["config_checksum"] = checksum(config, {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return
    metadata["config"] = json.dumps(config, indent=2, sort_keys=True) + "\n"


# ---- formats ----


class Format(NamedTuple):
    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    damages: list[tuple[str, Callable]]  # file, function (content, random.Random) -> damaged content
    checked: tuple[Callable, ...]  # damages that a checksum must detect: what loads then is the right content


def damages(file: str, *functions: Callable) -> list[tuple[str, Callable]]:
    return [(file, function) for function in functions]


def text_damage(data: bytes, chance: random.Random) -> bytes:
    return damage_json(data.decode(), chance).encode("utf-8", "surrogatepass")


signed_mask = functools.partial(damage_safetensors, sign=sign_mask)
signed_delta = functools.partial(damage_safetensors, sign=sign_delta)


def write_sft(folder: Path) -> None:
    interop.to_composable_sft(example(), folder)
    saved = torch.load(folder / interop.SFT_NAME, weights_only=True)
    for encoded in saved["diffs"].values():  # as the library itself writes the first index
        encoded["index_steps"][:1] = [np.int64(step) for step in encoded["index_steps"][:1]]
    torch.save(saved, folder / interop.SFT_NAME)


DELTA_DAMAGES = [
    *damages(WEIGHTS_NAME, damage_bytes, damage_safetensors, signed_delta),
    *damages(CONFIG_NAME, damage_bytes, text_damage),
]
ADAPTER_DAMAGES = [
    *damages(interop.ADAPTER_WEIGHTS, damage_bytes, damage_safetensors),
    *damages(interop.ADAPTER_CONFIG, damage_bytes, text_damage),
]


def write_adapter(folder: Path, parts: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors = {f"base_model.model.fc.{n}": t for n, t in parts.items()} | {"base_model.model.head": torch.ones(2, 2)}
    (folder / interop.ADAPTER_WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
    (folder / interop.ADAPTER_CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "m"}))


def write_supertuning(folder: Path) -> None:
    parts = {"supertuning_values": torch.arange(8.0), "supertuning_indices": torch.arange(8, dtype=torch.int32)}
    write_adapter(folder, parts, {"peft_type": "SUPERTUNING", "sparsity": 0.5, "select_top": True, "r": None})


def write_lora(folder: Path) -> None:
    parts = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.arange(8.0).view(4, 2)}
    write_adapter(folder, parts, {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"fc": 3}})


def write_shira(folder: Path) -> None:
    index = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 1, 2, 3, 0]], dtype=torch.int32)
    parts = {"shira_indices": index, "shira_weight": torch.arange(8.0)}
    write_adapter(folder, parts, {"peft_type": "SHIRA", "r": 1, "target_modules": ["fc"]})


FORMATS = {
    "mask": Format(
        lambda folder: example().mask.save(folder / "mask"),
        lambda folder: CSRMask.load(folder / "mask"),
        damages("mask", damage_bytes, damage_safetensors, signed_mask),
        (damage_bytes, damage_safetensors),
    ),
    "delta": Format(
        lambda folder: example().save_pretrained(folder),
        SparseDelta.from_pretrained,
        DELTA_DAMAGES,
        (damage_bytes, damage_safetensors, text_damage),
    ),
    "delta of version 2": Format(
        lambda folder: save_version_2(example(), folder),
        SparseDelta.from_pretrained,
        DELTA_DAMAGES,
        (damage_bytes, damage_safetensors, text_damage),
    ),
    "composable-sft": Format(
        write_sft,
        interop.from_composable_sft,
        damages(interop.SFT_NAME, damage_bytes, damage_pickle, damage_pickle, damage_sft, damage_sft),
        (damage_bytes,),
    ),
    "shira": Format(
        write_shira,
        interop.from_peft_shira,
        ADAPTER_DAMAGES,
        (),  # PEFT's files have no checksum
    ),
    "supertuning": Format(
        write_supertuning,
        lambda folder: interop.from_peft_supertuning(folder, {"fc.weight": torch.arange(16.0).view(4, 4)}),
        ADAPTER_DAMAGES,
        (),
    ),
    "lora": Format(write_lora, lambda folder: interop.from_peft_lora(folder, density=0.3), ADAPTER_DAMAGES, ()),
}
COUNTS = dict.fromkeys(FORMATS, 100) | {"delta": 1500}


def fuzz(name: str, folder: Path, count: int, seed: int) -> Counter:
    """Damage the format's files `count` times and count the outcomes. An AssertionError has the file that failed."""
    form = FORMATS[name]
    form.write(folder)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    right = content(form.read(folder))
    found: Counter = Counter()
    for number in range(seed * 1_000_000, seed * 1_000_000 + count):
        chance = random.Random(number)
        file, damage = form.damages[number % len(form.damages)]
        data = damage(whole[folder / file], chance)
        if chance.random() < 0.01:
            (folder / file).unlink()
        else:
            (folder / file).write_bytes(data)
        start, got, error, fault = time.perf_counter(), None, None, None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = content(form.read(folder))
        except Exception as caught:
            error = caught
        if (seconds := time.perf_counter() - start) >= SECONDS:
            fault = f"it took {seconds:.1f} s"
        elif error is None:
            if got != right and damage in form.checked:
                fault = "other content was read"
            found["right content" if got == right else "other content that is valid"] += 1
        elif not isinstance(error, ValueError | FileNotFoundError) or str(folder) not in str(error):
            fault = f"the error is of another kind or names no file: {error!r}"
        elif any(text in str(error) for text in OUT_OF_MEMORY):
            fault = f"memory was taken: {error}"
        else:
            found[type(error).__name__] += 1
        assert fault is None, f"{damage}, number {number}: {fault}. {file} in hexadecimal: {data.hex()}"
        (folder / file).write_bytes(whole[folder / file])
    return found


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(name, tmp_path, one_thread):
    found = fuzz(name, tmp_path, COUNTS[name], seed=0)
    assert found["ValueError"] >= 0.3 * COUNTS[name], found


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_ten_thousand_damaged_files(name):
    done = subprocess.run([sys.executable, __file__, name, "10000", "1"], capture_output=True, text=True, timeout=3000)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory() as scratch:
        print(sys.argv[1], dict(fuzz(sys.argv[1], Path(scratch), int(sys.argv[2]), int(sys.argv[3]))))
