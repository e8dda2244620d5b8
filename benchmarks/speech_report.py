"""Tables of `benchmarks.speech`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import record, translation_report
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
        of_it = [run for run in results["runs"] if run["condition"] == condition]
        size = np.mean([run["bytes_of_a_language"] for run in of_it])
        rows.append(
            [
                condition,
                str(len(means)),
                f"{means.mean():.1f}{spread}",
                *(f"{value:.1f}" for value in scores.mean(0)),
                f"{of_it[0]['trained_parameters']:,}",
                f"{size / 1000:,.0f}",
            ]
        )
    head = ["condition", "seeds", "mean", *languages, "trained weights", "kB a language"]
    return table(head, rows)
