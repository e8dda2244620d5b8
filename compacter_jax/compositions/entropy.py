"""Mixtures chosen at test time: the weights that make predictions most certain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Mixed(NamedTuple):
    """The result of `minimize_entropy`.

    Attributes:
      weights: `[batch, n]` or `[batch, sites, n]`, found for each row separately; they sum to 1.
      logits: logits with these weights, `[batch, …, labels]`.
      entropies: `[batch, steps + 1]`, before every step and after the last, in nats.
    """

    weights: Array
    logits: Array
    entropies: Array


def minimize_entropy(
    logits_fn: Callable[..., Array],
    n: int,
    *inputs: Any,
    steps: int,
    learning_rate: float,
    mask: Any = None,
    sites: int | None = None,
) -> Mixed:
    """Finds, for each example, the weights of `n` adapters that make its predictions most certain.

    The function minimises the entropy by gradient descent on scores, from equal weights; the
    weights are the softmax of the scores. It needs no labels, so it runs at prediction time.
    Examples do not affect each other. All steps are one compiled program.

    Args:
      logits_fn: `logits_fn(weights, *inputs_of_one_example)` returns logits, `[labels]` or
        `[length, labels]`; the weights are `[n]`, or `[sites, n]`. With a bank: `lambda mix, ids:
        model.apply({"params": params}, ids[None], mix=mix[None])[0]`. The same function object is
        compiled only once. To change parameters, make them arguments of the function, and pass
        `jax.tree_util.Partial(logits_fn, params)`.
      n: number of adapters.
      *inputs: arrays `[batch, …]`.
      steps: number of steps of gradient descent; 0 leaves the weights equal.
      learning_rate: learning rate of gradient descent.
      mask: `[batch, length]`, zero where a prediction does not count, such as at padding.
      sites: number of sites with their own weights, `len(mixing_sites(params))`; None for the same
        weights at all sites.

    Raises:
      ValueError: if `n` or `learning_rate` is not positive, `steps` is negative, or there are no
        inputs.

    References:
      Wang et al., Efficient Test Time Adapter Ensembling for Low-resource Language Varieties,
      Findings of EMNLP 2021, arXiv:2109.04877, section 3.
    """
    for name, value in (("n", n), ("learning_rate", learning_rate)):
        if not value > 0:
            raise ValueError(f"{name}={value} must be positive")
    if steps < 0:
        raise ValueError(f"steps={steps} must be at least 0")
    if not inputs:
        raise ValueError(
            "minimize_entropy needs at least one input after n, an array of shape [batch, …]"
        )
    if not isinstance(logits_fn, jax.tree_util.Partial):
        logits_fn = jax.tree_util.Partial(logits_fn)
    shape = (n,) if sites is None else (sites, n)
    return _minimize(logits_fn, inputs, mask, learning_rate, shape=shape, steps=steps)


@functools.partial(jax.jit, static_argnames=("shape", "steps"))
def _minimize(
    logits_fn: Callable[..., Array],
    inputs: tuple[Any, ...],
    mask: Any,
    learning_rate: Array,
    *,
    shape: tuple[int, ...],
    steps: int,
) -> Mixed:
    def one(inputs: tuple[Any, ...], mask: Any) -> Mixed:
        def objective(scores: Array) -> tuple[Array, Array]:
            logits = logits_fn(jax.nn.softmax(scores), *inputs)
            return _mean_entropy(logits, mask), logits

        def step(scores: Array, _: None) -> tuple[Array, Array]:
            (entropy, _), slope = jax.value_and_grad(objective, has_aux=True)(scores)
            return scores - learning_rate * slope, entropy

        scores, entropies = jax.lax.scan(step, jnp.zeros(shape), length=steps)
        last, logits = objective(scores)
        return Mixed(jax.nn.softmax(scores), logits, jnp.append(entropies, last))

    return jax.vmap(one)(inputs, mask)


def _mean_entropy(logits: Array, mask: Any) -> Array:
    """Returns the mean entropy of logits `[…, labels]`, over a mask `[…]` if there is one."""
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits.astype(dtype))
    entropies = -(jnp.exp(log_probabilities) * log_probabilities).sum(-1)
    if mask is None:
        return entropies.mean()
    counts = jnp.asarray(mask) != 0
    return (entropies * counts).sum() / jnp.maximum(counts.sum(), 1)
