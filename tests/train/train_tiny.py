"""Small texts with labels, and CSV files of them."""

import csv
from pathlib import Path

GOOD, BAD = ["good", "nice", "lovely", "great"], ["bad", "awful", "ugly", "poor"]
FILLERS = ["the", "room", "food", "was", "very", "and", "place", "a", "service", "is"]


def sentence(i: int) -> tuple[str, str]:
    """The i-th sentence and its label, which depends on one of its words."""
    words = [FILLERS[(i * 7 + j * 3) % len(FILLERS)] for j in range(4 + i % 5)]
    label, choice = (("positive", GOOD), ("negative", BAD))[i % 2]
    words.insert(i % len(words), choice[(i // 2) % 4])
    return " ".join(words), label


def write_csv(path: Path, rows: list[tuple], header=("id", "text", "label")) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path
