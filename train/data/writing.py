"""Writers of rows to files, chunk by chunk."""

from __future__ import annotations

import abc
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from compacter_jax.files import replace_file
from compacter_jax.messages import quote, shorten
from train.data.files import Rows
from train.data.rows import check_suffix, column_names, column_values


@contextlib.contextmanager
def write_rows(path: str | Path) -> Iterator[Callable[[Rows], None]]:
    """Opens a .parquet, .jsonl, .csv or .tsv file for writing chunk by chunk.

    The rows go to a temporary file in the same folder, which takes the name `path` when the block
    ends. If the block raises, the temporary file is removed and a file at `path` stays as it was.
    The first chunk sets the columns, and for parquet their types, of all formats but .jsonl. In
    .csv and .tsv, null is an empty field, and numbers, lists and objects are JSON. A line break in
    a field of a .tsv is refused, as it is when a .tsv is read.

    Yields:
      A function that writes one chunk.

    Raises:
      ValueError: if `path` is a folder, has an unsupported suffix or cannot be written, or if a
        chunk does not fit the first.
    """
    path = Path(path)
    suffix = check_suffix(path)
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not a file")
    with replace_file(path) as temporary:
        try:
            file = temporary.open("wb")
        except OSError as error:
            raise ValueError(f"{path} cannot be written: {error.strerror}") from error
        with file, contextlib.closing(_WRITERS[suffix](file, path)) as writer:
            yield writer.write


def add_columns(rows: Rows, added: dict[str, pa.Array]) -> Rows:
    """Returns the rows with columns appended."""
    if isinstance(rows, pa.Table):
        for name, values in added.items():
            rows = rows.append_column(name, values)
        return rows
    new = pa.table(added).to_pylist()
    return [row | values for row, values in zip(rows, new, strict=True)]


class _Writer(abc.ABC):
    """Writer of chunks to an open binary file; errors call the file `path`."""

    def __init__(self, file: IO[bytes], path: Path):
        self.file, self.path = file, path
        self.names: list[str] = []  # names of the first chunk's columns

    @abc.abstractmethod
    def write(self, rows: Rows) -> None: ...

    def close(self) -> None:  # noqa: B027 - most formats have nothing to write there
        """Writes the end of the format."""

    def records(self, rows: Rows) -> list[dict[str, Any]]:
        """Returns the rows as records of text; raises ValueError for bytes, which text has not."""
        found = rows if isinstance(rows, list) else rows.to_pylist()
        for record in found:
            if bad := [name for name, value in record.items() if isinstance(value, bytes)]:
                raise ValueError(
                    f"{self.path}: the column {quote(bad[0], 100)} has bytes, which only a "
                    ".parquet can hold; write .parquet instead"
                )
        return found

    def check_names(self, names: list[str]) -> None:
        self.names = self.names or names
        if new := [name for name in names if name not in self.names]:
            raise ValueError(
                f"{self.path}: the first rows have no column {quote(new[0])}; write .jsonl instead"
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
                f"{self.path}: the rows cannot be stored as parquet: {reason}; write .jsonl instead"
            ) from error

    def table(self, rows: list[dict[str, Any]]) -> pa.Table:
        """Returns the rows as a table with inferred types.

        A cast to the types of the first chunk would lose values.
        """
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
        for record in self.records(rows):
            line = json.dumps(record, ensure_ascii=False, default=str)
            try:
                self.file.write(line.encode() + b"\n")
            except UnicodeEncodeError:  # half a surrogate pair, which JSON can only escape
                self.file.write(json.dumps(record, default=str).encode() + b"\n")


class _CsvWriter(_Writer):
    rows = 0  # number of rows written so far

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
        for row, record in enumerate(self.records(rows), self.rows + 1):
            cells = [_cell(record.get(name)) for name in self.names]
            self.check_lines(row, cells)
            try:
                self.write_line(cells)
            except UnicodeEncodeError:
                name = next(n for n, cell in zip(self.names, cells, strict=True) if _is_cut(cell))
                raise ValueError(
                    f"{self.path}: row {row} of the input holds half a surrogate pair, which is "
                    f"not a valid character, in the column {quote(name)}; write .jsonl instead"
                ) from None
        self.rows += len(rows)

    def check_lines(self, row: int, fields: list[str]) -> None:
        """Raises ValueError for a line break in a field of a .tsv, where each row is one line."""
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
        # The csv module writes a lone carriage return unquoted, and then reads it as a new row.
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
    """Returns True for text with half a surrogate pair, which UTF-8 cannot encode."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _cell(value: Any) -> str:
    """Returns a value as the text of a .csv or .tsv field."""
    if isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)
