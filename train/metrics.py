"""Metrics of a whole split, from logits or generated text: scikit-learn, SciPy and sacrebleu."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal

import numpy as np
from scipy import stats
from sklearn import metrics


def compute_metrics(
    kind: Literal["classification", "regression"], logits: np.ndarray, targets: np.ndarray
) -> dict[str, float]:
    """Compares the predictions of a split with its targets.

    Args:
      kind: of the task.
      logits: `[examples, num_labels]`; for regression `[examples]` or `[examples, 1]`.
      targets: `[examples]` labels or scores.

    Returns:
      For classification `accuracy`, `macro_f1` (over the classes that occur among targets or
      predictions), `matthews_correlation` and, with two labels, `f1` of label 1. For regression
      `pearson`, `spearman`, `mse` and `mae`. A correlation with a constant is 0.

    Raises:
      ValueError: if there are no examples, the shapes do not fit or a logit is not finite.
    """
    logits, targets = np.asarray(logits), np.asarray(targets)
    if kind == "regression" and logits.shape == (len(targets), 1):
        logits = logits[:, 0]
    if (
        targets.ndim != 1
        or len(logits) != len(targets)
        or logits.ndim != (1 if kind == "regression" else 2)
    ):
        raise ValueError(f"logits {logits.shape} and targets {targets.shape} do not fit {kind}")
    if not len(targets):
        raise ValueError("no examples to evaluate on")
    check_finite(logits)
    if kind == "regression":
        return _regression(logits.astype(np.float64), targets.astype(np.float64))
    return _classification(logits.argmax(-1), targets, logits.shape[1])


def check_finite(logits: np.ndarray) -> None:
    """ValueError if some logits are not finite."""
    if not np.isfinite(logits).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} logits are not finite; "
            "training has diverged, try a smaller learning rate"
        )


def label_metrics(
    predictions: np.ndarray, targets: np.ndarray, num_labels: int
) -> dict[str, float]:
    """Metrics of generated labels: those of `compute_metrics`, and `invalid`.

    Args:
      predictions: `[examples]` labels, -1 where the text was no label's name: always wrong.
      targets: `[examples]` labels.
      num_labels: how many there are.
    """
    invalid = int(np.count_nonzero(predictions < 0))
    return {**_classification(predictions, targets, num_labels), "invalid": invalid}


def score_metrics(
    predictions: np.ndarray, targets: np.ndarray, fallback: float
) -> dict[str, float]:
    """Metrics of generated scores: those of `compute_metrics`, and `invalid`.

    Args:
      predictions: `[examples]` scores, NaN where the text was no number.
      targets: `[examples]` scores.
      fallback: what stands for NaN: whoever knows nothing best says the mean.
    """
    unknown = np.isnan(predictions)
    known = np.where(unknown, fallback, predictions)
    values = compute_metrics("regression", known, targets)
    return {**values, "invalid": int(np.count_nonzero(unknown))}


def text_metrics(predictions: Iterable[str], targets: Iterable[str]) -> dict[str, float]:
    """`exact_match`: the part of generated texts equal to their targets, white space aside."""
    pairs = zip(predictions, targets, strict=True)
    return {"exact_match": float(np.mean([a.split() == b.split() for a, b in pairs]))}


def answer_metrics(
    predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> dict[str, float]:
    """`exact_match` and `f1` of answers, as the official scripts of SQuAD v1.1 and ReCoRD do it.

    Case, punctuation, the articles a, an and the, and white space are ignored. `f1` is that of the
    words that a prediction and an answer share. Of several answers the best counts.

    Args:
      predictions: one for each question.
      answers: those that are right, at least one for each question.

    Returns:
      Means over the questions, from 0 to 1.

    References:
      Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016,
      arXiv:1606.05250, section 6.1; Zhang et al., ReCoRD, 2018, arXiv:1810.12885, section 5.
    """
    pairs = [
        (_answer_words(prediction), [_answer_words(text) for text in right])
        for prediction, right in zip(predictions, answers, strict=True)
    ]
    exact = [any(words == right for right in rights) for words, rights in pairs]
    overlap = [max(_word_f1(words, right) for right in rights) for words, rights in pairs]
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def all_of_group(values: Sequence[bool], groups: Sequence[Hashable]) -> float:
    """The part of the groups all of whose values are true.

    Args:
      values: `[rows]`.
      groups: `[rows]`: to which each belongs.
    """
    whole: dict[Hashable, bool] = {}
    for value, group in zip(values, groups, strict=True):
        whole[group] = bool(value) and whole.get(group, True)
    return sum(whole.values()) / len(whole)


def bleu(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Corpus BLEU from 0 to 100, with sacrebleu's defaults: tokenizer 13a, case as it is."""
    import sacrebleu  # noqa: PLC0415 - slow to import

    return sacrebleu.corpus_bleu(list(predictions), [list(targets)]).score


def _answer_words(text: str) -> list[str]:
    """What counts of an answer, word by word."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _word_f1(prediction: list[str], right: list[str]) -> float:
    """Harmonic mean of precision and recall of words, each as often as it stands there."""
    shared = (collections.Counter(prediction) & collections.Counter(right)).total()
    return 2 * shared / (len(prediction) + len(right)) if shared else 0.0


def _classification(
    predictions: np.ndarray, targets: np.ndarray, num_labels: int
) -> dict[str, float]:
    occurring = [y for y in np.union1d(predictions, targets) if y >= 0]
    values = {
        "accuracy": metrics.accuracy_score(targets, predictions),
        "macro_f1": metrics.f1_score(
            targets, predictions, labels=occurring, average="macro", zero_division=0.0
        ),
        "matthews_correlation": 0.0,
    }
    # Undefined for one class on either side; scikit-learn gives 0, in some cases with a warning.
    if len(np.unique(predictions)) > 1 and len(np.unique(targets)) > 1:
        values["matthews_correlation"] = metrics.matthews_corrcoef(targets, predictions)
    if num_labels == 2:
        values["f1"] = metrics.f1_score(
            targets, predictions, labels=[1], average="macro", zero_division=0.0
        )
    return {name: float(value) for name, value in values.items()}


def _regression(predictions: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    return {
        "pearson": _correlation(stats.pearsonr, predictions, targets),
        "spearman": _correlation(stats.spearmanr, predictions, targets),
        "mse": float(np.mean((predictions - targets) ** 2)),
        "mae": float(np.mean(np.abs(predictions - targets))),
    }


def _correlation(function: Callable, predictions: np.ndarray, targets: np.ndarray) -> float:
    for values in (predictions, targets):
        # Up to rounding: SciPy warns of a spread below 1e-13 of the mean.
        if np.ptp(values) <= 1e-12 * np.abs(values).max():
            return 0.0
    # A correlation of exactly two points may come out a rounding error beyond 1.
    return float(np.clip(function(predictions, targets).statistic, -1.0, 1.0))
