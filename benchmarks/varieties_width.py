r"""Width of language adapters, chosen on validation sentences of languages that are left out.

    python -m benchmarks.varieties_width --reduction-factors 2 1 8 32 --validation-sentences 200 \
        --backbone runs/e5 --tagging tagging --ntrex ntrex.parquet --group 1 --layers 4 \
        --output-dir runs/widths

Language adapters and the task's are trained for every width, and each language but the task's is
tagged without its own adapter, by equal weights of the others. All other flags are those of
`benchmarks.varieties`, as are the files; no test sentence is read. Every width has a file
`width-N.json`, and the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import varieties, varieties_report
from train.report import table, write_json

CONDITION, SPLIT = "equal", "validation"


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains and judges every width, and prints and writes the report.

    Raises:
      SystemExit: with code 2 for bad flags.
    """
    flags = parser()
    options, others = flags.parse_known_args(arguments)
    root = options.output_dir
    own = ["--adapters", varieties.DENSE, "--splits", SPLIT, "--output-dir", str(root)]
    files = {factor: root / f"width-{factor}.json" for factor in options.reduction_factors}
    given = [
        [*others, *own, "--reduction-factor", str(factor), "--json", str(file)]
        for factor, file in files.items()
    ]
    # All flags are read before the first width is trained, which takes long.
    for each in given:
        varieties.parsed(each)
    for each in given:
        varieties.main(each)
    reports = {str(factor): json.loads(file.read_text("utf-8")) for factor, file in files.items()}
    found = {"widths": reports}
    output = options.json or root / "widths.json"
    write_json(output, found)
    text = report(found)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"\n{text}")


def report(found: Mapping[str, Any]) -> str:
    """Returns the table of the widths in Markdown, and the one with the best mean.

    Each is compared with the first width by a paired bootstrap over the sentences of a language.
    """
    reports: dict[str, Any] = found["widths"]
    first = next(iter(reports.values()))
    left_out = first["left_out"]
    rows, means = [], {}
    for factor, each in reports.items():
        means[factor] = mean_of(each)
        cells = [_compared(each, first, language) for language in left_out]
        rows.append([factor, *_sizes(each), *cells, f"{100 * means[factor]:.2f}"])
    head = ["reduction", "bytes a language", "loss of masked words", *left_out, "mean"]
    best = max(means, key=lambda factor: means[factor])
    seeds = len(first["adapters"])
    told = (
        f"Accuracy or F1 in % of equal weights, seeds: {seeds}; in brackets the 95 % interval of "
        f"the difference from the first row. The best mean is that of reduction {best}."
    )
    return f"# Width of language adapters\n\n{table(head, rows)}\n\n{told}\n"


def mean_of(report: Mapping[str, Any]) -> float:
    """Returns the mean score of a width over the languages that are left out, and seeds."""
    scores = [
        varieties_report.scores(np.array(list(_counts(report, language).values()))).mean()
        for language in report["left_out"]
    ]
    return float(np.mean(scores))


def _counts(report: Mapping[str, Any], language: str) -> dict[str, np.ndarray]:
    return varieties_report.counts_of(report, language, CONDITION, SPLIT)


def _compared(ours: Mapping[str, Any], first: Mapping[str, Any], language: str) -> str:
    """Returns the score of a language, and the interval of its distance from the first width."""
    counts = _counts(ours, language)
    score = varieties_report.scores(np.array(list(counts.values()))).mean()
    difference = varieties_report.compared(counts, _counts(first, language))
    if ours is first or difference is None:
        return f"{100 * score:.2f}"
    low, high = (100 * difference[key] for key in ("low", "high"))
    return f"{100 * score:.2f} ({low:+.2f} to {high:+.2f})"


def _sizes(report: Mapping[str, Any]) -> list[str]:
    """Returns the bytes of a language's adapter, and the mean loss of masked words."""
    adapters = [
        adapter
        for of_seed in report["adapters"].values()
        for name, adapter in of_seed.items()
        if not name.endswith("/task")
    ]
    losses = [each["validation"]["loss"] for each in adapters]
    return [f"{adapters[0]['bytes']:,}", f"{np.mean(losses):.3f}"]


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the flags that `benchmarks.varieties` has not."""
    description = (__doc__ or "").partition("\n")[0]
    add = argparse.ArgumentParser(
        prog="python -m benchmarks.varieties_width",
        description=description,
        epilog="All other flags are those of benchmarks.varieties, some of them required.",
        allow_abbrev=False,
    )
    add.add_argument("--reduction-factors", type=int, nargs="+", default=[2, 1, 8, 32])
    add.add_argument("--output-dir", type=Path, required=True)
    add.add_argument("--json", type=Path)
    return add


if __name__ == "__main__":
    main()
