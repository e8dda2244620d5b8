"""Prediction files: the rows of an input file, streamed, checked, and written with predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from train.data.rows import check_files, column_names, column_values, columns_read, read_rows
from train.data.writing import add_columns, write_rows
from train.objectives.base import Predicted, Predictions

# Columns that a model reads -> its predictions for their rows.
PredictChunk: TypeAlias = Callable[[dict[str, list[Any]]], Predictions]


def predict_file(
    input_path: str | Path,
    output_path: str | Path,
    predict_chunk: PredictChunk,
    *,
    label_names: Sequence[str] | Mapping[str, Sequence[str]],
    columns: Mapping[str, type] | None = None,
    write_logits: bool = False,
    progress: Callable[[int], object] | None = None,
    chunk_rows: int = 1024,
    max_characters: int = 100_000,
) -> int:
    """Copies a file with predictions added, a chunk at a time.

    The input's columns are followed by `prediction` (the name of the label; for regression the
    number; for words the list of their tags; otherwise the text), `label_id` and `probability` (for
    labels of rows only) and, if requested, `logits`. With several models the columns are
    `prediction_NAME` and so on for each. The formats of input and output may differ.

    Args:
      input_path: a .parquet, .jsonl, .csv, .tsv, .conll or .txt file, as for `read_rows`.
      output_path: a .parquet, .jsonl, .csv or .tsv file; it appears, or is replaced, only when it
        is complete.
      predict_chunk: columns -> logits `[rows, num_labels]`, or a list of texts, numbers or lists of
        tags, None where there is no prediction; with several models, name -> these. The columns are
        `sentence` and, for pairs, `sentence2`, or `columns`.
      label_names: one name per class; empty for regression, which has one logit, texts and tags;
        with several models, name -> these.
      columns: the alternative columns, as for `read_rows`.
      write_logits: whether to add the column `logits`; not for models without logits.
      progress: a function that is called after each chunk with the number of its rows.
      chunk_rows: the maximum number of rows in memory.
      max_characters: the maximum length of a sentence.

    Returns:
      The number of rows.

    Raises:
      FileNotFoundError: if the input does not exist.
      ValueError: if `read_rows` or `write_rows` raises it, input and output are the same file, the
        input has one of the added columns, or the logits have another shape or are not finite.
    """
    input_path, output_path = Path(input_path), Path(output_path)
    check_files(input_path, output_path)
    labels_of = label_names if isinstance(label_names, Mapping) else {"": label_names}
    added = [
        _named(column, name)
        for name, labels in labels_of.items()
        for column in added_names(labels, write_logits)
    ]
    num_rows = 0
    read: tuple[str, ...] = ()
    with write_rows(output_path) as write:
        for rows in read_rows(input_path, chunk_rows, max_characters, columns):
            names = column_names(rows)
            check_not_taken(input_path, names, added)
            read = read or columns_read(names, columns)
            values = {name: column_values(rows, name) for name in read}
            try:
                predicted = predict_chunk(values)
            except ValueError as error:
                if not num_rows:
                    raise
                raise ValueError(
                    f"{input_path}, rows counted from row {num_rows + 1} on: {error}"
                ) from error
            each = predicted if isinstance(predicted, Mapping) else {"": predicted}
            new: dict[str, pa.Array] = {}
            for name, labels in labels_of.items():
                found = _checked(each[name], len(rows), len(labels) or 1)
                values = added_columns(found, labels, added_names(labels, write_logits))
                new |= {_named(column, name): array for column, array in values.items()}
            write(add_columns(rows, new))
            num_rows += len(rows)
            if progress is not None:
                progress(len(rows))
    return num_rows


def _named(column: str, name: str) -> str:
    """Returns the name of a column of predictions, with the model's name if there are several."""
    return f"{column}_{name}" if name else column


def _checked(predicted: Predicted, num_rows: int, num_labels: int) -> Predicted:
    """Returns predictions unchanged, and logits in float64; raises ValueError as `check_logits`."""
    if isinstance(predicted, list):
        return predicted
    logits = np.asarray(predicted, np.float64)
    check_logits(logits, num_rows, num_labels)
    return logits


def check_not_taken(path: Path, names: Sequence[str], added: Sequence[str]) -> None:
    """Raises ValueError if a file with columns `names` already has a column to be added."""
    if taken := [name for name in added if name in names]:
        raise ValueError(
            f"{path} already has a column {taken[0]!r}, which is reserved for predictions; rename "
            "or remove it"
        )


def added_names(label_names: Sequence[str], write_logits: bool) -> list[str]:
    """Returns the names of the prediction columns, for labels, numbers or texts."""
    names = ["prediction", "label_id", "probability"] if label_names else ["prediction"]
    return names + ["logits"] * write_logits


def check_logits(logits: np.ndarray, num_rows: int, num_labels: int) -> None:
    """Raises ValueError unless the logits are `[num_rows, num_labels]` finite numbers."""
    if logits.shape != (num_rows, num_labels):
        raise ValueError(f"logits have shape {logits.shape}, not {(num_rows, num_labels)}")
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite; the adapter or the backbone is damaged")


def added_columns(
    predicted: Predicted, label_names: Sequence[str], added: Sequence[str]
) -> dict[str, pa.Array]:
    """Returns the columns `added`, from `[rows, num_labels]` float64 logits or predictions."""
    if isinstance(predicted, list):
        return {"prediction": pa.array(predicted, _type_of(predicted))}
    logits = predicted
    values = {"logits": pa.array(list(logits.astype(np.float32)), pa.list_(pa.float32()))}
    if label_names:
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        label_ids = logits.argmax(-1)
        values["prediction"] = pa.array([label_names[i] for i in label_ids], pa.string())
        values["label_id"] = pa.array(label_ids, pa.int64())
        values["probability"] = pa.array(exponentials.max(-1) / exponentials.sum(-1), pa.float64())
    else:
        values["prediction"] = pa.array(logits[:, 0], pa.float64())
    return {name: values[name] for name in added}


def _type_of(predicted: Sequence[Any]) -> pa.DataType:
    """Returns the type of a column of texts, numbers, or lists of tags or of numbers, or None."""
    first = next((value for value in predicted if value is not None), None)
    if isinstance(first, list):
        of_numbers = any(isinstance(value, float) for value in first)
        return pa.list_(pa.float32() if of_numbers else pa.string())
    return pa.string() if isinstance(first, str) else pa.float64()
