"""Attention, its biases and its cache."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple, Self, TypeAlias

import flax.struct
import jax
import jax.numpy as jnp
from jax import Array

from compacter_jax.nn.dense import Dtype


def split_heads(x: Array, heads: int) -> Array:
    """Reshapes `[batch, length, heads * size]` to `[batch, heads, length, size]`."""
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
    """Computes `softmax(scale * query key^T + biases) value`, the softmax in float32 at least.

    The axis of heads comes before that of lengths, so that every product of the forward and the
    backward pass multiplies contiguous matrices. With the axes the other way round, both passes
    take up to 1.7 times as long on a CPU (`benchmarks/NOTES.md`).

    Args:
      query: `[batch, heads, queries, size]`.
      key: `[batch, heads, keys, size]`; or fewer rows, each for equally many adjacent rows of the
        query, such as the hypotheses for one source.
      value: as many rows, `[batch, heads, keys, size]`.
      biases: added to the scores, each `[batch or 1, heads or 1, queries or 1, keys]` or None.
      scale: factor of the scores.
      dropout: function that zeroes some probabilities `[batch, heads, queries, keys]` and scales
        the others; it receives the probabilities times a positive number for each query.

    Returns:
      `[batch, queries, heads, size]`.
    """
    at_least_float32 = jnp.promote_types(query.dtype, jnp.float32)
    scores = _product("bhqd,bhkd->bhqk", query, key, at_least_float32)
    if scale != 1:
        scores *= scale
    for bias in biases:
        if bias is not None:
            scores += bias
    # The normalisation comes last, so that only one of the largest arrays is kept for the backward
    # pass, instead of the exponentials and the probabilities.
    largest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    exponentials = _exponentials(scores - largest, value.dtype)
    y = _product("bhqk,bhkd->bhqd", dropout(exponentials), value, at_least_float32)
    y /= exponentials.sum(-1, keepdims=True, dtype=at_least_float32)
    return jnp.moveaxis(y.astype(value.dtype), -3, -2)


def _product(equation: str, x: Array, y: Array, dtype: Dtype) -> Array:
    """Returns the sum of products of `x` and of `y`, each of whose rows adjacent rows of `x` share.

    Args:
      equation: the sum for equally many rows, as `jnp.einsum` takes it.
      x: the first factor.
      y: the second factor; its number of rows divides that of `x`.
      dtype: dtype of the result.
    """
    multiply = functools.partial(jnp.einsum, equation, preferred_element_type=dtype)
    if x.shape[0] == y.shape[0]:
        return multiply(x, y)
    copies = x.reshape(y.shape[0], -1, *x.shape[1:])
    found = jax.vmap(multiply, in_axes=(1, None), out_axes=1)(copies, y)
    return found.reshape(-1, *found.shape[2:])


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _exponentials(x: Array, dtype: Dtype) -> Array:
    """Returns `exp(x)` rounded to `dtype`; the derivative uses the rounded values, kept alone."""
    return jnp.exp(x).astype(dtype)


@_exponentials.defjvp
def _exponentials_jvp(
    dtype: Dtype, primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    (dx,) = tangents
    y = _exponentials(*primals, dtype)
    return y, (y.astype(dx.dtype) * dx).astype(dtype)


# (key, value), each [batch, heads, length, head size].
KeyValue = tuple[Array, Array]


class StackInputs(NamedTuple):
    """Everything that the layers of a stack are told beside hidden states.

    Attributes:
      masks: biases of self-attention and of cross-attention, each added to the scores and broadcast
        to `[batch, heads, queries, keys]`, or None.
      states: states of the encoder, `[batch, keys, width]`; None in an encoder.
      query_index: position of the only query, where keys and values are cached; None elsewhere.
      position_bias: bias of relative positions, `[1, heads, queries, keys]`, which the first layer
        makes for all; None before it has.
      cached: keys and values of a layer's self-attention and cross-attention, each None where
        nothing is cached or there is no such attention.
    """

    masks: tuple[Array | None, Array | None]
    states: Array | None = None
    query_index: Array | None = None
    position_bias: Array | None = None
    cached: tuple[KeyValue | None, KeyValue | None] = (None, None)


class DecoderCache(NamedTuple):
    """Keys and values of the decoder's attention, a pair per layer.

    Attributes:
      self_attention: pairs of the tokens so far, `[batch, heads, max_length, d_kv]`, zero beyond.
      cross_attention: pairs of the encoder's states, `[batch, heads, length, d_kv]`, or fewer rows,
        each for equally many adjacent rows of `self_attention`.
    """

    self_attention: tuple[KeyValue, ...]
    cross_attention: tuple[KeyValue, ...]

    @classmethod
    def with_room(cls, pairs: Iterable[tuple[KeyValue, KeyValue]], max_length: int) -> Self:
        """Returns a cache for `max_length` tokens that has none of them yet.

        Args:
          pairs: keys and values of self-attention and of cross-attention, for each layer.
          max_length: largest number of tokens.
        """

        def room(own: Array) -> Array:
            return jnp.zeros((*own.shape[:2], max_length, own.shape[3]), own.dtype)

        pairs = tuple(pairs)
        return cls(
            tuple((room(key), room(value)) for (key, value), _ in pairs),
            tuple(crossed for _, crossed in pairs),
        )

    @property
    def room(self) -> int:
        """Largest number of tokens that the cache holds."""
        return self.self_attention[0][0].shape[2]

    @property
    def source_shape(self) -> tuple[int, int]:
        """Number of rows, and length of the encoder's states."""
        return self.self_attention[0][0].shape[0], self.cross_attention[0][0].shape[2]

    @property
    def changing(self) -> tuple[KeyValue, ...]:
        """Arrays that a step changes."""
        return self.self_attention

    def of_layer(self, index: int) -> tuple[KeyValue, KeyValue]:
        """Returns the pairs of a layer's self-attention and cross-attention."""
        return self.self_attention[index], self.cross_attention[index]

    def after_step(self, pairs: Iterable[tuple[KeyValue, KeyValue]]) -> Self:
        """Returns the cache after a step that gave each layer these pairs."""
        return self.with_changing(tuple(own for own, _ in pairs))

    def with_changing(self, changing: tuple[KeyValue, ...]) -> Self:
        """Returns the cache with other values of `changing`."""
        return self._replace(self_attention=changing)

    def repeated(self, copies: int, *, share_source: bool) -> Self:
        """Returns the cache for adjacent copies of each row.

        Args:
          copies: number of copies.
          share_source: True to keep one row of the encoder's states for all copies of a row.
        """
        repeat = functools.partial(jnp.repeat, repeats=copies, axis=0)
        if share_source:
            return self.with_changing(jax.tree.map(repeat, self.self_attention))
        return jax.tree.map(repeat, self)

    def reordered(self, changing: tuple[KeyValue, ...], parents: Array) -> tuple[KeyValue, ...]:
        """Returns `changing` with its rows at `parents`, `[rows]` integers."""
        return jax.tree.map(lambda leaf: leaf.take(parents, 0, mode="clip"), changing)


@flax.struct.dataclass
class JoinedCache:
    """Keys and values of a decoder whose attention reads source and target at once.

    Attributes:
      layers: a pair per layer, `[batch, heads, source_length + max_length, size]`: those of the
        encoder's states first, then those of the tokens so far, zero beyond.
      source_length: length of the encoder's states.
    """

    layers: tuple[KeyValue, ...]
    source_length: int = flax.struct.field(pytree_node=False)

    @classmethod
    def with_room(cls, pairs: Iterable[KeyValue], source_length: int, max_length: int) -> Self:
        """Returns a cache for `max_length` tokens that has none of them yet.

        Args:
          pairs: keys and values of the encoder's states and of any tokens, for each layer.
          source_length: length of the encoder's states.
          max_length: largest number of tokens.
        """

        def room(joined: Array) -> Array:
            axes = ((0, 0), (0, 0), (0, max_length), (0, 0))
            return jnp.pad(joined[:, :, :source_length], axes)

        return cls(tuple((room(key), room(value)) for key, value in pairs), source_length)

    @property
    def room(self) -> int:
        """Largest number of tokens that the cache holds."""
        return self.layers[0][0].shape[2] - self.source_length

    @property
    def source_shape(self) -> tuple[int, int]:
        """Number of rows, and length of the encoder's states."""
        return self.layers[0][0].shape[0], self.source_length

    @property
    def changing(self) -> tuple[KeyValue, ...]:
        """Arrays that a step changes."""
        return self.layers

    def of_layer(self, index: int) -> tuple[KeyValue, None]:
        """Returns the pair of a layer, and None in place of a second attention's."""
        return self.layers[index], None

    def after_step(self, pairs: Iterable[KeyValue]) -> Self:
        """Returns the cache after a step that gave each layer these pairs."""
        return self.with_changing(tuple(pairs))

    def with_changing(self, changing: tuple[KeyValue, ...]) -> Self:
        """Returns the cache with other values of `changing`."""
        return dataclasses.replace(self, layers=changing)

    def repeated(self, copies: int, *, share_source: bool) -> Self:
        """Returns the cache for adjacent copies of each row, which cannot share the joined source.

        Args:
          copies: number of copies.
          share_source: ignored.
        """
        del share_source
        return jax.tree.map(functools.partial(jnp.repeat, repeats=copies, axis=0), self)

    def reordered(self, changing: tuple[KeyValue, ...], parents: Array) -> tuple[KeyValue, ...]:
        """Returns `changing` with the target's part of its rows at `parents`, `[rows]` integers.

        All hypotheses of a row have the same source, so its part stays where it is.
        """
        start = self.source_length

        def reorder(leaf: Array) -> Array:
            _, heads, _, width = leaf.shape
            size = (1, heads, self.room, width)

            # One gather from the whole array: XLA would merge a slice of it with the step's update,
            # and copy the source's part as well.
            def target_of(parent: Array) -> Array:
                return jax.lax.dynamic_slice(leaf, (parent, 0, start, 0), size)[0]

            own = jax.vmap(target_of)(parents)
            return jax.lax.dynamic_update_slice_in_dim(leaf, own, start, axis=2)

        return jax.tree.map(reorder, changing)


Cache: TypeAlias = DecoderCache | JoinedCache


def join_inputs(inputs: StackInputs, cache: JoinedCache | None) -> StackInputs:
    """Returns the inputs of layers whose attention reads source and target at once.

    Args:
      inputs: those of layers with two attentions.
      cache: cache of the decoder, or None.

    Returns:
      The inputs with one bias, `[batch or 1, 1, queries, source + target]`, in front of None; with
      zeros in place of the encoder's states at padding, so that nothing there has an effect; and
      with the position of the only query among the joined keys.
    """
    (causal, padding), states, index = inputs.masks, inputs.states, inputs.query_index
    assert causal is not None
    if padding is not None and states is not None:
        states = jnp.where(padding[:, 0, 0, :, None] == 0, states, 0)
    if padding is None:
        length = cache.source_length if states is None else states.shape[1]  # type: ignore[union-attr]
        padding = jnp.zeros((1, 1, 1, length), causal.dtype)
    rows, queries = max(causal.shape[0], padding.shape[0]), causal.shape[2]
    parts = [jnp.broadcast_to(x, (rows, 1, queries, x.shape[3])) for x in (padding, causal)]
    if cache is not None and index is not None:
        index = index + cache.source_length
    return inputs._replace(
        masks=(jnp.concatenate(parts, -1), None), states=states, query_index=index
    )


def cached_key_value(
    project: Callable[[], KeyValue], cached: KeyValue | None, index: Array | None
) -> KeyValue:
    """Returns the keys and values of an attention, from a cache or computed now.

    Args:
      project: function that computes keys and values of the present tokens or states.
      cached: cached keys and values. With `index` they are those of self-attention, or of source
        and target joined, and the ones of the present token are put in at that position; without
        it, they are those of the encoder's states, and nothing is computed. None computes all.
      index: position of the only query, an int32 scalar; None without a cache of self-attention.

    Returns:
      Keys and values, `[batch, heads, length, head size]` each.
    """
    if cached is not None and index is None:
        return cached
    key, value = project()
    if cached is None or index is None:
        return key, value
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=index, axis=2)
    old_key, old_value = cached
    return put(old_key, key.astype(old_key.dtype)), put(old_value, value.astype(old_value.dtype))


def bias_where(allowed: Array, dtype: Dtype) -> Array:
    """Returns 0 where allowed, else the least finite number: -inf would turn full rows into NaN."""
    dtype = jnp.promote_types(dtype, jnp.float32)
    return jnp.where(allowed, 0, jnp.finfo(dtype).min).astype(dtype)


def padding_bias(mask: Array | None, dtype: Dtype) -> Array | None:
    """Returns the bias `[batch, 1, 1, length]` of a padding mask `[batch, length]`.

    The bias is added to the scores instead of selecting among them. A row of padding alone thus has
    the gradient that PyTorch gives it, and a uniform softmax instead of NaN.
    """
    return None if mask is None else bias_where(mask[:, None, None, :] != 0, dtype)


def window_bias(length: int, mask: Array | None, window: int | None, dtype: Dtype) -> Array | None:
    """Returns the bias that hides padding and keys far from the query.

    One mask of both, for the sum of two least numbers would be -inf, and NaN in a row without keys.

    Args:
      length: number of queries and of keys.
      mask: `[batch, length]`, zero at padding; None for no padding.
      window: largest distance of a key that a query attends to; None for no limit.
      dtype: dtype of the hidden states.

    Returns:
      `[batch or 1, 1, length or 1, length]`, or None if nothing is hidden.
    """
    if window is None or window >= length - 1:
        return padding_bias(mask, dtype)
    positions = jnp.arange(length)
    allowed = (jnp.abs(positions[:, None] - positions) <= window)[None, None]
    if mask is not None:
        allowed = allowed & (mask[:, None, None, :] != 0)
    return bias_where(allowed, dtype)


def causal_bias(
    length: int, mask: Array | None, cache: Cache | None, index: Array | None, dtype: Dtype
) -> Array:
    """Returns the bias `[1 or batch, 1, length, keys]` that hides later tokens and padding."""
    if cache is not None and index is not None:
        keys = cache.room
        bias = bias_where(jnp.arange(keys)[None, None, None, :] <= index, dtype)
        return jnp.where((index >= 0) & (index < keys), bias, jnp.nan)
    positions = jnp.arange(length)
    allowed = positions[None, :] <= positions[:, None]
    if mask is not None:
        allowed = allowed & (mask[:, None, None, :] != 0)
    return bias_where(allowed if mask is not None else allowed[None, None], dtype)
