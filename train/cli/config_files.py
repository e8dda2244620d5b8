"""Flags from a TOML file of settings."""

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
    """Inserts the flags of `--config FILE.toml` before those of the command line, which win.

    `base = "OTHER.toml"` names a file in the same folder, whose keys are the defaults of this
    file's. A table `[tasks.NAME]` has the values for runs of this single task. For commands with
    the flag `--methods`, the key `method` sets it.

    Args:
      arguments: the arguments of the command line.
      options_class: the options of the command, whose flags the keys must be.

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
    """Returns key -> type, for the keys that a configuration may have."""
    hints = typing.get_type_hints(options_class) | typing.get_type_hints(MethodOptions)
    return {key: hint for key, hint in hints.items() if key not in ("method_options", "config")}


def _check_keys(path: str, values: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that is no flag, or a value of another type."""
    for key in values:
        if key not in hints:
            close = difflib.get_close_matches(key, hints, n=1)
            near = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(
                f"{path}: unknown key {quote(key)}{near}; keys are the flags that --help lists"
            )
    toml.check_values(path, values, hints)


def _value_of(name: str, arguments: Sequence[str]) -> str | None:
    """Returns the last value of a flag, `--flag value` or `--flag=value`; None without one."""
    value = None
    for i, argument in enumerate(arguments):
        if argument == name and i + 1 < len(arguments):
            value = arguments[i + 1]
        elif argument.startswith(f"{name}="):
            value = argument.removeprefix(f"{name}=")
    return value


def _read_config(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns the keys of a file and its base, and task -> the keys of its table."""
    values, of_tasks = _read_tables(path)
    if "base" not in values:
        return values, of_tasks
    base = values.pop("base")
    if not isinstance(base, str):
        raise ValueError(
            f"{path}: base={quote(base)} must be text, the name of a file in the same folder"
        )
    base_path = path.parent / base
    with about(f"{path}: base={quote(base, 100)}"):
        base, of_tasks_in_base = _read_tables(base_path)
    if "base" in base:
        raise ValueError(
            f"{base_path} is the base of {path} and has a base itself, but only one level is "
            f"read; name the second base in {path}"
        )
    tasks = of_tasks_in_base | of_tasks
    merged = {task: of_tasks_in_base.get(task, {}) | of_tasks.get(task, {}) for task in tasks}
    return base | values, merged


def _read_tables(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Returns the keys of a file, and those of its tables `[tasks.NAME]`."""
    values = toml.read_toml(path)
    tables = values.pop("tasks", {})
    if not isinstance(tables, dict) or not all(isinstance(x, dict) for x in tables.values()):
        raise ValueError(
            f"{path}: tasks must be tables such as [tasks.rte], not {quote(tables)}; to choose "
            "the tasks, use the key task"
        )
    return values, tables


def flag(key: str, value: Any, toggle: bool) -> list[str]:
    """Returns a field as command line arguments.

    A bool is a switch `--key` with `toggle`, otherwise a value.
    """
    name = key.replace("_", "-")
    if isinstance(value, bool) and toggle:
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, list | tuple):
        return [f"--{name}", *map(str, value)]
    if str(value).startswith("-"):  # otherwise it would be read as a flag
        return [f"--{name}={value}"]
    return [f"--{name}", str(value)]
