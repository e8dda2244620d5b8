"""Metrics of resampled sentences whose words have tags."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from train.tasks.entities import entity_counts


def are_tags(values: np.ndarray) -> bool:
    """Returns True if the values of rows are tuples of tags."""
    return len(values) > 0 and all(isinstance(value, tuple) for value in values.tolist())


def is_known(metric: str, predictions: np.ndarray, targets: np.ndarray) -> bool:
    """Returns True if a metric of these tags can be resampled.

    Args:
      metric: the name of the metric.
      predictions: `[sentences]` tuples of tags, or other values.
      targets: tuples of tags, or other values.
    """
    if metric not in _COUNTS or not (are_tags(predictions) and are_tags(targets)):
        return False
    return list(map(len, predictions)) == list(map(len, targets))


def weighted(
    metric: str, predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Computes a metric of resampled sentences, which is a ratio of sums over sentences.

    Args:
      metric: `accuracy` of words, or `f1` of entities.
      predictions: `[sentences]` tuples of tags.
      targets: `[sentences]` tuples of tags.
      weights: `[resamples, sentences]` numbers of times that a sentence was drawn.

    Returns:
      `[resamples]` float64.
    """
    above, below = (weights @ np.array(_COUNTS[metric](predictions, targets), float)).T
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _words(predictions: np.ndarray, targets: np.ndarray) -> list[tuple[int, int]]:
    """Returns, for each sentence, the number of words with the right tag and that of all words."""
    pairs = zip(predictions, targets, strict=True)
    return [(sum(a == b for a, b in zip(*pair, strict=True)), len(pair[0])) for pair in pairs]


def _entities(predictions: np.ndarray, targets: np.ndarray) -> list[tuple[int, int]]:
    """Returns, for each sentence, twice the right entities, and the predicted and wanted ones."""
    each = entity_counts(predictions.tolist(), targets.tolist())
    return [(2 * right, found + wanted) for right, found, wanted in each]


_COUNTS: dict[str, Callable[[np.ndarray, np.ndarray], list[tuple[int, int]]]] = {
    "accuracy": _words,
    "f1": _entities,
}
