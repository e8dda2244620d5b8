"""Tests train.tasks.entities: entities and their metrics are those of conlleval and seqeval."""

import random

import numpy as np
import pytest

from train.compare import tagged_rows
from train.compare.bootstrap import Scored, difference, weighted
from train.data.words import of_rows
from train.tasks import entities

NAMES = ("B-LOC", "B-ORG", "B-PER", "I-LOC", "I-ORG", "I-PER", "O")

# Tags, the entities that seqeval 1.2.2 finds in them (`get_entities`, whose ends are inclusive).
FOUND = {
    "B after I of another kind": ("B-PER I-PER B-LOC", [("PER", 0, 1), ("LOC", 2, 2)]),
    "kind changes between two I": (
        "B-PER I-PER I-LOC I-LOC O",
        [("PER", 0, 1), ("LOC", 2, 3)],
    ),
    "at the end": ("O O B-ORG I-ORG", [("ORG", 2, 3)]),
    "I after O": ("O I-PER I-PER O", [("PER", 1, 2)]),
    "I at the beginning": ("I-LOC O", [("LOC", 0, 0)]),
    "B after B": ("B-LOC B-LOC I-LOC", [("LOC", 0, 0), ("LOC", 1, 2)]),
    "B after I of its kind": ("B-LOC I-LOC B-LOC", [("LOC", 0, 1), ("LOC", 2, 2)]),
    "I of another kind after B": ("B-LOC I-PER", [("LOC", 0, 0), ("PER", 1, 1)]),
    "no kind": ("B I O I", [("_", 0, 1), ("_", 3, 3)]),
    "kind with a hyphen": ("B-LOC-a I-LOC-a I-LOC-b", [("LOC-a", 0, 1), ("LOC-b", 2, 2)]),
    "none": ("O O", []),
}

# What seqeval 1.2.2 reports for `sentences()` with zero_division=0: precision, recall, F1.
REPORTED = {
    "": (0.7220843672456576, 0.6986794717887155, 0.7101891397193411),
    "LOC": (0.7636363636363637, 0.6885245901639344, 0.7241379310344828),
    "ORG": (0.7093023255813954, 0.7261904761904762, 0.7176470588235294),
    "PER": (0.6923076923076923, 0.6847826086956522, 0.6885245901639345),
}


def sentences():
    """Returns 200 predictions, often wrong and often not IOB2, and their targets."""
    generator = random.Random(5)

    def tag():
        return (*NAMES, "O")[int(generator.random() * 8)]

    targets = [[tag() for _ in range(1 + int(generator.random() * 12))] for _ in range(200)]
    predictions = [[x if generator.random() < 0.7 else tag() for x in each] for each in targets]
    return predictions, targets


@pytest.mark.parametrize("case", FOUND)
def test_entities_are_those_of_seqeval(case):
    tags, found = FOUND[case]
    assert entities.entities(tags.split()) == [(kind, a, b + 1) for kind, a, b in found]


def test_metrics_are_those_of_seqeval():
    values = entities.tag_metrics(*sentences(), NAMES)
    for kind, numbers in REPORTED.items():
        prefix = f"{kind}/" if kind else ""
        found = [values[f"{prefix}{name}"] for name in ("precision", "recall", "f1")]
        np.testing.assert_allclose(found, numbers, rtol=1e-12, err_msg=kind)
    pairs = [pair for each in zip(*sentences(), strict=True) for pair in zip(*each, strict=True)]
    assert values["accuracy"] == np.mean([a == b for a, b in pairs])


def test_a_ratio_without_a_denominator_is_0():
    values = entities.tag_metrics([["O", "O"]], [["O", "O"]], NAMES)
    assert values.pop("accuracy") == 1
    assert set(values.values()) == {0.0}
    assert len(values) == 12


def test_entities_of_words_that_do_not_line_up_are_refused():
    with pytest.raises(ValueError, match="argument 2 is longer"):
        entities.tag_metrics([["O"]], [["O", "O"]], NAMES)
    with pytest.raises(ValueError, match="there are no words to evaluate on"):
        entities.tag_metrics([[]], [[]], NAMES)


@pytest.mark.parametrize(
    ("names", "is_iob2"),
    [
        (NAMES, True),
        (("B", "I", "O"), True),
        (("I-PER", "O"), True),
        (("ADJ", "NOUN", "O"), False),
        (("B-PER", "E-PER", "O"), False),
        (("B-", "O"), False),
        (("BUS", "I"), False),
        (("O",), False),
        ((), False),
    ],
)
def test_tags_that_mark_entities(names, is_iob2):
    assert entities.is_iob2(names) == is_iob2
    assert entities.metric(names) == ("f1" if is_iob2 else "accuracy")


def test_entities_that_begin_with_inside_are_counted():
    tags = "I-LOC I-LOC O I-PER I-LOC B-LOC I-LOC"
    assert entities.opened_by_inside(tags.split()) == 3


@pytest.mark.parametrize("metric", ["accuracy", "f1"])
def test_resampled_sentences_have_the_metrics_of_the_sentences_drawn(metric):
    predictions, targets = sentences()
    generator = np.random.default_rng(1)
    weights = generator.multinomial(200, np.full(200, 1 / 200), size=3)
    found = weighted(metric, of_rows(predictions), of_rows(targets), weights)
    for counts, value in zip(weights, found, strict=True):
        drawn = np.repeat(np.arange(200), counts)
        own = [predictions[i] for i in drawn], [targets[i] for i in drawn]
        assert value == pytest.approx(entities.tag_metrics(*own, NAMES)[metric], abs=1e-12)


def test_the_bootstrap_draws_sentences():
    predictions, targets = sentences()
    score = entities.tag_metrics(predictions, targets, NAMES)["f1"]
    rows, best = of_rows(predictions), of_rows(targets)
    worse = Scored({0: score}, {0: rows}, best)
    found = difference(Scored({0: 1.0}, {0: best}, best), worse, "f1", NAMES, resamples=200)
    assert found.over_examples
    assert found.low < 1 - score < found.high
    assert found.verdict == "ahead"
    # Predictions that do not have the score, or are not of the same words, are not resampled.
    unlike = Scored({0: 0.5}, {0: rows}, best)
    assert not difference(unlike, worse, "f1", NAMES, resamples=9).over_examples
    assert not tagged_rows.is_known("f1", of_rows([["O"]]), of_rows([["O", "O"]]))
    assert not tagged_rows.is_known("pearson", rows, best)
    assert not tagged_rows.is_known("f1", np.array(["O"]), of_rows([["O"]]))
