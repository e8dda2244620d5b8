"""The layers of the encoder-decoders of the BART line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models.seq2seq.config import Seq2SeqConfig
from compacter_jax.models.seq2seq.positions import m2m_positions, marian_positions
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
from compacter_jax.nn.norms import LayerNorm
from compacter_jax.nn.remat import Remat, rematted
from compacter_jax.nn.residual import Residual

# The first rows of learned positions belong to no position.
LEARNED_OFFSET = 2


class _Seq2SeqModule(nn.Module):
    """Configuration and dtypes of every submodule, and the constructors of its children."""

    config: Seq2SeqConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    is_decoder: bool = False

    def dense(self, features: int, name: str) -> nn.Dense:
        return dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.init_std),
            name=name,
        )

    def norm(self, name: str) -> LayerNorm:
        return LayerNorm(1e-5, dtype=self.dtype, param_dtype=self.param_dtype, name=name)

    def dropout(self, x: Array, rate: float, deterministic: bool, name: str = "dropout") -> Array:
        return Dropout(rate, name=name)(x, deterministic)

    def child(self, module: type[_Seq2SeqModule], name: str, **attributes: Any) -> Any:
        return module(
            self.config,
            self.dtype,
            self.param_dtype,
            is_decoder=self.is_decoder,
            name=name,
            **attributes,
        )


class Seq2SeqAttention(_Seq2SeqModule):
    """Multi-head attention, with its output projection."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        states: Array | None,
        mask: Array | None,
        cached: KeyValue | None,
        index: Array | None,
        deterministic: bool,
    ) -> tuple[Array, KeyValue]:
        """Attends to `states`, or to `x` itself if `states` is None.

        Args:
          x: `[batch, queries, d_model]`.
          states: states of the encoder, `[batch, keys, d_model]`, for cross-attention.
          mask: bias added to the scores, broadcast to `[batch, heads, queries, keys]`.
          cached: keys and values, see `cached_key_value`.
          index: position of the only query.
          deterministic: True for no dropout.

        Returns:
          `[batch, queries, d_model]`, and keys and values.
        """
        config = self.config
        of_encoder, of_decoder = config.encoder_attention_heads, config.decoder_attention_heads
        heads = of_decoder if self.is_decoder else of_encoder

        def project(name: str, source: Array) -> Array:
            return split_heads(self.dense(config.d_model, name)(source), heads)

        source = x if states is None else states
        query = project("q_proj", x)
        key, value = cached_key_value(
            lambda: (project("k_proj", source), project("v_proj", source)), cached, index
        )
        y = self.attend(query, key, value, (mask,), deterministic)
        return self.dense(config.d_model, "out_proj")(y.reshape(x.shape)), (key, value)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        biases: tuple[Array | None, ...],
        deterministic: bool,
    ) -> Array:
        """Computes attention as `compacter_jax.nn.attention.attention`, scaled, with dropout."""

        def dropout(x: Array) -> Array:
            return self.dropout(x, self.config.attention_dropout, deterministic)

        return attention(query, key, value, biases, scale=query.shape[-1] ** -0.5, dropout=dropout)


# Sub-layer -> name of its norm.
_NORMS = {
    "self_attn": "self_attn_layer_norm",
    "encoder_attn": "encoder_attn_layer_norm",
    "feed_forward": "final_layer_norm",
}


class Seq2SeqLayer(_Seq2SeqModule):
    """One layer of a stack.

    Attributes:
      keep: True to return keys and values too. If a layer is recomputed in the backward pass,
        returned keys and values would be kept for it.
    """

    keep: bool = False

    @nn.compact
    def __call__(self, x: Array, inputs: StackInputs, deterministic: bool) -> tuple[Array, Any]:
        masks, cached = inputs.masks, inputs.cached

        def attend(name: str, states: Array | None, *more: Any) -> Callable[[Array], Any]:
            attention = self.child(Seq2SeqAttention, name)
            return lambda x: attention(x, states, *more, deterministic)

        own_attention = attend("self_attn", None, masks[0], cached[0], inputs.query_index)
        x, own = self.sublayer("self_attn", x, own_attention, deterministic)
        crossed = None
        if self.is_decoder:
            to_states = attend("encoder_attn", inputs.states, masks[1], cached[1], None)
            x, crossed = self.sublayer("encoder_attn", x, to_states, deterministic)
        x, _ = self.sublayer(
            "feed_forward", x, lambda x: (self.feed_forward(x, deterministic), None), deterministic
        )
        if x.dtype == jnp.float16 and not self.is_decoder:  # as in transformers
            most = float(jnp.finfo(x.dtype).max) - 1000
            x = jnp.clip(x, -most, most)
        return x, (own, crossed) if self.keep else None

    def sublayer(
        self, name: str, x: Array, run: Callable[[Array], Any], deterministic: bool
    ) -> tuple[Array, Any]:
        """Runs a sub-layer with its norm, its dropout and its residual.

        Args:
          name: name of the sub-layer.
          x: `[batch, length, d_model]`.
          run: function of the input that returns a pair of the output and anything else.
          deterministic: True for no dropout.

        Returns:
          `[batch, length, d_model]`, and the second result of `run`.
        """
        norm, is_before = self.norm(_NORMS[name]), self.config.normalize_before
        y, kept = run(norm(x) if is_before else x)
        y = self.dropout(y, self.config.dropout, deterministic, f"{name}_dropout")
        return Residual(name=f"{name}_residual")(x, y, None if is_before else norm), kept

    def feed_forward(self, x: Array, deterministic: bool) -> Array:
        """Computes `fc2(dropout(act(fc1(x))))`."""
        config = self.config
        inner = config.decoder_ffn_dim if self.is_decoder else config.encoder_ffn_dim
        y = config.activation()(self.dense(inner, "fc1")(x))
        y = self.dropout(y, config.activation_dropout, deterministic, "activation_dropout")
        return self.dense(config.d_model, "fc2")(y)


class Seq2SeqLayers(_Seq2SeqModule):
    """The level `layers` in the names of parameters: the layers "0", "1", ..."""

    remat: Remat = "off"
    keep: bool = False

    @nn.compact
    def __call__(
        self, x: Array, inputs: StackInputs, cache: DecoderCache | None, deterministic: bool
    ) -> tuple[Array, list[Any]]:
        config, key_values = self.config, []
        # `deterministic` is argument 3 of Seq2SeqLayer.__call__, self counted.
        layer = rematted(Seq2SeqLayer, self.remat, static_argnums=(3,))
        for i in range(config.decoder_layers if self.is_decoder else config.encoder_layers):
            cached: Any = (None, None) if cache is None else cache.of_layer(i)
            run = self.child(layer, str(i), keep=self.keep)
            x, key_value = run(x, inputs._replace(cached=cached), deterministic)
            key_values.append(key_value)
        return x, key_values


class Seq2SeqStack(_Seq2SeqModule):
    """The encoder or the decoder, from embedded tokens to states."""

    remat: Remat = "off"
    keep: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        ids: Array,
        inputs: StackInputs,
        cache: DecoderCache | None,
        deterministic: bool,
    ) -> tuple[Array, list[Any]]:
        x = self.embedded(x, ids, inputs.query_index, None if cache is None else cache.room)
        x = self.dropout(x, self.config.dropout, deterministic)
        layers = self.child(Seq2SeqLayers, "layers", remat=self.remat, keep=self.keep)
        x, key_values = layers(x, inputs, cache, deterministic)
        return self.norm("layer_norm")(x) if self.config.last_norms else x, key_values

    def embedded(self, x: Array, ids: Array, index: Array | None, room: int | None) -> Array:
        """Returns what the first layer reads, but for dropout: tokens and positions, normalised.

        Args:
          x: embedded tokens, `[batch, length, d_model]`.
          ids: the tokens, `[batch, length]`.
          index: position of the only token in a cache; None for whole rows.
          room: largest number of tokens in the cache.
        """
        config, length = self.config, ids.shape[1]
        if config.positions == "learned":
            table = Embed(
                config.max_position_embeddings + LEARNED_OFFSET,
                config.d_model,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                embedding_init=initializers.normal(config.init_std),
                name="embed_positions",
            )
            x += table((0 if index is None else index) + jnp.arange(length) + LEARNED_OFFSET)
        elif config.positions == "marian":
            x += marian_positions(length, config.d_model, index, room, x.dtype)
        else:
            x += m2m_positions(ids, config.d_model, config.pad_token_id, index, room, x.dtype)
        return self.norm("layernorm_embedding")(x) if config.normalize_embedding else x
