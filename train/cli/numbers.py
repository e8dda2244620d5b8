"""Numbers on the command line, with errors in plain words."""

from __future__ import annotations

import types
import typing
from typing import Any

import tyro


def _number(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """Returns a parser of numbers and None for tyro, whose own errors name Python's types."""
    is_union = typing.get_origin(info.type) in (typing.Union, types.UnionType)
    kinds = set(typing.get_args(info.type)) if is_union else {info.type}
    if kinds - {type(None)} not in ({int}, {float}):
        return None
    (kind,) = kinds - {type(None)}

    def read(values: list[str]) -> Any:
        try:
            return None if values == ["None"] and is_union else kind(values[0])
        except ValueError:
            wanted = "whole number" if kind is int else "number"
            raise ValueError(f"{values[0]!r} is not a {wanted}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, (kind, *kinds)),
        str_from_instance=lambda value: [str(value)],
    )


# Registry with which tyro parses numbers by `_number`.
NUMBERS = tyro.constructors.ConstructorRegistry()
NUMBERS.primitive_rule(_number)
