"""Layer norms that compute in float32 at least, and the residuals that they normalise."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype
from jax import Array

from compacter_jax.nn.dense import Dtype
from compacter_jax.nn.dtypes import at_least_float32


class _Norm(nn.Module):
    """A norm over the last axis, with its statistics in float32 at least.

    The product runs from left to right. Flax first multiplies the scale with one over the
    deviation, an array as large as the input that is kept for the backward pass
    (`benchmarks/NOTES.md`).

    Attributes:
      epsilon: number added to the mean square, as in PyTorch.
      dtype: dtype of the result; None promotes as flax does.
      param_dtype: dtype of the parameters.
      scale_init: initialiser of the scale.
    """

    epsilon: float
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Callable[..., Array] = nn.initializers.ones

    def _scaled(self, x: Array) -> Array:
        scale = self.param("scale", self.scale_init, (x.shape[-1],), self.param_dtype)
        inverse = jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + self.epsilon)
        return x * inverse * scale


class LayerNorm(_Norm):
    """Layer normalisation, `(x - mean) / sqrt(variance + epsilon) * scale + bias`.

    Attributes:
      use_bias: True to add a bias.
    """

    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., features] -> [..., features]
        dtype = canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        x = at_least_float32(x)
        # The variance is not computed as E[x^2] - E[x]^2, which cancels: states of BERT have a few
        # entries much larger than the rest.
        y = self._scaled(x - x.mean(-1, keepdims=True))
        if not self.use_bias:
            return y.astype(dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return (y + bias).astype(dtype)


class RMSNorm(_Norm):
    """Root mean square normalisation, `x / sqrt(mean(x^2) + epsilon) * scale`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., features] -> [..., features]
        dtype = canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        return self._scaled(at_least_float32(x)).astype(dtype)


class Residual(nn.Module):
    """The end of a sub-layer, without parameters: the sum with the residual, and a norm of it."""

    @nn.compact
    def __call__(self, residual: Array, output: Array, norm: LayerNorm | None = None) -> Array:
        x = residual + output
        return x if norm is None else norm(x)
