"""The convolutions between the frames of speech and the encoder's layers."""

from __future__ import annotations

from typing import TypeVar

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models.speech_to_text.config import SpeechToTextConfig
from compacter_jax.nn.dense import Dtype

Length = TypeVar("Length", int, Array)


def shortened(length: Length, convolutions: int) -> Length:
    """Returns the number of frames after convolutions of stride 2, `floor((L - 1) / 2) + 1` each.

    Args:
      length: number of frames L, an int, or integers of any shape; 0 remains 0.
      convolutions: number of the convolutions.
    """
    for _ in range(convolutions):
        length = (length - 1) // 2 + 1
    return length


def prefix_mask(counts: Array, length: int) -> Array:
    """Returns the mask `[batch, length]` of int32, 1 at the first `counts` `[batch]` frames."""
    return (jnp.arange(length) < counts[:, None]).astype(jnp.int32)


class Convolutions(nn.Module):
    """Convolutions over time, each followed by a gated linear unit.

    A gated linear unit multiplies the first half of the channels by the sigmoid of the second.

    References:
      Dauphin et al., Language Modeling with Gated Convolutional Networks, ICML 2017,
      arXiv:1612.08083; Synnaeve et al., arXiv:1911.08460.
    """

    config: SpeechToTextConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Array, counts: Array | None) -> Array:
        """Computes `[batch, frames, feature_size] -> [batch, fewer frames, d_model]`.

        Args:
          features: the frames.
          counts: number of frames of each row, `[batch]` integers; what lies beyond them is set to
            zero before each convolution. None leaves it.
        """
        layers = _Layers(self.config, self.dtype, self.param_dtype, name="conv_layers")
        return layers(features, counts)


class _Layers(nn.Module):
    """The level `conv_layers` in the names of parameters: the convolutions "0", "1", ..."""

    config: SpeechToTextConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, counts: Array | None) -> Array:
        config, sizes = self.config, self.config.conv_kernel_sizes
        for i, size in enumerate(sizes):
            if counts is not None:
                present = jnp.arange(x.shape[1]) < shortened(counts, i)[:, None]
                x = jnp.where(present[..., None], x, 0)
            convolution = nn.Conv(
                config.conv_channels if i < len(sizes) - 1 else 2 * config.d_model,
                (size,),
                strides=2,
                padding=size // 2,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=initializers.normal(config.init_std),
                name=str(i),
            )
            x = nn.glu(convolution(x))
        return x
