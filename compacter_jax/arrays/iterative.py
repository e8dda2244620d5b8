"""Joint iterative optimisation of a rank-reduction matrix and a vector, from its abstract."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from compacter_jax.arrays.checks import (
    check_angles,
    check_memory_of_recursion,
    check_snapshots,
)
from compacter_jax.arrays.least_squares import constrained, followed, identity, inner, updated
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
    `b = T^H a` take the place of r and a, and `w = Q_w b / (b^H Q_w b)`. Start: T picks the first D
    sensors, `w = b / |b|^2`.

    This T has rank one, so that z and b lie along w, and w never turns: the power
    `1 / (b^H Q_w b)` is `forgetting^N loading / D + sum_l forgetting^{N-l} |g(l)^H r(l)|^2`, with
    the filter g(l) of its time. It is computed in this form. With matrices, a rounding error across
    w would grow from snapshot to snapshot.

    Args:
      snapshots: `[N, M]`, complex64 or complex128.
      angles: `[G]` grid in degrees, rising.
      rank: D, the number of columns of T.
      forgetting: alpha, the factor by which a snapshot loses weight with each later one, in (0, 1].
      loading: the multiple of the identity that both covariances start from.

    Returns:
      The spectrum `[G]`, real.

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


@jax.jit
def _scan(
    snapshots: jax.Array, responses: jax.Array, forgetting: Any, loading: Any, rank: int
) -> jax.Array:
    grid, sensors = responses.shape

    def step(carry: Any, x: jax.Array) -> tuple[Any, None]:
        inverse, image, power = carry
        inverse, gain = updated(inverse, x, forgetting)
        image = followed(image, x, gain, forgetting)
        capon, _ = constrained(image, responses)
        power = forgetting * power + jnp.abs(inner(capon, x)) ** 2
        return (inverse, image, power), None

    start = (
        identity(sensors, (), loading, responses.dtype),
        responses / loading,
        jnp.full(grid, loading / rank, responses.real.dtype),
    )
    (_, _, spectrum), _ = jax.lax.scan(step, start, snapshots)
    return spectrum
