"""The user's own files as splits of a task, checked row by row."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from train.data.rows import (
    check_texts,
    column_names,
    column_values,
    first_columns,
    read_rows,
    require_column,
)
from train.tasks import labels, pairs, tagged
from train.tasks.benchmark import Kind

_KINDS: dict[str, Kind] = {"label": "classification", "score": "regression", "target": "text"}
EMBEDDING = "embedding"
SENTIMENT = Path(__file__).parents[1] / "sentiment"
SENTIMENT_LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Read:
    """Content of files.

    Attributes:
      kind: the kind of the task.
      label_names: one name for each class or tag; empty for other kinds.
      splits: split -> rows.
      notes: lines about the reading of the files, for the user.
    """

    kind: Kind
    label_names: tuple[str, ...]
    splits: dict[str, datasets.Dataset]
    notes: tuple[str, ...]


def load(
    files: Mapping[str, Path],
    wanted: Sequence[str],
    target: str | None,
    names: tuple[str, ...],
    order: tuple[str, ...],
    max_characters: int,
) -> Read:
    """Reads the splits of a task.

    Args:
      files: split -> file.
      wanted: the splits to return.
      target: the column to predict, or "embedding" for pairs of texts; None takes `tags` for files
        of words, "embedding" for pairs with the columns of `train.tasks.pairs`, and otherwise label
        if there are `names`, or the first of label, score and target that exists.
      names: the names of the labels or tags; if empty, those of the training file.
      order: the names that integer labels from 0 on stand for, if they are stated.
      max_characters: the maximum length of a sentence.

    Raises:
      FileNotFoundError, ValueError: as `train.tasks.load_task`.
    """
    first = files[wanted[0]] if names else next(iter(files.values()))
    target = target or _target_column(first, names)
    if target == tagged.TAGS:
        return Read("tagging", *tagged.load(files, wanted, names, max_characters))
    if target == EMBEDDING:
        return Read("embedding", (), pairs.load(files, wanted, max_characters), ())
    # The training file is read even for an evaluation if the label names must come from it.
    needed = [s for s in files if s in wanted or (s == "train" and target == "label" and not names)]
    columns = {split: _read_split(files[split], target, max_characters) for split in needed}
    _check_same_columns(files, columns)
    notes: list[str] = []
    if target != "label":
        names = ()
    else:
        if "train" in columns:
            _check_two_classes(files["train"], columns["train"]["label"])
        if not names:
            names, order, notes = _names_of_training(files, columns)
        for split, values in columns.items():
            values["label"], told = labels.indices(files[split], values["label"], names, order)
            notes += told
        if "train" in columns:
            _check_two_classes(files["train"], [names[i] for i in columns["train"]["label"]])
    splits = {split: _dataset(columns[split], names) for split in wanted}
    return Read(_KINDS[target], names, splits, tuple(dict.fromkeys(notes)))


def _target_column(path: Path, names: Sequence[str]) -> str:
    """Returns the column to predict, from the columns of a file and the names of the labels."""
    columns = first_columns(path)
    if tagged.TOKENS in columns and "sentence" not in columns:
        return tagged.TAGS
    if pairs.has_pairs(columns):
        return EMBEDDING
    return "label" if names else next((each for each in _KINDS if each in columns), "label")


def _read_split(path: Path, target: str, max_characters: int) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    for rows in read_rows(path, max_characters=max_characters):
        if not columns:
            names = column_names(rows)
            require_column(path, names, target)
            columns = {name: [] for name in ("sentence", "sentence2", target) if name in names}
        for name in columns:
            columns[name] += column_values(rows, name)
    if target == "score":
        columns["score"] = [_score(path, row, x) for row, x in enumerate(columns["score"], 1)]
    elif target == "target":
        texts = columns[target]
        check_texts(path, target, texts, range(1, 1 + len(texts)), max_characters)
    else:
        class_names = _class_names(path)
        columns["label"] = [
            _label(path, row, x, class_names) for row, x in enumerate(columns["label"], 1)
        ]
    return columns


def _check_same_columns(files: Mapping[str, Path], columns: Mapping[str, dict[str, Any]]) -> None:
    pairs = {split: "sentence2" in values for split, values in columns.items()}
    if len(set(pairs.values())) > 1:
        with_pairs = next(files[split] for split, pair in pairs.items() if pair)
        without = next(files[split] for split, pair in pairs.items() if not pair)
        raise ValueError(f"{with_pairs} has a column 'sentence2', but {without} has none")


def _check_two_classes(path: Path, found: Sequence[str]) -> None:
    if len(set(found)) == 1:
        raise ValueError(
            f"{path}: every label is {found[0]!r:.80}; training needs at least two classes"
        )


def _class_names(path: Path) -> Sequence[str]:
    """Returns the names of integer labels if the file is built in or was written by `datasets`."""
    if SENTIMENT in path.parents:
        return SENTIMENT_LABELS
    if path.suffix.lower() != ".parquet":
        return ()
    feature = datasets.Features.from_arrow_schema(pq.read_schema(path)).get("label")
    return feature.names if isinstance(feature, datasets.ClassLabel) else ()


def _label(path: Path, row: int, value: Any, class_names: Sequence[str]) -> str:
    """Returns a label as text: an integer in decimal, or by name if `class_names` has one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas stores integers as floats where some are missing
    if (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not labels.key(value))
        or (class_names and value == -1)  # how `datasets` marks a hidden label
    ):
        raise ValueError(f"{path}, row {row}: the label is missing")
    if not isinstance(value, str | int):
        raise ValueError(
            f"{path}, row {row}: label {str(value)[:80]!r} is neither an integer nor text; "
            "a number to predict belongs in a column 'score'"
        )
    if isinstance(value, int) and 0 <= value < len(class_names):
        return class_names[value]
    return str(value)


def _names_of_training(
    files: Mapping[str, Path], columns: Mapping[str, dict[str, list[Any]]]
) -> tuple[tuple[str, ...], tuple[str, ...], list[str]]:
    """Returns the label names, their order if the file states one, and lines for the user."""
    if "train" not in files:
        raise ValueError(
            "without a training file the label names are unknown; give train_file or label_names"
        )
    found = Counter(columns["train"]["label"])
    notes = labels.check_found(files["train"], found)
    if class_names := tuple(_class_names(files["train"])):
        return class_names, class_names, notes
    names = sorted(found, key=int if all(map(labels.is_integer, found)) else None)
    return tuple(names), (), notes


def _score(path: Path, row: int, value: Any) -> float:
    try:
        score = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{path}, row {row}: score {str(value)[:80]!r} is not a finite number")
    return score


def _dataset(columns: dict[str, list[Any]], names: tuple[str, ...]) -> datasets.Dataset:
    """Returns a dataset in memory: without a cache on disk, an edited file is always read again."""
    features: dict[str, Any] = {name: datasets.Value("string") for name in columns}
    if "label" in columns:
        features["label"] = datasets.ClassLabel(names=list(names))
    elif "score" in columns:
        features["score"] = datasets.Value("float64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
