"""Text, JSON and tables that commands show and write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from compacter_jax.files import replace_file
from compacter_jax.methods.base import MethodConfig
from compacter_jax.params import Count


def write_json(path: Path, value: Any) -> None:
    """Writes JSON under a temporary name and renames it."""
    with replace_file(path) as temporary:
        temporary.write_text(as_json(value), encoding="utf-8")


def as_json(value: Any) -> str:
    """Returns a value as the text of a JSON file."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def number(value: float | None) -> str:
    """Formats a metric: a count as it is, any other number with four decimals, None as "-"."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def parameter_rows(count: Count) -> list[tuple[str, str, str, str]]:
    """Returns rows `(group, trained, all, trained in percent of all parameters)`, the sum last."""

    def row(name: str, trained: int, total: int) -> tuple[str, str, str, str]:
        return name, f"{trained:,}", f"{total:,}", f"{100 * trained / count.total:.4f} %"

    rows = [row(group, *sizes) for group, sizes in count.groups.items()]
    return [*rows, row("sum", count.trained, count.total)]


def backbone_total(count: Count) -> int:
    """Returns the number of parameters of the backbone, without method and head."""
    return count.total - sum(count.groups.get(g, (0, 0))[1] for g in ("rule", "adapters", "head"))


def parameter_table(count: Count, method: MethodConfig) -> str:
    """Returns the table of trained parameters for the console."""
    rows = [("group", "trained", "parameters", "of all"), *parameter_rows(count)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 4))])
        for row in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([f"method: {method.kind}", lines[0], rule, *lines[1:-1], rule, lines[-1]])


def table(header: list[str], rows: Any) -> str:
    """Returns a table in Markdown, in whose cells `|` is no border."""
    lines = [header, ["---"] * len(header), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
