"""Capon's spectrum, MUSIC and ESPRIT with spatial smoothing, and the peaks of a spectrum."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compacter_jax.arrays.checks import (
    check_angles,
    check_memory_of_recursion,
    check_snapshots,
    check_sources,
)
from compacter_jax.arrays.least_squares import inner
from compacter_jax.arrays.model import steering


def covariance(snapshots: jax.Array, window: int | None = None) -> jax.Array:
    """Returns the sum of `r r^H` over snapshots, smoothed along the line of sensors if requested.

    Smoothing is the mean over all windows of the line, forward and backward:
    `(R + J conj(R) J) / 2` with J the reversal.

    Args:
      snapshots: `[N, M]`, complex.
      window: L, the number of sensors in a window; None for all sensors and no smoothing.

    Returns:
      `[L, L]`, or `[M, M]` without a window.
    """
    if window is None:
        return snapshots.T @ snapshots.conj()
    count = snapshots.shape[1] - window + 1
    parts = snapshots[:, jnp.arange(count)[:, None] + jnp.arange(window)]
    forward = jnp.einsum("nki,nkj->ij", parts, parts.conj()) / count
    return (forward + forward[::-1, ::-1].conj()) / 2


def capon(
    snapshots: jax.Array,
    angles: Any,
    *,
    window: int | None = None,
    forgetting: Any = 1.0,
    loading: Any = 1.0,
) -> jax.Array:
    """Returns Capon's spectrum `1 / (a^H R^-1 a)`, the least output power with response 1.

    R is the covariance that recursions with the same `forgetting` and `loading` have after the last
    snapshot, `sum_l forgetting^{N-l} r r^H + forgetting^N loading I`.

    Args:
      snapshots: `[N, M]`, complex64 or complex128.
      angles: `[G]` grid in degrees, rising.
      window: sensors in a window of forward and backward spatial smoothing, for correlated sources;
        None for no smoothing.
      forgetting: the factor by which a snapshot loses weight with each later one, in (0, 1].
      loading: the multiple of the identity in R.

    Returns:
      `[G]`, real.

    Raises:
      ValueError: if grid, settings or snapshots do not fit.
    """
    check_memory_of_recursion(forgetting, loading)
    responses, snapshots = _prepared(snapshots, angles, window)
    return _capon(snapshots, responses, forgetting, loading, window=window)


@partial(jax.jit, static_argnames="window")
def _capon(
    snapshots: jax.Array, responses: jax.Array, forgetting: Any, loading: Any, window: int | None
) -> jax.Array:
    age = jnp.arange(len(snapshots) - 1, -1, -1, dtype=snapshots.real.dtype)
    weighted = snapshots * (forgetting ** (age / 2))[:, None]
    size = responses.shape[1]
    matrix = covariance(weighted, window)
    matrix += forgetting ** len(snapshots) * loading * jnp.eye(size, dtype=matrix.dtype)
    factor = jax.scipy.linalg.cholesky(matrix, lower=True)
    white = jax.scipy.linalg.solve_triangular(factor, responses.T, lower=True)
    return 1 / jnp.sum(jnp.abs(white) ** 2, axis=0)


def music(
    snapshots: jax.Array, angles: Any, sources: int, *, window: int | None = None
) -> jax.Array:
    """Returns MUSIC's spectrum (Schmidt, 1986).

    It is one over the squared length of the part of `a / |a|` that lies in the noise subspace.

    Args:
      snapshots: `[N, M]`, complex64 or complex128.
      angles: `[G]` grid in degrees, rising.
      sources: K, the number of sources.
      window: sensors in a window of forward and backward spatial smoothing, for correlated sources;
        None for no smoothing.

    Returns:
      `[G]`, real.

    Raises:
      ValueError: if grid, windows or snapshots do not fit, or a window cannot tell the sources
        apart.
    """
    responses, snapshots = _prepared(snapshots, angles, window, sources)
    return _music(snapshots, responses, sources=sources, window=window)


@partial(jax.jit, static_argnames=("sources", "window"))
def _music(
    snapshots: jax.Array, responses: jax.Array, sources: int, window: int | None
) -> jax.Array:
    _, vectors = jnp.linalg.eigh(covariance(snapshots, window))
    outside = responses.conj() @ vectors[:, : responses.shape[1] - sources]
    return responses.shape[1] / inner(outside, outside).real


def esprit(snapshots: jax.Array, sources: int, *, window: int | None = None) -> jax.Array:
    """Returns directions by least-squares ESPRIT (Roy and Kailath, 1989).

    Args:
      snapshots: `[N, M]`, complex64 or complex128.
      sources: K, the number of sources.
      window: sensors in a window of forward and backward spatial smoothing, for correlated sources;
        None for no smoothing.

    Returns:
      `[K]` degrees in rising order.

    Raises:
      ValueError: if windows or snapshots do not fit, or a window cannot tell the sources apart.
    """
    check_snapshots(snapshots)
    _check_window(snapshots, window, sources)
    return _esprit(jnp.asarray(snapshots), sources=sources, window=window)


@partial(jax.jit, static_argnames=("sources", "window"))
def _esprit(snapshots: jax.Array, sources: int, window: int | None) -> jax.Array:
    _, vectors = jnp.linalg.eigh(covariance(snapshots, window))
    signal = vectors[:, -sources:]
    rotation = jnp.linalg.lstsq(signal[:-1], signal[1:])[0]
    cosines = -jnp.angle(jnp.linalg.eigvals(rotation)) / jnp.pi
    return jnp.sort(jnp.rad2deg(jnp.arccos(cosines)))


def _prepared(
    snapshots: jax.Array, angles: Any, window: int | None, sources: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the steering vectors of a window, and the snapshots, after checks."""
    check_snapshots(snapshots)
    check_angles(angles, fewest=2)
    size = _check_window(snapshots, window, sources)
    snapshots = jnp.asarray(snapshots)
    return steering(angles, size).astype(snapshots.dtype), snapshots


def _check_window(snapshots: jax.Array, window: int | None, sources: int | None) -> int:
    """Returns the number of sensors in a window."""
    count, sensors = np.shape(snapshots)
    size = sensors if window is None else window
    if not 1 <= size <= sensors:
        raise ValueError(f"window={window} should be from 1 to the number of sensors, {sensors}")
    if sources is not None:
        check_sources(sources, size)
        seen = count if window is None else 2 * count * (sensors - size + 1)
        if sources > seen:
            raise ValueError(
                f"{sources} sources have no subspace in {count} snapshots; use more snapshots or a "
                "smaller window"
            )
    return size


def peaks(spectrum: jax.Array, angles: Any, sources: int) -> jax.Array:
    """Returns the directions of the highest local maxima of a spectrum.

    A maximum is refined by the parabola through the logarithms at its grid point and at the two
    beside it. The ends of the grid are no maxima.

    Args:
      spectrum: `[..., G]`, positive.
      angles: `[G]` grid in degrees, rising.
      sources: K, the number of maxima.

    Returns:
      `[..., K]` degrees in rising order; NaN, at the end, where there are fewer maxima.

    Raises:
      ValueError: if the grid does not fit the spectrum, or has no room for the maxima.
    """
    check_angles(angles, fewest=2)
    grid = np.shape(angles)[0]
    if np.shape(spectrum)[-1:] != (grid,):
        raise ValueError(
            f"spectrum of shape {list(np.shape(spectrum))} should end with {grid}, one for each "
            "angle"
        )
    if not 1 <= sources <= grid - 2:
        raise ValueError(f"sources={sources} should be from 1 to {grid - 2} on {grid} angles")
    return _peaks(jnp.asarray(spectrum), jnp.asarray(angles), sources=sources)


@partial(jax.jit, static_argnames="sources")
def _peaks(spectrum: jax.Array, angles: jax.Array, sources: int) -> jax.Array:
    angles = angles.astype(spectrum.dtype)
    left, middle, right = spectrum[..., :-2], spectrum[..., 1:-1], spectrum[..., 2:]
    heights = jnp.where((middle > left) & (middle >= right), middle, -jnp.inf)
    heights, at = jax.lax.top_k(heights, sources)
    low, top, high = (jnp.log(jnp.take_along_axis(spectrum, at + i, axis=-1)) for i in range(3))
    before, after = angles[at + 1] - angles[at], angles[at + 2] - angles[at + 1]
    # The vertex of the parabola through (-before, low), (0, top), (after, high).
    rise, fall = (top - low) / before, (top - high) / after
    shift = (rise * after - fall * before) / (2 * (rise + fall))
    return jnp.sort(jnp.where(jnp.isfinite(heights), angles[at + 1] + shift, jnp.nan), axis=-1)
