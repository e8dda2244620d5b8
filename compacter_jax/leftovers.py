"""Weights left in an adapter's folder by interrupted saves, and the log that names them.

A save first writes the new weights, then the configuration that names them, and last removes the
old weights. If a save is killed in between, it leaves weights that no configuration names. Each
save keeps the names of its weights in a log while it runs. Files that are in no log belong to
somebody else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from compacter_jax.files import read_json, replace_file

LOG_NAME = ".adapter_saving.json"
# The name contains a hash, because other libraries also write files named adapter.safetensors.
_WEIGHTS_NAME = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")


def note(directory: Path, names: Iterable[str]) -> None:
    """Adds names of weights to the log, before a save writes or replaces the weights."""
    names = {name for name in names if _WEIGHTS_NAME.fullmatch(name)} | set(_noted(directory))
    with replace_file(directory / LOG_NAME) as temporary:
        temporary.write_text(json.dumps({"weights": sorted(names)}) + "\n", encoding="utf-8")


def clear(directory: Path, in_use: str | None) -> None:
    """Removes the log and the weights that it names, complete or partial, except those in use.

    Args:
      directory: folder of the adapter; nobody else saves to it meanwhile.
      in_use: name of the weights in the configuration; if None, the function removes nothing.
    """
    if in_use is None:
        return
    for name in _noted(directory):
        if name != in_use:
            (directory / name).unlink(missing_ok=True)
        for begun in directory.glob(f".{name}.*.tmp"):
            begun.unlink(missing_ok=True)
    (directory / LOG_NAME).unlink(missing_ok=True)


def _noted(directory: Path) -> list[str]:
    """Returns the names in the log; an empty list if the log is missing or damaged."""
    try:
        names = read_json(directory / LOG_NAME, {"weights": list[str]})["weights"]
    except (OSError, ValueError, KeyError):
        return []
    return [name for name in names if _WEIGHTS_NAME.fullmatch(name)]
