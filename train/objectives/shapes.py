"""A check that a method can act on a backbone, before any weight is read."""

from __future__ import annotations

from typing import Any

import compacter_jax as cj
from compacter_jax.compilation import initial_shapes
from compacter_jax.limits import memory_of_machine
from compacter_jax.methods.base import MethodConfig
from compacter_jax.models.families import max_tokens_of
from compacter_jax.params import group_of
from train.data import tokens
from train.objectives import check_length

_ADDED = ("adapters", "rule")


def check_fit(module: Any, method: MethodConfig, config: Any, max_length: int) -> None:
    """Checks, within a second or two, that a method can act on a backbone.

    Args:
      module: the module of the backbone, without parameters.
      method: the method, to be trained or saved.
      config: the backbone's configuration of transformers.
      max_length: the maximum input length in tokens, without a prompt.

    Raises:
      ValueError: if inputs are longer than the backbone's positions; as `compacter_jax.Adapted`,
        for an unknown site or a width that does not fit; or if this machine lacks the memory for
        the method's parameters.
    """
    tokens.check_max_length(max_length, max_tokens_of(config))
    check_length(config, method, max_length)
    shapes = initial_shapes(cj.Adapted(module, method))
    added = sum(leaf.size for path, leaf in shapes.items() if group_of(path) in _ADDED)
    # Checked here, since XLA ends the process if it cannot allocate memory.
    size, there = 4 * added, memory_of_machine()
    if there is not None and size > there:
        raise ValueError(
            f"method {method.kind} adds {added:,} numbers to the backbone, {size / 1e9:,.0f} GB, "
            f"but this machine has {there / 1e9:,.0f} GB; choose smaller widths"
        )
