"""Files of texts that belong together: scored pairs, pairs of a text and its positive, triplets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import datasets

from compacter_jax.messages import listing
from train.data.files import read_chunks
from train.data.rows import check_texts, column_names, column_values, first_columns
from train.data.tokens import columns_of

# What the rows of a file are: pairs with a score, pairs that belong together, or such pairs with a
# text that does not belong to them.
Class: TypeAlias = Literal["scored pairs", "pairs", "triplets"]

FIRST, SECOND, NEGATIVE, SCORE = "sentence1", "sentence2", "negative", "score"
TEXTS = (FIRST, SECOND, NEGATIVE)
_SENTENCES, _ANCHORS = (FIRST, SECOND), ("anchor", "positive")
# The columns of pairs in files for other tasks, which are read if embeddings are asked for.
_OF_OTHER_TASKS = ("sentence", "sentence2")
_MORE_NEGATIVES = re.compile(r"negative_?\d+|negatives")


def has_pairs(columns: Sequence[str]) -> bool:
    """Returns True if columns are those of a file of pairs for embeddings and for nothing else."""
    return "sentence" not in columns and any(
        set(pair) <= set(columns) for pair in (_SENTENCES, _ANCHORS)
    )


def class_of(rows: Any) -> Class:
    """Returns what the rows are that `load` has read."""
    columns = columns_of(rows)
    if SCORE in columns:
        return "scored pairs"
    return "triplets" if NEGATIVE in columns else "pairs"


def load(
    files: Mapping[str, Path], wanted: Sequence[str], max_characters: int
) -> dict[str, datasets.Dataset]:
    """Reads the splits of a task of embeddings.

    Args:
      files: split -> file.
      wanted: the splits to return.
      max_characters: the maximum length of a text.

    Returns:
      Split -> rows with `sentence1`, `sentence2` and, where the file has them, `negative` or
      `score`; an anchor is `sentence1`, its positive `sentence2`.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: for any other invalid input, such as an empty text, a score outside of -1 to 1, or
        validation and test files of different classes; the message names the file and the row.
    """
    splits = {split: _read(files[split], max_characters) for split in wanted}
    scored = [split for split in ("validation", "test") if split in splits]
    classes = [class_of(splits[split]) for split in scored]
    if len(set(classes)) > 1:
        raise ValueError(
            f"{files[scored[0]]} has {classes[0]}, but {files[scored[1]]} has {classes[1]}, which "
            "have other metrics; give validation and test files of one class"
        )
    return splits


def scaled(path: str, rows: Any, columns: Sequence[str], highest: float) -> datasets.Dataset:
    """Returns the scored pairs of a benchmark with scores divided by the highest that there is.

    Args:
      path: the split, for errors.
      rows: rows with the two columns of texts, and `score`.
      columns: the names of the two columns.
      highest: the highest score.

    Raises:
      ValueError: for a score that is then outside of -1 to 1.
    """
    named = dict(zip(_SENTENCES, columns, strict=True))
    texts = {name: list(rows[column][:]) for name, column in named.items()}
    return _dataset(path, texts | {SCORE: [score / highest for score in rows[SCORE][:]]})


def _read(path: Path, max_characters: int) -> datasets.Dataset:
    columns = _columns(path, first_columns(path))
    found: dict[str, list[Any]] = {name: [] for name in columns}
    for rows in read_chunks(path, 1024):
        names = column_names(rows)
        for name, column in columns.items():
            if column not in names:
                raise ValueError(
                    f"{path}: the rows after row {len(found[name])} have no {column}, but the rows "
                    "before have one; give all rows one, or none"
                )
            values = column_values(rows, column)
            if name != SCORE:
                first = len(found[name]) + 1
                numbers = range(first, first + len(rows))
                check_texts(path, column, values, numbers, max_characters)
            found[name] += values
        new = {NEGATIVE, SCORE} & set(names) - set(columns.values())
        if new:
            raise ValueError(
                f"{path}: the rows after row {len(found[FIRST]) - len(rows)} have a "
                f"{listing(new)}, but the rows before have none; give all rows one, or none"
            )
    return _dataset(path, found)


def _columns(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Returns name -> column of the file; raises ValueError for columns that are ambiguous."""
    pairs = [pair for pair in (_ANCHORS, _SENTENCES, _OF_OTHER_TASKS) if set(pair) <= set(names)]
    if not pairs:
        raise ValueError(
            f"{path} has no pairs of texts: it needs the columns anchor and positive, or sentence1 "
            f"and sentence2; its columns are {listing(names)}"
        )
    if len(pairs) > 1:
        raise ValueError(
            f"{path} has two pairs of texts, {' and '.join(pairs[0])} as well as "
            f"{' and '.join(pairs[1])}; remove one pair"
        )
    (pair,) = pairs
    columns = dict(zip(_SENTENCES, pair, strict=True))
    more = [name for name in (NEGATIVE, SCORE) if name in names]
    if "label" in names and SCORE not in more:
        raise ValueError(
            f"{path} has a column 'label' of pairs, which embeddings do not have; for a classifier "
            "of pairs call the texts sentence and sentence2, for embeddings give a column 'score'"
        )
    if further := [name for name in names if _MORE_NEGATIVES.fullmatch(name)]:
        raise ValueError(
            f"{path} has the column {further[0]!r}; one negative is read in each row, from a "
            "column 'negative': repeat the anchor and its positive for each"
        )
    if len(more) > 1 or (more == [SCORE] and pair == _ANCHORS):
        raise ValueError(
            f"{path} has a column 'score' beside {listing([*pair, *more][:-1])}; scored pairs have "
            "the columns sentence1, sentence2 and score alone"
        )
    if more == [NEGATIVE] and pair != _ANCHORS:
        raise ValueError(
            f"{path} has a column 'negative' beside {' and '.join(pair)}; call these anchor and "
            "positive"
        )
    return columns | {name: name for name in more}


def _dataset(path: Path | str, columns: dict[str, list[Any]]) -> datasets.Dataset:
    """Returns a dataset in memory: without a cache on disk, an edited file is always read again."""
    features: dict[str, Any] = {name: datasets.Value("string") for name in columns}
    if SCORE in columns:
        features[SCORE] = datasets.Value("float64")
        scores = enumerate(columns[SCORE], 1)
        columns = columns | {SCORE: [_score(path, row, value) for row, value in scores]}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _score(path: Path | str, row: int, value: Any) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{path}, row {row}: score {str(value)[:80]!r} is not a finite number")
    if not -1 <= score <= 1:
        raise ValueError(
            f"{path}, row {row}: score {score:g} is not from -1 to 1, as the cosine of two "
            "embeddings is; divide the scores by the highest there is, such as 5 for STS-B"
        )
    return score
