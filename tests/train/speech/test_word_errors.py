"""Tests the word error rate."""

import functools

import numpy as np
import pytest

from train.speech.word_errors import edits, word_error_rate


def slow_edits(said, target):
    """Counts edits as the definition says, by recursion."""

    @functools.cache
    def of(i, j):
        if not i or not j:
            return i + j
        return min(
            of(i - 1, j) + 1, of(i, j - 1) + 1, of(i - 1, j - 1) + (said[i - 1] != target[j - 1])
        )

    return of(len(said), len(target))


def test_edits_are_those_of_the_definition():
    """Random lists of words, empty ones among them, have the edits of a plain recursion."""
    generator = np.random.default_rng(0)
    for _ in range(200):
        said, target = (
            tuple(map(str, generator.integers(0, 4, generator.integers(0, 8)))) for _ in range(2)
        )
        assert edits(said, target) == slow_edits(said, target) == edits(target, said)


def test_the_rate_is_over_all_words():
    """Edits and words of all texts are added up, whatever white space separates the words."""
    said = ["three four", "one  two\nthree", ""]
    wanted = ["three one four", "one two three", "five"]
    assert word_error_rate(said, wanted) == pytest.approx(2 / 7)
    assert word_error_rate(["a b c"], ["d"]) == 3.0
    with pytest.raises(ValueError, match="have no words"):
        word_error_rate(["a"], [" "])
