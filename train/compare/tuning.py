"""Choice of the learning rate of each method, on validation data."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from train.compare.plan import Point, in_order
from train.compare.single_run import Run


@dataclasses.dataclass(frozen=True)
class Choice:
    """The learning rates that were tried at a point, and the one that is taken.

    Attributes:
      point: the method, task and size.
      scores: learning rate -> mean validation score over the tuning seeds; None where a run failed.
    """

    point: Point
    scores: dict[float, float | None]

    @property
    def rate(self) -> float | None:
        """The rate of the best score, of equal ones the nearest to the method's own.

        Of two equally near it is the smaller. None if every rate failed.
        """
        rates = sorted(self.scores)
        own = rates.index(self.point.rates[len(self.point.rates) // 2])
        known = [i for i, rate in enumerate(rates) if self.scores[rate] is not None]
        if not known:
            return None
        return rates[max(known, key=lambda i: (self.scores[rates[i]], -abs(i - own), -i))]

    @property
    def at_edge(self) -> bool:
        """True if the grid ends at the chosen rate, beyond which a better one may lie."""
        return self.rate in (min(self.scores), max(self.scores))

    def records(self) -> list[dict[str, Any]]:
        """Returns a JSON-ready row for each rate that was tried."""
        return [
            {
                "task": self.point.options.task,
                "train_size": self.point.size,
                "method": self.point.method,
                "learning_rate": rate,
                "validation": score,
                "chosen": rate == self.rate,
                "at_edge": rate == self.rate and self.at_edge,
            }
            for rate, score in sorted(self.scores.items())
        ]

    def beyond(self) -> float | None:
        """Returns the rate to try next: one factor beyond the best, if that ends the grid.

        None if there is nothing to try: the best rate has others on both sides, no rate finished,
        or `tune_beyond` further rates were tried.
        """
        left = self.point.options.tune_beyond - (len(self.scores) - len(self.point.rates))
        if self.rate is None or not self.at_edge or left <= 0:
            return None
        reachable = self.point.reachable_rates
        step = 1 if self.rate == max(self.scores) else -1
        return reachable[reachable.index(self.rate) + step]


def tune(
    points: Iterable[Point], train: Callable[[Sequence[Run]], Mapping[Run, str]]
) -> tuple[dict[Point, Choice], dict[Run, str]]:
    """Tries the learning rates of points, and further ones while the best ends the grid.

    A rate that fails is not taken, so that its failure is none of the comparison.

    Args:
      points: the points with a grid.
      train: trains the unfinished ones of some runs and returns the reasons of failed runs.

    Returns:
      The choices, and the failed runs of points at which every rate failed.
    """
    tried = {point: set(point.rates) for point in points}
    failures: dict[Run, str] = {}
    new = tried
    choices: dict[Point, Choice] = {}
    while new:
        runs = [run for point, rates in new.items() for run in point.tried(rates)]
        print(f"{len(runs)} {'further ' if choices else ''}runs choose the learning rates")
        failures |= train(in_order(runs))
        choices |= {point: _choose(point, tried[point]) for point in new}
        further = {point: choices[point].beyond() for point in new}
        new = {point: {rate} for point, rate in further.items() if rate is not None}
        for point, rates in new.items():
            tried[point] |= rates
    failed = [point for point, choice in choices.items() if choice.rate is None]
    lost = {run for point in failed for run in point.tried(tried[point])}
    return choices, {run: reason for run, reason in failures.items() if run in lost}


def _choose(point: Point, rates: Iterable[float]) -> Choice:
    """Reads the validation scores of the runs that tried some learning rates of a point."""
    return Choice(point, {rate: _mean(point.tried([rate])) for rate in rates})


def _mean(runs: Sequence[Run]) -> float | None:
    """Returns the mean validation score of some runs, None if one of them has none."""
    if not all(run.finished() for run in runs):
        return None
    records = [run.record() for run in runs]
    return statistics.mean(record["validation"][record["metric"]] for record in records)
