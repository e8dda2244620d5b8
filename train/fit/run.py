"""The command `fit`: steps, evaluation, checkpoints, results."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import compacter_jax as cj
from train import report as train_report
from train.compute import distributed, mesh
from train.data.writing import write_rows
from train.exchange import join
from train.fit import members, stopping, timing
from train.fit import report as fit_report
from train.fit.job import Job, TaskRun, prepare, say_all
from train.fit.learners import slow_start
from train.fit.options import FitOptions
from train.fit.run_folder import RunFolder, bytes_removed, check_only_ours
from train.fit.run_record import PREDICTIONS_NAME
from train.fit.trainer import Trainer
from train.folders import new_folder
from train.objectives import masked_words
from train.tasks import ON_TEXT, multilingual


def fit(options: FitOptions) -> dict[str, dict[str, Any]]:
    """Fine-tunes, keeps the adapter of the best epoch, evaluates it and writes the reports.

    Returns:
      Task -> the content of its `metrics.json`.

    Raises:
      ValueError, OSError: if the input is invalid, before anything is written; or if a file cannot
        be written.
      NonFiniteLossError: if the loss is not finite; the message names the step, and the last
        checkpoint is kept.
      InterruptedRunError, PreemptedRunError: after a signal; `resume` continues from there and
        gives bit-identical results.
    """
    started = time.perf_counter()
    with stopping.handled() as stop, contextlib.ExitStack() as held:
        options.check()
        # The joined backbone is written, so what the files lack has to be told before.
        options = join.prepared(multilingual.resolved(options))
        distributed.start(options)
        if options.mesh is not None:
            mesh.make_mesh(options.mesh)  # raises before anything is written if it does not fit
        folder = RunFolder(options)
        distributed.of_first(lambda: _hold(held, folder))
        job = prepare(options)
        stop.check()
        check_room([job])
        if distributed.is_first():
            learner = job.learners[0]
            count = cj.count(learner.params, learner.labels)
            print(train_report.parameter_table(count, job.method), flush=True)
        say_slow_start([job])
        distributed.of_first(folder.open)
        with Trainer(job, stop) as trainer:
            trainer.run()
            results = {
                task_run.name: result_of(trainer, i) for i, task_run in enumerate(job.task_runs)
            }
        if distributed.is_first():
            cost = timing.cost(trainer.progress.step_seconds, started)
            write_results(job, results, cost)
    return results


def say_slow_start(jobs: Sequence[Job]) -> None:
    """Prints once for all jobs why a run is too short for its method's initial values."""
    lines = (slow_start(job) for job in jobs)
    say_all([line for line in lines if line is not None][:1])


def _hold(held: contextlib.ExitStack, folder: RunFolder) -> None:
    held.enter_context(folder)


def check_room(jobs: Sequence[Job]) -> None:
    """Checks that the file system has room for an adapter and a checkpoint of every run.

    Raises:
      OSError: if there is not enough room.
    """
    # An adapter is a copy of the trained parameters; a checkpoint also holds Adam's two moments.
    trained = sum(
        leaf.nbytes
        for job in jobs
        for learner in job.learners
        for leaf in jax.tree.leaves(cj.partition(learner.params, learner.labels)[0])
    )
    folder = jobs[0].options.output_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    free = usage.free + sum(bytes_removed(job.options) for job in jobs)
    if usage.total and free < 4 * trained:  # some file systems report a total of 0
        raise OSError(
            f"{folder} has {free / 1e6:,.1f} MB free, but an adapter with its first checkpoint "
            f"takes {4 * trained / 1e6:,.1f} MB; make room, or choose another --output-dir"
        )


def result_of(trainer: Trainer, index: int) -> dict[str, Any]:
    """Evaluates the best adapter of a task, as it was written to disk."""
    job, task_run = trainer.job, trainer.job.task_runs[index]
    training, compute = trainer.of_task(index)
    params = members.load(job, task_run)
    trained = compute.place(cj.partition(params, task_run.labels)[0])
    count = cj.count(task_run.params, task_run.labels)
    progress = trainer.progress
    scores = {}
    for split in (split for split in task_run.encoded if split != "train"):
        outputs = trainer.outputs(index, split, trained)
        encoded = task_run.encoded[split].of_epoch(0)
        scores[split] = task_run.objective.scores(outputs, encoded)
        if split == "test" and distributed.is_first():
            compared = task_run.objective.predictions_and_targets(outputs, encoded)
            write_predictions(compared, task_run, job.folder(task_run))
    return {
        "task": task_run.name,
        "kind": task_run.task.kind,
        "label_names": list(task_run.task.label_names),
        "metric": task_run.task.metric,
        "backbone": job.options.backbone,
        "method": job.options.method,
        "objective": task_run.objective.settings,
        "learning_rate": job.learning_rate,
        "seed": job.options.seed,
        "train_examples": len(task_run.encoded["train"]),
        "steps": int(np.sum(job.order == index)),
        "best_epoch": progress.best_epoch[training.learner.name],
        **scores,
        "trained_parameters": count.trained,
        "total_parameters": count.total,
        "trained_groups": {group: trained for group, (trained, _) in count.groups.items()},
        "adapter_bytes": members.bytes_on_disk(job, task_run),
        **members.report(job, task_run),
        "history": progress.history[task_run.name],
    }


def write_predictions(
    compared: tuple[np.ndarray, np.ndarray] | None, task_run: TaskRun, folder: Path
) -> None:
    """Writes what the test metrics compare, one row for each row of the split.

    Args:
      compared: the result of `Objective.predictions_and_targets`; nothing is written for None.
      task_run: the task; its labels are written by their names.
      folder: folder of the task's results.
    """
    if compared is None:
        return
    names = task_run.task.label_names

    def readable(values: np.ndarray) -> list[Any]:
        if task_run.task.kind not in ("classification", "choice") or not names:
            is_text = values.dtype == object and not all(map(_is_tags, values))
            return list(map(str, values)) if is_text else values.tolist()
        return [names[label] if label >= 0 else None for label in values.tolist()]

    rows = zip(*map(readable, compared), strict=True)
    with write_rows(folder / PREDICTIONS_NAME) as write:
        write([{"prediction": found, "target": target} for found, target in rows])


def _is_tags(value: Any) -> bool:
    """Returns True for the tags of a row, which are written as a list."""
    return isinstance(value, tuple)


def write_results(job: Job, results: dict[str, dict[str, Any]], cost: dict[str, Any]) -> None:
    """Writes numbers, curves and report of every task, and for a mixture all numbers."""
    for task_run in job.task_runs:
        result, folder = results[task_run.name], job.folder(task_run)
        if not job.is_mixture:
            result["measured"] = cost
        if _makes_backbone(job, task_run):
            write_backbone(task_run, folder)
        count = cj.count(task_run.params, task_run.labels)
        fit_report.plot_curves(result, folder / "curves.png")
        fit_report.write_report(result, job.options, task_run.model.method, count, folder)
        # Written last: the file tells whoever started the run that the run is done.
        train_report.write_json(folder / "metrics.json", result)
        if job.is_mixture:
            print(f"{task_run.name}:")
        print(fit_report.result_text(result, folder))
    if job.is_mixture:
        options = job.options
        mixed = {"mixture": options.mixture, "adapters": options.adapters, "tasks": results}
        train_report.write_json(options.output_dir / "metrics.json", {**mixed, "measured": cost})


def write_backbone(task_run: TaskRun, folder: Path) -> None:
    """Writes the best epoch of full fine-tuning as a checkpoint that `--backbone` accepts."""
    _, params = cj.load_adapter(folder / "adapter", task_run.backbone)
    target = folder / "backbone"
    check_only_ours(target)
    with new_folder(target, replace=True) as temporary:
        cj.save_backbone(temporary, task_run.backbone.module, params, task_run.backbone.config)
        task_run.objective.save_processors(temporary)


def _makes_backbone(job: Job, task_run: TaskRun) -> bool:
    """Returns True if the run pre-trains a backbone, or its head of words, for other runs."""
    pre_trains = task_run.task.kind in (*ON_TEXT, *multilingual.KINDS)
    whole = pre_trains and job.method.trains_backbone
    return whole or masked_words.trains_head(task_run.task, job.method)
