"""Decoding of one token after another: greedy search or sampling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from compacter_jax.decode.settings import NO_TOKEN, Settings, Step, constrain, is_end


def one_by_one(
    step: Step, cache: Any, rows: int, settings: Settings, key: Array | None
) -> tuple[Array, Array]:
    """Runs greedy search, or sampling if there is a key."""
    ids = jnp.full((rows, 1 + settings.max_new_tokens), settings.pad or 0, jnp.int32)
    ids = ids.at[:, 0].set(settings.start)

    def unfinished(state: Any) -> Array:
        index, _, finished, _ = state
        return (index < settings.max_new_tokens) & ~finished.all()

    def extend(state: Any) -> Any:
        index, ids, finished, cache = state
        logits, cache = step(ids[:, index], cache, index)
        logits = constrain(logits, index, settings)
        if key is None:
            tokens = _most_probable(logits)
        else:
            logits = cut_logits(logits, settings)
            drawn = jax.random.categorical(jax.random.fold_in(key, index), logits)
            tokens = jnp.where(jnp.isnan(logits.max(-1)), NO_TOKEN, drawn)
        tokens = jnp.where(finished, ids[:, index + 1], tokens)  # padding, once finished
        ids = ids.at[:, index + 1].set(tokens.astype(jnp.int32))
        return index + 1, ids, finished | is_end(tokens, settings), cache

    state = (jnp.int32(0), ids, jnp.zeros(rows, bool), cache)
    index, ids, _, _ = lax.while_loop(unfinished, extend, state)
    return ids, 1 + index


def _most_probable(logits: Array) -> Array:
    """Returns the first most probable token per row, `[rows, vocab] -> [rows]`; `NO_TOKEN` for NaN.

    The result equals `argmax`. A CPU is faster here, because XLA vectorizes the two reductions, but
    not the reduction of pairs in `argmax`. They act on the transpose, the layout in which
    `tied_logits` computes the logits.
    """
    columns = logits.T
    index = lax.broadcasted_iota(jnp.int32, columns.shape, 0)
    largest = columns.max(0)
    first = jnp.where(columns < largest, columns.shape[0], index).min(0)
    return jnp.where(jnp.isnan(largest), NO_TOKEN, first)


def cut_logits(logits: Array, settings: Settings) -> Array:
    """Applies temperature, top-k and top-p to `[rows, vocab]`, in transformers' order.

    Tokens that are cut get -inf.
    """
    logits = logits / settings.temperature
    if settings.top_k is not None:
        best, _ = lax.top_k(logits, min(settings.top_k, logits.shape[-1]))
        logits = jnp.where(logits < best[:, -1:], -jnp.inf, logits)
    if settings.top_p < 1:
        order = logits.argsort(-1)
        ascending = jnp.take_along_axis(logits, order, -1)
        below = jax.nn.softmax(ascending, -1).cumsum(-1) <= 1 - settings.top_p
        below = below.at[:, -1].set(False)  # never the most probable token
        # argsort of a permutation is its inverse
        cut = jnp.take_along_axis(below, order.argsort(-1), -1)
        logits = jnp.where(cut, -jnp.inf, logits)
    return logits
