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

# The bias of a label that a member of a bank, or its backbone, does not have: it has no probability
# and no gradient.
NO_LABEL = -1e30


def labels_apart(leaf: Array) -> tuple[Array, Array]:
    """Returns a leaf with 0 for labels that it lacks, and the mask of these labels."""
    lacking = leaf <= NO_LABEL / 2
    return jnp.where(lacking, 0, leaf), lacking


def with_rest(mixed: Array, lacking: Array, rest: Any, unused: Any, own: Array) -> Array:
    """Returns a weighted sum of members' leaves, in which the backbone's leaf gets the rest to 1.

    This rest is often only a rounding error, which must not be multiplied by `NO_LABEL`.

    Args:
      mixed: weighted sum, with 0 for labels that a member lacks.
      lacking: True for labels that a member with a weight lacks.
      rest: 1 less the sum of the weights.
      unused: True where no member has a weight.
      own: leaf of the backbone.
    """
    values, own_lacking = labels_apart(own)
    # `NO_LABEL` is added instead of selected, so that NaN stays NaN.
    return mixed + rest * values + jnp.where(lacking | (own_lacking & unused), NO_LABEL, 0)


def effective(
    node: MethodConfig,
    own: Leaf,
    stored: Mapping[Path, Array],
    route: Callable[[Path, int], Any],
    rows: int,
    path: Path = (),
) -> Leaf:
    """Returns the leaf that a host uses in place of its own.

    Args:
      node: a method.
      own: leaf of the backbone.
      stored: path of a member -> its leaf, `[size, …]` in a bank; a missing member uses the
        backbone's leaf.
      route: path of a bank and number of rows -> `Routing`, the members that each row uses.
      rows: number of rows of the batch.
      path: path of `node`.
    """
    if path in stored and not isinstance(node, Composition):
        return Leaf(stored[path])
    if not any(other[: len(path)] == path for other in stored):
        return own
    assert isinstance(node, Composition)
    if path in stored:  # the leaf of a bank
        return node.chosen(own, stored[path], lambda *leaves: route(path, rows).choose(*leaves))
    members = dict(node.children())

    def child(name: str, own: Leaf, rows: int) -> Leaf:
        return effective(members[name], own, stored, route, rows, (*path, name))

    return node.effective(child, own, rows)


def run_with(
    host: nn.Module, own: Mapping[str, Any], leaves: Mapping[str, Leaf], x: Array
) -> Array:
    """Calls a host with some of its leaves replaced.

    Args:
      host: module without submodules, such as a norm or a dense layer.
      own: parameters of the host.
      leaves: name -> leaf in place of the host's own.
      x: input, `[rows, …]`.
    """
    template: Any = host.clone(parent=None, name=None)
    same = {**own, **{name: leaf.value for name, leaf in leaves.items() if not leaf.by_row}}
    by_row = {name: leaf.value for name, leaf in leaves.items() if leaf.by_row}
    if not by_row:
        return template.apply({"params": same}, x)
    # Leaves that all rows share are not batched: a kernel is multiplied with all rows at once.
    return jax.vmap(lambda mine, x: template.apply({"params": {**same, **mine}}, x))(by_row, x)


def stored_leaf(own: Array, member: Member) -> Array:
    """Returns the initial value of a member's leaf for one of the backbone; of all in a bank."""
    if member.bank is None:
        return own
    return jnp.broadcast_to(own, (member.bank.size, *own.shape))
