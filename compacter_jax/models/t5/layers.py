"""The layers of T5, for encoder and decoder."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen import initializers
from jax import Array

from compacter_jax.models.t5.config import T5Config
from compacter_jax.nn.attention import (
    DecoderCache,
    KeyValue,
    StackInputs,
    attention,
    cached_key_value,
    split_heads,
)
from compacter_jax.nn.dense import Dtype, Embed, dense
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.norms import RMSNorm
from compacter_jax.nn.remat import Remat, rematted


class _T5Module(nn.Module):
    """Configuration and dtypes of every submodule, and the constructors of its children."""

    config: T5Config
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def dense(
        self, features: int, name: str, stddev: float, dtype: Dtype | None = None
    ) -> nn.Dense:
        return dense(
            features,
            use_bias=False,
            dtype=dtype or self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.initializer_factor * stddev),
            name=name,
        )

    def embed(self, num_embeddings: int, features: int, name: str, stddev: float) -> Embed:
        return Embed(
            num_embeddings,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=initializers.normal(self.config.initializer_factor * stddev),
            name=name,
        )

    def norm(self, name: str = "layer_norm") -> RMSNorm:
        return RMSNorm(
            self.config.layer_norm_epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            scale_init=initializers.constant(self.config.initializer_factor),
            name=name,
        )

    def dropout(self, x: Array, deterministic: bool, name: str = "dropout") -> Array:
        return Dropout(self.config.dropout_rate, name=name)(x, deterministic)

    def add(self, residual: Array, output: Array) -> Array:
        """Adds the residual at the end of a sub-layer."""
        return _wide(residual) + _wide(output)

    def child(self, module: type[_T5Module], name: str, **attributes: Any) -> Any:
        return module(self.config, self.dtype, self.param_dtype, name=name, **attributes)


def _wide(x: Array) -> Array:
    """Returns `x` in float32 if it is of float16, whose range the sub-layers of T5 exceed.

    The function is applied to the residual stream and, as in transformers, to the input of `wo`,
    which then also computes in float32. bfloat16 has the range of float32.
    """
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


class T5Attention(_T5Module):
    """Multi-head attention without scaling, with or without relative position biases.

    Attributes:
      bidirectional: True if keys after the query have their own buckets.
      has_position_bias: True if the module owns the embedding of relative positions (in the first
        layer of a stack).
    """

    bidirectional: bool = True
    has_position_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        states: Array | None,
        mask: Array | None,
        position_bias: Array | None,
        cached: KeyValue | None,
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Array | None, KeyValue]:
        """Attends to `states`, or to `x` itself if `states` is None.

        Args:
          x: `[batch, queries, d_model]`.
          states: states of the encoder, `[batch, keys, d_model]`, for cross-attention.
          mask: bias added to the scores, broadcast to `[batch, heads, queries, keys]`.
          position_bias: bias of the first layer, `[1, heads, queries, keys]`, or None.
          cached: keys and values. With `index` they are those of self-attention, and the ones of
            `x` are added at that position; without it, they are those of the encoder's states.
          index: position of the only query.
          deterministic: True for no dropout.

        Returns:
          `[batch, queries, d_model]`, the position bias, keys and values.
        """
        config = self.config
        inner = config.num_heads * config.d_kv

        def project(name: str, source: Array, stddev: float) -> Array:
            return split_heads(self.dense(inner, name, stddev)(source), config.num_heads)

        query = project("q", x, (config.d_model * config.d_kv) ** -0.5)
        source = x if states is None else states
        key, value = cached_key_value(
            lambda: (
                project("k", source, config.d_model**-0.5),
                project("v", source, config.d_model**-0.5),
            ),
            cached,
            index,
        )
        if position_bias is None and self.has_position_bias:
            position_bias = self.relative_bias(query.shape[2], key.shape[2], index)
        y = self.attend(query, key, value, (position_bias, mask), deterministic)
        y = self.dense(config.d_model, "o", inner**-0.5)(y.reshape(*x.shape[:-1], inner))
        return y, position_bias, (key, value)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        biases: tuple[Array | None, ...],
        deterministic: bool,
    ) -> Array:
        """Computes attention as `compacter_jax.nn.attention.attention`, with dropout."""

        def dropout(x: Array) -> Array:
            return self.dropout(x, deterministic)

        return attention(query, key, value, biases, dropout=dropout)

    def relative_bias(self, queries: int, keys: int, index: Array | None) -> Array:
        """Returns the bias `[1, heads, queries, keys]`, in the dtype of the parameters.

        Args:
          queries: number of queries.
          keys: number of keys.
          index: position of the first query; None for 0.
        """
        config = self.config
        first = 0 if index is None else index
        relative = jnp.arange(keys)[None, :] - (jnp.arange(queries) + first)[:, None]
        buckets = relative_position_bucket(
            relative,
            bidirectional=self.bidirectional,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        # The bias is not in `dtype`, because it is added to scores in float32.
        table = nn.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            param_dtype=self.param_dtype,
            embedding_init=initializers.normal(config.initializer_factor * config.d_model**-0.5),
            name="relative_attention_bias",
        )
        return jnp.moveaxis(table(buckets), -1, 0)[None]


class T5LayerSelfAttention(_T5Module):
    """A sub-layer: norm, self-attention, dropout, residual."""

    bidirectional: bool = True
    has_position_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        inputs: StackInputs,
        deterministic: bool,
    ) -> tuple[Array, Array | None, KeyValue]:
        attention = self.child(
            T5Attention,
            "SelfAttention",
            bidirectional=self.bidirectional,
            has_position_bias=self.has_position_bias,
        )
        y, position_bias, key_value = attention(
            self.norm()(x),
            None,
            inputs.masks[0],
            inputs.position_bias,
            inputs.cached[0],
            inputs.query_index,
            deterministic,
        )
        return self.add(x, self.dropout(y, deterministic)), position_bias, key_value


class T5LayerCrossAttention(_T5Module):
    """A sub-layer: norm, attention to the encoder's states, dropout, residual."""

    @nn.compact
    def __call__(
        self, x: Array, inputs: StackInputs, deterministic: bool
    ) -> tuple[Array, KeyValue]:
        attention = self.child(T5Attention, "EncDecAttention")
        y, _, key_value = attention(
            self.norm()(x),
            inputs.states,
            inputs.masks[1],
            None,
            inputs.cached[1],
            None,
            deterministic,
        )
        return self.add(x, self.dropout(y, deterministic)), key_value


class T5FeedForward(_T5Module):
    """The network `wo(dropout(act(wi(x))))`, or gated `wo(dropout(act(wi_0(x)) * wi_1(x)))`."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        config = self.config
        activation = config.feed_forward_activation()
        wi = lambda name: self.dense(config.d_ff, name, config.d_model**-0.5)  # noqa: E731
        y = (
            _wide(activation(wi("wi_0")(x))) * _wide(wi("wi_1")(x))
            if config.is_gated
            else _wide(activation(wi("wi")(x)))
        )
        dtype = jnp.float32 if x.dtype == jnp.float16 else None
        wo = self.dense(config.d_model, "wo", config.d_ff**-0.5, dtype)
        return wo(self.dropout(y, deterministic))


class T5LayerFeedForward(_T5Module):
    """A sub-layer: norm, feed-forward network, dropout, residual."""

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        y = self.child(T5FeedForward, "DenseReluDense")(self.norm()(x), deterministic)
        return self.add(x, self.dropout(y, deterministic))


class _StackModule(_T5Module):
    """A part of the encoder or the decoder."""

    is_decoder: bool = False
    has_position_bias: bool = False


class T5Sublayers(_StackModule):
    """The level `layer` in the names of parameters: sub-layers "0", "1" and, in a decoder, "2"."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        inputs: StackInputs,
        deterministic: bool,
    ) -> tuple[Array, Array | None, tuple[KeyValue, KeyValue | None]]:
        attention = self.child(
            T5LayerSelfAttention,
            "0",
            bidirectional=not self.is_decoder,
            has_position_bias=self.has_position_bias,
        )
        x, position_bias, own = attention(x, inputs, deterministic)
        crossed = None
        if self.is_decoder:
            x, crossed = self.child(T5LayerCrossAttention, "1")(x, inputs, deterministic)
        x = self.child(T5LayerFeedForward, "2" if self.is_decoder else "1")(x, deterministic)
        return x, position_bias, (own, crossed)


class T5Block(_StackModule):
    """One layer of a stack.

    Attributes:
      keep: True to return keys and values too. If a layer is recomputed in the backward pass,
        returned keys and values would be kept for it.
    """

    keep: bool = False

    @nn.compact
    def __call__(
        self, x: Array, inputs: StackInputs, deterministic: bool
    ) -> tuple[Array, Array | None, Any]:
        sublayers = self.child(
            T5Sublayers,
            "layer",
            is_decoder=self.is_decoder,
            has_position_bias=self.has_position_bias,
        )
        x, position_bias, key_value = sublayers(x, inputs, deterministic)
        return x, position_bias, key_value if self.keep else None


class T5Blocks(_StackModule):
    """The level `block` in the names of parameters: the layers "0", "1", ..."""

    remat: Remat = "off"
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        inputs: StackInputs,
        cache: DecoderCache | None,
        deterministic: bool,
    ) -> tuple[Array, list[Any]]:
        config = self.config
        num_layers = config.num_decoder_layers if self.is_decoder else config.num_layers
        # `deterministic` is argument 3 of T5Block.__call__, self counted.
        block = rematted(T5Block, self.remat, static_argnums=(3,))
        position_bias, key_values = inputs.position_bias, []
        for i in range(num_layers):
            layer = self.child(
                block,
                str(i),
                is_decoder=self.is_decoder,
                has_position_bias=i == 0,
                keep=self.keep,
            )
            cached: Any = (None, None) if cache is None else cache.of_layer(i)
            of_layer = inputs._replace(position_bias=position_bias, cached=cached)
            x, position_bias, key_value = layer(x, of_layer, deterministic)
            key_values.append(key_value)
        return x, key_values


class T5Stack(_StackModule):
    """The encoder or the decoder, from embedded tokens to normalised states."""

    remat: Remat = "off"
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        inputs: StackInputs,
        cache: DecoderCache | None,
        deterministic: bool,
    ) -> tuple[Array, list[Any]]:
        blocks = self.child(
            T5Blocks, "block", is_decoder=self.is_decoder, remat=self.remat, keep=self.keep
        )
        x = self.dropout(self.embedded(x), deterministic, "dropout_in")
        x, key_values = blocks(x, inputs, cache, deterministic)
        x = self.norm("final_layer_norm")(x)
        return self.dropout(x, deterministic, "dropout_out"), key_values

    def embedded(self, x: Array) -> Array:
        """Returns the embeddings that the first layer reads, which are those of the tokens."""
        return x


def relative_position_bucket(
    relative_position: Array, *, bidirectional: bool, num_buckets: int, max_distance: int
) -> Array:
    """Returns the bucket of each relative position: exact if near, logarithmic to `max_distance`.

    Args:
      relative_position: integers, position of the key minus that of the query.
      bidirectional: True for half of the buckets to hold keys after the query; otherwise these keys
        have distance 0.
      num_buckets: number of buckets.
      max_distance: distance from which all positions are in the last bucket.

    Returns:
      int32 of the same shape, from 0 to `num_buckets - 1`.

    References:
      arXiv:1910.10683, section 2.1.
    """
    if bidirectional:
        num_buckets //= 2
        bucket = (relative_position > 0).astype(jnp.int32) * num_buckets
        distance = jnp.abs(relative_position)
    else:
        bucket = jnp.zeros_like(relative_position, dtype=jnp.int32)
        distance = jnp.maximum(-relative_position, 0)
    table = _distance_buckets(num_buckets, max_distance)
    return bucket + jnp.asarray(table)[jnp.minimum(distance, max_distance)]


def _distance_buckets(num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each distance, `[max_distance + 1]` int32.

    NumPy computes them, because another logarithm may round to another bucket.
    """
    exact = num_buckets // 2
    distance = np.arange(max_distance + 1)
    ratio = np.maximum(distance, 1).astype(np.float32) / np.float32(exact)
    steps = np.log(ratio) / np.float32(math.log(max_distance / exact))
    far = exact + (steps * np.float32(num_buckets - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, num_buckets - 1)).astype(np.int32)
