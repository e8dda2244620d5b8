"""Beam search."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compacter_jax.decode.settings import NO_TOKEN, Settings, Step, constrain, is_end
from compacter_jax.nn.attention import Cache

# The number that transformers adds to the score of a hypothesis that must not be chosen.
_EXCLUDED = -1e9


class _Beams(NamedTuple):
    """State of a beam search; `n` is `num_beams`, and hypotheses are sorted by their scores."""

    done: Array  # [] int32, tokens generated
    running: Array  # [batch, n, width] int32
    running_scores: Array  # [batch, n] float32, log probabilities
    ended: Array  # [batch, n, width] int32
    ended_scores: Array  # [batch, n] float32, with the length penalty
    lengths: Array  # [batch, n] int32, tokens generated in each of `ended`
    is_ended: Array  # [batch, n] bool, True if that place of `ended` is filled
    improvable: Array  # [batch, 1] bool, True if a running hypothesis may enter `ended`
    stuck: Array  # [] bool, True if nothing is left to extend
    cache: Any  # what changes of the cache, rows of `running` flattened


class _Candidates(NamedTuple):
    """Extensions of the running hypotheses, best first; `m` is at least twice `num_beams`."""

    ids: Array  # [batch, m, width] int32
    scores: Array  # [batch, m] float32
    parents: Array  # [batch, m] int32, index of the running hypothesis that each extends
    ends: Array  # [batch, m] bool


def beam_search(step: Step, cache: Cache, rows: int, settings: Settings) -> tuple[Array, Array]:
    """Runs a beam search with the same scores as transformers, so that the tokens agree."""

    def unfinished(beams: _Beams) -> Array:
        go_on = beams.improvable.any() & ~beams.stuck
        return go_on & ~beams.is_ended.all() if settings.early_stopping is True else go_on

    def extend(beams: _Beams) -> _Beams:
        tokens = beams.running[:, :, beams.done].reshape(-1)
        logits, changed = step(tokens, beams.cache, beams.done)
        candidates = _candidates(beams, logits, settings)
        beams = _collect_ended(beams, candidates, settings)
        beams = _keep_running(beams._replace(cache=changed), candidates, cache)
        return _look_ahead(beams, settings)

    beams = lax.while_loop(unfinished, extend, _first_beams(cache.changing, rows, settings))
    copies = settings.num_return_sequences
    ids = jnp.where(jnp.isnan(beams.ended_scores)[..., None], NO_TOKEN, beams.ended)
    ids = ids[:, :copies].reshape(rows * copies, -1)
    return ids, 1 + beams.lengths[:, :copies].max(initial=0)


def _first_beams(cache: Any, rows: int, settings: Settings) -> _Beams:
    shape = (rows, settings.num_beams)
    # Transformers treats a pad token of 0 as none.
    fill = settings.pad or (settings.eos[0] if settings.eos else 0)
    ids = jnp.full((*shape, 1 + settings.max_new_tokens), fill, jnp.int32)
    ids = ids.at[..., 0].set(settings.start)
    # All hypotheses start equal, so only the first may be extended.
    scores = jnp.zeros(shape, jnp.float32).at[:, 1:].set(_EXCLUDED)
    return _Beams(
        done=jnp.int32(0),
        running=ids,
        running_scores=scores,
        ended=ids,
        ended_scores=jnp.full(shape, _EXCLUDED, jnp.float32),
        lengths=jnp.zeros(shape, jnp.int32),
        is_ended=jnp.zeros(shape, bool),
        improvable=jnp.ones((rows, 1), bool),
        stuck=jnp.asarray(False),
        cache=cache,
    )


def _candidates(beams: _Beams, logits: Array, settings: Settings) -> _Candidates:
    """Returns the best `max(2, 1 + len(eos)) * num_beams` extensions.

    If all others end, `num_beams` of them remain.
    """
    rows, n, _ = beams.running.shape
    vocab_size = logits.shape[-1]
    scores = constrain(jax.nn.log_softmax(logits), beams.done, settings)
    scores = scores.reshape(rows, n, vocab_size) + beams.running_scores[..., None]
    scores, flat = lax.top_k(
        scores.reshape(rows, n * vocab_size), max(2, 1 + len(settings.eos)) * n
    )
    parents, tokens = flat // vocab_size, flat % vocab_size
    ids = rows_at(beams.running, parents).at[:, :, beams.done + 1].set(tokens)
    ends = is_end(tokens, settings) | (beams.done + 1 == settings.max_new_tokens)
    return _Candidates(ids, scores, parents, ends)


def _collect_ended(beams: _Beams, candidates: _Candidates, settings: Settings) -> _Beams:
    """Keeps the best of the hypotheses that had ended and those that just ended."""
    n = settings.num_beams
    # The other candidates are a reserve to continue with, not results.
    just_ended = candidates.ends & (jnp.arange(candidates.ends.shape[1]) < n)
    length = beams.done + 1
    scores = candidates.scores / _penalty(length, settings)
    if settings.early_stopping is True:
        scores += beams.is_ended.all(-1, keepdims=True) * _EXCLUDED
    scores += ~beams.improvable * _EXCLUDED
    scores += ~just_ended * _EXCLUDED
    scores, best = lax.top_k(jnp.concatenate([beams.ended_scores, scores], 1), n)

    def merge(old: Array, new: Array) -> Array:
        return rows_at(jnp.concatenate([old, new], 1), best)

    return beams._replace(
        ended=merge(beams.ended, candidates.ids),
        ended_scores=scores,
        lengths=merge(beams.lengths, jnp.full_like(candidates.parents, length)),
        is_ended=merge(beams.is_ended, just_ended),
    )


def _keep_running(beams: _Beams, candidates: _Candidates, cache: Cache) -> _Beams:
    """Keeps the best running hypotheses, each with the cache of its parent."""
    rows, n, _ = beams.running.shape
    scores, best = lax.top_k(candidates.scores + candidates.ends * _EXCLUDED, n)
    parents = (rows_at(candidates.parents, best) + n * jnp.arange(rows)[:, None]).reshape(-1)
    return beams._replace(
        done=beams.done + 1,
        running=rows_at(candidates.ids, best),
        running_scores=scores,
        stuck=candidates.ends.all(),
        cache=cache.reordered(beams.cache, parents),
    )


def _look_ahead(beams: _Beams, settings: Settings) -> _Beams:
    """Updates for each row if its best running hypothesis can still beat its worst ended one."""
    length = beams.done
    if settings.early_stopping == "never" and settings.length_penalty > 0:
        length = jnp.int32(settings.max_new_tokens)
    best = beams.running_scores[:, :1] / _penalty(length, settings)
    worst = jnp.where(
        beams.is_ended, beams.ended_scores.min(-1, keepdims=True), jnp.float32(_EXCLUDED)
    )
    could = (best > worst).any(-1, keepdims=True)
    return beams._replace(improvable=beams.improvable & could)


def _penalty(length: Array, settings: Settings) -> Array:
    """Returns `length ** length_penalty`, rounded once, as Python's numbers are."""
    table = np.arange(1, settings.max_new_tokens + 1) ** np.float64(settings.length_penalty)
    return jnp.asarray(table, jnp.float32)[length - 1]


def rows_at(array: Array, indices: Array) -> Array:
    """Returns `[batch, m, …]`, the hypotheses `[batch, n, …]` at the places `[batch, m]`."""
    indices = indices.reshape(indices.shape + (1,) * (array.ndim - 2))
    return jnp.take_along_axis(array, indices, 1, mode="clip")
