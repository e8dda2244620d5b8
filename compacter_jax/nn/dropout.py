"""Dropout whose masks do not depend on padding, for the backbones and the adapters."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.random import threefry_2x32


class Dropout(nn.Dropout):
    """Dropout as in flax, with the masks of `dropout_mask`; for two to four axes."""

    @nn.compact
    def __call__(
        self, inputs: Array, deterministic: bool | None = None, rng: Array | None = None
    ) -> Array:
        deterministic = nn.merge_param("deterministic", self.deterministic, deterministic)
        if self.rate == 0 or deterministic:
            return inputs
        key = self.make_rng(self.rng_collection) if rng is None else rng
        kept = _kept_of_65536(self.rate)
        mask = dropout_mask(key, inputs.shape, self.rate)
        return jnp.where(mask, inputs * (65536 / kept), 0)


def _kept_of_65536(rate: float) -> int:
    return round((1 - rate) * 65536)


def dropout_mask(key: Array, shape: tuple[int, ...], rate: float) -> Array:
    """Returns the mask of entries that dropout keeps, each with probability `1 - rate`, to 2^-17.

    An entry of the mask depends on the key and on its position, not on the shape. Batches of other
    lengths or with fewer rows share the common part of the mask, so padding changes nothing. Four
    entries share a hash of 64 bits, where `jax.random.bernoulli` takes one hash for each;
    `benchmarks/NOTES.md` has the time that this saves.

    Args:
      key: random key of the mask.
      shape: `[batch, width]`, `[batch, length, width]` or `[batch, heads, queries, keys]`.
      rate: probability of a zero, at least 0 and less than 1.

    Returns:
      Booleans of that shape.

    Raises:
      ValueError: if `shape` has another number of axes.
    """
    if not 2 <= len(shape) <= 4:
        raise ValueError(
            f"shape {shape} has {len(shape)} axes; dropout takes arrays of two to four axes"
        )
    # The four entries lie along an axis whose size the model fixes: its width or its heads.
    axis = 1 if len(shape) == 4 else len(shape) - 1
    counted = [-(-size // 4) if i == axis else size for i, size in enumerate(shape)]
    index = [jax.lax.broadcasted_iota(jnp.uint32, counted, i) for i in range(len(shape))]
    # A counter is two words, with 16 bits for each axis.
    high, low = index[0] << 16, index[-1]
    if len(shape) > 2:
        high |= index[-2]
    if len(shape) > 3:
        low |= index[1] << 16
    words = threefry_2x32(jax.random.bits(key, (2,), jnp.uint32), jnp.stack([high, low]))
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    # The concatenation uses bytes, because booleans are concatenated more slowly.
    bits = [(half < _kept_of_65536(rate)).astype(jnp.uint8) for half in halves]
    return jax.lax.slice_in_dim(jnp.concatenate(bits, axis), 0, shape[axis], axis=axis) != 0
