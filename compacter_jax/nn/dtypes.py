"""Dtypes of computations."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def at_least_float32(x: Array) -> Array:
    """Converts an array of 16 bits to float32; float32 and float64 stay as they are."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
