"""Progress of a run, as a checkpoint keeps it."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import numpy as np

from compacter_jax.files import check_fields
from compacter_jax.messages import listing
from train.compute import step
from train.data import batching


@dataclasses.dataclass
class Progress:
    """Position of a run; with the states of the learners it is all that resuming needs.

    Attributes:
      epoch: the index of the current epoch.
      batch: the index of its next batch.
      losses: task -> losses of the steps since the last evaluation.
      examples: the number of examples in these steps.
      seconds: the time spent on these steps.
      step_seconds: the seconds of the most recent single steps.
      best: learner -> its best evaluation score; empty before the first evaluation.
      best_epoch: learner -> the epoch of that evaluation.
      history: task -> a record of every evaluation.
    """

    epoch: int = 0
    batch: int = 0
    losses: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    examples: int = 0
    seconds: float = 0.0
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    best: dict[str, float] = dataclasses.field(default_factory=dict)
    best_epoch: dict[str, int] = dataclasses.field(default_factory=dict)
    history: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Progress:
        """Reads the progress from a checkpoint; missing fields take their defaults.

        Raises:
          ValueError: if a field is unknown or has another type.
        """
        hints = typing.get_type_hints(cls)
        if unknown := sorted(values.keys() - hints.keys()):
            raise ValueError(
                f"its progress has {listing(unknown)}, which this version of the package does not "
                "know"
            )
        check_fields("its progress", values, hints)
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class PendingStep:
    """A step that may still be computing.

    Attributes:
      metrics: the metrics of the step.
      task_index: the index of its task.
      batch: the part of the batch on this host.
      number: the number of the step, starting at 1.
      learning_rate: the learning rate of the step.
    """

    metrics: step.StepMetrics
    task_index: int
    batch: batching.Batch
    number: int
    learning_rate: float


def thinned(losses: list[float], most: int = 50) -> list[float]:
    """Returns means of consecutive losses, at most `most` of them, for a plot."""
    parts = np.array_split(np.array(losses), min(most, len(losses))) if losses else []
    return [float(part.mean()) for part in parts]
