"""Runs of a comparison, summarised by task, training set size and method."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Summary:
    """Runs of a method on one task with one training set size.

    Attributes:
      task: the task.
      size: the number of training examples.
      method: the preset.
      metric: the metric of the scores.
      scores: the scores on the test split, by seed.
      learning_rate: the learning rate of all runs.
      trained: the number of trained parameters.
      total: the number of all parameters.
      step_seconds: the median over the runs; None if no step was timed.
      peak_memory: the maximum over the runs in bytes.
      peak_device_memory: the maximum of a device with its own memory in bytes, or None.
      adapter_bytes: the size on disk.
    """

    task: str
    size: int
    method: str
    metric: str
    scores: tuple[float, ...]
    learning_rate: float
    trained: int
    total: int
    step_seconds: float | None
    peak_memory: int
    peak_device_memory: int | None
    adapter_bytes: int

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return statistics.mean(self.scores)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the scores; 0 for a single score."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    @property
    def percent(self) -> float:
        """Trained parameters in percent of all parameters."""
        return 100 * self.trained / self.total


def summaries(records: Iterable[Mapping[str, Any]]) -> list[Summary]:
    """Returns a summary for each task, training set size and method, in order of appearance."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for record in records:
        key = record["task"], record["train_examples"], record["method"]
        groups.setdefault(key, []).append(record)
    return [_summary(runs) for runs in groups.values()]


def _summary(runs: Sequence[Mapping[str, Any]]) -> Summary:
    runs = sorted(runs, key=lambda run: run["seed"])
    first = runs[0]
    seconds = [run["step_seconds"] for run in runs if run["step_seconds"] is not None]
    devices = [run["peak_device_memory_bytes"] for run in runs if "peak_device_memory_bytes" in run]
    return Summary(
        task=first["task"],
        size=first["train_examples"],
        method=first["method"],
        metric=first["metric"],
        scores=tuple(run["test"][first["metric"]] for run in runs),
        learning_rate=first["learning_rate"],
        trained=first["trained_parameters"],
        total=first["total_parameters"],
        step_seconds=statistics.median(seconds) if seconds else None,
        peak_memory=max(run["peak_memory_bytes"] for run in runs),
        peak_device_memory=max(devices, default=None),
        adapter_bytes=max(run["adapter_bytes"] for run in runs),
    )


def grouped(found: Iterable[Summary], key: Callable[[Summary], Any]) -> dict[Any, list[Summary]]:
    """Returns key -> summaries, both in order of appearance."""
    groups: dict[Any, list[Summary]] = {}
    for summary in found:
        groups.setdefault(key(summary), []).append(summary)
    return groups
