"""Files of sentences that are divided into words, with a tag of every word."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from train.data.rows import (
    WORDS,
    check_words,
    column_names,
    column_values,
    read_rows,
    require_column,
)
from train.tasks import entities, labels

TOKENS, TAGS = "tokens", "tags"


def load(
    files: Mapping[str, Path],
    wanted: Sequence[str],
    names: tuple[str, ...],
    max_characters: int,
) -> tuple[tuple[str, ...], dict[str, datasets.Dataset], tuple[str, ...]]:
    """Reads the splits of a task with tags.

    Args:
      files: split -> file.
      wanted: the splits to return.
      names: the tags; if empty, those of the training file, sorted.
      max_characters: the maximum length of a sentence.

    Returns:
      The tags; split -> rows with `tokens` and `tags`, which are positions among the tags; and
      lines for the user.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: for any other invalid input, such as a sentence without words, another number of
        tags than of words, or a tag that is none of `names`; the message names the file and row.
    """
    needed = [split for split in files if split in wanted or (split == "train" and not names)]
    columns = {split: _read(files[split], max_characters) for split in needed}
    if not names:
        names = _names_of_training(files, columns)
    splits = {split: _dataset(files[split], columns[split], names) for split in wanted}
    notes: list[str] = []
    if entities.is_iob2(names):
        for split in wanted:
            notes += _told_of_inside(files[split], columns[split][TAGS])
    return names, splits, tuple(dict.fromkeys(notes))


def _read(path: Path, max_characters: int) -> dict[str, list[list[str]]]:
    columns: dict[str, list[Any]] = {TOKENS: [], TAGS: []}
    for rows in read_rows(path, max_characters=max_characters, columns={TOKENS: WORDS}):
        for name in columns:
            require_column(path, column_names(rows), name)
            columns[name] += column_values(rows, name)
    rows_of = zip(columns[TOKENS], columns[TAGS], strict=True)
    for row, (words, tags) in enumerate(rows_of, 1):
        check_words(path, TAGS, tags, row, max_characters)
        if len(words) != len(tags):
            raise ValueError(
                f"{path}, row {row}: {len(words)} tokens, but {len(tags)} tags; give every token "
                "one tag"
            )
        if empty := [place for place, tag in enumerate(tags, 1) if not labels.key(tag)]:
            raise ValueError(f"{path}, row {row}: tag {empty[0]} is empty; give every token a tag")
    return columns


def _names_of_training(
    files: Mapping[str, Path], columns: Mapping[str, Mapping[str, list[list[str]]]]
) -> tuple[str, ...]:
    """Returns the tags of the training file; raises ValueError if there are less than two."""
    if "train" not in files:
        raise ValueError(
            "without a training file the tags are unknown; give train_file or label_names"
        )
    names = tuple(sorted(set(itertools.chain.from_iterable(columns["train"][TAGS]))))
    if len(names) == 1:
        raise ValueError(
            f"{files['train']}: every tag is {names[0]!r:.80}; training needs at least two tags"
        )
    return names


def _dataset(
    path: Path, columns: Mapping[str, list[list[str]]], names: tuple[str, ...]
) -> datasets.Dataset:
    """Returns a dataset in memory, in which tags are numbers.

    Raises:
      ValueError: for a tag that is none of `names`; the message names the row.
    """
    index = {name: i for i, name in enumerate(names)}
    for row, tags in enumerate(columns[TAGS], 1):
        if other := [tag for tag in tags if tag not in index]:
            raise ValueError(
                f"{path}, row {row}: tag {other[0]!r:.80} is not one of the training tags "
                f"{labels.listed(names):.300}"
            )
    return datasets.Dataset.from_dict(
        {TOKENS: columns[TOKENS], TAGS: [[index[tag] for tag in tags] for tags in columns[TAGS]]},
        features=datasets.Features(
            {
                TOKENS: datasets.Sequence(datasets.Value("string")),
                TAGS: datasets.Sequence(datasets.Value("int32")),
            }
        ),
    )


def _told_of_inside(path: Path, tags: Sequence[Sequence[str]]) -> list[str]:
    """Returns a line about entities that begin with I; empty if there are none."""
    number = sum(map(entities.opened_by_inside, tags))
    if not number:
        return []
    return [
        f"{number:,} entities of {path} begin with I instead of B, which is not IOB2; they count "
        "as entities, as in conlleval"
    ]
