"""Checks of a section: each answers with a result, a failure, or the reason why it was skipped."""

from __future__ import annotations

import importlib
import json
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TextIO

# name -> function that returns a JSON-ready result, whose "passed" says whether it is as expected.
Checks = Mapping[str, Callable[[], dict[str, Any]]]


class SkippedError(Exception):
    """Reason why a check cannot be made here."""


def need(*packages: str) -> None:
    """Raises SkippedError for the first of some packages that is not installed."""
    for name in packages:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise SkippedError(f"{error.name} is not installed") from None


def run_checks(checks: Checks, channel: TextIO) -> None:
    """Runs checks in order and writes a line of JSON after each, so that no result can be lost.

    The first line names all of them.

    Args:
      checks: the checks of a section.
      channel: the file that the lines are written to.
    """
    print(json.dumps({"checks": list(checks)}), file=channel, flush=True)
    for name, check in checks.items():
        start = time.perf_counter()
        try:
            result = check()
        except SkippedError as reason:
            result = {"skipped": str(reason)}
        except ModuleNotFoundError as error:
            result = {"skipped": f"{error.name} is not installed"}
        except Exception as error:
            traceback.print_exc()
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:2000]}
        result["check_seconds"] = round(time.perf_counter() - start, 3)
        print(json.dumps({"name": name, "result": result}), file=channel, flush=True)
