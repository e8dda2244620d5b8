"""Several tasks in one run: how often each of them gives a batch, and when."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

# Beside the seed and the epoch, so that no other draw shares its stream.
_STREAM = 0x6D6978


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Rates `min(examples, limit) ** (1 / temperature)`, divided by their sum.

    Attributes:
      temperature: 1 draws in proportion to the examples, more draws small tasks more often.
      limit: examples beyond so many do not count.

    References:
      Raffel et al., Exploring the Limits of Transfer Learning, JMLR 2020, arXiv:1910.10683,
      section 3.5.2.
    """

    temperature: float = 1.0
    limit: float = math.inf

    def __post_init__(self) -> None:
        for name in ("temperature", "limit"):
            value = getattr(self, name)
            if not value >= 1:
                raise ValueError(f"{name}={value:g} of --mixture must be at least 1")

    def rates(self, sizes: Sequence[int]) -> np.ndarray:
        """`[tasks]` float64, sum 1, of tasks with so many examples."""
        # The largest is taken out of the power, which would overflow for none.
        counted = np.minimum(np.array(sizes, np.float64), self.limit)
        rates = (counted / counted.max()) ** (1 / self.temperature)
        return rates / rates.sum()

    def order(self, sizes: Sequence[int], steps: int, *, seed: int, epoch: int) -> np.ndarray:
        """`[steps]` int64: whose batch each step of an epoch takes; a function of its arguments."""
        if len(sizes) == 1:
            return np.zeros(steps, np.int64)
        generator = np.random.default_rng([seed, epoch, _STREAM])
        return generator.choice(len(sizes), steps, p=self.rates(sizes))


def parse(text: str) -> Mixture:
    """A mixture from `temperature=10`, `limit=65536`, or both with a comma between them.

    Raises:
      ValueError: for anything else.
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
