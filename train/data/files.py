"""Rows of .parquet, .jsonl, .csv, .tsv and two-column .conll and .txt files, streamed."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

# Parquet stays an Arrow table, so that its types are preserved when it is written back; text
# formats are records, so that a missing key and a null value stay different.
Rows: TypeAlias = pa.Table | list[dict[str, Any]]

# Bounds the text after a quotation mark that is never closed.
_LONGEST_FIELD = 16 * 2**20
_LINE_BREAK = re.compile("[\r\n]")
# Files of words, one a line.
WORD_SUFFIXES = (".conll", ".txt")


def read_chunks(path: Path, chunk_rows: int) -> Iterator[Rows]:
    """Streams a file, at most `chunk_rows` rows at a time.

    A .conll or .txt file has a word in each line, followed by a tab or spaces and its tag, if the
    tags are known. Blank lines separate sentences, each of which is a row with the columns `tokens`
    and, with tags, `tags`.

    Yields:
      A `pyarrow.Table` for parquet, a list of dicts for the other formats.

    Raises:
      ValueError: if the content does not match the suffix, or is not UTF-8.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_tables(path, chunk_rows)
            return
        of_words = dict.fromkeys(WORD_SUFFIXES, _word_records)
        records = ({".jsonl": _json_records} | of_words).get(suffix, _csv_records)(path)
        while rows := list(itertools.islice(records, chunk_rows)):
            yield rows
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 (byte 0x{error.object[error.start]:02x}); convert it to UTF-8"
        ) from error


def _parquet_tables(path: Path, chunk_rows: int) -> Iterator[pa.Table]:
    try:
        # A buffer instead of whole column chunks, so that one huge row group streams as well.
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise ValueError("two columns have the same name")
            for batch in file.iter_batches(chunk_rows):
                batch.validate(full=True)  # text that is not UTF-8 passes the reader
                if batch.num_rows:
                    yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a readable parquet file: {reason}") from error


def _json_records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {line} is not valid JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {line} is not a JSON object: {text.strip():.40}")
            yield record


def _word_records(path: Path) -> Iterator[dict[str, list[str]]]:
    rows: list[list[str]] = []
    width = 0
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line, text in enumerate(itertools.chain(file, [""]), 1):
            plain = text.strip(" \r\n")
            if not plain.strip("\t"):
                if rows:
                    yield dict(
                        zip(("tokens", "tags"), map(list, zip(*rows, strict=True)), strict=False)
                    )
                rows = []
                continue
            values = plain.split("\t") if "\t" in plain else re.split(" +", plain)
            width = width or len(values)
            if len(values) != width or width > 2:
                raise ValueError(
                    f"{path}, line {line} has {len(values)} columns; a {path.suffix} file has a "
                    "word in each line, in all lines or in none followed by a tab or spaces and "
                    "its tag, and blank lines between sentences"
                )
            rows.append(values)


def _csv_records(path: Path) -> Iterator[dict[str, str]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        fields = _csv_fields(path, csv.reader(file, delimiter=delimiter, strict=True))
        header = next(fields, [])
        if len(set(header)) < len(header):
            raise ValueError(
                f"{path}: two columns of the header have the same name: {header!r:.200}"
            )
        for row, values in enumerate(fields, 1):
            if len(values) != len(header):
                raise ValueError(
                    f"{path}, row {row} has {len(values)} fields, but the header has "
                    f"{len(header)}; quote fields that contain the delimiter"
                )
            yield dict(zip(header, values, strict=True))


def _csv_fields(path: Path, reader: Any) -> Iterator[list[str]]:
    """Yields the rows that are not blank, and restores the process's limit on a field.

    A row of a .tsv is one line: most of these files are not quoted, and two sentences that begin
    and end with a quotation mark would absorb the rows between them.
    """
    while True:
        line = reader.line_num + 1
        previous = csv.field_size_limit(_LONGEST_FIELD)
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{path}, line {line}: {error}; a field that begins with a quotation mark must "
                "end with one, and quotation marks inside it must be doubled"
            ) from error
        finally:
            csv.field_size_limit(previous)
        if values is None:
            return
        if path.suffix.lower() == ".tsv" and any(_LINE_BREAK.search(value) for value in values):
            raise ValueError(
                f"{path}, line {line}: a quotation mark opens a field that ends on line "
                f"{reader.line_num}, but a field of a .tsv cannot contain a line break; quote a "
                "field that begins with a quotation mark, and double the quotation marks inside "
                'it ("""so" he said"), or save the file as .jsonl'
            )
        if values:
            yield values
