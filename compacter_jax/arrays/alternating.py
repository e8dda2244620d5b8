"""Alternating low-rank decomposition, after the abstract of Qiu, Cai, de Lamare and Zhao.

Only the abstract of arXiv:1604.04321 was at hand. The formulas are a reconstruction from it and
from constrained least squares; `docs/arrays.md` derives them and says what is guessed.

Window d picks I of the M sensors, from number mu_d on: `x_d = P_d^T r`, `a_d = P_d^T a(t)`. With
basis vectors `s_d = P_d phi_d`, `S = [s_1 … s_D]` and a short auxiliary vector w, the recursion
minimises the output power for every angle t of a grid,

    sum_{l <= i} alpha^{i-l} |w^H S^H r(l)|^2   subject to   w^H S^H a(t) = 1,

over the basis vectors and w in turn. The power that is left is the spectrum at t.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compacter_jax.arrays import covariance
from compacter_jax.arrays.checks import (
    check_angles,
    check_memory_of_recursion,
    check_snapshots,
    check_windows,
)
from compacter_jax.arrays.least_squares import (
    applied,
    constrained,
    followed,
    identity,
    inner,
    matched,
    unit,
    updated,
    windows,
)
from compacter_jax.arrays.model import steering


class SetState(NamedTuple):
    """State of the form with a set of basis vectors, one for each window (ALRD-RLS).

    With Q_d the inverse covariance of window d, `Q_d a_d` and `Q_d p_d` follow the update of Q_d by
    themselves, `g <- (g - k x^H g) / alpha`: a snapshot costs O(D I) operations for an angle, where
    a product with Q_d would cost O(D I^2).

    Attributes:
      starts: `[D]`, the first sensor of each window.
      steering: a_d, `[D, G, I]`.
      inverses: Q_d, `[D, I, I]`, the same for all angles.
      images: `Q_d a_d`, `[D, G, I]`.
      crossed: `Q_d p_d`, `[D, G, I]`.
      basis: phi_d, `[D, G, I]`, of length 1.
      weights: w, `[G, D]`.
      inverse: Q_w, `[G, D, D]`.
    """

    starts: jax.Array
    steering: jax.Array
    inverses: jax.Array
    images: jax.Array
    crossed: jax.Array
    basis: jax.Array
    weights: jax.Array
    inverse: jax.Array

    def step(self, snapshot: jax.Array, forgetting: Any) -> tuple[SetState, jax.Array]:
        """Returns the state after a snapshot `[M]`, and the spectrum `[G]`."""
        x = windows(snapshot, self.starts, self.basis.shape[-1])  # [D, I]
        inverses, gains = updated(self.inverses, x, forgetting)
        images = followed(self.images, x[:, None], gains[:, None], forgetting)

        def one(total: Any, given: Any) -> Any:
            """Moves one basis vector; `total` has each one's part of output and response."""
            outputs, responses = total
            d, x, gain, a, image, crossed = given
            others = (jnp.arange(len(outputs)) != d)[:, None]
            error = jnp.sum(jnp.where(others, outputs, 0), axis=0)
            rest = 1 - jnp.sum(jnp.where(others, responses, 0), axis=0)
            crossed += gain * (error.conj() - inner(x, crossed))[:, None]
            scale = (rest.conj() + inner(a, crossed)) / inner(a, image).real
            moved = scale[:, None] * image - crossed
            total = outputs.at[d].set(inner(moved, x)), responses.at[d].set(inner(moved, a))
            return total, (crossed, *unit(moved))

        weights = self.weights.T.conj()
        start = (
            weights * inner(self.basis, x[:, None]),
            weights * inner(self.basis, self.steering),
        )
        given = (jnp.arange(len(x)), x, gains, self.steering, images, self.crossed)
        _, (crossed, basis, _) = jax.lax.scan(one, start, given)
        inverse, weights, spectrum = _auxiliary(
            self.inverse, basis, x[:, None], self.steering, forgetting
        )
        state = self._replace(
            inverses=inverses,
            images=images,
            crossed=crossed,
            basis=basis,
            weights=weights,
            inverse=inverse,
        )
        return state, spectrum


class SharedState(NamedTuple):
    """State of the form with one basis vector for all windows (a guess at MARLD-RLS).

    Attributes:
      starts: `[D]`, the first sensor of each window.
      steering: a_d, `[D, G, I]`.
      basis_inverse: Q_phi, `[G, I, I]`.
      basis: phi, `[1, G, I]`, of length 1.
      weights: w, `[G, D]`.
      inverse: Q_w, `[G, D, D]`.
    """

    starts: jax.Array
    steering: jax.Array
    basis_inverse: jax.Array
    basis: jax.Array
    weights: jax.Array
    inverse: jax.Array

    def step(self, snapshot: jax.Array, forgetting: Any) -> tuple[SharedState, jax.Array]:
        """Returns the state after a snapshot `[M]`, and the spectrum `[G]`."""
        x = windows(snapshot, self.starts, self.basis.shape[-1])  # [D, I]
        weights = self.weights.T.conj()[..., None]  # [D, G, 1]
        mixed, aim = (jnp.sum(weights * each, axis=0) for each in (x[:, None], self.steering))
        basis_inverse, gain = updated(self.basis_inverse, mixed, forgetting)
        # A product with the new inverse takes a third longer.
        image = applied(self.basis_inverse, aim)
        basis, _ = unit(followed(image, mixed, gain, forgetting))
        inverse, weights, spectrum = _auxiliary(
            self.inverse, basis, x[:, None], self.steering, forgetting
        )
        state = self._replace(
            basis_inverse=basis_inverse, basis=basis[None], weights=weights, inverse=inverse
        )
        return state, spectrum


def _auxiliary(
    inverse: jax.Array, basis: jax.Array, x: jax.Array, a: jax.Array, forgetting: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns Q_w, the auxiliary vector w and the spectrum, for a basis that stands still."""
    reduced, aim = inner(basis, x).T, inner(basis, a).T  # z and b, [G, D]
    inverse, _ = updated(inverse, reduced, forgetting)
    return inverse, *constrained(applied(inverse, aim), aim)


State = SetState | SharedState | covariance.SetState | covariance.SharedState


def alrd_init(
    angles: Any,
    sensors: int,
    *,
    window: int,
    rank: int,
    modified: bool = False,
    loading: Any = 1.0,
    recursion: str = "rls",
    dtype: Any = jnp.complex64,
    sources: int | None = None,
) -> State:
    """Returns the state of `alrd` before the first snapshot; `alrd_step` takes it on.

    Args:
      angles: `[G]` grid in degrees, rising.
      sensors: M, the number of sensors.
      window: I, the number of sensors in a window.
      rank: D, the number of windows.
      modified: True for one basis vector that all windows share.
      loading: the multiple of the identity that covariances start from; 1 is the power of the noise
        in one snapshot of `simulate`.
      recursion: "rls" or "covariance"; see `alrd`.
      dtype: complex64 or complex128, the dtype of the snapshots.
      sources: the number of sources to be found, which is only checked.

    Raises:
      ValueError: if grid, windows or settings do not fit.
    """
    check_angles(angles, fewest=2)
    check_windows(sensors, window, rank, sources)
    check_memory_of_recursion(1.0, loading)
    make = _INITIAL.get((recursion, modified))
    if make is None:
        raise ValueError(f"recursion={recursion!r} should be 'rls' or 'covariance'")
    return make(steering(angles, sensors).astype(dtype), window, rank, loading)


def _initial_set(responses: jax.Array, window: int, rank: int, loading: Any) -> SetState:
    starts, steered, basis = matched(responses, window, rank)
    grid, dtype = len(responses), responses.dtype
    return SetState(
        starts=starts,
        steering=steered,
        inverses=identity(window, (rank,), loading, dtype),
        images=steered / loading,
        crossed=jnp.zeros_like(steered),
        basis=basis,
        weights=jnp.full((grid, rank), 1 / (rank * window**0.5), dtype),
        inverse=identity(rank, (grid,), loading, dtype),
    )


def _initial_shared(responses: jax.Array, window: int, rank: int, loading: Any) -> SharedState:
    starts, steered, basis = matched(responses, window, rank)
    grid, dtype = len(responses), responses.dtype
    return SharedState(
        starts=starts,
        steering=steered,
        basis_inverse=identity(window, (grid,), loading, dtype),
        basis=basis[:1],
        weights=jnp.full((grid, rank), 1 / rank, dtype),
        inverse=identity(rank, (grid,), loading, dtype),
    )


_INITIAL: dict[tuple[str, bool], Callable[..., State]] = {
    ("rls", False): _initial_set,
    ("rls", True): _initial_shared,
    ("covariance", False): covariance.initial_set,
    ("covariance", True): covariance.initial_shared,
}


def alrd_step(
    state: State, snapshot: jax.Array, forgetting: Any = 0.998
) -> tuple[State, jax.Array]:
    """Returns the state after one more snapshot, and the spectrum.

    Args:
      state: what `alrd_init` or `alrd_step` returned.
      snapshot: `[M]`, complex, of the dtype of the state.
      forgetting: alpha, in (0, 1].

    Returns:
      The state, and the spectrum `[G]`, real.

    Raises:
      ValueError: if `forgetting` is outside (0, 1], or the snapshot does not fit.
    """
    check_memory_of_recursion(forgetting, 1.0)
    check_snapshots(snapshot[None])
    return _step(state, snapshot, forgetting)


@jax.jit
def _step(state: State, snapshot: jax.Array, forgetting: Any) -> tuple[State, jax.Array]:
    return state.step(snapshot, forgetting)


def alrd_filters(state: State, sensors: int) -> jax.Array:
    """Returns the filter `S w` of every angle, whose output for a snapshot r is `(S w)^H r`.

    Args:
      state: what `alrd_init` or `alrd_step` returned.
      sensors: M, the number of sensors.

    Returns:
      `[G, M]`, complex.
    """
    parts = jnp.moveaxis(state.weights.T[..., None] * state.basis, 0, 1)  # [G, D, I]
    places = state.starts[:, None] + jnp.arange(parts.shape[-1])
    return jnp.zeros((len(parts), sensors), parts.dtype).at[:, places].add(parts)


def alrd(
    snapshots: jax.Array,
    angles: Any,
    *,
    window: int,
    rank: int,
    modified: bool = False,
    forgetting: Any = 0.998,
    loading: Any = 1.0,
    recursion: str = "rls",
    history: bool = False,
    sources: int | None = None,
) -> jax.Array:
    """Returns the power spectrum by alternating low-rank decomposition.

    This is a reconstruction after the abstract of Qiu, Cai, de Lamare and Zhao
    (arXiv:1604.04321); see `docs/arrays.md`. `modified` is a guess at their MARLD-RLS.

    Args:
      snapshots: `[N, M]`, complex64 or complex128.
      angles: `[G]` grid in degrees, rising.
      window: I, the number of sensors in a window; windows start at evenly spaced sensors.
      rank: D, the number of windows.
      modified: True for one basis vector that all windows share, False for one for each.
      forgetting: alpha, the factor by which a snapshot loses weight with each later one, in (0, 1].
      loading: the multiple of the identity that covariances start from.
      recursion: "rls" for recursive least squares, or "covariance" for the exact form, which keeps
        the covariance of all sensors and minimises with it; it costs more.
      history: True for the spectrum after every snapshot.
      sources: the number of sources to be found, which is only checked.

    Returns:
      The spectrum `[G]`, or `[N, G]` with `history`, real.

    Raises:
      ValueError: if grid, windows, settings or snapshots do not fit.
    """
    check_snapshots(snapshots)
    check_memory_of_recursion(forgetting, loading)
    snapshots = jnp.asarray(snapshots)
    state = alrd_init(
        angles,
        snapshots.shape[1],
        window=window,
        rank=rank,
        modified=modified,
        loading=loading,
        recursion=recursion,
        dtype=snapshots.dtype,
        sources=sources,
    )
    return _scan(state, snapshots, forgetting, history=history)


@partial(jax.jit, static_argnames="history")
def _scan(state: State, snapshots: jax.Array, forgetting: Any, history: bool) -> jax.Array:
    def step(carry: Any, snapshot: jax.Array) -> Any:
        state, spectrum = carry[0].step(snapshot, forgetting)
        return (state, spectrum), (spectrum if history else None)

    grid = jnp.zeros(state.weights.shape[0], snapshots.real.dtype)
    (_, last), every = jax.lax.scan(step, (state, grid), snapshots)
    return every if history else last
