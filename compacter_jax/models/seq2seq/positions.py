"""Sinusoidal positions of M2M-100 and Marian, which are computed and not learned."""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from compacter_jax.nn.dense import Dtype


@functools.lru_cache
def m2m_table(first: int, count: int, width: int) -> np.ndarray:
    """Returns the sinusoids of positions from `first` on, `[count, width]` float64.

    Sines come before cosines; an odd width has a last column of zeros. With h = width // 2, the
    frequencies are `exp(-k ln(10000) / (h - 1))` for k from 0 to h - 1.

    References:
      Fan et al., Beyond English-Centric Multilingual Machine Translation, arXiv:2010.11125; the
      sinusoids of tensor2tensor.
    """
    half = width // 2
    frequencies = np.exp(np.arange(half) * (-math.log(10_000) / (half - 1)))
    angles = np.arange(first, first + count)[:, None] * frequencies
    table = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    return np.pad(table, ((0, 0), (0, width % 2)))


@functools.lru_cache
def marian_table(count: int, width: int) -> np.ndarray:
    """Returns the sinusoids of positions from 0 on, `[count, width]` float64, sines first.

    Feature j is the sine (j even) or the cosine (j odd) of `position / 10000^(2 (j // 2) / width)`,
    with all sines before all cosines.

    References:
      Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762, section 3.5.
    """
    pairs = np.arange(width) // 2
    angles = np.arange(count)[:, None] / np.power(10_000.0, 2 * pairs / width)
    return np.concatenate([np.sin(angles[:, 0::2]), np.cos(angles[:, 1::2])], axis=1)


def m2m_positions(
    ids: Array, width: int, pad: int | None, index: Array | None, room: int | None, dtype: Dtype
) -> Array:
    """Returns the positions of M2M-100 for tokens, `[batch, length, width]`.

    Args:
      ids: `[batch, length]` integers.
      width: width of the hidden states.
      pad: padding token p; token number j of a row that is not padding, from 1 on, has the position
        p + j, and padding has zeros.
      index: number of tokens before the only one, of which none counts as padding; None to count
        the tokens of the row.
      room: largest `index` plus one; None without an index.
      dtype: dtype of the result.
    """
    first = (0 if pad is None else pad) + 1
    present = jnp.ones(ids.shape, bool) if pad is None else ids != pad
    count = ids.shape[1] if room is None else room
    table = jnp.asarray(m2m_table(first, count, width), dtype)
    if index is None:
        before = jnp.cumsum(present, axis=1) - present
    else:
        before = jnp.broadcast_to(index, ids.shape)
    return jnp.where(present[..., None], table[before], 0)


def marian_positions(
    length: int, width: int, index: Array | None, room: int | None, dtype: Dtype
) -> Array:
    """Returns the positions of Marian, `[length, width]`, which padding does not change.

    Args:
      length: number of tokens.
      width: width of the hidden states.
      index: position of the first token; None for 0.
      room: largest `index` plus one; None without an index.
      dtype: dtype of the result.
    """
    table = jnp.asarray(marian_table(length if room is None else room, width), dtype)
    return table if index is None else table[index + jnp.arange(length)]
