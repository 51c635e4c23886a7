"""Entity F1 against seqeval 1.2.2 (f1_score, default mode, micro average), and the scores of a prediction."""

from types import SimpleNamespace

import numpy as np
import pytest

from deftx_kernels.train.metrics import are_entity_tags, classification_metrics, default_metric, entities, entity_f1


def sentences(text: str) -> list[list[str]]:
    return [part.split() for part in text.split("|")]


@pytest.mark.parametrize(
    ("truth", "guess", "seqeval"),
    [
        ("B-A I-A O B-B", "B-A I-A O B-A", 0.5),
        ("B-A I-A I-A", "B-A I-A O", 0.0),
        ("I-A I-A O I-B", "I-A I-A O I-A", 0.5),  # IOB1
        ("I-A B-A I-A", "I-A I-A I-A", 0.0),
        ("B-A I-A I-B", "B-A I-A B-B", 1.0),  # another type begins another entity
        ("B-A I-B I-B O", "B-A B-B I-B O", 1.0),
        ("S-A O B-A I-A E-A", "S-A O B-A E-A O", 0.5),  # IOBES
        ("B-A E-A E-A I-A", "B-A E-A S-A B-A", 1.0),
        ("S-A I-A O E-B", "B-A B-A O B-B", 1.0),
        ("O O O", "O O O", 0.0),
        ("O O O", "O B-A O", 0.0),
        ("B-A-x I-A-x B-A-y", "B-A-x I-A-y B-A-y", 0.4),
        ("B-A | O | B-A I-A", "B-A | B-A | B-A O", 0.4),
    ],
)
def test_entity_f1_is_that_of_seqeval(truth, guess, seqeval):
    assert entity_f1(sentences(truth), sentences(guess)) == pytest.approx(seqeval, abs=1e-12)
    assert entity_f1(sentences(guess), sentences(truth)) == pytest.approx(seqeval, abs=1e-12)


def test_entities_of_hand_cases_and_of_none():
    tags = ["O", "B-PER", "I-PER", "I-LOC", "B-LOC", "O"]
    assert list(entities(tags)) == [(1, 2, "PER"), (3, 3, "LOC"), (4, 4, "LOC")]
    assert list(entities(["S-A", "B-B", "I-B", "E-B", "E-B"])) == [(0, 0, "A"), (1, 3, "B"), (4, 4, "B")]
    assert not list(entities([]))
    assert entity_f1([], []) == entity_f1([[]], [[]]) == 0
    for guesses in ([["O"]], [["O", "O"], []]):
        with pytest.raises(ValueError, match="same sentences, with a tag for each word"):
            entity_f1([["O", "O"]], guesses)


def prediction(truths, guesses, classes: int) -> SimpleNamespace:
    return SimpleNamespace(predictions=np.eye(classes)[np.array(guesses)], label_ids=np.array(truths))


@pytest.mark.parametrize(
    ("labels", "expected"), [(["B-A", "I-A", "O"], 0.5), (["ADJ", "NOUN", "X"], None), ([], None), (["O"] * 3, None)]
)
def test_classification_metrics_leave_out_ignored_positions(labels, expected):
    ignored = -100
    # tags without the ignored positions: B I O | B O, and the guesses B I O | B I
    truths = [[ignored, 0, ignored, 1, 2], [0, ignored, 2, ignored, ignored]]
    guesses = [[2, 0, 0, 1, 2], [0, 2, 1, 0, 0]]
    metrics = classification_metrics(prediction(truths, guesses, 3), labels)
    assert metrics.get("entity_f1") == expected
    assert metrics["n"] == 5
    assert metrics["accuracy"] == pytest.approx(4 / 5)
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    flat = classification_metrics(prediction([0, 1, 1], [0, 1, 0], 3), labels)
    assert "entity_f1" not in flat
    assert flat["macro_f1"] == pytest.approx(2 / 3)  # the third class has no example


def test_which_labels_are_entity_tags():
    assert are_entity_tags(["O", "B-PER", "I-PER", "S-X", "E-X"])
    assert not any(map(are_entity_tags, ([], ["O"], ["O", "X"], ["NOUN", "B-X"])))
    assert default_metric(["B-A", "O"], "token-classification") == "entity_f1"
    assert default_metric(["B-A", "O"], "classification") == default_metric(["X"], "token-classification") == "macro_f1"
