"""What the backbones are built of: dense layers, embeddings, and layers that are recomputed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import canonicalize_dtype, promote_dtype
from jax import Array

from compacter_jax.quantize import is_quantized, matmul, rows_of

Dtype = Any
Remat: TypeAlias = Literal["off", "full", "dots"]
# What of a layer is kept for the backward pass, where it is recomputed; None keeps its input alone.
_KEPT = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


def dense(features: int, **attributes: Any) -> nn.Dense:
    """A dense layer of flax, whose kernel may be a `QuantizedArray`."""
    return nn.Dense(features, promote_dtype=_promote, dot_general=_dot_general, **attributes)


def _promote(*args: Any, dtype: Dtype | None = None, inexact: bool = True) -> list[Any]:
    """As flax's `promote_dtype`; a `QuantizedArray` stays what it is, and has no say."""
    plain = [None if is_quantized(x) else x for x in args]
    promoted = promote_dtype(*plain, dtype=dtype, inexact=inexact)
    return [x if is_quantized(x) else y for x, y in zip(args, promoted, strict=True)]


def _dot_general(x: Array, kernel: Any, *args: Any, **keywords: Any) -> Array:
    if is_quantized(kernel):
        return matmul(x, kernel)
    return jax.lax.dot_general(x, kernel, *args, **keywords)


class Embed(nn.Embed):
    """Embeddings, as flax's; the table may be a `QuantizedArray`.

    An id that the table does not have, a negative one included, gives a row of NaN.
    """

    def __call__(self, inputs: Array) -> Array:  # [...] integers -> [..., features]
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ValueError(f"ids are {inputs.dtype}; they must be integers")
        table: Any = self.embedding
        if is_quantized(table):
            return table.rows(inputs, canonicalize_dtype(table.scale, dtype=self.dtype))
        (table,) = promote_dtype(table, dtype=self.dtype, inexact=False)
        return rows_of(table, inputs)

    def attend(self, query: Array) -> Array:  # [..., features] -> [..., num_embeddings]
        return tied_logits(query, self.embedding, dtype=self.dtype)


def check_ids(name: str, ids: Any, size: int, field: str) -> None:
    """Checks that a table of `size` rows has every id, as far as the values are known.

    The values of a tracer are not looked at: `Embed` gives NaN for an id that it does not have.

    Args:
      name: of the argument.
      ids: integers of any shape.
      size: of the table.
      field: of the configuration that says `size`.

    Raises:
      ValueError: if an id is negative, or `size` or more.
    """
    if isinstance(ids, jax.core.Tracer) or not getattr(ids, "is_fully_addressable", True):
        return
    values = np.asarray(ids)
    outside = (values < 0) | (values >= size)
    if not outside.any():
        return
    place = tuple(np.argwhere(outside)[0].tolist())
    value = int(values[place])
    at = f" at {place}" if place else ""
    hint = "; -100 marks labels that a loss passes over: give pad_token_id" if value == -100 else ""
    raise ValueError(f"{name} has {value}{at}; use 0 to {field} - 1 = {size - 1}{hint}")


def tied_logits(x: Array, table: Any, *, dtype: Dtype | None) -> Array:
    """`x` `[…, features]` times the transpose of embeddings `[vocab, features]`, `[…, vocab]`."""
    x, table = _promote(x, table, dtype=dtype)
    if is_quantized(table):
        return matmul(x, table.transposed())
    if x.ndim == 3 and x.shape[1] == 1:
        # The next token of each row: what takes the time is to read the table, which a CPU does
        # faster along its rows (`benchmarks/NOTES.md`).
        return jnp.einsum("vf,btf->vbt", table, x).transpose(1, 2, 0)
    return jnp.dot(x, table.T)


class _Norm(nn.Module):
    """Normalises the last axis, its statistics in float32 at least.

    What is multiplied is multiplied from left to right. Flax multiplies the scale with one over the
    deviation first, which is an array as large as the input, and kept for the backward pass
    (`benchmarks/NOTES.md`).

    Attributes:
      epsilon: added to the mean square, as in PyTorch.
      dtype: of the result; None promotes as flax does.
      param_dtype: of the parameters.
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
    """`(x - mean) / sqrt(variance + epsilon) * scale + bias`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., features] -> [..., features]
        dtype = canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        x = _at_least_float32(x)
        # Not E[x^2] - E[x]^2, which cancels: states of BERT have a few entries much larger than the
        # rest.
        y = self._scaled(x - x.mean(-1, keepdims=True))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return (y + bias).astype(dtype)


class RMSNorm(_Norm):
    """`x / sqrt(mean(x^2) + epsilon) * scale`."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [..., features] -> [..., features]
        dtype = canonicalize_dtype(x, jnp.zeros((), self.param_dtype), dtype=self.dtype)
        return self._scaled(_at_least_float32(x)).astype(dtype)


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def split_heads(x: Array, heads: int) -> Array:
    """`[batch, length, heads * size]` -> `[batch, heads, length, size]`."""
    return jnp.moveaxis(x.reshape(*x.shape[:-1], heads, -1), -2, -3)


def attention(
    query: Array,
    key: Array,
    value: Array,
    biases: Iterable[Array | None] = (),
    *,
    scale: float = 1.0,
    dropout: Callable[[Array], Array] = lambda x: x,
) -> Array:
    """`softmax(scale * query key^T + biases) value`, the softmax in float32 at least.

    Heads come before lengths, so that every product of the forward and of the backward pass is of
    matrices that lie in one piece: with the axes the other way round, on a CPU, both take up to
    1.7 times as long (`benchmarks/NOTES.md`).

    Args:
      query: `[batch, heads, queries, size]`.
      key: `[batch, heads, keys, size]`.
      value: as `key`.
      biases: added to the scores, each `[batch or 1, heads or 1, queries or 1, keys]` or None.
      scale: of the scores.
      dropout: applied to the probabilities `[batch, heads, queries, keys]`, times a number for
        each query: it zeroes some and scales the others.

    Returns:
      `[batch, queries, heads, size]`.
    """
    at_least_float32 = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=at_least_float32)
    if scale != 1:
        scores *= scale
    for bias in biases:
        if bias is not None:
            scores += bias
    # What makes the sum 1 comes last, so that of the largest arrays one is kept for the backward
    # pass, and not the exponentials and the probabilities both.
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    exponentials = _exponentials(scores - largest, value.dtype)
    y = jnp.einsum(
        "bhqk,bhkd->bhqd",
        dropout(exponentials),
        value,
        preferred_element_type=at_least_float32,
    )
    y /= exponentials.sum(-1, keepdims=True, dtype=at_least_float32)
    return jnp.moveaxis(y.astype(value.dtype), -3, -2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _exponentials(x: Array, dtype: Dtype) -> Array:
    """`exp(x)` rounded to `dtype`; its derivative is by what was rounded, which alone is kept."""
    return jnp.exp(x).astype(dtype)


@_exponentials.defjvp
def _exponentials_jvp(
    dtype: Dtype, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (dx,) = tangents
    y = _exponentials(*primals, dtype)
    return y, (y.astype(dx.dtype) * dx).astype(dtype)


def rematted(layer: type[nn.Module], remat: Remat, *, static_argnums: tuple[int, ...]) -> Any:
    """`layer`, or one that the backward pass computes again.

    Args:
      layer: a class of modules.
      remat: "off"; "full", which keeps a layer's input alone; or "dots", which keeps the products
        with weights, too, and computes again what is between them.
      static_argnums: arguments of a call that are no arrays, self counted.

    Raises:
      ValueError: if `remat` is something else.
    """
    if remat == "off":
        return layer
    if remat not in _KEPT:
        raise ValueError(f"unknown remat={remat!r}; use 'off', 'full' or 'dots'")
    return nn.remat(layer, policy=_KEPT[remat], static_argnums=static_argnums)
