"""Several test files in one `evaluate`: the tables of their metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.report import number, table


def report(adapter: Path, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a report in Markdown: a table of the metrics, and one of the F1 of each kind.

    Args:
      adapter: the adapter.
      results: name -> what `evaluate` writes for one file.
    """
    first = next(iter(results.values()))
    counts = [name for name in ("examples", "truncated", "cut_words") if name in first]
    whole = [name for name in first["metrics"] if "/" not in name]
    kinds = [name.removesuffix("/f1") for name in first["metrics"] if name.endswith("/f1")]
    rows = [
        [
            name,
            *(number(result[each]) for each in counts),
            *(number(result["metrics"][each]) for each in whole),
        ]
        for name, result in results.items()
    ]
    heads = [each.replace("_", " ") for each in (*counts, *whole)]
    parts = [f"# {adapter} on {len(results)} test files", table(["file", *heads], rows)]
    if kinds:
        of_kinds = [
            [name, *(number(result["metrics"][f"{kind}/f1"]) for kind in kinds)]
            for name, result in results.items()
        ]
        parts += ["## F1 by kind", table(["file", *kinds], of_kinds)]
    return "\n\n".join(parts) + "\n"
