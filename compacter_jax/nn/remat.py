"""Rematerialisation of layers."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax

Remat: TypeAlias = Literal["off", "full", "dots"]


# What of a layer is kept for the backward pass, where it is recomputed; None keeps its input alone.
_KEPT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def rematted(layer: type[nn.Module], remat: Remat, *, static_argnums: tuple[int, ...]) -> Any:
    """`layer`, or one that the backward pass computes again.

    Args:
      layer: a class of modules.
      remat: "off"; "full", which keeps a layer's input alone; or "dots", which keeps the products
        with weights, too, and computes again what is between them.
      static_argnums: arguments of a call that are no arrays, self counted.

    Raises:
      ValueError: if `remat` is something else.
    """
    if remat == "off":
        return layer
    if remat not in _KEPT:
        raise ValueError(f"unknown remat={remat!r}; use 'off', 'full' or 'dots'")
    return nn.remat(layer, policy=_KEPT[remat], static_argnums=static_argnums)
