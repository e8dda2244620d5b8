"""Word error rate: edits of words that turn what was written into what was said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def word_error_rate(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns the number of edits of words over the number of words of the targets.

    The edits are the fewest insertions, deletions and substitutions of words, separated by white
    space, that turn each prediction into its target; the rate may exceed 1.

    Args:
      predictions: `[examples]` texts.
      targets: `[examples]` texts.

    Raises:
      ValueError: if the numbers of texts differ, or the targets have no words.
    """
    pairs = [(a.split(), b.split()) for a, b in zip(predictions, targets, strict=True)]
    words = sum(len(target) for _, target in pairs)
    if not words:
        raise ValueError("the targets have no words, so there is no word error rate")
    return sum(edits(said, target) for said, target in pairs) / words


def edits(said: Sequence[str], target: Sequence[str]) -> int:
    """Returns the smallest number of insertions, deletions and substitutions between two lists.

    Example:
      >>> edits("three four".split(), "three one four".split())
      1
    """
    costs = np.arange(len(target) + 1)
    places = np.arange(len(target) + 1)
    for count, word in enumerate(said, 1):
        differs = np.array([word != other for other in target], int)
        stepped = np.empty_like(costs)
        stepped[0] = count
        stepped[1:] = np.minimum(costs[1:] + 1, costs[:-1] + differs)
        # Insertions add up from the left: the minimum of earlier costs, each plus its distance.
        costs = np.minimum.accumulate(stepped - places) + places
    return int(costs[-1])
