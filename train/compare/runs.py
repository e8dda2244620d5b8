"""Command `compare`: every method with every seed, each run in its own process."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compacter_jax.messages import listing
from train.cli.method_flags import given_options
from train.compare import report
from train.compare.differences import differences
from train.compare.options import CompareOptions
from train.compare.plan import Point, in_order, joined, points
from train.compare.single_run import Run
from train.compare.tuning import Choice, tune
from train.compare.workers import side_by_side
from train.errors import FailedRunsError, InterruptedRunError
from train.fingerprints import files_read
from train.fit.run_folder import check_apart, clear
from train.fit.run_record import FLAGS_NAME, FORMAT_VERSION, OUTPUT_NAME, entries
from train.folders import alone
from train.report import write_json

_ROOT = Path(__file__).parents[1]
# Files in the folder of a comparison, beside its reports.
_RECORD_NAME, _RUNS_LOCK_NAME = "compare.json", ".runs.lock"


def compare(each: Sequence[CompareOptions]) -> None:
    """Runs what is not finished yet, then writes the report.

    Args:
      each: the options for each task, which a configuration may vary.

    Raises:
      ValueError: for invalid options, before anything is run.
      FailedRunsError: at the end, if a run failed; the others are reported.
      InterruptedRunError: on Ctrl-C; the same command continues.
    """
    options, found = joined(each), points(each)
    if not found:
        raise ValueError(f"--train-size {options.train_size} leaves nothing to train on")
    _check_finished([run for point in found for run in _possible(point)], options)
    folder = options.output_dir
    if folder.is_file():
        raise ValueError(f"{folder} is a file; choose another --output-dir")
    _check_folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    # The runs inherit the second lock, so that a comparison waits for runs of a killed one.
    left = f"waiting for another comparison, or a run left of it, in {folder}"
    with alone(folder), alone(folder, _RUNS_LOCK_NAME, waiting=left) as lock:
        _check_folder(options)
        write_json(folder / _RECORD_NAME, {"format_version": FORMAT_VERSION})
        choices, failures = tune(
            [point for point in found if point.rates],
            lambda runs: _run_all(runs, options, lock),
        )
        runs_of = {
            point: point.runs(choices[point].rate if point in choices else None)
            for point in found
            if point not in choices or choices[point].rate is not None
        }
        runs = in_order(run for runs in runs_of.values() for run in runs)
        failures |= _run_all(runs, options, lock)
        _write(each, runs_of, choices, failures)
    if failures:
        listed = "; ".join(f"{run.name}: {reason}" for run, reason in failures.items())
        of = len({*runs, *failures})
        raise FailedRunsError(f"{len(failures)} of {of} runs failed: {listed}")


def _possible(point: Point) -> list[Run]:
    """Returns the runs of a point at every learning rate."""
    return [run for rate in point.reachable_rates or (None,) for run in point.runs(rate)]


def _write(
    each: Sequence[CompareOptions],
    runs_of: Mapping[Point, Sequence[Run]],
    choices: Mapping[Point, Choice],
    failures: Mapping[Run, str],
) -> None:
    """Writes results.json and the report, if a run is finished."""
    runs = in_order(run for runs in runs_of.values() for run in runs)
    records = [run.record() for run in runs if run.finished()]
    if not records:
        return
    options = joined(each)
    results = {
        "settings": _settings(each),
        "runs": records,
        "differences": differences(runs_of, options.reference),
        "tried": [row for choice in choices.values() for row in choice.records()],
        "failed": [{"run": run.name, "reason": reason} for run, reason in failures.items()],
    }
    write_json(options.output_dir / "results.json", results)
    report.write(results, options.output_dir)
    print(f"report: {options.output_dir / 'report.md'}")


def _check_finished(runs: Sequence[Run], options: CompareOptions) -> None:
    """Raises ValueError if a finished run had other settings, unless it is to be replaced."""
    others = [run for run in runs if run.finished() and not run.same_flags()]
    if others and not options.overwrite:
        raise ValueError(
            f"{others[0].folder} and {len(others) - 1} more hold finished runs with other "
            "settings; choose another --output-dir, or train them again with --overwrite"
        )


def _check_folder(options: CompareOptions) -> None:
    """Checks the output folder without writing anything.

    Raises:
      ValueError: if it is not empty and holds no comparison, or if an input file lies where runs
        are written.
    """
    folder = options.output_dir
    check_apart([folder / "runs"], files_read(options))
    if (folder / _RECORD_NAME).is_file() or not entries(folder):
        return
    # Comparisons of earlier versions have no record.
    if not any(folder.glob(f"runs/*/*/*/**/seed-*/{FLAGS_NAME}")):
        raise ValueError(
            f"{folder} is not empty and holds no comparison ({listing(entries(folder), 3)}); "
            "choose another --output-dir"
        )


def _run_all(runs: Sequence[Run], options: CompareOptions, lock: int) -> dict[Run, str]:
    """Trains the unfinished runs; returns the reasons of failed runs."""
    failures: dict[Run, str] = {}
    # A run of another comparison may have finished while this one waited for it.
    done = [run for run in runs if run.finished() and run.same_flags()]
    left = [run for run in runs if run not in done]
    number = len(done)
    if done:
        print(f"{number} of {len(runs)} runs are finished already")
    groups = _together(left, options.at_once)
    ends = side_by_side(groups, lambda runs: _start(runs, options, lock), options.processes)
    try:
        for together, code in ends:
            reason = _ended(together, code, options)
            for run in together:
                number += 1
                left.remove(run)
                if reason and not run.finished():
                    failures[run] = reason
                    outcome = f"failed: {reason}"
                else:
                    done.append(run)
                    record = run.record()
                    score = record["test"][record["metric"]]
                    outcome = f"test {record['metric']} {score:.4f} in {record['seconds']:.0f} s"
                rest = _duration(_seconds_left(done, left, options.processes))
                print(f"[{number}/{len(runs)}] {run.name}: {outcome}; {rest}", flush=True)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"interrupted with {len(left)} of {len(runs)} runs left; the same command goes on with "
            "them"
        ) from None
    return failures


def _together(runs: Sequence[Run], most: int) -> list[list[Run]]:
    """Returns groups of at most `most` runs that differ only in the seed."""
    groups: dict[Any, list[list[Run]]] = {}
    ordered: list[list[Run]] = []
    for run in runs:
        of_method = groups.setdefault(run.point, [])
        if not of_method or len(of_method[-1]) == most:
            of_method.append([])
            ordered.append(of_method[-1])
        of_method[-1].append(run)
    return ordered


def _start(runs: Sequence[Run], options: CompareOptions, lock: int) -> subprocess.Popen[bytes]:
    """Starts a process that trains `runs`."""
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        run.clear()
        write_json(run.folder / FLAGS_NAME, list(run.flags))
    with _log(runs).open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "train", "fit", *_flags(runs)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(options.output_dir),
            pass_fds=(lock,),
        )


def _ended(runs: Sequence[Run], code: int, options: CompareOptions) -> str | None:
    """Cleans up after the process of `runs`; returns the reason of its failure, or None."""
    for run in runs:
        unwanted = ["checkpoints"]
        if run.finished() and not options.keep_adapters:
            unwanted.append("adapter")
        clear(run.folder, unwanted)
    if all(run.finished() for run in runs):
        return None
    log = _log(runs)
    if code == 0:
        return f"terminated before its end, see {log}"  # the exit code of a run after SIGTERM
    if code < 0:
        return f"ended by signal {-code}, see {log}"
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"


def _log(runs: Sequence[Run]) -> Path:
    """Returns the path of the log of the process of `runs`."""
    return runs[0].folder / OUTPUT_NAME


def _flags(runs: Sequence[Run]) -> list[str]:
    """Returns the flags of one `fit` for all of the runs."""
    if len(runs) == 1:
        return [*runs[0].flags, "--output-dir", str(runs[0].folder)]
    flags = list(runs[0].flags)
    if "--seed" in flags:
        at = flags.index("--seed")
        del flags[at : at + 2]
    seeds = ",".join(str(run.seed) for run in runs)
    # The folders of the runs are those that `fit` creates for each seed.
    return [*flags, "--seeds", seeds, "--output-dir", str(runs[0].folder.parent)]


def _environment(folder: Path) -> dict[str, str]:
    """Returns the environment of this process, with a compilation cache that all runs share."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return {**cache, **os.environ, "PYTHONPATH": path}


def _seconds_left(done: Sequence[Run], left: Sequence[Run], processes: int) -> float | None:
    """Estimates the time left from runs that differ only in the seed, or else from all runs."""
    seconds: dict[Any, list[float]] = {}
    for run in done:
        seconds.setdefault((run.task, run.size, run.method), []).append(run.record()["seconds"])
    if not seconds:
        return None
    average = statistics.mean(itertools.chain.from_iterable(seconds.values()))
    of_run = [seconds.get((run.task, run.size, run.method), [average]) for run in left]
    return sum(map(statistics.mean, of_run)) / processes


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "no estimate of the time left"
    minutes = round(seconds / 60)
    return f"about {minutes // 60} h {minutes % 60:02d} min left"


def _settings(each: Sequence[CompareOptions]) -> dict[str, Any]:
    """Returns the settings, JSON-ready; one that differs between tasks is `{task: value}`."""
    by_task = {options.task: _of_task(options) for options in each}
    first, *others = by_task.values()
    settings = {
        name: value
        if all(other[name] == value for other in others)
        else {task: values[name] for task, values in by_task.items()}
        for name, value in first.items()
    }
    return settings | {"task": joined(each).task}


def _of_task(options: CompareOptions) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    values["method_options"] = given_options(options.method_options)
    return json.loads(json.dumps(values, default=str))
