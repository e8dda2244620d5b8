"""Choice of the learning rate of each method, on validation data."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from train.compare.plan import Point
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
        rates, middle = list(self.scores), len(self.scores) // 2
        known = [(score, i) for i, score in enumerate(self.scores.values()) if score is not None]
        if not known:
            return None
        return rates[max(known, key=lambda pair: (pair[0], -abs(pair[1] - middle), -pair[1]))[1]]

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
            for rate, score in self.scores.items()
        ]


def choose(point: Point) -> Choice:
    """Reads the validation scores of the runs that tried the learning rates of a point."""
    tried = point.tried()
    return Choice(
        point, {rate: _mean([run for run in tried if run.rate == rate]) for rate in point.rates}
    )


def _mean(runs: Sequence[Run]) -> float | None:
    """Returns the mean validation score of some runs, None if one of them has none."""
    if not all(run.finished() for run in runs):
        return None
    records = [run.record() for run in runs]
    return statistics.mean(record["validation"][record["metric"]] for record in records)
