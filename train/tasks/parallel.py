"""Translation between many languages: files of sentence pairs, and tables of parallel texts."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import datasets
import numpy as np

from compacter_jax.messages import listing
from train import tasks
from train.data import rows as data_rows
from train.data.files import Rows, read_chunks

if TYPE_CHECKING:
    from train.fit.options import FitOptions
    from train.inference.options import EvaluateOptions

# Columns of a file with one pair of sentences in each row.
PAIR = ("source", "target", "source_language", "target_language")
KIND: Final = "translation"
ALL = "all"
# Files without null values, in which an empty field is one.
_WITHOUT_NULL = (".csv", ".tsv")
_LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,8})*")
# Part of a table that is held out for validation if there is no table for it.
_HELD_OUT, _MOST_HELD_OUT = 0.02, 1000
_LONGEST = 100_000


class Direction(NamedTuple):
    """A pair of languages.

    Attributes:
      source: the language to translate from.
      target: the language to translate to.
    """

    source: str
    target: str

    @property
    def name(self) -> str:
        """Name such as `en-de`."""
        return f"{self.source}-{self.target}"


def parse(text: str, languages: Sequence[str]) -> tuple[Direction, ...]:
    """Returns the directions of a list such as `en-de,de-en`.

    Args:
      text: the list.
      languages: the known languages, whose names may have hyphens.

    Raises:
      ValueError: if a part is no direction, names an unknown language, or is given twice.
    """
    found: list[Direction] = []
    for part in (each.strip() for each in text.split(",")):
        halves = [Direction(part[:i], part[i + 1 :]) for i, c in enumerate(part) if c == "-"]
        halves = [each for each in halves if each.source and each.target]
        if not halves:
            raise ValueError(
                f"--directions: {part!r:.100} is no direction; write SOURCE-TARGET, joined by "
                "commas, as in en-de,de-en, or all"
            )
        fitting = [each for each in halves if {*each} <= {*languages}]
        direction = fitting[0] if fitting else halves[0]
        if unknown := [language for language in direction if language not in languages]:
            raise ValueError(
                f"--directions: there is no column or language {unknown[0]!r:.100} for "
                f"{part!r:.100}; there are {listing(languages)}"
            )
        if direction.source == direction.target:
            raise ValueError(f"--directions: {part!r:.100} has the same language twice")
        if direction in found:
            raise ValueError(f"--directions has {part!r:.100} twice; give it once")
        found.append(direction)
    return tuple(found)


def members_of(
    directions: Sequence[Direction], adapters: str
) -> dict[str, tuple[Direction, ...]] | None:
    """Returns the name of each adapter -> the directions that it serves; None for a shared one.

    Args:
      directions: the directions.
      adapters: `per_direction`, `per_target` or another way.
    """
    if adapters == "per_direction":
        return {direction.name: (direction,) for direction in directions}
    if adapters == "per_target":
        targets = dict.fromkeys(direction.target for direction in directions)
        return {to: tuple(each for each in directions if each.target == to) for to in targets}
    return None


def resolved(options: FitOptions) -> FitOptions:
    """Returns the options with the names of all directions, if the task is a translation.

    Raises:
      FileNotFoundError, ValueError: if a file cannot be read, flags contradict each other, or a
        direction has no training row.
    """
    if options.parallel_files is None:
        if options.train_file is None or not _has_pairs(options.train_file):
            _refuse_flags(options)
            return options
        found = _directions_of_pairs(options.train_file)
    else:
        _check_alone(options)
        is_named = options.directions not in (None, ALL)
        found = _directions_of_table(options.parallel_files[0], every=is_named)
    chosen = options.directions or ALL
    if chosen != ALL:
        languages = dict.fromkeys(language for direction in found for language in direction)
        if options.parallel_files is not None:
            languages |= dict.fromkeys(data_rows.first_columns(options.parallel_files[0]))
        wanted = parse(chosen, list(languages))
        for direction in wanted:
            if direction not in found:
                path = options.train_file or (options.parallel_files or [Path()])[0]
                raise ValueError(
                    f"{path}: no row has both {direction.source!r} and {direction.target!r}, so "
                    f"there is nothing to learn {direction.name} from; leave it out of "
                    "--directions"
                )
        found = wanted
    return dataclasses.replace(options, directions=",".join(each.name for each in found))


def _refuse_flags(options: FitOptions) -> None:
    """Raises ValueError for a flag that only translation has."""
    given = {
        "--directions": options.directions is not None,
        "--temperature": options.temperature != 1,
        "--add-to": options.add_to is not None,
        f"--adapters {options.adapters}": options.adapters in ("per_direction", "per_target"),
    }
    if flags := [flag for flag, is_given in given.items() if is_given]:
        raise ValueError(
            f"{flags[0]} is for translation between several languages; give --parallel-files, or "
            f"a --train-file with the columns {', '.join(PAIR)}"
        )


def _check_alone(options: FitOptions) -> None:
    files = ("train_file", "validation_file", "test_file", "data_dir")
    if given := [name for name in files if getattr(options, name) is not None]:
        flag = given[0].replace("_", "-")
        raise ValueError(f"--parallel-files and --{flag} contradict each other; give one")
    if not 1 <= len(options.parallel_files or ()) <= len(tasks.SPLITS):
        raise ValueError(
            f"--parallel-files has {len(options.parallel_files or ())} files; give those of "
            "train, validation and test in this order, of which the first is needed"
        )


def files_of(options: FitOptions) -> dict[str, Path]:
    """Returns split -> file of a run, tables or pairs."""
    if options.parallel_files is not None:
        return dict(zip(tasks.SPLITS, options.parallel_files, strict=False))
    files = {split: getattr(options, f"{split}_file") for split in tasks.SPLITS}
    return {split: path for split, path in files.items() if path is not None}


def load_task(options: FitOptions) -> tasks.Task:
    """Reads the splits of a run whose options are `resolved`.

    Raises:
      FileNotFoundError, ValueError: if a file cannot be read, a text is empty, or there are rows of
        other directions alone; the message names the file and the row.
    """
    files = files_of(options)
    if options.parallel_files is None:
        wanted = _known(options.directions or "", _directions_of_pairs(files["train"]))
        splits = {split: _pairs(path, wanted) for split, path in files.items()}
        return _task(options.task, wanted, splits)
    tables = {split: read_table(path) for split, path in files.items()}
    languages = {language for table in tables.values() for language in table}
    wanted = parse(options.directions or "", sorted(languages))
    notes: tuple[str, ...] = ()
    if "validation" not in tables:
        tables["train"], tables["validation"], count = _held_out(tables["train"], files["train"])
        notes = (f"{count:,} rows of {files['train']} are held out for validation",)
        files["validation"] = files["train"]
    splits = {split: _from_table(files[split], table, wanted) for split, table in tables.items()}
    return _task(options.task, wanted, splits, notes)


def load_split(options: EvaluateOptions, known: Sequence[str]) -> tasks.Task:
    """Reads one split to evaluate an adapter on.

    Args:
      options: the options of `evaluate`.
      known: the names of the directions of the adapter; by default the split has them all, as far
        as the file has rows of them.

    Raises:
      FileNotFoundError, ValueError: as `load_task`; or if a direction that is asked for has no row.
    """
    path = options.parallel_files or getattr(options, f"{options.split}_file", None)
    if path is None:
        raise ValueError(
            f"the adapter in {options.adapter} translates; give --parallel-files, or "
            f"--{options.split}-file with the columns {', '.join(PAIR)}"
        )
    is_table = options.parallel_files is not None
    there = _directions_of_table(path, every=True) if is_table else _directions_of_pairs(path)
    notes: tuple[str, ...] = ()
    if options.directions in (None, ALL):
        wanted = tuple(each for each in there if each.name in known)
        others = [each.name for each in there if each.name not in known]
        # A row of a table is one of many directions.
        notes = () if is_table else left_out(path, others, "directions")
    else:
        languages = {language for direction in there for language in direction}
        wanted = parse(options.directions or "", sorted(languages))
    if missing := [each.name for each in wanted if each not in there]:
        raise ValueError(f"{path} has no row of {missing[0]}; leave it out of --directions")
    if not wanted:
        raise ValueError(
            f"{path} has no row of the directions of the adapter, {listing(known)}; it has "
            f"{listing([each.name for each in there]) or 'none'}"
        )
    rows = _from_table(path, read_table(path), wanted) if is_table else _pairs(path, wanted)
    return _task(options.task, wanted, {options.split: rows}, notes)


def left_out(path: Path, names: Sequence[str], what: str) -> tuple[str, ...]:
    """Returns a line about rows of a file that are not evaluated; none if there are none.

    Args:
      path: the file.
      names: the languages or directions of these rows.
      what: "languages" or "directions".
    """
    if not names:
        return ()
    return (f"{path}: rows of the {what} {listing(names)} are left out",)


def _task(
    name: str,
    directions: tuple[Direction, ...],
    splits: Mapping[str, datasets.Dataset],
    notes: tuple[str, ...] = (),
) -> tasks.Task:
    counted = [Counter(names_of(rows)) for rows in splits.values()]
    lines = [f"{name}: {len(directions)} directions; rows of {', '.join(splits)}:"]
    for direction in directions:
        numbers = ", ".join(f"{counts[direction.name]:,}" for counts in counted)
        lines.append(f"  {direction.name}: {numbers}")
    return tasks.Task(name, KIND, (), dict(splits), notes=(*notes, *lines), directions=directions)


def names_of(rows: Any) -> list[str]:
    """Returns the name of each row's direction."""
    pairs = zip(rows["source_language"][:], rows["target_language"][:], strict=True)
    return [f"{source}-{target}" for source, target in pairs]


def _known(names: str, directions: Sequence[Direction]) -> tuple[Direction, ...]:
    """Returns the directions with the given names, joined by commas."""
    by_name = {direction.name: direction for direction in directions}
    return tuple(by_name[name] for name in names.split(","))


# --- files with a pair of sentences in each row ---------------------------------------------------


def _has_pairs(path: Path) -> bool:
    if path.suffix.lower() not in data_rows.SUFFIXES or not path.is_file():
        return False
    return {*PAIR} <= {*data_rows.first_columns(path)}


def _chunks(path: Path) -> Iterator[tuple[Rows, range]]:
    """Yields the rows of a file, and their numbers."""
    first = 1
    for rows in read_chunks(path, 4096):
        yield rows, range(first, first + len(rows))
        first += len(rows)


def _directions_of_pairs(path: Path) -> tuple[Direction, ...]:
    """Returns the directions of a file, sorted."""
    names = data_rows.first_columns(path)
    for name in PAIR:
        data_rows.require_column(path, names, name)
    found = set()
    for rows, numbers in _chunks(path):
        columns = [data_rows.column_values(rows, name) for name in PAIR[2:]]
        for name, column in zip(PAIR[2:], columns, strict=True):
            data_rows.check_texts(path, name, column, numbers, _LONGEST)
            data_rows.check_languages(path, name, column, numbers)
        found |= {Direction(*pair) for pair in zip(*columns, strict=True)}
    return tuple(sorted(found))


def _pairs(path: Path, directions: Sequence[Direction]) -> datasets.Dataset:
    """Returns the rows of the given directions; all rows are checked."""
    columns: dict[str, list[str]] = {name: [] for name in PAIR}
    names = data_rows.first_columns(path)
    for name in PAIR:
        data_rows.require_column(path, names, name)
    wanted = {*directions}
    for rows, numbers in _chunks(path):
        values = {name: data_rows.column_values(rows, name) for name in PAIR}
        for name, column in values.items():
            data_rows.check_texts(path, name, column, numbers, _LONGEST)
        for row in zip(*values.values(), strict=True):
            if Direction(*row[2:]) in wanted:
                for name, value in zip(PAIR, row, strict=True):
                    columns[name].append(value)
    if not columns["source"]:
        raise ValueError(f"{path} has no row of {listing([each.name for each in directions])}")
    return _dataset(columns)


# --- tables with a column for each language -------------------------------------------------------


def read_table(path: Path) -> dict[str, list[str | None]]:
    """Returns column -> texts of a table, None where there is none; other values count as none."""
    data_rows.first_columns(path)
    columns: dict[str, list[Any]] = {}
    length = 0
    for rows, numbers in _chunks(path):
        for name in data_rows.column_names(rows):
            values = data_rows.column_values(rows, name)
            columns.setdefault(name, [None] * length).extend(values)
        length = numbers[-1]
        for values in columns.values():
            values.extend([None] * (length - len(values)))
    if path.suffix.lower() in _WITHOUT_NULL:
        return {name: [x or None for x in values] for name, values in columns.items()}
    return columns


def _directions_of_table(path: Path, *, every: bool = False) -> tuple[Direction, ...]:
    """Returns all directions that a row has.

    Args:
      path: the table.
      every: True for directions between all columns, False for those between columns with names
        like those of languages.
    """
    table = read_table(path)
    names = [name for name in table if every or _LANGUAGE.fullmatch(name)]
    there = {name: np.array([isinstance(x, str) for x in table[name]]) for name in names}
    return tuple(
        Direction(a, b) for a in names for b in names if a != b and (there[a] & there[b]).any()
    )


def _held_out(
    table: Mapping[str, list[Any]], path: Path
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Returns a table without some rows, these rows, the same in every run, and their number."""
    length = len(next(iter(table.values())))
    if length < 2:
        raise ValueError(f"{path}: a single row leaves none for validation; give more files")
    size = min(max(1, round(_HELD_OUT * length)), _MOST_HELD_OUT)
    is_held = np.zeros(length, bool)
    is_held[np.random.default_rng(0).permutation(length)[:size]] = True

    def part(chosen: np.ndarray) -> dict[str, Any]:
        # The other rows are kept as rows without text, so that messages count as the file does.
        return {
            name: [x if c else None for x, c in zip(column, chosen, strict=True)]
            for name, column in table.items()
        }

    return part(~is_held), part(is_held), size


def _from_table(
    path: Path, table: Mapping[str, list[Any]], directions: Sequence[Direction]
) -> datasets.Dataset:
    """Returns a row for each direction of each row of a table that has both languages."""
    for direction in directions:
        for language in direction:
            data_rows.require_column(path, list(table), language, f" for {direction.name}")
    for language in dict.fromkeys(language for direction in directions for language in direction):
        numbered = [(i, x) for i, x in enumerate(table[language], 1) if x is not None]
        texts = [x for _, x in numbered]
        data_rows.check_texts(path, language, texts, [i for i, _ in numbered], _LONGEST)
    columns: dict[str, list[str]] = {name: [] for name in PAIR}
    for direction in directions:
        pairs = zip(table[direction.source], table[direction.target], strict=True)
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        columns["source"] += [a for a, _ in both]
        columns["target"] += [b for _, b in both]
        columns["source_language"] += [direction.source] * len(both)
        columns["target_language"] += [direction.target] * len(both)
    if not columns["source"]:
        raise ValueError(f"{path} has no row of {listing([each.name for each in directions])}")
    return _dataset(columns)


def _dataset(columns: Mapping[str, list[str]]) -> datasets.Dataset:
    features = datasets.Features(dict.fromkeys(PAIR, datasets.Value("string")))
    return datasets.Dataset.from_dict(dict(columns), features=features)
