"""Parallel adapters: the rows of a batch pass through each."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from compacter_jax.compositions.base import (
    Combine,
    Composition,
    EffectiveOf,
    Leaf,
    copies_of,
    parallel_names,
)


@dataclasses.dataclass(frozen=True, init=False)
class Parallel(Composition):
    """Parallel adapters: each gets a copy of every row of a batch, and a call returns a tuple.

    Rows are copied for each member at the start of the backbone. A call is one program that costs
    as much as one call for each member. A T5 is called like any other backbone, but `generate`
    takes a model of one member. The command line supports parallel adapters only on encoders, for
    tasks with labels or scores.
    """

    kind: ClassVar[str] = "parallel"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unjoined()
        self._refuse_added_tokens(
            "its rows are longer than those of the other members; call each model by itself",
        )

    def copies(self) -> int:
        """Returns the number of copies that a model of the composition makes of each row."""
        return sum(copies_of(member) for member in self.members)

    def parallel_names(self) -> tuple[str, ...]:
        """Returns the names of the members, or of the items of members that return tuples."""
        return tuple(
            "/".join(filter(None, (name, each)))
            for name, member in self.children()
            for each in parallel_names(member) or ("",)
        )

    def combine(self, child: Combine, x: Any, context: Any) -> Any:
        """Returns each member's effect on its own copies of the rows."""
        parts = [child(name, *self._chunk(i, (x, context))) for i, name in enumerate(self.names)]
        return jnp.concatenate(parts)

    def effective(self, child: EffectiveOf, own: Leaf, rows: int) -> Leaf:
        """Returns a leaf with the rows of all members."""
        parts = []
        for i, (name, member) in enumerate(self.children()):
            count = rows // self.copies() * copies_of(member)
            mine = Leaf(self._chunk(i, own.value), by_row=True) if own.by_row else own
            value, by_row = child(name, mine, count)
            parts.append(value if by_row else jnp.broadcast_to(value, (count, *value.shape)))
        return Leaf(jnp.concatenate(parts), by_row=True)

    def _chunk(self, index: int, tree: Any) -> Any:
        """Returns the rows of one member from arrays with the rows of all."""
        copies = [copies_of(member) for member in self.members]
        first, last = sum(copies[:index]), sum(copies[: index + 1])

        def cut(x: Any) -> Any:
            each = x.shape[0] // sum(copies)
            return x[first * each : last * each]

        return jax.tree.map(cut, tree)
