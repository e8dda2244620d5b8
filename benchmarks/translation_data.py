"""Tables with a column for each language: their directions' rows, shares, and parts to score."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from compacter_jax.files import replace_file
from compacter_jax.messages import listing
from train.data import rows, sampled
from train.tasks import parallel


@functools.cache
def counts(path: Path, languages: tuple[str, ...]) -> dict[str, int]:
    """Returns the number of rows of each direction of a table."""
    there = _there(parallel.read_table(path), languages)
    return {
        f"{a}-{b}": int((there[a] & there[b]).sum()) for a in languages for b in languages if a != b
    }


def check(options: argparse.Namespace, directions: Sequence[str]) -> None:
    """Checks the tables and the numbers of rows to take of them, before anything is made.

    Args:
      options: the options of `benchmarks.translation`.
      directions: the names of the directions.

    Raises:
      OSError, ValueError: if a table cannot be read, or lacks the column of a language or the rows
        of a direction; or if a number of rows is below 1.
    """
    for name in ("most_rows", "tokenizer_rows"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise ValueError(f"--{name.replace('_', '-')} {number} must be 1 or more")
    for path in filter(None, (options.train, options.validation, options.test)):
        columns = list(parallel.read_table(path))
        for language in options.languages:
            rows.require_column(path, columns, language, " for --languages")
        found = counts(path, tuple(options.languages))
        if lacking := [name for name in directions if not found[name]]:
            raise ValueError(f"{path} has no row of {listing(lacking)}; leave out these directions")


def steps_of(options: argparse.Namespace, directions: Sequence[str], steps: int) -> dict[str, int]:
    """Divides the steps of a run by the rows that it draws of each direction, rounded up.

    Args:
      options: the options of `benchmarks.translation`, with `train`, `languages`, `temperature`.
      directions: the names of the directions.
      steps: the number of steps of a run of all of them.
    """
    found = counts(options.train, tuple(options.languages))
    quotas = sampled.quotas(np.array([found[name] for name in directions]), options.temperature)
    parts = (-(-steps * quotas // quotas.sum())).tolist()
    return dict(zip(directions, parts, strict=True))


def write_part(path: Path, languages: Sequence[str], most: int, output: Path) -> None:
    """Writes a table with at most so many texts of every language but the first.

    The rows are put in a random order, the same every time, and of each language the first texts
    are kept. Rows that have none left are left out.

    Args:
      path: the table.
      languages: the languages, first the one that all texts of the others are paired with.
      most: the number of texts to keep of a language.
      output: the parquet file to write.
    """
    table = parallel.read_table(path)
    there = _there(table, languages)
    order = np.random.default_rng(0).permutation(len(next(iter(there.values()))))
    kept = {each: np.zeros(len(order), bool) for each in languages}
    for each in languages[1:]:
        kept[each][order[there[each][order] & there[languages[0]][order]][:most]] = True
    wanted = np.any(list(kept.values()), axis=0)
    kept[languages[0]] = wanted
    columns = {
        each: [table[each][row] if kept[each][row] else None for row in np.flatnonzero(wanted)]
        for each in languages
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(output) as temporary:
        pq.write_table(pa.table(columns), temporary)


def drawn(texts: list[str], most: int | None) -> list[str]:
    """Returns at most so many texts, drawn at random, the same every time, in their order."""
    if most is None or most >= len(texts):
        return texts
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[row] for row in sorted(order[:most])]


def _there(table: dict[str, list[str | None]], languages: Sequence[str]) -> dict[str, np.ndarray]:
    return {each: np.array([isinstance(x, str) for x in table[each]]) for each in languages}
