"""Report of a comparison: tables of scores, of differences, and of the learning rates tried."""

from __future__ import annotations

import math
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compacter_jax.files import replace_file
from train.compare.figures import comparison_figure, head_of, size_figure
from train.compare.summaries import Summary, grouped, summaries
from train.figures import save
from train.report import number, table


def write(results: Mapping[str, Any], folder: Path) -> None:
    """Writes report.md, `comparison-TASK-SIZE.png` and, for several sizes, `sizes-TASK.png`."""
    found = summaries(results["runs"])
    settings = results["settings"]
    backbone = settings["backbone"]
    sections = ["# Comparison", _explanation(settings)]
    for task, of_task in grouped(found, lambda s: s.task).items():
        by_size = grouped(of_task, lambda s: s.size)
        if len(by_size) > 1:
            path = folder / f"sizes-{task}.png"
            save(size_figure(of_task, backbone, head_of(settings)), path)
            sections += [
                f"## {task}",
                f"![score by training size]({urllib.parse.quote(path.name)})",
            ]
            sections.append(size_table(of_task))
        for size, of_size in sorted(by_size.items()):
            # None is the size of all examples.
            differences, tried = (
                _of_point(results[name], task, [size, None]) for name in ("differences", "tried")
            )
            path = folder / f"comparison-{task}-{size}.png"
            save(comparison_figure(of_size, backbone, head_of(settings), differences), path)
            sections += [f"## {task}, {size:,} training examples"]
            link = urllib.parse.quote(path.name)
            sections += [f"![score by trained parameters]({link})", method_table(of_size)]
            sections += _difference_sections(differences, tuned=bool(tried))
            sections += _tried_sections(tried)
    if results["failed"]:
        sections.append("## Failed")
        sections.append(table(["run", "reason"], [list(f.values()) for f in results["failed"]]))
    shown = {key: value for key, value in settings.items() if value is not None}
    sections.append("## Settings")
    told = {key: _told(value) for key, value in shown.items() if key != "method_options"}
    told |= {"method_options": str(shown["method_options"])}
    sections.append(table(["setting", "value"], [[k, f"`{v}`"] for k, v in told.items()]))
    with replace_file(folder / "report.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")


def _of_point(
    rows: Sequence[Mapping[str, Any]], task: str, sizes: Sequence[int | None]
) -> list[Mapping[str, Any]]:
    """Returns the rows of one task and training set size."""
    return [row for row in rows if row["task"] == task and row["train_size"] in sizes]


def _difference_sections(rows: Sequence[Mapping[str, Any]], *, tuned: bool) -> list[str]:
    if not rows:
        return []
    return [
        f"Differences in mean test {rows[0]['metric']} to `{rows[0]['reference']}`, with 95 % "
        f"intervals of a paired bootstrap over {_resampled(rows)}. On par: the interval includes "
        f"0. {_limits(rows, tuned=tuned)}",
        difference_table(rows),
    ]


_OVER = ("the seeds and the test examples", "the test examples", "the seeds")


def _resampled(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns what the intervals are over, and the methods for which it is less."""
    methods: dict[str, list[str]] = {over: [] for over in _OVER}
    for row in rows:
        # The metric cannot be resampled, or predictions are missing or have another score.
        over = _OVER[2] if not row["over_examples"] else _OVER[0 if row["seeds"] > 1 else 1]
        methods[over].append(f"`{row['method']}`")
    most, *fewer = (over for over in _OVER if methods[over])
    told = "; ".join(f"{over} alone for {', '.join(methods[over])}" for over in fewer)
    return f"{most} ({told})" if told else most


def _limits(rows: Sequence[Mapping[str, Any]], *, tuned: bool) -> str:
    """Returns what the intervals leave out."""
    seeds = min(row["seeds"] for row in rows)
    if seeds > 1:
        share = math.sqrt((seeds - 1) / seeds)
        limits = f"The part of {seeds} seeds is about {share:.2f} times as wide as it should be."
    else:
        limits = "With one seed the interval says nothing of others."
    return limits + (" It leaves out how the learning rates were chosen." if tuned else "")


def difference_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of the differences to the reference, with intervals."""
    return table(
        ["method", "difference", "95 % interval", "seeds", "verdict"],
        [
            [
                f"`{row['method']}`",
                f"{row['mean']:+.4f}",
                f"{row['low']:+.4f} to {row['high']:+.4f}",
                str(row["seeds"]),
                row["verdict"],
            ]
            for row in rows
        ],
    )


def _tried_sections(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "Learning rates that were tried, and their mean validation scores; the chosen one is bold. "
        "One at the edge of its grid is marked by an asterisk: a better one may lie beyond.",
        tried_table(rows),
    ]


def tried_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns a Markdown table of the learning rates that were tried, a row for each method."""
    methods: dict[str, list[str]] = {}
    for row in rows:
        value = "failed" if row["validation"] is None else number(row["validation"])
        cell = f"{row['learning_rate']:g}: {value}"
        if row["chosen"]:
            cell = f"**{cell}**" + ("\\*" if row["at_edge"] else "")
        methods.setdefault(row["method"], []).append(cell)
    most = max(map(len, methods.values()))
    cells = [[f"`{name}`", *tried, *[""] * (most - len(tried))] for name, tried in methods.items()]
    return table(["method", *["rate: validation"] * most], cells)


def _explanation(settings: Mapping[str, Any]) -> str:
    length = "steps" if settings["steps"] else "epochs"
    heads = {
        "alike": "Every method trains the same head, its pooler included where it has one.",
        "as_published": "Each method trains the head; the pooler as its preset does.",
    }[settings["heads"]]
    beyond = settings.get("tune_beyond", 0)  # earlier results have none
    tuned = (
        f" The learning rate is the best of {settings['tune_learning_rates']}"
        f"{f' and up to {beyond} beyond their ends' if beyond else ''} by the validation score of "
        f"{settings['tuning_seeds']} seed(s)."
        if settings["tune_learning_rates"] > 1
        else ""
    )
    at_once = (
        f" {settings['processes']} runs at a time, each with its share of the processors."
        if settings["processes"] > 1
        else ""
    )
    return (
        f"Backbone `{settings['backbone']}`; {length}: {_told(settings[length])}; batch size: "
        f"{_told(settings['batch_size'])}. {heads}{tuned} Each "
        "score is of the test split, with the adapter of the epoch that had the best validation "
        "score; mean and sample standard deviation over the seeds, whose number stands in "
        "parentheses. Parameters trained are in percent of all, adapter and head included. Step: "
        f"median, without those that compiled. Memory: largest of the process.{at_once}"
    )


def _told(value: Any) -> str:
    """Formats a setting; one that differs between tasks as `20 (cola), 3 (sst2)`."""
    if isinstance(value, dict):
        return ", ".join(
            f"{'-' if each is None else each} ({task})" for task, each in value.items()
        )
    return str(value)


def method_table(found: Sequence[Summary]) -> str:
    """Returns a Markdown table of the methods of one task and size."""
    header = ["method", "trained", "of all", "learning rate", found[0].metric, "step", "memory"]
    on_device = all(s.peak_device_memory is not None for s in found)
    header += ["device memory"] if on_device else []
    rows = [
        [
            f"`{s.method}`",
            f"{s.trained:,}",
            f"{s.percent:.3f} %",
            f"{s.learning_rate:g}",
            score(s),
            "-" if s.step_seconds is None else f"{1000 * s.step_seconds:,.0f} ms",
            _megabytes(s.peak_memory),
            *([_megabytes(s.peak_device_memory or 0)] if on_device else []),
            _kilobytes(s.adapter_bytes),
        ]
        for s in found
    ]
    return table([*header, "on disk"], rows)


def size_table(found: Sequence[Summary]) -> str:
    """Returns a Markdown table of the scores of one task, by method and training set size."""
    cells = {(s.method, s.size): score(s) for s in found}
    sizes = sorted({s.size for s in found})
    rows = [
        [f"`{method}`", *(cells.get((method, size), "-") for size in sizes)]
        for method in dict.fromkeys(s.method for s in found)
    ]
    return table([found[0].metric, *(f"{size:,}" for size in sizes)], rows)


def score(summary: Summary) -> str:
    """Formats mean, standard deviation and number of seeds."""
    spread = f" ± {number(summary.deviation)}" if len(summary.scores) > 1 else ""
    return f"{number(summary.mean)}{spread} ({len(summary.scores)})"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _kilobytes(size: int) -> str:
    return f"{size / 1e3:,.0f} kB"
