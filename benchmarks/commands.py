"""Commands of `python -m train` that experiments run, each once, and what they record of it."""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.__main__ import main
from train.compute import compilation_cache
from train.report import write_json


def run(name: str, flags: Sequence[Any]) -> None:
    """Runs a command, whose compiled programs stay for the next; RuntimeError if it fails."""
    _keep_programs()
    if code := main([name, *map(str, flags)]):
        raise RuntimeError(f"{name} ended with exit code {code}; run the same command to go on")


def fit_once(folder: Path, flags: Sequence[Any]) -> float:
    """Runs `fit` unless it is done; an interrupted run goes on.

    Args:
      folder: folder of the run. A file beside it keeps the seconds.
      flags: flags of `fit`, without those of the folder.

    Returns:
      The seconds that `fit` took when it ended.

    Raises:
      RuntimeError: if it failed or was stopped.
    """
    timed = _timed(folder)
    if not (folder / "metrics.json").exists() or not timed.exists():
        started = time.perf_counter()
        run("fit", [*flags, "--output-dir", folder, "--resume"])
        if not (folder / "metrics.json").exists():  # a signal ends `fit` without an error
            raise RuntimeError(f"{folder} was stopped; run the same command to go on")
        write_json(timed, {"seconds": time.perf_counter() - started})
    return seconds_of(folder)


def seconds_of(folder: Path) -> float:
    """Returns the seconds that `fit` took for a folder of `fit_once`."""
    return float(json.loads(_timed(folder).read_text(encoding="utf-8"))["seconds"])


def _timed(folder: Path) -> Path:
    """Returns the file of the seconds: beside the folder, which has only what the run wrote."""
    return folder.parent / f"{folder.name}.seconds.json"


@functools.cache
def _keep_programs() -> None:
    compilation_cache.enable_late()


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """Returns the settings of an experiment; of paths the last part, which says what was read."""
    return {
        name: value.name if isinstance(value, Path) else str(value)
        for name, value in vars(options).items()
    }
