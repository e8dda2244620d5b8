"""Tables and figure of `benchmarks.translation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record
from train import figures
from train.report import table

METRICS = ("bleu", "chrf")
# A difference in BLEU that the paper counts as a clear one.
CLEAR = 0.5
COMPARED = "ciat"


def predicted_text(predicted: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the predicted operations and minutes."""
    rows = [
        [
            row["condition"],
            str(row["runs"]),
            f"{row['flops_per_step'] / 1e9:,.1f}",
            f"{row['flops'] / 1e12:,.1f}",
            f"{row['minutes']:,.1f}",
        ]
        for row in predicted
    ]
    minutes = sum(row["minutes"] for row in predicted)
    head = ["condition", "runs", "GFLOP a step", "TFLOP", "minutes predicted"]
    return f"{table(head, rows)}\n\n{minutes:,.1f} minutes predicted"


def by_condition(report: Mapping[str, Any], metric: str) -> dict[str, record.Scores]:
    """Returns condition -> seed -> `[directions]` scores."""

    def scores_of(run: Mapping[str, Any]) -> dict[str, float]:
        return {name: values[metric] for name, values in run["scores"].items()}

    return record.by_condition(report["runs"], report["directions"], scores_of)


def wins(ours: np.ndarray, theirs: np.ndarray) -> dict[str, int]:
    """Counts the directions in which one condition is better than another, by the means of seeds.

    Args:
      ours: `[seeds, directions]` BLEU.
      theirs: `[seeds, directions]` BLEU.

    Returns:
      `better`, `clearly_better` (by more than 0.5), `beyond_spread` (by more than the sum of both
      standard deviations over seeds) and `directions`.
    """
    difference = ours.mean(0) - theirs.mean(0)
    spread = _spread(ours) + _spread(theirs)
    return {
        "better": int((difference > 0).sum()),
        "clearly_better": int((difference > CLEAR).sum()),
        "beyond_spread": int((difference > spread).sum()),
        "directions": difference.size,
    }


def _spread(scores: np.ndarray) -> np.ndarray:
    """Returns the standard deviation over seeds, `[directions]`; 0 with a single seed."""
    return scores.std(0, ddof=1) if len(scores) > 1 else np.zeros(scores.shape[1])


def stands(report: Mapping[str, Any]) -> bool | None:
    """Returns whether `ciat` beats longer training and the shared adapter in most directions.

    More than the spread over seeds counts; None if one of the three was not run, or if they have
    less than two seeds in common.
    """
    scores = by_condition(report, "bleu")
    names = (COMPARED, "longer", "shared")
    if not set(names) <= scores.keys():
        return None
    ours, *rivals = record.paired(*(scores[name] for name in names))
    if len(ours) < 2:
        return None
    counts = [wins(ours, theirs) for theirs in rivals]
    return all(2 * count["beyond_spread"] > count["directions"] for count in counts)


def report(found: Mapping[str, Any]) -> str:
    """Returns the report in Markdown."""
    parts = [_costs(found)]
    for metric in METRICS:
        scores = by_condition(found, metric)
        rows = [
            ["first stage", "1", *(f"{value:.1f}" for value in first), f"{np.mean(first):.2f}"]
            for first in _first(found, metric)
        ]
        for condition, of_seeds in scores.items():
            (values,) = record.paired(of_seeds)
            cells = [
                f"{mean:.1f} ± {spread:.1f}" if len(values) > 1 else f"{mean:.1f}"
                for mean, spread in zip(values.mean(0), _spread(values), strict=True)
            ]
            rows.append([condition, str(len(values)), *cells, f"{values.mean():.2f}"])
        name = {"bleu": "BLEU", "chrf": "chrF"}[metric]
        head = ["", "seeds", *found["directions"], "mean"]
        parts.append(f"## {name}\n\n{table(head, rows)}")
    scores = by_condition(found, "bleu")
    if COMPARED in scores:
        rows = []
        for condition, of_seeds in scores.items():
            ours, theirs = record.paired(scores[COMPARED], of_seeds)
            if condition != COMPARED and len(ours):
                count = wins(ours, theirs)
                of = count["directions"]
                keys = ("better", "clearly_better", "beyond_spread")
                told = [f"{count[key]} of {of}" for key in keys]
                if len(ours) == 1:
                    told[-1] = "-"  # one seed has no spread
                rows.append([condition, str(len(ours)), *told])
        head = [f"`{COMPARED}` against", "seeds", "better", f"by more than {CLEAR}"]
        parts.append(f"## Wins\n\n{table([*head, 'beyond the spread'], rows)}\n\n{_verdict(found)}")
    return "\n\n".join([*parts, *elsewhere_text(found)]) + "\n"


def elsewhere_text(found: Mapping[str, Any]) -> list[str]:
    """Returns a paragraph on runs that started from another first stage; none if all did not."""
    names = record.started_elsewhere(found)
    if not names:
        return []
    return [
        "These runs started from another first stage than the one in the table, which was trained "
        f"again since: {', '.join(names)}."
    ]


def _first(found: Mapping[str, Any], metric: str) -> list[list[float]]:
    """Returns the scores of the first stage, `[1, directions]`; none if it was not needed."""
    names = found["directions"]
    return [[each["scores"][name][metric] for name in names] for each in found["first"]]


def _verdict(found: Mapping[str, Any]) -> str:
    told = {
        True: "`ciat` beats both `longer` and `shared` in most directions by more than the spread.",
        False: "`ciat` does not beat both `longer` and `shared` in most directions by more than "
        "the spread.",
        None: "Nothing can be said of the claim: that needs `longer`, `shared` and `ciat` with two "
        "seeds or more.",
    }
    return told[stands(found)]


def _costs(found: Mapping[str, Any]) -> str:
    predicted = {row["condition"]: row for row in found["predicted"]}
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in (*found["first"], *found["runs"]):
        groups.setdefault(run["condition"], []).append(run)
    rows = []
    for condition, runs in groups.items():
        # The plan may be one of other seeds.
        share = len(runs) / predicted[condition]["runs"]
        rows.append(
            [
                condition,
                f"{record.of_a_seed(runs, 'trained_parameters'):,}",
                f"{record.of_a_seed(runs, 'adapter_bytes'):,}",
                f"{share * predicted[condition]['minutes']:.1f}",
                f"{sum(run['seconds'] for run in runs) / 60:.1f}",
            ]
        )
    head = ["condition", "trained numbers", "bytes on disk", "minutes predicted", "measured"]
    return f"# Translation\n\n{table(head, rows)}"


# Condition -> the preset whose colour and marker it has in every figure, and a marker of its own
# where it is a variant of that preset.
_PRESETS = {
    "longer": ("full", "s"),
    "shared": ("ciat", "s"),
    "ciat": ("ciat", None),
    "without-embeddings": ("parallel", None),
    "serial-ciat": ("serial-ciat", None),
    "compacter-ciat": ("compacter-ciat", None),
    "full": ("full", None),
    "bilingual": ("full", "^"),
}


def looks(presets: Mapping[str, tuple[str, str | None]]) -> dict[str, tuple[str, str]]:
    """Returns the colour and marker of each condition, by its preset and own marker."""
    return {
        condition: (figures.colour_of(preset), marker or figures.marker_of(preset))
        for condition, (preset, marker) in presets.items()
    }


_DRAWN = looks(_PRESETS)


def seeds_told(counts: Sequence[int]) -> str:
    """Returns the numbers of seeds of the conditions, as `1 to 3 seeds`."""
    least, most = min(counts, default=0), max(counts, default=0)
    return f"{least} to {most} seeds" if least < most else f"{most} seed{'s' * (most != 1)}"


def figure(found: Mapping[str, Any], path: Path) -> None:
    """Draws every condition in every direction, each seed as a point, as a PNG file.

    BLEU is drawn as what a condition gains over the first stage, if that is in the report.
    """
    scores = {name: record.paired(of)[0] for name, of in by_condition(found, "bleu").items()}
    first = np.array((_first(found, "bleu") or [[0.0]])[0])
    directions = found["directions"]
    drawn, axes = figures.new_figure((max(6, 0.9 * len(directions)), 4))
    places, width = np.arange(len(directions)), 0.8 / max(len(scores), 1)
    for i, (condition, values) in enumerate(scores.items()):
        at, (colour, marker) = places + (i - (len(scores) - 1) / 2) * width, _DRAWN[condition]
        gains = values - first
        flat = np.tile(at, len(gains)), gains.ravel()
        axes.plot(*flat, marker, ls="", ms=4, color=colour, label=condition)
        axes.hlines(gains.mean(0), at - width / 2, at + width / 2, color=colour)
    label = "BLEU, less that of the first stage" if first.any() else "BLEU"
    axes.set(xticks=places, xticklabels=directions, ylabel=label)
    settings, counts = found.get("settings", {}), [len(values) for values in scores.values()]
    model = "M2M-100 from random weights"
    if "d_model" in settings:
        model += (
            f", {settings['layers']} and {settings['layers']} layers {settings['d_model']} wide"
        )
    axes.set_title(
        f"Directions of translation: {model}\n"
        f"{seeds_told(counts)}: a point for each, a line for their mean"
    )
    drawn.legend(loc="outside upper center", ncols=4)
    figures.save(drawn, path)
