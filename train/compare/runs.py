"""Command `compare`: every method with every seed, each run in its own process."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compacter_jax.catalogue import presets
from compacter_jax.files import parse_json
from compacter_jax.messages import listing
from train import tasks
from train.cli.config_files import flag
from train.cli.method_flags import ALL, given_options, method_of, options_of
from train.cli.options import TrainingOptions
from train.compare import report
from train.compare.options import CompareOptions
from train.compare.workers import side_by_side
from train.errors import FailedRunsError, InterruptedRunError
from train.fingerprints import files_read
from train.fit.options import FitOptions
from train.fit.run_folder import check_apart, clear
from train.fit.run_record import (
    FLAGS_NAME,
    FORMAT_VERSION,
    OUTPUT_NAME,
    RUN_NAME,
    entries,
    possibly_written,
)
from train.folders import alone
from train.report import write_json

_ROOT = Path(__file__).parents[1]
# The meaning of a flag's numbers, if fit's flag of the same name has another meaning.
_MEANINGS = {"seeds": ": how many seeds, which are then 0, 1, and so on"}
# Files in the folder of a comparison, beside its reports.
_RECORD_NAME, _RUNS_LOCK_NAME = "compare.json", ".runs.lock"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of `fit`.

    Attributes:
      task: the task to learn.
      size: the number of training examples; None is all.
      method: the preset.
      seed: the seed of the run.
      folder: its `--output-dir`.
      flags: its other flags.
    """

    task: str
    size: int | None
    method: str
    seed: int
    folder: Path
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the run in messages."""
        size = "" if self.size is None else f", {self.size:,} examples"
        return f"{self.task}{size}, {self.method}, seed {self.seed}"

    def finished(self) -> bool:
        """Returns True if the result exists, with any flags."""
        return (self.folder / "metrics.json").exists()

    def same_flags(self) -> bool:
        """Returns True if the run was last started with these flags."""
        path = self.folder / FLAGS_NAME
        return path.exists() and parse_json(path.read_bytes(), str(path)) == list(self.flags)

    def clear(self) -> None:
        """Removes the outputs of an earlier start of the run, and nothing else."""
        settings = {"task": self.task, "method": self.method}
        clear(self.folder, possibly_written(settings))
        for name in (RUN_NAME, FLAGS_NAME, OUTPUT_NAME):
            (self.folder / name).unlink(missing_ok=True)

    def record(self) -> dict[str, Any]:
        """Returns the fields of `metrics.json` that are compared."""
        result = json.loads((self.folder / "metrics.json").read_text("utf-8"))
        kept = ["metric", "learning_rate", "train_examples", "steps", "best_epoch"]
        kept += ["trained_parameters", "total_parameters", "adapter_bytes"]
        return {
            "task": self.task,
            "train_size": self.size,
            "method": self.method,
            "seed": self.seed,
            **{name: result[name] for name in kept},
            "validation": result["validation"],
            "test": result["test"],
            **_shares(result["measured"]),
        }


def _shares(measured: dict[str, Any]) -> dict[str, Any]:
    """Returns the measurements of a process with its times divided by its number of runs."""
    runs = measured.get("runs_at_once", 1)
    times = {name: measured[name] for name in ("step_seconds", "seconds")}
    return measured | {name: value and value / runs for name, value in times.items()}


def compare(each: Sequence[CompareOptions]) -> None:
    """Runs what is not finished yet, then writes the report.

    Args:
      each: the options for each task, which a configuration may vary.

    Raises:
      ValueError: for invalid options, before anything is run.
      FailedRunsError: at the end, if a run failed; the others are reported.
      InterruptedRunError: on Ctrl-C; the same command continues.
    """
    options = _joined(each)
    runs = plan(each)
    if not runs:
        raise ValueError(f"--train-size {options.train_size} leaves nothing to train on")
    _check_finished(runs, options)
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
        failures = _run_all(runs, options, lock)
        records = [run.record() for run in runs if run.finished()]
        if records:
            failed = [{"run": run.name, "reason": reason} for run, reason in failures.items()]
            results = {"settings": _settings(options), "runs": records, "failed": failed}
            write_json(folder / "results.json", results)
            report.write(results, folder)
            print(f"report: {folder / 'report.md'}")
    if failures:
        listed = "; ".join(f"{run.name}: {reason}" for run, reason in failures.items())
        raise FailedRunsError(f"{len(failures)} of {len(runs)} runs failed: {listed}")


def plan(each: Sequence[CompareOptions]) -> list[Run]:
    """Returns the runs on all tasks; the first seed of all methods comes before the second.

    Raises:
      ValueError: for an unknown method, a task named twice, a list that is not of numbers, or lists
        of different lengths; and as `train.tasks.load_task`.
    """
    _names(_joined(each).task)
    runs = [run for options in each for run in _runs(options)]
    return sorted(runs, key=lambda run: run.seed)  # stable: otherwise in the order of `_runs`


def _runs(options: CompareOptions) -> list[Run]:
    """Returns the runs on one task, by size, then by seed."""
    options.check()
    for name in ("at_once", "processes"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    methods = list(presets()) if options.methods == ALL else _names(options.methods)
    for name in methods:
        method_of(name, options_of(name, options.method_options))
    sizes = [None] if options.train_size is None else _numbers("train-size", options.train_size)
    seeds = _each("seeds", options.seeds, sizes)
    steps = _each("steps", options.steps, sizes) if options.steps else [None] * len(sizes)
    examples = _num_examples(options)
    runs = []
    for size, num_seeds, num_steps in zip(sizes, seeds, steps, strict=True):
        if size is not None and size > examples:
            print(f"{options.task} has {examples:,} training examples: {size:,} are left out")
            continue
        runs += [
            _run(options, size, method, seed, num_steps)
            for seed in range(num_seeds)
            for method in methods
        ]
    return runs


def _joined(each: Sequence[CompareOptions]) -> CompareOptions:
    """Returns the options of all tasks, without values that a configuration gives for one task."""
    return dataclasses.replace(each[0], task=",".join(options.task for options in each))


def _run(
    options: CompareOptions, size: int | None, method: str, seed: int, steps: int | None
) -> Run:
    """Returns one run; its flags are those that differ from the defaults of `fit`."""
    shared = [field.name for field in dataclasses.fields(TrainingOptions)]
    values = {name: getattr(options, name) for name in shared}
    values |= {"train_size": size, "method": method, "seed": seed}
    values |= {"checkpoint_steps": 0}
    if steps is not None:
        # The steps need at most this number of epochs.
        values |= {"max_steps": steps, "epochs": steps}
    defaults = {field.name: field.default for field in dataclasses.fields(FitOptions)}
    flags = []
    for name, value in values.items():
        if value != defaults[name] and value is not None:
            flags += flag(name, value, toggle=True)
    for name, value in given_options(options_of(method, options.method_options)).items():
        flags += flag(name, value, toggle=False)
    folder = options.output_dir / "runs" / options.task / str(size or "all") / method
    return Run(options.task, size, method, seed, folder / f"seed-{seed}", tuple(flags))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{text!r} must be different names with commas between them")
    return names


def _numbers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= 1 for part in parts):
        meaning = _MEANINGS.get(name, "")
        raise ValueError(
            f"--{name} {text!r} must be numbers from 1 on, with commas between them{meaning}"
        )
    return [int(part) for part in parts]


def _each(name: str, text: str, sizes: Sequence[int | None]) -> list[int]:
    """Returns a number for each size."""
    numbers = _numbers(name, text)
    if len(numbers) not in (1, len(sizes)):
        raise ValueError(
            f"--{name} has {len(numbers)} numbers for {len(sizes)} training sizes; give one, or as "
            "many as there are sizes"
        )
    return numbers * len(sizes) if len(numbers) == 1 else numbers


def _num_examples(options: CompareOptions) -> int:
    """Returns the number of training examples of a task, which must have a test split."""
    task = tasks.load_task(
        options.task,
        regression=options.regression,
        **tasks.sources(options),
    )
    if task.kind == tasks.SPAN_CORRUPTION or set(tasks.SPLITS) - task.splits.keys():
        hint = "; --split-protocol paper makes a test split" if task.benchmark is not None else ""
        raise ValueError(
            "compare wants a task with training, validation and test examples, and "
            f"{options.task!r} has {', '.join(task.splits)}{hint}"
        )
    return len(task.splits["train"])


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
    if not any(folder.glob(f"runs/*/*/*/seed-*/{FLAGS_NAME}")):
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
        of_method = groups.setdefault((run.task, run.size, run.method), [])
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


def _settings(options: CompareOptions) -> dict[str, Any]:
    values = dataclasses.asdict(options)
    values["method_options"] = given_options(options.method_options)
    return json.loads(json.dumps(values, default=str))
