"""Rows of the user's files, read in chunks and checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from compacter_jax.messages import listing, quote
from train.data.files import WORD_SUFFIXES, Rows, read_chunks

SUFFIXES = (".parquet", ".jsonl", ".csv", ".tsv")
# The type of a column of sentences that are divided into words.
WORDS = list[str]


def check_files(input_path: Path, output_path: Path, suffixes: Sequence[str] = SUFFIXES) -> None:
    """Checks the names of input and output before anything slow happens.

    Args:
      input_path: the input.
      output_path: the output.
      suffixes: the suffixes of supported formats of the output.

    Raises:
      FileNotFoundError: if the input does not exist.
      ValueError: if a file is a folder or has an unsupported type, the input is empty, both are the
        same file, or there is no folder for the output.
    """
    _check_file(input_path)
    check_suffix(output_path, suffixes)
    if output_path.is_dir():
        raise ValueError(f"{output_path} is a directory, not a file")
    if output_path.exists() and output_path.samefile(input_path):
        raise ValueError(f"{output_path} is the input file; give the output another name")
    if not output_path.parent.is_dir():
        raise ValueError(f"{output_path}: there is no folder {output_path.parent}")


def check_apart(written: Mapping[str, Path], read: Sequence[Path]) -> None:
    """Checks that the files of a command can be written without the loss of one that it reads.

    Args:
      written: what the files are, in words -> the files.
      read: the files that are read.

    Raises:
      ValueError: if a file to write is a folder, another one of them, or one of those that are
        read.
    """
    inputs = {path.resolve() for path in read}
    known: dict[Path, str] = {}
    for name, path in written.items():
        if path.is_dir():
            raise ValueError(f"{name}: {path} is a directory, not a file")
        if (whole := path.resolve()) in inputs:
            raise ValueError(f"{name}: {path} is an input file; use another name")
        if whole in known:
            raise ValueError(f"{known[whole]} and {name} are both {path}; use another name")
        known[whole] = name


def read_rows(
    path: str | Path,
    chunk_rows: int = 1024,
    max_characters: int = 100_000,
    columns: Mapping[str, type] | None = None,
) -> Iterator[Rows]:
    """Streams a .parquet, .jsonl, .csv, .tsv, .conll or .txt file and checks its sentences.

    Every value of a .csv or .tsv file is text, exactly as in the file. In both formats fields are
    quoted with `"`, doubled inside a field; a field of a .csv may contain line breaks, a field of a
    .tsv may not. Blank lines are skipped and do not count as rows.

    Args:
      path: the file; it needs a column `sentence`, and may have `sentence2`.
      chunk_rows: the maximum number of rows in memory.
      max_characters: the maximum length of a sentence.
      columns: name -> type of the values, for columns that a file may have instead, all of them;
        `WORDS` for lists of words.

    Yields:
      At most `chunk_rows` rows: a `pyarrow.Table` for parquet, a list of dicts for the other
      formats.

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
        raise ValueError(f"{path} has no rows")


class ColumnReader:
    """Reader of a model's input columns, which checks them chunk by chunk.

    Args:
      path: the file, for errors.
      columns: the alternative columns, as for `read_rows`.
      max_characters: the maximum length of a sentence.
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
        """Reads the columns of a chunk; the first chunk decides which columns are read.

        If the rows have all columns that the reader was made with, these are read; otherwise
        `sentence` and, if present, `sentence2`.

        Args:
          rows: the chunk, at least one row.
          names: the names of its columns.
          numbers: the numbers of its rows in the file, counted from 1.

        Returns:
          Name -> values.

        Raises:
          ValueError: as `read_rows`.
        """
        if not self._read:
            self._read = columns_read(names, self._columns)
            instead = f", and not all of {', '.join(self._columns)}" if self._columns else ""
            require_column(self._path, names, self._read[0], instead)
        elif self._read == ("sentence",) and "sentence2" in names:
            raise ValueError(
                f"{self._path}: the rows after row {numbers[0] - 1} have a sentence2, but the "
                "rows before have none; give all rows one, or none"
            )
        values = {name: column_values(rows, name) for name in self._read}
        for name, column in values.items():
            kind = self._columns.get(name, str)
            if kind is str:
                check_texts(self._path, name, column, numbers, self._max_characters)
            elif kind is WORDS:
                for row, words in zip(numbers, column, strict=True):
                    check_words(self._path, name, words, row, self._max_characters)
            else:
                _check_values(self._path, name, column, numbers, kind)
        return values


def columns_read(names: Sequence[str], columns: Mapping[str, type] | None) -> tuple[str, ...]:
    """Returns `columns` if a file has them all, otherwise `sentence` and any `sentence2`."""
    if columns and set(columns) <= set(names):
        return tuple(columns)
    return ("sentence", "sentence2") if "sentence2" in names else ("sentence",)


def column_names(rows: Rows) -> list[str]:
    """Returns the column names; for records, all keys in the order of first appearance."""
    if isinstance(rows, pa.Table):
        return rows.column_names
    return list(dict.fromkeys(itertools.chain.from_iterable(rows)))


def column_values(rows: Rows, name: str) -> list[Any]:
    """Returns one column as Python values; None where a record lacks it."""
    if isinstance(rows, pa.Table):
        return rows.column(name).to_pylist()
    return [row.get(name) for row in rows]


def require_column(path: Path, columns: Sequence[str], name: str, instead: str = "") -> None:
    """Raises ValueError, listing the columns of `path`, if `name` is not one of them."""
    if name not in columns:
        raise ValueError(
            f"{path} has no column {name!r}{instead}; its columns are {listing(columns)}"
        )


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
                    f"{path}, row {row}: {name} holds half a surrogate pair, which is not a valid "
                    "character"
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


def check_languages(path: Path, name: str, values: Sequence[str], numbers: Sequence[int]) -> None:
    """Raises ValueError, naming the row, for a language whose name cannot stand in a list."""
    for row, value in zip(numbers, values, strict=True):
        if "," in value or value != value.strip():
            raise ValueError(
                f"{path}, row {row}: {name} is {value!r:.100}; the name of one language has no "
                "comma, and no white space at its ends"
            )


def check_words(path: Path, name: str, words: Any, row: int, max_characters: int) -> None:
    """Checks a sentence that is divided into words.

    Args:
      path: the file, for errors.
      name: the column, for errors.
      words: the value of the column.
      row: the number of the row, counted from 1, for errors.
      max_characters: the maximum length of a sentence.

    Raises:
      ValueError: if the value is no list, has no words, or is too long, or a word is not text.
    """
    where = f"{path}, row {row}: {name}"
    if not isinstance(words, list):
        raise ValueError(
            f"{where} is {type(words).__name__}, not a list of words; use .jsonl or .parquet, or "
            "a .conll with a word in each line"
        )
    if not words:
        raise ValueError(f"{where} is a list without words; remove or fill the row")
    for place, word in enumerate(words, 1):
        if not isinstance(word, str):
            raise ValueError(f"{where} has {word!r:.40} as word {place}, which is not text")
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise ValueError(
                f"{where} holds half a surrogate pair in word {place}, which is not a valid "
                "character"
            )
    if (length := sum(map(len, words))) > max_characters:
        raise ValueError(
            f"{where} has {length} characters, over the limit of {max_characters}; split it"
        )


def first_columns(path: Path) -> list[str]:
    """Returns the names of the columns of a file's first rows.

    Raises:
      FileNotFoundError, ValueError: as `read_rows`, if the file cannot be read or has no rows.
    """
    _check_file(path)
    rows = next(read_chunks(path, 1024), None)
    if rows is None:
        raise ValueError(f"{path} has no rows")
    return column_names(rows)


def _check_values(
    path: Path, name: str, values: list[Any], numbers: Sequence[int], kind: type
) -> None:
    """Raises ValueError, naming the row, if a value has another type; integers may be text."""
    for row, value in zip(numbers, values, strict=True):
        of_number = kind is int and isinstance(value, str) and value.strip().isdecimal()
        if not isinstance(value, kind) and not of_number:
            raise ValueError(
                f"{path}, row {row}: {name} is {type(value).__name__}, not {kind.__name__}"
                + ("; use .jsonl or .parquet" if kind in (list, dict) else "")
            )


def check_suffix(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str:
    """Returns the suffix in lower case.

    Args:
      path: the file.
      suffixes: the suffixes of supported formats.

    Raises:
      ValueError: if the suffix is of no supported format.
    """
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        hint = "; write one JSON object per line, as .jsonl" if suffix == ".json" else ""
        raise ValueError(
            f"{path} has the unsupported file type {quote(suffix, 40)}; use "
            f"{', '.join(suffixes)}{hint}"
        )
    return suffix


def _check_file(path: Path) -> None:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        raise ValueError(f"{path} is a directory, not a file")
    check_suffix(path, SUFFIXES + WORD_SUFFIXES)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")
