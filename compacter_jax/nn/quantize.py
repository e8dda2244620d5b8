"""Weights of eight bits: integers, and for every output channel a scale that they share.

A weight `w` is stored as `q = round(w / scale)`, `scale = max |w| / 127` over its channel, so that
`|w - scale q| <= scale / 2`: at most 1/254 of the channel's largest weight. The scale is of an
output channel, so a product multiplies by it afterwards, `x w = (x q) scale`, and no floating-point
copy of more than the one weight at work is ever made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax import Array

Dtype = Any
_LARGEST = 127  # of int8, the same on both sides of zero


@flax.struct.dataclass
class QuantizedArray:
    """A matrix `values * scale`; in a tree of parameters it stands where the matrix did.

    Attributes:
      values: int8, of the matrix' shape.
      scale: float32, `[1, out]` of a kernel `[in, out]`, `[vocab, 1]` of embeddings.
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Of the matrix."""
        return self.values.ndim

    @property
    def size(self) -> int:
        """Numbers in the matrix; the scales do not count."""
        return self.values.size

    def transposed(self) -> QuantizedArray:
        """The transpose."""
        return QuantizedArray(self.values.T, self.scale.T)

    def dequantized(self, dtype: Dtype = jnp.float32) -> Array:
        """The matrix itself."""
        return (self.values * self.scale).astype(dtype)

    def rows(self, ids: Array, dtype: Dtype) -> Array:
        """The rows `ids` `[…]` of embeddings, `[…, width]`; NaN for an id that has no row."""
        return (rows_of(self.values, ids) * rows_of(self.scale, ids)).astype(dtype)


def quantize(weight: Any, axis: int) -> QuantizedArray:
    """The nearest matrix of eight bits, on the host if `weight` is there.

    Args:
      weight: a floating-point matrix.
      axis: that a channel runs along: 0 of a kernel `[in, out]`, 1 of embeddings.
    """
    numpy: Any = jnp if isinstance(weight, Array) else np
    weight = weight.astype(jnp.float32)
    largest = numpy.max(numpy.abs(weight), axis=axis, keepdims=True)
    scale = numpy.where(largest == 0, 1, largest / _LARGEST).astype(jnp.float32)
    return QuantizedArray(numpy.round(weight / scale).astype(jnp.int8), scale)


def matmul(x: Array, kernel: QuantizedArray) -> Array:
    """`[…, in] -> […, out]` in the dtype of `x`; the scales are multiplied in float32."""
    y = jnp.matmul(x, kernel.values.astype(x.dtype))
    return (y * kernel.scale[0]).astype(x.dtype)


def rows_of(table: Any, ids: Any) -> Array:
    """The rows `ids` `[…]` of `table` `[rows, width]`, `[…, width]`.

    An id that is negative, or too large, gives NaN, or of integers the least of their type.
    """
    # Not `jnp.take`, where negative ids count from the end.
    return jnp.asarray(table).at[ids].get(mode="fill", wrap_negative_indices=False)


def is_quantized(leaf: Any) -> bool:
    """Whether it is a `QuantizedArray`: what tree functions are to take as one leaf."""
    return isinstance(leaf, QuantizedArray)


def check_float(params: Mapping[str, Any], doing: str) -> None:
    """ValueError if a parameter is quantised, which `doing` would lose bits of."""
    for path, leaf in flatten_dict(params, sep="/").items():
        if is_quantized(leaf):
            raise ValueError(
                f"{doing} wants the backbone's own weights, and {path} is of int8; take "
                "merge(trained, frozen) with the frozen half as it was before cast_frozen"
            )
