"""Rematerialisation of layers."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax

Remat: TypeAlias = Literal["off", "full", "dots"]


# Remat -> the policy that decides which arrays of a layer are kept for the backward pass; None
# keeps only the layer's input.
_KEPT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rematted(layer: type[nn.Module], remat: Remat, *, static_argnums: tuple[int, ...]) -> Any:
    """Returns `layer`, or a class whose activations the backward pass computes again.

    Args:
      layer: a class of modules.
      remat: "off"; "full", which keeps only the input of a layer; or "dots", which also keeps the
        products with weights and recomputes everything between them.
      static_argnums: positions of the call's arguments that are not arrays, with `self` at 0.

    Raises:
      ValueError: for another value of `remat`.
    """
    if remat == "off":
        return layer
    if remat not in _KEPT:
        raise ValueError(f"unknown remat={remat!r}; use 'off', 'full' or 'dots'")
    return nn.remat(layer, policy=_KEPT[remat], static_argnums=static_argnums)
