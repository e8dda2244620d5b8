"""The head alone: what the features of the frozen backbone are worth."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from compacter_jax.methods.base import MethodConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOnlyConfig(MethodConfig):
    """The task's head on a frozen backbone, also called a linear probe; nothing is inserted.

    It is the baseline of every other method. A backbone without a head of the task, such as T5, has
    nothing that it could train.
    """

    kind: ClassVar[str] = "head_only"
    own_groups: ClassVar[frozenset[str]] = frozenset()
