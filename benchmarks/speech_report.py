"""Tables and figure of `benchmarks.speech`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import record, translation_report
from train import figures
from train.report import table

# Metrics that are fractions; reports have them in percent.
FRACTIONS = ("exact_match", "word_error_rate")
OURS, WHOLE, ONE = "st-2", "full", "shared"

predicted_text = translation_report.predicted_text


def by_condition(report: Mapping[str, Any], split: str, metric: str) -> dict[str, record.Scores]:
    """Returns condition -> seed -> `[languages]` scores; fractions in percent."""
    factor = 100.0 if metric in FRACTIONS else 1.0

    def scores_of(run: Mapping[str, Any]) -> dict[str, float]:
        return {name: factor * values[metric] for name, values in run["scores"][split].items()}

    return record.by_condition(report["runs"], list(report["languages"]), scores_of)


def stands(report: Mapping[str, Any]) -> bool | None:
    """Returns True if `st` is as good as full fine-tuning, and better than one shared adapter.

    The mean over seeds and languages has to lie within the spread of full fine-tuning over seeds,
    or above, and above that of the shared adapter, by the first metric on the first test. None if
    one of the conditions is missing, or they have less than two seeds in common.
    """
    found = by_condition(report, next(iter(report["tests"])), next(iter(report["metrics"])))
    if not {OURS, WHOLE, ONE} <= found.keys():
        return None
    compared = record.paired(*(found[name] for name in (OURS, WHOLE, ONE)))
    if len(compared[0]) < 2:
        return None
    ours, whole, one = (scores.mean(1) for scores in compared)
    least = whole.mean() - whole.std(ddof=1)
    return bool(ours.mean() >= least and ours.mean() > one.mean())


def report(results: Mapping[str, Any]) -> str:
    """Returns the tables of an experiment, in Markdown."""
    parts = [results["title"]]
    for split, described in results["tests"].items():
        for metric, name in results["metrics"].items():
            parts.append(f"{name}, {described}\n\n{_table(results, split, metric)}")
    parts += [_first(results, run) for run in results["first"]]
    outcome = {True: "stands", False: "does not stand", None: "was not tested by these runs"}
    parts.append(
        "The claim that adapters reach full fine-tuning, and more than a shared adapter, "
        f"{outcome[stands(results)]}."
    )
    return "\n\n".join([*parts, *translation_report.elsewhere_text(results)]) + "\n"


def _first(results: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """Returns a line of the scores of a first stage, means over its languages."""
    metrics = dict([next(iter(results["metrics"].items()))])
    # A recogniser is read by its errors; of translations they say little.
    if run["scores"][next(iter(results["tests"]))].keys() == {"en"}:
        metrics["word_error_rate"] = "word error rate in %"
    told = []
    for split, described in results["tests"].items():
        for metric, name in metrics.items():
            factor = 100.0 if metric in FRACTIONS else 1.0
            scores = [factor * each[metric] for each in run["scores"][split].values()]
            told.append(f"{name} {np.mean(scores):.1f} ({described})")
    return f"{run['condition']}: {', '.join(told)}"


def _table(results: Mapping[str, Any], split: str, metric: str) -> str:
    languages = list(results["languages"])
    rows = []
    for condition, of_seeds in by_condition(results, split, metric).items():
        (scores,) = record.paired(of_seeds)
        means = scores.mean(1)
        spread = f" ± {means.std(ddof=1):.1f}" if len(means) > 1 else ""
        of_it = _runs_of(results, condition)
        size = np.mean([run["bytes_of_a_language"] for run in of_it])
        rows.append(
            [
                condition,
                str(len(means)),
                f"{means.mean():.1f}{spread}",
                *(f"{value:.1f}" for value in scores.mean(0)),
                f"{record.of_a_seed(of_it, 'trained_parameters'):,}",
                f"{size / 1000:,.0f}",
            ]
        )
    head = ["condition", "seeds", "mean", *languages, "trained weights", "kB a language"]
    return table(head, rows)


def _runs_of(results: Mapping[str, Any], condition: str) -> list[Mapping[str, Any]]:
    return [run for run in results["runs"] if run["condition"] == condition]


# Condition -> colour and marker: those of its preset in every figure, or a variant's own marker.
_DRAWN = translation_report.looks(
    {
        "longer": ("full", "s"),
        "st-2": ("st", None),
        "st-8": ("st", "s"),
        "compacter-st": ("compacter-st", None),
        "shared": ("st", "^"),
        "decoder": ("head-only", None),
        "full": ("full", None),
        "recogniser-adapters": ("st", "D"),
        "recogniser-cross": ("st", "X"),
        "recogniser-full": ("full", "D"),
    }
)


def figure(results: Mapping[str, Any], path: Path) -> None:
    """Draws scores against trained weights, a panel for each test, as a PNG file.

    A point is the mean over languages of one seed, by the first metric. A dashed line is the
    translator before the conditions.
    """
    metric, label = next(iter(results["metrics"].items()))
    tests = results["tests"]
    drawn, panels = figures.new_figure(
        (4.6 * len(tests), 4.4), 1, len(tests), squeeze=False, sharex=True
    )
    for axes, (split, described) in zip(panels[0], tests.items(), strict=True):
        for condition, of_seeds in by_condition(results, split, metric).items():
            colour, marker = _DRAWN[condition]
            means = record.paired(of_seeds)[0].mean(1)
            trained = record.of_a_seed(_runs_of(results, condition), "trained_parameters")
            axes.plot([trained] * len(means), means, marker, ms=5, color=colour, label=condition)
        for first in results["first"]:
            scores = [each[metric] for each in first["scores"][split].values()]
            if first["condition"] == "translator":
                level = np.mean(scores) * (100 if metric in FRACTIONS else 1)
                axes.axhline(level, ls="--", lw=1, color=figures.GREY, label="translator")
        axes.set(xscale="log", xlabel="trained weights, all languages", ylabel=label)
        axes.set_title(described)
    settings = results.get("settings", {})
    model = "Speech2Text from random weights"
    if "d_model" in settings:
        layers = f"{settings['encoder_layers']} and {settings['decoder_layers']} layers"
        model += f", {layers} {settings['d_model']} wide"
    counts = [len(seeds) for seeds in by_condition(results, next(iter(tests)), metric).values()]
    told = f"{translation_report.seeds_told(counts)}, a point for each run"
    drawn.suptitle(f"Adapters for languages of speech: {model}; {told}", fontsize=10)
    handles, names = panels[0][0].get_legend_handles_labels()
    drawn.legend(handles, names, loc="outside lower center", ncols=4)
    figures.save(drawn, path)
