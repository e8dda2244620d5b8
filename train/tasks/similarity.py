"""Metrics of sentence embeddings: correlation with scores, and retrieval of positives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train.tasks.metrics import compute_metrics

# Number of anchors whose similarities to all candidates are in memory at once.
_ANCHORS_AT_ONCE = 512


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the cosines of pairs of embeddings, `[rows]` float64; 0 for an embedding of zeros."""
    return np.sum(_normalized(first) * _normalized(second), -1)


def score_metrics(first: np.ndarray, second: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Compares the cosines of pairs with their scores.

    Args:
      first: `[rows, width]` embeddings.
      second: `[rows, width]` embeddings.
      scores: `[rows]`.

    Returns:
      `spearman` and `pearson`, the correlations with the cosines; a correlation with a constant is
      0.
    """
    values = compute_metrics("regression", cosines(first, second), scores)
    return {name: values[name] for name in ("spearman", "pearson")}


def retrieval_metrics(embeddings: np.ndarray, texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """Scores the retrieval of each anchor's positive among the texts of all rows.

    The candidates are the distinct positives and negatives of all rows, each counted once. The
    right ones for an anchor are its positives in all rows, so that another positive of an anchor is
    never wrong. An anchor that occurs in several rows counts once. Its rank is 1 plus the number of
    wrong candidates that are at least as similar to it as its best right one: a tie counts as
    wrong, so that equal embeddings of all texts score 0.

    Args:
      embeddings: `[rows, texts, width]`: anchor, positive and perhaps negative.
      texts: `[rows]` of as many texts.

    Returns:
      `accuracy_at_1`, the fraction of anchors of rank 1; `mrr`, the mean of 1 / rank; and with
      negatives `triplet_accuracy`, the fraction of rows whose positive has a greater cosine with
      the anchor than the negative has.

    References:
      Voorhees, The TREC-8 Question Answering Track Report, 1999, section 2, for the mean reciprocal
      rank.
    """
    unit = _normalized(embeddings)
    anchors: dict[str, int] = {}
    places: dict[str, int] = {}
    right: list[set[int]] = []
    first_rows: list[int] = []
    candidates: list[np.ndarray] = []
    for row, (anchor, *others) in enumerate(texts):
        for column, text in enumerate(others, 1):
            if text not in places:
                places[text] = len(candidates)
                candidates.append(unit[row, column])
        if anchor not in anchors:
            anchors[anchor] = len(right)
            first_rows.append(row)
            right.append(set())
        right[anchors[anchor]].add(places[others[0]])
    ranks = _ranks(unit[first_rows, 0], np.stack(candidates), right)
    values = {"accuracy_at_1": float(np.mean(ranks == 1)), "mrr": float(np.mean(1 / ranks))}
    if unit.shape[1] == 3:
        positive, negative = (np.sum(unit[:, 0] * unit[:, i], -1) for i in (1, 2))
        values["triplet_accuracy"] = float(np.mean(positive > negative))
    return values


def _ranks(anchors: np.ndarray, candidates: np.ndarray, right: Sequence[set[int]]) -> np.ndarray:
    """Returns the rank of the best right candidate of each anchor, `[anchors]` integers."""
    ranks = np.ones(len(anchors), np.int64)
    for start in range(0, len(anchors), _ANCHORS_AT_ONCE):
        similarities = anchors[start : start + _ANCHORS_AT_ONCE] @ candidates.T
        for row, of_row in enumerate(similarities):
            places = list(right[start + row])
            best = of_row[places].max()
            of_row[places] = -np.inf
            ranks[start + row] += np.count_nonzero(of_row >= best)
    return ranks


def _normalized(embeddings: np.ndarray) -> np.ndarray:
    x = np.asarray(embeddings, np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
