"""Weights that killed saves left in an adapter's folder, and how the next save knows them.

A save writes new weights, then the configuration that names them, then removes the old weights.
A kill in between leaves weights that no configuration names. Their names are in a log, which is
there for as long as a save lasts. What is in no log is somebody else's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from compacter_jax.files import read_json, replace_file

LOG_NAME = ".adapter_saving.json"
# With a hash: other libraries have files of the name adapter.safetensors.
_WEIGHTS_NAME = re.compile(r"adapter-[0-9a-f]{16}\.safetensors")


def note(directory: Path, names: Iterable[str]) -> None:
    """Adds names of weights to the log, before a save writes or replaces them."""
    names = {name for name in names if _WEIGHTS_NAME.fullmatch(name)} | set(_noted(directory))
    with replace_file(directory / LOG_NAME) as temporary:
        temporary.write_text(json.dumps({"weights": sorted(names)}) + "\n", encoding="utf-8")


def clear(directory: Path, in_use: str | None) -> None:
    """Removes the log and the weights named in it, whole or begun, other than those in use.

    Args:
      directory: in which nobody else saves meanwhile.
      in_use: the name that the configuration has; None where no configuration says one, and then
        nothing is removed.
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
    """The names in the log, none where there is no log or a damaged one."""
    try:
        names = read_json(directory / LOG_NAME, {"weights": list[str]})["weights"]
    except (OSError, ValueError, KeyError):
        return []
    return [name for name in names if _WEIGHTS_NAME.fullmatch(name)]
