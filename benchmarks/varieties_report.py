"""Tables, intervals and figure of `benchmarks.varieties`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.varieties_tagging import score
from train import figures
from train.report import table

RESAMPLES = 2000
_COLOURS = (figures.GREY, figures.BLUE, figures.ORANGE, figures.GREEN, figures.PURPLE, figures.TEAL)


def predicted_text(planned: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the predicted operations, passes and minutes."""
    rows = [
        [
            row["what"],
            str(row["runs"]),
            f"{row['flops'] / 1e12:,.2f}",
            f"{row['passes']:.1f}" if "passes" in row else "-",
            f"{row['minutes']:,.1f}",
        ]
        for row in planned
    ]
    head = ["", "runs", "TFLOP", "forward passes a sentence", "minutes predicted"]
    total = sum(row["minutes"] for row in planned)
    return f"{table(head, rows)}\n\n{total:,.1f} minutes predicted"


def line(key: str, cell: Mapping[str, Any]) -> str:
    """Returns a line on a cell for the console."""
    more = ""
    if "entropy_before" in cell:
        more = f", entropy {cell['entropy_before']:.3f} -> {cell['entropy_after']:.3f}"
    return f"{key}: {cell['score']:.4f} of {cell['sentences']} sentences{more}"


def counts_of(
    report: Mapping[str, Any], variety: str, condition: str, split: str
) -> dict[str, np.ndarray]:
    """Returns seed -> `[sentences, k]` counts of a condition, of the seeds that have it."""
    found = {
        seed: report["cells"].get(f"{seed}/{variety}/{split}/{condition}")
        for seed in report["adapters"]
    }
    return {seed: np.array(cell["counts"]) for seed, cell in found.items() if cell is not None}


def compared(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, float] | None:
    """Compares two conditions as `paired`, by the seeds that both have; None if there are none."""
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    return paired(*(np.array([each[seed] for seed in seeds]) for each in (ours, theirs)))


def scores(counts: np.ndarray) -> np.ndarray:
    """Returns the scores `[seeds]` of counts `[seeds, sentences, k]`."""
    return np.array([score(each) for each in counts])


def paired(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Compares two conditions by a paired percentile bootstrap over sentences.

    Args:
      ours: `[seeds, sentences, k]` counts.
      theirs: the same; where one has more sentences, the first ones of both are compared.

    Returns:
      `difference` of the mean scores over seeds, and `low` and `high` of its 95 % interval.
    """
    count = min(ours.shape[1], theirs.shape[1])
    ours, theirs = ours[:, :count], theirs[:, :count]
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    found = [
        np.einsum("rs,esk->rek", drawn, each, optimize=True).astype(float)
        for each in (ours, theirs)
    ]
    differences = (_scores_of_sums(found[0]) - _scores_of_sums(found[1])).mean(1)
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "difference": float((scores(ours) - scores(theirs)).mean()),
        "low": float(low),
        "high": float(high),
    }


def _scores_of_sums(sums: np.ndarray) -> np.ndarray:
    """Returns the scores `[…]` of summed counts `[…, k]`, as `score`."""
    if sums.shape[-1] == 2:
        return sums[..., 0] / np.maximum(sums[..., 1], 1)
    return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1)


def chosen(report: Mapping[str, Any], prefix: str = "") -> str | None:
    """Returns the setting of EMEA that is best on the validation split of left-out languages.

    Args:
      report: the report.
      prefix: `compacter-` for these adapters.

    Returns:
      The condition; None if no cell on a validation split is there. The best has the largest mean
      gain over equal weights, on the same sentences.
    """
    names = _conditions(report, "validation")
    means = {}
    for name in names:
        if not name.startswith(f"{prefix}entropy-"):
            continue
        gains = [
            compared(
                counts_of(report, variety, name, "validation"),
                counts_of(report, variety, f"{prefix}equal", "validation"),
            )
            for variety in report["left_out"]
        ]
        if any(gains):
            means[name] = float(np.mean([each["difference"] for each in gains if each]))
    return max(means, key=lambda name: means[name]) if means else None


def _conditions(report: Mapping[str, Any], split: str) -> list[str]:
    keys = [key.split("/") for key in report["cells"]]
    return list(dict.fromkeys(condition for _, _, of, condition in keys if of == split))


def claims(report: Mapping[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Returns, for each claim and variety, a difference and its interval.

    `mixture` compares equal weights with the adapter of the language that the task was trained on,
    or, where that is not there, with the first; `emea` the chosen setting of EMEA with equal
    weights. `best` compares equal weights with the single adapter that turned out best.
    """
    found: dict[str, dict[str, dict[str, float]]] = {"mixture": {}, "best": {}, "emea": {}}
    setting = chosen(report)
    for variety in (*report["varieties"], *report["left_out"]):
        equal = counts_of(report, variety, "equal", "test")
        singles = [counts_of(report, variety, f"only-{n}", "test") for n in report["languages"]]
        pairs = {}
        if singles := [each for each in singles if each]:
            pairs["mixture"] = equal, singles[0]
            pairs["best"] = equal, max(singles, key=lambda counts: _scores_of(counts).mean())
        if setting is not None:
            pairs["emea"] = counts_of(report, variety, setting, "test"), equal
        for claim, both in pairs.items():
            if (difference := compared(*both)) is not None:
                found[claim][variety] = difference
    return found


def report(found: Mapping[str, Any]) -> str:
    """Returns the report in Markdown."""
    varieties = [*found["varieties"], *found["left_out"]]
    rows = []
    for condition in _conditions(found, "test"):
        cells = []
        for variety in varieties:
            counts = counts_of(found, variety, condition, "test")
            cells.append(_cell(counts, len(found["adapters"])) if counts else "-")
        rows.append([f"`{condition}`", *cells])
    parts = ["# Varieties", table(["", *varieties], rows)]
    setting = chosen(found)
    parts.append(f"Chosen on validation splits of left-out languages: `{setting}`.")
    titles = {
        "mixture": f"equal weights less the adapter `{found['languages'][0]}`",
        "best": "equal weights less the adapter that turned out best",
        "emea": f"`{setting}` less equal weights",
    }
    for claim, of_varieties in claims(found).items():
        rows = [
            [name, *(f"{100 * each[key]:+.2f}" for key in ("difference", "low", "high"))]
            for name, each in of_varieties.items()
        ]
        head = ["variety", "difference in points", "95 % from", "to"]
        above = sum(each["low"] > 0 for each in of_varieties.values())
        below = sum(each["high"] < 0 for each in of_varieties.values())
        told = f"Above 0 with its interval in {above} of {len(rows)}, below in {below}."
        parts.append(f"## {titles[claim]}\n\n{table(head, rows)}\n\n{told}")
    sizes = {
        kind: each
        for kind, each in next(iter(found["adapters"].values()), {}).items()
        if not kind.endswith("/task")
    }
    rows = [
        [
            name,
            *(f"{each[key]:,}" for key in ("trained_parameters", "bytes")),
            f"{each['validation']['loss']:.3f}",
            f"{each['seconds']:.0f}",
        ]
        for name, each in sizes.items()
    ]
    head = ["language adapter", "trained numbers", "bytes", "loss of masked words", "seconds"]
    parts.append(table(head, rows))
    return "\n\n".join([*parts, predicted_text(found["predicted"])]) + "\n"


def _scores_of(counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the scores `[seeds]` of the result of `counts_of`."""
    return scores(np.array(list(counts.values())))


def _cell(counts: Mapping[str, np.ndarray], seeds: int) -> str:
    """Returns mean, spread and sentences, and the number of seeds if others have more."""
    values, sentences = _scores_of(counts), len(next(iter(counts.values())))
    spread = f" ± {100 * values.std(ddof=1):.1f}" if len(values) > 1 else ""
    fewer = f", {len(values)} of {seeds} seeds" if len(values) < seeds else ""
    return f"{100 * values.mean():.1f}{spread} ({sentences}{fewer})"


def figure(found: Mapping[str, Any], path: Path) -> None:
    """Draws the main conditions of every variety on the test split as a PNG file.

    Each seed is a point, and the mean over seeds a line. All are of the same sentences, those that
    every condition has.
    """
    varieties = [*found["varieties"], *found["left_out"]]
    names = ["none", f"only-{found['languages'][0]}", "equal", chosen(found), "labels", "joint"]
    drawn, axes = figures.new_figure((max(6, 1.1 * len(varieties)), 3.8))
    places, width = np.arange(len(varieties)), 0.8 / len(names)
    for place, variety in zip(places, varieties, strict=True):
        counts = [counts_of(found, variety, str(name), "test") for name in names]
        least = min(len(each) for of_it in counts for each in of_it.values())
        for at, of_it in enumerate(counts):
            if not of_it:
                continue
            values = 100 * scores(np.array([each[:least] for each in of_it.values()]))
            x = place + (at - (len(names) - 1) / 2) * width
            label = None if names[at] in axes.get_legend_handles_labels()[1] else names[at]
            axes.plot(np.full(len(values), x), values, "o", ms=4, color=_COLOURS[at], label=label)
            axes.hlines(values.mean(), x - width / 2, x + width / 2, color=_COLOURS[at])
    unit = "F1 of entities" if found["settings"]["task"] == "ner" else "accuracy"
    axes.set(xticks=places, xticklabels=varieties, ylabel=f"{unit} in %")
    seeds, backbone = len(found["adapters"]), Path(found["settings"]["backbone"]).name
    axes.set_title(
        f"{backbone}, tags of varieties without an adapter\n"
        f"{seeds} seed{'s' * (seeds != 1)}: a point for each, a line for their mean"
    )
    drawn.legend(loc="outside upper center", ncols=3)
    figures.save(drawn, path)
