"""The layers of BERT, from embeddings to heads."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen import initializers
from jax import Array

from compacter_jax.models.bert.config import BertConfig
from compacter_jax.nn.activations import get_activation
from compacter_jax.nn.attention import attention, split_heads
from compacter_jax.nn.dense import Dtype, Embed, dense, tied_logits
from compacter_jax.nn.dropout import Dropout
from compacter_jax.nn.norms import LayerNorm
from compacter_jax.nn.quantize import QuantizedArray
from compacter_jax.nn.remat import Remat, rematted


class _BertModule(nn.Module):
    """Configuration and dtypes of every submodule, and the constructors of its children."""

    config: BertConfig
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32

    def dense(self, features: int, name: str) -> nn.Dense:
        return dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.initializer_range),
            name=name,
        )

    def embed(self, num_embeddings: int, name: str) -> Embed:
        return Embed(
            num_embeddings,
            self.config.hidden_size,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=initializers.normal(self.config.initializer_range),
            name=name,
        )

    def layer_norm(self) -> LayerNorm:
        return LayerNorm(
            self.config.layer_norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="LayerNorm",
        )

    def child(self, module: type[_BertModule], name: str, **attributes: Any) -> _BertModule:
        return module(self.config, self.dtype, self.param_dtype, name=name, **attributes)


class BertEmbeddings(_BertModule):
    """The normalised sum of word, token type and position embeddings."""

    @nn.compact
    def __call__(
        self, input_ids: Array, token_type_ids: Array, position_ids: Array, deterministic: bool
    ) -> Array:  # [batch, length] each -> [batch, length, hidden]
        config = self.config
        x = self.embed(config.vocab_size, "word_embeddings")(input_ids)
        if config.pad_token_id is not None:
            # As with PyTorch's padding_idx, the embedding of the padding token gets no gradient.
            x = jnp.where(
                (input_ids == config.pad_token_id)[..., None], jax.lax.stop_gradient(x), x
            )
        x += self.embed(config.type_vocab_size, "token_type_embeddings")(token_type_ids)
        x += self.embed(config.max_position_embeddings, "position_embeddings")(position_ids)
        x = self.layer_norm()(x)
        return Dropout(config.hidden_dropout_prob, name="dropout")(x, deterministic)

    def word_table(self) -> Array | QuantizedArray:
        """Returns the word embeddings `[vocab, hidden]`, as they are stored."""
        return self.variables["params"]["word_embeddings"]["embedding"]


class BertSelfAttention(_BertModule):
    """Multi-head self-attention of a sequence, before the output projection."""

    @nn.compact
    def __call__(self, x: Array, states: Array, bias: Array | None, deterministic: bool) -> Array:
        """Attends from `x` `[batch, queries, hidden]` to `states` `[batch, keys, hidden]`."""
        config = self.config

        def project(name: str, source: Array) -> Array:
            return split_heads(
                self.dense(config.hidden_size, name)(source), config.num_attention_heads
            )

        query, key, value = (
            project(name, source)
            for name, source in (("query", x), ("key", states), ("value", states))
        )
        return self.attend(query, key, value, (bias,), deterministic).reshape(x.shape)

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        biases: tuple[Array | None, ...],
        deterministic: bool,
    ) -> Array:
        """Computes attention as `compacter_jax.nn.attention.attention`, with dropout."""
        rate = self.config.attention_probs_dropout_prob
        dropout = Dropout(rate, name="dropout", deterministic=deterministic)
        scale = 1 / math.sqrt(query.shape[-1])
        return attention(query, key, value, biases, scale=scale, dropout=dropout)


class BertResidual(_BertModule):
    """The end of a sub-layer: projection to the hidden size, dropout, residual, layer norm."""

    @nn.compact
    def __call__(self, x: Array, residual: Array, deterministic: bool) -> Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        x = Dropout(self.config.hidden_dropout_prob, name="dropout")(x, deterministic)
        return self.add(residual, x, self.layer_norm())

    def add(self, residual: Array, output: Array, layer_norm: LayerNorm) -> Array:
        """Adds the residual and normalises the sum."""
        return layer_norm(output + residual)


class BertAttention(_BertModule):
    """Self-attention with its output projection and residual."""

    @nn.compact
    def __call__(self, x: Array, states: Array, bias: Array | None, deterministic: bool) -> Array:
        y = self.child(BertSelfAttention, "self")(x, states, bias, deterministic)
        return self.child(BertResidual, "output")(y, x, deterministic)


class BertIntermediate(_BertModule):
    """The first layer of the feed-forward network, with its activation."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        activation = get_activation(self.config.hidden_act)
        return activation(self.dense(self.config.intermediate_size, "dense")(x))


class BertLayer(_BertModule):
    """One layer: attention and feed-forward network.

    Attributes:
      first_only: True to return only the first token's state, `[batch, 1, hidden]`; of the other
        tokens, the layer computes only keys and values.
    """

    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        queries = x[:, :1] if self.first_only else x
        x = self.child(BertAttention, "attention")(queries, x, bias, deterministic)
        y = self.child(BertIntermediate, "intermediate")(x)
        return self.child(BertResidual, "output")(y, x, deterministic)


class BertLayers(_BertModule):
    """The layers in sequence, named "0", "1", ..."""

    remat: Remat = "off"
    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        # `deterministic` is argument 3 of BertLayer.__call__, self counted.
        layer = rematted(BertLayer, self.remat, static_argnums=(3,))
        last = self.config.num_hidden_layers - 1
        for i in range(last + 1):
            first_only = self.first_only and i == last
            x = self.child(layer, str(i), first_only=first_only)(x, bias, deterministic)
        return x


class BertEncoder(_BertModule):
    """The level `encoder` in the names of parameters."""

    remat: Remat = "off"
    first_only: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None, deterministic: bool) -> Array:
        layers = self.child(BertLayers, "layer", remat=self.remat, first_only=self.first_only)
        return layers(x, bias, deterministic)


class BertPooler(_BertModule):
    """The pooler: a dense layer and tanh on the first token's state."""

    @nn.compact
    def __call__(self, x: Array) -> Array:  # [batch, length, hidden] -> [batch, hidden]
        return jnp.tanh(self.dense(self.config.hidden_size, "dense")(x[:, 0]))


class BertTransform(_BertModule):
    """A dense layer, activation and layer norm before the projection to the vocabulary."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = self.dense(self.config.hidden_size, "dense")(x)
        return self.layer_norm()(get_activation(self.config.hidden_act)(x))


class BertPredictions(_BertModule):
    """The masked language model's logits over the vocabulary."""

    @nn.compact
    def __call__(self, x: Array, word_table: Array | QuantizedArray) -> Array:
        vocab_size = self.config.vocab_size
        x = self.child(BertTransform, "transform")(x)
        # The bias belongs to `predictions`, not to `decoder`, as in its Hugging Face name.
        bias = self.param("bias", initializers.zeros, (vocab_size,), self.param_dtype)
        if self.config.tie_word_embeddings:
            x, bias = nn.dtypes.promote_dtype(x, bias, dtype=self.dtype)
            return tied_logits(x, word_table, dtype=self.dtype) + bias
        decoder = dense(
            vocab_size,
            use_bias=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=initializers.normal(self.config.initializer_range),
            name="decoder",
        )
        x, bias = nn.dtypes.promote_dtype(decoder(x), bias, dtype=self.dtype)
        return x + bias


class BertMaskedLM(_BertModule):
    """The level `cls` in the names of parameters."""

    @nn.compact
    def __call__(self, x: Array, word_table: Array | QuantizedArray) -> Array:
        return self.child(BertPredictions, "predictions")(x, word_table)
