"""Shapes of an adapted backbone, which its configuration tells before any weight is read."""

from __future__ import annotations

from typing import Any

import jax
from flax.traverse_util import flatten_dict

import compacter_jax as cj
from compacter_jax.limits import memory_of_machine
from compacter_jax.methods.base import MethodConfig
from compacter_jax.params import group_of
from train.data import tokens
from train.objectives import check_length

_ADDED = ("adapters", "rule")


def shapes_of(module: Any) -> dict[str, Any]:
    """Returns `/`-joined path -> shape and dtype of a module's parameters; nothing is computed.

    Args:
      module: a backbone, or a `compacter_jax.Adapted`.
    """
    backbone = getattr(module, "backbone", module)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), *backbone.dummy_inputs())["params"]
    )
    return flatten_dict(shapes, sep="/")


def check_fit(module: Any, method: MethodConfig, config: Any, max_length: int) -> None:
    """Checks that a method can act on a backbone, in a second or two.

    Args:
      module: the backbone's, without parameters.
      method: to be trained, or saved.
      config: of transformers, of the backbone.
      max_length: longest input in tokens, a prompt aside.

    Raises:
      ValueError: if inputs are longer than the backbone's positions, as `compacter_jax.Adapted` for
        an unknown site or a width that does not fit, or if this machine has not enough memory for
        what the method adds.
    """
    positions = getattr(config, "max_position_embeddings", None)
    tokens.check_max_length(max_length, positions)
    if positions is not None:
        check_length(config, method, max_length)
    shapes = shapes_of(cj.Adapted(module, method))
    added = sum(leaf.size for path, leaf in shapes.items() if group_of(path) in _ADDED)
    # Nobody asks XLA for memory that there is not: it ends the process.
    size, there = 4 * added, memory_of_machine()
    if there is not None and size > there:
        raise ValueError(
            f"method {method.kind} adds {added:,} numbers to the backbone, {size / 1e9:,.0f} GB, "
            f"and this machine has {there / 1e9:,.0f} GB; choose smaller widths"
        )
