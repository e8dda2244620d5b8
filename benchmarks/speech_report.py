"""Tables of `benchmarks.speech`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import translation_report
from train.report import table

# Metrics that are fractions; reports have them in percent.
FRACTIONS = ("exact_match", "word_error_rate")
OURS, WHOLE, ONE = "st-2", "full", "shared"

predicted_text = translation_report.predicted_text


def by_condition(report: Mapping[str, Any], split: str, metric: str) -> dict[str, np.ndarray]:
    """Returns condition -> `[seeds, languages]` scores; fractions in percent."""
    seeds = sorted({run["seed"] for run in report["runs"]})
    factor = 100.0 if metric in FRACTIONS else 1.0
    found = {}
    for condition in dict.fromkeys(run["condition"] for run in report["runs"]):
        scores = {
            (run["seed"], language): factor * values[metric]
            for run in report["runs"]
            if run["condition"] == condition
            for language, values in run["scores"][split].items()
        }
        found[condition] = np.array(
            [[scores[seed, name] for name in report["languages"]] for seed in seeds]
        )
    return found


def stands(report: Mapping[str, Any]) -> bool | None:
    """Returns True if `st` is as good as full fine-tuning, and better than one shared adapter.

    The mean over seeds and languages has to lie within the spread of full fine-tuning over seeds,
    or above, and above that of the shared adapter, by the first metric on the first test. None if
    one of the conditions, or a second seed, is missing.
    """
    found = by_condition(report, next(iter(report["tests"])), next(iter(report["metrics"])))
    if not {OURS, WHOLE, ONE} <= found.keys() or len(found[WHOLE]) < 2:
        return None
    of_seeds = {name: scores.mean(1) for name, scores in found.items()}
    least = of_seeds[WHOLE].mean() - of_seeds[WHOLE].std(ddof=1)
    ours = of_seeds[OURS].mean()
    return bool(ours >= least and ours > of_seeds[ONE].mean())


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
    return "\n\n".join(parts) + "\n"


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
    for condition, scores in by_condition(results, split, metric).items():
        means = scores.mean(1)
        spread = f" ± {means.std(ddof=1):.1f}" if len(means) > 1 else ""
        of_it = [run for run in results["runs"] if run["condition"] == condition]
        size = np.mean([run["bytes_of_a_language"] for run in of_it])
        rows.append(
            [
                condition,
                f"{means.mean():.1f}{spread}",
                *(f"{value:.1f}" for value in scores.mean(0)),
                f"{of_it[0]['trained_parameters']:,}",
                f"{size / 1000:,.0f}",
            ]
        )
    head = ["condition", "mean", *languages, "trained weights", "kB a language"]
    return table(head, rows)
