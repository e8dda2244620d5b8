"""What is trained, and how: parameters, optimizers and compiled steps of each run."""

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
    """A learner on the devices.

    Attributes:
      learner: what is trained.
      computes: for each of its lanes, the compiled functions.
      schedule: learning rate by its own steps.
      state: arrays that a step changes.
      frozen: those that none does.
      steps: updates done.
    """

    learner: Learner
    computes: tuple[Compute, ...]
    schedule: optax.Schedule
    state: step.TrainState
    frozen: Any
    steps: int = 0

    @property
    def compute(self) -> Compute:
        """For what concerns all lanes."""
        return self.computes[0]

    def host_state(self) -> dict[str, Any]:
        """A copy of the state on the host."""
        return jax.tree.map(np.asarray, self.compute.host_state(self.state)._asdict())


def trainings_of(
    job: Job,
    placed: dict[int, Any],
    computes: tuple[Compute, ...] | None,
    devices: Sequence[jax.Device] | None,
) -> list[Training]:
    """The learners on the devices; what is frozen of several is there once.

    Args:
      job: the run.
      placed: array on the host, by identity -> the same on the devices; new ones are added.
      computes: compiled functions to share, of a run like this one, of one learner.
      devices: to compile for, otherwise; None for all.
    """
    made: list[Training] = []
    for learner in job.learners:
        schedule = schedule_of(job, job.steps_of_learner(learner))
        tx = cj.optimizer(transformation(job.options), learner.labels)
        programs = computes or tuple(
            compute_of(job, job.lanes[lane], view, tx, devices)
            for lane, view in zip(learner.lanes, learner.views, strict=True)
        )
        trained, frozen = cj.partition(learner.params, learner.labels)
        frozen = _placed_once(frozen, job.options.backbone_dtype, programs[0], placed)
        state = programs[0].init_state(trained)
        made.append(Training(learner, programs, schedule, state, frozen))
    return made


def _placed_once(tree: Any, dtype: str, compute: Compute, placed: dict[int, Any]) -> Any:
    """What is frozen, on the devices in `dtype`; arrays there are in `placed` are not copied again.

    Args:
      tree: of arrays on the host, None where one is trained.
      dtype: float32, bfloat16 or int8.
      compute: of the devices.
      placed: by the identity of the array on the host; those that are new are added.
    """
    small = tree if dtype == "float32" else cj.cast_frozen(tree, dtype)
    new = jax.tree.map(lambda leaf, cast: None if id(leaf) in placed else cast, tree, small)
    copies = compute.place(new)
    return jax.tree.map(lambda leaf, copy: placed.setdefault(id(leaf), copy), tree, copies)


def schedule_of(job: Job, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then linear decay to zero."""
    return step.linear_schedule(
        job.learning_rate, round(job.options.warmup_fraction * steps), steps
    )


def transformation(options: FitOptions) -> optax.GradientTransformationExtraArgs:
    """Returns what makes updates of a run's gradients; the numbers come from `Trainer.numbers`."""
    return step.adamw(decays=options.weight_decay > 0, clips=options.clip_norm > 0)


def apply_of(lane: TaskRun, view: Any) -> step.ApplyFunction:
    """The model as a task sees it, of the parameters of its learner."""
    apply = lane.objective.apply
    return lambda params, batch, key: apply(view(params), batch, key)


def compute_of(
    job: Job,
    lane: TaskRun,
    view: Any,
    tx: optax.GradientTransformationExtraArgs,
    devices: Sequence[jax.Device] | None,
) -> Compute:
    """A step of the learner's parameters on a task's batch; outputs of the task's own."""
    return make_compute(
        apply_of(lane, view),
        lane.objective.loss,
        tx,
        outputs=lane.objective.outputs,
        seed=job.options.seed,
        accumulation_steps=job.options.accumulation_steps,
        devices=devices,
        mesh=job.options.mesh,
    )
