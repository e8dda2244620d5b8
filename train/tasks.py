"""Sentences and what to predict: built-in tasks and the user's own files, checked row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.parquet as pq

from train.predictions import (
    check_texts,
    column_names,
    column_values,
    read_rows,
    require_column,
)
from train.span_corruption import check_text_file

BUILT_IN = ("movie", "product", "tweet", "editorial")
SPAN_CORRUPTION = "span_corruption"
SPLITS = ("train", "validation", "test")

Kind = Literal["classification", "regression", "text", "span_corruption"]

_METRICS: dict[Kind, str] = {
    "classification": "accuracy",
    "regression": "pearson",
    "text": "exact_match",
    "span_corruption": "token_accuracy",
}
_KINDS: dict[str, Kind] = {"label": "classification", "score": "regression", "target": "text"}
_SENTIMENT = Path(__file__).parent / "sentiment"
SENTIMENT_LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Task:
    """Sentences, or pairs of them, with what to predict.

    Attributes:
      name: of the built-in task, or what the caller called the files.
      kind: "classification", "regression", "text" or "span_corruption".
      label_names: one name per class; empty unless it is classification.
      splits: split name -> dataset with columns `sentence`, maybe `sentence2`, and `label` (index
        into `label_names`), `score` (float64) or, for "text", `target`. For "span_corruption" the
        path of a text file.
    """

    name: str
    kind: Kind
    label_names: tuple[str, ...]
    splits: dict[str, Any]

    @property
    def num_labels(self) -> int:
        """Width of the classification head: one output for regression."""
        return len(self.label_names) or 1

    @property
    def metric(self) -> str:
        """The metric, larger is better, that chooses the best epoch."""
        return _METRICS[self.kind]


def load_task(
    name: str | None = None,
    *,
    regression: bool = False,
    text: bool = False,
    train_file: str | Path | None = None,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    splits: Sequence[str] | None = None,
    label_names: Sequence[str] | None = None,
    max_characters: int = 100_000,
) -> Task:
    """Reads a built-in task, the user's files, or a built-in task with some splits replaced.

    A file has a column `sentence`, for pairs also `sentence2`, and `label` (integers or text),
    `score` (numbers) or `target` (text). Which of them is predicted is, unless `regression`, `text`
    or `label_names` says it, the first of these that the files have. Label names are the sorted
    labels of the training file, or those of its `datasets.ClassLabel`; where no name is an integer,
    integer labels are positions in them. The files of `SPAN_CORRUPTION` are plain text, not read
    here.

    Args:
      name: one of `BUILT_IN`, `SPAN_CORRUPTION`, or any name for the user's files ("custom" if
        None).
      regression: predict `score` instead of `label`.
      text: predict `target` instead of `label`.
      train_file: .parquet, .jsonl, .csv or .tsv.
      validation_file: the same.
      test_file: the same.
      splits: which splits to return; by default all there are.
      label_names: the classes of a saved adapter; they take precedence over the training file's.
      max_characters: limit on the length of one sentence.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: for anything else that does not fit, naming the file and the row.
    """
    files = _files(name, (train_file, validation_file, test_file))
    wanted = tuple(files) if splits is None else tuple(splits)
    for split in wanted:
        if split not in files:
            raise ValueError(f"no file for the split {split!r}; there are {', '.join(files)}")
    if name == SPAN_CORRUPTION:
        if regression or text:
            raise ValueError(f"{name} takes its targets from the text itself, not from a column")
        for split in wanted:
            check_text_file(files[split])
        return Task(name, "span_corruption", (), {split: files[split] for split in wanted})
    names = tuple(label_names or ())
    if regression or text:
        target = "score" if regression else "target"
    elif names or name in BUILT_IN:
        names, target = names or SENTIMENT_LABELS, "label"
    else:
        target = _target_column(next(iter(files.values())), max_characters)
    # The training file is read even when only evaluating, if the label names have to come from it.
    needed = [s for s in files if s in wanted or (s == "train" and target == "label" and not names)]
    columns = {split: _read_split(files[split], target, max_characters) for split in needed}
    _check_same_columns(files, columns)
    if target != "label":
        names = ()
    else:
        names = names or _label_names(files, columns)
        for split, values in columns.items():
            values["label"] = _label_indices(files[split], values["label"], names)
        _check_two_classes(files, columns, names)
    return Task(
        name=name or "custom",
        kind=_KINDS[target],
        label_names=names,
        splits={split: _dataset(columns[split], names) for split in wanted},
    )


def subsample(dataset: datasets.Dataset, size: int, seed: int) -> datasets.Dataset:
    """`size` rows drawn without replacement, in their original order.

    The draw depends on `seed` alone, and a smaller sample is part of a larger one of the same seed.

    Raises:
      ValueError: if `size` is below 1 or above the number of rows.
    """
    if not 1 <= size <= len(dataset):
        raise ValueError(f"cannot draw {size} examples of {len(dataset)}; use 1 to {len(dataset)}")
    chosen = np.random.default_rng(seed).permutation(len(dataset))[:size]
    return dataset.select(np.sort(chosen))


def _files(name: str | None, given: Sequence[str | Path | None]) -> dict[str, Path]:
    """Split -> file, the user's before the built-in task's."""
    files = {}
    if name in BUILT_IN:
        files = {split: _SENTIMENT / str(name) / f"{split}.parquet" for split in SPLITS}
    files |= {split: Path(path) for split, path in zip(SPLITS, given, strict=True) if path}
    if not files:
        raise ValueError(
            f"{name} needs a text file; give --train-file"
            if name == SPAN_CORRUPTION
            else f"unknown task {name!r}; use {', '.join(BUILT_IN)}, or give files of your own"
        )
    return files


def _target_column(path: Path, max_characters: int) -> str:
    names = column_names(next(read_rows(path, max_characters=max_characters)))
    return next((column for column in _KINDS if column in names), "label")


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
        check_texts(path, target, columns[target], 1, max_characters)
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
        raise ValueError(f"{with_pairs} has a column 'sentence2' and {without} has none")


def _check_two_classes(
    files: Mapping[str, Path], columns: Mapping[str, dict[str, list[Any]]], names: Sequence[str]
) -> None:
    found = set(columns["train"]["label"]) if "train" in columns else set()
    if len(found) == 1:
        raise ValueError(
            f"{files['train']}: every label is {names[found.pop()]!r}; "
            "training needs at least two classes"
        )


def _class_names(path: Path) -> Sequence[str]:
    """The names of integer labels, where the file is built in or was written by `datasets`."""
    if _SENTIMENT in path.parents:
        return SENTIMENT_LABELS
    if path.suffix.lower() != ".parquet":
        return ()
    feature = datasets.Features.from_arrow_schema(pq.read_schema(path)).get("label")
    return feature.names if isinstance(feature, datasets.ClassLabel) else ()


def _label(path: Path, row: int, value: Any, class_names: Sequence[str]) -> str:
    """A label as text: integers in decimal, or by name where `class_names` has one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas stores integers as floats where some are missing
    if (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and not value.strip())
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


def _label_names(
    files: Mapping[str, Path], columns: Mapping[str, dict[str, list[Any]]]
) -> tuple[str, ...]:
    if "train" not in files:
        raise ValueError(
            "without a training file the label names are unknown; give train_file or label_names"
        )
    class_names = _class_names(files["train"])
    if class_names:
        return tuple(class_names)
    found = set(columns["train"]["label"])
    return tuple(sorted(found, key=int if all(map(_is_integer, found)) else None))


def _is_integer(label: str) -> bool:
    """Whether `label` is how Python writes an integer, unlike "007"."""
    return label.removeprefix("-").isdecimal() and label == str(int(label))


def _label_indices(path: Path, labels: list[str], names: tuple[str, ...]) -> list[int]:
    index = {name: i for i, name in enumerate(names)}
    if not any(map(_is_integer, names)):  # otherwise "1" is a name, not a position
        index |= {str(i): i for i in range(len(names))}
    for row, label in enumerate(labels, 1):
        if label not in index:
            raise ValueError(
                f"{path}, row {row}: label {label[:80]!r} is not one of "
                f"{', '.join(map(repr, names)):.400}"
            )
    return [index[label] for label in labels]


def _score(path: Path, row: int, value: Any) -> float:
    try:
        score = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{path}, row {row}: score {str(value)[:80]!r} is not a finite number")
    return score


def _dataset(columns: dict[str, list[Any]], names: tuple[str, ...]) -> datasets.Dataset:
    """In memory: nothing is cached on disk, so an edited file is never mistaken for an old one."""
    features: dict[str, Any] = {name: datasets.Value("string") for name in columns}
    if "label" in columns:
        features["label"] = datasets.ClassLabel(names=list(names))
    elif "score" in columns:
        features["score"] = datasets.Value("float64")
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
