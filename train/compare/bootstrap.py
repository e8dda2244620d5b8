"""Paired bootstrap between two methods, over test examples and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.compare import tagged_rows

RESAMPLES = 2000
# Number of resamples whose counts are in memory at once.
_CHUNK = 250
# Largest number of labels of the confusion matrices, whose size grows with its square.
_MOST_LABELS = 64
# A prediction that is no label. No label has this name.
_NO_LABEL = ""


@dataclasses.dataclass(frozen=True)
class Scored:
    """Runs of one method that differ in the seed alone.

    Attributes:
      scores: seed -> score of the test split.
      predictions: seed -> `[examples]` labels, scores, texts or tuples of tags; a seed is missing
        where a run has not recorded them.
      targets: `[examples]`; None if no run has recorded them.
    """

    scores: Mapping[int, float]
    predictions: Mapping[int, np.ndarray]
    targets: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference between the mean scores of two methods.

    Attributes:
      mean: of the method less that of the reference, over the seeds that both have.
      low: lower end of the 95 % interval.
      high: upper end.
      over_examples: True if test examples were resampled too, False for seeds alone.
      seeds: number of seeds that both methods have.
    """

    mean: float
    low: float
    high: float
    over_examples: bool
    seeds: int

    @property
    def verdict(self) -> str:
        """Returns "on par" for an interval that includes 0, else "ahead" or "behind"."""
        if self.low <= 0 <= self.high:
            return "on par"
        return "ahead" if self.low > 0 else "behind"

    @property
    def known(self) -> bool:
        """True if there was something to resample: examples, or more than one seed."""
        return self.over_examples or self.seeds > 1


def difference(
    method: Scored,
    reference: Scored,
    metric: str,
    label_names: Sequence[str] = (),
    *,
    resamples: int = RESAMPLES,
) -> Difference | None:
    """Compares two methods by a paired percentile bootstrap.

    Each resample draws seeds and test examples with replacement, the same ones for both methods,
    and takes the difference of the mean scores. The interval is that of a new training run and a
    new test set. With few seeds its part for the seeds is too narrow, by about
    `sqrt((seeds - 1) / seeds)`, and a single seed has no such part. Learning rates are those that
    were chosen: with other seeds or validation data others might be, and this is not in the
    interval. The draws are the same in every call.

    Args:
      method: runs of the method.
      reference: runs of the method that it is compared with.
      metric: name of the metric, as `train.tasks.metrics` has it, or several joined by `_and_`,
        whose mean counts. Seeds alone are resampled for a metric that is not known here, and where
        the predictions do not have the scores.
      label_names: names of the labels in their order; the F1 of two labels is that of the second.
      resamples: number of resamples.

    Returns:
      None if the methods have no seed in common.

    References:
      Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13; Koehn,
      Statistical Significance Tests for Machine Translation Evaluation, EMNLP 2004.
    """
    seeds = sorted(method.scores.keys() & reference.scores.keys())
    if not seeds:
        return None
    plain = np.array([method.scores[seed] - reference.scores[seed] for seed in seeds])
    generator = np.random.default_rng(0)
    drawn = generator.integers(len(seeds), size=(resamples, len(seeds)))
    over_examples = _on_the_same_rows(method, reference) and all(
        _reproduced(each, seeds, metric, label_names) for each in (method, reference)
    )
    if over_examples:
        assert method.targets is not None
        each = np.concatenate(
            [
                _differences(method, reference, seeds, metric, label_names, weights)
                for weights in _weights(len(method.targets), resamples, generator)
            ],
            axis=1,
        )  # [seeds, resamples]
        means = each[drawn, np.arange(resamples)[:, None]].mean(1)
    else:
        means = plain[drawn].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(plain.mean()), float(low), float(high), over_examples, len(seeds))


def _weights(examples: int, resamples: int, generator: np.random.Generator) -> Any:
    """Yields `[chunk, examples]` counts of how often a resample draws each example."""
    for start in range(0, resamples, _CHUNK):
        chunk = min(_CHUNK, resamples - start)
        yield generator.multinomial(examples, np.full(examples, 1 / examples), size=chunk)


def _on_the_same_rows(method: Scored, reference: Scored) -> bool:
    """Returns True if both have recorded targets, and the same."""
    if method.targets is None or reference.targets is None:
        return False
    return np.array_equal(method.targets, reference.targets)


def _reproduced(
    runs: Scored, seeds: Sequence[int], metric: str, label_names: Sequence[str]
) -> bool:
    """Returns True if the predictions of these seeds have their scores, by the metrics known here.

    A metric over groups of examples, as that of MultiRC, has another score here.
    """
    if runs.targets is None or not set(seeds) <= runs.predictions.keys():
        return False
    once = np.ones((1, len(runs.targets)), int)
    for seed in seeds:
        predictions = runs.predictions[seed]
        if not _is_known(metric, predictions, runs.targets, label_names):
            return False
        (found,) = weighted(metric, predictions, runs.targets, once, label_names)
        if not np.isclose(found, runs.scores[seed], rtol=0, atol=1e-6):
            return False
    return True


def _is_known(
    metric: str, predictions: np.ndarray, targets: np.ndarray, label_names: Sequence[str]
) -> bool:
    """Returns True if these predictions and targets can be resampled for a metric."""
    if tagged_rows.are_tags(targets):
        return tagged_rows.is_known(metric, predictions, targets)
    names = set(metric.split("_and_"))
    if not names <= _METRICS.keys() or predictions.shape != targets.shape or not len(targets):
        return False
    kinds = {predictions.dtype.kind, targets.dtype.kind}
    if names & _OF_NUMBERS.keys() and not kinds <= set("iuf"):
        return False
    if "exact_match" in names and kinds != {"U"}:
        return False
    if "f1" in names and len(label_names) != 2:
        return False
    labels = set(_texts(predictions)) | set(_texts(targets)) if names & _OF_LABELS.keys() else ()
    return len(labels) <= _MOST_LABELS


def _differences(
    method: Scored,
    reference: Scored,
    seeds: list[int],
    metric: str,
    label_names: Sequence[str],
    weights: np.ndarray,
) -> np.ndarray:
    """Returns `[seeds, chunk]` differences."""
    assert method.targets is not None
    one, other = (
        np.stack(
            [
                weighted(metric, side.predictions[seed], method.targets, weights, label_names)
                for seed in seeds
            ]
        )
        for side in (method, reference)
    )
    return one - other


def weighted(
    metric: str,
    predictions: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    label_names: Sequence[str] = (),
) -> np.ndarray:
    """Computes a metric of resampled examples.

    Args:
      metric: a metric that is known here, or several joined by `_and_`.
      predictions: `[examples]`.
      targets: `[examples]`.
      weights: `[resamples, examples]` numbers of times that an example was drawn.
      label_names: names of the labels in their order, for `f1`.

    Returns:
      `[resamples]` float64.
    """
    if tagged_rows.are_tags(targets):
        return tagged_rows.weighted(metric, predictions, targets, weights)
    functions = [_METRICS[name] for name in metric.split("_and_")]
    values = [function(predictions, targets, weights, label_names) for function in functions]
    return np.mean(values, axis=0)


def _accuracy(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, _: Sequence[str]
) -> np.ndarray:
    return weights @ (predictions == targets) / weights.sum(1)


def _exact_match(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, _: Sequence[str]
) -> np.ndarray:
    pairs = zip(predictions, targets, strict=True)
    return weights @ np.array([a.split() == b.split() for a, b in pairs]) / weights.sum(1)


def _confusions(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Returns `[resamples, labels, labels]` counts by target and prediction, and the labels."""
    texts = _texts(predictions), _texts(targets)
    names = np.unique(np.concatenate(texts))
    found, wanted = (np.searchsorted(names, each) for each in texts)
    cells, group = np.unique(wanted * len(names) + found, return_inverse=True)
    counts = np.zeros((len(weights), len(names) ** 2))
    counts[:, cells] = _sums(weights, group)
    return counts.reshape(-1, len(names), len(names)), names.tolist()


def _texts(labels: np.ndarray) -> np.ndarray:
    """Returns `[examples]` names of labels."""
    return np.array([_NO_LABEL if label is None else str(label) for label in labels.tolist()])


def _sums(weights: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Returns `[resamples, groups]` sums of the weights of each group.

    Args:
      weights: `[resamples, examples]`.
      group: `[examples]` numbers from 0 on, all of which occur.
    """
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(group.max() + 1))
    return np.add.reduceat(weights[:, order], starts, axis=1)


def _matthews(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, _: Sequence[str]
) -> np.ndarray:
    counts, _ = _confusions(predictions, targets, weights)
    total, right = counts.sum((1, 2)), np.trace(counts, axis1=1, axis2=2)
    rows, columns = counts.sum(2), counts.sum(1)
    covariance = right * total - (rows * columns).sum(1)
    spread = (total**2 - (rows**2).sum(1)) * (total**2 - (columns**2).sum(1))
    return _ratio(covariance, np.sqrt(spread))


def _f1s(counts: np.ndarray) -> np.ndarray:
    """Returns `[resamples, labels]` F1 of every label; NaN for a label that does not occur."""
    right = np.diagonal(counts, axis1=1, axis2=2)
    occurring = counts.sum(1) + counts.sum(2)
    with np.errstate(invalid="ignore"):
        return 2 * right / occurring


def _f1(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, label_names: Sequence[str]
) -> np.ndarray:
    counts, names = _confusions(predictions, targets, weights)
    if label_names[1] not in names:
        return np.zeros(len(weights))
    return np.nan_to_num(_f1s(counts)[:, names.index(label_names[1])])


def _macro_f1(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, _: Sequence[str]
) -> np.ndarray:
    counts, names = _confusions(predictions, targets, weights)
    labels = [i for i, name in enumerate(names) if name != _NO_LABEL]
    return np.nanmean(_f1s(counts)[:, labels], axis=1)


def _pearson(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, _: Sequence[str]
) -> np.ndarray:
    ones = np.ones_like(weights, dtype=float)
    return _correlation(predictions * ones, targets * ones, weights)


def _spearman(
    predictions: np.ndarray, targets: np.ndarray, weights: np.ndarray, _: Sequence[str]
) -> np.ndarray:
    return _correlation(_ranks(predictions, weights), _ranks(targets, weights), weights)


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns `[resamples, examples]` ranks within each resample, the mean rank for ties."""
    _, group = np.unique(values, return_inverse=True)
    sizes = _sums(weights, group)
    return (sizes.cumsum(1) - (sizes - 1) / 2)[:, group]


def _correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns `[resamples]` weighted correlations of `[resamples, examples]` numbers."""
    a, b = (_deviations(each, weights) for each in (a, b))
    covariance, *spreads = ((weights * x * y).sum(1) for x, y in ((a, b), (a, a), (b, b)))
    return _ratio(covariance, np.sqrt(spreads[0] * spreads[1]))


def _deviations(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns deviations from the weighted means, 0 where values are constant up to rounding."""
    deviations = values - (weights * values).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    largest = (np.abs(deviations) * (weights > 0)).max(1, keepdims=True)
    return np.where(largest > 1e-12 * np.abs(values).max(), deviations, 0.0)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Returns `above / below`, and 0 where `below` is 0, as for a constant prediction."""
    return np.divide(above, below, out=np.zeros_like(above, dtype=float), where=below > 0)


_OF_LABELS = {"matthews_correlation": _matthews, "f1": _f1, "macro_f1": _macro_f1}
_OF_NUMBERS = {"pearson": _pearson, "spearman": _spearman}
# F1 is not here for texts: that of SQuAD is over words, and no run records what it needs.
_METRICS = _OF_LABELS | _OF_NUMBERS | {"accuracy": _accuracy, "exact_match": _exact_match}
