"""Words of tokenised examples, for tasks that predict a tag of every word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class WordCounts:
    """Counts of words, and of those that a model does not read.

    Attributes:
      words: the number of all words.
      cut: the number of words beyond the maximum length.
      dropped: the number of other words that the tokenizer makes no token of.
    """

    words: int = 0
    cut: int = 0
    dropped: int = 0

    def __add__(self, other: WordCounts) -> WordCounts:
        return WordCounts(
            self.words + other.words, self.cut + other.cut, self.dropped + other.dropped
        )

    def user_messages(self, what: str, max_length: int) -> list[str]:
        """Returns lines about words of `what` that are not read; empty if all are."""
        told = {
            f"are cut off by max_length={max_length}": self.cut,
            "are dropped by the tokenizer": self.dropped,
        }
        return [
            f"{number:,} of {self.words:,} words of the {what} {why}, and have no tag"
            for why, number in told.items()
            if number
        ]


@dataclass(frozen=True)
class Words:
    """Words of examples, and where their first tokens are.

    Attributes:
      lengths: `[examples]` int64, the number of words of each example.
      indices: `[tokens]` int32, for the first token of a word the index of the word in its example;
        -1 for all other tokens.
      tags: `[tokens]` int32, for the first token of a word its tag, `train.data.tokens.IGNORED` for
        all other tokens; None where the tags are unknown.
      counts: the counts of words that are not read.
    """

    lengths: np.ndarray
    indices: np.ndarray
    tags: np.ndarray | None
    counts: WordCounts


def of_rows(sentences: Iterable[Iterable[str]]) -> np.ndarray:
    """Returns an array `[rows]` of tuples, one for each sentence, whatever their lengths."""
    found = list(map(tuple, sentences))
    rows = np.empty(len(found), object)
    rows[:] = found
    return rows
