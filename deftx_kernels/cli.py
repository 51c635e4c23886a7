"""The `deftx` command. tyro makes its options from `train`'s dataclasses; only training imports transformers."""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import tyro
from rich.console import Console
from rich.table import Table

from deftx_kernels.train.config import EvalConfig, TrainLanguageConfig, TrainTaskConfig
from deftx_kernels.train.presets import PRESETS, DemoRun, PresetRun, small

# Packages of the extra `train`, by the name under which they are imported.
TRAIN_PACKAGES = {"transformers", "accelerate", "datasets", "sklearn", "matplotlib", "babel", "pandas", "filelock"}
DESCRIPTION = "The `deftx` command."  # not the docstring, which python -OO removes


@dataclass
class Run:
    """The whole pipeline: language and task vectors, composition, zero-shot evaluation, report."""

    preset: DemoRun | PresetRun


@dataclass
class Compose:
    """Add deltas (vectors) of one base model and save the sum."""

    vectors: tyro.conf.Positional[list[str]]
    """Folders or hub ids."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write."""


@dataclass
class Merge:
    """Add deltas to a model folder and write the model, one weight file at a time. Continues an interrupted call."""

    base: tyro.conf.Positional[Path]
    """Folder of the base model, with safetensors weights."""
    vectors: tyro.conf.Positional[list[str]]
    """Folders or hub ids of deltas."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write."""
    weights: list[float] | None = None
    """Factor of each delta, 1 by default."""
    method: Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "linear"
    density: float | None = None
    """Share of entries that each delta keeps; for every method but linear."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    scope: Literal["global", "tensor"] = "global"
    """Whether the largest entries are those of all tensors together or of each."""
    seed: int = 0
    """Of the dare methods."""
    dense: bool = True
    """Replace the tensors that the deltas hold whole, such as a head; the base must have them."""
    strict: bool = True
    """Refuse another base than that of the deltas."""


@dataclass
class Inspect:
    """Show the content of a delta or a mask: method, base model, size, density of each tensor.

    With two: what they share, by tensor: entries, cosine, sign conflicts.
    """

    path: tyro.conf.Positional[str]
    """Folder or hub id of a delta, of a composable-sft or of a PEFT adapter, or a mask.safetensors file."""
    other: tyro.conf.Positional[str | None] = None
    """A second delta, to compare."""
    base: Path | None = None
    """Folder of the base model, for the shapes of a PEFT adapter's weights."""
    density: float | None = None
    """The fraction of the entries of a LoRA adapter's products to keep."""
    all: bool = False
    """List every tensor, not only those with the most entries."""


@dataclass
class Convert:
    """Convert a delta between formats; the source's format is recognised by its files."""

    source: tyro.conf.Positional[str]
    """Folder or hub id: a delta of this library or composable-sft, or a PEFT adapter (SHiRA, Super-Tuning, LoRA)."""
    output: tyro.conf.Positional[Path]
    """Folder to write."""
    to: Literal["deftx", "composable-sft", "peft-shira"] = "deftx"
    """peft-shira is for deltas of linear layers, with about as many entries per row and column in each."""
    base: Path | None = None
    """Folder of the base model (safetensors files), for the shapes of a PEFT adapter's weights. Super-Tuning needs it,
    SHiRA where a weight is not square."""
    density: float | None = None
    """The fraction of the entries of a LoRA adapter's products to keep, the largest ones."""
    k: int | None = None
    """Instead of density, the number of entries."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the values in a deftx folder; 16 bits are smaller and lossy. The other formats take only float32."""


@dataclass
class Doctor:
    """Versions, devices, and each operator on each backend: checked against its oracle, with its speed."""

    device: str | None = None
    """Check only this device, cpu or cuda."""


def _preset(name: str, preset: type[PresetRun], profile: str) -> Any:
    """The subcommand of a preset, with the defaults of the profile."""
    if profile != "small":
        return Annotated[preset, tyro.conf.subcommand(name)]
    (data,) = (field.type for field in dataclasses.fields(preset) if field.name == "data")
    unset = object.__new__(data.__origin__)  # type: ignore[union-attr]  # what is missing is not checked
    for field in dataclasses.fields(unset):
        given = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        setattr(unset, field.name, tyro.MISSING if given is dataclasses.MISSING else given)
    return Annotated[preset, tyro.conf.subcommand(name, default=small(preset, unset))]


def _commands(profile: str) -> Any:
    """The type of all commands. `deftx run PRESET --profile small` has other defaults, also in its help."""
    presets = [Annotated[DemoRun, tyro.conf.subcommand("demo")]]
    presets += [_preset(name, preset, profile) for name, preset in PRESETS.items()]
    union = Annotated[Union[tuple(presets)], tyro.conf.arg(name="")]  # type: ignore[valid-type]  # noqa: UP007
    run = dataclasses.make_dataclass("Run", [("preset", union)], bases=(Run,))
    run.__doc__ = Run.__doc__
    return Annotated[run, tyro.conf.subcommand("run")] | _Others


def _profile(arguments: Sequence[str]) -> str:
    """The profile on the command line: the last one, as tyro takes it."""
    found = "paper"
    for argument, following in itertools.pairwise([*arguments, ""]):
        name, equals, value = argument.partition("=")
        if name == "--profile":
            found = value if equals else following
    return found


_Others = (
    Annotated[TrainLanguageConfig, tyro.conf.subcommand("train-language")]
    | Annotated[TrainTaskConfig, tyro.conf.subcommand("train-task")]
    | Annotated[Compose, tyro.conf.subcommand("compose")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[EvalConfig, tyro.conf.subcommand("eval")]
    | Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Convert, tyro.conf.subcommand("convert")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Of several processes (torchrun, accelerate launch), which train together, only the first prints, and of errors the
    first one is printed.

    Returns:
        The exit code: 0; 1 where `doctor` found an error; 2 for bad input, a file that cannot be read or written, or a
        missing extra; 130 after an interrupt; 141 where the pipe that reads its output was closed.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _main(arguments) if _rank() is None else _one_of_several(arguments)


def _rank() -> int | None:
    """The number of this process among several that a launcher started, or None."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _one_of_several(arguments: list[str]) -> int:
    from deftx_kernels.train import processes

    with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
        if _rank():
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            warnings.simplefilter("ignore")
        try:
            if (code := _main(arguments)) == 0:
                processes.leave()
            return code
        except processes.FailedElsewhere:
            return 2
        except Exception:
            if processes.first_to_fail():
                raise
            return 2


def _main(arguments: list[str]) -> int:
    try:
        try:
            command = _parse(arguments)
            trains = isinstance(command, (Run, TrainLanguageConfig, TrainTaskConfig, EvalConfig))
            if _rank() and not trains:
                return 0
            return next(handler for kind, handler in _HANDLERS.items() if isinstance(command, kind))(command)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAIN_PACKAGES:
            raise
        return _fail(f'this needs {package}: pip install "deftx-kernels[train]"')
    except (ValueError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; the same command continues where it stopped", 130)


def _parse(arguments: list[str]) -> Any:
    commands = _commands(_profile(arguments))
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere if _rank() else sys.stderr):
        return tyro.cli(commands, args=arguments, prog="deftx", description=DESCRIPTION)


def _fail(message: str, code: int = 2) -> int:
    if _rank() is not None:
        from deftx_kernels.train import processes

        if not processes.first_to_fail():
            return code
    print(f"deftx: {' '.join(message.split())}", file=sys.stderr)
    return code


def _silence_transformers() -> None:
    """Turn off the messages of transformers and datasets. ValueError under python -OO, where transformers fails."""
    if sys.flags.optimize > 1:
        raise ValueError("transformers needs the docstrings that python -OO removes: start it with python -O or python")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _drive(command: Run | TrainLanguageConfig | TrainTaskConfig | EvalConfig) -> int:
    _silence_transformers()
    from deftx_kernels.train import pipeline

    if isinstance(command, Run):
        pipeline.run(command.preset)
    elif isinstance(command, TrainLanguageConfig):
        print(pipeline.train_language(command))
    elif isinstance(command, TrainTaskConfig):
        print(pipeline.train_task(command))
    else:
        print(json.dumps(pipeline.evaluate_vectors(command)))
    return 0


def _compose(command: Compose) -> int:
    from deftx_kernels.delta import compose
    from deftx_kernels.train.deltas import load_delta

    if not command.vectors:
        raise ValueError("vectors: at least one is needed")
    for path in command.vectors:
        _check_output(command.output, path)
    compose(*(load_delta(path) for path in command.vectors)).save_pretrained(command.output)
    print(command.output)
    return 0


def _merge(command: Merge) -> int:
    from rich.progress import Progress

    from deftx_kernels.delta import merge
    from deftx_kernels.delta.checkpoint import merge_into_checkpoint
    from deftx_kernels.train.deltas import load_delta

    for path in (command.base, *command.vectors):
        _check_output(command.output, str(path))
    delta = merge(
        *(load_delta(path) for path in command.vectors),
        weights=command.weights,
        method=command.method,
        density=command.density,
        majority_sign_method=command.majority_sign_method,
        scope=command.scope,
        seed=command.seed,
    )
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("merging")
        merge_into_checkpoint(
            command.base,
            delta,
            command.output,
            dense=command.dense,
            strict=command.strict,
            on_file=lambda done, files: progress.update(bar, completed=done, total=files),
        )
    print(command.output)
    return 0


def _check_output(output: Path, source: str) -> None:
    """ValueError where the output would replace the source."""
    folder = Path(source).resolve()
    if folder.exists() and output.resolve() == (folder.parent if folder.is_file() else folder):
        raise ValueError(f"output {output} is the folder of {source}, which it would replace: choose another")


def _inspect(command: Inspect) -> int:
    from deftx_kernels.mask import CSRMask
    from deftx_kernels.train.deltas import load_any

    if command.other is not None:
        return _inspect_two(command)
    found = load_any(command.path, command.base, command.density)
    mask = found if isinstance(found, CSRMask) else found.mask
    console = Console()
    share = f"{mask.nnz:,} of {mask.numel:,} entries ({mask.density:.3%})"
    console.print(f"{type(found).__name__}: {share} in {len(mask.names)} tensors")
    for name, value in getattr(found, "metadata", {}).items():
        if name != "base_fingerprint":
            console.print(f"{name}: {json.dumps(value)}", highlight=False, soft_wrap=True)
    rows = sorted(mask.summary().items(), key=lambda item: -item[1]["nnz"])
    shown = rows if command.all else rows[:20]
    table = Table("tensor", "shape", "entries", "density", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, sizes in shown:
        table.add_row(name, "×".join(map(str, sizes["shape"])), f"{sizes['nnz']:,}", f"{sizes['density']:.3%}")
    for name, tensor in getattr(found, "dense", {}).items():
        table.add_row(name, "×".join(map(str, tensor.shape)), f"{tensor.numel():,}", "whole")
    console.print(table)
    if len(shown) < len(rows):
        console.print(f"… and {len(rows) - len(shown)} more tensors (--all)")
    return 0


def _inspect_two(command: Inspect) -> int:
    from deftx_kernels.train.deltas import comparison, load_delta

    one, other = load_delta(command.path), load_delta(str(command.other))
    rows = comparison(one, other)
    table = Table("tensor", "entries", "entries", "shared", "cosine", "sign conflicts", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    ordered = sorted(rows.items(), key=lambda item: (item[0] != "all tensors", -item[1]["shared"]))
    shown = ordered if command.all else ordered[:21]
    for name, row in shown:
        counts = [f"{row[key]:,}" for key in ("first", "second", "shared")]
        table.add_row(name, *counts, f"{row['cosine']:+.3f}", f"{row['sign_conflicts']:.1%}")
    console = Console()
    console.print(table)
    if len(shown) < len(ordered):
        console.print(f"… and {len(ordered) - len(shown)} more tensors (--all)")
    return 0


def _convert(command: Convert) -> int:
    import torch

    from deftx_kernels.delta import SparseDelta
    from deftx_kernels.delta.interop import to_composable_sft, to_peft_shira
    from deftx_kernels.train.deltas import base_tensors, load_any

    _check_output(command.output, command.source)
    if command.to != "deftx" and command.dtype != "float32":
        raise ValueError(f"dtype must be float32 for {command.to}, not {command.dtype}")
    delta = load_any(command.source, command.base, command.density, command.k)
    if not isinstance(delta, SparseDelta):
        raise ValueError(f"{command.source} is a mask, not a delta")
    if command.to == "composable-sft":
        to_composable_sft(delta, command.output)
    elif command.to == "peft-shira":
        to_peft_shira(delta, command.output, None if command.base is None else base_tensors(command.base))
    else:
        delta.save_pretrained(command.output, dtype=getattr(torch, command.dtype))
    print(command.output)
    return 0


def _doctor(command: Doctor) -> int:
    from deftx_kernels import doctor

    rows = doctor.run(device=command.device)
    doctor.print_table(rows)
    return 0 if all(row.correct for row in rows) else 1


_HANDLERS: dict[type, Callable[[Any], int]] = {
    Run: _drive,
    TrainLanguageConfig: _drive,
    TrainTaskConfig: _drive,
    Compose: _compose,
    Merge: _merge,
    EvalConfig: _drive,
    Inspect: _inspect,
    Convert: _convert,
    Doctor: _doctor,
}


if __name__ == "__main__":
    sys.exit(main())
