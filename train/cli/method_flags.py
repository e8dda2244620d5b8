"""Flags that choose a method and change its fields."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import docstring_parser
import tyro

from compacter_jax.catalogue import METHODS, preset, presets
from compacter_jax.messages import quote
from compacter_jax.methods import bottleneck, compacter, prompt_tuning
from compacter_jax.methods.base import MethodConfig
from compacter_jax.methods.fields import did_you_mean

# Name in place of a preset, for commands that accept all of them.
ALL = "all"


MethodName: TypeAlias = Annotated[
    str,
    tyro.conf.arg(
        help=f"preset of the method: {', '.join(presets())}; or a composition by stack, parallel, "
        "average or average_maps, such as 'stack(runs/english,compacter++)', of presets, which "
        "are trained, and folders of saved adapters, which stay frozen."
    ),
]


def _method_options() -> type:
    """Builds a dataclass of the fields of all methods, None where the preset's value applies.

    Methods share a flag if they share the name of a field. `parts` has no flag: its values are
    methods.
    """
    hints: dict[str, Any] = {}
    texts: dict[str, dict[str, list[str]]] = {}  # field -> explanation -> kinds of method
    for kind, cls in METHODS.items():
        told = documented(cls)
        for name, hint in _flag_fields(cls).items():
            if hints.setdefault(name, hint) != hint:
                raise TypeError(
                    f"{name} of {kind} has the type {hint}, but {hints[name]} in other methods"
                )
            texts.setdefault(name, {}).setdefault(told[name], []).append(kind)
    made = [
        (
            name,
            Annotated[
                hint | None, tyro.conf.arg(help=_joined(texts[name]), metavar=_metavar(hint))
            ],
            dataclasses.field(default=None),
        )
        for name, hint in hints.items()
    ]
    return dataclasses.make_dataclass("MethodOptions", made, frozen=True, kw_only=True)


def _flag_fields(cls: type[MethodConfig]) -> dict[str, Any]:
    """Returns field -> type, for the fields that have a flag."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.name != "parts"}


def _joined(texts: Mapping[str, list[str]]) -> str:
    """Returns the first explanation, then those of the kinds whose field has another meaning."""
    (first, _), *others = texts.items()
    return " ".join([first, *(f"Of {', '.join(kinds)}: {text}" for text, kinds in others)])


# Constants with lists of choices that the docstrings of methods name.
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "WEIGHT_INITS": bottleneck.WEIGHT_INITS,
    "PROMPT_INITS": prompt_tuning.PROMPT_INITS,
    "RULE_INITS": compacter.RULE_INITS,
}


def documented(cls: type) -> dict[str, str]:
    """Returns field -> its explanation in the docstring of the class that declares it."""
    texts = {}
    for base in reversed(cls.__mro__):
        for attribute in docstring_parser.parse(base.__doc__ or "").params:
            for name in attribute.arg_name.split(", "):
                text = re.sub(r"`([A-Z_]+)`", _values_of, attribute.description or "")
                texts[name] = " ".join(text.replace("`", "").split())
    return texts


def _values_of(name: re.Match[str]) -> str:
    """Returns the choices in place of the name of the constant that lists them."""
    values = _CHOICES.get(name[1])
    return ", ".join(values) if isinstance(values, tuple) else name[0]


def _metavar(hint: Any) -> str:
    if hint is bool:
        return "{True,False}"
    if typing.get_origin(hint) is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if typing.get_origin(hint) is tuple:
        return f"{typing.get_args(hint)[0].__name__.upper()} [...]"
    return hint.__name__.upper()


_HINTS: Mapping[str, Any] = {
    name: hint for cls in METHODS.values() for name, hint in _flag_fields(cls).items()
}


MethodOptions = _method_options()


MethodFlags: TypeAlias = tyro.conf.OmitArgPrefixes[MethodOptions]  # type: ignore[valid-type]


def method_of(name: str, options: Any) -> MethodConfig:
    """Returns the preset with the given options."""
    return preset(name, **given_options(options))


def variant(text: str) -> tuple[str, dict[str, Any]]:
    """Parses a variant of a preset, such as `compacter++:phm_dim=8:sites=attention+feed_forward`.

    Values of a field with several are joined by `+`.

    Returns:
      The preset, and the fields with their values.

    Raises:
      ValueError: for a change that is no `FIELD=VALUE`, an unknown field, or a value of another
        type.

    Example:
      >>> variant("lora:rank=1:sites=query+key")
      ('lora', {'rank': 1, 'sites': ('query', 'key')})
    """
    name, *changes = text.split(":")
    values: dict[str, Any] = {}
    for change in changes:
        field, equals, value = change.partition("=")
        where = f"{quote(change, 100)} in {quote(text, 100)}"
        if not equals:
            raise ValueError(f"{where} must be FIELD=VALUE, such as rank=1")
        if field not in _HINTS:
            raise ValueError(f"{where}: no method has this field{did_you_mean(field, [*_HINTS])}")
        if field in values:
            raise ValueError(f"{where} gives {field} a second time; give it once")
        try:
            values[field] = _from_text(value, _HINTS[field])
        except ValueError:
            raise ValueError(f"{where} must have a value {_metavar(_HINTS[field])}") from None
    return name, values


def _from_text(text: str, hint: Any) -> Any:
    """Returns the value of a field; raises ValueError if the text is empty or of another type."""
    if not text:
        raise ValueError(text)
    if typing.get_origin(hint) is tuple:
        return tuple(_from_text(part, typing.get_args(hint)[0]) for part in text.split("+"))
    choices = (True, False) if hint is bool else typing.get_args(hint)
    if choices:
        named = {str(choice): choice for choice in choices}
        if text not in named:
            raise ValueError(text)
        return named[text]
    return hint(text) if hint in (int, float) else text


def is_composition(text: str) -> bool:
    """Returns True for an expression of `train.cli.compositions.parse`, False for a name."""
    return "(" in text


def given_options(options: Any) -> dict[str, Any]:
    """Returns field -> value, for the `MethodOptions` that were given."""
    return {key: value for key, value in vars(options).items() if value is not None}


def options_of(name: str, options: Any) -> Any:
    """Returns the `MethodOptions` that apply to a preset, if several presets share them."""
    known = preset(name).replaceable()
    given = {key: value for key, value in given_options(options).items() if key in known}
    return MethodOptions(**given)
