"""The command `compare`: every method with every seed, in processes of their own."""

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
from train.fit.run_folder import (
    FLAGS_NAME,
    FORMAT_VERSION,
    OUTPUT_NAME,
    RUN_NAME,
    check_apart,
    clear,
    entries,
    possibly_written,
)
from train.folders import alone
from train.report import write_json

_ROOT = Path(__file__).parents[1]
# What a flag's numbers mean, where fit's flag of this name means something else.
_MEANINGS = {"seeds": ": how many seeds, which are then 0, 1, and so on"}
# In the folder of a comparison, beside what it reports.
_RECORD_NAME, _RUNS_LOCK_NAME = "compare.json", ".runs.lock"


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of `fit`.

    Attributes:
      task: what to learn.
      size: training examples; None is all there are.
      method: preset.
      seed: of the run.
      folder: its `--output-dir`.
      flags: the others.
    """

    task: str
    size: int | None
    method: str
    seed: int
    folder: Path
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people."""
        size = "" if self.size is None else f", {self.size:,} examples"
        return f"{self.task}{size}, {self.method}, seed {self.seed}"

    def finished(self) -> bool:
        """Whether its result is there, with whatever flags."""
        return (self.folder / "metrics.json").exists()

    def same_flags(self) -> bool:
        """Whether it was last started with these flags."""
        path = self.folder / FLAGS_NAME
        return path.exists() and parse_json(path.read_bytes(), str(path)) == list(self.flags)

    def clear(self) -> None:
        """Removes what the run wrote, if it was begun before, and nothing else."""
        settings = {"task": self.task, "method": self.method}
        clear(self.folder, possibly_written(settings))
        for name in (RUN_NAME, FLAGS_NAME, OUTPUT_NAME):
            (self.folder / name).unlink(missing_ok=True)

    def record(self) -> dict[str, Any]:
        """What is compared of its `metrics.json`."""
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
    """Of what a process took, the part of each of the runs in it; memory is that of all."""
    runs = measured.get("runs_at_once", 1)
    times = {name: measured[name] for name in ("step_seconds", "seconds")}
    return measured | {name: value and value / runs for name, value in times.items()}


def compare(each: Sequence[CompareOptions]) -> None:
    """Runs what is not finished yet, then reports.

    Args:
      each: the options for each task, which a configuration may tell apart.

    Raises:
      ValueError: for options that do not fit, before anything is run.
      FailedRunsError: at the end, if a run failed; the others are reported.
      InterruptedRunError: on Ctrl-C; the same command goes on.
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
    # The runs inherit the second lock: those that outlive a killed comparison are waited for.
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
    """The runs on all tasks, all methods with the first seed before any with the second.

    Raises:
      ValueError: for an unknown method, a task named twice, a list that is not one of numbers, or
        lists that do not fit each other; and as `train.tasks.load_task`.
    """
    _names(_joined(each).task)
    runs = [run for options in each for run in _runs(options)]
    return sorted(runs, key=lambda run: run.seed)  # stable: otherwise in the order of `_runs`


def _runs(options: CompareOptions) -> list[Run]:
    """Those on one task, by size, then by seed."""
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
    """The options of all, but for what a configuration says of one task alone."""
    return dataclasses.replace(each[0], task=",".join(options.task for options in each))


def _run(
    options: CompareOptions, size: int | None, method: str, seed: int, steps: int | None
) -> Run:
    """One of the runs, its flags being those that differ from what `fit` takes by default."""
    shared = [field.name for field in dataclasses.fields(TrainingOptions)]
    values = {name: getattr(options, name) for name in shared}
    values |= {"train_size": size, "method": method, "seed": seed}
    values |= {"checkpoint_steps": 0}
    if steps is not None:
        # As many epochs as the steps need, which are at most so many.
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
    """A number for each size."""
    numbers = _numbers(name, text)
    if len(numbers) not in (1, len(sizes)):
        raise ValueError(
            f"--{name} has {len(numbers)} numbers for {len(sizes)} training sizes; give one, or as "
            "many as there are sizes"
        )
    return numbers * len(sizes) if len(numbers) == 1 else numbers


def _num_examples(options: CompareOptions) -> int:
    """Training examples of a task, which must have a test split."""
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
    """ValueError if a finished run had other settings, unless these are to be replaced."""
    others = [run for run in runs if run.finished() and not run.same_flags()]
    if others and not options.overwrite:
        raise ValueError(
            f"{others[0].folder} and {len(others) - 1} more hold finished runs with other "
            "settings; choose another --output-dir, or train them again with --overwrite"
        )


def _check_folder(options: CompareOptions) -> None:
    """Looks at the output folder, and writes nothing.

    Raises:
      ValueError: if it is not empty and holds no comparison, or something to be read lies where
        runs are written.
    """
    folder = options.output_dir
    check_apart([folder / "runs"], files_read(options))
    if (folder / _RECORD_NAME).is_file() or not entries(folder):
        return
    # Of a version before there was a record.
    if not any(folder.glob(f"runs/*/*/*/seed-*/{FLAGS_NAME}")):
        raise ValueError(
            f"{folder} is not empty and holds no comparison ({listing(entries(folder), 3)}); "
            "choose another --output-dir"
        )


def _run_all(runs: Sequence[Run], options: CompareOptions, lock: int) -> dict[Run, str]:
    """Trains what is not finished; returns why runs failed."""
    failures: dict[Run, str] = {}
    # A run that another comparison left may have finished while this one waited for it.
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
    """The runs, so many at once at most that differ in nothing but the seed."""
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
    """A process that trains `runs`."""
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
    """Clears up after the process of `runs`; returns why it failed, None if it did not."""
    for run in runs:
        unwanted = ["checkpoints"]
        if run.finished() and not options.keep_adapters:
            unwanted.append("adapter")
        clear(run.folder, unwanted)
    if all(run.finished() for run in runs):
        return None
    log = _log(runs)
    if code == 0:
        return f"terminated before its end, see {log}"  # as a run should be that gets SIGTERM
    if code < 0:
        return f"ended by signal {-code}, see {log}"
    lines = log.read_text("utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else f"exit code {code}"


def _log(runs: Sequence[Run]) -> Path:
    """Where the process of `runs` says what it does."""
    return runs[0].folder / OUTPUT_NAME


def _flags(runs: Sequence[Run]) -> list[str]:
    """Of one `fit` for all."""
    if len(runs) == 1:
        return [*runs[0].flags, "--output-dir", str(runs[0].folder)]
    flags = list(runs[0].flags)
    if "--seed" in flags:
        at = flags.index("--seed")
        del flags[at : at + 2]
    seeds = ",".join(str(run.seed) for run in runs)
    # The runs' folders are those that `fit` makes for each seed.
    return [*flags, "--seeds", seeds, "--output-dir", str(runs[0].folder.parent)]


def _environment(folder: Path) -> dict[str, str]:
    """That of this process; what one run compiles is there for the next."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    return {**cache, **os.environ, "PYTHONPATH": path}


def _seconds_left(done: Sequence[Run], left: Sequence[Run], processes: int) -> float | None:
    """A guess: as long as the same with other seeds, or as all together on average."""
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
