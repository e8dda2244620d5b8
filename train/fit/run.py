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
from train.fit import report as fit_report
from train.fit import stopping, timing
from train.fit.job import Job, TaskRun, prepare
from train.fit.options import FitOptions
from train.fit.run_folder import RunFolder, bytes_removed, check_only_ours
from train.fit.trainer import Trainer
from train.folders import new_folder


def fit(options: FitOptions) -> dict[str, dict[str, Any]]:
    """Fine-tunes, keeps the best epoch's adapter, evaluates it, reports.

    Returns:
      Task -> what its `metrics.json` has.

    Raises:
      ValueError, OSError: for input that does not fit, before anything is written; or if something
        cannot be written.
      NonFiniteLossError: names the step; the last checkpoint stays.
      InterruptedRunError, PreemptedRunError: after a signal; `resume` goes on from there, to the
        same bits.
    """
    started = time.perf_counter()
    with stopping.handled() as stop, contextlib.ExitStack() as held:
        options.check()
        distributed.start(options)
        if options.mesh is not None:
            mesh.make_mesh(options.mesh)  # which must fit the devices, before anything is written
        folder = RunFolder(options)
        distributed.of_first(lambda: _hold(held, folder))
        job = prepare(options)
        stop.check()
        check_room([job])
        if distributed.is_first():
            learner = job.learners[0]
            count = cj.count(learner.params, learner.labels)
            print(train_report.parameter_table(count, job.method), flush=True)
        distributed.of_first(folder.open)
        with Trainer(job, stop) as trainer:
            trainer.run()
            results = {lane.name: result_of(trainer, i) for i, lane in enumerate(job.lanes)}
        if distributed.is_first():
            cost = timing.cost(trainer.progress.step_seconds, started)
            write_results(job, results, cost)
    return results


def _hold(held: contextlib.ExitStack, folder: RunFolder) -> None:
    held.enter_context(folder)


def check_room(jobs: Sequence[Job]) -> None:
    """Checks that the file system has room for an adapter and a checkpoint of every run.

    Raises:
      OSError: if it has not.
    """
    # The adapter is a copy of what is trained; a checkpoint has it, and two moments of Adam.
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
    if usage.total and free < 4 * trained:  # of some file systems nothing is known
        raise OSError(
            f"{folder} has {free / 1e6:,.1f} MB free, and an adapter with its first "
            f"checkpoint takes {4 * trained / 1e6:,.1f} MB; make room, or choose another "
            "--output-dir"
        )


def result_of(trainer: Trainer, index: int) -> dict[str, Any]:
    """Evaluates the best adapter of a task as it was written to disk."""
    job, lane = trainer.job, trainer.job.lanes[index]
    training, compute = trainer.of_lane(index)
    folder = job.folder(lane) / "adapter"
    _, params = cj.load_adapter(folder, lane.backbone)
    trained = compute.place(cj.partition(params, lane.labels)[0])
    splits = [split for split in lane.encoded if split != "train"]
    count = cj.count(lane.params, lane.labels)
    progress = trainer.progress
    return {
        "task": lane.name,
        "kind": lane.task.kind,
        "label_names": list(lane.task.label_names),
        "metric": lane.task.metric,
        "method": job.options.method,
        "objective": lane.objective.settings,
        "learning_rate": job.learning_rate,
        "seed": job.options.seed,
        "train_examples": len(lane.encoded["train"]),
        "steps": int(np.sum(job.order == index)),
        "best_epoch": progress.best_epoch[training.learner.name],
        **{split: trainer.scores(index, split, trained) for split in splits},
        "trained_parameters": count.trained,
        "total_parameters": count.total,
        "trained_groups": {group: trained for group, (trained, _) in count.groups.items()},
        "adapter_bytes": sum(f.stat().st_size for f in folder.iterdir()),
        "history": progress.history[lane.name],
    }


def write_results(job: Job, results: dict[str, dict[str, Any]], cost: dict[str, Any]) -> None:
    """Numbers, curves and report of every task, and of a mixture all numbers in one file."""
    for lane in job.lanes:
        result, folder = results[lane.name], job.folder(lane)
        if not job.is_mixture:
            result["measured"] = cost
        if _makes_backbone(job, lane):
            write_backbone(lane, folder)
        count = cj.count(lane.params, lane.labels)
        fit_report.plot_curves(result, folder / "curves.png")
        fit_report.write_report(result, job.options, lane.model.method, count, folder)
        # Last: whoever started the run knows by it that it is done.
        train_report.write_json(folder / "metrics.json", result)
        if job.is_mixture:
            print(f"{lane.name}:")
        print(fit_report.result_text(result, folder))
    if job.is_mixture:
        options = job.options
        mixed = {"mixture": options.mixture, "adapters": options.adapters, "tasks": results}
        train_report.write_json(options.output_dir / "metrics.json", {**mixed, "measured": cost})


def write_backbone(lane: TaskRun, folder: Path) -> None:
    """Writes the best epoch of full fine-tuning as a checkpoint that `--backbone` takes."""
    _, params = cj.load_adapter(folder / "adapter", lane.backbone)
    target = folder / "backbone"
    check_only_ours(target)
    with new_folder(target, replace=True) as temporary:
        cj.save_backbone(temporary, lane.backbone.module, params, lane.backbone.config)
        lane.objective.tokenizer.save_pretrained(temporary)


def _makes_backbone(job: Job, lane: TaskRun) -> bool:
    """Whether what was trained is a backbone for other tasks: pre-training of all of it."""
    return job.method.trains_backbone and lane.task.kind == "span_corruption"
