"""Recursive least squares, and windows over the line of sensors: what the recursions share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def identity(size: int, batch: tuple[int, ...], loading: Any, dtype: Any) -> jax.Array:
    """Returns `I / loading`, the start of an inverse, `[*batch, size, size]`."""
    return jnp.broadcast_to(jnp.eye(size, dtype=dtype) / loading, (*batch, size, size))


def updated(inverse: jax.Array, vector: jax.Array, forgetting: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the inverse Q of `forgetting * Q^-1 + v v^H`, and the gain.

    By the inversion lemma, `k = Q v / (forgetting + v^H Q v)` and
    `Q <- (Q - k v^H Q) / forgetting`.
    Division by `forgetting` would let the part of a rounding error that is not Hermitian grow
    without bound, since no snapshot takes it away; so this part is removed.

    Args:
      inverse: Q, `[..., n, n]`, Hermitian.
      vector: v, `[..., n]`.
      forgetting: a number in (0, 1].

    Returns:
      The new inverse `[..., n, n]`, Hermitian, and the gain k `[..., n]`.
    """
    image = applied(inverse, vector)
    gain = image / (forgetting + inner(vector, image).real)[..., None]
    inverse = (inverse - gain[..., :, None] * image.conj()[..., None, :]) / forgetting
    return (inverse + jnp.swapaxes(inverse, -1, -2).conj()) / 2, gain


def followed(image: jax.Array, vector: jax.Array, gain: jax.Array, forgetting: Any) -> jax.Array:
    """Returns `Q u` after an update of Q, from `Q u` before it: O(n) operations in place of O(n^2).

    Args:
      image: `Q u` for the old Q and any vector u, `[..., n]`.
      vector: v of the update, `[..., n]`.
      gain: k of the update, `[..., n]`.
      forgetting: a number in (0, 1].

    Returns:
      `(Q u - k v^H Q u) / forgetting`, `[..., n]`.
    """
    return (image - gain * inner(vector, image)[..., None]) / forgetting


def applied(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    """Returns the products of small matrices `[..., n, n]` and vectors `[..., n]`."""
    # On a CPU a batched product of complex matrices takes several times as long as this sum.
    return jnp.sum(matrix * vector[..., None, :], axis=-1)


def inner(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns `left^H right` over the last axis."""
    return jnp.sum(left.conj() * right, axis=-1)


def constrained(image: jax.Array, constraint: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the weights of least output power with response 1, and this power.

    Args:
      image: `Q b`, `[..., n]`, where Q is the inverse of a covariance.
      constraint: b, `[..., n]`: the weights w have `w^H b = 1`.

    Returns:
      `w = Q b / (b^H Q b)`, `[..., n]`, and `1 / (b^H Q b)`, `[...]`, real.
    """
    power = 1 / inner(constraint, image).real
    return image * power[..., None], power


def unit(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns a vector scaled to length 1, and its length; zero stays zero."""
    length = jnp.sqrt(inner(vector, vector).real)
    return vector / jnp.where(length == 0, 1, length)[..., None], length


def window_starts(sensors: int, window: int, rank: int) -> jax.Array:
    """Returns the first sensors of windows, evenly spaced from 0 to `sensors - window`, `[D]`."""
    last = sensors - window
    return jnp.array([round(d * last / max(rank - 1, 1)) for d in range(rank)])


def matched(responses: jax.Array, window: int, rank: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what both forms start from.

    Args:
      responses: steering vectors, `[G, M]`.
      window: I, the number of sensors in a window.
      rank: D, the number of windows.

    Returns:
      The first sensor of each window `[D]`, the windows of the steering vectors `[D, G, I]`, and
      these scaled to length 1, the basis vectors that match a plane wave.
    """
    starts = window_starts(responses.shape[1], window, rank)
    steered = jnp.moveaxis(windows(responses, starts, window), 1, 0)
    return starts, steered, steered / steered.real.dtype.type(window) ** 0.5


def windows(values: jax.Array, starts: jax.Array, window: int) -> jax.Array:
    """Returns the windows `[..., D, window]` of values `[..., M]`."""
    return values[..., starts[:, None] + jnp.arange(window)]
