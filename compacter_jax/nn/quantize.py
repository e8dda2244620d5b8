"""Weights of eight bits: integers, and one scale for every output channel.

A weight `w` is stored as `q = round(w / scale)` with `scale = max |w| / 127` over its channel, so
`|w - scale q| <= scale / 2`: the error is at most 1/254 of the channel's largest weight. The scale
belongs to an output channel, so a product applies it last, `x w = (x q) scale`. At most one weight
at a time has a floating-point copy.
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
_LARGEST = 127  # the largest int8 used, the same on both sides of zero


@flax.struct.dataclass
class QuantizedArray:
    """A matrix `values * scale`; it takes the place of the matrix in a tree of parameters.

    Attributes:
      values: int8, of the matrix' shape.
      scale: float32; `[1, out]` for a kernel `[in, out]`, `[vocab, 1]` for embeddings.
    """

    values: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the matrix."""
        return self.values.ndim

    @property
    def size(self) -> int:
        """Number of entries of the matrix, without the scales."""
        return self.values.size

    def transposed(self) -> QuantizedArray:
        """Returns the transposed matrix."""
        return QuantizedArray(self.values.T, self.scale.T)

    def dequantized(self, dtype: Dtype = jnp.float32) -> Array:
        """Returns the matrix as a floating-point array."""
        return (self.values * self.scale).astype(dtype)

    def rows(self, ids: Array, dtype: Dtype) -> Array:
        """Returns the rows `ids` `[…]` of embeddings, `[…, width]`; NaN for an id without a row."""
        return (rows_of(self.values, ids) * rows_of(self.scale, ids)).astype(dtype)


def quantize(weight: Any, axis: int) -> QuantizedArray:
    """Returns the nearest matrix of eight bits, computed by NumPy if `weight` is a NumPy array.

    Args:
      weight: floating-point matrix.
      axis: axis along which a channel runs: 0 for a kernel `[in, out]`, 1 for embeddings.
    """
    numpy: Any = jnp if isinstance(weight, Array) else np
    weight = weight.astype(jnp.float32)
    largest = numpy.max(numpy.abs(weight), axis=axis, keepdims=True)
    scale = numpy.where(largest == 0, 1, largest / _LARGEST).astype(jnp.float32)
    return QuantizedArray(numpy.round(weight / scale).astype(jnp.int8), scale)


def matmul(x: Array, kernel: QuantizedArray) -> Array:
    """Multiplies `[…, in] -> […, out]` in the dtype of `x`; applies the scales in float32."""
    y = jnp.matmul(x, kernel.values.astype(x.dtype))
    return (y * kernel.scale[0]).astype(x.dtype)


def rows_of(table: Any, ids: Any) -> Array:
    """Returns the rows `ids` `[…]` of `table` `[rows, width]`, as `[…, width]`.

    An id that is negative or too large gives NaN; in a table of integers, it gives the smallest
    integer of the type.
    """
    # `jnp.take` counts negative ids from the end.
    return jnp.asarray(table).at[ids].get(mode="fill", wrap_negative_indices=False)


def is_quantized(leaf: Any) -> bool:
    """Returns True for a `QuantizedArray`, which tree functions must treat as one leaf."""
    return isinstance(leaf, QuantizedArray)


def check_float(params: Mapping[str, Any], doing: str) -> None:
    """Raises ValueError if a parameter is quantised, so that `doing` would lose precision."""
    for path, leaf in flatten_dict(params, sep="/").items():
        if is_quantized(leaf):
            raise ValueError(
                f"{doing} needs the backbone's original weights, but {path} is int8; use "
                "merge(trained, frozen) with the frozen half from before cast_frozen"
            )
