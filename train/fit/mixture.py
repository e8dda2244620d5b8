"""Mixtures of several tasks in one run: how often, and when, each task provides a batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# A third seed beside the seed and the epoch, so that no other draw uses the same random stream.
_STREAM = 0x6D6978


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sampling rates `min(examples, limit) ** (1 / temperature)`, normalised to sum to 1.

    Attributes:
      temperature: 1 samples in proportion to the examples; larger values favour small tasks.
      limit: the largest number of examples that counts for a task.

    References:
      Raffel et al., Exploring the Limits of Transfer Learning, JMLR 2020, arXiv:1910.10683, section
      3.5.2.
    """

    temperature: float = 1.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        for name in ("temperature", "limit"):
            value = getattr(self, name)
            if not value >= 1:
                raise ValueError(f"{name}={value:g} of --mixture must be at least 1")

    def rates(self, sizes: Sequence[int]) -> np.ndarray:
        """Returns `[tasks]` float64 rates with sum 1, given the number of examples of each task."""
        # Dividing by the largest count keeps the power from overflowing.
        counted = np.minimum(np.array(sizes, np.float64), self.limit)
        rates = (counted / counted.max()) ** (1 / self.temperature)
        return rates / rates.sum()

    def order(self, sizes: Sequence[int], steps: int, *, seed: int, epoch: int) -> np.ndarray:
        """Returns the task of each step of an epoch, `[steps]` int64.

        The order is a function of the arguments alone.
        """
        if len(sizes) == 1:
            return np.zeros(steps, np.int64)
        generator = np.random.default_rng([seed, epoch, _STREAM])
        return generator.choice(len(sizes), steps, p=self.rates(sizes))


def parse(text: str) -> Mixture:
    """Parses a mixture from `temperature=10`, `limit=65536`, or both joined by a comma.

    Raises:
      ValueError: for any other text.
    """
    values: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if name not in ("temperature", "limit") or name in values or math.isnan(number):
            raise ValueError(
                f"--mixture {text!r} must be temperature=NUMBER, limit=NUMBER, or both with a "
                "comma between them"
            )
        values[name] = number
    return Mixture(**values)
