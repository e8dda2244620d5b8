"""Labels of files: their names, missing values among them, and the meaning of integers."""

from __future__ import annotations

import collections
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

# Maximum numbers of labels in a line, and of characters of a label.
_MOST_SHOWN, _LONGEST_SHOWN = 50, 60
# At most as many digits as an int64 has: Python refuses to read thousands of them.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_NUMBER = re.compile(r"-?[0-9]{1,15}(\.0*)?")
# Texts that may be labels, but more often stand for a missing one.
_OFTEN_NONE = {
    *("na", "n/a", "#n/a", "<na>", "nan", "nat", "nil", "none", "null", "undefined", "unknown"),
    *("missing", "unlabeled", "unlabelled", "?", "."),
}
_DASHES = {"-", "--", "---", "\u2013", "\u2014", "_"}


def is_integer(label: str) -> bool:
    """Returns True if Python writes an integer of at most 18 digits like `label`; not "007"."""
    return _INTEGER.fullmatch(label) is not None


def key(label: str) -> str:
    """Returns a label without case, invisible characters and variants of Unicode.

    White space becomes one space, and is removed at the ends. Whole numbers are equal however they
    are written: "1", "1.0" and "01". The key is empty if the text is no label.
    """
    plain = unicodedata.normalize("NFKC", label).casefold()
    plain = "".join(c for c in plain if unicodedata.category(c) != "Cf")
    plain = " ".join(unicodedata.normalize("NFKC", plain).split())
    return str(int(plain.partition(".")[0])) if _NUMBER.fullmatch(plain) else plain


def shown(label: str) -> str:
    """Returns a label for a message, in quotation marks if its ends would not be visible."""
    plain = label.isprintable() and label == label.strip() and "," not in label
    text = label if plain else repr(label)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def listed(labels: Sequence[str]) -> str:
    """Returns the first 50 labels, joined by commas."""
    more = f" and {len(labels) - _MOST_SHOWN:,} more" if len(labels) > _MOST_SHOWN else ""
    return ", ".join(map(shown, labels[:_MOST_SHOWN])) + more


def told(names: Sequence[str], counts: Sequence[Sequence[int]], of: str) -> str:
    """Returns a line about the labels: `labels (custom, rows of train): no (3), yes (5)`.

    Args:
      names: the names of the labels, in their order.
      counts: for each split, the number of rows with each label; there may be no split.
      of: what the counts are of, in words.
    """
    columns = zip(*counts, strict=True) if counts else [()] * len(names)
    each = [
        shown(name) + (f" ({', '.join(f'{n:,}' for n in numbers)})" if numbers else "")
        for name, numbers in zip(names, columns, strict=True)
    ]
    more = f" and {len(each) - _MOST_SHOWN:,} more" if len(each) > _MOST_SHOWN else ""
    return f"labels ({of}): {', '.join(each[:_MOST_SHOWN])}{more}"


def check_names(names: Sequence[str], what: str) -> None:
    """Checks label names that the user states.

    Args:
      names: the names.
      what: the flag or field that states them, for errors.

    Raises:
      ValueError: if a name is empty or appears twice.
    """
    for place, name in enumerate(names):
        if not key(name):
            raise ValueError(f"{what}: name {place + 1} is empty; give every label a name")
        if name in names[:place]:
            raise ValueError(f"{what}: {shown(name)} occurs twice; give every label its own name")


def check_stated(order: Sequence[str], names: Sequence[str]) -> None:
    """Checks the stated order of integer labels against the labels of an adapter, if there are any.

    Raises:
      ValueError: as `check_names`, or if a name is none of the labels, where these have names.
    """
    check_names(order, "--label-names")
    other = [name for name in order if name not in names]
    if other and names and not all(map(is_integer, names)):
        raise ValueError(
            f"--label-names: {shown(other[0])} is not one of the adapter's labels, which are "
            f"{listed(names):.300}"
        )


def check_found(path: Path, found: Mapping[str, int]) -> list[str]:
    """Checks the labels of a training file that the user has not stated.

    Args:
      path: the file, for errors.
      found: label -> number of rows.

    Returns:
      Lines for the user about labels that often stand for missing ones.

    Raises:
      ValueError: if two labels differ only in case, white space or form, or one looks like a
        missing value: a negative number beside 0, 1, …, n - 1, or a dash.
    """
    rows = {label: f"{shown(label)} ({number:,})" for label, number in found.items()}
    alike = collections.defaultdict(list)
    for label in found:
        alike[key(label)].append(label)
    for group in alike.values():
        if len(group) > 1:
            raise ValueError(
                f"{path}: the labels {', '.join(repr(x)[:60] for x in group[:4])} differ only in "
                "case, white space or Unicode form; use one spelling, or list all of them in "
                "--label-names"
            )
    if missing := _like_missing({k: group[0] for k, group in alike.items()}):
        others = listed([label for label in found if label != missing])
        raise ValueError(
            f"{path}: {rows[missing]} next to {others:.150} looks like rows without a label; "
            f"remove these rows, or list {shown(missing)} in --label-names if it is a label"
        )
    doubtful = [rows[group[0]] for k, group in alike.items() if k in _OFTEN_NONE]
    if not doubtful:
        return []
    return [
        f"{path} has labels that often stand for a missing label: {', '.join(doubtful[:10])}; if "
        "they do here, remove these rows"
    ]


def _like_missing(labels: Mapping[str, str]) -> str | None:
    """Returns the label that data sets write for a missing one; None if there is none.

    A dash is a label if there is a plus, and a negative number is a label beside numbers other than
    0, 1, 2, ….

    Args:
      labels: key of a label -> label.
    """
    if not any(plus in labels for plus in ("+", "++", "+++")):
        for dash in _DASHES & labels.keys():
            return labels[dash]
    numbers = sorted(int(k) for k in labels if is_integer(k))
    negative, rest = [n for n in numbers if n < 0], [n for n in numbers if n >= 0]
    if len(negative) != 1 or rest != list(range(len(rest))):
        return None
    # Either all other labels are the numbers of classes, or all are names.
    if len(rest) not in (len(labels) - 1, 0):
        return None
    return labels[str(negative[0])]


def indices(
    path: Path, labels: Sequence[str], names: tuple[str, ...], order: Sequence[str]
) -> tuple[list[int], list[str]]:
    """Returns the position of each label among the names, and lines on how integers were read.

    Args:
      path: the file, for errors.
      labels: the labels of the rows.
      names: the names of all labels, in their order.
      order: the names that the integers from 0 on stand for; empty if no order is stated.

    Raises:
      ValueError: for a label that is none of the names, or an integer in place of a name if no
        order is stated; the message names the row.
    """
    index = {name: i for i, name in enumerate(names)}
    numbers = dict(enumerate(order))
    by_number: dict[str, int] = {}
    if all(map(is_integer, names)):  # a file may have names where the adapter has integers
        by_number = {name: index[str(i)] for i, name in numbers.items() if str(i) in index}
    elif not any(map(is_integer, names)):  # otherwise "1" is a name, not a position
        by_number = {str(i): index[name] for i, name in numbers.items() if name in index}
    read = set()
    for row, label in enumerate(labels, 1):
        if label in index:
            continue
        if label in by_number:
            read.add(label)
            continue
        if is_integer(label) and not order and not any(map(is_integer, names)):
            raise ValueError(
                f"{path}, row {row}: label {label} is a number, but the labels have names, whose "
                "order is unknown; give --label-names with the names of 0, 1, … in this order; "
                f"the names are {listed(names):.150}"
            )
        raise ValueError(
            f"{path}, row {row}: label {label[:80]!r} is not one of "
            f"{', '.join(map(repr, names)):.300}"
        )
    places = index | by_number | index
    said = []
    if read:
        shown_first = [label for label in by_number if label in read]
        said.append(
            f"labels {listed(shown_first)} of {path} are read as "
            f"{listed([names[by_number[label]] for label in shown_first])}"
        )
    return [places[label] for label in labels], said
