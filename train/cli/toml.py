"""TOML files of the user, read without trust in their content."""

from __future__ import annotations

import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from compacter_jax.files import check_fields, read_text
from compacter_jax.messages import quote, shorten

# A file of flags has about two kilobytes. Parsing a key with many dots takes quadratic time.
LARGEST_TOML = 64 * 2**10


def read_toml(path: Path) -> dict[str, Any]:
    """Reads the keys of a file.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if it is too large, is not UTF-8 or no TOML, or has too many nested brackets; the
        message names the file.
    """
    text = read_text(path, LARGEST_TOML)
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is not valid TOML: its brackets are nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid TOML: {shorten(str(error), 200)}") from None


def check_values(where: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Checks that values of TOML are valid for options.

    Args:
      where: the source of the values, for messages.
      values: option -> value.
      hints: option -> its type in the dataclass of the options.

    Raises:
      ValueError: for a value of another type, or a list item that would be read as a flag; the
        message names the source and the option.
    """
    check_fields(where, values, {name: _of_toml(hint) for name, hint in hints.items()})
    for name, value in values.items():
        items = value if isinstance(value, list) else []
        if flags := [item for item in items if isinstance(item, str) and item.startswith("-")]:
            raise ValueError(f"{where}: {name} has the item {quote(flags[0])}, which is a flag")


def _of_toml(hint: Any) -> Any:
    """Returns the type of an option in TOML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _of_toml(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_of_toml(part) for part in arguments)]  # noqa: UP007 - of a tuple
    if origin is tuple:
        return list[_of_toml(arguments[0])]  # type: ignore[misc]
    if hint is Path:
        return str
    # Comma-separated lists, such as seeds, may be a single number.
    return str | int | float if hint is str else hint
