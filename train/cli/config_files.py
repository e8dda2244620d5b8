"""Flags from a file of settings, and numbers as people write them."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compacter_jax.messages import about, quote
from train.cli import toml
from train.cli.method_flags import MethodOptions


def expand_config(arguments: Sequence[str], options_class: type) -> list[str]:
    """Puts the flags of `--config FILE.toml` before those of the command line, so that these win.

    `base = "OTHER.toml"`, of the same folder, is a file whose keys this one has too unless it says
    otherwise. A table `[tasks.NAME]` holds what is different where the run has this task alone.
    The key `method` is `--methods` for commands that have that flag.

    Args:
      arguments: of the command line.
      options_class: of the command, whose flags the keys must be.

    Raises:
      FileNotFoundError: if a file does not exist.
      ValueError: if it is no TOML, or has a key that is no flag or a value of another type.
    """
    path = _value_of("--config", arguments)
    if path is None:
        return list(arguments)
    values, of_tasks = _read_config(Path(path))
    hints = _hints_of_keys(options_class)
    of_methods = "methods" in hints
    if of_methods:
        hints["method"] = str
    for table in (values, *of_tasks.values()):
        _check_keys(path, table, hints)
    if of_methods and "method" in values:
        values["methods"] = values.pop("method")
    values |= of_tasks.get(_value_of("--task", arguments) or values.get("task", ""), {})
    own = {field.name for field in dataclasses.fields(MethodOptions)}
    flags = [part for key, value in values.items() for part in flag(key, value, key not in own)]
    return [*flags, *arguments]


def _hints_of_keys(options_class: type) -> dict[str, Any]:
    """Key that a configuration may have -> type."""
    hints = typing.get_type_hints(options_class) | typing.get_type_hints(MethodOptions)
    return {key: hint for key, hint in hints.items() if key not in ("method_options", "config")}


def _check_keys(path: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """ValueError for a key that is no flag, or a value of another type."""
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            near = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"{path}: unknown key {quote(key)}{near}; keys are the flags that --help lists"
            )
    toml.check_values(path, values, hints)


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """What follows a flag where it comes last, as `--flag value` or `--flag=value`."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"{name}="):
            value = argument.removeprefix(f"{name}=")
    return value


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The keys of a file and its base, and those of each of its tables by task."""
    values, of_tasks = _read_tables(path)
    if "base" not in values:
        return values, of_tasks
    base = values.pop("base")
    if not isinstance(base, str):
        raise ValueError(f"{path}: base={quote(base)} must be text, the name of a file beside it")
    base_path = path.parent / base
    with about(f"{path}: base={quote(base, 100)}"):
        base, of_tasks_in_base = _read_tables(base_path)
    if "base" in base:
        raise ValueError(f"{base_path} is the base of {path} and has a base itself; name that one")
    tasks = of_tasks_in_base | of_tasks
    merged = {task: of_tasks_in_base.get(task, {}) | of_tasks.get(task, {}) for task in tasks}
    return base | values, merged


def _read_tables(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The keys of a file, and those of its tables `[tasks.NAME]`."""
    values = toml.read_toml(path)
    tables = values.pop("tasks", {})
    if not isinstance(tables, dict) or not all(isinstance(x, dict) for x in tables.values()):
        raise ValueError(
            f"{path}: tasks must be tables such as [tasks.rte], not {quote(tables)}; the tasks "
            "themselves are named by the key task"
        )
    return values, tables


def flag(key: str, value: Any, toggle: bool) -> list[str]:
    """A field as arguments of the command line; a bool is `--key` or, without `toggle`, a value."""
    name = key.replace("_", "-")
    if isinstance(value, bool) and toggle:
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    if str(value).startswith("-"):  # which would be a flag by itself
        return [f"--{name}={value}"]
    return [f"--{name}", str(value)]
