"""Learners on the devices: parameters, optimizers and compiled steps of each run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax

import compacter_jax as cj
from train.compute import step
from train.compute.compute import Compute, make_compute
from train.fit.job import Job, Learner, TaskRun
from train.fit.options import FitOptions


@dataclasses.dataclass
class Training:
    """A learner whose arrays are on the devices.

    Attributes:
      learner: the parameters and their tasks.
      computes: the compiled functions, one entry for each task of the learner.
      schedule: the learning rate as a function of the learner's own steps.
      state: the arrays that a step changes.
      frozen: the arrays that no step changes.
      steps: the number of updates done.
    """

    learner: Learner
    computes: tuple[Compute, ...]
    schedule: optax.Schedule
    state: step.TrainState
    frozen: Any
    steps: int = 0

    @property
    def compute(self) -> Compute:
        """Compiled functions for work that does not depend on the task."""
        return self.computes[0]

    def host_state(self) -> dict[str, Any]:
        """Returns a copy of the state on the host."""
        return jax.tree.map(np.asarray, self.compute.host_state(self.state)._asdict())


def trainings_of(
    job: Job,
    placed: dict[int, Any],
    computes: tuple[Compute, ...] | None,
    devices: Sequence[jax.Device] | None,
) -> list[Training]:
    """Puts the learners on the devices; frozen arrays that several learners share are placed once.

    Args:
      job: the run.
      placed: identity of an array on the host -> the same array on the devices; new arrays are
        added.
      computes: compiled functions to share, of a similar run with one learner.
      devices: the devices to compile for if `computes` is None; None takes all of them.
    """
    made: list[Training] = []
    for learner in job.learners:
        schedule = schedule_of(job, job.steps_of_learner(learner))
        tx = cj.optimizer(transformation(job.options), learner.labels)
        programs = computes or tuple(
            compute_of(job, job.task_runs[index], view, tx, devices)
            for index, view in zip(learner.task_indices, learner.views, strict=True)
        )
        trained, frozen = cj.partition(learner.params, learner.labels)
        frozen = _placed_once(frozen, job.options.backbone_dtype, programs[0], placed)
        state = programs[0].init_state(trained)
        made.append(Training(learner, programs, schedule, state, frozen))
    return made


def _placed_once(tree: Any, dtype: str, compute: Compute, placed: dict[int, Any]) -> Any:
    """Casts frozen arrays to `dtype` and places them, except for those that are in `placed`.

    Args:
      tree: a tree of arrays on the host, None in place of each trained array.
      dtype: float32, bfloat16 or int8.
      compute: the compiled functions, which know the devices.
      placed: identity of an array on the host -> the same array on the devices; new arrays are
        added.
    """
    small = tree if dtype == "float32" else cj.cast_frozen(tree, dtype)
    new = jax.tree.map(lambda leaf, cast: None if id(leaf) in placed else cast, tree, small)
    copies = compute.place(new)
    return jax.tree.map(lambda leaf, copy: placed.setdefault(id(leaf), copy), tree, copies)


def schedule_of(job: Job, steps: int) -> optax.Schedule:
    """Returns the learning rate schedule: linear warm-up, then linear decay to zero."""
    return step.linear_schedule(
        job.learning_rate, round(job.options.warmup_fraction * steps), steps
    )


def slow_start(job: Job) -> str | None:
    """Returns why a run is too short for its method's initial values, None if it is not."""
    if job.options.composition is not None:  # whose members may be trained already
        return None
    width = getattr(job.task_runs[0].backbone.module.config, "hidden_size", None)
    steps = max(job.steps_of_learner(learner) for learner in job.learners)
    schedule = schedule_of(job, steps)
    reach = sum(schedule(count) for count in range(steps))
    told = [part.slow_start(width, reach) for part in job.method.inserted()]
    return next((line for line in told if line is not None), None)


def transformation(options: FitOptions) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a run; each update takes its numbers from `Trainer.numbers`."""
    return step.adamw(
        decays=options.weight_decay > 0, clips=options.clip_norm > 0, members=options.has_members
    )


def apply_of(task_run: TaskRun, view: Any) -> step.ApplyFunction:
    """Returns the model of a task as a function of the parameters of its learner."""
    apply = task_run.objective.apply
    return lambda params, batch, key: apply(view(params), batch, key)


def compute_of(
    job: Job,
    task_run: TaskRun,
    view: Any,
    tx: optax.GradientTransformationExtraArgs,
    devices: Sequence[jax.Device] | None,
) -> Compute:
    """Compiles a step of the learner's parameters on batches of a task, and the task's outputs."""
    return make_compute(
        apply_of(task_run, view),
        task_run.objective.loss,
        tx,
        outputs=task_run.objective.outputs,
        seed=job.options.seed,
        accumulation_steps=job.options.accumulation_steps,
        devices=devices,
        mesh=job.options.mesh,
    )
