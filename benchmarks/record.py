"""Results of an experiment in one JSON file, to which several commands add."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from benchmarks import commands
from train.report import write_json

# Settings that do not change what a run is.
FREE = frozenset(
    ("seeds", "conditions", "eval_batch_size", "flops_per_second", "json", "output_dir")
)
# Scores of a condition: seed -> `[names]`, one for each direction or language.
Scores = dict[int, np.ndarray]


class Reporting(Protocol):
    """A module that describes the results of an experiment."""

    def report(self, found: Mapping[str, Any], /) -> str:
        """Returns the results in Markdown."""

    def figure(self, found: Mapping[str, Any], path: Path, /) -> None:
        """Draws the results as a PNG file."""


class Run(Protocol):
    """A run of `fit`: the folder of its results, and the backbone that it starts from."""

    folder: Path
    backbone: Path
    condition: str

    @property
    def is_first(self) -> bool:
        """True for a run that makes a backbone for others."""


def opened(
    path: Path, settings: Mapping[str, Any], free: Collection[str], empty: dict[str, Any]
) -> dict[str, Any]:
    """Returns the results in a file, or `empty` if there is none.

    Args:
      path: the file.
      settings: the settings of this command, by the names of its options.
      free: names of settings that may differ from those of the file.
      empty: the results of an experiment that has not begun.

    Raises:
      ValueError: if the file has results of other settings, or is no file of results.
    """
    if not path.exists():
        return empty
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before, missing = dict(report["settings"]), empty.keys() - report.keys()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of results; give another --json") from error
    if missing:
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}; give another --json")
    for name, value in settings.items():
        if name not in free and before.get(name, value) != value:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{path} has results with {flag} {before[name]}, not {value}; give the same to go "
                "on, or another --json and --output-dir"
            )
    return report


def run_all(
    report: dict[str, Any],
    output: Path,
    planned: Sequence[Any],
    root: Path,
    flags_of: Callable[[Any], Sequence[Any]],
    evaluated: Callable[[Any], dict[str, Any]],
) -> None:
    """Fits and evaluates the runs that a report lacks, and writes the report after each.

    Every result has the beginning of the SHA-256 hash of the weights that its run started
    from, so that it can be seen whether all started from the same.

    Args:
      report: the report, with lists `first` and `runs`, to which results are added.
      output: the file of the report.
      planned: the runs, each after the one whose backbone it starts from.
      root: the folder of the experiment; a run's name is its folder below it.
      flags_of: the flags of `fit` for a run, without its folder.
      evaluated: the result of a run that is done.
    """
    for run in missing(report, planned, root):
        commands.fit_once(run.folder, flags_of(run))
        name, start = _name(run, root), weights_hash(run.backbone)
        result = {"run": name, "start": start, **evaluated(run)}
        if run.is_first:
            result["weights"] = weights_hash(run.folder / "backbone")
            others = [each for each in report["first"] if each["run"] != name]
            report["first"] = [*others, result]
        else:
            report["runs"].append(result)
        write_json(output, report)


def describe(report: Mapping[str, Any], output: Path, reporting: Reporting) -> None:
    """Prints the tables of a report, and writes them and its figure beside its file.

    Args:
      report: the report.
      output: the file of the report; the tables end in .md, the figure in .png.
      reporting: the module of the experiment's tables and figure.
    """
    text = reporting.report(report)
    output.with_suffix(".md").write_text(text, encoding="utf-8")
    reporting.figure(report, output.with_suffix(".png"))
    print(f"\n{text}")


def missing(report: Mapping[str, Any], planned: Sequence[Any], root: Path) -> list[Any]:
    """Returns the runs that a report lacks, and the first stages that these start from."""
    there = {each["run"] for each in report["runs"]}
    left = [run for run in planned if not run.is_first and _name(run, root) not in there]
    starts = {run.backbone for run in left}
    return [run for run in planned if run in left or run.folder / "backbone" in starts]


def _name(run: Run, root: Path) -> str:
    return run.folder.relative_to(root).as_posix()


def weights_hash(backbone: Path) -> str:
    """Returns the first 16 hexadecimal digits of the SHA-256 hash of a backbone's weights."""
    with (backbone / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def started_elsewhere(report: Mapping[str, Any]) -> list[str]:
    """Returns the names of runs from other weights than those of the report's first stages.

    That is so if a first stage was trained again and did not end with the same bits, as on a
    processor of another kind. Runs from what a first stage started from are not among them.
    """
    known = {each[key] for each in report["first"] for key in ("weights", "start")}
    return [run["run"] for run in report["runs"] if known and run["start"] not in known]


def merged_plan(
    before: Iterable[Mapping[str, Any]], now: Iterable[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns the rows of two plans by condition; of a condition in both, the row of `now`."""
    rows = {row["condition"]: dict(row) for row in (*before, *now)}
    return list(rows.values())


def by_condition(
    runs: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    scores_of: Callable[[Mapping[str, Any]], Mapping[str, float]],
) -> dict[str, Scores]:
    """Returns the scores of every condition, of those seeds that have all of them.

    Args:
      runs: results with `condition` and `seed`.
      names: the directions or languages.
      scores_of: the scores of a result by direction or language.
    """
    found: dict[str, dict[int, dict[str, float]]] = {}
    for run in runs:
        of_seed = found.setdefault(run["condition"], {}).setdefault(run["seed"], {})
        of_seed.update(scores_of(run))
    whole = {
        condition: {
            seed: np.array([scores[name] for name in names])
            for seed, scores in sorted(of_it.items())
            if scores.keys() >= set(names)
        }
        for condition, of_it in found.items()
    }
    return {condition: scores for condition, scores in whole.items() if scores}


def paired(*conditions: Scores) -> list[np.ndarray]:
    """Returns `[seeds, names]` scores of each condition, of the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(each) for each in conditions)))
    return [np.array([each[seed] for seed in seeds]) for each in conditions]


def of_a_seed(runs: Iterable[Mapping[str, Any]], key: str) -> float:
    """Returns what the runs of one seed of a condition have together, as of trained numbers.

    A seed of which some runs are still missing has less than the others, so the largest sum counts.

    Args:
      runs: the results of a condition.
      key: what to add up.
    """
    sums: dict[int, float] = {}
    for run in runs:
        sums[run["seed"]] = sums.get(run["seed"], 0) + run[key]
    return max(sums.values())
