"""Grids of `fit`: runs with several seeds, learning rates or training sizes share one step."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

import compacter_jax as cj
from compacter_jax.files import replace_file
from train import report
from train.compute import step as compute_step
from train.compute.compute import compiler_options
from train.data import batching, tokens
from train.errors import FailedRunsError, NonFiniteLossError, StoppedRunError
from train.exchange import join
from train.fit import learners, run, stopping, timing
from train.fit import trainer as fit_trainer
from train.fit.grid_folder import check_grid_folder, open_grid
from train.fit.job import Job, prepare
from train.fit.options import FitOptions
from train.fit.run_folder import RunFolder
from train.folders import alone
from train.tasks import multilingual

_AXIS = "runs"
# Padding value where a batch is narrower than those of other runs; 0 where none is given.
_FILL = {"labels": tokens.IGNORED}


def runs_of(options: FitOptions) -> dict[str, FitOptions]:
    """Returns the runs of a grid by name, each with the options of a single `fit`.

    Raises:
      ValueError: for a list that is not of numbers, or flags that do not allow several runs.
    """
    lists = {
        "seed": _values("seeds", options.seeds, int),
        "learning_rate": _values("learning-rates", options.learning_rates, float),
        "train_size": _values("train-sizes", options.train_sizes, int),
    }
    axes = {name: values for name, values in lists.items() if values}
    _check_together(options, axes)
    alone = dataclasses.replace(options, seeds=None, learning_rates=None, train_sizes=None)
    runs = {}
    for point in itertools.product(*axes.values()):
        values = dict(zip(axes, point, strict=True))
        name = "_".join(f"{axis.replace('_', '-')}-{value}" for axis, value in values.items())
        changes = {**values, "output_dir": options.output_dir / name}
        runs[name] = dataclasses.replace(alone, **changes)
    return runs


def _values(name: str, text: str | None, kind: Callable[[str], Any]) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",")] if text is not None else []
    except ValueError:
        raise ValueError(f"--{name} {text!r} must be numbers with commas between them") from None
    if len(set(values)) < len(values):
        raise ValueError(f"--{name} {text!r} has a number twice; give each number once")
    return values


def _check_together(options: FitOptions, axes: Mapping[str, Any]) -> None:
    default = {field.name: field.default for field in dataclasses.fields(FitOptions)}
    for name in axes:
        if getattr(options, name) != default[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} and --{flag}s contradict each other; give one")
    refused = {
        "--task with several tasks": "," in options.task,
        "--mesh": options.mesh is not None,
        "--profile": options.profile,
        "several hosts": options.distributed or options.num_processes is not None,
    }
    for name, given in refused.items():
        if given:
            raise ValueError(
                f"{name} works with one run, not with --{' and --'.join(axes)}; leave one of them "
                "out"
            )


def fit(options: FitOptions) -> dict[str, dict[str, Any]]:
    """Trains all runs of a grid; each gives the results of a single `fit`, in its own folder.

    A run whose loss is no longer finite ends; the other runs continue.

    Returns:
      Run -> the content of its `metrics.json`.

    Raises:
      ValueError, OSError: as `train.fit.run.fit`.
      FailedRunsError: at the end; the message names the failed runs and the reasons.
      InterruptedRunError, PreemptedRunError: after a signal; `resume` continues all runs.
    """
    started = time.perf_counter()
    with stopping.handled() as stop, ExitStack() as held:
        runs = runs_of(multilingual.resolved(options))
        check_grid_folder(options.output_dir, runs)
        for each in runs.values():
            each.check()
        join.prepared(options)
        folders = [held.enter_context(RunFolder(each)) for each in runs.values()]
        jobs = _prepared(runs)
        stop.check()
        run.check_room(list(jobs.values()))
        run.say_slow_start(list(jobs.values()))
        first = next(iter(jobs.values()))
        count = cj.count(first.learners[0].params, first.learners[0].labels)
        print(report.parameter_table(count, first.method), flush=True)
        options.output_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(alone(options.output_dir))
        check_grid_folder(options.output_dir, runs)
        open_grid(options.output_dir)
        for folder in folders:
            folder.open()
        results: dict[str, dict[str, Any]] = {}
        with ExitStack() as stack:
            trainers: dict[str, fit_trainer.Trainer] = {}
            for name, job in jobs.items():
                like = next(iter(trainers.values()), None)
                trainer = fit_trainer.Trainer(job, stop, name=name, like=like)
                trainers[name] = stack.enter_context(trainer)
            failures = _train(trainers, stop)
            for name, trainer in trainers.items():
                if name not in failures:
                    results[name] = _finished(name, trainer, started, len(runs))
        if results:
            _write_summary(options, runs, results, failures)
    if failures:
        listed = "; ".join(f"{name}: {reason}" for name, reason in failures.items())
        raise FailedRunsError(f"{len(failures)} of {len(runs)} runs failed: {listed}")
    return results


def _prepared(runs: Mapping[str, FitOptions]) -> dict[str, Job]:
    """Prepares the jobs, which share the arrays of the backbone."""
    jobs: dict[str, Job] = {}
    for name, options in runs.items():
        jobs[name] = prepare(options, like=next(iter(jobs.values()), None), num_devices=1)
    return jobs


def _finished(
    name: str, trainer: fit_trainer.Trainer, started: float, runs_at_once: int
) -> dict[str, Any]:
    """Evaluates the best adapter of a run and writes its results."""
    print(f"{name}:")
    result = run.result_of(trainer, 0)
    cost = timing.cost(trainer.progress.step_seconds, started)
    run.write_results(
        trainer.job, {trainer.job.task_runs[0].name: result}, {**cost, "runs_at_once": runs_at_once}
    )
    return result


def _train(trainers: Mapping[str, fit_trainer.Trainer], stop: stopping.Stopping) -> dict[str, str]:
    """Trains all runs to their ends; returns the reasons of failed runs.

    Raises:
      StoppedRunError: after a signal, once all runs have saved their state.
    """
    failures: dict[str, str] = {}
    stopped: list[StoppedRunError] = []
    stacked = StackedRuns(list(trainers.values()))
    total = max(trainer.job.total_steps for trainer in trainers.values())
    done = min(trainer.learners[0].steps for trainer in trainers.values())
    with stop.delayed(), tqdm(total=total, initial=done, unit="step") as bar:
        bar.set_description(f"{len(trainers)} runs at once")
        members = {name: trainer.steps() for name, trainer in trainers.items()}
        waiting: dict[str, batching.Batch] = {}
        metrics: dict[str, compute_step.StepMetrics | None] = dict.fromkeys(members)
        while members:
            for name in list(members):
                try:
                    _, waiting[name] = members[name].send(metrics.get(name))
                except (StopIteration, NonFiniteLossError, StoppedRunError) as end:
                    del members[name]
                    waiting.pop(name, None)
                    if isinstance(end, NonFiniteLossError):
                        failures[name] = str(end)
                    elif isinstance(end, StoppedRunError):
                        stopped.append(end)
            if members:
                given = [waiting.get(name) for name in trainers]
                metrics = dict(zip(trainers, stacked.step(given), strict=True))
                bar.update()
    if stopped:
        raise stopped[0]
    return failures


class _Arguments(NamedTuple):
    """Arguments of one run in a stacked step.

    Attributes:
      own: the leaves of the frozen half that not all runs share, by position.
      batch: the rows of the run.
      seed: the seed of the dropout masks.
      numbers: the hyperparameters of the optimizer.
      active: whether the run is still training; the state of a finished run does not change.
    """

    own: dict[int, Array]
    batch: dict[str, Any]
    seed: Any
    numbers: compute_step.Hyperparameters
    active: Any


class StackedRuns:
    """States of several runs, stacked along a leading axis, with one compiled step for all runs.

    With several devices, the largest number of them that divides the number of runs is used, and
    each has an equal share of the runs.

    Attributes:
      states: `train.compute.step.TrainState` with `[runs, …]` leaves.
    """

    def __init__(self, trainers: Sequence[fit_trainer.Trainer]):
        self._trainers = list(trainers)
        first = trainers[0]
        runs = len(trainers)
        self._devices = jax.local_devices()
        size = max(n for n in range(1, len(self._devices) + 1) if runs % n == 0)
        mesh = Mesh(np.array(self._devices[:size]), (_AXIS,))
        self._divided = NamedSharding(mesh, PartitionSpec(_AXIS))
        whole = NamedSharding(mesh, PartitionSpec())
        self.states: compute_step.TrainState = jax.device_put(
            _stacked([trainer.learners[0].state for trainer in trainers]), self._divided
        )
        leaves, self._frozen = zip(
            *(jax.tree.flatten(trainer.learners[0].frozen) for trainer in trainers), strict=True
        )
        own = [i for i, of_runs in enumerate(zip(*leaves, strict=True)) if not _same(of_runs)]
        self._own = jax.device_put(
            {i: np.stack([each[i] for each in leaves]) for i in own}, self._divided
        )
        self._shared = jax.device_put(
            {i: leaf for i, leaf in enumerate(leaves[0]) if i not in own}, whole
        )
        self._seeds = np.array([trainer.options.seed for trainer in trainers], np.uint32)
        self._step = jax.jit(
            self._compiled(first),
            donate_argnums=0,
            compiler_options=compiler_options(self._devices[0]),
        )
        for index, trainer in enumerate(trainers):
            trainer.learners[0].state = cast(compute_step.TrainState, _Row(self, index))

    def _compiled(self, first: fit_trainer.Trainer) -> Callable[..., Any]:
        """Returns the step as a function of arrays, with separate metrics for every run."""
        job, learner, runs = first.job, first.job.learners[0], len(self._trainers)
        task_run = job.task_runs[0]
        apply = learners.apply_of(task_run, learner.views[0])

        def one(
            state: compute_step.TrainState, arguments: _Arguments, shared: dict[int, Array]
        ) -> Any:
            leaves = {**shared, **arguments.own}
            frozen = jax.tree.unflatten(self._frozen[0], [leaves[i] for i in range(len(leaves))])
            new, metrics = compute_step.loss_and_update(
                state,
                frozen,
                arguments.batch,
                jax.random.key(arguments.seed),
                apply=apply,
                loss=task_run.objective.loss,
                tx=cj.optimizer(learners.transformation(job.options), learner.labels),
                accumulation_steps=job.options.accumulation_steps,
                numbers=arguments.numbers,
            )
            kept = jax.tree.map(lambda a, b: jnp.where(arguments.active, a, b), new, state)
            return kept, metrics

        def all_of_them(states: Any, arguments: Any, shared: Any) -> Any:
            states, metrics = jax.vmap(one, in_axes=(0, 0, None))(states, arguments, shared)
            return states, [jax.tree.map(lambda x, i=i: x[i], metrics) for i in range(runs)]

        return all_of_them

    def step(self, batches: Sequence[batching.Batch | None]) -> list[compute_step.StepMetrics]:
        """Updates every run that has a batch; the metrics of the other runs are meaningless."""
        self._settle()
        active = np.array([batch is not None for batch in batches])
        filler = next(batch for batch in batches if batch is not None)
        numbers = [trainer.numbers(trainer.learners[0]) for trainer in self._trainers]
        arguments = _Arguments(
            self._own,
            padded([filler if batch is None else batch for batch in batches]),
            self._seeds,
            compute_step.Hyperparameters(*np.array(numbers, np.float32).T),
            active,
        )
        arguments = jax.device_put(arguments, self._divided)
        self.states, metrics = self._step(self.states, arguments, self._shared)
        return metrics

    def _settle(self) -> None:
        """Waits for the step before, on a CPU.

        The devices of a CPU share its threads: two programs that communicate between devices, and
        overlap, can wait for each other until XLA ends the process.
        """
        if self._devices[0].platform == "cpu":
            jax.block_until_ready(self.states)

    def row(self, index: int, tree: Any) -> Any:
        """Returns one run's part of a tree with `[runs, …]` leaves, on the first device."""
        self._settle()
        return jax.device_put(jax.tree.map(lambda x: _row_of(x, index), tree), self._devices[0])


def _row_of(stacked: Array, index: int) -> Array:
    """Returns one row of an array whose rows are divided over devices, on the device that has it.

    To index the whole array would be a program in which all devices communicate.
    """
    for shard in stacked.addressable_shards:
        rows = shard.index[0]
        first = rows.start or 0
        if first <= index < (stacked.shape[0] if rows.stop is None else rows.stop):
            return shard.data[index - first]
    raise ValueError(f"row {index} is on no device of this process")


class _Row:
    """The `train.compute.step.TrainState` of one run, sliced from the stack on access."""

    def __init__(self, stacked: StackedRuns, index: int):
        self._stacked, self._index = stacked, index

    @property
    def trained(self) -> Any:
        return self._stacked.row(self._index, self._stacked.states.trained)

    def _asdict(self) -> dict[str, Any]:
        return self._stacked.row(self._index, self._stacked.states)._asdict()


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *trees)


def _same(leaves: Sequence[Any]) -> bool:
    return all(leaf is leaves[0] for leaf in leaves)


def padded(batches: Sequence[batching.Batch]) -> dict[str, np.ndarray]:
    """Stacks batches, each array padded to the longest; the padding is masked."""

    def stacked(name: str) -> np.ndarray:
        arrays = [batch[name] for batch in batches]
        shape = np.max([array.shape for array in arrays], axis=0)
        whole = np.full((len(arrays), *shape), _FILL.get(name, 0), arrays[0].dtype)
        for i, array in enumerate(arrays):
            whole[i][tuple(map(slice, array.shape))] = array
        return whole

    return {name: stacked(name) for name in batches[0]}


def _write_summary(
    options: FitOptions,
    runs: Mapping[str, FitOptions],
    results: Mapping[str, dict[str, Any]],
    failures: Mapping[str, str],
) -> None:
    """Writes `metrics.json` and `report.md` of the grid: all runs, mean and spread over seeds."""
    groups: dict[tuple[float, int], list[str]] = {}
    for name, result in results.items():
        point = (result["learning_rate"], result["train_examples"])
        groups.setdefault(point, []).append(name)
    splits = [split for split in ("validation", "test") if split in next(iter(results.values()))]
    summary = [
        {
            "learning_rate": rate,
            "train_examples": size,
            "runs": names,
            **{split: _spread([results[name][split] for name in names]) for split in splits},
        }
        for (rate, size), names in groups.items()
    ]
    folder = options.output_dir
    text = _report(summary, results, splits, failures)
    with replace_file(folder / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    values = {"runs": results, "summary": summary, "failed": failures}
    report.write_json(folder / "metrics.json", values)
    print(f"\n{text.split('## Runs')[0].strip()}\n\nreport: {folder / 'report.md'}")


def _spread(scores: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    """Returns metric -> mean and sample standard deviation; with one run, the deviation is None."""

    def of(values: list[float]) -> dict[str, float | None]:
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return {"mean": statistics.mean(values), "standard_deviation": deviation}

    return {name: of([score[name] for score in scores]) for name in scores[0]}


def _report(
    summary: Sequence[Mapping[str, Any]],
    results: Mapping[str, dict[str, Any]],
    splits: Sequence[str],
    failures: Mapping[str, str],
) -> str:
    metric = next(iter(results.values()))["metric"]

    def scored(values: Mapping[str, Any]) -> str:
        deviation = values[metric]["standard_deviation"]
        spread = "" if deviation is None else f" ± {deviation:.4f}"
        return f"{values[metric]['mean']:.4f}{spread}"

    columns = [f"{split} {metric}" for split in splits]
    rows = [
        [f"{row['learning_rate']:g}", f"{row['train_examples']:,}", str(len(row["runs"]))]
        + [scored(row[split]) for split in splits]
        for row in summary
    ]
    each = [
        [f"[{name}]({name}/report.md)", str(result["best_epoch"])]
        + [f"{result[split][metric]:.4f}" for split in splits]
        for name, result in results.items()
    ]
    failed = [f"- {name}: {reason}" for name, reason in failures.items()]
    return "\n\n".join(
        [
            "Mean and sample standard deviation over seeds.",
            report.table(["learning rate", "examples", "runs", *columns], rows),
            "## Runs",
            report.table(["run", "best epoch", *columns], each),
            *(["## Failed", "\n".join(failed)] if failed else []),
            "",
        ]
    )
