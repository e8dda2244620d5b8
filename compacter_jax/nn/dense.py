"""Dense layers and embeddings, also with weights of 8 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
from jax import Array

from compacter_jax.nn.quantize import is_quantized, matmul, rows_of

Dtype = Any


def dense(features: int, **attributes: Any) -> nn.Dense:
    """Returns a dense layer of flax, whose kernel may be a `QuantizedArray`."""
    return nn.Dense(features, promote_dtype=_promote, dot_general=_dot_general, **attributes)


def _promote(*args: Any, dtype: Dtype | None = None, inexact: bool = True) -> list[Any]:
    """Promotes arrays as flax's `promote_dtype`, and ignores each `QuantizedArray`."""
    plain = [None if is_quantized(x) else x for x in args]
    promoted = promote_dtype(*plain, dtype=dtype, inexact=inexact)
    return [x if is_quantized(x) else y for x, y in zip(args, promoted, strict=True)]


def _dot_general(x: Array, kernel: Any, *args: Any, **keywords: Any) -> Array:
    if is_quantized(kernel):
        return matmul(x, kernel)
    return jax.lax.dot_general(x, kernel, *args, **keywords)


class Embed(nn.Embed):
    """Embeddings as in flax; the table may be a `QuantizedArray`.

    An id that the table does not have, negative ones included, gives a row of NaN.
    """

    def __call__(self, inputs: Array) -> Array:  # [...] integers -> [..., features]
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"ids have dtype {inputs.dtype}; they must be integers")
        table: Any = self.embedding
        if is_quantized(table):
            return table.rows(inputs, canonicalize_dtype(table.scale, dtype=self.dtype))
        (table,) = promote_dtype(table, dtype=self.dtype, inexact=False)
        return rows_of(table, inputs)

    def attend(self, query: Array) -> Array:  # [..., features] -> [..., num_embeddings]
        return tied_logits(query, self.embedding, dtype=self.dtype)


def tied_logits(x: Array, table: Any, *, dtype: Dtype | None) -> Array:
    """Returns the product of `x` `[…, features]` and `table^T`, `table` `[vocab, features]`."""
    x, table = _promote(x, table, dtype=dtype)
    if is_quantized(table):
        return matmul(x, table.transposed())
    if x.ndim == 3 and x.shape[1] == 1:
        # For the next token of each row, reading the table takes most of the time. A CPU reads the
        # table faster along its rows (`benchmarks/NOTES.md`).
        return jnp.einsum("vf,btf->vbt", table, x).transpose(1, 2, 0)
    return jnp.dot(x, table.T)


class LogitsBias(nn.Module):
    """A bias of the logits, initially zero."""

    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., vocab] -> [..., vocab]
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        x, bias = promote_dtype(x, bias, dtype=self.dtype)
        return x + bias


# The bound method `nn.Module.param` of the module that owns a parameter.
ParamFunction = Callable[..., Array]


# The initialiser of PyTorch's linear layers, uniform within 1 / sqrt(in).
linear_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
