"""Tables of `benchmarks.speech`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import translation_report
from train.report import table

SPLITS = {"known": "speakers of training", "new": "a new speaker"}
METRICS = {"exact_match": "exact matches in %", "chrf": "chrF"}
OURS, WHOLE, ONE = "st-2", "full", "shared"

predicted_text = translation_report.predicted_text


def by_condition(report: Mapping[str, Any], split: str, metric: str) -> dict[str, np.ndarray]:
    """Returns condition -> `[seeds, languages]` scores; exact matches in percent."""
    seeds = sorted({run["seed"] for run in report["runs"]})
    factor = 100.0 if metric == "exact_match" else 1.0
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

    The mean of exact matches of known speakers over seeds and languages has to lie within the
    spread of full fine-tuning over seeds, or above, and above that of the shared adapter. None if
    one of the conditions, or a second seed, is missing.
    """
    found = by_condition(report, "known", "exact_match")
    if not {OURS, WHOLE, ONE} <= found.keys() or len(found[WHOLE]) < 2:
        return None
    of_seeds = {name: scores.mean(1) for name, scores in found.items()}
    least = of_seeds[WHOLE].mean() - of_seeds[WHOLE].std(ddof=1)
    ours = of_seeds[OURS].mean()
    return bool(ours >= least and ours > of_seeds[ONE].mean())


def report(results: Mapping[str, Any]) -> str:
    """Returns the tables of an experiment, in Markdown."""
    parts = []
    for split, speakers in SPLITS.items():
        for metric, name in METRICS.items():
            parts.append(f"{name}, new numbers, {speakers}\n\n{_table(results, split, metric)}")
    for run in results["first"]:
        told = [
            f"{split} {np.mean([100 * each['exact_match'] for each in scores.values()]):.1f}"
            for split, scores in run["scores"].items()
        ]
        parts.append(f"exact matches of the {run['condition']} in %: {', '.join(told)}")
    outcome = {True: "stands", False: "does not stand", None: "was not tested by these runs"}
    parts.append(
        "The claim that adapters reach full fine-tuning, and more than a shared adapter, "
        f"{outcome[stands(results)]}."
    )
    return "\n\n".join(parts) + "\n"


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
