"""The exact form of `alrd`: block coordinate descent with the covariance of all sensors.

The recursions of `compacter_jax.arrays.alternating` keep least squares whose past inputs belong to
basis vectors that have moved since. Here the covariance is kept and every step minimises with it,
so that the output power never rises from step to step. It is for tests, and to tell what is lost.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compacter_jax.arrays.least_squares import constrained, inner, matched, unit, windows


class SetState(NamedTuple):
    """State with a basis vector for each window.

    Attributes:
      starts: `[D]`, the first sensor of each window.
      steering: a_d, `[D, G, I]`.
      covariance: R, `[M, M]`.
      basis: phi_d, `[D, G, I]`, of length 1.
      weights: w, `[G, D]`.
    """

    starts: jax.Array
    steering: jax.Array
    covariance: jax.Array
    basis: jax.Array
    weights: jax.Array

    def step(self, snapshot: jax.Array, forgetting: Any) -> tuple[SetState, jax.Array]:
        """Returns the state after a snapshot `[M]`, and the spectrum `[G]`."""
        return self._replace(covariance=_with(self.covariance, snapshot, forgetting)).sweep()

    def sweep(self) -> tuple[SetState, jax.Array]:
        """Returns the state after each part has been minimised once, and the spectrum `[G]`."""
        moved = self
        for d in range(len(self.starts)):
            moved = moved.move(d)
        weights, spectrum = moved.minimised_weights()
        return moved._replace(weights=weights), spectrum

    def move(self, d: int) -> SetState:
        """Returns the state after basis vector d, with its weight, has been minimised."""
        selection = _selection(self.starts, self.basis.shape[-1], len(self.covariance))
        parts = jnp.einsum("gd,dgi,dim->dgm", self.weights, self.basis, selection)
        rest = jnp.sum(parts, axis=0) - parts[d]
        own = selection[d]  # [I, M]
        a = self.steering[d]
        crossed = rest @ (own @ self.covariance).T  # p, [G, I]
        free = 1 - jnp.einsum(
            "gd,dgi,dgi->g", self.weights.conj(), self.basis.conj(), self.steering
        )
        free += self.weights[:, d].conj() * inner(self.basis[d], a)
        both = jnp.concatenate([crossed, a]).T
        solved = jnp.linalg.solve(own @ self.covariance @ own.T, both).T
        crossed, image = jnp.split(solved, 2)
        scale = (free.conj() + inner(a, crossed)) / inner(a, image).real
        vector, length = unit(scale[:, None] * image - crossed)
        return self._replace(
            basis=self.basis.at[d].set(vector), weights=self.weights.at[:, d].set(length)
        )

    def minimised_weights(self) -> tuple[jax.Array, jax.Array]:
        """Returns the weights of least power for the basis as it stands, and this power."""
        return _minimised_weights(self)


class SharedState(NamedTuple):
    """State with one basis vector for all windows.

    Attributes:
      starts: `[D]`, the first sensor of each window.
      steering: a_d, `[D, G, I]`.
      covariance: R, `[M, M]`.
      basis: phi, `[1, G, I]`, of length 1.
      weights: w, `[G, D]`.
    """

    starts: jax.Array
    steering: jax.Array
    covariance: jax.Array
    basis: jax.Array
    weights: jax.Array

    def step(self, snapshot: jax.Array, forgetting: Any) -> tuple[SharedState, jax.Array]:
        """Returns the state after a snapshot `[M]`, and the spectrum `[G]`."""
        return self._replace(covariance=_with(self.covariance, snapshot, forgetting)).sweep()

    def sweep(self) -> tuple[SharedState, jax.Array]:
        """Returns the state after each part has been minimised once, and the spectrum `[G]`."""
        selection = _selection(self.starts, self.basis.shape[-1], len(self.covariance))
        mixed = jnp.einsum("gd,dim->gim", self.weights, selection)
        reduced = jnp.einsum("gim,mn,gjn->gij", mixed.conj(), self.covariance, mixed)
        aim = jnp.einsum("gd,dgi->gi", self.weights.conj(), self.steering)
        vector, _ = unit(jnp.linalg.solve(reduced, aim[..., None])[..., 0])
        moved = self._replace(basis=vector[None])
        weights, spectrum = _minimised_weights(moved)
        return moved._replace(weights=weights), spectrum


def _with(covariance: jax.Array, snapshot: jax.Array, forgetting: Any) -> jax.Array:
    return forgetting * covariance + jnp.outer(snapshot, snapshot.conj())


def _selection(starts: jax.Array, window: int, sensors: int) -> jax.Array:
    """Returns P_d^T, `[D, I, M]`."""
    return windows(jnp.eye(sensors), starts, window).transpose(1, 2, 0)


def _minimised_weights(state: SetState | SharedState) -> tuple[jax.Array, jax.Array]:
    selection = _selection(state.starts, state.basis.shape[-1], len(state.covariance))
    basis = jnp.broadcast_to(state.basis, state.steering.shape)
    vectors = jnp.einsum("dgi,dim->gdm", basis, selection)  # S^T
    reduced = jnp.einsum("gdm,mn,gen->gde", vectors.conj(), state.covariance, vectors)
    aim = inner(basis, state.steering).T
    return constrained(jnp.linalg.solve(reduced, aim[..., None])[..., 0], aim)


def initial_set(responses: jax.Array, window: int, rank: int, loading: Any) -> SetState:
    """Returns the state before the first snapshot, for steering vectors `[G, M]`."""
    starts, steered, basis = matched(responses, window, rank)
    weights = jnp.full((len(responses), rank), 1 / (rank * window**0.5), responses.dtype)
    return SetState(starts, steered, _loaded(responses, loading), basis, weights)


def initial_shared(responses: jax.Array, window: int, rank: int, loading: Any) -> SharedState:
    """Returns the state before the first snapshot, for steering vectors `[G, M]`."""
    starts, steered, basis = matched(responses, window, rank)
    weights = jnp.full((len(responses), rank), 1 / rank, responses.dtype)
    return SharedState(starts, steered, _loaded(responses, loading), basis[:1], weights)


def _loaded(responses: jax.Array, loading: Any) -> jax.Array:
    return loading * jnp.eye(responses.shape[1], dtype=responses.dtype)
