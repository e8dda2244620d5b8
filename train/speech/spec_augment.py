"""SpecAugment: masks of time and of frequency over the features of speech, in training."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class SpecAugment:
    """Masks of features: stretches of time and bands of frequency that are set to zero.

    Zero is the mean of features that are normalised for each utterance. The width of each mask is
    drawn from 0 to its largest value, then its place.

    Attributes:
      time_masks: number of masks of time in each utterance.
      most_frames: largest number of frames of a mask of time.
      most_of_time: largest fraction of an utterance that a mask of time may cover.
      frequency_masks: number of masks of frequency in each utterance.
      most_bands: largest number of features of a mask of frequency, of 80; it is scaled to features
        of another width.

    References:
      Park et al., SpecAugment: A Simple Data Augmentation Method for Automatic Speech Recognition,
      Interspeech 2019, arXiv:1904.08779; the values are those of its policy LD, whose masks of time
      have a bound p, 0.2 here, for short utterances.
    """

    time_masks: int = 2
    most_frames: int = 100
    most_of_time: float = 0.2
    frequency_masks: int = 2
    most_bands: int = 27

    def __call__(self, features: Array, mask: Array, key: Array) -> Array:
        """Returns features with masked parts.

        The masks of a row depend on the key, its place in the batch and its own length alone, not
        on the padding.

        Args:
          features: `[rows, frames, width]`.
          mask: `[rows, frames]`, nonzero at frames of the utterance.
          key: key of `jax.random`.

        Returns:
          `[rows, frames, width]`, of the same dtype.
        """
        rows, frames, width = features.shape
        of_time, of_frequency = jax.random.split(key)
        lengths = jnp.sum(mask != 0, 1)
        longest = jnp.minimum(self.most_frames, (lengths * self.most_of_time).astype(jnp.int32))
        hidden = _masks(of_time, self.time_masks, lengths, longest, frames)
        widths = jnp.full(rows, width)
        widest = jnp.full(rows, self.most_bands * width // 80)
        bands = _masks(of_frequency, self.frequency_masks, widths, widest, width)
        return jnp.where(hidden[:, :, None] | bands[:, None, :], 0, features).astype(features.dtype)


def _masks(key: Array, count: int, lengths: Array, most: Array, size: int) -> Array:
    """Draws `count` masks for each row, `[rows, size]` booleans.

    Args:
      key: the key.
      count: number of masks.
      lengths: `[rows]`, the number of places of each row.
      most: `[rows]`, the largest width of a mask.
      size: number of places of the result.
    """
    drawn = jax.random.uniform(key, (2, len(lengths), count))
    widths = jnp.floor(drawn[0] * (most[:, None] + 1))
    starts = jnp.floor(drawn[1] * (lengths[:, None] - widths + 1))
    places = jnp.arange(size)
    inside = (places >= starts[..., None]) & (places < (starts + widths)[..., None])
    return inside.any(1)
