"""The model of a line of sensors: steering vectors, drawn snapshots and the Cramer-Rao bound."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from compacter_jax.arrays.checks import check_angles, is_traced


def steering(angles: Any, sensors: int) -> jax.Array:
    """Returns the responses of a line of sensors, half a wavelength apart, to far sources.

    Entry m is `exp(-j pi m cos t)`, m = 0 … M - 1.

    Args:
      angles: `[K]` directions t in degrees.
      sensors: M, the number of sensors.

    Returns:
      `[K, M]`, complex128 for float64 angles where JAX has 64 bits enabled, else complex64.

    Raises:
      ValueError: if an angle is outside 0 to 180 degrees, or there are no sensors.
    """
    check_angles(angles)
    if sensors < 1:
        raise ValueError(f"sensors={sensors} should be at least 1")
    angles = jnp.asarray(angles)
    if not jnp.issubdtype(angles.dtype, jnp.floating):
        angles = angles.astype(float)
    cosines = jnp.cos(jnp.deg2rad(angles))
    return jnp.exp(-1j * jnp.pi * jnp.arange(sensors, dtype=cosines.dtype) * cosines[:, None])


def simulate(
    key: jax.Array,
    angles: Any,
    sensors: int,
    snapshots: int,
    snr_db: Any,
    correlation: Any = 0.0,
) -> jax.Array:
    """Returns snapshots `r(i) = A s(i) + n(i)` of drawn sources and noise of power 1.

    Sources and noise are circular complex Gaussians, independent from snapshot to snapshot.

    Args:
      key: a JAX random key.
      angles: `[K]` directions in degrees.
      sensors: M, the number of sensors.
      snapshots: N, the number of snapshots.
      snr_db: power of each source over that of the noise at one sensor, in decibels: a number or
        `[K]`.
      correlation: correlation of each two sources, 0 to 1; with 1 they are coherent: copies of one
        signal, in phase at the first sensor.

    Returns:
      `[N, M]`, complex, of the dtype of `steering`.

    Raises:
      ValueError: if angles or sizes do not fit, or the correlation is outside 0 to 1.
    """
    _check_correlation(correlation)
    if snapshots < 1:
        raise ValueError(f"snapshots={snapshots} should be at least 1")
    responses = steering(angles, sensors)
    sources = responses.shape[0]
    own, common, noise = (
        jax.random.normal(each, (snapshots, width), responses.dtype)
        for each, width in zip(jax.random.split(key, 3), (sources, 1, sensors), strict=True)
    )
    correlation = jnp.asarray(correlation, responses.real.dtype)
    signals = jnp.sqrt(1 - correlation) * own + jnp.sqrt(correlation) * common
    return (signals * jnp.sqrt(_powers(snr_db, sources, responses))) @ responses + noise


def cramer_rao(
    angles: Any, sensors: int, snapshots: int, snr_db: Any, correlation: Any = 0.0
) -> jax.Array:
    """Returns the least standard deviation that an unbiased estimate of each direction can have.

    This is the bound for Gaussian sources of unknown covariance P: with noise of power 1,
    `R = A P A^H + I`, E the derivatives of the steering vectors and Π the projection that takes
    away A, the covariance of the directions is at least
    `(2 N Re[(E^H Π E) * (P A^H R^-1 A P)^T])^-1` (Stoica and Nehorai, 1990). It is not the bound
    of an estimate that knows the correlation.

    Args:
      angles: `[K]` directions in degrees.
      sensors: M, the number of sensors.
      snapshots: N, the number of snapshots.
      snr_db: as for `simulate`.
      correlation: as for `simulate`.

    Returns:
      `[K]`, in degrees.

    Raises:
      ValueError: as `simulate`.
    """
    _check_correlation(correlation)
    responses = steering(angles, sensors).T  # [M, K], A of the paper
    sources = responses.shape[1]
    sines = jnp.sin(jnp.deg2rad(jnp.asarray(angles, responses.real.dtype)))
    slopes = 1j * jnp.pi * jnp.arange(sensors)[:, None] * sines * responses
    amplitudes = jnp.sqrt(_powers(snr_db, sources, responses))
    correlations = jnp.full((sources, sources), jnp.asarray(correlation, amplitudes.dtype))
    correlations = jnp.where(jnp.eye(sources, dtype=bool), 1, correlations)
    power = amplitudes[:, None] * correlations * amplitudes
    covariance = responses @ power @ responses.conj().T + jnp.eye(sensors)
    apart = slopes - responses @ jnp.linalg.lstsq(responses, slopes)[0]
    seen = power @ responses.conj().T @ jnp.linalg.solve(covariance, responses @ power)
    information = 2 * snapshots * ((slopes.conj().T @ apart) * seen.T).real
    return jnp.rad2deg(jnp.sqrt(jnp.diag(jnp.linalg.inv(information))))


def _powers(snr_db: Any, sources: int, responses: jax.Array) -> jax.Array:
    decibels = jnp.asarray(snr_db, responses.real.dtype)
    return 10 ** (jnp.broadcast_to(decibels, (sources,)) / 10)


def _check_correlation(correlation: Any) -> None:
    if not is_traced(correlation) and not 0 <= correlation <= 1:
        raise ValueError(f"correlation={correlation} should be from 0 to 1")
