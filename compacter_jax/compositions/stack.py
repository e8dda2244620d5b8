"""Stacks: adapters in sequence."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from compacter_jax.compositions.base import Combine, Composition, EffectiveOf, Leaf, members_of


@dataclasses.dataclass(frozen=True, init=False)
class Stack(Composition):
    """Adapters in sequence: at each site, a member reads the result of the member before it.

    Only one member can have its own layer norms (or biases, with BitFit); the head is the last
    member's.
    """

    kind: ClassVar[str] = "stack"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unjoined()
        prompts = [part for part in self.inserted() if part.extra_tokens]
        if len(prompts) > 1:
            kind = prompts[0].kind
            raise ValueError(f"a stack can have only one member of the kind {kind!r}")
        owners = [
            name
            for name, member in zip(self.names, self.members, strict=True)
            if any(own.replaces & {"layer norms", "biases"} for own in members_of(member, True))
        ]
        if len(owners) > 1:
            raise ValueError(
                f"the members {', '.join(owners)} of a stack each have layer norms or biases of "
                "their own, but a host can have only one set of them; set train_layer_norms=False "
                "in all but one"
            )

    def groups_of_others(self, name: str) -> frozenset[str]:
        """Returns head and pooler for all members but the last: they follow the whole stack."""
        is_last = name == self.names[-1]
        return frozenset() if is_last else frozenset({"head", "pooler"})

    def combine(self, child: Combine, x: Any, context: Any) -> Any:
        """Returns the effect of all members in sequence."""
        for name in self.names:
            x = child(name, x, context)
        return x

    def effective(self, child: EffectiveOf, own: Leaf, rows: int) -> Leaf:
        """Returns the leaf of the last member that has one."""
        for name in self.names:
            own = child(name, own, rows)
        return own
