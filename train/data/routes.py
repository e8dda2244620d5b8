"""Members of a bank and languages of the rows of a batch, which translation does not share."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Routes:
    """Members of a bank and languages, one entry for each example.

    Attributes:
      directions: `[examples]` int32, positions in the objective's list of directions.
      adapter_ids: `[examples]` int32, the members of a bank; None without a bank.
      first_tokens: `[examples]` int32, the tokens that a decoder is forced to write first; None if
        it is free.
    """

    directions: np.ndarray
    adapter_ids: np.ndarray | None = None
    first_tokens: np.ndarray | None = None

    def columns(self) -> dict[str, np.ndarray]:
        """Returns the columns of a batch, name -> `[examples]` int32."""
        values = {"adapter_ids": self.adapter_ids, "first_tokens": self.first_tokens}
        return {name: value for name, value in values.items() if value is not None}

    def taken(self, positions: np.ndarray) -> Routes:
        """Returns the entries of the examples at `positions`."""
        return Routes(
            self.directions[positions],
            **{name: value[positions] for name, value in self.columns().items()},
        )
