"""Checks of the fields of methods, with messages that name the field."""

from __future__ import annotations

import dataclasses
import difflib
import math
import sys
import types
import typing
from typing import Any, Literal

from compacter_jax.messages import quote

# The largest size or index. Products of two of them are still numbers of 64 bits, the type of array
# sizes.
_LARGEST_INT = 2**31 - 1


def typed(name: str, value: Any, hint: Any) -> Any:
    """Returns `value` in the type `hint`: converts lists to tuples and ints to floats.

    Args:
      name: name of the field.
      value: given value.
      hint: type of the field.

    Raises:
      ValueError: if the value is of another type, not finite, or too large.
    """
    if typing.get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ValueError(f"{name}={quote(value)} must be a list")
        element = typing.get_args(hint)[0]
        return tuple(typed(name, item, element) for item in value)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            wanted = ", ".join(map(repr, choices))
            raise ValueError(f"{name}={quote(value)} must be one of {wanted}")
        return value
    if hint is float and type(value) is int:
        # JSON has whole numbers that no float can hold.
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias):
        # The type must be exact, because a bool is also an int. A field for methods accepts every
        # subclass.
        nests = dataclasses.is_dataclass(hint)
        fits = isinstance(value, hint) if nests else type(value) is hint
    else:
        fits = True
    if not fits:
        raise ValueError(f"{name}={quote(value)} must be of type {hint.__name__}")
    if hint is int and abs(value) > _LARGEST_INT:
        raise ValueError(f"{name}={quote(value, 40)} is too large; use at most {_LARGEST_INT:,}")
    if hint is float and not math.isfinite(value):
        raise ValueError(f"{name}={value} must be finite")
    return value


def require(holds: bool, name: str, value: Any, wanted: str) -> None:
    """Raises ValueError that names a field and its valid values if a condition does not hold."""
    if not holds:
        raise ValueError(f"{name}={quote(value)} must be {wanted}")


def choose(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError if a field has none of the values to choose from."""
    if value not in choices:
        raise ValueError(f"unknown {name}={quote(value)}; use one of {', '.join(choices)}")


def did_you_mean(name: str, known: list[str]) -> str:
    """Returns a hint for the end of a message: the known name that is most similar."""
    close = difflib.get_close_matches(name[:100], known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def either(values: list[int]) -> str:
    """Returns numbers as text, such as `1, 2 or 4`."""
    head = ", ".join(map(str, values[:-1]))
    return f"{head} or {values[-1]}" if head else str(values[-1])


def no_answer(owner: object, answer: str, needed: str) -> NotImplementedError:
    """Makes the error for the author of a class that lacks an answer which only some classes need.

    Args:
      owner: the method or composition.
      answer: name of the answer, a method of the class.
      needed: which classes need it.
    """
    return NotImplementedError(
        f"{type(owner).__name__} does not define {answer}(), which {needed}; docs/extending.md "
        "describes the answers"
    )
