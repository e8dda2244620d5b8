"""Banks: adapters of one shape; each row of a batch uses one of them, or a mixture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from jax import Array

from compacter_jax.compositions.base import Composition, Leaf, Member, replaced_groups
from compacter_jax.methods.base import MethodConfig
from compacter_jax.methods.fields import require


@dataclasses.dataclass(frozen=True, init=False)
class Bank(Composition):
    """Adapters of one shape; each row of a batch uses one of them, or a mixture.

    Their parameters are those of one adapter with a leading axis `size`. A call of a model with a
    bank takes `adapter_ids` `[batch]`, the member of each row (-1 for the plain backbone), or
    `mix`, the weights of the members' outputs.

    `stack_adapters` makes a bank of saved adapters. `Bank(method, size=n)` is a method like any
    other, and `init_adapters` creates its parameters for training.

    Attributes:
      size: number of places for members; a program that is compiled for a size works for all
        members that are put in and taken out.
      shared_rule: True for one rule in all members, if each member has one for the whole model;
        otherwise each member has its own.
    """

    kind: ClassVar[str] = "bank"

    size: int = 1
    shared_rule: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.size >= 1, "size", self.size, "at least 1")
        if len(self.members) != 1 or isinstance(self.members[0], Composition):
            raise ValueError(
                "a bank holds `size` adapters of one method, and that method cannot be a "
                "composition; put banks inside a composition, not compositions inside a bank"
            )
        if self.shared_rule:
            self._check_rule()

    def _check_rule(self) -> None:
        rules = {part.rule for part in self.inserted()} - {None}
        if "shared" not in rules:
            has = "has a rule in every projection" if rules else "has no rule"
            fix = "set shared_phm_rule=True in it, or " if rules else ""
            raise ValueError(
                "shared_rule=True needs a method with one rule for the whole model, but "
                f"{self.member.kind!r} {has}; {fix}leave shared_rule out"
            )

    @property
    def member(self) -> MethodConfig:
        """Method of every member."""
        return self.members[0]

    @property
    def allows_unadapted_rows(self) -> bool:
        """True if a row can be without an adapter: no method adds tokens or shifts positions."""
        return all(part.allows_unadapted_rows for part in self.inserted())

    def single_methods(self) -> tuple[Member, ...]:
        """Returns the method of the members, as one `Member`."""
        is_trained = self.names[0] not in self.frozen
        return (Member((), self.member, self, is_trained, replaced_groups(self.member)),)

    def chosen(self, own: Leaf, stored: Array, choose: Callable[[Any, Any], Any]) -> Leaf:
        """Returns the leaf of the member that each row uses, or of their mixture."""
        value = choose(stored, own.value)
        return Leaf(value, own.by_row or value.ndim == stored.ndim)


def bank_of(method: MethodConfig) -> Bank:
    """Returns `method`, if it is a bank.

    Raises:
      ValueError: if it is not a bank.
    """
    if not isinstance(method, Bank):
        raise ValueError(
            f"the model's method is {method.kind!r}, not a bank; for another composition, use "
            "get_member to get one member"
        )
    return method
