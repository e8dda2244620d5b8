"""Joint iterative optimisation of a rank-reduction matrix and a vector, from its abstract."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from compacter_jax.arrays.checks import (
    check_angles,
    check_memory_of_recursion,
    check_snapshots,
)
from compacter_jax.arrays.least_squares import constrained, identity, inner, updated
from compacter_jax.arrays.model import steering


def jio(
    snapshots: jax.Array,
    angles: Any,
    *,
    rank: int,
    forgetting: Any = 0.998,
    loading: Any = 1.0,
) -> jax.Array:
    """Returns the power spectrum by joint iterative optimisation with recursive least squares.

    For every angle a matrix T `[M, D]` reduces the rank and a vector w makes the output
    `w^H T^H r`. Both are found in turn, from the abstract of Wang, de Lamare and Haardt
    (arXiv:1402.2710): with Q the inverse covariance of all sensors, the T of least output power and
    least norm is `g w^H / |w|^2` with Capon's filter `g = Q a / (a^H Q a)`; then `z = T^H r` and
    `b = T^H a` take the place of r and a for w. Start: T picks the first D sensors, `w = b / |b|^2`.

    Args:
      snapshots: `[N, M]`, complex64 or complex128.
      angles: `[G]` grid in degrees, rising.
      rank: D, the number of columns of T.
      forgetting: alpha, the factor by which a snapshot loses weight with each later one, in (0, 1].
      loading: the multiple of the identity that both covariances start from.

    Returns:
      The spectrum `1 / (b^H Q_w b)`, `[G]`, real.

    Raises:
      ValueError: if grid, settings or snapshots do not fit.
    """
    check_snapshots(snapshots)
    check_angles(angles, fewest=2)
    check_memory_of_recursion(forgetting, loading)
    snapshots = jnp.asarray(snapshots)
    sensors = snapshots.shape[1]
    if not 1 <= rank <= sensors:
        raise ValueError(f"rank={rank} should be from 1 to the number of sensors, {sensors}")
    responses = steering(angles, sensors).astype(snapshots.dtype)
    return _scan(snapshots, responses, forgetting, loading, rank=rank)


@partial(jax.jit, static_argnames="rank")
def _scan(
    snapshots: jax.Array, responses: jax.Array, forgetting: Any, loading: Any, rank: int
) -> jax.Array:
    grid, sensors = responses.shape
    dtype = responses.dtype

    def step(carry: Any, x: jax.Array) -> tuple[Any, None]:
        whole, image, weights, inverse, _ = carry
        whole, gain = updated(whole, x, forgetting)
        # `Q a` follows the update of Q: O(M) operations for an angle.
        image = (image - inner(x, image)[:, None] * gain) / forgetting
        capon, _ = constrained(image, responses)
        direction = weights / inner(weights, weights)[:, None]
        reduced = direction * inner(capon, x)[:, None]
        aim = direction * inner(capon, responses)[:, None]
        inverse, _ = updated(inverse, reduced, forgetting)
        weights, power = constrained(jnp.einsum("gij,gj->gi", inverse, aim), aim)
        return (whole, image, weights, inverse, power), None

    start = (
        identity(sensors, (), loading, dtype),
        responses / loading,
        responses[:, :rank] / rank,
        identity(rank, (grid,), loading, dtype),
        jnp.zeros(grid, responses.real.dtype),
    )
    (*_, spectrum), _ = jax.lax.scan(step, start, snapshots)
    return spectrum
