"""Leaves of the backbone that members of a composition replace by their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from compacter_jax.compositions.base import Composition, Leaf, Member, Path
from compacter_jax.methods.base import MethodConfig

# Bias of a label that a member of a bank, or its backbone, does not have: no probability, no
# gradient.
NO_LABEL = -1e30


def labels_apart(leaf: Array) -> tuple[Array, Array]:
    """A leaf with 0 for labels that it lacks, and which those are."""
    lacking = leaf <= NO_LABEL / 2
    return jnp.where(lacking, 0, leaf), lacking


def with_rest(mixed: Array, lacking: Array, rest: Any, unused: Any, own: Array) -> Array:
    """A weighted sum of members' leaves, with what is missing from a sum of 1 the backbone's.

    That rest is often nothing but rounding, which must not be multiplied by `NO_LABEL`.

    Args:
      mixed: the sum, with 0 for labels that a member lacks.
      lacking: those that one with a weight lacks.
      rest: 1 less the sum of the weights.
      unused: where no member has a weight.
      own: the backbone's.
    """
    values, own_lacking = labels_apart(own)
    # Added, not put in place, so that what is not a number stays so.
    return mixed + rest * values + jnp.where(lacking | (own_lacking & unused), NO_LABEL, 0)


def effective(
    node: MethodConfig,
    own: Leaf,
    stored: Mapping[Path, Array],
    route: Callable[[Path, int], Any],
    rows: int,
    path: Path = (),
) -> Leaf:
    """Returns what a host computes with, in place of a leaf of its own.

    Args:
      node: a method.
      own: the backbone's.
      stored: path of a member -> its leaf, `[size, …]` of a bank; a member that is not here has
        the backbone's.
      route: path of a bank and number of rows -> `Routing`, which rows use which of its members.
      rows: of the batch.
      path: of `node`.
    """
    if path in stored and not isinstance(node, Composition):
        return Leaf(stored[path])
    if not any(other[: len(path)] == path for other in stored):
        return own
    assert isinstance(node, Composition)
    if path in stored:  # of a bank
        return node.chosen(own, stored[path], lambda *leaves: route(path, rows).choose(*leaves))
    members = dict(node.children())

    def child(name: str, own: Leaf, rows: int) -> Leaf:
        return effective(members[name], own, stored, route, rows, (*path, name))

    return node.effective(child, own, rows)


def run_with(
    host: nn.Module, own: Mapping[str, Any], leaves: Mapping[str, Leaf], x: Array
) -> Array:
    """A call of a host with some of its leaves replaced.

    Args:
      host: a module without parts of its own, such as a norm or a dense layer.
      own: its parameters.
      leaves: name -> what it is to have in place of its own.
      x: `[rows, …]`.
    """
    template: Any = host.clone(parent=None, name=None)
    same = {**own, **{name: leaf.value for name, leaf in leaves.items() if not leaf.by_row}}
    by_row = {name: leaf.value for name, leaf in leaves.items() if leaf.by_row}
    if not by_row:
        return template.apply({"params": same}, x)
    # What rows have in common is not batched: a kernel is multiplied with all of them at once.
    return jax.vmap(lambda mine, x: template.apply({"params": {**same, **mine}}, x))(by_row, x)


def stored_leaf(own: Array, member: Member) -> Array:
    """What a member has at first in place of a leaf of the backbone; of a bank, every member."""
    if member.bank is None:
        return own
    return jnp.broadcast_to(own, (member.bank.size, *own.shape))
