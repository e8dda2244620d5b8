"""The end of a sub-layer: the sum with the residual."""

from __future__ import annotations

import flax.linen as nn
from jax import Array

from compacter_jax.nn.norms import LayerNorm


class Residual(nn.Module):
    """The end of a sub-layer, without parameters: the sum with the residual, and a norm of it."""

    @nn.compact
    def __call__(self, residual: Array, output: Array, norm: LayerNorm | None = None) -> Array:
        x = residual + output
        return x if norm is None else norm(x)
