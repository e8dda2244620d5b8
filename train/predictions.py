"""Rows of the user's files, streamed in, checked, and streamed out with predictions beside them."""

from __future__ import annotations

import abc
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from compacter_jax.files import replace_file
from compacter_jax.messages import listing, quote, shorten
from train.files import Rows, read_chunks

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")

# Logits `[rows, num_labels]`, or the predictions themselves, None where there is none.
Predicted: TypeAlias = np.ndarray | list[str] | list[float | None]
# Of one model, or of several by name.
Predictions: TypeAlias = Predicted | Mapping[str, Predicted]
# Columns that a model reads -> what it makes of their rows.
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

    After the input's columns come `prediction` (the label's name; for regression the number; else
    the text), `label_id` and `probability` (for labels alone) and, if asked for, `logits`; of
    several models `prediction_NAME` and so on for each. The formats of input and output may differ.

    Args:
      input_path: .parquet, .jsonl, .csv or .tsv, as `read_rows` takes it.
      output_path: one of the same formats; it appears, or is replaced, only when complete.
      predict_chunk: columns, `sentence` and, for pairs, `sentence2`, or those below -> logits
        `[rows, num_labels]`, or a list of texts or numbers, None where there is no prediction; of
        several models name -> these.
      label_names: one name per class; empty for regression, which has one logit, and for texts; of
        several models name -> these.
      columns: as `read_rows` takes them.
      write_logits: whether to add the column `logits`; not where there are none.
      progress: called after each chunk with the number of its rows.
      chunk_rows: most rows to hold at a time.
      max_characters: limit on the length of one sentence.

    Returns:
      The number of rows.

    Raises:
      FileNotFoundError: if the input does not exist.
      ValueError: if `read_rows` or `write_rows` raises it, input and output are one file, the input
        has one of the added columns, or the logits do not have their shape or are not finite.
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
    """A column of predictions, of several models with the name of one."""
    return f"{column}_{name}" if name else column


def _checked(predicted: Predicted, num_rows: int, num_labels: int) -> Predicted:
    """Predictions as they are, logits in float64; ValueError as of `check_logits`."""
    if isinstance(predicted, list):
        return predicted
    logits = np.asarray(predicted, np.float64)
    check_logits(logits, num_rows, num_labels)
    return logits


def check_files(input_path: Path, output_path: Path) -> None:
    """Looks at the names of input and output before anything slow happens.

    Raises:
      FileNotFoundError: if the input does not exist.
      ValueError: if a file is a folder or of an unsupported type, the input is empty, both are the
        same file, or there is no folder for the output.
    """
    _check_file(input_path)
    _check_suffix(output_path)
    if output_path.is_dir():
        raise ValueError(f"{output_path}: is a directory, not a file")
    if output_path.exists() and output_path.samefile(input_path):
        raise ValueError(f"{output_path}: is the input file; give the output another name")
    if not output_path.parent.is_dir():
        raise ValueError(f"{output_path}: there is no folder {output_path.parent}")


def read_rows(
    path: str | Path,
    chunk_rows: int = 1024,
    max_characters: int = 100_000,
    columns: Mapping[str, type] | None = None,
) -> Iterator[Rows]:
    """Streams a .parquet, .jsonl, .csv or .tsv file whose sentences have been checked.

    Every value of a .csv or .tsv file is text, exactly as it stands in the file. Fields are quoted
    with `"`, doubled inside a field, in both; a field of a .csv may hold line breaks, one of a .tsv
    may not. Blank lines are skipped and not counted as rows.

    Args:
      path: the file; it needs a column `sentence`, and may have `sentence2`.
      chunk_rows: most rows to hold at a time.
      max_characters: limit on the length of one sentence.
      columns: name -> type of values, of columns that a file may have instead: all of them.

    Yields:
      At most `chunk_rows` rows: a `pyarrow.Table` of parquet, a list of dicts of the other formats.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it cannot be read, has no rows or no column `sentence`, or if a sentence is
        null, not text, empty or too long; the message names the file and the row, counted from 1.
    """
    path = Path(path)
    _check_file(path)
    first_row = 1
    reader = ColumnReader(path, columns, max_characters)
    for rows in read_chunks(path, chunk_rows):
        reader.read(rows, column_names(rows), range(first_row, first_row + len(rows)))
        yield rows
        first_row += len(rows)
    if first_row == 1:
        raise ValueError(f"{path}: has no rows")


class ColumnReader:
    """Reads the columns that a model is called with, chunk by chunk, and checks them.

    Args:
      path: of the file, for errors.
      columns: as `read_rows` takes them.
      max_characters: limit on the length of one sentence.
    """

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, type] | None = None,
        max_characters: int = 100_000,
    ):
        self._path, self._columns, self._max_characters = path, columns or {}, max_characters
        self._read: tuple[str, ...] = ()

    def read(
        self, rows: Rows, names: Sequence[str], numbers: Sequence[int]
    ) -> dict[str, list[Any]]:
        """Name -> values of the columns to read, which the first rows decide on.

        These are all that the reader was made with, if the rows have them, else `sentence` and,
        where it is, `sentence2`.

        Args:
          rows: at least one.
          names: of their columns.
          numbers: of the rows in the file, counted from 1.

        Raises:
          ValueError: as `read_rows`.
        """
        if not self._read:
            self._read = columns_read(names, self._columns)
            instead = f", nor all of {', '.join(self._columns)}" if self._columns else ""
            require_column(self._path, names, self._read[0], instead)
        elif self._read == ("sentence",) and "sentence2" in names:
            raise ValueError(
                f"{self._path}: there is a sentence2 after row {numbers[0] - 1}, but none before"
            )
        values = {name: column_values(rows, name) for name in self._read}
        for name, column in values.items():
            kind = self._columns.get(name, str)
            if kind is str:
                check_texts(self._path, name, column, numbers, self._max_characters)
            else:
                _check_values(self._path, name, column, numbers, kind)
        return values


def columns_read(names: Sequence[str], columns: Mapping[str, type] | None) -> tuple[str, ...]:
    """Those of `columns` if a file has them all, else `sentence` and, where it is, `sentence2`."""
    if columns and set(columns) <= set(names):
        return tuple(columns)
    return ("sentence", "sentence2") if "sentence2" in names else ("sentence",)


def column_names(rows: Rows) -> list[str]:
    """Names of the columns; for records, of all keys in the order of their first appearance."""
    if isinstance(rows, pa.Table):
        return rows.column_names
    return list(dict.fromkeys(itertools.chain.from_iterable(rows)))


def column_values(rows: Rows, name: str) -> list[Any]:
    """One column as Python values; None where a record does not have it."""
    if isinstance(rows, pa.Table):
        return rows.column(name).to_pylist()
    return [row.get(name) for row in rows]


def require_column(path: Path, columns: Sequence[str], name: str, instead: str = "") -> None:
    """Raises ValueError, listing the columns of `path`, if `name` is not one of them."""
    if name not in columns:
        raise ValueError(f"{path}: no column {name!r}{instead}; its columns are {listing(columns)}")


def check_texts(
    path: Path, name: str, values: list[Any], numbers: Sequence[int], max_characters: int
) -> None:
    """Raises ValueError, naming the row, if a value of a column is no text, empty or too long."""
    for row, value in zip(numbers, values, strict=True):
        if isinstance(value, str) and value.strip() and len(value) <= max_characters:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"{path}, row {row}: {name} holds half a surrogate pair, which is no character"
                ) from None
        elif isinstance(value, str) and value.strip():
            raise ValueError(
                f"{path}, row {row}: {name} has {len(value)} characters, over the limit of "
                f"{max_characters}; shorten or split it"
            )
        elif value is None or isinstance(value, str):
            state = "missing (null)" if value is None else "empty"
            raise ValueError(f"{path}, row {row}: {name} is {state}; remove or fill the row")
        else:
            raise ValueError(f"{path}, row {row}: {name} is {type(value).__name__}, not text")


def _check_values(
    path: Path, name: str, values: list[Any], numbers: Sequence[int], kind: type
) -> None:
    """Raises ValueError, naming the row, if a value is not of a type, or text of an integer."""
    for row, value in zip(numbers, values, strict=True):
        of_number = kind is int and isinstance(value, str) and value.strip().isdecimal()
        if not isinstance(value, kind) and not of_number:
            raise ValueError(
                f"{path}, row {row}: {name} is {type(value).__name__}, not {kind.__name__}"
                + ("; use .jsonl or .parquet" if kind in (list, dict) else "")
            )


def _check_suffix(path: Path) -> str:
    """The suffix in lower case; ValueError if it names none of the formats."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        hint = "; write one JSON object per line, as .jsonl" if suffix == ".json" else ""
        raise ValueError(
            f"{path}: unsupported file type {quote(suffix, 40)}; use {', '.join(SUFFIXES)}{hint}"
        )
    return suffix


@contextlib.contextmanager
def write_rows(path: str | Path) -> Iterator[Callable[[Rows], None]]:
    """Opens a .parquet, .jsonl, .csv or .tsv file for writing chunk by chunk.

    The rows go to a temporary file in the same folder, which takes the name `path` when the block
    ends; if the block raises, it is removed and whatever was at `path` stays as it was. The first
    chunk sets the columns (and, for parquet, their types) of all formats but .jsonl. In .csv and
    .tsv, null is an empty field, and numbers, lists and objects are JSON. A line break in a field
    is refused in a .tsv, as it is when one is read.

    Yields:
      A function that writes one chunk.

    Raises:
      ValueError: if `path` is a folder, has an unsupported suffix or cannot be written, or if a
        chunk does not fit the first.
    """
    path = Path(path)
    suffix = _check_suffix(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, not a file")
    with replace_file(path) as temporary:
        try:
            file = temporary.open("wb")
        except OSError as error:
            raise ValueError(f"{path}: cannot write to its folder: {error.strerror}") from error
        with file, contextlib.closing(_WRITERS[suffix](file, path)) as writer:
            yield writer.write


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise ValueError(f"{path}: is a directory, not a file")
    _check_suffix(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: is empty (0 bytes)")


def check_not_taken(path: Path, names: Sequence[str], added: Sequence[str]) -> None:
    """ValueError if a file with columns `names` has one that is to be added."""
    if taken := [name for name in added if name in names]:
        raise ValueError(
            f"{path}: already has a column {taken[0]!r}, which predictions need; rename or remove "
            "it"
        )


def added_names(label_names: Sequence[str], write_logits: bool) -> list[str]:
    """The columns that predictions are: of labels, by name, or of numbers or texts."""
    names = ["prediction", "label_id", "probability"] if label_names else ["prediction"]
    return names + ["logits"] * write_logits


def check_logits(logits: np.ndarray, num_rows: int, num_labels: int) -> None:
    """ValueError if they are not `[num_rows, num_labels]` numbers."""
    if logits.shape != (num_rows, num_labels):
        raise ValueError(f"logits have shape {logits.shape}, not {(num_rows, num_labels)}")
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite; the adapter or the backbone is damaged")


def added_columns(
    predicted: Predicted, label_names: Sequence[str], added: Sequence[str]
) -> dict[str, pa.Array]:
    """The columns named in `added`, from `[rows, num_labels]` float64 logits or predictions."""
    if isinstance(predicted, list):
        of_text = any(isinstance(value, str) for value in predicted)
        return {"prediction": pa.array(predicted, pa.string() if of_text else pa.float64())}
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


def add_columns(rows: Rows, added: dict[str, pa.Array]) -> Rows:
    """The rows with columns behind their own."""
    if isinstance(rows, pa.Table):
        for name, values in added.items():
            rows = rows.append_column(name, values)
        return rows
    new = pa.table(added).to_pylist()
    return [row | values for row, values in zip(rows, new, strict=True)]


class _Writer(abc.ABC):
    """Writes chunks to an open binary file; `path` is what errors call it."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path = file, path
        self.names: list[str] = []  # of the first chunk's columns

    @abc.abstractmethod
    def write(self, rows: Rows) -> None: ...

    def close(self) -> None:  # noqa: B027 - most formats have nothing to write there
        """Writes what the format has at its end."""

    def check_names(self, names: list[str]) -> None:
        self.names = self.names or names
        if new := [name for name in names if name not in self.names]:
            raise ValueError(
                f"{self.path}: column {quote(new[0])} is not in the first rows; write .jsonl "
                "instead"
            )


class _ParquetWriter(_Writer):
    writer: pq.ParquetWriter | None = None

    def write(self, rows: Rows) -> None:
        self.check_names(column_names(rows))
        try:
            table = rows if isinstance(rows, pa.Table) else self.table(rows)
            if self.writer is None:
                self.writer = pq.ParquetWriter(self.file, table.schema)
            self.writer.write_table(table)
        except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
            reason = shorten(str(error).partition("\n")[0].rstrip(": "), 200)
            raise ValueError(
                f"{self.path}: the rows do not fit in parquet: {reason}; write .jsonl instead"
            ) from error

    def table(self, rows: list[dict[str, Any]]) -> pa.Table:
        """Types as Arrow infers them; made to fit those of the first rows, values would be lost."""
        columns = {name: pa.array(column_values(rows, name)) for name in self.names}
        for field in self.writer.schema if self.writer is not None else ():
            if pa.types.is_null(columns[field.name].type):
                columns[field.name] = pa.nulls(len(rows), field.type)
        return pa.table(columns)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _JsonWriter(_Writer):
    def write(self, rows: Rows) -> None:
        for record in _records(rows):
            line = json.dumps(record, ensure_ascii=False, default=str)
            try:
                self.file.write(line.encode() + b"\n")
            except UnicodeEncodeError:  # half a surrogate pair, which only an escape can write
                self.file.write(json.dumps(record, default=str).encode() + b"\n")


class _CsvWriter(_Writer):
    rows = 0  # written before

    def write(self, rows: Rows) -> None:
        header = not self.names
        self.check_names(column_names(rows))
        if header:
            if cut := [name for name in self.names if _is_cut(name)]:
                raise ValueError(
                    f"{self.path}: the column {quote(cut[0])} has half a surrogate pair in its "
                    "name; write .jsonl instead"
                )
            self.check_lines(0, self.names)
            self.write_line(self.names)
        for row, record in enumerate(_records(rows), self.rows + 1):
            cells = [_cell(record.get(name)) for name in self.names]
            self.check_lines(row, cells)
            try:
                self.write_line(cells)
            except UnicodeEncodeError:
                name = next(n for n, cell in zip(self.names, cells, strict=True) if _is_cut(cell))
                raise ValueError(
                    f"{self.path}: row {row} of the input holds half a surrogate pair, which is no "
                    f"character, in the column {quote(name)}; write .jsonl instead"
                ) from None
        self.rows += len(rows)

    def check_lines(self, row: int, fields: list[str]) -> None:
        """ValueError for a line break in a field of a .tsv, each row of which is one line."""
        if not self.is_tsv:
            return
        for name, field in zip(self.names, fields, strict=True):
            if "\n" in field or "\r" in field:
                where = f"row {row} of the input" if row else "the header"
                raise ValueError(
                    f"{self.path}: {where} holds a line break in the column {quote(name, 100)}, "
                    "which a .tsv cannot; write .csv or .jsonl instead"
                )

    @property
    def is_tsv(self) -> bool:
        return self.path.suffix.lower() == ".tsv"

    def write_line(self, fields: list[str]) -> None:
        # The csv module leaves a lone carriage return unquoted, and then reads it as a new row.
        delimiter = "\t" if self.is_tsv else ","
        special = (delimiter, '"', "\r", "\n")
        quoted = (
            '"' + field.replace('"', '""') + '"'
            if any(mark in field for mark in special)
            else field
            for field in fields
        )
        self.file.write((delimiter.join(quoted) + "\n").encode())


_WRITERS: dict[str, type[_Writer]] = {
    ".parquet": _ParquetWriter,
    ".jsonl": _JsonWriter,
    ".csv": _CsvWriter,
    ".tsv": _CsvWriter,
}


def _is_cut(text: str) -> bool:
    """Returns True for text that UTF-8 cannot write: it holds half a surrogate pair."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _records(rows: Rows) -> list[dict[str, Any]]:
    return rows if isinstance(rows, list) else rows.to_pylist()


def _cell(value: Any) -> str:
    """A value as the text of a .csv or .tsv field."""
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)
