"""Checks of the driver's settings. Each raises ValueError naming the setting."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args


def check_int(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, not {value!r}")


def check_number(name: str, value: Any, positive: bool = False) -> None:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be a finite number {'above' if positive else 'of at least'} 0, not {value!r}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"{name} must be one of {', '.join(get_args(choices))}, not {value!r}")


def check_list(name: str, values: Sequence) -> None:
    """ValueError unless there are values, all of them different."""
    if not values:
        raise ValueError(f"{name}: at least one is needed")
    if repeated := [value for i, value in enumerate(values) if value in values[:i]]:
        raise ValueError(f"{name}: {str(repeated[0])!r} is given twice")


def check_seed(name: str, seed: Any) -> None:
    check_int(name, seed, 0)
    if seed >= 1 << 32:
        raise ValueError(f"{name} must be below 2**32, not {seed}")


def check_languages(name: str, values: Sequence[str]) -> None:
    """ValueError unless each can name a folder."""
    check_list(name, values)
    for value in values:
        if not value.strip() or value.strip(".") == "" or any(character in value for character in "/\\\0"):
            raise ValueError(f"{name}: {value!r} cannot name a language: it names a folder, so it has neither / nor \\")


def check_transfer(sources: Sequence[str], targets: Sequence[str]) -> None:
    check_languages("sources", sources)
    check_languages("targets", targets)
    if both := [name for name in targets if name in sources]:
        raise ValueError(f"targets: {both[0]!r} is a source as well, so it has labels and is no target")


def parse_pairs(pairs: list[str], argument: str) -> dict[str, Path]:
    """{"id": Path("x.csv")} from ["id=x.csv"]. Raises ValueError naming the argument."""
    if not pairs:
        return {}
    split = [pair.partition("=") for pair in pairs]
    for pair, (name, equals, path) in zip(pairs, split):
        if not (name and equals and path):
            raise ValueError(f"{argument}: {pair!r} should be written as language=path")
    check_languages(argument, [name for name, _, _ in split])
    return {name: Path(path) for name, _, path in split}
