"""Rotary positions: queries and keys turned by angles that grow with their positions."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array

from compacter_jax.nn.dense import Dtype

# Cosines and sines, each `[…, length, size / 2]`.
Rotary = tuple[Array, Array]


@functools.lru_cache
def rotary_table(length: int, size: int, base: float, dtype: Dtype) -> tuple[np.ndarray, ...]:
    """Returns the cosines and sines of the angles `position * base^(-2 j / size)`.

    In float32 the frequencies and their products with positions are rounded to float32, as in
    transformers: at position 8191 such an angle differs by up to 2e-4 from the exact one, and
    pre-trained models have seen the rounded angles.

    Args:
      length: number of positions, counted from 0.
      size: width of a head, an even number.
      base: base of the frequencies.
      dtype: float32 or float64, the precision of angles and results.

    Returns:
      Cosines and sines, `[length, size / 2]` each.

    References:
      Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, arXiv:2104.09864,
      equation 34.
    """
    frequencies = (float(base) ** (-np.arange(0, size, 2) / size)).astype(dtype)
    angles = np.arange(length).astype(dtype)[:, None] * frequencies
    exact = angles.astype(np.float64)
    return np.cos(exact).astype(dtype), np.sin(exact).astype(dtype)


def rotated(x: Array, rotary: Rotary) -> Array:
    """Returns queries or keys turned by the angles of their positions, in the dtype of `x`.

    Feature `j` of the first half of a head and feature `j` of the second half are the two
    coordinates that angle `j` turns.

    Args:
      x: `[batch, heads, length, size]`.
      rotary: cosines and sines, `[batch or 1, 1, length, size / 2]` each.
    """
    cos, sin = rotary
    first, second = jnp.split(x, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)
