"""Values and lists in error messages, shortened so that a message stays one short line."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterable, Iterator
from typing import Any

# A message quotes no value in more than `LONGEST_VALUE` characters, and no message is longer than
# `LONGEST`.
LONGEST_VALUE = 200
LONGEST = 500
# The characters of a message that names of parameters may take: half of it, since paths of files
# are long as well.
_ROOM = 240
_LONGEST_ITEM = 130


class _Repr(reprlib.Repr):
    """A `repr` that reads no more of a value than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = LONGEST_VALUE
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 12
        self.maxlevel = 4

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write integers of more than 4,300 digits in decimal.
        return hex(x)[: self.maxlong] + "…" if x.bit_length() > 14_000 else str(x)


_REPR = _Repr()


def quote(value: Any, longest: int = LONGEST_VALUE) -> str:
    """Returns `repr(value)`; a long one is cut in the middle.

    Args:
      value: any value; only the beginning and the end of a long or deep one are read.
      longest: largest number of characters in the result.
    """
    return shorten(_REPR.repr(value), longest)


def shorten(text: str, longest: int = LONGEST) -> str:
    """Returns `text`, without its middle if it has more than `longest` characters."""
    if len(text) <= longest:
        return text
    end = (longest - 1) // 3
    return f"{text[: longest - 1 - end]}…{text[-end:]}"


def listing(items: Iterable[str], most: int = 8, longest: int = 60) -> str:
    """Returns at most `most` items joined by commas, each cut to `longest` characters."""
    items = list(items)
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(shorten(item, longest) for item in items[:most]) + more


def mismatches(missing: list[str], left_over: list[str], shapes: list[str]) -> str:
    """Returns one line that lists mismatched leaves of each kind and leaves room for every kind."""
    kinds = {"missing": missing, "left over": left_over, "of another shape": shapes}
    room = _ROOM // max(1, sum(map(bool, kinds.values())))
    listed = []
    for kind, items in kinds.items():
        most, length = 1, 0
        while (
            most < len(items)
            and (length := length + min(len(items[most - 1]), _LONGEST_ITEM)) < room - 60
        ):
            most += 1
        listed.append(f"{kind}: {listing(items, most, _LONGEST_ITEM) or 'none'}")
    return "; ".join(listed)


def reason_of(error: BaseException, longest: int = LONGEST_VALUE) -> str:
    """Returns the message of an exception as one line, without the name of its class."""
    return shorten(" ".join(str(error).split()), longest) or "no reason was given"


@contextlib.contextmanager
def about(place: Any) -> Iterator[None]:
    """Puts a place in front of the message of a ValueError that does not name the place.

    Args:
      place: source of the value, such as the path of a file; anything with a `str`.
    """
    try:
        yield
    except ValueError as error:
        name, text = str(place), str(error)
        if name in text and len(text) <= LONGEST:
            raise
        text = text if name in text else f"{name}: {text}"
        raise ValueError(shorten(" ".join(text.split()))) from None
