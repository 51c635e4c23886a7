"""Scores of a classifier: macro-F1, accuracy, and F1 of entities."""

from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers.trainer_utils import EvalPrediction

from deftx_kernels.train.tokens import IGNORED

METRICS = {"macro_f1": "macro-F1", "accuracy": "accuracy", "entity_f1": "entity F1"}  # names in reports


def are_entity_tags(labels: Sequence[str]) -> bool:
    """Whether the labels are O and tags such as B-PER and I-PER."""
    others = [label for label in labels if label != "O"]
    return bool(others) and all(label[:2] in ("B-", "I-", "E-", "S-") for label in others)


def default_metric(labels: Sequence[str], task: str) -> str:
    """The score of a task: entity_f1 for entity tags, else macro_f1."""
    return "entity_f1" if task == "token-classification" and are_entity_tags(labels) else "macro_f1"


def classification_metrics(prediction: EvalPrediction, labels: Sequence[str] = ()) -> dict[str, float]:
    """{"macro_f1", "accuracy", "n"} over the labelled positions; classes without examples do not enter macro-F1.

    With `labels` that are entity tags, and a row of positions per example, also "entity_f1".
    """
    guesses, truths = np.argmax(prediction.predictions, -1), np.asarray(prediction.label_ids)
    counted = truths != IGNORED
    truth, guess = truths[counted], guesses[counted]
    metrics = {
        "macro_f1": float(f1_score(truth, guess, labels=sorted(set(truth.tolist())), average="macro", zero_division=0)),
        "accuracy": float(accuracy_score(truth, guess)),
        "n": len(truth),
    }
    if truths.ndim == 2 and are_entity_tags(labels):
        tags = [
            [[labels[i] for i in row[keep]] for row, keep in zip(rows, counted, strict=True)]
            for rows in (truths, guesses)
        ]
        metrics["entity_f1"] = entity_f1(*tags)
    return metrics


def entity_f1(truths: Sequence[Sequence[str]], guesses: Sequence[Sequence[str]]) -> float:
    """F1 over entities of all sentences: an entity counts as found if its first word, last word and type are right.

    The definition of CoNLL's conlleval and of seqeval's default mode, with micro average; 0 where there is no entity.
    (seqeval itself has no wheel, and its source distribution does not build with current setuptools.)

    Args:
        truths, guesses: the tags of each sentence, such as ["B-PER", "I-PER", "O"].

    Raises:
        ValueError: sentences of different number or length.

    Example:
        >>> entity_f1([["B-PER", "I-PER", "O", "B-LOC"]], [["B-PER", "I-PER", "O", "B-ORG"]])
        0.5
    """
    if [len(tags) for tags in truths] != [len(tags) for tags in guesses]:
        raise ValueError("truths and guesses must have the same sentences, with a tag for each word")
    true, found = (
        {(i, *entity) for i, tags in enumerate(rows) for entity in entities(tags)} for rows in (truths, guesses)
    )
    total = len(true) + len(found)
    return 2 * len(true & found) / total if total else 0.0


def entities(tags: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """(first word, last word, type) of each entity in the tags of a sentence, in the schemes IOB1, IOB2 and IOBES.

    An entity begins at B- or S-, after an entity of another type, after E- or S-, and after O.
    """
    start, before, kind = 0, "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        begins = prefix in ("B", "S") or (prefix != "O" and (before in ("O", "E", "S") or name != kind))
        if before != "O" and (begins or prefix == "O"):
            yield start, i - 1, kind
        if begins:
            start = i
        before, kind = prefix, name
